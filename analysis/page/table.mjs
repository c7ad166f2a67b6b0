// The selected points as a CSV table (RFC 4180), for spreadsheets.

import {groupOf, neighborsOf} from "./points.mjs";

// Return a cell. Texts that a spreadsheet would compute as a formula get an apostrophe in front; numbers stay.
export function csvCell(value) {
  let text = String(value);
  const isNumber = typeof value === "number" || /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text);
  if (/^[=+\-@\t\r]/.test(text) && !isNumber) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// Return a table as text. rows: arrays of texts and numbers; null and NaN leave a cell empty
export function csvText(header, rows) {
  const text = cell => (cell === null || Number.isNaN(cell) ? "" : csvCell(cell));
  const line = cells => `${cells.map(text).join(",")}\r\n`;
  return [header, ...rows].map(line).join("");
}

// Return float32 numbers without the digits that they do not have.
function single(value) {
  return Number(value.toPrecision(7));
}

// Return a table of points, with all that the page knows about them. map: whose coordinates are listed
export function pointTable(points, map, rows) {
  const {setColumn, sets, names} = points, columns = points.columns.filter(column => column.key !== "set");
  const header = ["name", "set", "kind", ...(points.groups ? ["group"] : []), ...columns.map(column => column.title),
    `${map.key} x`, `${map.key} y`, "nearest real image", "set of the nearest", "distance to it"];
  const lines = Array.from(rows, row => {
    const [nearest] = neighborsOf(points, row);
    const facts = columns.map(column => (column.kind === "number" ? single(column.numbers[row])
      : column.values[column.codes[row]] ?? null));
    return [names[row], setColumn.values[setColumn.codes[row]], sets[setColumn.codes[row]].kind,
      ...(points.groups ? [groupOf(points, row)] : []), ...facts, single(map.x[row]), single(1 - map.y[row]),
      ...(nearest ? [names[nearest.row], sets[setColumn.codes[nearest.row]].name, single(nearest.distance)]
        : [null, null, null])];
  });
  return csvText(header, lines);
}

// Return a file name made of a title: letters, digits and single dashes.
export function fileName(title, ending) {
  const withoutAccents = title.normalize("NFKD").replace(/\p{M}/gu, "");
  const plain = withoutAccents.replace(/[^A-Za-z0-9]+/g, "-").slice(0, 60).replace(/^-+|-+$/g, "");
  return `${plain || "map"}-${ending}`;
}
