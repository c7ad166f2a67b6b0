// Which points are shown: filters of columns, what the legend counts, and search by name.
// Filters are a Map from a column's key to {hidden: Set of codes} for categories, and {from, to, hidesMissing} for
// numbers, where null leaves an end open. The code -1 stands for missing values. Filters that hide nothing are not
// kept.

import {formatNumber} from "./points.mjs";

// Return whether a filter leaves a point.
export function passes(column, filter, row) {
  if (column.kind === "category") return !filter.hidden.has(column.codes[row]);
  const value = column.numbers[row];
  if (Number.isNaN(value)) return !filter.hidesMissing;
  return (filter.from === null || value >= filter.from) && (filter.to === null || value <= filter.to);
}

// Return which points are shown, and how many filters hide each: {visible, failures, shown}, Uint8Arrays and a count.
export function applyFilters(columns, filters, count) {
  const failures = new Uint8Array(count), visible = new Uint8Array(count);
  for (const column of columns.filter(each => filters.has(each.key))) {
    const filter = filters.get(column.key);
    for (let row = 0; row < count; row++) if (!passes(column, filter, row)) failures[row]++;
  }
  let shown = 0;
  for (let row = 0; row < count; row++) {
    visible[row] = failures[row] === 0 ? 1 : 0;
    shown += visible[row];
  }
  return {visible, failures, shown};
}

// Return the number of points of each value: {left, all}, both with an entry for each value, and a last one for missing
// ones. left counts those that the filters of other columns leave. A number column has two entries: known, missing.
export function countValues(column, filters, failures) {
  const isNumber = column.kind === "number", size = isNumber ? 2 : column.values.length + 1;
  const left = new Int32Array(size), all = new Int32Array(size), filter = filters.get(column.key);
  for (let row = 0; row < failures.length; row++) {
    const code = isNumber ? (Number.isNaN(column.numbers[row]) ? -1 : 0) : column.codes[row];
    const place = code < 0 ? size - 1 : code;
    const others = failures[row] - (filter && !passes(column, filter, row) ? 1 : 0);
    all[place]++;
    if (others === 0) left[place]++;
  }
  return {left, all};
}

function store(filters, key, filter) {
  const changed = new Map(filters);
  const isIdle = filter.hidden ? filter.hidden.size === 0
    : filter.from === null && filter.to === null && !filter.hidesMissing;
  if (isIdle) changed.delete(key);
  else changed.set(key, filter);
  return changed;
}

// Return filters in which a value of a category is hidden, or shown if it was.
export function toggleValue(filters, key, code) {
  const hidden = new Set(filters.get(key)?.hidden);
  if (!hidden.delete(code)) hidden.add(code);
  return store(filters, key, {hidden});
}

// Return filters in which a category shows only one value, or all if it did.
export function onlyValue(filters, column, code) {
  const hidden = new Set([-1, ...column.values.keys()]);
  hidden.delete(code);
  const before = filters.get(column.key)?.hidden;
  const wasOnly = before !== undefined && before.size === hidden.size && !before.has(code);
  return store(filters, column.key, {hidden: wasOnly ? new Set() : hidden});
}

// Return filters in which a number column's range is changed. change: some of {from, to, hidesMissing}
export function changeRange(filters, key, change) {
  return store(filters, key, {from: null, to: null, hidesMissing: false, ...filters.get(key), ...change});
}

export function removeFilter(filters, key) {
  const changed = new Map(filters);
  changed.delete(key);
  return changed;
}

// Return a filter in words: "class: nv, mel hidden", "class: only nv", "distance: 0.1 to 2".
export function describeFilter(column, filter) {
  if (column.kind === "category") {
    const name = code => (code < 0 ? "missing" : column.values[code]);
    const codes = [...column.values.keys(), -1], shown = codes.filter(code => !filter.hidden.has(code) && code >= 0);
    if (shown.length === 1 && filter.hidden.size > 1) return `${column.title}: only ${name(shown[0])}`;
    const hidden = codes.filter(code => filter.hidden.has(code));
    const more = hidden.length > 3 ? ` and ${hidden.length - 3} more` : "";
    return `${column.title}: ${hidden.slice(0, 3).map(name).join(", ")}${more} hidden`;
  }
  const parts = [];
  if (filter.from !== null && filter.to !== null) {
    parts.push(`${formatNumber(filter.from)} to ${formatNumber(filter.to)}`);
  } else if (filter.from !== null) parts.push(`at least ${formatNumber(filter.from)}`);
  else if (filter.to !== null) parts.push(`at most ${formatNumber(filter.to)}`);
  if (filter.hidesMissing) parts.push("missing hidden");
  return `${column.title}: ${parts.join(", ")}`;
}

// Return the points whose names contain a text, in any case: {rows, total}, at most `limit` rows. "" finds none.
// lowerNames: the names in lower case
export function findNames(lowerNames, text, limit) {
  const wanted = text.trim().toLowerCase(), rows = [];
  let total = 0;
  if (wanted !== "") {
    lowerNames.forEach((name, row) => {
      if (name.includes(wanted) && ++total <= limit) rows.push(row);
    });
  }
  return {rows, total};
}

// Return a column's values in a selection and in all shown points, most frequent in the selection first:
// [{code, inside, insideShare, shown, shownShare, ratio}, ...]; ratio is the quotient of the shares.
export function compareCounts(column, selected, visible) {
  const size = column.values.length + 1, inside = new Int32Array(size), shown = new Int32Array(size);
  const place = row => (column.codes[row] < 0 ? size - 1 : column.codes[row]);
  let numShown = 0;
  for (const row of selected) inside[place(row)]++;
  for (let row = 0; row < visible.length; row++) {
    shown[place(row)] += visible[row];
    numShown += visible[row];
  }
  const rows = [];
  for (let index = 0; index < size; index++) {
    if (inside[index] === 0 && shown[index] === 0) continue;
    const insideShare = selected.length ? inside[index] / selected.length : 0;
    const shownShare = numShown ? shown[index] / numShown : 0;
    rows.push({code: index < size - 1 ? index : -1, inside: inside[index], insideShare, shown: shown[index], shownShare,
      ratio: insideShare / shownShare});
  }
  return rows.sort((a, b) => b.inside - a.inside || b.shown - a.shown);
}
