// The part of a map that the screen shows. A view is {x, y, zoom}: the map's point in the middle of the canvas, and how
// much it is enlarged; zoom 1 shows all points. A size is {width, height} of the canvas in CSS pixels.

export const MOST_ZOOM = 200;
const MARGIN = 16;  // CSS pixels around all points at zoom 1

// Return CSS pixels per unit of the map.
export function scaleOf(view, size, bounds) {
  const width = Math.max(bounds.right - bounds.left, 1e-3), height = Math.max(bounds.bottom - bounds.top, 1e-3);
  const fit = Math.min((size.width - 2 * MARGIN) / width, (size.height - 2 * MARGIN) / height);
  return Math.max(fit, 1) * view.zoom;
}

// Return the view that shows all points.
export function wholeView(bounds) {
  return {x: (bounds.left + bounds.right) / 2, y: (bounds.top + bounds.bottom) / 2, zoom: 1};
}

// Return a view within the limits: a zoom of 1 to MOST_ZOOM, and a middle among the points.
export function limitView(view, bounds) {
  return {
    x: clamp(view.x, bounds.left, bounds.right),
    y: clamp(view.y, bounds.top, bounds.bottom),
    zoom: clamp(view.zoom, 1, MOST_ZOOM),
  };
}

export function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

// Return where a point of the map is on the canvas, in CSS pixels.
export function toScreen(view, size, bounds, x, y) {
  const scale = scaleOf(view, size, bounds);
  return {x: (x - view.x) * scale + size.width / 2, y: (y - view.y) * scale + size.height / 2};
}

// Return the point of the map at a place of the canvas.
export function toMap(view, size, bounds, x, y) {
  const scale = scaleOf(view, size, bounds);
  return {x: (x - size.width / 2) / scale + view.x, y: (y - size.height / 2) / scale + view.y};
}

// Return the part of the map on the canvas: {left, right, top, bottom}.
export function shownRectangle(view, size, bounds) {
  const first = toMap(view, size, bounds, 0, 0), last = toMap(view, size, bounds, size.width, size.height);
  return {left: first.x, right: last.x, top: first.y, bottom: last.y};
}

// Return the view after a drag by CSS pixels: what was under the pointer stays under it.
export function panView(view, size, bounds, dx, dy) {
  const scale = scaleOf(view, size, bounds);
  return limitView({...view, x: view.x - dx / scale, y: view.y - dy / scale}, bounds);
}

// Return the view enlarged by a factor; the point of the map at a place of the canvas stays there.
export function zoomView(view, size, bounds, factor, x, y) {
  const fixed = toMap(view, size, bounds, x, y), zoom = clamp(view.zoom * factor, 1, MOST_ZOOM);
  const scale = scaleOf({...view, zoom}, size, bounds);
  const [dx, dy] = [x - size.width / 2, y - size.height / 2];
  return limitView({x: fixed.x - dx / scale, y: fixed.y - dy / scale, zoom}, bounds);
}

// Return the opacity of dots: less where there are many, so that dense places are told apart.
export function dotOpacity(count, zoom) {
  const least = count > 20000 ? 0.7 : 0.95;
  return Math.min(least * zoom ** 0.1, 0.95);
}

// Return the radius of dots in CSS pixels: smaller where there are many, larger where the map is enlarged.
export function dotRadius(count, zoom) {
  const least = count > 20000 ? 1.75 : count > 4000 ? 2.5 : 3.5;
  return Math.min(least * zoom ** 0.35, 9);
}
