"""What a classifier is trained on: real images, synthetic ones, or both, and which of them.

TRTR ("train on real, test on real") is the regime `real`, TSTR is `synthetic` (the classification accuracy score of
Ravuri and Vinyals 2019), TRTS is `real-on-synthetic`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.protocol import LEAST_GROUPS
from dnnlib.cli import UserError
from dnnlib.text import plural, suggestion
from metrics.intervals import group_numbers
from torch_utils.seeding import seed_for

REAL, SYNTHETIC, BOTH, REAL_ON_SYNTHETIC = "real", "synthetic", "real+synthetic", "real-on-synthetic"
REGIMES = (REAL, SYNTHETIC, BOTH, REAL_ON_SYNTHETIC)
BALANCE = "balance"


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The training images of a classifier.

    name:      unique in a study, also in names of files: "real", "real-0.1", "real+synthetic-0.5", ...
    regime:    one of REGIMES but REAL_ON_SYNTHETIC, which tests the classifiers of REAL and trains none
    fraction:  share of the real images in use, chosen by group
    dose:      number of synthetic images as a share of the real ones in use; None = all, or as `fill` needs
    fill:      BALANCE = so many that all labels have equally many images; None
    baseline:  name of the condition to compare with; None for a baseline
    """

    name: str
    regime: str
    fraction: float = 1.0
    dose: float | None = None
    fill: str | None = None
    baseline: str | None = None

    @property
    def uses_real(self) -> bool:
        return self.regime != SYNTHETIC

    @property
    def uses_synthetic(self) -> bool:
        return self.regime != REAL


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRows:
    """The images of a condition, for one seed; ascending rows of the training part and of the synthetic set."""

    real: np.ndarray  # int64 [N]
    synthetic: np.ndarray  # int64 [M]

    def is_equal(self, other: "TrainingRows") -> bool:
        """Return whether the images are the same."""
        return np.array_equal(self.real, other.real) and np.array_equal(self.synthetic, other.synthetic)

    def count_labels(self, real_labels: np.ndarray, synthetic_labels: np.ndarray | None,
                     num_labels: int) -> tuple[list[int], list[int]]:
        """Return the numbers of real and of synthetic images of each label."""
        synthetic = [] if synthetic_labels is None else synthetic_labels[self.synthetic]
        return (np.bincount(real_labels[self.real], minlength=num_labels).tolist(),
                np.bincount(np.asarray(synthetic, dtype=np.int64), minlength=num_labels).tolist())


def parse_regimes(text: str) -> tuple[str, ...]:
    """Return the regimes of a list, in the order of REGIMES. Raises UserError."""
    found = [name.strip() for name in text.split(",")]
    for name in found:
        if name not in REGIMES:
            raise UserError(f"--regimes has {name!r}{suggestion(name, REGIMES)}; expected some of "
                            f"{', '.join(REGIMES)}, separated by commas")
    return tuple(name for name in REGIMES if name in found)


def parse_shares(text: str, flag: str, *, most: float | None = None) -> tuple[float, ...]:
    """Return different numbers above 0, and up to `most`, in ascending order: with six digits, as names have them.

    Raises UserError.
    """
    bound = "" if most is None else f" and at most {most:g}"
    example = "0.1,1" if most == 1 else "0.5,1"
    found = []
    for part in text.split(","):
        try:
            number = float(f"{float(part):g}")
        except ValueError:
            number = float("nan")
        if not (0 < number < float("inf")) or (most is not None and number > most):
            raise UserError(f"{flag} has {part.strip() or 'an empty number'}; expected numbers above 0{bound}, "
                            f"separated by commas, such as {flag}={example}")
        found.append(number)
    return tuple(sorted(set(found)))


def plan_conditions(regimes: Sequence[str], *, fractions: Sequence[float] = (1.0,), doses: Sequence[float] = (),
                    fill: str | None = None) -> tuple[Condition, ...]:
    """Return the conditions of a study, those with real images alone first.

    regimes:    some of REGIMES
    fractions:  of the real images
    doses:      of BOTH; empty = a dose of 1, unless `fill` is given
    fill:       BALANCE adds conditions of BOTH that make labels equal; None

    Each condition has the one with the same real images alone as its baseline; SYNTHETIC that with the most.
    """
    has_real = REAL in regimes or REAL_ON_SYNTHETIC in regimes  # the latter needs their classifiers
    names = {fraction: REAL if fraction == 1 else f"{REAL}-{fraction:g}" for fraction in sorted(fractions)}
    found = [Condition(name=name, regime=REAL, fraction=fraction)
             for fraction, name in names.items()] if has_real else []
    if SYNTHETIC in regimes:
        found.append(Condition(name=SYNTHETIC, regime=SYNTHETIC,
                               baseline=names[max(names)] if has_real else None))
    if BOTH in regimes:
        for fraction, name in names.items():
            shared = {"regime": BOTH, "fraction": fraction, "baseline": name if has_real else None}
            found += [Condition(name=f"{name}+synthetic-{dose:g}", dose=dose, **shared)
                      for dose in (doses or (() if fill else (1.0,)))]
            if fill:
                found.append(Condition(name=f"{name}+synthetic-{fill}", fill=fill, **shared))
    return tuple(found)


