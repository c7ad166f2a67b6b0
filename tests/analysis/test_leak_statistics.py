"""analysis.leak_statistics: exact p-values without a leak, rates that agree with their definitions, known-bad input."""

from itertools import product

import numpy as np
import pytest

from analysis.leak_statistics import (
    ExceedanceTest,
    MembershipTest,
    Scores,
    exceedance_test,
    mean_difference,
    membership_test,
    smallest_effect,
)
from metrics.intervals import TooFew


def make_scores(seed, num_groups, per_group=1, shift=0.0, num_strata=1, share=0.8):
    """Return scores of images that resemble each other within groups; groups are numbered at random."""
    random = np.random.default_rng(seed)
    groups = np.repeat(random.permutation(num_groups), per_group)
    values = np.sqrt(share) * random.normal(size=num_groups)[groups] + np.sqrt(1 - share) * random.normal(
        size=len(groups))
    return Scores(values=values + shift + 3.0 * (groups % num_strata), groups=groups, strata=groups % num_strata)


def shuffled(scores, seed=0):
    return scores.rows(np.random.default_rng(seed).permutation(len(scores)))


def reference_rates(members, heldout, fpr):
    """Return the AUC and the true positive rate by their definitions, image by image."""
    wins, pairs = 0.0, 0
    for (value, stratum), (other, other_stratum) in product(zip(members.values, members.strata, strict=True),
                                                            zip(heldout.values, heldout.strata, strict=True)):
        if stratum == other_stratum:
            wins, pairs = wins + (value > other) + (value == other) / 2, pairs + 1
    centers = {stratum: np.median(heldout.values[heldout.strata == stratum]) for stratum in np.unique(heldout.strata)}
    centered = [np.array([value - centers[stratum] for value, stratum in zip(side.values, side.strata, strict=True)])
                for side in (members, heldout)]
    threshold = np.sort(centered[1])[::-1][int(fpr * len(heldout))]
    rate = sum((heldout.strata == stratum).mean() * (centered[0][members.strata == stratum] > threshold).mean()
               for stratum in centers)
    return wins / pairs, rate


# Exceedance

def test_exceedance_p_value_of_one_rank_equals_the_share_of_simulations_with_as_many_scores_beyond():
    random = np.random.default_rng(0)
    control, scores = random.normal(size=[20_000, 40]), random.normal(size=[20_000, 60])
    beyond = (scores > control.max(axis=1, keepdims=True)).sum(axis=1)
    for count in (1, 2, 4, 8):
        made = np.concatenate([np.full(count, 41.0), np.full(60 - count, -1.0)])
        p_value, counts = ExceedanceTest(np.arange(40.0)).p_value(made)
        assert counts == (count,)
        share = (beyond >= count).mean()
        assert p_value == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 20_000))
    assert ExceedanceTest(np.arange(40.0)).p_value(np.full(60, 39.0)) == (1.0, (0,))  # ties are not beyond


def test_exceedance_p_value_of_several_ranks_is_their_smallest_one_times_their_number():
    control = np.arange(400.0)
    test = ExceedanceTest(control, tail=0.01)
    assert test.ranks == (1, 2, 4)
    scores = np.concatenate([np.full(12, 397.5), np.zeros(88)])
    assert test.p_value(scores)[1] == (0, 0, 12)
    # All orders of 500 scores are equally likely: those with at most 3 of 400 controls among the 15 largest.
    from scipy.stats import hypergeom

    assert test.p_value(scores)[0] == pytest.approx(3 * hypergeom(500, 400, 15).cdf(3), rel=1e-9)


@pytest.mark.parametrize("by_group", [True, False])
def test_exceedance_p_value_of_a_grouped_control_is_valid_by_group_only(by_group):
    """With the same seed in all runs: which image of a group is drawn must not follow from the scores."""
    p_values = []
    for run in range(500):
        control = make_scores(run, 40, per_group=10, share=1.0)
        scores = np.random.default_rng([run, 1]).normal(size=400)
        p_values.append(ExceedanceTest(control.values, control.groups if by_group else None).p_value(scores)[0])
    for level in (0.05, 0.2):
        error = np.sqrt(level * (1 - level) / 500)
        share = np.mean(np.array(p_values) <= level)
        if by_group:
            assert level - 4 * error <= share <= level + 4 * error
    if not by_group:
        assert np.mean(np.array(p_values) <= 0.01) > 0.03


