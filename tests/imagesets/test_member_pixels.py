"""imagesets.pixel_hashes: what the members of a data set decode to, and what is said of those that cannot be used."""

import io

import numpy as np
import PIL.Image
import pytest

from dnnlib.cli import UserError
from imagesets.pixel_hashes import describe_shape, load_pixels
from imagesets.reader import ImageSet
from tests.helpers.make_sets import make_set, pixels_of, png

NAME = "00000/img00000001.png"


def encoded(pixels, image_format="png", mode=None):
    file = io.BytesIO()
    image = PIL.Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, image_format)
    return file.getvalue()


def refused(images, *args):
    """Return what is said of a member, the same each time."""
    messages = []
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            load_pixels(images, *args)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


@pytest.fixture
def folder(tmp_path):
    """Return a folder with one image, to write others into: a set reads what is asked for, listed or not."""
    (tmp_path / "a.png").write_bytes(png(pixels_of(0)))
    return tmp_path


@pytest.mark.parametrize("place", ["set.zip", "folder"])
def test_load_pixels_gives_the_planes_of_a_member(tmp_path, place):
    colour = ImageSet(make_set(tmp_path / f"colour_{place}", 2))
    grey = ImageSet(make_set(tmp_path / f"grey_{place}", 2, channels=1))
    for images, expected in ((colour, pixels_of(1).transpose(2, 0, 1)), (grey, pixels_of(1, channels=1)[None])):
        for shape in (None, expected.shape):
            found = load_pixels(images, NAME, shape)
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, expected)


def test_load_pixels_takes_any_format_and_oblong_images(folder):
    pixels = np.random.RandomState(0).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    (folder / "b.bmp").write_bytes(encoded(pixels, "bmp"))
    np.testing.assert_array_equal(load_pixels(ImageSet(folder), "b.bmp"), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("data", [b"", b"nothing"])
def test_load_pixels_of_what_is_no_image_says_so(folder, data):
    (folder / "b.png").write_bytes(data)
    assert refused(ImageSet(folder), "b.png") == (
        f"{folder}: b.png cannot be decoded (it is no image); make or copy it again")


def test_load_pixels_of_half_an_image_gives_the_decoder_s_reason(folder):
    whole = encoded(pixels_of(1, 64), "jpeg")
    (folder / "b.jpg").write_bytes(whole[:len(whole) // 2])
    message = refused(ImageSet(folder), "b.jpg")
    assert message.startswith(f"{folder}: b.jpg cannot be decoded (image file is truncated")
    assert message.endswith("); make or copy it again")


def test_load_pixels_of_a_member_that_claims_to_be_huge_is_refused(folder, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 31)
    assert refused(ImageSet(folder), "a.png") == (
        f"{folder}: a.png has 64 pixels; at most 62 are read: save it smaller")


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "I;16"])
def test_load_pixels_of_another_mode_is_refused(folder, mode):
    grey = pixels_of(1, channels=1)
    data = encoded(grey.astype(np.uint16)) if mode == "I;16" else encoded(grey, mode=mode)
    (folder / "b.png").write_bytes(data)
    assert refused(ImageSet(folder), "b.png") == (
        f"{folder}: b.png has mode {mode}; expected 8-bit grey or RGB: convert it with dataset_tool.py")


@pytest.mark.parametrize(("pixels", "found"), [
    (pixels_of(1, 16), "16x16 RGB"), (pixels_of(1, channels=1), "8x8 grey"), (np.zeros((8, 6, 3)), "6x8 RGB")])
def test_load_pixels_of_another_shape_names_both(folder, pixels, found):
    (folder / "b.png").write_bytes(png(pixels))
    assert refused(ImageSet(folder), "b.png", (3, 8, 8)) == (
        f"{folder}: b.png is {found}, the first image 8x8 RGB; expected one size: convert it with dataset_tool.py")


def test_load_pixels_leaves_what_the_reader_says_as_it_is(tmp_path):
    path = make_set(tmp_path / "a.zip", 2)
    assert refused(ImageSet(path), "b.png") == f"{path} has no member b.png"
    data = path.read_bytes()
    start = data.index(png(pixels_of(1)))
    path.write_bytes(data[:start + 60] + bytes([data[start + 60] ^ 0xFF]) + data[start + 61:])
    assert refused(ImageSet(path), NAME) == (
        f"{path}: {NAME} is damaged (Bad CRC-32 for file '{NAME}'); make or copy the data set again")


@pytest.mark.parametrize(("shape", "expected"), [((3, 64, 64), "64x64 RGB"), ((1, 32, 48), "48x32 grey")])
def test_describe_shape_gives_width_height_and_kind(shape, expected):
    assert describe_shape(shape) == expected