def choose_rows(condition: Condition, real_labels: np.ndarray, real_groups: np.ndarray,
                synthetic_labels: np.ndarray | None, labels: Sequence[str], seed: int) -> TrainingRows:
    """Return the training images of a condition.

    real_labels, real_groups:  int64 [N] of the training part
    synthetic_labels:          int64 [M] of the synthetic set; None without one
    labels:                    names of the labels
    seed:                      decides which images are used, where not all are

    Of one seed, a smaller fraction or dose is a part of a larger one. Raises UserError if there are too few images.
    """
    none = np.zeros(0, dtype=np.int64)
    real = none if not condition.uses_real else choose_groups(
        real_labels, real_groups, condition.fraction, labels, seed)
    if not condition.uses_synthetic:
        return TrainingRows(real=real, synthetic=none)
    order = np.random.RandomState(seed_for(seed, 0, 0, "synthetic") % 2**32).permutation(len(synthetic_labels))
    if condition.fill == BALANCE:
        synthetic = _fill_up(order, real_labels[real], synthetic_labels, labels)
    elif condition.dose is None:
        synthetic = order
    else:
        count = round(condition.dose * len(real))
        if not 0 < count <= len(order):
            what = (f"needs {plural(count, 'synthetic image')}; the set has {len(order)}: make more with generate.py "
                    "--count, or lower it" if count else "takes no synthetic image; expected a larger one")
            raise UserError(f"--dose={condition.dose:g} of {plural(len(real), 'real image')} {what}")
        synthetic = order[:count]
    return TrainingRows(real=real, synthetic=np.sort(synthetic))


def choose_groups(labels: np.ndarray, groups: np.ndarray, fraction: float, names: Sequence[str],
                  seed: int) -> np.ndarray:
    """Return the rows of a random part of the groups, with about this fraction of the images of each label: int64.

    labels, groups:  int64 [N]; a group with several labels counts for its rarest one
    names:           of the labels

    Raises UserError if a label would have fewer than two groups.
    """
    if fraction == 1:
        return np.arange(len(labels))
    numbers = group_numbers(groups, len(labels))
    sizes = np.bincount(numbers)
    rarity = np.argsort(np.argsort(-np.bincount(labels, minlength=len(names)), kind="stable"))  # the rarest is last
    stratum = np.zeros(len(sizes), dtype=np.int64)
    np.maximum.at(stratum, numbers, rarity[labels])
    order = np.random.RandomState(seed_for(seed, 0, 0, "fraction") % 2**32).permutation(len(sizes))
    chosen = np.zeros(len(sizes), dtype=bool)
    for place in np.unique(stratum):
        mine = order[stratum[order] == place]
        ends = np.cumsum(sizes[mine])
        # The number of whole groups that comes nearest to the fraction of the images.
        chosen[mine[:np.argmin(np.abs(np.concatenate([[0], ends]) - fraction * ends[-1]))]] = True
    rows = np.flatnonzero(chosen[numbers])
    for label, name in enumerate(names):
        count = len(np.unique(numbers[rows][labels[rows] == label]))
        if count < LEAST_GROUPS:
            raise UserError(f"--fraction={fraction:g} leaves {plural(count, 'group')} (patients or lesions) of {name}; "
                            f"expected at least {LEAST_GROUPS}: use a larger fraction")
    return rows


def _fill_up(order: np.ndarray, real_labels: np.ndarray, synthetic_labels: np.ndarray,
             labels: Sequence[str]) -> np.ndarray:
    """Return so many rows of each label that real and synthetic images together are equal in number."""
    counts = np.bincount(real_labels, minlength=len(labels))
    found = []
    for label, needed in enumerate(counts.max() - counts):
        mine = order[synthetic_labels[order] == label]
        if len(mine) < needed:
            raise UserError(f"--fill={BALANCE} needs {plural(int(needed), 'synthetic image')} of {labels[label]}; the "
                            f"set has {len(mine)}: make more with generate.py --classes")
        found.append(mine[:needed])
    return np.concatenate(found)
