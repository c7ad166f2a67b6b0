"""Costs, cells and tables of a comparison."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from federated.arm_tables import ArmResult, Costs, Reference, csv_rows, describe, read_costs, text_tables


def line(kimg, speed, **more):
    """Return a line of stats.jsonl."""
    values = {"Progress/kimg": kimg, "Timing/sec_per_kimg": speed, **more}
    return {name: {"num": 1, "mean": value, "std": 0.0} for name, value in values.items()}


def interval(low, high, estimate):
    return {"low": low, "high": high, "estimate": estimate, "level": 0.9}


def kid(value, low=None, high=None, estimate=None, **more):
    ci = {} if low is None else {"ci": {"kid_full": interval(low, high, value if estimate is None else estimate)}}
    return {"kid_full": {"results": {"kid_full": value}, "num_real": 20, "num_fake": 20, **ci, **more}}


def arm(name, records, images=1000, curve=(), **costs):
    return ArmResult(name=name, run=Path("out") / name, snapshots=(Path("network-snapshot-000001.safetensors"),),
                     costs=Costs(images=images, **{"sec_per_kimg": None, **costs}), records=records, curve=list(curve))


def reference(name, count):
    evaluator = SimpleNamespace(requests=[SimpleNamespace(name="kid_full")])
    return Reference(name=name, path=f"{name}.zip", content="0" * 64, num_images=count, evaluator=evaluator,
                     settings={"seed": 0})


REFERENCES = [reference("a", 20), reference("union", 60)]
ARMS = [
    arm("central", {"a": kid(0.0251, 0.021, 0.029), "union": kid(0.02, 0.019, 0.022, 0.0205)}, sec_per_kimg=36.126),
    arm("federated", {"a": kid(0.5, 0.4, 0.61), "union": kid(0.75)}, images=1024, sec_per_kimg=40.0,
        bytes_up={"a": 3 * 2**20, "b": 2**20}, bytes_down={"a": 2**19, "b": 2**20}),
]


def test_seconds_per_kimg_are_the_time_of_all_images_over_their_number():
    lines = [line(0.016, 250.0), line(5.024, 40.0), line(10.032, 30.0)]
    seconds = 0.016 * 250 + 5.008 * 40 + 5.008 * 30
    assert read_costs(lines, 10032) == Costs(images=10032, sec_per_kimg=pytest.approx(seconds / 10.032))


def test_line_without_a_time_counts_neither_its_images_nor_its_time():
    lines = [line(1, 10.0), line(3, None), line(4, 20.0)]
    assert read_costs(lines, 4000).sec_per_kimg == pytest.approx((1 * 10 + 1 * 20) / 2)
    assert read_costs([], 0).sec_per_kimg is None


def test_bytes_are_summed_over_rounds_for_each_institution_also_one_that_joins_later():
    lines = [line(1, 10.0, **{"Exchange/bytes_up/a": 5, "Exchange/bytes_down/a": 7}),
             line(2, 10.0, **{"Exchange/bytes_up/a": 5, "Exchange/bytes_down/a": 7, "Exchange/bytes_up/b": 1,
                              "Exchange/bytes_down/b": 2})]
    costs = read_costs(lines, 2000)
    assert (costs.bytes_up, costs.bytes_down) == ({"a": 10, "b": 1}, {"a": 14, "b": 2})
    assert costs.bytes_by_site == {"a": 24, "b": 3}


def test_table_of_a_value_shows_intervals_and_what_they_are_about():
    lines = text_tables(ARMS, REFERENCES)
    assert lines[:4] == [
        "kid_full (lower is better)",
        "arm        a (n 20)                 union (n 60)",
        "central    0.0251 [0.0210, 0.0290]  0.0200 [0.0190, 0.0220] of 0.0205",
        "federated  0.50 [0.40, 0.61]        0.75"]
    assert lines[-1] == ("[...]: 90% interval; [...] of E: about an estimate E that leaves out pairs of images within "
                         "a group (kid), or is for infinitely many images (fid)")


def test_table_of_costs_has_a_column_for_each_institution():
    lines = text_tables(ARMS, REFERENCES)
    start = next(index for index, text in enumerate(lines) if "sec/kimg" in text)
    assert lines[start:start + 5] == [
        "arm        images  sec/kimg  MiB of a  MiB of b  MiB in all",
        "central      1000     36.13         -         -           -",
        "federated    1024     40.00       3.5       2.0         5.5",
        "MiB: networks sent and received in all rounds",
        "central needs the images of all institutions in one place"]


def test_tables_of_classes_compare_the_arms_within_a_row():
    classes = [{"mel": {"results": {"kid_full": 0.25}, "num_real": 12}, "nv": {"reason": "too few images: 1"}},
               {"mel": {"results": {"kid_full": 0.5}, "num_real": 12}, "nv": {"reason": "too few images: 1"}}]
    arms = [arm(name, {"union": kid(0.1, per_class=each)})
            for name, each in zip(("central", "alone-a"), classes, strict=True)]
    lines = text_tables(arms, REFERENCES[1:])
    start = lines.index("kid_full (lower is better), by class, against union")
    assert lines[start + 1:start + 4] == ["class       central  alone-a", "mel (n 12)  0.25     0.5",
                                          "nv (n 0)    -        -"]
    assert lines[-1] == "without [...], and -: too few images or groups; comparison.json has the reasons"


def test_csv_has_a_row_for_each_arm_with_unrounded_values():
    titles, central, federated = csv_rows(ARMS, REFERENCES)
    rows = [dict(zip(titles, row, strict=True)) for row in (central, federated)]
    assert titles[:6] == ["arm", "images", "sec_per_kimg", "bytes a", "bytes b", "bytes"]
    assert rows[0]["sec_per_kimg"] == 36.126
    assert (rows[0]["union kid_full"], rows[0]["union kid_full low"], rows[0]["union kid_full high"]) == (
        0.02, 0.019, 0.022)
    assert (rows[1]["bytes a"], rows[1]["bytes"]) == (3 * 2**20 + 2**19, 11 * 2**19)
    assert (rows[1]["union kid_full low"], rows[1]["a kid_full reals"]) == (None, 20)


def test_description_holds_what_the_tables_round_as_json():
    found = describe(ARMS, REFERENCES, {"kimg": 1, "flags": ("--cond=1",)})
    assert found["arms"]["federated"]["bytes"] == 11 * 2**19
    assert found["arms"]["central"]["results"]["union"]["kid_full"]["results"] == {"kid_full": 0.02}
    assert found["references"]["union"] == {"path": "union.zip", "sha256": "0" * 64, "images": 60,
                                            "settings": {"seed": 0}}
    assert json.loads(json.dumps(found))["settings"]["flags"] == ["--cond=1"]


def test_value_that_is_not_finite_is_a_dash():
    lines = text_tables([arm("central", {"union": kid(math.nan)})], REFERENCES[1:])
    assert lines[2] == "central  -"
