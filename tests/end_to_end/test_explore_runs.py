"""explore.py together with the other programs, in several processes, and stopped before the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import explore
import generate
from dnnlib.cli import run
from tests.helpers.explore_commands import cells_of, differ_by, frames_of, styles_of, succeed
from tests.helpers.generator_files import pixels_in, save_generator, save_lesion_generator
from tests.helpers.make_sets import pixels_of, png
from tests.helpers.projector_commands import as_image, attempt, contents, working_in
from tests.helpers.training_runs import environment

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
INFO = {"classes": ["nv", "mel"]}
SIDE = 16


@pytest.fixture
def inside(tmp_path, monkeypatch):
    with working_in(tmp_path, monkeypatch):
        save_lesion_generator("net.safetensors", INFO, resolution=SIDE)
        yield


def start(command, *flags, launcher=(), network="net.safetensors"):
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "explore.py"), command, f"--network={network}", "--device=cpu", *flags],
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def own_lines(err):
    """Return the lines of standard error without the note on operators that are not compiled."""
    return [line for line in err.splitlines() if not line.startswith("warning: using PyTorch's own operators")]


def project(name, index):
    """Project an image, in three steps; return the file of its style."""
    Path(f"{name}.png").write_bytes(png(pixels_of(index, size=SIDE)))
    assert attempt(f"--target={name}.png", "--class=nv", "--num-steps=3", "--detector=pixels", "--save-video=0",
                   f"--outdir={name}") == 0
    return f"{name}/projected_w.npz"


def test_projections_are_edited_and_filmed_as_the_images_that_projector_and_generate_make(inside, capsys):
    points = [project(name, index) for index, name in enumerate(("first", "second"))]
    own = [as_image(pixels_in(f"{name}/proj.png")) for name in ("first", "second")]
    assert run(explore.main, [
        "boundary", "--network=net.safetensors", "--device=cpu", "--attribute=mel", "--seeds=0-99", "--measure=0",
        "--permutations=60", "--steps=2", "--outdir=found"]) == 0
    capsys.readouterr()
    succeed(capsys, "edit", f"--target={','.join(points)}", "--direction=found/directions.npz:mel", "--steps=3",
            "--frames=2", "--outdir=edited")
    cells = cells_of("edited/edit.png", SIDE, columns=4, rows=2)  # original, -3, 0, 3
    for row, image in enumerate(own):
        np.testing.assert_array_equal(cells[4 * row + 2], image)
    assert run(generate.main, ["--network=net.safetensors", "--device=cpu", "--projected-w=edited/edit.npz",
                               "--outdir=made"]) == 0
    capsys.readouterr()
    made = [as_image(pixels_in(path)) for path in sorted(Path("made").glob("proj*.png"))]
    for place, image in enumerate(made):
        np.testing.assert_array_equal(cells[4 * (place // 3) + 1 + place % 3], image)
    assert len(made) == 6
    succeed(capsys, "interpolate", f"--points={','.join(points)}", "--frames=3", "--formats=webp", "--outdir=film")
    frames, _ = frames_of("film/interpolation.webp")
    ends = styles_of("film/interpolation.npz")
    for name, frame, image, style in zip(("first", "second"), (frames[0], frames[-1]), own, ends, strict=True):
        side = frame.shape[1] // 3  # the film is between the originals
        assert differ_by(frame[:, side:2 * side], image) < 4
        assert (style == styles_of(f"{name}/projected_w.npz")[0]).all()


def test_processes_of_torchrun_write_the_files_of_one(inside, capsys):
    flags = ("--seeds=0-4", "--steps=3", "--layers=coarse")
    succeed(capsys, "sefa", *flags, "--outdir=one")
    process = start("sefa", *flags, "--outdir=two",
                    launcher=["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("direction 0 (") == 1
    assert contents("one") == contents("two")


def test_mistake_that_images_show_ends_all_processes_with_one_line(inside):
    save_generator("plain.safetensors", INFO)  # its images have no lesions
    process = start("boundary", "--attribute=area", "--seeds=0-39", "--gpus=2", "--outdir=out",
                    network="plain.safetensors")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, ""), err
    mistakes = [line for line in own_lines(err) if line.startswith("error: ")]
    assert mistakes == ["error: area is not known for any of the samples; expected an attribute that differs between "
                        "them: take more samples, of other classes, or another attribute"]
    assert "Traceback" not in err
    assert contents("out") == {}


@pytest.mark.parametrize(("command", "flags", "whole", "number", "code"), [
    ("sefa", ["--seeds=0-499", "--num=8", "--gpus=2"], {"directions.npz"}, signal.SIGTERM, 143),
    ("interpolate", ["--points=0,1", "--class=nv", "--frames=20000"], set(), signal.SIGINT, 130)])
def test_stopped_command_leaves_neither_a_half_written_file_nor_a_process(inside, command, flags, whole, number, code):
    process = start(command, *flags, "--outdir=out")
    deadline = time.monotonic() + 120
    while not (Path("out").is_dir() and os.listdir("out")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    assert len(children) == (2 if "--gpus=2" in flags else 0)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert [line for line in own_lines(err) if line.startswith("error: ")] == [err.splitlines()[-1]]
    assert "Traceback" not in err
    assert set(os.listdir("out") if Path("out").exists() else ()) <= whole  # an empty folder is removed
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
