"""Run simulations of small institutions in tests, and read their files."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from dnnlib.cli import run
from federated.command import make_simulate_command
from federated.simulation import simulate
from metrics.names import choose_metrics
from tests.helpers.training_runs import flattened

# Three rounds of five iterations, in which regularizations are due.
SMALL = ("--outdir=runs", "--rounds=3", "--round-kimg=0.02", "--batch=4", "--cfg=tiny", "--precision=fp32",
         "--workers=0", "--tick=0.012", "--cond=1")
# Fields of states and statistics that may differ between two equal runs. Updates tell how long the site trained: so do
# their bytes, by a few digits.
TIMES = ("Timing/", "Resources/", "Exchange/bytes_up")


def run_simulation(*flags, change=lambda prepared: prepared, evaluate=None, usual=SMALL):
    """Run `federate.py simulate` in this process; flags replace the usual ones; return the exit code.

    change:  returns another PreparedFederation in place of that of the command
    """
    given = {flag.partition("=")[0] for flag in flags}
    command = make_simulate_command(lambda prepared: simulate(change(prepared), evaluate), choose_metrics)
    return run(command, [*(flag for flag in usual if flag.partition("=")[0] not in given), *flags])


def only_run(outdir="runs"):
    """Return the folder of the only run."""
    found = [path for path in Path(outdir).iterdir() if path.is_dir()]
    assert len(found) == 1
    return found[0]


def newest(outdir="runs"):
    """Return the tensors of the server's newest network snapshot."""
    return load_file(sorted(only_run(outdir).glob("server/network-snapshot-*.safetensors"))[-1])


def differing(first, second):
    """Return the names of tensors that are missing on a side, or not equal bit for bit."""
    return [name for name in first.keys() | second.keys()
            if name not in first or name not in second or not torch.equal(first[name], second[name])]


def lines(folder):
    """Return the statistics of a server or site: {name: mean} of each line."""
    found = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return [{name: entry["mean"] for name, entry in line.items() if name != "timestamp"} for line in found]


def without_times(folder):
    return [{name: value for name, value in line.items() if not any(part in name for part in TIMES)}
            for line in lines(folder)]


def state_of(folder):
    """Return the newest state of a server or site, flat, without times and the ends that the run reached before."""
    saved = torch.load(folder / "training-state.pt", weights_only=True)
    return {name: value for name, value in flattened(saved).items() if not name.endswith(("seconds", "ends"))}


def unlike(first, second):
    """Return what differs between the files of two runs that should have ended alike."""
    found = []
    for folder in sorted(path.name for path in first.iterdir() if path.is_dir()):
        a, b = state_of(first / folder), state_of(second / folder)
        found += [f"{folder}/{name}" for name in a.keys() | b.keys() if name not in a or name not in b or not (
            torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name])]
        if without_times(first / folder) != without_times(second / folder):
            found.append(f"{folder}/stats.jsonl")
    for pattern in ("server/network-snapshot-*.safetensors", "server/fakes*.png"):
        names = {str(path.relative_to(run)) for run in (first, second) for path in run.glob(pattern)}
        found += [name for name in sorted(names) if not (first / name).exists() or not (second / name).exists()
                  or (first / name).read_bytes() != (second / name).read_bytes()]
    return found
