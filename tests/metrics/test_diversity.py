"""metrics.diversity: against loops over pairs, and what it says of a set."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist

from metrics import pair_sums
from metrics.diversity import diversity
from metrics.intervals import TooFew


def features(count, num_features=6, seed=0, mean=0.0):
    return np.random.RandomState(seed).randn(count, num_features) + mean


def mean_distance(x, groups):
    return cdist(x, x)[groups[:, None] != groups[None]].mean()


@pytest.mark.parametrize("block", [(3, 5), (256, 2048)])
def test_diversity_equals_mean_distances_without_each_group(monkeypatch, block):
    monkeypatch.setattr(pair_sums, "_CPU_BLOCK", block)
    real, fake, groups = features(17, mean=3), features(12, seed=1) * 0.5, np.arange(17) % 5
    found = diversity(real, fake, groups)
    of_real, of_fake = mean_distance(real, groups), pdist(fake).mean()
    assert (found.real.estimate, found.fake.estimate) == pytest.approx((of_real, of_fake), rel=1e-9)
    assert found.ratio.estimate == pytest.approx(of_fake / of_real, rel=1e-9)
    without_real = np.array([mean_distance(real[groups != g], groups[groups != g]) for g in range(5)])
    without_fake = np.array([pdist(np.delete(fake, i, axis=0)).mean() for i in range(12)])
    assert found.real.without.keys() == {"real"}
    assert found.fake.without.keys() == {"fake"}
    np.testing.assert_allclose(found.real.without["real"], without_real, rtol=1e-9)
    np.testing.assert_allclose(found.fake.without["fake"], without_fake, rtol=1e-9)
    np.testing.assert_allclose(found.ratio.without["real"], of_fake / without_real, rtol=1e-9)
    np.testing.assert_allclose(found.ratio.without["fake"], without_fake / of_real, rtol=1e-9)


def test_diversity_of_fakes_by_groups_leaves_pairs_within_groups_out():
    real, fake, groups = features(20), features(24, seed=1), np.arange(24) // 2
    assert diversity(real, fake, fake_groups=groups).fake.estimate == pytest.approx(mean_distance(fake, groups))


def test_diversity_falls_when_modes_are_lost_and_copies_in_a_group_change_nothing():
    centers = np.random.RandomState(3).randn(8, 6) * 5
    real, whole, collapsed = (centers[np.arange(400) % kept] + features(400, seed=seed)
                              for kept, seed in ((8, 1), (8, 2), (2, 2)))
    assert diversity(real, whole).ratio.estimate == pytest.approx(1, abs=0.03)
    assert diversity(real, collapsed).ratio.interval().high < 0.9
    once, twice = diversity(real, whole), diversity(np.tile(real, (2, 1)), whole, np.tile(np.arange(400), 2))
    assert twice.ratio.estimate == pytest.approx(once.ratio.estimate, rel=1e-9)
    assert twice.ratio.interval().low == pytest.approx(once.ratio.interval().low, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diversity_of_near_duplicates_far_from_zero_is_exact(dtype):
    fake = torch.from_numpy(features(60, mean=1000)).to(dtype)
    fake[1::2] = fake[::2] + 2.0**-10
    expected = pdist(fake.double().numpy())
    found = diversity(features(20), fake)
    # Squared distances are off by about 1e-15 of the squared distance to the mean.
    assert found.fake.estimate == pytest.approx(expected.mean(), rel=1e-9)
    same = diversity(features(20), torch.full([30, 6], 0.1, dtype=dtype))
    # The mean of equal values is off by their rounding.
    assert same.fake.estimate == pytest.approx(0, abs=1e-14)
    assert same.fake.interval().low == 0


def test_diversity_order_of_images_changes_nothing():
    real, fake, groups = features(300), features(200, seed=1), np.arange(300) // 3
    order = np.random.RandomState(1).permutation(300)
    found, mixed = diversity(real, fake, groups), diversity(real[order], fake[::-1], groups[order])
    assert mixed.ratio.interval().low == pytest.approx(found.ratio.interval().low, rel=1e-9)
    assert mixed.real.estimate == pytest.approx(found.real.estimate, rel=1e-9)


def test_diversity_of_equal_real_images_raises():
    with pytest.raises(TooFew, match=r"^the real images, or all but one group of them, have equal features; "
                                     r"expected different ones, for a diversity to compare with$"):
        diversity(np.ones([5, 3]), features(5, 3))


def test_diversity_of_two_groups_raises():
    with pytest.raises(TooFew, match=r"^there are 2 groups of real images; expected at least 3, for pairs of different "
                                     r"groups that remain without one of them$"):
        diversity(features(6), features(5), np.arange(6) % 2)


def test_diversity_tells_of_each_row():
    told = []
    diversity(features(150), features(20), on_rows=told.append)
    assert sum(told) == 170
