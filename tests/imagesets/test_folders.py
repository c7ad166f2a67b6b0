"""imagesets.folders and sources: folders and zips of images, and what the names of folders mean."""

import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest

from dnnlib.cli import UserError
from imagesets.folders import labels_of_folders, parts_among, refuse_doubtful_folders
from imagesets.pixel_formats import BadImage
from imagesets.reader import ImageSet
from imagesets.sources import open_source
from tests.helpers.make_archives import encode, make_folder, make_zip, noise
from tests.helpers.make_sets import enclose

FILES = {f"{folder}/{name}": encode(noise(number, 4, 4, 3))
         for number, (folder, name) in enumerate([("mel", "b.png"), ("mel", "deep/a.png"), ("nv", "c.jpg.png")])}


def load_all(source, wanted=None):
    wanted = np.ones(len(source), dtype=bool) if wanted is None else np.array(wanted)
    load = pickle.loads(pickle.dumps(source.load))
    return [load(item) for item in source.items(wanted)]


def open_as(kind, tmp_path, files):
    if kind == "folder":
        return open_source(make_folder(tmp_path / "set", files))
    return open_source(make_zip(tmp_path / "set.zip", files, getattr(zipfile, kind)))


@pytest.mark.parametrize("kind", ["folder", "ZIP_STORED", "ZIP_DEFLATED"])
def test_images_in_sub_folders_take_the_folders_as_classes(kind, tmp_path):
    source = open_as(kind, tmp_path, FILES | {"notes.txt": b"hello", "truth.csv": b"a,b"})
    assert list(source.names) == ["mel/b.png", "mel/deep/a.png", "nv/c.jpg.png"]
    assert source.classes == ["mel", "nv"]
    assert source.labels.tolist() == [0, 0, 1]
    assert sorted(source.ignored) == ["notes.txt", "truth.csv"]
    assert source.hints == ["truth.csv is among the images; to use it as the table of labels, give --labels=FILE"]
    assert load_all(source) == [FILES[name] for name in source.names]
    assert load_all(source, [False, True, False]) == [FILES["mel/deep/a.png"]]


@pytest.mark.parametrize(("names", "labels", "classes"), [
    (["a.png", "b.png"], None, None),
    (["images/a.png", "images/b.png"], None, None),
    (["set/x/mel/a.png", "set/x/nv/2019/b.png"], [0, 1], ["mel", "nv"]),
    (["a.png", "nv/b.png"], [-1, 0], ["nv"]),
    (["set/a.png", "set/nv/b.png"], [-1, 0], ["nv"]),
    (["nv/p1/a.png", "nv/p2/b.png"], [0, 1], ["p1", "p2"]),
    (["00000/img00000000.png", "00001/img00001000.png"], None, None),
    (["set/00000/img00000000.png", "set/00001/img00001000.png"], None, None),
    (["10/a.png", "9/b.png"], [1, 0], ["9", "10"]),
    (["0/a", "1/a", "10/a", "11/a", "2/a"], [0, 1, 3, 4, 2], ["0", "1", "2", "10", "11"]),
    (["0/a", "10/a", "2/a", "x/a"], [0, 1, 2, 3], ["0", "10", "2", "x"]),
])
def test_labels_of_folders_take_the_first_folder_that_differs(names, labels, classes):
    found, found_classes = labels_of_folders(names)
    assert (None if found is None else found.tolist(), found_classes) == (labels, classes)


@pytest.mark.parametrize("kind", ["folder", "ZIP_STORED"])
def test_a_ready_data_set_keeps_labels_classes_groups_and_origin(kind, tmp_path):
    metadata = {"labels": [["mel/b.png", 1], ["mel/deep/a.png", None], ["nv/c.jpg.png", 0]], "classes": ["x", "y"],
                "groups": {"mel/b.png": "p1"}, "source": {"phantom": True}}
    source = open_as(kind, tmp_path, FILES | {"dataset.json": json.dumps(metadata).encode()})
    assert source.labels.tolist() == [1, -1, 0]
    assert source.classes == ["x", "y"]
    assert source.groups == ["p1", None, None]
    assert source.origin == {"phantom": True}
    assert not source.ignored
    assert source.kind.endswith("with dataset.json")


def test_dataset_json_without_labels_means_no_labels(tmp_path):
    source = open_source(make_folder(tmp_path / "set", FILES | {"dataset.json": b'{"labels": null}'}))
    assert source.labels is None
    assert source.classes is None


