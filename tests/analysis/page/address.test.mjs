import assert from "node:assert/strict";
import {test} from "node:test";
import {readAddress, writeAddress} from "../../../analysis/page/address.mjs";
import {readPoints} from "../../../analysis/page/points.mjs";
import {madeData} from "./made_points.mjs";

const points = readPoints(madeData());
const start = {map: "tsne", color: "class", view: {x: 0.5, y: 0.5, zoom: 1}, filters: new Map(), pin: -1};

test("what is written is read again", () => {
  const state = {
    map: "tsne", color: "distance", view: {x: 0.12346, y: 1, zoom: 12.34}, pin: 4,
    filters: new Map([["*", {hidden: new Set([1])}], ["class", {hidden: new Set([-1, 0])}],
      ["distance", {from: -0.25, to: 1e-7, hidesMissing: true}]]),
  };

  const text = writeAddress(state);

  assert.equal(text, "map=tsne&color=distance&at=0.12346_1.00000_12.34&pin=4&hide.*=1&hide.class=-1_0"
    + "&range.distance=-0.25_1e-7_known");
  assert.deepEqual(readAddress(`#${text}`, points), state);
});

test("open ranges are read again", () => {
  for (const filter of [{from: null, to: 3, hidesMissing: false}, {from: 3, to: null, hidesMissing: false},
    {from: null, to: null, hidesMissing: true}]) {
    const filters = new Map([["distance", filter]]);
    assert.deepEqual(readAddress(writeAddress({...start, filters}), points).filters, filters);
  }
});

test("an empty address tells nothing", () => {
  for (const text of ["", "#", "#&&=&=="]) assert.deepEqual(readAddress(text, points), {filters: new Map()});
});

test("whatever does not fit the page is ignored", () => {
  for (const text of ["map=umap", "map=__proto__", "color=no", "color=*", "color=<script>alert(1)</script>",
    "pin=5", "pin=-1", "pin=1.5", "pin=1e0", "pin=", "pin=99999999999999999999", "pin=0x1", "pin= 1",
    "at=0.5_0.5", "at=0.5_0.5_0.5", "at=0.5_0.5_201", "at=NaN_0.5_2", "at=1.1_0.5_2", "at=Infinity_0_1", "at=1e999_0_1",
    "at=__2", "hide.class=2", "hide.class=-2", "hide.class=", "hide.class=0_x", "hide.no=0", "hide.distance=0",
    "hide.__proto__=0",
    "hide.constructor=0", "hide=0", "range.class=0_1", "range.distance=", "range.distance=_", "range.distance=a_1",
    "range.distance=0_1_known_more", "range.distance=0_1_2", "range.distance=Infinity_", "range.distance=1e999_",
    "constructor=1", "filters=1", "view=1", "%", "%E0%A4%A", "x".repeat(100000), "hide.class=".repeat(1000)]) {
    assert.deepEqual(readAddress(`#${text}`, points), {filters: new Map()}, text.slice(0, 50));
  }
});

test("wrong parts do not hinder right ones", () => {
  assert.deepEqual(readAddress("#map=no&color=place&at=bad&pin=2&hide.class=7&hide.place=1", points),
    {color: "place", pin: 2, filters: new Map([["place", {hidden: new Set([1])}]])});
});
