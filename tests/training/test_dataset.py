"""training.dataset: reading data sets, and its error messages."""

import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from imagesets.reader import ImageSet
from tests.helpers.make_archives import make_zip
from tests.helpers.make_sets import enclose, make_set, pixels_of, png
from training.command import check_images
from training.dataset import ImageDataset, choose_subset
from training.sampling import TrainingOrder, iterate_batches

DATA = Path(__file__).parent.parent / "data"


def refused(make):
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["set.zip", "folder"])
@pytest.mark.parametrize("channels", [1, 3])
def test_dataset_reads_pixels_and_labels(tmp_path, name, channels):
    path = make_set(tmp_path / name, 4, channels=channels, labels=[1, 0, 2, 1], classes=["a", "b", "c"])
    dataset = ImageDataset(path, use_labels=True)
    assert (len(dataset), dataset.image_shape, dataset.label_dim) == (4, (channels, 8, 8), 3)
    pixels, label = dataset[2]
    expected = pixels_of(2, channels=channels).reshape(8, 8, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels, expected)
    assert (pixels.dtype, pixels.flags.c_contiguous, label.tolist()) == (np.uint8, True, [0.0, 0.0, 1.0])
    assert dataset.label_table().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    facts = dataset.facts()
    assert (facts.name, facts.resolution, facts.channels, facts.num_images, facts.c_dim) == (
        name.removesuffix(".zip"), 8, channels, 4, 3)


def test_dataset_without_use_labels_gives_empty_ones(tmp_path):
    dataset = ImageDataset(make_set(tmp_path / "a.zip", 3, labels=[0, 1, 0]))
    assert dataset[0][1].shape == (0,)
    assert dataset.label_table().shape == (3, 0)
    assert dataset.facts().c_dim == 2


def test_dataset_label_vectors_are_taken_as_they_are(tmp_path):
    dataset = ImageDataset(make_set(tmp_path / "a.zip", 2, labels=[[0.5, 0.25, 1], [0, 0, 1]]), use_labels=True)
    assert dataset[0][1].tolist() == [0.5, 0.25, 1.0]
    assert dataset.label_dim == 3
    assert dataset.class_indices() is None


@pytest.mark.parametrize("labels", [[1, 0], [[0.5, 1], [0, 1]]])
def test_dataset_labels_belong_to_who_asked(tmp_path, labels):
    dataset = ImageDataset(make_set(tmp_path / "a.zip", 2, labels=labels), use_labels=True)
    before = dataset.label_table()
    for index in range(2):
        assert dataset[index][1].dtype == np.float32
        dataset[index][1][:] = 7
    dataset.label_table()[:] = 7
    assert torch.equal(dataset.label_table(), before)
    assert [dataset[index][1].tolist() for index in range(2)] == before.tolist()


def test_dataset_label_length_counts_classes_without_images(tmp_path):
    named = ImageDataset(make_set(tmp_path / "a.zip", 2, labels=[0, 1], classes=["x", "y", "z"]), use_labels=True)
    unnamed = ImageDataset(make_set(tmp_path / "b.zip", 2, labels=[0, 1]), use_labels=True)
    assert (named.label_dim, unnamed.label_dim) == (3, 2)


def test_dataset_mirror_appends_flipped_images(tmp_path):
    dataset = ImageDataset(make_set(tmp_path / "a.zip", 3, labels=[0, 1, 0]), use_labels=True, xflip=True)
    assert (len(dataset), dataset.num_images) == (6, 3)
    np.testing.assert_array_equal(dataset[4][0], dataset[1][0][:, :, ::-1])
    assert dataset[4][1].tolist() == dataset[1][1].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("seed", "expected"), [(0, [1, 6, 8, 10, 17, 18, 19]), (5, [1, 2, 5, 11, 12, 17, 19])])
def test_choose_subset_takes_the_rows_that_the_original_takes(seed, expected):
    assert choose_subset(20, 7, seed).tolist() == expected


def test_dataset_subset_is_consistent(tmp_path):
    groups = [f"patient{index}" for index in range(20)]
    path = make_set(tmp_path / "a.zip", 20, labels=[index % 3 for index in range(20)], groups=groups)
    dataset = ImageDataset(path, use_labels=True, max_size=7, seed=5)
    chosen = choose_subset(20, 7, 5)
    assert (len(dataset), dataset.facts().num_images) == (7, 7)
    for item, row in enumerate(chosen):
        np.testing.assert_array_equal(dataset[item][0], pixels_of(row).transpose(2, 0, 1))
        assert dataset[item][1].argmax() == row % 3
    assert dataset.named_groups() == [groups[row] for row in chosen]
    assert dataset.image_names() == [f"00000/img{row:08d}.png" for row in chosen]
    assert len(ImageDataset(path, max_size=50)) == 20