@pytest.mark.parametrize("name", ["set.zip", "set"])
def test_dataset_json_of_other_programs_is_read_as_it_is_meant(tmp_path, name):
    metadata = {"labels": [["mel\\a.png", 1.0], ["./nv/b.png", 0], [".\\nv\\c.png", -0.0], ["nv//d.png", float("nan")]],
                "classes": ["nv", "mel"], "groups": {"mel\\a.png": "L1", "./nv/b.png": "L1"},
                "pixel_hashes": {"nv\\c.png": ["0" * 32, 3, 5]}}
    files = {f"{name}.png": FILES["mel/b.png"] for name in ("mel/a", "nv/b", "nv/c", "nv/d", "nv/e")} | {
        "dataset.json": json.dumps(metadata).encode()}
    path = make_zip(tmp_path / name, files) if name == "set.zip" else make_folder(tmp_path / name, files)
    for images in (ImageSet(path), ImageSet(enclose(path, tmp_path / f"in-{name}"))):
        assert images.labels.tolist() == [1, 0, 0, -1, -1]
        assert images.groups == ["L1", "L1", "nv/c.png", "nv/d.png", "nv/e.png"]
        assert images.recorded_hash("nv/c.png", 3, 5) == "0" * 32
        assert (images.missing_labels().sum(), images.num_unnamed) == (2, 1)
    assert (open_source(path).labels.tolist(), open_source(path).classes) == ([1, 0, 0, -1, -1], ["nv", "mel"])


def test_dataset_json_name_with_a_backslash_is_first_that_of_a_file(tmp_path):
    metadata = {"labels": [["a\\b.png", 1], ["a/b.png", 0]]}
    files = {"a\\b.png": FILES["mel/b.png"], "a/b.png": FILES["nv/c.jpg.png"]}
    images = ImageSet(make_folder(tmp_path / "set", files | {"dataset.json": json.dumps(metadata).encode()}))
    assert dict(zip(images.names, images.labels.tolist())) == {"a/b.png": 0, "a\\b.png": 1}


def test_hidden_files_and_mac_leftovers_are_ignored_and_named(tmp_path):
    files = FILES | {"__MACOSX/mel/b.png": b"x", ".cache/a.png": b"x"}
    source = open_source(make_zip(tmp_path / "set.zip", files))
    assert len(source) == 3
    assert source.classes == ["mel", "nv"]
    assert sorted(source.ignored) == [".cache/a.png", "__MACOSX/mel/b.png"]


