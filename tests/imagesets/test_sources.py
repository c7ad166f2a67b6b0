"""imagesets.sources: files chosen by patterns of names; several folders and zips as one source."""

import io
import json
import re

import numpy as np
import PIL.Image
import pytest

from dnnlib.cli import UserError
from imagesets.classes import NO_LABEL
from imagesets.convert import convert
from imagesets.reader import ImageSet
from imagesets.sources import open_sources
from imagesets.writer import ImageSetWriter
from tests.helpers.make_archives import encode, make_folder, make_idx, make_zip, noise

HAM = "lesion_id,image_id,dx,dx_type,age,sex,localization\n"


def image(seed, size=8):
    return encode(noise(seed, size, size, 3))


def run(source, dest, **options):
    return convert(source, dest, **{"workers": 1, "stream": io.StringIO()} | options)


def pixels(data_set, name):
    return np.asarray(PIL.Image.open(io.BytesIO(data_set.read(name))))


def read_json(path):
    return json.loads(path.read_text())


def read_json_of(data_set):
    return json.loads(ImageSet(data_set).read("dataset.json"))


def names_left(path, include=(), exclude=()):
    return list(open_sources([path], include=include, exclude=exclude).names)


def table(folder, *names):
    path = folder / "table.csv"
    path.write_text(HAM + "".join(f"L{number},{name},{'mel' if number % 2 else 'nv'},,,,\n"
                                  for number, name in enumerate(names)))
    return str(path)


NAMES = ("images/A.JPG", "images/A_mask.png", "images/b.jpg", "masks/b.png", "masks/old/c.jpg")


@pytest.fixture(params=[make_folder, make_zip])
def lesions(request, tmp_path):
    return request.param(tmp_path / "lesions", {name: image(seed) for seed, name in enumerate(NAMES)})


@pytest.mark.parametrize(("include", "exclude", "left"), [
    (["*.jpg"], [], [0, 2, 4]), ([], ["*.PNG"], [0, 2, 4]), (["*.jpg", "*_mask.png"], [], [0, 1, 2, 4]),
    (["*.jpg"], ["masks/*"], [0, 2]), ([], ["masks/"], [0, 1, 2]), ([], ["*/old/*"], [0, 1, 2, 3]),
    ([], ["old/*"], [0, 1, 2, 3]), ([], ["masks\\*", "*_mask.*"], [0, 2]), (["?.jpg"], ["[bc].*"], [0]),
    (["b.*"], [], [2, 3]), (["images/b.jpg"], [], [2]), (["./images/*.jpg"], [], [0, 2]), ([], [], [0, 1, 2, 3, 4])])
def test_patterns_fit_names_or_ends_of_paths_in_any_case(lesions, include, exclude, left):
    assert names_left(lesions, include, exclude) == [NAMES[index] for index in left]


@pytest.mark.parametrize(("pattern", "left"), [
    ("ham_1/*", [0, 2, 3]), ("HAM_1/", [1, 2, 3]), ("Ham_1/*", [2, 3]), ("*.JPG", [1]),
    ("a.jpg", [0, 2, 3]), ("A.jpg", [2, 3])])
def test_case_decides_between_files_that_nothing_else_tells_apart(pattern, left, tmp_path):
    names = ("HAM_1/a.JPG", "ham_1/a.jpg", "ham_2/b.jpg", "ham_2/c.jpg")
    source = make_zip(tmp_path / "twice.zip", {name: image(seed) for seed, name in enumerate(names)})
    assert names_left(source, exclude=[pattern]) == [names[index] for index in left]


def test_files_left_out_are_neither_classes_nor_found_but_named(lesions, tmp_path):
    summary = run(lesions, tmp_path / "set.zip", exclude=["masks/*", "*_mask.png"], report=tmp_path / "r.json")
    found = ImageSet(tmp_path / "set.zip")
    assert (found.labels, summary.report["found"], summary.report["kept"], summary.report["duplicates"]) == (
        None, 2, 2, [])
    assert np.array_equal(found.names, ["00000/img00000000.png", "00000/img00000001.png"])
    assert json.loads((tmp_path / "r.json").read_text())["files_not_chosen"] == {
        "count": 3, "names": [NAMES[1], NAMES[3], NAMES[4]]}
    assert (f"  left out by --include and --exclude: 3 ({NAMES[1]}, {NAMES[3]}, {NAMES[4]})") in summary.lines
    assert found.source["options"]["exclude"] == ["masks/*", "*_mask.png"]
    assert "include" not in found.source["options"]


