"""projector.py: what was stopped at any moment goes on by the same command, and ends like an unbroken run."""

import json
import os
import signal
from pathlib import Path

import pytest

from dnnlib.cli import Terminated, UserError
from dnnlib.process_lock import ProcessLock
from latent.projection import Projection
from tests.helpers.make_sets import make_set, pixels_of, png
from tests.helpers.projector_commands import (
    SET_FILES,
    STEPS,
    attempt,
    contents,
    names_in,
    project,
    record_in,
    stop_within,
    working_in,
)
from torch_utils.ops import compiled
from torch_utils.ops.compiled import auto_implementation, auto_means
from torch_utils.piecework import Pieces

pytestmark = pytest.mark.usefixtures("one_thread")  # as programs that tests start

TARGET = ("--target=target.png", "--outdir=out", "--save-video=0")
SET = ("--data=set.zip", "--outdir=out", "--batch=2", "--class=auto")  # six passes
PARTS = Path("out/projections.zip.parts")
KEPT = "the work so far is saved in out; the same command continues\n"


@pytest.fixture
def inside(tmp_path, monkeypatch):
    with working_in(tmp_path, monkeypatch):
        make_set("set.zip", 6, labels=[0, 1, 0, 1, 1, 0], classes=["nv", "mel"])
        Path("target.png").write_bytes(png(pixels_of(3)))
        yield


def stop_after(monkeypatch, number, error, method="save"):
    """Let the program end when it has saved or loaded so many pieces; return the list of their numbers."""
    done, do = [], getattr(Pieces, method)

    def do_some(self, piece, *arguments):
        if len(done) == number:
            raise error
        result = do(self, piece, *arguments)
        done.append(piece)
        return result

    monkeypatch.setattr(Pieces, method, do_some)
    return done


def signal_in_step(monkeypatch, step, numbers):
    """Let signals arrive while a step is done; return the list of steps done."""
    done, advance = [], Projection.advance

    def advance_and_signal(self):
        result = advance(self)
        for number in numbers if self.step == step else []:
            os.kill(os.getpid(), number)
        done.append(self.step)
        return result

    monkeypatch.setattr(Projection, "advance", advance_and_signal)
    return done


def test_target_that_was_stopped_is_continued_by_the_same_command(inside, capsys, monkeypatch):
    command = ("--target=target.png", "--class=auto", "--batch=1")
    project(capsys, *command, "--outdir=expected")
    with monkeypatch.context() as patch:
        stop_within(patch, 2, Terminated())
        assert attempt(*command, "--outdir=out") == 143
    assert capsys.readouterr().err == KEPT + "error: terminated\n"
    assert names_in("out") == ["projection-state-0.pt"]
    with monkeypatch.context() as patch:
        assert (stop_within(patch, 3, KeyboardInterrupt()), attempt(*command, "--outdir=out")) == ([3, 4, 1], 130)
    assert names_in("out") == ["projection-state-0.pt", "projection-state-1.pt"]
    with monkeypatch.context() as patch:
        done = stop_within(patch, 99, None)
        assert attempt(*command, "--outdir=out") == 0
    assert done == [2, 3, 4]
    assert contents("out") == contents("expected")


@pytest.mark.parametrize("command", [(*TARGET, "--class=auto", "--batch=1"), SET])
def test_projection_that_was_begun_without_compiled_operators_goes_on_without(inside, capsys, monkeypatch, command):
    with auto_means("composed"):
        project(capsys, *command, "--outdir=expected")
        with monkeypatch.context() as patch:
            stop_within(patch, 6, Terminated())  # in the second pass
            assert attempt(*command) == 143
    capsys.readouterr()
    used, advance = [], Projection.advance
    monkeypatch.setattr(Projection, "advance", lambda self: used.append(auto_implementation("cpu")) or advance(self))
    assert attempt(*command) == 0
    assert set(used) == {"composed"}
    folder = "the projection in out" if command != SET else f"the work in {PARTS}"
    assert (f"{folder} was started with PyTorch's own operators and continues with them, for consistent results\n"
            in capsys.readouterr().err)
    assert record_in("out", "projection.json" if command != SET else "projections.json")["operators"] == "composed"
    assert contents("out") == contents("expected")


