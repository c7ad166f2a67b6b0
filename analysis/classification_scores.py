"""How well classifiers do: metrics with intervals over groups of images, and paired differences of classifiers.

N images, L labels (the negative one first where L = 2, so that column 1 is of the positive one), R resamples, S seeds.
Metrics are functions of labels int64 [N], probabilities float64 [N, L] and weights float64 [R, N], how often each image
counts in each resample, and return float64 [R]. No weights stand for all images once: float64 [1].

Thresholds are chosen on validation images only. One-against-rest metrics of more than two labels are means over labels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from metrics.intervals import DEFAULT_LEVEL, GroupBootstrap, Interval, check_level, holm

ECE_BINS = 15
SPECIFICITIES = (0.90, 0.95)  # at which sensitivity is given
RESAMPLES = 2000
RANKING = ("auc", "average_precision")  # metrics that need no threshold
# By metric: its title in tables, and a sentence on what it is.
METRICS = {
    "auc": ("AUC", "Area under the ROC curve: the chance that a positive image gets a higher probability than a "
                   "negative one, ties counting half; of more than two labels, the mean over each against the rest."),
    "average_precision": ("AP", "Average precision: the mean of the precision at each positive image's probability, "
                                "without interpolation; of more than two labels, the mean over each against the rest."),
    "balanced_accuracy": ("balanced accuracy", "Mean over labels of the share of their images that is recognized; two "
                                               "labels: at the threshold that maximizes it on the validation images, "
                                               "more: of the most probable label."),
    "f1": ("F1", "Harmonic mean of precision and sensitivity of the positive label, at the threshold of the balanced "
                 "accuracy; of more than two labels, the mean over labels, of the most probable label."),
    "sensitivity_at_90": ("sens@90", "Sensitivity at the smallest threshold whose specificity is at least 90 % on the "
                                     "validation images; of more than two labels, the mean over each against the "
                                     "rest."),
    "specificity_at_90": ("spec@90", "Specificity that is reached at the threshold of sensitivity_at_90."),
    "sensitivity_at_95": ("sens@95", "The same as sensitivity_at_90, for 95 %."),
    "specificity_at_95": ("spec@95", "Specificity that is reached at the threshold of sensitivity_at_95."),
    "brier": ("Brier", "Brier score: mean squared difference of the probability of the positive label and 0 or 1; of "
                       "more than two labels, summed over labels. Lower is better."),
    "ece": ("ECE", f"Expected calibration error: mean difference of probability and share of positives in {ECE_BINS} "
                   "bins of equal width, weighted by images; of more than two labels, of the most probable label. Few "
                   "images show an error even of a perfectly calibrated classifier, and resamples a larger one: their "
                   "mean is moved to the value, and the interval is about the error that as many other images would "
                   "show. Lower is better."),
}


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Probabilities from which on a label is predicted, chosen on validation images.

    balanced:  of the positive label, for balanced accuracy and F1; None with more than two labels
    at_90:     by label against the rest, for a specificity of 90 %; one number where L = 2
    at_95:     ... of 95 %
    """

    balanced: float | None
    at_90: tuple[float, ...]
    at_95: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ConditionPredictions:
    """What the classifiers of a condition, one for each seed, predict for the images of a part."""

    labels: np.ndarray  # int64 [N]
    groups: np.ndarray  # int64 [N]
    probabilities: np.ndarray  # float64 [S, N, L]
    thresholds: Sequence[Thresholds]  # S


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric of a condition on a part."""

    values: tuple[float, ...]  # by seed
    sd: float | None  # standard deviation of the values; None for one seed
    interval: Interval  # of their mean


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The mean of a metric over the seeds of one condition minus that of another."""

    metric: str
    first: str
    second: str
    values: tuple[float, ...]  # by seed; where one condition has one classifier, it is compared with each of the other
    sd: float | None  # standard deviation of the values; None for one
    interval: Interval
    p_value: float
    p_holm: float  # adjusted for the pairs of this metric on this part
    num_tests: int  # their number


@dataclass(frozen=True, kw_only=True)
class PartScores:
    """All scores of a part."""

    num_images: int
    num_groups: int
    scores: Mapping[str, Mapping[str, Score]]  # by condition and metric
    differences: tuple[PairedDifference, ...]