def test_a_pattern_picks_the_right_pixels_labels_and_groups_of_a_data_set(tmp_path):
    files = {f"{name}.png": image(seed) for seed, name in enumerate("abc")}
    metadata = {"labels": [["a.png", 0], ["b.png", 1], ["c.png", 1]], "classes": ["x", "y"],
                "groups": {"a.png": "p", "b.png": "q", "c.png": "q"}}
    source = make_zip(tmp_path / "in.zip", files | {"dataset.json": json.dumps(metadata).encode()})
    opened = open_sources([source], exclude=["a*"])
    assert (list(opened.names), opened.labels.tolist(), opened.classes) == (["b.png", "c.png"], [1, 1], ["x", "y"])
    assert list(opened.groups) == ["q", "q"]
    wanted = np.array([False, True])
    assert [opened.load(item) for item in opened.items(wanted)] == [image(2)]


@pytest.mark.parametrize("pattern", ["*_mask.png", "one/*_mask.png", "./ONE/a_*"])
def test_patterns_are_compared_below_each_of_several_sources_and_with_its_name(pattern, tmp_path):
    one = make_folder(tmp_path / "one", {"a.png": image(1), "a_mask.png": image(2)})
    two = make_zip(tmp_path / "two.zip", {"b.png": image(3), "c.png": image(4)})
    opened = open_sources([one, two], exclude=[pattern])
    assert list(opened.names) == ["one/a.png", "two.zip/b.png", "two.zip/c.png"]
    assert list(opened.not_chosen) == ["one/a_mask.png"]
    assert [opened.load(item) for item in opened.items(np.ones(3, dtype=bool))] == [image(1), image(3), image(4)]


def test_case_decides_between_sources_that_nothing_else_tells_apart(tmp_path):
    paths = [make_folder(tmp_path / name, {"a.png": image(1), "b.png": image(2)}) for name in ("x/HAM", "y/ham")]
    assert list(open_sources(paths, exclude=["ham/a.*"]).names) == ["HAM/a.png", "HAM/b.png", "ham/b.png"]


THERE = "the 5 images of lesions (.jpg 3, .png 2; images/A.JPG, images/A_mask.png, images/b.jpg, ...)"


@pytest.mark.parametrize(("options", "message"), [
    ({"exclude": ["*.gif"]}, f'--exclude="*.gif" matches none of {THERE}; expected a pattern of names, such as '
                             '"*.jpg", or of a folder, such as "masks/*"'),
    ({"include": ["MASKS"]}, f'--include="MASKS" matches none of {THERE}; the folder of that name is "MASKS/"'),
    ({"exclude": ["*.jpg", "*.png"]}, f"--include and --exclude leave none of {THERE}; expected patterns that leave "
                                      "some: change them"),
    ({"exclude": ["*.png", ""]}, '--exclude is empty; expected a pattern of file names, such as --exclude="*.png"')])
def test_patterns_that_fit_nothing_or_everything_are_refused(lesions, tmp_path, options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(lesions, tmp_path / "set.zip", **options)
    assert not (tmp_path / "set.zip").exists()


def test_archives_of_arrays_have_no_files_to_choose(tmp_path):
    path = make_idx(tmp_path / "t10k-images-idx3-ubyte.gz", noise(0, 2, 8, 8))
    make_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(2, dtype=np.uint8))
    with pytest.raises(UserError, match=r"^--exclude: t10k-images-idx3-ubyte\.gz \(MNIST\) does not consist of "
                                        "files; leave the "):
        open_sources([path], exclude=["*.png"])


@pytest.mark.parametrize(("files", "message"), [
    (["1.jpg", "1.png", "2.jpg", "2.png", "3.jpg", "3.png"],
     "--labels: 3 of the table's 3 rows match several files (1.jpg and 1.png; 2.jpg and 2.png; ...); expected one "
     'image per row: choose the files, for example by --include="*.jpg" or --exclude="*.png", or take all with '
     '--include="*"'),
    (["1.jpg", "2.jpg", "2.png", "3.jpg"],
     "--labels: 1 of the table's 3 rows matches several files (2.jpg and 2.png); expected one image per row: choose "
     'the files, for example by --include="*.jpg" or --exclude="*.png", or take all with --include="*"'),
    (["annotations/1.png", "images/1.JPG", "images/2.jpg"],  # the photograph, whichever comes first
     "--labels: 1 of the table's 3 rows matches several files (annotations/1.png and images/1.JPG); expected one image "
     'per row: choose the files, for example by --include="*.jpg" or --exclude="*.png", or take all with '
     '--include="*"'),
    (["images/1.png", "images/2.png", "images/3.png", "masks/1.png", "masks/3.png"],
     "--labels: 2 of the table's 3 rows match several files (images/1.png and masks/1.png; images/3.png and "
     'masks/3.png); expected one image per row: choose the files, for example by --exclude="images/*" or '
     '--exclude="masks/*", or take all with --include="*"')])
