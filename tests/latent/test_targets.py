"""latent.targets: any picture becomes an image of the network; which of a set are projected, and where each starts."""

import json
import os
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib.cli import UserError
from generation.network import Classes
from imagesets.decode import REASONS, decode
from imagesets.pixel_formats import BadImage, Depth
from imagesets.reader import ImageSet
from imagesets.resize import PixelSpec
from latent.targets import (
    choose_targets,
    count_left_out,
    fingerprint,
    parse_start,
    prepare,
    read_ranges,
    read_target,
    spec_for,
    starts_of_target,
)
from tests.helpers.image_files import encode, lesion_like, png_chunk, read_png
from tests.helpers.make_sets import enclose, make_set, pixels_of, png
from tests.helpers.tiny_networks import generator

WIDE = lesion_like(60, 45)
COLOR, GRAY = (SimpleNamespace(img_resolution=16, img_channels=channels) for channels in (3, 1))


def pixels(height, width, channels=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values[..., 0] if channels == 1 else values


def written(path, data):
    path.write_bytes(data)
    return path


def refusal(path, G=COLOR, **options):
    with pytest.raises(UserError) as error:
        read_target(path, G, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("transform", ["center-crop", "none"])
@pytest.mark.parametrize("resize_filter", ["lanczos", "box"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("G", "channels"), [(COLOR, 3), (GRAY, 1)])
def test_target_of_the_networks_size_keeps_every_pixel(tmp_path, transform, resize_filter, exact, G, channels):
    values = pixels(16, 16, channels)
    path = written(tmp_path / "x.png", encode(values))
    found = read_target(path, G, transform=transform, resize_filter=resize_filter, exact=exact)
    assert (found.dtype, found.shape) == (torch.uint8, (channels, 16, 16))
    expected = values.reshape(16, 16, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_target_takes_the_middle_square_unless_told_otherwise(tmp_path):
    values = pixels(16, 24)
    found = read_target(written(tmp_path / "x.png", encode(values)), COLOR)
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), values[:, 4:20])


def test_target_without_a_transform_is_stretched(tmp_path):
    values = np.repeat(pixels(16, 16), 2, axis=1)  # pairs of equal columns, whose mean is the one column
    found = read_target(written(tmp_path / "x.png", encode(values)), COLOR, transform="none", resize_filter="box")
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), values[:, ::2])


def test_target_of_the_wide_crop_lies_between_black_bars(tmp_path):
    values = pixels(12, 16)
    found = read_target(written(tmp_path / "x.png", encode(values)), COLOR, transform="center-crop-wide")
    np.testing.assert_array_equal(found[:, 2:14].permute(1, 2, 0).numpy(), values)
    assert not found[:, :2].any()
    assert not found[:, 14:].any()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"])
@pytest.mark.parametrize("G", [COLOR, GRAY])
def test_target_of_any_kind_and_name_has_the_pixels_of_a_data_set(tmp_path, image_format, G):
    data = encode(WIDE, image_format)
    spec = PixelSpec(width=16, height=16, transform="center-crop", resize_filter="lanczos", channels=G.img_channels,
                     exact=False)
    expected = read_png(decode(data, spec).png).reshape(16, 16, -1)
    found = read_target(written(tmp_path / "without an ending", data), G)
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("G", [COLOR, GRAY])
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
    found = read_target(written(tmp_path / "x.png", encode(np.full((2, 3, 3), 77, np.uint8))), COLOR)
    assert (found.shape, found.unique().tolist()) == ((3, 16, 16), [77])


def test_target_exact_reads_large_jpegs_whole(tmp_path):
    path = written(tmp_path / "x.jpg", encode(lesion_like(640, 480), "JPEG"))
    fast, exact = (read_target(path, COLOR, exact=exact).int() for exact in (False, True))
    assert 0 < (fast - exact).abs().max() <= 3


def test_prepare_gives_memory_of_its_own():
    found = prepare(encode(pixels(16, 16)), spec_for(COLOR))
    found.zero_()  # a view of read-only bytes would warn or crash
    assert found.is_contiguous()


def test_prepare_bad_file_raises_with_the_reason():
    with pytest.raises(BadImage, match=r"^truncated$"):
        prepare(encode(WIDE)[:500], spec_for(COLOR))


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
        spec_for(COLOR, **options)


