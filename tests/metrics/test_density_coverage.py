"""Density and coverage, and what neighborhoods in random halves say about the error of all four metrics."""

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy.spatial.distance import cdist

from metrics import distances
from metrics.intervals import TooFew, random_halves
from metrics.precision_recall import neighborhoods, precision_recall

NAMES = ("precision", "recall", "density", "coverage")


def brute_force(real, fake, k):
    """Return the four metrics as the definitions read."""
    real_radii, fake_radii = (np.sort(cdist(x, x, "sqeuclidean"))[:, k] for x in (real, fake))  # [:, 0]: the image
    across = cdist(real, fake, "sqeuclidean")
    in_real, in_fake = across <= real_radii[:, None], across <= fake_radii
    return {"precision": in_real.any(axis=0).mean(), "recall": in_fake.any(axis=1).mean(),
            "density": in_real.sum() / (k * len(fake)), "coverage": in_real.any(axis=1).mean()}


def values(found):
    return {name: getattr(found, name) for name in NAMES}


def draw(num_real, num_fake, num_features=4, seed=0, shift=0.5, spread=0.8):
    random = np.random.RandomState(seed)
    return random.randn(num_real, num_features), random.randn(num_fake, num_features) * spread + shift


@pytest.fixture(params=[13, 2048])
def block(request, monkeypatch):
    """Blocks that cut the sets into many pieces, and blocks that hold them whole."""
    monkeypatch.setattr(distances, "_BLOCK", request.param)
    monkeypatch.setattr(distances, "_EXACT_VALUES", 50 * request.param)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("block")
def test_density_coverage_equal_brute_force_for_all_ks_in_one_pass(seed):
    real, fake = draw(60, 50, seed=seed)
    if seed == 3:  # full of ties and duplicates
        real, fake = np.round(real * 2), np.round(fake * 2)
    found = neighborhoods(real, fake, [5, 1, 3])
    assert list(found) == [1, 3, 5]
    for k in (1, 3, 5):
        assert values(found[k]) == pytest.approx(brute_force(real, fake, k), abs=1e-12)
        assert (found[k].precision, found[k].recall) == precision_recall(real, fake, k)
        assert found[k].jackknives == {}


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_coverage_equal_prdc(k):
    real, fake = draw(300, 200, num_features=10)
    # A float64 distance of prdc's is from products of matrices; no tie is near in these draws.
    theirs = compute_prdc(real, fake, k)
    assert values(neighborhoods(real, fake, [k])[k]) == pytest.approx(theirs, abs=1e-12)
    assert all(0.05 < value < 0.95 for name, value in theirs.items() if name != "density")


def test_density_coverage_of_fakes_that_are_the_reals_have_closed_forms():
    real, _ = draw(200, 1)
    found = neighborhoods(real, real, [5])[5]
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert found.density == pytest.approx(6 / 5)  # each real counts in its own neighborhood, and in its 5 neighbors'


def test_coverage_of_one_distribution_is_its_expectation():
    # Naeem et al. 2020: 1 - (N - 1) ... (N - k) / ((2 N - 1) ... (2 N - k)) for N = M, whatever the distribution.
    count, k = 1000, 5
    expected = 1 - np.prod([(count - i) / (2 * count - i) for i in range(1, k + 1)])
    found = [neighborhoods(*draw(count, count, seed=seed, shift=0, spread=1), [k])[k] for seed in range(3)]
    # A standard deviation of each is near sqrt(0.97 * 0.03 / 1000) = 0.005.
    assert np.mean([each.coverage for each in found]) == pytest.approx(expected, abs=0.01)
    assert np.mean([each.density for each in found]) == pytest.approx(1, abs=0.05)


def test_density_rises_when_modes_are_dropped_and_coverage_falls():
    random = np.random.RandomState(0)
    modes = np.eye(6) * 20
    real = np.repeat(modes, 50, axis=0) + random.randn(300, 6)
    whole = np.repeat(modes, 50, axis=0) + random.randn(300, 6)
    dropped = np.repeat(modes[:3], 100, axis=0) + random.randn(300, 6) * 0.8
    before, after = (neighborhoods(real, fake, [5])[5] for fake in (whole, dropped))
    assert after.density > before.density
    assert after.coverage < 0.55 < 0.9 < before.coverage


def test_indicators_have_the_metrics_as_means():
    real, fake = draw(80, 60)
    found = neighborhoods(real, fake, [3])[3]
    assert {name: len(each) for name, each in found.indicators.items()} == {
        "precision": 60, "recall": 80, "density": 60, "coverage": 80}
    assert {name: each.mean() for name, each in found.indicators.items()} == pytest.approx(values(found))
    assert set(found.indicators["coverage"]) == {0, 1}
    near = cdist(real, fake) <= np.sort(cdist(real, real))[:, 3, None]
    assert found.indicators["density"].tolist() == pytest.approx(list(near.sum(axis=0) / 3))


