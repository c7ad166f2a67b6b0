"""Nearest neighbors of the images on a map, by features: exact, and without images of the same patient or lesion.

Legend: N points, M images that can be neighbors, F features, k neighbors.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.embedding_points import NearestReals, Points
from metrics.distances import FeatureSet, Nearest, Screen, nearest
from metrics.feature_tensors import as_features
from metrics.intervals import group_numbers

_SPARE = 8  # images listed at first beyond those asked for: they replace images of the point's own group, and show ties
# LIMIT: in lists of this length the neighborhood of a group of more images ends too early.
_LONGEST = 1024
_MOST_PAIRS = 2**22  # pairs listed at once when a few points need longer lists: 64 MiB


@dataclass(frozen=True, eq=False)
class GroupedFeatures:
    """Features of the images of one kind, and their patients or lesions.

    features:  [n, F]
    groups:    int64 [n], the same number = the same patient or lesion, in all kinds
    is_named:  bool [n], whether the patient or lesion is known; otherwise the image is a group by itself
    """

    kind: str
    features: np.ndarray
    groups: np.ndarray
    is_named: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    @property
    def num_groups(self) -> int | None:
        """The number of patients or lesions; None if all are unknown."""
        return len(np.unique(self.groups)) if self.is_named.any() else None

    def select(self, rows: np.ndarray) -> "GroupedFeatures":
        return GroupedFeatures(self.kind, self.features[rows], self.groups[rows], self.is_named[rows])

    def order(self) -> np.ndarray:
        """Return the images in an order that does not depend on theirs, for random choices: int64 [n]."""
        return np.lexsort((self.features[:, 0], self.features.sum(axis=1, dtype=np.float64)))


def grouped_features(kind: str, features: np.ndarray, points: Points, rows: np.ndarray | slice) -> GroupedFeatures:
    """Return the features of some points. features: [N, F], of all points"""
    is_named = np.array([group is not None for one in points.sets for group in one.groups])
    return GroupedFeatures(kind, features[rows], points.groups[rows], is_named[rows])


class Neighbors(NamedTuple):
    """The nearest images of each point, in order.

    rows:       int64 [N, k], -1 where there are fewer
    distances:  float64 [N, k], ascending, NaN where there are fewer
    """

    rows: np.ndarray
    distances: np.ndarray


def nearest_others(points: np.ndarray, among: np.ndarray | None, count: int, *, point_groups: np.ndarray | None = None,
                   among_groups: np.ndarray | None = None, on_rows: Callable[[int], None] = lambda rows: None,
                   ) -> Neighbors:
    """Return the nearest images of each point that are not of its own group; of equally near ones the first.

    points:        floating point [N, F]
    among:         floating point [M, F]; None = the points themselves, none of which is its own neighbor
    count:         number of neighbors; rows end with -1 where fewer images are of other groups
    point_groups:  int64 [N]; None = each point is its own group, which none of `among` has
    among_groups:  int64 [M]; not given with among=None
    on_rows:       called with the number of finished points, N in all

    Distances are those of float64 differences (metrics.distances). All points get `count` + 8 neighbors at first; those
    of which too many are of their own group, or that have more at equal distances, get four times as many, and so on.
    Of images with equal features only the first are looked at, which alone can be neighbors.

    LIMIT: thousands of images at equal distances that are not equal take minutes, because lists grow to all of these.

    Raises ValueError if features have another shape or type or are not finite, or numbers of groups differ from theirs.
    """
    values = as_features(points)
    own = FeatureSet(values)
    others = own if among is None else FeatureSet(as_features(among))
    if among is None:
        point_groups = among_groups = group_numbers(point_groups, len(values))
    for groups, size in ((point_groups, len(own)), (among_groups, len(others))):
        if groups is not None and len(groups) != size:
            raise ValueError(f"there are {len(groups)} groups of {size} images; expected one for each image")
    is_within = among is None
    kept = _first_of_equal(others, among_groups if point_groups is not None else None, count)
    if not kept.all():
        is_within, others = False, FeatureSet(others.features[kept])
        among_groups = None if among_groups is None else among_groups[kept]
    numbers = np.flatnonzero(kept)
    screen = Screen(own) if is_within else Screen(own, others)
    length = min(count + _SPARE, len(others))
    found = Neighbors(np.full([len(own), count], -1), np.full([len(own), count], np.nan))

    def take(rows: np.ndarray, near: Nearest, has_all: bool) -> np.ndarray:
        """Write the neighbors of some points, and return those that need a longer list."""
        squares, indices = near.squares.numpy(), near.indices.numpy()
        is_own = np.zeros(indices.shape, dtype=bool)
        if point_groups is not None and among_groups is not None:
            is_own = point_groups[rows][:, None] == among_groups[indices]
        order = np.lexsort((indices, squares, is_own), axis=1)[:, :count]
        squares_of, indices_of, left_out = (np.take_along_axis(each, order, axis=1)
                                            for each in (squares, indices, is_own))
        width = order.shape[1]
        found.rows[rows, :width] = np.where(left_out, -1, numbers[indices_of])
        found.distances[rows, :width] = np.where(left_out, np.nan, np.sqrt(squares_of))
        if has_all:
            return rows[:0]
        # What is not listed is as far as the last of the list, or farther.
        is_done = ~left_out[:, -1] & (squares_of[:, -1] < squares.max(axis=1))
        return rows[~is_done]

    every = np.arange(len(own))
    size = min(length, len(others) - 1) if is_within else length
    if size == 0:
        on_rows(len(own))
        return found
    near = nearest(screen, own, size, None if is_within else others, on_rows=on_rows)
    pending = take(every, near, length == len(others))
    del near
    while len(pending) > 0:
        length = min(4 * length, len(others))
        chunks = np.split(pending, range(max(1, _MOST_PAIRS // length), len(pending), max(1, _MOST_PAIRS // length)))
        pending = np.concatenate([take(rows, nearest(screen, FeatureSet(values[rows]), length, others),
                                       length == len(others)) for rows in chunks])
    return found


def _first_of_equal(images: FeatureSet, groups: np.ndarray | None, count: int) -> np.ndarray:
    """Return which images can be among the `count` nearest of a point, bool [M]: of equal images only the first.

    groups:  int64 [M], of which a point has one whose images are not its neighbors; None = all images can be

    An image is left out if, whatever that group is, `count` equal images come before it: of its own group, or of all
    groups but the largest.
    """
    kept = np.ones(len(images), dtype=bool)
    if images.equal is None:
        return kept
    equal = images.equal.numpy()
    if groups is None:
        return count_earlier(equal[None])[0] < count
    order = np.argsort(equal, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(equal[order])) + 1):
        before: Counter[int] = Counter()
        largest = 0
        for place, (row, group) in enumerate(zip(rows.tolist(), groups[rows].tolist())):
            kept[row] = place - largest < count and before[group] < count
            before[group] += 1
            largest = max(largest, before[group])
    return kept


def nearest_among_reals(features: np.ndarray, points: Points, count: int,
                        on_rows: Callable[[int], None] = lambda rows: None) -> Neighbors:
    """Return the real images nearest to each real one, none of its own patient or lesion. See `nearest_others`.

    features:  floating point [N, F], of all points
    """
    num_real = points.num_real
    return nearest_others(features[:num_real], None, count, point_groups=points.groups[:num_real], on_rows=on_rows)


def nearest_reals(features: np.ndarray, points: Points, count: int, among_reals: Neighbors,
                  on_rows: Callable[[int], None] = lambda rows: None) -> NearestReals:
    """Return the real images nearest to each point; to a real one, none of its own patient or lesion.

    features:     floating point [N, F], of the points
    count:        number of neighbors
    among_reals:  from `nearest_among_reals`, at least as many
    on_rows:      called with the number of finished points, those that are not real

    Raises ValueError as `nearest_others` does.
    """
    num_real = points.num_real
    parts = [Neighbors(*(each[:, :count] for each in among_reals))]
    if len(points) > num_real:
        parts.append(nearest_others(features[num_real:], features[:num_real], count, on_rows=on_rows))
    rows, distances = (np.concatenate(each) for each in zip(*parts, strict=True))
    return NearestReals(rows=rows, distances=distances)


def pooled_length(k: int) -> int:
    """Return the number of neighbors listed for k: in a random half of the images, k remain of 99.9 % of lists."""
    return 3 * k + 12


class Pool(NamedTuple):
    """The images that can be neighbors of points: those of one or several kinds, numbered through."""

    parts: Sequence[GroupedFeatures]

    @property
    def groups(self) -> np.ndarray:
        return np.concatenate([part.groups for part in self.parts])

    def search(self, points: GroupedFeatures, count: int, **settings) -> list[Neighbors]:
        """Return the nearest of each part, see `nearest_others`."""
        return [nearest_others(points.features, part.features, count, point_groups=points.groups,
                               among_groups=part.groups, **settings) for part in self.parts]


class PooledNeighbors(NamedTuple):
    """The nearest images of each point, those of all parts of a pool together: lists of different lengths, in a row.

    All are int64 [n], by point and then by distance.
    """

    point: np.ndarray  # whose list it is
    index: np.ndarray  # of the listed image, in the pool
    nearer: np.ndarray  # number of images before it in the list
    of_group: np.ndarray  # number of these that are of its own group


def pooled_neighbors(points: GroupedFeatures, pool: Pool, k: int,
                     lists: Sequence[Neighbors] | None = None) -> PooledNeighbors:
    """Return all images of a pool to which fewer than k of other groups are nearer, without the point's own group.

    lists:  from Pool.search, at least `pooled_length` each; None = to be found

    Lists go on to `pooled_length` images at least, where there are as many.
    """
    groups, starts = pool.groups, np.cumsum([0, *map(len, pool.parts)])
    length, pending = pooled_length(k), np.arange(len(points))
    parts = []
    while len(pending) > 0:
        lists = pool.search(points.select(pending), length) if lists is None else lists
        distances = np.concatenate([each.distances[:, :length] for each in lists], axis=1)
        rows = np.concatenate([np.where(each.rows[:, :length] < 0, -1, each.rows[:, :length] + start)
                               for each, start in zip(lists, starts, strict=False)], axis=1)
        order = np.argsort(distances, axis=1, kind="stable")[:, :length]  # missing ones, NaN, last
        rows = np.take_along_axis(rows, order, axis=1)
        is_missing = rows < 0
        of_group = count_earlier(np.where(is_missing, -1, groups[rows]))
        # An image that is not listed has at least as many nearer ones of other groups.
        is_done = rows.shape[1] - 1 - np.where(is_missing, 0, of_group).max(axis=1) >= k
        is_done |= is_missing.any(axis=1) | (length >= min(_LONGEST, len(groups)))
        listed = ~is_missing & is_done[:, None]
        parts.append([np.broadcast_to(each, rows.shape)[listed]
                      for each in (pending[:, None], rows, np.arange(rows.shape[1]), of_group)])
        pending, length, lists = pending[~is_done], 4 * length, None
    found = [np.concatenate(each) for each in zip(*parts, strict=True)]
    order = np.argsort(found[0], kind="stable")
    return PooledNeighbors(*(each[order] for each in found))


def count_earlier(groups: np.ndarray) -> np.ndarray:
    """Return how often each value occurs before it in its row: int64 like groups, [N, n]."""
    order = np.argsort(groups, axis=1, kind="stable")
    ordered = np.take_along_axis(groups, order, axis=1)
    places = np.arange(groups.shape[1])
    begins = np.ones(groups.shape, dtype=bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counts = np.empty_like(order)
    np.put_along_axis(counts, order, places - np.maximum.accumulate(np.where(begins, places, 0), axis=1), axis=1)
    return counts


def count_of(groups: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Return how many of the groups are each of some: int64 like some."""
    return np.bincount(groups, minlength=int(some.max(initial=-1)) + 1)[some]
