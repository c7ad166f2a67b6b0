"""generate.py as a program of its own: several processes, and every way to end before the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generate
from dnnlib.cli import run
from imagesets.reader import ImageSet
from tests.helpers.generator_files import save_generator
from tests.helpers.training_runs import environment

ROOT = Path(__file__).parent.parent.parent
COUNT = 1100  # five pieces
FLAGS = ("--network=net.safetensors", "--classes=nv:500,mel:600", "--batch=32", "--device=cpu")


pytestmark = pytest.mark.usefixtures("one_thread")  # as the started programs


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The bytes of the set that nothing happened to."""
    folder = tmp_path_factory.mktemp("expected")
    network = save_generator(folder / "net.safetensors", {"classes": ["nv", "mel"]})
    assert run(generate.main, [f"--network={network}", *FLAGS[1:], f"--zip={folder / 'set.zip'}"]) == 0
    return (folder / "set.zip").read_bytes()


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_generator("net.safetensors", {"classes": ["nv", "mel"]})
    return tmp_path


def start(*flags):
    command = [sys.executable, str(ROOT / "generate.py"), *FLAGS, "--zip=set.zip", *flags]
    return subprocess.Popen(command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def end_after_a_piece(process, number):
    """Send a signal once a piece is there; return exit code and standard error."""
    deadline = time.monotonic() + 60
    while not list(Path("set.zip.parts").glob("piece-*.npz")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.slow
def test_set_of_two_processes_is_that_of_one(inside, expected):
    process = start("--gpus=2")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, f"set.zip: {COUNT} images of 8x8 (nv: 500, mel: 600), seeds 0-1099\n"), err
    assert Path("set.zip").read_bytes() == expected
    assert sorted(os.listdir()) == ["net.safetensors", "set.zip"]


@pytest.mark.parametrize(("number", "code", "word"), [
    (signal.SIGTERM, 143, "terminated"), (signal.SIGKILL, -9, None),
    pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow)])
def test_set_that_was_stopped_is_continued_by_the_same_command(inside, expected, number, code, word, capsys):
    found, err = end_after_a_piece(start(), number)
    assert found == code
    assert not Path("set.zip").exists()
    if word is not None:
        hint, last = err.splitlines()[-2:]
        assert hint.endswith(f" of {COUNT} images are kept in set.zip.parts; the same command continues")
        assert last == f"error: {word}"
        assert "lock" not in os.listdir("set.zip.parts")
    before = len(list(Path("set.zip.parts").glob("piece-*.npz")))
    assert run(generate.main, [*FLAGS, "--zip=set.zip"]) == 0
    assert f"{before * 256} of {COUNT} images are already done" in capsys.readouterr().err or before == 5
    assert Path("set.zip").read_bytes() == expected
    assert sorted(os.listdir()) == ["net.safetensors", "set.zip"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_set_of_stopped_processes_is_continued_by_one(inside, expected, number, code):
    found, err = end_after_a_piece(start("--gpus=2"), number)
    assert found == code, err
    if number != signal.SIGKILL:
        assert err.count("the same command continues") == 1
        assert err.count("error:") == 1
    time.sleep(1)  # after SIGKILL the system ends the processes in a moment
    assert run(generate.main, [*FLAGS, "--zip=set.zip"]) == 0
    assert Path("set.zip").read_bytes() == expected
    assert len(ImageSet("set.zip")) == COUNT