def test_a_row_of_several_files_is_an_error_until_patterns_say_which(files, message, tmp_path):
    source = make_folder(tmp_path / "in", {name: image(seed) for seed, name in enumerate(files)})
    labels = table(tmp_path, "1", "2", "3")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(source, tmp_path / "set.zip", labels=labels, unlabeled="drop", report=tmp_path / "r.json")
    assert not (tmp_path / "set.zip").exists()
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["error"], report["found"]) == (message, len(files))
    assert all(len(names) == 2 for names in report["rows_of_several_files"].values())
    for advice in re.findall(r'--(\w+)="([^"]+)"', message):
        chosen = {advice[0]: [advice[1]]}
        summary = run(source, tmp_path / "set.zip", labels=labels, unlabeled="drop", **chosen)
        assert summary.report["kept"] == (len(files) if advice[1] == "*" else len(names_left(source, **chosen)))


def test_a_set_that_a_zip_holds_twice_is_refused_with_a_table_until_one_is_left_out(tmp_path):
    folders = [f"{name}_images_part_{part}" for name in ("HAM10000", "ham10000") for part in (1, 2)]
    source = make_zip(tmp_path / "kaggle.zip", {f"{folder}/{int(folder[-1]) * 10 + number}.jpg": image(number)
                                                for folder in folders for number in (0, 1)})
    labels = table(tmp_path, "10", "11", "20", "21")
    with pytest.raises(UserError) as caught:
        run(source, tmp_path / "set.zip", labels=labels)
    assert str(caught.value) == (
        "--labels: 4 of the table's 4 rows match several files (HAM10000_images_part_1/10.jpg and "
        "ham10000_images_part_1/10.jpg; HAM10000_images_part_1/11.jpg and ham10000_images_part_1/11.jpg; ...); "
        'expected one image per row: choose the files, for example by --exclude="HAM10000_images_part_1/*" '
        '--exclude="HAM10000_images_part_2/*" or --exclude="ham10000_images_part_1/*" '
        '--exclude="ham10000_images_part_2/*", or take all with --include="*"')
    for name in ("HAM10000", "ham10000"):
        patterns = [f"{name}_images_part_{part}/*" for part in (1, 2)]
        with pytest.raises(UserError, match=r"^--labels: 4 of the table's 4 rows match several files \(HAM10000_ima"):
            run(source, tmp_path / "set.zip", labels=labels, include=["*.jpg"])  # does not distinguish the two
        summary = run(source, tmp_path / "set.zip", labels=labels, exclude=patterns)
        assert (summary.report["found"], summary.report["kept"]) == (4, 4)
        assert summary.report["rows_without_an_image"]["count"] == 0
    lines = run(source, tmp_path / "set.zip", labels=labels, include=["*"]).lines
    assert [line for line in lines if line.endswith("is every image there twice? Give each folder only once")]


def test_an_image_and_its_mask_in_two_sources_are_told_by_their_endings(tmp_path):
    one = make_folder(tmp_path / "one", {"1.jpg": image(1), "2.jpg": image(2)})
    two = make_folder(tmp_path / "two", {"1.png": image(3)})
    labels = table(tmp_path, "1", "2")
    with pytest.raises(UserError, match=r"^--labels: 1 of the table's 2 rows matches several files \(one/1\.jpg and "
                       r".* the files, for example by leaving out the --source of two, or take all w"):
        run([one, two], tmp_path / "set.zip", labels=labels)
    with pytest.raises(UserError, match=r"^--include and --exclude leave none of the 1 image of two .*; expected "
                       r"patterns that leave some: change them, or leave this --source out$"):
        run([one, two], tmp_path / "set.zip", labels=labels, include=["*.jpg"])
    make_folder(two, {"1.jpg": image(1)})
    (two / "1.png").unlink()  # overlapping parts of one set
    assert run([one, two], tmp_path / "set.zip", labels=labels).report["kept"] == 3


