"""latent.pair_sheet: examples from best to worst, and each pair at its place."""

import math
import random

import numpy as np
import PIL.Image
import pytest
import torch

from latent.pair_sheet import Pair, Row, choose_examples, save_pair_sheet

MARGIN, TITLE, ROW_TITLE, CAPTION, GAP = 8, 28, 22, 18, 10


@pytest.mark.parametrize(("distances", "count", "expected"), [
    ([5, 3, 9, 1, 7], 1, ([3], [0], [2])),
    ([8, 7, 6, 5, 4, 3, 2, 1, 0], 2, ([8, 7], [5, 4], [0, 1])),
    ([1] * 7, 2, ([0, 1], [2, 3], [6, 5])),  # ties: by index
    ([math.nan, 1, math.inf, 2, 0, 3], 2, ([4, 1], [3, 5], [2, 0])),
    ([-math.inf, 1, 2], 1, ([1], [2], [0])),
    ([2, 1, 3], 2, ([1, 0], [], [2])),  # too few: best first, then worst
    ([2, 1, 3, 0, 4], 2, ([3, 1], [0], [4, 2])),
    ([1], 3, ([0], [], [])),
    ([], 3, ([], [], [])),
])
def test_choose_examples_nearest_middle_and_farthest(distances, count, expected):
    assert tuple(choose_examples(distances, count).values()) == expected
    assert list(choose_examples(distances, count)) == ["best", "median", "worst"]


def test_choose_examples_none_twice_and_as_many_as_there_are():
    draw = random.Random(0)
    for _ in range(300):
        number, count = draw.randrange(20), draw.randrange(1, 6)
        distances = [draw.choice([0, 1, 2, 3, math.nan]) for _ in range(number)]
        lists = choose_examples(distances, count)
        chosen = [index for some in lists.values() for index in some]
        assert len(chosen) == len(set(chosen)) == min(number, 3 * count)


def test_choose_examples_median_is_that_of_the_distances():
    distances = torch.randn(101, generator=torch.Generator().manual_seed(0))
    assert distances[choose_examples(distances.tolist(), 1)["median"]].item() == distances.median()


def test_choose_examples_count_zero_raises():
    with pytest.raises(ValueError, match=r"^count is 0; expected 1 or more$"):
        choose_examples([1.0], 0)


def noise(seed, *shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def sheet_of(tmp_path, rows, title=""):
    """Return the pixels of a sheet: uint8 [H, W, 3]."""
    save_pair_sheet(tmp_path / "sheet.png", rows, title=title)
    with PIL.Image.open(tmp_path / "sheet.png") as picture:
        return np.asarray(picture)


def cell(sheet, row, pair, side, size):
    """Return the pixels of a target (side 0) or projection (side 1): uint8 [size, size, 3]."""
    top = MARGIN + TITLE + row * (ROW_TITLE + size + CAPTION + GAP) + ROW_TITLE
    left = MARGIN + pair * (2 * size + 2 + 14) + side * (size + 2)
    return sheet[top:top + size, left:left + size]


def pair_of(seed, *shape, caption=""):
    return Pair(target=noise(2 * seed, *shape), projection=noise(2 * seed + 1, *shape), caption=caption)


@pytest.mark.parametrize(("side", "channels", "factor"), [(16, 3, 8), (64, 1, 2), (48, 3, 2), (128, 3, 1), (96, 1, 1)])
def test_save_pair_sheet_pairs_lie_side_by_side_enlarged(tmp_path, side, channels, factor):
    rows = [Row(title="", pairs=[pair_of(10 * row + index, channels, side, side) for index in range(3 - row)])
            for row in range(2)]
    sheet = sheet_of(tmp_path, rows)
    size = side * factor
    assert sheet.shape == (MARGIN + TITLE + 2 * (ROW_TITLE + size + CAPTION + GAP),
                           max(640, 2 * MARGIN + 3 * (2 * size + 2) + 2 * 14), 3)
    left = sheet.copy()
    for number, row in enumerate(rows):
        for index, pair in enumerate(row.pairs):
            for place, image in enumerate((pair.target, pair.projection)):
                large = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2).expand(3, -1, -1)
                assert (cell(sheet, number, index, place, size) == large.permute(1, 2, 0).numpy()).all()
                cell(left, number, index, place, size)[:] = 255
    assert (left == 255).all()  # nothing else, since all texts are empty


