"""analysis.leak_tests: what is compared with what, what is said of it, and why a test did not run."""

from collections import Counter

import numpy as np
import pytest

from analysis import leak_tests
from analysis.authenticity_measures import Measured
from analysis.authenticity_results import adjust
from analysis.leak_statistics import exceedance_test, membership_test
from analysis.leak_tests import (
    DISCRIMINATOR,
    DISTANCE,
    Sides,
    distance_scores,
    matched_control,
    membership_not_run,
    membership_tests,
    nearest_not_run,
    nearest_tests,
    power_of_nearest,
    powers_of_distance,
    projection_not_run,
    projection_test,
    secondary_numbers,
    smallest_certain_share,
    with_power,
)
from analysis.nearest_training import NearestTraining
from analysis.planted_copies import ANY, TRANSFORMATIONS

SETTINGS = leak_tests.BatterySettings(level=0.01, ci=0.95, resamples=400, draws=3)
NUM_TRAIN, NUM_HELDOUT = 120, 150
KEYS = ["projection-gap", "nearest-ssim", "nearest-features", "nearest-pixels", "membership-discriminator",
        "membership-discriminator-tpr", "membership-synthetic-distance", "membership-synthetic-distance-tpr"]


def no_beat():
    pass


def make_measured(ratios, feature_ratios=None, pixel_ratios=None):
    """Return what was measured of images with these ratios of the distance to the nearest and to the next."""
    ratios, count = np.asarray(ratios, np.float64), len(ratios)
    feature_ratios = ratios if feature_ratios is None else np.asarray(feature_ratios, np.float64)
    pixel_ratios = ratios if pixel_ratios is None else np.asarray(pixel_ratios, np.float64)
    zeros, ones = np.zeros(count), np.ones(count)
    return Measured(features=np.zeros([count, 2], np.float32), nearest=NearestTraining(
        ssim=0.8 * ones, ratio=ratios, row=zeros.astype(int), orientation=zeros.astype(int),
        shift=np.zeros([count, 2], int), scale=ones, feature_distance=ones, feature_ratio=feature_ratios,
        pixel_distance=ones, pixel_ratio=pixel_ratios))


def make_sides(num_train=NUM_TRAIN, num_heldout=NUM_HELDOUT, per_group=1):
    return Sides(train_groups=np.arange(num_train) // per_group, heldout_groups=np.arange(num_heldout) // per_group,
                 train_strata=np.arange(num_train) % 2, heldout_strata=np.arange(num_heldout) % 2)


def uniform(count, seed, low=0.6, high=1.0):
    return np.random.RandomState(seed).uniform(low, high, count)


def normal(count, seed, shift=0.0):
    return np.random.RandomState(seed).randn(count) + shift


# Which tests there are


def test_tests_that_did_not_run_have_the_keys_and_sentences_of_those_that_did():
    sides, heldout = make_sides(), make_measured(uniform(300, 1))
    ran = [projection_test(*sides.scores(normal(NUM_TRAIN, 0), normal(NUM_HELDOUT, 1)), SETTINGS, {}),
           *nearest_tests(make_measured(uniform(100, 0)), heldout, heldout, np.arange(300), np.arange(300), SETTINGS,
                         np.arange(300)),
           *membership_tests(DISCRIMINATOR, sides, normal(NUM_TRAIN, 2), normal(NUM_HELDOUT, 3), SETTINGS),
           *membership_tests(DISTANCE, sides, normal(NUM_TRAIN, 4), normal(NUM_HELDOUT, 5), SETTINGS)]
    missing = [projection_not_run("why"), *nearest_not_run("why"), *membership_not_run(DISCRIMINATOR, "why"),
               *membership_not_run(DISTANCE, "why")]
    assert [test.key for test in ran] == [test.key for test in missing] == KEYS
    for test, other in zip(ran, missing, strict=True):
        for name in ("number", "title", "question", "statistic", "expected"):
            assert getattr(test, name) == getattr(other, name)
        assert test.question.endswith(("?", "."))
        assert (test.reason, other.reason) == (None, "why")
        assert 0 < test.p_value <= 1
        assert (other.p_value, other.estimate, other.control, dict(other.counts)) == (None, None, "", {})
        assert test.estimate.low <= test.estimate.estimate <= test.estimate.high
        assert test.expected == (0.01 if test.number == 2 or test.key.endswith("-tpr") else 0.5)
    assert [test.number for test in ran] == [1, 2, 2, 2, 3, 3, 3, 3]


