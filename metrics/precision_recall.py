"""Improved precision and recall: the share of each set's images that lie in neighborhoods of the other set."""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metrics.feature_tensors import as_feature_pair

_BLOCK = 2048  # rows and columns of the distance matrix in memory at a time
_EXACT_VALUES = 1 << 17  # values subtracted at a time: these fit into the CPU's cache


class PrecisionRecall(NamedTuple):
    """Share of fake images in neighborhoods of reals; share of real images in neighborhoods of fakes."""

    precision: float
    recall: float


def precision_recall(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, k: int,
                     on_rows: Callable[[int], None] = lambda count: None) -> PrecisionRecall:
    """Return precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2).

    real, fake:  [N, F] and [M, F], floating point; N, M > k
    k:           an image's neighborhood extends to its k-th nearest other image, inclusive; a duplicate is a
                 neighbor at distance 0
    on_rows:     called with the number of finished rows of distances; there are 2 (N + M)

    Results are those of float64 differences of the features. Matrix products, whose rounding would decide ties and
    duplicates at random, only settle the clear cases. Memory beyond the features: a float32 copy of one set and
    0.4 GB; on a GPU a float64 copy.

    Raises ValueError if features have another shape or type, or are at most k.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    real, fake = as_feature_pair(real, fake, at_least=k + 1)
    screen = _Screen(real, fake)
    return PrecisionRecall(_share_inside(screen, fake, real, k, on_rows), _share_inside(screen, real, fake, k, on_rows))


class _Screened(NamedTuple):
    """Features, and their scaled copies that bound their distances."""

    features: Tensor  # [N, F], unchanged
    x: Tensor  # [N, F] centered and scaled
    squares: Tensor  # [N] squared norms of x

    def take(self, indices: Tensor | slice) -> "_Screened":
        return _Screened(self.features[indices], self.x[indices], self.squares[indices])


class _Screen:
    """Bounds of squared distances from matrix products, in units of the largest squared norm.

    For rows a, b centered on the mean of all features, |a|^2 + |b|^2 - 2 a.b is off by at most
    `slack` * (|a|^2 + |b|^2): a sum of F products in float32 with unit roundoff u has an error of F u |a||b| at worst,
    and of more than 8 sqrt(F) u |a||b| with negligible probability (Higham and Mary 2019).
    """

    def __init__(self, real: Tensor, fake: Tensor):
        # On a GPU, float32 products may be TF32, with 13 bits less; float64 is fast enough there.
        self._dtype = torch.float32 if real.device.type == "cpu" else torch.float64
        self._slack = 8 * (math.sqrt(real.shape[1]) + 4) * 2**-24
        blocks = [*real.split(_BLOCK), *fake.split(_BLOCK)]
        self._center = sum(block.double().sum(dim=0) for block in blocks) / (len(real) + len(fake))
        largest = max((block.double() - self._center).square().sum(dim=1).max().item() for block in blocks)
        self.square_scale = 1 / largest if largest > 0 else 1.0

    def __call__(self, features: Tensor) -> _Screened:
        x = torch.empty_like(features, dtype=self._dtype)
        for target, block in zip(x.split(_BLOCK), features.split(_BLOCK)):
            target.copy_((block.double() - self._center).mul_(math.sqrt(self.square_scale)))
        return _Screened(features, x, torch.linalg.vector_norm(x, dim=1).square())

    def lower_bounds(self, a: _Screened, b: _Screened, minus: Tensor | None = None) -> Tensor:
        """Return lower bounds of squared distances, [n, m], minus `minus`, [m]."""
        offsets = b.squares * (1 - self._slack)
        if minus is not None:
            offsets -= minus
        return torch.addmm(offsets, a.x, b.x.T, alpha=-2).add_((a.squares * (1 - self._slack))[:, None])

    def spread(self, a: _Screened, b: _Screened) -> Tensor:
        """Return by how much, at most, distances of each row of a exceed their lower bounds, [n]."""
        return 2 * self._slack * (a.squares + b.squares.max())


def _share_inside(screen: _Screen, points: Tensor, centers: Tensor, k: int, on_rows: Callable[[int], None]) -> float:
    """Return the share of points in the neighborhood of at least one center."""
    first, counts = _distinct(centers)
    screened = screen(centers)
    radii = _square_radii(screen, screened, first, counts, k, on_rows)
    some_points, counts = _distinct(points)
    num_inside = 0
    for some, equal in zip(some_points.split(_BLOCK), counts.split(_BLOCK)):
        inside = _inside(screen, screen(points[some]), screened, first, radii)
        num_inside += int((inside * equal).sum())
        on_rows(int(equal.sum()))
    return num_inside / len(points)


def _distinct(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index and the size of each group of equal rows: both int64 [U]."""
    groups: dict[bytes, list[int]] = {}  # hash -> [first index, size]
    rows = features.cpu().flatten().view(torch.uint8).view(len(features), -1)  # for any strides, also of one column
    for index, row in enumerate(rows.numpy()):
        groups.setdefault(hashlib.blake2b(row, digest_size=16).digest(), [index, 0])[1] += 1
    first, counts = torch.tensor(list(groups.values()), device=features.device).unbind(dim=1)
    return first, counts


