// Draw the map on its two canvases: dots and pictures on the lower one, marks of single points on the upper one.

import {KINDS, neighborsOf, shuffledRows} from "./points.mjs";
import {dotOpacity, dotRadius, scaleOf, shownRectangle, toScreen} from "./view.mjs";
import {toPixel} from "./colors.mjs";
import {drawDots, makeStamps, sortByTile} from "./raster.mjs";

const MOST_PICTURES = 300;  // in view, for pictures to be drawn unless they are asked for; on small screens as many as
const PICTURES_COVER = 0.5;  // cover this share of the map
const MOST_PICTURES_ASKED = 1500;
const MOST_OUTLINED = 60;  // selected points; of more, outlines hide the colors, and the fading of the others tells them
const MOST_DOTS_ON_PICTURES = 3000;
const MOST_PIXEL_RATIO = 2;  // more costs time and shows no more
const MOST_PIXELS = 2.5e6;  // of a canvas: on larger ones pixels are drawn larger, so that moving stays smooth

// Return the sides of pictures in CSS pixels: the fewer there are, the larger.
function pictureSide(count) {
  return count <= 40 ? 80 : count <= 120 ? 56 : 40;
}

// The canvases of a page. Each drawing gets the whole state of the page, see map.mjs.
export class Drawing {
  #image = null;
  #orders = new Map();  // of the points of each map
  #stamps = {key: "", stamps: []};

  constructor(dots, marks, points, sprites) {
    this.dots = dots;
    this.marks = marks;
    this.points = points;
    this.sprites = sprites;
    this.order = shuffledRows(points.count);
    this.size = {width: 0, height: 0};
    this.hasPictures = false;
    this.areMarksClear = true;
    this.resize();
  }

