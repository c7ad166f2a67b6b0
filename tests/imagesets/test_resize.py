"""imagesets.resize: the transforms of the original, bit for bit."""
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from dnnlib.cli import UserError
from imagesets.resize import PixelSpec, crop_and_resize, crop_box, decoder_reduction, picture_size

_FRAMEWORK = np.load(Path(__file__).parent.parent / "data" / "framework.npz")
VECTORS = {name.removeprefix("transform/"): _FRAMEWORK[name] for name in _FRAMEWORK.files
           if name.startswith("transform/")}
WANTED = {"width": 32, "height": 32, "transform": None, "resize_filter": "lanczos", "channels": 3, "exact": False}


def spec_with(**changes):
    return PixelSpec(**{**WANTED, **changes})


def transform(pixels, spec):
    image = PIL.Image.fromarray(pixels)
    return np.asarray(crop_and_resize(image, crop_box(image.size, spec), spec))


@pytest.mark.parametrize("name", sorted(set(VECTORS) - {"src"}))
def test_transform_reference_image_is_equal_to_the_bit(name):
    kind, size, resize_filter = name.split("_")
    width, height = map(int, size.split("x"))
    spec = spec_with(width=width, height=height, resize_filter=resize_filter,
                     transform=None if kind == "scale" else kind)
    np.testing.assert_array_equal(transform(VECTORS["src"], spec), VECTORS[name])


def test_transform_box_to_half_is_the_mean_of_four():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    means = pixels.reshape(4, 2, 6, 2, 3).mean(axis=(1, 3))
    found = transform(pixels, spec_with(width=6, height=4, resize_filter="box"))
    assert np.abs(found - means).max() <= 1  # Pillow rounds by up to 0.5 in each of the two directions


@pytest.mark.parametrize("resize_filter", ["box", "lanczos"])
@pytest.mark.parametrize("kind", [None, "center-crop"])
def test_transform_own_size_keeps_every_pixel(resize_filter, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    spec = spec_with(width=None, height=None, resize_filter=resize_filter, transform=kind)
    np.testing.assert_array_equal(transform(pixels, spec), pixels)
    np.testing.assert_array_equal(transform(pixels, spec_with(width=16, height=16, transform=kind)), pixels)


def test_transform_one_side_given_keeps_the_other():
    pixels = np.zeros((10, 20, 3), np.uint8)
    assert transform(pixels, spec_with(width=5, height=None)).shape == (10, 5, 3)
    assert transform(pixels, spec_with(width=None, height=5)).shape == (5, 20, 3)


@pytest.mark.parametrize(("size", "box"), [((60, 45), (7, 0, 52, 45)), ((45, 60), (0, 7, 45, 52)),
                                           ((5, 5), (0, 0, 5, 5)), ((1, 9), (0, 4, 1, 5))])
def test_crop_box_center_crop_is_the_middle_square(size, box):
    spec = spec_with(width=None, height=None, transform="center-crop")
    assert crop_box(size, spec) == box
    assert picture_size(box, spec) == (min(size), min(size))


def test_transform_center_crop_ignores_what_is_cut_off():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    other = pixels.copy()
    other[:, :10] = 255
    other[:, 30:] = 0
    spec = spec_with(width=16, height=16, transform="center-crop")
    np.testing.assert_array_equal(transform(pixels, spec), transform(other, spec))


def test_center_crop_wide_bars_are_black_and_equally_high():
    pixels = np.full((30, 40, 3), 200, np.uint8)
    found = transform(pixels, spec_with(width=32, height=16, transform="center-crop-wide"))
    assert found.shape == (32, 32, 3)
    assert (found[:8] == 0).all()
    assert (found[8:24] == 200).all()
    assert (found[24:] == 0).all()


@pytest.mark.parametrize(("size", "box"), [((60, 45), (0, 10, 60, 34)), ((31, 100), None), ((32, 24), (0, 0, 32, 24)),
                                           ((32, 23), None), ((64, 46), None), ((64, 48), (0, 12, 64, 36))])
def test_crop_box_wide_takes_rows_by_the_images_proportions_or_refuses(size, box):
    assert crop_box(size, spec_with(height=24, transform="center-crop-wide")) == box


@pytest.mark.parametrize(("side", "reduction"), [(100, 1), (127, 1), (128, 2), (255, 2), (256, 4), (511, 4), (512, 8),
                                                 (9999, 8)])
def test_decoder_reduction_leaves_twice_the_wanted_pixels(side, reduction):
    spec = spec_with(transform="center-crop")
    box = crop_box((side + 50, side), spec)
    assert decoder_reduction(box, spec) == reduction
    assert decoder_reduction(box, spec_with(transform="center-crop", exact=True)) == 1


def test_decoder_reduction_own_size_is_one():
    assert decoder_reduction((0, 0, 9000, 9000), spec_with(width=None, height=None)) == 1


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_crop_and_resize_reduced_image_shows_the_same_part(reduction):
    # A ramp: its mean over a part identifies the part. 1003 is not a multiple of the reductions.
    x = np.linspace(0, 255, 1003)
    pixels = np.tile(np.rint(x), (701, 1)).astype(np.uint8)
    spec = spec_with(transform="center-crop")
    box = crop_box((1003, 701), spec)
    whole = PIL.Image.fromarray(pixels)
    expected = np.asarray(crop_and_resize(whole, box, spec)).astype(int)
    found = np.asarray(crop_and_resize(whole.reduce(reduction), box, spec, reduction=reduction)).astype(int)
    assert np.abs(found - expected).max() <= 1
    # A crop that is off by one pixel of the reduced image changes all by at least 0.5; rounding alone by 0.13.
    assert abs((found - expected).mean()) < 0.2


@pytest.mark.parametrize(("changes", "message"), [
    ({"transform": "crop"}, "--transform is crop; expected center-crop or center-crop-wide"),
    ({"resize_filter": "cubic"}, "--resize-filter is cubic; expected box or lanczos"),
    ({"width": 0}, "--width is 0; expected at least 1"),
    ({"transform": "center-crop", "width": None},
     "--transform=center-crop has only one of width and height; give both, such as --resolution=256x256, or neither to "
     "keep the size of the square"),
    ({"transform": "center-crop-wide", "height": None},
     "--transform=center-crop-wide needs a size; give --resolution=WxH, for example 256x192"),
    ({"transform": "center-crop-wide", "height": 33},
     "--transform=center-crop-wide needs a width above the height, but the size is 32x33; swap the numbers, or "
     "use center-crop"),
])
def test_pixel_spec_impossible_wish_is_explained(changes, message):
    with pytest.raises(UserError) as caught:
        spec_with(**changes)
    assert str(caught.value) == message