def test_masks_without_a_row_are_an_error_that_names_their_pattern(tmp_path):
    files = {f"ISIC_{number}{tail}": image(number) for number in (1, 2) for tail in (".jpg", "_superpixels.png")}
    source, labels = make_folder(tmp_path / "in", files), table(tmp_path, "ISIC_1", "ISIC_2")
    message = ("no label for 2 of 4 images, 2 of them without a row in the table (ISIC_1_superpixels.png, "
               "ISIC_2_superpixels.png); expected a label for each: add them, leave them out "
               '(--exclude="*_superpixels.png"), or give --unlabeled=drop or --unlabeled=keep')
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(source, tmp_path / "set.zip", labels=labels)
    assert run(source, tmp_path / "set.zip", labels=labels, exclude=["*_superpixels.png"]).report["kept"] == 2
    (tmp_path / "table.csv").write_text(f"{HAM}L1,ISIC_1,,,,,\n")  # no image has a label, so nothing to compare with
    with pytest.raises(UserError, match=r"expected a label for each: add them, or give --unlabeled=drop or "):
        run(source, tmp_path / "set.zip", labels=labels)


@pytest.mark.parametrize(("files", "note"), [
    (["1.jpg", "1.png", "2.jpg"], "the names of 2 images differ only in the ending (1.jpg, 1.png); if some are "
                                  'masks, leave them out, for example with --exclude="*.png"'),
    (["1.jpg", "1_mask.png"], "1 image is named after others (1_mask.png); if they are masks, leave them out with "
                              '--exclude="*_mask.png"'),
    (["1.jpg", "2.png", "x_mask.png"], None)])
def test_masks_are_noted_where_no_table_tells(files, note, tmp_path):
    source = make_folder(tmp_path / "in", {name: image(seed) for seed, name in enumerate(files)})
    notes = [line for line in run(source, tmp_path / "set.zip").lines if line.startswith("  note: ")]
    assert notes == ([] if note is None else [f"  note: {note}"])


# ---- several sources


@pytest.fixture
def labeled_folder(tmp_path):
    """Six 8x8 images of three classes; b is the same file twice, in two classes."""
    files = {f"{label}/{name}.png": image(seed) for label, name, seed in [
        ("mel", "a", 1), ("mel", "b", 2), ("nv", "b", 2), ("nv", "c", 3), ("nv", "d", 4), ("vasc", "e", 5)]}
    return make_folder(tmp_path / "lesions", files)


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
    assert summary.report["rows_without_an_image"]["count"] == 0


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
    assert summary.report["kept"] == 7
    assert np.array_equal(pixels(found, found.names[5]), noise(50, 8, 8, 3))
    report = read_json(halves / "report.json")
    assert report["names_in_several_sources"] == {"count": 2, "names": ["ISIC_5.png", "ISIC_6.png"]}
    assert report["duplicates"] == [["part_1/ISIC_6.png", "part_2/ISIC_6.png"]]
    assert found.groups[1] == found.groups[6]
    assert len(set(found.groups)) == 6
    assert "  names in several sources: 2 (ISIC_5.png, ISIC_6.png); all these images were kept" in summary.lines


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
    counts = run(source, tmp_path / "set.zip", folders="classes").report["classes"]
    assert counts == ({"images_part_1": 3, "images_part_2": 2} if several else {"images_part_1": 2, "images_part_2": 1})
    assert ImageSet(tmp_path / "set.zip").source["options"]["folders"] == "classes"
    run(source, tmp_path / "none.zip", folders="ignore")
    assert ImageSet(tmp_path / "none.zip").labels is None
    (tmp_path / "t.csv").write_text("image,dx\n" + "".join(f"{name},{name in 'ab'}\n" for name in "abcde"))
    table = {"labels": tmp_path / "t.csv", "id_column": "image", "label_column": "dx"}
    assert run(source, tmp_path / "table.zip", **table).report["classes"]["True"] == 2
    with pytest.raises(UserError, match=r"^--folders=ignore and --labels are both given; expected only one of the two"):
        run(source, tmp_path / "x.zip", folders="ignore", **table)


def test_folders_of_archives_that_bring_labels_are_not_asked_about(labeled_folder, tmp_path):
    run(labeled_folder, tmp_path / "ready.zip")
    np.savez(tmp_path / "set.npz", train_images=noise(0, 2, 8, 8), train_labels=[[0], [1]])
    for name, kind in (("ready.zip", "zip of images with dataset.json"), ("set.npz", "MedMNIST npz")):
        with pytest.raises(UserError) as caught:
            run(tmp_path / name, tmp_path / "x.zip", folders="ignore")
        assert str(caught.value) == f"--folders: {name} ({kind}) has its own labels; leave the option out"
    run([tmp_path / "ready.zip", labeled_folder], tmp_path / "both.zip", folders="ignore", unlabeled="keep")
    assert ImageSet(tmp_path / "both.zip").labels.tolist() == [0, 0, 1, 1, 1, 2, *[NO_LABEL] * 6]


