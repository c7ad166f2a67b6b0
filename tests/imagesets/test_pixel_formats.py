"""imagesets.pixel_formats: images with more than 8 bits, color profiles, and all modes become 8-bit gray or RGB."""

import io
import json
import re
import struct

import numpy as np
import PIL.Image
import pytest
from PIL import ImageCms

from dnnlib.cli import UserError, run
from dnnlib.progress import Progress
from imagesets.commands import inspect_command
from imagesets.convert import convert
from imagesets.decode import decode, decode_array, probe
from imagesets.pixel_formats import BadImage, Depth, Values, cmyk_to_srgb, depth_remark, flatten, is_gray, to_srgb
from imagesets.reader import ImageSet
from imagesets.resize import PixelSpec
from tests.helpers.image_files import encode, png_16_bit, read_png
from tests.helpers.make_archives import counts, make_folder, make_zip, noise

PIXELS = np.array([[[4080, 2048, 0], [1, 4095, 17]], [[65, 300, 4000], [9, 8, 7]]])  # [2, 2, 3], 12 bits


def spec_with(bits=None, ranges=None, channels=3, **changes):
    return PixelSpec(**{"width": None, "height": None, "transform": None, "resize_filter": "lanczos",
                        "channels": channels, "exact": False, "depth": Depth(bits=bits, ranges=ranges), **changes})


def pixels_of(data, **options):
    return read_png(decode(data, spec_with(**options)).png)


def tiff(bits, data, size, *, samples=1, sample_format=1, endian="<", planar=1):
    """Return an uncompressed TIFF (TIFF 6.0, section 2) of a kind that Pillow does not write."""
    width, height = size
    entries = [(256, 4, width), (257, 4, height), (259, 3, 1), (262, 3, 2 if samples == 3 else 1), (277, 3, samples),
               (278, 4, height), (279, 4, len(data)), (284, 3, planar)]
    count, extra = len(entries) + 3, b""
    start = 8 + 2 + 12 * count + 4
    lists = []
    for tag, value in ((258, bits), (339, sample_format)):
        lists.append((tag, 3, samples, start + len(extra) if samples > 2 else value))
        extra += struct.pack(f"{endian}{samples}H", *[value] * samples)
    whole = sorted([(tag, kind, 1, value) for tag, kind, value in entries] + lists + [(273, 4, 1, start + len(extra))])
    fields = b"".join(struct.pack(f"{endian}HHI", tag, kind, num) + (
        struct.pack(f"{endian}HH", value, 0) if kind == 3 and num == 1 else struct.pack(f"{endian}I", value))
        for tag, kind, num, value in whole)
    return (struct.pack(f"{endian}2sHI", b"II" if endian == "<" else b"MM", 42, 8) + struct.pack(f"{endian}H", count)
            + fields + bytes(4) + extra + data)


def scaled(values, white):
    return np.rint(np.asarray(values, dtype=float) * 255 / white).astype(int)


# ---- one image


@pytest.mark.parametrize("bits", range(8, 17))
def test_depth_makes_its_largest_number_white_and_rounds_to_the_nearest(bits):
    white = (1 << bits) - 1
    every = np.arange(white + 1, dtype=np.uint16)[None]
    found = decode_array(every, spec_with(bits=bits, channels=1))
    np.testing.assert_array_equal(read_png(found.png)[0], [int(v * 255 / white + 0.5) for v in range(white + 1)])
    assert found.values == Values(kind="16-bit", black=0, white=white, largest=white)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_without_a_depth_takes_65535_for_white(image_format):
    found = decode(encode(np.array([[0, 256, 32768, 65535]], dtype=np.uint16), image_format), spec_with(channels=1))
    assert read_png(found.png).tolist() == [[0, 1, 128, 255]]
    assert (found.notes, found.values.largest) == (("16-bit scaled",), 65535)


@pytest.mark.parametrize(("data", "bits"), [
    (png_16_bit(PIXELS), 12),
    (tiff(16, PIXELS.astype("<u2").tobytes(), (2, 2), samples=3), 12),
    (tiff(16, PIXELS.astype(">u2").tobytes(), (2, 2), samples=3, endian=">"), 12),
    (b"P6 2 2 65535\n" + PIXELS.astype(">u2").tobytes(), 12),
    (b"P6 2 2 4095\n" + PIXELS.astype(">u2").tobytes(), None)], ids=["png", "tiff", "tiff MM", "ppm", "ppm of 4095"])
