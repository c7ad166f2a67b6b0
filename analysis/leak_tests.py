"""The tests of authenticity: what each compares, with its control and its power. The mathematics is in leak_statistics.

Test 2 looks at how much nearer the nearest training image is than the next one of another patient or lesion. The plain
distance would not do: smooth images are similar to everything, so that a network that makes smooth images would seem to
copy. A copy is much more similar to its original than to all else; any other image, smooth or not, is about as similar
to its second neighbor as to its first.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.authenticity_measures import Measured
from analysis.authenticity_results import (
    MEMBERSHIP,
    NEAREST,
    PROJECTION_GAP,
    LeakTest,
    PlantedPower,
    SecondaryNumber,
)
from analysis.leak_statistics import (
    POWER,
    SHIFTS,
    ExceedanceTest,
    MembershipTest,
    Scores,
    exceedance_test,
    mean_difference,
    membership_test,
    smallest_effect,
)
from analysis.planted_copies import NUM_DRAWS, TRANSFORMATIONS, planted_power
from dnnlib.text import listed
from metrics.authenticity import authenticity
from metrics.intervals import TooFew
from metrics.precision_recall import precision_recall

# Scores of test 2: key of `NearestTraining.copy_scores`, and what is compared.
NEAREST_SCORES: Mapping[str, tuple[str, str]] = {
    "ssim-ratio": ("nearest-ssim", "structural similarity (SSIM) after alignment"),
    "features": ("nearest-features", "features of the detector"),
    "pixels": ("nearest-pixels", "16x16 pixels")}
DISCRIMINATOR, DISTANCE = "discriminator", "synthetic-distance"  # scores of test 3
NUM_TESTS = 1 + len(NEAREST_SCORES) + 2 * 2  # a score of test 3 has two: by AUC, and by true positives
CLASS_TOLERANCE = 0.1  # total variation distance of class shares up to which a control needs no matching
CERTAIN_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)  # of the training images, recognized with certainty
_TPR = "-tpr"  # at the end of the keys of tests by true positive rate
_PR_NEIGHBORS = 3  # as in calc_metrics.py


@dataclass(frozen=True, kw_only=True)
class BatterySettings:
    """What the tests depend on besides the measurements."""

    level: float
    ci: float
    resamples: int
    draws: int = NUM_DRAWS
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Sides:
    """Groups and classes of the training images and of the held-out ones, as numbers."""

    train_groups: np.ndarray  # int64 [N]
    train_strata: np.ndarray
    heldout_groups: np.ndarray  # int64 [H]
    heldout_strata: np.ndarray

    def scores(self, train: np.ndarray, heldout: np.ndarray) -> tuple[Scores, Scores]:
        """Return scores with groups and classes; images whose score is nan are left out. float [N] and [H]

        Raises TooFew if a side has no score.
        """
        found = []
        for name, values, groups, strata in (("training", train, self.train_groups, self.train_strata),
                                             ("held-out", heldout, self.heldout_groups, self.heldout_strata)):
            known = ~np.isnan(values)
            if not known.any():
                raise TooFew(f"no {name} image has a score: the network has none of their classes")
            found.append(Scores(values=values[known].astype(np.float64), groups=groups[known], strata=strata[known]))
        return found[0], found[1]


# Test 1


_PROJECTION = LeakTest(
    number=PROJECTION_GAP, key="projection-gap", title="distance to the own projection",
    question="Is the distance of a training image to its projection smaller than that of a held-out image of the same "
             "class?",
    statistic="AUC", expected=0.5)


def projection_not_run(reason: str) -> LeakTest:
    """Return test 1 if it did not run."""
    return replace(_PROJECTION, reason=reason)


def projection_test(members: Scores, heldout: Scores, settings: BatterySettings, setup: Mapping[str, Any]) -> LeakTest:
    """Compare distances of training images to their projections with those of held-out images.

    members, heldout:  minus the distances
    setup:             settings of the projections, for results.json
    """
    try:
        found = membership_test(members, heldout, ci=settings.ci, resamples=settings.resamples,
                                permutations=settings.resamples, seed=settings.seed)
    except TooFew as error:
        return projection_not_run(str(error))
    gap = mean_difference(members, heldout, ci=settings.ci, resamples=settings.resamples, seed=settings.seed)
    gap = replace(gap, estimate=-gap.estimate, low=-gap.high, high=-gap.low)  # scores are minus the distances
    medians = [float(np.median(-side.values)) for side in (members, heldout)]
    return replace(
        _PROJECTION, estimate=found.auc.interval, p_value=found.auc.p_value,
        control=f"{_control_of_members(found.auc)} Median distance {medians[0]:.4g} of training images, "
                f"{medians[1]:.4g} of held-out ones; difference of means within classes {gap.estimate:+.3g} "
                f"[{gap.low:+.3g}, {gap.high:+.3g}], positive where training images are nearer.",
        counts=_counts(found),
        details={"difference_of_means": gap.as_record(), "median_distances": {"training": medians[0],
                                                                              "held-out": medians[1]},
                 "projection": dict(setup), **_control_record(found.auc)})


# Test 2


def matched_control(synthetic_classes: Sequence[str], heldout_classes: Sequence[str], heldout_groups: np.ndarray,
                    seed: int) -> tuple[np.ndarray, str]:
    """Return the held-out images that the synthetic ones are compared with, int64 [n], and a sentence or "" about them.

    synthetic_classes:  name of each image's class; "" = not known
    heldout_groups:     int64 [H]

    All, if classes have about the same shares in both sets. Of a set with other shares, such as one of rare classes
    only, random groups of each class, as many as its share asks for: what is near for a common class may be far for a
    rare one.
    """
    every = np.arange(len(heldout_classes))
    ours, theirs = Counter(synthetic_classes), Counter(heldout_classes)
    if "" in ours:
        return every, ""
    apart = sum(abs(ours[name] / len(synthetic_classes) - theirs[name] / len(heldout_classes))
                for name in {*ours, *theirs}) / 2
    if apart <= CLASS_TOLERANCE:
        return every, ""
    if not set(ours) <= set(theirs):
        return every, (f"Held-out images have no {listed(sorted(set(ours) - set(theirs)))}, so the control has other "
                       "classes than the synthetic set.")
    random, order = np.random.RandomState(seed), {}
    for name in sorted(ours):
        groups = np.unique(heldout_groups[[row for row in every if heldout_classes[row] == name]])
        order[name] = random.permutation(groups)
    total = min(len(groups) * len(synthetic_classes) / ours[name] for name, groups in order.items())
    chosen = {name: set(groups[:max(int(total * ours[name] / len(synthetic_classes)), 1)].tolist())
              for name, groups in order.items()}
    rows = np.array([row for row in every if int(heldout_groups[row]) in chosen.get(heldout_classes[row], ())])
    return rows, (f"{len(rows)} of the held-out images, chosen so that classes have the shares that they have in the "
                  "synthetic set.")


def nearest_tests(synthetic: Measured, heldout: Measured, others: Measured, heldout_groups: np.ndarray,
                  other_groups: np.ndarray, settings: BatterySettings, control_rows: np.ndarray,
                  note: str = "") -> Iterator[LeakTest]:
    """Yield the comparisons of synthetic images with training images, for each score.

    heldout, others:     the controls: held-out images, and training images among those of other groups
    *_groups:            int64, of the images of the controls
    control_rows, note:  of `matched_control`
    """
    ours, theirs, seconds = (each.nearest.copy_scores() for each in (synthetic, heldout, others))
    theirs = {score: values[control_rows] for score, values in theirs.items()}
    heldout_groups = heldout_groups[control_rows]
    for test, score in zip(_nearest_questions(), NEAREST_SCORES, strict=True):
        test = replace(test, counts={
            "synthetic images": len(ours[score]), "held-out images": len(heldout_groups),
            "held-out groups": len(np.unique(heldout_groups)), "training images among others": len(other_groups)})
        options = {"ci": settings.ci, "resamples": settings.resamples, "seed": settings.seed}
        try:
            found = exceedance_test(ours[score], theirs[score], heldout_groups, **options)
        except TooFew as error:
            yield replace(test, reason=str(error))
            continue
        second = float((seconds[score] > found.threshold).mean())
        extremes = [float(values.max()) for values in (ours[score], theirs[score])]
        yield replace(
            test, estimate=found.share, p_value=found.p_value,
            control=f"{found.num_beyond} of {found.num_scores} synthetic images are beyond; so are "
                    f"{100 * second:.2g} % of {len(other_groups)} training images compared with those of other groups. "
                    f"The most extreme synthetic image is at {extremes[0]:.3g}, the most extreme held-out one at "
                    f"{extremes[1]:.3g} (0: as near as the next, 1: equal).{f' {note}' if note else ''}",
            details={"threshold": found.threshold, "num_beyond": found.num_beyond, "ranks": list(found.ranks),
                     "counts": list(found.counts), "num_units": found.num_units, "share_of_other_training": second})


def nearest_not_run(reason: str) -> list[LeakTest]:
    """Return the comparisons of `nearest_tests` if they did not run."""
    return [replace(test, reason=reason) for test in _nearest_questions()]


def _nearest_questions() -> Iterator[LeakTest]:
    for key, what in NEAREST_SCORES.values():
        yield LeakTest(
            number=NEAREST, key=key, title=what,
            question="How many synthetic images are nearer to a training image, compared with the next one of another "
                     f"patient or lesion, than 99 % of the held-out images are? By {what}.",
            statistic="share beyond the control's 1 % quantile", expected=0.01)


# Test 3


def membership_tests(name: str, sides: Sides, train: np.ndarray, heldout: np.ndarray,
                     settings: BatterySettings) -> list[LeakTest]:
    """Return the tests of a score of training and held-out images: by AUC, and by true positives.

    name:            DISCRIMINATOR or DISTANCE
    train, heldout:  float [N] and [H], larger = more like a training image; nan = unknown
    """
    by_auc, by_tpr = _membership_questions(name)
    try:
        members, others = sides.scores(train, heldout)
        found = membership_test(members, others, ci=settings.ci, resamples=settings.resamples,
                                permutations=settings.resamples, seed=settings.seed)
    except TooFew as error:
        return [replace(test, reason=str(error)) for test in (by_auc, by_tpr)]
    tests = [replace(by_auc, estimate=found.auc.interval, p_value=found.auc.p_value,
                     control=_control_of_members(found.auc), counts=_counts(found), details=_control_record(found.auc))]
    if found.tpr is None:
        return [*tests, replace(by_tpr, reason=found.reason)]
    return [*tests, replace(by_tpr, estimate=found.tpr.interval, p_value=found.tpr.p_value,
                            control=_control_of_members(found.tpr), counts=_counts(found),
                            details=_control_record(found.tpr))]


def membership_not_run(name: str, reason: str) -> list[LeakTest]:
    """Return the tests of `membership_tests` that did not run."""
    return [replace(test, reason=reason) for test in _membership_questions(name)]


def _membership_questions(name: str) -> tuple[LeakTest, LeakTest]:
    what = {DISCRIMINATOR: ("score of the discriminator", "Does the discriminator take a training image for real more "
                            "than a held-out image of the same class?"),
            DISTANCE: ("distance to the nearest synthetic image", "Is a training image nearer to a synthetic image "
                       "than a held-out image of the same class is?")}[name]
    by_auc = LeakTest(number=MEMBERSHIP, key=f"membership-{name}", title=what[0], question=what[1],
                      statistic="AUC", expected=0.5)
    return by_auc, replace(
        by_auc, key=f"{by_auc.key}{_TPR}", title=f"{what[0]}, few images", expected=0.01,
        question=f"{what[1]} Asked about the few that are recognized with most certainty: how many training images "
                 "are, where 1 % of the held-out images are taken for training images?",
        statistic="TPR at 1 % FPR")


def _control_of_members(attack: Any) -> str:
    return (f"Training images against other training images: {attack.control:.3f} (95 % of splits "
            f"{attack.control_low:.3f} to {attack.control_high:.3f}).")


def _control_record(attack: Any) -> dict[str, Any]:
    return {"member_against_member": {"median": attack.control, "low": attack.control_low,
                                      "high": attack.control_high}}


def _counts(found: Any) -> dict[str, int]:
    return {"training images": found.num_members, "training groups": found.num_member_groups,
            "held-out images": found.num_heldout, "held-out groups": found.num_heldout_groups}


# Power


def with_power(tests: list[LeakTest], scores: Mapping[str, tuple[Scores, Scores]], settings: BatterySettings,
               beat: Callable[[], None]) -> list[LeakTest]:
    """Return the tests of training against held-out images with what they would have found.

    scores:  of training and held-out images, by key of a test
    beat:    called after each test
    """
    level, found = _strict_level(tests, settings), []
    for test in tests:
        sides = scores.get(test.key.removesuffix(_TPR))
        if sides is not None and test.p_value is not None:
            in_draws = f"in 90 % of {settings.draws} draws"
            if test.key.endswith(_TPR):
                share = smallest_certain_share(*sides, level=level, settings=settings)
                power = (f"It would not have found a leak {in_draws} even if {100 * CERTAIN_SHARES[-1]:g} % of the "
                         "training images had been recognized with certainty." if share is None else
                         f"It would have found a leak {in_draws} if {100 * share:g} % of the training images had been "
                         "recognized with certainty.")
            else:
                effect = smallest_effect(*sides, level=level, num_draws=settings.draws, seed=settings.seed,
                                         permutations=settings.resamples)
                power = (f"It would not have found a shift of all training images by {SHIFTS[-1]:g} standard "
                         f"deviations {in_draws}." if effect is None else
                         f"It would have found an AUC of {effect.auc:.3f} {in_draws}: a shift of all training images "
                         f"by {effect.shift:.2f} standard deviations.")
            test = replace(test, power=power)
        found.append(test)
        beat()
    return found


def smallest_certain_share(members: Scores, heldout: Scores, *, level: float,
                           settings: BatterySettings) -> float | None:
    """Return the smallest of CERTAIN_SHARES that the true positive rate finds in POWER of the draws; None if none is.

    In each draw random training groups with this share of the images get a score above all others.
    """
    run = MembershipTest(members, heldout, permutations=settings.resamples, seed=settings.seed)
    both = np.concatenate([members.values, heldout.values])
    most = both.max() + np.ptp(both) + 1  # above all others also after scores are centered by class
    for number, share in enumerate(CERTAIN_SHARES):
        random, times = np.random.RandomState([settings.seed, number]), 0
        for _ in range(settings.draws):
            order = random.permutation(np.unique(members.groups))
            sizes = np.bincount(members.groups, minlength=order.max() + 1)[order]
            chosen = order[:int(np.searchsorted(np.cumsum(sizes), share * len(members))) + 1]
            values = np.where(np.isin(members.groups, chosen), most, members.values)
            times += run.p_values(values, heldout.values)[1] <= level
        if times >= POWER * settings.draws:
            return share
    return None


def power_of_nearest(test: LeakTest, synthetic: Measured, heldout: Measured, planted: Measured,
                     heldout_groups: np.ndarray, control_rows: np.ndarray, tests: list[LeakTest],
                     settings: BatterySettings, beat: Callable[[], None]) -> PlantedPower:
    """Return how often a comparison of `nearest_tests` finds planted copies. tests: all that ran"""
    score = next(score for score, (key, _) in NEAREST_SCORES.items() if key == test.key)
    ours, theirs, copies = (each.nearest.copy_scores()[score] for each in (synthetic, heldout, planted))
    run = ExceedanceTest(theirs[control_rows], heldout_groups[control_rows], seed=settings.seed)
    level = _strict_level(tests, settings)
    return planted_power(test.key, len(ours), len(copies) // len(TRANSFORMATIONS),
                         lambda rows: run.p_value(np.concatenate([ours, copies[rows]]))[0] <= level,
                         seed=settings.seed, num_draws=settings.draws, beat=beat)


def powers_of_distance(of_distance: Sequence[LeakTest], sides: Sides, to_synthetic: np.ndarray, to_planted: np.ndarray,
                       to_reference: np.ndarray | None, num_synthetic: int, tests: list[LeakTest],
                       settings: BatterySettings, beat: Callable[[], None]) -> Iterator[PlantedPower]:
    """Yield how often the nearest synthetic image gives away members when copies are planted, for each test.

    of_distance:   these tests
    to_synthetic:  float [R], distance of each real image to the nearest synthetic one, training images first
    to_planted:    float [copies, R], to each copy
    to_reference:  float [R], to the nearest image of the reference network
    """
    num_train, level = len(sides.train_groups), _strict_level(tests, settings)
    run = MembershipTest(*sides.scores(to_synthetic[:num_train], to_synthetic[num_train:]),
                         permutations=settings.resamples, seed=settings.seed)
    known: dict[bytes, tuple[float, float | None]] = {}  # the tests are run with the same copies

    def p_values(rows: np.ndarray) -> tuple[float, float | None]:
        if rows.tobytes() not in known:
            scores = distance_scores(np.minimum(to_synthetic, to_planted[rows].min(axis=0)), to_reference)
            known[rows.tobytes()] = run.p_values(scores[:num_train], scores[num_train:])
        return known[rows.tobytes()]

    for test in of_distance:
        place = int(test.key.endswith(_TPR))
        yield planted_power(test.key, num_synthetic, len(to_planted) // len(TRANSFORMATIONS),
                            lambda rows, place=place: p_values(rows)[place] <= level, seed=settings.seed,
                            num_draws=settings.draws, beat=beat)


def distance_scores(to_synthetic: np.ndarray, to_reference: np.ndarray | None) -> np.ndarray:
    """Return scores from distances to the nearest synthetic images, float [R]: larger = nearer.

    With a reference, how much nearer than to the nearest of equally many images of a network that did not see the
    training images: an image that any network comes near to says nothing (Chen et al. 2020, "GAN-Leaks", section 4.5).
    """
    return -to_synthetic if to_reference is None else to_reference - to_synthetic


def _strict_level(tests: list[LeakTest], settings: BatterySettings) -> float:
    """Return the level at which a test finds something whatever the other tests give (the first step of Holm)."""
    return settings.level / max(sum(test.p_value is not None for test in tests), 1)


# Secondary numbers


def secondary_numbers(train: np.ndarray, heldout: np.ndarray, synthetic: np.ndarray, sides: Sides,
                      settings: BatterySettings) -> Iterator[SecondaryNumber]:
    """Yield AuthPct, C_T, and precision and recall against training and held-out images.

    train, heldout, synthetic:  float32 [N, F], [H, F], [Q, F]
    """
    def interval_of(jackknife: Any) -> Any:
        try:
            return jackknife.interval(settings.ci)
        except TooFew:
            return None

    try:
        found = authenticity(train, synthetic, sides.train_groups, heldout, sides.heldout_groups, seed=settings.seed)
        control = authenticity(train, heldout, sides.train_groups, fake_groups=sides.heldout_groups, jackknife=False)
    except TooFew as error:
        yield SecondaryNumber(name="AuthPct", value=None, meaning=_AUTHPCT, weakness=_AUTHPCT_WEAKNESS,
                              reason=str(error))
    else:
        yield SecondaryNumber(name="AuthPct", value=found.authpct.estimate, interval=interval_of(found.authpct),
                              control=control.authpct.estimate, meaning=_AUTHPCT, weakness=_AUTHPCT_WEAKNESS)
        yield SecondaryNumber(name="C_T", value=None if found.ct is None else found.ct.estimate,
                              interval=None if found.ct is None else interval_of(found.ct), meaning=_CT,
                              weakness=_CT_WEAKNESS, reason=found.note or None)
    random = np.random.RandomState(settings.seed)
    count = min(len(train), len(heldout))
    rows = {"training": np.sort(random.permutation(len(train))[:count]),
            "held-out": np.sort(random.permutation(len(heldout))[:count])}
    of_sides = {name: precision_recall(side[rows[name]], synthetic, _PR_NEIGHBORS)
                for name, side in (("training", train), ("held-out", heldout))
                if min(count, len(synthetic)) > _PR_NEIGHBORS}
    for at, (name, meaning) in enumerate((("Precision", "synthetic images near a real one"),
                                          ("Recall", "real images near a synthetic one"))):
        yield SecondaryNumber(
            name=name, value=of_sides["training"][at] if of_sides else None,
            control=of_sides["held-out"][at] if of_sides else None,
            meaning=f"Share of {meaning}, for {count} random training images, and for as many held-out ones as the "
                    "control; about equal without copies.",
            weakness="Both measure how good and how varied the images are; a few copies among many hardly move them.",
            reason=None if of_sides else f"there are {count} images; expected more than {_PR_NEIGHBORS}")


_AUTHPCT = ("Percentage of synthetic images that are farther from their nearest training image than that is from its "
            "nearest other one; the control is the same of held-out images.")
_AUTHPCT_WEAKNESS = ("It falls where synthetic images are typical, and bad or blurred images count as authentic: sets "
                     "that leak pass, and good ones fail.")
_CT = ("By how many standard deviations synthetic images are nearer to training images than held-out ones are; 0 "
       "without copies, negative with.")
_CT_WEAKNESS = ("It grows with the number of images, and synthetic images that are worse than held-out ones are "
                "farther away, which hides copies.")
