"""metrics.precision_recall: precision and recall against brute force in float64, ties and duplicates included."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from metrics import distances as module
from metrics.precision_recall import PrecisionRecall, precision_recall


def brute_force(real, fake, k):
    """Return precision and recall as the definition reads."""
    real, fake = (np.asarray(x, dtype=np.float64) for x in (real, fake))

    def share_inside(points, centers):
        radii = np.sort(cdist(centers, centers, "sqeuclidean"))[:, k]  # [:, 0] is the image itself
        return (cdist(points, centers, "sqeuclidean") <= radii).any(axis=1).mean()

    return share_inside(fake, real), share_inside(real, fake)


def gaussians(num_real, num_fake, num_features, seed=0, shift=0.0, spread=1.0):
    """Return features that vary in two directions, and a little in all: neither inside nor outside by their number."""
    random = np.random.RandomState(seed)
    directions = random.randn(2, num_features)

    def draw(count):
        return random.randn(count, 2) @ directions + 0.02 * random.randn(count, num_features)

    return draw(num_real), draw(num_fake) * spread + shift * directions[0]


@pytest.fixture(params=[13, 2048])
def block(request, monkeypatch):
    """Blocks that cut the sets into many pieces, and blocks that hold them whole."""
    monkeypatch.setattr(module, "_BLOCK", request.param)
    monkeypatch.setattr(module, "_EXACT_VALUES", 50 * request.param)
    return request.param


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize(("shape", "dtype"), [
    ((60, 80, 2), np.float64), ((80, 60, 30), np.float32), ((90, 70, 300), np.float32), ((30, 90, 5), np.float16),
])
@pytest.mark.usefixtures("block")
def test_precision_recall_random_features_equals_brute_force(shape, dtype, k):
    real, fake = (x.astype(dtype) for x in gaussians(*shape, shift=2, spread=0.9))
    found = precision_recall(real, fake, k)
    assert isinstance(found, PrecisionRecall)
    assert found == pytest.approx(brute_force(real, fake, k), abs=1e-12)
    assert min(found) > 0
    assert min(found) < 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.usefixtures("block")
def test_precision_recall_grid_full_of_ties_equals_brute_force(seed):
    random = np.random.RandomState(seed)
    real, fake = random.randint(0, 9, [60, 2]) * 1.0, random.randint(0, 12, [50, 2]) * 1.0
    far = 1e4  # whole numbers: differences are exact there as well, |a|^2 + |b|^2 - 2 a.b in float32 is not
    expected = brute_force(real, fake, 3)
    assert precision_recall(real, fake, 3) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(real + far, fake + far, 3) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("copies", [2, 3, 4, 5])
@pytest.mark.usefixtures("block")
def test_precision_recall_duplicates_are_neighbors_at_distance_zero(copies):
    real, fake = gaussians(12, 15, 40)
    real = np.repeat(real, copies, axis=0)  # 4 copies have 3 neighbors at 0: their neighborhood is a point
    fake = np.concatenate([fake * 0.9, real[:5], real[:1]])
    found = precision_recall(real, fake, 3)
    assert found == pytest.approx(brute_force(real, fake, 3), abs=1e-12)
    if copies > 3:
        assert found.precision == pytest.approx(6 / 21)  # the copies and nothing else


@pytest.mark.usefixtures("block")
def test_precision_recall_equal_sets_are_inside_each_other():
    real, _ = gaussians(50, 1, 600)
    real = (real * 1e-4 + 1e3).astype(np.float32)  # where products in float32 see no difference at all
    assert precision_recall(real, real[::-1], 3) == (1, 1)


@pytest.mark.parametrize("direction", [0, 1])
def test_precision_recall_image_at_the_radius_is_inside_just_beyond_is_not(direction):
    # The 1st neighbors are at 1; a fake at distance 1 of the last real is inside, the next number is not.
    real = np.zeros([3, 50])
    real[:, 0] = [0, 1, 2]
    fake = np.full([2, 50], 1e3)
    fake[0] = [np.nextafter(3, 3 + direction)] + [0] * 49
    assert precision_recall(real, fake, 1).precision == (0 if direction else 0.5)


@pytest.mark.usefixtures("block")
def test_precision_recall_near_duplicates_equal_brute_force():
    random = np.random.RandomState(0)
    modes = random.randn(4, 100) * 10
    real = np.repeat(modes, 15, axis=0) + random.randn(60, 100) * 1e-7
    fake = np.repeat(modes, 10, axis=0) + random.randn(40, 100) * 1.01e-7
    expected = brute_force(real, fake, 3)
    assert precision_recall(real, fake, 3) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected[0] < 1


@pytest.mark.usefixtures("block")
def test_precision_recall_constant_sets():
    one, other = np.ones([9, 4]), np.full([9, 4], 2.0)
    assert precision_recall(one, one, 3) == (1, 1)
    assert precision_recall(one, other, 3) == (0, 0)


def test_precision_recall_order_and_scale_change_nothing():
    real, fake = gaussians(300, 200, 20, shift=0.4)
    found = precision_recall(real, fake, 3)
    random = np.random.RandomState(1)
    assert precision_recall(random.permutation(real), random.permutation(fake), 3) == found
    assert precision_recall(real * 2**30, fake * 2**30, 3) == found
    assert precision_recall(torch.from_numpy(real), torch.from_numpy(fake).requires_grad_(), 3) == found


def test_precision_recall_swapped_sets_swap_the_results():
    real, fake = gaussians(100, 150, 10, shift=0.5, spread=0.7)
    assert precision_recall(fake, real, 3) == precision_recall(real, fake, 3)[::-1]


def test_precision_recall_more_images_than_a_block_equals_brute_force():
    real, fake = gaussians(2100, 2060, 8, shift=0.8)
    assert precision_recall(real, fake, 3) == pytest.approx(brute_force(real, fake, 3), abs=1e-12)


def test_precision_recall_blocks_smaller_than_k_leave_out_the_image_itself(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2)
    real = np.arange(6.0)[:, None]  # the 5th neighbors of both ends are at 5
    fake = np.array([[-5.0], [-5.5], [10], [10.5], [100], [200]])
    assert precision_recall(real, fake, 5).precision == 2 / 6


def test_precision_recall_least_number_of_images():
    real, fake = gaussians(4, 4, 3, spread=0.1)
    assert precision_recall(real, fake, 3) == pytest.approx(brute_force(real, fake, 3))
    with pytest.raises(ValueError, match=r"^fake features are of 3 images; expected at least 4$"):
        precision_recall(real, fake[:3], 3)
    with pytest.raises(ValueError, match=r"^k is 0; expected at least 1$"):
        precision_recall(real, fake, 0)


def test_precision_recall_tells_of_each_row_equal_ones_too():
    random = np.random.RandomState(0)
    real, fake = random.randn(30, 4), random.randn(20, 4)
    real[10:20] = real[0]  # more than k equal ones
    fake[5:7] = fake[0]
    told = []
    precision_recall(real, fake, 3, on_rows=told.append)
    assert sum(told) == 2 * 30 + 20