def test_spec_for_other_channels_raises():
    with pytest.raises(UserError, match=r"^the network of --network makes images with 4 channels; expected a network "
                                        r"of gray or RGB images$"):
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
                             "reduce its size, or leave it out")


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
    "unsupported format": (bytes(128) + b"DICM" + bytes(9), "is an image in an unsupported format; expected "
                                                            "another: save it as PNG or JPEG"),
    "truncated": (encode(WIDE)[:500], "ends too early; expected a whole image: copy or download it again"),
    "corrupt": (b"\x89PNG" + bytes(50), "is damaged; expected a whole image: copy or download it again"),
    "too large": (huge_png(), "has 179,560,000 pixels; at most 178,956,970 are read: reduce its size"),
    "not-a-number pixels": (encode(PIL.Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"),
                            "has pixels that are not finite; expected an image without them"),
    "values beyond --depth": (encode(np.full((2, 2), 4096, np.uint16)), "has values beyond --depth; expected 0 to "
                                                                        "2^depth - 1: choose a larger depth, or leave "
                                                                        "--depth out"),
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
    assert read_target(path, GRAY).max() == 16
    assert capsys.readouterr().err == (f"--target is {path}: largest value 4080 of 65535 in this 16-bit image: 12-bit "
                                       "data? --depth=12 makes 4095 white\n")
    found = read_target(path, GRAY, depth=Depth(bits=12))
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
    found = prepare(images.read("a.tif"), spec_for(GRAY, depth=Depth(ranges=ranges)))
    np.testing.assert_array_equal(found[0].numpy(), np.rint((steps + 20) / 4).astype(np.uint8))


def test_target_every_reason_has_its_words():
    assert set(BAD) | {"smaller than the wide crop", "32-bit or float, but not named .tif or .pfm"} == set(REASONS)


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
        f"--target is {path}, which is {width}x{height}; expected a width of at least 16 pixels and a height "
        "of at least 3/4 of it for --transform=center-crop-wide: use --transform=center-crop")


NETWORK = Classes(2, {"classes": ["nv", "mel"]})
PLAIN = Classes(0, {})
NUMBERED = Classes(3, {})
LABELS = [1, 0, 1, 0, 0, 1, 0, 0]


def choose(images, classes=NETWORK, *, chosen=None, count=None, group_by_class=False, seed=303):
    return choose_targets(images, classes, start=parse_start(classes, chosen), count=count,
                          group_by_class=group_by_class, seed=seed)


def refused(*arguments, **options):
    with pytest.raises(UserError) as caught:
        choose(*arguments, **options)
    return str(caught.value)


def indices(targets):
    """Return which images of `make_set` they are."""
    return [int(target.name[-12:-4]) for target in targets]


def starts(targets):
    return [target.starts for target in targets]


@pytest.fixture
def images(tmp_path):
    """Eight images; the set's numbers of the classes are the other way round."""
    return ImageSet(make_set(tmp_path / "set.zip", 8, labels=LABELS, classes=["mel", "nv"], groups=list("aabbccdd")))


@pytest.fixture
def bare(tmp_path):
    return ImageSet(make_set(tmp_path / "bare.zip", 5))


def with_metadata(folder, metadata, count=4):
    """Return a folder of images with a dataset.json of its own."""
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:08d}.png").write_bytes(png(pixels_of(index)))
    (folder / "dataset.json").write_text(json.dumps(metadata))
    return ImageSet(folder)


def test_targets_are_all_images_in_order_with_their_own_classes(images):
    found = choose(images)
    assert [target.name for target in found] == images.names
    assert [target.group for target in found] == list("aabbccdd")
    assert [target.label for target in found] == LABELS
    assert [target.class_name for target in found] == [["mel", "nv"][label] for label in LABELS]
    assert [target.own for target in found] == [(1, 0)[label] for label in LABELS]  # by name, not by number
    assert starts(found) == [(target.own,) for target in found]
    assert count_left_out(images, NETWORK, None) == 0


def test_class_auto_begins_each_image_from_each_class(images, bare):
    for some in (images, bare):
        found = choose(some, chosen="auto")
        assert len(found) == len(some)
        assert set(starts(found)) == {(0, 1)}
    assert {(target.class_name, target.own) for target in found} == {(None, None)}


