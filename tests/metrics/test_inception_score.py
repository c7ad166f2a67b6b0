"""metrics.inception_score: closed forms, and intervals of known coverage."""

import math

import numpy as np
import pytest
import torch

from metrics.inception_score import InceptionScore, inception_score, score_jackknife
from metrics.intervals import TooFew


def test_inception_score_uniform_probabilities_is_one():
    score = inception_score(np.full([50, 8], 1 / 8))
    assert score == pytest.approx((1, 0), abs=1e-14)
    assert isinstance(score, InceptionScore)


@pytest.mark.parametrize("num_classes", [2, 7, 20])
def test_inception_score_sure_and_even_is_number_of_classes(num_classes):
    probabilities = torch.eye(num_classes).repeat(30, 1)  # each tenth holds all classes equally often
    assert inception_score(probabilities) == pytest.approx((num_classes, 0), abs=1e-12)


def test_inception_score_sure_of_one_class_is_one():
    assert inception_score(torch.eye(5)[:1].repeat(20, 1)) == (1, 0)


def test_inception_score_two_kinds_of_images_equals_formula():
    p = np.array([[0.9, 0.1], [0.2, 0.8]] * 10)
    marginal = [0.55, 0.45]
    divergence = np.mean([sum(a * math.log(a / b) for a, b in zip(row, marginal)) for row in p[:2]])
    assert inception_score(p, splits=5) == pytest.approx((math.exp(divergence), 0), rel=1e-12, abs=1e-12)


def test_inception_score_splits_are_consecutive_and_std_is_of_population():
    sure, unsure = np.eye(3), np.full([3, 3], 1 / 3)
    assert inception_score(np.concatenate([sure, unsure]), splits=2) == pytest.approx((2, 1), rel=1e-12)
    assert inception_score(np.concatenate([sure, unsure, unsure]), splits=3).std == pytest.approx(math.sqrt(8) / 3)


def test_inception_score_uneven_number_uses_every_image():
    # 7 images in 3 splits are 2, 2 and 3
    p = torch.eye(7)
    assert inception_score(p, splits=3).mean == pytest.approx((2 + 2 + 3) / 3, rel=1e-12)


def test_inception_score_float16_probabilities_pass():
    p = torch.softmax(torch.randn(40, 1000, generator=torch.Generator().manual_seed(0)), dim=1)
    assert inception_score(p.half()).mean == pytest.approx(inception_score(p).mean, rel=1e-3)


@pytest.mark.parametrize(("probabilities", "splits", "message"), [
    (np.ones(3), 1, r"^probabilities are \[3\]; expected \[N, F\]$"),
    (np.eye(9), 10, r"^probabilities are of 9 images; expected at least 10$"),
    (np.eye(9), 0, r"^there are 0 splits; expected at least 1$"),
    (np.eye(3) * np.nan, 1, r"^probabilities have 9 values that are not finite, of 9; expected none$"),
    (np.array([[2.0, -1]]), 1, r"^probabilities have values below 0, or rows that do not add up to 1; expected the "
                               r"classes' probabilities, not logits$"),
    (np.array([[2.0, 1]]), 1, r"^probabilities have values below 0, or rows that do not add up to 1;"),
])
def test_inception_score_of_no_probabilities_raises(probabilities, splits, message):
    with pytest.raises(ValueError, match=message):
        inception_score(probabilities, splits)


def random_probabilities(count, seed=0):
    return np.random.RandomState(seed).dirichlet([0.1, 0.2, 0.3, 0.6, 1], size=count)


@pytest.mark.parametrize("splits", [2, 7, 10])
def test_score_jackknife_has_the_standard_error_of_the_splits_mean(splits):
    p = random_probabilities(205)
    score, found = inception_score(p, splits), score_jackknife(p, splits).interval()
    assert found.estimate == score.mean
    assert found.std_error == pytest.approx(score.std / math.sqrt(splits - 1), rel=1e-10)
    assert (found.unit, found.num_units, found.method) == ("split", {"fake": splits}, "jackknife over splits")


def test_score_jackknife_does_not_depend_on_the_order_within_splits():
    p = random_probabilities(200)
    found, expected = score_jackknife(p.reshape(10, 20, 5)[:, ::-1].reshape(200, 5)), score_jackknife(p)
    assert found.without["fake"] == pytest.approx(expected.without["fake"], rel=1e-12)


def test_score_jackknife_is_at_least_one():
    assert score_jackknife(np.full([50, 8], 1 / 8)).interval().low == 1


def test_score_jackknife_of_one_split_has_no_interval():
    with pytest.raises(TooFew, match=r"^there is 1 split of fake images; an interval needs at least 2$"):
        score_jackknife(random_probabilities(30), splits=1).interval()


def test_score_intervals_cover_the_mean_over_fresh_draws():
    intervals = [score_jackknife(random_probabilities(200, seed)).interval() for seed in range(200)]
    # The mean over 2,000 fresh splits, whose own error is a fourteenth of that of 10.
    fresh = random_probabilities(40_000, seed=1000)
    truth = inception_score(fresh, splits=2000).mean
    covered = sum(interval.low <= truth <= interval.high for interval in intervals)
    # Of 200 trials at 95 %, fewer than 180 or more than 196 have a chance of 0.4 %.
    assert 180 <= covered <= 196
    # They are not about the score of many images, of which splits of 20 fall short.
    whole = inception_score(fresh, splits=1).mean
    assert sum(interval.low <= whole <= interval.high for interval in intervals) < 180
