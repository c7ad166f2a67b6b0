"""Choose the images of a set that are to be projected, and the classes that each starts from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dnnlib.cli import UserError
from imagesets.class_names import known_classes
from imagesets.reader import NO_LABEL, ImageSet
from latent.classes import Classes

AUTO = "auto"  # of --class: try each


@dataclass(frozen=True, kw_only=True)
class TargetImage:
    """An image of a set."""

    name: str  # of the member
    group: str  # what must not be split: patient, lesion, or the image itself
    label: int | None  # the set's own, None where it has none
    class_name: str | None  # its name, or its number where it has none
    starts: tuple[int | None, ...]  # classes of the network to begin with; (None,) of an unconditional one


def choose_targets(images: ImageSet, classes: Classes, *, chosen: str | None, count: int | None, group_by_class: bool,
                   seed: int) -> list[TargetImage]:
    """Return images in the order of the set; class by class with group_by_class.

    classes:         of the network
    chosen:          --class: the class to begin with, AUTO for each, None for the image's own. In a set with labels a
                     name takes the images of that class alone
    count:           of images, drawn by `seed`; None for all
    group_by_class:  take equally many of each class of the set, as far as there are

    Raises UserError where labels are missing, or the network does not know them.
    """
    if count is not None and count < 1:
        raise UserError(f"--count is {count}; expected at least 1")
    labels = _labels_of(images)
    starts = _Starts(images, labels, classes, chosen)
    rows = starts.rows()
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
    return [TargetImage(name=images.names[row], group=images.groups[row],
                        label=None if labels[row] == NO_LABEL else int(labels[row]),
                        class_name=_name_of(images, labels[row]), starts=starts.of(labels[row])) for row in rows]


def fingerprint(images: ImageSet, targets: Sequence[TargetImage]) -> str:
    """Return a sha256 of which images they are: names, and sizes and checksums of a zip's members, sizes of files."""
    known = dict(zip(images.names, images.checksums(), strict=True)) if images.is_zip else {}
    digest = hashlib.sha256()
    for target in targets:
        content = known[target.name] if known else (images.path / target.name).stat().st_size
        digest.update(f"{target.name}/{content}/{target.group}/{target.class_name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


class _Starts:
    """Which images are wanted, and which classes of the network each starts from."""

    def __init__(self, images: ImageSet, labels: np.ndarray, classes: Classes, chosen: str | None):
        self._images, self._labels, self._classes = images, labels, classes
        self._all = chosen == AUTO and classes.count > 0
        self._one = None
        if chosen is not None and not self._all:
            found = classes.choose(chosen)
            if len(found) > 1:
                raise UserError(f"--class names {len(found)} classes; expected one, or {AUTO}")
            self._one = found[0]
        self._has_labels = bool((labels != NO_LABEL).any())

    def rows(self) -> np.ndarray:
        """Return the rows of the images that are wanted."""
        rows = np.arange(len(self._images))
        if self._one is None or not self._has_labels:
            return rows
        own = {int(label): self._own(int(label)) for label in np.unique(self._labels) if label != NO_LABEL}
        rows = np.array([row for row in rows if own.get(int(self._labels[row])) == self._one], dtype=np.int64)
        if not len(rows):
            raise UserError(f"{self._images.path} holds no images of class {self._classes.name(self._one)}; expected "
                            "some")
        return rows

    def of(self, label: int) -> tuple[int | None, ...]:
        """Return the classes to begin with for an image of this label."""
        if self._classes.count == 0:
            return (None,)
        if self._all:
            return tuple(range(self._classes.count))
        if self._one is not None:
            return (self._one,)
        ways = f"give --class=NAME, or --class={AUTO} to try each"
        if label == NO_LABEL:
            raise UserError(f"{self._images.path} has images without a class, and the network starts from one; {ways}")
        found = self._own(label)
        if found is None:
            raise UserError(f"{self._images.path} has images of class {_name_of(self._images, label)}, which the "
                            f"network does not know; expected {known_classes(self._classes.names, self._classes.count)}"
                            f": {ways}")
        return (found,)

    def _own(self, label: int) -> int | None:
        """Return the network's class of a label of the set: the one of the same name, where both have names."""
        ours, theirs = self._classes.names, self._images.classes
        if ours is None or theirs is None:
            return int(label) if label < self._classes.count else None
        return ours.index(theirs[label]) if theirs[label] in ours else None


def _labels_of(images: ImageSet) -> np.ndarray:
    """Return the class of each image, int64 [N], NO_LABEL for none; lists count where they are one-hot."""
    labels = images.labels
    if labels is None:
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
