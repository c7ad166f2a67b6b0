// The legend: which shape is which set, which color is which value, how many points each has, and what is hidden.

import {KINDS, formatCount, formatNumber} from "./points.mjs";
import {countValues, describeFilter} from "./filters.mjs";
import {SCALES, categoryColors, codesByCount} from "./colors.mjs";
import {makeMask} from "./raster.mjs";
import {make} from "./details.mjs";

const MOST_ENTRIES = 40;  // of a column with many values, until all are asked for

// A legend whose entries are buttons. A click hides or shows a value, a double click or Alt and click shows only it.
export class Legend {
  #entries = new Map();  // code -> {button, count}

  // on: {toggle(column, code), only(column, code), range(column, change)}
  constructor(section, on) {
    this.section = section;
    this.on = on;
  }

  // Show the values of a column. kinds: the shape of each value, or null to show colors
  build(column, theme, kinds) {
    this.column = column;
    this.#entries.clear();
    this.section.replaceChildren(make("h2", {textContent: kinds ? "Sets" : `Color: ${column.title}`}));
    if (column.kind === "number") {
      this.section.append(...this.#numberParts(column, theme), this.#list([this.#entry(-1, hollowSwatch())]));
      return;
    }
    const colors = categoryColors(column, theme), codes = kinds ? [...column.values.keys()] : codesByCount(column);
    const entry = code => (kinds
      ? this.#entry(code, shapeSwatch(kinds[code]), KINDS[kinds[code]]) : this.#entry(code, colorSwatch(colors[code])));
    const list = this.#list(codes.slice(0, MOST_ENTRIES).map(entry));
    if (!kinds) list.append(this.#entry(-1, hollowSwatch()));
    this.section.append(list);
    if (codes.length > MOST_ENTRIES) {
      const text = `Show ${formatCount(codes.length - MOST_ENTRIES)} more values`;
      const more = make("button", {type: "button", textContent: text});
      more.addEventListener("click", () => {
        list.append(...codes.slice(MOST_ENTRIES).map(entry));
        more.remove();
        this.update(...this.state);
      });
      this.section.append(more);
    }
  }

  // Show the filters, and the counts that those of other columns leave.
  update(filters, failures) {
    this.state = [filters, failures];
    const {column} = this, {left, all} = countValues(column, filters, failures), filter = filters.get(column.key);
    for (const [code, {item, button, count}] of this.#entries) {
      const place = code < 0 ? all.length - 1 : code;
      const isShown = column.kind === "number" ? !filter?.hidesMissing : !filter?.hidden.has(code);
      button.setAttribute("aria-pressed", isShown);
      count.textContent = `${formatCount(left[place])} of ${formatCount(all[place])}`;
      item.hidden = code < 0 && all[place] === 0;
    }
    if (column.kind === "number") {
      this.from.value = filter?.from ?? "";
      this.to.value = filter?.to ?? "";
    }
  }

  #list(entries) {
    return make("ul", {className: "legend"}, ...entries);
  }

  #entry(code, swatch, remark = "") {
    const {column, on} = this, name = code < 0 ? "missing" : column.values[code];
    const count = make("span", {className: "count"});
    const button = make("button", {type: "button", className: "entry"}, swatch,
      make("span", {className: "name", textContent: name}), make("small", {textContent: remark}), count);
    button.dataset.code = code;
    button.addEventListener("click", event => (event.altKey ? on.only : on.toggle)(column, code));
    const item = make("li", {}, button);
    if (column.kind === "category") {
      button.addEventListener("dblclick", () => on.only(column, code));
      const only = make("button", {type: "button", className: "only", "aria-label": `Only ${name}`}, "only");
      only.addEventListener("click", () => on.only(column, code));
      item.append(only);
    }
    this.#entries.set(code, {item, button, count});
    return item;
  }

  #numberParts(column, theme) {
    const bar = make("div", {className: "scale", role: "img",
      "aria-label": `Colors from ${formatNumber(column.low)} to ${formatNumber(column.high)}`});
    bar.style.background = `linear-gradient(to right, ${SCALES[theme].join(", ")})`;
    const ends = [column.low, (column.low + column.high) / 2, column.high].map(value =>
      make("span", {textContent: Number.isNaN(value) ? "" : formatNumber(value)}));
    const field = (key, label, hint) => {
      const placeholder = Number.isNaN(hint) ? "" : formatNumber(hint);
      const input = make("input", {type: "number", step: "any", placeholder});
      input.addEventListener("change", () => {
        this.on.range(column, {[key]: input.value === "" ? null : Number(input.value)});
      });
      this[key] = input;
      return make("label", {}, label, input);
    };
    return [bar, make("div", {className: "ends"}, ...ends),
      make("p", {className: "soft", textContent: "Colors span the values between the quantiles of 2 and 98 %."}),
      make("div", {className: "range"}, field("from", "Show from", column.least), field("to", "to", column.greatest))];
  }
}

// Show how many points are shown, and what hides the others. on: {remove(key), removeAll()}
export function showFilters(section, columns, filters, shown, count, on) {
  const chips = columns.filter(column => filters.has(column.key)).map(column => {
    const text = describeFilter(column, filters.get(column.key));
    const action = `Remove the filter ${text}`;
    const chip = make("button", {type: "button", title: action, "aria-label": action}, `\u00d7 ${text}`);
    chip.addEventListener("click", () => on.remove(column.key));
    return chip;
  });
  if (chips.length > 1) {
    const all = make("button", {type: "button", textContent: "\u00d7 all", "aria-label": "Remove all filters"});
    all.addEventListener("click", on.removeAll);
    chips.unshift(all);
  }
  const hadFocus = section.contains(document.activeElement);
  const text = make("p", {tabIndex: -1},
    make("strong", {textContent: `${formatCount(shown)} of ${formatCount(count)} images shown`}));
  section.replaceChildren(text, make("div", {className: "chips"}, ...chips));
  if (hadFocus) (chips[0] ?? text).focus({preventScroll: true});
}

function colorSwatch(color) {
  const swatch = make("span", {className: "swatch"});
  swatch.style.background = color;
  return swatch;
}

function hollowSwatch() {
  return make("span", {className: "swatch hollow"});
}

// Return a small picture of a kind's shape, in the color of texts.
function shapeSwatch(kind) {
  const {side, coverage} = makeMask(kind, 11, false), image = new ImageData(side, side);
  const color = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  const [red, green, blue] = [1, 3, 5].map(start => parseInt(color.slice(start, start + 2), 16));
  coverage.forEach((value, place) => image.data.set([red, green, blue, value], place * 4));
  const canvas = make("canvas", {className: "swatch", width: side, height: side});
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
