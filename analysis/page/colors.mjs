// Colors of points: a palette for categories, a scale for numbers, and gray for what is missing or beyond the palette.
// A theme is "light" or "dark". A pixel is a color as canvases store it on little-endian machines, 0xAABBGGRR, as
// a signed integer.

// Eight colors each, chosen by a search for the greatest least difference (CIEDE2000), also as people with protanopia,
// deuteranopia and tritanopia see them (Machado et al. 2009), from the hues of Okabe and Ito; the contrast with the
// page is at least 3 (WCAG 2.2, 1.4.11).
export const PALETTES = {
  light: ["#017bdd", "#ee5a0e", "#659d5c", "#6b21bc", "#875d47", "#05395c", "#444800", "#5f2835"],
  dark: ["#31a7ff", "#dd9d0b", "#d7e580", "#e8b9e2", "#e0605b", "#4b53f8", "#90508d", "#a6590b"],
};
export const GRAYS = {light: "#8a9098", dark: "#7f868e"};
// From blue over gray to yellow, as cividis does (Nunez et al. 2018), with lightness rising all the way; the ends keep
// a contrast of 3 with the page, so the yellow of the light theme is a dark one.
export const SCALES = {
  light: ["#00224e", "#2c416f", "#575d6d", "#7d7c6c", "#a58d1f"],
  dark: ["#4a6fb8", "#7382a8", "#a09f98", "#cbbb69", "#fee838"],
};

// Return [red, green, blue], 0 to 255, of a color "#rrggbb".
export function parseColor(color) {
  return [1, 3, 5].map(start => parseInt(color.slice(start, start + 2), 16));
}

// Return a color "#rrggbb" as an opaque pixel.
export function toPixel(color) {
  const [red, green, blue] = parseColor(color);
  return 0xff000000 | blue << 16 | green << 8 | red;
}

// Return the color at a share, 0 to 1, of a scale.
export function scaleColor(theme, share) {
  const stops = SCALES[theme], place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const below = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [parseColor(stops[below]), parseColor(stops[below + 1])];
  const mixed = from.map((value, index) => Math.round(value + (to[index] - value) * (place - below)));
  return `#${mixed.map(value => value.toString(16).padStart(2, "0")).join("")}`;
}

// Return a category's codes, most frequent first, those of equal counts in their order. The first eight have colors.
export function codesByCount(column) {
  const counts = new Int32Array(column.values.length);
  for (const code of column.codes) if (code >= 0) counts[code]++;
  return [...counts.keys()].sort((a, b) => counts[b] - counts[a] || a - b);
}

// Return the color of each code of a category, in the order of the codes.
export function categoryColors(column, theme) {
  const colors = new Array(column.values.length).fill(GRAYS[theme]);
  codesByCount(column).slice(0, PALETTES[theme].length).forEach((code, place) => {
    colors[code] = PALETTES[theme][place];
  });
  return colors;
}

// Return the colors of all points: {pixels, isMissing}, Int32Array and Uint8Array [N].
export function colorPoints(column, theme, count) {
  const pixels = new Int32Array(count).fill(toPixel(GRAYS[theme])), isMissing = new Uint8Array(count);
  if (column.kind === "category") {
    const table = categoryColors(column, theme).map(toPixel);
    for (let row = 0; row < count; row++) {
      const code = column.codes[row];
      if (code < 0) isMissing[row] = 1;
      else pixels[row] = table[code];
    }
    return {pixels, isMissing};
  }
  const table = Array.from({length: 256}, (_, step) => toPixel(scaleColor(theme, step / 255)));
  for (let row = 0; row < count; row++) {
    const share = shareOfScale(column, column.numbers[row]);
    if (Number.isNaN(share)) isMissing[row] = 1;
    else pixels[row] = table[Math.round(share * 255)];
  }
  return {pixels, isMissing};
}

// Return the place of a number on the scale, 0 to 1; numbers beyond the scale's ends have the colors of the ends.
export function shareOfScale(column, value) {
  if (Number.isNaN(value)) return NaN;
  if (!(column.high > column.low)) return value < column.low ? 0 : value > column.high ? 1 : 0.5;
  return Math.min(Math.max((value - column.low) / (column.high - column.low), 0), 1);
}
