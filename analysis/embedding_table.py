"""The points of an embedding as a table: facts about each image, its place on each map, and its nearest real image."""

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from analysis.embedding_points import Column, Embedding, Points
from dnnlib.files import atomic_write

_FIXED = ("class", "set", "source")  # columns that are in the first fields of a row already
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # texts that begin so are computed by spreadsheets


def shown_groups(points: Points) -> list[str | None]:
    """Return the group of each point; None where it is unknown, or the set's pictures are not shown.

    Which images are of one patient is no more for strangers than the images.
    """
    return [group if one.shows_pictures else None for one in points.sets for group in one.groups]


def feature_name(embedding: Embedding) -> str:
    """Return what distances are measured in, such as "efficientnet-lite0"; "" if the settings do not tell."""
    features = embedding.settings.get("features", "")
    return str(features.get("name", "") if isinstance(features, Mapping) else features)


def fact_header(points: Points) -> list[str]:
    """Return the names of the fields of `fact_rows`."""
    return ["name", "set", "kind", "class", "group", *(column.key for column in _others(points))]


def fact_rows(points: Points) -> Iterator[list[str]]:
    """Yield name, set, kind, class, group and columns of each point as texts, "" where unknown."""
    sets = [one for one in points.sets for _ in one.names]
    texts = [column_texts(column) for column in _others(points)]
    facts = zip(points.names, sets, points.classes, shown_groups(points), strict=True)
    for row, (name, one, class_name, group) in enumerate(facts):
        yield [name, one.name, one.kind, class_name, group or "", *(column[row] for column in texts)]


def column_texts(column: Column) -> Sequence[str]:
    """Return the values of a column as texts, numbers with 6 digits, "" where missing."""
    if not column.is_number:
        return column.values
    return ["" if math.isnan(value) else f"{value:.6g}" for value in column.values.tolist()]


def write_table(path: str | os.PathLike, embedding: Embedding) -> None:
    """Write a CSV file with a row for each point, whole or not at all. Raises OSError.

    Texts that a spreadsheet would take for a formula get an apostrophe in front; bytes of file names that are not UTF-8
    are written as \\udcXX.
    """
    points, nearest = embedding.points, embedding.nearest
    places = [axis for layout in embedding.layouts for axis in (f"{layout.key}_x", f"{layout.key}_y")]
    coordinates = np.concatenate([layout.coordinates for layout in embedding.layouts], axis=1)
    names, sets = points.names, [one.name for one in points.sets for _ in one.names]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    of_nearest = ["nearest_real", "nearest_real_set", "nearest_distance"]
    writer.writerow(map(_plain, [*fact_header(points), *places, *of_nearest]))
    for row, facts in enumerate(fact_rows(points)):
        found = int(nearest.rows[row, 0]) if nearest.rows.shape[1] else -1
        near = ["", "", ""] if found < 0 else [_plain(names[found]), _plain(sets[found]),
                                               f"{nearest.distances[row, 0]:.6g}"]
        writer.writerow([*map(_plain, facts), *(f"{value:.6g}" for value in coordinates[row]), *near])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def _others(points: Points) -> list[Column]:
    return [column for column in points.columns if column.key not in _FIXED]


def _plain(text: str) -> str:
    """Return a text that no spreadsheet computes; numbers are unchanged."""
    if not text.startswith(_FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
