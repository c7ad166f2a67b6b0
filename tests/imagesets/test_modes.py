"""imagesets.pixel_formats: 8-bit grey or RGB from every mode, by numbers worked out by hand."""
import io

import numpy as np
import PIL.Image
import pytest

from imagesets.pixel_formats import flatten, is_grey
from tests.helpers.image_files import encode


def opened(data):
    return PIL.Image.open(io.BytesIO(data))


def flat(image, *, grey):
    image.load()
    found, notes = flatten(image, grey=grey)
    assert found.mode == ("L" if grey else "RGB")
    return np.asarray(found), notes


def on_white(value, alpha):
    return round((value * alpha + 255 * (255 - alpha)) / 255)


def test_flatten_rgba_goes_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 128], [200, 0, 255, 51]]], dtype=np.uint8)
    pixels, notes = flat(opened(encode(rgba)), grey=False)
    assert pixels.tolist() == [[[on_white(value, pixel[3]) for value in pixel[:3]] for pixel in rgba[0].tolist()]]
    assert pixels[0, 1].tolist() == [255, 255, 255]
    assert notes == {"alpha on white"}


def test_flatten_la_goes_on_white_and_stays_grey():
    image = PIL.Image.merge("LA", [PIL.Image.fromarray(np.array([[0, 0, 100]], np.uint8)),
                                   PIL.Image.fromarray(np.array([[0, 255, 128]], np.uint8))])
    image = opened(encode(image))
    assert is_grey(image)
    pixels, notes = flat(image, grey=True)
    assert (pixels.tolist(), notes) == ([[255, 0, on_white(100, 128)]], {"alpha on white"})


def test_flatten_premultiplied_alpha_is_divided_first():
    image = PIL.Image.frombytes("RGBa", (1, 1), bytes([50, 25, 0, 128]))  # colour 100, 50, 0 at half strength
    pixels, _ = flat(image, grey=False)
    assert np.abs(pixels[0, 0].astype(int) - [on_white(100, 128), on_white(50, 128), on_white(0, 128)]).max() <= 1


def test_flatten_opaque_alpha_changes_nothing():
    rgb = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    pixels, notes = flat(opened(encode(np.dstack([rgb, np.full((3, 4), 255, np.uint8)]))), grey=False)
    np.testing.assert_array_equal(pixels, rgb)
    assert notes == {"opaque alpha dropped"}


PALETTE = [200, 10, 30, 0, 0, 255, 90, 90, 90]


def palette_image(palette=PALETTE):
    image = PIL.Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putdata([0, 1, 2])
    image.putpalette(palette)
    return image


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "TIFF"])
def test_flatten_palette_gives_its_colours(image_format):
    image = opened(encode(palette_image(), image_format))
    assert (image.mode, is_grey(image)) == ("P", False)
    pixels, notes = flat(image, grey=False)
    assert (pixels.reshape(-1).tolist(), notes) == (PALETTE, {"palette"})


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_flatten_palette_transparent_colour_goes_on_white(transparency):
    pixels, notes = flat(opened(encode(palette_image(), transparency=transparency)), grey=False)
    assert pixels.tolist() == [[[200, 10, 30], [255, 255, 255], [90, 90, 90]]]
    assert notes == {"palette", "alpha on white"}


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_flatten_palette_of_greys_is_grey(image_format):
    image = opened(encode(palette_image([7, 7, 7, 0, 0, 0, 255, 255, 255]), image_format))
    assert (image.mode, is_grey(image)) == ("P", True)
    assert flat(image, grey=True)[0].tolist() == [[7, 0, 255]]


def test_flatten_rgb_with_one_transparent_colour_goes_on_white():
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    found, notes = flat(opened(encode(pixels, transparency=(1, 2, 3))), grey=False)
    assert (found.tolist(), notes) == ([[[255, 255, 255], [4, 5, 6]]], {"alpha on white"})


def test_flatten_one_bit_is_black_and_white():
    image = opened(encode(PIL.Image.fromarray(np.array([[False, True]]))))
    assert (image.mode, is_grey(image)) == ("1", True)
    pixels, notes = flat(image, grey=True)
    assert (pixels.tolist(), notes) == ([[0, 255]], {"1-bit"})


@pytest.mark.parametrize(("cmyk", "rgb"), [((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)),
                                           ((255, 0, 0, 0), (0, 255, 255)), ((0, 128, 255, 0), (255, 127, 0)),
                                           ((0, 51, 102, 51), (204, 163, 122))])
@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_flatten_cmyk_known_colours(cmyk, rgb, image_format):
    image = opened(encode(PIL.Image.new("CMYK", (16, 16), cmyk), image_format, quality=100))
    pixels, notes = flat(image, grey=False)
    assert np.abs(pixels.astype(int) - rgb).max() <= 1  # JPEG's own rounding
    assert notes == {"CMYK"}


def test_flatten_ycck_jpeg_turns_colours_round_once():
    data = bytearray(encode(PIL.Image.new("CMYK", (16, 16), (105, 155, 115, 51)), "JPEG", quality=100))
    marker = data.index(b"Adobe\0")
    assert data[marker + 11] == 0
    data[marker + 11] = 2  # now the stored, inverted numbers 150 100 140 204 mean Y Cb Cr K
    pixels, _ = flat(opened(bytes(data)), grey=False)
    luma, blue, red = 150, 100 - 128, 140 - 128
    inks = np.array([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue])  # JFIF
    assert np.abs(pixels - (255 - inks) * (255 - 51) / 255).max() <= 2


@pytest.mark.parametrize(("mode", "colour", "rgb", "tolerance"), [
    ("HSV", (0, 255, 255), (255, 0, 0), 0), ("YCbCr", (76, 85, 255), (254, 0, 0), 1),
    ("LAB", (255, 128, 128), (255, 255, 255), 2), ("LAB", (0, 128, 128), (0, 0, 0), 2)])
def test_flatten_other_colour_spaces_known_colours(mode, colour, rgb, tolerance):
    pixels, notes = flat(PIL.Image.new(mode, (2, 2), colour), grey=False)
    assert np.abs(pixels.astype(int) - rgb).max() <= tolerance
    assert notes == {mode}