def choose_thresholds(labels: np.ndarray, probabilities: np.ndarray) -> Thresholds:
    """Return the thresholds that validation images suggest; of equally good ones the smallest, which finds more.

    labels:         int64 [N], with images of each label
    probabilities:  float64 [N, L]
    """
    from sklearn.metrics import roc_curve  # here: importing it takes a second

    at = {specificity: [] for specificity in SPECIFICITIES}
    balanced = None
    for label in scored_labels(probabilities.shape[1]):
        scores = probabilities[:, label]
        false, true, thresholds = roc_curve(labels == label, scores, drop_intermediate=False)
        thresholds[0] = np.nextafter(scores.max(), np.inf)  # at which nothing is positive; infinity in scikit-learn
        for specificity, found in at.items():
            found.append(float(thresholds[false <= 1 - specificity + 1e-12].min()))
        if probabilities.shape[1] == 2:
            gain = true - false
            balanced = float(thresholds[gain >= gain.max() - 1e-12].min())
    return Thresholds(balanced=balanced, at_90=tuple(at[0.90]), at_95=tuple(at[0.95]))


def scored_labels(num_labels: int) -> Sequence[int]:
    """Return the labels that are scored against the rest: the positive one of two, or each of several."""
    return (1,) if num_labels == 2 else range(num_labels)


def predicted_labels(probabilities: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    """Return int64 [N]: two labels by the threshold of the balanced accuracy, more by the highest probability."""
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= thresholds.balanced).astype(np.int64)
    return probabilities.argmax(axis=1)


