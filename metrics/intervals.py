"""Intervals of measured numbers: delete-group jackknife, bootstrap of groups, permutation of groups, Holm's correction.

The unit is the group of images that belong together (a patient, a lesion): images of one lesion resemble each other,
and an interval that takes them for independent ones is too narrow. Groups are int64 [N], one number per image; images
of equal numbers belong together, and None stands for images that are independent of each other, as generated ones are.

What an interval is about: the mean of the estimate over fresh draws of as many groups of real and as many generated
images from the same sources. 95 % of such draws give intervals that contain it. It is not about the images at hand, and
it holds a bias that the estimate has at this number of images; KID and the extrapolated FID have none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

DEFAULT_LEVEL = 0.95
RESAMPLES = 1000
SPLITS = 64  # of a set into halves, one per bit of an int64
# Sides on which all that is compared with equal reals has the same images. A block, or half, has reals and fakes.
SHARED_SIDES = ("real", "heldout", "blocks")
_ROUNDING = 1e-12  # standard errors of shares below it are of estimates that are equal up to rounding


class TooFew(ValueError):
    """There are too few images or groups for an interval; the message gives their number and what is needed."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An interval of a measured number, and how it was computed."""

    estimate: float  # what the interval is about
    low: float
    high: float
    level: float  # the share of fresh draws whose intervals are meant to contain the mean over them, such as 0.95
    std_error: float
    method: str
    unit: str  # what is resampled: group, image, block, split or pair
    num_units: Mapping[str, int]  # by side, such as real and fake

    def as_record(self) -> dict[str, Any]:
        """Return the interval as plain JSON values."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high, "level": self.level,
                "std_error": self.std_error, "method": self.method, "unit": self.unit,
                "num_units": dict(self.num_units)}


@dataclass(frozen=True, kw_only=True)
class Jackknife:
    """An estimate, and what it becomes without each group (Efron and Stein 1981).

    The sides, such as real and fake images, are independent of each other: their variances add up.
    """

    estimate: float
    without: Mapping[str, np.ndarray]  # side -> float64 [G], the estimate without each group of this side
    is_share: bool = False  # a share of images, from 0 to 1, or to `most` where that is finite, as for percent
    least: float = -math.inf  # the smallest value that the quantity can have
    most: float = math.inf  # the largest one
    unit: str = "group"  # what is left out; image where all groups are of one image
    method: str = "delete-group jackknife"
    dealt: Mapping[str, int] = field(default_factory=dict)  # groups by side, where units are made of groups
    splits: int | None = None  # number of random splits that the variance is a mean over; None = it is of all units

    @property
    def num_units(self) -> dict[str, int]:
        if self.splits is not None:
            return {"splits": self.splits, **self.dealt}
        return {**{side: len(values) for side, values in self.without.items()}, **self.dealt}

    def variances(self) -> dict[str, float]:
        """Return by side (G - 1) / G * sum over g of (without g - mean)^2, which is never negative.

        The same formula serves groups of unequal sizes: what is drawn is a group, with its size.

        Raises TooFew if a side has fewer than two groups, or if there is no estimate without one of them.
        """
        for side, values in self.without.items():
            if len(values) < 2:
                raise TooFew(f"there is {len(values)} {self.unit} of {side} images; an interval needs at least 2")
            if not np.isfinite(values).all():
                raise TooFew(f"without one of the {len(values)} {self.unit}s of {side} images the estimate is not "
                             "finite; an interval needs more of them")
        return {side: (len(values) - 1) / len(values) * float(np.square(values - values.mean()).sum())
                for side, values in self.without.items()}

    def interval(self, level: float = DEFAULT_LEVEL) -> Interval:
        """Return an interval of the estimate from Student's t with the degrees of freedom of Welch and Satterthwaite.

        Raises TooFew as `variances` does.
        """
        check_level(level)
        estimate = float(self.estimate)
        variances = self.variances()
        error = math.sqrt(sum(variances.values()))
        reach = _critical(level, self._freedom(variances))
        if self.is_share:
            whole = self.most if math.isfinite(self.most) else 1.0
            low, high = (whole * end for end in _share_bounds(estimate / whole, error / whole, self._fewest(), reach))
        else:
            low, high = (min(max(end, self.least), self.most)
                         for end in (estimate - reach * error, estimate + reach * error))
        return Interval(estimate=estimate, low=low, high=high, level=level, std_error=error,
                        method=self.method, unit=self.unit, num_units=self.num_units)

    def p_value(self) -> float:
        """Return the two-sided p-value for a true value of 0: below 1 - level where `interval` excludes 0.

        Raises TooFew as `variances` does.
        """
        from scipy.stats import t  # here: importing it takes 0.4 s

        variances = self.variances()
        error = math.sqrt(sum(variances.values()))
        if error == 0:
            return 1.0 if self.estimate == 0 else 0.0
        return float(2 * t.sf(abs(self.estimate) / error, self._freedom(variances)))

    def minus(self, other: "Jackknife", paired: Sequence[str] = SHARED_SIDES) -> "Jackknife":
        """Return the difference to another estimate.

        paired:  sides on which both estimates use the same groups, in the same order, so that their errors cancel;
                 blocks count as such if their real images are the same, dealt by the same seed

        LIMIT: the difference of two shares that are both 0 or both 1 has the standard error 0.

        Raises ValueError if the estimates have different sides, or different numbers of groups on a paired side.
        """
        if self.without.keys() != other.without.keys():
            raise ValueError(f"the estimates vary with {', '.join(self.without)} and with {', '.join(other.without)}; "
                             "expected the same metric")
        without = {}
        for side, values in self.without.items():
            if side in paired:
                if len(values) != len(other.without[side]):
                    raise ValueError(f"there are {len(values)} and {len(other.without[side])} groups of {side} images; "
                                     "expected the same groups on both sides")
                without[side] = values - other.without[side]
            else:
                without[f"{side} of first"] = values - other.estimate
                without[f"{side} of second"] = self.estimate - other.without[side]
        return Jackknife(estimate=self.estimate - other.estimate, without=without, unit=self.unit, method=self.method,
                         dealt=self.dealt, splits=self.splits)

    def _fewest(self) -> int:
        return min((self.dealt or self.num_units).values())

    def _freedom(self, variances: Mapping[str, float]) -> float:
        total = sum(variances.values())
        parts = 0.0
        for side, variance in variances.items():
            counts = [*self.dealt.values(), *([] if self.splits else [len(self.without[side])])]
            parts += variance**2 / (min(counts) - 1)
        if parts == 0:  # variances that are all 0: the side with the fewest groups
            return self._fewest() - 1
        # A mean over random splits adds the relative variance 2 / splits to that of a variance, which is 2 / freedom.
        return 1 / (parts / total**2 + (0 if self.splits is None else 1 / self.splits))


def random_halves(name: str, count: int, groups: np.ndarray | None, fewest: int) -> np.ndarray:
    """Return int64 [count]: bit s tells which half an image is in, in the s-th of SPLITS splits; groups stay together.

    name:    of the side, such as real, for the message
    fewest:  number of images needed

    Groups are dealt in order of first appearance: images in another order are dealt otherwise, by which a standard
    error from SPLITS splits moves by 9 % (1 / sqrt(2 SPLITS)), and the estimate does not.

    Raises TooFew if there are fewer images, or fewer than four groups.
    """
    numbers = group_numbers(groups, count)
    num_groups = int(numbers.max()) + 1
    if num_groups < 4 or count < fewest:
        raise TooFew(f"there are {count} {name} images of {num_groups} groups; an interval needs at least {fewest} "
                     "images of 4 groups")
    random = np.random.RandomState(0)
    halves = np.zeros(num_groups, dtype=np.int64)
    for split in range(SPLITS):
        halves |= (random.permutation(num_groups) % 2) << split
    return halves[numbers]


def halves_jackknife(estimate: float, values: np.ndarray, groups: Mapping[str, np.ndarray | None],
                     counts: Mapping[str, int], **properties) -> Jackknife:
    """Return an estimate with its variance, computed from the values in two halves of all sides.

    values:      float64 [SPLITS, 2], from the halves of each split
    groups:      by side, int64 [N]; None = each image is its own group
    counts:      by side, number of images
    properties:  further fields of Jackknife

    For means over neighborhoods. The halves are independent of each other, and a variance is inversely proportional to
    the number of images; so that of the whole is the mean over the splits of (difference / 2)^2. Leaving out one group
    at a time overstates it, as Efron and Stein (1981) show, because several images notice a change of neighbors. In
    simulations standard errors from single groups were 1.3 to 1.8 times too large, from halves 0.9 to 1.2 times.
    """
    apart = (values[:, 0] - values[:, 1]) / 2
    step = apart / math.sqrt(2 * len(apart) - 1)  # so that the variance of a jackknife is the mean of apart^2
    dealt = {side: int(group_numbers(numbers, counts[side]).max()) + 1 for side, numbers in groups.items()}
    return Jackknife(estimate=float(estimate), without={"blocks": np.concatenate([estimate + step, estimate - step])},
                     unit=unit_of(*groups.values()), method="random halves of groups", dealt=dealt, splits=len(apart),
                     **properties)


def check_level(level: float) -> None:
    """Raise ValueError unless a level is between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"the level is {level}; expected a number between 0 and 1, such as 0.95")


