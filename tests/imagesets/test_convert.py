"""Conversion: what is kept, dropped, linked and recorded."""

import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from dnnlib.cli import UserError
from imagesets.convert import convert
from imagesets.labels import class_names
from imagesets.reader import NO_LABEL, ImageSet
from imagesets.writer import ImageSetWriter
from tests.helpers.make_archives import encode, make_cifar, make_folder, make_idx, make_zip, noise


def image(seed, size=8, channels=3):
    return encode(noise(seed, size, size, *((3,) if channels == 3 else ())))


def run(source, dest, **options):
    options = {"workers": 1, "stream": io.StringIO()} | options
    return convert(source, dest, **options)


def pixels(data_set, name):
    return np.asarray(PIL.Image.open(io.BytesIO(data_set.read(name))))


def read_json(path):
    return json.loads(path.read_text())


def read_json_of(data_set):
    return json.loads(ImageSet(data_set).read("dataset.json"))


@pytest.fixture
def folder(tmp_path):
    """Six 8x8 images of three classes; b is the same file twice, in two classes."""
    files = {f"{label}/{name}.png": image(seed) for label, name, seed in [
        ("mel", "a", 1), ("mel", "b", 2), ("nv", "b", 2), ("nv", "c", 3), ("nv", "d", 4), ("vasc", "e", 5)]}
    return make_folder(tmp_path / "lesions", files)


def test_a_folder_becomes_a_data_set_in_the_order_of_its_names(folder, tmp_path):
    summary = run(folder, tmp_path / "set.zip")
    result = ImageSet(tmp_path / "set.zip")
    assert result.names == [f"00000/img{index:08d}.png" for index in range(6)]
    assert result.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert result.classes == ["mel", "nv", "vasc"]
    for name, seed in zip(result.names, (1, 2, 2, 3, 4, 5)):
        assert np.array_equal(pixels(result, name), noise(seed, 8, 8, 3))
    assert (summary.found, summary.kept, summary.dropped) == (6, 6, {})
    assert summary.class_counts == {"mel": 2, "nv": 3, "vasc": 1}


def test_a_folder_can_be_written_as_a_folder(folder, tmp_path):
    run(folder, tmp_path / "set")
    run(folder, tmp_path / "set.zip")
    as_folder, as_zip = ImageSet(tmp_path / "set"), ImageSet(tmp_path / "set.zip")
    assert as_folder.names == as_zip.names
    assert all(as_folder.read(name) == as_zip.read(name) for name in [*as_zip.names, "dataset.json"])


def test_byte_identical_images_are_kept_in_one_group_and_contradictions_named(folder, tmp_path):
    summary = run(folder, tmp_path / "set.zip", report=tmp_path / "report.json")
    groups = ImageSet(tmp_path / "set.zip").groups
    assert groups[1] == groups[2] == "00000/img00000001.png"
    assert len(set(groups)) == summary.num_groups == 5
    report = read_json(tmp_path / "report.json")
    assert report["duplicates"] == [["mel/b.png", "nv/b.png"]]
    assert report["contradictions"] == [{"mel/b.png": "mel", "nv/b.png": "nv"}]
    assert (summary.num_duplicates, summary.num_contradictions) == (2, 1)
    assert "  contradiction among byte-identical images: mel/b.png is mel, nv/b.png is nv" in summary.lines
    for name in ("mel/c", "mel/d", "nv/c"):
        (folder / f"{name}.png").write_bytes((folder / "nv/b.png").read_bytes())
    assert ("  contradiction among byte-identical images: mel/b.png is mel, nv/b.png is nv, and 3 more"
            in run(folder, tmp_path / "more.zip").lines)


def test_a_set_that_is_there_twice_is_asked_about(tmp_path):
    files = {f"{folder}_part_{part}/{part}.png": image(part) for folder in ("HAM", "ham") for part in (1, 2)}
    summary = run(make_folder(tmp_path / "in", files), tmp_path / "set.zip", folders="ignore")
    assert ("  byte-identical: 4 images in 2 sets, kept in one group each (HAM_part_1/1.png = ham_part_1/1.png); does "
            "the source hold the set twice? Give each of its folders once") in summary.lines


def test_an_unlabelled_duplicate_is_no_contradiction(folder, tmp_path):
    (folder / "nv/b.png").unlink()
    (folder / "b.png").write_bytes(image(2))
    summary = run(folder, tmp_path / "set.zip", unlabelled="keep")
    assert (summary.num_duplicates, summary.num_contradictions) == (2, 0)


def test_classes_and_merge_choose_and_order(folder, tmp_path):
    summary = run(folder, tmp_path / "set.zip", merge="benign=nv,vasc", classes="benign", report=tmp_path / "r.json")
    result = ImageSet(tmp_path / "set.zip")
    assert result.classes == ["benign"]
    assert result.labels.tolist() == [0, 0, 0, 0]
    assert summary.dropped == {"class not chosen": 2}
    assert read_json(tmp_path / "r.json")["dropped"]["class not chosen"]["names"] == ["mel/a.png", "mel/b.png"]


