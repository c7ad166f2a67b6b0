"""metrics.intervals: closed forms of means, what duplicates and order do, and coverage with a known truth."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from metrics.intervals import (
    GroupBootstrap,
    Jackknife,
    TooFew,
    bootstrap_mean,
    group_numbers,
    halves_jackknife,
    holm,
    unit_of,
)


def leave_out(values, groups=None):
    """Return the mean of the images left without each group: float64 [G]."""
    numbers = group_numbers(groups, len(values))
    return np.array([values[numbers != number].mean() for number in range(numbers.max() + 1)])


def mean_of(values, groups=None, side="real", **properties):
    return Jackknife(estimate=values.mean(), without={side: leave_out(values, groups)}, **properties)


def difference_of_means(real, fake):
    return Jackknife(estimate=real.mean() - fake.mean(),
                     without={"real": leave_out(real) - fake.mean(), "fake": real.mean() - leave_out(fake)})


def normal(count, seed=0, mean=0.0, spread=1.0):
    return np.random.RandomState(seed).normal(mean, spread, count)


@pytest.mark.parametrize("count", [2, 3, 50])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_interval_of_a_mean_equals_students(count, level):
    values = normal(count, mean=3)
    found = mean_of(values).interval(level)
    error = values.std(ddof=1) / math.sqrt(count)
    expected = scipy.stats.t.interval(level, count - 1, values.mean(), error)
    assert found.std_error == pytest.approx(error, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-11)
    assert found.level == level
    assert found.num_units == {"real": count}


def test_interval_of_two_sides_equals_welchs():
    real, fake = normal(20, 1, spread=3), normal(7, 2, mean=2)
    welch = scipy.stats.ttest_ind(real, fake, equal_var=False)
    difference = difference_of_means(real, fake)
    found = difference.interval()
    assert (found.low, found.high) == pytest.approx(tuple(welch.confidence_interval()), rel=1e-10)
    assert difference.p_value() == pytest.approx(welch.pvalue, rel=1e-10)


def test_minus_of_the_same_groups_equals_the_paired_test():
    first = normal(15, 1)
    second = first + normal(15, 2, mean=0.2, spread=0.1)
    paired = scipy.stats.ttest_rel(first, second)
    found = mean_of(first).minus(mean_of(second))
    interval = found.interval()
    assert (interval.low, interval.high) == pytest.approx(tuple(paired.confidence_interval()), rel=1e-9)
    assert found.p_value() == pytest.approx(paired.pvalue, rel=1e-9)
    assert interval.num_units == {"real": 15}


def test_minus_of_other_images_equals_welchs_test():
    first, second = normal(15, 1), normal(9, 2, mean=1, spread=2)
    found = mean_of(first, side="fake").minus(mean_of(second, side="fake"))
    assert found.p_value() == pytest.approx(scipy.stats.ttest_ind(first, second, equal_var=False).pvalue, rel=1e-10)
    assert found.interval().num_units == {"fake of first": 15, "fake of second": 9}


def test_minus_itself_is_surely_zero():
    values = normal(15)
    difference = mean_of(values).minus(mean_of(values))
    assert (difference.interval().low, difference.interval().high, difference.p_value()) == (0, 0, 1)


def test_p_value_of_a_constant_other_than_zero_is_zero():
    assert mean_of(np.full(5, 0.5)).p_value() == 0


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_p_value_is_below_one_minus_level_where_the_interval_excludes_zero(level):
    sides = []
    for seed in range(60):
        jackknife = difference_of_means(normal(12, seed), normal(9, 100 + seed, mean=0.8))
        interval = jackknife.interval(level)
        sides.append(not interval.low <= 0 <= interval.high)
        assert (jackknife.p_value() < 1 - level) == sides[-1]
    assert set(sides) == {True, False}


def test_groups_of_one_image_equal_none():
    values = normal(30)
    assert mean_of(values, np.arange(30)[::-1]).interval() == mean_of(values).interval()


def test_jackknife_of_unequal_groups_equals_the_error_of_a_ratio():
    random = np.random.RandomState(0)
    sizes = random.randint(1, 4, size=2000)
    groups = np.repeat(np.arange(2000), sizes)
    values = random.randn(2000)[groups] + random.randn(len(groups))
    residuals = np.bincount(groups, values - values.mean())
    # The linearized ratio of sums to sizes (Cochran 1977, chapter 6).
    expected = math.sqrt(2000 / 1999 * np.square(residuals).sum()) / len(groups)
    # They differ by terms of relative size 1 / 2000.
    assert mean_of(values, groups).interval().std_error == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("interval_of", [
    lambda values, groups: mean_of(values, groups).interval(),
    lambda values, groups: bootstrap_mean(values, groups)])
def test_duplicates_in_their_group_do_not_shrink_intervals(interval_of):
    values, groups = normal(40), np.arange(40) // 2
    once = interval_of(values, groups)
    four_times = interval_of(np.tile(values, 4), np.tile(groups, 4))
    assert four_times.std_error == pytest.approx(once.std_error, rel=1e-12)
    assert (four_times.low, four_times.high) == pytest.approx((once.low, once.high), rel=1e-11)
    alone = interval_of(np.tile(values, 4), None)
    assert alone.std_error < 0.7 * once.std_error  # half, as of 4 times as many, and groups vary by chance


@pytest.mark.parametrize("interval_of", [
    lambda values, groups: mean_of(values, groups).interval(),
    lambda values, groups: bootstrap_mean(values, groups)])
def test_order_and_names_of_groups_change_nothing(interval_of):
    random = np.random.RandomState(3)
    values, groups = normal(60), random.randint(15, size=60)
    order, names = random.permutation(60), random.permutation(15) - 7
    found, expected = interval_of(values[order], names[groups[order]]), interval_of(values, groups)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-11)
    assert (found.std_error, found.num_units) == (pytest.approx(expected.std_error, rel=1e-11), expected.num_units)


@pytest.mark.parametrize("count", [2, 10, 300])
@pytest.mark.parametrize("share", [0, 1])
def test_share_of_none_or_all_equals_wilsons_of_as_many_groups(count, share):
    found = mean_of(np.full(3 * count, float(share)), np.arange(3 * count) // 3, is_share=True).interval()
    square = scipy.stats.t.ppf(0.975, count - 1) ** 2
    far = square / (count + square)  # Wilson's other bound at a share of 0
    assert (found.low, found.high) == pytest.approx((0, far) if share == 0 else (1 - far, 1), rel=1e-12)


def assert_wilson(interval, share, number, reach):
    """Check that the bounds are the shares whose own standard error, times reach, is their distance to the share."""
    for bound in (interval.low, interval.high):
        assert (share - bound) ** 2 == pytest.approx(reach**2 * bound * (1 - bound) / number, rel=1e-9)
    assert 0 < interval.low < share < interval.high < 1


@pytest.mark.parametrize("count", [1, 3, 10, 19])
def test_share_of_some_equals_wilsons(count):
    found = mean_of((np.arange(20) < count).astype(float), is_share=True).interval(0.9)
    assert_wilson(found, count / 20, 19, scipy.stats.t.ppf(0.95, 19))  # the jackknife's error divides by n - 1


def test_percent_that_is_most_has_the_bounds_of_a_share():
    values = (np.arange(20) < 3).astype(float)
    share, percent = (mean_of(each, is_share=True, **most).interval() for each, most in (
        (values, {}), (100 * values, {"most": 100.0})))
    assert (percent.low, percent.high) == pytest.approx((100 * share.low, 100 * share.high), rel=1e-11)
    none = mean_of(np.zeros(20), is_share=True, most=100.0).interval()
    assert (none.low, none.high) == (0, pytest.approx(100 * mean_of(np.zeros(20), is_share=True).interval().high))


def of_halves(estimate, values, **properties):
    groups = {"real": np.arange(3000) // 3, "fake": None}
    return halves_jackknife(estimate, values, groups, {"real": 3000, "fake": 500}, **properties)


def test_share_of_all_in_all_halves_equals_wilsons_of_the_side_with_the_fewest_groups():
    found = of_halves(1.0, np.ones([64, 2]), is_share=True).interval()
    square = scipy.stats.t.ppf(0.975, 499) ** 2
    assert (found.low, found.high) == pytest.approx((500 / (500 + square), 1), rel=1e-12)


def test_interval_from_random_halves_has_fewer_degrees_of_freedom_than_splits():
    values = np.random.RandomState(0).randn(64, 2)
    found = of_halves(5.0, values)
    error = np.sqrt(np.square(np.diff(values, axis=1) / 2).mean())
    # Of a variance from 500 images, and of a mean over 64 squares.
    for jackknife in (found, found.minus(of_halves(0.0, np.zeros([64, 2])))):
        interval, freedom = jackknife.interval(), 1 / (1 / 499 + 1 / 64)
        assert interval.std_error == pytest.approx(error, rel=1e-12)
        assert interval.high - 5 == pytest.approx(scipy.stats.t.ppf(0.975, freedom) * error, rel=1e-9)
        assert jackknife.p_value() == pytest.approx(2 * scipy.stats.t.sf(5 / error, freedom), rel=1e-9)
    assert found.interval().num_units == {"splits": 64, "real": 1000, "fake": 500}


def test_share_that_is_equal_in_all_groups_is_not_certain():
    found = mean_of(np.tile([0.0, 1.0, 1.0], 10), np.arange(30) // 3, is_share=True).interval()
    assert_wilson(found, 2 / 3, 10, scipy.stats.t.ppf(0.975, 9))


@pytest.mark.parametrize(("mean", "low_is_least", "high_is_least"), [(-9, True, True), (0, True, False),
                                                                      (9, False, False)])
def test_least_bounds_both_ends(mean, low_is_least, high_is_least):
    values = np.linspace(-1, 1, 5) + mean
    found = mean_of(values, least=0.0).interval()
    assert found.estimate == mean
    assert (found.low == 0, found.high == 0) == (low_is_least, high_is_least)
    assert found.low <= found.high


def test_records_hold_plain_json_values():
    values = np.linspace(0, 1, 5, dtype=np.float32)
    intervals = [mean_of(values, unit="image").interval(), mean_of(values, is_share=True).interval(),
                 bootstrap_mean(values), bootstrap_mean(np.ones(5), is_share=True)]
    for record in (interval.as_record() for interval in intervals):
        assert json.loads(json.dumps(record)) == record
        assert all(type(record[key]) is float for key in ("estimate", "low", "high", "level", "std_error"))
    assert intervals[0].as_record()["unit"] == "image"


def test_record_of_units_made_of_groups_counts_both():
    found = mean_of(normal(12), side="blocks", unit="block", method="by blocks", dealt={"real": 300}).interval()
    assert found.num_units == {"blocks": 12, "real": 300}
    assert (found.method, found.unit) == ("by blocks", "block")


@pytest.mark.parametrize(("without", "message"), [
    ([1.0], r"^there is 1 group of real images; an interval needs at least 2$"),
    ([1.0, np.nan], r"^without one of the 2 groups of real images the estimate is not finite; an interval needs more "
                    r"of them$")])
def test_too_few_groups_raise(without, message):
    jackknife = Jackknife(estimate=1.0, without={"fake": np.ones(3), "real": np.array(without)})
    for raising in (jackknife.interval, jackknife.p_value):
        with pytest.raises(TooFew, match=message):
            raising()


@pytest.mark.parametrize("level", [0, 1, 95, -0.5, math.nan])
def test_level_outside_its_range_raises(level):
    message = rf"^the level is {level}; expected a number between 0 and 1, such as 0.95$"
    with pytest.raises(ValueError, match=message):
        mean_of(normal(4)).interval(level)
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(normal(4), level=level)


@pytest.mark.parametrize(("other", "message"), [
    ({"real": np.ones(4)}, r"^there are 3 and 4 groups of real images; expected the same groups on both sides$"),
    ({"real": np.ones(3), "fake": np.ones(3)}, r"^the estimates vary with real and with real, fake; expected the same "
                                               r"metric$")])
def test_minus_unlike_raises(other, message):
    with pytest.raises(ValueError, match=message):
        mean_of(normal(3)).minus(Jackknife(estimate=1.0, without=other))


def test_group_numbers_count_from_zero_in_order_of_appearance():
    assert group_numbers(["b", "a", "b", "c"], 4).tolist() == [0, 1, 0, 2]
    assert group_numbers(None, 3).tolist() == [0, 1, 2]
    assert group_numbers(np.array([7, -1, 7]), 3).dtype == np.int64
    with pytest.raises(ValueError, match=r"^there are 2 groups of 3 images; expected one for each image$"):
        group_numbers([1, 2], 3)


def test_unit_of_any_side_with_groups_of_several_is_group():
    alone, shared = np.array([3, 1, 2]), np.array([1, 2, 1])
    assert [unit_of(None, None), unit_of(alone, None), unit_of(alone, shared), unit_of(shared)] == [
        "image", "image", "group", "group"]


def test_bootstrap_of_a_mean_is_near_students_interval():
    values = np.random.RandomState(0).exponential(size=200)
    found, expected = bootstrap_mean(values, resamples=4000), mean_of(values).interval()
    # 4,000 resamples give the error to 1 / sqrt(8000) and the ends to 4 % of the error; the skew moves them by more.
    assert found.std_error == pytest.approx(expected.std_error, rel=0.05)
    assert found.low == pytest.approx(expected.low, abs=0.3 * expected.std_error)
    assert found.high == pytest.approx(expected.high, abs=0.3 * expected.std_error)
    assert (found.estimate, found.unit, found.num_units) == (values.mean(), "image", {"images": 200})


def test_bootstrap_is_determined_by_its_seed():
    values, groups = normal(50), np.arange(50) // 3
    assert bootstrap_mean(values, groups) == bootstrap_mean(values, groups)
    assert bootstrap_mean(values, groups).low != bootstrap_mean(values, groups, seed=1).low
    assert bootstrap_mean(values, groups).unit == "group"
    assert bootstrap_mean(values, groups).num_units == {"groups": 17}


def test_bootstrap_of_a_share_of_all_equals_wilsons():
    found = bootstrap_mean(np.ones(30), np.arange(30) // 3, is_share=True)
    expected = mean_of(np.ones(30), np.arange(30) // 3, is_share=True).interval()
    assert (found.low, found.high) == (expected.low, expected.high)


def test_bootstrap_of_one_group_raises():
    with pytest.raises(TooFew, match=r"^there is 1 group of 5 images; an interval needs at least 2$"):
        bootstrap_mean(np.ones(5), np.zeros(5, dtype=np.int64))


def test_group_bootstrap_weights_repeat_whole_groups():
    groups = np.array([4, 4, 9, 7, 9, 4])
    bootstrap = GroupBootstrap(groups, 6, resamples=50)
    weights = np.concatenate(list(bootstrap.weights()))
    assert weights.shape == (50, 6)
    for number in (4, 7, 9):
        assert (weights[:, groups == number] == weights[:, groups == number][:, :1]).all()
    firsts = weights[:, [0, 2, 3]]
    assert (firsts.sum(axis=1) == 3).all()  # as many groups as there are
    assert len(np.unique(firsts, axis=0)) > 5
    # The mean of a value with these weights is what bootstrap_mean takes the percentiles of.
    values = np.arange(6.0)
    found = GroupBootstrap(groups, 6, keys=[values], resamples=50)
    weights = np.concatenate(list(found.weights()))
    means = weights @ values / weights.sum(axis=1)
    interval, expected = found.interval(values.mean(), means), bootstrap_mean(values, groups, resamples=50)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.std_error == pytest.approx(expected.std_error)


def test_group_bootstrap_of_many_images_comes_in_blocks():
    bootstrap = GroupBootstrap(np.arange(20_000) // 2, 20_000, resamples=250)
    blocks = list(bootstrap.weights())
    assert sum(map(len, blocks)) == 250
    assert len(blocks) > 1
    assert max(block.nbytes for block in blocks) <= 2**25
    assert all(block.T.flags.c_contiguous for block in blocks)
    drawn = np.array([np.bincount(each, minlength=10_000) for each in bootstrap.draws()])
    assert (np.concatenate(blocks)[:, ::2] == drawn[:, bootstrap.numbers[::2]]).all()


def test_group_bootstrap_with_required_kinds_has_them_in_each_resample():
    is_rare = np.arange(20) < 2
    bootstrap = GroupBootstrap(None, 20, required={"rare images": is_rare, "others": ~is_rare}, resamples=300)
    weights = np.concatenate(list(bootstrap.weights()))
    assert (weights[:, is_rare].sum(axis=1) > 0).all()
    assert len(weights) == 300
    plain = np.concatenate(list(GroupBootstrap(None, 20, resamples=300).weights()))
    # Without: a chance of (18 / 20)^20 = 12 % each.
    assert 20 < (plain[:, is_rare].sum(axis=1) == 0).sum() < 54
    assert bootstrap.fewest == 2


def test_group_bootstrap_fewer_groups_of_a_kind_widen_the_interval():
    values = normal(1000)
    few = GroupBootstrap(None, 100, required={"rare images": np.arange(100) < 5})
    many = GroupBootstrap(None, 100)
    assert few.interval(0, values).low < many.interval(0, values).low
    assert few.p_value(values + 2) > many.p_value(values + 2)


@pytest.mark.parametrize(("below", "at", "above"), [
    (0, 0, 999), (30, 0, 969), (999, 0, 0), (400, 100, 499), (0, 999, 0)])
def test_group_bootstrap_p_value_of_many_groups_is_twice_the_smaller_share(below, at, above):
    differences = np.repeat([-1.0, 0.0, 1.0], [below, at, above])
    share = (1 + min(below + at, at + above)) / 1000  # counts the one at hand
    assert GroupBootstrap(None, 10**6).p_value(differences) == pytest.approx(min(1, 2 * share), rel=1e-4)


@pytest.mark.parametrize("count", [3, 12, 1000])
def test_group_bootstrap_p_value_is_that_of_the_interval_which_ends_at_0(count):
    bootstrap = GroupBootstrap(None, count)
    differences = normal(4999, mean=1.5)
    p_value = bootstrap.p_value(differences)
    # The ends are 1 / 5000 apart in share from where the p-value is counted.
    assert bootstrap.interval(1.5, differences, 1 - 1.1 * p_value).low > 0
    assert bootstrap.interval(1.5, differences, 1 - 0.9 * p_value).low < 0


def test_group_bootstrap_of_too_few_groups_raises():
    with pytest.raises(TooFew, match=r"^there is 1 group with images of mel; an interval needs at least 2$"):
        GroupBootstrap([1, 1, 2], 3, required={"images of mel": np.array([True, True, False])})
    with pytest.raises(TooFew, match=r"^there is 0 groups of 0 images; an interval needs at least 2$"):
        GroupBootstrap(None, 0)


@pytest.mark.parametrize("interval_of", [
    lambda values, groups: mean_of(values, groups).interval(),
    lambda values, groups: bootstrap_mean(values, groups, resamples=400)])
def test_intervals_by_group_cover_the_mean_and_those_by_image_do_not(interval_of):
    random = np.random.RandomState(0)
    groups = np.repeat(np.arange(40), random.randint(1, 8, size=40))
    covered = {"group": 0, "image": 0}
    for _ in range(200):
        values = 5 + random.randn(40)[groups] + random.randn(len(groups))
        for unit, numbers in (("group", groups), ("image", None)):
            interval = interval_of(values, numbers)
            covered[unit] += interval.low <= 5 <= interval.high
    # Of 200 trials at 95 %, fewer than 180 or more than 196 have a chance of 0.4 %.
    assert 180 <= covered["group"] <= 196
    assert covered["image"] < 180


@pytest.mark.parametrize(("p_values", "expected"), [
    ([], []), ([0.3], [0.3]), ([0.7, 0.8], [1, 1]),
    ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),  # as of R's p.adjust
    ([0.04, 0.005, 0.03, 0.01], [0.06, 0.02, 0.06, 0.03])])
def test_holm_equals_known_examples(p_values, expected):
    assert holm(p_values) == pytest.approx(expected, rel=1e-12)
    assert holm(p_values[::-1]) == pytest.approx(expected[::-1], rel=1e-12)