@pytest.mark.parametrize("command", [TARGET, SET])
def test_projection_whose_operators_are_gone_is_refused_and_kept(inside, capsys, monkeypatch, command):
    with monkeypatch.context() as patch:
        stop_within(patch, 2, Terminated())
        assert attempt(*command, "--class=nv") == 143
    capsys.readouterr()
    before = contents("out")
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_failures", {"cpu": "there is no compiler"})
        assert attempt(*command, "--class=nv") == 2
    work = "the projection in out" if command == TARGET else f"the work in {PARTS}"
    assert capsys.readouterr().err.endswith(
        f"error: {work} was started with the compiled operators (cpp), which cannot run here (there is no compiler): "
        "fix that and repeat the command, or remove it to start from scratch\n")
    assert contents("out") == before


def test_target_is_not_projected_again_when_tuning_was_stopped(inside, capsys, monkeypatch):
    command = (*TARGET, "--class=nv", "--pti-steps=2")
    project(capsys, *command, "--outdir=expected")

    def stop(*_, **__):
        raise Terminated

    with monkeypatch.context() as patch:
        patch.setattr("latent.one_image.tune", stop)
        assert attempt(*command) == 143
    capsys.readouterr()
    with monkeypatch.context() as patch:
        done = stop_within(patch, 0, AssertionError("it is done"))
        assert attempt(*command) == 0
    assert done == []
    assert contents("out") == contents("expected")


@pytest.mark.parametrize(("flag", "target"), [("--seed=4", 3), ("--class=nv", 3), ("--num-steps=5", 3),
                                              ("--save-video=1", 3), ("--device=cpu", 4)])
def test_state_of_another_projection_is_not_gone_on_with(inside, capsys, monkeypatch, flag, target):
    with monkeypatch.context() as patch:
        stop_within(patch, 2, Terminated())
        assert attempt(*TARGET, "--class=mel") == 143
    capsys.readouterr()
    Path("target.png").write_bytes(png(pixels_of(target)))
    project(capsys, *TARGET, "--class=mel", flag, "--outdir=expected")
    project(capsys, *TARGET, "--class=mel", flag)
    assert contents("out") == contents("expected")


def test_damaged_state_is_told_and_the_projection_begun_anew(inside, capsys, monkeypatch):
    project(capsys, *TARGET, "--class=nv", "--outdir=expected")
    with monkeypatch.context() as patch:
        stop_within(patch, 2, Terminated())
        assert attempt(*TARGET, "--class=nv") == 143
    capsys.readouterr()
    state = Path("out/projection-state-0.pt")
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    assert attempt(*TARGET, "--class=nv") == 0
    err = capsys.readouterr().err
    assert err.startswith("out/projection-state-0.pt is damaged")
    assert err.endswith("; starting from scratch\n")
    assert contents("out") == contents("expected")


def test_set_that_was_stopped_between_passes_is_continued(inside, capsys, monkeypatch):
    project(capsys, *SET, "--outdir=expected")
    for number, (error, code, word) in enumerate([(Terminated(), 143, "terminated"),
                                                  (KeyboardInterrupt(), 130, "interrupted")]):
        with monkeypatch.context() as patch:
            assert (stop_after(patch, 2, error), attempt(*SET)) == ([2 * number, 2 * number + 1], code)
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = [f"{PARTS}: 4 of 12 projections are already done; continuing"] * number
        lines += [f"{4 * number + 4} of 12 projections are kept in {PARTS}; the same command continues",
                  f"error: {word}"]
        assert captured.err.splitlines() == lines
        assert names_in("out") == ["projections.zip.parts"]
    with monkeypatch.context() as patch:
        saved = stop_after(patch, 9, None)
        assert attempt(*SET) == 0
    assert saved == [4, 5]
    assert capsys.readouterr().err == f"{PARTS}: 8 of 12 projections are already done; continuing\n"
    assert contents("out") == contents("expected")


