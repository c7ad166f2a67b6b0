import assert from "node:assert/strict";
import {test} from "node:test";
import {
  applyFilters, changeRange, compareCounts, countValues, describeFilter, findNames, onlyValue, removeFilter,
  toggleValue,
} from "../../../analysis/page/filters.mjs";
import {readPoints} from "../../../analysis/page/points.mjs";
import {madeData} from "./made_points.mjs";

const points = readPoints(madeData()), [ofClass, place, distance] = points.columns;
const columns = [points.setColumn, ...points.columns], none = new Map();
const apply = filters => applyFilters(columns, filters, points.count);
const shown = filters => [...apply(filters).visible.keys()].filter(row => apply(filters).visible[row]);

test("without filters all points are shown", () => {
  assert.deepEqual(shown(none), [0, 1, 2, 3, 4]);
  assert.equal(apply(none).shown, 5);
});

test("a value is hidden and shown again; missing ones are a value of their own", () => {
  const hidden = toggleValue(none, "class", 0);

  assert.deepEqual(shown(hidden), [1, 4]);
  assert.deepEqual(shown(toggleValue(hidden, "class", -1)), [1]);
  assert.deepEqual(toggleValue(hidden, "class", 0), none);
  assert.deepEqual(shown(none), [0, 1, 2, 3, 4], "filters are not changed in place");
});

test("only one value is shown, and all by the same again", () => {
  const only = onlyValue(none, ofClass, 1);

  assert.deepEqual(shown(only), [1]);
  assert.deepEqual(shown(onlyValue(only, ofClass, 0)), [0, 2, 3]);
  assert.deepEqual(shown(onlyValue(only, ofClass, -1)), [4]);
  assert.equal(onlyValue(only, ofClass, 1).size, 0);
});

test("filters of several columns work together", () => {
  const filters = changeRange(onlyValue(toggleValue(none, "*", 0), ofClass, 0), "distance", {from: 1});

  assert.deepEqual(shown(filters), [2, 3]);
  assert.deepEqual(shown(changeRange(filters, "distance", {hidesMissing: true})), [3]);
  assert.deepEqual(shown(removeFilter(filters, "*")), [2, 3]);
  assert.deepEqual(shown(removeFilter(filters, "class")), [2, 3, 4]);
});

test("ends of a range are inside, and an open range that hides nothing is no filter", () => {
  const both = changeRange(changeRange(none, "distance", {from: 0.5}), "distance", {to: 2});

  assert.deepEqual(shown(both), [0, 2, 3]);
  assert.deepEqual(shown(changeRange(both, "distance", {from: 3})), [2]);
  assert.equal(changeRange(both, "distance", {from: null, to: null}).size, 0);
});

test("counts are of the points that other columns leave, and of all", () => {
  const filters = toggleValue(toggleValue(none, "class", 0), "*", 2), {failures} = apply(filters);

  const {left, all} = countValues(ofClass, filters, failures);
  assert.deepEqual([[...left], [...all]], [[3, 1, 0], [3, 1, 1]]);
  const sets = countValues(points.setColumn, filters, failures);
  assert.deepEqual([[...sets.left], [...sets.all]], [[1, 0, 1, 0], [2, 2, 1, 0]]);
  const numbers = countValues(distance, filters, failures);
  assert.deepEqual([[...numbers.left], [...numbers.all]], [[1, 0], [4, 1]]);
});

test("each filter is told in words", () => {
  const tell = (column, filters) => describeFilter(column, filters.get(column.key));

  assert.equal(tell(ofClass, toggleValue(none, "class", 0)), "class: nv hidden");
  assert.equal(tell(ofClass, onlyValue(none, ofClass, 1)), "class: only mel");
  assert.equal(tell(ofClass, toggleValue(toggleValue(toggleValue(none, "class", 0), "class", 1), "class", -1)),
    "class: nv, mel, missing hidden");
  assert.equal(tell(distance, changeRange(none, "distance", {from: 0.12345})), "distance: at least 0.123");
  assert.equal(tell(distance, changeRange(none, "distance", {to: 2, hidesMissing: true})),
    "distance: at most 2, missing hidden");
  assert.equal(tell(distance, changeRange(none, "distance", {from: 1, to: 2})), "distance: 1 to 2");
  const many = {...ofClass, values: ["a", "b", "c", "d", "e", "f", "g"]};
  assert.equal(describeFilter(many, {hidden: new Set([0, 1, 2, 3, 4])}), "class: a, b, c and 2 more hidden");
});

test("names are found in any case, as texts and not as patterns, and all are counted", () => {
  const names = ["a.png", "b.png", "lesion [1].png", "\u00e9t\u00e9.png"];

  assert.deepEqual(findNames(names, " .PNG ", 2), {rows: [0, 1], total: 4});
  assert.deepEqual(findNames(names, "[1]", 50), {rows: [2], total: 1});
  assert.deepEqual(findNames(names, "\u00c9T", 50), {rows: [3], total: 1});
  assert.deepEqual(findNames(names, ".*", 50), {rows: [], total: 0});
  assert.deepEqual(findNames(names, "  ", 50), {rows: [], total: 0});
});

test("a selection is compared with all shown points by shares", () => {
  const visible = Uint8Array.of(1, 1, 1, 0, 1);

  assert.deepEqual(compareCounts(ofClass, Int32Array.of(1, 4), visible), [
    {code: 1, inside: 1, insideShare: 0.5, shown: 1, shownShare: 0.25, ratio: 2},
    {code: -1, inside: 1, insideShare: 0.5, shown: 1, shownShare: 0.25, ratio: 2},
    {code: 0, inside: 0, insideShare: 0, shown: 2, shownShare: 0.5, ratio: 0}]);
  assert.deepEqual(compareCounts(place, new Int32Array(0), visible).map(entry => entry.insideShare), [0, 0, 0]);
});
