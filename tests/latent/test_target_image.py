"""latent.targets: any picture becomes an image of the network, or one line says why not."""

import os
import struct
import tarfile
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib.cli import UserError
from imagesets.decode import REASONS, BadImage, decode
from imagesets.pixel_formats import Depth
from imagesets.reader import ImageSet
from imagesets.resize import PixelSpec
from latent.targets import _REASONS, prepare, read_ranges, read_target, spec_for
from tests.helpers.image_files import encode, lesion_like, png_chunk, read_png
from tests.helpers.tiny_networks import generator

WIDE = lesion_like(60, 45)
COLOUR, GREY = (SimpleNamespace(img_resolution=16, img_channels=channels) for channels in (3, 1))


def pixels(height, width, channels=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[..., 0] if channels == 1 else values


def written(path, data):
    path.write_bytes(data)
    return path


def refusal(path, G=COLOUR, **options):
    with pytest.raises(UserError) as error:
        read_target(path, G, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("transform", ["center-crop", "none"])
@pytest.mark.parametrize("resize_filter", ["lanczos", "box"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("G", "channels"), [(COLOUR, 3), (GREY, 1)])
def test_target_of_the_networks_size_keeps_every_pixel(tmp_path, transform, resize_filter, exact, G, channels):
    values = pixels(16, 16, channels)
    path = written(tmp_path / "x.png", encode(values))
    found = read_target(path, G, transform=transform, resize_filter=resize_filter, exact=exact)
    assert (found.dtype, found.shape) == (torch.uint8, (channels, 16, 16))
    expected = values.reshape(16, 16, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_target_takes_the_middle_square_unless_told_otherwise(tmp_path):
    values = pixels(16, 24)
    found = read_target(written(tmp_path / "x.png", encode(values)), COLOUR)
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), values[:, 4:20])


def test_target_without_a_transform_is_stretched(tmp_path):
    values = np.repeat(pixels(16, 16), 2, axis=1)  # pairs of equal columns, whose mean is the one column
    found = read_target(written(tmp_path / "x.png", encode(values)), COLOUR, transform="none", resize_filter="box")
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), values[:, ::2])


def test_target_of_the_wide_crop_lies_between_black_bars(tmp_path):
    values = pixels(12, 16)
    found = read_target(written(tmp_path / "x.png", encode(values)), COLOUR, transform="center-crop-wide")
    np.testing.assert_array_equal(found[:, 2:14].permute(1, 2, 0).numpy(), values)
    assert not found[:, :2].any()
    assert not found[:, 14:].any()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"])
@pytest.mark.parametrize("G", [COLOUR, GREY])
def test_target_of_any_kind_and_name_has_the_pixels_of_a_data_set(tmp_path, image_format, G):
    data = encode(WIDE, image_format)
    spec = PixelSpec(width=16, height=16, transform="center-crop", resize_filter="lanczos", channels=G.img_channels,
                     exact=False)
    expected = read_png(decode(data, spec).png).reshape(16, 16, -1)
    found = read_target(written(tmp_path / "without an ending", data), G)
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("G", [COLOUR, GREY])
def test_target_of_any_mode_becomes_the_networks(tmp_path, mode, G):
    if mode == "I;16":
        image = PIL.Image.fromarray(np.full((16, 16), 0xC800, np.uint16))  # 200 in eight bits
    else:
        value = 255 if mode == "1" else 200
        image = PIL.Image.new("L", (16, 16), value).convert("RGB" if mode in ("CMYK", "RGBA") else "L").convert(mode)
    found = read_target(written(tmp_path / "x", encode(image, "TIFF" if mode == "CMYK" else "PNG")), G)
    assert found.shape == (G.img_channels, 16, 16)
    assert (found.int() - (255 if mode == "1" else 200)).abs().max() <= 1