def test_max_images_draws_from_the_classes_chosen_and_counts_the_rest(folder, tmp_path):
    summary = run(folder, tmp_path / "set.zip", classes="nv", max_images=2, report=tmp_path / "r.json")
    assert (summary.found, summary.kept) == (6, 2)
    assert summary.dropped == {"class not chosen": 3, "not drawn for --max-images": 1}
    assert "  sample: 2 of 3 images, drawn at random (--max-images, --seed): nv 2 of 3" in summary.lines
    report = read_json(tmp_path / "r.json")
    assert report["sample"] == {"drawn": 2, "of": 3, "classes": {"nv": [2, 3]}}
    assert len(report["dropped"]["not drawn for --max-images"]["names"]) == 1
    source = ImageSet(tmp_path / "set.zip").source
    assert (source["options"]["max_images"], source["options"]["seed"]) == (2, 0)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """One set of 40 images of class a, 16 of b and 4 of c in every kind of archive: a list of paths for each."""
    place = tmp_path_factory.mktemp("archives")
    files = {f"{name}/{index:02d}.png": image(100 * code + index)
             for code, (name, count) in enumerate((("a", 40), ("b", 16), ("c", 4))) for index in range(count)}
    folder, packed = make_folder(place / "folder", files), make_zip(place / "packed.zip", files)
    run(folder, place / "ready.zip")
    halves = [make_folder(place / half, {name: data for name, data in files.items() if int(name[2:4]) % 2 == odd})
              for odd, half in enumerate(("even", "odd"))]
    (place / "flat").mkdir()
    for name, data in files.items():
        (place / "flat" / name.replace("/", "")).write_bytes(data)
    table = place / "t.csv"
    rows = [f"{name[0]}{name[2:4]},{name[0]},{name[0]}{int(name[2:4]) // 4}\n" for name in files]
    table.write_text("image,class,lesion\n" + "".join(rows))
    np.savez(place / "set.npz", train_images=noise(0, 60, 8, 8), train_labels=[[0]] * 40 + [[1]] * 16 + [[2]] * 4)
    columns = {"labels": table, "id_column": "image", "label_column": "class", "group_column": "lesion"}
    return {"folder": (folder, {}), "zip": (packed, {}), "data set": (place / "ready.zip", {}), "halves": (halves, {}),
            "table": (place / "flat", columns), "npz": (place / "set.npz", {})}


def drawn_by(path, dest, **options):
    """Return the images' hashes, in order, and the counts of the classes."""
    summary = run(path, dest, max_images=15, **options)
    found = ImageSet(dest)
    return [hash(found.read(name)) for name in found.names], list(summary.class_counts.values())


@pytest.mark.parametrize("kind", ["folder", "zip", "data set", "halves", "table", "npz"])
def test_max_images_is_a_seeded_sample_of_all_classes_in_proportion(kind, archives, tmp_path):
    path, options = archives[kind]
    first, counts = drawn_by(path, tmp_path / "0.zip", **options)
    assert counts == [10, 4, 1]
    assert drawn_by(path, tmp_path / "1.zip", seed=0, workers=2, **options) == (first, counts)
    assert (tmp_path / "0.zip").read_bytes() == (tmp_path / "1.zip").read_bytes()
    other, counts = drawn_by(path, tmp_path / "2.zip", seed=1, **options)
    assert counts == [10, 4, 1]
    assert set(other) != set(first)
    run(path, tmp_path / "all.zip", **options)
    everything = ImageSet(tmp_path / "all.zip")
    places = {hash(everything.read(name)): place for place, name in enumerate(everything.names)}
    assert [places[one] for one in first] == sorted(places[one] for one in first)  # in the order of the set
    assert max(places[one] for one in first[:10]) > 20  # and not its first ones


def test_max_images_of_a_set_without_classes_is_a_sample_and_of_enough_images_all(archives, tmp_path):
    plain = make_folder(tmp_path / "plain", {f"{index:02d}.png": image(index) for index in range(30)})
    summary = run(plain, tmp_path / "set.zip", max_images=6)
    assert "  sample: 6 of 30 images, drawn at random (--max-images, --seed)" in summary.lines
    names = read_json_of(tmp_path / "set.zip")["pixel_hashes"]
    assert len(names) == 6
    first = [ImageSet(plain).read(f"{index:02d}.png") for index in range(6)]
    assert [ImageSet(tmp_path / "set.zip").read(name) for name in names] != first
    summary = run(archives["folder"][0], tmp_path / "all.zip", max_images=60)
    assert summary.dropped == {}
    assert not [line for line in summary.lines if "sample" in line]


def test_an_unlabelled_image_is_an_error_until_decided(folder, tmp_path):
    (folder / "stray.png").write_bytes(image(9))
    message = ("1 of 7 images have no label (stray.png); expected a label for each: add them, or give "
               "--unlabelled=drop or --unlabelled=keep")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(folder, tmp_path / "set.zip", report=tmp_path / "r.json")
    assert not (tmp_path / "set.zip").exists()
    assert read_json(tmp_path / "r.json") == {"error": message, "found": 7, "unlabelled": ["stray.png"]}
    assert run(folder, tmp_path / "drop.zip", unlabelled="drop").dropped == {"no label": 1}
    summary = run(folder, tmp_path / "keep.zip", unlabelled="keep")
    assert summary.class_counts == {"mel": 2, "nv": 3, "vasc": 1, "(none)": 1}
    assert ImageSet(tmp_path / "keep.zip").labels.tolist() == [0, 0, 1, 1, 1, -1, 2]


def test_images_without_any_labels_need_no_decision(tmp_path):
    folder = make_folder(tmp_path / "plain", {"a.png": image(1), "b.png": image(2)})
    summary = run(folder, tmp_path / "set.zip")
    assert summary.class_counts is None
    assert ImageSet(tmp_path / "set.zip").labels is None
    with pytest.raises(UserError, match=r"^--classes: the images of plain have no labels; expected sub-folders, a "):
        run(folder, tmp_path / "set.zip", classes="mel")


# patient p1 has a and b, p2 has c; e has no row, f no image
TABLE = "image_name,patient_id,benign_malignant,target\na,p1,benign,0\nb,p1,malignant,1\nc,p2,benign,0\nd,,benign,0\n" \
        "f,p3,benign,0\n"


