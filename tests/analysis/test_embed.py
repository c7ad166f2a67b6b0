"""study.py embed: equal pages for equal inputs, what moves nothing, whose pictures are shown, meaning, and mistakes."""

import csv
import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset_tool
from analysis import embed as command
from analysis.backbones import open_backbone
from analysis.classifier import Classifier, Head, save_classifier
from dnnlib.cli import run
from generation.image_generator import save_projected_w
from generation.network import open_network
from imagesets.reader import ImageSet
from tests.helpers.embed_commands import (
    CLASSES,
    GENERATED,
    OPEN,
    Written,
    color_of,
    draw,
    embed,
    link_sets,
    make_sets,
    rows_of,
    write_drawings,
    write_generated,
    write_projections,
)
from tests.helpers.generator_files import save_generator
from tests.helpers.html_pages import HOSTILE
from tests.helpers.make_archives import make_zip
from tests.helpers.make_sets import make_set, png
from tests.helpers.projector_commands import contents
from tests.helpers.small_studies import study
from tests.helpers.spot_sets import LABELS, make_spot_set, spot_images

PROJECTED = "projected/projections.zip"
PCA = "--maps=pca"
RED, GREEN, BLUE = range(3)
UNKNOWN = ("its dataset.json does not record that they may be redistributed; if they may, convert the set with "
           "dataset_tool.py --redistribution=yes")
