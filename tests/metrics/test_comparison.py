"""metrics.comparison: which differences are named, that pairing narrows them, and what can be compared."""

import json

import numpy as np
import pytest

from dnnlib.cli import UserError
from metrics.comparison import Measured, difference_table, differences, find_items
from metrics.intervals import Jackknife, holm
from metrics.kernel import kernel_jackknife
from metrics.names import parse_metrics

METRIC = "kid_full"


def mean_of(**sides):
    """Return the jackknife of the sum of the sides' means."""
    estimate = sum(values.mean() for values in sides.values())
    return Jackknife(estimate=estimate, without={
        side: estimate + (values.mean() - values) / (len(values) - 1) for side, values in sides.items()})


def measured(name, *, is_network=True, key=METRIC, ci=None, **sides):
    jackknife = {key: mean_of(**sides)} if sides else {}
    value = float(jackknife[key].estimate) if sides else 0.0
    return Measured(name=name, is_network=is_network, jackknives={METRIC: jackknife},
                    records={METRIC: {"results": {key: value}, "ci": ci}})


@pytest.fixture
def draw():
    rng = np.random.RandomState(0)
    return lambda count, mean=0.0: mean + rng.randn(count)


def test_difference_of_values_of_the_same_reals_has_their_mean_and_error_alone(draw):
    reals, first, second = draw(50), draw(30, 2.0), draw(40)
    (found,) = differences([measured("a", is_network=False, real=reals, fake=first),
                            measured("b", is_network=False, real=reals, fake=second)], 0.95)
    assert found.interval.estimate == pytest.approx(first.mean() - second.mean())
    # What the reals add cancels; the variance of a mean of independent values remains.
    assert found.interval.std_error == pytest.approx(np.sqrt(first.var(ddof=1) / 30 + second.var(ddof=1) / 40))
    assert (found.paired, found.is_named) == (("real",), True)


def test_networks_of_equal_numbers_are_paired_by_latents_and_sets_are_not(draw):
    latents = draw(200)
    one, other = latents + 0.1 * draw(200), latents + 0.1 * draw(200)
    reals = draw(100)
    paired, apart = (differences([measured("a", real=reals, fake=one),
                                  measured("b", is_network=is_network, real=reals, fake=other)], 0.95)[0]
                     for is_network in (True, False))
    assert (paired.paired, apart.paired) == (("real", "fake"), ("real",))
    assert paired.interval.estimate == pytest.approx(apart.interval.estimate)
    # Errors of 0.1 sqrt(2 / n) instead of sqrt(2 / n), up to the spread of two estimates from 200 values, 5% each.
    assert paired.interval.std_error / apart.interval.std_error == pytest.approx(0.1, rel=0.25)


def test_kernel_distances_of_two_similar_snapshots_differ_less_uncertainly_when_paired():
    rng = np.random.RandomState(0)
    reals, fakes = rng.randn(80, 8), 0.3 + rng.randn(60, 8)
    values = {name: kernel_jackknife(reals, fakes + 0.05 * rng.randn(60, 8)) for name in "ab"}
    paired, apart = (differences([Measured(name=name, is_network=is_network, jackknives={METRIC: {METRIC: value}},
                                           records={METRIC: {"results": {METRIC: value.estimate}}})
                                  for name, value in values.items()], 0.95)[0].interval
                     for is_network in (True, False))
    assert paired.estimate == apart.estimate
    # Noise of 0.05 beside images that spread by 1 changes 5% of a value; half leaves room for the error of 60 images.
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


def test_networks_of_other_numbers_are_not_paired_by_latents(draw):
    reals = draw(20)
    (found,) = differences([measured("a", real=reals, fake=draw(30)), measured("b", real=reals, fake=draw(31))], 0.95)
    assert found.paired == ("real",)
    assert found.interval.num_units == {"real": 20, "fake of first": 30, "fake of second": 31}


def test_item_and_itself_differ_by_nothing(draw):
    reals, fakes = draw(20), draw(30)
    for is_network in (True, False):
        (found,) = differences([measured(name, is_network=is_network, real=reals, fake=fakes) for name in "ab"], 0.95)
        assert (found.interval.estimate, found.p_value, found.is_named) == (0, 1, False)


