"""Facts about the points of a map, by which they are colored: classes, sets, attributes, distances, a classifier."""

import csv
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from analysis.attributes import Keys, look_up, open_table
from analysis.embedding_features import Predictions, classifier_predictions
from analysis.embedding_inputs import EmbedRequest, is_projected
from analysis.embedding_points import REAL, Column, Points, PointSet
from dnnlib.files import retrying
from dnnlib.text import listed, to_ascii
from imagesets.split import institution_of
from latent.image_set import TABLE
from latent.projection import COLUMNS, PERCEPTUAL
from metrics.features import on_main
from torch_utils.distributed import Processes

# Keys of columns that are not of a table, and fields of exported tables.
_OURS = {"name", "set", "kind", "class", "group", "source", "institution", "distance", "projection-distance",
         "predicted", "correct"}
_FEWEST_VALUES, _FEWEST_PER_TEXT, _FEWEST_NUMBERS, _NEARLY_ALL = 5, 5, 20, 0.9  # see `identifies`
_MOST_LABELS = 10  # of a classifier, with a column of probabilities each
RIGHT, WRONG = "right", "wrong"  # values of the column "correct"


def make_columns(points: Points, request: EmbedRequest, processes: Processes) -> tuple[list[Column], list[str]]:
    """Return what is known of the points, and notes for the user; empty except on the main process.

    All processes call this together.

    Raises UserError if the table of attributes or the classifier cannot be used, or an image cannot be read.
    """
    notes: list[str] = []
    columns = on_main(lambda: list(_without_classifier(points, request.attributes, notes))) or []
    predictions = None if request.classifier is None else classifier_predictions(request, points, processes)
    if predictions is not None:
        columns += _of_classifier(points, predictions)
        if len(predictions.labels) > _MOST_LABELS:
            notes.append(f"{request.classifier}: probabilities of the first {_MOST_LABELS} of its "
                         f"{len(predictions.labels)} labels are shown")
    return with_keys(columns), notes


def _without_classifier(points: Points, attributes: str | None, notes: list[str]) -> Iterator[Column]:
    yield from _of_sets(points)
    yield from _of_projections(points)
    if attributes is not None:
        yield from _of_attributes(points, attributes, notes)


def with_keys(columns: Sequence[Column]) -> list[Column]:
    """Return columns with keys of lower case letters, digits and "-" alone, all different; the first keep theirs."""
    found: dict[str, Column] = {}
    for column in columns:
        plain = re.sub("[^a-z0-9]+", "-", to_ascii(column.key).lower()).strip("-") or "column"
        key, number = plain, 1
        while key in found:
            number += 1
            key = f"{plain}-{number}"
        found[key] = Column(key=key, title=column.title, values=column.values)
    return list(found.values())


def _of_sets(points: Points) -> Iterator[Column]:
    """Yield the columns class, source, set and institution, where they are known."""
    if any(points.classes):
        yield Column(key="class", title="class", values=points.classes)
    yield Column(key="source", title="source", values=_each(points, lambda one: one.kind))
    yield Column(key="set", title="set", values=_each(points, lambda one: one.name))
    reals = [one for one in points.sets if one.kind == REAL]
    if len(reals) > 1 or any(institution_of(one.images.images.source) for one in reals):
        yield Column(key="institution", title="institution", values=_each(
            points, lambda one: (institution_of(one.images.images.source) or one.name) if one.kind == REAL else ""))


def _each(points: Points, text_of: Callable[[PointSet], str]) -> list[str]:
    return [text for one in points.sets for text in [text_of(one)] * len(one)]


def _of_projections(points: Points) -> Iterator[Column]:
    """Yield the perceptual distance of projections to their originals, where distances.csv lies beside a set."""
    values = np.full(len(points), np.nan)
    for number, one in enumerate(points.sets):
        rows = _projection_rows(one)
        if rows:
            values[points.rows_of(number)] = [_number(rows[name].get(COLUMNS[PERCEPTUAL])) for name in one.names]
    values[~np.isfinite(values)] = np.nan
    if not np.isnan(values).all():
        yield Column(key="projection-distance", title="distance between original and projection", values=values)


def _projection_rows(one: PointSet) -> dict[str, dict[str, str]]:
    """Return the row of distances.csv of each projection, by its name; {} if the table is missing or of another set."""
    images = one.images.images
    path = images.path.with_name(TABLE)
    if not is_projected(images.source) or not path.is_file():
        return {}
    with retrying(lambda: open(path, newline="", encoding="utf-8", errors="replace"), path) as file:
        rows = {row.get("projection") or "": row for row in csv.DictReader(file)}
    return rows if len(rows) == len(images) and set(one.names) <= set(rows) else {}


