"""What a study of classifiers gave: their predictions, and the scores of each part and of its subgroups.

S seeds, N images, L labels. A condition whose classifier does not depend on the seed has S = 1, else all have the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.classification_scores import (
    RANKING,
    RESAMPLES,
    ConditionPredictions,
    PartScores,
    Thresholds,
    confusion,
    predicted_labels,
    score_part,
)
from analysis.protocol import SYNTHETIC
from analysis.regimes import Condition
from metrics.intervals import DEFAULT_LEVEL, TooFew, group_numbers

UNKNOWN = "unknown"  # images without a value of an attribute
_MOST_VALUES = 12  # of an attribute; the others are only named
_MOST_NUMBERS = 10  # different numbers that count as categories


@dataclass(frozen=True, kw_only=True)
class TrainedCondition:
    """A condition, and how many images of each label its classifiers were trained on, by seed."""

    condition: Condition
    num_real: Sequence[Mapping[str, int]]  # S, or one for all seeds; by name of the label
    num_synthetic: Sequence[Mapping[str, int]]

    @property
    def name(self) -> str:
        return self.condition.name


@dataclass(frozen=True, kw_only=True)
class PartPredictions:
    """Images of a part, and what the classifiers of conditions say about them."""

    name: str  # train, val, test, the file name of an external set, or "synthetic"
    role: str  # val, test, external or synthetic
    images: Sequence[str]  # names, N
    groups: Sequence[str]  # N
    labels: np.ndarray  # int64 [N]
    probabilities: Mapping[str, np.ndarray]  # by condition, float64 [S, N, L]; not all conditions need have one
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by column, values of the images, or ""


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """All that a report is written from."""

    protocol: Mapping[str, Any]  # a summary, of plain JSON values
    settings: Mapping[str, Any]  # ... of how classifiers were trained
    labels: tuple[str, ...]  # names; the negative one first of two
    seeds: tuple[int, ...]
    conditions: tuple[TrainedCondition, ...]
    thresholds: Mapping[str, Sequence[Thresholds]]  # by condition, S
    validation: PartPredictions
    parts: tuple[PartPredictions, ...]  # that are scored, in order of importance
    notes: tuple[str, ...] = ()  # sentences that belong to each result, such as why synthetic images are not verified
    is_verified: bool = True  # the synthetic images; true without any
    level: float = DEFAULT_LEVEL
    resamples: int = RESAMPLES

    def __post_init__(self):
        for name, of_seeds in self.thresholds.items():
            if len(of_seeds) not in (1, len(self.seeds)):
                raise ValueError(f"{name} has thresholds of {len(of_seeds)} classifiers; expected 1 or "
                                 f"{len(self.seeds)}")

    def seeds_of(self, condition: str) -> tuple[int, ...]:
        """Return the seeds of the classifiers of a condition: the first one where they do not depend on it."""
        return self.seeds[:len(self.thresholds[condition])]


@dataclass(frozen=True, kw_only=True)
class Subgroup:
    """The images with a value of an attribute."""

    column: str
    value: str
    images_by_label: Mapping[str, int]
    groups_by_label: Mapping[str, int]
    scores: PartScores | None  # of RANKING
    reason: str | None = None  # why there are no scores


@dataclass(frozen=True, kw_only=True)
class ScoredPart:
    """The scores of a part, and of its subgroups."""

    part: PartPredictions
    images_by_label: Mapping[str, int]
    groups_by_label: Mapping[str, int]  # with at least one image of the label
    num_groups: int
    scores: PartScores | None
    reason: str | None  # why there are no scores
    confusion: Mapping[str, np.ndarray]  # by condition, float64 [S, L, L], labels in rows
    subgroups: tuple[Subgroup, ...]
    left_out: Mapping[str, Sequence[str]]  # by column, values that are too many to score


def score_study(results: StudyResults, beat: Callable[[], None] = lambda: None) -> list[ScoredPart]:
    """Return the scores of each part, with paired differences between each condition and its baseline.

    beat:  called now and then, for scores that take long

    Synthetic images as a part have no differences: they say nothing about real images.
    """
    return [_score(results, part, beat) for part in results.parts]


def _score(results: StudyResults, part: PartPredictions, beat: Callable[[], None]) -> ScoredPart:
    groups = group_numbers(part.groups, len(part.images))
    predictions = {name: ConditionPredictions(labels=part.labels, groups=groups, thresholds=results.thresholds[name],
                                              probabilities=probabilities)
                   for name, probabilities in part.probabilities.items()}
    pairs = [(each.name, each.condition.baseline) for each in results.conditions if part.role != SYNTHETIC
             and {each.name, each.condition.baseline} <= predictions.keys()]
    scores, reason, subgroups = None, None, []
    left_out: dict[str, Sequence[str]] = {}
    try:
        scores = score_part(predictions, pairs, level=results.level, resamples=results.resamples,
                            label_names=results.labels, beat=beat)
    except TooFew as error:
        reason = str(error)
    for column, values in part.attributes.items():
        rows_of_values, left_out[column] = split_by_value(values)
        subgroups += [_subgroup(results, predictions, column, value, rows, beat)
                      for value, rows in rows_of_values.items()]
    return ScoredPart(
        part=part, **_counts(results.labels, part.labels, groups), num_groups=len(np.unique(groups)), scores=scores,
        reason=reason, subgroups=tuple(subgroups), left_out={name: rest for name, rest in left_out.items() if rest},
        confusion={name: np.concatenate([
            confusion(part.labels, predicted_labels(probabilities, thresholds), len(results.labels))
            for probabilities, thresholds in zip(each.probabilities, each.thresholds, strict=True)])
            for name, each in predictions.items()})


def _subgroup(results: StudyResults, predictions: Mapping[str, ConditionPredictions], column: str, value: str,
              rows: np.ndarray, beat: Callable[[], None]) -> Subgroup:
    first = next(iter(predictions.values()))
    scores, reason = None, None
    try:
        scores = score_part(predictions, [], level=results.level, resamples=results.resamples, rows=rows,
                            metrics=RANKING, label_names=results.labels, beat=beat)
    except TooFew as error:
        reason = str(error)
    return Subgroup(column=column, value=value, scores=scores, reason=reason,
                    **_counts(results.labels, first.labels[rows], first.groups[rows]))


def _counts(names: Sequence[str], labels: np.ndarray, groups: np.ndarray) -> dict[str, dict[str, int]]:
    return {"images_by_label": {name: int((labels == label).sum()) for label, name in enumerate(names)},
            "groups_by_label": {name: len(np.unique(groups[labels == label])) for label, name in enumerate(names)}}


def split_by_value(values: Sequence[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the rows of images (int64) by value of an attribute, and values that are left out.

    More than 10 different numbers are cut at their quartiles; of other values the 12 with the most images are used.
    Images without a value are "unknown".
    """
    given = np.array([value != "" for value in values])
    numbers = np.array([_number(value) for value in values])
    if np.isfinite(numbers[given]).all() and len(np.unique(numbers[given])) > _MOST_NUMBERS:
        found = _quarters(numbers, given)
        rest: list[str] = []
    else:
        known: dict[str, list[int]] = {}
        for row, value in enumerate(values):
            if value != "":
                known.setdefault(value, []).append(row)
        ordered = sorted(known, key=lambda value: (-len(known[value]), value))
        found = {value: np.array(known[value]) for value in ordered[:_MOST_VALUES]}
        rest = ordered[_MOST_VALUES:]
    if not given.all():
        # A value that is itself "unknown" means the same.
        missing = np.flatnonzero(~given)
        found[UNKNOWN] = np.sort(np.concatenate([found.get(UNKNOWN, missing[:0]), missing]))
    return found, rest


def _quarters(numbers: np.ndarray, given: np.ndarray) -> dict[str, np.ndarray]:
    """Return rows by "LOW to HIGH", the smallest and the largest number of a quarter of the images.

    Equal numbers stay together: where many are, there are fewer parts of other sizes.
    """
    edges = np.unique(np.quantile(numbers[given], [0.25, 0.5, 0.75]))
    quarters = np.searchsorted(edges, numbers)
    found = {}
    for quarter in range(len(edges) + 1):
        rows = np.flatnonzero(given & (quarters == quarter))
        if len(rows):
            low, high = numbers[rows].min(), numbers[rows].max()
            found[f"{low:.10g}" if low == high else f"{low:.10g} to {high:.10g}"] = rows
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
