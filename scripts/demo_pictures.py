"""Draw what the demonstration shows: samples over time, reals beside fakes, curves, and the page that holds them."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from dnnlib.files import atomic_write
from imagesets.member_pixels import load_pixels
from imagesets.reader import ImageSet
from torch_utils.images import save_grid, to_pixels
from torch_utils.plots import draw_curves
from training.json_lines import read_lines
from training.snapshot import load_network

COLUMNS = 12  # images of a row
_ZOOM = 2  # images of 32 pixels are small on a screen
_CURVES = (("Loss/G/loss", "Loss/D/loss"), ("Loss/signs/real", "Progress/augment"))
_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Synthetic lesion drawings</title>
<style>body {{ font-family: sans-serif; max-width: 60em; margin: 2em auto }} img {{ max-width: 100% }}</style>
<h1>Synthetic lesion drawings</h1>
<p>The training images are phantoms: drawings by a program, not photographs and no data on patients.</p>
<h2>Samples over the training</h2><p>Each row one network, each column one latent; left half {first}, right half
{second}.</p><img src="samples.png" alt="samples">
<h2>Training images and synthetic ones</h2><img src="reals_fakes.png" alt="reals and fakes">
<h2>Curves over kimg</h2><img src="curves.png" alt="curves">
<h2>Summary</h2><pre>{summary}</pre>
</html>
"""


@torch.no_grad()
def save_samples(path: Path, snapshots: Sequence[Path]) -> None:
    """Write a row for each network file, of the same latents: half of them of the first class, half of the second."""
    rows, names = [], []
    z = torch.from_numpy(np.random.RandomState(0).randn(COLUMNS, load_network(snapshots[0]).G_ema.z_dim))
    for snapshot in snapshots:
        networks = load_network(snapshot)
        G = networks.G_ema
        labels = torch.arange(COLUMNS) * 2 // COLUMNS
        c = torch.nn.functional.one_hot(labels, G.c_dim).float()
        rows.append(to_pixels(G(z, c, noise_mode="const")))
        names.append(f"kimg {networks.config['info']['kimg']:.0f}")
    save_grid(path, _enlarged(torch.cat(rows)), columns=COLUMNS, rows=len(rows), labels=names)


def save_reals_and_fakes(path: Path, reals: Path, fakes: Path, *, seed: int) -> None:
    """Write a row of reals and a row of fakes of each class, drawn by seed."""
    rng = np.random.Generator(np.random.PCG64(seed))
    sets = {"real": ImageSet(reals), "synthetic": ImageSet(fakes)}
    rows, names = [], []
    for label, name in enumerate(sets["real"].classes):
        for kind, images in sets.items():
            chosen = rng.permutation(np.flatnonzero(images.labels == label))[:COLUMNS]
            pixels = [torch.tensor(load_pixels(images, images.names[row])) for row in chosen]
            pixels += [torch.full_like(pixels[0], 255)] * (COLUMNS - len(pixels))
            rows.append(torch.stack(pixels))
            names.append(f"{name}, {kind}")
    save_grid(path, _enlarged(torch.cat(rows)), columns=COLUMNS, rows=len(rows), labels=names)


def save_training_curves(path: Path, run: Path, metrics: Sequence[str]) -> None:
    """Write metrics, losses, the discriminator's signs and the augmentation probability, one picture below another."""
    ticks = read_lines(run / "stats.jsonl")
    curves = [{metric: [(line["nimg"] / 1000, line["results"][metric]) for line in
                        read_lines(run / f"metric-{metric}.jsonl")]} for metric in metrics]
    curves += [{name: [(tick["Progress/kimg"]["mean"], tick[name]["mean"]) for tick in ticks if name in tick]
                for name in names} for names in _CURVES]
    pictures = [draw_curves(curve) for curve in curves]
    sheet = PIL.Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)))
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    with atomic_write(path) as file:
        sheet.save(file, "png")


def save_page(path: Path, summary: Mapping[str, Any], classes: Sequence[str] = ("benign", "melanoma")) -> None:
    """Write a page of the pictures beside it."""
    with atomic_write(path, text=True) as file:
        file.write(_PAGE.format(first=classes[0], second=classes[1],
                                summary=html.escape(json.dumps(summary, indent=1, allow_nan=False))))


def _enlarged(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.repeat_interleave(_ZOOM, dim=2).repeat_interleave(_ZOOM, dim=3)
