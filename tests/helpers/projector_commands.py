"""Run projector.py in tests as a user does, and look at what it leaves behind."""

import csv
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import projector
from dnnlib.cli import run
from dnnlib.progress import Progress
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from latent.projection import COLUMNS, Projection, measure_pairs
from metrics.detectors.registry import open_similarity
from tests.helpers.generator_files import pixels_in, save_generator
from tests.helpers.image_files import read_png
from tests.helpers.make_sets import pixels_of, png
from tests.helpers.training_runs import replaced

INFO = {"classes": ["nv", "mel"], "kimg": 4.5}
STEPS = 4
USUAL = (f"--num-steps={STEPS}", "--detector=pixels", "--device=cpu")
SET_FILES = ["distances.csv", "distances.png", "latents.npz", "pairs.png", "projections.json", "projections.zip"]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def working_in(folder, monkeypatch):
    """Work in a folder, with networks of two named classes, of no classes, and one for gray images."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Progress, "advance", lambda self, count=1: None)  # a slow machine says more than a fast one
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    save_generator("net.safetensors", INFO)
    save_generator("plain.safetensors", {}, c_dim=0)
    save_generator("gray.safetensors", {}, c_dim=0, img_channels=1)
    yield folder


def attempt(*arguments, network="net.safetensors"):
    """Run projector.py; return the exit code. Later arguments win over the usual ones."""
    return run(projector.main, replaced([*([f"--network={network}"] if network else []), *USUAL], arguments))


def project(capsys, *arguments, network="net.safetensors"):
    """Run projector.py to its end, without a word on standard error; return standard output."""
    code = attempt(*arguments, network=network)
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def refuse(capsys, *arguments, network="net.safetensors", code=2):
    """Return the one line of a mistake, without "error: "; nothing may be made or changed."""
    before = contents(".")
    found = attempt(*arguments, network=network)
    captured = capsys.readouterr()
    assert (found, captured.out) == (code, "")
    assert contents(".") == before
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def contents(folder):
    """Return the bytes of every file below a folder by its path in it, and None for each folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(folder).rglob("*"))}


def record_in(folder, name="projection.json"):
    return json.loads(Path(folder, name).read_text())


def rows_in(path):
    """Return the rows of a table as dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def styles_in(folder, name="latents.npz"):
    with np.load(Path(folder, name), allow_pickle=False) as arrays:
        return arrays["w"]


def as_image(pixels):
    """Return [H, W] or [H, W, 3] as a tensor: uint8 [C, H, W]."""
    pixels = np.array(pixels)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def distances_between(target, projection):
    """Return by name what the distances of two pictures should be. target, projection: uint8 [C, H, W]"""
    found = measure_pairs(target[None], projection[None], open_similarity("pixels", device="cpu"))[0]
    return dict(zip(COLUMNS, found.tolist(), strict=True))


def distances_in(folder, projection="proj.png"):
    target, found = (as_image(pixels_in(Path(folder, name))) for name in ("target.png", projection))
    return distances_between(target, found)


def stop_within(monkeypatch, steps, error):
    """Let the program end after so many steps, with a state kept after each; return the list of steps done."""
    done, advance = [], Projection.advance

    def advance_some(self):
        if len(done) == steps:
            raise error
        result = advance(self)
        done.append(self.step)
        return result

    monkeypatch.setattr("latent.projection.STATE_SECONDS", 0)
    monkeypatch.setattr(Projection, "advance", advance_some)
    return done


def names_in(folder):
    return sorted(os.listdir(folder))


def project_with_failures(capsys, *arguments, network="net.safetensors"):
    """Run to the end; return standard output and error."""
    assert attempt(*arguments, network=network) == 0
    return capsys.readouterr()


def pictures_in(path):
    """Return the images of a data set in their order: uint8 [C, H, W] each."""
    images = ImageSet(path)
    return [as_image(read_png(images.read(name))) for name in images.names]


def write_set(path, indices):
    """Write a set of images of `make_set` without labels, in an order of its own."""
    with ImageSetWriter(path) as writer:
        for index in indices:
            writer.add(png(pixels_of(index)))


def results_in(folder):
    """Return for each row what was found: style, distances and file of the picture."""
    images = ImageSet(f"{folder}/projections.zip")
    return [(w.tobytes(), *(row[name] for name in COLUMNS), row["network_class"], images.read(row["projection"]))
            for w, row in zip(styles_in(folder), rows_in(f"{folder}/distances.csv"), strict=True)]
