"""Show the whole way on drawings of lesions: data set, training, synthetic set, metrics, in minutes on a CPU.

It runs the programs as a user would, printing each command, and ends with a page of pictures, curves and numbers.
"""

import base64
import html
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import click
import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from dnnlib.cli import UserError, UserPath, run
from dnnlib.files import atomic_write
from dnnlib.lines import read_lines
from imagesets.reader import ImageSet, load_pixels
from torch_utils.images import draw_grid, save_grid, to_pixels
from torch_utils.plots import draw_curves
from training.run_folder import RunFolder, list_snapshots
from training.run_record import read_record
from training.snapshot import load_network

ROOT = Path(__file__).resolve().parent.parent
RESOLUTION = 32
PHANTOMS = 2000
HELD_OUT = 1000  # as many as the fakes of METRICS, so that both are measured alike
CLASSES = "benign:0.8,melanoma:0.2"
METRICS = ("kid1k_full", "fid1k_full", "pr1k3_full")
LEAD = METRICS[0]  # what the last message is about: FID of 1,000 images is biased
ARTIFACTS = ("hair", "ruler", "frame", "ink", "bubbles")  # left out: a run of minutes does not learn them
# A smaller batch takes more steps in the same time, and each class is seen equally often.
TRAINING_FLAGS = ("--cond=1", "--cfg=tiny", "--batch=8", "--gamma=0.05", "--balance=classes")
SNAPSHOTS = 5  # network files of a run besides that of its start

COLUMNS = 12  # images of a row
ROWS = 2  # of each class, of drawings and of synthetic images
_ZOOM = 2  # images of 32 pixels are small on a screen
_PLOT_COLORS = 64  # few lines on white: a third of the file's size

# Result of a metric -> its name on the page, which direction is better, what it means.
MEANINGS = {
    "kid1k_full": ("KID", "lower", "Distance between synthetic images and drawings as a whole, quality and variety in "
                                   "one number. 0 means no difference that these images can show."),
    "fid1k_full": ("FID", "lower", "The same question, and the number that most papers report. With only 1,000 images "
                                   "it is far too high: compare it with the last column, never with a paper."),
    "pr1k3_full_precision": ("Precision", "higher", "Share of synthetic images that look like a drawing: quality."),
    "pr1k3_full_recall": ("Recall", "higher", "Share of drawings that the generator could have made: variety."),
}
# Title of a plot, how to read it, statistics in it; metrics come first.
CURVES = (
    ("Losses", "The two networks compete, so neither loss falls for long: a discriminator loss near 0 means that the "
               "generator has lost, and one near 1.39 (2 ln 2) that the discriminator is guessing.",
     ("Loss/G/loss", "Loss/D/loss")),
    ("Overfitting and augmentation",
     "The sign of the discriminator on training images is near 0 when it cannot tell them from synthetic ones, and "
     "near 1 when it knows them by heart; above 0.6, ADA raises the augmentation probability p (\"augment\").",
     ("Loss/signs/real", "Progress/augment")),
)


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
    def held_out(self) -> Path:
        return self.dest / "heldout.zip"

    @property
    def synthetic_set(self) -> Path:
        return self.dest / "synthetic.zip"

    @property
    def measured(self) -> Path:
        """The metrics of the held-out drawings, one JSON line each."""
        return self.dest / "heldout.jsonl"

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
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Random seed of drawings and training.")
@click.option("--kimg", type=click.IntRange(min=1), default=35, show_default=True,
              help="Length of the training, in thousands of images.")
@click.option("--synthetic", type=click.IntRange(min=2), default=1000, show_default=True,
              help="Number of images in the synthetic set.")
@click.option("--detector", default="efficientnet-lite0", show_default=True,
              help="Network that computes the features for metrics; see calc_metrics.py --help.")
