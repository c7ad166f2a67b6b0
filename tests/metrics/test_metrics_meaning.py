"""The metrics say of features what they are meant to say."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from imagesets.phantoms.make import render_phantom
from metrics.authenticity import authenticity
from metrics.detectors.registry import open_detector
from metrics.diversity import diversity
from metrics.frechet import FeatureStats, frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distance, kernel_distances, kernel_jackknife
from metrics.precision_recall import neighborhoods, precision_recall

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


def test_dropped_modes_lower_recall_and_coverage_while_precision_and_density_rise():
    # Few images: 20 of each mode; those of one mode alone lie in more of its neighborhoods.
    real = modes(120, seed=1)
    whole, dropped = (neighborhoods(real, modes(120, seed=2, kept=kept), [5])[5] for kept in (None, 3))
    assert dropped.recall < 0.6 < 0.8 < whole.recall  # three modes of six are left
    assert dropped.coverage < 0.6 < 0.8 < whole.coverage
    assert dropped.precision >= whole.precision
    assert dropped.density > whole.density


def test_copies_leave_the_kernel_distance_alone_and_lower_authpct_and_ct():
    random = np.random.RandomState(0)
    train, fresh, heldout = (random.randn(count, NUM_FEATURES) for count in (900, 400, 300))
    copies = train[:400] + 0.01 * random.randn(400, NUM_FEATURES)
    of_fresh, of_copies, of_shifted = (kernel_jackknife(train, fakes).estimate
                                       for fakes in (fresh, copies, fresh + 0.2))
    # Copies are in pairs with their originals, one of 900 for each, and the kernel is 8 there and 1 elsewhere.
    assert of_copies == pytest.approx(-2 * 7 / 900, rel=0.2)
    assert max(abs(of_fresh), abs(of_copies)) < of_shifted / 5
    new, copied = (authenticity(train, fakes, heldout=heldout) for fakes in (fresh, copies))
    assert copied.authpct.interval().high < 5 < 50 < new.authpct.interval().low
    assert copied.ct.interval().high < -5 < -3 < new.ct.estimate < 3  # z-scores


def test_blur_raises_the_kernel_distance():
    pixels = torch.stack([torch.from_numpy(render_phantom(5, index, resolution=32)[0]).permute(2, 0, 1)
                          for index in range(160)])
    detector = open_detector("random-conv", device="cpu")
    real, others = detector(pixels[:80]), pixels[80:].float()
    found = [kernel_jackknife(real, detector(nn.functional.avg_pool2d(
        others, size, 1, size // 2, count_include_pad=False).round().byte())) for size in (1, 3, 5, 9)]
    assert found[0].interval().low < 0
    for less, more in pairwise(found):
        assert more.estimate > less.estimate + 0.02  # noise of this size is left without any blur
    assert found[-1].minus(found[0], paired=("real", "fake")).interval().low > 0


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


def test_images_that_are_there_twice_in_their_group_do_not_narrow_intervals():
    random = np.random.RandomState(0)
    groups = np.repeat(np.arange(40), 3)
    real, fake = random.randn(40, 6)[groups] + random.randn(120, 6), random.randn(150, 6)
    twice, groups_twice = np.concatenate([real, real]), np.concatenate([groups, groups])
    once, both = ({"kid": kernel_jackknife(some, fake, numbers), "diversity": diversity(some, fake, numbers).ratio,
                   **neighborhoods(some, fake, [3], real_groups=numbers, jackknife=True)[3].jackknives}
                  for some, numbers in ((real, groups), (twice, groups_twice)))
    for name in ("kid", "diversity", "recall"):
        jackknife = once[name]
        assert both[name].estimate == pytest.approx(jackknife.estimate, rel=1e-9)
        assert both[name].interval().std_error == pytest.approx(jackknife.interval().std_error, rel=1e-9)
    # With every image twice, the third nearest other is the nearest of another image: values are those of k = 1.
    near = neighborhoods(real, fake, [1], real_groups=groups, jackknife=True)[1].jackknives
    for name, scale in (("precision", 1), ("density", 2 / 3), ("coverage", 1)):
        assert both[name].estimate == pytest.approx(scale * near[name].estimate, rel=1e-9)
        # 21 nearest others are 10 of those that are there twice, and 15 without copies: for the rare longer searches.
        error, errors = near[name].interval().std_error, both[name].interval().std_error
        assert errors == pytest.approx(scale * error, rel=0.03)
        assert error > 0


def test_images_that_are_there_twice_in_other_groups_count_as_new_ones():
    # What unknown copies do, and why sets should be checked for them.
    real, fake = np.random.RandomState(0).randn(2, 100, 6)
    once, twice = (kernel_jackknife(some, fake).variances()["real"] for some in (real, np.concatenate([real, real])))
    assert twice == pytest.approx(once / 2, rel=0.1)  # also pairs of copies count as pairs of different images


def test_image_order_changes_no_value_and_intervals_by_how_halves_are_dealt():
    real, fake, groups = modes(240, seed=1), modes(200, seed=2), np.arange(240) // 4
    order, other = np.random.RandomState(3).permutation(240), np.random.RandomState(4).permutation(200)
    plain, mixed = (({"kid": kernel_jackknife(a, b, numbers), "diversity": diversity(a, b, numbers).ratio},
                     {**neighborhoods(a, b, [5], real_groups=numbers, jackknife=True)[5].jackknives,
                      "authpct": authenticity(a, b, numbers).authpct})
                    for a, b, numbers in ((real, fake, groups), (real[order], fake[other], groups[order])))
    for name, jackknife in plain[0].items():
        ends, others = ([found.interval().low, found.interval().high] for found in (jackknife, mixed[0][name]))
        assert ends == pytest.approx(others, rel=1e-9)
    for name, jackknife in plain[1].items():
        assert jackknife.estimate == pytest.approx(mixed[1][name].estimate, rel=1e-12)
        # A standard error from 64 splits is known within 9 %, the ratio of two within 12 %: four times that.
        assert jackknife.interval().std_error == pytest.approx(mixed[1][name].interval().std_error, rel=0.5)


def test_inception_score_falls_with_doubt_and_with_unused_classes():
    def score(doubt, classes):
        sure = np.eye(10)[np.arange(1000) % classes]
        return inception_score((1 - doubt) * sure + doubt / 10).mean

    assert [score(0, 10), score(0, 5), score(0, 2)] == pytest.approx([10, 5, 2], rel=1e-9)
    assert score(0, 10) > score(0.2, 10) > score(0.6, 10) > score(1, 10) == pytest.approx(1)
