"""The rounds of a decentralized run: whole iterations without drift, equal totals, members, seeds, refused settings."""

import math
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dnnlib.cli import UserError
from federated.schedule import Schedule, default_round_kimg, site_seed
from training.config import FederationConfig


def schedule(*, sizes=(1865, 10016, 18003), batch=16, sites=("a", "b", "c"), rounds=10, round_kimg=0.336, **flags):
    federation = FederationConfig(sites=sites[:len(sizes)], rounds=rounds, round_kimg=round_kimg, **flags)
    return Schedule(federation, sizes=sizes, batch=batch)


def test_three_rounds_of_336_images_end_at_the_iteration_that_ends_1_kimg():
    plan = schedule(sizes=[500], rounds=3)
    assert [plan.end_nimg("a", number) for number in range(4)] == [0, 336, 672, 1008]
    assert plan.end_nimg("a", 3) == math.ceil(1000 / 16) * 16  # train.py --kimg=1
    assert plan.total_images(3) == 1008


def test_rounds_that_are_no_whole_iterations_do_not_drift():
    plan = schedule(sizes=[500], round_kimg=0.1)
    assert [plan.end_nimg("a", number) for number in range(1, 6)] == [112, 208, 304, 400, 512]
    assert [plan.num_images("a", number) for number in range(1, 6)] == [112, 96, 96, 96, 112]


@pytest.mark.parametrize(("round_kimg", "ends"), [(0.07, [70, 140, 210]), (0.29, [290, 580, 870]),
                                                   (1.1, [1100, 2200, 3300]), (8.2, [8200, 16400, 24600])])
def test_lengths_of_rounds_are_decimal_numbers(round_kimg, ends):
    # In binary 1000 * 8.2 and its like lie just beside the whole number, and would cost an iteration.
    plan = schedule(sizes=[500], round_kimg=round_kimg, batch=10)
    assert [plan.end_nimg("a", number) for number in (1, 2, 3)] == ends


def test_proportional_rounds_share_the_total_by_size():
    plan = schedule(sizes=[1000, 500, 100], round_kimg=1.6, local="proportional", batch=10)
    assert [plan.num_images(site, 1) for site in "abc"] == [3000, 1500, 300]
    assert schedule(sizes=[1000, 500, 100], round_kimg=1.6, batch=10).total_images(1) == 4800
    assert plan.total_images(1) == 4800


@st.composite
def _plans(draw):
    sizes = draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
    batch = draw(st.integers(1, 64))
    round_kimg = draw(st.integers(50 * 64, 10**6)) / 1000
    return sizes, batch, round_kimg, draw(st.sampled_from(["equal", "proportional"]))


@settings(max_examples=60, deadline=None)
@given(_plans(), st.integers(1, 60))
def test_every_plan_has_whole_iterations_near_the_exact_numbers(plan, rounds):
    sizes, batch, round_kimg, local = plan
    plan = schedule(sizes=sizes, batch=batch, round_kimg=round_kimg, local=local, rounds=rounds)
    per_round = Fraction(str(round_kimg)) * 1000
    for site, size in zip("abc", sizes):
        exact = per_round if local == "equal" else per_round * len(sizes) * size / sum(sizes)
        assert plan.start_nimg(site, 1) == 0
        for number in range(1, rounds + 1):
            end = plan.end_nimg(site, number)
            assert end % batch == 0
            assert 0 <= end - number * exact < batch
            assert plan.start_nimg(site, number) + plan.num_images(site, number) == end
            assert plan.num_images(site, number) >= batch
    assert 0 <= plan.total_images(rounds) - rounds * per_round * len(sizes) < batch * len(sizes)


def test_mean_end_nimg_is_that_of_every_site_of_equal_rounds():
    plan = schedule(round_kimg=0.1)
    assert all(plan.mean_end_nimg(number) == plan.end_nimg(site, number) for site in "abc" for number in range(11))
    proportional = schedule(sizes=[300, 100], round_kimg=0.1, local="proportional")
    assert [proportional.mean_end_nimg(number) for number in range(3)] == [0, 112, 208]


# Members


def test_members_follow_join_and_leave_sorted_by_name():
    plan = schedule(sites=("c", "a", "b"), rounds=6, join=("a:3",), leave=("c:4", "a:5"))
    assert [plan.members(number) for number in range(1, 7)] == [["b", "c"], ["b", "c"], ["a", "b", "c"],
                                                                ["a", "b", "c"], ["a", "b"], ["b"]]