def test_a_table_gives_labels_and_groups_and_counts_what_is_missing(tmp_path):
    files = {f"{name}.png": image(seed) for seed, name in enumerate("abcde")}
    source = make_zip(tmp_path / "images.zip", files)
    (tmp_path / "truth.csv").write_text(TABLE)
    options = {"labels": str(tmp_path / "truth.csv"), "report": tmp_path / "r.json"}
    with pytest.raises(UserError, match=r"^1 of 5 images have no label, 1 of them no row in the table \(e\.png\); "):
        run(source, tmp_path / "set.zip", **options)
    summary = run(source, tmp_path / "set.zip", unlabelled="drop", **options)
    result = ImageSet(tmp_path / "set.zip")
    assert result.classes == ["benign", "malignant"]
    assert result.labels.tolist() == [0, 1, 0, 0]
    assert result.groups == ["p1", "p1", "p2", result.names[3]]
    report = read_json(tmp_path / "r.json")
    assert report["images_without_a_row"] == {"count": 1, "names": ["e.png"]}
    assert report["rows_without_an_image"] == {"count": 1, "names": ["f"]}
    assert (summary.images_without_a_row, summary.rows_without_an_image) == (1, 1)
    assert result.source["options"]["labels"] == "truth.csv"


def test_duplicates_join_groups_and_images_of_one_row_share_theirs(tmp_path):
    files = {"a.png": image(1), "b.png": image(2), "c.png": image(1), "d.png": image(4), "x/d.png": image(5)}
    (tmp_path / "truth.csv").write_text(TABLE)
    summary = run(make_folder(tmp_path / "in", files), tmp_path / "set.zip", labels=str(tmp_path / "truth.csv"),
                  include=["*"])
    result = ImageSet(tmp_path / "set.zip")
    # a = c joins p1 and p2; d.png and x/d.png are of the row d, which names no patient.
    assert result.groups == ["p1", "p1", "p1", result.names[3], result.names[3]]
    assert summary.num_groups == 2


def test_a_table_without_a_row_for_any_image_raises(folder, tmp_path):
    (tmp_path / "truth.csv").write_text("id,kind\nISIC_1,mel\n")
    message = ("--labels: no image of lesions has a row; the images are named as mel/a.png, the rows as ISIC_1: choose "
               "the column by --id-column, or another table")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(folder, tmp_path / "set.zip", labels=str(tmp_path / "truth.csv"), id_column="id", label_column="kind")


def test_grey_images_stay_grey_only_among_themselves(tmp_path):
    grey = {f"{name}.png": image(seed, channels=1) for seed, name in enumerate("abc")}
    run(make_folder(tmp_path / "grey", grey), tmp_path / "grey.zip")
    result = ImageSet(tmp_path / "grey.zip")
    assert np.array_equal(pixels(result, result.names[1]), noise(1, 8, 8))
    summary = run(make_folder(tmp_path / "mixed", grey | {"d.png": image(4)}), tmp_path / "mixed.zip")
    result = ImageSet(tmp_path / "mixed.zip")
    assert np.array_equal(pixels(result, result.names[1]), np.repeat(noise(1, 8, 8)[:, :, None], 3, axis=2))
    assert summary.converted == {"grey to RGB": 3}


def test_dropped_images_do_not_decide_on_colour(tmp_path):
    files = {f"x/{name}.png": image(seed, channels=1) for seed, name in enumerate("abc")} | {"y/d.png": image(4)}
    run(make_folder(tmp_path / "in", files), tmp_path / "set.zip", classes="x")
    result = ImageSet(tmp_path / "set.zip")
    assert pixels(result, result.names[0]).shape == (8, 8)


def bad_folder(tmp_path, num_good=6):
    files = {f"{number:03d}.png": image(number) for number in range(num_good)}
    whole = image(50, size=64)
    return make_folder(tmp_path / "in", files | {"cut.png": whole[:3000], "empty.png": b"", "text.png": b"hello" * 20})


def test_more_bad_images_than_allowed_leave_only_the_report(tmp_path):
    report = tmp_path / "r.json"
    message = (f"3 of 9 images are unreadable (not an image: 1, truncated: 1, zero bytes: 1), more than --max-bad=0.3 "
               f"allows; see {report}")
    source = bad_folder(tmp_path)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(source, tmp_path / "set.zip", width=8, height=8, max_bad=0.3, report=report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "r.json"]
    found = read_json(report)
    assert found["error"] == message
    assert found["dropped"]["unreadable: zero bytes"] == {"count": 1, "names": ["empty.png"]}


def test_as_many_bad_images_as_allowed_are_dropped_and_named(tmp_path):
    options = {"width": 8, "height": 8, "max_bad": 0.34, "report": tmp_path / "r.json"}
    summary = run(bad_folder(tmp_path), tmp_path / "set.zip", **options)
    assert (summary.found, summary.kept) == (9, 6)
    assert summary.dropped == {"unreadable: not an image": 1, "unreadable: truncated": 1, "unreadable: zero bytes": 1}
    found = read_json(tmp_path / "r.json")
    assert {reason: entry["names"] for reason, entry in found["dropped"].items()} == {
        "unreadable: not an image": ["text.png"], "unreadable: truncated": ["cut.png"],
        "unreadable: zero bytes": ["empty.png"]}
    assert found["kept"] + sum(entry["count"] for entry in found["dropped"].values()) == found["found"]


def test_nothing_readable_raises_whatever_is_allowed(tmp_path):
    folder = make_folder(tmp_path / "in", {"a.png": b"", "b.png": b"x"})
    message = r"^2 of 2 images are unreadable \(.*\), none is left; list them by --report=FILE$"
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "set.zip", max_bad=1)
    assert not (tmp_path / "set.zip").exists()


@pytest.mark.parametrize(("sizes", "options", "message"), [
    ((8, 16), {}, "images differ in size: a.png is 8x8 but b.png is 16x16; expected one size: give --resolution=8x8, "
                  "with --transform=center-crop if their shapes are not to be stretched"),
    ((12, 12), {}, "images are 12x12 (a.png for example); expected squares with a side of a power of "
                   "two from 8 to 2048: give --transform=center-crop --resolution=8x8"),
    (((8, 16), (8, 16)), {}, "images are 16x8 (a.png for example); expected squares with a side of a power of "
                             "two from 8 to 2048: give --transform=center-crop --resolution=8x8")])
