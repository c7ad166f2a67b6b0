"""From features to values: what each metric takes of two samples, and the intervals of its values."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from metrics import scores
from metrics.authenticity import authenticity
from metrics.diversity import diversity
from metrics.features import Features
from metrics.frechet import FeatureStats, frechet_distance
from metrics.inception_score import inception_score
from metrics.intervals import Jackknife
from metrics.kernel import kernel_distance, permuted_distances
from metrics.names import parse_metric, parse_metrics
from metrics.precision_recall import neighborhoods
from metrics.samples import Sample
from metrics.scores import Scoring, interval_record, permutation_record, score_all, share_work

CPU = torch.device("cpu")
PLAIN, WITH_CI = (Scoring(seed=3, level=level, device=CPU) for level in (None, 0.9))


def make_sample(count, seed, num_features=5, groups=None):
    random = np.random.RandomState(seed)
    p = random.dirichlet(np.ones(4), size=count).astype(np.float32)
    return Sample(features=Features(values=random.randn(count, num_features).astype(np.float32), probabilities=p),
                  groups=groups)


REAL = make_sample(60, seed=1, groups=np.arange(60) // 2)
FAKE = make_sample(70, seed=2)
HELDOUT = make_sample(50, seed=4)


def score(names, scoring=PLAIN, real=REAL, fake=FAKE, heldout=None):
    return score_all(parse_metrics(names), real, fake, heldout, scoring, lambda count: None)


def test_scores_are_the_values_of_the_metrics_functions():
    real, fake, heldout = (side.features.values for side in (REAL, FAKE, HELDOUT))
    stats = [FeatureStats.of(side) for side in (real, fake)]
    assert score("fid_full")["fid_full"].results == {
        "fid_full": frechet_distance(stats[0].mean, stats[0].covariance(), stats[1].mean, stats[1].covariance())}
    assert score("kid_full")["kid_full"].results == {"kid_full": kernel_distance(real, fake, 100, 60, 3)}
    found, expected = score("pr_full,dc_full"), neighborhoods(real, fake, [3, 5])
    assert found["pr_full"].results == {"pr_full_precision": expected[3].precision,
                                        "pr_full_recall": expected[3].recall}
    assert found["dc_full"].results == {"dc_full_density": expected[5].density,
                                        "dc_full_coverage": expected[5].coverage}
    mean, std = inception_score(FAKE.features.probabilities)
    assert score("is60", real=None)["is60"].results == {"is60_mean": mean, "is60_std": std}
    expected = authenticity(real, fake, REAL.groups, heldout, seed=3)
    assert score("auth_full", heldout=HELDOUT)["auth_full"].results == {
        "auth_full_authpct": expected.authpct.estimate, "auth_full_ct": expected.ct.estimate}
    expected = diversity(real, fake, REAL.groups)
    assert score("div_full")["div_full"].results == {
        "div_full_fake": expected.fake.estimate, "div_full_real": expected.real.estimate,
        "div_full_ratio": expected.ratio.estimate}


def test_scores_without_a_level_have_no_jackknives():
    for names in ("fid_full", "kid_full", "pr_full,dc_full", "auth_full", "div_full"):
        assert all(found.jackknives == {} for found in score(names).values())


@pytest.mark.parametrize("names", ["fid_full", "kid_full", "pr_full,dc_full", "auth_full", "div_full"])
def test_intervals_are_of_every_value_and_wider_with_the_level(names):
    for name, found in score(names, WITH_CI).items():
        assert list(found.jackknives) == [key for key in parse_metric(name).keys if key in found.results]
        for jackknife in found.jackknives.values():
            widths = [record["high"] - record["low"] for record in (
                interval_record(jackknife, level) for level in (0.5, 0.9, 0.99))]
            assert all(narrow < wide for narrow, wide in pairwise(widths))


def test_intervals_name_the_unit_that_is_left_out():
    groups = np.arange(70) // 7
    assert score("kid_full", WITH_CI)["kid_full"].jackknives["kid_full"].unit == "group"  # of reals
    independent = make_sample(60, seed=1)
    assert score("kid_full", WITH_CI, real=independent)["kid_full"].jackknives["kid_full"].unit == "image"
    found = score("kid_full", WITH_CI, real=independent, fake=make_sample(70, seed=2, groups=groups))["kid_full"]
    assert (found.jackknives["kid_full"].unit, found.jackknives["kid_full"].num_units) == (
        "group", {"real": 60, "fake": 10})


def test_note_says_why_there_is_no_copying_statistic():
    few = make_sample(10, seed=5)
    found = score("auth_full", fake=few, heldout=HELDOUT)["auth_full"]
    assert list(found.results) == ["auth_full_authpct"]
    assert found.fields == {"note": "no C_T: no part of the training images has 20 fakes and a held-out image beside "
                                    "it"}


def test_jackknife_of_too_few_groups_is_a_reason_and_leaves_the_value():
    one = make_sample(60, seed=1, groups=np.zeros(60, dtype=np.int64))
    for names in ("fid_full", "kid_full", "pr_full,dc_full"):
        plain, found = score(names, real=one), score(names, WITH_CI, real=one)
        for name, each in found.items():
            assert each.results == plain[name].results
            assert all(isinstance(reason, str) and reason for reason in each.jackknives.values())
            assert all(list(record) == ["reason"] for record in each.intervals(WITH_CI).values())


def test_interval_of_one_group_gives_the_reason():
    jackknife = Jackknife(estimate=1.0, without={"real": np.array([1.0])})
    assert interval_record(jackknife, 0.9) == {
        "reason": "there is 1 group of real images; an interval needs at least 2"}


def test_permutation_record_is_that_of_the_test(monkeypatch):
    found = permutation_record(REAL, HELDOUT, WITH_CI, lambda count: None)
    expected = permuted_distances(REAL.features.values, HELDOUT.features.values, REAL.groups, seed=3)
    assert found == {"estimate": expected.estimate, "p_value": expected.p_value, "permutations": 1000,
                     "null_high": np.quantile(expected.null, 0.9), "unit": "group",
                     "num_units": {"real": 30, "fake": 50}}
    monkeypatch.setattr(scores, "MAX_PERMUTED", 100)
    assert permutation_record(REAL, HELDOUT, WITH_CI, lambda count: None) == {
        "reason": "too many images for a permutation test: 110, at most 100"}


def test_metrics_of_neighborhoods_share_their_work():
    names = "pr_full,dc_full,kid_full,fid_full"
    assert [share_work(request) for request in parse_metrics(names)] == [
        "neighborhoods", "neighborhoods", "kid_full", "fid_full"]
