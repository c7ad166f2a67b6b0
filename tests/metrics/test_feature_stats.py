"""metrics.feature_stats: moments that do not depend on how the features arrive."""

import itertools
import warnings

import numpy as np
import pytest
import torch

from metrics.feature_stats import FeatureStats, as_feature_pair, as_features


def spread_features(count=600, num_features=7, mean=0.0, seed=0):
    random = np.random.RandomState(seed)
    return random.randn(count, num_features) @ random.randn(num_features, num_features) + mean


def assert_same(stats, features, rel=1e-12):
    assert stats.count == len(features)
    np.testing.assert_allclose(stats.mean, features.mean(axis=0), rtol=rel, atol=1e-13)
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(stats.covariance(ddof=1), expected, rtol=0, atol=rel * np.abs(expected).max())


def test_of_small_example_returns_known_moments():
    stats = FeatureStats.of(np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]]))
    assert stats.count == 3
    assert stats.mean.tolist() == [3, 4]
    np.testing.assert_allclose(stats.covariance(), [[8 / 3, 4], [4, 8]], rtol=1e-15)
    np.testing.assert_allclose(stats.covariance(ddof=1), [[4, 6], [6, 12]], rtol=1e-15)
    assert stats.mean.dtype == stats.covariance().dtype == np.float64


@pytest.mark.parametrize("mean", [0.0, 1e6, -1e6])
@pytest.mark.parametrize("pieces", [[600], [1, 599], [100] * 6, [1] * 600, [0, 300, 0, 300]])
def test_add_in_any_pieces_equals_direct_result(mean, pieces):
    features = spread_features(mean=mean)
    stats = FeatureStats(7)
    for start, length in zip(itertools.accumulate([0, *pieces]), pieces):
        stats.add(features[start:start + length])
    assert_same(stats, features)


@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("cuts", [[300], [1, 2, 3], [599], [50, 51, 400]])
def test_merge_of_any_partition_equals_direct_result(mean, cuts):
    features = spread_features(mean=mean)
    parts = [FeatureStats.of(part) for part in np.split(features, cuts)]
    forward, backward = parts[0], parts[-1]
    for part in parts[1:]:
        forward = forward.merge(part)
    for part in parts[-2::-1]:
        backward = part.merge(backward)
    assert_same(forward, features)
    assert_same(backward, features)


def test_merge_parts_of_far_apart_means_equals_direct_result():
    a, b = spread_features(mean=-1e6, seed=1), spread_features(200, mean=1e6, seed=2)
    assert_same(FeatureStats.of(a).merge(FeatureStats.of(b)), np.concatenate([a, b]))


def test_merge_leaves_both_parts_alone():
    a, b = spread_features(50, seed=1), spread_features(70, seed=2)
    left, right = FeatureStats.of(a), FeatureStats.of(b)
    both = left.merge(right)
    both.add(a)
    assert_same(left, a)
    assert_same(right, b)


def test_merge_with_empty_changes_nothing():
    features = spread_features(40)
    assert_same(FeatureStats(7).merge(FeatureStats.of(features)), features, rel=1e-15)
    assert_same(FeatureStats.of(features).merge(FeatureStats(7)), features, rel=1e-15)


def test_of_equal_large_features_has_no_spread():
    stats = FeatureStats.of(np.full([5000, 3], 123456.789, dtype=np.float32))
    assert not stats.covariance().any()
    assert stats.mean.tolist() == [float(np.float32(123456.789))] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_of_narrow_tensors_is_computed_in_float64(dtype):
    features = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same(FeatureStats.of(features.requires_grad_()), features.detach().double().numpy())


def test_results_are_copies():
    stats = FeatureStats.of(spread_features(20))
    before = stats.mean.copy(), stats.covariance()
    stats.mean[:] = 0
    stats.covariance()[:] = 0
    np.testing.assert_array_equal(stats.mean, before[0])
    np.testing.assert_array_equal(stats.covariance(), before[1])


def test_moments_of_too_few_features_raise():
    with pytest.raises(ValueError, match=r"^there are 0 features; expected at least 1$"):
        FeatureStats(3).mean  # noqa: B018
    with pytest.raises(ValueError, match=r"^there are 1 features; expected at least 2$"):
        FeatureStats.of(np.ones([1, 3])).covariance(ddof=1)


def test_add_other_width_raises():
    with pytest.raises(ValueError, match=r"^features have 4 dimensions; expected 3 like those before$"):
        FeatureStats(3).add(np.ones([2, 4]))
    with pytest.raises(ValueError, match=r"^features have 4 dimensions; expected 3 like those before$"):
        FeatureStats(3).merge(FeatureStats(4))


@pytest.mark.parametrize(("features", "message"), [
    (np.ones(3), r"^real features are \[3\]; expected \[N, F\]$"),
    (np.ones([3, 0]), r"^real features are \[3, 0\]; expected \[N, F\]$"),
    (np.ones([3, 2], dtype=np.int64), r"^real features are torch.int64; expected floating point$"),
    (np.ones([3, 2]), r"^real features are of 3 images; expected at least 4$"),
    (np.array([[1, np.nan]] * 4 + [[np.inf, 1]]),
     r"^real features have 5 values that are not finite, of 10; expected none$"),
])
def test_as_features_of_another_kind_raises(features, message):
    with pytest.raises(ValueError, match=message):
        as_features(features, "real features", at_least=4)


def test_as_features_read_only_array_shares_memory_without_warning():
    features = np.ones([3, 2], dtype=np.float32)
    features.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = as_features(features)
    assert found.data_ptr() == features.ctypes.data


def test_as_features_reversed_view_keeps_values():
    features = spread_features(5)
    np.testing.assert_array_equal(as_features(features[::-1]).numpy(), features[::-1])


def test_as_feature_pair_of_two_detectors_raises():
    with pytest.raises(ValueError, match=r"^real features have 2 dimensions, fake ones 3; expected as many: "
                                         r"take both from one detector$"):
        as_feature_pair(np.ones([4, 2]), np.ones([4, 3]), at_least=1)
