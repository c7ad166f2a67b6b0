// The map's page: its state, and what changes it. Every change goes through a function here, which asks for a drawing.

import {KINDS, readPoints} from "./points.mjs";
import {limitView, panView, shownRectangle, toMap, toScreen, wholeView, zoomView} from "./view.mjs";
import {PointGrid} from "./picking.mjs";
import {applyFilters, changeRange, onlyValue, removeFilter, toggleValue} from "./filters.mjs";
import {colorPoints} from "./colors.mjs";
import {Sprites} from "./pictures.mjs";
import {readAddress, writeAddress} from "./address.mjs";
import {fileName, pointTable} from "./table.mjs";
import {describePinned, make, showCard, showLink, showPinned, showSelection} from "./details.mjs";
import {Legend, showFilters} from "./legend.mjs";
import {Drawing} from "./drawing.mjs";
import {listenToPointers} from "./gestures.mjs";
import {listenToSearch} from "./search.mjs";

const HOVER_REACH = {mouse: 10, touch: 24, pen: 14};  // CSS pixels from a pointer to the point that it means
const ADDRESS_DELAY = 200;  // ms after the last change
const MOST_STEPS = 500;  // of the keys n and p

const byId = id => document.getElementById(id);
const points = readPoints(JSON.parse(byId("data").textContent));
const columns = [points.setColumn, ...points.columns];
const grids = new Map();  // of each map that was shown
const darkColors = matchMedia("(prefers-color-scheme: dark)");

// All that a drawing depends on.
const state = {
  map: points.maps[0],
  color: points.columns[0] ?? points.setColumn,
  view: wholeView(points.maps[0].bounds),
  filters: new Map(),  // see filters.mjs
  visible: new Uint8Array(points.count).fill(1),
  failures: new Uint8Array(points.count),
  colors: null,  // see colors.mjs
  theme: null,  // {name, paper, ink, accent}
  draw: "auto",  // "dots", "pictures", or pictures where they are few
  pin: -1,
  hover: -1,
  selected: null,  // Int32Array of rows, and as a mask:
  isSelected: null,
  found: new Int32Array(0),
  isLassoOn: false,  // the mode
  lasso: [],  // corners on the map while it is drawn
  hasCross: false,
};
let arePointsOld = true, isFrameAsked = false, frames = 0, addressTimer = 0;
let walk = {rows: [], place: 0};  // of the keys n and p

const sprites = new Sprites(points.pictures, () => {
  for (const canvas of document.querySelectorAll("canvas.picture")) sprites.fill(canvas);
  redraw(true);
});
const drawing = new Drawing(byId("dots"), byId("marks"), points, sprites);
const setsLegend = new Legend(byId("sets"), {toggle, only, range});
const colorLegend = new Legend(byId("legend"), {toggle, only, range});

// ------------------------------------------------------------------------------------------------------------- drawing

function draw() {
  const start = performance.now();
  if (arePointsOld) drawing.drawPoints(state);
  drawing.drawMarks(state);
  arePointsOld = false;
  frames++;
  return performance.now() - start;
}

// Draw before the screen is painted next; all: not only the marks.
function redraw(all = false) {
  arePointsOld ||= all;
  if (isFrameAsked) return;
  isFrameAsked = true;
  requestAnimationFrame(() => {
    isFrameAsked = false;
    draw();
  });
}

function resize() {
  if (!drawing.resize()) return;
  arePointsOld = true;  // now, not with the next frame: the canvases are empty
  draw();
}

function grid() {
  if (!grids.has(state.map)) grids.set(state.map, new PointGrid(state.map.x, state.map.y));
  return grids.get(state.map);
}

function setTheme() {
  const chosen = document.documentElement.dataset.theme, style = getComputedStyle(document.documentElement);
  const color = name => style.getPropertyValue(`--${name}`).trim();
  state.theme = {name: chosen ?? (darkColors.matches ? "dark" : "light"), paper: color("paper"), ink: color("ink"),
    accent: color("accent")};
  byId("theme").textContent = `Theme: ${chosen ?? "auto"}`;
  setColors();
}