def test_loaders_read_no_more_than_the_limit(tmp_path):
    files = {"a.png": encode(noise(0, 60, 60, 3))}
    for kind in ("folder", "ZIP_STORED", "ZIP_DEFLATED"):
        source = open_as(kind, tmp_path, files)
        (item,) = source.items(np.array([True]))
        start = source.load(item, 100)
        assert files["a.png"].startswith(start)
        assert 50 < len(start) <= 100  # deflated noise is a little longer than the noise
        assert source.load(item, 1 << 20) == files["a.png"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_zip_member_is_a_bad_image(compression, tmp_path):
    path = make_zip(tmp_path / "set.zip", {"a.png": encode(noise(0, 30, 30, 3)), "b.png": b"1234"}, compression)
    data = bytearray(path.read_bytes())
    data[500:520] = bytes(20)
    path.write_bytes(data)
    source = open_source(path)
    first, second = source.items(np.array([True, True]))
    with pytest.raises(BadImage, match=r"^damaged in the zip$"):
        source.load(first)
    assert source.load(second) == b"1234"


@pytest.mark.parametrize(("compression", "flags", "reason"), [
    (zipfile.ZIP_BZIP2, 0, "unknown compression in the zip"), (zipfile.ZIP_STORED, 1, "encrypted in the zip")])
def test_zip_members_that_cannot_be_unpacked_are_bad_images(compression, flags, reason, tmp_path):
    path = make_zip(tmp_path / "set.zip", {"a.png": b"1234"}, compression)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= flags
    path.write_bytes(data)
    with pytest.raises(BadImage, match=f"^{reason}$"):
        load_all(open_source(path))


def test_files_that_are_none_are_bad_images(tmp_path):
    folder = make_folder(tmp_path / "set", {"a.png": b"1234"})
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    source = open_source(folder)
    reasons = {}
    for name, item in zip(source.names, source.items(np.ones(3, dtype=bool))):
        try:
            source.load(item)
        except BadImage as error:
            reasons[name] = str(error)
    assert reasons == {"gone.png": "cannot be opened", "pipe.png": "not a file"}


def test_a_zip_with_a_name_twice_raises(tmp_path):
    with pytest.warns(UserWarning, match=r"Duplicate name"):
        path = make_zip(tmp_path / "set.zip", [("a.png", b"1"), ("a.png", b"2")])
    with pytest.raises(UserError, match=r"holds a\.png more than once \(1 such names\)"):
        open_source(path)


@pytest.mark.parametrize(("files", "message"), [
    ({"train/a.png": b"1", "Test/b.png": b"2"},
     "set: the folders Test, train look like parts of a data set, not like classes; give labels with --labels=FILE, or "
     "each of them as --source, or --folders=classes if they are classes, or --folders=ignore for images without "
     "labels"),
    ({"HAM10000_images_part_1/a.png": b"1", "HAM10000_images_part_2/b.png": b"2", "HAM10000_metadata.csv": b"a,b"},
     "set: the folders HAM10000_images_part_1, HAM10000_images_part_2 look like parts of a data set, not like classes; "
     "give labels with --labels=FILE (HAM10000_metadata.csv is there), or each of them as --source, or "
     "--folders=classes if they are classes, or --folders=ignore for images without labels"),
    ({f"{folder}/a.png": b"1" for folder in ("HAM_images_part_1", "HAM_images_part_2", "HAM_segmentations", "Test")},
     "set: the folders HAM_images_part_1, HAM_images_part_2 look like parts of a data set, not like classes; give "
     "labels with --labels=FILE, or each of them as --source, or --folders=classes if they are classes, or "
     "--folders=ignore for images without labels"),
    ({"set/x/a.png": b"1", "b.png": b"2", "set/dataset.json": b"{}"},
     "{path}: dataset.json is in a subfolder (set/dataset.json), but images are outside of it (b.png); expected it at "
     "the top: give that subfolder, or zip its content without the subfolder")])
def test_doubtful_folders_raise(files, message, tmp_path):
    source = open_source(make_folder(tmp_path / "set", files))
    with pytest.raises(UserError, match=f"^{re.escape(message.format(path=tmp_path / 'set'))}$"):
        refuse_doubtful_folders(source)


@pytest.mark.parametrize("names", [
    "train test", "Training valid", "images masks", "images_001 images_002 images_012", "data1 data2", "fold-1 fold-2",
    "ISIC_2019_Training_Input ISIC_2019_Test_Input", "patient_1 patient_23", "train_images test_images", "images test",
    "TrainImages TestImages", "trainset testset",
    "HAM10000_images_part_1 HAM10000_images_part_2 ham10000_images_part_1 ham10000_images_part_2"])
def test_folders_that_divide_a_set_are_parts(names):
    assert parts_among(names.split()) == names.split()


@pytest.mark.parametrize("names", [
    "0 1", "mel nv", "stage_1 stage_2", "class1 class2", "grade 1,grade 2", "label_0 label_1", "images_mel images_nv",
    "test_positive test_negative", "train mel", "lesion skin", "ISIC2018 ISIC2019", "type-2 type-4", "train",
    "stageA stageB"])
def test_folders_that_may_be_classes_are_no_parts(names):
    assert not parts_among(names.split("," if "," in names else None))


@pytest.mark.parametrize("kind", ["folder", "ZIP_STORED"])
def test_a_ready_data_set_in_a_folder_inside_is_taken_as_it_is(kind, tmp_path):
    metadata = {"labels": [["mel/b.png", 1], ["mel/deep/a.png", 1], ["nv/c.jpg.png", 0]], "groups": {"mel/b.png": "p1"}}
    files = FILES | {"dataset.json": json.dumps(metadata).encode()}
    source = open_as(kind, tmp_path, {f"set/{name}": data for name, data in files.items()})
    assert source.names == sorted(FILES)
    assert (source.labels.tolist(), source.groups) == ([1, 1, 0], ["p1", None, None])
    assert load_all(source) == [FILES[name] for name in source.names]


EXPECTED = ("expected a folder or a zip of images, a MedMNIST .npz, the CIFAR-10 python archive (.tar.gz), or MNIST "
            "images (-images-idx3-ubyte.gz)")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("gone", None, "--source={path} does not exist; " + EXPECTED),
    ("empty.zip", b"", "--source={path} is empty (0 bytes); " + EXPECTED),
    ("notes.txt", b"hello", "--source={path} is of an unknown kind; " + EXPECTED),
    ("a.png", encode(noise(0, 4, 4, 3)), "--source={path} is of an unknown kind; " + EXPECTED),
    ("cut.zip", b"PK\x03\x04....", "{path} cannot be read as a zip (File is not a zip file): it is truncated or not a "
                                   "zip; make or copy it again"),
    ("names.zip", {"notes.txt": b"1"}, "{path} holds no images; expected files such as .png or .jpg"),
    ("folder", "folder", "{path} holds no images; expected files such as .png or .jpg")])
def test_sources_that_are_none_raise(name, content, message, tmp_path):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, dict):
        make_zip(path, content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(message.format(path=path))}$"):
        open_source(path)


def test_a_device_is_no_source():
    with pytest.raises(UserError, match=r"^--source=/dev/null is neither a file nor a folder; expected a folder or a"):
        open_source("/dev/null")


def test_a_split_of_a_folder_raises(tmp_path):
    folder = make_folder(tmp_path / "set", FILES)
    with pytest.raises(UserError, match=r"^--split=val: set \(image folder\) has no splits; only MedMNIST and CIFAR-10 "
                                        r"do: leave the option out$"):
        open_source(folder, split="val")
    with pytest.raises(UserError, match=r"^--split=dev; expected one of train, val, test, all$"):
        open_source(folder, split="dev")
