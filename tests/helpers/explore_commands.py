"""Run explore.py in tests as a user does, and look at the films that it makes."""

import json
from pathlib import Path

import av
import numpy as np
import PIL.Image
import torch

import explore
from dnnlib.cli import run
from generation.image_generator import ImageGenerator, SynthesisSettings, read_projected_w
from generation.network import open_network
from tests.helpers.generator_files import pixels_in
from tests.helpers.projector_commands import as_image, contents


def attempt(command, *arguments, network="net.safetensors"):
    """Run a command of explore.py on the CPU; return the exit code."""
    return run(explore.main, [command, f"--network={network}", "--device=cpu", *arguments])


def succeed(capsys, command, *arguments, network="net.safetensors"):
    """Run a command to its end, without a word on standard error; return standard output."""
    code = attempt(command, *arguments, network=network)
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def refuse(capsys, command, *arguments, network="net.safetensors"):
    """Return the one line of a mistake, without "error: "; nothing may be made or changed."""
    before = contents(".")
    code = attempt(command, *arguments, network=network)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert contents(".") == before
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def opened(network="net.safetensors", **settings):
    """Return a network and an ImageGenerator of it, as generate.py makes them."""
    found = open_network(network, "cpu")
    return found, ImageGenerator(found.G, SynthesisSettings(**settings), batch=1)


def images_of_seeds(seeds, labels, network="net.safetensors", **settings):
    """Return styles [N, L, K] and images uint8 [N, C, R, R] of seeds as generate.py makes them."""
    found, generator = opened(network, **settings)
    rows = found.classes.labels(labels)
    ws = torch.cat([generator.map_seeds([seed], row[None]) for seed, row in zip(seeds, rows)])
    return ws, torch.cat(list(generator.generate(seeds, rows)))


def images_of_styles(ws, network="net.safetensors"):
    """Return the images of styles [N, L, K] as generate.py --projected-w makes them: uint8 [N, C, R, R]."""
    return torch.cat(list(opened(network)[1].render_all(ws)))


def styles_of(path, network="net.safetensors"):
    """Return the styles of a file, as generate.py --projected-w reads them."""
    return read_projected_w(path, open_network(network, "cpu").G)


def cells_of(path, side, columns, rows=1):
    """Return the images on a sheet, row by row, without labels and headings: uint8 [C, side, side] each."""
    sheet = as_image(pixels_in(path))[:, -rows * side:, -columns * side:]
    return [cell for line in sheet.split(side, dim=1) for cell in line.split(side, dim=2)]


def frames_of(path):
    """Return the frames of a film, uint8 [H, W, 3] each, and for how many seconds it runs."""
    if Path(path).suffix == ".webp":
        frames, milliseconds = [], 0
        with PIL.Image.open(path) as film:
            for index in range(film.n_frames):
                film.seek(index)
                frames.append(np.array(film.convert("RGB")))
                milliseconds += film.info["duration"]
        return frames, milliseconds / 1000
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return frames, float(stream.duration * stream.time_base)


def record_of(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def enlarged(image, height):
    """Return uint8 [C, H, W] as [height, ..., 3], enlarged by an integer."""
    factor = height // image.shape[1]
    return image.expand(3, -1, -1).permute(1, 2, 0).numpy().repeat(factor, axis=0).repeat(factor, axis=1)


def differ_by(frame, image):
    """Return the mean difference, in levels, of a frame [H, W, 3] from an image [C, h, w] that it shows enlarged."""
    return np.abs(frame.astype(float) - enlarged(image, len(frame))).mean()
