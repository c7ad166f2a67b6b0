"""The command `federate.py compare`: what it runs, measures and writes; see tests/helpers/fake_arms.py."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest

import dataset_tool
from dnnlib.cli import run
from dnnlib.files import sha256_of
from federated import arm_tables
from federated.arm_runs import ArmStopped
from federated.compare_arms import make_compare_command, write_union
from generation.network import open_network
from imagesets.reader import ImageSet
from metrics.evaluation import Evaluator
from tests.helpers.fake_arms import ARMS, CLASSES, calls, compare, enter, found, make_material
from tests.helpers.make_sets import make_set
from tests.helpers.training_runs import make_phantoms

TOOL = Path(__file__).parent.parent.parent / "dataset_tool.py"
METRICS = "kid_full,pr_full,dc_full"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    make_material(folder)
    return folder


@pytest.fixture(scope="module")
def compared(material, tmp_path_factory, one_thread):
    """Folder with a comparison, which tests do not change."""
    folder = tmp_path_factory.mktemp("compared") / "inside"
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, material, patch)
        assert compare(folder) == 0
    return folder


@pytest.fixture
def inside(tmp_path, material, monkeypatch, one_thread):
    """Working folder with the material."""
    return enter(tmp_path / "inside", material, monkeypatch)


@pytest.fixture
def finished(tmp_path, compared, monkeypatch):
    """Working folder with the material and a comparison."""
    return enter(tmp_path / "inside", compared, monkeypatch)


def test_arms_are_ordinary_runs_with_equal_numbers_of_images(inside):
    assert compare(inside, "--local=equal", "--server-optimizer", "fedadam", "--dp=1", "--dp-clip=3", mirror="1",
                   batch="16", seed="3", points="4", metrics="kid_full", holdout="a-test.zip") == 0
    shared = ["--kimg=1", "--metrics=none", "--tick=0.25", "--snap=1"]
    passed = ["--seed=3", "--cond=true", "--mirror=true", "--batch=16"]
    train = str(inside / "train.py")
    assert calls(inside) == [
        [train, "--outdir=out/central", "--data=out/union.zip", *shared, *passed, "--device=cpu"],
        [train, "--outdir=out/alone-a", "--data=a.zip", *shared, *passed, "--device=cpu"],
        [train, "--outdir=out/alone-b", "--data=b.zip", *shared, *passed, "--device=cpu"],
        [str(inside / "federate.py"), "simulate", "--outdir=out/federated", "--data=a.zip,b.zip", "--sites=a,b",
         "--rounds=2", "--round-kimg=0.25", "--snap=1", "--metrics=none", *passed, "--local=equal",
         "--server-optimizer=fedadam", "--dp=true", "--dp-clip=3.0", "--device=cpu"]]
    assert found(inside)["settings"]["round_kimg"] * 2 * 2 == 1


def test_several_gpus_give_the_federated_arm_at_most_a_process_for_each_institution(inside):
    assert compare(inside, "--gpus=5", metrics="kid_full", holdout="a-test.zip") == 0
    by_arm = {Path(call[-1 - call[::-1].index(next(text for text in call if "--outdir" in text))]).name: call
              for call in calls(inside)}
    assert "--gpus=2" in by_arm["federated"]
    assert not any(text.startswith("--gpus") for name in ARMS[:3] for text in by_arm[name])


def test_union_holds_the_images_labels_and_groups_of_all_in_order(inside):
    write_union(inside / "union.zip", ["a.zip", "b.zip"], TOOL)
    union, parts = ImageSet(inside / "union.zip"), [ImageSet(inside / name) for name in ("a.zip", "b.zip")]
    hashes = [images.recorded_hash(name, *checksum) for images in parts
              for name, checksum in zip(images.names, images.checksums(), strict=True)]
    assert [union.recorded_hash(name, *checksum)
            for name, checksum in zip(union.names, union.checksums(), strict=True)] == hashes
    assert union.labels.tolist() == [label for images in parts for label in images.labels.tolist()]
    assert union.groups == [group for images in parts for group in images.groups]
    assert union.classes == CLASSES


def test_union_is_written_again_only_if_a_set_changed(inside):
    dest, paths = inside / "union.zip", ["a.zip", "b.zip"]
    write_union(dest, paths, TOOL)
    first = dest.stat().st_mtime_ns, sha256_of(dest)
    write_union(dest, paths, TOOL)
    assert (dest.stat().st_mtime_ns, sha256_of(dest)) == first
    write_union(dest, paths[::-1], TOOL)
    assert sha256_of(dest) != first[1]
    write_union(dest, paths, TOOL)
    assert sha256_of(dest) == first[1]
    make_set(inside / "b.zip", images=range(50, 60), labels=[0, 1] * 5, classes=CLASSES)
    write_union(dest, paths, TOOL)
    assert len(ImageSet(dest)) == 8 + 10


def test_sets_that_cannot_be_joined_end_the_command_with_the_code_of_dataset_tool(inside, capfd):
    make_set(inside / "b.zip", images=range(50, 60), size=16)
    with pytest.raises(ArmStopped) as stop:
        write_union(inside / "union.zip", ["a.zip", "b.zip"], TOOL)
    assert stop.value.exit_code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (inside / "union.zip").exists()
    assert not (inside / "union.json").exists()


def test_union_that_was_damaged_or_made_by_hand_is_written_again(inside):
    dest, paths = inside / "union.zip", ["a.zip", "b.zip"]
    write_union(dest, paths, TOOL)
    whole = sha256_of(dest)
    dest.write_bytes((inside / "a.zip").read_bytes())
    write_union(dest, paths, TOOL)
    assert sha256_of(dest) == whole
    dest.with_suffix(".json").write_text("{")
    write_union(dest, paths, TOOL)
    assert sha256_of(dest) == whole


def test_values_are_those_of_calc_metrics_for_the_newest_networks(finished):
    references = {"a": "a-test.zip", "b": "b-test.zip", "union": "out/holdout-union.zip"}
    arms = found(finished)["arms"]
    assert list(arms) == ARMS
    for name, path in references.items():
        evaluator = Evaluator(METRICS, data=path, detector="random-conv", ci=0.95, per_class=name == "union",
                              use_cache=False)
        for arm in ("central", "federated"):
            opened = open_network(next((finished / "networks" / arm).glob("*-000001.safetensors")), "cpu")
            for metric, record in evaluator.evaluate(opened.G, opened.info).items():
                known = arms[arm]["results"][name][metric]
                for field in ("results", "ci", "num_real", "num_fake", "data_sha256"):
                    assert known[field] == json.loads(json.dumps(record[field]))
    assert {name: each["images"] for name, each in found(finished)["references"].items()} == {
        "a": 10, "b": 14, "union": 24}
    classes = arms["alone-a"]["results"]["union"]["kid_full"]["per_class"]
    assert {name: record["num_real"] for name, record in classes.items()} == {"benign": 12, "melanoma": 12}


def test_curves_have_a_point_for_each_network_at_its_number_of_images(finished):
    arms = found(finished)["arms"]
    evaluator = Evaluator("kid_full", data="out/holdout-union.zip", detector="random-conv", use_cache=False)
    for number, name in enumerate(ARMS):
        first, last = arms[name]["curve"]
        assert (first[0], last[0]) == (0.016, 1 + 0.008 * number)
        opened = open_network(finished / "networks" / name / "network-snapshot-000000.safetensors", "cpu")
        assert first[1] == evaluator.evaluate(opened.G, opened.info)["kid_full"]["results"]["kid_full"]
        assert last[1] == arms[name]["results"]["union"]["kid_full"]["results"]["kid_full"]
    assert (finished / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_costs_are_times_per_image_and_bytes_of_all_rounds(compared):
    arms = found(compared)["arms"]
    assert {name: arm["images"] for name, arm in arms.items()} == {
        "central": 1000, "alone-a": 1008, "alone-b": 1016, "federated": 1024}
    assert arms["central"]["sec_per_kimg"] == pytest.approx(0.016 * 40 + 0.984 * 10)
    assert arms["federated"]["sec_per_kimg"] == pytest.approx((0.5 * 12 + 0.524 * 16) / 1.024)
    assert arms["federated"]["bytes_up"] == {"a": 2 * 2**20, "b": 4 * 2**20}
    assert arms["federated"]["bytes_down"] == {"a": 2**20, "b": 2**20}
    assert (arms["federated"]["bytes"], arms["central"]["bytes"]) == (8 * 2**20, 0)


def test_tables_have_arms_as_rows_and_the_same_values_everywhere(finished, capsys):
    assert compare(finished) == 0
    text = (finished / "out" / "comparison.txt").read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    start = lines.index("kid_full (lower is better)")
    assert lines[start + 1].split("  ")[0] == "arm"
    assert [part.strip() for part in lines[start + 1].split("  ") if part] == ["arm", "a (n 10)", "b (n 14)",
                                                                              "union (n 24)"]
    assert [line.split()[0] for line in lines[start + 2:start + 6]] == ARMS
    assert "pr_full_recall (higher is better)" in lines
    costs = next(index for index, line in enumerate(lines) if "sec/kimg" in line)
    assert [line.split() for line in lines[costs:costs + 5]] == [
        ["arm", "images", "sec/kimg", "MiB", "of", "a", "MiB", "of", "b", "MiB", "in", "all"],
        ["central", "1000", "10.48", "-", "-", "-"], ["alone-a", "1008", "10.48", "-", "-", "-"],
        ["alone-b", "1016", "10.48", "-", "-", "-"], ["federated", "1024", "14.05", "3.0", "5.0", "8.0"]]
    classes = lines.index("kid_full (lower is better), by class, against union")
    assert lines[classes + 1].split() == ["class", *ARMS]
    assert [line.split()[0] for line in lines[classes + 2:classes + 4]] == CLASSES

    arms = found(finished)["arms"]
    rows = list(csv.DictReader((finished / "out" / "comparison.csv").open()))
    assert [row["arm"] for row in rows] == ARMS
    for row in rows:
        arm = arms[row["arm"]]
        record = arm["results"]["b"]["kid_full"]
        assert float(row["b kid_full"]) == record["results"]["kid_full"]
        assert float(row["b kid_full low"]) == record["ci"]["kid_full"]["low"]
        assert (row["b kid_full reals"], row["bytes"]) == ("14", str(arm["bytes"]))


def test_same_command_again_neither_trains_nor_measures(finished, monkeypatch):
    before, lines = found(finished), (finished / "out" / "results.jsonl").read_text()
    assert len(lines.splitlines()) == 4 * 3 + 4  # networks against references, and the start of each curve
    monkeypatch.setattr(arm_tables, "open_network", None)
    assert compare(finished) == 0
    assert len(calls(finished)) == 4
    assert found(finished) == before
    assert (finished / "out" / "results.jsonl").read_text() == lines


def test_what_was_measured_before_a_stop_is_kept(finished):
    path = finished / "out" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:40])
    assert compare(finished) == 0
    times = [json.loads(line)["records"]["kid_full"].pop("total_time") for line in lines[:5]]
    again = path.read_text().splitlines()
    assert [json.loads(line)["records"]["kid_full"]["total_time"] for line in again[:5]] == times
    assert len(again) == 5 + 1 + 11  # the line that was cut stays


def test_another_held_out_set_is_measured_anew(finished):
    make_set(finished / "a-test.zip", images=range(100, 110), labels=[0, 1] * 5, classes=CLASSES)
    assert compare(finished) == 0
    lines = [json.loads(line) for line in (finished / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["reference"] for line in lines[16:]] == ["a"] * 4  # the union is still the one before
    assert len(calls(finished)) == 4


@pytest.mark.parametrize("code", [75, 3])
def test_arm_that_stops_ends_the_command_with_its_code_and_the_same_command_continues(inside, capsys, code):
    (inside / "codes.json").write_text(json.dumps({"alone-a": code}))
    flags = {"metrics": "kid_full", "holdout": "a-test.zip"}
    assert compare(inside, **flags) == code
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: the arm alone-a ended with exit code {code}; the same command continues with it once the reason above "
        "is gone")
    assert not (inside / "out" / "results.jsonl").exists()
    (inside / "codes.json").write_text("{}")
    assert compare(inside, **flags) == 0
    assert [next(Path(text).name for text in call if "--outdir" in text) for call in calls(inside)] == [
        "central", "alone-a", "alone-a", "alone-b", "federated"]


def test_one_held_out_set_for_all_is_the_only_reference(inside):
    assert compare(inside, holdout="b-test.zip", cond=None, metrics="kid_full") == 0
    assert list(found(inside)["references"]) == ["union"]
    assert found(inside)["references"]["union"]["path"] == "b-test.zip"
    assert not (inside / "out" / "holdout-union.zip").exists()


def test_no_kernel_distance_draws_no_curves(inside):
    assert compare(inside, metrics="pr_full") == 0
    assert found(inside)["arms"]["central"]["curve"] == []
    assert not (inside / "out" / "comparison.png").exists()


def test_dry_run_prints_the_commands_and_writes_nothing(inside, capsys):
    assert compare(inside, "--dry-run") == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ARMS
    assert printed["alone-b"] == {
        "command": [sys.executable, str(inside / "train.py"), "--outdir=out/alone-b", "--data=b.zip", "--kimg=1",
                    "--metrics=none", "--tick=1", "--snap=1", "--cond=true"],
        "run_folder": "out/alone-b/00000-run", "already_finished": False}
    assert not (inside / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("federated.simulation") is None, reason="there is no simulation yet")
def test_two_institutions_are_compared_and_the_same_command_leaves_them_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_phantoms(tmp_path / "all.zip", count=120, resolution=16)
    for path, flags in (("all.zip", "--parts=train:0.7,test:0.3"), ("all-train.zip", "--institutions=2"),
                        ("all-test.zip", "--institutions=2")):
        assert run(dataset_tool.main, ["split", path, flags]) == 0
    command = ["--data=all-train-institution1.zip,all-train-institution2.zip", "--sites=a,b", "--outdir=out",
               "--holdout=all-test-institution1.zip,all-test-institution2.zip", "--kimg=1", "--rounds=3", "--points=2",
               "--detector=random-conv", "--cfg=tiny", "--cond=1", "--batch=64", "--aug=noaug", "--workers=1",
               "--device=cpu"]
    assert run(make_compare_command(), command) == 0
    arms = found(tmp_path)["arms"]
    # The first whole iteration of 64 images at or after 1000, or at each of two sites after 500.
    assert {name: arm["images"] for name, arm in arms.items()} == dict.fromkeys(ARMS, 1024)
    assert [kimg for kimg, _ in arms["central"]["curve"]] == [0.576, 1.024]  # the first network has the same name
    assert arms["federated"]["curve"][-1][0] == 1.024
    sent = arms["federated"]["bytes_up"]
    assert sent["a"] == pytest.approx(sent["b"], rel=1e-3)  # equal networks; only the messages' headers differ
    assert arms["federated"]["bytes"] == pytest.approx(4 * sent["a"], rel=1e-2)
    assert all(arm["sec_per_kimg"] > 0 for arm in arms.values())
    references = found(tmp_path)["references"]
    assert references["union"]["images"] == references["a"]["images"] + references["b"]["images"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/**/*") if path.is_file()}
    capfd.readouterr()
    assert run(make_compare_command(), command) == 0
    assert "starts at image" not in capfd.readouterr().out
    assert found(tmp_path)["arms"] == arms
    assert {path: path.stat().st_mtime_ns for path in before} == before