def test_12_bit_color_uses_all_12_bits(data, bits):
    np.testing.assert_allclose(pixels_of(data, bits=bits), scaled(PIXELS, 4095), atol=0 if bits else 1)
    if bits:
        assert decode(data, spec_with(bits=12)).values.largest == 4095
        np.testing.assert_array_equal(pixels_of(data), scaled(PIXELS, 65535))


@pytest.mark.parametrize("opaque", [4095, 65535])
def test_12_bit_color_or_gray_with_alpha_stays_opaque(opaque):
    alpha = np.full((2, 2, 1), opaque)
    np.testing.assert_array_equal(pixels_of(png_16_bit(np.concatenate([PIXELS, alpha], axis=2)), bits=12),
                                  scaled(PIXELS, 4095))
    gray = np.concatenate([PIXELS[..., :1], alpha], axis=2)
    found = decode(png_16_bit(gray), spec_with(bits=12, channels=1))
    np.testing.assert_array_equal(read_png(found.png), scaled(PIXELS[..., 0], 4095))
    assert (found.values.largest, found.notes) == (4080, ("16-bit scaled", "opaque alpha dropped"))


def test_16_bit_gray_with_alpha_goes_on_white():
    found = pixels_of(png_16_bit(np.array([[[0, 0], [0, 65535], [25700, 32896]]])), channels=1)
    assert found.tolist() == [[255, 0, round((100 * 128 + 255 * 127) / 255)]]


def test_16_bit_transparent_color_is_compared_in_16_bits():
    from tests.helpers.image_files import png_chunk
    data = png_16_bit(np.array([[[256, 512, 1], [256, 512, 2]]]))
    cut = data.index(b"IDAT") - 4
    data = data[:cut] + png_chunk(b"tRNS", struct.pack(">3H", 256, 512, 1)) + data[cut:]
    assert pixels_of(data).tolist() == [[[255, 255, 255], [1, 2, 0]]]


def test_16_bit_exif_orientation_turns_both_bytes():
    tags = PIL.Image.Exif()
    tags[0x0112] = 6
    from tests.helpers.image_files import png_chunk
    data = png_16_bit(PIXELS)
    cut = data.index(b"IDAT") - 4
    data = data[:cut] + png_chunk(b"eXIf", tags.tobytes()[6:]) + data[cut:]
    np.testing.assert_array_equal(pixels_of(data, bits=12), np.rot90(scaled(PIXELS, 4095), -1))


def test_tiff_of_12_bits_says_so_itself():
    found = decode(tiff(12, bytes([0xff, 0xf8, 0x00]), (2, 1)), spec_with(channels=1))
    assert (read_png(found.png).tolist(), found.values) == ([[255, 128]], None)


@pytest.mark.parametrize("endian", "<>")
def test_signed_16_bit_tiff_is_stretched_where_it_goes_below_zero(endian):
    data = tiff(16, struct.pack(f"{endian}4h", -100, 0, 100, 155), (4, 1), sample_format=2, endian=endian)
    found = decode(data, spec_with(channels=1))
    assert (read_png(found.png).tolist(), found.notes) == ([[0, 100, 200, 255]], ("32-bit scaled",))
    assert found.values == Values(kind="32-bit", black=-100, white=155, largest=155)


def test_unsigned_32_bit_tiff_is_not_taken_for_signed():
    data = tiff(32, struct.pack("<3I", 0, 1 << 31, (1 << 32) - 1), (3, 1))
    assert pixels_of(data, channels=1).tolist() == [[0, 128, 255]]


def test_planar_16_bit_tiff_which_pillow_misreads_is_refused():
    data = tiff(16, PIXELS.transpose(2, 0, 1).astype("<u2").tobytes(), (2, 2), samples=3, planar=2)
    with pytest.raises(BadImage, match=r"^unsupported format$"):
        decode(data, spec_with())


