"""Run train.py as a user does, on small phantoms, and compare what runs leave behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from imagesets.phantom import write_phantoms

ROOT = Path(__file__).parent.parent
# Fields that may differ between two equal runs.
TIMING = ("Timing/", "Resources/")


def make_phantoms(path, count=24, resolution=16):
    write_phantoms(path, workers=1, count=count, resolution=resolution, classes={"benign": 0.7, "melanoma": 0.3},
                   seed=0, bias={})
    return path


def command(folder, *flags, data="phantom.zip"):
    """Return the command of a short run: batch 8, ticks of 200 images, 1000 images in all."""
    return [sys.executable, str(ROOT / "train.py"), "--outdir=runs", f"--data={folder / data}", "--cond=1",
            "--cfg=tiny", "--batch=8", "--kimg=1", "--tick=0.2", "--snap=1", "--metrics=none", "--workers=1",
            "--precision=fp32", "--device=cpu", *flags]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run(folder, *flags, **kwargs):
    """Run to the end; return the finished process."""
    return subprocess.run(command(folder, *flags), cwd=folder, env=environment(), capture_output=True, text=True,
                          check=False, **kwargs)


def statistics(run_folder):
    """Return stats.jsonl without what may differ."""
    lines = [json.loads(line) for line in (run_folder / "stats.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timestamp" and not name.startswith(TIMING)}
            for line in lines]


def state(run_folder):
    """Return the newest state, flat, without what may differ."""
    saved = torch.load(run_folder / "training-state.pt", weights_only=True)
    saved.pop("seconds")
    return flattened(saved)


def flattened(value, prefix=""):
    if isinstance(value, dict):
        return {key: leaf for name, item in value.items() for key, leaf in flattened(item, f"{prefix}{name}/").items()}
    return {prefix.removesuffix("/"): value}


def differences(first, second):
    """Return what differs between two run folders that should have ended alike."""
    a, b = state(first), state(second)
    found = sorted(a.keys() ^ b.keys())
    found += [name for name in a.keys() & b.keys() if not (
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name])]
    if statistics(first) != statistics(second):
        found.append("stats.jsonl")
    for pattern in ("network-snapshot-*.safetensors", "fakes*.png", "reals.png"):
        names = {path.name for folder in (first, second) for path in folder.glob(pattern)}
        found += [name for name in sorted(names) if not (first / name).exists() or not (second / name).exists()
                  or (first / name).read_bytes() != (second / name).read_bytes()]
    return found