def test_an_image_without_a_class_folder_beside_sources_with_some_is_unlabeled(tmp_path):
    make_folder(tmp_path / "one", {"mel/a.png": image(1), "nv/b.png": image(2)})
    make_folder(tmp_path / "two", {"c.png": image(3)})
    with pytest.raises(UserError, match=r"^no label for 1 of 3 images \(two/c\.png\); expected a label for each"):
        run([tmp_path / "one", tmp_path / "two"], tmp_path / "set.zip")


def make_labeled(path, labels, classes, groups=None, seed=0, source=None):
    with ImageSetWriter(path, classes=classes, source=source) as writer:
        for index, label in enumerate(labels):
            writer.add(image(seed + index), label, None if groups is None else groups[index])
    return path


def test_data_sets_of_the_same_classes_are_joined_by_the_names_of_these(tmp_path):
    one = make_labeled(tmp_path / "one.zip", [0, 1, 1], ["mel", "nv"], ["p", "00000/img00000001.png", None])
    two = make_labeled(tmp_path / "two.zip", [0, 1, None], ["nv", "mel"], ["p", "00000/img00000001.png", None], seed=5,
                        source={"phantom": True})
    folders = make_folder(tmp_path / "folders", {"nv/x.png": image(20)})
    run([one, two, folders], tmp_path / "set.zip", unlabeled="keep", report=tmp_path / "report.json")
    found = ImageSet(tmp_path / "set.zip")
    assert (found.classes, found.labels.tolist()) == (["mel", "nv"], [0, 1, 1, 1, 0, NO_LABEL, 1])
    assert found.groups[0] == found.groups[3] == "p"
    assert len(set(found.groups)) == 6  # a group named after an image is only a group of that data set
    assert found.source["phantom"] is True
    assert read_json(tmp_path / "report.json")["names_in_several_sources"]["count"] == 0  # numbered names do not count


@pytest.mark.parametrize(("one", "two", "message"), [
    (([0, 1], ["mel", "nv"]), ([0, 1], ["bcc", "nv"]),
     "the classes of one.zip are mel, nv, those of two.zip bcc, nv; expected the same in both: make both with the same "
     "--classes, or give --labels"),
    (([0, 1], ["mel", "nv"]), ([0, 1], None),
     "the classes of one.zip are mel, nv, those of two.zip numbers without names; expected the same in both: make both "
     "with the same --classes, or give --labels"),
    (([0, 1], ["mel", "nv"]), ([[0.5, 0.5]], ["mel", "nv"]),
     "the labels of one.zip are classes, those of two.zip lists of 2 numbers; expected one kind: convert each "
     "separately, or give --labels"),
    (([0, 1], ["mel", "nv"]), "folders",
     "one.zip has the classes mel, nv as labels, but the folders of other sources are named bcc, nv; expected the same "
     "classes in all: convert each separately, or give --labels"),
    (([0, 1], None), "folders",
     "one.zip has numbers of classes without names as labels, but the folders of other sources are named bcc, nv; "
     "expected the same classes in all: convert each separately, or give --labels")])
def test_sources_of_other_classes_are_refused_unless_a_table_labels_them(tmp_path, one, two, message):
    one = make_labeled(tmp_path / "one.zip", *one)
    if two == "folders":
        two = make_folder(tmp_path / "folders", {"bcc/x.png": image(20), "nv/y.png": image(21)})
    else:
        two = make_labeled(tmp_path / "two.zip", *two, seed=5)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run([one, two], tmp_path / "set.zip")
    assert not (tmp_path / "set.zip").exists()
    (tmp_path / "t.csv").write_text("image,dx\n" + "".join(f"{name},a\n" for name in (
        "img00000000", "img00000001", "x", "y")))
    assert run([one, two], tmp_path / "set.zip", labels=str(tmp_path / "t.csv"), id_column="image",
               label_column="dx").report["classes"]["a"] in (3, 4)


def test_numbers_without_names_of_several_data_sets_stay(tmp_path):
    one = make_labeled(tmp_path / "one.zip", [3, 1], None)
    two = make_labeled(tmp_path / "two.zip", [2, 0], None, seed=5)
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
            ([".", "part_1"], "--source={0}/part_1 is inside --source={0}, which is read with all its subfolders; "
                              "leave one of the two out"),
            (["part_1", "set.npz"], "--source: set.npz (MedMNIST npz) cannot be joined with others; expected folders "
                                    "or zips of images: convert it separately")]:
        np.savez(halves / "set.npz", train_images=noise(0, 2, 8, 8))
        with pytest.raises(UserError, match=f"^{re.escape(message.format(halves))}$"):
            run([halves / path for path in paths], halves / "set.zip")
