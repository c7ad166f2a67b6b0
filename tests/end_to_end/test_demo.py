"""The demonstration, shortened: what it leaves, and that it goes on where it was stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from scripts.demo import COLUMNS, save_reals_and_fakes
from tests.helpers.make_sets import pixels_of, png

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_demo_goes_all_the_way_from_drawings_to_numbers(tmp_path):
    dest = tmp_path / "demo"
    command = [sys.executable, "-m", "scripts.demo", f"--dest={dest}", "--kimg=1", "--synthetic=40",
               "--detector=random-conv"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DNNLIB_CACHE_DIR": str(tmp_path / "cache")},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in dest.iterdir()} == {
        "phantom.zip", "run", "synthetic.zip", "samples.png", "reals_fakes.png", "curves.png", "summary.json",
        "index.html"}
    synthetic = ImageSet(dest / "synthetic.zip")
    assert (len(synthetic), (synthetic.labels == 1).sum(), synthetic.classes) == (40, 8, ["benign", "melanoma"])
    assert (synthetic.source["generated"], synthetic.source["phantom"]) == (True, True)
    summary = json.loads((dest / "summary.json").read_text())
    # 1.008: 63 whole batches
    assert (summary["kimg"], summary["detector"], summary["metric"]) == (1.008, "random-conv", "kid1k_full")
    lines = (dest / "run" / summary["run"] / "metric-kid1k_full.jsonl").read_text().splitlines()
    assert [summary[moment]["kid1k_full"] for moment in ("start", "end")] == [
        json.loads(line)["results"]["kid1k_full"] for line in (lines[0], lines[-1])]
    assert summary["end"]["kid1k_full"] < summary["start"]["kid1k_full"]
    with PIL.Image.open(dest / "samples.png") as samples:
        assert samples.height == 2 * 64  # a row for each network file: of the start, and of 1 kimg
    page = (dest / "index.html").read_text()
    assert all(f'src="{name}"' in page for name in ("samples.png", "reals_fakes.png", "curves.png"))
    assert "no data on patients" in " ".join(page.split())
    assert f"look at {dest / 'samples.png'}" in done.stdout


def test_demo_ends_with_the_message_of_the_program_that_failed(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "phantom.zip").mkdir()  # where the first program wants to write
    done = subprocess.run([sys.executable, "-m", "scripts.demo", f"--dest={tmp_path / 'demo'}"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: --dest={tmp_path / 'demo' / 'phantom.zip'} is a folder; expected a zip file to write",
        "error: dataset_tool.py ended with exit code 2; see above. The same command continues from here"]


def test_demo_shows_images_of_each_set_and_class(tmp_path):
    classes = ["benign", "melanoma"]
    labels = {"real": [0, 1, 0, 0], "synthetic": [1, 0, 1, 1]}
    for kind, found in labels.items():
        with ImageSetWriter(tmp_path / kind, classes=classes) as writer:
            for index, label in enumerate(found):
                writer.add(png(pixels_of(index + 10 * (kind == "real"))), label)
    save_reals_and_fakes(tmp_path / "picture.png", tmp_path / "real", tmp_path / "synthetic", seed=0)
    with PIL.Image.open(tmp_path / "picture.png") as picture:
        sheet = np.asarray(picture)[:, -16 * COLUMNS:]  # without the column of names; images of 8 pixels, enlarged
    assert sheet.shape == (4 * 16, 16 * COLUMNS, 3)
    tiles = sheet.reshape(4, 16, COLUMNS, 16, 3).transpose(0, 2, 1, 3, 4)
    for row, (label, kind) in enumerate((label, kind) for label in range(2) for kind in labels):
        expected = {pixels_of(index + 10 * (kind == "real")).repeat(2, axis=0).repeat(2, axis=1).tobytes()
                    for index, found in enumerate(labels[kind]) if found == label}
        assert {tile.tobytes() for tile in tiles[row, :len(expected)]} == expected
        assert (tiles[row, len(expected):] == 255).all()
