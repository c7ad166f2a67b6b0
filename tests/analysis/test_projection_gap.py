"""analysis.projection_gap: matched images, projections of parts that continue, folders of users, values to compare."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import projector
from analysis.discriminator_scores import match_classes
from analysis.projection_gap import (
    ProjectedPart,
    choose_matched,
    combine,
    projection_problem,
    read_projections,
    run_projections,
)
from analysis.protocol import open_part, open_unchanged
from dnnlib.cli import Terminated, UserError, run
from generation.network import open_network
from tests.helpers.generator_files import save_generator
from tests.helpers.projector_commands import SET_FILES, contents, names_in, rows_in, stop_within
from tests.helpers.study_parts import CLASSES, make_part, make_parts, protocol_of
from torch_utils.distributed import Processes

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3
ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_generator("net.safetensors", {"classes": CLASSES, "label_kind": "class"})
    return make_parts(tmp_path)


@pytest.fixture
def protocol(paths):
    return protocol_of(paths)


@pytest.fixture
def network(paths):
    return open_network("net.safetensors", "cpu")


def open_parts(protocol, names=("train", "val", "test")):
    return {name: open_part(protocol, name) for name in names}


def project(protocol, network, rows, outdir="out", **options):
    parts = {name: (open_unchanged(protocol, name), np.array(some)) for name, some in rows.items()}
    return run_projections(outdir, "net.safetensors", network, parts, processes=ALONE, detector="pixels", batch=2,
                           **{"num_steps": STEPS, **options})


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Matched images


def test_matched_images_have_equal_classes_and_each_another_group(protocol):
    parts = open_parts(protocol)
    found = choose_matched(parts, 6, seed=0)
    assert (found.count, found.counts, found.wanted) == (6, {"mel": 3, "nv": 3}, 6)
    for names in (["train"], ["val", "test"]):
        rows = [(name, row) for name in names for row in found.rows[name]]
        assert Counter(parts[name].classes[row] for name, row in rows) == found.counts
        assert len({(name, parts[name].groups[row]) for name, row in rows}) == 6
    assert all(len(found.rows[name]) for name in parts)


def test_matched_images_depend_on_the_seed_only(protocol):
    parts = open_parts(protocol)
    draws = [[rows.tolist() for rows in choose_matched(parts, 4, seed=seed).rows.values()] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_too_few_groups_give_fewer_images_and_shares_of_what_can_be_matched(paths, tmp_path):
    make_part(tmp_path / "train.zip", range(16), labels=[1] * 12 + [0] * 4)  # six lesions and two
    make_part(tmp_path / "val.zip", range(50, 62), labels=[1] * 8 + [0] * 4)  # four and two
    parts = open_parts(protocol_of(paths), ["train", "val"])
    found = choose_matched(parts, 100, seed=0)
    assert (found.count, found.counts, found.wanted) == (6, {"mel": 4, "nv": 2}, 100)
    assert choose_matched(parts, 1, seed=0).counts == {"mel": 1}
    assert choose_matched(parts, 3, seed=0).counts == {"mel": 2, "nv": 1}


def test_classes_that_the_network_does_not_have_are_not_chosen(protocol, tmp_path):
    parts = open_parts(protocol)
    classes = open_network(save_generator(tmp_path / "other.safetensors", {"classes": ["mel", "df"]}), "cpu").classes
    known = match_classes(classes, parts["train"].classes, parts["train"].images.classes)
    assert choose_matched(parts, 100, seed=0, known=known).counts == {"mel": 4}


# Projections


def test_projections_of_a_part_are_those_of_the_program(protocol, network, paths):
    assert project(protocol, network, {"train": [1, 4, 7], "val": [2], "test": []}) == {
        "train": Path("out/train"), "val": Path("out/val")}
    assert names_in("out") == ["train", "val"]
    assert names_in("out/train") == SET_FILES
    assert run(projector.main, ["--network=net.safetensors", f"--data={paths['train']}", "--outdir=all", "--batch=2",
                                f"--num-steps={STEPS}", "--detector=pixels", "--device=cpu"]) == 0
    every = {row["image"]: row for row in rows_in("all/distances.csv")}
    found = rows_in("out/train/distances.csv")
    assert [row["image"] for row in found] == [f"00000/img0000000{row}.png" for row in (1, 4, 7)]
    for row in found:
        for column in ("class", "group", "network_class", "detector"):
            assert row[column] == every[row["image"]][column]
        assert float(row["perceptual"]) == pytest.approx(float(every[row["image"]]["perceptual"]), rel=1e-3)
    records = [json.loads(Path(folder, "projections.json").read_text()) for folder in ("out/train", "all")]
    different = {name for name in records[0] if records[0][name] != records[1][name]}
    assert different == {"data_sha256", "count", "projected", "distances"}


def test_projections_that_were_stopped_continue_and_finished_ones_are_kept(protocol, network, monkeypatch, capsys):
    rows = {"train": [0, 3, 5], "test": [1, 2, 6]}
    project(protocol, network, rows, outdir="expected")
    with monkeypatch.context() as patch:
        stop_within(patch, 2 * STEPS + STEPS + 1, Terminated())  # in the second pass of the second part
        with pytest.raises(Terminated):
            project(protocol, network, rows)
    assert names_in("out/train") == SET_FILES
    before = contents("out/train")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        done = stop_within(patch, 99, None)
        project(protocol, network, rows)
    assert done == [2, 3]
    assert capsys.readouterr().out.startswith("out/train already holds these results\nout/test: 3 images projected")
    assert contents("out/train") == before
    assert contents("out") == contents("expected")


def test_finished_projections_with_other_settings_are_refused(protocol, network):
    project(protocol, network, {"train": [0, 3]})
    assert refusal(project, protocol, network, {"train": [0, 3]}, num_steps=4) == (
        "--outdir is out/train, which holds other results (num_steps differs); choose another folder for these")
    assert refusal(project, protocol, network, {"train": [0, 4]}) == (
        "--outdir is out/train, which holds other results (data_sha256 differs); choose another folder for these")


def test_networks_of_label_vectors_are_not_projected(network, tmp_path):
    assert projection_problem(network) is None
    vectors = open_network(save_generator(tmp_path / "v.safetensors", {"label_kind": "vector"}), "cpu")
    assert projection_problem(vectors) == (
        "the labels of v.safetensors are vectors, which the images of a protocol do not have")


# Folders


def test_folders_are_read_with_part_rows_and_distances(protocol, network):
    folders = project(protocol, network, {"train": [1, 4, 7], "test": [2, 3]})
    train, test = read_projections(list(folders.values()), protocol, network)
    assert (train.part, train.rows.tolist(), test.part, test.rows.tolist()) == ("train", [1, 4, 7], "test", [2, 3])
    part = open_part(protocol, "train")
    assert train.names == [part.names[row] for row in (1, 4, 7)]
    assert train.groups == [part.group_names[row] for row in (1, 4, 7)]
    assert train.classes == [part.classes[row] for row in (1, 4, 7)]
    assert train.distances.dtype == np.float64
    assert train.distances.tolist() == [float(row["perceptual"]) for row in rows_in("out/train/distances.csv")]
    assert train.settings["num_steps"] == STEPS


def test_folders_of_the_program_are_read(protocol, network, paths):
    for name in ("train", "val"):
        assert run(projector.main, ["--network=net.safetensors", f"--data={paths[name]}", f"--outdir=own-{name}",
                                    "--count=5", "--group-by-class", f"--num-steps={STEPS}", "--detector=pixels",
                                    "--device=cpu"]) == 0
    train, val = read_projections(["own-train", "own-val"], protocol, network)
    assert (train.part, val.part) == ("train", "val")
    part = open_part(protocol, "train")
    assert [part.classes[row] for row in train.rows] == train.classes == ["nv"] * 3 + ["mel"] * 2


@pytest.fixture
def folders(protocol, network):
    return project(protocol, network, {"train": [1, 4], "val": [2, 3]})


def read_refusal(folders, protocol, network):
    return refusal(read_projections, folders, protocol, network)


def test_missing_unfinished_and_damaged_folders_are_refused(folders, protocol, network):
    expected = "expected a folder that projector.py --data has finished"
    assert read_refusal(["nowhere"], protocol, network) == f"--projections=nowhere has no projections.json; {expected}"
    Path("out/val/distances.csv").rename("kept.csv")
    assert read_refusal(["out/val"], protocol, network) == f"--projections=out/val has no distances.csv; {expected}"
    damaged = f"--projections=out/val is damaged: projections.json and distances.csv do not fit each other; {expected}"
    lines = Path("kept.csv").read_text().splitlines()
    for text in ("", "\n".join(lines[:-1]), "\n".join(lines).replace("perceptual", "other"),
                 "\n".join([*lines[:-1], lines[-1].replace("pixels,", "pixels,nan")])):
        Path("out/val/distances.csv").write_text(text)
        assert read_refusal(["out/val"], protocol, network) == damaged
    Path("out/val/projections.json").write_text("[]")
    assert read_refusal(["out/val"], protocol, network) == damaged


def test_images_that_could_not_be_projected_are_left_out(protocol, network):
    project(protocol, network, {"train": [1, 4, 7], "val": [2, 3]})
    table, record = Path("out/train/distances.csv"), Path("out/train/projections.json")
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([lines[0], lines[1], lines[3]]))
    Path("out/train/failed.csv").write_text(f"image,reason\n{lines[2].split(',')[0]},its distance became infinite\n")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"projected": 2, "unreadable": 1}))
    assert read_projections(["out/train", "out/val"], protocol, network)[0].rows.tolist() == [1, 7]


def test_projections_of_other_images_are_refused(folders, protocol, network, paths, tmp_path):
    other = "expected projector.py --data with the file of a part, as it is now: project its images again"
    assert run(projector.main, ["--network=net.safetensors", f"--data={paths['isic']}", "--outdir=isic",
                                f"--num-steps={STEPS}", "--detector=pixels", "--device=cpu"]) == 0
    assert read_refusal(["out/train", "isic"], protocol, network) == (
        "--projections=isic has projections of isic.zip, whose images are not those of the training, validation or "
        f"test part of the protocol; {other}")
    shutil.copytree("out/val", "changed")
    table = Path("changed/distances.csv")
    table.write_text(table.read_text().replace("img00000003", "img00000004"))
    assert read_refusal(["out/train", "changed"], protocol, network).startswith(
        "--projections=changed has projections of val.zip, whose images are not those of")


def test_folders_with_different_settings_are_refused(folders, protocol, network):
    project(protocol, network, {"val": [2, 3]}, outdir="more", num_steps=STEPS + 1)
    assert read_refusal(["out/train", "more/val"], protocol, network) == (
        f"--projections=more/val was made with num_steps {STEPS + 1}, but the projections of the train part with "
        f"{STEPS}; expected equal settings: project one of them again")


def test_projections_of_another_network_are_refused(folders, protocol, tmp_path):
    other = open_network(save_generator(tmp_path / "other.safetensors", seed=5), "cpu")
    assert read_refusal(["out/train", "out/val"], protocol, other) == (
        "--projections=out/train has projections of net.safetensors, another network than --network "
        "(other.safetensors); expected those of --network: project the images again")


def test_parts_that_are_missing_or_given_twice_are_refused(folders, protocol, network):
    rest = "; expected those of the training part, and of the validation part, the test part or both"
    assert read_refusal(["out/val"], protocol, network) == (
        f"--projections has no projections of the training part{rest}")
    assert read_refusal(["out/train"], protocol, network) == (
        f"--projections has no projections of the validation and test parts{rest}")
    assert read_refusal(["out/train", "out/train"], protocol, network) == (
        "--projections=out/train has projections of the train part, as another folder of --projections has; expected "
        "one folder for each part")


# Values


def projected(part, classes, distances, groups=None, rows=None):
    count = len(classes)
    return ProjectedPart(part=part, rows=np.array(range(count) if rows is None else rows), names=[""] * count,
                         groups=groups or [f"g{index}" for index in range(count)], classes=classes,
                         distances=np.array(distances), settings={})


def test_values_are_larger_for_nearer_images_and_only_of_classes_of_both_sides():
    members, heldout = combine([
        projected("test", ["df", "mel"], [0.5, 0.25]), projected("val", ["nv"], [2.0]),
        projected("train", ["nv", "mel", "vasc", "nv"], [1.0, 3.0, 4.0, 5.0], rows=[3, 2, 1, 0])])
    assert members.values.tolist() == [-5.0, -3.0, -1.0]
    assert members.strata.tolist() == [1, 0, 1]
    assert heldout.values.tolist() == [-2.0, -0.25]
    assert heldout.strata.tolist() == [1, 0]


def test_groups_of_different_parts_have_different_numbers():
    members, heldout = combine([projected("train", ["nv"] * 3, [1.0] * 3, groups=["a", "b", "a"]),
                                projected("val", ["nv"] * 2, [1.0] * 2, groups=["a", "a"]),
                                projected("test", ["nv"] * 2, [1.0] * 2, groups=["a", "c"])])
    assert members.groups.tolist() == [0, 1, 0]
    assert heldout.groups.tolist() == [2, 2, 3, 4]


def test_parts_without_a_class_in_common_give_no_values():
    members, heldout = combine([projected("train", ["nv"], [1.0]), projected("val", ["mel"], [1.0])])
    assert (len(members.values), len(heldout.groups)) == (0, 0)
