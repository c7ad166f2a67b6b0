"""imagesets.inspect: counts, problems and readiness; identical images; the command `inspect`."""

import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from dnnlib.cli import run
from imagesets.commands import describe, inspect_command
from imagesets.inspect import measure, open_for_inspection, summarize
from imagesets.pixel_hashes import identical_sets, link_groups
from imagesets.writer import ImageSetWriter
from tests.helpers.make_sets import enclose, make_set, pixels_of, png


def inspect(path, workers=1):
    images, fault = open_for_inspection(path)
    return summarize(images, measure(images, workers=workers), fault)


def problems_of(path):
    return {problem.kind: problem for problem in inspect(path).problems}


def write(path, items, classes=None):
    """Write a set of (image bytes, label, group)."""
    with ImageSetWriter(path, classes=classes) as writer:
        for data, label, group in items:
            writer.add(data, label, group)
    return path


def image(size=(16, 16), mode="RGB", kind="png", seed=0):
    file = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def png16():
    file = io.BytesIO()
    PIL.Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)).save(file, "png")
    return file.getvalue()


NAMES = [f"00000/img{index:08d}.png" for index in range(20)]


# ---- counts


def test_summarize_counts_classes_groups_and_sizes(tmp_path):
    path = make_set(tmp_path / "set.zip", 8, size=16, labels=[0, 0, 0, 0, 0, 0, 1, 1], classes=["benign", "melanoma"],
                    groups=["p", "p", "q", "q", None, None, "p", "r"])
    found = inspect(path)
    assert [(one.index, one.name, one.num_images, one.share, one.num_groups) for one in found.classes] == [
        (0, "benign", 6, 0.75, 4), (1, "melanoma", 2, 0.25, 2)]
    assert (found.num_images, found.num_groups, found.num_unlabeled, found.label_kind) == (8, 5, 0, "classes")
    assert (found.num_mixed_groups, found.mixed_groups) == (1, ["p"])
    assert (found.sizes, found.modes, found.kind) == ({"16x16": 8}, {"RGB": 8}, "zip")
    assert found.num_bytes == sum(len(png(pixels_of(index, 16))) for index in range(8))
    assert (found.problems, found.ready, found.ready_with_labels, found.phantom) == ([], True, True, False)


def test_summarize_lists_count_numbers_above_a_half(tmp_path):
    path = make_set(tmp_path / "set.zip", 4, labels=[[1, 0, 0.5], [1, 1, 0], [0, 0, 0], [0.6, 0.4, 0]],
                    groups=["p", "p", "q", "q"])
    found = inspect(path)
    assert [(one.name, one.num_images, one.num_groups) for one in found.classes] == [("0", 3, 2), ("1", 1, 1),
                                                                                    ("2", 0, 0)]
    assert (found.label_kind, found.mixed_groups) == ("lists", ["p", "q"])


def test_summarize_lists_does_not_count_measures(tmp_path):
    # Whether a lesion is there, and the age of the patient.
    found = inspect(make_set(tmp_path / "set.zip", 3, labels=[[1, 45], [0, 62], [1, 80]], classes=["lesion", "age"]))
    assert [(one.index, one.name, one.num_images) for one in found.classes] == [(0, "lesion", 2)]
    assert found.problems == []
    assert "labels are lists of numbers; an image is of a class if its number is above 0.5:" in list(describe(found))


def test_summarize_unlabeled_set_is_ready_without_labels(tmp_path):
    found = inspect(make_set(tmp_path / "set.zip", 4, channels=1))
    assert (found.label_kind, found.num_unlabeled, found.classes) == (None, 4, [])
    assert (found.problems, found.ready, found.ready_with_labels, found.modes) == ([], True, False, {"L": 4})


