"""imagesets.pixel_hashes and load_pixels: decoded pixels, and their hashes, computed and cached."""

import io
import json
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest

from dataset_tool import main as dataset_tool
from dnnlib.cli import UserError, run
from imagesets.convert import convert
from imagesets.phantoms.make import write_phantoms
from imagesets.pixel_hashes import equal_files, hash_pixels, hash_set, known_pixel_hashes, read_pixel_hashes
from imagesets.reader import ImageSet, describe_shape, load_pixels
from tests.helpers.make_archives import make_zip
from tests.helpers.make_sets import make_set, pixels_of, png


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pixel_hashes"


def metadata(path):
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read("dataset.json"))


def recorded(path):
    return {name: record[0] for name, record in metadata(path)["pixel_hashes"].items()}


def decoded(path):
    images = ImageSet(path)
    return {name: hash_pixels(load_pixels(images, name)) for name in images.names}


def write_files(folder, count=4, size=8):
    folder.mkdir()
    for index in range(count):
        (folder / f"{index}.png").write_bytes(png(pixels_of(index, size)))
    return folder


def test_pixel_hash_is_that_of_the_mirror_image_and_of_no_other():
    image = pixels_of(0).transpose(2, 0, 1)
    other = image.copy()
    other[0, 0, 0] ^= 1
    gray = image[:1]
    different = [image, image[:, ::-1], image.transpose(0, 2, 1), image[::-1], other, gray, gray.repeat(3, axis=0),
                 image.reshape(3, 4, 16)]
    assert hash_pixels(image[:, :, ::-1]) == hash_pixels(image)
    assert len({hash_pixels(pixels) for pixels in different}) == len(different)


def test_hash_of_a_set_does_not_depend_on_order_names_labels_formats_or_mirroring(cache, tmp_path):
    first = make_set(tmp_path / "a.zip", 5, labels=[0, 1, 0, 1, 1])
    folder = tmp_path / "b"
    folder.mkdir()
    for index, name in zip(range(5), ["e.bmp", "d.png", "c.tif", "b.png", "a.webp"]):
        pixels = pixels_of(index)[:, ::-1] if index % 2 else pixels_of(index)
        PIL.Image.fromarray(pixels).save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    hashes = [read_pixel_hashes(ImageSet(path)) for path in (first, folder)]
    assert hash_set(hashes[0]) == hash_set(hashes[1])
    assert hash_set(hashes[0]) != hash_set(hashes[0][:4])
    assert hash_set(hashes[0]) != hash_set([*hashes[0], hashes[0][0]])


def test_convert_phantom_and_split_record_the_hash_of_each_image(cache, tmp_path):
    write_files(tmp_path / "files", 6)
    convert(tmp_path / "files", tmp_path / "converted.zip", workers=1)
    write_phantoms(tmp_path / "phantom.zip", workers=1, count=8, resolution=16)
    assert run(dataset_tool, ["split", str(tmp_path / "phantom.zip"), "--parts=a:0.5,b:0.5", "--allow-missing"]) == 0
    for name in ("converted", "phantom", "phantom-a", "phantom-b"):
        path = tmp_path / f"{name}.zip"
        assert recorded(path) == decoded(path), name
    assert len(recorded(tmp_path / "converted.zip")) == 6
    assert not cache.exists()


def test_split_keeps_an_image_and_its_mirror_image_together(tmp_path):
    """A validation set that dataset_tool.py made is never refused for equal images."""
    folder = write_files(tmp_path / "files", 6)
    for index in range(6):
        (folder / f"z{index}.png").write_bytes(png(pixels_of(index)[:, ::-1]))
    convert(folder, tmp_path / "set.zip", workers=1)
    assert run(dataset_tool, ["split", str(tmp_path / "set.zip"), "--parts=a:0.5,b:0.5"]) == 0
    a, b = (set(recorded(tmp_path / f"set-{part}.zip").values()) for part in "ab")
    assert (len(a), len(b), a & b) == (3, 3, set())


