"""imagesets.pixel_formats: colours by the file's profile, checked with a profile whose effect is a formula."""
import struct

import numpy as np
import PIL.Image
import pytest
from PIL import ImageCms

from imagesets.pixel_formats import cmyk_to_srgb, to_srgb

# sRGB's primaries and white, adapted to D50, as the sRGB profile itself gives them.
PRIMARIES = {b"rXYZ": (0.43607, 0.22249, 0.01392), b"gXYZ": (0.38515, 0.71687, 0.09708),
             b"bXYZ": (0.14307, 0.06061, 0.71410), b"wtpt": (0.96420, 1.0, 0.82491)}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def fixed(value):
    return struct.pack(">i", round(value * 65536))


def matrix_profile(gamma):
    """Return an ICC profile (version 2) of sRGB's primaries with another gamma."""
    tags = {name: b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz)) for name, xyz in PRIMARIES.items()}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    text = b"gamma\0"
    tags[b"desc"] = (b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)).ljust(96, b"\0")
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", offset + len(body), bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += b"".join(map(fixed, PRIMARIES[b"wtpt"]))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def srgb_curve(linear):
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)  # IEC 61966-2-1


@pytest.mark.parametrize("gamma", [1.0, 1.8])
def test_to_srgb_other_gamma_follows_the_formula(gamma):
    pixels = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (2, 1, 3))
    found, note = to_srgb(PIL.Image.fromarray(pixels), matrix_profile(gamma))
    expected = 255 * srgb_curve((np.arange(256) / 255) ** gamma)
    assert note == "colour profile to sRGB"
    # 2: LittleCMS computes in 8 and 16 bits.
    assert np.abs(np.asarray(found)[0] - expected[:, None]).max() <= 2


@pytest.mark.parametrize("profile", [None, b"", SRGB])
def test_to_srgb_nothing_asked_returns_the_image(profile):
    image = PIL.Image.new("RGB", (2, 2), (1, 2, 3))
    found, note = to_srgb(image, profile)
    assert found is image
    assert note is None


@pytest.mark.parametrize("profile", [b"no profile", SRGB[:100], bytes(500),
                                     ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_to_srgb_unusable_profile_is_ignored_and_said(profile):
    image = PIL.Image.new("RGB", (2, 2), (1, 2, 3))
    found, note = to_srgb(image, profile)
    assert found is image
    assert note == "colour profile ignored"


def test_cmyk_to_srgb_profile_of_another_kind_leaves_the_plain_formula():
    image = PIL.Image.new("CMYK", (1, 1), (0, 51, 102, 51))
    for profile, expected in ((SRGB, "colour profile ignored"), (None, None)):
        image.info["icc_profile"] = profile
        found, note = cmyk_to_srgb(image)
        assert (found.mode, found.getpixel((0, 0)), note) == ("RGB", (204, 163, 122), expected)


def test_to_srgb_grey_image_stays_as_it_is():
    image = PIL.Image.new("L", (1, 1), 100)
    assert to_srgb(image, matrix_profile(1.0)) == (image, "colour profile ignored")
