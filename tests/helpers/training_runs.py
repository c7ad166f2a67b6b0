"""Run train.py as a user does, on small phantoms, and compare the files of runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import train
from dnnlib.cli import run as run_command
from dnnlib.files import EXIT_TEMPORARY
from imagesets.phantoms.make import write_phantoms

ROOT = Path(__file__).parent.parent.parent
RUN_NAME = "00000-phantom-cond-tiny-kimg1-batch8"  # what the command makes
SEVERAL = ("--detector-weights", "--metrics")  # options that may be given several times
OFTEN = "--state-minutes=0.005"  # a state every third of a second: a good part of the time goes into writing them
METRIC, METRIC_FLAGS = "kid80_full", ("--metrics=kid80_full", "--detector=random-conv")  # three blocks of fakes
# Fields that may differ between two equal runs.
TIMING = ("Timing/", "Resources/")
METRIC_TIMING = ("timestamp", "total_time", "total_time_str")


def make_phantoms(path, count=24, resolution=32, seed=0):
    write_phantoms(path, workers=1, count=count, resolution=resolution, classes={"benign": 0.7, "melanoma": 0.3},
                   seed=seed, bias={})
    return path


def command(folder, *flags, data="phantom.zip"):
    """Return the command of a short run: batch 8, ticks of 200 images, 1000 images in all; flags replace its own."""
    usual = ["--outdir=runs", f"--data={folder / data}", "--cond=1", "--cfg=tiny", "--batch=8", "--kimg=1",
             "--tick=0.2", "--snap=1", *METRIC_FLAGS, "--workers=1", "--precision=fp32", "--device=cpu"]
    return [sys.executable, str(ROOT / "train.py"), *replaced(usual, flags)]


def replaced(usual, flags):
    """Return usual flags and others, the last of each name, since programs reject repeated flags."""
    last = {flag.partition("=")[0]: flag for flag in flags}
    return [flag for flag in usual if flag.partition("=")[0] not in last] + [
        flag for flag in flags if flag.startswith(SEVERAL) or flag is last[flag.partition("=")[0]]]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run(folder, *flags, **kwargs):
    """Run to the end; return the finished process."""
    return subprocess.run(command(folder, *flags), cwd=folder, env=environment(), capture_output=True, text=True,
                          check=False, **kwargs)


def start(folder, *flags):
    """Start a run, with pipes for its output."""
    return subprocess.Popen(command(folder, *flags), cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def train_one_step(outdir, data, *flags):
    """Train one iteration in this process; return its network snapshot."""
    command = [f"--outdir={outdir}", f"--data={data}", "--cfg=tiny", "--batch=4", "--metrics=none", "--workers=0",
               "--precision=fp32", "--device=cpu", "--tune-malloc=0", "--max-hours=1e-9", "--snap=1", *flags]
    assert run_command(train.main, command) == EXIT_TEMPORARY
    path, = (outdir / next(outdir.iterdir()).name).glob("network-snapshot-*.safetensors")
    return path


def wait_for_line(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return line
    raise AssertionError(process.stderr.read())


def kill_run(folder, seconds, *, in_a_write=False):
    """Start or continue a run, and kill -9 it some seconds after it locked its folder.

    in_a_write:  wait from then on for a moment in which some file is half written

    Returns None if the run finished before, else whether a half-written file was left.
    """
    process = start(folder, OFTEN)
    try:
        wait_for_line(process, "run: ")
        run_folder, end = folder / "runs" / RUN_NAME, time.monotonic() + seconds
        while process.poll() is None and (time.monotonic() < end or (in_a_write and not half_written(run_folder))):
            time.sleep(0.001)
    finally:
        process.kill()
        _, errors = process.communicate()
    if process.returncode == 0:
        return None
    assert process.returncode == -signal.SIGKILL, errors
    return bool(half_written(run_folder))


def half_written(run_folder):
    return list(run_folder.glob(".tmp*"))


def statistics(run_folder):
    """Return stats.jsonl without what may differ."""
    lines = [json.loads(line) for line in (run_folder / "stats.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timestamp" and not name.startswith(TIMING)}
            for line in lines]


def metrics(run_folder):
    """Return the lines of the run's metric without what may differ."""
    lines = [json.loads(line) for line in (run_folder / f"metric-{METRIC}.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in METRIC_TIMING} for line in lines]


def state(run_folder):
    """Return the newest state, flat, without what may differ."""
    saved = torch.load(run_folder / "training-state.pt", weights_only=True)
    saved.pop("seconds")
    saved.pop("missing_metrics")  # those that are made up with a network are so after its state is saved
    return flattened(saved)


def seconds(run_folder):
    """Return the seconds that a run has trained."""
    return torch.load(run_folder / "training-state.pt", weights_only=True)["seconds"]


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
    if metrics(first) != metrics(second):
        found.append(f"metric-{METRIC}.jsonl")
    for pattern in ("network-snapshot-*.safetensors", "fakes*.png", "reals.png"):
        names = {path.name for folder in (first, second) for path in folder.glob(pattern)}
        found += [name for name in sorted(names) if not (first / name).exists() or not (second / name).exists()
                  or (first / name).read_bytes() != (second / name).read_bytes()]
    return found
