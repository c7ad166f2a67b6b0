"""The metrics say of features what they are meant to say."""

import numpy as np
import pytest

from metrics.frechet import FeatureStats, frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distance, kernel_distances
from metrics.precision_recall import precision_recall

NUM_FEATURES = 24


def modes(count, seed, num_modes=6, kept=None):
    """Return features around `kept` of `num_modes` centers, all where None, varying in two directions there."""
    random = np.random.RandomState(100)
    centers, directions = random.randn(num_modes, NUM_FEATURES) * 2, random.randn(2, NUM_FEATURES) * 0.3
    random = np.random.RandomState(seed)
    return centers[random.randint(kept or num_modes, size=count)] + random.randn(count, 2) @ directions


def frechet(real, fake, batch=None):
    a, b = FeatureStats.of(real), FeatureStats(fake.shape[1])
    batch = batch or len(fake)
    for start in range(0, len(fake), batch):
        b.add(fake[start:start + batch])
    return frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())


def test_fakes_of_the_same_kind_are_close_by_every_metric():
    real, fake = modes(800, seed=1), modes(800, seed=2)
    assert min(precision_recall(real, fake, 3)) > 0.85
    assert frechet(real, fake) < 0.01 * np.trace(np.cov(real, rowvar=False))


def test_mode_collapse_keeps_precision_and_loses_recall():
    real = modes(800, seed=1)
    whole, collapsed = (precision_recall(real, modes(800, seed=2, kept=kept), 3) for kept in (None, 1))
    assert collapsed.precision > 0.85
    assert collapsed.recall < 1 / 6 + 0.05  # one mode of six
    assert whole.recall > 0.85
    assert frechet(real, modes(800, seed=2, kept=1)) > 10 * frechet(real, modes(800, seed=2))


def test_invented_images_lose_precision_and_keep_recall():
    real = modes(800, seed=1, kept=3)
    found = precision_recall(real, modes(1600, seed=2), 3)
    assert found.precision == pytest.approx(0.5, abs=0.1)
    assert found.recall > 0.85


def test_noise_raises_frechet_distance_and_lowers_precision_monotonously():
    real, fake = modes(600, seed=1), modes(600, seed=2)
    noise = np.random.RandomState(3).randn(*fake.shape)
    noisy = [fake + level * noise for level in (0, 0.05, 0.1, 0.2, 2)]
    frechets = [frechet(real, x) for x in noisy]
    precisions = [precision_recall(real, x, 3).precision for x in noisy[:4]]
    assert frechets == sorted(set(frechets))
    without, much = (kernel_distance(real, x, 1, 600, seed=0) for x in (noisy[0], noisy[-1]))
    assert much > 10 * abs(without)
    assert precisions == sorted(set(precisions), reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_two_halves_of_a_set_have_a_kernel_distance_of_zero_within_its_spread(seed):
    shuffled = np.random.RandomState(seed).permutation(modes(1000, seed=1))
    found = kernel_distances(shuffled[:500], shuffled[500:], 50, 100, seed)
    assert abs(found.mean()) < found.std()
    apart = kernel_distances(modes(500, seed=2), modes(500, seed=3, kept=3), 50, 100, seed)
    assert apart.mean() > 3 * apart.std()


def test_kernel_distance_is_unbiased_and_frechet_distance_is_not():
    halves = [(modes(60, seed=2 * i), modes(60, seed=2 * i + 1)) for i in range(60)]
    kernels = np.array([kernel_distance(*half, 1, 60, seed=0) for half in halves])
    assert abs(kernels.mean()) < 3 * kernels.std() / np.sqrt(60)
    assert min(frechet(*half) for half in halves) > 0


def test_frechet_distance_batch_size_changes_nothing():
    real, fake = modes(500, seed=1), modes(500, seed=2)
    found = [frechet(real, fake, batch) for batch in (1, 7, 64, 500)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-11)


def test_image_order_changes_nothing():
    real, fake = modes(500, seed=1), modes(500, seed=2)
    random = np.random.RandomState(3)
    mixed = random.permutation(real), random.permutation(fake)
    assert precision_recall(*mixed, 3) == precision_recall(real, fake, 3)
    assert frechet(*mixed) == pytest.approx(frechet(real, fake), rel=1e-11)
    kernels = [kernel_distance(*sets, 1, 500, seed=0) for sets in (mixed, (real, fake))]
    assert kernels[0] == pytest.approx(kernels[1], rel=1e-9)


def test_inception_score_falls_with_doubt_and_with_unused_classes():
    def score(doubt, classes):
        sure = np.eye(10)[np.arange(1000) % classes]
        return inception_score((1 - doubt) * sure + doubt / 10).mean

    assert [score(0, 10), score(0, 5), score(0, 2)] == pytest.approx([10, 5, 2], rel=1e-9)
    assert score(0, 10) > score(0.2, 10) > score(0.6, 10) > score(1, 10) == pytest.approx(1)
