"""Show the whole way on drawings of lesions: data set, training, synthetic set, metrics, in minutes on a CPU.

It runs the programs as a user would, printing each command, and ends with a page of pictures and a summary.
"""

import html
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image
import torch

from dnnlib.cli import UserError, UserPath, run
from dnnlib.files import atomic_write
from dnnlib.lines import read_lines
from imagesets.reader import ImageSet, load_pixels
from torch_utils.images import save_grid, to_pixels
from torch_utils.plots import draw_curves
from training.run_folder import RunFolder, list_snapshots
from training.snapshot import load_network

ROOT = Path(__file__).resolve().parent.parent
RESOLUTION = 32
PHANTOMS = 2000
CLASSES = "benign:0.8,melanoma:0.2"
METRICS = ("kid1k_full", "fid1k_full")  # the first one is what the summary leads with: the other is biased at 1,000
SNAPSHOTS = 5  # network files of a run besides that of its start

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


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Where the demonstration writes, and how long it takes."""

    dest: Path
    seed: int
    kimg: int
    synthetic: int  # images of the synthetic set
    detector: str

    @property
    def phantoms(self) -> Path:
        return self.dest / "phantom.zip"

    @property
    def synthetic_set(self) -> Path:
        return self.dest / "synthetic.zip"

    @property
    def run(self) -> Path:
        """The folder of the newest run."""
        folders = sorted(path for path in (self.dest / "run").glob("[0-9]*") if RunFolder(path).log.exists())
        if not folders:
            raise UserError(f"{self.dest / 'run'} holds no run; expected one from train.py")
        return folders[-1]

    @property
    def snapshots(self) -> list[Path]:
        return [Path(path) for path in list_snapshots(self.run)]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--dest", type=UserPath(path_type=Path, file_okay=False), metavar="FOLDER", default=Path("demo"),
              show_default=True, help="Folder to write to.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of data and training.")
@click.option("--kimg", type=click.IntRange(min=1), default=20, show_default=True, help="Length of the training.")
@click.option("--synthetic", type=click.IntRange(min=2), default=1000, show_default=True,
              help="Images of the synthetic set.")
@click.option("--detector", default="efficientnet-lite0", show_default=True, help="As --detector of calc_metrics.py.")
def main(**options: Any) -> None:
    """Train on drawings of lesions and show what comes out."""
    demo = Demo(**options)
    started = time.monotonic()
    demo.dest.mkdir(parents=True, exist_ok=True)
    make_data(demo)
    train(demo)
    make_synthetic_set(demo)
    summary = summarize(demo, seconds=time.monotonic() - started)
    with atomic_write(demo.dest / "summary.json", text=True) as file:
        file.write(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    save_samples(demo.dest / "samples.png", demo.snapshots)
    save_reals_and_fakes(demo.dest / "reals_fakes.png", demo.phantoms, demo.synthetic_set, seed=demo.seed)
    save_training_curves(demo.dest / "curves.png", demo.run, METRICS)
    save_page(demo.dest / "index.html", summary)
    lead = METRICS[0]
    click.echo(f"{lead} went from {summary['start'][lead]:.4g} to {summary['end'][lead]:.4g} (lower is better) in "
               f"{summary['kimg']:g} kimg\nlook at {demo.dest / 'samples.png'}, or open {demo.dest / 'index.html'}")


def make_data(demo: Demo) -> None:
    """Draw the phantoms: two classes, one four times the other."""
    call("dataset_tool.py", "phantom", f"--dest={demo.phantoms}", f"--count={PHANTOMS}",
         f"--resolution={RESOLUTION}x{RESOLUTION}", f"--classes={CLASSES}", f"--seed={demo.seed}")


def train(demo: Demo) -> None:
    """Train, with metrics at the start, at the end and in between; a stopped demonstration goes on here."""
    call("train.py", f"--outdir={demo.dest / 'run'}", f"--data={demo.phantoms}", "--cond=1", "--cfg=tiny",
         f"--kimg={demo.kimg}", "--tick=1", f"--snap={max(demo.kimg // SNAPSHOTS, 1)}", f"--seed={demo.seed}",
         f"--metrics={','.join(METRICS)}", f"--detector={demo.detector}")


def make_synthetic_set(demo: Demo) -> None:
    """Write a labeled set with the trained network, its classes in the shares of training."""
    demo.synthetic_set.unlink(missing_ok=True)  # of an earlier end of the run; generate.py replaces no file
    call("generate.py", f"--network={demo.snapshots[-1]}", f"--count={demo.synthetic}", f"--zip={demo.synthetic_set}")


def summarize(demo: Demo, *, seconds: float) -> dict[str, Any]:
    """Return what summary.json says."""
    records = {metric: read_lines(RunFolder(demo.run).metric(metric)) for metric in METRICS}
    for metric, lines in records.items():
        if len(lines) < 2:
            raise UserError(f"{demo.run} has {len(lines)} results of {metric}; expected those of start and end: see "
                            f"{RunFolder(demo.run).log}")
    first, last = ({metric: lines[index]["results"][metric] for metric, lines in records.items()} for index in (0, -1))
    lead = records[METRICS[0]]
    return {"kimg": lead[-1]["nimg"] / 1000, "seconds": round(seconds, 1), "seed": demo.seed, "metric": METRICS[0],
            "start": first, "end": last, "detector": lead[-1]["detector"],
            "detector_sha256": lead[-1]["detector_sha256"], "run": demo.run.name,
            "phantom": True}


def call(program: str, *arguments: str) -> None:
    """Print and run one of the project's commands; a failure has been printed and ends the demonstration."""
    click.echo(f"\n$ python {program} {shlex.join(arguments)}")
    sys.stdout.flush()
    code = subprocess.run([sys.executable, str(ROOT / program), *arguments], check=False).returncode
    if code:
        raise UserError(f"{program} ended with exit code {code}; see above. The same command continues from here")