def test_dataset_content_hash_follows_content_only(tmp_path):
    labels = [0, 1, 0, 1]
    base = ImageDataset(make_set(tmp_path / "a.zip", 4, labels=labels)).content_hash()
    same = [make_set(tmp_path / "b.zip", 4, labels=labels), make_set(tmp_path / "folder", 4, labels=labels)]
    renamed = tmp_path / "renamed"
    shutil.copytree(same[1], renamed)
    (renamed / "dataset.json").unlink()
    (renamed / "00000").rename(renamed / "other")
    assert {ImageDataset(path).content_hash() for path in [*same, renamed]} == {base}
    assert ImageDataset(same[0], xflip=True).content_hash() == base
    others = {
        ImageDataset(same[0], use_labels=True).content_hash(),
        ImageDataset(make_set(tmp_path / "c.zip", 4, labels=[1, 1, 0, 1]), use_labels=True).content_hash(),
        ImageDataset(make_set(tmp_path / "d.zip", 5, labels=[*labels, 0])).content_hash(),
        ImageDataset(same[0], max_size=3).content_hash(),
    }
    assert len(others | {base}) == 5


def test_dataset_content_hash_reads_the_files_of_a_folder_once(tmp_path, monkeypatch):
    dataset = ImageDataset(make_set(tmp_path / "folder", 2))
    first = dataset.content_hash()
    monkeypatch.setattr(ImageSet, "read", None)
    assert dataset.content_hash() == first


def test_dataset_opens_its_file_anew_in_each_process(tmp_path):
    dataset = ImageDataset(make_set(tmp_path / "a.zip", 4))
    expected = dataset[3][0]
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy[3][0], expected)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2)
    for _ in range(2):
        seen = torch.cat([pixels for pixels, _ in loader])
        np.testing.assert_array_equal(seen[3], expected)