def ranking_scores(is_positive: np.ndarray, scores: np.ndarray,
                   weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the area under the ROC curve and the average precision, of one label against the rest.

    is_positive:  bool [N]
    scores:       float64 [N]

    With w the weights and sums over positive i: AUC = sum w_i (weight of the negatives below i + half of those equal)
    / (weight of positives * of negatives), and AP = sum w_i (weight of positives / weight of all, from i up) / (weight
    of positives). NaN where the weight of a side is 0.
    """
    weights = _or_ones(weights, len(scores))
    by_image = weights.T  # [N, R]: sums along images add whole rows
    order = np.argsort(scores, kind="stable")
    positives, negatives = order[is_positive[order]], order[~is_positive[order]]
    below, of_positives = _cumulated(by_image, negatives), by_image[positives]
    first = np.searchsorted(scores[negatives], scores[positives], "left")
    last = np.searchsorted(scores[negatives], scores[positives], "right")
    found = np.zeros((len(positives) + 1, by_image.shape[1]))
    np.cumsum(of_positives, axis=0, out=found[1:])
    # From the first positive of an equal score up.
    found = (found[-1] - found)[np.searchsorted(scores[positives], scores[positives], "left")]
    lower = below[first]
    alarms = below[-1] - lower
    total, num_negative = of_positives.sum(axis=0), below[-1]
    won = np.einsum("ir,ir->r", lower + below[last], of_positives) / 2
    precision = np.divide(found, found + alarms, out=np.zeros_like(found), where=found > 0)
    with np.errstate(invalid="ignore"):
        return won / (total * num_negative), np.einsum("ir,ir->r", precision, of_positives) / total


def confusion(labels: np.ndarray, predicted: np.ndarray, num_labels: int,
              weights: np.ndarray | None = None) -> np.ndarray:
    """Return float64 [R, L, L]: the weight of the images of each label (rows) that get each label (columns)."""
    cells = np.eye(num_labels**2)[labels * num_labels + predicted]  # [N, L * L]
    return (_or_ones(weights, len(labels)) @ cells).reshape(-1, num_labels, num_labels)


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    """Return the mean share of recognized images over labels, from confusion [R, L, L]."""
    with np.errstate(invalid="ignore"):
        return (np.diagonal(counts, axis1=1, axis2=2) / counts.sum(axis=2)).mean(axis=1)


def f1(counts: np.ndarray) -> np.ndarray:
    """Return 2 TP / (2 TP + FP + FN) from confusion [R, L, L]: of label 1 of two, or the mean over labels."""
    true = np.diagonal(counts, axis1=1, axis2=2)
    both = counts.sum(axis=1) + counts.sum(axis=2)
    of_labels = np.divide(2 * true, both, out=np.zeros_like(both), where=both > 0)
    return of_labels[:, list(scored_labels(counts.shape[1]))].mean(axis=1)


def sensitivity_and_specificity(labels: np.ndarray, probabilities: np.ndarray, thresholds: Sequence[float],
                                weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return both at given thresholds: of the positive label of two, or the means over labels.

    thresholds:  one for each of `scored_labels`
    """
    weights = _or_ones(weights, len(labels))
    shares = []
    for label, threshold in zip(scored_labels(probabilities.shape[1]), thresholds, strict=True):
        is_label, is_found = labels == label, probabilities[:, label] >= threshold
        columns = np.stack([is_label & is_found, is_label, ~is_label & ~is_found, ~is_label], axis=1)
        hits, positives, passes, negatives = (weights @ columns.astype(np.float64)).T
        with np.errstate(invalid="ignore"):
            shares.append((hits / positives, passes / negatives))
    sensitivity, specificity = np.mean(shares, axis=0)
    return sensitivity, specificity


def brier(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the mean of (p - y)^2 of the positive label of two, or summed over labels (Brier 1950)."""
    columns = list(scored_labels(probabilities.shape[1]))
    errors = np.square(probabilities - np.eye(probabilities.shape[1])[labels])[:, columns].sum(axis=1)
    weights = _or_ones(weights, len(labels))
    return weights @ errors / weights.sum(axis=1)


def calibration_sides(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what is compared by calibration: probabilities float64 [N], and whether it came true, bool [N].

    Of two labels, of the positive one; of more, of the most probable one.
    """
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], labels == 1
    return probabilities.max(axis=1), labels == probabilities.argmax(axis=1)


def calibration_bins(stated: np.ndarray) -> np.ndarray:
    """Return the bin of each probability, int64 [N]: without lower ends, as of scikit-learn's calibration_curve."""
    return np.searchsorted(np.linspace(0, 1, ECE_BINS + 1)[1:-1], stated)


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the expected calibration error: sum over bins of |sum of w (p - y)| / sum of w (Naeini et al. 2015)."""
    stated, is_true = calibration_sides(labels, probabilities)
    gaps = np.eye(ECE_BINS)[calibration_bins(stated)] * (stated - is_true)[:, None]
    weights = _or_ones(weights, len(labels))
    return np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1)


def score(labels: np.ndarray, probabilities: np.ndarray, thresholds: Thresholds, weights: np.ndarray | None = None, *,
          metrics: Sequence[str] = tuple(METRICS)) -> dict[str, np.ndarray]:
    """Return float64 [R] by metric; see the module."""
    num_labels = probabilities.shape[1]
    pairs = [ranking_scores(labels == label, probabilities[:, label], weights) for label in scored_labels(num_labels)]
    found = dict(zip(RANKING, np.mean(pairs, axis=0)))
    if not set(metrics) <= set(RANKING):
        counts = confusion(labels, predicted_labels(probabilities, thresholds), num_labels, weights)
        found |= {"balanced_accuracy": balanced_accuracy(counts), "f1": f1(counts)}
        for name, chosen in (("90", thresholds.at_90), ("95", thresholds.at_95)):
            found[f"sensitivity_at_{name}"], found[f"specificity_at_{name}"] = sensitivity_and_specificity(
                labels, probabilities, chosen, weights)
        found |= {"brier": brier(labels, probabilities, weights),
                  "ece": calibration_error(labels, probabilities, weights)}
    return {metric: found[metric] for metric in metrics}


def score_part(conditions: Mapping[str, ConditionPredictions], pairs: Sequence[tuple[str, str]], *,
               level: float = DEFAULT_LEVEL, resamples: int = RESAMPLES, seed: int = 0, rows: np.ndarray | None = None,
               metrics: Sequence[str] = tuple(METRICS), label_names: Sequence[str] | None = None,
               beat: Callable[[], None] = lambda: None) -> PartScores:
    """Return the scores of conditions on the same images, and the differences of pairs of conditions.

    conditions:   by name; equal labels and groups. The number of seeds may differ: a condition whose classifiers do
                  not depend on the seed has one
    pairs:        of names, (first, second)
    rows:         int64, the images to use, such as those of a subgroup; None = all
    metrics:      some of METRICS; those in RANKING alone take less time
    label_names:  for messages; None = numbers
    beat:         called now and then: 10,000 images of eight labels take five seconds for each classifier

    A resample draws groups with replacement, and all classifiers are scored on it: an interval of a mean is of the mean
    over seeds in each resample, and one of a difference is of the difference of these means. So both hold the trained
    networks fixed. p-values are adjusted by Holm's correction for the pairs of the same metric.

    Raises TooFew if there are fewer than two groups with images of a label, and ValueError if conditions do not fit.
    """
    check_level(level)
    _check(conditions)
    conditions = {name: _select(condition, rows) for name, condition in conditions.items()}
    first = next(iter(conditions.values()))
    names = label_names or [f"label {label}" for label in range(first.probabilities.shape[2])]
    # Scores of each condition break ties of groups that are alike in what stands before.
    keys = [*(first.labels == label for label in range(1, len(names))),
            *(condition.probabilities[..., 1:].sum(axis=(0, 2)) for condition in conditions.values())]
    bootstrap = GroupBootstrap(first.groups, len(first.labels), keys=keys, resamples=resamples, seed=seed, required={
        f"images of {name}": first.labels == label for label, name in enumerate(names)})
    values = {name: _by_seed(condition, None, metrics)[:, :, 0] for name, condition in conditions.items()}  # [M, S]
    blocks = {name: [] for name in conditions}  # of [M, R]
    for weights in bootstrap.weights():
        for name, condition in conditions.items():
            blocks[name].append(_by_seed(condition, weights, metrics).mean(axis=1))
            beat()
    resampled = {name: np.concatenate(found, axis=1) for name, found in blocks.items()}
    if "ece" in metrics:
        index = list(metrics).index("ece")
        for name, found in resampled.items():
            found[index] += values[name][index].mean() - found[index].mean()
    return PartScores(
        num_images=len(first.labels), num_groups=bootstrap.num_groups,
        scores={name: {metric: _score(bootstrap, values[name][index], resampled[name][index], level)
                       for index, metric in enumerate(metrics)} for name in conditions},
        differences=tuple(_differences(bootstrap, values, resampled, pairs, metrics, level)))


def _spread(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _score(bootstrap: GroupBootstrap, values: np.ndarray, resampled: np.ndarray, level: float) -> Score:
    # All metrics are at least 0; ECE may be moved below.
    interval = bootstrap.interval(values.mean(), np.maximum(resampled, 0), level)
    return Score(values=tuple(map(float, values)), sd=_spread(values), interval=interval)


def _differences(bootstrap: GroupBootstrap, values: Mapping[str, np.ndarray], resampled: Mapping[str, np.ndarray],
                 pairs: Sequence[tuple[str, str]], metrics: Sequence[str], level: float) -> Iterator[PairedDifference]:
    tests = []
    for index, metric in enumerate(metrics):
        for first, second in pairs:
            apart = resampled[first][index] - resampled[second][index]
            by_seed = values[first][index] - values[second][index]
            tests.append((metric, first, second, by_seed, bootstrap.interval(by_seed.mean(), apart, level),
                          bootstrap.p_value(apart)))
    for _, family in groupby(tests, key=lambda test: test[0]):
        of_metric = list(family)
        adjusted = holm([p_value for *_, p_value in of_metric])
        for (metric, first, second, by_seed, interval, p_value), p_holm in zip(of_metric, adjusted, strict=True):
            yield PairedDifference(metric=metric, first=first, second=second, values=tuple(map(float, by_seed)),
                                   sd=_spread(by_seed), interval=interval, p_value=p_value, p_holm=p_holm,
                                   num_tests=len(of_metric))


def _by_seed(condition: ConditionPredictions, weights: np.ndarray | None, metrics: Sequence[str]) -> np.ndarray:
    """Return float64 [metrics, S, R]."""
    by_seed = [score(condition.labels, probabilities, thresholds, weights, metrics=metrics)
               for probabilities, thresholds in zip(condition.probabilities, condition.thresholds, strict=True)]
    return np.array([[found[metric] for found in by_seed] for metric in metrics])


def _check(conditions: Mapping[str, ConditionPredictions]) -> None:
    first = next(iter(conditions.values()))
    for name, condition in conditions.items():
        if not (np.array_equal(condition.labels, first.labels) and np.array_equal(condition.groups, first.groups)):
            raise ValueError(f"the images of {name} are not those of {next(iter(conditions))}; expected the same part")
        if condition.probabilities.shape[1:] != first.probabilities.shape[1:] or len(condition.probabilities) == 0:
            raise ValueError(f"the probabilities of {name} are of shape {condition.probabilities.shape}; expected "
                             f"(seeds, {', '.join(map(str, first.probabilities.shape[1:]))})")
        if not np.isfinite(condition.probabilities).all():
            raise ValueError(f"probabilities of {name} are not finite")


def _select(condition: ConditionPredictions, rows: np.ndarray | None) -> ConditionPredictions:
    if rows is None:
        return condition
    return ConditionPredictions(labels=condition.labels[rows], groups=condition.groups[rows],
                                probabilities=condition.probabilities[:, rows], thresholds=condition.thresholds)


def _cumulated(by_image: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return [len(chosen) + 1, R]: sums of the first 0, 1, ... of the chosen rows."""
    sums = np.zeros((len(chosen) + 1, by_image.shape[1]))
    np.cumsum(by_image[chosen], axis=0, out=sums[1:])
    return sums


def _or_ones(weights: np.ndarray | None, count: int) -> np.ndarray:
    return np.ones((1, count)) if weights is None else weights