def test_set_that_was_stopped_within_a_pass_is_continued_there(inside, capsys, monkeypatch):
    project(capsys, *SET, "--outdir=expected")
    with monkeypatch.context() as patch:
        stop_within(patch, 3, Terminated())
        assert attempt(*SET) == 143
    assert capsys.readouterr().err == (f"the work so far is saved in {PARTS}; the same command continues\n"
                                       "error: terminated\n")
    assert names_in(PARTS) == ["settings.json", "state-000000.pt"]
    with monkeypatch.context() as patch:
        done = stop_within(patch, 8, KeyboardInterrupt())
        assert attempt(*SET) == 130
    assert done == [4, 1, 2, 3, 4, 1, 2, 3]
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"4 of 12 projections are kept in {PARTS}; the same command continues", "error: interrupted"]
    assert names_in(PARTS) == ["piece-000000.npz", "piece-000001.npz", "settings.json", "state-000002.pt"]
    with monkeypatch.context() as patch:
        done = stop_within(patch, 999, None)
        assert attempt(*SET) == 0
    assert done == [4, *[1, 2, 3, 4] * 3]
    assert contents("out") == contents("expected")


def test_set_stopped_before_any_state_leaves_nothing(inside, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stop_within(patch, 2, Terminated())
        patch.setattr("latent.projection.STATE_SECONDS", 120)
        assert attempt(*SET) == 143
    assert capsys.readouterr().err == "error: terminated\n"
    assert not os.path.exists("out")


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"),
                                                      (signal.SIGINT, 130, "interrupted")])
@pytest.mark.parametrize("command", [TARGET, SET])
def test_signal_ends_the_step_and_keeps_it(inside, capsys, monkeypatch, command, number, code, word):
    flags = (*command, "--class=mel", "--num-steps=9")
    project(capsys, *flags, "--outdir=expected")
    with monkeypatch.context() as patch:
        done = signal_in_step(patch, 5, [number])
        assert attempt(*flags) == code
    assert done == [1, 2, 3, 4, 5]
    folder = "out" if command == TARGET else PARTS
    assert capsys.readouterr().err == (f"the work so far is saved in {folder}; the same command continues\n"
                                       f"error: {word}\n")
    with monkeypatch.context() as patch:
        done = signal_in_step(patch, 99, [])
        assert attempt(*flags) == 0
    assert done[:4] == [6, 7, 8, 9]
    assert contents("out") == contents("expected")


def test_second_interruption_ends_at_once(inside, capsys, monkeypatch):
    done = signal_in_step(monkeypatch, 3, [signal.SIGINT] * 2)
    assert attempt(*TARGET, "--class=mel", "--num-steps=9") == 130
    assert done == [1, 2]
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not os.path.exists("out")


def test_states_are_kept_after_their_time_and_at_the_end(inside, monkeypatch):
    now, kept = [0.0], []
    stop_within(monkeypatch, 999, None)
    monkeypatch.setattr("latent.projection.STATE_SECONDS", 120)

    def tick():
        now[0] += 50
        return now[0]

    monkeypatch.setattr("latent.projection.time.monotonic", tick)
    monkeypatch.setattr("latent.projection.write_checkpoint",
                        lambda path, state: kept.append((Path(path).name, state["projection"]["step"])))
    assert attempt(*SET, "--class=nv", "--num-steps=7") == 0
    passes = [f"state-{number:06d}.pt" for number in range(2)]
    assert kept == [(name, step) for name in passes for step in (3, 6, 7)]


def test_set_whose_results_were_being_written_is_not_projected_again(inside, capsys, monkeypatch):
    project(capsys, *SET, "--outdir=expected")
    for number in (3, 8):  # of twelve looks at pieces, those for the sheet included
        with monkeypatch.context() as patch:
            loaded = stop_after(patch, number, Terminated(), method="load")
            assert attempt(*SET) == 143
        assert len(loaded) == number
        assert capsys.readouterr().err.splitlines()[-2:] == [
            f"12 of 12 projections are kept in {PARTS}; the same command continues", "error: terminated"]
        assert "projections.json" not in names_in("out")
    with monkeypatch.context() as patch:
        saved = stop_after(patch, 0, AssertionError("all pieces are there"))
        assert attempt(*SET) == 0
    assert saved == []
    assert contents("out") == contents("expected")


@pytest.mark.parametrize(("flags", "message"), [
    (["--seed=5"], "seed is 303 there and 5 here"),
    (["--num-steps=9", "--space=w+"], f'space is "w" there and "w+" here; num_steps is {STEPS} there and 9 here'),
    (["--class=nv"], "data_sha256 is "), (["--count=2"], "data_sha256 is ")])
