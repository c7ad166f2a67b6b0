"""Run `study.py classify` in this process, on small sets of images with and without a spot."""

import torch

from analysis.command import make_group
from dnnlib.cli import run
from tests.helpers.spot_sets import make_spot_set

COUNTS = {"train": 48, "val": 24, "test": 24, "other": 20, "synthetic": 60}
HEAD = ("--model=squeezenet1_1", "--weights=none", "--size=32", "--resamples=50", "--workers=1", "--device=cpu",
        "--tune-malloc=0")
TUNED = (*HEAD, "--finetune=all", "--epochs=2", "--batch=16", "--lr=0.001")


def make_sets(folder):
    """Write train.zip, val.zip, test.zip, other.zip and synthetic.zip, which no network made."""
    for seed, (name, count) in enumerate(COUNTS.items()):
        make_spot_set(folder / f"{name}.zip", count, seed=seed)
    return folder


def study(*arguments):
    """Run study.py in this process; return the exit code."""
    threads = torch.get_num_threads()
    try:
        return run(make_group(), list(arguments))
    finally:
        torch.set_num_threads(threads)


def make_protocol(folder, *flags, positive="spot", out="protocol.json"):
    parts = [f"--{name}={folder / name}.zip" for name in ("train", "val", "test")]
    assert study("protocol", *parts, f"--positive={positive}", *flags, f"--out={folder / out}") == 0
    return folder / out


def classify(folder, *flags, **options):
    """Run the command as `classify_arguments` gives it; return the exit code."""
    return study(*classify_arguments(folder, *flags, **options))


def classify_arguments(folder, *flags, usual=HEAD, outdir="out", protocol="protocol.json"):
    """Return the arguments of study.py; flags replace the usual ones."""
    given = {flag.partition("=")[0] for flag in flags}
    return ["classify", f"--protocol={folder / protocol}", f"--outdir={folder / outdir}",
            *(flag for flag in usual if flag.partition("=")[0] not in given), *flags]