@pytest.mark.parametrize(("values", "expected", "note"), [
    (np.int32([0, 255, 256, 65535]), [0, 1, 1, 255], "32-bit scaled"),
    (np.int32([0, 65536, 131072, 131072]), [0, 128, 255, 255], "32-bit scaled"),
    (np.int32([70000, 70000, 70000, 70000]), [0, 0, 0, 0], "32-bit scaled"),
    (np.float32([0, 0.25, 0.5, 1]), [0, 64, 128, 255], "float scaled"),
    (np.float32([0, 1.4, 100, 255]), [0, 1, 100, 255], "float scaled"),
    (np.float32([0, 257, 32768, 65535]), [0, 1, 128, 255], "float scaled"),
    (np.float32([-1, 0, 1, 4]), [0, 51, 102, 255], "float scaled"),
    (np.float32([0, 0, 0, 0]), [0, 0, 0, 0], "float scaled")])
def test_32_bit_and_float_picture_alone_is_scaled_by_its_own_values(values, expected, note):
    data = encode(PIL.Image.fromarray(values[None]), "TIFF")
    found = decode(data, spec_with(channels=1))
    assert (read_png(found.png).tolist(), found.notes) == ([expected], (note,))
    assert probe(data).needs_range


@pytest.mark.parametrize(("kind", "ranges", "bits", "expected"), [
    (np.float32, {"float": (-100, 155)}, None, [100, 101, 110]), (np.float32, {"float": (0, 255)}, None, [0, 1, 10]),
    (np.float32, {"float": (0, 4095)}, 12, [0, 0, 1]), (np.float32, {"float": (0, 65535)}, None, [0, 0, 0]),
    (np.int32, {"32-bit": (-100, 155)}, None, [100, 101, 110]), (np.int32, {}, 8, [0, 1, 10])])
def test_scale_follows_from_the_set_not_from_the_image(kind, ranges, bits, expected):
    data = encode(PIL.Image.fromarray(np.array([[0, 1, 10]], dtype=kind)), "TIFF")
    assert pixels_of(data, bits=bits, ranges=ranges, channels=1).tolist() == [expected]


@pytest.mark.parametrize(("data", "bits", "reason"), [
    (encode(np.array([[4096]], np.uint16)), 12, "values beyond --depth"),
    (png_16_bit(np.full((1, 1, 3), 4096)), 12, "values beyond --depth"),
    (encode(PIL.Image.fromarray(np.int32([[-1]])), "TIFF"), 16, "values beyond --depth"),
    (encode(PIL.Image.fromarray(np.float32([[4096]])), "TIFF"), 12, "32-bit or float, but not named .tif or .pfm"),
    (encode(PIL.Image.fromarray(np.float32([[np.inf]])), "TIFF"), None, "not-a-number pixels"),
    (encode(PIL.Image.fromarray(np.float32([[np.nan, 1]])), "TIFF"), None, "not-a-number pixels")])
def test_values_without_a_place_are_bad_images(data, bits, reason):
    with pytest.raises(BadImage, match=f"^{re.escape(reason)}$"):
        decode(data, spec_with(bits=bits, ranges={}, channels=1))


@pytest.mark.parametrize(("white", "largest", "remark"), [
    (65535, 4080, "largest value 4080 of 65535 in all of them: 12-bit data? --depth=12 makes 4095 white"),
    (65535, 4096, "largest value 4096 of 65535 in all of them: 13-bit data? --depth=13 makes 8191 white"),
    (65535, 100, "largest value 100 of 65535 in all of them: 8-bit data? --depth=8 makes 255 white"),
    (16383, 1000.5, "largest value 1000.5 of 16383 in all of them: 10-bit data? --depth=10 makes 1023 white"),
    (65535, 32768, None), (4095, 4080, None), (65535, 0, None), (65535, -3.5, None), (255, 3, None), (1, 0.1, None),
    (900.0, 3, None)])
def test_remark_where_fewer_bits_would_hold_all_values(white, largest, remark):
    assert depth_remark("all of them", white, largest) == remark


# ---- sets


def run_convert(source, dest, **options):
    return convert(source, dest, **{"workers": 1, "stream": io.StringIO()} | options)


def values_12_bit(seed):
    values = np.random.RandomState(seed).randint(0, 4081, (8, 8)).astype(np.uint16)
    values[0, 0] = 4080
    return values


def pixels(data_set):
    return [read_png(data_set.read(name)) for name in data_set.names]


@pytest.fixture(params=[make_folder, make_zip])
def source_12_bit(request, tmp_path):
    """Two gray images of 12 bits in 16, in two classes."""
    return request.param(tmp_path / "deep", {f"{name}/{name}.png": encode(values_12_bit(seed))
                                             for seed, name in enumerate(("mel", "nv"))})


