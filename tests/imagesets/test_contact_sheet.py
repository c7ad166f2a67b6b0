"""imagesets.contact_sheet: one sheet per class, with images chosen evenly, under safe names."""

import numpy as np
import PIL.Image
import pytest

from dnnlib.cli import UserError, run
from imagesets.commands import inspect_command
from imagesets.contact_sheet import choose_evenly, sheet_name, write_sheets
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from tests.helpers.make_sets import make_set, pixels_of, png

GAP, TITLE = 4, 28


def sheets_of(path, folder, usable=None):
    images = ImageSet(path)
    return write_sheets(images, np.ones(len(images), dtype=bool) if usable is None else usable, folder)


def cell(sheet, index, columns, size=64):
    """Return the pixels of a cell: uint8 [size, size, 3]."""
    row, column = divmod(index, columns)
    left, top = GAP + column * (size + GAP), TITLE + row * (size + GAP)
    return np.asarray(sheet)[top:top + size, left:left + size]


@pytest.mark.parametrize(("groups", "limit", "expected"), [
    ("aabbccdd", 4, [0, 2, 4, 6]),  # one of each group
    ("aabbccdd", 2, [0, 4]),  # spread over the set
    ("aaaaab", 3, [0, 1, 5]),  # all groups, then second images
    ("aabb", 9, [0, 1, 2, 3]),
    ("abcdefghij", 5, [0, 2, 4, 6, 8]),
])
def test_choose_evenly_takes_many_groups_spread_over_the_set(groups, limit, expected):
    assert choose_evenly(groups, limit) == expected


@pytest.mark.parametrize(("index", "count", "name", "expected"), [
    (0, 2, "melanoma", "0-melanoma.png"),
    (3, 12, "../../etc/passwd", "03-etc-passwd.png"),
    (1, 2, "m\u00e9lanome: in situ?", "1-melanome-in-situ.png"),
    (1, 2, "\u75e3", "1.png"),
    (1, 2, "x" * 300, "1-" + "x" * 60 + ".png"),
])
def test_sheet_name_is_safe_and_starts_with_the_number(index, count, name, expected):
    assert sheet_name(index, count, name) == expected


def test_write_sheets_one_a_class_with_the_images_enlarged(tmp_path):
    path = make_set(tmp_path / "set.zip", 12, size=16, labels=[0] * 8 + [2] * 4, classes=["benign", "none", "mel"])
    files = sheets_of(path, tmp_path / "sheets")
    assert [file.name for file in files] == ["0-benign.png", "2-mel.png"]
    sheet = PIL.Image.open(files[0])
    assert sheet.height == TITLE + 3 * (64 + GAP)  # 8 images in 3 columns
    for index in range(8):
        expected = pixels_of(index, 16).repeat(4, axis=0).repeat(4, axis=1)
        assert (cell(sheet, index, 3) == expected).all()


def test_write_sheets_title_is_drawn_and_differs(tmp_path):
    path = make_set(tmp_path / "set.zip", 2, labels=[0, 1], classes=["benign", "melanoma"])
    first, second = (np.asarray(PIL.Image.open(file))[:TITLE] for file in sheets_of(path, tmp_path / "sheets"))
    assert first.min() < 60  # ink
    assert first.shape != second.shape or (first != second).any()


def test_write_sheets_many_images_shows_a_hundred_groups(tmp_path):
    path = make_set(tmp_path / "set.zip", 300, size=8, groups=[f"g{index // 2}" for index in range(300)])
    (file,) = sheets_of(path, tmp_path / "sheets")
    sheet = PIL.Image.open(file)
    assert (file.name, sheet.size) == ("all.png", (GAP + 10 * (64 + GAP), TITLE + 10 * (64 + GAP)))
    # 150 groups: of every three the first two, by their first images.
    shown = [2 * (index * 150 // 100) for index in range(100)]
    assert all((cell(sheet, place, 10)[::8, ::8] == pixels_of(index, 8)).all() for place, index in enumerate(shown))


def test_write_sheets_large_and_gray_and_oblong_images_fit_their_cells(tmp_path):
    with ImageSetWriter(tmp_path / "set.zip") as writer:
        writer.add(png(np.full((300, 600, 3), (200, 0, 0))))
        writer.add(png(np.full((40, 20), 100)))
        writer.add(png(np.full((32, 32, 3), (0, 0, 200))))
    (file,) = sheets_of(tmp_path / "set.zip", tmp_path / "sheets")
    sheet = PIL.Image.open(file)
    oblong, gray = cell(sheet, 0, 2, 128), cell(sheet, 1, 2, 128)
    assert (oblong[32:96] == (200, 0, 0)).all()
    assert (oblong[:31] == 255).all()
    assert (gray[44:84, 54:74] == 100).all()
    assert (gray[:, :53] == 255).all()


def test_write_sheets_unlabeled_have_their_own_and_unusable_are_left_out(tmp_path):
    path = make_set(tmp_path / "set.zip", 4, labels=[0, None, 0, 0])
    files = sheets_of(path, tmp_path / "sheets", np.array([True, True, False, True]))
    assert [file.name for file in files] == ["0-0.png", "unlabeled.png"]
    sheet = PIL.Image.open(files[0])
    assert (cell(sheet, 1, 2)[::8, ::8] == pixels_of(3)).all()


def test_write_sheets_twice_gives_equal_bytes_and_replaces(tmp_path):
    path = make_set(tmp_path / "set.zip", 30, labels=[0, 1, 2] * 10)
    first = [file.read_bytes() for file in sheets_of(path, tmp_path / "sheets")]
    (tmp_path / "sheets" / "0-0.png").write_bytes(b"old")
    assert [file.read_bytes() for file in sheets_of(path, tmp_path / "sheets")] == first
    assert sorted(item.name for item in (tmp_path / "sheets").iterdir()) == ["0-0.png", "1-1.png", "2-2.png"]


@pytest.mark.parametrize("exists", [True, False])
def test_write_sheets_failing_leaves_nothing(tmp_path, exists):
    with ImageSetWriter(tmp_path / "set.zip") as writer:
        writer.add(png(pixels_of(0)), 0)
        writer.add(b"damaged", 1)
    if exists:
        (tmp_path / "sheets").mkdir()
    with pytest.raises(PIL.UnidentifiedImageError):
        sheets_of(tmp_path / "set.zip", tmp_path / "sheets")
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["set.zip", *["sheets"] * exists]


def test_write_sheets_folder_that_cannot_be_used_raises(tmp_path):
    path = make_set(tmp_path / "set.zip", 2)
    with pytest.raises(UserError, match=r"--sheet=.*set\.zip is a file; expected a folder for the sheets"):
        sheets_of(path, path)
    with pytest.raises(UserError, match=r"--sheet=.*c: there is no folder .*b; make it first"):
        sheets_of(path, tmp_path / "b" / "c")


def test_inspect_command_sheet_of_a_damaged_set_shows_the_rest(tmp_path, capsys):
    with ImageSetWriter(tmp_path / "set.zip") as writer:
        writer.add(png(pixels_of(0)))
        writer.add(b"damaged")
    assert run(inspect_command, [str(tmp_path / "set.zip"), f"--sheet={tmp_path / 'sheets'}", "--workers=1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"1 sheet in {tmp_path / 'sheets'}: all.png"
