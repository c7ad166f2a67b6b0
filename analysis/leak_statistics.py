"""Statistics of the tests of authenticity: do scores of training images, or of synthetic ones, exceed held-out ones?

Scores point one way: larger = more like a copy, or more like a training image. The unit is the group (a patient, a
lesion). Images of one group resemble each other, and p-values that take them for independent ones find leaks where
there are none; tests/analysis/test_leak_false_alarms.py shows both.

`exceedance_test` compares synthetic images, which are independent of each other, with held-out ones, `MembershipTest`
training images with held-out ones. Both are valid for any distribution of the scores: the first counts ranks, the
second deals groups to the two sides at random.

N images, M training and H held-out ones, G groups, S strata (classes), R resamples, P ways to split groups in two.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.group_splits import (
    ROUNDING,
    GroupSplits,
    Scores,
    checked,
    class_of_groups,
    deal_groups,
    draw_groups,
)
from dnnlib.text import plural
from metrics.intervals import (
    DEFAULT_LEVEL,
    RESAMPLES,
    GroupBootstrap,
    Interval,
    TooFew,
    bootstrap_mean,
    check_level,
    group_numbers,
)

DEFAULT_TAIL = 0.01  # of the control's scores, beyond which a synthetic image is unusually near to a training image
DEFAULT_FPR = 0.01  # as Carlini et al. 2022 ask for: an attack that is sure of a few images is a leak of these
DEFAULT_PERMUTATIONS = 999
NUM_CONTROLS = 200  # splits of the training groups in two; their 95 % range needs the 5 most extreme ones on each side
MIN_GROUPS = 20  # of a control, below which its largest scores say little about a tail of 1 %
SHIFTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0)  # in standard deviations within a class
POWER = 0.9  # share of draws in which an effect must be found


@dataclass(frozen=True, kw_only=True)
class Exceedance:
    """How many synthetic images have scores beyond those of the control."""

    share: Interval  # of the scores that are above the threshold; about `tail` without a leak
    threshold: float  # the (1 - tail) quantile of all images of the control
    num_beyond: int  # scores above it
    num_scores: int
    num_units: int  # groups of the control, of each of which one image is in the p-value
    p_value: float  # one-sided, corrected for the number of ranks
    ranks: tuple[int, ...]  # k: the scores above the k-th largest one of the control were counted
    counts: tuple[int, ...]  # by rank, the number of these scores


def exceedance_test(scores: np.ndarray, control: np.ndarray, control_groups: np.ndarray | None = None, *,
                    tail: float = DEFAULT_TAIL, ci: float = DEFAULT_LEVEL, resamples: int = RESAMPLES,
                    seed: int = 0) -> Exceedance:
    """Test whether more scores lie beyond the tail of a control than if both had one distribution.

    scores:          float64 [N], of images that are independent of each other, such as synthetic ones
    control:         float64 [H], of held-out images
    control_groups:  int64 [H]; None = images are independent
    tail:            share of the control that counts as its tail
    seed:            which image of each group is in the p-value, and resamples of the interval

    Raises TooFew and ValueError as ExceedanceTest does.
    """
    check_level(ci)
    test = ExceedanceTest(control, control_groups, tail=tail, seed=seed)
    p_value, counts = test.p_value(scores)
    scores = np.asarray(scores, dtype=np.float64)
    return Exceedance(share=_share_beyond(scores, test, ci, resamples, seed), threshold=test.threshold,
                      num_beyond=int((scores > test.threshold).sum()), num_scores=len(scores),
                      num_units=len(test.units), p_value=p_value, ranks=test.ranks, counts=counts)


class ExceedanceTest:
    """P-values of many sets of scores against one control. Arguments as of `exceedance_test`

    Of each group one image is drawn, so that the control is of independent images. The p-value is that of exceedance
    (precedence) tests (Balakrishnan and Ng 2006): without a leak the number X_k of scores above the k-th largest one of
    the control is negative hypergeometric, whatever the distribution. The ranks k are 1, 2, 4, ... up to tail * groups;
    the smallest of their p-values is multiplied by their number. Scores equal to that of the control count as not
    above, so ties make the p-value larger.

    LIMIT: p-values as small as a battery needs take enough groups: where a share s of many synthetic images are copies,
    the p-value is at best about ranks * exp(-s * groups). In simulations with copies beyond the whole control, p-values
    of 0.0014 were reached for 5 % of copies with 300 groups, 2 % with 750, 1 % with 1,500 and 0.5 % with 3,000.

    LIMIT: which image of a group is drawn follows from the order of the images, which must not follow from the scores.

    LIMIT: it finds any difference of the tails. Synthetic images that are more typical than held-out ones are nearer to
    training images without being copies of them; hence the second control, of training images among other groups.

    LIMIT: a group counts once, however many images it has, while a generator imitates images: if patients with many
    images have other scores than those with few, the two distributions differ without a leak.

    Raises TooFew if the control has fewer than MIN_GROUPS groups, ValueError if scores are not finite.
    """

    def __init__(self, control: np.ndarray, control_groups: np.ndarray | None = None, *, tail: float = DEFAULT_TAIL,
                 seed: int = 0):
        self.control, self.tail = checked(control, "scores of the control"), tail
        if not 0 < tail < 1:
            raise ValueError(f"the tail is {tail}; expected a number between 0 and 1, such as {DEFAULT_TAIL}")
        self.groups = group_numbers(control_groups, len(self.control))  # int64 [H]
        sizes = np.bincount(self.groups)
        if len(sizes) < MIN_GROUPS:
            raise TooFew(f"the control has {plural(len(sizes), 'group')} of images; the test needs at least "
                         f"{MIN_GROUPS}")
        # Which image of a group is drawn must not follow from its score: from the order at hand, not from a sorted one.
        rows = np.argsort(self.groups, kind="stable")
        drawn = rows[np.cumsum(sizes) - sizes + np.random.RandomState(seed).randint(sizes)]
        self.units = np.sort(self.control[drawn])[::-1]  # float64 [G], the score of one image of each group
        self.ranks = tuple(2**power for power in range(math.ceil(tail * len(sizes) - ROUNDING).bit_length()))
        self.threshold = float(np.quantile(self.control, 1 - tail, method="inverted_cdf"))

    def p_value(self, scores: np.ndarray) -> tuple[float, tuple[int, ...]]:
        """Return the one-sided p-value, and for each rank k how many scores are above the k-th of the control.

        scores:  float64 [N]
        """
        from scipy.stats import hypergeom  # here: importing it takes 0.4 s

        scores, ranks = checked(scores, "scores"), np.array(self.ranks)
        counts = (scores[:, None] > self.units[ranks - 1]).sum(axis=0)
        # X_k >= x: of the x + k - 1 largest scores of both, at most k - 1 are of the control.
        least = hypergeom.cdf(ranks - 1, len(scores) + len(self.units), len(self.units), counts + ranks - 1).min()
        return min(1.0, len(ranks) * float(least)), tuple(counts.tolist())


@dataclass(frozen=True, kw_only=True)
class Attack:
    """How well scores tell training images from held-out ones; the control is of training against training images."""

    interval: Interval
    p_value: float  # one-sided
    control: float  # median over random splits of the training groups
    control_low: float  # 95 % of these splits lie between low and high
    control_high: float


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Training images against held-out images of the same classes."""

    auc: Attack  # area under the ROC curve within classes; 0.5 without a leak
    tpr: Attack | None  # true positive rate at `fpr` false positives; about `fpr` without a leak
    fpr: float
    num_members: int
    num_heldout: int
    num_member_groups: int
    num_heldout_groups: int
    num_left_out: int  # images of classes that only one of the sides has
    reason: str | None = None  # why there is no `tpr`


