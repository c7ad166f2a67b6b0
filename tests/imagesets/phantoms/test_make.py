"""imagesets.phantoms.make and the command `phantom`: options, classes and lesions, and the data set written."""

import csv
import io
import zipfile

import numpy as np
import PIL.Image
import pytest

from dnnlib.cli import run
from imagesets.commands import phantom_command
from imagesets.metadata import METADATA
from imagesets.phantoms.make import (
    TABLE,
    deal_lesions,
    lesion_numbers,
    parse_bias,
    parse_classes,
    render_phantom,
    write_phantoms,
)
from imagesets.phantoms.scene import ARTIFACT_RATES
from imagesets.reader import ImageSet


def read_table(path):
    with zipfile.ZipFile(path) as archive:
        return list(csv.DictReader(io.StringIO(archive.read(TABLE).decode())))


def read_pixels(images, index):
    return np.asarray(PIL.Image.open(io.BytesIO(images.read(images.names[index]))))


@pytest.fixture(scope="module")
def phantom_zip(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantoms") / "phantom.zip"
    write_phantoms(path, count=60, resolution=32, classes={"benign": 0.7, "melanoma": 0.3}, seed=4,
                   bias={"frame": (0.0, 1.0)}, workers=1, stream=io.StringIO())
    return path


def test_set_of_phantoms_reads_as_a_data_set(phantom_zip):
    images = ImageSet(phantom_zip)
    assert len(images) == 60
    assert images.classes == ["benign", "melanoma"]
    assert np.bincount(images.labels).tolist() == [42, 18]
    assert images.other_members == [METADATA, TABLE]
    assert read_pixels(images, 0).shape == (32, 32, 3)
    assert 1 < max(images.groups.count(group) for group in images.groups) <= 3


def test_set_of_phantoms_says_what_it_is(phantom_zip):
    source = ImageSet(phantom_zip).source
    assert source["phantom"] is True
    assert "not to be taken for data" in source["note"]
    assert {name: source[name] for name in ("generator", "seed", "count", "resolution", "classes", "bias")} == {
        "generator": "dataset_tool.py phantom", "seed": 4, "count": 60, "resolution": 32,
        "classes": {"benign": 0.7, "melanoma": 0.3}, "bias": {"frame": [0.0, 1.0]}}


def test_table_agrees_with_labels_groups_and_pixels(phantom_zip):
    images, rows = ImageSet(phantom_zip), read_table(phantom_zip)
    assert [row["file"] for row in rows] == images.names
    assert [row["class"] for row in rows] == [images.classes[label] for label in images.labels]
    assert [row["group"] for row in rows] == images.groups
    assert [row["frame"] for row in rows] == [str(label) for label in images.labels]  # its bias is 0:1
    corners = [read_pixels(images, index)[0, 0].max() < 12 for index in range(60)]
    assert corners == [row["frame"] == "1" for row in rows]


def test_image_of_a_set_is_what_render_phantom_returns(phantom_zip):
    images, rows = ImageSet(phantom_zip), read_table(phantom_zip)
    for index in (0, 17, 59):
        rates = {**ARTIFACT_RATES, "frame": float(images.labels[index])}
        pixels, row = render_phantom(4, index, class_name=rows[index]["class"], resolution=32, rates=rates)
        assert np.array_equal(pixels, read_pixels(images, index))
        assert {name: str(value) for name, value in row.items()}.items() <= rows[index].items()


def test_set_does_not_depend_on_the_number_of_workers(phantom_zip, tmp_path):
    path = tmp_path / "again.zip"
    write_phantoms(path, count=60, resolution=32, classes={"benign": 0.7, "melanoma": 0.3}, seed=4,
                   bias={"frame": (0.0, 1.0)}, workers=3, stream=io.StringIO())
    assert path.read_bytes() == phantom_zip.read_bytes()


def test_image_does_not_depend_on_the_count(tmp_path):
    for count in (8, 20):
        write_phantoms(tmp_path / f"{count}.zip", count=count, resolution=16, classes={"benign": 1.0}, workers=1,
                       stream=io.StringIO())
    few, many = ImageSet(tmp_path / "8.zip"), ImageSet(tmp_path / "20.zip")
    assert all(few.read(name) == many.read(name) for name in few.names)
    assert len({many.read(name) for name in many.names}) == 20


def test_other_seed_gives_other_images():
    assert not np.array_equal(render_phantom(0, 0)[0], render_phantom(1, 0)[0])


def test_command_writes_a_set_and_says_so(tmp_path, capsys):
    path = tmp_path / "p.zip"
    assert run(phantom_command, [f"--dest={path}", "--count=10", "--resolution=16x16", "--workers=1", "--seed=2",
                                 "--classes=nv:0.5,mel:0.3,bcc:0.2", "--bias=hair=1:0:1", "--bias=ink=0:0:1"]) == 0
    assert capsys.readouterr().out == (
        f"{path}: 10 phantoms of 16x16 pixels (nv 5, mel 3, bcc 2); their attributes are in phantom.csv\n")
    rows = read_table(path)
    assert all(row["hair"] == str(int(row["class"] != "mel")) for row in rows)
    assert all(row["ink"] == str(int(row["class"] == "bcc")) for row in rows)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--count=0"], "--count=0; expected at least 1"),
    (["--seed=-1"], "--seed=-1; expected at least 0"),
    (["--workers=0"], "--workers=0; expected at least 1"),
    (["--resolution=64"], "--resolution=64; expected WIDTHxHEIGHT, such as 256x256"),
    (["--resolution=64x48"], "--resolution=64x48 is not square; expected for example 64x64"),
    (["--resolution=100x100"],
     "--resolution=100x100 is not a power of two from 8 to 1024; expected for example 128x128"),
    (["--resolution=4x4"], "--resolution=4x4 is not a power of two from 8 to 1024; expected for example 8x8"),
    (["--resolution=2048x2048"],
     "--resolution=2048x2048 is not a power of two from 8 to 1024; expected for example 1024x1024"),
    (["--classes=benign"],
     "--classes has 'benign'; expected NAME:SHARE,NAME:SHARE,..., such as benign:0.87,melanoma:0.13"),
    (["--classes=benign:0.5,:0.5"],
     "--classes has ':0.5'; expected NAME:SHARE,NAME:SHARE,..., such as benign:0.87,melanoma:0.13"),
    (["--classes=nv:0.5,nv:0.5"], "--classes has nv twice; expected each name once"),
    (["--classes=nv:0.87,mel:0.31"], "--classes has shares that sum to 1.18; expected 1"),
    (["--classes=nv:1,mel:0"], "--classes gives mel the share 0; expected above 0, up to 1"),
    (["--classes=nv:nan,mel:0"], "--classes gives nv the share nan; expected above 0, up to 1"),
    (["--classes=nv:0.5,benign:0.5"], "--classes has nv and benign, which look the same; keep one of them"),
    (["--bias=frame"], "--bias=frame; expected NAME=P:P:... with a probability for each class, such as frame=0.4:0.02"),
    (["--bias=frame=0.4:x"],
     "--bias=frame=0.4:x; expected NAME=P:P:... with a probability for each class, such as frame=0.4:0.02"),
    (["--bias=frames=0.4:0.02"], "--bias names frames (did you mean frame?); "
                                 "expected one of hair, ruler, vignette, frame, ink, bubbles"),
    (["--bias=frame=0.4"],
     "--bias gives frame 1 probabilities; expected 2, one for each class of --classes"),
    (["--bias=frame=0.4:1.5"], "--bias gives frame the probability 1.5; expected 0 to 1"),
    (["--bias=frame=0.4:nan"], "--bias gives frame the probability nan; expected 0 to 1"),
    (["--bias=hair=0:1", "--bias=hair=1:0"], "--bias names hair twice; expected each name once"),
])
def test_command_wrong_option_is_one_line_and_leaves_nothing(arguments, message, tmp_path, capsys):
    assert run(phantom_command, [f"--dest={tmp_path / 'p.zip'}", *arguments]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_command_destination_is_a_folder(tmp_path, capsys):
    (tmp_path / "p.zip").mkdir()
    assert run(phantom_command, [f"--dest={tmp_path / 'p.zip'}"]) == 2
    assert capsys.readouterr().err == (
        f"error: --dest={tmp_path / 'p.zip'} is a folder; expected a zip file to write\n")


def test_parsers_return_numbers_in_order():
    assert list(parse_classes("nv: 0.67, mel:0.33").items()) == [("nv", 0.67), ("mel", 0.33)]
    assert parse_bias(["frame=0.4:0.02", "hair=1:0"]) == {"frame": (0.4, 0.02), "hair": (1.0, 0.0)}


@pytest.mark.parametrize("counts", [[1740, 260], [1, 1, 1], [2, 0, 1], [20, 3, 3, 2, 1, 1], [1], [0, 500]])
@pytest.mark.parametrize("seed", range(4))
def test_plan_meets_the_counts_and_keeps_lesions_in_one_class(counts, seed):
    labels, lesions = deal_lesions(counts, seed)
    assert np.bincount(labels, minlength=len(counts)).tolist() == counts
    assert np.bincount(lesions).max() <= 3
    for lesion in np.unique(lesions):
        assert len(np.unique(labels[lesions == lesion])) == 1


def test_plan_gives_lesions_of_every_size_to_both_classes():
    labels, lesions = deal_lesions([1740, 260], 0)
    for label in range(2):
        sizes = np.bincount(lesions[labels == label])
        shares = np.bincount(sizes[sizes > 0], minlength=4)[1:] / (sizes > 0).sum()
        # 260 images are about 185 lesions: the standard error of a share is below 0.035, the bound three of it.
        assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.105)


def test_lesion_numbers_of_fewer_images_begin_those_of_more():
    assert np.array_equal(lesion_numbers(3, 50), lesion_numbers(3, 500)[:50])
    assert not np.array_equal(lesion_numbers(3, 50), lesion_numbers(4, 50))
