"""Columns of the points of a map: their keys, and what they hold for each kind of set."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.embedding_columns import identifies, make_columns, with_keys
from analysis.embedding_features import Predictions
from analysis.embedding_inputs import EmbedRequest, open_points
from analysis.embedding_points import Column
from analysis.protocol import Task
from dnnlib.cli import UserError
from tests.helpers.make_archives import make_folder
from tests.helpers.make_sets import make_set, png
from torch_utils.distributed import Processes

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))
CLASSES = ["nv", "mel"]
GENERATED = {"generated": True, "network": "net.safetensors"}
PROJECTIONS = {**GENERATED, "projected": True}
DISTANCES = "image,projection,class,group,network_class,detector,perceptual,pixel_l2,psnr,feature_cosine\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def columns_of(*paths, **options):
    """Return the columns of all images of some sets, by key."""
    asked = EmbedRequest(**{"sets": paths, "out": "map.html", "verbose": False, **options})
    return {column.key: column for column in make_columns(open_points(asked)[0], asked, ALONE)[0]}


def make_real(path, count=50, *, first=0, lesion="lesion{}", **changes):
    """Write a set of two images of each lesion, of alternating classes."""
    return make_set(path, images=range(first, first + count), **{
        "labels": [index % 2 for index in range(count)], "classes": CLASSES,
        "groups": [lesion.format(index // 2) for index in range(count)], **changes})


def make_projections(folder, count=4, **changes):
    """Write projections of the first images of `make_real`, with the table of their distances."""
    (folder / "run").mkdir(exist_ok=True)
    make_real(folder / "run/projections.zip", count, first=300, source=PROJECTIONS, **changes)
    (folder / "run/distances.csv").write_text(DISTANCES + "".join(
        f"00000/img{index:08d}.png,00000/img{index:08d}.png,nv,lesion{index // 2},nv,pixels,0.{index + 1},0,0,0\n"
        for index in range(count)))
    return "run/projections.zip"


# Keys


def test_keys_are_plain_and_different_whatever_the_headers():
    names = ["Age (years)", "age years", "<script>alert(1)</script>", "\U0001f600", "\u00c4ge", "", "a--b", "a b",
             "A.B"]
    found = with_keys([Column(key=name, title=name, values=["x"]) for name in names])
    assert [column.key for column in found] == [
        "age-years", "age-years-2", "script-alert-1-script", "column", "age", "column-2", "a-b", "a-b-2", "a-b-3"]
    assert [column.title for column in found] == names
    assert [column.key for column in with_keys(found)] == [column.key for column in found]
    assert all(re.fullmatch("[a-z0-9-]+", column.key) for column in found)


# Sets


def test_columns_of_sets_name_class_source_and_set(here):
    make_real("real.zip", labels=[0, None] * 25)
    make_set("synthetic.zip", images=range(100, 102), labels=[1, 1], classes=CLASSES, source=GENERATED)
    found = columns_of("real.zip", "synthetic.zip")
    assert list(found) == ["class", "source", "set"]
    assert found["class"].values == ["nv", ""] * 25 + ["mel", "mel"]
    assert found["source"].values == ["real"] * 50 + ["synthetic"] * 2
    assert found["set"].values == ["real"] * 50 + ["synthetic"] * 2


def test_column_of_classes_is_missing_without_labels(here):
    make_set("real.zip", 50)
    assert list(columns_of("real.zip")) == ["source", "set"]


def test_institutions_are_named_by_the_split_or_by_the_sets(here):
    make_real("a.zip", 50, source={"split": {"part": "val", "before": {"part": "institution2"}}})
    make_real("b.zip", 2, first=100, source={"split": {"part": "train"}})
    make_set("synthetic.zip", images=range(200, 202), source=GENERATED)
    found = columns_of("a.zip", "synthetic.zip", real=("b.zip",))
    assert found["institution"].values == ["institution2"] * 50 + ["b"] * 2 + [""] * 2
    assert columns_of("a.zip")["institution"].values == ["institution2"] * 50
    make_real("c.zip", 50)
    assert "institution" not in columns_of("c.zip")


# Projections


def test_projections_have_their_distances(here):
    make_real("real.zip")
    path = make_projections(here)
    column = columns_of("real.zip", path)["projection-distance"]
    assert np.isnan(column.values[:50]).all()
    assert column.values[50:].tolist() == [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("rows", [
    "", "a.png,00000/img00000000.png,,,,pixels,0.5,0,0,0\n",  # of fewer images
    "".join(f"a.png,{index}.png,,,,pixels,0.5,0,0,0\n" for index in range(4))])  # of others
def test_distances_of_other_projections_are_left_out(here, rows):
    make_real("real.zip")
    path = make_projections(here)
    (here / "run/distances.csv").write_text(DISTANCES + rows)
    assert "projection-distance" not in columns_of("real.zip", path)


# Attributes


SHOWN = {"redistribution": True}


def write_table(path, rows, header="lesion_id,age,localization,size mm"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_attributes_are_found_by_lesion_also_for_projections(here):
    make_real("real.zip")
    make_set("synthetic.zip", images=range(100, 102), groups=["lesion0", None], source=GENERATED)
    path = make_projections(here)
    table = write_table(here / "table.csv", ["lesion0,40,back,1.5", "lesion1,50,face,unknown", "lesion2,,back,3",
                                             "other,9,knee,9"])
    found = columns_of("real.zip", "synthetic.zip", path, attributes=table)
    age, place, size = found["age"], found["localization"], found["size-mm"]
    assert (age.title, place.title, size.title) == ("age", "localization", "size mm")
    assert age.values[:4].tolist() == age.values[-4:].tolist() == [40, 40, 50, 50]
    assert np.isnan(age.values[4:-4]).all()
    assert place.values[:8] == ["back", "back", "face", "face", "back", "back", "", ""]
    assert place.values[-6:] == ["", "", "back", "back", "face", "face"]
    assert size.values[[0, 4]].tolist() == [1.5, 3]
    assert np.isnan(size.values[2])
    assert (age.is_number, place.is_number) == (True, False)


def test_attributes_of_lesions_that_are_in_several_real_sets_are_ambiguous(here):
    make_real("a.zip", source=SHOWN)
    make_real("b.zip", 4, first=100, lesion="lesion1{}")  # lesion10 and lesion11 are in both
    table = write_table(here / "table.csv", [f"lesion{index},{index},x,1" for index in range(25)])
    values = columns_of("a.zip", real=("b.zip",), attributes=table)["age"].values
    assert np.isnan(values[20:24]).all()
    assert np.isnan(values[50:]).all()
    assert values[24:26].tolist() == [12, 12]


def test_attributes_are_found_by_file_names_also_for_projections(here):
    files = {f"ISIC_{index}.png": png(np.full((8, 8, 3), index)) for index in range(50)}
    make_folder(here / "photos", files)
    make_projections(here, groups=None)
    (here / "run/distances.csv").write_text(DISTANCES + "".join(
        f"ISIC_{index + 7}.png,00000/img{index:08d}.png,,,,pixels,0.5,0,0,0\n" for index in range(4)))
    table = write_table(here / "table.csv", [f"ISIC_{index},{index % 40}" for index in range(50)], "image,age")
    values = columns_of("photos", "run/projections.zip", attributes=table)["age"].values
    assert dict(zip(sorted(files), values[:50], strict=True)) == {
        f"ISIC_{index}.png": index % 40 for index in range(50)}
    assert values[50:].tolist() == [7, 8, 9, 10]


HEADER = "lesion_id,visit,patient_id,sex,age,diameter,site code"


def clinical_rows():
    """Rows of 25 lesions of 13 patients: visits are numbered, codes are texts of two lesions each, ages repeat."""
    return [f"lesion{index},{1000 + index},P{index // 2},{'mf'[index % 2]},{40 + index % 4},{index + 0.5},"
            f"code-{index}" for index in range(25)]


def notes_and_columns(*paths, attributes, **options):
    asked = EmbedRequest(sets=paths, out="map.html", verbose=False, attributes=attributes, **options)
    columns, notes = make_columns(open_points(asked)[0], asked, ALONE)
    return notes, {column.key: column for column in columns}


def test_attributes_that_tell_patients_apart_are_left_out_for_sets_without_pictures(here):
    make_real("hidden.zip")
    table = write_table(here / "table.csv", clinical_rows(), HEADER)
    notes, found = notes_and_columns("hidden.zip", attributes=table)
    assert {"sex", "age", "diameter"} <= found.keys()
    assert not {"visit", "patient-id", "site-code"} & found.keys()
    assert notes == ["table.csv: by lesion_id, found for 50 of 50 real images; not used: site code"] + [
        f"table.csv: {name} is left out for hidden, whose pictures are not shown, since it can tell patients or "
        "lesions apart" for name in ("visit", "patient_id")]


def test_attributes_that_tell_patients_apart_are_kept_for_sets_with_pictures(here):
    make_real("hidden.zip")
    make_real("shown.zip", 50, first=100, lesion="other{}", source=SHOWN)
    rows = [*clinical_rows(), *(row.replace("lesion", "other") for row in clinical_rows())]
    table = write_table(here / "table.csv", rows, HEADER)
    notes, found = notes_and_columns("shown.zip", attributes=table, real=("hidden.zip",))
    assert found["visit"].values[:2].tolist() == [1000, 1000]
    assert np.isnan(found["visit"].values[50:]).all()
    assert sum("left out for hidden," in note for note in notes) >= 1
    assert not any("left out for shown" in note for note in notes)


@pytest.mark.parametrize(("values", "groups", "expected"), [
    ([f"P{index // 3}" for index in range(30)], None, True),
    ([f"P{index // 6}" for index in range(60)], [f"lesion{index // 6}" for index in range(60)], True),
    ([f"site{index // 6}" for index in range(60)], [f"lesion{index // 3}" for index in range(60)], False),
    ([f"site{index // 3}" for index in range(12)], None, False),  # 4 values
    ([str(7000 + index) for index in range(30)], None, True),
    ([str(40 + index % 20) for index in range(60)], [f"lesion{index}" for index in range(60)], False),
    ([f"{index}.5" for index in range(60)], [f"lesion{index}" for index in range(60)], False),
    (["m", "f"] * 30, [f"lesion{index}" for index in range(60)], False),
    ([""] * 30, None, False)])
def test_ids_are_told_from_attributes(values, groups, expected):
    assert identifies(values, groups or [None] * len(values)) is expected


@pytest.mark.parametrize("name", ["class", "name", "group", "kind", "distance", "Source"])
def test_attribute_named_like_a_fact_of_ours_has_a_key_of_its_own(here, name):
    make_real("real.zip")
    table = write_table(here / "table.csv", [f"lesion{index},{'xy'[index % 2]}" for index in range(25)],
                        f"lesion_id,{name}")
    found = columns_of("real.zip", attributes=table)
    assert found[f"table-{name.lower()}"].title == name
    assert found[f"table-{name.lower()}"].values[:4] == ["x", "x", "y", "y"]


def test_table_that_fits_no_real_image_is_refused(here):
    make_real("real.zip")
    table = write_table(here / "table.csv", ["x,1,y,1"])
    with pytest.raises(UserError, match=r"^--attributes=.*table\.csv: no column names images or groups"):
        columns_of("real.zip", attributes=table)


# Classifiers


def with_predictions(monkeypatch, **fields):
    """Let c.safetensors predict this; every image has the same probabilities, unless they are given."""
    def predict(asked, points, processes):
        labels = fields["labels"]
        probabilities = np.tile(np.eye(len(labels))[0], (len(points), 1))
        given = {"probabilities": probabilities, "predicted": np.zeros(len(points), np.int64), **fields}
        task = Task(labels=given.pop("labels"), positive=given.pop("positive", ()))
        return Predictions(task=task, **given)

    Path("c.safetensors").write_bytes(b"")
    monkeypatch.setattr("analysis.embedding_columns.classifier_predictions", predict)


def test_columns_of_a_binary_classifier(here, monkeypatch):
    make_real("real.zip", labels=[0, 1, None, 1, *[0] * 46])
    make_set("unnamed.zip", images=range(100, 102), labels=[0, 1], source=GENERATED)
    probabilities = np.stack([1 - np.arange(52) / 100, np.arange(52) / 100], axis=1)
    with_predictions(monkeypatch, labels=("rest", "Melanoma?"), positive=("mel",), probabilities=probabilities,
                     predicted=np.array([0, 1, 1, 0, *[0] * 48]))
    found = columns_of("real.zip", "unnamed.zip", classifier="c.safetensors")
    assert list(found)[-3:] == ["probability-melanoma", "predicted", "correct"]
    assert found["probability-melanoma"].title == "probability of Melanoma?"
    assert np.array_equal(found["probability-melanoma"].values, probabilities[:, 1])
    assert found["predicted"].values[:4] == ["rest", "Melanoma?", "Melanoma?", "rest"]
    assert found["correct"].values[:5] == ["right", "right", "", "wrong", "right"]
    assert found["correct"].values[50:] == ["", ""]  # numbers of classes tell nothing


def test_columns_of_a_classifier_of_many_labels(here, monkeypatch):
    make_real("real.zip", classes=["label0", "else"])
    with_predictions(monkeypatch, labels=tuple(f"label{number}" for number in range(12)))
    found = columns_of("real.zip", classifier="c.safetensors")
    assert [key for key in found if key.startswith("probability")] == [f"probability-label{each}" for each in range(10)]
    assert found["correct"].values == ["right", ""] * 25


def test_column_of_correctness_is_missing_where_no_class_is_known(here, monkeypatch):
    make_real("real.zip")
    with_predictions(monkeypatch, labels=("a", "b", "c"))
    assert "correct" not in columns_of("real.zip", classifier="c.safetensors")
