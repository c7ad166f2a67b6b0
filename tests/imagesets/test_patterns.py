"""--include and --exclude, and rows of a table that match an image and its mask."""

import io
import json
import re

import numpy as np
import pytest

from dnnlib.cli import UserError
from imagesets.convert import convert
from imagesets.reader import ImageSet
from imagesets.sources import open_sources
from tests.helpers.make_archives import encode, make_folder, make_idx, make_zip, noise

HAM = "lesion_id,image_id,dx,dx_type,age,sex,localization\n"


def image(seed):
    return encode(noise(seed, 8, 8, 3))


def run(source, dest, **options):
    return convert(source, dest, **{"workers": 1, "stream": io.StringIO()} | options)


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
    assert (found.labels, summary.found, summary.kept, summary.num_duplicates) == (None, 2, 2, 0)
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
    ({"exclude": ["*.gif"]}, f'--exclude="*.gif" fits none of {THERE}; expected a pattern of names, such as "*.jpg", '
                             'or of a folder, such as "masks/*"'),
    ({"include": ["MASKS"]}, f'--include="MASKS" fits none of {THERE}; the folder of that name is "MASKS/"'),
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
    with pytest.raises(UserError, match=r"^--exclude: t10k-images-idx3-ubyte\.gz \(MNIST\) holds no files; leave the "):
        open_sources([path], exclude=["*.png"])


@pytest.mark.parametrize(("files", "message"), [
    (["1.jpg", "1.png", "2.jpg", "2.png", "3.jpg", "3.png"],
     "--labels: 3 of the table's 3 rows match several files (1.jpg and 1.png; 2.jpg and 2.png; ...); expected one "
     'image a row: say which files are meant, such as by --include="*.jpg" or --exclude="*.png", or take all by '
     '--include="*"'),
    (["1.jpg", "2.jpg", "2.png", "3.jpg"],
     "--labels: 1 of the table's 3 rows matches several files (2.jpg and 2.png); expected one image a row: say which "
     'files are meant, such as by --include="*.jpg" or --exclude="*.png", or take all by --include="*"'),
    (["annotations/1.png", "images/1.JPG", "images/2.jpg"],  # the photograph, whichever comes first
     "--labels: 1 of the table's 3 rows matches several files (annotations/1.png and images/1.JPG); expected one image "
     'a row: say which files are meant, such as by --include="*.jpg" or --exclude="*.png", or take all by '
     '--include="*"'),
    (["images/1.png", "images/2.png", "images/3.png", "masks/1.png", "masks/3.png"],
     "--labels: 2 of the table's 3 rows match several files (images/1.png and masks/1.png; images/3.png and "
     'masks/3.png); expected one image a row: say which files are meant, such as by --exclude="images/*" or '
     '--exclude="masks/*", or take all by --include="*"')])
def test_a_row_of_several_files_is_an_error_until_patterns_say_which(files, message, tmp_path):
    source = make_folder(tmp_path / "in", {name: image(seed) for seed, name in enumerate(files)})
    labels = table(tmp_path, "1", "2", "3")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(source, tmp_path / "set.zip", labels=labels, unlabelled="drop", report=tmp_path / "r.json")
    assert not (tmp_path / "set.zip").exists()
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["error"], report["found"]) == (message, len(files))
    assert all(len(names) == 2 for names in report["rows_of_several_files"].values())
    for advice in re.findall(r'--(\w+)="([^"]+)"', message):
        chosen = {advice[0]: [advice[1]]}
        summary = run(source, tmp_path / "set.zip", labels=labels, unlabelled="drop", **chosen)
        assert summary.kept == (len(files) if advice[1] == "*" else len(names_left(source, **chosen)))


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
        'expected one image a row: say which files are meant, such as by --exclude="HAM10000_images_part_1/*" '
        '--exclude="HAM10000_images_part_2/*" or --exclude="ham10000_images_part_1/*" '
        '--exclude="ham10000_images_part_2/*", or take all by --include="*"')
    for name in ("HAM10000", "ham10000"):
        patterns = [f"{name}_images_part_{part}/*" for part in (1, 2)]
        with pytest.raises(UserError, match=r"^--labels: 4 of the table's 4 rows match several files \(HAM10000_ima"):
            run(source, tmp_path / "set.zip", labels=labels, include=["*.jpg"])  # tells nothing of the two
        summary = run(source, tmp_path / "set.zip", labels=labels, exclude=patterns)
        assert (summary.found, summary.kept, summary.rows_without_an_image) == (4, 4, 0)
    lines = run(source, tmp_path / "set.zip", labels=labels, include=["*"]).lines
    assert [line for line in lines if line.endswith("hold the set twice? Give each of its folders once")]


def test_an_image_and_its_mask_in_two_sources_are_told_by_their_endings(tmp_path):
    one = make_folder(tmp_path / "one", {"1.jpg": image(1), "2.jpg": image(2)})
    two = make_folder(tmp_path / "two", {"1.png": image(3)})
    labels = table(tmp_path, "1", "2")
    with pytest.raises(UserError, match=r"^--labels: 1 of the table's 2 rows matches several files \(one/1\.jpg and "
                       r".* are meant, such as by leaving out the --source of two, or take all by"):
        run([one, two], tmp_path / "set.zip", labels=labels)
    with pytest.raises(UserError, match=r"^--include and --exclude leave none of the 1 image of two .*; expected "
                       r"patterns that leave some: change them, or leave this --source out$"):
        run([one, two], tmp_path / "set.zip", labels=labels, include=["*.jpg"])
    make_folder(two, {"1.jpg": image(1)})
    (two / "1.png").unlink()  # overlapping parts of one set
    assert run([one, two], tmp_path / "set.zip", labels=labels).kept == 3


def test_masks_without_a_row_are_an_error_that_names_their_pattern(tmp_path):
    files = {f"ISIC_{number}{tail}": image(number) for number in (1, 2) for tail in (".jpg", "_superpixels.png")}
    source, labels = make_folder(tmp_path / "in", files), table(tmp_path, "ISIC_1", "ISIC_2")
    message = ("2 of 4 images have no label, 2 of them no row in the table (ISIC_1_superpixels.png, "
               "ISIC_2_superpixels.png); expected a label for each: add them, leave them out "
               '(--exclude="*_superpixels.png"), or give --unlabelled=drop or --unlabelled=keep')
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(source, tmp_path / "set.zip", labels=labels)
    assert run(source, tmp_path / "set.zip", labels=labels, exclude=["*_superpixels.png"]).kept == 2
    (tmp_path / "table.csv").write_text(f"{HAM}L1,ISIC_1,,,,,\n")  # no image has a label: none to tell the others from
    with pytest.raises(UserError, match=r"expected a label for each: add them, or give --unlabelled=drop or "):
        run(source, tmp_path / "set.zip", labels=labels)


@pytest.mark.parametrize(("files", "note"), [
    (["1.jpg", "1.png", "2.jpg"], "2 images differ by the ending of their names only (1.jpg, 1.png); if some are "
                                  'masks, leave them out, such as by --exclude="*.png"'),
    (["1.jpg", "1_mask.png"], "1 image is named after others (1_mask.png); if they are masks, leave them out by "
                              '--exclude="*_mask.png"'),
    (["1.jpg", "2.png", "x_mask.png"], None)])
def test_masks_are_noted_where_no_table_tells(files, note, tmp_path):
    source = make_folder(tmp_path / "in", {name: image(seed) for seed, name in enumerate(files)})
    notes = [line for line in run(source, tmp_path / "set.zip").lines if line.startswith("  note: ")]
    assert notes == ([] if note is None else [f"  note: {note}"])
