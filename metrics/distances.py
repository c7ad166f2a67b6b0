"""Nearest neighbors in feature space: float64 differences decide, matrix products only settle the clear cases.

Products are fast, but their rounding would decide ties and duplicates at random. So each distance has bounds from a
product, and the few whose bounds leave a question open are computed from the differences.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 2048  # rows and columns of the distance matrix in memory at a time
_EXACT_VALUES = 1 << 17  # values subtracted at a time: these fit into the CPU's cache
_LARGEST_EXPONENT = 120  # of the scale: a power of two that float32 represents with room to spare


class FeatureSet:
    """Features of a set of images, and which of them are equal."""

    def __init__(self, features: Tensor):
        self.features = features  # [N, F]
        self.equal = _equal_rows(features)  # int64 [N], equal for equal rows; None if there are none

    def __len__(self) -> int:
        return len(self.features)


class Block(NamedTuple):
    """Some images of a set, with scaled features that bound their distances."""

    features: Tensor  # [n, F], unchanged
    equal: Tensor | None  # int64 [n]
    x: Tensor  # [n, F] centered and scaled
    squares: Tensor  # [n] squared norms of x
    start: int  # index of the first image in its set


class Screen:
    """Bounds of squared distances from matrix products, in scaled units: squared distances times `square_scale`.

    For rows a, b centered on the mean of all features, |a|^2 + |b|^2 - 2 a.b is off by at most
    `slack` * (|a|^2 + |b|^2): a sum of F products in float32 with unit roundoff u has an error of F u |a||b| at worst,
    and of more than 8 sqrt(F) u |a||b| with negligible probability (Higham and Mary 2019).
    """

    def __init__(self, *sets: FeatureSet):
        parts = [block for each in sets for block in each.features.split(_BLOCK)]
        # On a GPU, float32 products may be TF32, with 13 bits less; float64 is fast enough there.
        self._dtype = torch.float32 if parts[0].device.type == "cpu" else torch.float64
        self._slack = 8 * (math.sqrt(parts[0].shape[1]) + 4) * 2**-24
        center = sum(part.sum(dim=0, dtype=torch.float64) for part in parts) / sum(len(part) for part in parts)
        largest = max(abs(value.item()) for part in parts for value in part.aminmax())
        # A power of two: scaling rounds nothing. Values of at most 2 after centering cannot overflow.
        exponent = -math.frexp(largest)[1] if largest > 0 else 0
        self._scale = 2.0 ** max(min(exponent, _LARGEST_EXPONENT), -_LARGEST_EXPONENT)
        self.square_scale = self._scale**2
        self._minus_center = (center * -self._scale).to(torch.promote_types(parts[0].dtype, torch.float32))

    def blocks(self, features: FeatureSet, start: int = 0) -> Iterator[Block]:
        """Yield the images from `start` on in blocks."""
        for begin in range(start, len(features), _BLOCK):
            part = features.features[begin:begin + _BLOCK]
            x = torch.add(self._minus_center, part, alpha=self._scale).to(self._dtype)
            equal = None if features.equal is None else features.equal[begin:begin + _BLOCK]
            yield Block(part, equal, x, torch.linalg.vector_norm(x, dim=1).square(), begin)

    def lower_bounds(self, a: Block, b: Block) -> Tensor:
        """Return lower bounds of scaled squared distances, [n, m]."""
        offsets = b.squares * (1 - self._slack)
        return torch.addmm(offsets, a.x, b.x.T, alpha=-2).add_((a.squares * (1 - self._slack))[:, None])

    def spread(self, squares_a: Tensor, squares_b: Tensor) -> Tensor:
        """Return by how much, at most, distances exceed their lower bounds, for squared norms that broadcast."""
        return 2 * self._slack * (squares_a + squares_b)


class Nearest(NamedTuple):
    """The nearest images of each image, in order."""

    squares: Tensor  # float64 [N, count], squared distances
    indices: Tensor  # int64 [N, count]

    def merge(self, start: int, row: Tensor, index: Tensor, squares: Tensor) -> None:
        """Take in images at these squared distances of rows start + row; row is ascending."""
        if len(row) == 0:
            return
        rows, counts = row.unique_consecutive(return_counts=True)
        line = torch.arange(len(rows), device=row.device).repeat_interleave(counts)
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(dim=0) - counts)[line]
        new_squares = squares.new_full([len(rows), int(counts.max())], math.inf)
        new_indices = torch.full_like(new_squares, -1, dtype=torch.int64)
        new_squares[line, place], new_indices[line, place] = squares, index
        rows = rows + start
        every = torch.cat([self.squares[rows], new_squares], dim=1)
        self.squares[rows], chosen = every.topk(self.squares.shape[1], dim=1, largest=False)
        self.indices[rows] = torch.cat([self.indices[rows], new_indices], dim=1).gather(1, chosen)


def nearest(screen: Screen, points: FeatureSet, count: int, among: FeatureSet | None = None,
            on_rows: Callable[[int], None] = lambda count: None) -> Nearest:
    """Return the `count` nearest images of each point among the images of another set, or the other points.

    count:    at most their number
    on_rows:  called with the number of finished points

    Of images at equal distances any may be taken. Within a set, each product serves its rows and its columns.
    """
    device = points.features.device
    found = Nearest(torch.full([len(points), count], math.inf, dtype=torch.float64, device=device),
                    torch.full([len(points), count], -1, device=device))
    for a in screen.blocks(points):
        for b in screen.blocks(points, a.start) if among is None else screen.blocks(among):
            low = screen.lower_bounds(a, b)
            is_diagonal = among is None and a.start == b.start
            if is_diagonal:
                low.fill_diagonal_(math.inf)
            close = low <= _reach(screen, found, a, b, low)[:, None]
            is_for_both = among is None and not is_diagonal
            if is_for_both:
                close |= low <= _reach(screen, found, b, a, low.T)
            row, column = close.nonzero().unbind(dim=1)
            squares = square_distances(a, row, b, column)
            found.merge(a.start, row, column + b.start, squares)
            if is_for_both:
                column, order = column.sort(stable=True)
                found.merge(b.start, column, row[order] + a.start, squares[order])
        on_rows(len(a.x))
    return found


def _reach(screen: Screen, found: Nearest, a: Block, b: Block, low: Tensor) -> Tensor:
    """Return a distance within which each row of a has enough neighbors already, or finds them in b: [n]."""
    count = found.squares.shape[1]
    farthest = found.squares[a.start:a.start + len(a.x), -1]
    reach = (farthest * screen.square_scale).clamp(max=torch.finfo(low.dtype).max).to(low.dtype)
    if low.shape[1] > count and farthest.isinf().any():
        within = low.topk(count, dim=1, largest=False).values[:, -1]
        reach = reach.minimum(within + screen.spread(a.squares, b.squares.max()))
    return reach.masked_fill(farthest == 0, -math.inf)  # nothing is nearer than 0


def square_distances(a: Block, rows: Tensor, b: Block, columns: Tensor) -> Tensor:
    """Return the squared distances of pairs of images from float64 differences, float64 [pairs]."""
    if len(rows) > 0 and (a.equal is not None or b.equal is not None):  # each distance once
        of_a, of_b = (rows if a.equal is None else a.equal[rows]), (columns if b.equal is None else b.equal[columns])
        keys, inverse = (of_a * (of_b.max() + 1) + of_b).unique(return_inverse=True)
        one = torch.empty_like(keys)
        one[inverse] = torch.arange(len(rows), device=rows.device)
        distinct = square_distances(a._replace(equal=None), rows[one], b._replace(equal=None), columns[one])
        return distinct[inverse]
    pairs = max(_EXACT_VALUES // a.features.shape[1], 1)
    parts = [(a.features[i].double() - b.features[j].double()).square_().sum(dim=1)
             for i, j in zip(rows.split(pairs), columns.split(pairs))]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=rows.device)


def _equal_rows(features: Tensor) -> Tensor | None:
    """Return int64 [N], the index of an equal row, the same for all that are equal; None if all rows differ.

    Rows are found by a hash and compared; those that only share their hash count as different.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[features.element_size()]
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-2**62, 2**62, [features.shape[1]], generator=generator).mul_(2).add_(1)
    factors = factors.to(features.device)
    hashes = torch.empty(len(features), dtype=torch.int64, device=features.device)
    rows = _EXACT_VALUES // features.shape[1] + 1
    for part, target in zip(features.split(rows), hashes.split(rows)):
        # In place: small results between large temporary ones would fragment memory, by 0.7 GB for 50,000 images.
        torch.sum(part.contiguous().view(whole).long() * factors, dim=1, out=target)
    values, inverse, counts = hashes.unique(return_inverse=True, return_counts=True)
    if len(values) == len(features):
        return None
    own = torch.arange(len(features), device=features.device)
    first = torch.full_like(values, len(features)).scatter_reduce_(0, inverse, own, "amin")[inverse]
    suspects = ((counts[inverse] > 1) & (first != own)).nonzero().flatten()
    for some in suspects.split(_BLOCK):
        differ = (features[some] != features[first[some]]).any(dim=1)
        first[some[differ]] = some[differ]
    return first
