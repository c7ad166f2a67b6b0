"""metrics.authenticity: copies, fresh draws with known probabilities, and errors."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu

from metrics.authenticity import authenticity
from metrics.intervals import TooFew
from metrics.kernel import kernel_distance


def brute_force(train, fake, groups):
    """Return AuthPct as the definition reads, with nearest training images of other groups."""
    within = np.where(groups[:, None] == groups, np.inf, cdist(train, train, "sqeuclidean"))
    across = cdist(fake, train, "sqeuclidean")
    return 100 * (across.min(axis=1) > within.min(axis=1)[across.argmin(axis=1)]).mean()


def draws(*counts, seed=0, num_features=16):
    random = np.random.RandomState(seed)
    return [random.randn(count, num_features) for count in counts]


# The probability that a point of an evenly filled space is the nearest neighbor of its nearest neighbor.
@pytest.mark.parametrize(("num_features", "mutual"), [(1, 2 / 3), (2, 6 * math.pi / (8 * math.pi + 3 * math.sqrt(3)))])
def test_authenticity_of_fresh_draws_is_the_share_without_mutual_neighbors(num_features, mutual):
    random = np.random.RandomState(0)
    found = authenticity(random.rand(3000, num_features), random.rand(3000, num_features)).authpct
    error = math.sqrt(sum(found.variances().values()))
    assert 0.5 < error < 3
    assert found.estimate == pytest.approx(100 * (1 - mutual), abs=3 * error)


def test_authenticity_of_copies_is_0_and_their_ct_far_below_0():
    train, heldout = draws(600, 300)
    found = authenticity(train, train[:200], heldout=heldout)
    assert found.authpct.estimate == 0
    # All fakes are nearer than all held-out images: U = 0, in each of the 2 cells of about 100 fakes and 150 held-out.
    assert found.ct.estimate == pytest.approx(-math.sqrt(3 * 100 * 150 / (100 + 150 + 1)), rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_authenticity_of_fresh_draws_has_ct_near_0(seed):
    train, fake, heldout = draws(600, 400, 300, seed=seed)
    ct = authenticity(train, fake, heldout=heldout).ct
    assert abs(ct.estimate) < 2
    # The mean of 3 z-scores.
    assert sum(ct.variances().values()) == pytest.approx(1 / 3, rel=0.4)


def test_authenticity_sees_copies_that_the_kernel_distance_does_not():
    train, fresh = draws(900, 400)
    near = np.random.RandomState(1).randn(400, 16) * 0.01
    copies = train[:400] + near
    distances = [kernel_distance(train, fakes, 20, 200, 0) for fakes in (copies, fresh)]
    between = kernel_distance(train, fresh + 0.2, 20, 200, 0)  # what a small shift does
    assert max(abs(distance) for distance in distances) < between / 5
    assert authenticity(train, copies).authpct.estimate < 2
    assert authenticity(train, fresh).authpct.estimate > 50


def test_authenticity_of_one_cell_is_the_mann_whitney_statistic():
    train, fake, heldout = draws(50, 60, 40)  # too few for two cells
    nearest_fake, nearest_heldout = (cdist(x, train).min(axis=1) for x in (fake, heldout))
    expected = mannwhitneyu(nearest_fake, nearest_heldout).statistic
    found = authenticity(train, fake, heldout=heldout).ct
    assert found.estimate == pytest.approx((expected - 60 * 40 / 2) / math.sqrt(60 * 40 * 101 / 12))
    pairs = nearest_fake[1:, None] > nearest_heldout
    assert found.without["fake"][0] == pytest.approx((pairs.sum() - 59 * 20) / math.sqrt(59 * 40 * 100 / 12))


@pytest.mark.parametrize("seed", range(4))
def test_authenticity_with_groups_equals_brute_force(seed):
    random = np.random.RandomState(seed)
    if seed % 2:
        train, fake = random.randint(0, 4, [40, 3]) * 1.0, random.randint(0, 4, [30, 3]) + 0.25  # full of ties
        train += random.rand(40, 1) * 1e-3  # so that the nearest training image of a fake is one
    else:
        train, fake = random.randn(40, 2), random.randn(30, 2)
    groups = random.permutation(np.arange(40) % 12)
    found = authenticity(train, fake, groups + 100).authpct
    assert found.estimate == pytest.approx(brute_force(train, fake, groups))
    assert 0 < found.estimate < 100
    assert found.num_units == {"splits": 64, "real": 12, "fake": 30}


def test_authenticity_varies_over_draws_as_its_standard_error_says():
    estimates, errors = [], []
    for seed in range(60):
        random = np.random.RandomState(seed)
        groups = np.arange(150) // 3
        train = random.randn(50, 4)[groups] * 0.9 + random.randn(150, 4) * 0.4
        found = authenticity(train, random.randn(150, 4), groups).authpct
        estimates.append(found.estimate)
        errors.append(found.interval().std_error)
    # The standard deviation of 60 draws is off by 9 %, and halves estimate it up to a fifth too high.
    assert 0.8 * np.std(estimates) < np.mean(errors) < 1.4 * np.std(estimates)


def test_authenticity_without_each_heldout_group_equals_recomputation():
    train, fake, heldout = draws(50, 60, 40)
    groups = np.arange(40) // 3
    found = authenticity(train, fake, heldout=heldout, heldout_groups=groups).ct
    expected = [authenticity(train, fake, heldout=heldout[groups != group]).ct.estimate for group in range(14)]
    assert found.without["heldout"] == pytest.approx(np.array(expected))


def test_authenticity_several_images_of_a_lesion_do_not_count_as_its_surroundings():
    train, fake = draws(200, 150)
    near = np.random.RandomState(1).randn(200, 16) * 0.01
    twice, groups = np.concatenate([train, train + near]), np.tile(np.arange(200), 2)
    with_groups, by_image = (authenticity(twice, fake, each).authpct.estimate for each in (groups, None))
    assert by_image == 100
    assert with_groups == pytest.approx(authenticity(train, fake).authpct.estimate, abs=3)  # moved by 1 % of a std


def test_authenticity_order_of_images_changes_nothing():
    train, fake, heldout = draws(400, 300, 250)
    found = authenticity(train, fake, heldout=heldout, seed=3)
    random = np.random.RandomState(0)
    again = authenticity(train, random.permutation(fake), heldout=random.permutation(heldout), seed=3)
    assert again.authpct.estimate == found.authpct.estimate
    assert again.ct.estimate == pytest.approx(found.ct.estimate, rel=1e-12)
    assert authenticity(random.permutation(train), fake).authpct.estimate == found.authpct.estimate


def test_authenticity_fakes_of_one_group_count_as_one():
    train, fake, heldout = draws(80, 60, 80)
    twice, groups = np.repeat(fake, 2, axis=0), np.repeat(np.arange(60), 2)
    once, by_group, by_image = (authenticity(train, *some, heldout=heldout, fake_groups=each).authpct.interval()
                                for some, each in (([fake], None), ([twice], groups), ([twice], None)))
    assert by_group.std_error == pytest.approx(once.std_error, rel=1e-9)
    assert by_image.std_error < 0.9 * once.std_error
    found = authenticity(train, twice, heldout=heldout, fake_groups=groups).ct
    assert found.num_units == {"heldout": 80, "fake": 60}
    expected = [authenticity(train, twice[groups != group], heldout=heldout).ct.estimate for group in range(60)]
    np.testing.assert_allclose(found.without["fake"], expected, rtol=1e-9)


def test_authenticity_without_jackknife_needs_two_groups():
    train, fake = draws(40, 10)
    groups = np.arange(40) % 2
    found = authenticity(train, fake, groups, jackknife=False).authpct
    assert found.estimate == pytest.approx(brute_force(train, fake, groups))
    with pytest.raises(TooFew, match=r"^there are 40 training images of 1 group; expected at least 2 groups, since "):
        authenticity(train, fake, np.zeros(40, dtype=int), jackknife=False)


def test_authenticity_too_few_images_says_what_is_missing():
    train, fake, heldout = draws(50, 19, 40)
    found = authenticity(train, fake, heldout=heldout)
    assert found.ct is None
    assert found.note == "no part of the training images has 20 fakes and a held-out image beside it"
    with pytest.raises(TooFew, match=r"^there are 50 training images of 3 groups; an interval needs "):
        authenticity(train, fake, np.arange(50) % 3)
    with pytest.raises(ValueError, match=r"^fake features are of 0 images; expected at least 1$"):
        authenticity(train, fake[:0])
    with pytest.raises(TooFew, match=r"^there are 3 fake images of 3 groups; an interval needs at least 4 images "):
        authenticity(train, fake[:3])
    with pytest.raises(ValueError, match=r"^held-out features have 3 dimensions, training ones 16; expected equal "):
        authenticity(train, fake, heldout=heldout[:, :3])


def test_authenticity_tells_of_each_row():
    train, fake, heldout = draws(30, 20, 10)
    told = []
    authenticity(train, fake, heldout=heldout, on_rows=told.append)
    assert sum(told) == 30 + 20 + 10