function setColors() {
  state.colors = colorPoints(state.color, state.theme.name, points.count);
  byId("color-choice").value = state.color.key;
  setsLegend.build(points.setColumn, state.theme.name, points.sets.map(set => KINDS.indexOf(set.kind)));
  colorLegend.build(state.color, state.theme.name, null);
  showWhyDots();
  filtersChanged();
}

function showWhyDots() {
  for (const set of points.sets.filter(each => each.why)) {
    byId("sets").append(make("p", {className: "soft", textContent: `${set.name} is drawn as dots: ${set.why}`}));
  }
}

function filtersChanged() {
  const {visible, failures, shown} = applyFilters(columns, state.filters, points.count);
  Object.assign(state, {visible, failures});
  walk = {rows: [], place: 0};
  setsLegend.update(state.filters, failures);
  colorLegend.update(state.filters, failures);
  showFilters(byId("shown"), columns, state.filters, shown, points.count, {
    remove: key => setFilters(removeFilter(state.filters, key)),
    removeAll: () => setFilters(new Map()),
  });
  if (state.selected) showSelected();
  changed();
}

function setFilters(filters) {
  state.filters = filters;
  filtersChanged();
}

function toggle(column, code) {
  if (column.kind === "category") setFilters(toggleValue(state.filters, column.key, code));
  else range(column, {hidesMissing: !state.filters.get(column.key)?.hidesMissing});
}

function only(column, code) {
  if (column.kind === "category") setFilters(onlyValue(state.filters, column, code));
  else toggle(column, code);
}

function range(column, change) {
  setFilters(changeRange(state.filters, column.key, change));
}

// ---------------------------------------------------------------------------------------------------- view and address

// Draw, and write the address soon.
function changed() {
  redraw(true);
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => {
    const address = writeAddress({...state, map: state.map.key, color: state.color.key});
    try {
      history.replaceState(null, "", `#${address}`);
    } catch {
      // Some browsers refuse it for files, or when it is done too often: the address then stays as it was.
    }
  }, ADDRESS_DELAY);
}

function setView(view) {
  state.view = limitView(view, state.map.bounds);
  hover(-1);
  changed();
}

function setMap(map) {
  state.map = map;
  walk = {rows: [], place: 0};
  byId("map-choice").value = map.key;
  byId("map-note").textContent = map.note;
  setView(wholeView(map.bounds));
}

function zoom(factor, place = {x: drawing.size.width / 2, y: drawing.size.height / 2}) {
  setView(zoomView(state.view, drawing.size, state.map.bounds, factor, place.x, place.y));
}

function pan(dx, dy) {
  setView(panView(state.view, drawing.size, state.map.bounds, dx, dy));
}

// Set what the page's address tells, and all else as it is at first.
function followAddress() {
  const told = readAddress(location.hash, points);
  state.filters = told.filters;
  state.color = columns.find(column => column.key === told.color) ?? points.columns[0] ?? points.setColumn;
  setMap(points.maps.find(map => map.key === told.map) ?? points.maps[0]);
  if (told.view) setView(told.view);
  setTheme();
  pin(told.pin ?? -1);
}

// ------------------------------------------------------------------------------------------------------- single points

// Return the point that a pointer at a place of the canvas means, -1 if it means none.
function pointAt(place, type) {
  const reach = Math.max(HOVER_REACH[type] ?? HOVER_REACH.mouse, drawing.hasPictures ? drawing.pictureSide / 2 : 0);
  const {x, y} = toMap(state.view, drawing.size, state.map.bounds, place.x, place.y);
  const edge = toMap(state.view, drawing.size, state.map.bounds, place.x + reach, place.y);
  return grid().nearest(x, y, edge.x - x, state.visible);
}

function hover(row, event) {
  showCard(byId("card"), points, sprites, row, event?.clientX, event?.clientY);
  if (row === state.hover) return;
  state.hover = row;
  redraw();
}

function pin(row) {
  if (row < 0) leave(byId("pinned"));
  state.pin = row;
  if (walk.rows[walk.place] !== row) walk = {rows: [], place: 0};
  showPinned(byId("pinned"), points, sprites, row, {pin, unpin: () => pin(-1), center});
  showLink(byId("to-details"), points, sprites, row);
  if (row >= 0) putFirst(byId("pinned"));
  byId("announcement").textContent = row < 0 && frames === 0 ? "" : describePinned(points, row);
  changed();
}