@pytest.mark.parametrize("chosen", ["nv", "0", " nv"])
def test_class_named_takes_its_images_alone(images, chosen):
    found = choose(images, chosen=chosen)
    assert indices(found) == [index for index, label in enumerate(LABELS) if label == 1]
    assert set(starts(found)) == {(0,)}


def test_class_named_begins_all_images_of_a_set_without_labels(bare):
    found = choose(bare, chosen="mel")
    assert (indices(found), set(starts(found))) == (list(range(5)), {(1,)})
    assert [target.group for target in found] == bare.names


def test_class_named_leaves_images_without_a_label_out(tmp_path):
    some = ImageSet(make_set(tmp_path / "some.zip", 4, labels=[0, None, 1, 0], classes=["mel", "nv"]))
    assert indices(choose(some, chosen="mel")) == [0, 3]
    found = choose(some, chosen="auto")
    assert [(target.label, target.class_name) for target in found] == [(0, "mel"), (None, None), (1, "nv"), (0, "mel")]


def test_network_without_classes_begins_from_its_mean(images, bare):
    for some in (images, bare):
        found = choose(some, PLAIN)
        assert (len(found), set(starts(found))) == (len(some), {(None,)})
        assert count_left_out(some, PLAIN, None) == 0
    found = choose(images, PLAIN)[0]
    assert (found.class_name, found.label, found.own) == ("nv", 1, None)


def test_classes_without_names_fit_by_number(images, tmp_path):
    assert starts(choose(images, NUMBERED)) == [(label,) for label in LABELS]
    numbers = ImageSet(make_set(tmp_path / "numbers.zip", 3, labels=[1, 0, 1]))
    found = choose(numbers)
    assert [(target.class_name, target.starts) for target in found] == [("1", (1,)), ("0", (0,)), ("1", (1,))]


def test_labels_that_are_one_hot_lists_are_classes(tmp_path):
    rows = [[0, 1], [1.0, 0.0], [0.5, 0.5], None]
    some = with_metadata(tmp_path / "set", {"labels": [[f"{i:08d}.png", row] for i, row in enumerate(rows)]})
    found = choose(some, chosen="auto")
    assert [target.class_name for target in found] == ["1", "0", None, None]
    assert [target.label for target in found] == [(0, 1), (1, 0), (0.5, 0.5), None]  # as in dataset.json
    assert indices(choose(some, chosen="nv")) == [1]
    assert indices(choose(some)) == [0, 1]
    assert count_left_out(some, NETWORK, None) == 2


def test_images_of_classes_that_the_network_does_not_know_are_left_out(tmp_path):
    some = ImageSet(make_set(tmp_path / "set.zip", 4, labels=[0, 1, None, 0], classes=["mel", "bcc"]))
    assert indices(choose(some)) == indices(choose(some, chosen="mel")) == [0, 3]
    assert count_left_out(some, NETWORK, None) == 2
    assert count_left_out(some, NETWORK, "auto") == count_left_out(some, NETWORK, 1) == 0
    found = choose(some, chosen="auto")
    assert starts(found) == [(0, 1)] * 4
    assert [target.own for target in found] == [1, None, None, 1]
    assert refused(some, chosen="nv") == (f"{some.path} has no images of class nv; expected one of mel, bcc, or "
                                          "leave --class out")


def test_images_whose_classes_are_all_unknown_begin_where_they_are_told(tmp_path):
    some = ImageSet(make_set(tmp_path / "set.zip", 3, labels=[0, 1, None], classes=["scc", "bcc"]))
    found = choose(some, chosen="mel")
    assert (indices(found), starts(found)) == ([0, 1, 2], [(1,)] * 3)
    assert refused(some) == (f"{some.path} has images of scc, bcc, which the network does not know; expected one of "
                             "nv, mel, or a number from 0 to 1: give --class=NAME to start from, or --class=auto to "
                             "try each")


def test_numbers_that_the_network_does_not_know_are_named(tmp_path):
    some = ImageSet(make_set(tmp_path / "set.zip", 2, labels=[4, 3]))
    assert refused(some, NUMBERED) == (f"{some.path} has images of 3, 4, which the network does not know; expected "
                                       "a number from 0 to 2: give --class=NAME to start from, or --class=auto to try "
                                       "each")


