// Draw points into an image, pixel by pixel: much faster than a canvas draws shapes where no GPU helps.

// The shape tells the kind of a point: real images are discs, synthetic ones crosses, projected ones triangles. A
// hollow shape stands for a missing value.
const SHAPES = [
  (x, y, thickness, isHollow) => {
    const radius = Math.hypot(x, y);
    return radius <= 1 && (!isHollow || radius >= 1 - thickness);
  },
  (x, y, thickness, isHollow) => {
    const across = Math.min(Math.abs(x - y), Math.abs(x + y)) / Math.SQRT2;
    const halfWidth = isHollow ? thickness / 2 : Math.max(thickness / 2, 0.36);
    return Math.max(Math.abs(x), Math.abs(y)) <= 1 && across <= halfWidth;
  },
  (x, y, thickness, isHollow) => {
    // Distances from the three sides of a triangle that points up, within a circle of radius 1.25; negative outside.
    const inside = Math.min(0.625 - y, ...[-1, 1].map(side => (1.25 + y - side * Math.sqrt(3) * x) / 2));
    return inside >= 0 && inside <= (isHollow ? thickness * 0.7 : Math.max(thickness, 0.34));
  },
];
const SAMPLES = 5;  // per pixel and axis, for smooth edges
const TILES = 32;  // along each side of the map
const OPAQUE = 0xff000000 | 0;

// Return the mask of a shape: {side, coverage}; coverage is Uint8Array [side * side], 0 to 255.
//   kind:    number of the shape
//   radius:  in pixels
export function makeMask(kind, radius, isHollow) {
  const reach = Math.ceil(radius * 1.25), side = 2 * reach + 1, coverage = new Uint8Array(side * side);
  const thickness = Math.max(1.3 / radius, 0.28);
  for (let line = 0; line < side; line++) {
    for (let column = 0; column < side; column++) {
      let hits = 0;
      for (let sample = 0; sample < SAMPLES * SAMPLES; sample++) {
        const x = column - reach + (sample % SAMPLES + 0.5) / SAMPLES - 0.5;
        const y = line - reach + (Math.floor(sample / SAMPLES) + 0.5) / SAMPLES - 0.5;
        if (SHAPES[kind](x / radius, y / radius, thickness, isHollow)) hits++;
      }
      coverage[line * side + column] = Math.round(255 * hits / SAMPLES ** 2);
    }
  }
  return {side, coverage};
}

// A mask as the pixels that it touches, with the opacity of each, 1 to 256.
function listPixels({side, coverage}, opacity, width) {
  const reach = (side - 1) / 2, offsets = [], weights = [];
  coverage.forEach((value, place) => {
    const weight = Math.round(value * opacity * 256 / 255);
    if (weight === 0) return;
    offsets.push((Math.floor(place / side) - reach) * width + place % side - reach);
    weights.push(weight);
  });
  return {reach, offsets: Int32Array.from(offsets), weights: Int32Array.from(weights)};
}

// Return the stamps of all shapes, for `drawDots`.
//   radius:   in pixels
//   opacity:  0 to 1; faded: that of points which are not emphasized
//   width:    of the image
export function makeStamps({radius, opacity, faded, width}) {
  return SHAPES.flatMap((_, kind) => [false, true].flatMap(isHollow => {
    const mask = makeMask(kind, radius, isHollow);
    return [listPixels(mask, opacity, width), listPixels(mask, faded, width)];
  }));
}

// Return rows sorted by the tile of the map that their points are in, those of a tile in the order given. Drawn so, the
// processor's cache holds the pixels at work, and still no set lies over another.
export function sortByTile(rows, x, y) {
  const tile = row => Math.floor(y[row] * (TILES - 0.001)) * TILES + Math.floor(x[row] * (TILES - 0.001));
  const starts = new Int32Array(TILES * TILES + 1), sorted = new Int32Array(rows.length);
  for (const row of rows) starts[tile(row) + 1]++;
  for (let index = 0; index < TILES * TILES; index++) starts[index + 1] += starts[index];
  for (const row of rows) sorted[starts[tile(row)]++] = row;
  return sorted;
}

// Draw points over a background, and return how many are within the image.
//   image:   {width, height, pixels: Int32Array}
//   dots:    {order, x, y, kinds, colors, isMissing, visible}: order holds rows, first drawn first; x and y are on the
//            map, the others typed arrays [N]; colors: Int32Array of pixels
//   place:   {scale, left, top}: a point of the map lies at ((x - left) * scale, (y - top) * scale)
//   style:   {stamps, background, emphasized}: of `makeStamps`; a pixel; Uint8Array, or null = all points are
export function drawDots(image, dots, place, {stamps, background, emphasized}) {
  const {width, height, pixels} = image, {order, x, y, kinds, colors, isMissing, visible} = dots;
  pixels.fill(background);
  let drawn = 0;
  for (let turn = 0; turn < order.length; turn++) {
    const row = order[turn];
    if (!visible[row]) continue;
    const column = Math.round((x[row] - place.left) * place.scale);
    const line = Math.round((y[row] - place.top) * place.scale);
    const isFaded = emphasized !== null && !emphasized[row];
    const stamp = stamps[kinds[row] * 4 + (isMissing[row] ? 2 : 0) + (isFaded ? 1 : 0)], {reach} = stamp;
    if (column < -reach || line < -reach || column >= width + reach || line >= height + reach) continue;
    drawn++;
    const isWhole = column >= reach && line >= reach && column < width - reach && line < height - reach;
    press(isWhole ? stamp : cutStamp(stamp, column, line, width, height), pixels, line * width + column, colors[row]);
  }
  return drawn;
}

// Mix a color into the pixels of a stamp around a middle. Signed integers throughout: V8 computes with them three times
// as fast as with unsigned ones. Red and blue are mixed in one product, green in another.
function press({offsets, weights}, pixels, middle, color) {
  const redBlue = color & 0xff00ff, green = color & 0xff00;
  for (let index = 0; index < offsets.length; index++) {
    const target = middle + offsets[index] | 0, weight = weights[index], rest = 256 - weight, under = pixels[target];
    pixels[target] = OPAQUE | (Math.imul(under & 0xff00ff, rest) + Math.imul(redBlue, weight)) >>> 8 & 0xff00ff
      | (Math.imul(under & 0xff00, rest) + Math.imul(green, weight)) >>> 8 & 0xff00;
  }
}

// Return the part of a stamp within the image. A pixel that left the image on one side shows up on the other one, far
// from the stamp's middle.
function cutStamp({reach, offsets, weights}, column, line, width, height) {
  const isInside = offset => {
    const target = line * width + column + offset;
    return target >= 0 && target < width * height && Math.abs(target % width - column) <= reach;
  };
  return {offsets: offsets.filter(isInside), weights: weights.filter((_, index) => isInside(offsets[index]))};
}
