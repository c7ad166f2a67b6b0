"""Test `explore.py neighbors`: its files agree with each other and with numpy, and bad options are one line."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dnnlib.cli import run
from generation.image_generator import read_projected_w
from generation.network import open_network
from latent.neighbors import make_neighbors_command
from metrics.detectors.registry import open_detector
from tests.helpers.generator_files import pixels_in, save_generator
from tests.helpers.make_sets import make_set

HOSTILE = "<script>alert(1)</script>"
USUAL = ("--network=net.safetensors", "--outdir=out", "--detector=random-conv", "--device=cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in an empty folder with a network, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    save_generator("net.safetensors", {"classes": [HOSTILE, "mel"]})
    return tmp_path


def neighbors(*arguments):
    return run(make_neighbors_command(), [*USUAL, *arguments])


def refusal(capsys, *arguments):
    code = neighbors(*arguments)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert not Path("out").exists()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def table():
    return list(csv.DictReader(Path("out/neighbors.csv").read_text().splitlines()))


def files():
    return {path.name: path.read_bytes() for path in sorted(Path("out").iterdir())}


def test_neighbors_numbers_equal_numpy_from_the_images_of_its_styles():
    assert neighbors("--seeds=3,5", "--radius=90,30", "--num=4") == 0

    record = json.loads(Path("out/neighbors.json").read_text())
    rows = table()
    network = open_network("net.safetensors", "cpu")
    ws = read_projected_w("out/neighbors.npz", network.G)
    arrays = np.load("out/neighbors.npz")
    assert arrays["seed"].tolist() == [3] * 9 + [5] * 9
    assert arrays["radius"].tolist() == ([0] + [30] * 4 + [90] * 4) * 2
    assert arrays["direction"].tolist() == ([-1] + [0, 1, 2, 3] * 2) * 2
    detector = open_detector("random-conv", device="cpu")
    for center, seed in enumerate((3, 5)):
        sheet = pixels_in(f"out/neighbors-seed{seed:04d}.png")[:, -5 * 8:]  # without the column of labels
        cells = sheet.reshape(2, 8, 5, 8, 3).transpose(0, 2, 1, 3, 4)
        np.testing.assert_array_equal(cells[0, 0], cells[1, 0])
        images = np.concatenate([cells[:1, 0], cells[0, 1:], cells[1, 1:]])
        levels = np.abs(images[1:].astype(float) - images[0]).mean(axis=(1, 2, 3)).reshape(2, 4)
        features = detector(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).double().numpy()
        distances = np.linalg.norm(features[1:] - features[0], axis=1).reshape(2, 4)
        mine = rows[9 * center + 1:9 * center + 9]
        np.testing.assert_allclose([float(row["pixel_distance"]) for row in mine], levels.ravel(), rtol=1e-5)
        np.testing.assert_allclose([float(row["feature_distance"]) for row in mine], distances.ravel(), rtol=1e-4)
        for found, level, distance in zip(record["centers"][center]["radii"], levels, distances, strict=True):
            np.testing.assert_allclose(found["levels"]["mean"], level.mean(), rtol=1e-9)
            np.testing.assert_allclose(found["features"]["mean"], distance.mean(), rtol=1e-4)
            assert found["levels"]["low"] <= found["levels"]["mean"] <= found["levels"]["high"]
    assert [center["class"] for center in record["centers"]] == [HOSTILE, "mel"]
    both = [center["radii"][0]["levels"]["mean"] for center in record["centers"]]
    np.testing.assert_allclose(record["radii"][0]["levels"]["mean"], np.mean(both), rtol=1e-9)
    assert len(ws) == 18


def test_neighbors_page_shows_a_hostile_class_name_as_text():
    assert neighbors("--class=0") == 0

    page = Path("out/neighbors.html").read_text()
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_neighbors_twice_gives_equal_files():
    assert neighbors("--seed=7", "--space=w") == 0
    first = files()

    assert neighbors("--seed=7", "--space=w") == 0

    assert files() == first
    assert set(first) == {"neighbors.html", "neighbors.csv", "neighbors.json", "neighbors.npz",
                          "neighbors-seed0007.png"}


def test_neighbors_with_data_name_the_nearest_training_images():
    make_set("train.zip", 5, labels=[0, 1, 0, 1, 0], classes=["nv", "mel"])

    assert neighbors("--seed=7", "--radius=20", "--num=3", "--data=train.zip", "--nearest=3") == 0

    rows = table()
    near = json.loads(Path("out/neighbors.json").read_text())["centers"][0]["training_images"]
    assert [rows[0][f"training_{index}"] for index in (1, 2, 3)] == [one["image"] for one in near]
    distances = [[float(row[f"training_{index}_distance"]) for index in (1, 2, 3)] for row in rows]
    assert all(row == sorted(row) for row in distances)
    assert len(rows) == 4
    assert {one["class"] for one in near} <= {"nv", "mel"}
    page = Path("out/neighbors.html").read_text()
    assert "no test of copying" in page
    assert page.count("<img") == 4 * (1 + 3)


def test_neighbors_with_fewer_training_images_than_asked_for_leave_cells_empty():
    make_set("train.zip", 2, labels=[0, 1])

    assert neighbors("--num=1", "--radius=20", "--data=train.zip", "--nearest=4") == 0

    rows = table()
    assert [rows[1][f"training_{index}_distance"] == "" for index in (1, 2, 3, 4)] == [False, False, True, True]
    assert json.loads(Path("out/neighbors.json").read_text())["radii"][0]["features"]["low"] is None  # one neighbor


@pytest.mark.parametrize(("arguments", "message"), [
    (["--radius=0"], "--radius has '0'; expected degrees above 0, at most 180, such as --radius=10,20,40,90"),
    (["--radius=20,181"], "--radius has '181'; expected degrees above 0, at most 180, such as --radius=10,20,40,90"),
    (["--radius=far"], "--radius has 'far'; expected degrees above 0, at most 180, such as --radius=10,20,40,90"),
    (["--radius=-1", "--space=w"], "--radius has '-1'; expected numbers above 0, at most 1000, such as "
                                   "--radius=0.5,1,2,4"),
    (["--seed=1", "--seeds=2"], "--seed and --seeds are both given; expected one of them"),
    (["--seeds=0-32"], "--seeds names 33 seeds; expected at most 32"),
    (["--num=0"], "--num is 0; expected at least 1"),
    (["--mirror"], "--mirror is given, but only works with --data; add that, or leave --mirror out"),
    (["--nearest=3"], "--nearest is given, but only works with --data; add that, or leave --nearest out"),
    (["--num=1000000"], "each sheet would show 4000004 images of 8x8; expected at most 1250000: use a smaller --num, "
                        "or fewer --radius"),
    (["--data=gray.zip"], "--data is gray.zip, which has 8x8 gray images, but the network makes 8x8 RGB ones; expected "
                          "the data set that it was trained on"),
    (["--data=large.zip"], "--data is large.zip, which has 16x16 RGB images, but the network makes 8x8 RGB ones; "
                           "expected the data set that it was trained on"),
])
def test_neighbors_with_bad_options_are_refused(capsys, arguments, message):
    make_set("gray.zip", 2, channels=1)
    make_set("large.zip", 2, size=16)

    assert refusal(capsys, *arguments) == message


@pytest.mark.slow
def test_neighbors_in_two_processes_give_the_same_files():
    make_set("train.zip", 5, labels=[0, 1, 0, 1, 0])
    options = ["--seeds=0-1", "--data=train.zip", "--no-cache"]
    assert neighbors(*options) == 0
    single = files()

    program = Path(__file__).parents[2] / "explore.py"
    subprocess.run([sys.executable, str(program), "neighbors", *USUAL, *options, "--gpus=2"], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert files() == single
