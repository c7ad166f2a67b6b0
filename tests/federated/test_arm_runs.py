"""Arms as child processes: how they start, how many at a time, and how they end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dnnlib.files import EXIT_TEMPORARY
from federated.arm_runs import Arm, ArmStopped, Limits, PlannedRun, plan_arm, run_arms

ROOT = Path(__file__).parent.parent.parent

# Notes its name, arguments, start and end in notes.jsonl; on SIGTERM or SIGINT it ends with 75, as train.py does.
PROGRAM = """
import json, os, signal, sys, time
name, seconds, code = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
def note(**fields):
    with open("notes.jsonl", "a") as file:
        file.write(json.dumps({"name": name, "time": time.time(), **fields}) + "\\n")
def stop(number, frame):
    note(signal=number)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
note(start=sys.argv[4:], pid=os.getpid())
time.sleep(seconds)
note(code=code)
sys.exit(code)
"""
# Runs one arm as compare does.
PARENT = """
import sys
from federated.arm_runs import Arm, ArmStopped, Limits, run_arms
try:
    run_arms([Arm(name=name, program=("program.py", name, "60", "0"), flags=()) for name in sys.argv[1:]],
             Limits(slots=2))
except ArmStopped as stop:
    print(stop)
    sys.exit(stop.exit_code)
