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
from imagesets.reader import ImageSet
from tests.helpers.make_archives import counts, encode, make_cifar, make_folder, make_idx, make_zip, noise


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
    assert (summary.report["found"], summary.report["kept"], counts(summary.report["dropped"])) == (6, 6, {})
    assert summary.report["classes"] == {"mel": 2, "nv": 3, "vasc": 1}


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
    assert len(set(groups)) == summary.report["num_groups"] == 5
    report = read_json(tmp_path / "report.json")
    assert report["duplicates"] == [["mel/b.png", "nv/b.png"]]
    assert report["contradictions"] == [{"mel/b.png": "mel", "nv/b.png": "nv"}]
    assert (sum(map(len, summary.report["duplicates"])), len(summary.report["contradictions"])) == (2, 1)
    assert "  contradiction among duplicates: mel/b.png is mel, nv/b.png is nv" in summary.lines
    for name in ("mel/c", "mel/d", "nv/c"):
        (folder / f"{name}.png").write_bytes((folder / "nv/b.png").read_bytes())
    assert ("  contradiction among duplicates: mel/b.png is mel, nv/b.png is nv, and 3 more"
            in run(folder, tmp_path / "more.zip").lines)


def test_a_set_that_is_there_twice_is_asked_about(tmp_path):
    files = {f"{folder}_part_{part}/{part}.png": image(part) for folder in ("HAM", "ham") for part in (1, 2)}
    summary = run(make_folder(tmp_path / "in", files), tmp_path / "set.zip", folders="ignore")
    assert ("  duplicates: 4 images in 2 sets of identical files, each set in one group (HAM_part_1/1.png = "
            "ham_part_1/1.png); is every image there twice? Give each folder only once") in summary.lines


def test_an_unlabeled_duplicate_is_no_contradiction(folder, tmp_path):
    (folder / "nv/b.png").unlink()
    (folder / "b.png").write_bytes(image(2))
    summary = run(folder, tmp_path / "set.zip", unlabeled="keep")
    assert (sum(map(len, summary.report["duplicates"])), len(summary.report["contradictions"])) == (2, 0)


def test_classes_and_merge_choose_and_order(folder, tmp_path):
    summary = run(folder, tmp_path / "set.zip", merge="benign=nv,vasc", classes="benign", report=tmp_path / "r.json")
    result = ImageSet(tmp_path / "set.zip")
    assert result.classes == ["benign"]
    assert result.labels.tolist() == [0, 0, 0, 0]
    assert counts(summary.report["dropped"]) == {"class not chosen": 2}
    assert read_json(tmp_path / "r.json")["dropped"]["class not chosen"]["names"] == ["mel/a.png", "mel/b.png"]


def test_max_images_draws_from_the_classes_chosen_and_counts_the_rest(folder, tmp_path):
    summary = run(folder, tmp_path / "set.zip", classes="nv", max_images=2, report=tmp_path / "r.json")
    assert (summary.report["found"], summary.report["kept"]) == (6, 2)
    assert counts(summary.report["dropped"]) == {"class not chosen": 3, "not drawn for --max-images": 1}
    assert "  subset: 2 of 3 images, chosen at random (--max-images, --seed): nv 2 of 3" in summary.lines
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
    return [hash(found.read(name)) for name in found.names], list(summary.report["classes"].values())


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
    assert "  subset: 6 of 30 images, chosen at random (--max-images, --seed)" in summary.lines
    names = read_json_of(tmp_path / "set.zip")["pixel_hashes"]
    assert len(names) == 6
    first = [ImageSet(plain).read(f"{index:02d}.png") for index in range(6)]
    assert [ImageSet(tmp_path / "set.zip").read(name) for name in names] != first
    summary = run(archives["folder"][0], tmp_path / "all.zip", max_images=60)
    assert counts(summary.report["dropped"]) == {}
    assert not [line for line in summary.lines if "subset" in line]


def test_an_unlabeled_image_is_an_error_until_decided(folder, tmp_path):
    (folder / "stray.png").write_bytes(image(9))
    message = ("no label for 1 of 7 images (stray.png); expected a label for each: add them, or give "
               "--unlabeled=drop or --unlabeled=keep")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(folder, tmp_path / "set.zip", report=tmp_path / "r.json")
    assert not (tmp_path / "set.zip").exists()
    assert read_json(tmp_path / "r.json") == {"error": message, "found": 7, "unlabeled": ["stray.png"]}
    assert counts(run(folder, tmp_path / "drop.zip", unlabeled="drop").report["dropped"]) == {"no label": 1}
    summary = run(folder, tmp_path / "keep.zip", unlabeled="keep")
    assert summary.report["classes"] == {"mel": 2, "nv": 3, "vasc": 1, "(none)": 1}
    assert ImageSet(tmp_path / "keep.zip").labels.tolist() == [0, 0, 1, 1, 1, -1, 2]


