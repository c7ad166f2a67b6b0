"""Names of metrics say how many images they take."""

import pytest

from dnnlib.cli import UserError
from metrics.names import DESCRIPTIONS, KNOWN_NAMES, MetricRequest, parse_metric, parse_metrics


def request(name, **fields):
    return MetricRequest(name=name, **fields)


@pytest.mark.parametrize("expected", [
    request("fid50k_full", kind="fid", num_fakes=50_000, full=True),
    request("fid50k", kind="fid", num_fakes=50_000, num_reals=50_000),
    request("fid500_full", kind="fid", num_fakes=500, full=True),
    request("kid5k_full", kind="kid", num_fakes=5000, full=True),
    request("kid20", kind="kid", num_fakes=20, num_reals=20),
    request("fid_full", kind="fid", num_fakes=None, full=True),
    request("kid_full", kind="kid", num_fakes=None, full=True),
    request("pr_full", kind="pr", num_fakes=None, full=True, k=3),
    request("pr50k3_full", kind="pr", num_fakes=50_000, full=True, k=3),
    request("pr2k5", kind="pr", num_fakes=2000, num_reals=2000, k=5),
    request("pr2k_full", kind="pr", num_fakes=2000, full=True, k=3),
    request("pr500_full", kind="pr", num_fakes=500, full=True, k=3),
    request("dc5k5_full", kind="dc", num_fakes=5000, full=True, k=5),
    request("dc600_full", kind="dc", num_fakes=600, full=True, k=5),
    request("dc2k3", kind="dc", num_fakes=2000, num_reals=2000, k=3),
    request("dc_full", kind="dc", num_fakes=None, full=True, k=5),
    request("auth5k_full", kind="auth", num_fakes=5000, full=True),
    request("auth_full", kind="auth", num_fakes=None, full=True),
    request("div300_full", kind="div", num_fakes=300, full=True),
    request("div_full", kind="div", num_fakes=None, full=True),
    request("is10k", kind="is", num_fakes=10_000),
    request("ppl2_wend", kind="ppl", num_fakes=50_000, space="w", sampling="end"),
    request("ppl_zfull", kind="ppl", num_fakes=50_000, space="z", sampling="full", crop=True),
    request("ppl1k_zend", kind="ppl", num_fakes=1000, space="z", sampling="end", crop=True),
    request("ppl1k2_wfull", kind="ppl", num_fakes=1000, space="w", sampling="full"),
    request("ppl64_wend", kind="ppl", num_fakes=64, space="w", sampling="end", crop=True),
], ids=lambda expected: expected.name)
def test_parse_metric_reads_counts_and_options(expected):
    assert parse_metric(expected.name) == expected


def test_known_names_are_50k_ones_of_the_paper_and_5k_ones_and_each_kind_is_described():
    requests = [parse_metric(name) for name in KNOWN_NAMES]
    assert {found.num_fakes for found in requests if found.kind not in ("dc", "auth", "div")} == {50_000}
    assert {found.num_fakes for found in requests if found.kind in ("dc", "auth", "div")} == {5000}
    assert {found.kind for found in requests} == set(DESCRIPTIONS)
    assert all("is better" in text or "is smoother" in text for text in DESCRIPTIONS.values())


@pytest.mark.parametrize("name", ["", "fid", "fid0", "fid05k", "fid2kk", "fid2k_ful", "FID2k", "fid2k3", "is10k_full",
                                  "ppl2_xend", "ppl_w", "pr", "is_full", "ppl_full", "kid__full",
                                  "fid-1", "kid2k_full ", "ppl1k3_wend", "dc", "auth5k", "div5k", "auth5k3_full"])
def test_parse_metric_unknown_name_gives_a_hint(name):
    with pytest.raises(UserError) as error:
        parse_metric(name)
    assert str(error.value) == (
        f"metric {name!r} is not known; expected names such as fid2k_full, kid500, kid_full, pr2k3_full, dc600_full, "
        f"auth_full, div_full, is10k, ppl1k2_wend, or one of {', '.join(KNOWN_NAMES)}")


@pytest.mark.parametrize(("name", "expected"), [
    ("fid1", "2"), ("kid1_full", "2, or kid_full for all images"), ("pr3_full", "4, or pr_full for all images"),
    ("is9", "10"), ("pr1k1000_full", "1001, or pr_full for all images"),
    ("dc5_full", "6, or dc_full for all images"), ("div2_full", "3, or div_full for all images"),
    ("auth3_full", "4, or auth_full for all images")])
def test_parse_metric_too_few_images_raises(name, expected):
    with pytest.raises(UserError, match=rf"^metric {name} takes \d+ images; expected at least {expected}$"):
        parse_metric(name)


def test_parse_metrics_takes_each_once_and_in_order():
    assert [found.name for found in parse_metrics(" kid5k,fid2k_full , is10k,")] == ["kid5k", "fid2k_full", "is10k"]
    with pytest.raises(UserError, match=r"^--metrics names kid5k 2 times; expected each metric once$"):
        parse_metrics("kid5k,fid2k_full,kid5k")
    assert parse_metrics(["is10k"]) == (parse_metric("is10k"),)
    with pytest.raises(UserError, match=r"^no metric is named; expected names such as"):
        parse_metrics(" ,")


@pytest.mark.parametrize(("name", "keys", "better"), [
    ("pr2k", ["pr2k_precision", "pr2k_recall"], {"pr2k_precision": False, "pr2k_recall": False}),
    ("dc_full", ["dc_full_density", "dc_full_coverage"], {"dc_full_density": False, "dc_full_coverage": False}),
    ("auth_full", ["auth_full_authpct", "auth_full_ct"], {"auth_full_authpct": False}),  # C_T is best near 0
    ("div_full", ["div_full_fake", "div_full_real", "div_full_ratio"], {"div_full_ratio": False}),
    ("is10k", ["is10k_mean", "is10k_std"], {"is10k_mean": False}),
    ("kid500", ["kid500"], {"kid500": True}),
])
def test_metrics_name_their_values_and_which_are_better(name, keys, better):
    assert list(parse_metric(name).keys) == keys
    assert parse_metric(name).lower_is_better == better
