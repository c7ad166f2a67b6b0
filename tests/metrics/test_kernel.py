"""metrics.kernel: against a double loop, what the subsets are, and what is left without each group."""

import itertools

import numpy as np
import pytest
import torch

from metrics import kernel, pair_sums
from metrics.intervals import TooFew
from metrics.kernel import kernel_distance, kernel_distances, kernel_jackknife, permuted_distances


def features(count, num_features=5, seed=0, shift=0.0):
    return np.random.RandomState(seed).randn(count, num_features) + shift


def double_loop(real, fake):
    """Return the unbiased estimate, pair by pair, as the formula reads."""
    def k(x, y):
        return (sum(float(a) * float(b) for a, b in zip(x, y)) / len(x) + 1) ** 3

    m, n = len(real), len(fake)
    of_real = sum(k(real[i], real[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    of_fake = sum(k(fake[i], fake[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    across = sum(k(x, y) for x in real for y in fake) / (m * n)
    return of_real + of_fake - 2 * across


def drawn(seed, subsets, size, num_real, num_fake):
    """Return the index pairs that a seed stands for."""
    random = np.random.RandomState(seed)
    return [(random.choice(num_real, size, replace=False), random.choice(num_fake, size, replace=False))
            for _ in range(subsets)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kernel_distance_whole_sets_equals_double_loop(dtype):
    real, fake = features(40).astype(dtype), features(40, seed=1, shift=0.1).astype(dtype)
    # Products of float32 features are float32: off by up to 6e-8 of values of the order of 1, of few pairs.
    tolerance = {"abs": 1e-7} if dtype is np.float32 else {"rel": 1e-9}
    assert kernel_distance(real, fake, 1, 40, seed=0) == pytest.approx(double_loop(real, fake), **tolerance)


# 30 subsets of 8 have more pairs than 20 images, those of 3 fewer than 40: each is a way of its own to add up
@pytest.mark.parametrize(("subsets", "size", "num_real", "num_fake"), [
    (30, 8, 20, 25), (30, 8, 20, 90), (30, 8, 90, 20), (3, 8, 60, 70), (1, 20, 20, 20), (5, 2, 3, 3),
])
@pytest.mark.parametrize("block", [(3, 5), (256, 256)])
def test_kernel_distances_equal_double_loops_over_drawn_subsets(monkeypatch, subsets, size, num_real, num_fake, block):
    monkeypatch.setattr(pair_sums, "_CPU_BLOCK", block)
    real, fake = features(num_real), features(num_fake, seed=1, shift=0.2)
    expected = [double_loop(real[i], fake[j]) for i, j in drawn(7, subsets, size, num_real, num_fake)]
    found = kernel_distances(real, fake, subsets, size, seed=7)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert kernel_distance(real, fake, subsets, size, seed=7) == pytest.approx(np.mean(expected), rel=1e-9)


def test_kernel_distances_more_images_than_a_block_equal_closed_sums():
    real, fake = features(700, 64).astype(np.float32), features(600, 64, seed=1, shift=0.05).astype(np.float32)
    for (i, j), found in zip(drawn(3, 2, 600, 700, 600), kernel_distances(real, fake, 2, 600, seed=3)):
        x, y = real[i].astype(np.float64), fake[j].astype(np.float64)
        xx, yy, xy = ((a @ b.T / 64 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (600 * 599)
        # Products of float32 features are float32, and their rounding averages out over the 360,000 pairs.
        assert found == pytest.approx(within - 2 * xy.mean(), abs=1e-9)


def test_kernel_distances_follow_the_seed():
    real, fake = torch.from_numpy(features(50)), torch.from_numpy(features(50, seed=1))
    first = kernel_distances(real, fake, 4, 10, seed=5)
    assert first.shape == (4,)
    assert first.dtype == np.float64
    np.testing.assert_array_equal(kernel_distances(real, fake, 4, 10, seed=5), first)
    np.testing.assert_allclose(kernel_distances(real, fake, 2, 10, seed=5), first[:2], rtol=1e-9)
    assert not np.isclose(kernel_distances(real, fake, 4, 10, seed=6), first).any()


def test_kernel_distance_order_of_whole_sets_changes_nothing():
    real, fake = features(300), features(300, seed=1)
    found = kernel_distance(real, fake, 1, 300, seed=0)
    assert kernel_distance(real[::-1], fake[::-1], 1, 300, seed=1) == pytest.approx(found, rel=1e-9)


def test_kernel_distance_is_symmetric():
    real, fake = features(30), features(30, seed=1)
    assert kernel_distance(fake, real, 1, 30, seed=0) == pytest.approx(kernel_distance(real, fake, 1, 30, seed=0))


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 5, 0), r"^there are 0 subsets of 5 images; expected at least 1 of at least 2$"),
    ((1, 1, 0), r"^there are 1 subsets of 1 images; expected at least 1 of at least 2$"),
    ((1, 6, 0), r"^fake features are of 5 images; expected at least 6$"),
])
def test_kernel_distances_numbers_out_of_range_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernel_distances(features(9), features(5), *arguments)


@pytest.mark.parametrize(("subsets", "size", "expected"), [(30, 8, 20 + 25 + 20), (3, 4, 3 * 3 * 4)])
def test_kernel_distances_tell_of_each_row(subsets, size, expected):
    told = []
    kernel_distances(features(20), features(25, seed=1), subsets, size, seed=0, on_rows=told.append)
    assert sum(told) == expected


@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.0), (0.3, 0.0), (0.3, 1.0)])
def test_kernel_jackknife_of_float32_is_that_of_float64_within_a_small_part_of_its_error(scale, mean):
    # Like a detector's: never negative, the mean far from 0; the smaller scale makes distances of the order of 1e-5.
    mix = features(32, 512) / 6
    real, fake = (np.maximum(features(800, 32, seed) @ mix + 0.3 * features(800, 512, seed + 10), 0) * scale + mean
                  for seed in (1, 2))
    real, fake = real.astype(np.float32), fake.astype(np.float32)
    found, exact = kernel_jackknife(real, fake), kernel_jackknife(real.astype(np.float64), fake.astype(np.float64))
    error = exact.interval().std_error
    # Rounding of products, 6e-8 of the kernel's values, averages out over 640,000 pairs; far means cancel less well.
    assert found.estimate == pytest.approx(exact.estimate, abs=1e-3 * error)
    assert found.interval().std_error == pytest.approx(error, rel=1e-3)


def over_groups(real, fake, real_groups, fake_groups):
    """Return the estimate over pairs of different groups, as the formula reads."""
    def k(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = 0
    for x, groups in ((real, real_groups), (fake, fake_groups)):
        differ = groups[:, None] != groups[None]
        within += k(x, x)[differ].mean()
    return within - 2 * k(real, fake).mean()


REAL_GROUPS = np.array([5, 5, 2, 7, 7, 7, 2, 9, 5, 11, 12, 12, 13])


@pytest.mark.parametrize("block", [(3, 5), (4, 2), (256, 2048)])
@pytest.mark.parametrize("fake_groups", [None, np.arange(20) // 3])
def test_kernel_jackknife_equals_estimates_without_each_group(monkeypatch, block, fake_groups):
    monkeypatch.setattr(pair_sums, "_CPU_BLOCK", block)
    real, fake = features(13), features(20, seed=1, shift=0.3)
    found = kernel_jackknife(real, fake, REAL_GROUPS, fake_groups)
    numbers = np.arange(20) if fake_groups is None else fake_groups
    assert found.estimate == pytest.approx(over_groups(real, fake, REAL_GROUPS, numbers), rel=1e-9)
    kept = [group != REAL_GROUPS for group in dict.fromkeys(REAL_GROUPS)]
    np.testing.assert_allclose(
        found.without["real"], [over_groups(real[i], fake, REAL_GROUPS[i], numbers) for i in kept], rtol=1e-9)
    kept = [numbers != group for group in np.unique(numbers)]
    np.testing.assert_allclose(
        found.without["fake"], [over_groups(real, fake[i], REAL_GROUPS, numbers[i]) for i in kept], rtol=1e-9)


def test_kernel_jackknife_without_groups_estimates_the_distance_of_whole_sets():
    real, fake = features(300), features(300, seed=1, shift=0.1)
    assert kernel_jackknife(real, fake).estimate == pytest.approx(kernel_distance(real, fake, 1, 300, seed=0), rel=1e-9)


def test_kernel_jackknife_order_of_images_changes_nothing():
    real, fake, groups = features(300), features(250, seed=1, shift=0.2), np.arange(300) // 4
    order = np.random.RandomState(2).permutation(300)
    found = kernel_jackknife(real, fake, groups).interval()
    mixed = kernel_jackknife(real[order], fake[::-1], groups[order]).interval()
    assert (mixed.low, mixed.high) == pytest.approx((found.low, found.high), rel=1e-9)
    assert mixed.num_units == found.num_units == {"real": 75, "fake": 250}


def test_kernel_jackknife_interval_does_not_shrink_when_real_images_are_there_twice():
    real, fake = features(100), features(400, seed=1, shift=0.3)
    once = kernel_jackknife(real, fake).interval()
    twice = kernel_jackknife(np.concatenate([real, real]), fake, np.tile(np.arange(100), 2)).interval()
    assert (twice.estimate, twice.low, twice.high) == pytest.approx((once.estimate, once.low, once.high), rel=1e-9)
    apart = kernel_jackknife(np.concatenate([real, real]), fake).interval()
    assert apart.std_error < 0.8 * once.std_error  # what the groups prevent


def test_kernel_jackknife_of_two_groups_raises():
    with pytest.raises(TooFew, match=r"^there are 2 groups of fake images; expected at least 3, for pairs of different "
                                     r"groups that remain without one of them$"):
        kernel_jackknife(features(9), features(8), fake_groups=np.arange(8) // 4)


def test_kernel_jackknife_tells_of_each_row():
    told = []
    kernel_jackknife(features(300), features(20), on_rows=told.append)
    assert sum(told) == 300 + 20 + 300


def test_permuted_distances_are_those_of_all_ways_to_deal_the_groups():
    real, fake = features(7), features(6, seed=1, shift=0.5)
    real_groups, fake_groups = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 2, 2])
    pooled, groups = np.concatenate([real, fake]), np.concatenate([real_groups, 3 + fake_groups])
    by_first = {}
    for chosen in itertools.combinations(range(6), 3):
        first = np.isin(groups, chosen)
        by_first[first.sum()] = by_first.get(first.sum(), [])
        by_first[first.sum()].append(over_groups(pooled[first], pooled[~first], groups[first], groups[~first]))
    found = permuted_distances(real, fake, real_groups, fake_groups, permutations=400)
    assert found.estimate == pytest.approx(over_groups(real, fake, real_groups, fake_groups), rel=1e-9)
    # Three groups, of 2 + 2 + 3 or 2 + 2 + 2 images; 20 ways in all, each of which 400 draws contain.
    expected = np.sort(np.unique(np.round(np.concatenate(list(by_first.values())), 9)))
    np.testing.assert_allclose(np.unique(np.round(found.null, 9)), expected, atol=2e-9)
    assert found.p_value == (1 + (found.null >= found.estimate - 1e-9).sum()) / 401


def test_permuted_distances_follow_the_seed_and_tell_of_each_row():
    real, fake, told = features(60), features(50, seed=1), []
    first = permuted_distances(real, fake, permutations=50, seed=3, on_rows=told.append)
    np.testing.assert_array_equal(permuted_distances(real, fake, permutations=50, seed=3).null, first.null)
    assert not np.isclose(permuted_distances(real, fake, permutations=50, seed=4).null, first.null).any()
    assert first.null.shape == (50,)
    assert sum(told) == 110


def test_permuted_distances_tell_sets_apart_and_equal_ones_not():
    groups = np.arange(120) // 4
    of_groups = np.random.RandomState(5).randn(60, 5).repeat(4, axis=0) + features(240, seed=6) * 0.3
    alike = permuted_distances(of_groups[:120], of_groups[120:], groups, groups)
    assert 0.05 < alike.p_value < 1
    assert alike.null.mean() == pytest.approx(0, abs=3 * alike.null.std() / 1000**0.5)
    # Images of a group taken for independent ones make any two sets differ.
    assert permuted_distances(of_groups[:120], of_groups[120:]).p_value < 0.05
    assert permuted_distances(of_groups[:120], of_groups[120:] + 1, groups, groups).p_value == 1 / 1001


def test_permuted_distances_of_too_many_or_too_few_raise(monkeypatch):
    monkeypatch.setattr(kernel, "MAX_PERMUTED", 20)
    with pytest.raises(ValueError, match=r"^there are 15 and 6 images; a permutation test takes at most 20 in all: "
                                         r"choose a random subset of the groups$"):
        permuted_distances(features(15), features(6))
    with pytest.raises(TooFew, match=r"^there are 5 groups of real and 1 of fake images; expected at least 2 of each$"):
        permuted_distances(features(5), features(6), fake_groups=np.zeros(6))