def test_set_without_classes_needs_one_to_begin_from(bare):
    assert refused(bare) == (f"{bare.path} has no classes, but this network is class-conditional; expected one of nv, "
                             f"mel, "
                             "or a number from 0 to 1: give --class=NAME to start from, or --class=auto to try each")
    assert count_left_out(bare, NETWORK, None) == 5


@pytest.mark.parametrize(("names", "text", "expected"), [
    (["nv", "mel"], None, None), (["nv", "mel"], "auto", "auto"), (["nv", "mel"], " Auto ", "auto"),
    (["nv", "auto"], "auto", 1), (["all", "mel"], "all", 0), (["nv", "mel"], "mel", 1), (["nv", "mel"], "0", 0),
    (None, "1", 1), (None, "auto", "auto")])
def test_start_is_a_class_or_auto(names, text, expected):
    classes = Classes(2, {"classes": names})
    assert parse_start(classes, text) == expected
    if expected is not None:
        assert starts_of_target(classes, text) == ([0, 1] if expected == "auto" else [expected])


def test_start_of_a_network_without_classes_is_none():
    assert parse_start(PLAIN, None) is None
    assert starts_of_target(PLAIN, None) == [None]


def test_start_of_one_image_must_be_given():
    with pytest.raises(UserError) as caught:
        starts_of_target(NETWORK, None)
    assert str(caught.value) == ("--class is missing, but this network is class-conditional; expected one of nv, "
                                 "mel, or a number from 0 to 1, or auto to try each")


@pytest.mark.parametrize(("options", "message"), [
    ({"chosen": "all"}, "--class is all; expected one class, or auto to try each"),
    ({"chosen": "nv,mel"}, "--class names 2 classes; expected one, or auto to try each"),
    ({"chosen": "bcc"}, "--class names the class 'bcc'; expected one of nv, mel, or a number from 0 to 1"),
    ({"count": 0}, "--count is 0; expected at least 1"),
    ({"classes": PLAIN, "chosen": "auto"}, "--class is auto, but this network was trained without classes; leave "
                                           "--class out")])
def test_class_or_count_that_cannot_be_is_refused(images, options, message):
    assert refused(images, **options) == message


def test_group_by_class_needs_a_class_of_each_image(bare, tmp_path):
    assert refused(bare, chosen="nv", group_by_class=True) == (
        f"{bare.path} has 5 images without a class; expected one each for --group-by-class")
    some = ImageSet(make_set(tmp_path / "some.zip", 3, labels=[0, None, None], classes=["mel"]))
    assert refused(some, chosen="auto", group_by_class=True) == (
        f"{some.path} has 2 images without a class; expected one each for --group-by-class")


def test_count_draws_by_the_seed_and_keeps_the_order(images):
    drawn = {seed: indices(choose(images, count=5, seed=seed)) for seed in range(20)}
    assert all(len(set(some)) == 5 and some == sorted(some) for some in drawn.values())
    assert indices(choose(images, count=5, seed=3)) == drawn[3]
    assert len({tuple(some) for some in drawn.values()}) > 10
    times = np.bincount(np.concatenate(list(drawn.values())), minlength=8)
    assert times.min() >= 5  # 12.5 on average: none is preferred or left out
    assert indices(choose(images, count=5, seed=2**32 + 3)) == drawn[3]


@pytest.mark.parametrize("count", [8, 9])
def test_count_of_all_or_more_takes_all(images, count):
    assert choose(images, count=count) == choose(images)


def test_count_of_one_class_counts_its_images(images):
    found = choose(images, chosen="mel", count=2)
    assert len(found) == 2
    assert {target.label for target in found} == {0}
    assert len(choose(images, chosen="mel", count=6)) == 5


def test_group_by_class_takes_equally_many_class_by_class(images):
    found = choose(images, group_by_class=True, count=5)
    assert [target.label for target in found] == [0, 0, 0, 1, 1]
    assert indices(found[:3]) == sorted(indices(found[:3]))
    assert [target.label for target in choose(images, group_by_class=True, count=7)] == [0] * 4 + [1] * 3
    everything = choose(images, group_by_class=True)
    assert indices(everything) == [1, 3, 4, 6, 7, 0, 2, 5]
    drawn = {tuple(indices(choose(images, group_by_class=True, count=4, seed=seed))) for seed in range(10)}
    assert len(drawn) > 5


