// The view in the page's address, so that it can be shared: #map=tsne&color=class&at=0.5_0.5_2&pin=7&hide.class=0_3
// An address may come from anyone: whatever in it does not fit the page is ignored.

import {MOST_ZOOM} from "./view.mjs";

// Return the part of the address after "#".
//   state: {map, color, view, filters, pin}: keys of the map and the column; see view.mjs, filters.mjs; -1 = no pin
export function writeAddress(state) {
  const {view} = state, at = [view.x.toFixed(5), view.y.toFixed(5), Number(view.zoom.toPrecision(4))];
  const fields = [["map", state.map], ["color", state.color], ["at", at.join("_")]];
  if (state.pin >= 0) fields.push(["pin", state.pin]);
  for (const [key, filter] of [...state.filters].sort(([a], [b]) => (a < b ? -1 : 1))) {
    if (filter.hidden) {
      fields.push([`hide.${key}`, [...filter.hidden].sort((a, b) => a - b).join("_")]);
    } else {
      const parts = [filter.from ?? "", filter.to ?? "", ...(filter.hidesMissing ? ["known"] : [])];
      fields.push([`range.${key}`, parts.join("_")]);
    }
  }
  return new URLSearchParams(fields).toString();
}

// Return what an address says: the fields of `writeAddress`, those that it does not tell or tells wrongly left out
// (filters: the ones that are right).
//   points: {count, maps, columns, setColumn}, see points.mjs
export function readAddress(text, points) {
  const state = {filters: new Map()}, columns = [...points.columns, points.setColumn];
  for (const [name, value] of new URLSearchParams(text.replace(/^#/, ""))) {
    const [kind, key] = splitOnce(name, ".");
    if (name === "map" && points.maps.some(map => map.key === value)) state.map = value;
    if (name === "color" && points.columns.some(column => column.key === value)) state.color = value;
    if (name === "at") {
      const [x, y, zoom] = value.split("_").map(readNumber);
      if (isBetween(x, 0, 1) && isBetween(y, 0, 1) && isBetween(zoom, 1, MOST_ZOOM)) state.view = {x, y, zoom};
    }
    if (name === "pin" && isBetween(readInteger(value), 0, points.count - 1)) state.pin = readInteger(value);
    const column = columns.find(each => each.key === key);
    if (kind === "hide" && column?.kind === "category") {
      const hidden = new Set(value.split("_").map(readInteger));
      if ([...hidden].every(code => isBetween(code, -1, column.values.length - 1))) state.filters.set(key, {hidden});
    }
    if (kind === "range" && column?.kind === "number") {
      const filter = readRange(value);
      if (filter !== null) state.filters.set(key, filter);
    }
  }
  return state;
}

function readRange(text) {
  const [first, second, known, ...more] = text.split("_");
  const from = first === "" ? null : readNumber(first), to = second ? readNumber(second) : null;
  if (Number.isNaN(from) || Number.isNaN(to) || ![undefined, "known"].includes(known) || more.length) return null;
  if (from === null && to === null && known === undefined) return null;
  return {from, to, hidesMissing: known !== undefined};
}

function splitOnce(text, separator) {
  const place = text.indexOf(separator);
  return place < 0 ? [text, ""] : [text.slice(0, place), text.slice(place + 1)];
}

function isBetween(value, low, high) {
  return value >= low && value <= high;
}

function readNumber(text) {
  return /^-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/.test(text) ? finite(Number(text)) : NaN;
}

function finite(value) {
  return Number.isFinite(value) ? value : NaN;
}

function readInteger(text) {
  return /^-?\d{1,9}$/.test(text) ? Number(text) : NaN;
}
