import assert from "node:assert/strict";
import {test} from "node:test";
import {csvCell, csvText, fileName, pointTable} from "../../../analysis/page/table.mjs";
import {readPoints} from "../../../analysis/page/points.mjs";
import {madeData} from "./made_points.mjs";

test("cells are quoted where they need it, and quotes are doubled (RFC 4180)", () => {
  assert.deepEqual(["a", "a,b", 'a"b', "a\nb", "a\rb", " a ", "", "a;b"].map(csvCell),
    ["a", '"a,b"', '"a""b"', '"a\nb"', '"a\rb"', " a ", "", "a;b"]);
});

test("texts that a spreadsheet would compute get an apostrophe, numbers stay", () => {
  assert.deepEqual(["=1+1", "+cmd", "-a", "@SUM(A1)", "\tx", "\r=1", '=HYPERLINK("a","b")'].map(csvCell),
    ["'=1+1", "'+cmd", "'-a", "'@SUM(A1)", "'\tx", "\"'\r=1\"", "\"'=HYPERLINK(\"\"a\"\",\"\"b\"\")\""]);
  assert.deepEqual(["-1", "+1.5e-3", "-.5", -2, 0, 1e-9, "-1-1", "+"].map(csvCell),
    ["-1", "+1.5e-3", "-.5", "-2", "0", "1e-9", "'-1-1", "'+"]);
});

test("lines end with CRLF, and cells that are missing are empty", () => {
  assert.equal(csvText(["a", "b"], [[1, null], [NaN, "x"]]), "a,b\r\n1,\r\n,x\r\n");
});

test("a table of points has all facts, coordinates that grow upwards, and the nearest real image", () => {
  const points = readPoints(madeData());

  const lines = pointTable(points, points.maps[0], Int32Array.of(0, 2, 3, 4)).split("\r\n");

  assert.deepEqual(lines, [
    "name,set,kind,group,class,place,distance,tsne x,tsne y,nearest real image,set of the nearest,distance to it",
    "a.png,real.zip,real,lesion 1,nv,arm,0.5,0,0,B.png,real.zip,0.5",
    "'=1+1,made.zip,synthetic,,nv,leg,,0,0.2,B.png,real.zip,0.1",
    '"say ""hi"", you",made.zip,synthetic,,nv,leg,2,0.2,0.2,a.png,real.zip,0.125',
    "\u{1F600}.png,projected.zip,projected,lesion 1,,arm,4,0.4,0.2,,,", ""]);
});

test("file names are made of letters, digits and dashes", () => {
  assert.deepEqual(["HAM10000, 5 % of it", "../..", "<b>", "\u00fcber"].map(title => fileName(title, "selection.csv")),
    ["HAM10000-5-of-it-selection.csv", "map-selection.csv", "b-selection.csv", "uber-selection.csv"]);
});
