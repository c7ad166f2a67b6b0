"""The kernel distance (KID): the unbiased squared MMD of two sets of features under a cubic kernel."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from metrics.feature_tensors import as_feature_pair
from metrics.intervals import RESAMPLES, Jackknife, PermutationTest, TooFew, group_numbers
from metrics.pair_sums import mean_across, mean_within, pair_blocks

MAX_PERMUTED = 20_000  # images of both sets together; 1,000 permutations of 2,048 features take 26 s of one CPU core


def kernel_distance(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, subsets: int, size: int, seed: int) -> float:
    """Return the mean of `kernel_distances`; near 0, possibly negative, for two sets from one distribution."""
    return float(kernel_distances(real, fake, subsets, size, seed).mean())


def kernel_distances(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, subsets: int, size: int, seed: int,
                     on_rows: Callable[[int], None] = lambda count: None) -> np.ndarray:
    """Return float64 [subsets]: the estimate from each of `subsets` random subsets of `size` images of both sets.

    real, fake:  [N, F] and [M, F], floating point; see `cubic_kernel` for precision
    size:        2 to min(N, M)
    seed:        0 to 2^32 - 1; equal seeds draw equal subsets on every platform
    on_rows:     called with the number of finished rows of kernel matrices

    The kernel is `cubic_kernel`, the estimate unbiased (Gretton et al. 2012, eq. 3).

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


def kernel_jackknife(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, real_groups: np.ndarray | None = None,
                     fake_groups: np.ndarray | None = None,
                     on_rows: Callable[[int], None] = lambda count: None) -> Jackknife:
    """Return the distance from all pairs of images of different groups, and what it is without each group.

    real, fake:   [N, F] and [M, F], floating point
    real_groups:  int64 [N]; None = images are independent; fake_groups likewise
    on_rows:      called with the number of finished rows of kernel matrices; there are 2 N + M

    Each pair of images is computed once. For equal distributions the variance is about twice the true one, as the
    jackknife counts second-order terms twice (Efron and Stein 1981), and nothing else is left there: intervals are
    1.4 times too wide, and 98 to 99 % of those at 95 % contain 0 (60 groups of 5 images, 12 groups of 1 to 20).

    Raises ValueError if features have another shape or type; TooFew, which is one, if a set has fewer than three
    groups.
    """
    real, fake = as_feature_pair(real, fake, at_least=1)
    of_real = mean_within(cubic_kernel, real, real_groups, "real", on_rows)
    of_fake = mean_within(cubic_kernel, fake, fake_groups, "fake", on_rows)
    across = mean_across(cubic_kernel, real, fake, real_groups, fake_groups, on_rows)
    return Jackknife(estimate=of_real.mean + of_fake.mean - 2 * across.mean,
                     without={"real": of_real.without[0] + of_fake.mean - 2 * across.without[0],
                              "fake": of_real.mean + of_fake.without[0] - 2 * across.without[1]})


