"""torch_utils.images: pixels as metrics need them, and grids with every image in its place."""

import numpy as np
import PIL.Image
import pytest
import torch

from torch_utils.images import Pair, PairRow, draw_grid, save_grid, save_pair_sheet, to_pixels, to_unit_range


def numbered(count, channels=3, height=8, width=8):
    """Return uint8 images, each filled with a different value in each channel."""
    values = torch.arange(count * channels, dtype=torch.uint8).view(count, channels, 1, 1)
    return values.expand(count, channels, height, width).contiguous()


def read(path):
    return np.asarray(PIL.Image.open(path))


@pytest.mark.parametrize(("value", "expected"), [
    (-1.0, 0), (0.0, 128), (1.0, 255), (-0.9999, 0), (-0.99, 1), (2.0, 255), (-9.0, 0), (0.499, 191),
])
def test_to_pixels_rounds_down_from_a_half_up(value, expected):
    assert to_pixels(torch.tensor([value])).item() == expected


def test_to_unit_range_maps_pixels_to_minus_one_and_one():
    found = to_unit_range(torch.tensor([0, 255, 51], dtype=torch.uint8))
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -0.6]))


def test_to_pixels_undoes_the_range_of_training_for_every_value():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert (to_pixels(to_unit_range(pixels)) == pixels).all()
    assert to_pixels(pixels) is pixels


def test_to_pixels_other_types_raise():
    with pytest.raises(ValueError, match=r"images are torch\.int64; expected floating point, -1 to 1, or uint8"):
        to_pixels(torch.zeros(1, dtype=torch.int64))


def test_save_grid_puts_each_image_at_its_place(tmp_path):
    images = torch.randint(0, 256, (6, 3, 4, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_grid(tmp_path / "grid.png", images, columns=3, rows=2)
    pixels = read(tmp_path / "grid.png")
    assert pixels.shape == (2 * 4, 3 * 8, 3)
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        cell = pixels[row * 4:(row + 1) * 4, column * 8:(column + 1) * 8]
        assert (cell == image.permute(1, 2, 0).numpy()).all()


def test_save_grid_gray_stays_gray_and_missing_cells_are_white(tmp_path):
    save_grid(tmp_path / "grid.png", numbered(3, channels=1), columns=2, rows=2)
    pixels = read(tmp_path / "grid.png")
    assert pixels.shape == (16, 16)
    assert [pixels[0, 0], pixels[0, 8], pixels[8, 0], pixels[8, 8], pixels[15, 15]] == [0, 1, 2, 255, 255]


def test_save_grid_float_equals_its_pixels(tmp_path):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    save_grid(tmp_path / "float.png", images, columns=2, rows=2)
    save_grid(tmp_path / "uint8.png", to_pixels(images), columns=2, rows=2)
    assert (tmp_path / "float.png").read_bytes() == (tmp_path / "uint8.png").read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 64])
def test_draw_grid_labels_stand_beside_their_rows(channels, size):
    images = numbered(4, channels, size, size)
    plain = np.asarray(draw_grid(images, columns=2, rows=2))
    labeled = np.asarray(draw_grid(images, columns=2, rows=2, labels=["mel", ""]))
    assert (labeled[:, -2 * size:] == plain).all()
    column = labeled[:, :-2 * size]
    assert column[:size].min() < 128  # ink
    assert (column[size:] == 255).all()
    assert (column[0] == 255).all()  # the text lies inside its row
    assert (column[size - 1] == 255).all()


def test_draw_grid_long_and_foreign_labels_are_drawn():
    images = numbered(2, 3, 32, 32)
    short = draw_grid(images, columns=1, rows=2, labels=["x" * 22 + "..", "e?"])
    long = draw_grid(images, columns=1, rows=2, labels=["x" * 500, "\u00e9\u75e3"])
    assert (np.asarray(short) == np.asarray(long)).all()


@pytest.mark.parametrize("labels", [None, ["nv", "mel"]])
@pytest.mark.parametrize("size", [16, 64])
def test_draw_grid_headings_stand_above_their_columns(labels, size):
    images = numbered(4, 3, size, size)
    plain = np.asarray(draw_grid(images, columns=2, rows=2, labels=labels))
    headed = np.asarray(draw_grid(images, columns=2, rows=2, labels=labels, headings=["+3", ""]))
    top = len(headed) - len(plain)
    assert top > 0
    assert (headed[top:] == plain).all()  # labels stay beside their rows
    line = headed[:top, -2 * size:]
    assert line[:, :size].min() < 128  # ink
    assert (line[:, size:] == 255).all()
    assert (headed[:top, :-2 * size] == 255).all()


