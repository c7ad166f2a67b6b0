// What pointers do on the map: a mouse hovers, drags and clicks, one finger drags and taps, two fingers zoom.

const CLICK_REACH = {mouse: 4, touch: 9, pen: 6};  // CSS pixels that a click may move

// Listen to the pointers on an element. Places are CSS pixels from its upper left corner.
//   on: {isLasso(event), hover(place, event), leave(), pan(dx, dy), zoom(factor, place), click(place, type),
//        lasso(place), endLasso(isWhole)}: the lasso's places one after the other, and whether it was finished
export function listenToPointers(element, on) {
  const pointers = new Map();  // id -> the last place of each pointer that is down
  let start = null, isMoving = false, isLasso = false;

  function placeOf(event) {
    const {left, top} = element.getBoundingClientRect();
    return {x: event.clientX - left, y: event.clientY - top};
  }

  element.addEventListener("pointerdown", event => {
    if (event.pointerType === "mouse" && event.button !== 0) return;
    element.setPointerCapture(event.pointerId);
    const place = placeOf(event);
    pointers.set(event.pointerId, place);
    if (pointers.size === 1) {
      [start, isMoving, isLasso] = [place, false, on.isLasso(event)];
      on.leave();
    } else {  // a second finger: it is no click any more
      isMoving = true;
      if (isLasso) on.endLasso(false);
      isLasso = false;
    }
  });

  element.addEventListener("pointermove", event => {
    const place = placeOf(event), before = pointers.get(event.pointerId);
    if (before === undefined) {
      if (event.pointerType === "mouse") on.hover(place, event);
      return;
    }
    if (pointers.size === 2) {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, value]) => value);
      const middle = {x: (place.x + other.x) / 2, y: (place.y + other.y) / 2};
      on.pan((place.x - before.x) / 2, (place.y - before.y) / 2);
      const length = Math.max(Math.hypot(before.x - other.x, before.y - other.y), 1);
      on.zoom(Math.max(Math.hypot(place.x - other.x, place.y - other.y), 1) / length, middle);
    } else if (pointers.size === 1) {
      const reach = CLICK_REACH[event.pointerType] ?? CLICK_REACH.mouse;
      if (!isMoving && Math.hypot(place.x - start.x, place.y - start.y) >= reach) {
        isMoving = true;
        if (isLasso) on.lasso(start);
        else on.pan(before.x - start.x, before.y - start.y);  // what was held back until it was known to be a drag
      }
      if (isMoving && isLasso) on.lasso(place);
      else if (isMoving) on.pan(place.x - before.x, place.y - before.y);
      element.classList.toggle("moving", isMoving && !isLasso);
    }
    pointers.set(event.pointerId, place);
  });

  function end(event, isWhole) {
    if (!pointers.delete(event.pointerId) || pointers.size > 0) return;
    element.classList.remove("moving");
    if (isMoving && isLasso) on.endLasso(isWhole);
    else if (!isMoving && isWhole) on.click(start, event.pointerType);
    isLasso = false;
  }
  element.addEventListener("pointerup", event => end(event, true));
  element.addEventListener("pointercancel", event => end(event, false));
  element.addEventListener("pointerleave", event => {
    if (!pointers.has(event.pointerId)) on.leave();
  });

  element.addEventListener("wheel", event => {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : event.deltaMode === 2 ? 400 : 1;  // pixels, lines or pages
    const change = Math.min(Math.max(event.deltaY * lines, -240), 240);
    on.zoom(Math.exp(-change * 0.002), placeOf(event));
  }, {passive: false});
}
