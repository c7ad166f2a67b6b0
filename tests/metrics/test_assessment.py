"""Intervals, the floor of held-out images, and classes: what records say, and what may not change it."""

import numpy as np
import pytest

from dnnlib.cli import UserError
from imagesets.writer import ImageSetWriter
from metrics import scores
from metrics.evaluation import Evaluator
from metrics.image_sources import SetImages
from metrics.names import parse_metric
from tests.helpers.make_sets import make_set, png
from tests.helpers.metric_networks import use_mean_detectors
from tests.helpers.small_networks import small_generator

CLASSES = ["benign", "melanoma"]
METRICS = "kid40_full,pr40_full,dc40_full,auth40_full,div40_full,is40"
COUNT, HELD, FAKES = 72, 40, 90
LEVEL = 0.9


@pytest.fixture(autouse=True)
def detectors(monkeypatch, tmp_path):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return use_mean_detectors(monkeypatch)


def make(path, images, *, every=2, pairs=True, **more):
    """Write images of size 16, each `every`-th a melanoma; with `pairs` images 0 and 2, 1 and 3, 4 and 6... are
    patients."""
    images = list(images)
    groups = [f"{path.stem}{4 * (index // 4) + index % 2}" for index in range(len(images))] if pairs else None
    return make_set(path, images=images, size=16, classes=CLASSES,
                    **{"labels": [int(index % every == 0) for index in range(len(images))], "groups": groups, **more})


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return (make(folder / "data.zip", range(COUNT)), make(folder / "held.zip", range(100, 100 + HELD)),
            make(folder / "fake.zip", range(200, 200 + FAKES), every=3, pairs=False))


@pytest.fixture(scope="module")
def data(sets):
    return sets[0]


@pytest.fixture(scope="module")
def held(sets):
    return sets[1]


@pytest.fixture(scope="module")
def fake(sets):
    return sets[2]


def measure_set(fake, names=METRICS, **settings):
    return Evaluator(names, use_cache=False, **settings).evaluate_images(SetImages(fake, settings.get("chosen")))


def without_times(results):
    return {name: {key: value for key, value in record.items() if key not in ("total_time", "versions")}
            for name, record in results.items()}


def close(found):
    """Return a record for comparison, with numbers that may differ by the rounding of sums in another order."""
    if isinstance(found, dict):
        return {key: close(value) for key, value in found.items()}
    # Products of KID are float32 and near 1: their rounding differs with the place of an image in a block.
    return pytest.approx(found, rel=1e-9, abs=1e-8) if isinstance(found, float) else found


# ---- Intervals ----