def test_save_pair_sheet_large_and_oblong_are_reduced_and_centred(tmp_path):
    target = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 300, 600)
    pair = Pair(target=target, projection=noise(0, 1, 512, 512), caption="")
    sheet = sheet_of(tmp_path, [Row(title="", pairs=[pair])])
    found = cell(sheet, 0, 0, 0, 128)
    assert (found[32:96] == (200, 0, 0)).all()
    assert (found[:32] == 255).all()
    assert (found[96:] == 255).all()
    assert abs(cell(sheet, 0, 0, 1, 128).mean() - 127.5) < 3


def ink(sheet):
    return (sheet < 100).all(axis=2)


def test_save_pair_sheet_texts_stand_at_their_places(tmp_path):
    def pixels(title="", row="", caption=""):
        white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
        pair = Pair(target=white, projection=white, caption=caption)
        return ink(sheet_of(tmp_path, [Row(title="", pairs=[pair]), Row(title=row, pairs=[pair, pair])], title))

    second = MARGIN + TITLE + ROW_TITLE + 128 + CAPTION + GAP
    for texts, top, height in (({"title": "A title"}, 0, MARGIN + TITLE), ({"row": "melanoma"}, second, ROW_TITLE)):
        found = pixels(**texts)
        assert found[top:top + height].any()
        assert found.sum() == found[top:top + height].sum()
    found = pixels(caption="0.123 name")
    rows, columns = found.nonzero()
    below = second + ROW_TITLE + 128
    assert ((rows >= below) & (rows < below + CAPTION)).sum() == 2 * (rows < second).sum() > 0
    assert (found[below:, MARGIN:MARGIN + 258] == found[below:, MARGIN + 258 + 14:MARGIN + 2 * 258 + 14]).all()
    assert columns.min() >= MARGIN


def test_save_pair_sheet_long_captions_stay_below_their_pair(tmp_path):
    white = torch.full((1, 32, 32), 255, dtype=torch.uint8)
    pairs = [Pair(target=white, projection=white, caption=text) for text in ("W" * 300, "", "m\u00e9l\n\u75e3")]
    found = ink(sheet_of(tmp_path, [Row(title="t" * 400, pairs=pairs)], "T" * 400))
    columns = found[MARGIN + TITLE + ROW_TITLE + 128:].any(axis=0)
    assert columns[MARGIN:MARGIN + 258].any()
    assert not columns[MARGIN + 258:MARGIN + 2 * (258 + 14)].any()
    assert columns[MARGIN + 2 * (258 + 14):].any()
    titles = found[:MARGIN + TITLE + ROW_TITLE].any(axis=0).nonzero()[0]
    assert titles.max() < found.shape[1] - MARGIN


def test_save_pair_sheet_shows_ascii_for_other_letters(tmp_path):
    rows = [Row(title="nevus ?", pairs=[pair_of(0, 3, 8, 8, caption="a?b")])]
    same = [Row(title="n\u00e9vus \u75e3", pairs=[pair_of(0, 3, 8, 8, caption="a\nb")])]
    assert (sheet_of(tmp_path, rows, "set") == sheet_of(tmp_path, same, "s\u00e9t")).all()


def test_save_pair_sheet_rows_without_pairs_are_left_out(tmp_path):
    row = Row(title="melanoma best", pairs=[pair_of(0, 3, 8, 8)])
    empty = Row(title="melanoma worst", pairs=[])
    assert (sheet_of(tmp_path, [empty, row, empty]) == sheet_of(tmp_path, [row])).all()
    with pytest.raises(ValueError, match=r"^there are no pairs; expected a row with one or more$"):
        save_pair_sheet(tmp_path / "none.png", [empty], title="")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_save_pair_sheet_twice_gives_equal_bytes_and_replaces(tmp_path):
    rows = [Row(title="best", pairs=[pair_of(0, 3, 8, 8, caption="0.1")])]
    path = tmp_path / "sheet.png"
    path.write_bytes(b"old")
    save_pair_sheet(path, rows, title="pairs")
    first = path.read_bytes()
    save_pair_sheet(path, rows, title="pairs")
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]