NEAR = ", which are as near as possible to real images,"
NASTY = f"{HOSTILE}</script></style>\U0001f600"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(autouse=True)
def here(sets, tmp_path, monkeypatch):
    """Files are named as they are in the folder of a test, which has the sets."""
    link_sets(sets, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def succeed(sets, *flags, **options):
    """Make a page and return what it holds."""
    assert embed(sets, *flags, **options) == 0
    return Written(options.get("out", "map.html"))


# The same bytes


def test_files_are_the_same_for_the_same_inputs_and_seed_and_other_ones_for_another_seed(here, capsys):
    found = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        (here / name).mkdir()
        flags = (f"--seed={seed}", f"--table={name}/map.csv", f"--tensorboard={name}/projector", "--no-real-images")
        assert embed(["open.zip", "synthetic.zip", PROJECTED], *flags, out=f"{name}/map.html") == 0
        found.append(contents(name))
    assert sorted(found[0]) == ["map.csv", "map.html", "map.json", "projector", "projector/features.bytes",
                                "projector/metadata.tsv", "projector/projector_config.pbtxt", "projector/sprite.jpg"]
    assert found[0] == found[1]
    assert found[0]["map.html"] != found[2]["map.html"]
    one, three = Written("one/map.html"), Written("three/map.html")
    assert not np.array_equal(one.places("tsne"), three.places("tsne"))
    assert np.array_equal(one.places("pca"), three.places("pca"))
    assert capsys.readouterr().err == ""


def test_sets_that_are_added_move_no_image(monkeypatch):
    embeddings, write = [], command.write_embedding_page
    monkeypatch.setattr(command, "write_embedding_page", lambda path, embedding, *args, **kwargs: (
        embeddings.append(embedding), write(path, embedding, *args, **kwargs)))
    for others in ([], ["synthetic.zip"], ["synthetic.zip", "other.zip", PROJECTED]):
        succeed(["open.zip", *others])
    alone, few, many = embeddings
    assert [layout.key for layout in alone.layouts] == ["tsne", "pca"]
    for one, two, three in zip(alone.layouts, few.layouts, many.layouts, strict=True):
        assert len(one.coordinates) == 120
        assert one.coordinates.tobytes() == two.coordinates[:120].tobytes() == three.coordinates[:120].tobytes()
        assert two.coordinates.tobytes() == three.coordinates[:len(two.coordinates)].tobytes()
        assert one.real == two.real == three.real
    assert few.nearest.distances.tobytes() == many.nearest.distances[:len(few.nearest.distances)].tobytes()


# Pictures of patients


@pytest.mark.parametrize(("first", "flags", "colors", "reasons"), [
    ("real.zip", [], {RED}, [f"pictures of real are not shown: {UNKNOWN}",
                             f"pictures of projections{NEAR} are not shown: {UNKNOWN}"]),
    ("open.zip", [], {RED, GREEN}, [f"pictures of projections{NEAR} are not shown: {UNKNOWN}"]),
    ("open.zip", ["--no-real-images"], {RED}, [
        "pictures of open are not shown: --no-real-images is given",
        f"pictures of projections{NEAR} are not shown: --no-real-images is given"]),
])
def test_files_have_no_pixel_and_no_lesion_of_sets_that_may_not_be_passed_on(first, flags, colors, reasons):
    found = succeed([first, "synthetic.zip", PROJECTED], PCA, "--table=map.csv", "--tensorboard=projector", *flags)
    kinds = {"real": GREEN, "synthetic": RED, "projected": BLUE}
    source = found.column("source")
    expected = {point: kinds[kind] for point, kind in enumerate(source) if kinds[kind] in colors}
    assert {point: color_of(tile) for point, tile in found.tiles().items()} == expected
    unused = {None} if len(found.cells()) > len(expected) else set()
    assert {color_of(cell) for cell in found.cells()} == colors | unused
    assert {color_of(one) for one in found.pictures()} == colors  # of synthetic ones near a region, too
    # Each reason is read by who opens the page, and stands in the numbers.
    sentences = [f"P{reason[1:]}." for reason in reasons]
    told = [text for text in found.page.texts if text in sentences]
    assert sorted(told) == sorted(sentences)
    assert [one["why"] for one in found.data["sets"] if not one["pictures"]] == reasons
    assert set(reasons) <= set(found.record["notes"])
    # Lesions
    shown = {f"lesion{index}" for index in range(60)} if GREEN in colors else set()
    assert set((found.data["groups"] or {"values": []})["values"]) == shown
    assert {row["group"] for row in rows_of("map.csv")} - {""} == shown
    written = contents(".")
    for name in ("map.html", "map.json", "map.csv", "projector/metadata.tsv"):
        assert (b"lesion1" in written[name]) == (bool(shown) and name != "map.json")


def test_pictures_are_shown_of_a_set_that_was_converted_with_the_permission():
    assert run(dataset_tool.main, ["--source=real.zip", "--dest=shared.zip", "--redistribution=yes"]) == 0
    found = succeed(["shared.zip", "synthetic.zip"], PCA)
    tiles = found.tiles()
    assert len(tiles) == 180
    for point in (0, 60, 119):  # each has its own picture
        errors = [np.abs(tiles[point].astype(float) - draw(row, colors=(1, 0, 2))).mean() for row in range(120)]
        assert int(np.argmin(errors)) == point
    assert not [text for text in found.page.texts if "are not shown" in text]


# What numbers mean


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with real images of three classes, as many others, and copies of one class with some noise."""
    folder = tmp_path_factory.mktemp("drawn")
    write_drawings(folder / "real.zip", range(180), source=OPEN, groups=True, colors=None)
    write_drawings(folder / "fresh.zip", range(180, 540, 2), source=GENERATED, colors=None)
    some = [row for row in range(180) if row % 6 < 2]  # of nv
    write_drawings(folder / "collapsed.zip", some * 3, source=GENERATED, colors=None, noise=4)
    return folder


def test_other_images_of_one_distribution_mix_as_expected_and_lack_nothing(drawn):
    record = succeed([drawn / "real.zip", drawn / "fresh.zip"], PCA).record["mixtures"][0]
    whole, *classes = record["rows"]
    assert whole["share"]["low"] <= whole["expected"] <= whole["share"]["high"]
    assert [row["class"] for row in classes] == sorted(CLASSES)
    assert all(0.8 < row["ratio"] < 1.25 for row in record["rows"])
    assert record["regions"] == []
    assert record["empty_share"]["high"] < 0.1
    assert record["matched_share"] == pytest.approx(record["control_share"], abs=0.05)


def test_copies_of_one_class_leave_the_others_empty(drawn):
    found = succeed([drawn / "real.zip", drawn / "collapsed.zip"], PCA)
    record = found.record["mixtures"][0]
    whole = record["rows"][0]
    assert whole["share"]["high"] < whole["expected"]
    assert whole["ratio"] < 0.8
    counts = dict.fromkeys(CLASSES, 0)
    for region in record["regions"]:
        for one in region["classes"]:
            counts[one["class"]] += one["images"]
    assert counts["mel"] + counts["bkl"] > 8 * counts["nv"]
    assert len(record["regions"]) >= 3
    assert record["empty_share"]["low"] > record["control_share"]
    assert record["matched_share"] > record["control_share"] + 0.3
    assert len(found.pictures()) > len(record["regions"])  # several of each
    # The lists of nearest images find the originals of the copies, on whatever map.
    nearest = found.nearest()[180:, 0]
    originals = [row for row in range(180) if row % 6 < 2]
    assert np.mean(nearest == originals * 3) > 0.8


# Names


def write_named(path, rows, nasty, source):
    """Write images of two classes whose names, classes and lesions have a text in them; return the names."""
    files = {f"{row:03d}{nasty}.png": png(draw(row)) for row in rows}
    record = {"labels": [[name, index % 2] for index, name in enumerate(files)], "source": source,
              "classes": [f"a{nasty}", f"=b{nasty}"],
              "groups": {name: f"lesion{index}{nasty}" for index, name in enumerate(files)}}
    make_zip(path, {**files, "dataset.json": json.dumps(record).encode()})
    return list(files)


def map_of_named(folder, nasty):
    """Make all files of sets and a table in which every text is hostile; return what the page holds, and the names."""
    (folder / nasty).mkdir(parents=True)
    real, synthetic = folder / nasty / f"real{nasty[-5:]}.zip", folder / nasty / f"made{nasty[-5:]}.zip"
    names = write_named(real, range(50), nasty, OPEN)
    names += write_named(synthetic, range(60, 90), nasty, {**GENERATED, "network": f"net{nasty}"})
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["lesion_id", f"where{nasty}"],
                                    *([f"lesion{index}{nasty}", f"back{nasty}"] for index in range(50))])
    found = succeed([real, synthetic], PCA, f"--attributes={folder / 'table.csv'}", f"--table={folder / 'map.csv'}",
                    f"--tensorboard={folder / 'projector'}", f"--title=A map{nasty}", out=str(folder / "map.html"))
    return found, names


def test_hostile_names_are_shown_and_do_nothing(here):
    plain, _ = map_of_named(here / "plain", "plain")
    found, names = map_of_named(here / "hostile", NASTY)
    assert [tag for tag, _ in found.page.tags] == [tag for tag, _ in plain.page.tags]
    assert not any({"onerror", "onload"} & set(attributes) for _, attributes in found.page.tags)
    assert found.data["names"] == names
    assert set(found.column("class")) == {f"a{NASTY}", f"=b{NASTY}"}
    assert found.data["title"] == found.record["title"] == f"A map{NASTY}"
    assert [column["title"] for column in found.data["columns"]][-2] == f"where{NASTY}"
    sets = [f"real{NASTY[-5:]}", f"made{NASTY[-5:]}"]
    assert [one["name"] for one in found.data["sets"]] == [one["name"] for one in found.record["sets"]] == sets
    rows = rows_of("hostile/map.csv")
    assert [row["name"] for row in rows] == names
    assert [row["group"] for row in rows[:2]] == [f"lesion{index}{NASTY}" for index in range(2)]
    assert {row["class"] for row in rows} == {f"a{NASTY}", f"'=b{NASTY}"}  # which no spreadsheet computes
    assert {row["class"] for row in found.record["mixtures"][0]["rows"]} == {None, f"a{NASTY}", f"=b{NASTY}"}


# Columns, and other features than those of detectors


def test_real_sets_of_several_institutions_are_told_apart():
    found = succeed(["open.zip", "synthetic.zip"], PCA, "--real=more.zip")
    assert [(one["name"], one["kind"], one["start"], one["count"]) for one in found.data["sets"]] == [
        ("open", "real", 0, 120), ("more", "real", 120, 30), ("synthetic", "synthetic", 150, 60)]
    assert found.column("institution") == ["open"] * 120 + ["more"] * 30 + [""] * 60
    assert found.data["numReal"] == 150


def test_maps_of_a_subset_have_its_images_and_their_attributes():
    ages = {f"lesion{index}": 20 + index for index in range(60)}
    Path("table.csv").write_text("lesion_id,age\n" + "".join(f"{name},{age}\n" for name, age in ages.items()))
    found = succeed(["open.zip", "synthetic.zip"], PCA, "--max-images=50", "--seed=3", "--attributes=table.csv",
                    "--table=map.csv")
    assert [one["count"] for one in found.data["sets"]] == [50, 50]
    rows = rows_of("map.csv")
    whole = dict(zip(ImageSet("open.zip").names, ImageSet("open.zip").named_groups(), strict=True))
    assert [row["age"] for row in rows] == [str(ages[whole[row["name"]]]) for row in rows[:50]] + [""] * 50
    assert np.array_equal(found.column("age")[:50], [float(row["age"]) for row in rows[:50]])
    assert np.isnan(found.column("age")[50:]).all()
    assert found.record["settings"]["max_images"] == 50


@pytest.fixture(scope="module")
def spots(tmp_path_factory):
    """A folder with images with and without a spot, and a classifier that knows all of them."""
    folder = tmp_path_factory.mktemp("spots")
    images = spot_images(folder / "spots.zip", 60)
    make_spot_set(folder / "synthetic.zip", 40, seed=1)
    backbone = open_backbone("mobilenet_v3_small", weights="none", size=32, seed=2)
    with torch.no_grad():
        features = backbone(images.images.select().pixels(range(60))).numpy().astype(np.float64)
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-9
    weight = np.linalg.lstsq((features - mean) / std, np.where(images.labels, 3.0, -3.0), rcond=None)[0]
    head = Head(mean=mean, std=std, weight=np.stack([np.zeros_like(weight), weight]), bias=np.zeros(2), C=1.0,
                val_auc=1.0, has_converged=True)
    save_classifier(folder / "spots.safetensors", Classifier(backbone, head, LABELS),
                    {"thresholds": {"balanced": 0.5}, "positive": ["spot"]})
    return folder


def test_classifier_colors_the_map_and_gives_its_features(spots):
    files = [spots / "spots.zip", spots / "synthetic.zip"]
    classifier = spots / "spots.safetensors"
    found = succeed(files, PCA, f"--features={classifier}", f"--classifier={classifier}")
    assert found.data["space"] == found.record["settings"]["features"]["name"] == "spots.safetensors"
    assert found.column("predicted")[:60] == found.column("class")[:60] == ["rest", "spot"] * 30
    assert found.column("correct")[:60] == ["right"] * 60
    right = np.array(found.column("predicted")[60:]) == np.array(found.column("class")[60:])
    assert found.column("correct")[60:] == np.where(right, "right", "wrong").tolist()
    assert np.array_equal(found.column("probability-spot") >= 0.5, np.array(found.column("predicted")) == "spot")
    # Colors do not depend on what images are compared by.
    other = succeed(files, PCA, f"--classifier={classifier}")
    assert other.data["space"] == "random-conv"
    assert np.array_equal(other.column("probability-spot"), found.column("probability-spot"))
    assert not np.array_equal(other.places("pca"), found.places("pca"))


@pytest.fixture
def styled(here):
    """A network, projections with styles in two clusters, and images of it."""
    network = open_network(save_generator(here / "net.safetensors", {"classes": ["nv", "mel"]}), "cpu")
    random = np.random.default_rng(0)
    centers = np.repeat([-3.0, 3.0], 30)[:, None, None]
    w = np.repeat(random.normal(size=(60, 1, 8)) + centers, network.G.num_ws, axis=1).astype(np.float32)
    write_projections(here / "w.zip", w, network)
    write_generated(here / "made.zip", network)
    return network, w


def test_styles_are_mapped_and_projections_stand_for_real_images(styled):
    found = succeed(["w.zip", "made.zip"], PCA, "--features=w", "--network=net.safetensors")
    assert [(one["name"], one["kind"], one["pictures"]) for one in found.data["sets"]] == [
        ("w", "real", True), ("made", "synthetic", True)]
    x = found.places("pca")[:60, 0].astype(int)
    assert (max(x[:30]) < min(x[30:])) or (min(x[:30]) > max(x[30:]))
    assert found.data["space"] == found.record["settings"]["features"]["name"] == "w"
    assert "w has projections, which stand for the real images: photographs have no styles." in found.page.texts
    # Distances to the nearest real image are those of styles.
    w = styled[1][:, 0].astype(np.float64)
    apart = np.linalg.norm(w[:, None] - w[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    np.testing.assert_allclose(found.column("distance")[:60], apart.min(axis=1), rtol=1e-4)


# Mistakes


def refuse(capsys, *sets, flags=(PCA,), **options):
    """Return the one line of a mistake, without "error: "; nothing may be made or changed."""
    capsys.readouterr()
    before = contents(".")
    code = embed(sets, *flags, **options)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert contents(".") == before
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


FORMS = "inception-v3, vgg16, efficientnet-lite0, random-conv, timm:NAME"


@pytest.mark.parametrize(("files", "flags", "message"), [
    (["more.zip", "synthetic.zip"], [],
     "there are 30 real images; expected at least 50: name larger sets with --sets and --real"),
    (["synthetic.zip", "open.zip"], [],
     "--sets begins with synthetic.zip, which net.safetensors generated; expected the real images first"),
    (["open.zip", "synthetic.zip"], ["--real=other.zip"],
     "--real has other.zip, which net.safetensors generated; expected real images"),
    (["open.zip", "./open.zip"], [],
     "--sets has ./open.zip, which is already there as open.zip; expected each set once"),
    (["open.zip"], ["--out=map.htm"], "--out is map.htm; expected a name ending in .html"),
    (["open.zip"], ["--out=gone/map.html"],
     "--out is gone/map.html, but the folder gone does not exist; create it first"),
    (["open.zip"], ["--features=resnet"],
     f"--features is resnet; expected one of {FORMS}, w, or a .safetensors file of study.py classify"),
    (["open.zip"], ["--features=gone.safetensors"],
     "--features is gone.safetensors, which does not exist; expected a .safetensors file of study.py classify"),
    (["open.zip"], ["--classifier=gone.pth"],
     "--classifier is gone.pth, which does not exist; expected a .safetensors file of study.py classify"),
    (["open.zip", "synthetic.zip"], ["--features=w", "--network=net.safetensors"],
     "--sets has open.zip, which has no styles: it does not record that a network generated it; expected with "
     "--features=w sets of generate.py --zip, and projections for real images: project them with projector.py --data"),
    (["open.zip"], ["--maps=mds"], "--maps is mds; expected some of tsne, pca, umap, each once"),
    (["open.zip"], ["--tensorboard=projected"], "--tensorboard=projected holds other files (projections.zip); expected "
     "a new or empty folder, or one that this command wrote: choose another"),
    (["open.zip"], ["--attributes=gone.csv"], "gone.csv does not exist; expected a table, a CSV file"),
    (["open.zip", "gone.zip"], [], "gone.zip does not exist; expected a data set: a zip or a folder of images"),
])
def test_mistake_is_one_line_and_nothing_is_written(capsys, files, flags, message):
    assert refuse(capsys, *files, flags=(PCA, *flags)) == message


def test_sets_and_out_are_required(capsys):
    assert study("embed", "--out=map.html") == study("embed", "--sets=open.zip") == 2
    assert capsys.readouterr().err == (
        "error: --sets is missing; expected one, such as --sets=real.zip,synthetic.zip, or see --help\n"
        "error: --out is missing; expected one, such as --out=map.html, or see --help\n")


def test_folder_that_is_not_writable_is_refused_before_any_work(capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert refuse(capsys, "gone.zip") == (
        "--out is map.html, but the folder . is not writable; choose a writable folder")


def test_styles_of_other_networks_and_sizes_are_refused(styled, here, capsys):
    _, w = styled
    other = open_network(save_generator(here / "other.safetensors", {"classes": ["nv", "mel"]}, seed=1), "cpu")
    write_generated(here / "others.zip", other)
    flags = (PCA, "--features=w", "--network=net.safetensors")
    assert refuse(capsys, "w.zip", "others.zip", flags=flags) == (
        "others.zip is of other.safetensors, another network than --network, net.safetensors; expected sets of one "
        "network, whose styles alone can be compared")
    save_projected_w("latents.npz", w[..., :4], group=np.array([f"lesion{index}" for index in range(60)]))
    assert refuse(capsys, "w.zip", "made.zip", flags=flags) == (
        "the styles of the sets are of 1x8 and 1x4 numbers; expected those of one network")


def test_sets_of_other_sizes_and_colors_are_mapped_together():
    make_set("gray.zip", 5, size=32, channels=1, source=GENERATED)
    found = succeed(["open.zip", "gray.zip"], PCA)
    tiles = found.tiles()
    assert {tile.shape for tile in tiles.values()} == {(16, 16, 3)}
    assert color_of(tiles[0]) == GREEN
    assert np.ptp(tiles[120].mean(axis=(0, 1))) < 15 < np.ptp(tiles[0].mean(axis=(0, 1)))


@pytest.mark.parametrize("name", ["write_embedding_page", "write_table", "measure_mixture"])
def test_page_that_cannot_be_finished_leaves_the_one_of_before(here, monkeypatch, capsys, name):
    Path("map.html").write_text("of before")

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command, name, fail)
    assert embed(["open.zip", "synthetic.zip"], PCA, "--table=map.csv") == 2
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert Path("map.html").read_text() == "of before"
    assert not [path for path in here.iterdir() if path.name.startswith((".", "tmp"))]


def test_page_that_is_interrupted_within_t_sne_is_not_written(here, monkeypatch, capsys):
    make_layouts = command.make_layouts

    def interrupt(features, num_real, settings, *, on_step):
        def step(name, done, steps):
            on_step(name, done, steps)
            if name == "tsne" and done > steps // 3:
                os.kill(os.getpid(), signal.SIGINT)

        return make_layouts(features, num_real, settings, on_step=step)

    monkeypatch.setattr(command, "make_layouts", interrupt)
    before = contents(".")
    assert embed(["open.zip", "synthetic.zip"], "--table=map.csv", "--tensorboard=projector") == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: interrupted\n")
    assert contents(".") == before
