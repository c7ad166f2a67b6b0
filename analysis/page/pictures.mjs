// Pictures of points, cut out of sprites: large images of many thumbnails each, which lie as base64 texts at the end of
// the page and are decoded only when one of their pictures is shown.

const MOST_SPRITES = 24;  // that are kept decoded: 1,024 x 1,024 pixels take 4 MiB each

// Return where the tile of a number is: {sprite, x, y}, in pixels of the sprite.
export function tilePlace(tile, {side, perRow, perSprite}) {
  const place = tile % perSprite;
  return {sprite: Math.floor(tile / perSprite), x: place % perRow * side, y: Math.floor(place / perRow) * side};
}

// The sprites of a page. A picture is not there as long as its sprite is not decoded; `onload` is called when one is.
// layout: pictures of the points, see points.mjs
export class Sprites {
  #decoded = new Map();  // number -> image, the one used longest ago first
  #pending = new Set();
  #broken = new Set();
  #used = new Set();  // by the current drawing

  constructor(layout, onload) {
    this.layout = layout;
    this.onload = onload;
    // While the document is read, the last sprites are not there yet.
    if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", () => onload());
  }

  // Begin a drawing of the map.
  begin() {
    this.#used.clear();
  }

  // Return a point's picture for the drawing, see `find`; null also if it is of one sprite too many: a drawing must not
  // drive out what it uses itself.
  findForDrawing(row) {
    const tile = this.layout.tiles[row];
    if (tile < 0) return null;
    const {sprite} = tilePlace(tile, this.layout);
    if (!this.#used.has(sprite) && this.#used.size >= MOST_SPRITES) return null;
    this.#used.add(sprite);
    return this.find(row);
  }

  // Return a point's picture: {image, x, y, side}; null if it has none, or not yet.
  find(row) {
    const tile = this.layout.tiles[row];
    if (tile < 0) return null;
    const {sprite, x, y} = tilePlace(tile, this.layout), image = this.#decoded.get(sprite);
    if (image === undefined) {
      this.#load(sprite);
      return null;
    }
    this.#decoded.delete(sprite);
    this.#decoded.set(sprite, image);
    return {image, x, y, side: this.layout.side};
  }

  async #load(sprite) {
    if (this.#pending.has(sprite) || this.#broken.has(sprite)) return;
    const elements = document.getElementsByClassName("sprite");
    // The last element may still be growing.
    if (sprite >= elements.length - (document.readyState === "loading" ? 1 : 0)) return;
    this.#pending.add(sprite);
    const image = new Image();
    image.src = `data:${this.layout.mime};base64,${elements[sprite].textContent.trim()}`;
    try {
      await image.decode();
      for (const oldest of this.#decoded.keys()) {
        if (this.#decoded.size < MOST_SPRITES) break;
        this.#decoded.delete(oldest);
      }
      this.#decoded.set(sprite, image);
    } catch {
      this.#broken.add(sprite);  // its points stay dots
    }
    this.#pending.delete(sprite);
    this.onload();
  }

  // Return a canvas that shows a point's picture, now or once its sprite is decoded.
  //   cssSize:  the side in CSS pixels
  element(row, label, cssSize) {
    const canvas = document.createElement("canvas"), size = Math.round(cssSize * Math.min(devicePixelRatio, 2));
    canvas.width = canvas.height = size;
    canvas.style.width = canvas.style.height = `${cssSize}px`;
    canvas.className = "picture";
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
    canvas.dataset.row = row;
    this.fill(canvas);
    return canvas;
  }

  // Draw the picture of a canvas made by `element`, if it is there and not drawn yet.
  fill(canvas) {
    if (canvas.dataset.isDrawn) return;
    const picture = this.find(Number(canvas.dataset.row));
    if (picture === null) return;
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    const {image, x, y, side} = picture;
    context.drawImage(image, x, y, side, side, 0, 0, canvas.width, canvas.height);
    canvas.dataset.isDrawn = "yes";
  }
}
