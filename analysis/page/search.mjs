// Search by name: a field with a list of results below it, which arrow keys and Enter choose from (a combobox of
// WAI-ARIA 1.2).

import {formatCount} from "./points.mjs";
import {findNames} from "./filters.mjs";
import {labelOf, make} from "./details.mjs";

const MOST_RESULTS = 50;

// Make a field search the names of points.
//   field, list:  the elements
//   on:           {found(rows): the results that are listed; choose(row); leave(): Escape}
export function listenToSearch(field, list, points, on) {
  let lowerNames = null, rows = [], active = -1;

  function close() {
    list.hidden = true;
    field.setAttribute("aria-expanded", false);
    field.removeAttribute("aria-activedescendant");
  }

  function activate(place) {
    active = place;
    [...list.querySelectorAll("[role=option]")].forEach((option, index) => {
      option.setAttribute("aria-selected", index === active);
      if (index !== active) return;
      option.scrollIntoView({block: "nearest"});
      field.setAttribute("aria-activedescendant", option.id);
    });
  }

  function search() {
    lowerNames ??= points.names.map(name => name.toLowerCase());
    const found = findNames(lowerNames, field.value, MOST_RESULTS);
    rows = found.rows;
    const options = rows.map((row, index) => {
      const option = make("li", {role: "option", id: `result-${index}`, "aria-selected": false},
        points.names[row], make("small", {textContent: ` ${labelOf(points, row)}`}));
      option.dataset.row = row;
      option.addEventListener("pointerdown", event => event.preventDefault());  // the field keeps the focus
      option.addEventListener("click", () => choose(row));
      return option;
    });
    const note = found.total > rows.length ? `${formatCount(found.total)} found, the first ${rows.length} are listed`
      : `${found.total} found`;
    list.replaceChildren(...options, make("li", {className: "note", role: "presentation", textContent: note}));
    list.hidden = field.value.trim() === "";
    field.setAttribute("aria-expanded", !list.hidden);
    field.removeAttribute("aria-activedescendant");
    active = -1;
    on.found(Int32Array.from(rows));
  }

  function choose(row) {
    close();
    on.choose(row);
  }

  field.addEventListener("input", search);
  field.addEventListener("focus", () => {
    if (field.value.trim() !== "") search();
  });
  field.addEventListener("blur", close);
  field.addEventListener("keydown", event => {
    if (event.key === "Escape") {
      field.value = "";
      search();
      on.leave();
    } else if (event.key === "Enter") {
      if (rows.length > 0) choose(rows[Math.max(active, 0)]);
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (rows.length === 0) return;
      if (list.hidden) search();
      const step = event.key === "ArrowDown" ? 1 : -1;
      activate(active < 0 && step < 0 ? rows.length - 1 : (active + step + rows.length) % rows.length);
    } else return;
    event.preventDefault();
  });
}