def main(**options: Any) -> None:
    """Train on drawings of lesions and show the results on a page."""
    demo = Demo(**options)
    started = time.monotonic()
    demo.dest.mkdir(parents=True, exist_ok=True)
    commands = [*make_data(demo), train(demo), make_synthetic_set(demo), measure_held_out(demo)]
    summary = summarize(demo, seconds=time.monotonic() - started)
    with atomic_write(demo.dest / "summary.json", text=True) as file:
        file.write(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    save_samples(demo.dest / "samples.png", demo.snapshots)
    save_reals_and_fakes(demo.dest / "reals_fakes.png", demo.phantoms, demo.snapshots[-1], seed=demo.seed)
    curves = draw_training_curves(demo.run, METRICS)
    save_plots(demo.dest / "curves.png", [picture for _, _, picture in curves])
    save_page(demo.dest / "index.html", demo, summary, curves, commands)
    click.echo(f"{LEAD} went from {summary['start'][LEAD]:.4g} to {summary['end'][LEAD]:.4g} (lower is better) in "
               f"{summary['kimg']:g} kimg\nopen {demo.dest / 'index.html'}, or look at {demo.dest / 'samples.png'}")


def make_data(demo: Demo) -> list[str]:
    """Draw the phantoms, and others that the training never sees: two classes, one four times the other."""
    return [call("dataset_tool.py", "phantom", f"--dest={path}", f"--count={count}",
                 f"--resolution={RESOLUTION}x{RESOLUTION}", f"--classes={CLASSES}", f"--seed={seed}",
                 *(f"--bias={name}=0:0" for name in ARTIFACTS))
            for path, count, seed in ((demo.phantoms, PHANTOMS, demo.seed), (demo.held_out, HELD_OUT, demo.seed + 1))]


def train(demo: Demo) -> str:
    """Train, with metrics at the start, at the end and in between; a stopped demonstration goes on here."""
    return call("train.py", f"--outdir={demo.dest / 'run'}", f"--data={demo.phantoms}", *TRAINING_FLAGS,
                f"--kimg={demo.kimg}", "--tick=1", f"--snap={max(demo.kimg // SNAPSHOTS, 1)}", f"--seed={demo.seed}",
                f"--metrics={','.join(METRICS)}", f"--detector={demo.detector}")


def make_synthetic_set(demo: Demo) -> str:
    """Write a labeled set with the trained network, with the class shares of the training set."""
    demo.synthetic_set.unlink(missing_ok=True)  # of an earlier end of the run; generate.py replaces no file
    return call("generate.py", f"--network={demo.snapshots[-1]}", f"--count={demo.synthetic}",
                f"--zip={demo.synthetic_set}")


def measure_held_out(demo: Demo) -> str:
    """Compute the metrics of drawings that training never saw: what a perfect generator would reach."""
    return call("calc_metrics.py", f"--generated={demo.held_out}", f"--data={demo.phantoms}",
                f"--metrics={','.join(METRICS)}", f"--detector={demo.detector}", "--verbose=false",
                output=demo.measured)


def summarize(demo: Demo, *, seconds: float) -> dict[str, Any]:
    """Return the contents of summary.json."""
    records = [read_lines(RunFolder(demo.run).metric(metric)) for metric in METRICS]
    for metric, lines in zip(METRICS, records):
        if len(lines) < 2:
            raise UserError(f"{demo.run} has {len(lines)} results of {metric}; expected those of start and end: see "
                            f"{RunFolder(demo.run).log}")
    first, last = ({key: value for lines in records for key, value in lines[index]["results"].items()}
                   for index in (0, -1))
    held_out = {key: value for line in read_lines(demo.measured) for key, value in line["results"].items()}
    lead = records[0][-1]
    return {"kimg": lead["nimg"] / 1000, "seconds": round(seconds, 1), "seed": demo.seed, "metric": LEAD,
            "start": first, "end": last, "held_out": held_out, "num_real": lead["num_real"],
            "num_fake": lead["num_fake"], "detector": lead["detector"], "detector_sha256": lead["detector_sha256"],
            "run": demo.run.name, "phantom": True}


def call(program: str, *arguments: str, output: Path | None = None) -> str:
    """Print, run and return one of the project's commands; a failure has been printed and ends the demonstration.

    output:  file that takes what the command prints; it appears once the command has succeeded
    """
    command = _python(program, *arguments)
    shown = command if output is None else f"{command} > {shlex.quote(str(output))}"
    click.echo(f"\n$ {shown}")
    sys.stdout.flush()
    done = subprocess.run([sys.executable, str(ROOT / program), *arguments], check=False,
                          stdout=None if output is None else subprocess.PIPE)
    if done.returncode:
        raise UserError(f"{program} ended with exit code {done.returncode}; see above. The same command continues "
                        "from here")
    if output is not None:
        with atomic_write(output) as file:
            file.write(done.stdout)
    return shown


# Pictures


@torch.no_grad()
def save_samples(path: Path, snapshots: Sequence[Path]) -> None:
    """Write a row for each network file; both halves are of the same latents, one class each."""
    cells, names = [], []
    for snapshot in snapshots:
        networks = load_network(snapshot)
        z = latents(networks.G_ema, COLUMNS // 2)
        for label in range(2):
            cells += synthesize(networks.G_ema, z, label)
        names.append(f"kimg {networks.config['info']['kimg']:.0f}")
    save_grid(path, cells, columns=COLUMNS, rows=len(names), labels=names)


@torch.no_grad()
def save_reals_and_fakes(path: Path, reals: Path, snapshot: Path, *, seed: int) -> None:
    """Write rows of drawings, chosen by seed, and of synthetic images for each class; all classes share the latents."""
    rng = np.random.Generator(np.random.PCG64(seed))
    images, G = ImageSet(reals), load_network(snapshot).G_ema
    z, number = latents(G, ROWS * COLUMNS), ROWS * COLUMNS
    cells, names = [], []
    for label, name in enumerate(images.classes):
        chosen = rng.permutation(np.flatnonzero(images.labels == label))[:number]
        cells += [_enlarged(torch.tensor(load_pixels(images, images.names[row]))) for row in chosen]
        cells += [None] * (number - len(chosen))
        cells += synthesize(G, z, label)
        names += [f"{name}, {kind}" for kind in ("drawn", "synthetic") for _ in range(ROWS)]
    with atomic_write(path) as file:
        draw_grid(cells, columns=COLUMNS, rows=len(names), labels=names).save(file, "png", optimize=True)


def latents(G: nn.Module, count: int) -> Tensor:
    """Return the latents of all pictures: [count, Z]"""
    return torch.from_numpy(np.random.RandomState(0).randn(count, G.z_dim))


def synthesize(G: nn.Module, z: Tensor, label: int) -> list[Tensor]:
    """Return enlarged images of one class, without truncation: uint8 [C, H, W]"""
    c = torch.nn.functional.one_hot(torch.full((len(z),), label), G.c_dim).float()
    return [*_enlarged(to_pixels(G(z, c, noise_mode="const")))]


def draw_training_curves(run: Path, metrics: Sequence[str]) -> list[tuple[str, str, PIL.Image.Image]]:
    """Return title, explanation and picture of each plot over kimg."""
    ticks, plots = read_lines(RunFolder(run).stats), []
    values: dict[str, list[tuple[float, float]]] = {}
    for metric in metrics:
        for line in read_lines(RunFolder(run).metric(metric)):
            for key, value in line["results"].items():
                values.setdefault(key, []).append((line["nimg"] / 1000, value))
    kid, fid, *shares = values
    for title, text, keys in (
            ("KID", "It falls steeply while color and shape are learned, then slowly; if it rises again for good, the "
                    "run has overfitted or collapsed.", [kid]),
            ("FID", "It should tell the same story as KID; if the two disagree, believe KID for so few images.", [fid]),
            ("Precision and recall", "In a good run both rise; high precision with recall near 0 means that the images "
                                     "are all alike.", shares)):
        plots.append((title, text, draw_curves({key: values[key] for key in keys})))
    for title, text, keys in CURVES:
        plots.append((title, text, draw_curves({
            key: [(tick["Progress/kimg"]["mean"], tick[key]["mean"]) for tick in ticks if key in tick]
            for key in keys})))
    return plots


def save_plots(path: Path, pictures: Sequence[PIL.Image.Image]) -> None:
    """Write pictures of one size in two columns."""
    width, height = pictures[0].size
    sheet = PIL.Image.new("RGB", (2 * width, (len(pictures) + 1) // 2 * height), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % 2 * width, index // 2 * height))
    with atomic_write(path) as file:
        sheet.quantize(_PLOT_COLORS).save(file, "png", optimize=True)


def _enlarged(pixels: Tensor) -> Tensor:
    return pixels.repeat_interleave(_ZOOM, dim=-2).repeat_interleave(_ZOOM, dim=-1)


# The page


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Synthetic skin lesions: a demonstration</title>
<style>
:root { color-scheme: light dark; --ink: #1c2026; --faint: #5a6370; --paper: #fff; --panel: #f3f5f8; --line: #d5dae1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --faint: #a0a9b6; --paper: #14171c; --panel: #1f242c; --line: #38404b; }
}
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; }
h2 { margin-top: 2.8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin: 1.8rem 0 .2rem; font-size: 1.05rem; }
p { max-width: 44rem; }
.note { padding: .7rem 1rem; border-left: 4px solid #c44e1e; background: var(--panel); }
figure { margin: 1rem 0; overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; background: #fff; }
.sheet img { min-width: 30rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { padding: .8rem 1rem; overflow-x: auto; border-radius: 4px; background: var(--panel); font-size: .85rem; }
small, .faint { color: var(--faint); }
</style>
</head>
<body>
<h1>Synthetic skin lesions: a demonstration</h1>
<p>A small StyleGAN2-ADA generator was trained on $num_phantoms images of $resolution x $resolution pixels for $kimg
kimg (thousand images shown to the discriminator). All steps together took $minutes minutes on this computer.</p>
<p class="note"><strong>Phantoms, not patients.</strong> The training images are drawings by a program: no photographs,
no patient data. Nothing on this page shows how well the method works on real lesions.</p>

<h2>Drawings and synthetic images</h2>
<p>For each class: $rows rows of training drawings, then $rows rows from the generator. Synthetic images in the same
place use the same latent in every class, so what differs between them is the class. They are not selected and not
truncated. The drawings come without $artifacts; their classes are unbalanced ($classes), and training
shows each class equally often.</p>
<figure class="sheet">$reals_fakes</figure>

<h2>Growth over time</h2>
<p>One row per saved network, with its training time in kimg. Each column is one latent that stays the same from top to
bottom; the left half shows $first, the right half the same latents as $second.</p>
<figure class="sheet">$samples</figure>

<h2>Numbers</h2>
<p>$num_fake synthetic images are compared with the $num_real training drawings through the features of $detector. The
last column is the same comparison for $num_held_out new drawings, which training never saw: no generator can be
expected to do better.</p>
<div class="scroll"><table>
<tr><th>Metric</th><th>Better</th><th>Start</th><th>End</th><th>New drawings</th><th>Meaning</th></tr>
$numbers
</table></div>
<p class="faint">Numbers from different detectors, or from different numbers of images, cannot be compared.</p>

<h2>Curves</h2>
<p>The horizontal axis of every plot is the training time in kimg.</p>
$curves

<h2>Settings</h2>
<p>Random seed $seed; generator and discriminator have $parameters parameters; batch size $batch, learning rate $lr,
R1 gamma $gamma, augmentation: $augmentation. The commands below repeat the run; <code>$run</code> holds its log and all
settings. CPU models round differently, so that figures differ slightly from one to another.</p>
<pre>$commands</pre>

<h2>Next steps</h2>
$steps
</body>
</html>
""")


def save_page(path: Path, demo: Demo, summary: Mapping[str, Any], curves: Sequence[tuple[str, str, PIL.Image.Image]],
              commands: Sequence[str]) -> None:
    """Write the page; its pictures are inside the file, so that it can be moved and sent as it is."""
    shares = [(name, float(share)) for name, share in (each.split(":") for each in CLASSES.split(","))]
    text = {
        "num_phantoms": f"{PHANTOMS:,}", "resolution": RESOLUTION, "kimg": f"{summary['kimg']:g}", "rows": ROWS,
        "minutes": f"{summary['seconds'] / 60:.1f}", "first": shares[0][0], "second": shares[1][0],
        "classes": ", ".join(f"{share:.0%} {name}" for name, share in shares), "num_held_out": f"{HELD_OUT:,}",
        "artifacts": " or ".join([", ".join(ARTIFACTS[:-1]), ARTIFACTS[-1]]),
        "num_fake": f"{summary['num_fake']:,}", "num_real": f"{summary['num_real']:,}",
        "detector": summary["detector"], "seed": demo.seed, "run": str(demo.run), "commands": "\n\n".join(commands),
        **describe_settings(demo.run, demo.snapshots[-1]),
    }
    plots = "\n".join(f"<h3>{html.escape(title)}</h3>\n<p>{html.escape(reading)}</p>\n"
                      f"<figure>{_embedded(picture, f'plot of {title} over kimg')}</figure>"
                      for title, reading, picture in curves)
    numbers = "\n".join(
        f"<tr><th>{name}</th><td>{better}</td>"
        + "".join(f'<td class="number">{summary[column][key]:.3g}</td>' for column in ("start", "end", "held_out"))
        + f"<td>{html.escape(meaning)}</td></tr>" for key, (name, better, meaning) in MEANINGS.items())
    steps = "\n".join(f"<h3>{title}</h3>\n<pre>{html.escape(command)}</pre>" for title, command in next_steps(demo))
    blocks = {
        "reals_fakes": _embedded(demo.dest / "reals_fakes.png", "drawings and synthetic images of each class"),
        "samples": _embedded(demo.dest / "samples.png", "images of the same latents over the training"),
        "numbers": numbers, "curves": plots, "steps": steps,
    }
    with atomic_write(path, text=True) as file:
        file.write(_PAGE.substitute({key: html.escape(str(value)) for key, value in text.items()}, **blocks))


def next_steps(demo: Demo) -> list[tuple[str, str]]:
    """Return what to try next: titles and commands."""
    network, detector = f"--network={demo.snapshots[-1]}", f"--detector={demo.detector}"
    longer = shlex.join([f"--dest={demo.dest}", f"--seed={demo.seed}", f"--synthetic={demo.synthetic}", detector,
                         f"--kimg={5 * demo.kimg}"])
    own = ["dataset_tool.py", "--source=IMAGES", "--labels=METADATA.csv", "--dest=own.zip", "--transform=center-crop",
           "--resolution=64x64"]
    train_own = ["train.py", "--outdir=runs", "--data=own.zip", "--cond=1", "--mirror=1", "--cfg=tiny", "--kimg=300"]
    return [
        ("Train longer: the run continues from where it ended", f"make demo ARGS={shlex.quote(longer)}"),
        ("Generate images of one class", _python(
            "generate.py", network, "--class=melanoma", "--seeds=0-31", f"--grid={demo.dest / 'melanoma.png'}")),
        ("Measure one class against drawings that the training never saw", _python(
            "calc_metrics.py", network, f"--data={demo.held_out}", "--metrics=kid_full,pr_full", "--class=melanoma",
            detector)),
        ("Find given images in the latent space", _python(
            "projector.py", network, f"--data={demo.held_out}", "--count=4", "--num-steps=200",
            f"--outdir={demo.dest / 'projected'}", detector)),
        ("Use your own images: convert them, then train on them",
         f"{_python(*own)}\n{_python(*train_own)}\n# with a GPU: a higher --resolution, and no --cfg=tiny"),
    ]


def _python(program: str, *arguments: str) -> str:
    return f"python {program} {shlex.join(arguments)}"


def describe_settings(run: Path, network: Path) -> dict[str, str]:
    """Return the settings that the page prints, from a run's folder and its last network file."""
    config, networks = read_record(run).config, load_network(network)
    number = sum(parameter.numel() for each in (networks.G_ema, networks.D) for parameter in each.parameters())
    ada, augment = config.step.ada, config.augment
    return {"batch": str(config.batch), "gamma": f"{config.step.loss.gamma:g}", "lr": f"{config.g_adam.lr:g}",
            "augmentation": "off" if not augment.strengths else f"p = {augment.p:g}" if ada is None
            else f"adaptive, target {ada.target:g}", "parameters": f"{number:,}"}


def _embedded(picture: Path | PIL.Image.Image, description: str) -> str:
    """Return a picture as an element of the page that needs no other file."""
    if isinstance(picture, Path):
        data = picture.read_bytes()
    else:
        buffer = io.BytesIO()
        picture.save(buffer, "png", optimize=True)
        data = buffer.getvalue()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


if __name__ == "__main__":
    sys.exit(run(main))