REMARK = "largest value 4080 of 65535 in all 16-bit images: 12-bit data? --depth=12 makes 4095 white"


def test_12_bit_set_is_noted_and_recorded_and_inspect_tells(source_12_bit, tmp_path, capsys):
    summary = run_convert(source_12_bit, tmp_path / "set.zip", report=tmp_path / "r.json")
    at = summary.lines.index(f"  note: {REMARK}")
    assert summary.lines[at - 1] == "  values of 16-bit images: 0 became black, 65535 white; the largest is 4080"
    found = ImageSet(tmp_path / "set.zip")
    record = {"16-bit": {"images": 2, "black": 0, "white": 65535, "largest": 4080}}
    assert found.source["values"] == json.loads((tmp_path / "r.json").read_text())["values"] == record
    assert max(image.max() for image in pixels(found)) == 16
    assert run(inspect_command, [str(tmp_path / "set.zip"), "--workers=1"]) == 0
    out = capsys.readouterr().out
    assert f"problem: depth: {REMARK}: convert the source again\n" in out
    assert "ready for training: yes\n" in out
    assert "dark" not in out


def test_depth_option_gives_the_set_its_brightness_back(source_12_bit, tmp_path, capsys):
    summary = run_convert(source_12_bit, tmp_path / "set.zip", depth=12)
    found = ImageSet(tmp_path / "set.zip")
    for seed, image in enumerate(pixels(found)):
        np.testing.assert_array_equal(image, scaled(values_12_bit(seed), 4095))
    assert found.source["options"]["depth"] == 12
    assert not [line for line in summary.lines if "note" in line]
    assert run(inspect_command, [str(tmp_path / "set.zip"), "--workers=1"]) == 0
    assert "bit data?" not in capsys.readouterr().out


def test_depth_leaves_images_of_8_bits_as_they_are(tmp_path):
    eight = noise(1, 8, 8, 3)
    source = make_folder(tmp_path / "in", {"a.png": encode(eight), "b.png": encode(values_12_bit(1))})
    summary = run_convert(source, tmp_path / "set.zip", depth=12)
    one, other = pixels(ImageSet(tmp_path / "set.zip"))
    np.testing.assert_array_equal(one, eight)
    np.testing.assert_array_equal(other[..., 0], scaled(values_12_bit(1), 4095))
    assert counts(summary.report["converted"])["16-bit scaled"] == 1
    (source / "b.png").unlink()
    note = "  note: --depth=12 changed nothing: no image has more than 8 bits per channel"
    assert note in run_convert(source, tmp_path / "set.zip", depth=12).lines


def test_arrays_of_12_bits_take_a_depth_too(tmp_path):
    stack = np.stack([values_12_bit(seed) for seed in range(2)])
    np.savez(tmp_path / "deep.npz", train_images=stack, train_labels=np.zeros((2, 1), np.uint8))
    assert f"  note: {REMARK}" in run_convert(tmp_path / "deep.npz", tmp_path / "set.zip").lines
    run_convert(tmp_path / "deep.npz", tmp_path / "set.zip", depth=12)
    np.testing.assert_array_equal(pixels(ImageSet(tmp_path / "set.zip")), scaled(stack, 4095))


def test_values_beyond_the_depth_are_counted_named_and_limited(source_12_bit, tmp_path):
    message = ("2 of 2 images cannot be read (values beyond --depth: 2), none is left; --depth=10 takes 0 to 1023: "
               "choose a larger one or leave it out, or list them with --report=FILE")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run_convert(source_12_bit, tmp_path / "set.zip", depth=10)
    assert not (tmp_path / "set.zip").exists()


def test_images_without_a_place_for_their_values_are_dropped_and_depth_is_not_said_to_change_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    for name, pixels in (("a", np.zeros((8, 8), np.uint8)), ("b", np.full((8, 8), 4096, np.uint16))):
        PIL.Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.png")
    summary = run_convert(tmp_path / "in", tmp_path / "set.zip", depth=12, max_bad=0.5)
    assert counts(summary.report["dropped"]) == {"unreadable: values beyond --depth": 1}
    assert not [line for line in summary.lines if "changed nothing" in line]


