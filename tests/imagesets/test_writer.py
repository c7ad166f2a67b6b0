"""imagesets.writer: Pillow and our reader read what was written; always the same bytes; whole or not at all."""

import gc
import hashlib
import json
import re

import numpy as np
import pytest

from dnnlib.cli import UserError
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter, encode_png
from tests.helpers.image_files import read_png
from tests.helpers.make_sets import pixels_of, png


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


# sha256 of the encoder's first output; it is not compressed, so no library can change it.
EXPECTED = "5194d95b62cdaedc579387343c7c0bcddf9feae6efbff590b51974d7e75f6ce4"


# ---- whole sets


def refused(make):
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_image_set_round_trip_keeps_everything(tmp_path):
    groups = ["p1", None, "p1", "p2"]
    for name in ("a.zip", "b.zip", "folder"):
        with ImageSetWriter(tmp_path / name, classes=["x", "y"], source={"made": "here"}) as writer:
            for index, label in enumerate([1, None, 0, 1]):
                writer.add(png(pixels_of(index)), label, groups[index])
            writer.add_file("table.csv", b"1,2\n")
    for name in ("a.zip", "folder"):
        opened = ImageSet(tmp_path / name)
        assert opened.labels.tolist() == [1, -1, 0, 1]
        assert opened.missing_labels().sum() == 1
        assert opened.classes == ["x", "y"]
        assert opened.groups == ["p1", "00000/img00000001.png", "p1", "p2"]
        assert opened.source == {"made": "here"}
        assert opened.other_members == ["dataset.json", "table.csv"]
        assert opened.read("table.csv") == b"1,2\n"
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    # Programs for the original's format can read it.
    metadata = json.loads(ImageSet(tmp_path / "a.zip").read("dataset.json"))
    assert metadata["labels"][0] == ["00000/img00000000.png", 1]


@pytest.mark.parametrize("name", ["a.zip", "folder"])
def test_image_set_writer_leaves_nothing_when_it_fails(tmp_path, name):
    def fail():
        with ImageSetWriter(tmp_path / name) as writer:
            writer.add(png(pixels_of(0)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_image_set_writer_refuses_destinations_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    (tmp_path / "folder.zip").mkdir()
    for name, message in {
        "folder.zip": "is a folder; expected a zip file to write",
        "set.tar": "ends in .tar; expected .zip, or a folder",
        "file": "is a file; expected a name ending in .zip, or a folder",
        "full": "is a folder with files in it; expected an empty or a new one",
        "missing/a.zip": f": there is no folder {tmp_path / 'missing'}; make it first",
    }.items():
        found = refused(lambda name=name: ImageSetWriter(tmp_path / name))
        assert found == f"--dest={tmp_path / name}{'' if message.startswith(':') else ' '}{message}"


def test_image_set_writer_names_the_option_of_its_caller(tmp_path):
    (tmp_path / "set.zip").mkdir()
    assert refused(lambda: ImageSetWriter(tmp_path / "set.zip", option="--zip")) == (
        f"--zip={tmp_path / 'set.zip'} is a folder; expected a zip file to write")


def test_image_set_writer_refuses_labels_of_mixed_kinds(tmp_path):
    def write():
        with ImageSetWriter(tmp_path / "a.zip") as writer:
            writer.add(b"x", 1)
            writer.add(b"y", [0.5])

    assert re.search("labels are of mixed kinds", refused(write))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_writer_that_is_interrupted_within_a_member_leaves_nothing_and_says_nothing_else(tmp_path):
    def write():
        with ImageSetWriter(tmp_path / "set.zip") as writer:
            writer.add(png(pixels_of(0)))
            handle = writer._zip.open("half.png", "w")  # as if writestr had just begun
            handle.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    gc.collect()
    assert list(tmp_path.iterdir()) == []