def membership_test(members: Scores, heldout: Scores, *, fpr: float = DEFAULT_FPR, ci: float = DEFAULT_LEVEL,
                    resamples: int = RESAMPLES, permutations: int = DEFAULT_PERMUTATIONS, seed: int = 0,
                    num_controls: int = NUM_CONTROLS) -> Membership:
    """Test whether training images have larger scores than held-out images of the same class.

    The AUC is the share of pairs of a training and a held-out image of one class in which the training image has the
    larger score, ties counting half. For the true positive rate scores are centered at the held-out median of their
    class; the threshold is the smallest held-out score with at most a share of `fpr` held-out images above it, and
    training images are weighted so that classes count as they do among the held-out ones. Intervals are of groups drawn
    with replacement on each side, p-values of groups dealt to the sides at random, see MembershipTest.

    10,000 images take about 5 seconds, nearly all of it for the intervals.

    Raises TooFew if no class has images on both sides, or if a side has fewer than two groups.
    """
    check_level(ci)
    test = MembershipTest(members, heldout, fpr=fpr, permutations=permutations, seed=seed)
    p_auc, p_tpr = test.p_values(members.values, heldout.values)
    members, heldout = members.rows(test.member_rows), heldout.rows(test.heldout_rows)
    draws = [GroupBootstrap(side.groups, len(side), keys=[side.values, side.strata], resamples=resamples,
                            seed=seed + at) for at, side in enumerate((members, heldout))]
    drawn = np.array([_rates(members.values[first], members.strata[first], heldout.values[second],
                             heldout.strata[second], fpr)
                      for first, second in zip(*map(_drawn_rows, draws), strict=True)])
    found = _rates(members.values, members.strata, heldout.values, heldout.strata, fpr)
    control = test.control_rates(members.values, num_controls, seed)
    fewest = min(draws, key=lambda each: each.num_groups)
    attacks = []
    for at, p_value in enumerate((p_auc, p_tpr)):
        interval = replace(fewest.interval(found[at], drawn[:, at], ci),
                           num_units={"members": draws[0].num_groups, "heldout": draws[1].num_groups},
                           unit="group" if "group" in {each.unit for each in draws} else "image")
        low, middle, high = np.quantile(control[at], [0.025, 0.5, 0.975])
        attacks.append(None if p_value is None else Attack(interval=interval, p_value=p_value, control=float(middle),
                                                           control_low=float(low), control_high=float(high)))
    return Membership(auc=attacks[0], tpr=attacks[1], fpr=fpr, num_members=len(members), num_heldout=len(heldout),
                      num_member_groups=draws[0].num_groups, num_heldout_groups=draws[1].num_groups,
                      num_left_out=test.num_left_out, reason=test.reason)


