"""The kernel distance (KID): the unbiased squared MMD of two sets of features under a cubic kernel."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from metrics.feature_tensors import as_feature_pair

_BLOCK = 256  # rows and columns of the kernel matrix held at a time


def kernel_distance(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, subsets: int, size: int, seed: int) -> float:
    """Return the mean of `kernel_distances`; near 0, possibly negative, for two sets from one distribution."""
    return float(kernel_distances(real, fake, subsets, size, seed).mean())


def kernel_distances(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, subsets: int, size: int, seed: int,
                     on_rows: Callable[[int], None] = lambda count: None) -> np.ndarray:
    """Return float64 [subsets]: the estimate from each of `subsets` random subsets of `size` images of both sets.

    real, fake:  [N, F] and [M, F], floating point; products and sums are float64, since the result is a small
                 difference of large means
    size:        2 to min(N, M)
    seed:        0 to 2^32 - 1; equal seeds draw equal subsets on every platform
    on_rows:     called with the number of finished rows of kernel matrices

    The kernel is (x.y / F + 1)^3; Binkowski et al. 2018, eq. 3.

    Raises ValueError if features have another shape or type or are too few, or a number is out of range.
    """
    if subsets < 1 or size < 2:
        raise ValueError(f"there are {subsets} subsets of {size} images; expected at least 1 of at least 2")
    real, fake = as_feature_pair(real, fake, at_least=size)
    # The legacy generator: it draws the same numbers in all versions of numpy.
    random = np.random.RandomState(seed)
    chosen_real, chosen_fake = [], []  # each [size]
    for _ in range(subsets):
        chosen_real.append(torch.from_numpy(random.choice(len(real), size, replace=False)))
        chosen_fake.append(torch.from_numpy(random.choice(len(fake), size, replace=False)))
    within = _pair_sums(on_rows, real, chosen_real) + _pair_sums(on_rows, fake, chosen_fake)
    across = _pair_sums(on_rows, real, chosen_real, fake, chosen_fake)
    return (within / (size * (size - 1)) - 2 * across / size**2).cpu().numpy()


def _pair_sums(on_rows: Callable[[int], None], a: Tensor, chosen_a: list[Tensor], b: Tensor | None = None,
               chosen_b: list[Tensor] | None = None) -> Tensor:
    """Return float64 [subsets]: the sum of the kernel over the pairs of each subset; without `b`, over i != j in `a`.

    If there are few images for the number of subsets, each pair is computed once, for all subsets that contain both.
    """
    subsets, size = len(chosen_a), len(chosen_a[0])
    if max(len(a), 0 if b is None else len(b)) ** 2 <= subsets * size**2:
        members = _members(chosen_a, a)
        other = () if b is None else (b, _members(chosen_b, b))
        return _block_sums(on_rows, a, members, *other)
    everyone = torch.ones(size, 1, dtype=torch.float64, device=a.device)
    if b is None:
        return torch.cat([_block_sums(on_rows, a[i], everyone) for i in chosen_a])
    return torch.cat([_block_sums(on_rows, a[i], everyone, b[j], everyone) for i, j in zip(chosen_a, chosen_b)])


def _members(chosen: list[Tensor], features: Tensor) -> Tensor:
    """Return float64 [N, subsets]: 1 if an image is in a subset, else 0."""
    members = torch.zeros(len(features), len(chosen), dtype=torch.float64)
    for subset, indices in enumerate(chosen):
        members[indices, subset] = 1
    return members.to(features.device)


def _block_sums(on_rows: Callable[[int], None], a: Tensor, members_a: Tensor, b: Tensor | None = None,
                members_b: Tensor | None = None) -> Tensor:
    within = b is None
    if within:
        b, members_b = a, members_a
    b = b.double()
    sums = torch.zeros(members_a.shape[1], dtype=torch.float64, device=a.device)
    for row in range(0, len(a), _BLOCK):
        rows = a[row:row + _BLOCK].double() / a.shape[1]
        of_rows = members_a[row:row + _BLOCK]
        # The matrix within a set is symmetric: blocks above the diagonal count twice, those below are skipped.
        for column in range(row if within else 0, len(b), _BLOCK):
            values = (rows @ b[column:column + _BLOCK].T).add_(1).pow_(3)
            twice = 1
            if within:
                if column == row:
                    values.fill_diagonal_(0)
                else:
                    twice = 2
            sums += twice * ((values @ members_b[column:column + _BLOCK]) * of_rows).sum(dim=0)
        on_rows(len(rows))
    return sums
