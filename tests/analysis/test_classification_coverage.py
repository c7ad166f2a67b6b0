"""Coverage of intervals of classifiers' scores by simulation: patients with several images, and a known truth.

By group 95 % intervals contain the truth as often as they state; by image, taking the images of a patient for
independent, they do not. Each test prints the shares that it found.
"""

import math

import numpy as np
import pytest
import scipy.stats

from analysis.classification_scores import ConditionPredictions, Thresholds, score_part

THRESHOLDS = Thresholds(balanced=0.5, at_90=(0.5,), at_95=(0.5,))
TRIALS = 300  # of a true coverage of 95 %, shares below 90 or above 98 % have a chance of 0.1 %
RESAMPLES = 500  # fewer than in reports, for time
SHIFT, OF_PATIENT, OF_IMAGE = 1.2, 1.0, 0.6  # of positives, and standard deviations
AUC = float(scipy.stats.norm.cdf(SHIFT / math.sqrt(2 * (OF_PATIENT**2 + OF_IMAGE**2))))


def draw_patients(random):
    """Return labels, groups and a function that draws scores: 60 to 120 patients of 1 to 8 images, 30 % positive."""
    sizes = random.randint(1, 9, size=random.randint(60, 121))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    labels = (random.rand(len(sizes)) < 0.3).astype(np.int64)[groups]
    return labels, groups, lambda effects: (SHIFT * labels + OF_PATIENT * effects[groups]
                                            + OF_IMAGE * random.randn(len(groups)))


def predictions(labels, groups, scores):
    probabilities = 1 / (1 + np.exp(-scores))
    return ConditionPredictions(labels=labels, groups=groups, thresholds=[THRESHOLDS],
                                probabilities=np.stack([1 - probabilities, probabilities], axis=1)[None])


@pytest.mark.slow
def test_auc_by_group_covers_the_truth_and_by_image_does_not():
    random = np.random.RandomState(0)
    covered = {"group": 0, "image": 0}
    for trial in range(TRIALS):
        labels, groups, draw = draw_patients(random)
        scores = draw(random.randn(groups.max() + 1))
        for unit, numbers in (("group", groups), ("image", np.arange(len(groups)))):
            found = score_part({"a": predictions(labels, numbers, scores)}, [], metrics=["auc"], seed=trial,
                               resamples=RESAMPLES)
            interval = found.scores["a"]["auc"].interval
            covered[unit] += interval.low <= AUC <= interval.high
    shares = {unit: count / TRIALS for unit, count in covered.items()}
    print(f"AUC {AUC:.3f}: covered by group {shares['group']:.3f}, by image {shares['image']:.3f}")
    assert 0.90 <= shares["group"] <= 0.98
    assert shares["image"] < 0.90


@pytest.mark.slow
def test_paired_differences_by_group_cover_0_and_reject_as_often_as_stated():
    random = np.random.RandomState(1)
    covered = {"group": 0, "image": 0}
    rejected = 0
    for trial in range(TRIALS):
        labels, groups, draw = draw_patients(random)
        # Two classifiers, equally good, that err on different patients in part.
        shared, own = random.randn(groups.max() + 1), random.randn(2, groups.max() + 1)
        scores = [draw(0.6 * shared + 0.8 * each) for each in own]
        for unit, numbers in (("group", groups), ("image", np.arange(len(groups)))):
            pair = {name: predictions(labels, numbers, each) for name, each in zip("ab", scores, strict=True)}
            (difference,) = score_part(pair, [("a", "b")], metrics=["auc"], seed=trial,
                                       resamples=RESAMPLES).differences
            covered[unit] += difference.interval.low <= 0 <= difference.interval.high
            rejected += unit == "group" and difference.p_value < 0.05
    shares = {unit: count / TRIALS for unit, count in covered.items()}
    print(f"difference 0: covered by group {shares['group']:.3f}, by image {shares['image']:.3f}; "
          f"p < 0.05 by group {rejected / TRIALS:.3f}")
    assert 0.90 <= shares["group"] <= 0.98
    assert shares["image"] < 0.90
    assert rejected / TRIALS == pytest.approx(1 - shares["group"], abs=0.01)