def test_draw_grid_long_headings_are_shortened_to_their_column():
    headed = np.asarray(draw_grid(numbered(2, 3, 64, 64), columns=2, rows=1, headings=["x" * 500, ""]))
    assert (headed[:-64, 64:] == 255).all()
    assert headed[:-64, :64].min() < 128


@pytest.mark.parametrize(("images", "options", "message"), [
    (torch.zeros(5, 3, 8, 8), {}, "there are 5 images; expected 1 to 2 x 2"),
    (torch.zeros(0, 3, 8, 8), {}, "there are 0 images; expected 1 to 2 x 2"),
    (torch.zeros(4, 2, 8, 8), {}, r"images are \[4, 2, 8, 8\]; expected \[N, 1 or 3, H, W\]"),
    (torch.zeros(4, 3, 8, 8), {"labels": ["a"]}, "there are 1 labels; expected one for each of the 2 rows"),
    (torch.zeros(4, 3, 8, 8), {"headings": ["a"]}, "there are 1 headings; expected one for each of the 2 columns"),
])
def test_save_grid_images_that_do_not_fit_raise_and_leave_nothing(tmp_path, images, options, message):
    with pytest.raises(ValueError, match=message):
        save_grid(tmp_path / "grid.png", images, columns=2, rows=2, **options)
    assert list(tmp_path.iterdir()) == []


def test_save_grid_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "grid.png").write_bytes(b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PIL.Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_grid(tmp_path / "grid.png", numbered(1), columns=1, rows=1)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("grid.png", b"old")]


MARGIN, TITLE, ROW_TITLE, CAPTION, GAP = 8, 28, 22, 18, 10


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
    rows = [PairRow(title="", pairs=[pair_of(10 * row + index, channels, side, side) for index in range(3 - row)])
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


def test_save_pair_sheet_large_and_oblong_are_reduced_and_centered(tmp_path):
    target = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 300, 600)
    pair = Pair(target=target, projection=noise(0, 1, 512, 512), caption="")
    sheet = sheet_of(tmp_path, [PairRow(title="", pairs=[pair])])
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
        return ink(sheet_of(tmp_path, [PairRow(title="", pairs=[pair]), PairRow(title=row, pairs=[pair, pair])], title))

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
    found = ink(sheet_of(tmp_path, [PairRow(title="t" * 400, pairs=pairs)], "T" * 400))
    columns = found[MARGIN + TITLE + ROW_TITLE + 128:].any(axis=0)
    assert columns[MARGIN:MARGIN + 258].any()
    assert not columns[MARGIN + 258:MARGIN + 2 * (258 + 14)].any()
    assert columns[MARGIN + 2 * (258 + 14):].any()
    titles = found[:MARGIN + TITLE + ROW_TITLE].any(axis=0).nonzero()[0]
    assert titles.max() < found.shape[1] - MARGIN


def test_save_pair_sheet_shows_ascii_for_other_letters(tmp_path):
    rows = [PairRow(title="nevus ?", pairs=[pair_of(0, 3, 8, 8, caption="a?b")])]
    same = [PairRow(title="n\u00e9vus \u75e3", pairs=[pair_of(0, 3, 8, 8, caption="a\nb")])]
    assert (sheet_of(tmp_path, rows, "set") == sheet_of(tmp_path, same, "s\u00e9t")).all()


def test_save_pair_sheet_rows_without_pairs_are_left_out(tmp_path):
    row = PairRow(title="melanoma best", pairs=[pair_of(0, 3, 8, 8)])
    empty = PairRow(title="melanoma worst", pairs=[])
    assert (sheet_of(tmp_path, [empty, row, empty]) == sheet_of(tmp_path, [row])).all()
    with pytest.raises(ValueError, match=r"^there are no pairs; expected a row with one or more$"):
        save_pair_sheet(tmp_path / "none.png", [empty], title="")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_save_pair_sheet_twice_gives_equal_bytes_and_replaces(tmp_path):
    rows = [PairRow(title="best", pairs=[pair_of(0, 3, 8, 8, caption="0.1")])]
    path = tmp_path / "sheet.png"
    path.write_bytes(b"old")
    save_pair_sheet(path, rows, title="pairs")
    first = path.read_bytes()
    save_pair_sheet(path, rows, title="pairs")
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]