def test_sizes_that_do_not_fit_raise_and_name_images(sizes, options, message, tmp_path):
    files = {f"{name}.png": encode(noise(1, *(size if isinstance(size, tuple) else (size, size)), 3))
             for name, size in zip("ab", sizes)}
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(make_folder(tmp_path / "in", files), tmp_path / "set.zip", **options)
    assert not (tmp_path / "set.zip").exists()


def test_center_crop_without_a_size_takes_the_shorter_side(tmp_path):
    source = make_folder(tmp_path / "in", {"a.png": encode(noise(1, 8, 12, 3)), "b.png": encode(noise(2, 10, 8, 3))})
    run(source, tmp_path / "set.zip", transform="center-crop")
    result = ImageSet(tmp_path / "set.zip")
    assert np.array_equal(pixels(result, result.names[0]), noise(1, 8, 12, 3)[:, 2:10])
    assert np.array_equal(pixels(result, result.names[1]), noise(2, 10, 8, 3)[1:9])


def test_wide_crop_pads_and_drops_what_is_too_small_without_calling_it_unreadable(tmp_path):
    files = {"a.png": encode(noise(1, 12, 16, 3)), "b.png": encode(noise(2, 6, 16, 3)), "c.png": image(3, size=4)}
    folder = make_folder(tmp_path / "in", files)
    summary = run(folder, tmp_path / "set.zip", transform="center-crop-wide", width=16, height=12, max_bad=0)
    result = ImageSet(tmp_path / "set.zip")
    assert np.array_equal(pixels(result, result.names[0])[2:14], noise(1, 12, 16, 3))
    assert not pixels(result, result.names[0])[[0, 1, 14, 15]].any()
    assert (summary.kept, summary.resolution) == (1, 16)
    assert summary.dropped == {"smaller than the wide crop": 2}
    message = "all 3 images are smaller than the wide crop to 32x24; choose a smaller --resolution"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(folder, tmp_path / "set.zip", transform="center-crop-wide", width=32, height=24)


def test_npz_with_vectors_keeps_them_and_refuses_a_choice_of_classes(tmp_path):
    labels = np.array([[0, 1, 1], [1, 0, 0.5]], dtype=np.float32)
    images = noise(1, 2, 8, 8, 3)
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=labels)
    summary = run(tmp_path / "set.npz", tmp_path / "out.zip")
    result = ImageSet(tmp_path / "out.zip")
    assert np.array_equal(result.labels, labels)
    assert np.array_equal(pixels(result, result.names[1]), images[1])
    assert "  labels: lists of 3 numbers" in summary.lines
    with pytest.raises(UserError, match=r"^--classes: the labels of set\.npz are lists of 3 numbers, from which"):
        run(tmp_path / "set.npz", tmp_path / "out.zip", classes="1")
    (tmp_path / "t.csv").write_text(TABLE)
    with pytest.raises(UserError, match=r"^--labels: set\.npz \(MedMNIST npz\) brings its own labels; leave"):
        run(tmp_path / "set.npz", tmp_path / "out.zip", labels=str(tmp_path / "t.csv"))


def test_cifar_and_mnist_become_data_sets(tmp_path):
    images, labels = make_cifar(tmp_path / "cifar.tar.gz")
    run(tmp_path / "cifar.tar.gz", tmp_path / "cifar.zip", classes="cat,dog,ship", unlabelled="error")
    result = ImageSet(tmp_path / "cifar.zip")
    chosen = [index for index in range(15) if labels[index] in (3, 5, 8)]
    assert result.classes == ["cat", "dog", "ship"]
    assert result.labels.tolist() == [(3, 5, 8).index(labels[index]) for index in chosen]
    assert np.array_equal(pixels(result, result.names[-1]), images[chosen[-1]])
    digits = make_idx(tmp_path / "t10k-images-idx3-ubyte.gz", noise(0, 3, 28, 28))
    make_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([7, 2, 1], dtype=np.uint8))
    run(digits, tmp_path / "mnist.zip", width=32, height=32)
    result = ImageSet(tmp_path / "mnist.zip")
    assert result.labels.tolist() == [7, 2, 1]
    assert result.classes is None
    assert pixels(result, result.names[0]).shape == (32, 32)


def test_integer_labels_without_names_are_chosen_by_number(tmp_path):
    np.savez(tmp_path / "set.npz", train_images=noise(1, 4, 8, 8), train_labels=np.array([[2], [0], [1], [2]]))
    run(tmp_path / "set.npz", tmp_path / "out.zip", classes="2,0")
    result = ImageSet(tmp_path / "out.zip")
    assert result.classes == ["2", "0"]
    assert result.labels.tolist() == [0, 1, 0]


def test_a_ready_data_set_passes_through(folder, tmp_path):
    (tmp_path / "truth.csv").write_text("name,kind,patient\n" + "".join(
        f"{name},{kind},p{name}\n" for name, kind in zip("abcde", ["x", "y", "y", "z", "z"])))
    run(folder, tmp_path / "first.zip", labels=str(tmp_path / "truth.csv"), id_column="name", label_column="kind",
        group_column="patient", include=["*"])
    run(tmp_path / "first.zip", tmp_path / "second.zip")
    first, second = ImageSet(tmp_path / "first.zip"), ImageSet(tmp_path / "second.zip")
    assert second.classes == first.classes == ["x", "y", "z"]
    assert np.array_equal(first.labels, second.labels)
    assert first.groups == second.groups == ["pa", "pb", "pb", "pc", "pd", "pe"]
    assert second.source["origin"] == first.source
    assert all(np.array_equal(pixels(first, name), pixels(second, name)) for name in first.names)


def test_a_phantom_stays_one_when_converted(tmp_path):
    metadata = json.dumps({"labels": None, "source": {"phantom": True, "seed": 3}}).encode()
    source = make_zip(tmp_path / "phantom.zip", {"a.png": image(1), "dataset.json": metadata})
    run(source, tmp_path / "small.zip", width=16, height=16)
    assert ImageSet(tmp_path / "small.zip").source["phantom"] is True