class MembershipTest:
    """P-values of many scores of the same training and held-out images; what depends on groups alone is computed once.

    members, heldout:  groups and strata of the images; their values are not used
    fpr:               share of held-out images above the threshold of the true positive rate
    permutations:      number of ways in which groups are dealt to the sides at random
    seed:              of these ways

    Groups are dealt among those of one class (the class of most of their images), and each side keeps its number of
    groups of each class. So the p-values are valid too where classes have different shares on the two sides, as long as
    it was chance, within a class, which groups are training groups.

    10,000 images of as many groups, 2,000 of them held-out, and 999 permutations: 0.4 s to prepare, then 0.1 s for both
    p-values of a score.

    LIMIT: which groups are dealt together follows from the order of the images; in another order p-values differ as
    they do with another seed.

    Raises TooFew if no class has images on both sides, or if a side has fewer than two groups.
    """

    def __init__(self, members: Scores, heldout: Scores, *, fpr: float = DEFAULT_FPR,
                 permutations: int = DEFAULT_PERMUTATIONS, seed: int = 0):
        if not 0 < fpr < 1:
            raise ValueError(f"the share of false positives is {fpr}; expected a number between 0 and 1")
        if permutations < 1:
            raise ValueError(f"there are {permutations} permutations; expected at least 1")
        self.fpr, self.permutations = fpr, permutations
        shared = np.intersect1d(members.strata, heldout.strata)
        self.member_rows = np.flatnonzero(np.isin(members.strata, shared))  # of images whose class is on both sides
        self.heldout_rows = np.flatnonzero(np.isin(heldout.strata, shared))
        self.num_left_out = len(members) + len(heldout) - len(self.member_rows) - len(self.heldout_rows)
        if not len(shared):
            raise TooFew("no class has both training and held-out images; the test needs images of one class on both "
                         "sides")
        self._member_groups = group_numbers(members.groups[self.member_rows], len(self.member_rows))
        heldout_groups = group_numbers(heldout.groups[self.heldout_rows], len(self.heldout_rows))
        self.num_member_groups, self.num_heldout_groups = (
            int(numbers.max()) + 1 for numbers in (self._member_groups, heldout_groups))
        for name, number in (("training", self.num_member_groups), ("held-out", self.num_heldout_groups)):
            if number < 2:
                raise TooFew(f"there is {plural(number, 'group')} of {name} images whose class is on both sides; the "
                             "test needs at least 2")
        self.reason = None
        if len(self.heldout_rows) * fpr < 1 - ROUNDING:
            self.reason = (f"{plural(len(self.heldout_rows), 'held-out image')}; a true positive rate at {100 * fpr:g} "
                           f"% false positives needs at least {math.ceil(1 / fpr - ROUNDING)}")
        elif self.num_heldout_groups < MIN_GROUPS:
            self.reason = (f"{plural(self.num_heldout_groups, 'held-out group')}; a true positive rate needs at least "
                           f"{MIN_GROUPS}")
        groups = np.concatenate([self._member_groups, self.num_member_groups + heldout_groups])
        self._strata = np.concatenate([members.strata[self.member_rows], heldout.strata[self.heldout_rows]])
        self._classes = class_of_groups(groups, self._strata)  # int64 [G], those of members first
        is_heldout = np.arange(len(self._classes)) >= self.num_member_groups
        self._heldout_of_class = np.bincount(self._classes[is_heldout], minlength=self._classes.max() + 1)
        ways = deal_groups(self._classes, self._heldout_of_class, permutations, np.random.default_rng(seed))
        self._splits = GroupSplits(groups, self._strata, np.concatenate([np.flatnonzero(is_heldout)[None], ways]))

    def p_values(self, members: np.ndarray, heldout: np.ndarray) -> tuple[float, float | None]:
        """Return the one-sided p-values of the AUC and of the true positive rate; None where `reason` tells why.

        members, heldout:  float64 [M], [H], scores of all images that the test was made for
        """
        values = self._join(members, heldout)
        return (_share_at_least(self._splits.aucs(values)),
                None if self.reason else _share_at_least(self._splits.true_positive_rates(values, self.fpr)))

    def auc(self, members: np.ndarray, heldout: np.ndarray) -> tuple[float, float]:
        """Return the AUC and its p-value alone, which takes a fifth of the time. Arguments as of `p_values`"""
        aucs = self._splits.aucs(self._join(members, heldout))
        return float(aucs[0]), _share_at_least(aucs)

    def control_rates(self, members: np.ndarray, num_controls: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return AUCs and true positive rates of training images against training images: two float64 [num_controls].

        members:  float64 [M], scores of the images of `member_rows`

        The second side has as many groups of each class as the held-out one has, and at most half of those there are.
        """
        classes = self._classes[:self.num_member_groups]
        groups = np.bincount(classes, minlength=len(self._heldout_of_class))
        few = np.minimum(self._heldout_of_class, groups // 2)
        if not few.any():  # classes of one group each
            few[np.argmax(groups)] = 1
        ways = deal_groups(classes, few, num_controls, np.random.default_rng([seed, 1]))
        splits = GroupSplits(self._member_groups, self._strata[:len(self._member_groups)], ways)
        return splits.aucs(members), splits.true_positive_rates(members, self.fpr)

    def _join(self, members: np.ndarray, heldout: np.ndarray) -> np.ndarray:
        return np.concatenate([checked(members, "scores")[self.member_rows],
                               checked(heldout, "scores")[self.heldout_rows]])


def mean_difference(members: Scores, heldout: Scores, *, ci: float = DEFAULT_LEVEL, resamples: int = RESAMPLES,
                    seed: int = 0) -> Interval:
    """Return the mean of held-out values minus that of training values, within classes, with a bootstrap of groups.

    Differences of classes are weighted by their numbers of held-out images. Of distances, a positive difference means
    that training images are nearer. Classes that only one side has are left out.

    Raises TooFew if no class has images on both sides, or if a side has fewer than two groups.
    """
    check_level(ci)
    shared = np.intersect1d(members.strata, heldout.strata)
    if not len(shared):
        raise TooFew("no class has both training and held-out images; a difference needs images of one class on both "
                     "sides")
    found, drawn, draws = [], [], []
    for at, side in enumerate((members, heldout)):
        side = side.rows(np.isin(side.strata, shared))
        draw = GroupBootstrap(side.groups, len(side), keys=[side.values, side.strata], resamples=resamples,
                              seed=seed + at)
        place = draw.numbers * len(shared) + np.searchsorted(shared, side.strata)
        table = np.stack([np.bincount(place, weights=weights, minlength=draw.num_groups * len(shared))
                          for weights in (None, side.values)]).reshape(2, draw.num_groups, -1)  # counts, sums by group
        draws.append(draw)
        found.append(table.sum(axis=1))
        drawn.append(np.stack([np.bincount(each, minlength=draw.num_groups) @ table for each in draw.draws()], axis=1))
    fewest = min(draws, key=lambda each: each.num_groups)
    interval = fewest.interval(float(_weighted_difference(*found)), _weighted_difference(*drawn), ci)
    return replace(interval, num_units={"members": draws[0].num_groups, "heldout": draws[1].num_groups},
                   unit="group" if "group" in {each.unit for each in draws} else "image")


@dataclass(frozen=True, kw_only=True)
class SmallestEffect:
    """The smallest effect that a test of membership finds in 90 % of draws."""

    shift: float  # of training scores, in standard deviations within a class
    auc: float  # at this shift, mean over draws


def smallest_effect(members: Scores, heldout: Scores, *, level: float, num_draws: int = 20,
                    permutations: int = DEFAULT_PERMUTATIONS, shifts: Sequence[float] = SHIFTS,
                    seed: int = 0) -> SmallestEffect | None:
    """Return the smallest shift of training scores whose AUC the test finds in POWER of the draws; None if none is.

    level:   of the p-value, corrected by the caller for the number of tests; at least 1 / (1 + permutations)
    shifts:  in ascending order, in standard deviations within a class

    In each draw the groups of both sides are drawn with replacement from those of both sides together, class by class,
    so that there is no leak; then the shift is added to all training images.

    LIMIT: it is about a leak of all training images alike. A leak of a few of them, which the true positive rate is
    for, has another smallest size.

    Raises ValueError if no p-value can be as small as the level, TooFew as MembershipTest does.
    """
    if level < 1 / (1 + permutations) - ROUNDING:
        raise ValueError(f"the level is {level:g}; {permutations} permutations give p-values of at least "
                         f"{1 / (1 + permutations):.2g}: use {math.ceil(1 / level - ROUNDING) - 1} or more")
    pooled = Scores(values=np.concatenate([members.values, heldout.values]),
                    groups=np.concatenate([group_numbers(members.groups, len(members)),
                                           len(members) + group_numbers(heldout.groups, len(heldout))]),
                    strata=np.concatenate([members.strata, heldout.strata]))
    numbers = group_numbers(pooled.groups, len(pooled))
    classes = class_of_groups(numbers, pooled.strata)
    is_member = np.isin(np.arange(len(classes)), numbers[:len(members)])
    centered = pooled.values.astype(np.float64)
    for stratum in np.unique(pooled.strata):
        centered[pooled.strata == stratum] -= centered[pooled.strata == stratum].mean()
    spread = float(centered.std())
    random = np.random.default_rng(seed)
    found = np.empty([num_draws, len(shifts), 2])  # AUC and p-value
    for draw in range(num_draws):
        first, second = (draw_groups(pooled, numbers, np.bincount(classes[side], minlength=classes.max() + 1), classes,
                                    random) for side in (is_member, ~is_member))
        test = MembershipTest(first, second, permutations=permutations, seed=seed + draw)
        found[draw] = [test.auc(first.values + shift * spread, second.values) for shift in shifts]
    for at, shift in enumerate(shifts):
        if (found[:, at, 1] <= level).mean() >= POWER:
            return SmallestEffect(shift=float(shift), auc=float(found[:, at, 0].mean()))
    return None


def _rates(members: np.ndarray, member_strata: np.ndarray, heldout: np.ndarray, heldout_strata: np.ndarray,
           fpr: float) -> tuple[float, float]:
    """Return the AUC and the true positive rate of one way to split images."""
    values = np.concatenate([members, heldout])
    side = np.repeat([0, 1], [len(members), len(heldout)])
    splits = GroupSplits(side, np.concatenate([member_strata, heldout_strata]), np.ones([1, 1], dtype=np.int64))
    return float(splits.aucs(values)[0]), float(splits.true_positive_rates(values, fpr)[0])


def _share_at_least(statistics: np.ndarray) -> float:
    """Return the share of ways that give at least the statistic of the first one, which counts too."""
    return float((statistics >= statistics[0] - ROUNDING).mean())


def _drawn_rows(bootstrap: GroupBootstrap) -> Iterator[np.ndarray]:
    """Yield the images of each resample: int64 [n]."""
    for drawn in bootstrap.draws():
        times = np.bincount(drawn, minlength=bootstrap.num_groups)[bootstrap.numbers]
        yield np.repeat(np.arange(len(times)), times)


def _share_beyond(scores: np.ndarray, test: ExceedanceTest, ci: float, resamples: int, seed: int) -> Interval:
    """Return an interval of the share of scores above the (1 - tail) quantile of the control; both are resampled.

    Of resampled independent scores, a binomial number is above a threshold. Where no share varies, Wilson's bounds.

    LIMIT: with fewer than some 5 / tail images in the control the quantile varies less in resamples than it should.
    """
    bootstrap = GroupBootstrap(test.groups, len(test.groups), keys=[test.control], resamples=resamples, seed=seed)
    ascending, order = np.sort(scores), np.argsort(test.control, kind="stable")
    thresholds = []
    for weights in bootstrap.weights():
        reached = np.cumsum(weights[:, order], axis=1)
        places = (reached >= (1 - test.tail) * reached[:, -1:] - ROUNDING).argmax(axis=1)
        thresholds.append(test.control[order][places])
    above = len(scores) - ascending.searchsorted(np.concatenate(thresholds), side="right")
    drawn = np.random.RandomState(seed + 1).binomial(len(scores), above / len(scores)) / len(scores)
    is_beyond = (scores > test.threshold).astype(np.float64)
    found = bootstrap.interval(float(is_beyond.mean()), drawn, ci)
    if found.std_error < ROUNDING:
        found = bootstrap_mean(is_beyond, is_share=True, level=ci, resamples=resamples, seed=seed)
    return replace(found, num_units={"scores": len(scores), f"control {bootstrap.unit}s": bootstrap.num_groups})


def _weighted_difference(members: np.ndarray, heldout: np.ndarray) -> np.ndarray:
    """Return the difference of means, weighted by held-out counts: float64 [...].

    members, heldout:  float64 [2, ..., S], counts and sums by stratum
    """
    weights = np.where(members[0] > 0, heldout[0], 0)
    differences = heldout[1] / np.maximum(heldout[0], 1) - members[1] / np.maximum(members[0], 1)
    return (weights * differences).sum(axis=-1) / np.maximum(weights.sum(axis=-1), 1)
