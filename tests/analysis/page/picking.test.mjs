import assert from "node:assert/strict";
import {test} from "node:test";
import {PointGrid, isInPolygon} from "../../../analysis/page/picking.mjs";
import {seededRandom} from "./made_points.mjs";

// Points on a coarse lattice, so that many are equally near, or at the same place; some are hidden.
function madeCloud(count, seed, steps) {
  const random = seededRandom(seed), place = () => Math.floor(random() * (steps + 1)) / steps;
  const x = Float32Array.from({length: count}, place), y = Float32Array.from({length: count}, place);
  return {x, y, visible: Uint8Array.from({length: count}, () => random() < 0.8), random};
}

const corners = (...places) => places.map(([x, y]) => ({x, y}));

test("the nearest point is the one that a search through all finds", () => {
  for (const [count, steps] of [[1, 4], [30, 8], [2000, 64], [2000, 2 ** 20]]) {
    const {x, y, visible, random} = madeCloud(count, count + steps, steps), grid = new PointGrid(x, y);
    for (let trial = 0; trial < 300; trial++) {
      const place = [random() * 1.4 - 0.2, random() * 1.4 - 0.2], radius = random() ** 3;
      let expected = -1, least = radius ** 2;
      for (let row = count - 1; row >= 0; row--) {
        const distance = (x[row] - place[0]) ** 2 + (y[row] - place[1]) ** 2;
        if (visible[row] && distance <= least) [expected, least] = [row, distance];
      }
      assert.equal(grid.nearest(...place, radius, visible), expected);
    }
  }
});

test("a point exactly at the radius is found, one beyond it is not, nor is a hidden one", () => {
  const grid = new PointGrid(Float32Array.of(0.25), Float32Array.of(0.5));

  assert.equal(grid.nearest(0.5, 0.5, 0.25, [1]), 0);
  assert.equal(grid.nearest(0.5, 0.5, 0.2499, [1]), -1);
  assert.equal(grid.nearest(0.5, 0.5, 0.25, [0]), -1);
});

test("the nearest many are sorted by distance, then by row, and are all where there are fewer", () => {
  const {x, y, visible} = madeCloud(500, 3, 16), grid = new PointGrid(x, y);
  const distance = row => (x[row] - 0.3) ** 2 + (y[row] - 0.9) ** 2;
  const all = [...x.keys()].filter(row => visible[row]).sort((a, b) => distance(a) - distance(b) || a - b);

  assert.deepEqual(grid.nearestMany(0.3, 0.9, 40, visible), all.slice(0, 40));
  assert.deepEqual(grid.nearestMany(0.3, 0.9, 1000, visible), all);
});

test("a rectangle holds the points on its edges, in order", () => {
  const {x, y, visible} = madeCloud(1000, 4, 8), grid = new PointGrid(x, y);
  const rectangle = {left: 0.25, right: 0.5, top: 0.125, bottom: 0.75};
  const isInside = row => x[row] >= 0.25 && x[row] <= 0.5 && y[row] >= 0.125 && y[row] <= 0.75;
  const expected = [...x.keys()].filter(row => visible[row] && isInside(row));

  assert.deepEqual([...grid.inRectangle(rectangle, visible)], expected);
  assert.equal(grid.inRectangle({left: -1, right: 2, top: -1, bottom: 2}, new Uint8Array(1000).fill(1)).length, 1000);
});

test("edges and corners of a polygon are inside, whatever its direction", () => {
  const square = corners([0, 0], [4, 0], [4, 4], [0, 4]);
  for (const polygon of [square, [...square].reverse()]) {
    const isInside = ([x, y]) => isInPolygon(polygon, x, y);
    assert.ok([[0, 0], [4, 4], [2, 0], [0, 3], [4, 1], [1, 4], [2, 2]].every(isInside));
    assert.ok(![[-1, 0], [5, 4], [-1, 4], [5, 0], [2, -1], [2, 5]].some(isInside));
  }
});

test("the notch of a concave polygon is outside, also at the height of its corners", () => {
  const arrow = corners([0, 0], [4, 2], [0, 4], [2, 2]);

  assert.ok(isInPolygon(arrow, 3, 2));
  assert.ok(isInPolygon(arrow, 2, 2));
  assert.ok(!isInPolygon(arrow, 1, 2));
  assert.ok(!isInPolygon(arrow, -1, 2));
  assert.ok(!isInPolygon(arrow, -1, 0));
});

test("the middle of a star that crosses itself is outside by the even-odd rule", () => {
  const angles = [0, 2, 4, 1, 3].map(turn => turn * 2 * Math.PI / 5);
  const star = corners(...angles.map(angle => [Math.sin(angle), -Math.cos(angle)]));

  assert.ok(!isInPolygon(star, 0, 0));
  assert.ok(isInPolygon(star, 0, -0.7));
  assert.ok(!isInPolygon(star, 0, 0.7));
});

test("a bow tie has two insides, and a corner that is drawn twice changes nothing", () => {
  const plain = corners([0, 0], [4, 4], [4, 0], [0, 4]);
  const doubled = corners([0, 0], [0, 0], [4, 4], [4, 0], [4, 0], [0, 4]);
  for (const polygon of [plain, doubled]) {
    const inside = [[1, 2], [3, 2], [2, 1], [2, 3]].map(([x, y]) => isInPolygon(polygon, x, y));
    assert.deepEqual(inside, [true, true, false, false]);
    assert.ok(isInPolygon(polygon, 2, 2));
  }
});

test("polygons on a lattice hold the points that rays in a slanted direction count", () => {
  const random = seededRandom(9), lattice = () => Math.floor(random() * 9);
  const [dx, dy] = [1, Math.SQRT2 / 97];  // meets no corner of the lattice but those it starts from
  for (let trial = 0; trial < 200; trial++) {
    const polygon = Array.from({length: 3 + Math.floor(random() * 7)}, () => ({x: lattice(), y: lattice()}));
    for (let x = 0.5; x < 9; x++) {
      for (let y = 0.25; y < 9; y++) {
        let crossings = 0;
        polygon.forEach((a, index) => {
          const b = polygon[(index + 1) % polygon.length];
          const sideOf = corner => (corner.x - x) * dy - (corner.y - y) * dx;
          if (sideOf(a) > 0 === sideOf(b) > 0) return;
          const share = sideOf(a) / (sideOf(a) - sideOf(b));
          const meeting = {x: a.x + share * (b.x - a.x), y: a.y + share * (b.y - a.y)};
          if ((meeting.x - x) * dx + (meeting.y - y) * dy > 0) crossings++;
        });
        const onEdge = polygon.some((a, index) => {
          const b = polygon[(index + 1) % polygon.length], length = Math.hypot(b.x - a.x, b.y - a.y);
          return Math.abs(Math.hypot(x - a.x, y - a.y) + Math.hypot(x - b.x, y - b.y) - length) < 1e-12;
        });
        assert.equal(isInPolygon(polygon, x, y), onEdge || crossings % 2 === 1);
      }
    }
  }
});

test("a lasso finds the visible points inside, a line finds none", () => {
  const {x, y, visible} = madeCloud(3000, 5, 32), grid = new PointGrid(x, y);
  const polygon = corners([0.1, 0.1], [0.9, 0.2], [0.3, 0.4], [0.8, 0.9], [0.2, 0.7]);
  const expected = [...x.keys()].filter(row => visible[row] && isInPolygon(polygon, x[row], y[row]));

  assert.ok(expected.length > 300);
  assert.deepEqual([...grid.inPolygon(polygon, visible)], expected);
  assert.equal(grid.inPolygon(polygon.slice(0, 2), visible).length, 0);
});
