"""The options of study.py embed, and the sets that they name: kinds, names, classes, groups, permissions, refusals."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.embedding_inputs import EmbedRequest, open_points
from analysis.embedding_points import PROJECTED, REAL, SYNTHETIC
from dnnlib.cli import UserError
from tests.helpers.make_sets import make_set

NETWORK = {"network": "net.safetensors", "network_sha256": "ab" * 32}
GENERATED = {"generated": True, **NETWORK, "seeds": [0, 5], "truncation": 1.0}
PROJECTIONS = {"generated": True, "projected": True, **NETWORK, "seed": 0}
YES = {"redistribution": True}
UNKNOWN = ("its dataset.json does not record that they may be redistributed; if they may, convert the set with "
           "dataset_tool.py --redistribution=yes")
NEAR = ", which are as near as possible to real images,"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Files are named as they are in the folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with real, synthetic and projected sets, which tests only read."""
    folder = tmp_path_factory.mktemp("sets")
    labels, classes = [index % 2 for index in range(60)], ["nv", "mel"]
    groups = [f"lesion{index // 2}" for index in range(60)]
    make_set(folder / "real.zip", 60, labels=labels, classes=classes, groups=groups)
    make_set(folder / "open.zip", 60, labels=labels, classes=classes, groups=groups, source=YES)
    make_set(folder / "phantom.zip", 60, labels=labels, classes=classes, groups=groups, source={"phantom": True})
    make_set(folder / "synthetic.zip", images=range(100, 106), labels=[0, 1] * 3, classes=classes, source=GENERATED)
    make_set(folder / "unknown.zip", images=range(200, 204))
    (folder / "run").mkdir()
    make_set(folder / "run" / "projections.zip", images=range(300, 304), labels=[0, 1, 0, 1], classes=classes,
             groups=groups[:4], source=PROJECTIONS)
    return folder


def request(*paths, **options):
    return EmbedRequest(**{"sets": tuple(map(str, paths)), "out": "map.html", **options})


