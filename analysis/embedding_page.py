"""Write an embedding as one page that works without a network: the map, its pictures, and the numbers beside it.

The parts are in the folder page: map.html, which has {{placeholders}}, map.css, and the scripts, which are joined here.
What a script reads is JSON in an element of its own; how it is made up is told at each part below. Every text may be
hostile: in the data no character is left that could end the element, and all other texts are escaped.
"""

import base64
import hashlib
import html
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from analysis.embedding_layouts import PCA
from analysis.embedding_pictures import MIME, PER_ROW, PER_SPRITE, curve_order, make_sprites, quantize
from analysis.embedding_points import Column, Embedding, Layout
from analysis.embedding_table import feature_name, shown_groups
from dnnlib.files import atomic_write
from latent.exploration_page import SCRIPT as TABLE_SCRIPT
from latent.exploration_page import STYLE

FOLDER = Path(__file__).parent / "page"
# In this order: each imports only from those before it.
NEIGHBORS_ONLY = "Distances between clusters and their sizes mean nothing: only who is near whom."
SCRIPTS = ("points", "view", "picking", "filters", "colors", "raster", "pictures", "address", "table", "details",
           "legend", "drawing", "gestures", "search", "map")
_IMPORT = re.compile(r"^import\b[^;]*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async |const |let |function|class ))", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_MISSING, _WIDE_MISSING = 255, 65535  # codes of values that are missing, as uint8 and as uint16


def write_embedding_page(path: str | os.PathLike, embedding: Embedding, report: str, workers: int | None = 1) -> None:
    """Write a page, whole or not at all; the same bytes for the same arguments. Raises OSError.

    report:   HTML of the sections below the map, see `embedding_report.report_html`
    workers:  processes that encode pictures, None = one for each core
    """
    order = curve_order(embedding.layouts[0].coordinates[embedding.pictured])
    with closing(make_sprites(embedding.thumbnails, order, workers)) as sprites:
        pictures = "".join(f'<script type="text/plain" class="sprite">{base64.b64encode(sprite).decode()}</script>\n'
                           for sprite in sprites)
    script = page_script()
    parts = {
        "title": html.escape(embedding.title),
        "policy": html.escape(_policy(script, TABLE_SCRIPT)),
        "style": STYLE + (FOLDER / "map.css").read_text(encoding="utf-8"),
        "data": _json_text(page_data(embedding, order)),
        "script": script,
        "report": f"{report}<script>{TABLE_SCRIPT}</script>\n",
        "sprites": pictures,
    }
    template = (FOLDER / "map.html").read_text(encoding="utf-8")
    # All at once, so that a name with a placeholder in it stays as it is.
    page = _PLACEHOLDER.sub(lambda found: parts[found[1]], template)
    with atomic_write(path) as file:
        file.write(page.encode(errors="backslashreplace"))  # bytes of file names that are not UTF-8


def page_script() -> str:
    """Return the modules of the page as one script, in a block of its own: a name that two of them have is an error."""
    modules = [(FOLDER / f"{name}.mjs").read_text(encoding="utf-8") for name in SCRIPTS]
    joined = "\n".join(_EXPORT.sub("", _IMPORT.sub("", module)) for module in modules)
    return f'\n"use strict";\n{{\n{joined}}}\n'


def page_data(embedding: Embedding, order: np.ndarray) -> dict[str, Any]:
    """Return what the page's script reads, as values of JSON; arrays are base64 of little-endian numbers.

    order:  int64 [M], which thumbnail is on each tile of the sprites
    """
    points, nearest = embedding.points, embedding.nearest
    tiles = np.full(len(points), -1, dtype=np.int64)
    tiles[embedding.pictured[order]] = np.arange(len(order))
    starts = np.cumsum([0, *map(len, points.sets)]).tolist()
    return {
        "title": embedding.title,
        "count": len(points),
        "sets": [{"name": one.name, "kind": one.kind, "start": start, "count": len(one), "pictures": one.shows_pictures,
                  "why": one.why_not} for one, start in zip(points.sets, starts)],
        "numReal": points.num_real,
        "names": points.names,
        "groups": _groups(shown_groups(points)),
        "maps": [{"key": layout.key, "title": layout.title, "note": _map_note(layout), "x": _base64(x, "<u2"),
                  "y": _base64(y, "<u2")} for layout in embedding.layouts for x, y in [quantize(layout.coordinates).T]],
        "columns": [_column(column) for column in points.columns],
        "neighbors": {"count": nearest.rows.shape[1], "rows": _base64(nearest.rows, "<i4"),
                      "distances": _base64(nearest.distances, "<f4")},
        "pictures": {"side": embedding.thumbnails.shape[1], "perRow": PER_ROW, "perSprite": PER_SPRITE, "mime": MIME,
                     "tiles": _base64(tiles, "<i4")},
        "space": feature_name(embedding),
    }


def _map_note(layout: Layout) -> str:
    """Return the sentences under a map: how it was made, and what it does not show."""
    return " ".join(filter(None, [layout.note, "" if layout.key == PCA else NEIGHBORS_ONLY]))


def _column(column: Column) -> dict[str, Any]:
    """Return a column: numbers, or the number of each point's value, the most frequent value first."""
    head = {"key": column.key, "title": column.title}
    if column.is_number:
        return {**head, "kind": "number", "data": _base64(column.values, "<f4")}
    # LIMIT: of more than 65,535 different values the rarest are shown as missing.
    counts = Counter(value for value in column.values if value)
    values = sorted(counts, key=lambda value: (-counts[value], value))[:_WIDE_MISSING]
    is_wide = len(values) > _MISSING
    codes = _codes(column.values, values, _WIDE_MISSING if is_wide else _MISSING)
    wide = {"wide": True} if is_wide else {}
    return {**head, "kind": "category", "values": values, **wide, "codes": _base64(codes, "<u2" if is_wide else "u1")}


def _groups(groups: Sequence[str | None]) -> dict[str, Any] | None:
    """Return the names of patients or lesions, and the number of each point's, -1 without one; None if all are."""
    values = list(dict.fromkeys(group for group in groups if group is not None))
    return {"values": values, "codes": _base64(_codes(groups, values, -1), "<i4")} if values else None


def _codes(texts: Sequence[str | None], values: Sequence[str], missing: int) -> np.ndarray:
    numbers: Mapping[str | None, int] = {value: number for number, value in enumerate(values)}
    return np.array([numbers.get(text, missing) for text in texts], dtype=np.int64)


def _base64(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()


def _json_text(data: Mapping[str, Any]) -> str:
    """Return ASCII that is JSON, and in HTML one text: without <, > and &."""
    text = json.dumps(_unicode(data), separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _unicode(value: Any) -> Any:
    """Return a value whose texts are Unicode: bytes of file names that are not UTF-8 become \\udcXX, as in reports."""
    if isinstance(value, dict):
        return {name: _unicode(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_unicode(item) for item in value]
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _policy(*scripts: str) -> str:
    """Return the page's policy: nothing is requested, and no script runs but these."""
    hashes = (f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts)
    return "; ".join(("default-src 'none'", "img-src data: blob:", "style-src 'unsafe-inline'",
                      f"script-src {' '.join(hashes)}", "base-uri 'none'", "form-action 'none'"))
