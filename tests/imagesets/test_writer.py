"""imagesets.writer: what is written is what Pillow reads, and never another byte."""

import hashlib

import numpy as np
import pytest

from imagesets.writer import encode_png
from tests.helpers.image_files import read_png


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (3, 5, 1), (4, 7, 3), (256, 256, 3), (300, 219, 3), (1, 65534)])
def test_encode_png_pillow_reads_the_same_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = read_png(encode_png(pixels))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pixels.reshape(found.shape))
    assert found.shape == (shape if len(shape) == 2 or shape[2] == 3 else shape[:2])


def test_encode_png_bytes_never_change():
    pixels = (np.arange(48 * 64 * 3, dtype=np.uint32) * 2654435761 >> 24).astype(np.uint8).reshape(48, 64, 3)
    assert hashlib.sha256(encode_png(pixels)).hexdigest() == EXPECTED


def test_encode_png_strided_pixels_are_the_visible_ones():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read_png(encode_png(pixels[::-1, ::2])), pixels[::-1, ::2])


@pytest.mark.parametrize("pixels", [np.zeros((2, 2), np.float32), np.zeros((2, 2, 4), np.uint8),
                                    np.zeros((0, 2), np.uint8), np.zeros((2, 2, 3, 1), np.uint8)])
def test_encode_png_other_arrays_raise(pixels):
    with pytest.raises(ValueError, match=r"expected uint8, \[H, W\] or \[H, W, 1 or 3\]"):
        encode_png(pixels)


# Of the bytes this encoder wrote first; they hold no compressed data, so no library can change them.
EXPECTED = "5194d95b62cdaedc579387343c7c0bcddf9feae6efbff590b51974d7e75f6ce4"
