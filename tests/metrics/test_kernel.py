"""metrics.kernel: against a double loop, and what the subsets are."""

import numpy as np
import pytest
import torch

from metrics import kernel
from metrics.kernel import kernel_distance, kernel_distances


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
    assert kernel_distance(real, fake, 1, 40, seed=0) == pytest.approx(double_loop(real, fake), rel=1e-9)


# 30 subsets of 8 have more pairs than 20 images, those of 3 fewer than 40: each is a way of its own to add up
@pytest.mark.parametrize(("subsets", "size", "num_real", "num_fake"), [
    (30, 8, 20, 25), (30, 8, 20, 90), (30, 8, 90, 20), (3, 8, 60, 70), (1, 20, 20, 20), (5, 2, 3, 3),
])
@pytest.mark.parametrize("block", [3, 256])
def test_kernel_distances_equal_double_loops_over_drawn_subsets(monkeypatch, subsets, size, num_real, num_fake, block):
    monkeypatch.setattr(kernel, "_BLOCK", block)
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
        assert found == pytest.approx(within - 2 * xy.mean(), rel=1e-9)


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
