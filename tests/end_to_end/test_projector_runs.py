"""projector.py as a program of its own: several processes, and every way to end before the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.generator_files import save_generator
from tests.helpers.make_sets import make_set, pixels_of, png
from tests.helpers.projector_commands import INFO, SET_FILES, attempt, contents, names_in, working_in
from tests.helpers.training_runs import environment, replaced

pytestmark = pytest.mark.usefixtures("one_thread")  # as programs that tests start

ROOT = Path(__file__).parent.parent.parent
COUNT, STEPS = 10, 25
FLAGS = (f"--num-steps={STEPS}", "--detector=pixels", "--device=cpu")
SET = ("--data=set.zip", "--batch=2", "--outdir=out")  # five passes
TARGET = ("--target=target.png", "--class=auto", "--batch=1", "--outdir=out")  # two passes
PARTS = Path("out/projections.zip.parts")


def fill(folder):
    """Make what is projected, and with what."""
    save_generator(folder / "net.safetensors", INFO)
    make_set(folder / "set.zip", COUNT, labels=[0, 1] * (COUNT // 2), classes=INFO["classes"])
    (folder / "target.png").write_bytes(png(pixels_of(3)))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The files that nothing happened to, by command."""
    folder = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch, working_in(folder, patch):
        fill(folder)
        for command, dest in ((SET, "set"), (TARGET, "target")):
            assert attempt(*FLAGS, *command, f"--outdir={dest}") == 0
    return {SET: contents(folder / "set"), TARGET: contents(folder / "target")}


@pytest.fixture
def inside(tmp_path, monkeypatch):
    with working_in(tmp_path, monkeypatch):
        fill(tmp_path)
        yield


def start(*flags, launcher=()):
    command = [sys.executable, *launcher, str(ROOT / "projector.py"), "--network=net.safetensors",
               *replaced(FLAGS, flags)]
    return subprocess.Popen(command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def run_whole(*flags, launcher=()):
    """Run to the end; return exit code, standard output and error."""
    process = start(*flags, launcher=launcher)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(process, pattern):
    """Wait until the program made a file."""
    deadline = time.monotonic() + 120
    while not list(Path().glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def end_after(process, pattern, number):
    """Send a signal once a file is there; return exit code and standard error."""
    wait_for(process, pattern)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.parametrize(("number", "code", "word"), [
    (signal.SIGKILL, -9, None), (signal.SIGTERM, 143, "terminated"),
    pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow)])
def test_set_that_was_stopped_is_continued_by_the_same_command(inside, expected, capsys, number, code, word):
    found, err = end_after(start(*SET), f"{PARTS}/piece-*.npz", number)
    assert found == code
    assert "projections.json" not in names_in("out")
    before = len(list(PARTS.glob("piece-*.npz")))
    if word is not None:
        assert err.splitlines()[-2:] == [
            f"{before * 2} of {COUNT} projections are kept in {PARTS}; the same command continues", f"error: {word}"]
        assert "lock" not in names_in(PARTS)
    assert attempt(*FLAGS, *SET) == 0
    assert capsys.readouterr().err == f"{PARTS}: {before * 2} of {COUNT} projections are already done; continuing\n"
    assert contents("out") == expected[SET]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_target_that_was_stopped_is_continued_by_the_same_command(inside, expected, number, code):
    found, err = end_after(start(*TARGET), "out/projection-state-0.pt", number)
    assert found == code, err
    assert "projection.json" not in names_in("out")
    assert attempt(*FLAGS, *TARGET) == 0
    assert contents("out") == expected[TARGET]


@pytest.mark.slow
def test_second_process_in_a_folder_is_refused(inside, expected, capsys):
    process = start(*SET)
    wait_for(process, f"{PARTS}/settings.json")
    process.send_signal(signal.SIGSTOP)  # so that it is still at work
    try:
        assert attempt(*FLAGS, *SET) == 2
    finally:
        process.send_signal(signal.SIGCONT)
    err = capsys.readouterr().err
    assert err.startswith(f"error: out/projections.zip is being made by process {process.pid} on ")
    assert err.count("\n") == 1
    out, _ = process.communicate(timeout=120)
    assert out.startswith(f"out: {COUNT} images projected; medians with pixels:\n")
    assert contents("out") == expected[SET]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "launcher"), [
    (["--gpus=2"], []), ([], ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"])])
def test_set_of_two_processes_is_that_of_one(inside, expected, flags, launcher):
    code, out, err = run_whole(*SET, *flags, launcher=launcher)
    assert code == 0, err
    assert out.startswith(f"out: {COUNT} images projected; medians with pixels:\n")
    assert out.count("\n") == 4
    assert contents("out") == expected[SET]
    code, out, err = run_whole(*SET, *flags, launcher=launcher)
    assert (code, out) == (0, "out already holds these results\n"), err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_set_of_stopped_processes_is_continued_by_one(inside, expected, number, code):
    found, err = end_after(start(*SET, "--gpus=2"), f"{PARTS}/piece-*.npz", number)
    assert found == code, err
    if number != signal.SIGKILL:
        assert err.count("the same command continues") == 1
        assert err.count("error:") == 1
    time.sleep(1)  # after SIGKILL the system ends the processes in a moment
    assert attempt(*FLAGS, *SET) == 0
    assert contents("out") == expected[SET]


@pytest.mark.slow
def test_more_processes_than_passes_do_no_harm(inside):
    code, _, err = run_whole(*SET, "--class=nv", "--count=2", "--gpus=3")
    assert code == 0, err
    assert names_in("out") == SET_FILES


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "message"), [
    (["--detector=vgg"], "--detector is vgg; expected one of lpips-vgg16, efficientnet-lite0, random-conv, pixels"),
    (["--seed=-1"], "--seed is -1; expected at least 0")])
def test_mistake_in_two_processes_is_one_line(inside, flags, message):
    code, out, err = run_whole(*SET, "--gpus=2", *flags)
    assert (code, out, err) == (2, "", f"error: {message}\n")
    assert not os.path.exists("out")


@pytest.mark.slow
def test_target_of_two_processes_is_one_line(inside):
    code, out, err = run_whole(*TARGET, launcher=["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"])
    assert (code != 0, out) == (True, "")
    assert "error: 2 processes were started; expected one: only --data uses several\n" in err
    assert not os.path.exists("out")