def test_intervals_state_method_unit_and_numbers_of_groups(data, fake):
    found = measure_set(fake, data=data, ci=LEVEL)
    ci = found["kid40_full"]["ci"]["kid40_full"]
    assert (ci["unit"], ci["num_units"], ci["level"]) == ("group", {"real": COUNT // 2, "fake": 40}, LEVEL)
    assert ci["method"] == "delete-group jackknife"
    assert ci["low"] < ci["estimate"] < ci["high"]
    for key, side, count in (("pr40_full_precision", "fake", 40), ("pr40_full_recall", "real", COUNT // 2),
                             ("dc40_full_density", "fake", 40), ("dc40_full_coverage", "real", COUNT // 2)):
        ci = found[key.rpartition("_")[0]]["ci"][key]
        assert ci["estimate"] == found[key.rpartition("_")[0]]["results"][key]
        given = ci["given_neighborhoods"]
        assert given["num_units"] == {side: count}
        assert given["unit"] == ("image" if side == "fake" else "group")
        assert given["low"] - 1e-9 <= ci["estimate"] <= given["high"] + 1e-9  # means round
    assert list(found["div40_full"]["ci"]) == ["div40_full_fake", "div40_full_real", "div40_full_ratio"]
    assert found["is40"]["ci"]["is40_mean"]["unit"] == "split"
    assert found["is40"]["ci"]["is40_std"] == {"reason": "the standard deviation over splits has no interval"}
    assert {name: list(jackknives) for name, jackknives in found.jackknives.items()} == {
        "kid40_full": ["kid40_full"], "pr40_full": ["pr40_full_precision", "pr40_full_recall"],
        "dc40_full": ["dc40_full_density", "dc40_full_coverage"], "auth40_full": ["auth40_full_authpct"],
        "div40_full": ["div40_full_fake", "div40_full_real", "div40_full_ratio"], "is40": ["is40_mean"]}


def test_intervals_of_images_without_groups_are_of_images(tmp_path, fake):
    data = make(tmp_path / "data.zip", range(COUNT), pairs=False)
    ci = measure_set(fake, "kid40_full", data=data, ci=LEVEL)["kid40_full"]["ci"]["kid40_full"]
    assert (ci["unit"], ci["num_units"]) == ("image", {"real": COUNT, "fake": 40})


def test_intervals_leave_values_as_they_are(data, fake):
    plain, found = measure_set(fake, data=data), measure_set(fake, data=data, ci=LEVEL)
    assert [record["results"] for record in found.values()] == [record["results"] for record in plain.values()]
    assert not any("ci" in record for record in plain.values())
    assert not any(plain.jackknives.values())


def test_flipped_copies_belong_to_the_group_of_their_original(data):
    found = [Evaluator(f"kid{2 * COUNT}", data=data, mirror=mirror, ci=LEVEL).evaluate(small_generator())[
        f"kid{2 * COUNT}"] for mirror in (False, True)]
    assert [record["num_real"] for record in found] == [COUNT, 2 * COUNT]
    assert [record["ci"][f"kid{2 * COUNT}"]["num_units"]["real"] for record in found] == [COUNT // 2, COUNT // 2]


def test_copies_within_groups_do_not_narrow_the_interval(tmp_path, fake):
    """Each image twice, in the group of its original: no pair within a group counts, so nothing changes."""
    data = [make_set(tmp_path / f"{times}.zip", images=[index for index in range(COUNT) for _ in range(times)], size=16,
                     groups=[f"p{index}" for index in range(COUNT) for _ in range(times)]) for times in (1, 2)]
    once, twice = (measure_set(fake, "kid40_full", data=path, ci=LEVEL)["kid40_full"]["ci"]["kid40_full"]
                   for path in data)
    assert close({**once, "unit": "group"}) == twice  # rounding of sums in another order


def test_few_images_have_no_interval_of_fid_and_the_reason(data, fake):
    found = measure_set(fake, "fid40_full", data=data, ci=LEVEL)["fid40_full"]
    assert found["ci"] == {"fid40_full": {"reason": (
        "there are 40 images; an interval needs at least 10 for each of the 6 dimensions of the features (60)")}}


def test_one_group_has_no_interval_and_the_reason(tmp_path, fake):
    data = make(tmp_path / "data.zip", range(30), groups=["p"] * 30)
    found = measure_set(fake, "kid40_full,pr40_full", data=data, ci=LEVEL)
    assert "reason" in found["kid40_full"]["ci"]["kid40_full"]
    assert [list(each) for each in found["pr40_full"]["ci"].values()] == [["reason"]] * 2
    assert found["pr40_full"]["results"] == measure_set(fake, "pr40_full", data=data)["pr40_full"]["results"]


def test_metrics_of_neighborhoods_share_one_computation(data, held, fake, monkeypatch):
    calls = []
    original = scores.neighborhoods
    monkeypatch.setattr(scores, "neighborhoods", lambda real, fake, ks, **more: (
        calls.append((len(fake), sorted(ks))) or original(real, fake, ks, **more)))
    measure_set(fake, "pr40_full,dc40_full,dc50_full,kid40_full", data=data)
    assert calls == [(40, [3, 5]), (50, [5])]


# ---- The floor ----

def test_floor_is_the_metric_between_the_data_and_as_many_held_out_images(data, held, fake):
    found = measure_set(fake, "kid60_full,pr60_full", data=data, holdout=held, ci=LEVEL)
    floors = measure_set(held, f"kid{HELD}_full,pr{HELD}_full", data=data, ci=LEVEL)
    equal = measure_set(fake, f"kid{HELD}_full,pr{HELD}_full", data=data)
    for name in ("kid", "pr"):
        record, floor, cut = found[f"{name}60_full"]["floor"], floors[f"{name}{HELD}_full"], equal[f"{name}{HELD}_full"]
        assert list(record["results"].values()) == list(floor["results"].values())
        assert list(record["ci"].values()) == list(floor["ci"].values())
        assert list(record["at_equal_size"].values()) != list(found[f"{name}60_full"]["results"].values())
        assert list(record["at_equal_size"].keys()) == list(found[f"{name}60_full"]["results"])
        assert record["num_fake"] == HELD
        assert record["holdout_sha256"] == SetImages(held).select().content_hash()
        assert list(record["at_equal_size"].values()) == pytest.approx(list(cut["results"].values()), rel=1e-12)
    test = found["kid60_full"]["floor"]["permutation"]
    assert test["estimate"] == pytest.approx(found["kid60_full"]["floor"]["ci"]["kid60_full"]["estimate"], abs=1e-9)
    assert test["p_value"] > 0.05  # both are random pixels; the seed is fixed
    assert (test["unit"], test["num_units"]) == ("group", {"real": COUNT // 2, "fake": HELD // 2})
    assert "permutation" not in found["pr60_full"]["floor"]


def test_floor_at_equal_size_is_the_value_if_no_more_images_are_held_out_than_generated(data, held, fake):
    record = measure_set(fake, "kid30_full", data=data, holdout=held)["kid30_full"]
    assert record["floor"]["at_equal_size"] == record["results"]
    assert (record["floor"]["num_fake"], "ci" in record["floor"]) == (30, False)


def test_floor_of_metrics_with_flipped_reals_takes_flipped_held_out_images(data, held, fake):
    found = measure_set(fake, "kid90,kid90_full", data=data, holdout=held, mirror=True)
    assert [record["floor"]["num_fake"] for record in found.values()] == [2 * HELD, HELD]


def test_held_out_images_are_computed_once(data, held, detectors):
    evaluator = Evaluator("kid30_full,div30_full", data=data, holdout=held, use_cache=False)
    results = [evaluator.evaluate(small_generator())["kid30_full"]["floor"]["results"] for _ in range(2)]
    assert results[0] == results[1]
    # A probe and the fakes, a probe and the reals, a probe and the held-out images, a probe and the fakes again
    assert detectors["inception-v3"].seen == [1, 30, 1, 32, 32, 8, 1, 30, 1, 30]


def test_metrics_without_reals_have_no_floor(data, held, fake):
    found = measure_set(fake, "is40,kid40_full", data=data, holdout=held)
    assert ["floor" in record for record in found.values()] == [False, True]


def test_held_out_images_give_c_t(data, held, fake):
    found = measure_set(fake, "auth40_full", data=data, holdout=held)["auth40_full"]
    assert list(found["results"]) == ["auth40_full_authpct", "auth40_full_ct"]
    assert list(found["floor"]["results"]) == ["auth40_full_authpct"]
    assert list(measure_set(fake, "auth40_full", data=data)["auth40_full"]["results"]) == ["auth40_full_authpct"]


def test_copies_of_training_images_lower_authpct_below_the_floor(data, held):
    found = measure_set(data, "auth40_full", data=data, holdout=held)["auth40_full"]
    assert found["results"]["auth40_full_authpct"] == 0
    assert found["floor"]["results"]["auth40_full_authpct"] > 20


# ---- Classes ----

NAMES = "kid30_full,pr30_full,dc30_full,auth30_full,div30_full,is30,kid30,fid30_full"


@pytest.mark.parametrize("name", CLASSES)
def test_class_of_a_network_gives_what_the_class_alone_gives(data, held, name):
    """Bit for bit: with the same latents, noise, reals, held-out images and groups."""
    settings = {"data": data, "holdout": held, "mirror": True, "ci": LEVEL, "use_cache": False, "seed": 2}
    found = Evaluator(NAMES, per_class=True, **settings).evaluate(small_generator())
    alone = Evaluator(NAMES, chosen=name, **settings).evaluate(small_generator())
    for metric, record in found.items():
        of_class, expected = record["per_class"][name], alone[metric]
        assert (of_class["num_fake"], of_class["num_real"]) == (30, expected["num_real"])
        for field in ("results", "ci", "note", "subset_std"):
            assert of_class.get(field) == expected.get(field), (metric, field)
        if "floor" in expected:
            expected["floor"].pop("holdout_sha256")  # of the class alone
        assert of_class.get("floor") == expected.get("floor"), metric


@pytest.mark.parametrize("name", CLASSES)
def test_class_of_a_set_gives_what_the_class_alone_gives(data, held, fake, name):
    settings = {"data": data, "holdout": held, "ci": LEVEL}
    found = measure_set(fake, NAMES, per_class=True, **settings)
    alone = measure_set(fake, NAMES, chosen=name, **settings)
    for metric, record in found.items():
        alone[metric].get("floor", {}).pop("holdout_sha256", None)
        for field in ("results", "ci", "floor"):
            assert record["per_class"][name].get(field) == alone[metric].get(field), (metric, field)


def test_class_of_a_set_takes_what_is_there_at_most_the_metrics_number(data, fake):
    """The overall value takes 40 of the images at random; a class takes its own, also others than those 40."""
    found = measure_set(fake, "kid40_full,kid_full", data=data, per_class=True)
    counts = {metric: {name: (each["num_real"], each["num_fake"], each["num_groups"])
                       for name, each in record["per_class"].items()} for metric, record in found.items()}
    half = COUNT // 2
    assert counts["kid40_full"] == {"benign": (half, 40, half // 2), "melanoma": (half, 30, half // 2)}
    assert counts["kid_full"] == {"benign": (half, 60, half // 2), "melanoma": (half, 30, half // 2)}


def test_overall_values_are_as_without_classes(data, held, fake):
    for with_network in (False, True):
        found = []
        for per_class in (False, True):
            evaluator = Evaluator(NAMES, data=data, holdout=held, mirror=True, ci=LEVEL, per_class=per_class)
            results = without_times(evaluator.evaluate(small_generator()) if with_network
                                    else evaluator.evaluate_images(SetImages(fake)))
            for record in results.values():
                assert (record.pop("per_class", None) is not None) == per_class
                record.pop("worst_class", None)
            found.append(results)
        assert found[0] == found[1]


def test_features_of_classes_are_computed_once(data, fake, detectors):
    measure_set(fake, "kid40_full,kid_full", data=data, per_class=True)
    assert sum(detectors["inception-v3"].seen) == 2 + FAKES + COUNT  # the probes are single images
    measure_set(fake, "kid40_full", data=data, per_class=True)
    # Of 60 and 30 images of the classes 40 and 30 are used; no image is computed twice.
    seen = sum(detectors["inception-v3"].seen) - 3 - COUNT
    assert 70 <= seen <= FAKES


def test_class_that_lost_its_variety_is_the_worst_one(data, tmp_path):
    """Melanomas are copies of one image: recall, coverage and diversity of the class collapse."""
    count = 80
    images = {"varied": range(300, 300 + count), "collapsed": [300 if index % 2 == 0 else 300 + index
                                                              for index in range(count)]}
    found = {kind: measure_set(make(tmp_path / f"{kind}.zip", chosen, pairs=False), "pr_full,dc_full,div_full",
                               data=data, per_class=True) for kind, chosen in images.items()}
    for metric, key in (("pr_full", "pr_full_recall"), ("dc_full", "dc_full_coverage"), ("div_full", "div_full_ratio")):
        varied, collapsed = (found[kind][metric] for kind in ("varied", "collapsed"))
        assert collapsed["worst_class"][key]["class"] == "melanoma"
        assert collapsed["worst_class"][key]["value"] == collapsed["per_class"]["melanoma"]["results"][key]
        assert collapsed["worst_class"][key]["value"] < 0.2 < 0.7 < varied["worst_class"][key]["value"]
        assert collapsed["per_class"]["benign"]["results"][key] == varied["per_class"]["benign"]["results"][key]


def test_class_that_was_dropped_is_the_worst_one_and_lowers_recall_and_coverage(tmp_path):
    """Melanomas are dark; the generated ones are as bright as the others, so that none looks like a melanoma."""
    def write(name, seed, dark):
        random = np.random.RandomState(seed)
        with ImageSetWriter(tmp_path / name, classes=CLASSES) as writer:
            for index in range(80):
                pixels = random.randint(0, 100, (16, 16, 3), dtype=np.uint8) + (0 if dark and index % 2 else 150)
                writer.add(png(pixels), index % 2, None)
        return tmp_path / name

    data, whole, dropped = (write(*each) for each in (("data.zip", 1, True), ("whole.zip", 2, True),
                                                      ("dropped.zip", 3, False)))
    whole, dropped = (measure_set(path, "pr_full,dc_full", data=data, per_class=True) for path in (whole, dropped))
    for metric, key in (("pr_full", "pr_full_recall"), ("dc_full", "dc_full_coverage")):
        assert dropped[metric]["worst_class"][key] == {"class": "melanoma", "value": 0}
        assert dropped[metric]["results"][key] <= 0.5  # half of the reals are melanomas
        assert whole[metric]["results"][key] > 0.7
    assert dropped["pr_full"]["results"]["pr_full_precision"] > 0.7  # which says nothing of the melanomas


def test_class_that_is_missing_or_too_small_says_so(data, tmp_path):
    fake = make(tmp_path / "fake.zip", range(200, 260), pairs=False, labels=[0] * 58 + [1] * 2)
    found = measure_set(fake, "pr_full,kid_full", data=data, per_class=True)
    assert found["pr_full"]["per_class"]["melanoma"] == {
        "reason": "too few images: 36 real and 2 generated; the metric needs at least 4"}
    small = found["kid_full"]["per_class"]["melanoma"]
    assert (small["num_fake"], small["note"]) == (
        2, "fewer than 30 images on a side: not considered as the worst class")
    assert found["kid_full"]["worst_class"]["kid_full"]["class"] == "benign"
    none = make(tmp_path / "none.zip", range(200, 260), pairs=False, labels=[0] * 60)
    found = measure_set(none, "kid_full,is10", data=data, per_class=True)
    assert [record["per_class"]["melanoma"] for record in found.values()] == [
        {"reason": "there are no generated images of this class"}] * 2


def test_class_with_fewer_generated_images_for_each_real_one_says_so(tmp_path):
    """Of a network, 32 of each class, for 80 reals of one and 32 of the other: coverage of the former is lower."""
    data = make(tmp_path / "data.zip", range(112), labels=[0] * 80 + [1] * 32)
    found = Evaluator("dc32_full,kid32_full", data=data, per_class=True).evaluate(small_generator())
    assert {name: [each.get("note") for each in record["per_class"].values()] for name, record in found.items()} == {
        "dc32_full": ["32 generated for 80 real images, less than half as many for each as in another class, which "
                      "lowers recall and coverage; compare with the floor", None], "kid32_full": [None, None]}


def test_class_without_reals_or_held_out_images_says_so(tmp_path, fake):
    data = make(tmp_path / "data.zip", range(40), labels=[0] * 40)
    held = make(tmp_path / "held.zip", range(100, 140), labels=[1] * 40)
    found = measure_set(fake, "kid_full", data=data, holdout=held, per_class=True)["kid_full"]
    assert found["per_class"]["melanoma"] == {"reason": "there are no real images of this class"}
    assert found["per_class"]["benign"]["floor"] == {"reason": "there are no held-out images of this class"}
    assert "results" in found["floor"]


def test_too_few_groups_give_one_line_and_those_of_held_out_images_no_floor(tmp_path, data, fake):
    """The mean distance is one between groups: of two, none is left without one of them."""
    two = make(tmp_path / "two.zip", range(100, 140), groups=["p"] * 20 + ["q"] * 20)
    floor = measure_set(fake, "div_full", data=data, holdout=two)["div_full"]["floor"]
    reason = ("there are 2 groups of {} images; expected at least 3, for pairs of different groups that remain without "
              "one of them")
    assert floor["reason"] == reason.format("fake")  # they stand in the place of the fakes
    with pytest.raises(UserError) as caught:
        measure_set(fake, "div_full", data=two)
    assert str(caught.value) == f"metric div_full: {reason.format('real')}"


def test_class_with_few_held_out_images_has_no_floor_and_the_reason(tmp_path, data, fake):
    held = make(tmp_path / "held.zip", range(100, 140), labels=[0] * 37 + [1] * 3)
    found = measure_set(fake, "pr_full", data=data, holdout=held, per_class=True)["pr_full"]["per_class"]
    assert found["melanoma"]["floor"] == {"reason": "too few held-out images: 3; the metric needs at least 4"}
    assert found["benign"]["floor"]["num_fake"] == 37


def test_class_whose_reals_are_equal_says_so(tmp_path, fake):
    """Without a distance between reals there is no diversity to compare with."""
    data = make(tmp_path / "data.zip", [7 if index % 2 == 0 else index for index in range(40)], pairs=False)
    found = measure_set(fake, "div_full", data=data, per_class=True)["div_full"]
    assert found["per_class"]["melanoma"]["reason"].startswith("the real images, or all but one group of them, have ")
    assert "results" in found["per_class"]["benign"]


def test_path_lengths_of_classes_are_left_out_with_the_reason(tmp_path):
    data = make_set(tmp_path / "data.zip", 20, size=32, labels=[0, 1] * 10)
    found = Evaluator("ppl30_zfull", data=data, ci=LEVEL, per_class=True).evaluate(small_generator(resolution=32))
    record = found["ppl30_zfull"]
    reason = {"reason": "path lengths of classes are not measured; measure one with calc_metrics.py --class"}
    assert (record["per_class"], record["worst_class"]) == ({"0": reason, "1": reason}, {})
    ci = record["ci"]["ppl30_zfull"]
    assert ci["low"] < ci["estimate"] == record["results"]["ppl30_zfull"] < ci["high"]


def test_worst_class_has_the_highest_distance_and_the_lowest_share(data, fake):
    found = measure_set(fake, "kid_full,pr_full,dc_full,div_full,is30", data=data, per_class=True)
    for metric, record in found.items():
        lower_is_better = parse_metric(metric).lower_is_better
        assert list(record["worst_class"]) == list(lower_is_better)
        for key, worst in record["worst_class"].items():
            values = {name: each["results"][key] for name, each in record["per_class"].items()}
            assert worst["value"] == (max if lower_is_better[key] else min)(values.values())
            assert values[worst["class"]] == worst["value"]


def test_images_that_classes_leave_out_are_logged_once(data, tmp_path):
    fake = make(tmp_path / "fake.zip", range(200, 260), pairs=False, labels=[0, 1, None] * 20)
    logged = []
    evaluator = Evaluator("kid_full", data=data, per_class=True, log=logged.append)
    for _ in range(2):
        evaluator.evaluate_images(SetImages(fake))
    assert logged == [f"{fake}: 20 of 60 images have no label; --per-class leaves them out"]


def test_set_without_classes_is_refused(data, tmp_path):
    fake = make_set(tmp_path / "fake.zip", 40, size=16)
    with pytest.raises(UserError) as caught:
        measure_set(fake, "kid_full", data=data, per_class=True)
    assert str(caught.value) == (
        f"{fake} has no labels, but --per-class is given; expected classes: leave --per-class out")


# ---- What may not change values ----

def test_batch_size_changes_nothing(data, held, fake):
    settings = {"data": data, "holdout": held, "ci": LEVEL, "per_class": True, "mirror": True}
    found = [without_times(measure_set(fake, NAMES, batch=batch, **settings)) for batch in (7, 64)]
    for results in found:
        for record in results.values():
            record.pop("batch")
    assert found[0] == found[1]


def test_order_of_images_changes_nothing(tmp_path):
    """Reals and held-out images in another order, all used; but those that are random draws by order."""
    count, names = 60, "kid60_full,pr60_full,dc60_full,div60_full"
    fake = make(tmp_path / "fake.zip", range(200, 260), pairs=False)
    found = []
    for kind in ("one", "other"):
        paths = []
        for name, first in (("data", 0), ("held", 100)):
            order = np.arange(count) if kind == "one" else np.random.RandomState(1).permutation(count)
            (tmp_path / kind).mkdir(exist_ok=True)
            paths.append(make(tmp_path / kind / f"{name}.zip", first + order, labels=[int(i % 2) for i in order],
                              groups=[f"{name}{i // 4}" for i in order]))
        results = without_times(measure_set(fake, names, data=paths[0], holdout=paths[1], ci=LEVEL, per_class=True))
        for name, record in results.items():
            del record["data_sha256"], record["floor"]["holdout_sha256"]
            for part in (record, *record["per_class"].values()):
                part["floor"].pop("permutation", None)  # groups are dealt in their order
                if name.startswith(("pr", "dc")):  # from random halves
                    del part["ci"], part["floor"]["ci"]
        found.append(results)
    assert found[0] == close(found[1])