# Test 1


def test_projection_test_speaks_of_distances_and_counts_groups():
    sides = make_sides(per_group=2)
    distances = np.abs(normal(NUM_TRAIN, 0)) + 1, np.abs(normal(NUM_HELDOUT, 1)) + 2
    members, heldout = sides.scores(-distances[0], -distances[1])
    found = projection_test(members, heldout, SETTINGS, {"num_steps": 7})
    assert found.p_value == pytest.approx(1 / 401)  # no way to deal groups gives as much
    assert found.estimate.estimate > 0.8
    assert dict(found.counts) == {"training images": 120, "training groups": 60, "held-out images": 150,
                                  "held-out groups": 75}
    medians = [float(np.median(each)) for each in distances]
    assert found.details["median_distances"] == {"training": pytest.approx(medians[0]),
                                                 "held-out": pytest.approx(medians[1])}
    assert found.details["projection"] == {"num_steps": 7}
    gaps = [distances[1][side::2].mean() - distances[0][side::2].mean() for side in (0, 1)]  # by class, equal counts
    record = found.details["difference_of_means"]
    assert record["estimate"] == pytest.approx(np.mean(gaps))
    assert record["low"] < record["estimate"] < record["high"]
    assert f"Median distance {medians[0]:.4g} of training images, {medians[1]:.4g} of held-out ones" in found.control
    assert f"difference of means within classes {np.mean(gaps):+.3g} [" in found.control


# Test 2


def test_nearest_tests_are_the_exceedance_tests_of_each_score():
    ratios = [[uniform(count, 3 * score + place) for place, count in enumerate((400, 300, 50))] for score in range(3)]
    groups = np.arange(300) // 2
    ours, heldout, others = map(make_measured, *ratios)
    found = list(nearest_tests(ours, heldout, others, groups, np.arange(50), SETTINGS, np.arange(300)))
    for test, sets in zip(found, ratios, strict=True):
        scores = [1 - each for each in sets]
        expected = exceedance_test(scores[0], scores[1], groups, resamples=SETTINGS.resamples)
        assert (test.p_value, test.estimate) == (expected.p_value, expected.share)
        second = float((scores[2] > expected.threshold).mean())
        assert test.details == {
            "threshold": expected.threshold, "num_beyond": expected.num_beyond, "ranks": list(expected.ranks),
            "counts": list(expected.counts), "num_units": 150, "share_of_other_training": second}
        assert dict(test.counts) == {"synthetic images": 400, "held-out images": 300, "held-out groups": 150,
                                     "training images among others": 50}
        assert test.control == (
            f"{expected.num_beyond} of 400 synthetic images are beyond; so are {100 * second:.2g} % of 50 training "
            f"images compared with those of other groups. The most extreme synthetic image is at "
            f"{scores[0].max():.3g}, the most extreme held-out one at {scores[1].max():.3g} (0: as near as the next, "
            "1: equal).")


def test_copies_among_synthetic_images_are_found_by_the_score_that_sees_them():
    ratios = np.concatenate([uniform(390, 0), uniform(10, 9, 0.0, 0.1)])
    heldout = make_measured(uniform(1000, 1), uniform(1000, 2))
    found = nearest_tests(make_measured(ratios, uniform(400, 3), uniform(400, 4)), heldout, heldout, np.arange(1000),
                          np.arange(1000), SETTINGS, np.arange(1000))
    by_ssim, by_features, by_pixels = (test.p_value for test in found)
    assert by_ssim < 0.001
    assert min(by_features, by_pixels) > 0.01


def test_too_few_held_out_groups_are_a_reason_not_to_run():
    heldout = make_measured(uniform(300, 1))
    found = list(nearest_tests(make_measured(uniform(100, 0)), heldout, heldout, np.arange(300) % 19, np.arange(300),
                               SETTINGS, np.arange(300)))
    assert [test.reason for test in found] == [
        "the control has 19 groups of images; the test needs at least 20"] * 3
    assert all(test.p_value is None and test.counts["held-out groups"] == 19 for test in found)