def test_images_without_any_labels_need_no_decision(tmp_path):
    folder = make_folder(tmp_path / "plain", {"a.png": image(1), "b.png": image(2)})
    summary = run(folder, tmp_path / "set.zip")
    assert summary.report["classes"] is None
    assert ImageSet(tmp_path / "set.zip").labels is None
    with pytest.raises(UserError, match=r"^--classes: the images of plain have no labels; expected subfolders, a "):
        run(folder, tmp_path / "set.zip", classes="mel")


# patient p1 has a and b, p2 has c; e has no row, f no image
TABLE = "image_name,patient_id,benign_malignant,target\na,p1,benign,0\nb,p1,malignant,1\nc,p2,benign,0\nd,,benign,0\n" \
        "f,p3,benign,0\n"


def test_a_table_gives_labels_and_groups_and_counts_what_is_missing(tmp_path):
    files = {f"{name}.png": image(seed) for seed, name in enumerate("abcde")}
    source = make_zip(tmp_path / "images.zip", files)
    (tmp_path / "truth.csv").write_text(TABLE)
    options = {"labels": str(tmp_path / "truth.csv"), "report": tmp_path / "r.json"}
    message = r"^no label for 1 of 5 images, 1 of them without a row in the table \(e\.png\); "
    with pytest.raises(UserError, match=message):
        run(source, tmp_path / "set.zip", **options)
    summary = run(source, tmp_path / "set.zip", unlabeled="drop", **options)
    result = ImageSet(tmp_path / "set.zip")
    assert result.classes == ["benign", "malignant"]
    assert result.labels.tolist() == [0, 1, 0, 0]
    assert result.groups == ["p1", "p1", "p2", result.names[3]]
    report = read_json(tmp_path / "r.json")
    assert report["images_without_a_row"] == {"count": 1, "names": ["e.png"]}
    assert report["rows_without_an_image"] == {"count": 1, "names": ["f"]}
    assert (summary.report["images_without_a_row"]["count"], summary.report["rows_without_an_image"]["count"]) == (1, 1)
    assert result.source["options"]["labels"] == "truth.csv"


def test_duplicates_join_groups_and_images_of_one_row_share_theirs(tmp_path):
    files = {"a.png": image(1), "b.png": image(2), "c.png": image(1), "d.png": image(4), "x/d.png": image(5)}
    (tmp_path / "truth.csv").write_text(TABLE)
    summary = run(make_folder(tmp_path / "in", files), tmp_path / "set.zip", labels=str(tmp_path / "truth.csv"),
                  include=["*"])
    result = ImageSet(tmp_path / "set.zip")
    # a = c joins p1 and p2; d.png and x/d.png are of the row d, which names no patient.
    assert result.groups == ["p1", "p1", "p1", result.names[3], result.names[3]]
    assert summary.report["num_groups"] == 2


def test_a_table_without_a_row_for_any_image_raises(folder, tmp_path):
    (tmp_path / "truth.csv").write_text("id,kind\nISIC_1,mel\n")
    message = ("--labels: no image of lesions has a row; the images are named as mel/a.png, the rows as ISIC_1: choose "
               "the column with --id-column, or another table")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(folder, tmp_path / "set.zip", labels=str(tmp_path / "truth.csv"), id_column="id", label_column="kind")


def test_gray_images_stay_gray_only_among_themselves(tmp_path):
    gray = {f"{name}.png": image(seed, channels=1) for seed, name in enumerate("abc")}
    run(make_folder(tmp_path / "gray", gray), tmp_path / "gray.zip")
    result = ImageSet(tmp_path / "gray.zip")
    assert np.array_equal(pixels(result, result.names[1]), noise(1, 8, 8))
    summary = run(make_folder(tmp_path / "mixed", gray | {"d.png": image(4)}), tmp_path / "mixed.zip")
    result = ImageSet(tmp_path / "mixed.zip")
    assert np.array_equal(pixels(result, result.names[1]), np.repeat(noise(1, 8, 8)[:, :, None], 3, axis=2))
    assert counts(summary.report["converted"]) == {"gray to RGB": 3}


