"""What a map of an embedding is made of: sets of images, their points, facts about them, and coordinates.

Legend: N points (images of all sets, the real ones first), F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from metrics.image_sources import SelectedImages

REAL, SYNTHETIC, PROJECTED = "real", "synthetic", "projected"  # kinds of sets


@dataclass(frozen=True, kw_only=True, eq=False)
class PointSet:
    """Images of one data set, in order of their names."""

    name: str  # as it is shown: the file's name, with folders where two sets have the same
    kind: str  # REAL, SYNTHETIC or PROJECTED
    images: SelectedImages
    names: Sequence[str]
    classes: Sequence[str]  # of each image; "" = no label
    groups: Sequence[str | None]  # patient or lesion of each image; None = unknown, each image by itself
    shows_pictures: bool
    why_not: str = ""  # why its images are drawn as dots, a sentence; "" = they are not

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """A fact about each point, by which points are colored.

    values:  float64 [N], NaN = missing; or N texts, "" = missing
    """

    key: str  # in the page's address: lower case letters, digits, "-"
    title: str
    values: np.ndarray | Sequence[str]

    @property
    def is_number(self) -> bool:
        return isinstance(self.values, np.ndarray)


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """The images of all sets; those of real sets come first."""

    sets: Sequence[PointSet]
    columns: Sequence[Column] = ()

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    @property
    def num_real(self) -> int:
        return sum(len(one) for one in self.sets if one.kind == REAL)

    @cached_property
    def names(self) -> list[str]:
        return [name for one in self.sets for name in one.names]

    @cached_property
    def classes(self) -> list[str]:
        return [name for one in self.sets for name in one.classes]

    @cached_property
    def set_numbers(self) -> np.ndarray:
        """The number of each point's set, int64 [N]."""
        return np.repeat(np.arange(len(self.sets)), [len(one) for one in self.sets])

    @cached_property
    def groups(self) -> np.ndarray:
        """The group of each point, int64 [N] from 0; a name means the same patient or lesion in all sets."""
        named = [("group", group) if group is not None else ("image", number, row)
                 for number, one in enumerate(self.sets) for row, group in enumerate(one.groups)]
        numbers: dict[tuple, int] = {}
        return np.array([numbers.setdefault(key, len(numbers)) for key in named], dtype=np.int64)

    def rows_of(self, number: int) -> np.ndarray:
        """Return the points of a set, int64 [n]."""
        return np.flatnonzero(self.set_numbers == number)


@dataclass(frozen=True, kw_only=True)
class LayoutQuality:
    """How well a map keeps neighborhoods, from 0 to 1 (Venna and Kaski 2001), see `embedding_layouts`."""

    trustworthiness: float  # are neighbors on the map also neighbors in the features?
    preservation: float  # share of the nearest images by features that are also nearest on the map
    num_neighbors: int
    num_points: int  # that it was measured on


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """A map: coordinates of all points; only the real ones decided about it.

    coordinates:  float64 [N, 2]
    placed:       quality of the other points' places among the real ones; None without others
    """

    key: str  # "pca", "tsne" or "umap"
    title: str
    coordinates: np.ndarray
    real: LayoutQuality
    placed: LayoutQuality | None
    note: str = ""  # a sentence on how it was made, with its settings


@dataclass(frozen=True, kw_only=True, eq=False)
class NearestReals:
    """The real images nearest to each point by features, none of the point's own group if it is real.

    rows:       int64 [N, n], -1 where there are fewer
    distances:  float64 [N, n], ascending, NaN where there are fewer
    """

    rows: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """Everything that a page shows.

    thumbnails:  uint8 [M, side, side, 3] of the points that have pictures, in order
    pictured:    int64 [M], these points
    """

    title: str
    points: Points
    layouts: Sequence[Layout]  # the first is shown first
    nearest: NearestReals
    thumbnails: np.ndarray
    pictured: np.ndarray
    settings: dict = field(default_factory=dict)  # of features and maps, as JSON values
