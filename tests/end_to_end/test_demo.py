"""The demonstration, shortened: what it leaves, and that it goes on where it was stopped."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from scripts.demo import COLUMNS, MEANINGS, METRICS, ROWS, Demo, next_steps, save_reals_and_fakes
from tests.end_to_end.test_flags_in_messages import FLAGS
from tests.helpers.generator_files import lively_generator, save_generator
from tests.helpers.make_sets import pixels_of, png
from torch_utils.images import to_pixels

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
        "phantom.zip", "heldout.zip", "heldout.jsonl", "run", "synthetic.zip", "samples.png", "reals_fakes.png",
        "curves.png", "summary.json", "index.html"}
    synthetic = ImageSet(dest / "synthetic.zip")
    assert (len(synthetic), (synthetic.labels == 1).sum(), synthetic.classes) == (40, 8, ["benign", "melanoma"])
    assert (synthetic.source["generated"], synthetic.source["phantom"]) == (True, True)
    summary = json.loads((dest / "summary.json").read_text())
    assert (summary["kimg"], summary["detector"], summary["metric"]) == (1, "random-conv", "kid1k_full")
    assert set(summary["start"]) == set(summary["end"]) == set(summary["held_out"]) == set(MEANINGS)
    for metric in METRICS:
        lines = (dest / "run" / summary["run"] / f"metric-{metric}.jsonl").read_text().splitlines()
        for moment, line in (("start", lines[0]), ("end", lines[-1])):
            found = json.loads(line)["results"]
            assert {key: summary[moment][key] for key in found} == found
    # New drawings are nearest to the drawings.
    distances = [summary[column]["kid1k_full"] for column in ("held_out", "end", "start")]
    assert distances == sorted(distances)
    with PIL.Image.open(dest / "samples.png") as samples:
        assert samples.height == 2 * 64  # a row for each network file: of the start, and of 1 kimg
    page = " ".join((dest / "index.html").read_text().split())
    assert "no photographs, no patient data" in page
    pictures = re.findall(r'<img alt="[^"]+" src="([^"]*)">', page)
    assert len(pictures) == page.count("<img") == 7  # two sheets, five plots
    for name, data in zip(("reals_fakes.png", "samples.png"), pictures):
        assert base64.b64decode(data.removeprefix("data:image/png;base64,")) == (dest / name).read_bytes()
    assert not re.search(r"<script|<link|@import|https?:|url\(", page)  # the browser asks for nothing else
    for key, (name, _, _) in MEANINGS.items():
        numbers = [f'<td class="number">{summary[column][key]:.3g}</td>' for column in ("start", "end", "held_out")]
        assert re.search(rf"<tr><th>{name}</th><td>\w+</td>{''.join(numbers)}<td>", page)
    assert f"--network={dest / 'run' / summary['run'] / 'network-snapshot-000001.safetensors'} --count=40" in page
    assert f"open {dest / 'index.html'}" in done.stdout


def test_demo_ends_with_the_message_of_the_program_that_failed(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "phantom.zip").mkdir()  # where the first program wants to write
    done = subprocess.run([sys.executable, "-m", "scripts.demo", f"--dest={tmp_path / 'demo'}"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: --dest={tmp_path / 'demo' / 'phantom.zip'} is a folder; expected a zip file to write",
        "error: dataset_tool.py ended with exit code 2; see above. The same command continues from here"]


def test_demo_shows_each_class_drawn_and_synthetic_from_the_same_latents(tmp_path):
    classes, labels = ["benign", "melanoma"], [0, 1, 0, 0]
    with ImageSetWriter(tmp_path / "real", classes=classes) as writer:
        for index, label in enumerate(labels):
            writer.add(png(pixels_of(index)), label)
    network = save_generator(tmp_path / "network.safetensors")
    save_reals_and_fakes(tmp_path / "picture.png", tmp_path / "real", network, seed=0)
    with PIL.Image.open(tmp_path / "picture.png") as picture:
        sheet = np.asarray(picture)[:, -16 * COLUMNS:]  # without the column of names; images of 8 pixels, enlarged
    count = ROWS * COLUMNS
    tiles = sheet.reshape(2, 2, ROWS, 16, COLUMNS, 16, 3).transpose(0, 1, 2, 4, 3, 5, 6).reshape(2, 2, count, 16, 16, 3)
    for label, (drawn, synthetic) in enumerate(tiles):
        expected = {pixels_of(index).repeat(2, axis=0).repeat(2, axis=1).tobytes()
                    for index, found in enumerate(labels) if found == label}
        assert {tile.tobytes() for tile in drawn[:len(expected)]} == expected
        assert (drawn[len(expected):] == 255).all()
        G = lively_generator()
        z = torch.from_numpy(np.random.RandomState(0).randn(count, G.z_dim))
        with torch.no_grad():
            images = G(z, torch.eye(2)[label].expand(count, -1), noise_mode="const")
        pixels = to_pixels(images).permute(0, 2, 3, 1).numpy()
        assert (synthetic == pixels.repeat(2, axis=1).repeat(2, axis=2)).all()
    assert (tiles[0, 1] != tiles[1, 1]).any()


def test_next_steps_of_the_page_use_flags_that_their_programs_have(tmp_path):
    dest = tmp_path / "a demonstration"
    run = dest / "run" / "00000-phantom"
    run.mkdir(parents=True)
    for name in ("log.txt", "network-snapshot-000001.safetensors"):
        (run / name).touch()
    demo = Demo(dest=dest, seed=0, kimg=1, synthetic=40, detector="random-conv")
    lines = [shlex.split(line, comments=True) for _, lines in next_steps(demo) for line in lines.splitlines()]
    lines = [line for line in lines if line]  # without comments
    assert lines[0][:2] == ["make", "demo"]
    lines[0] = ["python", "demo.py", *shlex.split(lines[0][2].removeprefix("ARGS="))]
    programs = [line[1] for line in lines]
    assert programs == ["demo.py", "generate.py", "calc_metrics.py", "projector.py", "dataset_tool.py", "train.py"]
    for program, line in zip(programs, lines):
        flags = {argument.partition("=")[0] for argument in line[2:]}
        assert len(flags) >= 4
        assert flags <= set(FLAGS[program])