def test_floats_that_were_not_expected_by_their_names_are_never_beyond_a_depth_that_nobody_gave(tmp_path):
    (tmp_path / "in").mkdir()
    for name, high in (("a", 1), ("c", 4000)):  # of which the first alone is seen before the image with color
        PIL.Image.fromarray(np.full((8, 8), high, np.float32)).save(tmp_path / "in" / f"{name}.png", format="TIFF")
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8) + np.uint8([0, 0, 9])).save(tmp_path / "in" / "b.png")
    message = ("1 of 3 images cannot be read (32-bit or float, but not named .tif or .pfm: 1), more than "
               "--max-bad=0.01 allows; list them with --report=FILE")
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run_convert(tmp_path / "in", tmp_path / "set.zip", width=8, height=8)


def test_values_beyond_the_largest_depth_are_read_without_it(tmp_path):
    (tmp_path / "in").mkdir()
    PIL.Image.fromarray(np.full((8, 8), 65536, np.int32)).save(tmp_path / "in" / "a.tif")
    with pytest.raises(UserError, match=r"; --depth=16 takes 0 to 65535: leave it out, or list them with "
                                        r"--report=FILE$"):
        run_convert(tmp_path / "in", tmp_path / "set.zip", depth=16)
    assert run_convert(tmp_path / "in", tmp_path / "set.zip").report["kept"] == 1


@pytest.mark.parametrize("bits", [7, 17, 0, -1])
def test_depth_out_of_range_is_refused_before_anything_is_read(bits, tmp_path):
    with pytest.raises(UserError, match=f"^--depth={bits}; expected the bits per value of images with more than 8 "):
        run_convert(tmp_path / "nowhere", tmp_path / "set.zip", depth=bits)


def tif(values):
    return encode(PIL.Image.fromarray(values), "TIFF")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("options", [{}, {"width": 8, "height": 8}])
def test_32_bit_and_float_images_of_a_set_share_one_scale_for_any_workers(dtype, options, tmp_path, monkeypatch):
    """The faintest image stays the faintest, even if the first image has color and the size is known."""
    steps = np.arange(64, dtype=dtype).reshape(8, 8)
    files = {"a.png": encode(noise(0, 8, 8, 3)), "b.tif": tif(steps), "x/c.TIFF": tif(steps * 10 - 100),
             "d.tif": tif(np.full((8, 8), 7, dtype))}
    if dtype == np.float32:
        files["nan.tif"] = tif(np.full((8, 8), np.nan, dtype))
    monkeypatch.setitem(Progress.__init__.__kwdefaults__, "log_seconds", 0)
    source, screen = make_folder(tmp_path / "in", files), io.StringIO()
    summary = run_convert(source, tmp_path / "1.zip", stream=screen, max_bad=0.5, unlabeled="keep", **options)
    assert f"/{len(files) - 1} values of 32-bit and float images" in screen.getvalue()
    _, b, d, c = pixels(ImageSet(tmp_path / "1.zip"))
    for image, values in ((b, steps), (c, steps * 10 - 100), (d, np.full((8, 8), 7))):
        np.testing.assert_array_equal(image[..., 0], np.rint((values + 100) * (255 / 630)).astype(int))
    kind = "float" if dtype == np.float32 else "32-bit"
    assert f"  values of {kind} images: -100 became black, 530 white; the largest is 530" in summary.lines
    assert counts(summary.report["dropped"]) == ({"unreadable: not-a-number pixels": 1} if dtype == np.float32 else {})
    run_convert(source, tmp_path / "3.zip", workers=3, max_bad=0.5, unlabeled="keep", **options)
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "3.zip").read_bytes()


def test_float_images_of_one_value_are_told(tmp_path):
    source = make_folder(tmp_path / "in", {f"{name}.tif": tif(np.full((8, 8), -2, np.float32)) for name in "ab"})
    summary = run_convert(source, tmp_path / "set.zip")
    assert "  note: all float images have only the value -2 and became black" in summary.lines
    assert not any(image.any() for image in pixels(ImageSet(tmp_path / "set.zip")))


def test_sets_of_8_and_16_bits_are_read_once(source_12_bit, tmp_path, monkeypatch):
    monkeypatch.setitem(Progress.__init__.__kwdefaults__, "log_seconds", 0)
    screen = io.StringIO()
    run_convert(source_12_bit, tmp_path / "set.zip", stream=screen)
    assert "2/2 images" in screen.getvalue()
    assert "values of" not in screen.getvalue()