@pytest.mark.usefixtures("block")
def test_jackknives_estimate_the_metrics_and_leave_them_as_they_are():
    real, fake = draw(90, 70, shift=1)
    groups = np.arange(90) // 3
    plain, found = (neighborhoods(real, fake, [3], real_groups=groups, jackknife=each)[3] for each in (False, True))
    assert values(found) == values(plain)
    assert {name: each.estimate for name, each in found.jackknives.items()} == pytest.approx(values(plain))
    for name, each in found.jackknives.items():
        interval = each.interval()
        assert interval.low < interval.estimate < interval.high
        assert interval.unit == "group"
        assert {side: interval.num_units[side] for side in ("real", "fake")} == {"real": 30, "fake": 70}
        assert each.is_share == (name != "density")
        assert each.variances().keys() == {"blocks"}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("block")
def test_jackknives_have_the_variance_of_halves_by_brute_force(seed):
    real, fake = draw(48, 40, seed=seed)
    if seed == 2:  # full of ties and duplicates
        real, fake = np.round(real * 2), np.round(fake * 2)
    groups = np.random.RandomState(seed).permutation(np.arange(48) % 20)
    found = neighborhoods(real, fake, [3], real_groups=groups, jackknife=True)[3]
    of_real, of_fake = random_halves("real", 48, groups, 16), random_halves("fake", 40, None, 16)
    halves = {name: np.empty([64, 2]) for name in NAMES}
    for split in range(64):
        for half in (0, 1):
            some = brute_force(real[(of_real >> split & 1) == half], fake[(of_fake >> split & 1) == half], 3)
            for name in NAMES:
                halves[name][split, half] = some[name]
    halves["density"] *= found.density / halves["density"].mean()
    for name in NAMES:
        expected = np.square(np.diff(halves[name], axis=1) / 2).mean()
        assert sum(found.jackknives[name].variances().values()) == pytest.approx(expected, rel=1e-9)
        assert expected > 0


def test_jackknives_of_groups_in_far_clusters_have_the_variance_of_three_splits():
    # Four far clusters, each a group of reals. Fakes are in the first two, so a half's coverage tells which of the
    # clusters it has: both halves cover 1/2, or one covers all and the other nothing.
    random = np.random.RandomState(0)
    centers = np.eye(4) * 1e3
    real = np.repeat(centers, 40, axis=0) + random.randn(160, 4)
    fake = np.repeat(centers[:2], 200, axis=0) + random.randn(400, 4) * 0.7
    variance = sum(neighborhoods(real, fake, [5], real_groups=np.arange(160) // 40, jackknife=True)[5]
                   .jackknives["coverage"].variances().values())
    # Of the three ways to halve four groups one has a difference of 1, squared half of which is 1 / 4.
    assert variance == pytest.approx(1 / 3 / 4, rel=0.35)  # 64 splits: the share of that way is 1/3 +- 0.06


def test_jackknives_of_correlated_images_are_wider_than_those_by_image():
    random = np.random.RandomState(0)
    groups = np.repeat(np.arange(60), 5)
    real = random.randn(60, 4)[groups] + 0.3 * random.randn(300, 4)
    fake = random.randn(300, 4)
    by_group, by_image = (neighborhoods(real, fake, [3], real_groups=each, jackknife=True)[3].jackknives
                          for each in (groups, None))
    for name in ("precision", "coverage"):
        assert by_group[name].interval().std_error > 1.2 * by_image[name].interval().std_error
    assert by_image["precision"].interval().unit == "image"


def test_jackknives_do_not_depend_on_how_groups_are_numbered_or_where_the_features_lie():
    real, fake = draw(60, 60)
    groups = np.arange(60) // 4
    found = neighborhoods(real, fake, [3], real_groups=groups, jackknife=True)[3].jackknives
    other = neighborhoods(torch.from_numpy(real), torch.from_numpy(fake), [3], real_groups=1000 - groups,
                          fake_groups=np.arange(60) * 7, jackknife=True)[3].jackknives
    assert all(other[name].variances() == each.variances() for name, each in found.items())


def test_jackknives_need_enough_images_and_groups():
    real, fake = draw(60, 60)
    message = "there are 60 real images of 3 groups; an interval needs at least 16 images of 4 groups"
    with pytest.raises(TooFew, match=f"^{message}$"):
        neighborhoods(real, fake, [3], real_groups=np.arange(60) % 3, jackknife=True)
    with pytest.raises(TooFew, match=r"^there are 15 fake images of 15 groups; an interval needs at least 16 "):
        neighborhoods(real, fake[:15], [3], jackknife=True)
    with pytest.raises(ValueError, match=r"^k is missing; expected at least 1$"):
        neighborhoods(real, fake, [])