def test_target_small_is_enlarged(tmp_path):
    found = read_target(written(tmp_path / "x.png", encode(np.full((2, 3, 3), 77, np.uint8))), COLOUR)
    assert (found.shape, found.unique().tolist()) == ((3, 16, 16), [77])


def test_target_exact_reads_large_jpegs_whole(tmp_path):
    path = written(tmp_path / "x.jpg", encode(lesion_like(640, 480), "JPEG"))
    fast, exact = (read_target(path, COLOUR, exact=exact).int() for exact in (False, True))
    assert 0 < (fast - exact).abs().max() <= 3


def test_prepare_gives_memory_of_its_own():
    found = prepare(encode(pixels(16, 16)), spec_for(COLOUR))
    found.zero_()  # a view of read-only bytes would warn or crash
    assert found.is_contiguous()


def test_prepare_bad_file_raises_with_the_reason():
    with pytest.raises(BadImage, match=r"^truncated$"):
        prepare(encode(WIDE)[:500], spec_for(COLOUR))


def test_spec_is_that_of_a_data_set_for_the_network():
    G = generator()
    common = {"width": 8, "resize_filter": "box", "channels": 3, "exact": True}
    assert spec_for(G, "center-crop", "box", True) == PixelSpec(**common, height=8, transform="center-crop")
    assert spec_for(G, "none", "box", True) == PixelSpec(**common, height=8, transform=None)
    assert spec_for(G, "center-crop-wide", "box", True) == PixelSpec(**common, height=6, transform="center-crop-wide")
    assert spec_for(G) == PixelSpec(width=8, height=8, transform="center-crop", resize_filter="lanczos", channels=3,
                                    exact=False)


@pytest.mark.parametrize(("options", "text"), [
    ({"transform": "crop"}, "--transform is crop; expected center-crop, center-crop-wide or none"),
    ({"resize_filter": "cubic"}, "--resize-filter is cubic; expected box or lanczos")])
def test_spec_of_unknown_values_raises(options, text):
    with pytest.raises(UserError, match=f"^{text}$"):
        spec_for(COLOUR, **options)


def test_spec_for_other_channels_raises():
    with pytest.raises(UserError, match=r"^the network of --network makes images of 4 channels; expected one of grey "
                                        r"or RGB images$"):
        spec_for(SimpleNamespace(img_resolution=16, img_channels=4))


def test_target_missing_says_so(tmp_path):
    path = tmp_path / "x.png"
    assert refusal(path) == (f"--target is {path}, which does not exist; expected an image file, such as a PNG or "
                             "JPEG")


def test_target_folder_says_so(tmp_path):
    assert refusal(tmp_path) == (f"--target is {tmp_path}, which is a folder; expected an image file, such as a PNG "
                                 "or JPEG (the images of a folder go with --data)")


def test_target_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert refusal(path) == (f"--target is {path}, which is a pipe or a device; expected an image file, such as a PNG "
                             "or JPEG")


def test_target_of_more_bytes_than_any_image_is_not_read(tmp_path):
    path = tmp_path / "x.png"
    with open(path, "wb") as file:
        file.truncate((1 << 30) + 1)
    assert refusal(path) == (f"--target is {path}, which has 1,073,741,825 bytes; at most 1,073,741,824 are read: "
                             "save it smaller, or leave it out")


def test_target_below_a_file_cannot_be_read(tmp_path):
    path = written(tmp_path / "x.png", b"") / "y.png"
    assert refusal(path) == (f"--target is {path}, which cannot be read (Not a directory); expected an image file, "
                             "such as a PNG or JPEG")


def huge_png():
    header = struct.pack(">IIBBBBB", 13400, 13400, 8, 2, 0, 0, 0)
    return encode(WIDE)[:8] + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