def test_summarize_plain_folder_counts_sub_folders_and_other_files(tmp_path):
    for seed, name in enumerate(["mel/a.jpg", "mel/b.jpg", "nv/c.jpg"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image(kind="jpeg", seed=seed))
    (tmp_path / "truth.csv").write_text("image,label\n")
    found = inspect(tmp_path)
    assert (found.kind, found.folders, found.other_files) == ("folder", {"mel": 2, "nv": 1}, ["truth.csv"])


def test_summarize_tells_phantoms(tmp_path):
    with ImageSetWriter(tmp_path / "set.zip", source={"phantom": True, "seed": 3}) as writer:
        writer.add(image())
    found = inspect(tmp_path / "set.zip")
    assert (found.phantom, found.source) == (True, {"phantom": True, "seed": 3})


@pytest.mark.parametrize(("source", "line"), [
    ({"redistribution": True}, "redistribution   yes"), ({"redistribution": False}, "redistribution   no"),
    ({"phantom": True}, "redistribution   yes"), ({}, None)])
def test_describe_tells_whether_images_may_be_redistributed(tmp_path, source, line):
    with ImageSetWriter(tmp_path / "set.zip", source=source) as writer:
        writer.add(image())
    found = inspect(tmp_path / "set.zip")
    assert [text for text in describe(found) if text.startswith("redistribution")] == ([line] if line else [])
    assert found.source == source


def test_summarize_is_the_same_for_any_number_of_workers(tmp_path):
    items = [(image(seed=index % 60), index % 3, f"g{index // 2}") for index in range(90)] + [(b"", 0, None)]
    path = write(tmp_path / "set.zip", items)
    assert inspect(path, workers=1) == inspect(path, workers=3)


# ---- duplicates


def test_identical_sets_equals_a_search_of_all_pairs():
    random = np.random.RandomState(0)
    digests = random.randint(0, 2, (60, 1), dtype=np.uint8) * np.ones((1, 32), dtype=np.uint8)
    digests[:, 7] = random.randint(0, 12, 60)
    digests[:, 31] = random.randint(0, 2, 60)
    expected = {}
    for row, digest in enumerate(digests):
        expected.setdefault(digest.tobytes(), []).append(row)
    assert [run.tolist() for run in identical_sets(digests)] == [rows for rows in expected.values() if len(rows) > 1]


def test_link_groups_joins_chains_and_numbers_by_first_image():
    units, linked = link_groups(list("abacdd"), [np.array([1, 3])])
    assert (units.tolist(), linked) == ([0, 1, 0, 1, 2, 2], 1)
    units, linked = link_groups(list("dcba"), [np.array([0, 3]), np.array([2, 3])])
    assert (units.tolist(), linked) == ([0, 1, 0, 0], 2)


@pytest.mark.parametrize("seed", range(10))
def test_link_groups_equals_spreading_the_smallest_number(seed):
    random = np.random.RandomState(seed)
    groups = [f"g{index}" for index in random.randint(0, 25, 30)]
    identical = [np.sort(random.choice(30, 2, replace=False)) for _ in range(random.randint(1, 12))]
    expected = np.arange(30)
    for _ in range(30):
        for rows in [*identical, *(np.flatnonzero(np.array(groups) == group) for group in set(groups))]:
            expected[rows] = expected[rows].min()
    units, linked = link_groups(groups, identical)
    assert (units == np.unique(expected, return_inverse=True)[1]).all()
    assert linked == len(set(groups)) - len(set(expected.tolist()))


def test_summarize_duplicates_tells_contradictions_and_groups(tmp_path):
    same, other = image(seed=1), image(seed=2)
    path = write(tmp_path / "set.zip", [(same, 0, "p"), (other, 1, "q"), (same, 1, "r"), (same, 0, "p"),
                                        (other, 1, "q"), (image(seed=3), None, None)], classes=["nv", "mel"])
    found = inspect(path)
    assert found.num_duplicates == 3
    assert found.duplicates == [[NAMES[0], NAMES[2], NAMES[3]], [NAMES[1], NAMES[4]]]
    problems = problems_of(path)
    assert problems["contradictory labels"].files == [f"{NAMES[0]} (nv) = {NAMES[2]} (mel)"]
    assert problems["identical across groups"].files == [f"{NAMES[0]} = {NAMES[2]}"]
    assert [problems[kind].blocks for kind in ("contradictory labels", "identical across groups")] == [None, None]


# ---- problems


GOOD = image(seed=100)


@pytest.mark.parametrize(("bad", "kind", "file", "message"), [
    (b"", "damaged", "{} (zero bytes)", "1 file cannot be decoded: make or copy the set again"),
    (b"no picture", "damaged", "{} (not an image)", "1 file cannot be decoded: make or copy the set again"),
    (GOOD[:-300], "damaged", "{} (truncated)", "1 file cannot be decoded: make or copy the set again"),
    (image((32, 32)), "mixed sizes", "{}", "2 sizes; expected one: convert with --resolution"),
    (image((16, 8)), "not square", "{}", "1 image is not square: convert with --transform=center-crop"),
    (image((12, 12)), "not a power of two", "{}",
     "1 image has sides that are not a power of two: convert with a --resolution such as 256x256"),
    (image((4, 4)), "size out of range", "{}",
     "1 image is not 8 to 2048 pixels wide and high: convert with --resolution"),
    (image(mode="RGBA"), "mode", "{} (RGBA)", "1 image is neither RGB nor 8-bit gray: convert the set"),
    (image(mode="P"), "mode", "{} (P)", "1 image is neither RGB nor 8-bit gray: convert the set"),
    (png16(), "mode", "{} (I;16)", "1 image is neither RGB nor 8-bit gray: convert the set"),
    (image(mode="L"), "mixed modes", "{}", "1 gray image and 2 in color; expected one kind: convert the set"),
])
def test_find_problems_bad_image_is_named_and_blocks_training(tmp_path, bad, kind, file, message):
    path = write(tmp_path / "set.zip", [(GOOD, 0, None), (bad, 1, None), (image(seed=101), 0, None)])
    problem = problems_of(path)[kind]
    assert (problem.message, problem.files, problem.count, problem.blocks) == (
        message, [file.format(NAMES[1])], 1, "training")
    assert not inspect(path).ready


def test_find_problems_flipped_byte_in_the_zip_is_named(tmp_path):
    path = make_set(tmp_path / "set.zip", 3)
    data = bytearray(path.read_bytes())
    data[data.find(b"IDAT", data.find(b"IDAT") + 4) + 10] ^= 255
    path.write_bytes(data)
    assert problems_of(path)["damaged"].files == [f"{NAMES[1]} (damaged: Bad CRC-32 for file '{NAMES[1]}')"]


def test_find_problems_zero_byte_files_are_no_duplicates(tmp_path):
    assert inspect(write(tmp_path / "set.zip", [(b"", 0, None)] * 3)).num_duplicates == 0


def rewrite_metadata(path, change):
    """Replace dataset.json of a folder."""
    metadata = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps(change(metadata)))


