"""Intervals of KID contain the truth as often as they claim, when images of a group resemble each other."""

import numpy as np
import pytest

from metrics.kernel import kernel_jackknife, permuted_distances

pytestmark = pytest.mark.slow
NUM_FEATURES, TRIALS = 8, 200


def reals(seed, sizes, correlation):
    """Return standard normal features, correlated within groups of these sizes, and the groups."""
    random, groups = np.random.RandomState(seed), np.repeat(np.arange(len(sizes)), sizes)
    shared, own = random.randn(len(sizes), NUM_FEATURES), random.randn(len(groups), NUM_FEATURES)
    return np.sqrt(correlation) * shared[groups] + np.sqrt(1 - correlation) * own, groups


def fakes(seed, shift):
    return np.random.RandomState(10_000 + seed).randn(300, NUM_FEATURES) + shift


def true_distance(shift):
    """Return the distance of two standard normal distributions, from the moments of x.y."""
    def mean_of_kernel(mu, nu):
        both, of_mu, of_nu = mu @ nu, mu @ mu, nu @ nu
        square = both**2 + of_mu + of_nu + NUM_FEATURES
        cube = both**3 + 3 * both * (of_mu + of_nu + NUM_FEATURES + 2)
        return cube / NUM_FEATURES**3 + 3 * square / NUM_FEATURES**2 + 3 * both / NUM_FEATURES + 1

    zero, mean = np.zeros(NUM_FEATURES), np.full(NUM_FEATURES, shift)
    return mean_of_kernel(zero, zero) + mean_of_kernel(mean, mean) - 2 * mean_of_kernel(zero, mean)


def share_covered(intervals, truth):
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


@pytest.mark.parametrize(("correlation", "shift"), [(0.9, 0.5), (0.8, 0.2)])
def test_kernel_interval_by_group_covers_and_the_one_by_image_does_not(correlation, shift):
    by_group, by_image = [], []
    for seed in range(TRIALS):
        real, groups = reals(seed, [5] * 60, correlation)
        fake = fakes(seed, shift)
        by_group.append(kernel_jackknife(real, fake, groups).interval())
        by_image.append(kernel_jackknife(real, fake).interval())
    truth = true_distance(shift)
    print(f"KID {truth:.4f}: covered by group {share_covered(by_group, truth):.1%}, by image "
          f"{share_covered(by_image, truth):.1%} of {TRIALS}")
    estimates = np.array([interval.estimate for interval in by_group])
    # The closed form is the mean of the estimates, within three of its standard errors.
    assert estimates.mean() == pytest.approx(truth, abs=3 * estimates.std() / TRIALS**0.5)
    assert 0.90 <= share_covered(by_group, truth) <= 0.98
    assert share_covered(by_image, truth) < 0.90


def test_kernel_interval_of_equal_distributions_is_too_wide_by_the_root_of_two():
    intervals = []
    for seed in range(TRIALS):
        real, groups = reals(seed, [5] * 60, 0.9)
        intervals.append(kernel_jackknife(real, fakes(seed, 0.0), groups).interval())
    assert share_covered(intervals, 0.0) >= 0.95
    mean_square = np.mean([interval.std_error**2 for interval in intervals])
    # 200 draws know the standard deviation within 5 %; its tails are heavier than a Gaussian's.
    assert mean_square**0.5 / np.std([interval.estimate for interval in intervals]) == pytest.approx(2**0.5, rel=0.15)


def test_permutation_of_groups_rejects_equal_distributions_as_rarely_as_it_claims():
    by_group, by_image = [], []
    for seed in range(TRIALS):
        features, groups = reals(seed, np.random.RandomState(seed).randint(1, 9, size=40), 0.9)
        first = groups < 20
        sets = features[first], features[~first]
        by_group.append(permuted_distances(*sets, groups[first], groups[~first], permutations=199).p_value)
        by_image.append(permuted_distances(*sets, permutations=199).p_value)
    # 10 of 200 are expected, with a standard deviation of 3.1.
    assert np.mean(np.array(by_group) <= 0.05) <= 0.05 + 3 * 0.0155
    assert np.median(by_group) == pytest.approx(0.5, abs=0.11)  # 3 / (2 sqrt(200))
    assert np.mean(np.array(by_image) <= 0.05) > 0.5