  // Fit the canvases to their place. Returns whether anything changed.
  resize() {
    const {width, height} = this.marks.getBoundingClientRect();
    const fitting = Math.sqrt(MOST_PIXELS / Math.max(width * height, 1));
    const ratio = Math.min(devicePixelRatio, MOST_PIXEL_RATIO, Math.max(fitting, 1));
    const wide = Math.max(Math.round(width * ratio), 1), high = Math.max(Math.round(height * ratio), 1);
    if (this.dots.width === wide && this.dots.height === high && this.#image) return false;
    for (const canvas of [this.dots, this.marks]) [canvas.width, canvas.height] = [wide, high];
    this.size = {width: Math.max(width, 1), height: Math.max(height, 1)};
    this.ratio = ratio;
    this.context = this.dots.getContext("2d", {alpha: false});
    this.marksContext = this.marks.getContext("2d");
    this.#image = this.context.createImageData(wide, high);
    this.pixels = new Int32Array(this.#image.data.buffer);
    return true;
  }

  // Draw dots and pictures.
  drawPoints(state) {
    const {map, view, visible, colors, theme} = state, {points, size, ratio} = this, {width, height} = this.dots;
    const scale = scaleOf(view, size, map.bounds), corner = shownRectangle(view, size, map.bounds);
    this.radius = dotRadius(points.count, view.zoom);
    drawDots({width, height, pixels: this.pixels},
      {order: this.#orderOf(map), x: map.x, y: map.y, kinds: points.kinds, colors: colors.pixels,
        isMissing: colors.isMissing, visible},
      {scale: scale * ratio, left: corner.left, top: corner.top},
      {stamps: this.#stampsFor(view.zoom), background: toPixel(theme.paper), emphasized: state.isSelected});
    this.context.putImageData(this.#image, 0, 0);
    this.sprites.begin();
    const rows = this.#picturesToDraw(state, corner);
    this.hasPictures = rows.length > 0;
    this.pictureSide = pictureSide(rows.length);
    if (this.hasPictures) this.#drawPictures(rows, state, corner);
  }

  #orderOf(map) {
    if (!this.#orders.has(map)) this.#orders.set(map, sortByTile(this.order, map.x, map.y));
    return this.#orders.get(map);
  }

  #stampsFor(zoom) {
    const options = {radius: Math.max(this.radius * this.ratio, 1), opacity: dotOpacity(this.points.count, zoom),
      faded: 0.2, width: this.dots.width};
    const key = Object.values(options).join();
    if (this.#stamps.key !== key) this.#stamps = {key, stamps: makeStamps(options)};
    return this.#stamps.stamps;
  }

  // Return the points whose pictures are drawn, none where they are too many.
  #picturesToDraw({map, visible, draw, pin}, {left, right, top, bottom}) {
    if (draw === "dots") return [];
    const fitting = PICTURES_COVER * this.size.width * this.size.height / pictureSide(Infinity) ** 2;
    const limit = draw === "auto" ? Math.floor(Math.min(MOST_PICTURES, fitting)) : MOST_PICTURES_ASKED;
    const {tiles} = this.points.pictures, rows = [];
    for (const row of this.order) {
      if (tiles[row] < 0 || !visible[row]) continue;
      const x = map.x[row], y = map.y[row];
      if (x < left || x > right || y < top || y > bottom) continue;
      if (rows.length === limit) return draw === "auto" ? [] : rows;
      rows.push(row);
    }
    return rows.sort((a, b) => (a === pin) - (b === pin));  // the pinned one lies on top
  }

  #drawPictures(rows, {map, view, visible, colors, theme, isSelected}, corner) {
    const {context, points, size, ratio, sprites} = this, side = this.pictureSide, frame = 2.5;
    const place = row => toScreen(view, size, map.bounds, map.x[row], map.y[row]);
    const color = row => cssColor(colors.pixels[row]);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.imageSmoothingQuality = "high";
    for (const row of rows) {
      const picture = sprites.findForDrawing(row);
      if (picture === null) continue;
      const {x, y} = place(row), left = Math.round(x - side / 2), top = Math.round(y - side / 2);
      context.globalAlpha = isSelected !== null && !isSelected[row] ? 0.35 : 1;
      context.fillStyle = theme.paper;
      context.fillRect(left - frame - 1, top - frame - 1, side + 2 * frame + 2, side + 2 * frame + 2);
      context.fillStyle = color(row);
      context.fillRect(left - frame, top - frame, side + 2 * frame, side + 2 * frame);
      context.drawImage(picture.image, picture.x, picture.y, picture.side, picture.side, left, top, side, side);
      drawBadge(context, points.kinds[row], left, top, theme);
    }
    context.globalAlpha = 1;
    // Points without pictures would be hidden below those of others: they are drawn once more, on top.
    const {tiles} = points.pictures;
    let drawn = 0;
    for (const row of this.order) {
      if (tiles[row] >= 0 || !visible[row] || map.x[row] < corner.left || map.x[row] > corner.right
          || map.y[row] < corner.top || map.y[row] > corner.bottom) continue;
      if (++drawn > MOST_DOTS_ON_PICTURES) break;
      const {x, y} = place(row);
      tracePath(context, points.kinds[row], x, y, this.radius);
      context.lineWidth = 2;
      context.strokeStyle = theme.paper;
      context.stroke();
      context.lineWidth = 1.5;
      context.strokeStyle = context.fillStyle = color(row);
      if (colors.isMissing[row] || KINDS[points.kinds[row]] !== "real") context.stroke();
      else context.fill();
    }
    context.setTransform(1, 0, 0, 1, 0, 0);
  }

  // Draw outlines of selected, found, hovered and pinned points, lines to the pinned point's neighbors, and the lasso.
  drawMarks(state) {
    const context = this.marksContext, {map, view, theme} = state, {size, ratio} = this;
    const isEmpty = !state.selected && !state.found.length && state.pin < 0 && state.hover < 0 && !state.lasso.length
      && !state.hasCross;
    if (isEmpty && this.areMarksClear) return;  // an untouched canvas is not composed anew
    this.areMarksClear = isEmpty;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, size.width, size.height);
    const place = row => toScreen(view, size, map.bounds, map.x[row], map.y[row]);
    const reach = this.hasPictures ? this.pictureSide / 2 + 4 : this.radius + 3;
    const outline = (rows, color, width, more = 0) => {
      context.beginPath();
      for (const row of rows) this.#traceOutline(context, row, place(row), reach + more);
      strokeTwice(context, theme.paper, color, width);
    };
    const isInView = row => {
      const {x, y} = place(row);
      return x > -reach && y > -reach && x < size.width + reach && y < size.height + reach;
    };
    const inView = rows => rows.filter(row => state.visible[row] && isInView(row));
    if (state.selected) {
      const rows = inView(state.selected);
      if (rows.length <= MOST_OUTLINED) outline(rows, theme.ink, 1);
    }
    if (state.found.length) outline(inView(state.found), theme.accent, 2);
    if (state.pin >= 0) {
      const neighbors = neighborsOf(this.points, state.pin).map(({row}) => row), from = place(state.pin);
      context.beginPath();
      for (const {x, y} of neighbors.map(place)) {
        context.moveTo(from.x, from.y);
        context.lineTo(x, y);
      }
      strokeTwice(context, theme.paper, theme.ink, 1.25);
      outline(neighbors, theme.ink, 1.25);
      outline([state.pin], theme.accent, 3, 2);
    }
    if (state.hover >= 0) outline([state.hover], theme.ink, 2.5, 1);
    if (state.lasso.length) {
      context.beginPath();
      for (const corner of state.lasso) {
        const {x, y} = toScreen(view, size, map.bounds, corner.x, corner.y);
        context.lineTo(x, y);
      }
      context.closePath();
      context.globalAlpha = 0.12;
      context.fillStyle = theme.accent;
      context.fill("evenodd");
      context.globalAlpha = 1;
      strokeTwice(context, theme.paper, theme.accent, 1.5);
    }
    if (state.hasCross) {
      const [x, y] = [size.width / 2, size.height / 2];
      context.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        context.moveTo(x + 4 * dx, y + 4 * dy);
        context.lineTo(x + 12 * dx, y + 12 * dy);
      }
      strokeTwice(context, theme.paper, theme.ink, 1.5);
    }
  }

  #traceOutline(context, row, {x, y}, reach) {
    if (this.hasPictures && this.points.pictures.tiles[row] >= 0) {
      context.rect(x - reach, y - reach, 2 * reach, 2 * reach);
    } else {
      const radius = Math.min(reach, this.radius + 4);
      context.moveTo(x + radius, y);
      context.arc(x, y, radius, 0, 2 * Math.PI);
    }
  }
}