BAD = {
    "zero bytes": (b"", "is empty; expected an image file, such as a PNG or JPEG"),
    "not an image": (b"image_id,dx\n", "is not an image; expected an image file, such as a PNG or JPEG (many images, "
                                       "or a data set, go with --data)"),
    "unsupported format": (bytes(128) + b"DICM" + bytes(9), "is an image of a format that is not read here; expected "
                                                            "another: save it as PNG or JPEG"),
    "truncated": (encode(WIDE)[:500], "ends too early; expected a whole image: copy or download it again"),
    "corrupt": (b"\x89PNG" + bytes(50), "is damaged; expected a whole image: copy or download it again"),
    "too large": (huge_png(), "has 179,560,000 pixels; at most 178,956,970 are read: save it smaller"),
    "not-a-number pixels": (encode(PIL.Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"),
                            "has pixels that are no finite numbers; expected an image without them"),
    "values beyond --depth": (encode(np.full((2, 2), 4096, np.uint16)), "has values for which --depth has no place; "
                              "expected 0 to 2^depth - 1: choose a larger one, or leave --depth out"),
}


@pytest.mark.parametrize("reason", BAD)
def test_target_bad_file_says_what_it_is(tmp_path, reason, capfd):
    data, text = BAD[reason]
    path = written(tmp_path / "x.txt", data)
    assert refusal(path, depth=Depth(bits=12)) == f"--target is {path}, which {text}"
    assert capfd.readouterr() == ("", "")


def test_target_of_12_bits_is_noted_and_takes_a_depth(tmp_path, capsys):
    values = np.random.default_rng(0).integers(0, 4081, (16, 16)).astype(np.uint16)
    values[0, 0] = 4080
    path = written(tmp_path / "x.png", encode(values))
    assert read_target(path, GREY).max() == 16
    assert capsys.readouterr().err == (f"--target is {path}: largest value 4080 of 65535 in this 16-bit image: 12-bit "
                                       "data? --depth=12 makes 4095 white\n")
    found = read_target(path, GREY, depth=Depth(bits=12))
    np.testing.assert_array_equal(found[0].numpy(), np.rint(values * (255 / 4095)).astype(np.uint8))
    assert capsys.readouterr() == ("", "")


def test_float_images_of_a_set_to_project_share_one_scale(tmp_path):
    steps = np.arange(256, dtype=np.float32).reshape(16, 16)
    for name, values in (("a.tif", steps), ("b.tiff", steps * 4 - 20), ("c.tif", steps * np.nan)):
        written(tmp_path / name, encode(PIL.Image.fromarray(values), "TIFF"))
    written(tmp_path / "d.png", encode(pixels(16, 16)))
    written(tmp_path / "e.tif", b"II*\0")
    images = ImageSet(tmp_path)
    ranges = read_ranges(images, shown=False)
    assert ranges == {"float": (-20, 1000)}
    found = prepare(images.read("a.tif"), spec_for(GREY, depth=Depth(ranges=ranges)))
    np.testing.assert_array_equal(found[0].numpy(), np.rint((steps + 20) / 4).astype(np.uint8))


def test_target_every_reason_has_its_words():
    assert set(_REASONS) | {"smaller than the wide crop", "too large",
                            "32-bit or float, but not named .tif or .pfm"} == set(REASONS)
    assert set(BAD) == set(_REASONS) | {"too large"}


def test_target_tar_is_to_be_unpacked(tmp_path):
    path = tmp_path / "lesions.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    folder = tmp_path / "lesions"
    assert refusal(path) == (f"--target is {path}, which is a tar archive; unpack it: "
                             f"mkdir -p {folder} && tar -xf {path} -C {folder}")


@pytest.mark.parametrize(("width", "height"), [(12, 9), (40, 20)])
def test_target_too_small_for_the_wide_crop_says_its_size(tmp_path, width, height):
    path = written(tmp_path / "x.png", encode(pixels(height, width)))
    assert refusal(path, transform="center-crop-wide") == (
        f"--target is {path}, which is {width}x{height}; expected at least 16 pixels of width, and no more than 4:3 of "
        "its height, for --transform=center-crop-wide: use --transform=center-crop")