def test_find_problems_missing_entries_and_nulls_are_counted(tmp_path):
    path = make_set(tmp_path / "set", 4, labels=[0, 1, None, 0])
    rewrite_metadata(path, lambda metadata: {"labels": metadata["labels"][:3]})
    problem = problems_of(path)["unlabeled"]
    assert problem.message == ("2 images without a label (1 not named in dataset.json): convert with "
                               "--unlabeled=drop, or run train.py without --cond")
    assert (problem.files, problem.blocks) == (NAMES[2:4], "labels")
    assert (inspect(path).ready, inspect(path).ready_with_labels) == (True, False)


@pytest.mark.parametrize(("change", "message"), [
    (lambda metadata: {"labels": [*metadata["labels"], ["gone.png", 0]]},
     "labels in dataset.json name 1 file that is not there (gone.png)"),
    (lambda metadata: {**metadata, "groups": {"gone.png": "p"}},
     "groups in dataset.json name 1 file that is not there (gone.png)"),
    (lambda metadata: {"labels": [[NAMES[0], 0], [NAMES[1], [0.5]]]},
     "labels in dataset.json are of mixed kinds (integers, lists of 1); expected integers, or lists of one length"),
    (lambda metadata: [], "dataset.json holds a list; expected an object with labels"),
])
def test_inspect_unfit_metadata_is_a_problem_and_images_are_still_looked_at(tmp_path, change, message):
    path = make_set(tmp_path / "set", 2, labels=[0, 1])
    rewrite_metadata(path, change)
    found = inspect(path)
    assert [(problem.kind, problem.blocks, problem.message) for problem in found.problems] == [
        ("dataset.json", "training", f"{message}; labels and groups were not read: make the set again")]
    assert (found.sizes, found.ready) == ({"8x8": 2}, False)