// Stroke the current path over a wider stroke in the page's color, so that it shows on points of any color.
function strokeTwice(context, paper, color, width) {
  context.lineWidth = width + 2.5;
  context.strokeStyle = paper;
  context.stroke();
  context.lineWidth = width;
  context.strokeStyle = color;
  context.stroke();
}

function cssColor(pixel) {
  return `rgb(${pixel & 255} ${pixel >>> 8 & 255} ${pixel >>> 16 & 255})`;
}

// Trace the outline of a kind's shape: a disc, a cross, a triangle.
function tracePath(context, kind, x, y, radius) {
  context.beginPath();
  if (KINDS[kind] === "real") context.arc(x, y, radius, 0, 2 * Math.PI);
  else if (KINDS[kind] === "synthetic") {
    for (const side of [-1, 1]) {
      context.moveTo(x - radius, y - side * radius);
      context.lineTo(x + radius, y + side * radius);
    }
  } else {
    for (const corner of [0, 1, 2]) {
      const angle = (corner / 3 - 0.25) * 2 * Math.PI;
      context.lineTo(x + 1.25 * radius * Math.cos(angle), y + 1.25 * radius * Math.sin(angle));
    }
    context.closePath();
  }
}

// Draw the shape of a kind into the corner of a picture that is not of a real image.
function drawBadge(context, kind, left, top, theme) {
  if (KINDS[kind] === "real") return;
  context.fillStyle = theme.paper;
  context.fillRect(left, top, 12, 12);
  tracePath(context, kind, left + 6, top + 6, 3.5);
  context.lineWidth = 1.75;
  context.strokeStyle = theme.ink;
  context.stroke();
}