// Give the keyboard's focus back to the map where it is in a section that is about to be hidden.
function leave(section) {
  if (section.contains(document.activeElement)) byId("marks").focus({preventScroll: true});
}

// Put a section to the top of the panel, where it is seen.
function putFirst(section) {
  const panel = section.parentElement, first = panel.querySelector("section");
  if (section !== first) panel.insertBefore(section, first);
  panel.scrollTop = 0;
}

function center(row) {
  setView({...state.view, x: state.map.x[row], y: state.map.y[row]});
}

// Pin the next point of those around the pinned one, or the middle: the nearest on the map first.
function step(direction) {
  if (walk.rows.length === 0) {
    const from = state.pin >= 0 ? {x: state.map.x[state.pin], y: state.map.y[state.pin]} : state.view;
    const rows = grid().nearestMany(from.x, from.y, MOST_STEPS, state.visible);
    walk = {rows: state.pin >= 0 ? [state.pin, ...rows.filter(row => row !== state.pin)] : rows,
      place: state.pin >= 0 ? 0 : -1};
  }
  const place = walk.place + direction;
  if (place < 0 || place >= walk.rows.length) return;
  walk.place = place;
  const row = walk.rows[place], {left, right, top, bottom} = shownRectangle(state.view, drawing.size, state.map.bounds);
  const x = state.map.x[row], y = state.map.y[row];
  if (x < left || x > right || y < top || y > bottom) center(row);
  pin(row);
}

// ----------------------------------------------------------------------------------------------------------- selection

// Select rows, an Int32Array, or nothing: null.
function select(rows) {
  if (!rows) leave(byId("selection"));
  state.selected = rows;
  state.isSelected = rows && new Uint8Array(points.count);
  rows?.forEach(row => { state.isSelected[row] = 1; });
  showSelected();
  if (rows) putFirst(byId("selection"));
  if (rows) byId("announcement").textContent = `${rows.length} images are selected.`;
  redraw(true);
}

// Return the selected points that the filters leave.
function shownSelection() {
  return state.selected && state.selected.filter(row => state.visible[row]);
}

function showSelected() {
  const ofClass = points.columns.find(column => column.key === "class") ?? points.setColumn;
  const counted = state.color.kind === "category" ? state.color : ofClass;
  showSelection(byId("selection"), points, sprites, shownSelection(), counted, state.visible,
    {pin, download, clear: () => select(null)});
}

function selectView() {
  select(grid().inRectangle(shownRectangle(state.view, drawing.size, state.map.bounds), state.visible));
}

function download() {
  const blob = new Blob([pointTable(points, state.map, shownSelection())], {type: "text/csv;charset=utf-8"});
  const link = make("a", {href: URL.createObjectURL(blob), download: fileName(points.title, "selection.csv")});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function setLasso(isOn) {
  state.isLassoOn = isOn;
  state.lasso = [];
  byId("lasso").setAttribute("aria-pressed", isOn);
  byId("hint").hidden = !isOn;
  byId("hint").textContent = "Draw around images; Escape ends the lasso.";
  redraw();
}

function endLasso(isWhole) {
  const polygon = state.lasso;
  setLasso(false);
  if (isWhole) select(grid().inPolygon(polygon, state.visible));
}

// --------------------------------------------------------------------------------------------------- keys and controls

const KEYS = {
  ArrowLeft: () => pan(drawing.size.width / 10, 0),
  ArrowRight: () => pan(-drawing.size.width / 10, 0),
  ArrowUp: () => pan(0, drawing.size.height / 10),
  ArrowDown: () => pan(0, -drawing.size.height / 10),
  "+": () => zoom(1.5),
  "=": () => zoom(1.5),
  "-": () => zoom(1 / 1.5),
  0: () => setView(wholeView(state.map.bounds)),
  Enter: () => pin(grid().nearestMany(state.view.x, state.view.y, 1, state.visible)[0] ?? -1),
  n: () => step(1),
  p: () => step(-1),
  l: () => setLasso(!state.isLassoOn),
  v: selectView,
};
const KEYS_EVERYWHERE = {
  "/": () => byId("search").focus(),
  "?": () => byId("keys").showModal(),
  Escape: () => {
    if (state.isLassoOn || state.lasso.length) setLasso(false);
    else if (state.pin >= 0) pin(-1);
    else if (state.selected) select(null);
  },
};

function listenToKeys() {
  const canvas = byId("marks");
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (byId("keys").open || event.target.matches("input, select")) return;
    const act = KEYS_EVERYWHERE[event.key] ?? (event.target === canvas ? KEYS[event.key] : undefined);
    if (act === undefined) return;
    event.preventDefault();
    state.hasCross ||= event.key in KEYS;  // also where a click gave the map the focus
    act();
    redraw();
  });
  for (const type of ["focus", "blur", "pointerdown"]) {
    canvas.addEventListener(type, () => {
      state.hasCross = type === "focus" && canvas.matches(":focus-visible");
      redraw();
    });
  }
}

