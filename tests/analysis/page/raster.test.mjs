import assert from "node:assert/strict";
import {test} from "node:test";
import {drawDots, makeMask, makeStamps, sortByTile} from "../../../analysis/page/raster.mjs";
import {seededRandom} from "./made_points.mjs";

const WHITE = 0xffffffff | 0, RED = 0xff0000ff | 0;

// Draw points given as [x, y, changes] in pixels into a small image, and return its pixels and the number drawn.
function drawn(places, {width = 24, height = 16, emphasized = null, opacity = 1} = {}) {
  const given = key => Uint8Array.from(places, ([, , changes]) => changes?.[key] ?? {visible: 1}[key] ?? 0);
  const dots = {
    order: Int32Array.from(places.keys()),
    x: Float32Array.from(places, ([x]) => x), y: Float32Array.from(places, ([, y]) => y),
    kinds: given("kinds"), isMissing: given("isMissing"), visible: given("visible"),
    colors: Int32Array.from(places, ([, , changes]) => changes?.color ?? RED),
  };
  const pixels = new Int32Array(width * height);
  const count = drawDots({width, height, pixels}, dots, {scale: 1, left: 0, top: 0},
    {stamps: makeStamps({radius: 3, opacity, faded: 0.25, width}), background: WHITE, emphasized});
  return {pixels, count, at: (x, y) => pixels[y * width + x]};
}

test("a dot covers its middle with its color and leaves the rest of the image", () => {
  const {pixels, count, at} = drawn([[10, 8]]);

  assert.equal(count, 1);
  assert.equal(at(10, 8), RED);
  assert.equal(at(10, 12), WHITE);
  for (let place = 0; place < pixels.length; place++) {
    const [x, y] = [place % 24, Math.floor(place / 24)];
    if (Math.hypot(x - 10, y - 8) > 4) assert.equal(pixels[place], WHITE);
    assert.equal(pixels[place], at(20 - x, y) ?? WHITE, "a disc is symmetrical");
  }
});

test("a dot at any edge is cut off there and does not show up on the other side", () => {
  const middle = drawn([[12, 8]]);
  const places = [[0, 8], [23, 8], [12, 0], [12, 15], [-2, 8], [25, 8], [12, -2], [12, 17], [0, 0], [23, 15], [-1, 16]];
  for (const [x, y] of places) {
    const {at} = drawn([[x, y]]);
    for (let line = 0; line < 16; line++) {
      for (let column = 0; column < 24; column++) {
        const [dx, dy] = [column - x, line - y];
        const expected = Math.max(Math.abs(dx), Math.abs(dy)) <= 5 ? middle.at(12 + dx, 8 + dy) : WHITE;
        assert.equal(at(column, line), expected, `dot at ${x}, ${y}: pixel ${column}, ${line}`);
      }
    }
  }
});

test("points outside and hidden ones are not drawn", () => {
  const {pixels, count} = drawn([[-30, 8], [60, 8], [12, -9], [12, 40], [12, 8, {visible: 0}]]);

  assert.equal(count, 0);
  assert.ok(pixels.every(pixel => pixel === WHITE));
});

test("the last point lies on top, and opacity mixes each channel", () => {
  assert.equal(drawn([[10, 8], [10, 8, {color: 0xff00ff00}]]).at(10, 8), 0xff00ff00 | 0);
  assert.equal(drawn([[10, 8, {color: 0xff804020}]], {opacity: 0.5}).at(10, 8), 0xffbf9f8f | 0);
});

test("points that are not emphasized fade", () => {
  const {at} = drawn([[6, 8], [18, 8]], {emphasized: Uint8Array.of(1, 0)});

  assert.equal(at(6, 8), RED);
  assert.equal(at(18, 8), 0xffbfbfff | 0);
});

test("kinds differ in shape, and missing values are hollow discs", () => {
  const images = [0, 1, 2].map(kinds => drawn([[10, 8, {kinds}]]).pixels.join());
  const hollow = drawn([[10, 8, {isMissing: 1}]]);

  assert.equal(new Set([...images, hollow.pixels.join()]).size, 4);
  assert.equal(hollow.at(10, 8), WHITE);
  assert.notEqual(hollow.at(12, 8), WHITE);
});

test("a mask's area is that of its shape", () => {
  const area = (kind, isHollow) => makeMask(kind, 20, isHollow).coverage.reduce((sum, value) => sum + value, 0) / 255;

  assert.ok(Math.abs(area(0, false) - Math.PI * 400) < 3);
  assert.ok(Math.abs(area(0, true) - Math.PI * 400 * (1 - 0.72 ** 2)) < 5);
  for (const kind of [1, 2]) assert.ok(area(kind, false) > area(kind, true) && area(kind, true) > 150);
});

test("rows sorted by tile hold each row once, neighbors on the map together, in the order given within a tile", () => {
  const random = seededRandom(1);
  const x = Float32Array.from({length: 5000}, random), y = Float32Array.from({length: 5000}, random);
  [x[0], y[0], x[1], y[1]] = [0, 0, 1, 1];
  const rows = Int32Array.from(x.keys()).reverse(), sorted = sortByTile(rows, x, y);
  const lines = Array.from(sorted, row => Math.floor(y[row] * 31.999));

  assert.deepEqual([...sorted].sort((a, b) => a - b), [...x.keys()]);
  assert.deepEqual([...lines].sort((a, b) => a - b), lines);
  const inLastTile = [...rows].filter(row => x[row] * 31.999 >= 31 && y[row] * 31.999 >= 31);
  assert.deepEqual([...sorted.slice(-inLastTile.length)], inLastTile);
});
