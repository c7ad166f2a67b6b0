// What the page tells about images: the card beside the pointer, the pinned image, and the selection.
// Texts of the data are only ever set as text, never as HTML.

import {formatCount, formatNumber, groupOf, neighborsOf, valueText, whyNoPicture} from "./points.mjs";
import {compareCounts} from "./filters.mjs";

const MOST_LISTED = 100;

// Return an element. properties: of the element, or attributes where their names hold "-", or "role";
// children: elements and texts
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

// Return a short text that tells a point: its class, or its set where it has no class.
export function labelOf(points, row) {
  const column = points.columns.find(each => each.key === "class");
  return (column && valueText(column, row)) || points.setColumn.values[points.setColumn.codes[row]];
}

// Return a list of all that is known about a point. Its source is in the line of its set.
function factList(points, row) {
  const set = points.sets[points.setColumn.codes[row]], facts = [["set", `${set.name} (${set.kind})`]];
  for (const column of points.columns) {
    const value = valueText(column, row);
    if (column.key !== "set" && column.key !== "source" && value) facts.push([column.title, value]);
  }
  const group = groupOf(points, row);
  if (group) facts.push(["group", group]);
  return make("dl", {className: "facts"},
    ...facts.flatMap(([name, value]) => [make("dt", {textContent: name}), make("dd", {textContent: value})]));
}

// Return a point's picture, or why it has none.
function pictureOrReason(points, sprites, row, size) {
  const why = whyNoPicture(points, row);
  if (why) return make("p", {className: "soft", textContent: `drawn as a dot: ${why}`});
  return sprites.element(row, points.names[row], size);
}

// Show or hide the card beside the pointer. card: the element; x, y: CSS pixels of the window; row -1 hides it
export function showCard(card, points, sprites, row, x, y) {
  card.hidden = row < 0;
  if (row < 0) {
    delete card.dataset.row;
    return;
  }
  if (card.dataset.row !== String(row)) {
    card.dataset.row = row;
    card.replaceChildren(pictureOrReason(points, sprites, row, 192), make("strong", {textContent: points.names[row]}),
      factList(points, row));
  }
  const {offsetWidth, offsetHeight} = card, gap = 16;
  const left = x + gap + offsetWidth < innerWidth ? x + gap : x - gap - offsetWidth;
  card.style.left = `${Math.max(left, 4)}px`;
  card.style.top = `${Math.max(Math.min(y + gap, innerHeight - offsetHeight - 4), 4)}px`;
}

// Return a button with an image's picture and name, which pins it.
function imageButton(points, sprites, row, note, size, onpin) {
  const why = whyNoPicture(points, row);
  const picture = why ? make("span", {className: "dot", textContent: "dot", title: why})
    : sprites.element(row, points.names[row], size);
  const button = make("button", {type: "button"}, picture,
    make("span", {}, points.names[row], make("small", {textContent: note})));
  button.dataset.row = row;
  button.addEventListener("click", () => onpin(row));
  return button;
}

// Show the pinned image and its nearest real ones. on: {pin(row), unpin(), center(row)}
export function showPinned(section, points, sprites, row, on) {
  section.hidden = row < 0;
  if (row < 0) {
    section.replaceChildren();
    return;
  }
  const unpin = make("button", {type: "button", textContent: "Unpin"});
  unpin.addEventListener("click", on.unpin);
  const center = make("button", {type: "button", textContent: "Center"});
  center.addEventListener("click", () => on.center(row));
  const group = groupOf(points, row), nearest = neighborsOf(points, row), isKnown = nearest.length > 0;
  const entries = nearest.map(({row: other, distance}) => {
    const isSameGroup = group !== "" && groupOf(points, other) === group;
    const note = [`distance ${formatNumber(distance)}`, labelOf(points, other),
      ...(isSameGroup ? [`same group as the pinned image: ${group}`] : [])].join(" - ");
    return make("li", {}, imageButton(points, sprites, other, note, 48, on.pin));
  });
  refill(section,
    make("h2", {textContent: "Pinned", tabIndex: -1}), pictureOrReason(points, sprites, row, 192),
    make("strong", {textContent: points.names[row]}), factList(points, row),
    make("div", {className: "bar"}, center, unpin),
    make("h3", {textContent: isKnown ? `Nearest real images: ${nearest.length}` : "No near real image is known"}),
    make("p", {className: "soft", textContent: isKnown ? `Distances are between features of ${points.space}.` : ""}),
    make("ol", {className: "images"}, ...entries));
}