def permuted_distances(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, real_groups: np.ndarray | None = None,
                       fake_groups: np.ndarray | None = None, *, permutations: int = RESAMPLES, seed: int = 0,
                       on_rows: Callable[[int], None] = lambda count: None) -> PermutationTest:
    """Test whether the images of two sets come from one distribution: deal their groups to two sides at random.

    real, fake:   [N, F] and [M, F], floating point, N + M at most MAX_PERMUTED
    real_groups:  int64 [N]; None = images are independent; fake_groups likewise
    on_rows:      called with the number of finished rows of the kernel matrix; there are N + M

    The distance is that of `kernel_jackknife`. Groups stay whole, and as many as the first set has go to the first
    side. The p-value (1 + number of permutations with at least the distance at hand) / (1 + permutations) is valid for
    any number of groups (Phipson and Smyth 2010). If one set has larger groups, it is too high rather than too low: of
    300 pairs of sets of one distribution, 20 groups of 5 images and 20 of 1, it was up to 0.05 in 2 to 3 %.

    Raises ValueError if features have another shape or type or are too many; TooFew, which is one, if a set has fewer
    than two groups.
    """
    real, fake = as_feature_pair(real, fake, at_least=1)
    if len(real) + len(fake) > MAX_PERMUTED:
        raise ValueError(f"there are {len(real)} and {len(fake)} images; a permutation test takes at most "
                         f"{MAX_PERMUTED} in all: choose a random subset of the groups")
    of_real, of_fake = group_numbers(real_groups, len(real)), group_numbers(fake_groups, len(fake))
    num_real, num_fake = of_real.max() + 1, of_fake.max() + 1
    if min(num_real, num_fake) < 2:
        raise TooFew(f"there are {num_real} groups of real and {num_fake} of fake images; expected at least 2 of each")
    groups = np.concatenate([of_real, num_real + of_fake])
    sizes = np.bincount(groups)
    random = np.random.RandomState(seed)  # draws the same numbers in all versions of numpy
    on_first = np.zeros([len(sizes), 1 + permutations], dtype=bool)  # groups; column 0 is the sets at hand
    on_first[:num_real, 0] = True
    for column in range(1, 1 + permutations):
        on_first[random.permutation(len(sizes))[:num_real], column] = True
    distances, scale = _dealt_distances(torch.cat([real, fake]), groups, sizes, on_first, on_rows)
    # The same two sides in another order may differ by rounding.
    at_least = int((distances[1:] >= distances[0] - 1e-12 * scale).sum())
    return PermutationTest(estimate=float(distances[0]), p_value=(1 + at_least) / (1 + permutations),
                           null=distances[1:])


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return (x.y / F + 1)^3 for x [n, F] and y [m, F] (Binkowski et al. 2018, eq. 3): float64 [n, m].

    On a CPU, products of features that are not float64 are float32, in half the time. Their rounding averages out: a
    distance of 2,000 images of 2,048 features as from a detector moves by 1e-10, where its standard error is 3e-4.
    """
    # On a GPU, float32 products may be TF32, with 13 bits less.
    dtype = torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else torch.float64
    return (x.to(dtype) @ y.to(dtype).T).double().div_(x.shape[1]).add_(1).pow_(3)


def _dealt_distances(features: Tensor, groups: np.ndarray, sizes: np.ndarray, on_first: np.ndarray,
                     on_rows: Callable[[int], None]) -> tuple[np.ndarray, float]:
    """Return the distance between two sides, for each way to deal groups to them, and the mean of the kernel.

    groups:    int64 [N], 0 to G - 1
    sizes:     int64 [G]
    on_first:  bool [G, ways], whether a group is on the first side
    """
    members = torch.from_numpy(on_first[groups]).to(features.device)
    # Sums over ordered pairs of different groups: both images on the first side; the first image there.
    both = torch.zeros(members.shape[1], dtype=torch.float64, device=features.device)
    by_image = torch.zeros(len(features), dtype=torch.float64, device=features.device)
    for rows, columns, values in pair_blocks(cubic_kernel, features, groups=groups, on_rows=on_rows):
        both += 2 * ((values @ members[columns].double()) * members[rows]).sum(dim=0)
        by_image[rows] += values.sum(dim=1)
        by_image[columns] += values.sum(dim=0)
    both, by_image = both.cpu().numpy(), by_image.cpu().numpy()
    first = np.bincount(groups, by_image) @ on_first
    count_first, pairs_first = sizes @ on_first, np.square(sizes @ on_first) - np.square(sizes) @ on_first
    count_second = len(features) - count_first
    pairs_second = np.square(count_second) - np.square(sizes) @ ~on_first
    total = by_image.sum()
    distances = (both / pairs_first + (total - 2 * first + both) / pairs_second
                 - 2 * (first - both) / (count_first * count_second))
    return distances, total / len(features) ** 2


def _pair_sums(on_rows: Callable[[int], None], a: Tensor, chosen_a: list[Tensor], b: Tensor | None = None,
               chosen_b: list[Tensor] | None = None) -> Tensor:
    """Return float64 [subsets]: the sum of the kernel over the pairs of each subset; without `b`, over i != j in `a`.

    If there are few images for the number of subsets, each pair is computed once, for all subsets that contain both.
    """
    subsets, size = len(chosen_a), len(chosen_a[0])
    twice = 2 if b is None else 1  # each pair within a comes once
    if max(len(a), 0 if b is None else len(b)) ** 2 <= subsets * size**2:
        members_a = _members(chosen_a, a)
        members_b = members_a if b is None else _members(chosen_b, b)
        sums = torch.zeros(subsets, dtype=torch.float64, device=a.device)
        for rows, columns, values in pair_blocks(cubic_kernel, a, b, on_rows=on_rows):
            sums += twice * ((values @ members_b[columns]) * members_a[rows]).sum(dim=0)
        return sums
    return torch.stack([
        twice * sum(values.sum() for _, _, values in
                    pair_blocks(cubic_kernel, a[i], None if b is None else b[j], on_rows=on_rows))
        for i, j in zip(chosen_a, chosen_a if b is None else chosen_b)])


def _members(chosen: list[Tensor], features: Tensor) -> Tensor:
    """Return float64 [N, subsets]: 1 if an image is in a subset, else 0."""
    members = torch.zeros(len(features), len(chosen), dtype=torch.float64)
    for subset, indices in enumerate(chosen):
        members[indices, subset] = 1
    return members.to(features.device)