def group_numbers(groups: Sequence[Any] | np.ndarray | None, count: int) -> np.ndarray:
    """Return the groups of `count` images numbered from 0 in order of first appearance: int64 [count].

    groups:  None = each image is its own group

    Raises ValueError if there are not `count` of them.
    """
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise ValueError(f"there are {len(groups)} groups of {count} images; expected one for each image")
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in np.asarray(groups).tolist()], dtype=np.int64)


def unit_of(*groups: np.ndarray | None) -> str:
    """Return "image" if each group of each side has one image, otherwise "group"."""
    return "group" if any(side is not None and len(np.unique(side)) < len(side) for side in groups) else "image"


def bootstrap_mean(values: np.ndarray, groups: np.ndarray | None = None, *, is_share: bool = False,
                   level: float = DEFAULT_LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the percentile interval of the mean of a value per image, with groups drawn with replacement.

    values:    float64 [N], such as whether an image lies in a neighborhood
    groups:    int64 [N]; None = images are independent
    is_share:  values are from 0 to 1; where all groups have the same mean, Wilson's bounds for as many images

    The percentiles are further out than those of the level, as Student's t is wider than a Gaussian, because means
    of few resampled groups vary too little (Hesterberg 2015). The order of the images does not matter.

    Raises TooFew if there are fewer than two groups.
    """
    from scipy.stats import norm  # here: importing it takes 0.4 s

    check_level(level)
    numbers = group_numbers(groups, len(values))
    sums, sizes = np.bincount(numbers, weights=values), np.bincount(numbers)
    total = len(sums)
    if total < 2:
        raise TooFew(f"there is {total} group of {len(values)} images; an interval needs at least 2")
    order = np.lexsort([sums, sizes])
    sums, sizes = sums[order], sizes[order]
    random = np.random.RandomState(seed)
    means = np.empty(resamples)
    for index in range(resamples):
        drawn = random.randint(total, size=total)
        means[index] = sums[drawn].sum() / sizes[drawn].sum()
    estimate, error, reach = float(np.mean(values)), float(means.std(ddof=1)), _critical(level, total - 1)
    if is_share and error < _ROUNDING:
        low, high = _share_bounds(estimate, 0.0, total, reach)
    else:
        tail = norm.sf(reach * math.sqrt(total / (total - 1)))
        low, high = np.quantile(means, [tail, 1 - tail])
    unit = unit_of(groups)
    return Interval(estimate=estimate, low=float(low), high=float(high), level=level, std_error=error,
                    method=f"bootstrap, {resamples} resamples", unit=unit, num_units={f"{unit}s": total})


class PermutationTest(NamedTuple):
    """A distance between two sets, and what it is when their groups are dealt to the two sides at random."""

    estimate: float
    p_value: float  # share of permutations with at least this distance, counting the one at hand
    null: np.ndarray  # float64 [permutations], the distances under permutation, in order of drawing


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the same order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * float(p_values[index])))
        adjusted[index] = largest
    return adjusted


def _critical(level: float, freedom: float) -> float:
    from scipy.stats import t  # here: importing it takes 0.4 s

    return float(t.ppf((1 + level) / 2, freedom))


def _share_bounds(share: float, error: float, num_units: int, reach: float) -> tuple[float, float]:
    """Return Wilson's bounds of a share for the number of independent images that would give the same error.

    That number is share (1 - share) / error^2 (Korn and Graubard 1998), or the number of groups where the error is 0,
    as for a share of 0 or 1. It may exceed the number of images: which real images have a generated neighbor varies
    less than if each had one by its own chance, as balls in bins do.
    """
    share = min(max(share, 0.0), 1.0)
    number = share * (1 - share) / error**2 if error > _ROUNDING and 0 < share < 1 else num_units
    center = (share + reach**2 / (2 * number)) / (1 + reach**2 / number)
    spread = reach / (1 + reach**2 / number) * math.sqrt(share * (1 - share) / number + reach**2 / (4 * number**2))
    return max(center - spread, 0.0), min(center + spread, 1.0)
