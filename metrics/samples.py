"""The images of one side of a comparison, all of them and those of each class: their features and their groups."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metrics.features import Features


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Features of images, and which images belong together."""

    features: Features
    groups: np.ndarray | None = None  # int64 [N], equal for images of one group; None = each image is its own group

    def __len__(self) -> int:
        return len(self.features)

    @property
    def num_groups(self) -> int:
        return len(self) if self.groups is None else len(np.unique(self.groups))

    def first(self, count: int) -> "Sample":
        """Return the first `count` images."""
        if count >= len(self):
            return self
        return Sample(features=self.features.first(count), groups=None if self.groups is None else self.groups[:count])


class Samples:
    """The images of one side by detector, all of them and those of each class; empty except on the main process.

    Features of a class of a set are copied when they are asked for, so that only one class is in memory twice.
    """

    def __init__(self):
        self._makers: dict[tuple[str, str | None], Callable[[], Sample]] = {}

    def add(self, detector: str, sample: Sample, class_name: str | None = None) -> None:
        self._makers[detector, class_name] = lambda: sample

    def add_classes(self, detector: str, parts: Sequence[tuple[np.ndarray, Features]],
                    classes: Mapping[str, np.ndarray], groups: Callable[[np.ndarray], np.ndarray | None]) -> None:
        """Add the classes of a set.

        parts:    as in `gather`
        classes:  which images each class has, as int64 [m] by name
        groups:   returns the groups of images
        """
        for name, items in classes.items():
            self._makers[detector, name] = lambda items=items: Sample(features=gather(items, parts),
                                                                      groups=groups(items))

    def get(self, detector: str, class_name: str | None = None) -> Sample | None:
        """Return the images of a class, all of them for None; None if there are none."""
        maker = self._makers.get((detector, class_name))
        return None if maker is None else maker()


def missing_items(classes: Mapping[str, np.ndarray], known: np.ndarray) -> np.ndarray:
    """Return the images of classes that are not among the known ones, in ascending order: int64 [n].

    classes:  which images each class has, as int64 [m] by name
    known:    int64 [N]
    """
    return np.setdiff1d(np.concatenate([np.empty(0, dtype=np.int64), *classes.values()]), known)


def gather(items: np.ndarray, parts: Sequence[tuple[np.ndarray, Features]]) -> Features:
    """Return the features of images, copying theirs alone.

    items:  int64 [n], which images
    parts:  images, int64 [m], all different, and their features; each of `items` is in one of the parts
    """
    known = np.concatenate([images for images, _ in parts])
    order = np.argsort(known)
    places = order[np.searchsorted(known, items, sorter=order)]

    def rows(tables: Sequence[np.ndarray]) -> np.ndarray:
        found, start = np.empty((len(items), tables[0].shape[1]), dtype=tables[0].dtype), 0
        for table in tables:
            inside = (places >= start) & (places < start + len(table))
            found[inside] = table[places[inside] - start]
            start += len(table)
        return found

    tables = [features for _, features in parts]
    has_classes = all(features.probabilities is not None for features in tables)
    return Features(values=rows([features.values for features in tables]),
                    probabilities=rows([features.probabilities for features in tables]) if has_classes else None)
