"""analysis.classification_scores: against scikit-learn with weights and ties, closed forms, resamples and pairs."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from sklearn.calibration import calibration_curve

from analysis.classification_scores import (
    ECE_BINS,
    METRICS,
    RANKING,
    ConditionPredictions,
    Thresholds,
    balanced_accuracy,
    brier,
    calibration_error,
    choose_thresholds,
    confusion,
    f1,
    predicted_labels,
    ranking_scores,
    score,
    score_part,
    sensitivity_and_specificity,
)
from metrics.intervals import TooFew, holm


def binary(scores):
    scores = np.asarray(scores, dtype=np.float64)
    return np.stack([1 - scores, scores], axis=1)


def made(count=200, num_labels=2, seed=0, ties=True):
    """Return labels, probabilities with or without ties, and weights from 0 to 3 of four resamples."""
    random = np.random.RandomState(seed)
    labels = random.randint(num_labels, size=count)
    logits = random.randn(count, num_labels) + np.eye(num_labels)[labels]
    if ties:
        logits = np.round(logits)
    odds = np.exp(logits)
    return labels, odds / odds.sum(axis=1, keepdims=True), random.randint(4, size=(4, count)).astype(np.float64)


def condition(labels, groups, *probabilities, thresholds=None):
    thresholds = thresholds or Thresholds(balanced=0.5, at_90=(0.6,), at_95=(0.7,))
    return ConditionPredictions(labels=labels, groups=groups, probabilities=np.stack(probabilities),
                                thresholds=[thresholds] * len(probabilities))


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_scores_equal_those_of_scikit_learn(ties):
    labels, probabilities, weights = made(ties=ties)
    scores = probabilities[:, 1]
    areas, precisions = ranking_scores(labels == 1, scores, weights)
    for index, weight in enumerate(weights):
        assert areas[index] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores, sample_weight=weight))
        assert precisions[index] == pytest.approx(
            sklearn.metrics.average_precision_score(labels, scores, sample_weight=weight))
    (area,), (precision,) = ranking_scores(labels == 1, scores)
    assert area == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))
    assert precision == pytest.approx(sklearn.metrics.average_precision_score(labels, scores))


def test_weights_equal_repeated_images():
    labels, probabilities, weights = made(60)
    thresholds = choose_thresholds(labels, probabilities)
    found = score(labels, probabilities, thresholds, weights)
    repeated = np.repeat(np.arange(60), weights[0].astype(int))
    expected = score(labels[repeated], probabilities[repeated], thresholds)
    assert {name: values[0] for name, values in found.items()} == pytest.approx(
        {name: values[0] for name, values in expected.items()}, rel=1e-12)
    assert found.keys() == METRICS.keys()


@pytest.mark.parametrize("num_labels", [2, 4])
def test_scores_at_thresholds_equal_those_of_scikit_learn(num_labels):
    labels, probabilities, weights = made(num_labels=num_labels, seed=1)
    predicted = predicted_labels(probabilities, Thresholds(balanced=0.4, at_90=(), at_95=()))
    counts = confusion(labels, predicted, num_labels, weights)
    for index, weight in enumerate(weights):
        one = {"sample_weight": weight}
        assert counts[index] == pytest.approx(sklearn.metrics.confusion_matrix(labels, predicted, **one))
        assert balanced_accuracy(counts)[index] == pytest.approx(
            sklearn.metrics.balanced_accuracy_score(labels, predicted, **one))
        assert f1(counts)[index] == pytest.approx(sklearn.metrics.f1_score(
            labels, predicted, average="binary" if num_labels == 2 else "macro", **one))
        squared = np.square(probabilities - np.eye(num_labels)[labels]).sum(axis=1) / (2 if num_labels == 2 else 1)
        assert brier(labels, probabilities, weights)[index] == pytest.approx(np.average(squared, weights=weight))
    if num_labels == 2:
        assert brier(labels, probabilities)[0] == pytest.approx(
            sklearn.metrics.brier_score_loss(labels, probabilities[:, 1]))


def test_macro_scores_equal_those_of_scikit_learn():
    labels, probabilities, weights = made(num_labels=4, seed=2, ties=False)
    thresholds = choose_thresholds(labels, probabilities)
    found = score(labels, probabilities, thresholds, weights)
    assert found["auc"][0] == pytest.approx(np.mean([sklearn.metrics.roc_auc_score(
        labels == label, probabilities[:, label], sample_weight=weights[0]) for label in range(4)]))
    assert score(labels, probabilities, thresholds)["auc"][0] == pytest.approx(
        sklearn.metrics.roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert found["average_precision"][0] == pytest.approx(sklearn.metrics.average_precision_score(
        np.eye(4)[labels], probabilities, average="macro", sample_weight=weights[0]))
    assert found["sensitivity_at_90"][0] == pytest.approx(np.mean([sklearn.metrics.recall_score(
        labels == label, probabilities[:, label] >= thresholds.at_90[label], sample_weight=weights[0])
        for label in range(4)]))


def test_sensitivity_and_specificity_equal_those_of_scikit_learn():
    labels, probabilities, weights = made()
    sensitivity, specificity = sensitivity_and_specificity(labels, probabilities, (0.6,), weights)
    found = probabilities[:, 1] >= 0.6
    assert sensitivity[1] == pytest.approx(sklearn.metrics.recall_score(labels, found, sample_weight=weights[1]))
    assert specificity[1] == pytest.approx(sklearn.metrics.recall_score(1 - labels, ~found, sample_weight=weights[1]))


def test_calibration_error_equals_the_gaps_of_the_calibration_curve():
    labels, probabilities, _ = made(500, ties=False)
    scores = probabilities[:, 1]
    true, stated = calibration_curve(labels, scores, n_bins=ECE_BINS)
    counts = np.histogram(scores, np.linspace(0, 1, ECE_BINS + 1))[0]
    assert calibration_error(labels, probabilities)[0] == pytest.approx(
        np.average(np.abs(true - stated), weights=counts[counts > 0]))


def test_calibration_error_and_brier_by_hand():
    labels, probabilities = np.array([0, 0, 1, 1]), binary([0.1, 0.1, 0.1, 0.8])
    assert brier(labels, probabilities)[0] == pytest.approx((0.01 + 0.01 + 0.81 + 0.04) / 4)
    assert calibration_error(labels, probabilities)[0] == pytest.approx((abs(0.3 - 1) + abs(0.8 - 1)) / 4)
    # Three labels: Brier is a sum over them, and the error is of the most probable label.
    labels, probabilities = np.array([0, 2]), np.array([[0.6, 0.3, 0.1], [0.5, 0.25, 0.25]])
    assert brier(labels, probabilities)[0] == pytest.approx(((0.16 + 0.09 + 0.01) + (0.25 + 0.0625 + 0.5625)) / 2)
    assert calibration_error(labels, probabilities)[0] == pytest.approx((abs(0.6 - 1) + abs(0.5 - 0)) / 2)
    assert calibration_error(np.array([0, 0]), binary([0.0, 0.0]))[0] == 0
    assert calibration_error(np.array([1, 1]), binary([1.0, 1.0]))[0] == 0


def test_auc_of_shifted_normals_is_the_closed_form():
    random = np.random.RandomState(0)
    labels = np.repeat([0, 1], 40_000)
    area, _ = ranking_scores(labels == 1, random.randn(80_000) + 1.2 * labels)
    # The standard error is about 0.0014.
    assert area[0] == pytest.approx(scipy.stats.norm.cdf(1.2 / math.sqrt(2)), abs=0.006)


def test_equal_probabilities_score_as_chance():
    labels, probabilities = np.array([0, 0, 0, 1]), binary([0.3] * 4)
    thresholds = choose_thresholds(labels, probabilities)
    assert thresholds.balanced == 0.3  # of two that are equally good, the one that finds more
    assert thresholds.at_90 == thresholds.at_95 == (np.nextafter(0.3, 1),)
    found = {name: float(values[0]) for name, values in score(labels, probabilities, thresholds).items()}
    assert found == pytest.approx({
        "auc": 0.5, "average_precision": 0.25, "balanced_accuracy": 0.5, "f1": 0.4, "sensitivity_at_90": 0,
        "specificity_at_90": 1, "sensitivity_at_95": 0, "specificity_at_95": 1, "brier": (3 * 0.09 + 0.49) / 4,
        "ece": 0.05})


def test_thresholds_are_the_smallest_with_the_specificity():
    labels = np.repeat([0, 1], [20, 3])
    scores = np.concatenate([np.arange(20) / 20, [0.87, 0.92, 0.99]])
    found = choose_thresholds(labels, binary(scores))
    # 18 of 20 negatives, up to 0.85, are below 0.87; 19, up to 0.9, are below 0.92.
    assert (found.at_90, found.at_95) == ((0.87,), (0.92,))
    assert found.balanced == 0.87  # recalls 3 / 3 and 18 / 20
    assert choose_thresholds(labels, binary(np.where(labels, 1.0, 0.0))).at_95 == (1.0,)


@pytest.mark.parametrize("specificity", [90, 95])
@pytest.mark.parametrize("num_labels", [2, 5])
def test_thresholds_reach_the_specificity_on_validation(specificity, num_labels):
    for seed in range(10):
        labels, probabilities, _ = made(150, num_labels, seed)
        thresholds = choose_thresholds(labels, probabilities)
        chosen = thresholds.at_90 if specificity == 90 else thresholds.at_95
        for label, threshold in zip([1] if num_labels == 2 else range(5), chosen, strict=True):
            scores = probabilities[:, label]
            assert (scores[labels != label] < threshold).mean() >= specificity / 100 - 1e-12
            smaller = scores[scores < threshold].max()
            assert (scores[labels != label] < smaller).mean() < specificity / 100


def test_score_part_gives_means_and_spread_over_seeds():
    labels, first, _ = made(seed=3, ties=False)
    _, second, _ = made(seed=4, ties=False)
    groups = np.arange(200) // 2
    found = score_part({"both": condition(labels, groups, first, second), "one": condition(labels, groups, first)},
                       [("both", "one")], resamples=50)
    areas = [sklearn.metrics.roc_auc_score(labels, each[:, 1]) for each in (first, second)]
    both = found.scores["both"]["auc"]
    assert both.values == pytest.approx(areas)
    assert both.interval.estimate == pytest.approx(np.mean(areas))
    assert both.sd == pytest.approx(np.std(areas, ddof=1))
    assert found.scores["one"]["auc"].sd is None
    assert (found.num_images, found.num_groups) == (200, 100)
    assert (both.interval.unit, both.interval.num_units) == ("group", {"groups": 100})
    difference = next(each for each in found.differences if each.metric == "auc")
    assert difference.interval.estimate == pytest.approx(np.mean(areas) - areas[0])
    assert difference.interval.low <= difference.interval.estimate <= difference.interval.high


def test_equal_classifiers_differ_by_0_with_p_1():
    labels, probabilities, _ = made()
    equal = {"a": condition(labels, np.arange(200), *[probabilities] * 3),  # the mean of three equal values is rounded
             "b": condition(labels, np.arange(200), probabilities)}
    for each in score_part(equal, [("a", "b")], resamples=100).differences:
        assert (each.interval.estimate, each.interval.low, each.interval.high) == pytest.approx((0, 0, 0), abs=1e-12)
        assert (each.p_value, each.p_holm) == (1, 1)


def test_p_values_are_adjusted_for_the_pairs_of_a_metric():
    labels, *_ = made(seed=5)
    random = np.random.RandomState(1)
    scores = {name: binary(1 / (1 + np.exp(-shift * labels - random.randn(200))))
              for name, shift in (("a", 0.0), ("b", 0.5), ("c", 0.9), ("d", 1.2))}
    pairs = [("b", "a"), ("c", "a"), ("d", "a"), ("d", "c")]
    found = score_part({name: condition(labels, np.arange(200), each) for name, each in scores.items()}, pairs,
                       resamples=400)
    assert [(each.metric, each.first, each.second) for each in found.differences] == [
        (metric, *pair) for metric in METRICS for pair in pairs]
    for metric in METRICS:
        tests = [each for each in found.differences if each.metric == metric]
        assert [each.p_holm for each in tests] == holm([each.p_value for each in tests])
        assert {each.num_tests for each in tests} == {4}
    best = next(each for each in found.differences if (each.metric, each.first) == ("auc", "d"))
    assert best.interval.low > 0
    assert best.p_holm < 0.05


def test_interval_excludes_0_where_p_is_below_its_level():
    labels, first, _ = made(80, seed=6)
    random = np.random.RandomState(2)
    decided = set()
    for shift in np.linspace(0, 1.5, 12):
        second = binary(1 / (1 + np.exp(-shift * labels - random.randn(80))))
        parts = {"a": condition(labels, np.arange(80), first), "b": condition(labels, np.arange(80), second)}
        for each in score_part(parts, [("a", "b")], resamples=500, metrics=RANKING).differences:
            if abs(each.p_value - 0.05) > 0.006:  # the p-value counts the one at hand, the interval interpolates
                excludes = not each.interval.low <= 0 <= each.interval.high
                assert excludes == (each.p_value < 0.05)
                decided.add(excludes)
    assert decided == {False, True}


def test_order_of_images_does_not_matter():
    labels, probabilities, _ = made(ties=False)
    groups = np.random.RandomState(3).randint(60, size=200)
    order = np.random.RandomState(4).permutation(200)
    first = score_part({"a": condition(labels, groups, probabilities)}, [], resamples=100)
    other = score_part({"a": condition(labels[order], -groups[order], probabilities[order])}, [], resamples=100)
    for metric in METRICS:
        one, two = (found.scores["a"][metric].interval for found in (first, other))
        assert (one.low, one.high, one.std_error) == pytest.approx((two.low, two.high, two.std_error), rel=1e-9)


def test_further_conditions_change_no_interval():
    labels, probabilities, _ = made(ties=False)
    _, others, _ = made(seed=9, ties=False)
    groups = np.arange(200) // 3
    alone = score_part({"a": condition(labels, groups, probabilities)}, [], resamples=50)
    both = score_part({"a": condition(labels, groups, probabilities), "b": condition(labels, groups, others)}, [],
                      resamples=50)
    assert both.scores["a"] == alone.scores["a"]


def test_rows_score_as_a_part_of_their_own():
    labels, probabilities, _ = made(ties=False)
    groups, rows = np.arange(200) // 3, np.arange(50, 120)
    found = score_part({"a": condition(labels, groups, probabilities)}, [], resamples=50, rows=rows, metrics=RANKING)
    alone = score_part({"a": condition(labels[rows], groups[rows], probabilities[rows])}, [], resamples=50)
    assert found.num_images == 70
    assert tuple(found.scores["a"]) == RANKING
    for metric in RANKING:
        assert found.scores["a"][metric] == alone.scores["a"][metric]


def test_labels_at_random_have_half_the_area_within_the_interval():
    random = np.random.RandomState(5)
    for trial in range(5):
        labels = random.permutation(np.repeat([0, 1], [150, 50]))
        found = score_part({"a": condition(labels, np.arange(200), binary(random.rand(200)))}, [], metrics=["auc"],
                           resamples=300, seed=trial)
        interval = found.scores["a"]["auc"].interval
        assert interval.low < 0.5 < interval.high


def test_interval_of_calibration_error_contains_it():
    random = np.random.RandomState(6)
    scores = random.rand(300)
    labels = (random.rand(300) < scores).astype(np.int64)  # well calibrated: resamples have larger errors
    found = score_part({"a": condition(labels, np.arange(300), binary(scores))}, [], resamples=300)
    interval = found.scores["a"]["ece"].interval
    assert 0 <= interval.low < interval.estimate < interval.high


def test_a_label_of_one_group_is_too_few():
    labels, probabilities, _ = made(20)
    labels[:] = 0
    labels[[3, 4]] = 1
    groups = np.arange(20)
    groups[4] = groups[3]
    with pytest.raises(TooFew, match=r"^there is 1 group with images of mel; an interval needs at least 2$"):
        score_part({"a": condition(labels, groups, probabilities)}, [], label_names=["rest", "mel"])
    with pytest.raises(TooFew, match=r"^there are 0 groups with images of label 1; an interval needs at least 2$"):
        score_part({"a": condition(labels, groups, probabilities)}, [], rows=np.array([0, 1, 2]))


@pytest.mark.parametrize(("change", "message"), [
    ({"labels": np.zeros(20, dtype=np.int64)}, "the images of b are not those of a; expected the same part"),
    ({"probabilities": np.zeros((1, 20, 3))},
     "the probabilities of b are of shape (1, 20, 3); expected (seeds, 20, 2)"),
    ({"probabilities": np.full((1, 20, 2), np.nan)}, "probabilities of b are not finite")])
def test_conditions_that_do_not_fit_raise(change, message):
    labels, probabilities, _ = made(20)
    first = condition(labels, np.arange(20), probabilities)
    with pytest.raises(ValueError) as caught:
        score_part({"a": first, "b": ConditionPredictions(**{**vars(first), **change})}, [])
    assert str(caught.value) == message