def test_source_records_what_was_done_and_no_path(folder, tmp_path):
    (folder / "nv" / "f.png").write_bytes(b"")
    summary = run(folder, tmp_path / "set.zip", width=16, height=16, resize_filter="box", max_bad=0.2)
    source = ImageSet(tmp_path / "set.zip").source
    assert summary.kept == 6
    content_hash = source.pop("images_sha256")
    assert re.fullmatch("[0-9a-f]{64}", content_hash)
    assert source == {
        "tool": "dataset_tool.py", "kind": "image folder", "name": "lesions", "found": 7, "kept": 6,
        "dropped": {"unreadable: zero bytes": 1}, "converted": {"upscaled": 6}, "decoder_downscaling": False,
        "options": {"unlabelled": "error", "width": 16, "height": 16, "resize_filter": "box", "exact": False,
                    "max_bad": 0.2}}


def test_the_result_is_the_same_for_any_number_of_workers(tmp_path):
    files = {f"{number % 3}/{number:03d}.png": image(number % 40, size=8 + number % 5, channels=3 if number % 7 else 1)
             for number in range(90)}
    files |= {"1/bad.png": b"", "2/cut.png": image(1, 40)[:700]}
    folder, results, reports = make_folder(tmp_path / "in", files), [], []
    for workers in (1, 2, 3):
        dest, report = tmp_path / f"{workers}.zip", tmp_path / f"{workers}.json"
        run(folder, dest, workers=workers, transform="center-crop", width=8, height=8, max_bad=0.1, report=report)
        results.append(dest.read_bytes())
        reports.append(report.read_bytes())
    assert results[0] == results[1] == results[2]
    assert reports[0] == reports[1] == reports[2]
    with zipfile.ZipFile(tmp_path / "2.zip") as archive:
        assert archive.testzip() is None


def test_a_zip_and_a_folder_of_the_same_images_give_the_same_images(folder, tmp_path):
    archive = make_zip(tmp_path / "lesions.zip", {path.relative_to(folder).as_posix(): path.read_bytes()
                                                  for path in sorted(folder.rglob("*.png"))}, zipfile.ZIP_DEFLATED)
    run(folder, tmp_path / "a.zip")
    run(archive, tmp_path / "b.zip", workers=2)
    a, b = ImageSet(tmp_path / "a.zip"), ImageSet(tmp_path / "b.zip")
    assert [a.read(name) for name in a.names] == [b.read(name) for name in b.names]
    assert a.source["images_sha256"] == b.source["images_sha256"]


@pytest.mark.parametrize(("options", "message"), [
    ({"transform": "centre"}, "--transform=centre; expected center-crop or center-crop-wide"),
    ({"resize_filter": "cubic"}, "--resize-filter=cubic; expected box or lanczos"),
    ({"max_bad": 1.5}, "--max-bad=1.5; expected a share from 0 to 1, or from 0% to 100%"),
    ({"max_images": 0}, "--max-images=0; expected at least 1"),
    ({"seed": 3}, "--seed=3 draws the images of --max-images, which is not given; add it, or leave --seed out"),
    ({"seed": -1, "max_images": 3}, "--seed=-1; expected a number from 0 to 4294967295"),
    ({"unlabelled": "skip"}, "--unlabelled=skip; expected one of error, drop, keep"),
    ({"workers": 0}, "--workers=0; expected at least 1"),
    ({"width": 8}, "--height is missing; expected both, or --resolution=WIDTHxHEIGHT"),
    ({"id_column": "x"}, "--id-column names a column, but there is no table; add --labels=FILE"),
    ({"transform": "center-crop-wide"},
     "--transform=center-crop-wide needs a size; add for example --resolution=256x192"),
    ({"report": "/nowhere/r.json"}, "--report=/nowhere/r.json: there is no folder /nowhere; make it first"),
    ({"merge": "bad=nv,scc"}, "--merge=bad=nv,scc takes scc into bad, but there is no class scc; expected some of mel, "
                              "nv, vasc"),
    ({"width": 8, "height": 4}, "--resolution=8x4 is not square; expected equal sides, such as 8x8, or "
                                "--transform=center-crop-wide, which pads with black to a square"),
    ({"width": 100, "height": 100}, "--resolution=100x100: 100 is not a power of two from 8 to 2048, as networks "
                                    "take; expected for example 128x128"),
    *(({"width": side, "height": side}, f"--resolution={side}x{side}: {side} is not a power of two from 8 to 2048, as "
       f"networks take; expected for example {near}x{near}") for side, near in ((4, 8), (4096, 2048), (8192, 2048))),
    ({"transform": "center-crop-wide", "width": 100, "height": 75},
     "--resolution=100x75: 100 is not a power of two from 8 to 2048, as networks take; expected for example 128x96"),
    ({"transform": "center-crop-wide", "width": 8, "height": 16},
     "--resolution=8x16 is higher than wide; center-crop-wide expects the width first, such as 8x6")])
