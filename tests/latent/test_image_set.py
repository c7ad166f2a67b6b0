"""projector.py --data: pictures, styles, tables and numbers of many images, and images that cannot be read."""

import math
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import generate
from dnnlib.cli import run
from imagesets.metadata import may_be_redistributed
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from latent.image_set import choose_examples
from latent.projection import COLUMNS, Projection
from latent.targets import read_target
from metrics.detectors.similarity import PixelDistance
from tests.helpers.generator_files import pixels_in, save_generator
from tests.helpers.image_files import encode, lesion_like, read_png
from tests.helpers.make_sets import enclose, make_set, pixels_of, png
from tests.helpers.projector_commands import (
    SET_FILES,
    STEPS,
    as_image,
    attempt,
    contents,
    distances_between,
    names_in,
    pictures_in,
    project,
    project_with_failures,
    record_in,
    results_in,
    rows_in,
    styles_in,
    working_in,
    write_set,
)
from torch_utils.images import Pair, PairRow, draw_pair_sheet
from torch_utils.plots import save_histogram
from training.dataset import ImageDataset
from training.snapshot import load_network

pytestmark = pytest.mark.usefixtures("one_thread")  # as programs that tests start

CLASSES, LABELS, GROUPS = ["mel", "nv"], [1, 0, 1, 0, 0, 1], ["a", "a", "b", "c", "d", "e"]  # the network's, reversed
SET = ("--data=set.zip", "--outdir=out", "--batch=4")
QUANTITY = "perceptual distance (pixels), w, net.safetensors"


@pytest.fixture
def inside(tmp_path, monkeypatch):
    with working_in(tmp_path, monkeypatch):
        make_set("set.zip", 6, labels=LABELS, classes=CLASSES, groups=GROUPS)
        yield


def test_set_becomes_a_data_set_of_projections(inside, capsys):
    project(capsys, *SET)
    assert names_in("out") == SET_FILES
    found = ImageSet("out/projections.zip")
    assert (found.classes, found.labels.tolist(), found.groups) == (["nv", "mel"], [0, 1, 0, 1, 1, 0], GROUPS)
    record = record_in("out", "projections.json")
    settings = {name: value for name, value in record.items() if name not in ("projected", "unreadable", "distances")}
    assert found.source == {"generated": True, "projected": True, **settings}
    assert settings | {"network_sha256": 0, "data_sha256": 0} == {
        "network": "net.safetensors", "network_sha256": 0, "network_kimg": 4.5, "space": "w", "num_steps": STEPS,
        "seed": 303, "detector": "pixels", "detector_weights_sha256": "none",
        "detector_preprocessing": PixelDistance.preprocessing, "transform": "center-crop", "resize_filter": "lanczos",
        "exact": False, "batch": 4, "device": "cpu", "operators": "cpp", "data": "set.zip", "data_sha256": 0,
        "count": 6, "left_out_by_class": 0, "class": None, "group_by_class": False}
    trained_on = ImageDataset("out/projections.zip", use_labels=True)
    assert (len(trained_on), trained_on.image_shape, trained_on[3][1].tolist()) == (6, (3, 8, 8), [0, 1])


def test_set_in_a_folder_inside_gives_the_files_of_the_set(inside, capsys):
    project(capsys, *SET)
    expected = contents("out")
    enclose("set.zip", Path("inside.zip")).replace("set.zip")
    (Path("out")).rename("first")
    project(capsys, *SET)
    assert contents("out") == expected


def test_styles_of_a_set_give_its_projections_again(inside, capsys):
    project(capsys, *SET)
    with np.load("out/latents.npz", allow_pickle=False) as arrays:
        assert arrays["image"].tolist() == ImageSet("set.zip").names
        assert arrays["group"].tolist() == GROUPS
        assert arrays["class"].tolist() == arrays["network_class"].tolist() == [CLASSES[label] for label in LABELS]
        assert (arrays["w"].dtype, arrays["w"].shape) == (np.float32, (6, 4, 8))
        assert len(arrays.files) == 5
    assert run(generate.main, ["--network=net.safetensors", "--projected-w=out/latents.npz", "--outdir=again"]) == 0
    found = ImageSet("out/projections.zip")
    assert ([found.read(name) for name in found.names]
            == [Path(f"again/proj0{index}.png").read_bytes() for index in range(6)])


