"""A comparison of two institutions with programs in place of train.py, federate.py and dataset_tool.py."""

import json
import shutil

import torch

from dnnlib.cli import run
from federated.compare_arms import make_compare_command
from imagesets.convert import convert
from tests.helpers.make_sets import make_set
from tests.helpers.tiny_networks import discriminator, generator
from training.snapshot import Networks, save_network

CLASSES = ["benign", "melanoma"]
ARMS = ["central", "alone-a", "alone-b", "federated"]

# Notes its arguments in calls.jsonl, then does what a run does that finishes: networks and stats.jsonl appear. Fails as
# "codes.json" says, by arm. And what takes the place of dataset_tool.py.
PROGRAM = """
import json, os, shutil, sys
from pathlib import Path
flags = dict(text.partition("=")[::2] for text in sys.argv[1:])
outdir = Path(flags["--outdir"])
run, finished = outdir / "00000-run", outdir / "00000-run" / "finished"
if "--dry-run" in flags:
    if flags.get("--local") == "proportional" and "--server-optimizer" not in flags:
        print("error: proportional does not suit", file=sys.stderr)
        sys.exit(2)
    print(json.dumps({"run_folder": str(run), "already_finished": finished.exists(), "batch": 16}))
    sys.exit()
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
codes = json.loads(Path("codes.json").read_text())
if outdir.name in codes:
    sys.exit(codes[outdir.name])
folder = run / "server" if outdir.name == "federated" else run
shutil.copytree(Path("networks") / outdir.name, folder)
finished.touch()
"""


JOIN = """
import shutil, sys
dest = sys.argv[-1].removeprefix("--dest=")
shutil.copy("unions/" + dest.rpartition("/")[2], dest)
"""


def stats(*rounds, sites=()):
    """Return stats.jsonl of (kimg, seconds per kimg)."""
    lines = []
    for kimg, speed in rounds:
        line = {"Progress/kimg": {"num": 1, "mean": kimg}, "Timing/sec_per_kimg": {"num": 1, "mean": speed}}
        for number, site in enumerate(sites):
            line |= {f"Exchange/bytes_up/{site}": {"mean": (number + 1) * 2**20},
                     f"Exchange/bytes_down/{site}": {"mean": 2**19}}
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def make_material(folder):
    """Write the sets of two institutions, held-out ones, programs, and the networks that these "train"."""
    start = 0
    for name, count in (("a", 8), ("b", 12), ("a-test", 10), ("b-test", 14)):
        make_set(folder / f"{name}.zip", images=range(start, start + count), classes=CLASSES,
                 labels=[index % 2 for index in range(count)], groups=[f"{name}{index // 2}" for index in range(count)])
        start += count
    for name in ("train.py", "federate.py"):
        (folder / name).write_text(PROGRAM)
    (folder / "dataset_tool.py").write_text(JOIN)
    (folder / "codes.json").write_text("{}")
    (folder / "unions").mkdir()
    for name, ending in (("union", ""), ("holdout-union", "-test")):
        convert([folder / f"{site}{ending}.zip" for site in "ab"], folder / "unions" / f"{name}.zip")
    for number, arm in enumerate(ARMS):
        networks = folder / "networks" / arm
        networks.mkdir(parents=True)
        for step, images in enumerate((16, 1000 + 8 * number)):
            G = generator(seed=10 * number + step)
            info = {"kimg": images / 1000, "classes": CLASSES, "class_counts": [4, 4], "label_kind": "class"}
            save_network(networks / f"network-snapshot-{images // 1000:06d}.safetensors",
                         Networks(G=G, D=discriminator(), G_ema=G, config={"info": info}))
        (networks / "stats.jsonl").write_text(stats((0.016, 40), (1, 10)) if arm != "federated" else
                                              stats((0.5, 12), (1.024, 16), sites=("a", "b")))


def enter(folder, source, patch):
    """Copy a folder and work there, without a GPU."""
    shutil.copytree(source, folder)
    patch.chdir(folder)
    patch.setenv("DNNLIB_CACHE_DIR", str(folder / "cache"))
    patch.setattr(torch.cuda, "is_available", lambda: False)
    return folder


USUAL = {"data": "a.zip,b.zip", "holdout": "a-test.zip,b-test.zip", "outdir": "out", "kimg": "1", "rounds": "2",
         "points": "1", "cond": "1", "detector": "random-conv"}


def compare(folder, *more, **flags):
    """Run the command; return its exit code."""
    flags = {**USUAL, **flags}
    return run(make_compare_command(folder), [*(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()
                                                if value is not None), *more])


def error(folder, capsys, *more, **flags):
    """Run a command with a mistake; return its message."""
    capsys.readouterr()
    assert compare(folder, *more, **flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1].removeprefix("error: ")


def calls(folder):
    """Return the commands of the arms that were started, without the interpreter."""
    path = folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def found(folder):
    return json.loads((folder / "out" / "comparison.json").read_text())
