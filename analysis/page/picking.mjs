// Which points are at a place of the map: the nearest one, those in a rectangle, those in a lasso.

// Points sorted into the cells of a uniform grid over 0..1, so that a search looks at few of them.
export class PointGrid {
  // x, y: Float32Array of coordinates in 0..1
  constructor(x, y) {
    this.x = x;
    this.y = y;
    this.side = Math.max(1, Math.min(256, Math.ceil(Math.sqrt(x.length / 2))));
    const {side} = this, cells = new Int32Array(x.length);
    this.starts = new Int32Array(side * side + 1);
    for (let row = 0; row < x.length; row++) {
      cells[row] = this.#place(y[row]) * side + this.#place(x[row]);
      this.starts[cells[row] + 1]++;
    }
    for (let cell = 0; cell < side * side; cell++) this.starts[cell + 1] += this.starts[cell];
    const next = this.starts.slice(0, -1);
    this.rows = new Int32Array(x.length);
    for (let row = 0; row < x.length; row++) this.rows[next[cells[row]]++] = row;
  }

  #place(value) {
    return Math.min(Math.max(Math.floor(value * this.side), 0), this.side - 1);
  }

  // Call visit(row) for each point in the cells that touch a rectangle.
  #visit({left, right, top, bottom}, visit) {
    const first = this.#place(left), last = this.#place(right);
    for (let line = this.#place(top); line <= this.#place(bottom); line++) {
      const end = this.starts[line * this.side + last + 1];
      for (let place = this.starts[line * this.side + first]; place < end; place++) visit(this.rows[place]);
    }
  }

  // Return the visible point nearest to a place, at most a radius away; of equally near ones the first; -1 if there is
  // none. visible: Uint8Array, 1 = can be found.
  nearest(x, y, radius, visible) {
    let found = -1, least = radius * radius;
    this.#visit({left: x - radius, right: x + radius, top: y - radius, bottom: y + radius}, row => {
      if (!visible[row]) return;
      const distance = (this.x[row] - x) ** 2 + (this.y[row] - y) ** 2;
      if (distance < least || (distance === least && (found < 0 || row < found))) [found, least] = [row, distance];
    });
    return found;
  }

  // Return the visible points nearest to a place, nearest first, at most `count`.
  nearestMany(x, y, count, visible) {
    const distance = row => (this.x[row] - x) ** 2 + (this.y[row] - y) ** 2;
    for (let radius = 2 / this.side; ; radius *= 2) {
      const square = {left: x - radius, right: x + radius, top: y - radius, bottom: y + radius};
      const rows = Array.from(this.inRectangle(square, visible)).filter(row => distance(row) <= radius * radius);
      if (rows.length >= count || radius > 4) {
        return rows.sort((a, b) => distance(a) - distance(b) || a - b).slice(0, count);
      }
    }
  }

  // Return the visible points in a rectangle, edges included, in order: Int32Array.
  inRectangle(rectangle, visible) {
    const {left, right, top, bottom} = rectangle, found = [];
    this.#visit(rectangle, row => {
      const x = this.x[row], y = this.y[row];
      if (visible[row] && x >= left && x <= right && y >= top && y <= bottom) found.push(row);
    });
    return Int32Array.from(found).sort();
  }

  // Return the visible points in a polygon, see `isInPolygon`, in order: Int32Array.
  inPolygon(polygon, visible) {
    if (polygon.length < 3) return new Int32Array(0);
    const xs = polygon.map(corner => corner.x), ys = polygon.map(corner => corner.y);
    const around = {left: Math.min(...xs), right: Math.max(...xs), top: Math.min(...ys), bottom: Math.max(...ys)};
    return this.inRectangle(around, visible).filter(row => isInPolygon(polygon, this.x[row], this.y[row]));
  }
}

// Return whether a place is inside a polygon, or on its edge. Where the outline crosses itself the even-odd rule
// decides: a place is inside if a ray from it meets the outline an odd number of times.
// polygon: [{x, y}, ...], closed from the last corner to the first
export function isInPolygon(polygon, x, y) {
  let inside = false;
  for (let index = 0, before = polygon.length - 1; index < polygon.length; before = index++) {
    const a = polygon[index], b = polygon[before];
    const side = (b.x - a.x) * (y - a.y) - (b.y - a.y) * (x - a.x);  // 0 on the line through a and b
    if (side === 0 && x >= Math.min(a.x, b.x) && x <= Math.max(a.x, b.x)
        && y >= Math.min(a.y, b.y) && y <= Math.max(a.y, b.y)) return true;
    // A corner at the height of the ray belongs to the edge below it only, so that it counts once.
    if ((a.y > y) !== (b.y > y) && (side < 0) === (b.y < a.y)) inside = !inside;
  }
  return inside;
}