def test_table_has_a_row_for_each_image_with_the_distances_of_its_pixels(inside, capsys):
    project(capsys, *SET)
    rows = rows_in("out/distances.csv")
    assert ",".join(rows[0]) == ("image,projection,class,group,network_class,detector,perceptual,pixel_l2,psnr,"
                                 "feature_cosine")
    pairs = zip(pictures_in("set.zip"), pictures_in("out/projections.zip"), strict=True)
    for index, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        name, label = f"00000/img0000000{index}.png", CLASSES[LABELS[index]]
        expected = distances_between(*pair)
        assert [float(row[column]) for column in COLUMNS] == pytest.approx(list(expected.values()), rel=1e-5)
        assert list(row.values())[:6] == [name, name, label, GROUPS[index], label, "pixels"]


def statistics(values):
    """Return what projections.json should say of distances, here by other means than numpy's quantiles."""
    ordered = torch.tensor(values, dtype=torch.float64)
    parts = ordered.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    expected = dict(zip(("quartile", "median", "third_quartile"), parts, strict=True)) | {"mean": ordered.mean().item()}
    return {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_statistics_are_those_of_the_table(inside, capsys):
    out = project(capsys, *SET)
    rows, record = rows_in("out/distances.csv"), record_in("out", "projections.json")
    assert (record["projected"], record["unreadable"]) == (6, 0)
    assert list(record["distances"]) == ["all", "nv", "mel"]
    lines = ["out: 6 images projected; medians with pixels:"]
    for name, found in record["distances"].items():
        values = {column: [float(row[column]) for row in rows if name in ("all", row["class"])] for column in COLUMNS}
        assert found == {"count": len(values["psnr"]), **{column: statistics(values[column]) for column in COLUMNS}}
        lines.append(f"  {name} ({found['count']}): "
                     + ", ".join(f"{column} {found[column]['median']:.4g}" for column in COLUMNS))
    assert out.splitlines() == lines


def expected_sheet(title, groups):
    """Return the picture of pairs.png. groups: by title rows of the table, and the pairs of each kind"""
    targets, projections = ImageSet("set.zip"), ImageSet("out/projections.zip")

    def pair(row, kind):
        return Pair(target=as_image(read_png(targets.read(row["image"]))),
                    projection=as_image(read_png(projections.read(row["projection"]))),
                    caption=f"{kind}{float(row['perceptual']):.3g} {row['image'].removeprefix('00000/')}")

    rows = []
    for name, (members, count) in groups.items():
        examples = choose_examples([float(row["perceptual"]) for row in members], count)
        if not name:  # a row for each kind, else one for each class
            rows += [PairRow(title=kind, pairs=[pair(members[index], "") for index in indices])
                     for kind, indices in examples.items()]
        else:
            rows.append(PairRow(title=name, pairs=[pair(members[index], f"{kind} ")
                                                   for kind, indices in examples.items() for index in indices]))
    return np.asarray(draw_pair_sheet(rows, title=title))


def test_sheet_and_histogram_show_the_distances(inside, capsys):
    make_set("set.zip", 27)
    project(capsys, "--data=set.zip", "--class=nv", "--outdir=out", "--num-steps=1")
    rows = rows_in("out/distances.csv")
    assert np.array_equal(pixels_in("out/pairs.png"),
                          expected_sheet(f"target and projection: {QUANTITY}", {"": (rows, 8)}))
    save_histogram("expected.png", {"all": [float(row["perceptual"]) for row in rows]}, quantity=QUANTITY)
    assert np.array_equal(pixels_in("out/distances.png"), pixels_in("expected.png"))


def test_group_by_class_takes_equally_many_and_shows_them_apart(inside, capsys):
    make_set("set.zip", 27, labels=[0, 1, 1] * 9, classes=CLASSES)
    project(capsys, *SET, "--group-by-class", "--count=24", "--num-steps=1")
    rows = rows_in("out/distances.csv")
    assert [row["class"] for row in rows] == ["mel"] * 9 + ["nv"] * 15
    groups = {name: [row for row in rows if row["class"] == name] for name in CLASSES}
    for members in groups.values():
        assert members == sorted(members, key=lambda row: row["image"])
    assert np.array_equal(pixels_in("out/pairs.png"), expected_sheet(
        f"target and projection: {QUANTITY}", {"mel": (groups["mel"], 2), "nv": (groups["nv"], 2)}))
    save_histogram("expected.png", {name: [float(row["perceptual"]) for row in members]
                                    for name, members in groups.items()}, quantity=QUANTITY)
    assert np.array_equal(pixels_in("out/distances.png"), pixels_in("expected.png"))


def test_sheet_of_many_classes_shows_the_first_ones_and_says_so(inside, capsys):
    names = [f"class{number:02d}" for number in range(14)]
    make_set("set.zip", 14, labels=list(range(14)), classes=names)
    project(capsys, *SET, "--class=auto", "--group-by-class", "--num-steps=1")
    groups = {row["class"]: ([row], 1) for row in rows_in("out/distances.csv")[:12]}
    title = f"target and projection: {QUANTITY} (the first 12 of 14 classes)"
    assert np.array_equal(pixels_in("out/pairs.png"), expected_sheet(title, groups))
    assert list(record_in("out", "projections.json")["distances"]) == ["all", *names]


def test_count_draws_images_by_the_seed(inside, capsys):
    project(capsys, *SET)
    everything = dict(zip(ImageSet("set.zip").names, styles_in("out"), strict=True))
    chosen = set()
    for number, seed in enumerate((303, 303, 304, 305)):
        project(capsys, *SET, "--count=3", f"--seed={seed}", f"--outdir=out{number}")
        names = [row["image"] for row in rows_in(f"out{number}/distances.csv")]
        assert (len(names), names) == (3, sorted(names))
        chosen.add(tuple(names))
        if seed == 303:
            assert np.array_equal(styles_in(f"out{number}"), [everything[name] for name in names])
    assert 1 < len(chosen) < 4
    assert contents("out0") == contents("out1")


def test_count_of_more_than_there_are_takes_all_and_says_so(inside, capsys):
    assert project_with_failures(capsys, *SET, "--count=9").err == (
        "set.zip has only 6 such images, fewer than --count=9\n")
    assert len(rows_in("out/distances.csv")) == 6


@pytest.mark.parametrize("flags", [["--class=nv"], ["--class=0"]])
def test_class_of_a_labeled_set_takes_its_images_alone(inside, capsys, flags):
    project(capsys, *SET)
    expected = [row for row in results_in("out") if row[5] == "nv"]
    project(capsys, *SET, *flags, "--outdir=nv")
    assert [row["image"][-5] for row in rows_in("nv/distances.csv")] == ["0", "2", "5"]
    assert results_in("nv") == expected


@pytest.mark.parametrize("batch", [1, 3, 5, 8])  # passes of 3 divide the tries of image 1, those of 5 of image 2
def test_class_auto_keeps_the_nearest_of_each_image(inside, capsys, batch):
    write_set("set.zip", range(6))
    alone = []
    for name in ("nv", "mel"):
        project(capsys, *SET, f"--class={name}", f"--batch={batch}", f"--outdir={name}")
        alone.append(results_in(name))
    project(capsys, *SET, "--class=auto", f"--batch={batch}")
    found = results_in("out")
    assert found == [min(pair, key=lambda result: float(result[1])) for pair in zip(*alone, strict=True)]
    assert [result[5] for result in found] == ["mel", "mel", "nv", "nv", "mel", "mel"]
    images = ImageSet("out/projections.zip")
    assert (images.labels.tolist(), images.classes) == ([1, 1, 0, 0, 1, 1], ["nv", "mel"])


@pytest.mark.parametrize("indices", [[5, 3, 1, 0, 2, 4], [4, 2, 0], [3], [2, 1, 0, 5, 4, 3, 2]])
def test_result_of_an_image_depends_on_no_other_one(inside, capsys, indices):
    write_set("set.zip", range(6))
    write_set("other.zip", indices)
    project(capsys, *SET, "--class=mel")
    project(capsys, *SET, "--class=mel", "--data=other.zip", "--outdir=other")
    expected, found = results_in("out"), results_in("other")
    assert found == [expected[index] for index in indices]


def test_set_of_one_image_is_like_that_image(inside, capsys):
    write_set("one.zip", [3])
    Path("target.png").write_bytes(png(pixels_of(3)))
    for space in ("w", "w+"):
        flags = ("--class=mel", "--batch=4", f"--space={space}")
        project(capsys, *flags, "--data=one.zip", f"--outdir=set{space}")
        project(capsys, *flags, "--target=target.png", f"--outdir=target{space}")
        assert np.array_equal(styles_in(f"set{space}"), styles_in(f"target{space}", "projected_w.npz"))
        images = ImageSet(f"set{space}/projections.zip")
        assert images.read(images.names[0]) == Path(f"target{space}/proj.png").read_bytes()
        distances = record_in(f"target{space}")["distances"]
        assert rows_in(f"set{space}/distances.csv")[0].items() >= {name: f"{distances[name]:.7g}" for name in
                                                                   COLUMNS}.items()


def test_set_of_a_network_without_classes_keeps_the_labels_of_the_set(inside, capsys):
    project(capsys, *SET, network="plain.safetensors")
    found = ImageSet("out/projections.zip")
    assert (found.classes, found.labels.tolist(), found.groups) == (CLASSES, LABELS, GROUPS)
    rows = rows_in("out/distances.csv")
    assert [(row["class"], row["network_class"]) for row in rows] == [(CLASSES[label], "") for label in LABELS]
    with np.load("out/latents.npz") as arrays:
        assert arrays["network_class"].tolist() == [""] * 6


def test_gray_network_makes_gray_projections(inside, capsys):
    project(capsys, *SET, network="gray.safetensors")
    images = ImageSet("out/projections.zip")
    assert {read_png(images.read(name)).shape for name in images.names} == {(8, 8)}
    assert pixels_in("out/pairs.png").shape[2] == 3


def test_classes_of_numbers_fit_as_numbers(inside, capsys):
    save_generator("numbers.safetensors", {}, c_dim=3)
    make_set("set.zip", 3, labels=[2, 0, 1])
    project(capsys, *SET, network="numbers.safetensors")
    rows = rows_in("out/distances.csv")
    assert [(row["class"], row["network_class"]) for row in rows] == [("2", "2"), ("0", "0"), ("1", "1")]
    found = ImageSet("out/projections.zip")
    assert (found.classes, found.labels.tolist()) == (None, [2, 0, 1])


@pytest.mark.parametrize(("network", "data"), [(True, False), (False, True), (False, False)])
def test_phantoms_stay_marked_as_such(inside, capsys, network, data):
    save_generator("net.safetensors", {"classes": CLASSES, "phantom": network})
    with ImageSetWriter("set.zip", classes=CLASSES, source={"phantom": data}) as writer:
        writer.add(png(pixels_of(0)), 0)
    project(capsys, *SET)
    assert ImageSet("out/projections.zip").source.get("phantom") is (True if network or data else None)


@pytest.mark.parametrize(("source", "expected"), [
    ({"redistribution": True}, True), ({"redistribution": False}, False), ({"phantom": True}, True), ({}, None)])
def test_projections_may_be_redistributed_if_their_originals_may(inside, capsys, source, expected):
    save_generator("net.safetensors", {"classes": CLASSES, "phantom": True})
    make_set("set.zip", 1, labels=[0], classes=CLASSES, source=source)
    project(capsys, *SET)
    found = ImageSet("out/projections.zip").source
    assert (found.get("redistribution"), may_be_redistributed(found)) == (expected, expected)


def test_class_auto_keeps_the_labels_of_the_set_where_the_network_knows_them(inside, capsys):
    make_set("set.zip", 6, labels=[0, 1, 1, 2, None, 1], classes=["nv", "mel", "bcc"])
    project(capsys, *SET, "--class=auto")
    rows = rows_in("out/distances.csv")
    assert [row["class"] for row in rows] == ["nv", "mel", "mel", "bcc", "", "mel"]
    assert [row["network_class"] for row in rows] == ["mel", "mel", "nv", "nv", "mel", "mel"]  # the nearest
    images = ImageSet("out/projections.zip")
    assert (images.labels.tolist(), images.classes) == ([0, 1, 1, 0, 1, 1], ["nv", "mel"])


def test_images_of_classes_that_the_network_does_not_know_are_left_out(inside, capsys):
    make_set("set.zip", 5, labels=[0, 1, 2, 1, None], classes=["nv", "bcc", "mel"])
    assert project_with_failures(capsys, *SET, "--count=3").err == (
        "3 images of set.zip are left out, because the network does not know their label\n"
        "set.zip has only 2 such images, fewer than --count=3\n")
    assert [row["class"] for row in rows_in("out/distances.csv")] == ["nv", "mel"]
    assert record_in("out", "projections.json")["left_out_by_class"] == 3


def make_photos():
    """Make a folder of photographs, some of which cannot be read; return the names of those that can."""
    good = {"b/lesion, one.JPG": encode(lesion_like(100, 80), "JPEG"), "a.png": png(pixels_of(1)),
            "z/clear.png": encode(np.dstack([pixels_of(2), pixels_of(3)[..., :1]]))}
    bad = {"cut.jpg": encode(lesion_like(90, 90), "JPEG")[:700], "text.png": b"no picture", "void.png": b""}
    for name, data in (good | bad).items():
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Path("photos", name).write_bytes(data)
    return sorted(good)


@pytest.mark.parametrize("class_", ["mel", "auto"])
def test_folder_of_photographs_is_projected_but_for_what_cannot_be_read(inside, capsys, class_):
    names = make_photos()
    out, err = project_with_failures(capsys, "--data=photos", f"--class={class_}", "--outdir=out", "--batch=2")
    assert out.startswith("out: 3 images projected, 3 left out (see failed.csv); medians with pixels:\n  all (3): ")
    assert names_in("out") == sorted([*SET_FILES, "failed.csv"])
    failed = {"cut.jpg": "truncated", "text.png": "not an image", "void.png": "zero bytes"}
    assert rows_in("out/failed.csv") == [{"image": name, "reason": reason} for name, reason in failed.items()]
    assert sorted(set(err.splitlines())) == sorted(f"{name} is left out: {reason}" for name, reason in failed.items())
    G = load_network("net.safetensors").G_ema
    rows = rows_in("out/distances.csv")
    assert [row["image"] for row in rows] == [row["group"] for row in rows] == names
    for row, image in zip(rows, pictures_in("out/projections.zip"), strict=True):
        expected = distances_between(read_target(f"photos/{row['image']}", G), image)
        assert [float(row[name]) for name in COLUMNS] == pytest.approx(list(expected.values()), rel=1e-5)
        assert row["class"] == ""
    record = record_in("out", "projections.json")
    assert (record["count"], record["projected"], record["unreadable"]) == (6, 3, 3)
    assert list(record["distances"]) == ["all"]


def test_good_images_beside_bad_ones_are_as_without_them(inside, capsys):
    make_photos()
    flags = ("--data=photos", "--class=mel", "--batch=2")
    project_with_failures(capsys, *flags, "--outdir=some")
    for name in ("cut.jpg", "text.png", "void.png"):
        Path("photos", name).unlink()
    project(capsys, *flags, "--outdir=all")
    assert results_in("some") == results_in("all")


def test_failures_of_an_earlier_command_are_not_left_for_its_successor(inside, capsys):
    Path("out").mkdir()
    Path("out/failed.csv").write_text("image,reason\nold.png,corrupt\n")
    project(capsys, *SET)
    assert names_in("out") == SET_FILES


def test_damaged_member_of_a_zip_is_left_out(inside, capsys):
    data = bytearray(Path("set.zip").read_bytes())
    with zipfile.ZipFile("set.zip") as archive:
        info = archive.getinfo("00000/img00000002.png")
    data[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 1
    Path("set.zip").write_bytes(data)
    reason = ("set.zip: 00000/img00000002.png is damaged (Bad CRC-32 for file '00000/img00000002.png'); make or copy "
              "the data set again")
    _, err = project_with_failures(capsys, *SET)
    assert err == f"00000/img00000002.png is left out: {reason}\n"
    assert rows_in("out/failed.csv") == [{"image": "00000/img00000002.png", "reason": reason}]
    assert [row["image"][-5] for row in rows_in("out/distances.csv")] == ["0", "1", "3", "4", "5"]
    found = ImageSet("out/projections.zip")
    assert (found.labels.tolist(), found.groups) == ([0, 1, 1, 1, 0], ["a", "a", "c", "d", "e"])


def test_set_without_a_readable_image_says_so_and_why(inside, capsys):
    Path("photos").mkdir()
    for number in range(3):
        Path(f"photos/{number}.png").write_text("no picture")
    command = ("--data=photos", "--class=mel", "--outdir=out")
    for _ in range(2):  # it does not pass for done
        assert attempt(*command) == 2
        assert capsys.readouterr() == ("", "".join(f"{number}.png is left out: not an image\n" for number in range(3))
                                       + "error: none of the 3 images of photos could be read; see failed.csv in "
                                       "--outdir\n")
        assert names_in("out") == ["failed.csv"]
        assert rows_in("out/failed.csv") == [{"image": f"{number}.png", "reason": "not an image"}
                                             for number in range(3)]
    Path("photos/1.png").write_bytes(png(pixels_of(1)))
    project_with_failures(capsys, *command)
    assert [row["image"] for row in rows_in("out/distances.csv")] == ["1.png"]


def test_names_of_any_kind_come_out_as_they_are(inside, capsys):
    names = sorted(["L\u00e4sion.png", 'quote"d, name.png', "two\nlines.png"])
    Path("photos").mkdir()
    for index, name in enumerate(names):
        Path("photos", name).write_bytes(png(pixels_of(index)))
    project(capsys, "--data=photos", "--class=mel", "--outdir=out")
    assert [row["image"] for row in rows_in("out/distances.csv")] == names
    with np.load("out/latents.npz") as arrays:
        assert arrays["image"].tolist() == names


def test_names_that_are_no_text_are_written_with_escapes(inside, capfd):
    Path("photos").mkdir()
    try:
        for name, data in ((b"\xff.png", png(pixels_of(0))), (b"\xfe.png", b"no picture")):
            Path("photos", os.fsdecode(name)).write_bytes(data)
    except OSError:
        pytest.skip("this file system takes no such names")
    _, err = project_with_failures(capfd, "--data=photos", "--class=mel", "--outdir=out")
    assert "is left out: not an image" in err
    assert [row["image"] for row in rows_in("out/distances.csv")] == ["\\udcff.png"]
    assert [row["image"] for row in rows_in("out/failed.csv")] == ["\\udcfe.png"]
    with np.load("out/latents.npz") as arrays:
        assert arrays["image"].tolist() == [os.fsdecode(b"\xff.png")]


def lose(monkeypatch, slots):
    """Let the styles of some projections of each pass become no numbers."""
    styles = Projection.styles

    def lose_some(self):
        ws = styles(self).clone()
        ws[slots] = float("nan")
        return ws

    monkeypatch.setattr(Projection, "styles", lose_some)


def test_projection_that_comes_to_nothing_is_left_out(inside, capsys, monkeypatch):
    project(capsys, *SET, "--outdir=expected")
    lose(monkeypatch, slice(0, 1))
    assert project_with_failures(capsys, *SET).out.startswith("out: 4 images projected, 2 left out (see failed.csv); ")
    assert rows_in("out/failed.csv") == [{"image": f"00000/img0000000{index}.png",
                                          "reason": "its distance became infinite or nan"} for index in (0, 4)]
    assert [row["image"][-5] for row in rows_in("out/distances.csv")] == ["1", "2", "3", "5"]
    assert np.array_equal(styles_in("out"), styles_in("expected")[[1, 2, 3, 5]])


@pytest.mark.parametrize("lost", [0, 1])
def test_class_whose_projection_comes_to_nothing_is_not_the_nearest(inside, capsys, monkeypatch, lost):
    write_set("set.zip", range(6))
    project(capsys, *SET, f"--class={1 - lost}", "--outdir=expected")
    lose(monkeypatch, slice(lost, None, 2))
    project(capsys, *SET, "--class=auto")
    assert results_in("out") == results_in("expected")


@pytest.mark.parametrize(("distances", "count", "expected"), [
    ([5, 3, 9, 1, 7], 1, ([3], [0], [2])),
    ([8, 7, 6, 5, 4, 3, 2, 1, 0], 2, ([8, 7], [5, 4], [0, 1])),
    ([1] * 7, 2, ([0, 1], [2, 3], [6, 5])),  # ties: by index
    ([math.nan, 1, math.inf, 2, 0, 3], 2, ([4, 1], [3, 5], [2, 0])),
    ([-math.inf, 1, 2], 1, ([1], [2], [0])),
    ([2, 1, 3], 2, ([1, 0], [], [2])),  # too few: best first, then worst
    ([2, 1, 3, 0, 4], 2, ([3, 1], [0], [4, 2])),
    ([1], 3, ([0], [], [])),
    ([], 3, ([], [], [])),
])
def test_choose_examples_nearest_middle_and_farthest(distances, count, expected):
    assert tuple(choose_examples(distances, count).values()) == expected
    assert list(choose_examples(distances, count)) == ["best", "median", "worst"]


def test_choose_examples_none_twice_and_as_many_as_there_are():
    draw = random.Random(0)
    for _ in range(300):
        number, count = draw.randrange(20), draw.randrange(1, 6)
        distances = [draw.choice([0, 1, 2, 3, math.nan]) for _ in range(number)]
        lists = choose_examples(distances, count)
        chosen = [index for some in lists.values() for index in some]
        assert len(chosen) == len(set(chosen)) == min(number, 3 * count)


def test_choose_examples_median_is_that_of_the_distances():
    distances = torch.randn(101, generator=torch.Generator().manual_seed(0))
    assert distances[choose_examples(distances.tolist(), 1)["median"]].item() == distances.median()


def test_choose_examples_count_zero_raises():
    with pytest.raises(ValueError, match=r"^count is 0; expected 1 or more$"):
        choose_examples([1.0], 0)
