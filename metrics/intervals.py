"""Intervals of measured numbers: delete-group jackknife, bootstrap of groups, permutation of groups, Holm's correction.

The unit is the group of images that belong together (a patient, a lesion): images of one lesion resemble each other,
and an interval that takes them for independent ones is too narrow. Groups are int64 [N], one number per image; images
of equal numbers belong together, and None stands for images that are independent of each other, as generated ones are.

What an interval is about: the mean of the estimate over fresh draws of as many groups of real and as many generated
images from the same sources. 95 % of such draws give intervals that contain it. It is not about the images at hand, and
it holds a bias that the estimate has at this number of images; KID and the extrapolated FID have none.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from dnnlib.text import plural

DEFAULT_LEVEL = 0.95
RESAMPLES = 1000
SPLITS = 64  # of a set into halves, one per bit of an int64
# Sides on which all that is compared with equal reals has the same images. A block, or half, has reals and fakes.
SHARED_SIDES = ("real", "heldout", "blocks")
_ROUNDING = 1e-12  # standard errors of shares, and differences, below it are of values that are equal up to rounding
_BLOCK = 2**22  # weights of images at once, as float64: 32 MiB


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
        raise TooFew(f"there {'is' if count == 1 else 'are'} {plural(count, f'{name} image')} of "
                     f"{plural(num_groups, 'group')}; an interval needs at least {fewest} images of 4 groups")
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


class GroupBootstrap:
    """Resamples of groups drawn with replacement: the same ones for all that is computed from the same images.

    groups:     of `count` images; None = images are independent
    keys:       float64 [K, N], values of the images whose sums put the groups in an order, so that that of the images
                does not matter
    required:   by name, such as "images of mel", bool [N]: kinds of images; resamples without one are drawn again
    resamples:  number of them
    seed:       of the draws

    Intervals are of percentiles that are further out than those of the level, as Student's t is wider than a Gaussian,
    because means of few resampled groups vary too little (Hesterberg 2015). The number of groups in that formula is
    the smallest one of a required kind: an AUC varies with the few positive patients, not with the many others.

    DeLong's variance of an AUC is not used: it takes the images for independent, but patients repeat; it is about AUC
    alone; and a difference of means over seeds needs the same resamples of all classifiers, which are at hand here.

    LIMIT: drawing again makes rare kinds less rare by a little: with 2 groups of a kind, 14 % are drawn again, with 5
    0.7 %.

    Raises TooFew if there are fewer than two groups, or two groups of a required kind.
    """

    def __init__(self, groups: Sequence[Any] | np.ndarray | None, count: int, *, keys: Sequence[np.ndarray] = (),
                 required: Mapping[str, np.ndarray] | None = None, resamples: int = RESAMPLES, seed: int = 0):
        numbers = group_numbers(groups, count)
        self.num_groups = int(numbers.max(initial=-1)) + 1
        self.unit = unit_of(groups)
        if self.num_groups < 2:
            raise TooFew(f"there is {plural(self.num_groups, 'group')} of {plural(count, 'image')}; an interval needs "
                         "at least 2")
        sums = [np.bincount(numbers, weights=values) for values in keys]
        order = np.lexsort([*reversed(sums), np.bincount(numbers)])
        places = np.empty(self.num_groups, dtype=np.int64)
        places[order] = np.arange(self.num_groups)
        self.numbers = places[numbers]  # int64 [N], the group of each image in this order
        kinds = required or {}
        self._has_kind = np.stack([np.bincount(self.numbers, weights=kind, minlength=self.num_groups) > 0
                                   for kind in kinds.values()], axis=1) if kinds else None  # bool [G, kinds]
        self.fewest = self.num_groups
        for index, name in enumerate(kinds):
            found = int(self._has_kind[:, index].sum())
            if found < 2:
                raise TooFew(f"there {'is' if found == 1 else 'are'} {plural(found, 'group')} with {name}; an interval "
                             "needs at least 2")
            self.fewest = min(self.fewest, found)
        self.resamples, self._seed = resamples, seed

    def draws(self) -> Iterator[np.ndarray]:
        """Yield the groups of each resample: int64 [G], with repetitions."""
        random = np.random.RandomState(self._seed)
        for _ in range(self.resamples):
            drawn = random.randint(self.num_groups, size=self.num_groups)
            while self._has_kind is not None and not self._has_kind[drawn].any(axis=0).all():
                drawn = random.randint(self.num_groups, size=self.num_groups)
            yield drawn

    def weights(self) -> Iterator[np.ndarray]:
        """Yield how often each image occurs in the resamples: float64 [R, N], in blocks of resamples.

        A block is stored by image: its transpose is contiguous.
        """
        draws, size = self.draws(), max(1, _BLOCK // len(self.numbers))
        while block := list(islice(draws, size)):
            times = np.stack([np.bincount(drawn, minlength=self.num_groups) for drawn in block], axis=1)
            yield times.astype(np.float64)[self.numbers].T

    def interval(self, estimate: float, values: np.ndarray, level: float = DEFAULT_LEVEL) -> Interval:
        """Return the percentile interval of an estimate.

        values:  float64 [resamples], the estimate in each resample
        """
        tail = self._tail(level)
        low, high = np.quantile(values, [tail, 1 - tail])
        return Interval(estimate=float(estimate), low=float(low), high=float(high), level=level,
                        std_error=float(values.std(ddof=1)), method=f"bootstrap, {self.resamples} resamples",
                        unit=self.unit, num_units={f"{self.unit}s": self.num_groups})

    def p_value(self, differences: np.ndarray) -> float:
        """Return the two-sided p-value for a true difference of 0: below 1 - level where `interval` excludes 0.

        differences:  float64 [resamples]

        The share of resamples on the other side of 0 counts the one at hand, (1 + k) / (resamples + 1), which is the
        smallest that can be found; the p-value is twice that share, carried over from the Gaussian to Student's t.

        LIMIT: with few groups it stays large, even where `interval` excludes 0: of 2,000 resamples of 4 groups it is at
        least 0.065, of 20 groups 0.005.
        """
        from scipy.stats import norm, t  # here: importing it takes 0.4 s

        ahead = min((differences <= _ROUNDING).sum(), (differences >= -_ROUNDING).sum())
        reach = norm.isf((1 + ahead) / (len(differences) + 1)) / math.sqrt(self.fewest / (self.fewest - 1))
        return float(min(1.0, 2 * t.sf(reach, self.fewest - 1)))

    def _tail(self, level: float) -> float:
        from scipy.stats import norm  # here: importing it takes 0.4 s

        return float(norm.sf(_critical(level, self.fewest - 1) * math.sqrt(self.fewest / (self.fewest - 1))))


def bootstrap_mean(values: np.ndarray, groups: np.ndarray | None = None, *, is_share: bool = False,
                   level: float = DEFAULT_LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the percentile interval of the mean of a value per image, with groups drawn with replacement.

    values:    float64 [N], such as whether an image lies in a neighborhood
    groups:    int64 [N]; None = images are independent
    is_share:  values are from 0 to 1; where all groups have the same mean, Wilson's bounds for as many images

    The order of the images does not matter.

    Raises TooFew if there are fewer than two groups.
    """
    check_level(level)
    bootstrap = GroupBootstrap(groups, len(values), keys=[values], resamples=resamples, seed=seed)
    sums, sizes = np.bincount(bootstrap.numbers, weights=values), np.bincount(bootstrap.numbers)
    means = np.array([sums[drawn].sum() / sizes[drawn].sum() for drawn in bootstrap.draws()])
    found = bootstrap.interval(float(np.mean(values)), means, level)
    if is_share and found.std_error < _ROUNDING:
        low, high = _share_bounds(found.estimate, 0.0, bootstrap.num_groups, _critical(level, bootstrap.num_groups - 1))
        return replace(found, low=low, high=high)
    return found


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
    # The bounds of 0 and 1 are these themselves, but for rounding.
    return 0.0 if share == 0 else max(center - spread, 0.0), 1.0 if share == 1 else min(center + spread, 1.0)