def _of_attributes(points: Points, path: str, notes: list[str]) -> Iterator[Column]:
    """Yield the columns of a table of attributes, and note what was found.

    Columns that tell which images are of one patient or lesion are left out for sets whose pictures are not shown, as
    the names of their groups are.

    Projections have the attributes of their originals, by their groups, or the names of their originals' files. Each
    set of projections is looked up by itself: what occurs in several real sets is ambiguous, but projections share the
    groups of real images on purpose.
    """
    keys = {one.name: _keys_of(one) for one in points.sets}
    real = {one.name: keys[one.name] for one in points.sets if one.kind == REAL}
    table = open_table(path, real)
    name_of_table = os.path.basename(path)
    num_matched, unused = sum(table.matched.values()), f"; not used: {listed(table.left_out)}" if table.left_out else ""
    notes.append(f"{name_of_table}: by {table.key_column}, found for {num_matched} of {points.num_real} real "
                 f"images{unused}")
    found: dict[str, list[str]] = {name: [] for name in table.columns}
    hidden: dict[str, list[str]] = {}  # columns -> sets that they are left out for
    for one in points.sets:
        values: Mapping[str, Sequence[str]] = {}
        if one.kind == REAL:
            values = look_up(table, one.name, real)
        elif is_projected(one.images.images.source):
            values = look_up(table, one.name, {one.name: keys[one.name]})
        for name, texts in found.items():
            own = values.get(name, [""] * len(one))
            if not one.shows_pictures and identifies(own, one.groups):
                hidden.setdefault(name, []).append(one.name)
                own = [""] * len(one)
            texts += own
    for name, sets in hidden.items():
        notes.append(f"{name_of_table}: {name} is left out for {listed(sets)}, whose pictures are not shown, since it "
                     "can tell patients or lesions apart")
    for name, texts in found.items():
        if any(texts):
            numbers = [_number(text) for text in texts]
            are_numbers = all(math.isfinite(number) for text, number in zip(texts, numbers, strict=True) if text)
            key = f"table-{name}" if name.lower() in _OURS else name
            yield Column(key=key, title=name, values=np.array(numbers) if are_numbers else texts)


def identifies(values: Sequence[str], groups: Sequence[str | None]) -> bool:
    """Return whether values can tell patients or lesions apart: ids rather than attributes.

    values:  "" = missing
    groups:  patient or lesion of each image; None = unknown

    Of at least 5 values, texts do with fewer than 5 images each on average, and texts and whole numbers if nearly each
    has images of one group only; of at least 20, whole numbers do if nearly all differ. So an age does not, unless
    there are few patients; measurements with fractions never do.
    """
    known = [(value, group) for value, group in zip(values, groups, strict=True) if value]
    distinct = {value for value, _ in known}
    numbers = [number for number in map(_number, distinct) if math.isfinite(number)]
    if not all(number.is_integer() for number in numbers):
        return False
    groups_of: dict[str, set[str]] = {}
    for value, group in known:
        if group is not None:
            groups_of.setdefault(value, set()).add(group)
    of_one = sum(len(found) == 1 for found in groups_of.values())
    if len(groups_of) >= _FEWEST_VALUES and of_one > _NEARLY_ALL * len(groups_of):
        return True
    if len(numbers) < len(distinct):
        return len(distinct) >= _FEWEST_VALUES and len(known) < _FEWEST_PER_TEXT * len(distinct)
    return len(distinct) >= _FEWEST_NUMBERS and len(distinct) > _NEARLY_ALL * len(known)


def _keys_of(one: PointSet) -> Keys:
    rows = _projection_rows(one)
    return Keys.of([rows[name].get("image") or name for name in one.names] if rows else one.names, one.groups)


def _of_classifier(points: Points, found: Predictions) -> Iterator[Column]:
    """Yield probabilities of labels, the predicted label, and whether it is that of the image's class."""
    shown = [1] if len(found.labels) == 2 else range(min(len(found.labels), _MOST_LABELS))
    for number in shown:
        yield Column(key=f"probability-{found.labels[number]}", title=f"probability of {found.labels[number]}",
                     values=found.probabilities[:, number])
    yield Column(key="predicted", title="predicted label", values=[found.labels[one] for one in found.predicted])
    labels = [label for one in points.sets for label in _true_labels(one, found)]
    if any(label is not None for label in labels):
        yield Column(key="correct", title="prediction", values=[
            "" if label is None else RIGHT if label == guess else WRONG
            for label, guess in zip(labels, found.predicted.tolist(), strict=True)])


def _true_labels(one: PointSet, found: Predictions) -> list[int | None]:
    """Return the label of each image's class, None where it is not known; numbers of classes tell nothing."""
    if one.images.images.classes is None:
        return [None] * len(one)
    by_class = {name: found.task.label_of(name) if name else None for name in set(one.classes)}
    return [by_class[name] for name in one.classes]


def _number(text: str | None) -> float:
    """Return nan where a text is not a number."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
