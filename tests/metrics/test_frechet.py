"""metrics.frechet: closed forms, other ways to compute the same, and singular covariances."""

import numpy as np
import pytest
import scipy.linalg

from metrics.feature_stats import FeatureStats
from metrics.frechet import frechet_distance


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
def test_frechet_distance_fewer_images_than_features_equals_that_of_centred_features(count1, count2):
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
     r"^mu1 has 2 dimensions, mu2 3; expected as many: use one detector$"),
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
