"""imagesets.reader: checksums, and archives that once gave wrong labels or were read endlessly."""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest

from dnnlib.cli import UserError
from imagesets.classes import MAX_CLASSES
from imagesets.convert import convert
from imagesets.inspect import measure
from imagesets.reader import ImageSet, load_pixels
from imagesets.sources import open_source
from imagesets.tables import read_table
from tests.helpers.image_files import png_chunk
from tests.helpers.make_archives import counts, encode, make_folder, make_zip, noise
from tests.helpers.make_sets import make_set, pixels_of, png


def test_table_whose_ids_share_a_folder_leaves_images_of_other_folders_alone(tmp_path):
    (tmp_path / "t.csv").write_text("image,class\ntrain/0.png,a\ntrain/1.png,b\n")
    table = read_table(tmp_path / "t.csv", id_column="image", label_column="class")
    assert table.class_of("train/0.png") == table.class_of("set/train/0.png") == "a"
    assert table.class_of("0.png") == "a"  # the folder itself is the source
    assert table.class_of("test/0.png") is None
    assert table.class_of("set/test/1.png") is None


def test_folders_that_link_to_each_other_are_entered_once(tmp_path):
    names = ("a", "b", "c")
    for index, name in enumerate(names):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / f"{index}.png").write_bytes(png(pixels_of(index)))
    for name in names:
        for other in names:
            if other != name:
                (tmp_path / "set" / name / f"to_{other}").symlink_to(tmp_path / "set" / other)
    found = ImageSet(tmp_path / "set").names
    assert sorted(name.rpartition("/")[2] for name in found) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(("label", "message"), [
    (10**9, f"the label {10**9}; expected the number of a class, below {MAX_CLASSES}"),
    (10**30, f"the label {10**30}; expected the number of a class, below {MAX_CLASSES}"),
    ([1e300], "the label [1e+300]; expected an integer >= 0, a list of numbers, or null"),
])
def test_labels_that_would_fill_the_memory_are_refused(tmp_path, label, message):
    (tmp_path / "a.png").write_bytes(png(pixels_of(0)))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.png", label]]}))
    with pytest.raises(UserError) as caught:
        ImageSet(tmp_path)
    assert str(caught.value) == f"{tmp_path}: dataset.json gives a.png {message}"


def test_class_names_that_repeat_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(pixels_of(0)))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.png", 0]], "classes": ["x", "x"]}))
    with pytest.raises(UserError, match=r"classes in dataset\.json name one twice; expected 2 different names$"):
        ImageSet(tmp_path)


def test_pipe_among_images_is_refused_when_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is a pipe or a device; expected a file$"):
        ImageSet(tmp_path).read("pipe.png")


HUGE = encode(np.zeros((1, 1)))[:8] + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 13400, 13400, 8, 0, 0, 0, 0)) + \
    png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
MANY_PIXELS = "has 179,560,000 pixels; at most 178,956,970 are read: reduce its size"
MANY_BYTES = "has 5,000 bytes; at most 1,000 are read: reduce its size, or leave it out"


