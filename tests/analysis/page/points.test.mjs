import assert from "node:assert/strict";
import {test} from "node:test";
import {decodeNumbers, formatNumber, groupOf, neighborsOf, quantile, readPoints, shuffledRows, valueText, whyNoPicture}
  from "../../../analysis/page/points.mjs";
import {tilePlace} from "../../../analysis/page/pictures.mjs";
import {madeData} from "./made_points.mjs";

test("numbers are read as little-endian, of each width and sign", () => {
  assert.deepEqual([...decodeNumbers("AQD//w==", Uint16Array)], [1, 65535]);
  assert.deepEqual([...decodeNumbers("/v///w==", Int32Array)], [-2]);
  assert.deepEqual([...decodeNumbers("AADAPwAAwH8=", Float32Array)], [1.5, NaN]);
  assert.deepEqual([...decodeNumbers("", Float32Array)], []);
});

test("points have the kind and the set of their rows, and coordinates that grow downwards", () => {
  const points = readPoints(madeData());

  assert.deepEqual([...points.kinds], [0, 0, 1, 1, 2]);
  assert.deepEqual([...points.setColumn.codes], [0, 0, 1, 1, 2]);
  assert.deepEqual([...points.maps[0].x], [0, 1, 0, Math.fround(0.2), Math.fround(0.4)]);
  assert.deepEqual([...points.maps[0].y], [1, 0, Math.fround(0.8), Math.fround(0.8), Math.fround(0.8)]);
  assert.deepEqual(points.maps[0].bounds, {left: 0, right: 1, top: 0, bottom: 1});
});

test("missing values of narrow, wide and number columns are empty texts", () => {
  const points = readPoints(madeData());

  const texts = points.columns.map(column => [0, 1, 2, 3, 4].map(row => valueText(column, row)));

  assert.deepEqual(texts,
    [["nv", "mel", "nv", "nv", ""], ["arm", "", "leg", "leg", "arm"], ["0.5", "0.25", "", "2", "4"]]);
});

test("the scale of a number column spans its quantiles and leaves out missing values", () => {
  const {low, high, least, greatest} = readPoints(madeData()).columns[2];

  assert.equal(low, 0.25 + 0.06 * 0.25);
  assert.ok(Math.abs(high - (4 - 0.06 * 2)) < 1e-12);
  assert.deepEqual([least, greatest], [0.25, 4]);
  assert.equal(quantile([], 0.5), NaN);
});

test("neighbors, groups and reasons leave out what does not exist", () => {
  const points = readPoints(madeData());

  assert.deepEqual(neighborsOf(points, 0), [{row: 1, distance: 0.5}]);
  assert.deepEqual(neighborsOf(points, 4), []);
  assert.deepEqual([0, 2, 4].map(row => groupOf(points, row)), ["lesion 1", "", "lesion 1"]);
  assert.equal(groupOf(readPoints({...madeData(), groups: null}), 0), "");
  assert.deepEqual([0, 2, 4].map(row => whyNoPicture(points, row)),
    ["They may not be shown.", "", "no picture is stored in this page"]);
});

test("numbers are written with three digits, whole ones with all", () => {
  assert.deepEqual([0.123456, 12345, -2.5, 1234.5, 0, 1e-9].map(formatNumber),
    ["0.123", "12345", "-2.5", "1230", "0", "1e-9"]);
});

test("the order of drawing holds each row once and mixes the sets", () => {
  const order = shuffledRows(10000);

  assert.deepEqual([...order].sort((a, b) => a - b), [...Array(10000).keys()]);
  assert.deepEqual(order, shuffledRows(10000));
  for (let start = 0; start < 10000; start += 1000) {
    const share = order.subarray(start, start + 1000).filter(row => row < 5000).length / 1000;
    assert.ok(Math.abs(share - 0.5) < 0.08, `${share} of the rows from ${start} are of the first half`);
  }
});

test("a tile's place follows rows, then sprites", () => {
  const layout = {side: 64, perRow: 16, perSprite: 256};

  assert.deepEqual(tilePlace(0, layout), {sprite: 0, x: 0, y: 0});
  assert.deepEqual(tilePlace(17, layout), {sprite: 0, x: 64, y: 64});
  assert.deepEqual(tilePlace(256 + 31, layout), {sprite: 1, x: 960, y: 64});
});
