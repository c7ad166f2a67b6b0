"""projector.py --data: images that cannot be read, names of any kind, projections that come to nothing."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from imagesets.reader import ImageSet
from latent.projection import COLUMNS, Projection
from latent.targets import read_target
from tests.helpers.image_files import encode, lesion_like
from tests.helpers.make_sets import make_set, pixels_of, png
from tests.helpers.projector_commands import (
    SET_FILES,
    attempt,
    distances_between,
    names_in,
    pictures_in,
    project,
    project_with_failures,
    record_in,
    results_in,
    rows_in,
    styles_in,
    working_in,
    write_set,
)
from training.snapshot import load_network

pytestmark = pytest.mark.usefixtures("one_thread")  # as programs that tests start

SET = ("--data=set.zip", "--outdir=out", "--batch=4")


@pytest.fixture
def inside(tmp_path, monkeypatch):
    with working_in(tmp_path, monkeypatch):
        make_set("set.zip", 6, labels=[1, 0, 1, 0, 0, 1], classes=["mel", "nv"], groups=["a", "a", "b", "c", "d", "e"])
        yield


def make_photos():
    """Make a folder of photographs, some of which cannot be read; return the names of those that can."""
    good = {"b/lesion, one.JPG": encode(lesion_like(100, 80), "JPEG"), "a.png": png(pixels_of(1)),
            "z/clear.png": encode(np.dstack([pixels_of(2), pixels_of(3)[..., :1]]))}
    bad = {"cut.jpg": encode(lesion_like(90, 90), "JPEG")[:700], "text.png": b"no picture", "void.png": b""}
    for name, data in (good | bad).items():
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        Path("photos", name).write_bytes(data)
    return sorted(good)


@pytest.mark.parametrize("class_", ["mel", "auto"])
def test_folder_of_photographs_is_projected_but_for_what_cannot_be_read(inside, capsys, class_):
    names = make_photos()
    out, err = project_with_failures(capsys, "--data=photos", f"--class={class_}", "--outdir=out", "--batch=2")
    assert out.startswith("out: 3 images projected, 3 left out (see failed.csv); medians with pixels:\n  all (3): ")
    assert names_in("out") == sorted([*SET_FILES, "failed.csv"])
    failed = {"cut.jpg": "truncated", "text.png": "not an image", "void.png": "zero bytes"}
    assert rows_in("out/failed.csv") == [{"image": name, "reason": reason} for name, reason in failed.items()]
    assert sorted(set(err.splitlines())) == sorted(f"{name} is left out: {reason}" for name, reason in failed.items())
    G = load_network("net.safetensors").G_ema
    rows = rows_in("out/distances.csv")
    assert [row["image"] for row in rows] == [row["group"] for row in rows] == names
    for row, image in zip(rows, pictures_in("out/projections.zip"), strict=True):
        expected = distances_between(read_target(f"photos/{row['image']}", G), image)
        assert [float(row[name]) for name in COLUMNS] == pytest.approx(list(expected.values()), rel=1e-5)
        assert row["class"] == ""
    record = record_in("out", "projections.json")
    assert (record["count"], record["projected"], record["unreadable"]) == (6, 3, 3)
    assert list(record["distances"]) == ["all"]


def test_good_images_beside_bad_ones_are_as_without_them(inside, capsys):
    make_photos()
    flags = ("--data=photos", "--class=mel", "--batch=2")
    project_with_failures(capsys, *flags, "--outdir=some")
    for name in ("cut.jpg", "text.png", "void.png"):
        Path("photos", name).unlink()
    project(capsys, *flags, "--outdir=all")
    assert results_in("some") == results_in("all")


def test_failures_of_an_earlier_command_are_not_left_for_its_successor(inside, capsys):
    Path("out").mkdir()
    Path("out/failed.csv").write_text("image,reason\nold.png,corrupt\n")
    project(capsys, *SET)
    assert names_in("out") == SET_FILES


def test_damaged_member_of_a_zip_is_left_out(inside, capsys):
    data = bytearray(Path("set.zip").read_bytes())
    with zipfile.ZipFile("set.zip") as archive:
        info = archive.getinfo("00000/img00000002.png")
    data[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 1
    Path("set.zip").write_bytes(data)
    reason = ("set.zip: 00000/img00000002.png is damaged (Bad CRC-32 for file '00000/img00000002.png'); make or copy "
              "the data set again")
    _, err = project_with_failures(capsys, *SET)
    assert err == f"00000/img00000002.png is left out: {reason}\n"
    assert rows_in("out/failed.csv") == [{"image": "00000/img00000002.png", "reason": reason}]
    assert [row["image"][-5] for row in rows_in("out/distances.csv")] == ["0", "1", "3", "4", "5"]
    found = ImageSet("out/projections.zip")
    assert (found.labels.tolist(), found.groups) == ([0, 1, 1, 1, 0], ["a", "a", "c", "d", "e"])


def test_set_without_a_readable_image_says_so_and_why(inside, capsys):
    Path("photos").mkdir()
    for number in range(3):
        Path(f"photos/{number}.png").write_text("no picture")
    command = ("--data=photos", "--class=mel", "--outdir=out")
    for _ in range(2):  # it does not pass for done
        assert attempt(*command) == 2
        assert capsys.readouterr() == ("", "".join(f"{number}.png is left out: not an image\n" for number in range(3))
                                       + "error: none of the 3 images of photos could be read; see failed.csv in "
                                       "--outdir\n")
        assert names_in("out") == ["failed.csv"]
        assert rows_in("out/failed.csv") == [{"image": f"{number}.png", "reason": "not an image"}
                                             for number in range(3)]
    Path("photos/1.png").write_bytes(png(pixels_of(1)))
    project_with_failures(capsys, *command)
    assert [row["image"] for row in rows_in("out/distances.csv")] == ["1.png"]


def test_names_of_any_kind_come_out_as_they_are(inside, capsys):
    names = sorted(["L\u00e4sion.png", 'quote"d, name.png', "two\nlines.png"])
    Path("photos").mkdir()
    for index, name in enumerate(names):
        Path("photos", name).write_bytes(png(pixels_of(index)))
    project(capsys, "--data=photos", "--class=mel", "--outdir=out")
    assert [row["image"] for row in rows_in("out/distances.csv")] == names
    with np.load("out/latents.npz") as arrays:
        assert arrays["image"].tolist() == names


def test_names_that_are_no_text_are_written_with_escapes(inside, capfd):
    Path("photos").mkdir()
    try:
        for name, data in ((b"\xff.png", png(pixels_of(0))), (b"\xfe.png", b"no picture")):
            Path("photos", os.fsdecode(name)).write_bytes(data)
    except OSError:
        pytest.skip("this file system takes no such names")
    _, err = project_with_failures(capfd, "--data=photos", "--class=mel", "--outdir=out")
    assert "is left out: not an image" in err
    assert [row["image"] for row in rows_in("out/distances.csv")] == ["\\udcff.png"]
    assert [row["image"] for row in rows_in("out/failed.csv")] == ["\\udcfe.png"]
    with np.load("out/latents.npz") as arrays:
        assert arrays["image"].tolist() == [os.fsdecode(b"\xff.png")]


def lose(monkeypatch, slots):
    """Let the styles of some projections of each pass become no numbers."""
    styles = Projection.styles

    def lose_some(self):
        ws = styles(self).clone()
        ws[slots] = float("nan")
        return ws

    monkeypatch.setattr(Projection, "styles", lose_some)


def test_projection_that_comes_to_nothing_is_left_out(inside, capsys, monkeypatch):
    project(capsys, *SET, "--outdir=expected")
    lose(monkeypatch, slice(0, 1))
    assert project_with_failures(capsys, *SET).out.startswith("out: 4 images projected, 2 left out (see failed.csv); ")
    assert rows_in("out/failed.csv") == [{"image": f"00000/img0000000{index}.png",
                                          "reason": "its distance became no finite number"} for index in (0, 4)]
    assert [row["image"][-5] for row in rows_in("out/distances.csv")] == ["1", "2", "3", "5"]
    assert np.array_equal(styles_in("out"), styles_in("expected")[[1, 2, 3, 5]])


@pytest.mark.parametrize("lost", [0, 1])
def test_class_whose_projection_comes_to_nothing_is_not_the_nearest(inside, capsys, monkeypatch, lost):
    write_set("set.zip", range(6))
    project(capsys, *SET, f"--class={1 - lost}", "--outdir=expected")
    lose(monkeypatch, slice(lost, None, 2))
    project(capsys, *SET, "--class=auto")
    assert results_in("out") == results_in("expected")