def test_only_the_images_of_the_control_are_compared_and_the_note_says_so():
    ratios, rows, groups = uniform(300, 1), np.arange(0, 300, 3), np.arange(300) // 2
    ours, others = make_measured(uniform(100, 0)), make_measured(uniform(50, 2))
    found = next(nearest_tests(ours, make_measured(ratios), others, groups, np.arange(50), SETTINGS, rows, "A note."))
    expected = next(nearest_tests(ours, make_measured(ratios[rows]), others, groups[rows], np.arange(50), SETTINGS,
                                  np.arange(100)))
    assert (found.p_value, found.counts, found.details) == (expected.p_value, expected.counts, expected.details)
    assert found.control == f"{expected.control} A note."


HELDOUT_CLASSES = ["nv"] * 80 + ["mel"] * 20  # two images of a lesion each


@pytest.mark.parametrize(("synthetic", "note"), [
    ([""] * 9, ""), ([""] + ["mel"] * 9, ""), (["nv"] * 8 + ["mel"] * 2, ""), (["nv"] * 9 + ["mel"], ""),
    (["nv"] * 5 + ["bcc"] * 5, "Held-out images have no bcc, so the control has other classes than the synthetic "
     "set.")])
def test_control_is_all_held_out_images_where_classes_fit_or_cannot(synthetic, note):
    rows, found = matched_control(synthetic, HELDOUT_CLASSES, np.arange(100) // 2, 0)
    assert rows.tolist() == list(range(100))
    assert found == note


@pytest.mark.parametrize(("synthetic", "counts"), [
    (["mel"] * 7, {"mel": 20}), (["nv"] * 5 + ["mel"] * 5, {"mel": 20, "nv": 20}),
    (["nv"] * 30 + ["mel"] * 20, {"mel": 20, "nv": 30})])
def test_control_has_whole_groups_with_the_class_shares_of_the_synthetic_set(synthetic, counts):
    groups = np.arange(100) // 2
    rows, note = matched_control(synthetic, HELDOUT_CLASSES, groups, 0)
    assert dict(Counter(HELDOUT_CLASSES[row] for row in rows)) == counts
    assert np.bincount(groups[rows])[np.unique(groups[rows])].tolist() == [2] * (len(rows) // 2)
    assert note == (f"{len(rows)} of the held-out images, chosen so that classes have the shares that they have in the "
                    "synthetic set.")
    again = [matched_control(synthetic[::-1], HELDOUT_CLASSES, groups, seed)[0].tolist() for seed in (0, 1)]
    assert again[0] == rows.tolist()
    assert again[1] != rows.tolist() or "nv" not in counts


# Test 3


def test_membership_tests_are_the_membership_test_of_the_scores():
    sides, train, heldout = make_sides(per_group=3), normal(NUM_TRAIN, 0, 0.5), normal(NUM_HELDOUT, 1)
    by_auc, by_tpr = membership_tests(DISTANCE, sides, train, heldout, SETTINGS)
    expected = membership_test(*sides.scores(train, heldout), resamples=400, permutations=400)
    for test, attack in ((by_auc, expected.auc), (by_tpr, expected.tpr)):
        assert (test.p_value, test.estimate) == (attack.p_value, attack.interval)
        assert test.control == (f"Training images against other training images: {attack.control:.3f} (95 % of splits "
                                f"{attack.control_low:.3f} to {attack.control_high:.3f}).")
        assert test.details == {"member_against_member": {
            "median": attack.control, "low": attack.control_low, "high": attack.control_high}}
        assert dict(test.counts) == {"training images": 120, "training groups": 40, "held-out images": 150,
                                     "held-out groups": 50}
    wins = [(train[side::2][:, None] > heldout[side::2]).mean() for side in (0, 1)]
    assert by_auc.estimate.estimate == pytest.approx(np.mean(wins))


def test_images_without_a_score_are_left_out():
    train, heldout = normal(NUM_TRAIN, 0), normal(NUM_HELDOUT, 1)
    train[::4], heldout[::5] = np.nan, np.nan
    by_auc, by_tpr = membership_tests(DISCRIMINATOR, make_sides(), train, heldout, SETTINGS)
    assert dict(by_auc.counts) == {"training images": 90, "training groups": 90, "held-out images": 120,
                                   "held-out groups": 120}
    assert by_tpr.reason is None


def test_few_held_out_images_leave_the_auc_alone():
    by_auc, by_tpr = membership_tests(DISTANCE, make_sides(120, 60), normal(120, 0), normal(60, 1), SETTINGS)
    assert by_auc.p_value is not None
    assert by_tpr.p_value is None
    assert by_tpr.reason == "60 held-out images; a true positive rate at 1 % false positives needs at least 100"


@pytest.mark.parametrize(("known", "reason"), [
    (0, "no training image has a score: the network has none of their classes"),
    (1, "there is 1 group of training images whose class is on both sides; the test needs at least 2")])
def test_unknown_scores_are_a_reason_not_to_run(known, reason):
    train = np.where(np.arange(NUM_TRAIN) < known, 1.0, np.nan)
    found = membership_tests(DISCRIMINATOR, make_sides(), train, normal(NUM_HELDOUT, 0), SETTINGS)
    assert [(test.p_value, test.reason) for test in found] == [(None, reason)] * 2


def test_distance_scores_are_larger_for_nearer_images_and_relative_to_the_reference():
    to_synthetic, to_reference = np.array([1.0, 4, 2]), np.array([3.0, 3, 2])
    assert distance_scores(to_synthetic, None).tolist() == [-1, -4, -2]
    assert distance_scores(to_synthetic, to_reference).tolist() == [2, -1, 0]


def test_reference_takes_away_what_any_network_comes_near_to():
    easy = 3 * np.abs(normal(NUM_TRAIN + NUM_HELDOUT, 0))  # an image that lies among others is near to all networks
    noise = 0.1 * normal(NUM_TRAIN + NUM_HELDOUT, 1)
    to_synthetic = 5 + easy + noise - 0.1 * (np.arange(len(easy)) < NUM_TRAIN)
    p_values = [membership_tests(DISTANCE, make_sides(), *np.split(distance_scores(to_synthetic, reference),
                                                                   [NUM_TRAIN]), SETTINGS)[0].p_value
                for reference in (None, 5 + easy)]
    assert p_values[0] > 0.05
    assert p_values[1] < 0.01


# Power


def test_power_of_nearest_finds_copies_of_the_ways_that_the_score_sees():
    originals, ways = 60, len(TRANSFORMATIONS)
    copies = np.where(np.arange(ways * originals) // originals == 1, 0.05, 0.8)  # only mirrored copies look like copies
    heldout, groups = make_measured(uniform(1000, 1)), np.arange(1000)
    synthetic = make_measured(uniform(1000, 0))
    tests = adjust(list(nearest_tests(synthetic, heldout, heldout, groups, groups, SETTINGS, groups)))
    found = power_of_nearest(tests[0], synthetic, heldout, make_measured(copies), groups, groups, tests, SETTINGS,
                             no_beat)
    assert (found.key, found.num_draws) == ("nearest-ssim", 3)
    assert found.smallest_share("mirrored") <= 0.02
    assert found.found["mirrored"][-2:] == [3, 3]
    assert all(counts == [0] * 5 for way, counts in found.found.items() if way not in ("mirrored", ANY))


def test_power_of_distance_finds_copies_that_are_near_to_training_images_only():
    sides, originals = make_sides(), 40
    to_synthetic = 5 + normal(NUM_TRAIN + NUM_HELDOUT, 0) ** 2
    to_planted = np.full([len(TRANSFORMATIONS) * originals, len(to_synthetic)], 9.0)
    for copy in range(originals, 2 * originals):  # mirrored ones are near to three training images each
        to_planted[copy, 3 * (copy - originals) + np.arange(3)] = 0
    tests = membership_tests(DISTANCE, sides, *np.split(-to_synthetic, [NUM_TRAIN]), SETTINGS)
    for test in tests:
        found, = powers_of_distance([test], sides, to_synthetic, to_planted, None, 700, tests, SETTINGS, no_beat)
        assert found.key == test.key
        assert found.found["mirrored"][-1] == 3  # 37 copies
        assert found.found["plain"] == [0] * 5


def test_power_is_told_of_tests_that_ran_with_scores():
    sides = make_sides()
    train, heldout = normal(NUM_TRAIN, 0), normal(NUM_HELDOUT, 1)
    tests = [*membership_tests(DISCRIMINATOR, sides, train, heldout, SETTINGS), *membership_not_run(DISTANCE, "why")]
    beats = []
    found = with_power(tests, {"membership-discriminator": sides.scores(train, heldout)}, SETTINGS,
                       lambda: beats.append(1))
    assert len(beats) == 4
    assert found[0].power.startswith("It would have found an AUC of 0.")
    assert " in 90 % of 3 draws: a shift of all training images by 0." in found[0].power
    assert found[1].power in [f"It would have found a leak in 90 % of 3 draws if {share} % of the training images had "
                              "been recognized with certainty." for share in (5, 10)]
    assert all(test.power == "" for test in found[2:])


def test_smallest_share_that_is_recognized_with_certainty_falls_with_the_level_and_is_none_where_none_is_found():
    scores = make_sides().scores(normal(NUM_TRAIN, 0), normal(NUM_HELDOUT, 1))
    shares = [smallest_certain_share(*scores, level=level, settings=SETTINGS) for level in (0.3, 0.01, 0)]
    assert shares[0] < shares[1]
    assert shares[2] is None


# Secondary numbers


@pytest.fixture(scope="module")
def features():
    """Features of 70 training images of 35 groups, 60 held-out and 50 synthetic ones."""
    random = np.random.RandomState(0)
    return [random.randn(count, 3).astype(np.float32) for count in (70, 60, 50)]


def numbers_of(features, per_group=2):
    sides = make_sides(len(features[0]), len(features[1]), per_group)
    return {number.name: number for number in secondary_numbers(*features, sides, SETTINGS)}


def distances(first, second):
    return np.linalg.norm(first.astype(float)[:, None] - second.astype(float), axis=2)


def authentic_share(train, groups, images):
    """Return the percentage of images that are farther from the nearest training image than that is from others."""
    among = distances(train, train)
    among[groups[:, None] == groups] = np.inf
    nearest = distances(images, train)
    return 100 * (nearest.min(axis=1) > among.min(axis=1)[nearest.argmin(axis=1)]).mean()


def test_authpct_is_that_of_its_definition(features):
    train, heldout, synthetic = features
    found, groups = numbers_of(features)["AuthPct"], np.arange(70) // 2
    assert found.value == pytest.approx(authentic_share(train, groups, synthetic))
    assert found.control == pytest.approx(authentic_share(train, groups, heldout))
    assert found.interval.low < found.value < found.interval.high
    assert found.reason is None


def test_ct_is_the_z_score_of_mann_and_whitney_in_one_cell(features):
    train, heldout, synthetic = features  # with fewer than 200 images there is one cell
    found = numbers_of(features)["C_T"]
    of_synthetic, of_heldout = (distances(each, train).min(axis=1) for each in (synthetic, heldout))
    u = (of_synthetic[:, None] > of_heldout).sum()
    deviation = np.sqrt(50 * 60 * (50 + 60 + 1) / 12)
    assert found.value == pytest.approx((u - 50 * 60 / 2) / deviation)
    copies = numbers_of([train, heldout, train[:50] + np.float32(0.001)])["C_T"]
    assert copies.value < -5


def in_neighborhoods(first, second):
    """Return the share of images of the second set within the distance of its third neighbor of one of the first."""
    radii = np.sort(distances(first, first), axis=1)[:, 3]  # the first is the image itself
    return (distances(second, first) <= radii).any(axis=1).mean()


def test_precision_and_recall_are_against_equally_many_training_and_held_out_images(features):
    train, heldout, synthetic = features
    found = numbers_of([train, heldout[:40], synthetic])
    assert "for 40 random training images, and for as many held-out ones" in found["Precision"].meaning
    assert found["Precision"].control == pytest.approx(in_neighborhoods(heldout[:40], synthetic))
    assert found["Recall"].control == pytest.approx(in_neighborhoods(synthetic, heldout[:40]))
    chosen = [np.sort(np.random.RandomState(SETTINGS.seed).permutation(70)[:40])]
    assert found["Precision"].value == pytest.approx(in_neighborhoods(train[chosen[0]], synthetic))
    assert found["Recall"].value == pytest.approx(in_neighborhoods(synthetic, train[chosen[0]]))


def test_secondary_numbers_of_too_few_images_are_missing_with_a_reason(features):
    train, heldout, synthetic = features
    found = numbers_of([train, heldout, synthetic[:3]])
    assert found["AuthPct"].value is None or found["AuthPct"].interval is None
    assert found["Precision"].value is found["Recall"].control is None
    assert found["Precision"].reason == "there are 60 images; expected more than 3"
    one_group = numbers_of([train[:2], heldout, synthetic])
    assert one_group["AuthPct"].reason == (
        "there are 2 training images of 1 group; expected at least 2 groups, since distances to images of other groups "
        "are needed")
    assert all(number.value is not None or number.reason for number in (*found.values(), *one_group.values()))