"""


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def arm(name, seconds=0.0, code=0, flags=()):
    return Arm(name=name, program=("program.py", name, str(seconds), str(code)), flags=flags)


def notes(folder, **fields):
    """Return the notes that have some fields, in order."""
    path = folder / "notes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if all(name in line for name in fields) and all(
        value in (..., line[name]) for name, value in fields.items())]


def wait_for_notes(folder, count, **fields):
    end = time.monotonic() + 20
    while len(found := notes(folder, **fields)) < count:
        assert time.monotonic() < end, (folder / "notes.jsonl").read_text()
        time.sleep(0.02)
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_arms_run_one_after_the_other_with_their_flags_and_the_device(inside):
    run_arms([arm("a", 0.1, flags=("--kimg=1",)), arm("b")], Limits(device="cuda"))
    found = notes(inside)
    assert [(line["name"], line.get("start")) for line in found] == [
        ("a", ["--kimg=1", "--device=cuda"]), ("a", None), ("b", ["--device=cuda"]), ("b", None)]


def test_several_slots_run_as_many_arms_at_a_time_each_on_its_own_gpu(inside):
    run_arms([arm(name, 0.4) for name in "abcd"], Limits(slots=2, device="cuda"))
    starts, ends = notes(inside, start=...), notes(inside, code=0)
    moments = sorted([(line["time"], 1) for line in starts] + [(line["time"], -1) for line in ends])
    running = [sum(step for _, step in moments[:count]) for count in range(1, 9)]
    assert max(running) == 2
    assert {line["name"]: line["start"] for line in starts if line["name"] in "ab"} == {
        "a": ["--device=cuda:0"], "b": ["--device=cuda:1"]}
    assert {line["start"][0] for line in starts} == {"--device=cuda:0", "--device=cuda:1"}


def test_several_slots_on_a_cpu_share_it(inside):
    run_arms([arm("a"), arm("b")], Limits(slots=2, device="cpu"))
    assert [line["start"] for line in notes(inside, start=...)] == [["--device=cpu"]] * 2


@pytest.mark.parametrize("code", [1, 3, 4, 75, 76])
def test_exit_code_of_an_arm_is_that_of_the_comparison_and_later_arms_do_not_start(inside, code):
    with pytest.raises(ArmStopped) as stop:
        run_arms([arm("central"), arm("alone-a", code=code), arm("alone-b")], Limits())
    assert stop.value.exit_code == code
    assert str(stop.value) == (f"the arm alone-a ended with exit code {code}; the same command continues with it once "
                               "the reason above is gone")
    assert [line["name"] for line in notes(inside, start=...)] == ["central", "alone-a"]


def test_failing_arm_lets_the_others_save_their_states_and_end(inside):
    with pytest.raises(ArmStopped, match="the arm b ended with exit code 3") as stop:
        run_arms([arm("a", 60), arm("b", 0.5, code=3), arm("c")], Limits(slots=2))
    assert stop.value.exit_code == 3
    assert [line["name"] for line in notes(inside, signal=signal.SIGTERM)] == ["a"]
    assert not any(is_alive(line["pid"]) for line in notes(inside, start=...))
    assert "c" not in {line["name"] for line in notes(inside)}


def test_arm_that_was_killed_is_reported_as_a_shell_does(inside):
    (inside / "program.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    with pytest.raises(ArmStopped) as stop:
        run_arms([arm("central")], Limits())
    assert (stop.value.exit_code, str(stop.value)) == (
        137, "the arm central was killed by SIGKILL, often because memory ran out; the same command continues with it")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_reaches_all_arms_once_and_nothing_is_left_running(inside, number):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, "a", "b", "c"], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    started = wait_for_notes(inside, 2, start=...)
    parent.send_signal(number)
    text, _ = parent.communicate(timeout=30)
    assert parent.returncode == EXIT_TEMPORARY
    assert re.fullmatch("the arm [ab] ended with exit code 75; the same command continues with it once the reason "
                        "above is gone\n", text)
    assert sorted(line["name"] for line in notes(inside, signal=int(number))) == ["a", "b"]
    assert not any(is_alive(line["pid"]) for line in started)
    assert len(notes(inside, start=...)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell children that their parent was killed")
def test_arms_end_when_the_comparison_is_killed(inside):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, "a", "b"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    started = wait_for_notes(inside, 2, start=...)
    parent.kill()
    parent.wait()
    wait_for_notes(inside, 2, signal=signal.SIGTERM)
    time.sleep(0.3)
    assert not any(is_alive(line["pid"]) for line in started)


def test_stop_between_two_arms_starts_no_other(inside):
    (inside / "program.py").write_text("import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
                                       "os.kill(os.getppid(), signal.SIGTERM)\n")
    with pytest.raises(ArmStopped) as stop:
        run_arms([arm("a"), arm("b")], Limits())
    assert (stop.value.exit_code, str(stop.value)) == (75, "stopped by SIGTERM; the same command continues")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_time_limit_is_passed_on_as_what_is_left_of_it(inside):
    run_arms([arm("a")], Limits(deadline=time.monotonic() + 3600))
    (line,) = notes(inside, start=...)
    name, _, hours = line["start"][1].partition("=")
    assert name == "--max-hours"
    assert 0.99 < float(hours) <= 1


def test_time_limit_that_was_reached_starts_no_arm(inside):
    with pytest.raises(ArmStopped) as stop:
        run_arms([arm("a")], Limits(deadline=time.monotonic()))
    assert (stop.value.exit_code, str(stop.value)) == (
        75, "the --max-hours limit was reached; the same command continues")
    assert notes(inside) == []


def test_time_limit_that_is_reached_later_lets_running_arms_end(inside):
    with pytest.raises(ArmStopped, match="the --max-hours limit was reached"):
        run_arms([arm("a", 0.8), arm("b", 0.5), arm("c")], Limits(slots=2, deadline=time.monotonic() + 0.3))
    assert {line["name"] for line in notes(inside, code=0)} == {"a", "b"}
    assert "c" not in {line["name"] for line in notes(inside)}


def test_plan_is_what_the_dry_run_prints(inside):
    plan = {"run_folder": "central/00000-set", "already_finished": True, "batch": 16, "more": 1}
    (inside / "program.py").write_text(
        f"import sys\nassert sys.argv[-2:] == ['--device=cpu', '--dry-run']\nprint('{json.dumps(plan)}')\n")
    assert plan_arm(arm("central"), "cpu") == PlannedRun(folder=Path("central/00000-set"), is_finished=True, batch=16)


def test_mistake_that_the_dry_run_finds_names_the_arm(inside, capsys):
    (inside / "program.py").write_text(
        "import sys\nprint('a note', file=sys.stderr)\nsys.exit('error: --batch is 30; expected 32')\n")
    with pytest.raises(ArmStopped) as stop:
        plan_arm(arm("alone-a"), "cpu")
    assert (stop.value.exit_code, str(stop.value)) == (1, "alone-a: --batch is 30; expected 32")
    assert capsys.readouterr().err == ""


def test_dry_run_that_fails_shows_why(inside, capsys):
    (inside / "program.py").write_text("raise KeyError('x')\n")
    with pytest.raises(ArmStopped, match=r"^alone-a: KeyError: 'x'$"):
        plan_arm(arm("alone-a"), "cpu")
    assert "Traceback" in capsys.readouterr().err