def test_options_that_do_not_fit_raise(options, message, folder, tmp_path):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(folder, tmp_path / "set.zip", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lesions"]


def test_dest_that_is_the_source_or_the_report_raises(folder, tmp_path):
    source = make_zip(tmp_path / "in.zip", {"a.png": image(1)})
    with pytest.raises(UserError, match=r"^--dest=\S+ is the source itself; choose another name$"):
        run(source, source)
    with pytest.raises(UserError, match=r"^--report=\S+ is --dest; choose another name$"):
        run(folder, tmp_path / "set.zip", report=tmp_path / "set.zip")


PEAK = """
import io, sys
from imagesets.convert import convert
convert(sys.argv[1], sys.argv[2], workers=2, stream=io.StringIO())
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(("count", "size", "limit"), [
    # Of each image stay its name, its entry in the zip's directory, a group and a digest: 800 bytes, seen.
    pytest.param(3000, 64, 3000),  # a PNG has 12 kB
    pytest.param(20000, 32, 1500, marks=pytest.mark.slow)])  # and 3 kB here
def test_memory_grows_by_less_than_the_limit_an_image(count, size, limit, tmp_path):
    peaks = []
    for number in (1000, 1000 + count):
        images = noise(0, number, size, size, 3)
        np.savez(tmp_path / "in.npz", train_images=images, train_labels=np.zeros((number, 1), dtype=np.uint8))
        code = [sys.executable, "-c", PEAK, str(tmp_path / "in.npz"), str(tmp_path / "out.zip")]
        done = subprocess.run(code, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent.parent)
        peaks.append(int(done.stdout) * 1024)
    assert (peaks[1] - peaks[0]) / count < limit


# ---- the same classes get the same numbers


def test_classes_of_folders_a_table_and_arrays_get_the_same_numbers(tmp_path):
    names, expected = [str(number) for number in range(12)], list(range(12))
    make_folder(tmp_path / "folders", {f"{name}/{index:02d}.png": image(index) for index, name in enumerate(names)})
    make_folder(tmp_path / "flat", {f"{index:02d}.png": image(index) for index in expected})
    (tmp_path / "table.csv").write_text("image,grade\n" + "".join(
        f"{index:02d},{name}\n" for index, name in reversed(list(enumerate(names)))))
    numbers = np.arange(12, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_images=noise(0, len(names), 8, 8, 3), train_labels=numbers[:, None])
    make_idx(tmp_path / "train-images-idx3-ubyte.gz", noise(0, len(names), 8, 8))
    make_idx(tmp_path / "train-labels-idx1-ubyte.gz", numbers)
    table = {"labels": str(tmp_path / "table.csv"), "id_column": "image", "label_column": "grade"}
    for source, options in (("folders", {}), ("flat", table), ("a.npz", {}), ("train-images-idx3-ubyte.gz", {})):
        run(tmp_path / source, tmp_path / "set.zip", **options)
        run(tmp_path / "set.zip", tmp_path / "again.zip")
        for path in ("set.zip", "again.zip"):
            found = ImageSet(tmp_path / path)
            # Images of folders come by name: 0/, 1/, 10/.
            assert found.labels.tolist() == ([int(name) for name in sorted(names)] if source == "folders" else expected)
            assert class_names(found) == names


def test_numeric_classes_with_gaps_of_folders_and_a_table_get_the_same_numbers(tmp_path):
    names = ["2", "3", "10"]
    make_folder(tmp_path / "folders", {f"{name}/{name}.png": image(index) for index, name in enumerate(names)})
    (tmp_path / "table.csv").write_text("image,grade\n10,10\n3,3\n2,2\n")
    for options in ({}, {"labels": str(tmp_path / "table.csv"), "id_column": "image", "label_column": "grade"}):
        run(tmp_path / "folders", tmp_path / "set.zip", **options)
        found = ImageSet(tmp_path / "set.zip")
        assert (found.labels.tolist(), found.classes) == ([2, 0, 1], names)  # the images come by name: 10/, 2/, 3/


def test_classes_given_override_the_order_of_numbers(tmp_path):
    make_folder(tmp_path / "folders", {f"{name}/a{name}.png": image(name) for name in (1, 2, 10)})
    run(tmp_path / "folders", tmp_path / "set.zip", classes="10,1,2")
    found = ImageSet(tmp_path / "set.zip")
    assert (found.classes, found.labels.tolist()) == (["10", "1", "2"], [1, 0, 2])


# ---- several sources


HAM = "lesion_id,image_id,dx,dx_type,age,sex,localization\n"


@pytest.fixture
def halves(tmp_path):
    """A set of five images in two folders, with one table; lesion L2 has an image in both."""
    make_folder(tmp_path / "part_1", {f"ISIC_{number}.png": image(number) for number in (5, 6, 7)})
    make_folder(tmp_path / "part_2", {f"ISIC_{number}.png": image(number) for number in (1, 2)})
    (tmp_path / "table.csv").write_text(HAM + "".join(f"{row},,,,\n" for row in (
        "L1,ISIC_1,nv", "L2,ISIC_2,mel", "L2,ISIC_5,mel", "L3,ISIC_6,nv", "L4,ISIC_7,bcc")))
    return tmp_path


@pytest.mark.parametrize("zipped", [False, True])
def test_two_sources_of_one_set_are_read_one_after_the_other_with_one_table(halves, zipped):
    parts = [halves / "part_1", halves / "part_2"]
    if zipped:  # with its enclosing folder
        parts[1] = make_zip(halves / "part_2.zip", {f"part_2/{path.name}": path.read_bytes()
                                                    for path in parts[1].iterdir()})
    summary = run(parts, halves / "set.zip", labels=str(halves / "table.csv"), report=halves / "report.json", workers=2)
    found = ImageSet(halves / "set.zip")
    for name, seed in zip(found.names, (5, 6, 7, 1, 2), strict=True):
        assert np.array_equal(pixels(found, name), noise(seed, 8, 8, 3))
    assert (found.classes, found.labels.tolist()) == (["bcc", "mel", "nv"], [1, 2, 0, 2, 1])
    assert found.groups == ["L2", "L3", "L4", "L1", "L2"]
    kinds = ["image folder", "zip of images" if zipped else "image folder"]
    counts = [{"name": path.name, "kind": kind, "found": count, "kept": count}
              for path, kind, count in zip(parts, kinds, (3, 2))]
    assert read_json(halves / "report.json")["sources"] == counts
    assert found.source["sources"] == counts
    assert summary.lines[1:4] == [
        f"  found 5 in part_1 + {parts[1].name} ({' + '.join(dict.fromkeys(kinds))}), kept 5, dropped 0",
        "  from part_1 (image folder): found 3, kept 3", f"  from {parts[1].name} ({kinds[1]}): found 2, kept 2"]
    assert summary.rows_without_an_image == 0


def test_kept_images_are_counted_by_source(halves):
    (halves / "part_1/ISIC_6.png").write_bytes(b"")
    run([halves / "part_1", halves / "part_2"], halves / "set.zip", labels=str(halves / "table.csv"), classes="nv,mel",
        report=halves / "report.json", max_bad=0.5)
    report = read_json(halves / "report.json")
    assert [(part["found"], part["kept"]) for part in report["sources"]] == [(3, 1), (2, 2)]
    assert report["dropped"]["unreadable: zero bytes"]["names"] == ["part_1/ISIC_6.png"]


def test_a_name_in_two_sources_is_two_images_and_reported(halves):
    make_folder(halves / "part_2", {"ISIC_5.png": image(50), "ISIC_6.png": image(6)})
    summary = run([halves / "part_1", halves / "part_2"], halves / "set.zip", report=halves / "report.json")
    found = ImageSet(halves / "set.zip")
    assert summary.kept == 7
    assert np.array_equal(pixels(found, found.names[5]), noise(50, 8, 8, 3))
    report = read_json(halves / "report.json")
    assert report["names_in_several_sources"] == {"count": 2, "names": ["ISIC_5.png", "ISIC_6.png"]}
    assert report["duplicates"] == [["part_1/ISIC_6.png", "part_2/ISIC_6.png"]]
    assert found.groups[1] == found.groups[6]
    assert len(set(found.groups)) == 6
    assert "  names in several sources: 2 (ISIC_5.png, ISIC_6.png); all these images are kept" in summary.lines


def test_tables_tell_images_of_several_sources_apart_by_their_folders(halves):
    make_folder(halves / "part_2", {"ISIC_5.png": image(50)})
    (halves / "t.csv").write_text("image,dx\n" + "".join(f"{row}\n" for row in (
        "part_1/ISIC_5.png,a", "part_2/ISIC_5.png,b", "part_1/ISIC_6.png,a", "part_1/ISIC_7.png,a",
        "part_2/ISIC_1.png,b", "part_2/ISIC_2.png,b")))
    run([halves / "part_1", halves / "part_2"], halves / "set.zip", labels=str(halves / "t.csv"), id_column="image",
        label_column="dx")
    assert ImageSet(halves / "set.zip").labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("first", "second", "classes", "labels"), [
    (["mel/a", "nv/b"], ["bcc/c", "nv/d"], ["bcc", "mel", "nv"], [1, 2, 0, 2]),
    (["mel/a", "nv/b"], ["nv/c", "nv/d"], ["mel", "nv"], [0, 1, 1, 1]),
    (["mel/a", "nv/b"], ["bcc/c"], ["bcc", "mel", "nv"], [1, 2, 0]),
    (["x/mel/a", "x/nv/b"], ["bcc/c", "mel/d"], ["bcc", "mel", "nv"], [1, 2, 0, 1]),
    (["x/mel/a", "x/nv/b"], ["y/nv/c"], ["mel", "nv"], [0, 1, 1]),
    (["2/a", "10/b"], ["1/c", "10/d"], ["1", "2", "10"], [2, 1, 0, 2]),
    (["x/a"], ["y/b"], None, None)])
def test_class_folders_of_several_sources_are_joined_by_name(tmp_path, first, second, classes, labels):
    paths = [make_folder(tmp_path / name, {f"{file}.png": image(number * 10 + seed) for seed, file in enumerate(files)})
             for number, (name, files) in enumerate((("one", first), ("two", second)))]
    summary = run(paths, tmp_path / "set.zip")
    found = ImageSet(tmp_path / "set.zip")
    assert found.classes == classes
    assert (None if found.labels is None else found.labels.tolist()) == labels
    assert (classes is None) == any("x, y are not taken as classes" in line for line in summary.lines)


@pytest.mark.parametrize("several", [False, True])
def test_folders_that_look_like_parts_wait_for_a_word_of_the_user(tmp_path, several):
    files = {f"images_part_{part}/{name}.png": image(ord(name)) for part, name in ((1, "a"), (1, "b"), (2, "c"))}
    source = make_folder(tmp_path / "in", files)
    if several:
        source = [source, make_folder(tmp_path / "more", {"images_part_1/d.png": image(9), "images_part_2/e.png":
                                                          image(10)})]
    with pytest.raises(UserError, match=r"the folders images_part_1, images_part_2 look like parts of a data set, not"):
        run(source, tmp_path / "set.zip")
    assert not (tmp_path / "set.zip").exists()
    counts = run(source, tmp_path / "set.zip", folders="classes").class_counts
    assert counts == ({"images_part_1": 3, "images_part_2": 2} if several else {"images_part_1": 2, "images_part_2": 1})
    assert ImageSet(tmp_path / "set.zip").source["options"]["folders"] == "classes"
    run(source, tmp_path / "none.zip", folders="ignore")
    assert ImageSet(tmp_path / "none.zip").labels is None
    (tmp_path / "t.csv").write_text("image,dx\n" + "".join(f"{name},{name in 'ab'}\n" for name in "abcde"))
    table = {"labels": tmp_path / "t.csv", "id_column": "image", "label_column": "dx"}
    assert run(source, tmp_path / "table.zip", **table).class_counts["True"] == 2
    with pytest.raises(UserError, match=r"^--folders=ignore and --labels are both given, and a table takes the place"):
        run(source, tmp_path / "x.zip", folders="ignore", **table)


def test_folders_of_archives_that_bring_labels_are_not_asked_about(folder, tmp_path):
    run(folder, tmp_path / "ready.zip")
    np.savez(tmp_path / "set.npz", train_images=noise(0, 2, 8, 8), train_labels=[[0], [1]])
    for name, kind in (("ready.zip", "zip of images with dataset.json"), ("set.npz", "MedMNIST npz")):
        with pytest.raises(UserError) as caught:
            run(tmp_path / name, tmp_path / "x.zip", folders="ignore")
        assert str(caught.value) == f"--folders: {name} ({kind}) brings its own labels; leave the option out"
    run([tmp_path / "ready.zip", folder], tmp_path / "both.zip", folders="ignore", unlabelled="keep")
    assert ImageSet(tmp_path / "both.zip").labels.tolist() == [0, 0, 1, 1, 1, 2, *[NO_LABEL] * 6]


def test_an_image_without_a_class_folder_beside_sources_with_some_is_unlabelled(tmp_path):
    make_folder(tmp_path / "one", {"mel/a.png": image(1), "nv/b.png": image(2)})
    make_folder(tmp_path / "two", {"c.png": image(3)})
    with pytest.raises(UserError, match=r"^1 of 3 images have no label \(two/c\.png\); expected a label for each"):
        run([tmp_path / "one", tmp_path / "two"], tmp_path / "set.zip")


def make_labelled(path, labels, classes, groups=None, seed=0, source=None):
    with ImageSetWriter(path, classes=classes, source=source) as writer:
        for index, label in enumerate(labels):
            writer.add(image(seed + index), label, None if groups is None else groups[index])
    return path


def test_data_sets_of_the_same_classes_are_joined_by_the_names_of_these(tmp_path):
    one = make_labelled(tmp_path / "one.zip", [0, 1, 1], ["mel", "nv"], ["p", "00000/img00000001.png", None])
    two = make_labelled(tmp_path / "two.zip", [0, 1, None], ["nv", "mel"], ["p", "00000/img00000001.png", None], seed=5,
                        source={"phantom": True})
    folders = make_folder(tmp_path / "folders", {"nv/x.png": image(20)})
    run([one, two, folders], tmp_path / "set.zip", unlabelled="keep", report=tmp_path / "report.json")
    found = ImageSet(tmp_path / "set.zip")
    assert (found.classes, found.labels.tolist()) == (["mel", "nv"], [0, 1, 1, 1, 0, NO_LABEL, 1])
    assert found.groups[0] == found.groups[3] == "p"
    assert len(set(found.groups)) == 6  # a group named after an image of one set is no group of the other
    assert found.source["phantom"] is True
    assert read_json(tmp_path / "report.json")["names_in_several_sources"]["count"] == 0  # numbers are no names


@pytest.mark.parametrize(("one", "two", "message"), [
    (([0, 1], ["mel", "nv"]), ([0, 1], ["bcc", "nv"]),
     "the classes of one.zip are mel, nv, those of two.zip bcc, nv; expected the same in both: make both with the same "
     "--classes, or give --labels"),
    (([0, 1], ["mel", "nv"]), ([0, 1], None),
     "the classes of one.zip are mel, nv, those of two.zip numbers without names; expected the same in both: make both "
     "with the same --classes, or give --labels"),
    (([0, 1], ["mel", "nv"]), ([[0.5, 0.5]], ["mel", "nv"]),
     "the labels of one.zip are classes, those of two.zip lists of 2 numbers; expected one kind: convert each alone, "
     "or give --labels"),
    (([0, 1], ["mel", "nv"]), "folders",
     "one.zip has the classes mel, nv as labels, and the folders of other sources are named bcc, nv; expected the same "
     "classes in all: convert each alone, or give --labels"),
    (([0, 1], None), "folders",
     "one.zip has numbers of classes without names as labels, and the folders of other sources are named bcc, nv; "
     "expected the same classes in all: convert each alone, or give --labels")])
def test_sources_of_other_classes_are_refused_unless_a_table_labels_them(tmp_path, one, two, message):
    one = make_labelled(tmp_path / "one.zip", *one)
    if two == "folders":
        two = make_folder(tmp_path / "folders", {"bcc/x.png": image(20), "nv/y.png": image(21)})
    else:
        two = make_labelled(tmp_path / "two.zip", *two, seed=5)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run([one, two], tmp_path / "set.zip")
    assert not (tmp_path / "set.zip").exists()
    (tmp_path / "t.csv").write_text("image,dx\n" + "".join(f"{name},a\n" for name in (
        "img00000000", "img00000001", "x", "y")))
    assert run([one, two], tmp_path / "set.zip", labels=str(tmp_path / "t.csv"), id_column="image",
               label_column="dx").class_counts["a"] in (3, 4)


def test_numbers_without_names_of_several_data_sets_stay(tmp_path):
    one = make_labelled(tmp_path / "one.zip", [3, 1], None)
    two = make_labelled(tmp_path / "two.zip", [2, 0], None, seed=5)
    run([one, two], tmp_path / "set.zip")
    assert ImageSet(tmp_path / "set.zip").labels.tolist() == [3, 1, 2, 0]


def test_sources_of_one_folder_name_are_told_apart_by_more_of_their_paths(tmp_path):
    paths = [make_folder(tmp_path / name / "images", {"a.png": image(seed)}) for seed, name in enumerate("xy")]
    run(paths, tmp_path / "set.zip")
    assert ImageSet(tmp_path / "set.zip").source["name"] == "x/images + y/images"


def test_a_source_given_twice_or_inside_another_is_refused(halves):
    (halves / "link").symlink_to("part_1")
    for paths, message in [
            (["part_1", "part_1"], "--source={0}/part_1 is given twice; expected each folder or archive once"),
            (["part_1", "part_2", "link"],
             "--source={0}/link is given twice, also as {0}/part_1; expected each folder or archive once"),
            ([".", "part_1"], "--source={0}/part_1 lies in --source={0}, which is read with all its folders; leave one "
                              "of the two out"),
            (["part_1", "set.npz"], "--source: set.npz (MedMNIST npz) cannot be joined with others; expected folders "
                                    "or zips of images: convert it alone")]:
        np.savez(halves / "set.npz", train_images=noise(0, 2, 8, 8))
        with pytest.raises(UserError, match=f"^{re.escape(message.format(halves))}$"):
            run([halves / path for path in paths], halves / "set.zip")