def test_order_of_items_changes_signs_only(draw):
    reals = draw(30)
    items = [measured(name, real=reals, fake=draw(40, mean)) for name, mean in (("a", 0), ("b", 0.5), ("c", 2))]
    forward = {(each.first, each.second): each for each in differences(items, 0.9)}
    for each in differences(items[::-1], 0.9):
        other = forward[each.second, each.first]
        assert each.p_holm == pytest.approx(other.p_holm)
        assert (each.interval.low, each.interval.estimate, each.interval.high) == pytest.approx(
            (-other.interval.high, -other.interval.estimate, -other.interval.low))


def test_p_values_are_adjusted_for_all_pairs_and_values_together(draw):
    """Differences that an interval alone would name are too many among 45 tests."""
    reals = draw(30)
    # Values of some standard errors, sqrt(1/40) each: the largest difference has a p-value near 0.01.
    items = [measured(str(index), is_network=False, real=reals, fake=(fakes := draw(40)) - fakes.mean() + index / 16)
             for index in range(10)]
    found = differences(items, 0.95)
    assert [each.p_holm for each in found] == holm([each.p_value for each in found])
    assert {each.num_tests for each in found} == {45}
    assert sum(each.p_value < 0.05 for each in found) > 0
    assert sum(each.is_named for each in found) == 0
    assert difference_table(found, 0.95) == ["The 45 differences are not distinguishable from 0."]


def test_named_difference_is_in_the_table_and_the_others_are_counted(draw):
    reals = draw(30)
    items = [measured(name, real=reals, fake=draw(40, mean)) for name, mean in (("run a", 0), ("b", 0), ("c", 5))]
    found = differences(items, 0.99)
    lines = difference_table(found, 0.99)
    assert lines[0] == "Differences distinguishable from 0 (Holm's correction for 3 tests, 99% intervals):"
    assert lines[1].split() == ["first", "second", "value", "first", "-", "second", "interval", "p"]
    assert {tuple(line.split("  ")[0:1]) for line in lines[2:4]} == {("run a",), ("b",)}
    assert lines[4:] == ["The other difference is not distinguishable from 0."]
    record = next(each for each in found if (each.first, each.second) == ("run a", "c")).as_record()
    assert f"  {record['difference']:.2f}  " in next(line for line in lines if line.startswith("run a"))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert list(record) == ["metric", "key", "first", "second", "difference", "low", "high", "level", "std_error",
                            "method", "unit", "num_units", "paired", "p_value", "p_holm", "num_tests",
                            "distinguishable"]


def test_value_without_an_interval_is_not_tested_and_says_why(draw):
    items = [measured("a", ci={METRIC: {"reason": "an interval needs 480 images"}}),
             measured("b", real=draw(9), fake=draw(9))]
    found = differences(items, 0.95)
    assert found[0].as_record() == {"metric": METRIC, "key": METRIC, "first": "a", "second": "b",
                                    "reason": "an interval needs 480 images"}
    assert difference_table(found, 0.95) == ["1 difference of kid_full not tested: an interval needs 480 images"]


def test_value_of_the_reals_alone_is_not_compared(draw):
    reals = draw(9)
    assert differences([measured(name, real=reals) for name in "ab"], 0.95) == []


def test_items_have_the_shortest_names_that_tell_them_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("x/a/set.zip", "x/b/set.zip", "other.zip"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    items = find_items(["x/a/set.zip", f"{tmp_path}/x/b/set.zip", "other.zip"], parse_metrics("kid_full"))
    assert [item.name for item in items] == ["a/set.zip", "b/set.zip", "other.zip"]


@pytest.mark.parametrize(("texts", "metrics", "message"), [
    (["a.zip", "none"], "kid_full", "--compare is none, which does not exist; expected a run, a network file or a set "
                                    "of images"),
    (["a.zip", "./a.zip"], "kid_full", "--compare names ./a.zip twice; expected different networks or sets"),
    (["a.safetensors", "a.zip"], "kid_full,ppl2_wend",
     "metric ppl2_wend needs networks, but --compare names a.zip, a set; expected networks, or other metrics"),
])
def test_items_that_cannot_be_compared_are_refused(tmp_path, monkeypatch, texts, metrics, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.zip", "a.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as caught:
        find_items(texts, parse_metrics(metrics))
    assert str(caught.value) == message
