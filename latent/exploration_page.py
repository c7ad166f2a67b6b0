"""Write what explore.py finds as pages: one HTML file each, which any browser opens and which works offline.

A page has its images inside, and loads nothing but picture files beside it, which its policy enforces. Every text is
escaped: class names and file names may contain anything. The only script that can run is the one below.
"""

import base64
import hashlib
import html
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from dnnlib.files import atomic_write

_COLD, _WARM = "45 111 193", "224 130 20"  # blue and orange, which look different to the color-blind too
_STRONGEST = 0.55  # opacity of the strongest shade: texts stay legible in light and in dark colors

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --line: #d5d8dc; --soft: #5b6168; --mark: #eef2f7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --paper: #17191c; --line: #3a3f45; --soft: #a2a9b1; --mark: #24292f }
}
body { margin: 0 auto; max-width: 75rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25 }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem }
h3 { font-size: 1rem; margin-top: 1.5rem }
p, li { max-width: 46rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: middle }
th button { all: unset; cursor: pointer; font-weight: bold }
th button:focus-visible, tr:focus-visible { outline: 2px solid #2d6fc1 }
th[aria-sort="ascending"] button::after { content: " \\25B2" }
th[aria-sort="descending"] button::after { content: " \\25BC" }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr[data-picture] { cursor: pointer }
tr.chosen { background: var(--mark) }
table.pictures th, table.pictures td { padding: .15rem; border: 0; text-align: center; font-weight: normal }
table.pictures td { vertical-align: top }
table.pictures tbody th { text-align: right; padding-right: .6rem; white-space: nowrap }
table.pictures td span { display: block; max-width: 17rem; margin: 0 auto; font-size: .8rem;
  color: var(--soft); overflow-wrap: anywhere }
figure { margin: 1rem 0 }
figcaption, p.caption { color: var(--soft); font-size: .9rem; max-width: 46rem }
p.caption { margin-bottom: -.5rem }
img { max-width: 100%; height: auto; vertical-align: middle }
td img { max-width: none }
img.enlarged { image-rendering: pixelated }
@media (max-width: 40rem) {
  body { padding: .6rem; font-size: .95rem }
  th, td { padding: .2rem .35rem }
  td.long { min-width: 14rem }
}
"""

SCRIPT = """
"use strict";
function value(row, column) {
  const cell = row.cells[column];
  return "number" in cell.dataset ? Number(cell.dataset.number) : cell.textContent;
}
function compare(a, b, direction) {
  const missing = [Number.isNaN(a), Number.isNaN(b)];
  if (missing[0] || missing[1]) return missing[0] - missing[1];
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return direction * (typeof a === "number" ? a - b : a.localeCompare(b));
}
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = Array.from(body.rows), headings = Array.from(table.tHead.rows[0].cells);
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", order);
    const direction = order === "ascending" ? 1 : -1;
    body.append(...rows.slice().sort((a, b) => compare(value(a, column), value(b, column), direction)));
  }));
  const figure = table.parentElement.nextElementSibling;
  for (const row of rows.filter(row => "picture" in row.dataset)) {
    const show = event => {
      event.preventDefault();
      rows.forEach(other => other.classList.toggle("chosen", other === row));
      const picture = figure.querySelector("img");
      picture.src = row.dataset.picture;
      picture.alt = figure.querySelector("figcaption").textContent = row.cells[0].textContent;
    };
    row.addEventListener("click", show);
    row.addEventListener("keydown", event => { if (event.key === "Enter") show(event); });
  }
}
"""

# The hash admits the script above and no other, wherever one might come from. Nothing is requested but pictures in the
# page and in its folder ('self' for pages on a server, file: for pages on a disk).
_POLICY = "; ".join((
    "default-src 'none'", "img-src data: 'self' file:", "style-src 'unsafe-inline'",
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'",
    "base-uri 'none'", "form-action 'none'"))


@dataclass(frozen=True)
class Cell:
    """A cell of a sortable table."""

    text: str
    sort: float | None = None  # the number that it is sorted by, NaN last; None = by its text
    shade: float | None = None  # colors it, from -1 (blue) over 0 (none) to 1 (orange); None or NaN = none
    title: str = ""  # shown when the mouse rests on it
    link: str | None = None  # a picture file in the page's folder, shown below the table when the row is chosen
    is_long: bool = False  # a sentence, which small screens do not squeeze into a narrow column


def write_page(path: str | os.PathLike, title: str, body: str) -> None:
    """Write an HTML page, whole or not at all. Raises OSError.

    title:  any text
    body:   HTML, made by the functions below
    """
    shown = html.escape(title)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{shown}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{shown}</h1>
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""
    with atomic_write(path, text=True) as file:
        file.write(page.encode(errors="backslashreplace").decode())  # bytes of file names that are not UTF-8


def heading(text: str, level: int = 2) -> str:
    """Return a heading. level: 2 for a section, 3 for a part of one"""
    return f"<h{level}>{html.escape(text)}</h{level}>\n"


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>\n"


def bullet_list(texts: Iterable[str]) -> str:
    """Return a list of plain texts; "" without any."""
    items = "".join(f"<li>{html.escape(text)}</li>\n" for text in texts)
    return f"<ul>\n{items}</ul>\n" if items else ""


def image_tag(image: Tensor | np.ndarray | PIL.Image.Image, alt: str, scale: int = 1, most: int | None = None) -> str:
    """Return an image as part of the page, a PNG.

    image:  uint8 [1 or 3, H, W], or one of Pillow
    alt:    text for those who do not see it
    scale:  pixels of the screen per pixel
    most:   larger images are reduced to this many pixels on their longer side; None = none are
    """
    if not isinstance(image, PIL.Image.Image):
        image = _to_picture(torch.as_tensor(image))
    if most is not None and max(image.size) > most:
        image = image.copy()
        image.thumbnail((most, most), PIL.Image.Resampling.LANCZOS)
    with io.BytesIO() as file:
        image.save(file, "png")
        data = base64.b64encode(file.getvalue()).decode()
    kind = ' class="enlarged"' if scale > 1 else ""
    return (f'<img{kind} src="data:image/png;base64,{data}" alt="{html.escape(alt)}" width="{image.width * scale}" '
            f'height="{image.height * scale}">')


def thumbnail(pixels: Tensor, alt: str, side: int = 128) -> str:
    """Return an image for tables: small ones are enlarged to up to `side` pixels of the screen, large ones reduced.

    pixels:  uint8 [1 or 3, H, W]
    """
    return image_tag(pixels, alt, scale=max(1, side // max(pixels.shape[1:])), most=side)


def figure(image: str, caption: str) -> str:
    """Return an image with a text below it. image: HTML, see `image_tag`"""
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>\n"


def picture_table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], caption: str = "") -> str:
    """Return images side by side, with a text above each column and one beside each row.

    columns:  texts
    rows:     a text, and the images of the row as HTML, see `image_tag` and `captioned`; "" leaves a cell empty
    """
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    lines = "".join(f'<tr><th scope="row">{html.escape(name)}</th>'
                    f'{"".join(f"<td>{image}</td>" for image in images)}</tr>\n' for name, images in rows)
    return (f'{_caption(caption)}<div class="wide"><table class="pictures"><thead><tr><td></td>{head}</tr></thead>\n'
            f"<tbody>{lines}</tbody></table></div>\n")


def captioned(image: str, text: str) -> str:
    """Return an image with a small text below it, for a cell of `picture_table`. image: HTML"""
    return f"{image}<span>{html.escape(text)}</span>"


def describe_mean(found: Mapping[str, float | None]) -> str:
    """Return "1.2 (1.1 to 1.3)" for a mean with the ends of its interval, see `mean_with_interval`."""
    interval = "" if found["low"] is None else f" ({found['low']:.3g} to {found['high']:.3g})"
    return f"{found['mean']:.3g}{interval}"


def sortable_table(columns: Sequence[str], rows: Sequence[Sequence[Cell | str]], caption: str = "") -> str:
    """Return a table that is sorted by a click, or Enter, on a heading.

    columns:  texts of the headings
    rows:     a cell for each column; the picture of a row is that of its first cell with a link; below the table is
              that of the first row with one, and the page's script shows that of a row which is chosen

    A column is right-aligned if its cells are sorted by numbers. Without scripts it is a plain table with links.
    Raises ValueError if a row has another number of cells.
    """
    table = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    if any(len(row) != len(columns) for row in table):
        raise ValueError(f"a row of the table has another number of cells than its {len(columns)} columns")
    numeric = [bool(table) and all(row[index].sort is not None for row in table) for index in range(len(columns))]
    head = "".join(f'<th scope="col"{_number_class(is_number)}><button type="button">{html.escape(text)}</button></th>'
                   for text, is_number in zip(columns, numeric, strict=True))
    chosen = next((row for row in table if _picture(row) is not None), None)
    shown = "" if chosen is None else figure(
        f'<img src="{_relative(_picture(chosen))}" alt="{html.escape(chosen[0].text)}">', chosen[0].text)
    return (f'{_caption(caption)}<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead>\n'
            f'<tbody>{"".join(_row(row, row is chosen) for row in table)}</tbody></table></div>\n{shown}')


def _picture(row: Sequence[Cell]) -> str | None:
    return next((cell.link for cell in row if cell.link is not None), None)


def _row(cells: Sequence[Cell], is_chosen: bool) -> str:
    link = _picture(cells)
    attributes = "" if link is None else f' data-picture="{_relative(link)}" tabindex="0"'
    if is_chosen:
        attributes += ' class="chosen"'
    return f'<tr{attributes}>{"".join(map(_cell, cells))}</tr>\n'


def _cell(cell: Cell) -> str:
    attributes = ""
    if cell.sort is not None:
        number = "NaN" if math.isnan(cell.sort) else repr(float(cell.sort)).replace("inf", "Infinity")
        attributes += f'{_number_class(True)} data-number="{number}"'
    elif cell.is_long:
        attributes += ' class="long"'
    if cell.shade is not None and not math.isnan(cell.shade) and cell.shade != 0:
        color, opacity = _WARM if cell.shade > 0 else _COLD, _STRONGEST * min(abs(cell.shade), 1)
        attributes += f' style="background: rgb({color} / {opacity:.3f})"'
    if cell.title:
        attributes += f' title="{html.escape(cell.title)}"'
    text = html.escape(cell.text)
    if cell.link is not None:
        text = f'<a href="{_relative(cell.link)}">{text}</a>'
    return f"<td{attributes}>{text}</td>"


def _relative(name: str) -> str:
    """Return the address of a file in the page's folder; never that of another server, or a script."""
    return html.escape(f"./{quote(name, safe='')}")


def _caption(text: str) -> str:
    return f'<p class="caption">{html.escape(text)}</p>\n' if text else ""


def _number_class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _to_picture(pixels: Tensor) -> PIL.Image.Image:
    """Return uint8 [1 or 3, H, W] as a picture."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or len(pixels) not in (1, 3):
        raise ValueError(f"an image is {pixels.dtype} {list(pixels.shape)}; expected torch.uint8 [1 or 3, H, W]")
    array = pixels.cpu().permute(1, 2, 0).contiguous().numpy()
    return PIL.Image.fromarray(array[:, :, 0] if len(pixels) == 1 else array)
