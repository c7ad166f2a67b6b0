// Small data for the tests of the page's scripts, as analysis/embedding_page.py writes them.

export function base64(numbers) {
  return Buffer.from(numbers.buffer, numbers.byteOffset, numbers.byteLength).toString("base64");
}

// Two real images, two synthetic ones and a projected one.
export function madeData() {
  return {
    title: "Map", count: 5, numReal: 2, space: "features",
    sets: [{name: "real.zip", kind: "real", start: 0, count: 2, pictures: false, why: "They may not be shown."},
      {name: "made.zip", kind: "synthetic", start: 2, count: 2, pictures: true, why: ""},
      {name: "projected.zip", kind: "projected", start: 4, count: 1, pictures: true, why: ""}],
    names: ["a.png", "B.png", "=1+1", "say \"hi\", you", "\u{1F600}.png"],
    groups: {values: ["lesion 1"], codes: base64(Int32Array.of(0, 0, -1, -1, 0))},
    maps: [{key: "tsne", title: "t-SNE", note: "A note.", x: base64(Uint16Array.of(0, 65535, 0, 13107, 26214)),
      y: base64(Uint16Array.of(0, 65535, 13107, 13107, 13107))}],
    columns: [
      {key: "class", title: "class", kind: "category", values: ["nv", "mel"],
        codes: base64(Uint8Array.of(0, 1, 0, 0, 255))},
      {key: "place", title: "place", kind: "category", values: ["arm", "leg"], wide: true,
        codes: base64(Uint16Array.of(0, 65535, 1, 1, 0))},
      {key: "distance", title: "distance", kind: "number", data: base64(Float32Array.of(0.5, 0.25, NaN, 2, 4))}],
    neighbors: {count: 2, rows: base64(Int32Array.of(1, -1, 0, -1, 1, 0, 0, 1, -1, -1)),
      distances: base64(Float32Array.of(0.5, NaN, 0.5, NaN, 0.1, 0.3, 0.125, 0.25, NaN, NaN))},
    pictures: {side: 64, perRow: 2, perSprite: 4, mime: "image/webp", tiles: base64(Int32Array.of(-1, -1, 0, 6, -1))},
  };
}

// Return a function that gives numbers from 0 to 1, always the same ones (mulberry32).
export function seededRandom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ state >>> 15, state | 1);
    mixed = (mixed + Math.imul(mixed ^ mixed >>> 7, mixed | 61)) ^ mixed;
    return ((mixed ^ mixed >>> 14) >>> 0) / 2 ** 32;
  };
}
