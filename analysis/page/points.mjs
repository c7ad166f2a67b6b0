// Decode the page's data element: points, their columns, maps, neighbors and pictures.
// A row is the number of a point, from 0; real images come first. Missing values have the code -1, or the number NaN.

export const KINDS = ["real", "synthetic", "projected"];
export const SETS = "*";  // key of the column that holds the set of each point; all other keys are a-z, 0-9 and "-"

// Return the numbers of a base64 text of little-endian bytes (all browsers run on little-endian machines).
export function decodeNumbers(text, Type) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let index = 0; index < bytes.length; index++) bytes[index] = binary.charCodeAt(index);
  return new Type(bytes.buffer);
}

// Return the points of the page: what analysis/embedding_page.py wrote, with numbers in typed arrays.
//   kinds:    Uint8Array, the number of each point's kind in KINDS
//   columns:  those of the data; setColumn is one more, the set of each point
//   maps:     x and y are Float32Array in 0..1, y grows downwards as on the screen; bounds hold all points
export function readPoints(data) {
  const {count} = data;
  const setCodes = new Int32Array(count), kinds = new Uint8Array(count);
  data.sets.forEach((set, number) => {
    setCodes.fill(number, set.start, set.start + set.count);
    kinds.fill(KINDS.indexOf(set.kind), set.start, set.start + set.count);
  });
  const setNames = data.sets.map(set => set.name);
  return {
    title: data.title, count, numReal: data.numReal, names: data.names, sets: data.sets, space: data.space, kinds,
    groups: data.groups && {values: data.groups.values, codes: decodeNumbers(data.groups.codes, Int32Array)},
    maps: data.maps.map(readMap),
    columns: data.columns.map(column => (column.kind === "number" ? readNumbers(column) : readCategory(column))),
    setColumn: {key: SETS, title: "set", kind: "category", values: setNames, codes: setCodes},
    neighbors: {
      count: data.neighbors.count,
      rows: decodeNumbers(data.neighbors.rows, Int32Array),
      distances: decodeNumbers(data.neighbors.distances, Float32Array),
    },
    pictures: {...data.pictures, tiles: decodeNumbers(data.pictures.tiles, Int32Array)},
  };
}

function readMap(map) {
  const x = Float32Array.from(decodeNumbers(map.x, Uint16Array), value => value / 65535);
  const y = Float32Array.from(decodeNumbers(map.y, Uint16Array), value => 1 - value / 65535);
  const bounds = {left: 1, right: 0, top: 1, bottom: 0};
  for (let row = 0; row < x.length; row++) {
    bounds.left = Math.min(bounds.left, x[row]);
    bounds.right = Math.max(bounds.right, x[row]);
    bounds.top = Math.min(bounds.top, y[row]);
    bounds.bottom = Math.max(bounds.bottom, y[row]);
  }
  return {key: map.key, title: map.title, note: map.note, x, y, bounds};
}

function readCategory({key, title, values, codes, wide}) {
  const missing = wide ? 65535 : 255;
  const stored = decodeNumbers(codes, wide ? Uint16Array : Uint8Array);
  return {key, title, kind: "category", values, codes: Int32Array.from(stored, code => (code === missing ? -1 : code))};
}

// The ends of the color scale are quantiles, so that single extreme values do not make all others look alike.
function readNumbers({key, title, data}) {
  const numbers = decodeNumbers(data, Float32Array);
  const sorted = numbers.filter(Number.isFinite).sort();
  return {key, title, kind: "number", numbers, low: quantile(sorted, 0.02), high: quantile(sorted, 0.98),
    least: quantile(sorted, 0), greatest: quantile(sorted, 1)};
}

// Return a quantile of sorted numbers by linear interpolation, NaN of none.
export function quantile(sorted, share) {
  if (sorted.length === 0) return NaN;
  const place = share * (sorted.length - 1), below = Math.floor(place), above = Math.ceil(place);
  return sorted[below] + (sorted[above] - sorted[below]) * (place - below);
}

// Return a number with three significant digits; whole numbers are not rounded.
export function formatNumber(value) {
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return String(value);
  return String(Number(value.toPrecision(3)));
}

// Return a count with separators: 50,000.
export function formatCount(count) {
  return count.toLocaleString("en-US");
}

// Return a column's value of a point as text, "" if it is missing.
export function valueText(column, row) {
  if (column.kind === "number") return Number.isNaN(column.numbers[row]) ? "" : formatNumber(column.numbers[row]);
  return column.codes[row] < 0 ? "" : column.values[column.codes[row]];
}

// Return the nearest real images of a point: [{row, distance}, ...], nearest first.
export function neighborsOf(points, row) {
  const {count, rows, distances} = points.neighbors, found = [];
  for (let place = row * count; place < (row + 1) * count; place++) {
    if (rows[place] >= 0) found.push({row: rows[place], distance: distances[place]});
  }
  return found;
}

// Return the patient or lesion of a point, "" if it is unknown.
export function groupOf(points, row) {
  const code = points.groups ? points.groups.codes[row] : -1;
  return code < 0 ? "" : points.groups.values[code];
}

// Return why a point is drawn as a dot, "" if it has a picture.
export function whyNoPicture(points, row) {
  if (points.pictures.tiles[row] >= 0) return "";
  return points.sets[points.setColumn.codes[row]].why || "no picture is stored in this page";
}

// Return the numbers from 0 below count in an order that looks random and is always the same, so that no set is drawn
// over all others (Fisher and Yates; the generator is a linear congruential one, of Numerical Recipes).
export function shuffledRows(count) {
  const order = Int32Array.from({length: count}, (_, row) => row);
  let random = 1;
  for (let last = count - 1; last > 0; last--) {
    random = (Math.imul(random, 1664525) + 1013904223) >>> 0;
    const other = Math.floor(random / 2 ** 32 * (last + 1));
    [order[last], order[other]] = [order[other], order[last]];
  }
  return order;
}
