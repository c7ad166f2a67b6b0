"""imagesets.decode: every file is decoded correctly or refused with a reason, and nothing is printed."""

import logging
import os
import pickle
import struct
import warnings
import zlib
from random import Random

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from imagesets.decode import (
    MAX_PIXELS,
    REASONS,
    decode,
    decode_array,
    pillow_silenced,
    probe,
    stderr_silenced,
)
from imagesets.pixel_formats import BadImage
from imagesets.resize import PixelSpec
from tests.helpers.image_files import encode, lesion_like, png_16_bit, png_chunk, read_png

LESION = lesion_like(60, 45)
ORIENTATIONS = {  # from the stored to the upright image, EXIF 2.3, tag 274
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1)}


def spec_with(**changes):
    return PixelSpec(**{"width": None, "height": None, "transform": None, "resize_filter": "lanczos", "channels": 3,
                        "exact": False, **changes})


def exif(orientation):
    tags = PIL.Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(("image_format", "options"), [
    ("PNG", {}), ("BMP", {}), ("PPM", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}), ("WEBP", {"lossless": True})])
def test_decode_lossless_formats_keep_every_pixel(image_format, options):
    data = encode(LESION, image_format, **options)
    found = decode(data, spec_with())
    np.testing.assert_array_equal(read_png(found.png), LESION)
    assert (found.width, found.height, found.source_size, found.source_mode) == (60, 45, (60, 45), "RGB")
    assert found.notes == ()
    assert probe(data)[:3] == (60, 45, 3)


@pytest.mark.parametrize(("image_format", "options"), [
    ("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}), ("WEBP", {"quality": 95}),
    ("JPEG2000", {"quality_mode": "dB", "quality_layers": [40]}), ("TIFF", {"compression": "jpeg", "quality": 95})])
def test_decode_lossy_formats_come_close(image_format, options):
    found = decode(encode(LESION, image_format, **options), spec_with())
    assert np.abs(read_png(found.png).astype(int) - LESION).mean() < 3.5  # the noise of the picture has a spread of 3
    assert found.notes == ()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("image_format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_decode_exif_orientation_is_undone(orientation, image_format, options):
    data = encode(LESION, image_format, exif=exif(orientation), **options)
    found = decode(data, spec_with())
    upright = ORIENTATIONS[orientation](LESION)
    np.testing.assert_array_equal(read_png(found.png), upright)
    assert found.source_size == probe(data)[:2] == upright.shape[1::-1]
    assert found.notes == (() if orientation == 1 else ("rotated by EXIF",))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_decode_exif_orientation_and_decoder_downscaling_agree(orientation):
    picture = lesion_like(320, 200)
    picture[:100, :160] //= 2  # no symmetry is left
    spec = {"width": 20, "height": 20, "transform": "center-crop"}
    turned = decode(encode(picture, "JPEG", quality=95, exif=exif(orientation)), spec_with(**spec))
    assert "decoder downscaling" in turned.notes
    upright = decode_array(np.ascontiguousarray(ORIENTATIONS[orientation](picture)), spec_with(**spec))
    assert np.abs(read_png(turned.png).astype(int) - read_png(upright.png)).mean() < 2


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_decode_exif_orientation_without_meaning_is_upright(orientation):
    found = decode(encode(LESION, exif=exif(orientation)), spec_with())
    np.testing.assert_array_equal(read_png(found.png), LESION)
    assert found.notes == ()


def test_decode_faulty_exif_is_no_fault_of_the_picture():
    for tags in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"):
        found = decode(encode(LESION, "JPEG", quality=95, exif=tags), spec_with())
        assert (found.png, found.notes) == (decode(encode(LESION, "JPEG", quality=95), spec_with()).png, ())


def test_decode_two_pictures_of_a_phone_take_the_first_and_may_be_reduced():
    picture = PIL.Image.fromarray(lesion_like(320, 200))
    data = encode(picture, "MPO", save_all=True, append_images=[PIL.Image.new("RGB", (320, 200))], quality=95)
    found = decode(data, spec_with(width=20, height=20, transform="center-crop"))
    assert found.notes == ("decoder downscaling", "first frame of 2")
    alone = decode(encode(picture, "JPEG", quality=95), spec_with(width=20, height=20, transform="center-crop"))
    assert found.png == alone.png


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_decode_several_frames_takes_the_first(image_format):
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if image_format == "WEBP" else {}
    found = decode(encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options), spec_with())
    assert read_png(found.png)[4, 4].tolist() == [255, 0, 0]
    assert "first frame of 3" in found.notes


def test_decode_damaged_second_frame_leaves_the_first():
    frames = [PIL.Image.new("P", (8, 8), index) for index in range(2)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], palette=[255, 0, 0, 0, 255, 0])
    cut = data[:data.rindex(b",") + 10]
    found = decode(cut, spec_with())
    assert read_png(found.png)[4, 4].tolist() == [255, 0, 0]
    assert "first frame of several" in found.notes