def test_float_image_under_another_name_is_not_scaled_by_itself(tmp_path):
    files = {"a.png": encode(noise(0, 8, 8, 3)), "b.png": tif(np.full((8, 8), 7, np.float32))}
    source = make_folder(tmp_path / "in", files)
    summary = run_convert(source, tmp_path / "set.zip", width=8, height=8, max_bad=0.5)
    assert counts(summary.report["dropped"]) == {"unreadable: 32-bit or float, but not named .tif or .pfm": 1}
    summary = run_convert(source, tmp_path / "set.zip")
    assert counts(summary.report["dropped"]) == {}  # all headers are read for the size


def test_inspect_tells_a_dark_set_without_a_record_and_16_bit_files(tmp_path, capsys):
    files = {"a.png": encode(np.full((8, 8, 3), 16, np.uint8)), "b.png": encode(noise(0, 8, 8, 3) // 16)}
    make_folder(tmp_path / "dark", files)
    assert run(inspect_command, [str(tmp_path / "dark"), "--workers=1"]) == 0
    assert ("problem: dark: largest value 16 of 255 in all images: 12-bit data in 16-bit files? convert the source "
            "again with --depth=12\n") in capsys.readouterr().out
    make_folder(tmp_path / "deep", {"a.png": encode(values_12_bit(0)), "b.png": encode(values_12_bit(1))})
    assert run(inspect_command, [str(tmp_path / "deep"), "--workers=1"]) == 0
    assert f"problem: depth: {REMARK}: convert the set\n" in capsys.readouterr().out
    (tmp_path / "dark/a.png").write_bytes(encode(np.full((8, 8, 3), 65, np.uint8)))
    assert run(inspect_command, [str(tmp_path / "dark"), "--workers=1"]) == 0
    assert "problem: dark" not in capsys.readouterr().out


def opened(data):
    return PIL.Image.open(io.BytesIO(data))


def flat(image, *, gray):
    image.load()
    found, notes = flatten(image, gray=gray)
    assert found.mode == ("L" if gray else "RGB")
    return np.asarray(found), notes


def on_white(value, alpha):
    return round((value * alpha + 255 * (255 - alpha)) / 255)


def test_flatten_rgba_goes_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 128], [200, 0, 255, 51]]], dtype=np.uint8)
    pixels, notes = flat(opened(encode(rgba)), gray=False)
    assert pixels.tolist() == [[[on_white(value, pixel[3]) for value in pixel[:3]] for pixel in rgba[0].tolist()]]
    assert pixels[0, 1].tolist() == [255, 255, 255]
    assert notes == {"alpha on white"}


def test_flatten_la_goes_on_white_and_stays_gray():
    image = PIL.Image.merge("LA", [PIL.Image.fromarray(np.array([[0, 0, 100]], np.uint8)),
                                   PIL.Image.fromarray(np.array([[0, 255, 128]], np.uint8))])
    image = opened(encode(image))
    assert is_gray(image)
    pixels, notes = flat(image, gray=True)
    assert (pixels.tolist(), notes) == ([[255, 0, on_white(100, 128)]], {"alpha on white"})


def test_flatten_premultiplied_alpha_is_divided_first():
    image = PIL.Image.frombytes("RGBa", (1, 1), bytes([50, 25, 0, 128]))  # color 100, 50, 0 at half strength
    pixels, _ = flat(image, gray=False)
    assert np.abs(pixels[0, 0].astype(int) - [on_white(100, 128), on_white(50, 128), on_white(0, 128)]).max() <= 1


def test_flatten_opaque_alpha_changes_nothing():
    rgb = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    pixels, notes = flat(opened(encode(np.dstack([rgb, np.full((3, 4), 255, np.uint8)]))), gray=False)
    np.testing.assert_array_equal(pixels, rgb)
    assert notes == {"opaque alpha dropped"}


PALETTE = [200, 10, 30, 0, 0, 255, 90, 90, 90]