@pytest.mark.parametrize("packed", [False, True])
def test_images_that_are_too_large_name_size_and_limit(tmp_path, monkeypatch, packed):
    monkeypatch.setattr("imagesets.reader.MAX_FILE_BYTES", 1000)
    files = {"a.png": encode(noise(1, 8, 8)), "huge.png": HUGE, "long.png": bytes(5000)}
    source = make_zip(tmp_path / "a.zip", files) if packed else make_folder(tmp_path / "a", files)
    options = {"workers": 1, "stream": io.StringIO(), "report": tmp_path / "r.json"}
    done = convert(source, tmp_path / "set.zip", max_bad=1, **options)
    assert counts(done.report["dropped"]) == {"unreadable: too large": 2}
    assert f"  dropped: unreadable: too large: 2 (huge.png {MANY_PIXELS}, long.png {MANY_BYTES})" in done.lines
    found = json.loads((tmp_path / "r.json").read_text())["dropped"]["unreadable: too large"]
    assert found == {"count": 2, "names": ["huge.png", "long.png"], "details": {"huge.png": MANY_PIXELS,
                                                                                "long.png": MANY_BYTES}}
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "set.zip", **options)
    assert str(caught.value) == ("2 of 3 images cannot be read (too large: 2), more than --max-bad=0.01 allows; "
                                 f"huge.png {MANY_PIXELS}; see {tmp_path / 'r.json'}")
    with pytest.raises(UserError) as caught:
        load_pixels(ImageSet(source), "huge.png")
    assert str(caught.value) == f"{source}: huge.png {MANY_PIXELS}"
    with pytest.raises(UserError) as caught:
        ImageSet(source).read("long.png")
    assert str(caught.value) == f"{f'{source}: ' if packed else f'{source}/'}long.png {MANY_BYTES}"
    faults = measure(ImageSet(source)).faults
    assert faults[1] == f"too large: {MANY_PIXELS}"
    assert faults[2].endswith(MANY_BYTES)


def test_table_cell_without_end_names_its_limit(tmp_path):
    (tmp_path / "t.csv").write_text("image_id,dx\na,\"" + "nv\nb,nv\n" * 30_000)
    with pytest.raises(UserError) as caught:
        read_table(tmp_path / "t.csv")
    assert str(caught.value) == (f"{tmp_path / 't.csv'}, line 2: a cell has more than 131,072 characters; expected "
                                 "short ones: is a quote in this row not closed?")


def test_npz_labels_that_are_no_numbers_or_too_large_are_refused(tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    for values, message in (([[0.0], [np.nan]], "labels are not all integers >= 0; expected class numbers"),
                            ([[0], [10**9]], "labels go up to 1e+09; expected class numbers less than 1000")):
        np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.array(values))
        with pytest.raises(UserError) as caught:
            open_source(tmp_path / "a.npz")
        assert str(caught.value).endswith(message)


def test_zip_of_windows_keeps_its_class_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for index, name in enumerate(("set\\mel\\0.png", "set\\nv\\1.png")):
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, png(pixels_of(index)))
    source = open_source(tmp_path / "a.zip")
    assert source.classes == ["mel", "nv"]
    assert source.labels.tolist() == [0, 1]
    images = ImageSet(tmp_path / "a.zip")
    assert images.names == ["set/mel/0.png", "set/nv/1.png"]
    assert images.read("set/nv/1.png") == png(pixels_of(1))


def test_images_of_equal_names_that_share_a_row_are_reported(tmp_path):
    for index, folder in enumerate(("one", "two")):
        (tmp_path / "set" / folder).mkdir(parents=True)
        (tmp_path / "set" / folder / "0.png").write_bytes(png(pixels_of(index)))
    (tmp_path / "t.csv").write_text("image,class\n0,a\n")
    summary = convert(tmp_path / "set", tmp_path / "a.zip", labels=tmp_path / "t.csv", id_column="image",
                      label_column="class", include=["*"], workers=1, report=tmp_path / "r.json")
    line = ("images that share a row of the table, because their names are equal: 2 (one/0.png, two/0.png); are they "
            "the same image?")
    assert f"  {line}" in summary.lines
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["images_that_share_a_row"] == {"count": 2, "names": ["one/0.png", "two/0.png"]}


@pytest.mark.parametrize("name", ["a.zip", "folder"])
def test_image_set_checksums_are_those_of_the_files_and_are_left_out_of_copies(tmp_path, name):
    images = ImageSet(make_set(tmp_path / name, 3))
    contents = [png(pixels_of(index)) for index in range(3)]
    assert images.checksums() == [(len(data), zlib.crc32(data)) for data in contents]
    assert images.checksums() is images.checksums()
    bare = ImageSet(images.path)
    assert len(pickle.dumps(images)) == len(pickle.dumps(bare))
    assert pickle.loads(pickle.dumps(images)).checksums() == images.checksums()