def test_beginning_of_another_set_is_refused_and_kept(inside, capsys, monkeypatch, flags, message):
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Terminated())
        assert attempt(*SET) == 143
    capsys.readouterr()
    before = contents("out")
    assert attempt(*SET, *flags) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {PARTS} contains unfinished work with other settings ({message}")
    assert err.endswith("); run its command again to complete it, or remove the folder\n")
    assert contents("out") == before


def test_second_process_of_a_target_is_refused(inside, capsys):
    os.mkdir("out")
    with ProcessLock(Path("out/lock")):
        assert attempt(*TARGET, "--class=nv") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --outdir is out, where process {os.getpid()} on ")
    assert err.endswith(" is working; wait for it, or choose another folder\n")
    project(capsys, *TARGET, "--class=nv")
    assert "lock" not in names_in("out")


def test_second_process_is_refused(inside, capsys):
    PARTS.mkdir(parents=True)
    with ProcessLock(PARTS / "lock"):
        assert attempt(*SET) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: out/projections.zip is being made by process {os.getpid()} on ")
    assert err.endswith("; wait for it, or choose another name\n")
    assert names_in("out") == ["projections.zip.parts"]
    project(capsys, *SET)
    assert names_in("out") == SET_FILES


def fill_disk(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("name", "kept"), [
    ("torch_utils.piecework.np.savez", ["settings.json", "state-000000.pt"]),
    ("latent.projection.write_checkpoint", None)])
def test_full_disk_during_the_passes_is_one_line(inside, capsys, monkeypatch, name, kept):
    with monkeypatch.context() as patch:
        patch.setattr("latent.projection.STATE_SECONDS", 0)
        patch.setattr(name, fill_disk)
        assert attempt(*SET) == 2
    assert capsys.readouterr().err == (
        f"error: {PARTS} is not writable (No space left on device); finished pieces are kept: fix this, and run the "
        "same command again\n")
    assert (names_in(PARTS) if PARTS.exists() else None) == kept
    assert os.path.exists("out") == PARTS.exists()


@pytest.mark.parametrize("name", SET_FILES)
def test_full_disk_at_the_end_keeps_the_pieces_and_says_so(inside, capsys, monkeypatch, name):
    project(capsys, *SET, "--outdir=expected")
    replace = os.replace

    def replace_others(source, dest):
        return fill_disk() if Path(dest).name == name else replace(source, dest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_others)
        assert attempt(*SET) == 2
    hint, error = capsys.readouterr().err.splitlines()
    assert hint == f"12 of 12 projections are kept in {PARTS}; the same command continues"
    assert error in ("error: No space left on device",
                     "error: --outdir=out/projections.zip cannot be written: the disk is full; nothing was left there")
    assert not {name, "projections.json"} & set(names_in("out"))
    with monkeypatch.context() as patch:
        stop_after(patch, 0, AssertionError("all pieces are there"))
        assert attempt(*SET) == 0
    assert contents("out") == contents("expected")


def test_full_disk_while_a_target_is_projected_is_one_line(inside, capsys, monkeypatch):
    monkeypatch.setattr("latent.projection.write_checkpoint", fill_disk)
    assert attempt(*TARGET, "--class=nv") == 2
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert not os.path.exists("out")


def test_damaged_piece_is_named_and_made_again(inside, capsys, monkeypatch):
    project(capsys, *SET, "--outdir=expected")
    with monkeypatch.context() as patch:
        stop_after(patch, 3, Terminated())
        assert attempt(*SET) == 143
    piece = PARTS / "piece-000001.npz"
    piece.write_bytes(piece.read_bytes()[:200])
    capsys.readouterr()
    assert attempt(*SET) == 2
    hint, error = capsys.readouterr().err.splitlines()[-2:]
    assert hint == f"12 of 12 projections are kept in {PARTS}; the same command continues"
    assert error.startswith(f"error: {piece} cannot be read (")
    assert error.endswith("); remove it, and run the same command again")
    piece.unlink()
    assert attempt(*SET) == 0
    assert contents("out") == contents("expected")


def test_failure_of_the_network_keeps_the_passes_before_it(inside, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        stop_within(patch, 6, UserError("no finite number"))
        assert attempt(*SET) == 2
    assert capsys.readouterr().err == "error: no finite number\n"
    assert names_in(PARTS) == ["piece-000000.npz", "settings.json", "state-000001.pt"]
    assert json.loads((PARTS / "settings.json").read_text())["batch"] == 2
