import assert from "node:assert/strict";
import {test} from "node:test";
import {
  MOST_ZOOM, dotOpacity, dotRadius, limitView, panView, scaleOf, shownRectangle, toMap, toScreen, wholeView, zoomView,
} from "../../../analysis/page/view.mjs";

const size = {width: 832, height: 632}, bounds = {left: 0, right: 1, top: 0.2, bottom: 0.8};

function assertNear(actual, expected) {
  for (const key of Object.keys(expected)) {
    assert.ok(Math.abs(actual[key] - expected[key]) < 1e-9, `${key} is ${actual[key]}, not ${expected[key]}`);
  }
}

test("the whole view shows all points, with a margin where they touch the edges first", () => {
  const view = wholeView(bounds);

  assert.equal(scaleOf(view, size, bounds), 800);
  assertNear(toScreen(view, size, bounds, 0, 0.5), {x: 16, y: 316});
  assertNear(toScreen(view, size, bounds, 1, 0.8), {x: 816, y: 316 + 240});
  assertNear(shownRectangle(view, size, bounds),
    {left: -0.02, right: 1.02, top: 0.5 - 316 / 800, bottom: 0.5 + 316 / 800});
});

test("screen and map are each other's inverse", () => {
  const view = {x: 0.3, y: 0.41, zoom: 17}, place = toMap(view, size, bounds, 123, 456);

  assertNear(toScreen(view, size, bounds, place.x, place.y), {x: 123, y: 456});
});

test("zooming keeps what is under the pointer, panning moves it by as many pixels", () => {
  const view = {x: 0.5, y: 0.5, zoom: 3}, fixed = toMap(view, size, bounds, 500, 200);

  assertNear(toScreen(zoomView(view, size, bounds, 2.5, 500, 200), size, bounds, fixed.x, fixed.y), {x: 500, y: 200});
  assertNear(toScreen(panView(view, size, bounds, 30, -20), size, bounds, fixed.x, fixed.y), {x: 530, y: 180});
});

test("zoom and place stay within their limits", () => {
  assert.equal(zoomView({x: 0.5, y: 0.5, zoom: 150}, size, bounds, 10, 0, 0).zoom, MOST_ZOOM);
  assert.equal(zoomView({x: 0.5, y: 0.5, zoom: 2}, size, bounds, 0.1, 0, 0).zoom, 1);
  assert.deepEqual(limitView({x: -4, y: 0.9, zoom: 0}, bounds), {x: 0, y: 0.8, zoom: 1});
});

test("points at a single place, and a canvas without room, leave finite numbers", () => {
  const place = {left: 0.5, right: 0.5, top: 0.5, bottom: 0.5};

  assertNear(toScreen(wholeView(place), size, place, 0.5, 0.5), {x: 416, y: 316});
  assert.equal(scaleOf(wholeView(bounds), {width: 1, height: 1}, bounds), 1);
});

test("dots grow with the zoom, up to a limit", () => {
  const radii = [1, 2, 10, 100, 200].map(zoom => dotRadius(50000, zoom));

  assert.deepEqual([...radii].sort((a, b) => a - b), radii);
  assert.equal(radii.at(-1), 9);
  assert.ok(dotRadius(500, 1) > dotRadius(5000, 1));
  assert.ok(dotOpacity(50000, 1) < dotOpacity(5000, 1));
  assert.ok(dotOpacity(50000, 1) < dotOpacity(50000, 20));
  assert.equal(dotOpacity(500, 200), 0.95);
});