def test_split_of_a_set_without_hashes_keeps_mirror_images_together_and_records_them(cache, tmp_path):
    """Otherwise train.py would refuse one part as --valid of the other, with the advice to split."""
    whole = make_set(tmp_path / "old.zip", 6, hashes=False)
    mirrored = make_set(tmp_path / "mirrored.zip", 6, mirror=True, hashes=False)
    with zipfile.ZipFile(whole, "a") as file, zipfile.ZipFile(mirrored) as other:
        for index, name in enumerate(ImageSet(mirrored).names):
            file.writestr(f"z{index}.png", other.read(name))
    assert run(dataset_tool, ["split", str(whole), "--parts=a:0.5,b:0.5"]) == 0
    a, b = (set(recorded(tmp_path / f"old-{part}.zip").values()) for part in "ab")
    assert (len(a), len(b), a & b) == (3, 3, set())


def test_hashes_of_an_older_set_are_computed_once_and_kept(cache, tmp_path, capsys):
    path = make_set(tmp_path / "old.zip", 5, hashes=False)
    assert known_pixel_hashes(ImageSet(path)) is None
    assert not cache.exists()
    assert read_pixel_hashes(ImageSet(path)) == list(decoded(path).values())
    kept, = cache.iterdir()
    kept.write_text("0" * 32 + "\n" + kept.read_text()[33:])  # seen to be what is read
    assert read_pixel_hashes(ImageSet(path)) == ["0" * 32, *list(decoded(path).values())[1:]]
    assert known_pixel_hashes(ImageSet(path))[0] == "0" * 32
    kept.write_text("damaged")
    assert read_pixel_hashes(ImageSet(path)) == list(decoded(path).values())


def test_hashes_of_a_part_of_a_set_are_those_of_its_images(cache, tmp_path):
    path = make_set(tmp_path / "old.zip", 5, hashes=False)
    assert read_pixel_hashes(ImageSet(path), np.array([3, 1])) == [list(decoded(path).values())[row] for row in (3, 1)]


def test_hashes_do_not_depend_on_the_number_of_workers(cache, tmp_path):
    images = ImageSet(make_set(tmp_path / "old.zip", 40, hashes=False))
    assert read_pixel_hashes(images, workers=2) == list(decoded(images.path).values())


def test_hash_of_an_image_that_was_changed_afterwards_does_not_count(cache, tmp_path):
    convert(write_files(tmp_path / "files"), tmp_path / "set", workers=1)
    changed = tmp_path / "set" / "00000" / "img00000002.png"
    before = read_pixel_hashes(ImageSet(tmp_path / "set"))
    changed.write_bytes(png(pixels_of(9)))
    after = read_pixel_hashes(ImageSet(tmp_path / "set"))
    assert after == list(decoded(tmp_path / "set").values())
    assert [first == second for first, second in zip(before, after)] == [True, True, False, True]


def test_files_of_equal_size_and_checksum_are_equal_only_if_their_bytes_are(tmp_path):
    first, pair = {}, None
    for index in range(2000):  # the checksums of such PNGs have 16 bits: about 30 of these pairs share one
        stream = io.BytesIO()
        PIL.Image.fromarray(pixels_of(index)).save(stream, "png", compress_level=0)
        other = first.setdefault(zlib.crc32(stream.getvalue()), stream.getvalue())
        if other != stream.getvalue():
            pair = other, stream.getvalue()
            break
    images = ImageSet(make_zip(tmp_path / "a.zip", {"0.png": pair[0]}))
    others = ImageSet(make_zip(tmp_path / "b.zip", {"0.png": pair[1], "1.png": pair[0]}))
    assert images.checksums()[0] == others.checksums()[0]
    assert equal_files(images, [0], others, [0]) == []
    assert equal_files(images, [0], others, [0, 1]) == [(0, 1)]


def test_hashes_that_cannot_be_kept_are_returned_all_the_same(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "file"))
    said = io.StringIO()
    path = make_set(tmp_path / "old.zip", 2, hashes=False)
    assert read_pixel_hashes(ImageSet(path), stream=said) == list(decoded(path).values())
    assert said.getvalue() == (f"pixel hashes cannot be cached in {tmp_path}/file/pixel_hashes (Not a directory); they "
                               "will be computed again next time\n")