@pytest.mark.parametrize(("available", "count", "expected"), [
    ([5, 5, 5], 6, [2, 2, 2]), ([5, 5, 5], 7, [3, 2, 2]), ([5, 5, 5], 8, [3, 3, 2]), ([1, 5, 2], 7, [1, 4, 2]),
    ([1, 9, 9], 10, [1, 5, 4]), ([3, 4], None, [3, 4]), ([3, 4], 99, [3, 4]), ([4, 4], 1, [1, 0])])
def test_equally_many_of_each_class_are_taken_as_far_as_there_are(tmp_path, available, count, expected):
    labels = [label for label, number in enumerate(available) for _ in range(number)]
    classes = ["a", "b", "c"][:len(available)]
    images = ImageSet(make_set(tmp_path / "set.zip", len(labels), labels=labels, classes=classes))
    targets = choose(images, Classes(len(available), {"classes": classes}), count=count, group_by_class=True)
    assert [[target.class_name for target in targets].count(name) for name in classes] == expected


def test_fingerprint_tells_sets_apart(images, tmp_path):
    everything = choose(images)
    first = fingerprint(images, everything)
    assert len(first) == 64
    assert fingerprint(ImageSet(shutil.copy(images.path, tmp_path / "copy.zip")), everything) == first
    others = {first, fingerprint(images, everything[:-1]), fingerprint(images, everything[::-1])}
    for changes in ({"labels": [0] * 8}, {"groups": list("aabbccde")}, {"classes": ["mel", "other"]}, {"size": 9}):
        options = {"labels": LABELS, "classes": ["mel", "nv"], "groups": list("aabbccdd"), **changes}
        other = ImageSet(make_set(tmp_path / "other.zip", 8, **options))
        others.add(fingerprint(other, choose(other, chosen="auto")))
    assert len(others) == 7


def test_fingerprint_of_a_zip_follows_its_pixels(images, tmp_path):
    with zipfile.ZipFile(images.path) as old, zipfile.ZipFile(tmp_path / "other.zip", "w") as new:
        for name in old.namelist():
            data = bytearray(old.read(name))
            if name == images.names[4]:
                data[-20] ^= 1
            new.writestr(name, bytes(data))
    other = ImageSet(tmp_path / "other.zip")
    assert fingerprint(other, choose(other)) != fingerprint(images, choose(images))


def test_fingerprint_of_a_folder_follows_names_sizes_and_times_without_reading(tmp_path, monkeypatch):
    some = with_metadata(tmp_path / "set", {"labels": None})
    monkeypatch.setattr(ImageSet, "read", lambda *_: pytest.fail("it reads a file"))
    first = fingerprint(some, choose(some, chosen="nv"))
    assert fingerprint(some, choose(some, chosen="nv")) == first
    with open(Path(some.path, some.names[2]), "ab") as file:
        file.write(b"more")
    second = fingerprint(some, choose(some, chosen="nv"))
    os.utime(some.path / some.names[1], ns=(0, 0))
    third = fingerprint(some, choose(some, chosen="nv"))
    assert len({first, second, third}) == 3


def test_fingerprint_takes_files_that_went_away(tmp_path):
    some = with_metadata(tmp_path / "set", {"labels": None})
    (some.path / some.names[0]).unlink()  # reading it will say so
    assert len(fingerprint(some, choose(some, chosen="nv"))) == 64


def test_fingerprint_takes_names_that_are_no_text(tmp_path):
    (tmp_path / "set").mkdir()
    name = b"\xff.png".decode(errors="surrogateescape")
    try:
        (tmp_path / "set" / name).write_bytes(png(pixels_of(0)))
    except OSError:
        pytest.skip("this file system takes no such name")
    some = ImageSet(tmp_path / "set")
    assert len(fingerprint(some, choose(some, chosen="nv"))) == 64


@pytest.mark.parametrize("name", ["inside.zip", "inside"])
def test_targets_of_a_set_in_a_folder_inside_have_its_classes_and_groups(images, tmp_path, name):
    inside = ImageSet(enclose(images.path, tmp_path / name))
    targets = choose(inside, group_by_class=True, count=4)
    assert targets == choose(images, group_by_class=True, count=4)
    first = fingerprint(inside, targets)
    if inside.is_zip:
        assert first == fingerprint(images, targets)
    else:
        os.utime(tmp_path / name / "set" / targets[0].name, (1, 1))
        assert first != fingerprint(inside, targets)