def palette_image(palette=PALETTE):
    image = PIL.Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putdata([0, 1, 2])
    image.putpalette(palette)
    return image


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "TIFF"])
def test_flatten_palette_gives_its_colors(image_format):
    image = opened(encode(palette_image(), image_format))
    assert (image.mode, is_gray(image)) == ("P", False)
    pixels, notes = flat(image, gray=False)
    assert (pixels.reshape(-1).tolist(), notes) == (PALETTE, {"palette"})


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_flatten_palette_transparent_color_goes_on_white(transparency):
    pixels, notes = flat(opened(encode(palette_image(), transparency=transparency)), gray=False)
    assert pixels.tolist() == [[[200, 10, 30], [255, 255, 255], [90, 90, 90]]]
    assert notes == {"palette", "alpha on white"}


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_flatten_palette_of_grays_is_gray(image_format):
    image = opened(encode(palette_image([7, 7, 7, 0, 0, 0, 255, 255, 255]), image_format))
    assert (image.mode, is_gray(image)) == ("P", True)
    assert flat(image, gray=True)[0].tolist() == [[7, 0, 255]]


def test_flatten_rgb_with_one_transparent_color_goes_on_white():
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    found, notes = flat(opened(encode(pixels, transparency=(1, 2, 3))), gray=False)
    assert (found.tolist(), notes) == ([[[255, 255, 255], [4, 5, 6]]], {"alpha on white"})


def test_flatten_one_bit_is_black_and_white():
    image = opened(encode(PIL.Image.fromarray(np.array([[False, True]]))))
    assert (image.mode, is_gray(image)) == ("1", True)
    pixels, notes = flat(image, gray=True)
    assert (pixels.tolist(), notes) == ([[0, 255]], {"1-bit"})


@pytest.mark.parametrize(("cmyk", "rgb"), [((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)),
                                           ((255, 0, 0, 0), (0, 255, 255)), ((0, 128, 255, 0), (255, 127, 0)),
                                           ((0, 51, 102, 51), (204, 163, 122))])
@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_flatten_cmyk_known_colors(cmyk, rgb, image_format):
    image = opened(encode(PIL.Image.new("CMYK", (16, 16), cmyk), image_format, quality=100))
    pixels, notes = flat(image, gray=False)
    assert np.abs(pixels.astype(int) - rgb).max() <= 1  # JPEG's own rounding
    assert notes == {"CMYK"}


def test_flatten_ycck_jpeg_turns_colors_round_once():
    data = bytearray(encode(PIL.Image.new("CMYK", (16, 16), (105, 155, 115, 51)), "JPEG", quality=100))
    marker = data.index(b"Adobe\0")
    assert data[marker + 11] == 0
    data[marker + 11] = 2  # now the stored, inverted numbers 150 100 140 204 mean Y Cb Cr K
    pixels, _ = flat(opened(bytes(data)), gray=False)
    luma, blue, red = 150, 100 - 128, 140 - 128
    inks = np.array([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue])  # JFIF
    assert np.abs(pixels - (255 - inks) * (255 - 51) / 255).max() <= 2


@pytest.mark.parametrize(("mode", "color", "rgb", "tolerance"), [
    ("HSV", (0, 255, 255), (255, 0, 0), 0), ("YCbCr", (76, 85, 255), (254, 0, 0), 1),
    ("LAB", (255, 128, 128), (255, 255, 255), 2), ("LAB", (0, 128, 128), (0, 0, 0), 2)])
def test_flatten_other_color_spaces_known_colors(mode, color, rgb, tolerance):
    pixels, notes = flat(PIL.Image.new(mode, (2, 2), color), gray=False)
    assert np.abs(pixels.astype(int) - rgb).max() <= tolerance
    assert notes == {mode}


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
    assert note == "color profile to sRGB"
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
    assert note == "color profile ignored"


def test_cmyk_to_srgb_profile_of_another_kind_leaves_the_plain_formula():
    image = PIL.Image.new("CMYK", (1, 1), (0, 51, 102, 51))
    for profile, expected in ((SRGB, "color profile ignored"), (None, None)):
        image.info["icc_profile"] = profile
        found, note = cmyk_to_srgb(image)
        assert (found.mode, found.getpixel((0, 0)), note) == ("RGB", (204, 163, 122), expected)


def test_to_srgb_gray_image_stays_as_it_is():
    image = PIL.Image.new("L", (1, 1), 100)
    assert to_srgb(image, matrix_profile(1.0)) == (image, "color profile ignored")