@torch.no_grad()
def save_samples(path: Path, snapshots: Sequence[Path]) -> None:
    """Write a row for each network file, of the same latents: half of them of the first class, half of the second."""
    cells, names = [], []
    z = torch.from_numpy(np.random.RandomState(0).randn(COLUMNS, load_network(snapshots[0]).G_ema.z_dim))
    for snapshot in snapshots:
        networks = load_network(snapshot)
        G = networks.G_ema
        labels = torch.arange(COLUMNS) * 2 // COLUMNS
        c = torch.nn.functional.one_hot(labels, G.c_dim).float()
        cells += _enlarged(to_pixels(G(z, c, noise_mode="const")))
        names.append(f"kimg {networks.config['info']['kimg']:.0f}")
    save_grid(path, cells, columns=COLUMNS, rows=len(names), labels=names)


def save_reals_and_fakes(path: Path, reals: Path, fakes: Path, *, seed: int) -> None:
    """Write a row of reals and a row of fakes of each class, drawn by seed."""
    rng = np.random.Generator(np.random.PCG64(seed))
    sets = {"real": ImageSet(reals), "synthetic": ImageSet(fakes)}
    cells, names = [], []
    for label, name in enumerate(sets["real"].classes):
        for kind, images in sets.items():
            chosen = rng.permutation(np.flatnonzero(images.labels == label))[:COLUMNS]
            cells += [_enlarged(torch.tensor(load_pixels(images, images.names[row]))) for row in chosen]
            cells += [None] * (COLUMNS - len(chosen))
            names.append(f"{name}, {kind}")
    save_grid(path, cells, columns=COLUMNS, rows=len(names), labels=names)


def save_training_curves(path: Path, run: Path, metrics: Sequence[str]) -> None:
    """Write metrics, losses, the discriminator's signs and the augmentation probability, one picture below another."""
    ticks = read_lines(RunFolder(run).stats)
    curves = [{metric: [(line["nimg"] / 1000, line["results"][metric]) for line in
                        read_lines(RunFolder(run).metric(metric))]} for metric in metrics]
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


def save_page(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a page of the pictures beside it."""
    with atomic_write(path, text=True) as file:
        first, second = (share.split(":")[0] for share in CLASSES.split(","))
        file.write(_PAGE.format(first=first, second=second,
                                summary=html.escape(json.dumps(summary, indent=1, allow_nan=False))))


def _enlarged(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.repeat_interleave(_ZOOM, dim=-2).repeat_interleave(_ZOOM, dim=-1)


if __name__ == "__main__":
    sys.exit(run(main))
