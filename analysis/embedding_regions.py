"""Regions of real images in feature space where another set has few images or none: what a generator does not make.

Legend: R real images, S images of another set, m images in a region.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.embedding_neighbors import GroupedFeatures, Neighbors, count_earlier, count_of, nearest_others
from metrics.intervals import Interval, TooFew, bootstrap_mean, group_numbers

MAX_REGIONS = 8
EMPTY_BELOW = 0.5  # of the expected number: a region with fewer images of the other set may be shown
FALSE_REGIONS = 0.05  # share of the regions found that may be so by chance (Benjamini and Hochberg 1995)
REGION_SIZES = (10, 50)  # fewest and most images in a region
MAX_DEALS = 8  # of the real groups into halves, for the control; fewer with more than 1,000 real images
_DEALT = 8000  # real images dealt in all


@dataclass(frozen=True, kw_only=True)
class Region:
    """A real image and the real images nearest to it, and how many images of another set lie as near to it.

    None of the images is of the center's own group, which could be anywhere in the region.

    rows:      points; the center first
    radius:    distance of the farthest of them to the center
    found:     images of the other set within the radius
    expected:  how many there would be if both sets were of one distribution
    nearest:   the point of the other set that is nearest to the center, and its distance
    """

    rows: Sequence[int]
    radius: float
    found: int
    expected: float
    nearest: int
    nearest_distance: float
    classes: Sequence[tuple[str, int]]  # of the real images, with numbers, most frequent first


def choose_region_size(num_real: int) -> int:
    """Return the number of images in a region, m: 1 % of the real images, within REGION_SIZES."""
    return int(np.clip(num_real // 100, *REGION_SIZES))


def num_listed(reals: GroupedFeatures, others: GroupedFeatures, size: int) -> int:
    """Return how many of the others must be listed for each real image to find regions: at most S m / (2 R) + 2."""
    return math.ceil(EMPTY_BELOW * size * len(others) / len(reals)) + 1


def find_emptiest_regions(reals: GroupedFeatures, others: GroupedFeatures, among_reals: Neighbors,
                          among_others: Neighbors, size: int, classes: np.ndarray, places: np.ndarray) -> list[Region]:
    """Return regions of reals with few of the others: the fewest of the expected number first, without common images.

    among_reals, among_others:  nearest ones of each real, at least m - 1 and `num_listed`
    size:                       images in a region, m
    classes:                    of the reals
    places:                     int64 [S], the others' points

    In a few of many regions few images are found by chance. If both sets are of one distribution, a ball that reaches
    to the (m - 1)-th other real image has as many of the others as there are failures before m - 1 successes: negative
    binomial, with the mean (m - 1) S / R. Images of one group come together: the number of groups in the region takes
    the place of m - 1, with the same mean.

    LIMIT: where images of one group lie together, the radius reaches farther, and regions look less empty by a few per
    cent. Where the other set has few images, an empty region is no surprise, and none may be returned.
    """
    from scipy.stats import false_discovery_control, nbinom  # here: importing it takes 0.4 s

    rows = among_reals.rows[:, :size - 1]
    radius = among_reals.distances[:, size - 2]
    num_reals = len(reals) - count_of(reals.groups, reals.groups)
    num_others = len(others) - count_of(others.groups, reals.groups)
    expected = (size - 1) * num_others / (num_reals + 1)  # the (m - 1)-th of n divides them into n + 1 equal parts
    is_inside = among_others.distances <= radius[:, None]  # False where there are fewer
    found, nearest_of = is_inside.sum(axis=1), among_others.distances[:, 0]
    may_be = (rows >= 0).all(axis=1) & (expected > 0) & (found < EMPTY_BELOW * expected)
    may_be &= ~is_inside[:, -1]  # there may be more than are listed
    num_groups = (count_earlier(np.where(rows < 0, -1, reals.groups[rows])) == 0).sum(axis=1)
    p_values = np.ones(len(reals))
    each = np.flatnonzero(may_be)
    p_values[each] = nbinom.cdf(found[each], num_groups[each], num_groups[each] / (num_groups[each] + expected[each]))
    may_be &= false_discovery_control(p_values) <= FALSE_REGIONS
    each = np.flatnonzero(may_be)
    with np.errstate(divide="ignore", invalid="ignore"):  # of equal images: nan, last
        emptiness = nearest_of[each] / radius[each]
    order = each[np.lexsort((each, -emptiness, found[each] / expected[each]))]
    is_taken = np.zeros(len(reals), dtype=bool)
    regions = []
    for center in order.tolist():
        members = [center, *rows[center].tolist()]
        if is_taken[members].any():
            continue
        is_taken[members] = True
        names = Counter(classes[members].tolist())
        regions.append(Region(
            rows=members, radius=float(radius[center]), found=int(found[center]), expected=float(expected[center]),
            nearest=int(places[among_others.rows[center, 0]]), nearest_distance=float(nearest_of[center]),
            classes=sorted(names.items(), key=lambda item: (-item[1], item[0]))))
        if len(regions) == MAX_REGIONS:
            break
    return regions


class EmptyShares(NamedTuple):
    """Shares of real images in whose region no image of another set lies, see `measure_empty_shares`."""

    share: Interval | None  # of all real images, by all images of the set; None if there are too few groups
    matched: float | None  # of a random half of the real images, by num_matched images of the set
    control: float | None  # of the same half, by num_matched images of the other half
    num_matched: int


def num_deals(num_real: int) -> int:
    """Return how often the real images are dealt into halves: shares of small sets vary with the deal."""
    return min(max(_DEALT // num_real, 1), MAX_DEALS)


def measure_empty_shares(reals: GroupedFeatures, others: GroupedFeatures, among_reals: Neighbors,
                         among_others: Neighbors, size: int, *, level: float, seed: int,
                         on_rows: Callable[[int], None] = lambda rows: None) -> EmptyShares:
    """Return the share of reals in whose region none of the others is, and what it would be with reals in their place.

    among_reals, among_others:  nearest ones of each real, at least m - 1 and 1
    on_rows:                    called with the number of finished reals, 2 * num_deals * R in all

    The share depends on the numbers of images. So half of the real groups, dealt at random, are compared with images of
    the other half: one of each group, because these are independent of each other, as generated ones are. As many of
    the others, of different groups as far as possible, are looked for in the same regions. Both are means over deals.
    """
    radius = among_reals.distances[:, size - 2]
    is_whole = np.isfinite(radius)
    is_empty = ~(among_others.distances[:, 0] <= radius)
    try:
        share = bootstrap_mean(is_empty[is_whole].astype(np.float64), reals.groups[is_whole], is_share=True,
                               level=level, seed=seed)
    except TooFew:
        share = None
    random, order = np.random.RandomState(seed), reals.order()
    groups = group_numbers(reals.groups[order], len(reals))
    num_groups = int(groups.max()) + 1
    num_matched = min(num_groups // 2, len(np.unique(others.groups)))
    found: tuple[list, list] = ([], [])
    for _ in range(num_deals(len(reals))):
        is_second = np.isin(groups, random.permutation(num_groups)[:num_groups // 2])
        first, second = order[~is_second], _one_of_each(reals, order[is_second], random)[:num_matched]
        chosen = _one_of_each(others, others.order(), random)[:num_matched]
        part = reals.select(first)
        near = nearest_others(part.features, None, size - 1, point_groups=part.groups, on_rows=on_rows)
        radius = near.distances[:, -1]
        is_whole = np.isfinite(radius)
        if num_matched > 0 and is_whole.any():
            part, radius = part.select(is_whole), radius[is_whole]
            for side, rows, shares in ((others, chosen, found[0]), (reals, second, found[1])):
                near = nearest_others(part.features, side.features[rows], 1, point_groups=part.groups,
                                      among_groups=side.groups[rows], on_rows=lambda rows: on_rows(0))
                shares.append(~(near.distances[:, 0] <= radius))
        on_rows(2 * len(reals) - len(first))
    if not found[0]:
        return EmptyShares(share, None, None, 0)
    return EmptyShares(share, *(float(np.concatenate(shares).mean()) for shares in found), num_matched)


def _one_of_each(side: GroupedFeatures, rows: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Return some of the rows in random order: one of each group."""
    rows = random.permutation(rows)
    return rows[np.sort(np.unique(side.groups[rows], return_index=True)[1])]
