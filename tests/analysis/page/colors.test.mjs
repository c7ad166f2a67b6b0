import assert from "node:assert/strict";
import {test} from "node:test";
import {
  GRAYS, PALETTES, SCALES, categoryColors, codesByCount, colorPoints, parseColor, scaleColor, shareOfScale, toPixel,
} from "../../../analysis/page/colors.mjs";
import {readPoints} from "../../../analysis/page/points.mjs";
import {madeData} from "./made_points.mjs";

const PAPER = {light: "#ffffff", dark: "#17191c"};  // of latent/exploration_page.py
// Linear RGB as dichromats see it (Machado, Oliveira and Fernandes 2009, severity 1).
const VISIONS = {
  normal: [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
  protanopia: [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
  deuteranopia: [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
  tritanopia: [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
};

function linear(color) {
  const shares = parseColor(color).map(value => value / 255);
  return shares.map(share => (share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4));
}

function luminance(color) {
  return linear(color).reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
}

function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}

// CIE Lab of what someone sees, and the Euclidean distance of two colors in it (CIE76).
function lab(color, vision) {
  const [red, green, blue] = linear(color);
  const seen = VISIONS[vision].map(([ofRed, ofGreen, ofBlue]) => ofRed * red + ofGreen * green + ofBlue * blue);
  const [r, g, b] = seen.map(value => Math.min(Math.max(value, 0), 1));
  const xyz = [(0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505, 0.2126 * r + 0.7152 * g + 0.0722 * b,
    (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089];
  const [x, y, z] = xyz.map(value => (value > 0.008856 ? Math.cbrt(value) : 7.787 * value + 16 / 116));
  return [116 * y - 16, 500 * (x - y), 200 * (y - z)];
}

function difference(a, b, vision) {
  const [first, second] = [lab(a, vision), lab(b, vision)];
  return Math.hypot(...first.map((value, index) => value - second[index]));
}

for (const theme of ["light", "dark"]) {
  test(`colors of the ${theme} theme have a contrast of 3 with the page`, () => {
    const ofScale = [0, 0.25, 0.5, 0.75, 1].map(share => scaleColor(theme, share));
    for (const color of [...PALETTES[theme], GRAYS[theme], ...ofScale]) {
      assert.ok(contrast(color, PAPER[theme]) >= 3, `${color}: ${contrast(color, PAPER[theme])}`);
    }
  });

  test(`the color-blind tell the ${theme} theme's colors apart`, () => {
    const colors = [...PALETTES[theme], GRAYS[theme]];
    for (const vision of Object.keys(VISIONS)) {
      colors.forEach((a, index) => colors.slice(index + 1).forEach(b => {
        assert.ok(difference(a, b, vision) > 13, `${a} and ${b}, ${vision}: ${difference(a, b, vision)}`);
      }));
    }
  });

  test(`the ${theme} theme's scale gets lighter all the way, for everyone`, () => {
    const shares = Array.from({length: 33}, (_, step) => step / 32);
    for (const vision of Object.keys(VISIONS)) {
      const lightness = shares.map(share => lab(scaleColor(theme, share), vision)[0]);
      lightness.slice(1).forEach((value, index) => assert.ok(value > lightness[index], `${vision}, step ${index}`));
    }
  });
}

test("pixels hold red in the lowest byte, and are opaque", () => {
  assert.equal(toPixel("#010203"), 0xff030201 | 0);
  assert.deepEqual([...new Uint8Array(Int32Array.of(toPixel("#fe8001")).buffer)], [0xfe, 0x80, 0x01, 0xff]);
});

test("the eight most frequent values have colors, all others are gray", () => {
  const codes = Array.from({length: 10}, (_, code) => Array(code === 3 ? 5 : 10 - code).fill(code)).flat();
  const column = {kind: "category", values: [..."abcdefghij"], codes: Int32Array.from([...codes, -1])};

  assert.deepEqual(codesByCount(column), [0, 1, 2, 4, 3, 5, 6, 7, 8, 9]);
  const colors = categoryColors(column, "light");
  assert.equal(colors[4], PALETTES.light[3]);
  assert.deepEqual(colors.slice(8), [GRAYS.light, GRAYS.light]);
  assert.equal(new Set(colors).size, 9);
});

test("points have the colors of their values, and missing ones are marked", () => {
  const points = readPoints(madeData()), [ofClass, , distance] = points.columns;
  const [first, second] = PALETTES.dark.map(toPixel), gray = toPixel(GRAYS.dark);

  const byClass = colorPoints(ofClass, "dark", 5);
  assert.deepEqual([...byClass.pixels], [first, second, first, first, gray]);
  assert.deepEqual([...byClass.isMissing], [0, 0, 0, 0, 1]);
  const byDistance = colorPoints(distance, "dark", 5);
  assert.deepEqual([...byDistance.isMissing], [0, 0, 1, 0, 0]);
  assert.equal(byDistance.pixels[4], toPixel(SCALES.dark.at(-1)));
  assert.equal(byDistance.pixels[1], toPixel(SCALES.dark[0]));
});

test("numbers beyond the quantiles have the colors of the ends; a constant has the middle", () => {
  assert.deepEqual([0, 1, 2, 3, 9].map(value => shareOfScale({low: 1, high: 3}, value)), [0, 0, 0.5, 1, 1]);
  assert.deepEqual([1, 2, 3, NaN].map(value => shareOfScale({low: 2, high: 2}, value)), [0, 0.5, 1, NaN]);
  assert.equal(scaleColor("light", -5), SCALES.light[0]);
  assert.equal(scaleColor("light", 7), SCALES.light.at(-1));
  assert.equal(scaleColor("light", 0.25), SCALES.light[1]);
});
