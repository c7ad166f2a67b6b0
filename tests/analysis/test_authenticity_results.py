"""Test the data of the tests of authenticity: adjusted p-values, power, and when copies count as found."""

import pytest

from analysis.authenticity_results import adjust
from tests.helpers.made_authenticity import make_power, make_results, make_test


def test_adjust_corrects_for_the_tests_that_ran_and_keeps_their_order():
    tests = adjust([make_test("projection", 0.01), make_test("nearest", None), make_test("membership", 0.004)])
    assert [test.key for test in tests] == ["projection", "nearest", "membership"]
    assert [test.adjusted for test in tests] == [pytest.approx(0.01), None, pytest.approx(0.008)]


def test_adjust_without_a_test_that_ran_adjusts_nothing():
    assert [test.adjusted for test in adjust([make_test("nearest", None)])] == [None]


def test_test_at_the_level_is_found_and_above_it_is_not():
    (at_level,) = adjust([make_test("nearest", 0.01)])
    assert at_level.is_found(0.01)
    assert not at_level.is_found(0.0099)


@pytest.mark.parametrize(("found", "share"), [
    ((18, 18, 19, 20), 0.002),
    ((0, 17, 18, 20), 0.01),
    ((0, 20, 17, 20), 0.05),  # found by luck at 0.5 %: what counts is the share from which on copies are found
    ((20, 20, 20, 17), None),
    ((0, 0, 0, 0), None),
])
def test_smallest_share_is_that_from_which_on_nine_of_ten_draws_are_found(found, share):
    assert make_power(plain=found).smallest_share("plain") == share


@pytest.mark.parametrize(("p_values", "equal_images", "has_copies"), [
    ({"nearest": 0.001}, (), True),
    ({"nearest": 0.02}, (), False),
    ({"membership": 0.001}, (), False),
    ({"nearest": None}, (("a.png", "b.png"),), True),
])
def test_copies_are_shown_by_the_nearest_images_and_by_equal_ones(p_values, equal_images, has_copies):
    assert make_results(p_values, equal_images=equal_images).has_copies == has_copies
