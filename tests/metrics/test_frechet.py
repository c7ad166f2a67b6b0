"""metrics.frechet: closed forms, singular covariances, moments however the features arrive, and the extrapolation."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics.frechet import BLOCKS, FeatureStats, frechet_distance, frechet_jackknife
from metrics.intervals import TooFew


def gaussian(num_features, seed, count=None):
    """Return mean and covariance of random features with unequal spreads."""
    random = np.random.RandomState(seed)
    count = count or 4 * num_features
    stats = FeatureStats.of(random.randn(count, num_features) * random.uniform(0.1, 3, num_features) + random.rand())
    return stats.mean, stats.covariance()


def rotation(num_features, seed):
    return np.linalg.qr(np.random.RandomState(seed).randn(num_features, num_features))[0]


@pytest.mark.parametrize("num_features", [1, 2, 50, 200])
@pytest.mark.parametrize("rotated", [False, True])
def test_frechet_distance_commuting_covariances_equals_closed_form(num_features, rotated):
    random = np.random.RandomState(num_features)
    mu1, mu2 = random.randn(2, num_features)
    spread1, spread2 = 10 ** random.uniform(-3, 1, [2, num_features])  # standard deviations
    q = rotation(num_features, 1) if rotated else np.eye(num_features)
    found = frechet_distance(mu1, q * spread1**2 @ q.T, mu2, q * spread2**2 @ q.T)
    expected = ((mu1 - mu2) ** 2).sum() + ((spread1 - spread2) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_features", [3, 64, 150])
def test_frechet_distance_full_rank_equals_matrix_square_root(num_features):
    (mu1, cov1), (mu2, cov2) = gaussian(num_features, 1), gaussian(num_features, 2)
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_symmetric():
    one, two = gaussian(60, 1), gaussian(60, 2, count=30)
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-12)


def test_frechet_distance_does_not_depend_on_rotation_and_scales_with_the_square():
    (mu1, cov1), (mu2, cov2) = gaussian(40, 1), gaussian(40, 2)
    q = 3 * rotation(40, 3)
    found = frechet_distance(q @ mu1, q @ cov1 @ q.T, q @ mu2, q @ cov2 @ q.T)
    assert found == pytest.approx(9 * frechet_distance(mu1, cov1, mu2, cov2), rel=1e-11)


@pytest.mark.parametrize("count", [2, 10, 99, 100, 101, 400])
def test_frechet_distance_to_itself_is_zero_up_to_rounding(count):
    mu, cov = gaussian(100, 1, count=count)
    assert 0 <= frechet_distance(mu, cov, mu, cov) <= 1e-12 * np.trace(cov)


@pytest.mark.parametrize(("count1", "count2"), [(10, 10), (10, 300), (60, 80), (2, 2), (101, 100)])
def test_frechet_distance_fewer_images_than_features_equals_that_of_centered_features(count1, count2):
    random = np.random.RandomState(0)
    x, y = random.randn(count1, 100), random.randn(count2, 100) * 1.5 + 0.1
    a, b = FeatureStats.of(x), FeatureStats.of(y)
    x, y = (x - a.mean) / np.sqrt(count1), (y - b.mean) / np.sqrt(count2)
    roots = np.linalg.svd(x @ y.T, compute_uv=False)  # tr (cov1 cov2)^(1/2) without forming a covariance
    expected = ((a.mean - b.mean) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * roots.sum()
    found = frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_orthogonal_supports_adds_the_traces():
    cov1, cov2 = np.diag([1.0, 2, 0, 0]), np.diag([0, 0, 3.0, 4])
    assert frechet_distance(np.zeros(4), cov1, np.ones(4), cov2) == pytest.approx(4 + 10, rel=1e-15)


@pytest.mark.parametrize("seed", range(8))
def test_frechet_distance_rotated_orthogonal_supports_adds_the_traces(seed):
    # In some of these a Cholesky factor exists by rounding, and would add its root of 1e-16.
    q = rotation(8, seed)
    cov1, cov2 = (q * np.array(values) @ q.T for values in ([1] * 7 + [0], [0] * 7 + [1]))
    assert frechet_distance(np.zeros(8), cov1, np.zeros(8), cov2) == pytest.approx(8, rel=1e-12)


def test_frechet_distance_of_points_is_their_squared_distance():
    assert frechet_distance(np.zeros(2), np.zeros([2, 2]), np.array([3.0, 4]), np.zeros([2, 2])) == 25


def test_frechet_distance_feature_that_never_varies_adds_nothing():
    (mu1, cov1), (mu2, cov2) = gaussian(20, 1), gaussian(20, 2)
    wider = [np.pad(mu1, (0, 1), constant_values=5), np.pad(cov1, (0, 1)),
             np.pad(mu2, (0, 1), constant_values=5), np.pad(cov2, (0, 1))]
    assert frechet_distance(*wider) == pytest.approx(frechet_distance(mu1, cov1, mu2, cov2), rel=1e-11)


def test_frechet_distance_batches_of_a_singular_set_change_nothing():
    random = np.random.RandomState(0)
    x, y = random.randn(50, 120), random.randn(70, 120)
    found = []
    for batch in (1, 7, 50):
        stats = FeatureStats(120)
        for start in range(0, 50, batch):
            stats.add(x[start:start + batch])
        other = FeatureStats.of(y)
        found.append(frechet_distance(stats.mean, stats.covariance(), other.mean, other.covariance()))
    assert found == pytest.approx([found[0]] * 3, rel=1e-11)


@pytest.mark.parametrize(("arguments", "message"), [
    ((np.ones([2, 1]), np.eye(2), np.ones(2), np.eye(2)), r"^mu1 is \[2, 1\]; expected \[F\]$"),
    ((np.ones(2), np.eye(2), np.ones(2), np.eye(3)), r"^cov2 is \[3, 3\]; expected \[2, 2\] like mu2$"),
    ((np.ones(2), np.eye(2), np.ones(3), np.eye(3)),
     r"^mu1 has 2 dimensions, mu2 3; expected equal numbers: use one detector$"),
    ((np.ones(2), np.eye(2) * np.nan, np.ones(2), np.eye(2)),
     r"^mu1 or cov1 has values that are not finite; expected none$"),
    ((np.ones(2), np.eye(2), np.ones(2), np.array([[1, 0.5], [0, 1]])),
     r"^cov2 is not symmetric; expected a covariance$"),
    ((np.ones(2), np.diag([2.0, -1]), np.ones(2), np.eye(2)),
     r"^cov1 has the eigenvalue -1 beside 2; expected none below 0$"),
])
def test_frechet_distance_of_no_gaussian_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


def spread_features(count=600, num_features=7, mean=0.0, seed=0):
    random = np.random.RandomState(seed)
    return random.randn(count, num_features) @ random.randn(num_features, num_features) + mean


def assert_same(stats, features, rel=1e-12):
    assert stats.count == len(features)
    np.testing.assert_allclose(stats.mean, features.mean(axis=0), rtol=rel, atol=1e-13)
    expected = np.cov(features, rowvar=False, ddof=0)
    np.testing.assert_allclose(stats.covariance(), expected, rtol=0, atol=rel * np.abs(expected).max())


def test_of_small_example_returns_known_moments():
    stats = FeatureStats.of(np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]]))
    assert stats.count == 3
    assert stats.mean.tolist() == [3, 4]
    np.testing.assert_allclose(stats.covariance(), [[8 / 3, 4], [4, 8]], rtol=1e-15)
    assert stats.mean.dtype == stats.covariance().dtype == np.float64


@pytest.mark.parametrize("mean", [0.0, 1e6, -1e6])
@pytest.mark.parametrize("pieces", [[600], [1, 599], [100] * 6, [1] * 600, [0, 300, 0, 300]])
def test_add_in_any_pieces_equals_direct_result(mean, pieces):
    features = spread_features(mean=mean)
    stats = FeatureStats(7)
    for start, length in zip(itertools.accumulate([0, *pieces]), pieces):
        stats.add(features[start:start + length])
    assert_same(stats, features)


def test_add_features_of_a_far_apart_mean_equals_direct_result():
    a, b = spread_features(mean=-1e6, seed=1), spread_features(200, mean=1e6, seed=2)
    stats = FeatureStats.of(a)
    stats.add(b)
    assert_same(stats, np.concatenate([a, b]))


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
    with pytest.raises(ValueError, match=r"^there are 0 features; expected at least 1$"):
        FeatureStats(3).covariance()


def test_add_other_width_raises():
    with pytest.raises(ValueError, match=r"^features have 4 dimensions; expected 3 like those before$"):
        FeatureStats(3).add(np.ones([2, 4]))


@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("part", [slice(0, 1), slice(100, 400), slice(50, 600)])
def test_without_a_part_equals_the_rest(mean, part):
    features = spread_features(mean=mean)
    whole, removed = FeatureStats.of(features), FeatureStats.of(features[part])
    # The rest is the difference of sums that are up to 12 times as large.
    assert_same(whole.without(removed), np.delete(features, part, axis=0), rel=1e-11)
    assert_same(whole, features)
    assert_same(removed, features[part])


def test_without_all_raises():
    stats = FeatureStats.of(np.ones([4, 3]))
    with pytest.raises(ValueError, match=r"^the part has 4 of 4 features; expected fewer$"):
        stats.without(stats)
    with pytest.raises(ValueError, match=r"^features have 2 dimensions; expected 3 like those before$"):
        stats.without(FeatureStats(2))


PARTS = [(100, -1e3, 1), (1000, 5.0, 2), (13, 400.0, 3)]  # number, mean and seed of features


@pytest.mark.parametrize("from_moments", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_merge_of_parts_equals_statistics_of_all(order, from_moments):
    features = [spread_features(count, mean=mean, seed=seed) for count, mean, seed in PARTS]
    parts = [FeatureStats.of(part) for part in features]
    if from_moments:
        parts = [FeatureStats.of_moments(part.count, part.mean, part.covariance()) for part in parts]
    merged = FeatureStats(7)
    for index in order:
        merged.merge(parts[index])
    assert_same(merged, np.concatenate([features[index] for index in order]))
    for part, alone in zip(parts, features):
        assert_same(part, alone)


def test_merge_of_parts_gives_the_distance_of_all():
    features = [spread_features(count, mean=mean, seed=seed) for count, mean, seed in PARTS]
    merged, all_, other = FeatureStats(7), FeatureStats.of(np.concatenate(features)), gaussian(7, 4)
    for part in features:
        merged.merge(FeatureStats.of(part))
    found, expected = (frechet_distance(stats.mean, stats.covariance(), *other) for stats in (merged, all_))
    assert found == pytest.approx(expected, rel=1e-12)


def test_merge_takes_up_what_is_added_before_and_after():
    features = spread_features(30)
    merged = FeatureStats.of(features[:10])
    merged.merge(FeatureStats(7))
    merged.merge(FeatureStats.of(features[10:25]))
    merged.add(features[25:])
    assert_same(merged, features)
    with pytest.raises(ValueError, match=r"^features have 2 dimensions; expected 7 like those before$"):
        merged.merge(FeatureStats(2))


def test_of_moments_keeps_them():
    stats = FeatureStats.of(spread_features(20, mean=1e3))
    again = FeatureStats.of_moments(20, stats.mean, stats.covariance())
    assert again.count == 20
    np.testing.assert_array_equal(again.mean, stats.mean)
    np.testing.assert_allclose(again.covariance(), stats.covariance(), rtol=1e-15)


@pytest.mark.parametrize("covariance", [np.zeros([2, 2]), np.ones([2, 2]), np.diag([1.0, 0])])
def test_of_moments_takes_singular_covariances(covariance):
    np.testing.assert_array_equal(FeatureStats.of_moments(3, np.ones(2), covariance).covariance(), covariance)


@pytest.mark.parametrize(("count", "mean", "covariance", "message"), [
    (0, np.ones(2), np.eye(2), r"^the count is 0; expected at least 1$"),
    (3, np.ones([2, 1]), np.eye(2), r"^the mean is \[2, 1\]; expected \[F\]$"),
    (3, np.ones(2), np.eye(3), r"^the covariance is \[3, 3\]; expected \[2, 2\] like the mean$"),
    (3, np.ones(2), np.diag([1, np.inf]),
     r"^the mean or the covariance has values that are not finite; expected none$"),
    (3, np.ones(2), np.triu(np.ones([2, 2])), r"^the covariance is not symmetric; expected a covariance$"),
    (3, np.ones(2), np.diag([1, -1e-3]), r"^the covariance has eigenvalues below 0; expected none$"),
    (3, np.ones(2), 1 - np.eye(2), r"^the covariance has eigenvalues below 0; expected none$"),
])
def test_of_moments_of_no_features_raises(count, mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        FeatureStats.of_moments(count, mean, covariance)


def clusters(num_groups, size, num_features, seed=0):
    """Return correlated features of `num_groups` groups of `size` images, and their groups."""
    random = np.random.RandomState(seed)
    groups = np.repeat(np.arange(num_groups), size)
    return random.randn(num_groups, num_features)[groups] + random.randn(len(groups), num_features), groups


def test_frechet_jackknife_to_a_point_is_the_unbiased_estimate():
    # With one feature and no spread of the fakes the distance is (mean - point)^2 + variance, whose estimates without
    # bias are known. 12 images are 12 blocks, whichever way they are dealt.
    real = np.random.RandomState(0).randn(BLOCKS, 1) + 2
    found = frechet_jackknife(real, np.full([BLOCKS, 1], 0.5))
    variance = real.var(ddof=1)
    assert found.estimate == pytest.approx((real.mean() - 0.5) ** 2 - variance / BLOCKS + variance, rel=1e-12)
    squares = np.square(real - 0.5).ravel()  # their mean is the estimate, up to the term in 1 / n
    assert found.interval().std_error == pytest.approx(math.sqrt(squares.var(ddof=1) / BLOCKS), rel=1e-12)
    assert found.without["blocks"].mean() == pytest.approx(found.estimate, rel=1e-12)


def test_frechet_jackknife_states_what_it_leaves_out():
    real, groups = clusters(50, 2, 3)
    interval = frechet_jackknife(real, clusters(80, 1, 3, seed=1)[0], groups).interval()
    assert interval.num_units == {"blocks": BLOCKS, "real": 50, "fake": 80}
    assert interval.unit == "block"
    assert interval.method == "extrapolation to infinitely many images, jackknife over blocks of groups"


def test_frechet_jackknife_does_not_depend_on_rotation_and_scales_with_the_square():
    real, groups = clusters(60, 3, 5)
    fake = np.random.RandomState(1).randn(90, 5) * 2
    once = frechet_jackknife(real, fake, groups).interval()
    q = 3 * rotation(5, 2)
    found = frechet_jackknife(real @ q + 7, fake @ q + 7, groups).interval()
    assert (found.estimate, found.std_error) == pytest.approx((9 * once.estimate, 9 * once.std_error), rel=1e-9)


def test_frechet_jackknife_groups_of_one_equal_none():
    real, fake = clusters(80, 1, 4)[0], clusters(70, 1, 4, seed=1)[0] * 1.5
    found = frechet_jackknife(real, fake, np.arange(80)[::-1], np.arange(70) + 5)
    assert found.interval() == frechet_jackknife(real, fake).interval()


def test_frechet_jackknife_duplicates_in_their_group_change_nothing():
    (real, groups), fake = clusters(120, 1, 4), clusters(200, 1, 4, seed=1)[0] * 1.5
    once = frechet_jackknife(real, fake, groups).interval()
    four_times = frechet_jackknife(np.tile(real, [4, 1]), fake, np.tile(groups, 4)).interval()
    assert four_times.estimate == pytest.approx(once.estimate, rel=1e-10)
    assert (four_times.low, four_times.high) == pytest.approx((once.low, once.high), rel=1e-10)
    # For independent images they would count, and the bias that is taken off would be too small.
    assert frechet_jackknife(np.tile(real, [4, 1]), fake).estimate > once.estimate


def test_frechet_jackknife_narrow_types_and_tensors_give_the_same():
    real, fake = clusters(80, 1, 4)[0].astype(np.float32), clusters(90, 1, 4, seed=1)[0].astype(np.float32)
    found = frechet_jackknife(torch.from_numpy(real), fake.astype(np.float64))
    assert found.estimate == pytest.approx(frechet_jackknife(real, fake).estimate, rel=1e-12)


def test_frechet_jackknife_is_determined_by_its_seed():
    real, fake = clusters(80, 1, 4)[0], clusters(90, 1, 4, seed=1)[0]
    first, second, other = (frechet_jackknife(real, fake, seed=seed).estimate for seed in (0, 0, 1))
    assert first == second != other


def test_frechet_jackknife_deals_the_reals_alike_whatever_the_fakes():
    # The reals' part of the error cancels between two sets of fakes: here all of it, as the fakes do not vary.
    real = clusters(96, 1, 1)[0]
    two, three = (frechet_jackknife(real, np.full([count, 1], 2.0), seed=3) for count in (12, 90))
    assert two.minus(three).interval().std_error < 1e-12


def test_frechet_jackknife_few_groups_are_as_many_blocks():
    (real, groups), steps = clusters(3, 40, 2), []
    found = frechet_jackknife(real, clusters(80, 1, 2, seed=1)[0], groups, on_step=steps.append)
    assert found.num_units == {"blocks": 3, "real": 3, "fake": 80}
    assert steps == [1] * 4


@pytest.mark.parametrize(("num_real", "num_fake", "num_features", "groups", "message"), [
    (1001, 1280, 128, None, r"^there are 1,001 images; an interval needs at least 10 for each of the 128 dimensions of "
                            r"the features \(1,280\)$"),
    (1280, 1279, 128, None, r"^there are 1,279 images; an interval needs at least 10 for each of the 128 dimensions of "
                            r"the features \(1,280\)$"),
    (20, 50, 2, np.zeros(20, dtype=np.int64), r"^there are 1 groups of real and 50 of fake images; an interval needs "
                                              r"at least 2 of each$")])
def test_frechet_jackknife_of_too_few_raises(num_real, num_fake, num_features, groups, message):
    with pytest.raises(TooFew, match=message):
        frechet_jackknife(np.ones([num_real, num_features]), np.ones([num_fake, num_features]), groups)


def test_frechet_jackknife_of_other_groups_raises():
    with pytest.raises(ValueError, match=r"^there are 3 groups of 50 images; expected one for each image$"):
        frechet_jackknife(np.ones([50, 2]), np.ones([50, 2]), fake_groups=np.arange(3))
