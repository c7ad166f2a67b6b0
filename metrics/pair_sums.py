"""Means over pairs of images, such as of a kernel or a distance, and what they become without each group of images.

Images of one group (a patient, a lesion) resemble each other: pairs within a group are left out of means within a set,
so that these estimate the mean over two independent images.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metrics.intervals import TooFew, group_numbers

# Rows and columns of the matrix of all pairs held at a time. On a CPU, 4 MiB: few blocks, since threads wait for each
# other at each; few rows, since half of a square on the diagonal of a symmetric matrix is computed in vain.
_CPU_BLOCK = (256, 2048)
_GPU_BLOCK = (4096, 4096)

PairValues = Callable[[Tensor, Tensor], Tensor]  # [n, F], [m, F] -> float64 [n, m], a symmetric function of two images


class PairMean(NamedTuple):
    """A mean over pairs, and what it is without each group."""

    mean: float
    without: list[np.ndarray]  # for each set, float64 [groups]


def pair_blocks(values_of: PairValues, a: Tensor, b: Tensor | None = None, groups: np.ndarray | None = None,
                on_rows: Callable[[int], None] = lambda count: None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, columns, float64 values of their pairs) for all of a [N, F] with all of b [M, F].

    b:        None = pairs within a, each once: the values of all others are 0
    groups:   int64 [N], only without b: the values of pairs within a group are 0
    on_rows:  called with the number of finished rows
    """
    num_rows, num_columns = _CPU_BLOCK if a.device.type == "cpu" else _GPU_BLOCK
    others = a if b is None else b
    numbers = None if groups is None else torch.from_numpy(groups).to(a.device)
    for first in range(0, len(a), num_rows):
        rows = slice(first, min(first + num_rows, len(a)))
        for start in range(first if b is None else 0, len(others), num_columns):
            columns = slice(start, min(start + num_columns, len(others)))
            values = values_of(a[rows], others[columns])
            if b is None and start < rows.stop:
                values.triu_(1 + first - start)
            if numbers is not None:
                values.masked_fill_(numbers[rows, None] == numbers[columns], 0)
            yield rows, columns, values
        on_rows(rows.stop - first)


def mean_within(values_of: PairValues, features: Tensor, groups: np.ndarray | None, name: str,
                on_rows: Callable[[int], None] = lambda count: None) -> PairMean:
    """Return the mean over all pairs of images of different groups.

    features:  [N, F]
    groups:    int64 [N]; None = images are independent
    name:      what the images are, such as real, for messages

    With the sum R_g over pairs of an image in group g and one outside, and T the sum of all R_g, the mean without g is
    (T - 2 R_g) / (number of pairs without g): no pair is computed twice.

    Raises TooFew for fewer than three groups: without one of two groups no pair is left.
    """
    numbers = group_numbers(groups, len(features))
    sizes = np.bincount(numbers)
    if len(sizes) < 3:
        raise TooFew(f"there are {len(sizes)} groups of {name} images; expected at least 3, for pairs of different "
                     "groups that remain without one of them")
    by_image = torch.zeros(len(features), dtype=torch.float64, device=features.device)
    for rows, columns, values in pair_blocks(values_of, features, groups=numbers, on_rows=on_rows):
        by_image[rows] += values.sum(dim=1)
        by_image[columns] += values.sum(dim=0)
    by_group = np.bincount(numbers, by_image.cpu().numpy())
    total, count = by_group.sum(), len(features) ** 2 - np.square(sizes).sum()
    return PairMean(total / count, [(total - 2 * by_group) / (count - 2 * sizes * (len(features) - sizes))])


def mean_across(values_of: PairValues, a: Tensor, b: Tensor, groups_a: np.ndarray | None, groups_b: np.ndarray | None,
                on_rows: Callable[[int], None] = lambda count: None) -> PairMean:
    """Return the mean over all pairs of an image of a [N, F] and one of b [M, F]; groups as for `mean_within`."""
    sums_a, sums_b = (torch.zeros(len(x), dtype=torch.float64, device=a.device) for x in (a, b))
    for rows, columns, values in pair_blocks(values_of, a, b, on_rows=on_rows):
        sums_a[rows] += values.sum(dim=1)
        sums_b[columns] += values.sum(dim=0)
    total, without = sums_a.sum().item(), []
    for sums, groups, num_others in ((sums_a, groups_a, len(b)), (sums_b, groups_b, len(a))):
        numbers = group_numbers(groups, len(sums))
        remaining = len(sums) - np.bincount(numbers)
        without.append((total - np.bincount(numbers, sums.cpu().numpy())) / (remaining * num_others))
    return PairMean(total / (len(a) * len(b)), without)