def test_decode_content_counts_not_the_name():
    # decode gets only bytes, so files of several kinds may share a folder.
    kinds = {name: decode(encode(LESION, name), spec_with()).source_mode for name in ("PNG", "JPEG", "GIF", "BMP")}
    assert kinds == {"PNG": "RGB", "JPEG": "RGB", "GIF": "P", "BMP": "RGB"}


@pytest.mark.parametrize(("channels", "values", "expected"), [
    (1, [65535], [255] * 3), (3, [65535, 256, 0], [255, 1, 0]), (4, [65535, 256, 0, 65535], [255, 1, 0])])
def test_decode_16_bit_png_is_scaled(channels, values, expected):
    found = decode(png_16_bit(np.full((2, 2, channels), values)), spec_with())
    assert read_png(found.png)[0, 0].tolist() == expected
    assert "16-bit scaled" in found.notes


def test_decode_gray_and_color_meet_the_wanted_channels():
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    as_rgb = decode(encode(gray), spec_with())
    np.testing.assert_array_equal(read_png(as_rgb.png), np.repeat(gray[..., None], 3, axis=2))
    assert (as_rgb.notes, as_rgb.source_mode) == (("gray to RGB",), "L")
    as_gray = decode(encode(gray), spec_with(channels=1))
    np.testing.assert_array_equal(read_png(as_gray.png), gray)
    assert as_gray.notes == ()
    color = decode(encode(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8)), spec_with(channels=1))
    assert read_png(color.png).tolist() == [[76, 150]]  # ITU-R 601: 0.299 and 0.587
    assert color.notes == ("RGB to gray",)


def test_decode_notes_are_sorted_and_complete():
    image = PIL.Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    data = encode(image, transparency=0, exif=exif(6))
    assert decode(data, spec_with(width=4, height=4)).notes == ("alpha on white", "gray to RGB", "palette",
                                                                "rotated by EXIF", "upscaled")


def test_decode_color_profile_is_applied():
    from tests.imagesets.test_pixel_formats import SRGB, matrix_profile
    gray = np.full((4, 4, 3), 128, np.uint8)
    found = decode(encode(gray, icc_profile=matrix_profile(1.0)), spec_with())
    assert np.abs(read_png(found.png).astype(int) - 188).max() <= 1  # linear 0.502 is 188 in sRGB
    assert found.notes == ("color profile to sRGB",)
    same = decode(encode(gray, icc_profile=SRGB), spec_with())
    assert (read_png(same.png) == 128).all()
    assert same.notes == ()


@pytest.mark.parametrize(("resize_filter", "largest", "mean"), [("lanczos", 2, 0.25), ("box", 8, 0.6)])
@pytest.mark.parametrize("kind", [None, "center-crop"])
def test_decode_decoder_downscaling_stays_close_to_exact(resize_filter, largest, mean, kind):
    # Box takes whole pixels only, of which fewer are left after the decoder: hence its larger bound.
    data = encode(lesion_like(1603, 1201), "JPEG", quality=90)
    wanted = {"width": 128, "height": 128, "transform": kind, "resize_filter": resize_filter}
    exact, fast = (decode(data, spec_with(exact=exact, **wanted)) for exact in (True, False))
    difference = np.abs(read_png(exact.png).astype(int) - read_png(fast.png))
    assert (exact.notes, fast.notes) == ((), ("decoder downscaling",))
    assert 0 < difference.mean() < mean
    assert difference.max() <= largest


def test_decode_large_image_of_own_size_is_never_reduced():
    found = decode(encode(lesion_like(640, 480), "JPEG"), spec_with())
    assert (found.width, found.height, found.notes) == (640, 480, ())


