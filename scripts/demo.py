"""Show the whole way on drawings of lesions: data set, training, synthetic set, metrics, in minutes on a CPU.

It runs the programs as a user would, printing each command, and ends with a page of pictures and a summary.
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import UserError, UserPath, run
from dnnlib.files import atomic_write
from scripts.demo_pictures import save_page, save_reals_and_fakes, save_samples, save_training_curves
from training.json_lines import read_lines

ROOT = Path(__file__).resolve().parent.parent
RESOLUTION = 32
PHANTOMS = 2000
CLASSES = "benign:0.8,melanoma:0.2"
METRICS = ("kid1k_full", "fid1k_full")  # the first one is what the summary leads with: the other is biased at 1,000
SNAPSHOTS = 5  # network files of a run besides that of its start


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
        folders = sorted(path for path in (self.dest / "run").glob("[0-9]*") if (path / "log.txt").exists())
        if not folders:
            raise UserError(f"{self.dest / 'run'} holds no run; expected one from train.py")
        return folders[-1]

    @property
    def snapshots(self) -> list[Path]:
        return sorted(self.run.glob("network-snapshot-*.safetensors"))


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
    summary = summarise(demo, seconds=time.monotonic() - started)
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
    """Write a labelled set with the trained network, its classes in the shares of training."""
    demo.synthetic_set.unlink(missing_ok=True)  # of an earlier end of the run; generate.py replaces no file
    call("generate.py", f"--network={demo.snapshots[-1]}", f"--count={demo.synthetic}", f"--zip={demo.synthetic_set}")


def summarise(demo: Demo, *, seconds: float) -> dict[str, Any]:
    """Return what summary.json says."""
    records = {metric: read_lines(demo.run / f"metric-{metric}.jsonl") for metric in METRICS}
    for metric, lines in records.items():
        if len(lines) < 2:
            raise UserError(f"{demo.run} has {len(lines)} results of {metric}; expected those of start and end: see "
                            f"{demo.run / 'log.txt'}")
    first, last = ({metric: lines[index]["results"][metric] for metric, lines in records.items()} for index in (0, -1))
    lead = records[METRICS[0]]
    return {"kimg": lead[-1]["nimg"] / 1000, "seconds": round(seconds, 1), "seed": demo.seed, "metric": METRICS[0],
            "start": first, "end": last, "detector": lead[-1]["detector"],
            "detector_sha256": lead[-1]["detector_sha256"], "run": demo.run.name,
            "phantom": True}


def call(program: str, *arguments: str) -> None:
    """Print and run one of the project's commands; a failure has been said and ends the demonstration."""
    click.echo(f"\n$ python {program} {shlex.join(arguments)}")
    sys.stdout.flush()
    code = subprocess.run([sys.executable, str(ROOT / program), *arguments], check=False).returncode
    if code:
        raise UserError(f"{program} ended with exit code {code}; see above. The same command continues from here")


if __name__ == "__main__":
    sys.exit(run(main))