def test_a_site_that_joins_starts_where_the_plan_stands():
    plan = schedule(rounds=6, join=("c:5",))
    assert plan.start_nimg("c", 5) == plan.start_nimg("a", 5) == 4 * 336
    assert [plan.total_images(number) for number in range(7)] == [0, 672, 1344, 2016, 2688, 3696, 4704]


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(1, 8)] * 3))
def test_totals_are_sums_over_rounds_and_members(first, last):
    flags = {"join": tuple(f"{site}:{number}" for site, number in zip("abc", first)),
             "leave": tuple(f"{site}:{number}" for site, number in zip("abc", last))}
    attended = [{site for site, start, end in zip("abc", first, last) if start <= number <= end}
                for number in range(1, 6)]
    if not all(attended) or any(end < start for start, end in zip(first, last)):
        with pytest.raises(UserError):
            schedule(rounds=5, **flags)
        return
    plan = schedule(rounds=5, round_kimg=0.1, local="proportional", sizes=(40, 100, 90), **flags)
    total = 0
    for number, sites in enumerate(attended, 1):
        assert plan.members(number) == sorted(sites)
        total += sum(plan.num_images(site, number) for site in sites)
        assert plan.total_images(number) == total


def test_one_round_only_and_leaving_after_the_end_are_possible():
    plan = schedule(rounds=4, join=("b:2", "a:4"), leave=("b:2", "c:9"))
    assert [plan.members(number) for number in range(1, 5)] == [["c"], ["b", "c"], ["c"], ["a", "c"]]


def test_names_may_contain_colons():
    plan = schedule(sites=("a", "ward:3", "c"), rounds=2, join=("ward:3:2",))
    assert plan.members(1) == ["a", "c"]


@pytest.mark.parametrize(("flags", "message"), [
    ({"join": ("c",)}, "--join has c; expected NAME:ROUND with a round from 1 on, such as c:5"),
    ({"join": ("c:0",)}, "--join has c:0; expected NAME:ROUND with a round from 1 on, such as c:5"),
    ({"leave": ("c:-2",)}, "--leave has c:-2; expected NAME:ROUND with a round from 1 on, such as c:5"),
    ({"leave": ("c:soon",)}, "--leave has c:soon; expected NAME:ROUND with a round from 1 on, such as c:5"),
    ({"leave": (":2",)}, "--leave has :2; expected NAME:ROUND with a round from 1 on, such as c:5"),
    ({"join": ("d:2",)}, "--join names d, which is not a site; expected one of a, b, c"),
    ({"leave": ("B:2",)}, "--leave names B, which is not a site (did you mean b?); expected one of a, b, c"),
    ({"join": ("c:2", "c:3")}, "--join names c twice; expected each site once"),
    ({"join": ("c:11",)}, "--join has c:11, but --rounds is 10; expected a round from 1 to 10"),
    ({"join": ("c:5",), "leave": ("c:4",)},
     "--leave has c:4, which is before its first round 5; expected that or a later round"),
    ({"join": ("a:2", "b:3", "c:2")},
     "--join and --leave let no site take part in round 1 of 10; expected at least one in each round"),
    ({"join": ("c:6",), "leave": ("a:4", "b:3")},
     "--join and --leave let no site take part in round 5 of 10; expected at least one in each round"),
    ({"rounds": 0}, "--rounds is 0; expected a number >= 1"),
    ({"round_kimg": 0.015}, "--round-kimg is 0.015, so site a would see 15 images in a round; expected at least one "
     "iteration of --batch=16: try --round-kimg=0.016"),
    ({"round_kimg": 0.05, "local": "proportional"}, "--round-kimg is 0.05, so site a would see 9.3612 images in a "
     "round; expected at least one iteration of --batch=16: try --round-kimg=0.086"),
])
def test_settings_that_cannot_work_are_refused_in_one_line(flags, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        schedule(**flags)


@pytest.mark.parametrize("local", ["equal", "proportional"])
@pytest.mark.parametrize("sizes", [(1865, 10016, 18003), (1, 1, 1), (7, 999_983, 4), (3, 100)])
def test_the_round_kimg_of_the_message_works_and_is_the_smallest_in_images(sizes, local):
    with pytest.raises(UserError) as refused:
        schedule(sizes=sizes, round_kimg=1e-6, local=local)
    advice = float(str(refused.value).rsplit("=", 1)[1])
    plan = schedule(sizes=sizes, round_kimg=advice, local=local, rounds=30)
    assert all(plan.num_images(site, number) >= 16 for site in plan.sites for number in range(1, 31))
    with pytest.raises(UserError):
        schedule(sizes=sizes, round_kimg=round(advice - 0.001, 3) or 1e-6, local=local)


def test_default_round_passes_each_image_about_once():
    sizes = (1865, 10016, 18003)
    assert default_round_kimg(sizes, "equal") == 1.865
    assert default_round_kimg(sizes, "proportional") == 9.961
    plan = schedule(sizes=sizes, round_kimg=default_round_kimg(sizes, "proportional"), local="proportional")
    assert all(0 <= plan.num_images(site, 1) - size + 1 < 17 for site, size in zip("abc", sizes))


# Seeds


def test_site_seed_of_the_first_site_is_the_seed_and_others_differ():
    assert [site_seed(seed, 0) for seed in (0, 7, 2**40)] == [0, 7, 2**40]
    seeds = [site_seed(seed, index) for seed in range(40) for index in range(40)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_site_seed_stays_what_it_is():
    # A run that continues with another seed would not be the same run.
    assert site_seed(0, 1) == 3653550915336489339
