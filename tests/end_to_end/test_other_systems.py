"""Without what Linux or POSIX alone has, all programs start, and data, training and images are made in one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Programs with their arguments, one after the other in one process, as each takes seconds to load PyTorch.
PROGRAMS = """
import importlib, os, sys
from dnnlib.cli import run
if __name__ == "__main__":  # readers of images are new processes that begin with this file
    assert os.name == "other" and not hasattr(os, "fork")
    for line in sys.stdin.read().splitlines():
        program, *arguments = line.split()
        code = run(importlib.import_module(program).main, arguments)
        print(f"{program} ended with {code}", flush=True)
"""


@pytest.fixture
def on_another_system(tmp_path):
    """Return a function that runs programs where Python has not what POSIX or Linux alone has."""
    (tmp_path / "site").mkdir()
    shutil.copy(ROOT / "tests" / "helpers" / "other_system.py", tmp_path / "site" / "sitecustomize.py")
    (tmp_path / "programs.py").write_text(PROGRAMS)

    def run(*lines):
        path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
        return subprocess.run([sys.executable, str(tmp_path / "programs.py")], input="\n".join(lines), cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True,
                              text=True, check=False)

    return run


def test_every_program_starts(on_another_system):
    programs = sorted(path.stem for path in ROOT.glob("*.py"))
    assert "train" in programs
    done = on_another_system(*(f"{program} --help" for program in programs))
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if " ended with " in line] == [
        f"{program} ended with 0" for program in programs]
    assert done.stdout.count("Usage: ") == len(programs)


@pytest.mark.slow
def test_data_training_and_images_in_one_process(on_another_system, tmp_path):
    train = "train --outdir=runs --data=set.zip --cond=1 --cfg=tiny --batch=8 --kimg=1 --device=cpu --metrics=none"
    stopped = f"{train} --max-hours=0.0001 --workers"
    done = on_another_system(
        "dataset_tool phantom --dest=set.zip --count=16 --resolution=16x16 --workers=2 --classes=mel:0.5,nv:0.5",
        f"{stopped}=1", f"{stopped}=0", "generate --network=runs/00000-set* --class=nv --seeds=0,1 --outdir=out",
        f"{train} --gpus=2")
    lines, errors = done.stdout.splitlines(), done.stderr.splitlines()
    assert [line for line in lines if " ended with " in line] == [
        "dataset_tool ended with 0", "train ended with 75", "train ended with 75", "generate ended with 0",
        "train ended with 2"], done.stderr
    assert "continues at image 8" in lines
    assert errors[-1] == ("error: --gpus is 2; expected 1 on this system, which does not have process groups: leave "
                          "--gpus out, or use Linux")
    assert "cpumem" not in done.stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["seed0000.png", "seed0001.png"]
    [run] = os.listdir(tmp_path / "runs")
    assert not [name for name in os.listdir(tmp_path / "runs" / run) if name.startswith(("lock", ".tmp"))]