def test_find_problems_empty_class_is_told_but_blocks_nothing(tmp_path):
    path = make_set(tmp_path / "set.zip", 2, labels=[0, 2], classes=["a", "b", "c", "d"])
    problem = problems_of(path)["empty class"]
    assert (problem.message, problem.count, problem.blocks) == ("2 classes without an image: b, d", 2, None)
    assert inspect(path).ready_with_labels


def test_find_problems_name_twice_in_the_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        file.writestr("a.png", GOOD)
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("a.png", GOOD)
    assert problems_of(tmp_path / "set.zip")["repeated"].files == ["a.png"]


# ---- the command


def test_inspect_command_prints_a_table_for_people(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    items = [(image(seed=index), index % 2, f"p{index // 2}") for index in range(6)]
    write(tmp_path / "set.zip", [*items, (b"", 1, None)], classes=["benign", "melanoma"])
    assert run(inspect_command, ["set.zip", "--workers=1"]) == 0
    size = sum(len(data) for data, _, _ in items) / 1e6
    assert capsys.readouterr().out.splitlines() == [
        f"set.zip: zip, 7 images, {size:.1f} MB",
        "",
        "sizes            16x16",
        "modes            RGB",
        "groups           4; 3 with different labels (p0, p1, p2)",
        "without a label  0",
        "duplicates       0 images identical to an earlier one",
        "",
        "class  name      images  share  groups",
        "    0  benign         3  42.9%       3",
        "    1  melanoma       4  57.1%       4",
        "",
        "PROBLEM: damaged: 1 file cannot be decoded: make or copy the set again",
        f"    {NAMES[6]} (zero bytes)",
        "ready for training: no",
        "ready for training with labels: no",
    ]


def test_inspect_command_json_is_one_object_with_the_documented_keys(tmp_path, capsys):
    path = make_set(tmp_path / "set.zip", 3, labels=[0, 1, 1])
    assert run(inspect_command, [str(path), "--json", "--workers=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    for key in found:
        assert key in inspect_command.help
    assert (found["path"], found["num_images"], found["ready"], found["problems"]) == (str(path), 3, True, [])
    assert found["classes"][1] == {"index": 1, "name": "1", "num_images": 2, "share": 2 / 3, "num_groups": 2}
    assert found["num_unlabeled"] == found["num_unlabelled"] == 0  # the old name, for existing scripts


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: None, "{} does not exist; expected a data set: a zip or a folder of images"),
    (lambda path: path.mkdir(), "{} holds no images; expected files such as .png or .jpg"),
    (lambda path: path.write_bytes(b""),
     "{} cannot be read as a zip (File is not a zip file): it is truncated or not a zip; make or copy it again"),
])
def test_inspect_command_nothing_to_look_at_ends_with_2(tmp_path, capsys, make, message):
    path = tmp_path / "set"
    make(path)
    assert run(inspect_command, [str(path)]) == 2
    assert capsys.readouterr().err == f"error: {message.format(path)}\n"


def test_inspect_command_zip_cut_in_the_middle_ends_with_2(tmp_path, capsys):
    path = make_set(tmp_path / "set.zip", 20)
    path.write_bytes(path.read_bytes()[:3000])
    assert run(inspect_command, [str(path), f"--sheet={tmp_path / 'sheets'}"]) == 2
    assert "cannot be read as a zip" in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir()] == ["set.zip"]


def test_inspect_of_a_set_in_a_folder_inside_is_that_of_the_set(tmp_path):
    flat = make_set(tmp_path / "flat.zip", 6, size=16, labels=[0, 1, 1, 0, 1, 0], classes=["a", "b"],
                    groups=list("ppqqrr"))
    inside = enclose(flat, tmp_path / "inside.zip")
    assert replace(inspect(inside), path=str(flat)) == inspect(flat)
    assert inspect(inside).ready_with_labels


def test_inspect_of_a_set_in_a_folder_inside_that_lacks_images_is_not_ready(tmp_path):
    flat = make_set(tmp_path / "flat.zip", 6, size=16, labels=[0, 1, 1, 0, 1, 0])
    found = inspect(enclose(flat, tmp_path / "inside.zip", more={"other/a.png": image()}))
    assert not found.ready
    assert found.problems[0].message == (
        "dataset.json is in a subfolder (set/dataset.json), but images are outside of it (other/a.png); expected "
        "it at the top: give that subfolder, or zip its content without the subfolder; labels and groups were not "
        "read: make the set again")