// Tell on a button over the map which image is pinned: where the screen is narrow, its details are below the map.
export function showLink(button, points, sprites, row) {
  button.hidden = row < 0;
  if (row < 0) return;
  const picture = whyNoPicture(points, row) ? [] : [sprites.element(row, points.names[row], 40)];
  const remark = make("small", {textContent: `${labelOf(points, row)} - show its details`});
  button.replaceChildren(...picture, make("span", {}, points.names[row], make("br"), remark));
}

// Return what a screen reader is told about the pinned image.
export function describePinned(points, row) {
  if (row < 0) return "Nothing is pinned.";
  const [nearest] = neighborsOf(points, row);
  const near = nearest
    ? ` Nearest real image: ${points.names[nearest.row]}, distance ${formatNumber(nearest.distance)}.` : "";
  const set = points.sets[points.setColumn.codes[row]];
  return `Pinned: ${points.names[row]}, ${set.kind}, ${labelOf(points, row)}.${near}`;
}

// Replace what is in a section; the keyboard's focus stays in it, on its heading.
function refill(section, ...parts) {
  const hadFocus = section.contains(document.activeElement);
  section.replaceChildren(...parts);
  if (hadFocus) section.querySelector("h2").focus({preventScroll: true});
}

function percent(share) {
  return `${(share * 100).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;
}

// Show the selected images.
//   rows:    Int32Array; null = nothing is selected
//   column:  the category whose values are counted
//   on:      {pin(row), download(), clear()}
export function showSelection(section, points, sprites, rows, column, visible, on) {
  section.hidden = rows === null;
  if (rows === null) {
    section.replaceChildren();
    return;
  }
  const download = make("button", {type: "button", id: "download", textContent: "Export CSV"});
  download.disabled = rows.length === 0;
  download.addEventListener("click", on.download);
  const clear = make("button", {type: "button", textContent: "Clear selection"});
  clear.addEventListener("click", on.clear);
  const title = `Selection: ${formatCount(rows.length)} ${rows.length === 1 ? "image" : "images"}`;
  const parts = [make("h2", {textContent: title, tabIndex: -1}),
    make("div", {className: "bar"}, download, clear)];
  if (rows.length > 0) parts.push(countTable(column, rows, visible));
  const list = Array.from(rows.subarray(0, MOST_LISTED), row =>
    make("li", {}, imageButton(points, sprites, row, labelOf(points, row), 32, on.pin)));
  parts.push(make("ul", {className: "images selected"}, ...list));
  if (rows.length > MOST_LISTED) {
    parts.push(make("p", {className: "soft", textContent: `and ${formatCount(rows.length - MOST_LISTED)} more`}));
  }
  refill(section, ...parts);
}

// Return the table of a column's values in the selection and in all that is shown.
function countTable(column, rows, visible) {
  const titles = [column.title, "selected", "share", "of all shown", "ratio"];
  const head = make("tr", {}, ...titles.map((title, index) =>
    make("th", {textContent: title, scope: "col", className: index ? "number" : ""})));
  const lines = compareCounts(column, rows, visible).slice(0, 30).map(entry => {
    const cells = [formatCount(entry.inside), percent(entry.insideShare), percent(entry.shownShare),
      entry.shownShare > 0 ? entry.ratio.toFixed(2) : ""];
    const name = entry.code < 0 ? "missing" : column.values[entry.code];
    return make("tr", {}, make("th", {scope: "row", textContent: name}),
      ...cells.map(text => make("td", {className: "number", textContent: text})));
  });
  return make("table", {className: "counts"}, make("thead", {}, head), make("tbody", {}, ...lines));
}
