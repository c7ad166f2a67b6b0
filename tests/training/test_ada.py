"""The heuristic that adapts the augmentation probability."""

import math

import pytest
import torch

from training.ada import count_signs, mean_sign, next_p

USUAL = dict(p=0.5, mean_sign=1.0, target=0.6, batch=32, interval=4, kimg=500)


# Steps computed with the reference implementation.
@pytest.mark.parametrize(("kimg", "step"), [(500, 0.000256), (100, 0.00128)])
@pytest.mark.parametrize(("r", "direction"), [(1.0, 1), (0.61, 1), (0.6, 0), (0.59, -1), (-1.0, -1)])
def test_next_p_moves_by_the_reference_step(kimg, step, r, direction):
    assert next_p(**USUAL | dict(mean_sign=r, kimg=kimg)) == pytest.approx(0.5 + direction * step, rel=1e-15)


def test_next_p_stays_between_0_and_1():
    assert next_p(**USUAL | dict(p=0.0, mean_sign=0.0)) == 0.0
    assert next_p(**USUAL | dict(p=1e-5, mean_sign=0.0)) == 0.0
    assert next_p(**USUAL | dict(p=1.0)) == 1.0
    assert next_p(**USUAL | dict(p=1 - 1e-5)) == 1.0


def test_next_p_travels_from_0_to_1_in_kimg_thousand_images():
    p, steps = 0.0, 0
    while p < 1 - 1e-9:
        p, steps = next_p(**USUAL | dict(p=p, kimg=10)), steps + 1
    assert steps == math.ceil(10_000 / (32 * 4))


@pytest.mark.parametrize(("change", "message"), [
    (dict(p=1.5), "ADA: p is 1.5; expected 0 to 1"),
    (dict(p=math.nan), "ADA: p is nan; expected 0 to 1"),
    (dict(mean_sign=math.nan), "ADA: mean sign of the discriminator is nan; expected a finite number"),
    (dict(mean_sign=math.inf), "ADA: mean sign of the discriminator is inf; expected a finite number"),
    (dict(target=2), "ADA: target is 2; expected -1 to 1"),
    (dict(batch=0), "ADA: batch is 0; expected at least 1"),
    (dict(interval=0), "ADA: interval is 0; expected at least 1"),
    (dict(kimg=0), "ADA: kimg is 0; expected a finite number above 0"),
])
def test_next_p_bad_value_raises(change, message):
    with pytest.raises(ValueError) as error:
        next_p(**USUAL | change)
    assert str(error.value) == message


def test_mean_sign_of_added_counts_is_that_of_all_logits():
    logits = torch.tensor([[2.0], [-0.1], [0.0], [7.0], [1e-8]], requires_grad=True)
    counts = count_signs(logits[:2]) + count_signs(logits[2:].half())  # 1e-8 is 0 in half precision
    assert counts.tolist() == [1.0, 5.0]
    assert counts.dtype == torch.float64
    assert not counts.requires_grad
    assert mean_sign(counts) == 0.2


def test_mean_sign_of_nothing_raises():
    with pytest.raises(ValueError, match=r"^the sign statistic counts 0 outputs .*; expected at least 1$"):
        mean_sign(count_signs(torch.zeros(0, 1)))


def test_mean_sign_of_nan_logits_is_nan():
    assert math.isnan(mean_sign(count_signs(torch.tensor([[1.0], [math.nan]]))))