def test_exceedance_of_copies_finds_their_share():
    random = np.random.default_rng(0)
    scores = np.concatenate([random.normal(size=970), np.full(30, 9.0)])
    found = exceedance_test(scores, random.normal(size=2000), resamples=300)
    assert found.p_value < 1e-4
    assert found.share.estimate == found.num_beyond / 1000
    assert 0.025 <= found.share.low <= 0.04 <= found.share.high <= 0.06
    assert (found.num_scores, found.num_units, len(found.ranks)) == (1000, 2000, 5)
    assert exceedance_test(scores[:970], random.normal(size=2000), resamples=300).share.high < 0.03


def test_exceedance_share_in_an_interval_for_independent_draws_covers_the_tail():
    covered = 0
    for run in range(200):
        random = np.random.default_rng(run)
        found = exceedance_test(random.normal(size=500), random.normal(size=600), tail=0.05, resamples=200, seed=run)
        covered += found.share.low <= 0.05 <= found.share.high
    assert 0.88 * 200 <= covered <= 0.995 * 200


def test_exceedance_of_no_score_beyond_has_wilsons_upper_bound():
    found = exceedance_test(np.zeros(500), np.arange(1.0, 101), resamples=100)
    assert (found.num_beyond, found.p_value, found.share.low) == (0, 1.0, 0.0)
    assert 0.005 < found.share.high < 0.01  # 1.96^2 / (500 + 1.96^2)


def test_exceedance_depends_neither_on_the_order_of_scores_nor_on_names_of_groups():
    random = np.random.default_rng(0)
    scores, control = random.normal(size=300), make_scores(1, 50, per_group=3)
    found = exceedance_test(scores, control.values, control.groups, resamples=100)
    assert exceedance_test(scores[::-1], control.values, control.groups * 7 + 3, resamples=100) == found


def test_exceedance_of_a_small_control_says_how_many_groups_are_needed():
    control = make_scores(0, 7, per_group=10)
    with pytest.raises(TooFew, match=r"^the control has 7 groups of images; the test needs at least 20$"):
        exceedance_test(np.zeros(5), control.values, control.groups)


def test_exceedance_of_scores_that_are_not_finite_raises_value_error():
    with pytest.raises(ValueError, match=r"^the scores have the shape \[3\], and 1 are not finite; expected a list"):
        exceedance_test(np.array([0, np.nan, 1]), np.arange(30.0))
    with pytest.raises(ValueError, match=r"^the tail is 1; expected a number between 0 and 1, such as 0.01$"):
        exceedance_test(np.zeros(5), np.arange(30.0), tail=1)


# Membership

def test_auc_and_tpr_agree_with_their_definitions_in_several_classes_with_ties():
    members, heldout = make_scores(0, 60, 2, 0.4, num_strata=3), make_scores(1, 60, 2, num_strata=3)
    for digits in (0, 1, 9):
        first, second = (Scores(values=side.values.round(digits), groups=side.groups, strata=side.strata)
                         for side in (members, heldout))
        found = membership_test(first, second, fpr=0.1, resamples=20, permutations=19, num_controls=10)
        assert (found.auc.interval.estimate, found.tpr.interval.estimate) == pytest.approx(
            reference_rates(first, second, 0.1), rel=1e-12)


def test_auc_of_one_class_equals_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    members, heldout = make_scores(0, 200, shift=0.5), make_scores(1, 150)
    expected = roc_auc_score([1] * 200 + [0] * 150, np.concatenate([members.values, heldout.values]))
    assert MembershipTest(members, heldout, permutations=19).auc(members.values, heldout.values)[0] == pytest.approx(
        expected, rel=1e-12)


