"""Intervals of precision, recall, density and coverage in simulations of correlated images."""

import numpy as np
import pytest

from metrics.precision_recall import neighborhoods

NAMES = ("precision", "recall", "density", "coverage")
TRIALS, DRAWS = 200, 400
NUM_FEATURES, NUM_FAKE, K = 8, 500, 3
GROUPS = np.repeat(np.arange(60), 6)  # of 360 real images
CORRELATION = 0.85  # of two images of a group


def draw(seed):
    """Return real [N, F] and fake [M, F] features; fakes vary less, and around another mean."""
    random = np.random.RandomState(seed)
    shared, own = random.randn(GROUPS[-1] + 1, NUM_FEATURES)[GROUPS], random.randn(len(GROUPS), NUM_FEATURES)
    fake = random.randn(NUM_FAKE, NUM_FEATURES) * 0.8
    fake[:, 0] += 0.5
    return CORRELATION**0.5 * shared + (1 - CORRELATION) ** 0.5 * own, fake


@pytest.mark.slow
def test_intervals_by_group_cover_the_mean_over_draws_and_those_by_image_do_not():
    draws = [neighborhoods(*draw(1000 + seed), [K])[K] for seed in range(DRAWS)]
    truth = {name: float(np.mean([getattr(each, name) for each in draws])) for name in NAMES}
    assert all(0.1 < value < 0.9 for value in truth.values())
    covered = {unit: dict.fromkeys(NAMES, 0) for unit in ("group", "image")}
    for seed in range(TRIALS):
        for unit, groups in (("group", GROUPS), ("image", None)):
            found = neighborhoods(*draw(seed), [K], real_groups=groups, jackknife=True)[K]
            for name in NAMES:
                interval = found.jackknives[name].interval(0.95)
                covered[unit][name] += int(interval.low <= truth[name] <= interval.high)
    print(f"means {truth}, covered {covered} of {TRIALS}")
    for name in NAMES:
        # Of 200 trials at 95 %, fewer than 180 or more than 196 have a chance of 0.4 %.
        assert 180 <= covered["group"][name] <= 196
        assert covered["image"][name] < 180