@pytest.mark.parametrize(("hashes", "message"), [
    ([], "pixel_hashes in dataset.json are not an object of [hash, size, CRC-32]; remove the field, then they are "
         "computed again"),
    ({"0.png": "0" * 32}, "pixel_hashes in dataset.json are not an object of [hash, size, CRC-32]; remove the field, "
                          "then they are computed again"),
    ({"0.png": ["0" * 31, 1, 2]}, "pixel_hashes in dataset.json are not an object of [hash, size, CRC-32]; remove the "
                                  "field, then they are computed again"),
    ({"9.png": ["0" * 32, 1, 2]}, "pixel_hashes in dataset.json name 1 file that is not there (9.png)"),
])
def test_hashes_that_do_not_fit_the_set_are_refused(tmp_path, hashes, message):
    folder = write_files(tmp_path / "files", 1)
    (folder / "dataset.json").write_text(json.dumps({"labels": None, "pixel_hashes": hashes}))
    with pytest.raises(UserError) as caught:
        ImageSet(folder)
    assert str(caught.value) == f"{folder}: {message}"


def test_damaged_image_is_named_when_its_hash_is_computed(cache, tmp_path):
    folder = write_files(tmp_path / "files", 40)
    (folder / "7.png").write_bytes(png(pixels_of(7))[:60])
    with pytest.raises(UserError, match=r"files: 7\.png cannot be decoded \(.*\); make or copy it again"):
        read_pixel_hashes(ImageSet(folder), workers=2)


NAME = "00000/img00000001.png"


def encoded(pixels, image_format="png", mode=None):
    file = io.BytesIO()
    image = PIL.Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file, image_format)
    return file.getvalue()


def refused(images, *args):
    """Return the error message for an image, which must be the same each time."""
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
    """Return a folder with one image, to write others into: ImageSet.read also reads files that are not listed."""
    (tmp_path / "a.png").write_bytes(png(pixels_of(0)))
    return tmp_path


@pytest.mark.parametrize("place", ["set.zip", "folder"])
def test_load_pixels_gives_the_planes_of_a_member(tmp_path, place):
    color = ImageSet(make_set(tmp_path / f"color_{place}", 2))
    gray = ImageSet(make_set(tmp_path / f"gray_{place}", 2, channels=1))
    for images, expected in ((color, pixels_of(1).transpose(2, 0, 1)), (gray, pixels_of(1, channels=1)[None])):
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
        f"{folder}: b.png cannot be decoded (it is not an image); make or copy it again")


def test_load_pixels_of_half_an_image_gives_the_decoder_s_reason(folder):
    whole = encoded(pixels_of(1, 64), "jpeg")
    (folder / "b.jpg").write_bytes(whole[:len(whole) // 2])
    message = refused(ImageSet(folder), "b.jpg")
    assert message.startswith(f"{folder}: b.jpg cannot be decoded (image file is truncated")
    assert message.endswith("); make or copy it again")


def test_load_pixels_of_a_member_that_claims_to_be_huge_is_refused(folder, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 31)
    assert refused(ImageSet(folder), "a.png") == (
        f"{folder}: a.png has 64 pixels; at most 62 are read: reduce its size")


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "I;16"])
def test_load_pixels_of_another_mode_is_refused(folder, mode):
    gray = pixels_of(1, channels=1)
    data = encoded(gray.astype(np.uint16)) if mode == "I;16" else encoded(gray, mode=mode)
    (folder / "b.png").write_bytes(data)
    assert refused(ImageSet(folder), "b.png") == (
        f"{folder}: b.png has mode {mode}; expected 8-bit gray or RGB: convert it with dataset_tool.py")


@pytest.mark.parametrize(("pixels", "found"), [
    (pixels_of(1, 16), "16x16 RGB"), (pixels_of(1, channels=1), "8x8 gray"), (np.zeros((8, 6, 3)), "6x8 RGB")])
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


@pytest.mark.parametrize(("shape", "expected"), [((3, 64, 64), "64x64 RGB"), ((1, 32, 48), "48x32 gray")])
def test_describe_shape_gives_width_height_and_kind(shape, expected):
    assert describe_shape(shape) == expected
