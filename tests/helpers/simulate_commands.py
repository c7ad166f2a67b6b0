"""Run `federate.py simulate` in tests, on tiny sets, up to the start of the training."""

import os

import torch

from dnnlib.cli import run
from federated.command import make_simulate_command
from metrics.names import choose_metrics
from tests.helpers.make_sets import make_set
from torch_utils.device import Tuning

BASE = ("--outdir=runs", "--data=a.zip,b.zip", "--rounds=3", "--cfg=tiny", "--precision=fp32")
CLASSES = ["nv", "mel"]


def enter_folder(tmp_path, monkeypatch):
    """Enter a folder with the sets of two institutions, of 20 and 30 images of 16x16, and return it; see `isolate`."""
    isolate(tmp_path, monkeypatch)
    site("a", range(20))
    site("b", range(20, 50))
    return tmp_path


def isolate(tmp_path, monkeypatch):
    """Enter a folder; there is no GPU, no other process, and the allocator of the test process is not changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.command.tune_malloc", lambda wanted: Tuning(is_done=wanted, reason="a test"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


def site(name, images, *, size=16, classes=CLASSES, labels=None, **options):
    """Write NAME.zip with two classes in turn."""
    images = list(images)
    labels = [index % 2 for index in range(len(images))] if labels is None else labels
    make_set(f"{name}.zip", images=images, size=size, labels=labels, classes=classes, **options)


def with_base(arguments):
    """Return arguments after those of BASE that they do not replace."""
    names = {argument.partition("=")[0] for argument in arguments}
    return [*(flag for flag in BASE if flag.partition("=")[0] not in names), *arguments]


def prepare(capsys, *arguments):
    """Return what the command would train."""
    found = []
    code = run(make_simulate_command(lambda prepared: found.append(prepared) or 0, choose_metrics),
               with_base(arguments))
    captured = capsys.readouterr()
    assert (code, captured.out) == (0, ""), captured.err
    return found[0]


def refuse(capsys, *arguments):
    """Return the error message of a command, without "error: "; it must not leave files."""
    before = sorted(os.listdir())
    code = run(make_simulate_command(None, choose_metrics), with_base(arguments))
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert sorted({*os.listdir()} - {"cache"}) == [name for name in before if name != "cache"]
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")
