"""Maps of embeddings in a browser: what a reader does with one, and what is then known about it."""

from pathlib import Path
from typing import Any

import numpy as np

from analysis.embedding_page import write_embedding_page
from analysis.embedding_points import Embedding
from analysis.embedding_report import report_html
from tests.helpers.browser import Window
from tests.helpers.made_embedding import NASTY, make_mixtures, make_purity

SHOWN = NASTY.replace("\udcff", "\\udcff")  # bytes that are not UTF-8 are written so


def write_map(folder: Path, embedding: Embedding, nasty: str = "") -> Path:
    """Write the page of an embedding with its report; return its path."""
    report = report_html(embedding, make_mixtures(embedding, nasty=nasty), make_purity(), [f"a note{nasty}"])
    write_embedding_page(folder / "map.html", embedding, report)
    return folder / "map.html"


def rows_of(embedding: Embedding, kind: str) -> np.ndarray:
    """Return the points of the sets of a kind, int64 [n]."""
    points = embedding.points
    return np.concatenate([points.rows_of(number) for number, one in enumerate(points.sets) if one.kind == kind])


def values_of(embedding: Embedding, key: str) -> np.ndarray:
    """Return the values of a column, [N]."""
    column, = (one for one in embedding.points.columns if one.key == key)
    return np.array(column.values)


def facts_of(embedding: Embedding, row: int) -> dict[str, str]:
    """Return all facts of a point as they are shown: its source with its set, and none that are missing."""
    points = embedding.points
    one = points.sets[points.set_numbers[row]]
    facts = {"set": f"{one.name} ({one.kind})"}
    for column in points.columns:
        value = column.values[row]
        if column.key not in ("set", "source"):
            facts[column.title] = ("" if np.isnan(value) else f"{value:g}") if column.is_number else value
    facts = {name: value for name, value in facts.items() if value}
    group = one.groups[row - points.set_numbers.searchsorted(points.set_numbers[row])]
    return {**facts, **({"group": group} if group is not None and one.shows_pictures else {})}


class MapWindow(Window):
    """A window of a map, see analysis/page/map.mjs."""

    def state(self, name: str) -> Any:
        """Return a number, text or array of the map's state."""
        script = "name => { const value = embeddingMap.state[name]; return value?.buffer ? Array.from(value) : value; }"
        return self.run(script, name)

    def shown_rows(self) -> np.ndarray:
        """Return the points that no filter hides, int64 [n]."""
        return np.flatnonzero(self.state("visible"))

    def places(self) -> np.ndarray:
        """Return where all points are in the window, float64 [N, 2], CSS pixels."""
        script = ("() => Array.from(embeddingMap.points.names, (_, row) => embeddingMap.pointOnScreen(row))"
                  ".map(({x, y}) => [x, y])")
        return np.array(self.run(script))

    def move_to(self, row: int, **settings: Any) -> None:
        self.page.mouse.move(*self.places()[row], **settings)

    def click_on(self, row: int) -> None:
        self.page.mouse.click(*self.places()[row])

    def picture(self, selector: str) -> np.ndarray:
        """Return the pixels of a canvas with a picture once it is drawn, uint8 [H, W, 3]."""
        self.wait("selector => document.querySelector(selector)?.dataset.isDrawn", selector)
        return self.pixels(selector)

    def isolated(self, rows: np.ndarray) -> int:
        """Return that of some points which is the farthest from all others on the screen."""
        places = self.places()
        distances = np.linalg.norm(places[rows, None] - places, axis=2)
        distances[np.arange(len(rows)), rows] = np.inf
        return int(rows[distances.min(axis=1).argmax()])

    def shown_facts(self, selector: str) -> dict[str, str]:
        """Return the facts in the card ("#card") or of the pinned image ("#pinned")."""
        return dict(zip(self.texts(f"{selector} dt"), self.texts(f"{selector} dd"), strict=True))

    def legend_entry(self, name: str, section: str = "#legend") -> Any:
        """Return the entry of a value in the legend of colors, or in that of sets ("#sets"), as a Locator."""
        entries = self.page.locator(f"{section} .entry")
        return entries.nth(self.texts(f"{section} .entry .name").index(name))

    def shown_count(self) -> str:
        return self.text("#shown strong")