def _square_radii(screen: _Screen, centers: _Screened, first: Tensor, counts: Tensor, k: int,
                  on_rows: Callable[[int], None]) -> Tensor:
    """Return the squared distance to the k-th other row, float64 [U], of each distinct row.

    first, counts:  as `_distinct` returns them
    """
    radii = torch.zeros(len(first), dtype=torch.float64, device=first.device)
    lonely = (counts <= k).nonzero().flatten()  # the others have k neighbors at distance 0
    for some in lonely.split(_BLOCK) if len(lonely) > 0 else ():
        radii[some] = _nearest(screen, centers, first[some], k)[:, -1]
        on_rows(int(counts[some].sum()))
    on_rows(int(counts[counts > k].sum()))
    return radii


def _nearest(screen: _Screen, centers: _Screened, rows: Tensor, k: int) -> Tensor:
    """Return the k smallest squared distances of rows to other rows, in order, float64 [n, k].

    rows:  int64 [n], indices into centers
    """
    a = centers.take(rows)
    nearest = torch.full([len(rows), k], math.inf, dtype=torch.float64, device=rows.device)
    for start in range(0, len(centers.x), _BLOCK):
        b = centers.take(slice(start, start + _BLOCK))
        low = screen.lower_bounds(a, b)
        columns = rows - start
        own = (columns >= 0) & (columns < len(b.x))
        low[own, columns[own]] = math.inf
        # At least k distances are within `reach`: those found so far, or upper bounds in this block.
        reach = (nearest[:, -1] * screen.square_scale).clamp(max=torch.finfo(low.dtype).max)  # finite: never `own`
        if len(b.x) > k:
            reach = reach.minimum(low.topk(k, dim=1, largest=False).values[:, -1] + screen.spread(a, b))
        row, column = (low <= reach.to(low.dtype)[:, None]).nonzero().unbind(dim=1)
        found = _ragged(row, _square_distances(a, row, b, column), len(rows))
        nearest = torch.cat([nearest, found], dim=1).topk(k, dim=1, largest=False).values
    return nearest


def _inside(screen: _Screen, points: _Screened, centers: _Screened, first: Tensor, radii: Tensor) -> Tensor:
    """Return whether each point is within the squared radius of at least one center, bool [n].

    first, radii:  int64 [U], indices of the distinct centers, and float64 [U]
    """
    inside = torch.zeros(len(points.x), dtype=torch.bool, device=radii.device)
    for some, reach in zip(first.split(_BLOCK), radii.split(_BLOCK)):
        b = centers.take(some)
        excess = screen.lower_bounds(points, b, minus=(reach * screen.square_scale).to(points.x.dtype))
        inside |= excess.amin(dim=1) + screen.spread(points, b) <= 0  # certainly
        row, column = ((excess <= 0) & ~inside[:, None]).nonzero().unbind(dim=1)
        within = _square_distances(points, row, b, column) <= reach[column]
        inside[row[within]] = True
    return inside


def _ragged(row: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """Arrange values by row, padded with infinity; row is ascending."""
    counts = row.bincount(minlength=num_rows)
    table = values.new_full([num_rows, int(counts.max())], math.inf)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(dim=0) - counts)[row]
    table[row, place] = values
    return table


def _square_distances(a: _Screened, rows: Tensor, b: _Screened, columns: Tensor) -> Tensor:
    """Return the squared distances of pairs of rows, from float64 differences, float64 [pairs]."""
    pairs = max(_EXACT_VALUES // a.features.shape[1], 1)
    parts = [(a.features[i].double() - b.features[j].double()).square_().sum(dim=1)
             for i, j in zip(rows.split(pairs), columns.split(pairs))]
    return torch.cat(parts)