def test_membership_of_a_leak_is_found_and_its_control_is_quiet():
    members, heldout = make_scores(0, 300, 2, shift=0.6, num_strata=2), make_scores(1, 100, 2, num_strata=2)
    found = membership_test(members, heldout, resamples=200, permutations=499)
    assert found.auc.p_value == 1 / 500
    assert found.auc.interval.low > 0.55
    assert found.auc.control_low < 0.5 < found.auc.control_high < found.auc.interval.estimate
    assert found.auc.control == pytest.approx(0.5, abs=0.02)
    assert found.tpr.control_low <= found.tpr.control <= found.tpr.control_high
    assert (found.num_members, found.num_member_groups, found.num_heldout, found.num_heldout_groups) == (
        600, 300, 200, 100)
    assert found.auc.interval.num_units == {"members": 300, "heldout": 100}


def test_membership_of_a_few_copied_images_is_found_by_the_rate_and_not_by_the_auc():
    members, heldout = make_scores(0, 400), make_scores(1, 300)
    values = members.values.copy()
    values[:40] = 6.0
    p_auc, p_tpr = MembershipTest(members, heldout, permutations=499).p_values(values, heldout.values)
    assert p_tpr == 1 / 500 < p_auc


def test_membership_of_scores_that_differ_by_class_only_is_not_found():
    """Training images are mostly of the class with large scores: an AUC of all pairs would be far above 0.5."""
    members, heldout = make_scores(0, 400, num_strata=2), make_scores(1, 400, num_strata=2)
    members = members.rows((members.strata == 1) | (members.groups % 8 == 0))
    heldout = heldout.rows((heldout.strata == 0) | (heldout.groups % 8 == 1))
    found = membership_test(members, heldout, resamples=100, permutations=199)
    assert abs(found.auc.interval.estimate - 0.5) < 0.1
    assert found.auc.p_value > 0.05
    assert found.tpr.p_value > 0.05


@pytest.mark.parametrize("by_group", [True, False])
def test_membership_p_values_without_a_leak_are_valid_by_group_only(by_group):
    p_values = []
    for run in range(300):
        sides = [make_scores([run, side], count, 4, num_strata=2) for side, count in enumerate((40, 30))]
        if not by_group:
            sides = [Scores(values=side.values, groups=np.arange(len(side)), strata=side.strata) for side in sides]
        test = MembershipTest(*sides, fpr=0.05, permutations=99)
        p_values.append(test.p_values(sides[0].values, sides[1].values))
    shares = (np.array(p_values) <= 0.1).mean(axis=0)
    error = np.sqrt(0.1 * 0.9 / 300)
    if by_group:
        assert (shares <= 0.1 + 3 * error).all()
        assert shares[0] >= 0.1 - 3 * error
    else:
        assert (shares > 0.1 + 4 * error).all()


def test_membership_rates_and_intervals_do_not_depend_on_the_order_of_images():
    members, heldout = make_scores(0, 60, 3, 0.2, num_strata=2), make_scores(1, 50, 3, num_strata=2)
    options = {"fpr": 0.05, "resamples": 50, "permutations": 19, "num_controls": 10}
    first, second = (membership_test(*sides, **options)
                     for sides in ((members, heldout), (shuffled(members), shuffled(heldout))))
    for name in ("auc", "tpr"):
        one, other = getattr(first, name).interval, getattr(second, name).interval
        assert (one.estimate, one.low, one.high) == pytest.approx((other.estimate, other.low, other.high), rel=1e-12)


def test_membership_of_classes_on_one_side_leaves_them_out_and_counts_them():
    members, heldout = make_scores(0, 90, 2, num_strata=3), make_scores(1, 60, 2, num_strata=2)
    found = membership_test(members, heldout, resamples=20, permutations=19, num_controls=10)
    assert (found.num_left_out, found.num_members, found.num_heldout) == (60, 120, 120)
    kept = members.rows(members.strata < 2)
    expected = membership_test(kept, heldout, resamples=20, permutations=19, num_controls=10)
    assert (found.auc, found.tpr) == (expected.auc, expected.tpr)