def refuse(*paths, **options):
    """Return the message of a mistake, one line."""
    with pytest.raises(UserError) as caught:
        open_points(request(*paths, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Options


FORMS = "inception-v3, vgg16, efficientnet-lite0, random-conv, timm:NAME"


@pytest.mark.parametrize(("changes", "message"), [
    ({"sets": None}, "--sets is missing; expected one, such as --sets=real.zip,synthetic.zip, or see --help"),
    ({"out": None}, "--out is missing; expected one, such as --out=map.html, or see --help"),
    ({"out": "map.htm"}, "--out is map.htm; expected a name ending in .html"),
    ({"out": "gone/map.html"}, "--out is gone/map.html, but the folder gone does not exist; create it first"),
    ({"table": "map.txt"}, "--table is map.txt; expected a name ending in .csv"),
    ({"tensorboard": "file"},
     "--tensorboard is file, but {here}/file is not a folder; choose a new or existing folder"),
    ({"sets": ("a.zip", "b.zip", "a.zip")}, "--sets has a.zip, which is already there; expected each set once"),
    ({"sets": ("a.zip",), "real": ("./a.zip",)},
     "--real has ./a.zip, which is already there as a.zip; expected each set once"),
    ({"ci": 1.0}, "--ci is 1; expected a number between 0 and 1"),
    ({"seed": -1}, "--seed is -1; expected a number from 0 to 4294967295"),
    ({"perplexity": 1.0}, "--perplexity is 1; expected a number above 1, such as 30"),
    ({"perplexity": float("nan")}, "--perplexity is nan; expected a number above 1, such as 30"),
    ({"neighbors": 0}, "--neighbors is 0; expected a number from 1 to 100"),
    ({"thumbnail": 300}, "--thumbnail is 300; expected a number from 16 to 256"),
    ({"max_images": 49}, "--max-images is 49; expected at least 50"),
    ({"workers": 0}, "--workers is 0; expected at least 1"),
    ({"features": "resnet"}, f"--features is resnet; expected one of {FORMS}, w, or a .safetensors file of study.py "
                             "classify"),
    ({"network": "net.safetensors"}, "--network is given, but only works with --features=w; leave --network out"),
    ({"features": "w", "weights": "x.pth"}, "--weights is given, but --features=w uses none; leave --weights out"),
    ({"maps": "tsne,mds"}, "--maps is tsne,mds; expected some of tsne, pca, umap, each once"),
    ({"maps": ""}, "--maps is empty; expected some of tsne, pca, umap, each once"),
    ({"maps": "pca,pca"}, "--maps is pca,pca; expected some of tsne, pca, umap, each once"),
])
def test_request_refuses_mistakes_in_one_line(here, changes, message):
    (here / "file").write_text("")
    with pytest.raises(UserError) as caught:
        request("a.zip", **changes)
    assert str(caught.value) == message.format(here=here)


def test_request_refuses_a_folder_that_is_not_writable(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError) as caught:
        request("a.zip")
    assert str(caught.value) == "--out is map.html, but the folder . is not writable; choose a writable folder"


def test_request_makes_the_maps_whose_packages_are_installed(monkeypatch):
    monkeypatch.setattr("analysis.embedding_inputs.find_spec", lambda module: None if module == "umap" else module)
    assert request("a.zip").map_names == ["tsne", "pca"]
    assert request("a.zip", maps="pca, tsne").map_names == ["pca", "tsne"]
    with pytest.raises(UserError) as caught:
        request("a.zip", maps="umap")
    assert str(caught.value) == ("--maps has umap, which needs the package umap-learn, which is not installed: pip "
                                 "install umap-learn")
    monkeypatch.setattr("analysis.embedding_inputs.find_spec", lambda module: None)
    with pytest.raises(UserError) as caught:
        request("a.zip")
    assert str(caught.value) == ("no map can be made: none of the packages is installed that make them; expected one: "
                                 "pip install openTSNE threadpoolctl umap-learn")


def test_table_that_would_replace_an_input_is_refused(here, sets):
    Path("a.csv").write_text("image,age\n")
    message = "--table is {}, which is also --attributes; choose another name"
    assert refuse(sets / "real.zip", table="a.csv", attributes="a.csv") == message.format("a.csv")
    assert refuse(sets / "real.zip", table="./a.csv", attributes="a.csv") == message.format("./a.csv")


@pytest.mark.parametrize("content", ['{"precious": 1}', "[]", "no JSON", None])
def test_page_whose_numbers_would_replace_another_file_is_refused(here, sets, content):
    if content is None:
        Path("map.json").mkdir()
    else:
        Path("map.json").write_text(content)
    assert refuse(sets / "real.zip") == (
        "--out is map.html, whose numbers are written to map.json, where there is something else; choose another name")
    if content is not None:
        assert Path("map.json").read_text() == content


def test_numbers_of_an_earlier_page_are_replaced(here, sets):
    Path("map.json").write_text(json.dumps({"format": "lesion-embedding"}))
    assert len(open_points(request(sets / "real.zip"))[0]) == 60


# Sets


def test_sets_have_their_kinds_and_the_real_ones_come_first(sets):
    points, notes = open_points(request(sets / "open.zip", sets / "synthetic.zip", sets / "run/projections.zip",
                                        real=(str(sets / "phantom.zip"),)))
    assert [(one.name, one.kind, len(one)) for one in points.sets] == [
        ("open", REAL, 60), ("phantom", REAL, 60), ("synthetic", SYNTHETIC, 6), ("projections", PROJECTED, 4)]
    assert (len(points), points.num_real) == (130, 120)
    assert notes == [f"pictures of projections{NEAR} are not shown: {UNKNOWN}", "60 images of phantom are also in open"]


def test_points_have_classes_and_groups_of_their_images(sets):
    points, _ = open_points(request(sets / "open.zip", sets / "synthetic.zip", sets / "run/projections.zip"))
    real, synthetic, projected = points.sets
    assert list(real.classes[:4]) == ["nv", "mel", "nv", "mel"]
    assert list(real.groups[:3]) == ["lesion0", "lesion0", "lesion1"]
    assert list(synthetic.groups) == [None] * 6
    assert list(projected.groups) == ["lesion0", "lesion0", "lesion1", "lesion1"]
    assert points.groups[60 + 6:].tolist() == points.groups[:4].tolist()  # projections share the groups of originals
    assert len(set(points.groups[60:66].tolist())) == 6


def test_subset_is_chosen_by_the_seed_and_keeps_everything_together(sets):
    whole, _ = open_points(request(sets / "open.zip"))
    of_name = dict(zip(whole.names, zip(whole.classes, whole.sets[0].groups, strict=True), strict=True))
    found = [open_points(request(sets / "open.zip", max_images=50, seed=seed))[0] for seed in (0, 0, 1)]
    assert [len(points) for points in found] == [50, 50, 50]
    assert found[0].names == found[1].names == sorted(found[0].names)
    assert found[0].names != found[2].names
    one = found[0].sets[0]
    assert [of_name[name] for name in one.names] == list(zip(one.classes, one.groups, strict=True))
    rows = [whole.names.index(name) for name in one.names]
    assert np.array_equal(one.images.pixels(range(3)), whole.sets[0].images.pixels(range(60))[rows[:3]])


def test_names_have_folders_only_where_they_are_equal(sets, here):
    for folder in ("one/run", "two/run"):
        (here / folder).mkdir(parents=True)
        make_set(here / folder / "projections.zip", 2, source=PROJECTIONS)
    make_set(here / "open", 2, source=GENERATED)
    points, _ = open_points(request(sets / "open.zip", "one/run/projections.zip", "two/run/projections.zip", "open"))
    assert [one.name for one in points.sets] == [
        "open.zip", "one/run/projections.zip", "two/run/projections.zip", "open"]


def test_title_is_made_of_the_names(sets):
    asked = request(sets / "open.zip", sets / "synthetic.zip")
    points, _ = open_points(asked)
    assert asked.shown_title(points) == "Map of open, synthetic"
    assert replace(asked, title="Lesions").shown_title(points) == "Lesions"


def test_equal_images_are_counted_among_those_in_use(here):
    make_set("many.zip", images=range(200), source=YES)
    make_set("few.zip", images=range(150, 210), source=GENERATED)
    assert open_points(request("many.zip", "few.zip"))[1] == ["50 images of few are also in many"]
    points, notes = open_points(request("many.zip", "few.zip", max_images=50))
    first, second = ({one.images.images._set.read(name) for name in one.names} for one in points.sets)
    count = len(first & second)
    assert 0 < count < 50
    assert notes == [f"{count} images of few are also in many"]


def test_classes_are_missing_without_labels_and_for_vectors(here, sets):
    make_set("some.zip", 50, labels=[0, None] * 25, classes=["nv", "mel"])
    make_set("vectors.zip", 2, labels=[[0.5, 1.0]] * 2, source=GENERATED)
    make_set("numbers.zip", 2, labels=[0, 1], source=GENERATED)
    points, notes = open_points(request("some.zip", "vectors.zip", "numbers.zip", no_real_images=True))
    assert points.classes == ["nv", ""] * 25 + ["", "", "0", "1"]
    assert notes == [
        "pictures of some are not shown: --no-real-images is given",
        "vectors has lists of numbers as labels; its images are shown without a class",
        "numbers does not name its classes, which are shown by number; other sets name theirs",
        "2 images of vectors are also in some", "2 images of numbers are also in some"]


@pytest.mark.parametrize(("name", "no_real_images", "reason"), [
    ("real", False, f"pictures of real are not shown: {UNKNOWN}"), ("open", False, ""), ("phantom", False, ""),
    ("open", True, "pictures of open are not shown: --no-real-images is given"),
    ("phantom", True, "pictures of phantom are not shown: --no-real-images is given")])
def test_pictures_of_real_images_are_shown_where_they_may_be_redistributed(sets, name, no_real_images, reason):
    points, notes = open_points(request(sets / f"{name}.zip", sets / "synthetic.zip", no_real_images=no_real_images))
    assert [(one.shows_pictures, one.why_not) for one in points.sets] == [(not reason, reason), (True, "")]
    assert notes == ([reason] if reason else [])


@pytest.mark.parametrize(("source", "no_real_images", "reason"), [
    (GENERATED, True, ""), ({"tool": "dataset_tool.py", "origin": GENERATED}, True, ""),
    ({**GENERATED, "redistribution": False}, False,
     "pictures of x are not shown: its dataset.json records that they may not be redistributed"),
    (PROJECTIONS, False, f"pictures of x{NEAR} are not shown: {UNKNOWN}"),
    ({**PROJECTIONS, "phantom": True}, False, f"pictures of x{NEAR} are not shown: {UNKNOWN}"),
    ({**PROJECTIONS, **YES}, False, ""),
    ({**PROJECTIONS, **YES}, True, f"pictures of x{NEAR} are not shown: --no-real-images is given"),
    ({}, False, f"pictures of x are not shown: {UNKNOWN}"), (YES, False, ""),
    (YES, True, "pictures of x are not shown: --no-real-images is given"),
    ({"sources": [{"name": "a"}, {"name": "b"}], "origin": {"sources": {"a": GENERATED, "b": PROJECTIONS}}}, False,
     f"pictures of x{NEAR} are not shown: {UNKNOWN}")])
def test_pictures_of_other_sets_are_shown_if_a_network_made_them_up(sets, source, no_real_images, reason):
    make_set("x.zip", images=range(400, 402), source=source)
    points, notes = open_points(request(sets / "open.zip", "x.zip", no_real_images=no_real_images))
    assert (points.sets[1].shows_pictures, points.sets[1].why_not) == (not reason, reason)
    assert reason in ["", *notes]


def test_set_of_unknown_origin_is_shown_as_synthetic_with_a_note(sets):
    points, notes = open_points(request(sets / "open.zip", sets / "unknown.zip"))
    assert points.sets[1].kind == SYNTHETIC
    assert notes == ["unknown does not record that a network generated its images; they are shown as "
                     "synthetic ones; name sets of real images with --real",
                     f"pictures of unknown are not shown: {UNKNOWN}"]


def test_sets_of_other_sizes_and_colors_are_accepted(sets):
    make_set("gray.zip", 2, size=16, channels=1, source=GENERATED)
    points, _ = open_points(request(sets / "open.zip", "gray.zip"))
    assert [one.images.images.shape for one in points.sets] == [(3, 8, 8), (1, 16, 16)]


def test_set_that_begins_and_is_generated_is_refused(sets):
    path = sets / "synthetic.zip"
    assert refuse(path, sets / "open.zip") == (
        f"--sets begins with {path}, which net.safetensors generated; expected the real images first")
    assert refuse(sets / "open.zip", real=(str(path),)) == (
        f"--real has {path}, which net.safetensors generated; expected real images")
    assert refuse(sets / "run/projections.zip").startswith("--sets begins with ")


def test_fewer_than_50_real_images_are_refused(sets):
    make_set("a.zip", images=range(500, 530), source=YES)
    make_set("b.zip", images=range(600, 619), source=YES)
    assert refuse("a.zip", sets / "synthetic.zip", real=("b.zip",)) == (
        "there are 49 real images; expected at least 50: name larger sets with --sets and --real")
    make_set("b.zip", images=range(600, 620), source=YES)
    assert open_points(request("a.zip", real=("b.zip",)))[0].num_real == 50


def test_missing_and_damaged_sets_are_refused(sets, here):
    assert refuse("gone.zip") == "gone.zip does not exist; expected a data set: a zip or a folder of images"
    (here / "bad.zip").write_bytes(b"PK")
    assert refuse(sets / "open.zip", "bad.zip").startswith("bad.zip cannot be read as a zip (")


# Styles in place of features


@pytest.fixture
def styled(here):
    """Projections of 50 real images, and images of the same network."""
    make_set("projections.zip", 50, source={**PROJECTIONS, **YES})
    make_set("synthetic.zip", images=range(100, 106), source=GENERATED)


def test_projections_stand_for_real_images_in_the_space_of_styles(styled):
    make_set("more.zip", images=range(200, 203), source={**PROJECTIONS, **YES})
    points, notes = open_points(request("projections.zip", "synthetic.zip", "more.zip", features="w",
                                        network="net.safetensors"))
    assert [one.kind for one in points.sets] == [REAL, SYNTHETIC, PROJECTED]
    assert notes == ["projections has projections, which stand for the real images: photographs have no styles"]


NO_STYLES = ("which has no styles: it does not record that a network generated it; expected with --features=w sets of "
             "generate.py --zip, and projections for real images: project them with projector.py --data")


def test_sets_without_styles_are_refused(styled, sets):
    real = sets / "real.zip"
    assert refuse(real, "synthetic.zip", features="w") == f"--sets has {real}, {NO_STYLES}"
    assert refuse("projections.zip", real=(str(real),), features="w") == f"--real has {real}, {NO_STYLES}"
    assert refuse("projections.zip", "synthetic.zip", features="w") == (
        "--network is missing; expected with --features=w the network that made the images of synthetic.zip: "
        "net.safetensors")
    assert refuse("synthetic.zip", features="w", network="net.safetensors") == (
        "--sets begins with synthetic.zip, which net.safetensors generated; expected projections of real images "
        "(projector.py --data), which stand for them")


@pytest.mark.parametrize("source", [{"tool": "dataset_tool.py", "origin": GENERATED},
                                    {**GENERATED, "split": {"part": "train"}}])
def test_changed_sets_are_refused_as_their_styles_are_lost(styled, source):
    make_set("changed.zip", images=range(100, 106), source=source)
    assert refuse("projections.zip", "changed.zip", features="w", network="net.safetensors") == (
        "--sets has changed.zip, which dataset_tool.py has changed, so that it is not known which style belongs to "
        "which image; expected with --features=w the file that generate.py or projector.py wrote")
