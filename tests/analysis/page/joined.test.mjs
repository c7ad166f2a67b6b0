import assert from "node:assert/strict";
import {readFileSync, readdirSync} from "node:fs";
import {test} from "node:test";
import vm from "node:vm";

const FOLDER = new URL("../../../analysis/page/", import.meta.url);
const texts = new Map(readdirSync(FOLDER).filter(name => name.endsWith(".mjs"))
  .map(name => [name, readFileSync(new URL(name, FOLDER), "utf-8")]));
const importsOf = text => [...text.matchAll(/^import \{([^}]*)\}\s+from "\.\/([\w.]+)";$/gm)]
  .map(([, names, file]) => ({names: names.split(",").map(name => name.trim()), file}));

test("the modules import only each other, in no circle, and names that are there", () => {
  const placed = new Set();
  for (const [name, text] of texts) {
    assert.equal((text.match(/^import\b/gm) ?? []).length, importsOf(text).length, name);
    for (const {names, file} of importsOf(text)) {
      for (const wanted of names) {
        const declared = new RegExp(`^export (const|function|class) ${wanted}\\b`, "m");
        assert.match(texts.get(file), declared, `${name}: ${wanted}`);
      }
    }
  }
  while (placed.size < texts.size) {
    const next = [...texts].filter(([name, text]) =>
      !placed.has(name) && importsOf(text).every(({file}) => placed.has(file)));
    assert.ok(next.length > 0, "modules import each other in a circle");
    next.forEach(([name]) => placed.add(name));
  }
});

test("no name is declared by two modules, so that they can be joined into one script", () => {
  const plain = text => text.replace(/^import\b[^;]*;\n/gm, "").replace(/^export /gm, "");
  const script = [...texts.values()].map(plain).join("\n");

  new vm.Script(`"use strict";\n{\n${script}\n}`);
});

test("no module makes HTML or code of texts, or asks for anything", () => {
  const forbidden = /innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|fetch\(|import\(/;
  for (const [name, text] of texts) {
    assert.doesNotMatch(text, forbidden, name);
    assert.match(text, /^[\x20-\x7e\n]*$/, `${name} is ASCII`);
  }
});
