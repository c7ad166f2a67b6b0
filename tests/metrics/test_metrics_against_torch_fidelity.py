"""The metrics give what torch-fidelity gives for the same features, and where they differ it is known why."""

import numpy as np
import pytest
import torch

from metrics.frechet import FeatureStats, frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distances
from metrics.precision_recall import precision_recall


def features(count, seed, num_features=48, shift=0.0):
    """Return float64 features like a detector's: correlated, never negative, many of them 0."""
    random = np.random.RandomState(99)
    mix = random.randn(num_features, num_features) / np.sqrt(num_features)
    return torch.from_numpy(np.maximum(np.random.RandomState(seed).randn(count, num_features) @ mix + shift, 0))


@pytest.mark.parametrize("num_fakes", [300, 200])
def test_frechet_distance_with_unbiased_covariances_equals_torch_fidelity(num_fakes):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    real, fake = features(300, seed=1), features(num_fakes, seed=2, shift=0.2)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(real), fid_features_to_statistics(fake), False)
    a, b = FeatureStats.of(real), FeatureStats.of(fake)
    unbiased = [each.covariance() * each.count / (each.count - 1) for each in (a, b)]
    found = frechet_distance(a.mean, unbiased[0], b.mean, unbiased[1])
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)
    biased = frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())
    assert biased != pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize(("subsets", "size"), [(1, 120), (20, 50), (2, 50)])
def test_kernel_distances_equal_torch_fidelity_with_the_same_draws(subsets, size):
    from torch_fidelity.metric_kid import kid_features_to_metric
    real, fake = features(130, seed=1), features(120, seed=2, shift=0.1)
    # It draws from its first input first, as we do from the real images; the distance itself is symmetric.
    theirs = kid_features_to_metric(real, fake, kid_subsets=subsets, kid_subset_size=size, rng_seed=2020, verbose=False)
    found = kernel_distances(real, fake, subsets, size, seed=2020)
    assert found.mean() == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert found.std() == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("save_cpu_ram", [False, True])
def test_precision_recall_equals_torch_fidelity(k, save_cpu_ram):
    from torch_fidelity.metric_prc import prc_features_to_metric
    real, fake = features(400, seed=1), features(300, seed=2, shift=0.1)
    theirs = prc_features_to_metric(fake, real, prc_neighborhood=k, prc_batch_size=128, save_cpu_ram=save_cpu_ram,
                                    verbose=False)
    found = precision_recall(real, fake, k)
    # Its means are float32.
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert 0.05 < found.recall < 0.95


@pytest.mark.parametrize("count", [500, 507])
def test_inception_score_of_unshuffled_images_equals_torch_fidelity(count):
    from torch_fidelity.metric_isc import isc_features_to_metric
    logits = features(count, seed=1) * 4
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    found = inception_score(logits.softmax(dim=1), splits=10)
    assert found.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert found.std == pytest.approx(theirs["inception_score_std"], rel=1e-9)
