"""Intervals of measured numbers: delete-group jackknife, bootstrap of groups, permutation of groups, Holm's correction.

The unit is the group of images that belong together (a patient, a lesion): images of one lesion resemble each other,
and an interval that takes them for independent ones is too narrow. Groups are int64 [N], one number per image; images
of equal numbers belong together, and None stands for images that are independent of each other, as generated ones are.

"""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

DEFAULT_LEVEL = 0.95
RESAMPLES = 1000


class TooFew(ValueError):
    """There are too few images or groups for an interval; the message says what is there and what is needed."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An interval of a measured number, and how it was computed."""

    estimate: float  # what the interval is about
    low: float
    high: float
    level: float  # its intended share of samples in which it contains the mean over new samples, such as 0.95
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
    is_share: bool = False  # a share of images, from 0 to 1
    least: float = -math.inf  # the smallest value that the quantity can have
    unit: str = "group"

    @property
    def num_units(self) -> dict[str, int]:
        return {side: len(values) for side, values in self.without.items()}

    def variances(self) -> dict[str, float]:
        """Return by side (G - 1) / G * sum over g of (without g - mean)^2, which is never negative.

        Raises TooFew if a side has fewer than two groups.
        """
        for side, values in self.without.items():
            if len(values) < 2:
                raise TooFew(f"there is {len(values)} {self.unit} of {side} images; an interval needs at least 2")
        return {side: (len(values) - 1) / len(values) * float(np.square(values - values.mean()).sum())
                for side, values in self.without.items()}

    def interval(self, level: float = DEFAULT_LEVEL) -> Interval:
        """Return an interval of the estimate from Student's t with the degrees of freedom of Welch and Satterthwaite.

        Raises TooFew if a side has fewer than two groups.
        """
        check_level(level)
        variances = self.variances()
        error = math.sqrt(sum(variances.values()))
        reach = _critical(level, self._freedom(variances))
        if self.is_share:
            low, high = _share_bounds(self.estimate, error, min(self.num_units.values()), reach)
        else:
            low, high = max(self.estimate - reach * error, self.least), self.estimate + reach * error
        return Interval(estimate=self.estimate, low=low, high=high, level=level, std_error=error,
                        method="delete-group jackknife", unit=self.unit, num_units=self.num_units)

    def p_value(self) -> float:
        """Return the two-sided p-value of the estimate being 0. Raises TooFew as `interval` does."""
        from scipy.stats import t  # here: importing it takes 0.4 s

        variances = self.variances()
        error = math.sqrt(sum(variances.values()))
        if error == 0:
            return 1.0 if self.estimate == 0 else 0.0
        return float(2 * t.sf(abs(self.estimate) / error, self._freedom(variances)))

    def minus(self, other: "Jackknife", paired: Sequence[str] = ("real",)) -> "Jackknife":
        """Return the difference to another estimate.

        paired:  sides on which both estimates use the same groups, in the same order, so that their errors cancel

        Raises ValueError if a paired side has different numbers of groups.
        """
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
        return Jackknife(estimate=self.estimate - other.estimate, without=without, unit=self.unit)

    def _freedom(self, variances: Mapping[str, float]) -> float:
        total = sum(variances.values())
        parts = sum(variance**2 / (len(self.without[side]) - 1) for side, variance in variances.items())
        # Of variances that are all 0, the side with the fewest groups.
        return total**2 / parts if parts > 0 else min(self.num_units.values()) - 1


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


def bootstrap_mean(values: np.ndarray, groups: np.ndarray | None = None, *, level: float = DEFAULT_LEVEL,
                   resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the percentile interval of the mean of a value per image, with groups drawn with replacement.

    values:  float64 [N], such as whether an image lies in a neighborhood
    groups:  int64 [N]; None = images are independent

    Raises TooFew if there are fewer than two groups.
    """
    check_level(level)
    numbers = group_numbers(groups, len(values))
    sums, sizes = np.bincount(numbers, weights=values), np.bincount(numbers)
    if len(sums) < 2:
        raise TooFew(f"there is {len(sums)} group of {len(values)} images; an interval needs at least 2")
    random = np.random.RandomState(seed)
    means = np.empty(resamples)
    for index in range(resamples):
        times = np.bincount(random.randint(len(sums), size=len(sums)), minlength=len(sums))
        means[index] = times @ sums / (times @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate=float(np.mean(values)), low=float(low), high=float(high), level=level,
                    std_error=float(means.std(ddof=1)), method=f"bootstrap of groups, {resamples} resamples",
                    unit="group", num_units={"group": len(sums)})


class PermutationTest(NamedTuple):
    """A distance between two sets, and what it is when their groups are dealt to the two sides at random."""

    estimate: float
    p_value: float  # share of permutations with at least this distance, counting the one at hand
    null: np.ndarray  # float64 [permutations], the distances under permutation, in order of drawing


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the same order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _critical(level: float, freedom: float) -> float:
    from scipy.stats import t  # here: importing it takes 0.4 s

    return float(t.ppf((1 + level) / 2, freedom))


def _share_bounds(share: float, error: float, num_units: int, reach: float) -> tuple[float, float]:
    """Return Wilson's bounds of a share for the number of independent images that would give the same error.

    That number is share (1 - share) / error^2 (Korn and Graubard 1998); for a share of 0 or 1, whose error is 0, the
    number of groups.
    """
    share = min(max(share, 0.0), 1.0)
    number = share * (1 - share) / error**2 if error > 0 and 0 < share < 1 else num_units
    center = (share + reach**2 / (2 * number)) / (1 + reach**2 / number)
    spread = reach / (1 + reach**2 / number) * math.sqrt(share * (1 - share) / number + reach**2 / (4 * number**2))
    return max(center - spread, 0.0), min(center + spread, 1.0)
