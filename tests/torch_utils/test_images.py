"""torch_utils.images: pixels as metrics want them, and grids with every image at its place."""

import numpy as np
import PIL.Image
import pytest
import torch

from torch_utils.images import draw_grid, save_grid, to_pixels


def numbered(count, channels=3, height=8, width=8):
    """Return uint8 images, each filled with a value of its own in each channel."""
    values = torch.arange(count * channels, dtype=torch.uint8).view(count, channels, 1, 1)
    return values.expand(count, channels, height, width).contiguous()


def read(path):
    return np.asarray(PIL.Image.open(path))


@pytest.mark.parametrize(("value", "expected"), [
    (-1.0, 0), (0.0, 128), (1.0, 255), (-0.9999, 0), (-0.99, 1), (2.0, 255), (-9.0, 0), (0.499, 191),
])
def test_to_pixels_rounds_down_from_a_half_up(value, expected):
    assert to_pixels(torch.tensor([value])).item() == expected


def test_to_pixels_undoes_the_range_of_training_for_every_value():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert (to_pixels(pixels.float() / 127.5 - 1) == pixels).all()
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


def test_save_grid_grey_stays_grey_and_missing_cells_are_white(tmp_path):
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
    labelled = np.asarray(draw_grid(images, columns=2, rows=2, labels=["mel", ""]))
    assert (labelled[:, -2 * size:] == plain).all()
    column = labelled[:, :-2 * size]
    assert column[:size].min() < 128  # ink
    assert (column[size:] == 255).all()
    assert (column[0] == 255).all()  # the text lies inside its row
    assert (column[size - 1] == 255).all()


def test_draw_grid_long_and_foreign_labels_are_drawn():
    images = numbered(2, 3, 32, 32)
    short = draw_grid(images, columns=1, rows=2, labels=["x" * 22 + "..", "e?"])
    long = draw_grid(images, columns=1, rows=2, labels=["x" * 500, "\u00e9\u75e3"])
    assert (np.asarray(short) == np.asarray(long)).all()


@pytest.mark.parametrize(("images", "options", "message"), [
    (torch.zeros(5, 3, 8, 8), {}, "there are 5 images; expected 1 to 2 x 2"),
    (torch.zeros(0, 3, 8, 8), {}, "there are 0 images; expected 1 to 2 x 2"),
    (torch.zeros(4, 2, 8, 8), {}, r"images are \[4, 2, 8, 8\]; expected \[N, 1 or 3, H, W\]"),
    (torch.zeros(4, 3, 8, 8), {"labels": ["a"]}, "there are 1 labels; expected one for each of 2 rows"),
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