def test_membership_of_few_heldout_images_has_no_rate_and_says_why():
    members = make_scores(0, 60)
    few = membership_test(members, make_scores(1, 40), resamples=20, permutations=19, num_controls=10)
    assert few.tpr is None
    assert few.reason == "40 held-out images; a true positive rate at 1 % false positives needs at least 100"
    few = membership_test(members, make_scores(1, 15, 10), resamples=20, permutations=19, num_controls=10)
    assert few.tpr is None
    assert few.reason == "15 held-out groups; a true positive rate needs at least 20"


def test_membership_of_sides_without_a_common_class_or_with_one_group_raises_too_few():
    members, heldout = make_scores(0, 30), make_scores(1, 30)
    other = Scores(values=heldout.values, groups=heldout.groups, strata=heldout.strata + 1)
    with pytest.raises(TooFew, match=r"^no class has both training and held-out images; the test needs images of one"):
        membership_test(members, other)
    with pytest.raises(TooFew, match=r"^no class has both training and held-out images; a difference needs images of"):
        mean_difference(members, other)
    with pytest.raises(TooFew, match=r"^there is 1 group of held-out images whose class is on both sides; the test"):
        membership_test(members, make_scores(1, 1, 9))


def test_membership_of_one_group_of_each_class_has_a_control():
    found = membership_test(make_scores(0, 2, 5, num_strata=2), make_scores(1, 2, 5, num_strata=2), resamples=20,
                            permutations=19, num_controls=10)
    assert found.auc.control == 0.5  # no pair of one class is in two halves
    assert found.auc.p_value == 1  # no group can change sides


def test_scores_of_unequal_lengths_raise_value_error():
    with pytest.raises(ValueError, match=r"^there are 2 groups of 3 scores; expected one for each score$"):
        Scores(values=np.zeros(3), groups=np.arange(2), strata=np.zeros(3, dtype=int))


# Differences of means and power

def test_mean_difference_is_that_of_heldout_and_training_means_weighted_by_heldout_images():
    members = Scores(values=np.array([1.0, 3, 10, 20]), groups=np.arange(4), strata=np.array([0, 0, 1, 2]))
    heldout = Scores(values=np.array([5.0, 20, 20, 20]), groups=np.arange(4), strata=np.array([0, 1, 1, 1]))
    assert mean_difference(members, heldout, resamples=20).estimate == pytest.approx((1 * 3 + 3 * 10) / 4)


def test_mean_difference_in_an_interval_by_group_covers_the_true_one():
    covered = 0
    for run in range(200):
        members, heldout = (make_scores([run, 0], 40, 4, num_strata=2), make_scores([run, 1], 30, 4, 0.3, num_strata=2))
        found = mean_difference(members, heldout, resamples=200, seed=run)
        covered += found.low <= 0.3 <= found.high
    assert 0.9 * 200 <= covered <= 0.99 * 200


def test_smallest_effect_is_smaller_with_more_groups_and_found_by_the_test():
    effects = [smallest_effect(make_scores(0, count, 2), make_scores(1, count, 2), level=0.01, permutations=99)
               for count in (30, 300)]
    assert effects[1].shift < effects[0].shift
    assert 0.5 < effects[1].auc < effects[0].auc < 1
    # Of two groups on each side 1 of 6 ways is the one at hand: no p-value is below 1 / 6.
    assert smallest_effect(make_scores(0, 2, 9), make_scores(1, 2, 9), level=0.01, permutations=99) is None


def test_smallest_effect_at_a_level_that_no_p_value_reaches_raises_value_error():
    with pytest.raises(ValueError, match=r"^the level is 0.001; 99 permutations give p-values of at least 0.01: use "
                                         r"999 or more$"):
        smallest_effect(make_scores(0, 30), make_scores(1, 30), level=0.001, permutations=99)
