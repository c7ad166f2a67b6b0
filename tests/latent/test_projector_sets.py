"""projector.py --data: pictures, styles, tables and numbers of many images."""

from pathlib import Path

import numpy as np
import pytest
import torch

import generate
from dnnlib.cli import run
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from latent.pair_sheet import Pair, Row, choose_examples, draw_pair_sheet
from latent.projection import COLUMNS
from metrics.detectors.similarity import PixelDistance
from tests.helpers.generator_files import pixels_in, save_generator
from tests.helpers.image_files import read_png
from tests.helpers.make_sets import enclose, make_set, pixels_of, png
from tests.helpers.projector_commands import (
    SET_FILES,
    STEPS,
    as_image,
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
from torch_utils.plots import save_histogram
from training.dataset import ImageDataset

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
            rows += [Row(title=kind, pairs=[pair(members[index], "") for index in indices])
                     for kind, indices in examples.items()]
        else:
            rows.append(Row(title=name, pairs=[pair(members[index], f"{kind} ") for kind, indices in examples.items()
                                               for index in indices]))
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
        "set.zip has 6 such images, fewer than --count=9\n")
    assert len(rows_in("out/distances.csv")) == 6


@pytest.mark.parametrize("flags", [["--class=nv"], ["--class=0"]])
def test_class_of_a_labelled_set_takes_its_images_alone(inside, capsys, flags):
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


def test_grey_network_makes_grey_projections(inside, capsys):
    project(capsys, *SET, network="grey.safetensors")
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
        "3 images of set.zip are left out, which have no label that the network knows\n"
        "set.zip has 2 such images, fewer than --count=3\n")
    assert [row["class"] for row in rows_in("out/distances.csv")] == ["nv", "mel"]
    assert record_in("out", "projections.json")["left_out_by_class"] == 3
