"""Intervals of FID in simulations of correlated images, where the true distance is known."""

import numpy as np
import pytest

from metrics.frechet import FeatureStats, frechet_distance, frechet_jackknife

TRIALS = 200
NUM_GROUPS, GROUP_SIZE, NUM_FAKE = 400, 5, 2000
CORRELATION = 0.8  # of two images of a group


@pytest.mark.slow
@pytest.mark.parametrize("num_features", [8, 32])
def test_fid_intervals_by_group_cover_the_true_distance_and_those_by_image_do_not(num_features):
    random = np.random.RandomState(num_features)
    mean = random.randn(num_features) / 2
    real_spread, fake_spread = random.uniform(0.5, 1.5, [2, num_features])
    truth = (mean**2).sum() + ((real_spread - fake_spread) ** 2).sum()
    groups = np.repeat(np.arange(NUM_GROUPS), GROUP_SIZE)
    covered, estimates, plain = {"group": 0, "image": 0}, {"group": [], "image": []}, []
    for seed in range(TRIALS):
        shared, own = random.randn(NUM_GROUPS, num_features)[groups], random.randn(len(groups), num_features)
        real = real_spread * (CORRELATION**0.5 * shared + (1 - CORRELATION) ** 0.5 * own)
        fake = mean + fake_spread * random.randn(NUM_FAKE, num_features)
        for unit, numbers in (("group", groups), ("image", None)):
            interval = frechet_jackknife(real, fake, numbers, seed=seed).interval()
            covered[unit] += int(interval.low <= truth <= interval.high)
            estimates[unit].append(interval.estimate)
        a, b = FeatureStats.of(real), FeatureStats.of(fake)
        plain.append(frechet_distance(a.mean, a.covariance(), b.mean, b.covariance()))
    bias = {name: float(np.mean(found)) - truth for name, found in (*estimates.items(), ("plain", plain))}
    error = np.std(plain) / TRIALS**0.5
    print(f"F = {num_features}, distance {truth:.3f}: covered {covered} of {TRIALS}, bias {bias} +- {error:.4f}")
    # Of 200 trials at 95 %, fewer than 180 or more than 196 have a chance of 0.4 %.
    assert 180 <= covered["group"] <= 196
    assert covered["image"] < 180
    assert abs(bias["group"]) < 3 * error
    # Of the same trials: taking images for independent takes off too little.
    assert bias["group"] < bias["image"] < bias["plain"]
