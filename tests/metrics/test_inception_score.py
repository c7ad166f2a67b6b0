"""metrics.inception_score: closed forms."""

import math

import numpy as np
import pytest
import torch

from metrics.inception_score import InceptionScore, inception_score


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