def huge_png():
    header = struct.pack(">IIBBBBB", 13400, 13400, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


JPEG, PNG = encode(LESION, "JPEG"), encode(LESION)
BAD = {
    "empty": (b"", "zero bytes"),
    "text": (b"image_id,dx\nISIC_0,nv\n", "not an image"),
    "zeros": (bytes(1000), "not an image"),
    "csv of BMI": (b"BMI,age\n23,50\n", "not an image"),
    "sound": (b"RIFF\x24\0\0\0WAVEfmt ", "not an image"),
    "bmp header cut": (encode(LESION, "BMP")[:30], "truncated"),
    "bmp header": (encode(LESION, "BMP").replace(b"\x28\0\0\0", b"\x29\0\0\0"), "corrupt"),
    "pdf": (b"%PDF-1.4\n", "not an image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported format"),
    "dicom": (bytes(128) + b"DICM" + bytes(100), "unsupported format"),
    "jpeg cut": (JPEG[:len(JPEG) // 2], "truncated"),
    "png cut": (PNG[:len(PNG) // 2], "truncated"),
    "gif cut": (encode(LESION, "GIF")[:-200], "truncated"),
    "bmp cut": (encode(LESION, "BMP")[:-200], "truncated"),
    "jpeg start only": (JPEG[:20], "corrupt"),
    "png flipped": (PNG[:100] + bytes([PNG[100] ^ 255]) + PNG[101:], "corrupt"),
    "tiff damaged": (encode(LESION, "TIFF", compression="tiff_adobe_deflate").replace(b"x\x9c", b"xx"), "corrupt"),
    "huge": (huge_png(), "too large"),
    "nan": (encode(PIL.Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"), "not-a-number pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_decode_bad_file_has_its_reason_and_is_silent(name, capfd):
    data, reason = BAD[name]
    with warnings.catch_warnings(record=True, action="always") as caught, pytest.raises(BadImage) as error:
        decode(data, spec_with())
    assert (error.value.reason, str(error.value)) == (reason, reason)
    assert error.value.detail == ("has 179,560,000 pixels; at most 178,956,970 are read: reduce its size"
                                  if name == "huge" else "")
    assert reason in REASONS
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_decode_png_with_a_profile_that_is_too_long_says_so():
    profile = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2 << 20)))
    with pytest.raises(BadImage) as error:
        decode(PNG[:33] + profile + PNG[33:], spec_with())
    assert (error.value.reason, error.value.detail) == (
        "too large", "has a text or a color profile inside that is longer than the 1,048,576 bytes that are read (all "
        "together 67,108,864): save it without")


@pytest.mark.parametrize("name", ["empty", "text", "heic", "jpeg start only", "huge"])
def test_probe_bad_header_has_its_reason(name):
    with pytest.raises(BadImage, match=f"^{BAD[name][1]}$"):
        probe(BAD[name][0])


def test_probe_reads_the_header_only():
    large = lesion_like(320, 200)
    for image_format in ("JPEG", "PNG", "GIF", "BMP"):
        data = encode(large[..., 0], image_format)
        assert probe(data[:len(data) // 2]) == (320, 200, 1, False)
    data = encode(large, "JPEG")
    assert probe(data[:len(data) // 2]) == (320, 200, 3, False)


def test_decode_large_image_within_the_limit_is_silent(monkeypatch, capfd):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 60 * 45 - 1)  # Pillow warns above, refuses above twice that
    with warnings.catch_warnings(record=True, action="always") as caught:
        decode(PNG, spec_with())
    assert not caught
    assert MAX_PIXELS == 178_956_970
    assert capfd.readouterr() == ("", "")


def test_decode_too_small_for_the_wide_crop_says_so():
    spec = spec_with(width=64, height=48, transform="center-crop-wide")
    for call, source in ((decode, PNG), (decode_array, LESION)):
        with pytest.raises(BadImage, match="smaller than the wide crop"):
            call(source, spec)


def test_decode_truncated_file_is_never_padded_and_pillow_stays_as_it_was():
    def state():
        return (PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS, list(warnings.filters),
                list(logging.getLogger("PIL").handlers))
    before = state()
    assert before[0] is False
    for data in (JPEG, BAD["jpeg cut"][0], BAD["tiff damaged"][0]):
        try:
            decode(data, spec_with())
        except BadImage:
            assert data is not JPEG
    assert state() == before


def test_bad_image_travels_between_processes():
    found = pickle.loads(pickle.dumps(BadImage("truncated")))
    assert (type(found), found.reason) == (BadImage, "truncated")


@pytest.mark.parametrize(("pixels", "expected", "notes"), [
    (np.array([[0, 256, 65535]], np.uint16), [[[0] * 3, [1] * 3, [255] * 3]], ("16-bit scaled", "gray to RGB")),
    (np.array([[7, 8]], np.uint8), [[[7] * 3, [8] * 3]], ("gray to RGB",)),
    (np.array([[[7], [8]]], np.uint8), [[[7] * 3, [8] * 3]], ("gray to RGB",)),
    (np.array([[[1, 2, 3]]], np.uint8), [[[1, 2, 3]]], ()),
    (np.array([[[65535, 256, 0]]], np.uint16), [[[255, 1, 0]]], ("16-bit scaled",)),
    (np.array([[[1, 2, 3, 0]]], np.uint8), [[[255, 255, 255]]], ("alpha on white",))])
def test_decode_array_gives_the_pixels(pixels, expected, notes):
    found = decode_array(pixels, spec_with())
    assert (read_png(found.png).tolist(), found.notes) == (expected, notes)


@pytest.mark.parametrize("pixels", [np.zeros((2, 2), np.float32), np.zeros((2, 2, 2), np.uint8), np.zeros(4, np.uint8),
                                    np.zeros((0, 4), np.uint8)])
def test_decode_array_other_arrays_raise(pixels):
    with pytest.raises(ValueError, match="expected uint8 or uint16"):
        decode_array(pixels, spec_with())


def test_decode_equals_decode_array_for_the_same_pixels():
    spec = spec_with(width=32, height=32, transform="center-crop")
    assert decode(PNG, spec) == decode_array(LESION, spec)


def mutated(data, random):
    """Return a file cut short, or with some bytes changed, mostly near its start where they matter most."""
    data = bytearray(data)
    if random.random() < 0.3:
        return bytes(data[:random.randrange(len(data))])
    for _ in range(random.choice([1, 3, 30])):
        data[random.randrange(len(data) if random.random() < 0.5 else min(len(data), 200))] = random.randrange(256)
    return bytes(data)


def reason_or_picture(data, spec):
    try:
        return decode(data, spec)
    except BadImage as error:
        return error.reason


@pytest.mark.parametrize(("image_format", "options"), [
    ("JPEG", {}), ("PNG", {}), ("GIF", {}), ("BMP", {}), ("WEBP", {}), ("PPM", {}), ("JPEG2000", {}), ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"})])
def test_decode_mutated_files_give_a_picture_or_a_reason_and_no_noise(image_format, options, capfd):
    random, spec = Random(0), spec_with(width=16, height=16, transform="center-crop")
    whole, outcomes = encode(LESION, image_format, **options), set()
    for _ in range(40):
        data = mutated(whole, random)
        found = reason_or_picture(data, spec)
        if isinstance(found, str):
            outcomes.add(found)
        else:
            assert read_png(found.png).shape == (16, 16, 3)
            assert probe(data)[:2] == found.source_size
    assert outcomes
    assert outcomes <= set(REASONS)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fails", [False, True])
def test_stderr_silenced_drops_writes_and_restores(capfd, fails):
    def write():
        with stderr_silenced():
            os.write(2, b"inside")
            if fails:
                raise KeyError

    before = os.listdir("/proc/self/fd")
    if fails:
        with pytest.raises(KeyError):
            write()
    else:
        write()
    os.write(2, b"outside")
    assert capfd.readouterr() == ("", "outside")
    assert os.listdir("/proc/self/fd") == before


def test_pillow_silenced_drops_warnings_and_log_and_restores(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program that does not set up logging
    log, filters = logging.getLogger("PIL.TiffImagePlugin"), list(warnings.filters)
    with pillow_silenced():
        warnings.warn("inside", UserWarning, stacklevel=1)
        log.error("inside")
    assert capsys.readouterr() == ("", "")
    assert (list(warnings.filters), logging.getLogger("PIL").handlers) == (filters, [])
    log.error("outside")
    assert capsys.readouterr().err == "outside\n"