def test_dropped_images_do_not_decide_on_color(tmp_path):
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
    message = (f"3 of 9 images cannot be read (not an image: 1, truncated: 1, zero bytes: 1), more than --max-bad=0.3 "
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
    assert (summary.report["found"], summary.report["kept"]) == (9, 6)
    assert counts(summary.report["dropped"]) == {"unreadable: not an image": 1, "unreadable: truncated": 1,
                                                 "unreadable: zero bytes": 1}
    found = read_json(tmp_path / "r.json")
    assert {reason: entry["names"] for reason, entry in found["dropped"].items()} == {
        "unreadable: not an image": ["text.png"], "unreadable: truncated": ["cut.png"],
        "unreadable: zero bytes": ["empty.png"]}
    assert found["kept"] + sum(entry["count"] for entry in found["dropped"].values()) == found["found"]


def test_nothing_readable_raises_whatever_is_allowed(tmp_path):
    folder = make_folder(tmp_path / "in", {"a.png": b"", "b.png": b"x"})
    message = r"^2 of 2 images cannot be read \(.*\), none is left; list them with --report=FILE$"
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "set.zip", max_bad=1)
    assert not (tmp_path / "set.zip").exists()


@pytest.mark.parametrize(("sizes", "options", "message"), [
    ((8, 16), {}, "images differ in size: a.png is 8x8 but b.png is 16x16; expected one size: give --resolution=8x8, "
                  "with --transform=center-crop if they should not be stretched"),
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
    assert (summary.report["kept"], summary.report["resolution"]) == (1, 16)
    assert counts(summary.report["dropped"]) == {"smaller than the wide crop": 2}
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
    with pytest.raises(UserError, match=r"^--labels: set\.npz \(MedMNIST npz\) has its own labels; leave"):
        run(tmp_path / "set.npz", tmp_path / "out.zip", labels=str(tmp_path / "t.csv"))


def test_cifar_and_mnist_become_data_sets(tmp_path):
    images, labels = make_cifar(tmp_path / "cifar.tar.gz")
    run(tmp_path / "cifar.tar.gz", tmp_path / "cifar.zip", classes="cat,dog,ship", unlabeled="error")
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
    assert summary.report["kept"] == 6
    content_hash = source.pop("images_sha256")
    assert re.fullmatch("[0-9a-f]{64}", content_hash)
    assert source == {
        "tool": "dataset_tool.py", "kind": "image folder", "name": "lesions", "found": 7, "kept": 6,
        "dropped": {"unreadable: zero bytes": 1}, "converted": {"upscaled": 6}, "decoder_downscaling": False,
        "options": {"unlabeled": "error", "width": 16, "height": 16, "resize_filter": "box", "exact": False,
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
    ({"transform": "centre"}, "--transform is centre; expected center-crop or center-crop-wide"),
    ({"resize_filter": "cubic"}, "--resize-filter is cubic; expected box or lanczos"),
    ({"max_bad": 1.5}, "--max-bad=1.5; expected a share from 0 to 1, or from 0% to 100%"),
    ({"max_images": 0}, "--max-images=0; expected at least 1"),
    ({"seed": 3}, "--seed=3 is the random seed of --max-images, which is not given; expected both or neither"),
    ({"seed": -1, "max_images": 3}, "--seed=-1; expected a number from 0 to 4294967295"),
    ({"unlabeled": "skip"}, "--unlabeled=skip; expected one of error, drop, keep"),
    ({"workers": 0}, "--workers=0; expected at least 1"),
    ({"width": 8}, "--height is missing; expected both, or --resolution=WIDTHxHEIGHT"),
    ({"id_column": "x"}, "--id-column names a column, but there is no table; add --labels=FILE"),
    ({"transform": "center-crop-wide"},
     "--transform=center-crop-wide needs a size; give --resolution=WxH, for example 256x192"),
    ({"report": "/nowhere/r.json"}, "--report=/nowhere/r.json: there is no folder /nowhere; make it first"),
    ({"merge": "bad=scc"}, "--merge=bad=scc takes scc into bad, but there is no class scc; expected some of mel, nv, "
                           "vasc"),
    ({"width": 8, "height": 4}, "--resolution=8x4 is not square; expected equal sides, such as 8x8, or "
                                "--transform=center-crop-wide, which pads with black to a square"),
    ({"width": 100, "height": 100}, "--resolution=100x100: 100 is not a power of two from 8 to 2048; expected "
                                    "for example 128x128"),
    *(({"width": side, "height": side}, f"--resolution={side}x{side}: {side} is not a power of two from 8 to 2048; "
       f"expected for example {near}x{near}") for side, near in ((4, 8), (4096, 2048), (8192, 2048))),
    ({"transform": "center-crop-wide", "width": 100, "height": 75},
     "--resolution=100x75: 100 is not a power of two from 8 to 2048; expected for example 128x96"),
    ({"transform": "center-crop-wide", "width": 8, "height": 16},
     "--resolution=8x16 is taller than wide; --transform=center-crop-wide expects a wide size, such as 8x6")])
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
            assert found.class_names() == names


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