function listenToControls() {
  const option = ({key, title}) => make("option", {value: key, textContent: title});
  byId("map-choice").append(...points.maps.map(option));
  byId("color-choice").append(...(points.columns.length ? points.columns : [points.setColumn]).map(option));
  byId("map-choice").addEventListener("change", event => {
    setMap(points.maps.find(map => map.key === event.target.value));
  });
  byId("color-choice").addEventListener("change", event => {
    state.color = points.columns.find(column => column.key === event.target.value);
    setColors();
  });
  byId("draw-choice").addEventListener("change", event => {
    state.draw = event.target.value;
    redraw(true);
  });
  byId("lasso").addEventListener("click", () => setLasso(!state.isLassoOn));
  byId("select-view").addEventListener("click", selectView);
  byId("zoom-in").addEventListener("click", () => zoom(1.5));
  byId("zoom-out").addEventListener("click", () => zoom(1 / 1.5));
  byId("fit").addEventListener("click", KEYS[0]);
  byId("help").addEventListener("click", KEYS_EVERYWHERE["?"]);
  byId("keys-close").addEventListener("click", () => byId("keys").close());
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement, next = {light: "dark", dark: undefined}[root.dataset.theme ?? ""];
    if (root.dataset.theme === undefined) root.dataset.theme = "light";
    else if (next) root.dataset.theme = next;
    else delete root.dataset.theme;
    setTheme();
  });
  byId("to-details").addEventListener("click", () => byId("pinned").scrollIntoView());
  darkColors.addEventListener("change", setTheme);
  listenToSearch(byId("search"), byId("search-results"), points, {
    found: rows => {
      state.found = rows;
      redraw();
    },
    choose: row => {
      center(row);
      pin(row);
      byId("marks").focus({preventScroll: true});
    },
    leave: () => byId("marks").focus({preventScroll: true}),
  });
}

listenToPointers(byId("marks"), {
  isLasso: event => state.isLassoOn || event.shiftKey,
  hover: (place, event) => hover(pointAt(place, event.pointerType), event),
  leave: () => hover(-1),
  pan, zoom,
  click: (place, type) => pin(pointAt(place, type)),
  lasso: place => {
    state.lasso.push(toMap(state.view, drawing.size, state.map.bounds, place.x, place.y));
    redraw();
  },
  endLasso,
});
listenToControls();
listenToKeys();
followAddress();
draw();
const ready = performance.now();
addEventListener("hashchange", () => {  // the reader follows a link of the report, or goes back
  const link = /^#pin=(\d+)$/.exec(location.hash);
  if (link && Number(link[1]) < points.count) {  // of the report, which is about a point and not about the view
    pin(Number(link[1]));
    center(state.pin);
  } else {
    followAddress();
  }
  if (state.pin >= 0) byId("canvases").scrollIntoView({block: "nearest"});
});
new ResizeObserver(resize).observe(byId("marks"));
addEventListener("resize", resize);  // also when only the pixel ratio changes

// For tests and consoles.
globalThis.embeddingMap = {
  state, points, ready,  // ready: ms from the start of the page to the end of the first drawing
  get frames() { return frames; },
  // Return where a point is in the window, in CSS pixels.
  pointOnScreen(row) {
    const {left, top} = byId("marks").getBoundingClientRect();
    const {x, y} = toScreen(state.view, drawing.size, state.map.bounds, state.map.x[row], state.map.y[row]);
    return {x: x + left, y: y + top};
  },
  // Draw all now, and return how many ms it took.
  draw() {
    arePointsOld = true;
    return draw();
  },
};