def test_dataset_reads_a_folder_of_plain_images_without_labels(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b.png").write_bytes(png(pixels_of(1)))
    (folder / "a.png").write_bytes(png(pixels_of(0)))
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    dataset = ImageDataset(folder)
    assert dataset.image_names() == ["a.png", "sub/b.png"]
    assert not dataset.facts().has_labels


def test_dataset_follows_linked_folders_and_no_circles(tmp_path):
    inside, outside = tmp_path / "set", tmp_path / "elsewhere"
    (inside / "deep").mkdir(parents=True)
    outside.mkdir()
    (inside / "a.png").write_bytes(png(pixels_of(0)))
    (outside / "b.png").write_bytes(png(pixels_of(1)))
    (inside / "linked").symlink_to(outside)
    (inside / "deep" / "circle").symlink_to(inside)
    assert ImageDataset(inside).image_names() == ["a.png", "linked/b.png"]


def damage(path, name):
    """Flip a byte in the middle of a member of a stored zip."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
        size = len(archive.read(name))
    data = bytearray(path.read_bytes())
    start = data.index(name.encode(), info.header_offset) + len(name)
    data[start + size // 2] ^= 0xFF
    path.write_bytes(data)


def test_dataset_damaged_member_is_named_when_it_is_read(tmp_path):
    path = make_set(tmp_path / "a.zip", 4)
    damage(path, "00000/img00000002.png")
    dataset = ImageDataset(path)
    assert dataset[1][0].shape == (3, 8, 8)
    message = refused(lambda: dataset[2])
    assert message == (f"{path}: 00000/img00000002.png is damaged (Bad CRC-32 for file '00000/img00000002.png'); make "
                       "or copy the data set again")
    order = TrainingOrder(4, seed=0)
    for workers in (0, 1):
        batches = iterate_batches(dataset, order, nimg=0, batch=4, rows=range(4), num_workers=workers)
        assert refused(lambda batches=batches: next(batches)) == message


def folder_with(tmp_path, **files):
    folder = tmp_path / "set"
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("_json", ".json").replace("_png", ".png")).write_bytes(data)
    return folder


@pytest.mark.parametrize(("files", "message"), [
    ({"a_png": png(np.zeros((8, 6, 3)))},
     "a.png is 6x8 RGB; expected square images, gray or RGB: convert it with dataset_tool.py --transform=center-crop "
     "--resolution=256x256"),
    ({"a_png": png(np.zeros((8, 8, 4)))},
     "a.png has mode RGBA; expected 8-bit gray or RGB: convert it with dataset_tool.py"),
    ({"a_png": b"nothing"}, "a.png cannot be decoded (it is not an image); make or copy it again"),
    ({"a_png": png(pixels_of(0))[:150]}, "a.png cannot be decoded ("),
])
def test_dataset_first_image_that_cannot_be_used_is_refused(tmp_path, files, message):
    folder = folder_with(tmp_path, **files)
    assert refused(lambda: ImageDataset(folder)).startswith(f"{folder}: {message}")


def test_dataset_image_of_another_size_is_named_when_it_is_read(tmp_path):
    folder = folder_with(tmp_path, a_png=png(pixels_of(0)), b_png=png(pixels_of(1, 16)), c_png=png(np.zeros((8, 8))))
    dataset = ImageDataset(folder)
    ending = "the first image 8x8 RGB; expected one size: convert it with dataset_tool.py"
    assert refused(lambda: dataset[1]) == f"{folder}: b.png is 16x16 RGB, {ending}"
    assert refused(lambda: dataset[2]) == f"{folder}: c.png is 8x8 gray, {ending}"


def test_dataset_labels_that_are_missing_are_counted(tmp_path):
    some = make_set(tmp_path / "some.zip", 3, labels=[0, None, None])
    none = make_set(tmp_path / "none.zip", 3)
    assert refused(lambda: ImageDataset(some, use_labels=True)) == (
        f"{some}: 2 of 3 images have no label (00000/img00000001.png, ...); expected one for each image: convert with "
        "dataset_tool.py --unlabeled=drop, or leave --cond out")
    assert refused(lambda: ImageDataset(none, use_labels=True)) == (
        f"{none} has no labels; expected one for each image: convert it with dataset_tool.py --labels, or leave --cond "
        "out")
    assert len(ImageDataset(some)) == 3


def test_dataset_paths_that_are_no_data_set_are_refused(tmp_path):
    missing = tmp_path / "missing.zip"
    assert refused(lambda: ImageDataset(missing)) == (
        f"{missing} does not exist; expected a data set: a zip or a folder of images")
    (tmp_path / "empty").mkdir()
    assert refused(lambda: ImageDataset(tmp_path / "empty")) == (
        f"{tmp_path / 'empty'} holds no images; expected files such as .png or .jpg")
    whole = make_set(tmp_path / "a.zip", 4)
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole.read_bytes()[:500])
    assert refused(lambda: ImageDataset(cut)) == (
        f"{cut} cannot be read as a zip (File is not a zip file): it is truncated or not a zip; make or copy it again")


IMAGE = png(pixels_of(0))


@pytest.mark.parametrize(("metadata", "message"), [
    (b"[1", "dataset.json is not JSON"),
    (b"[]", "dataset.json holds a list; expected an object with labels"),
    (b'{"labels": [["a.png", 0], ["x.png", 1], ["y.png", 1]]}',
     "labels in dataset.json name 2 files that are not there (x.png, y.png)"),
    (b'{"labels": [["a.png", 0], ["b.png", [0.5, 1]]]}',
     "labels in dataset.json are of mixed kinds (integers, lists of 2); expected integers, or lists of one length"),
    (b'{"labels": [["a.png", [1]], ["b.png", [0.5, 1]]]}',
     "labels in dataset.json are of mixed kinds (lists of 1, lists of 2); expected integers, or lists of one length"),
    (b'{"labels": [["a.png", "nv"]]}',
     "dataset.json gives a.png the label 'nv'; expected an integer >= 0, a list of numbers, or null"),
    (b'{"labels": [["a.png", -1]]}',
     "dataset.json gives a.png the label -1; expected an integer >= 0, a list of numbers, or null"),
    (b'{"labels": [["a.png", true]]}',
     "dataset.json gives a.png the label True; expected an integer >= 0, a list of numbers, or null"),
    (b'{"labels": [["a.png", [NaN]]]}',
     "dataset.json gives a.png the label [nan]; expected an integer >= 0, a list of numbers, or null"),
    (b'{"labels": [["a.png", 0], ["a.png", 1]]}', "dataset.json labels a file twice"),
    (b'{"labels": [["a.png", 0], ["./a.png", 1]]}', "dataset.json labels a file twice"),
    (b'{"groups": {"a.png": "p", "./a.png": "q"}}', "groups in dataset.json name a file twice"),
    (b'{"labels": [["a.png", 1.5]]}',
     "dataset.json gives a.png the label 1.5; expected an integer >= 0, a list of numbers, or null"),
    (b'{"labels": [["a.png", -1.0]]}',
     "dataset.json gives a.png the label -1; expected an integer >= 0, a list of numbers, or null"),
    (b'{"labels": [["a.png", 1e300]]}',
     "dataset.json gives a.png the label 1e+300; expected an integer >= 0, a list of numbers, or null"),
    (b'{"labels": [["a.png", "0"]]}',
     "dataset.json gives a.png the label '0'; expected an integer >= 0, a list of numbers, or null"),
    (b'{"labels": [["x\\\\a.png", 0]]}', "labels in dataset.json name 1 file that is not there (x\\a.png)"),
    (b'{"labels": {"a.png": 0}}', "labels in dataset.json are not [[file, label], ...]"),
    (b'{"labels": [["a.png", 2]], "classes": ["x", "y"]}',
     "dataset.json names 2 classes; expected 3, as its labels need"),
    (b'{"classes": "xy"}', "classes in dataset.json are 'xy'; expected a list of names"),
    (b'{"groups": ["a"]}', "groups in dataset.json are not an object of texts"),
    (b'{"groups": {"z.png": "p"}}', "groups in dataset.json name 1 file that is not there (z.png)"),
])
def test_dataset_json_that_does_not_fit_is_refused(tmp_path, metadata, message):
    folder = folder_with(tmp_path, a_png=IMAGE, b_png=IMAGE, dataset_json=metadata)
    assert refused(lambda: ImageDataset(folder)).startswith(f"{folder}: {message}")


# ---- a set that lies in a folder inside


LEFTOVERS = {"__MACOSX/set/._dataset.json": b"x", "__MACOSX/set/00000/._img00000000.png": b"x", ".hidden/a.png": b"x",
             "readme.txt": b"hello"}


@pytest.mark.parametrize("more", [{}, LEFTOVERS], ids=["alone", "leftovers"])
@pytest.mark.parametrize("folder", ["set", "a/b", "a\\b", "./set"])
@pytest.mark.parametrize("name", ["inside.zip", "inside"])
def test_set_in_a_folder_inside_is_read_as_if_it_lay_at_the_top(tmp_path, name, folder, more):
    if name == "inside" and "\\" in folder:
        folder = "a/./b"
    flat = ImageDataset(make_set(tmp_path / "flat.zip", 6, labels=[1, 0, 2, 0, 1, 1], classes=["x", "y", "z"],
                                 groups=["p", "p", "q", None, "r", "r"]), use_labels=True)
    inside = ImageDataset(enclose(flat.path, tmp_path / name, folder, more), use_labels=True)
    assert inside.image_names() == flat.image_names()
    assert inside.named_groups() == flat.named_groups()
    assert inside.classes == flat.classes
    assert torch.equal(inside.label_table(), flat.label_table())
    assert all(np.array_equal(inside[row][0], flat[row][0]) for row in range(6))
    assert inside.content_hash() == flat.content_hash()
    check_images(inside)
    images = ImageSet(tmp_path / name)
    assert images.other_members == sorted(["dataset.json", *more])
    assert [images.read(member) for member in more] == list(more.values())


def test_set_in_a_folder_inside_that_does_not_hold_all_images_is_refused(tmp_path):
    path = enclose(make_set(tmp_path / "flat.zip", labels=[0, 1] * 3), tmp_path / "a.zip",
                   more={"b.png": png(pixels_of(9))})
    assert refused(lambda: ImageSet(path)) == (
        f"{path}: dataset.json is in a subfolder (set/dataset.json), but images are outside of it (b.png); expected it "
        "at the top: give that subfolder, or zip its content without the subfolder")


@pytest.mark.parametrize(("folder", "found"), [("one", "one/dataset.json"), (".", "dataset.json")])
def test_sets_in_several_folders_are_refused(tmp_path, folder, found):
    flat = make_set(tmp_path / "flat", labels=[0, 1] * 3)
    path = enclose(flat, tmp_path / "both", "two")
    enclose(flat, path, folder)
    assert refused(lambda: ImageSet(path)) == (
        f"{path}: dataset.json is in 2 places ({found}, two/dataset.json); expected one: give one of these "
        "folders, remove the others, or join them with dataset_tool.py and a --source for each")


@pytest.mark.parametrize("folder", ["", "set/"])
def test_dataset_json_in_other_case_is_read(tmp_path, folder):
    path = make_zip(tmp_path / "a.zip", {f"{folder}0.png": png(pixels_of(0)),
                                         f"{folder}Dataset.JSON": b'{"labels": [["0.png", 3]]}'})
    images = ImageSet(path)
    assert (images.names, images.labels.tolist(), images.other_members) == (["0.png"], [3], ["dataset.json"])
