"""Choose the images of a set that are to be projected, and the classes that each starts from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dnnlib.cli import UserError
from dnnlib.disk_failures import retrying
from imagesets.class_columns import label_of
from imagesets.class_names import VECTOR, known_classes
from imagesets.reader import NO_LABEL, ImageSet
from latent.classes import Classes, Label
from latent.projecting.start_class import AUTO, StartClass


@dataclass(frozen=True, kw_only=True)
class TargetImage:
    """An image of a set."""

    name: str  # of the member
    group: str  # what must not be split: patient, lesion, or the image itself
    label: Label  # the set's own, None where it has none
    class_name: str | None  # name of the class that it says, or number where it has none
    own: Label  # the network's class of that name, where there is one; the label itself where both have vectors
    starts: tuple[Label, ...]  # labels of the network to begin with; (None,) of an unconditional one


def choose_targets(images: ImageSet, classes: Classes, *, start: StartClass, count: int | None, group_by_class: bool,
                   seed: int) -> list[TargetImage]:
    """Return images in the order of the set; class by class with group_by_class.

    classes:         of the network
    start:           what the images start from, None for their own label: images of other classes, or without one, are
                     left out. Of a set whose classes the network knows, a class takes the images of that class alone
    count:           of images, drawn by `seed`; None for all
    group_by_class:  take equally many of each class of the set, as far as there are

    Raises UserError where no image is left.
    """
    if count is not None and count < 1:
        raise UserError(f"--count is {count}; expected at least 1")
    labels = _classes_of(images, classes)
    own = _own_labels(images, labels, classes)
    rows = _wanted_rows(images, labels, own, classes, start)
    if group_by_class and not (labels[rows] >= 0).all():
        raise UserError(f"{images.path} has {int((labels[rows] < 0).sum())} images without a class; expected one each "
                        "for --group-by-class")
    random = np.random.RandomState(seed % 2**32)
    if group_by_class:
        kinds = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
        counts = _equal_counts([len(kind) for kind in kinds], count)
        rows = np.concatenate([_draw(kind, number, random) for kind, number in zip(kinds, counts, strict=True)])
    else:
        rows = _draw(rows, count, random)
    return [TargetImage(name=images.names[row], group=images.groups[row], label=_label_of(images, row),
                        class_name=_name_of(images, labels[row]), own=own[row],
                        starts=_starts(start, own[row], classes)) for row in rows]


def count_left_out(images: ImageSet, classes: Classes, start: StartClass) -> int:
    """Return how many images of a set have no label that the network knows, where each starts from its own."""
    if start is not None or classes.count == 0:
        return 0
    return _own_labels(images, _classes_of(images, classes), classes).count(None)


def _starts(start: StartClass, own: Label, classes: Classes) -> tuple[Label, ...]:
    if classes.count == 0:
        return (None,)
    if start == AUTO:
        return tuple(range(classes.count))
    return (own if start is None else start,)


def _label_of(images: ImageSet, row: int) -> Label:
    label = label_of(images, row)
    return tuple(label) if isinstance(label, list) else label


def fingerprint(images: ImageSet, targets: Sequence[TargetImage]) -> str:
    """Return a sha256 of which images they are: names, and sizes with checksums of members or times of files."""
    known = dict(zip(images.names, images.checksums(), strict=True)) if images.is_zip else {}
    digest = hashlib.sha256()
    for target in targets:
        content = known[target.name] if known else _describe_file(images.path / images.locate(target.name))
        label = target.own if isinstance(target.own, tuple) else target.class_name
        digest.update(f"{target.name}/{content}/{target.group}/{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _describe_file(path: Path) -> tuple[int, int] | None:
    try:
        status = retrying(path.stat, path)
    except OSError:  # reading it will say why
        return None
    return status.st_size, status.st_mtime_ns


def _own_labels(images: ImageSet, labels: np.ndarray, classes: Classes) -> list[Label]:
    """Return the network's label for each image: the class of the same name, or the image's own vector.

    labels:  the class of each image in the set, int64 [N]

    None for images without such a label.
    """
    if classes.kind == VECTOR:
        fits = images.label_kind == VECTOR and images.labels.shape[1] == classes.count
        return [_label_of(images, row) if fits else None for row in range(len(images))]
    own = {label: None if label == NO_LABEL else classes.match(label, images.classes)
           for label in np.unique(labels).tolist()}
    return [own[label] for label in labels.tolist()]


def _wanted_rows(images: ImageSet, labels: np.ndarray, own: Sequence[Label], classes: Classes,
                 start: StartClass) -> np.ndarray:
    """Return the rows that can be projected as `start` says. Raises UserError where there are none."""
    rows = np.arange(len(images))
    if classes.count == 0 or start == AUTO:
        return rows
    is_known = np.array([label is not None for label in own])
    if start is None:
        rows = np.flatnonzero(is_known)
        if not len(rows) and classes.kind == VECTOR:
            raise UserError(f"{images.path} has no labels of {classes.count} numbers, which the network learned from; "
                            f"expected such ones, or {classes.known_labels()} to start all images from")
        if not len(rows):
            known = known_classes(classes.names, classes.count)
            found = _names_of(images, labels)
            what = f"has images of {found}, which the network does not know" if found else (
                "has no classes, and the network starts from one")
            raise UserError(f"{images.path} {what}; expected {known}: give --class=NAME to start from, or "
                            f"--class={AUTO} to try each")
        return rows
    if isinstance(start, tuple) or not is_known.any():  # all images, whatever they are; other classes, or none
        return rows
    rows = np.flatnonzero([label == start for label in own])
    if not len(rows):
        raise UserError(f"{images.path} holds no images of class {classes.name(start)}; expected one of "
                        f"{_names_of(images, labels)}, or leave --class out")
    return rows


def _names_of(images: ImageSet, labels: np.ndarray) -> str:
    return ", ".join(_name_of(images, label) for label in np.unique(labels).tolist() if label != NO_LABEL)


def _classes_of(images: ImageSet, classes: Classes) -> np.ndarray:
    """Return the class of each image, int64 [N], NO_LABEL for none; lists count where they are one-hot.

    For a network that learned vectors no list is a class.
    """
    labels = images.labels
    if labels is None or (labels.ndim == 2 and classes.kind == VECTOR):
        return np.full(len(images), NO_LABEL)
    if labels.ndim == 1:
        return labels
    is_one_hot = ((labels == 0) | (labels == 1)).all(axis=1) & (labels.sum(axis=1) == 1)
    return np.where(is_one_hot, np.nan_to_num(labels).argmax(axis=1), NO_LABEL)


def _name_of(images: ImageSet, label: int) -> str | None:
    if label == NO_LABEL:
        return None
    return str(label) if images.classes is None else images.classes[label]


def _draw(rows: np.ndarray, count: int | None, random: np.random.RandomState) -> np.ndarray:
    """Return some rows in ascending order."""
    return rows if count is None or count >= len(rows) else np.sort(random.permutation(rows)[:count])


def _equal_counts(available: list[int], count: int | None) -> list[int]:
    """Return how many of each to take: equally many as far as there are, where it does not divide the first more."""
    taken = [0] * len(available)
    left = sum(available) if count is None else min(count, sum(available))
    while left:
        for index, most in enumerate(available):
            if taken[index] < most and left:
                taken[index] += 1
                left -= 1
    return taken
