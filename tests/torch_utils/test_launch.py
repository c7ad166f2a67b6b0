"""torch_utils.launch: the processes of a run get one place each, and end together."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from torch_utils import launch as launching
from torch_utils.launch import launch

ROOT = Path(__file__).parent.parent.parent


def python(code):
    """Return a command that starts faster than one that imports torch."""
    return [sys.executable, "-c", f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}"]


def is_alive(pid):
    """Return whether a process runs; a zombie counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def grace(monkeypatch):
    monkeypatch.setattr(launching, "GRACE_SECONDS", 1.5)


def test_launch_gives_each_process_its_place(tmp_path):
    code = launch(3, python(f"""import json
open(rf"{tmp_path}/{{rank}}.json", "w").write(json.dumps(dict(os.environ)))"""))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert code == 0
    assert [(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) for env in found] == [
        (str(rank), str(rank), "3", "3") for rank in range(3)]
    assert {env["MASTER_ADDR"] for env in found} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in found}) == 1
    assert {env["PATH"] for env in found} == {os.environ["PATH"]}


@pytest.mark.parametrize("code", [2, 4, 75])
def test_launch_returns_the_first_failure_and_says_nothing_more(code, capfd):
    found = launch(2, python(f"print(f'error: of {{rank}}', file=sys.stderr) if rank else time.sleep(0.5)\n"
                             f"sys.exit({code} if rank else {launching.LOST_EXIT_CODE})"))
    assert found == code
    assert capfd.readouterr() == ("", "error: of 1\n")


def test_launch_says_which_process_was_killed_and_ends_the_others(grace, capfd, tmp_path):
    started = time.monotonic()
    code = launch(3, python(f"""open(rf"{tmp_path}/{{rank}}", "w").write(str(os.getpid()))
if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(100)"""))
    assert code == 137
    assert time.monotonic() - started < 20
    assert capfd.readouterr().err == ("error: process 1 of 3 was killed by SIGKILL, often because memory ran out; the "
                                      "others were stopped\n")
    assert not any(is_alive(int((tmp_path / str(rank)).read_text())) for rank in range(3) if
                   (tmp_path / str(rank)).exists())


def test_launch_that_finds_only_lost_processes_says_so(capfd):
    assert launch(2, python(f"sys.exit({launching.LOST_EXIT_CODE})")) == launching.LOST_EXIT_CODE
    assert capfd.readouterr().err == ("error: the processes of the run cannot reach each other, or one of them hangs; "
                                      "all were stopped\n")


def test_launch_kills_what_its_processes_started(grace, tmp_path):
    code = launch(2, python(f"""import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open(rf"{tmp_path}/{{rank}}", "w").write(str(child.pid))
os._exit(5 * rank)"""))
    assert code == 5
    for rank in range(2):
        pid = int((tmp_path / str(rank)).read_text())
        wait_until(lambda pid=pid: not is_alive(pid), 5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_launch_hands_signals_on(number, code, capfd, tmp_path):
    before = signal.getsignal(number)
    received = send_when_ready(tmp_path, [number], python(f"""
signal.signal({number}, lambda *_: sys.exit(75))
open(rf"{tmp_path}/{{rank}}", "w").close()
time.sleep(100)"""))
    assert received == 75  # what the processes make of it
    received = send_when_ready(tmp_path, [number], python(f"""
signal.signal({number}, signal.SIG_DFL)
open(rf"{tmp_path}/{{rank}}", "w").close()
time.sleep(100)"""))
    assert received == code
    assert capfd.readouterr().err == f"error: stopped by {signal.Signals(number).name}\n"
    assert signal.getsignal(number) == before


def test_launch_asked_twice_by_ctrl_c_does_not_wait_for_ever(grace, tmp_path):
    assert send_when_ready(tmp_path, [signal.SIGINT, signal.SIGINT], python(f"""
signal.signal(signal.SIGINT, signal.SIG_IGN)
open(rf"{tmp_path}/{{rank}}", "w").close()
time.sleep(100)""")) == 130


def send_when_ready(folder, numbers, command):
    """Launch two processes, send signals to this one once both are ready, and return the exit code."""
    for rank in range(2):
        (folder / str(rank)).unlink(missing_ok=True)

    def send():
        wait_until(lambda: all((folder / str(rank)).exists() for rank in range(2)))
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        return launch(2, command)
    finally:
        thread.join()


PROGRAM = "import sys; from torch_utils.launch import launch; sys.exit(launch(2, sys.argv[1:]))"


def running(tmp_path, *arguments):
    """Start a launcher with two joined processes; return it and their process ids once they run."""
    command = [sys.executable, "-c", PROGRAM, sys.executable, "-m", "tests.helpers.process_programs", "run_forever",
               str(tmp_path), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def pids(tmp_path):
    texts = [path.read_text() for path in sorted(tmp_path.glob("running-*"))]
    return [int(text) for text in texts if text]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not kill children with the parent")
def test_killed_launcher_leaves_no_process(tmp_path):
    launcher = running(tmp_path, "nothing", "-1")
    wait_until(lambda: len(pids(tmp_path)) == 2)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(map(is_alive, pids(tmp_path))), 10)


@pytest.mark.slow
@pytest.mark.parametrize(("deed", "code", "last_line"), [
    ("killed", 137, "error: process 1 of 2 was killed by SIGKILL, often because memory ran out; the others were "
                    "stopped"),
    ("fails", 1, "[rank1]: luck"),
    ("refuses", 2, "error: --luck is 0; more"),
])
def test_launched_process_that_fails_is_the_only_one_to_speak(deed, code, last_line, tmp_path):
    launcher = running(tmp_path, deed, "1")
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == code
    assert err.splitlines()[-1] == last_line
    assert "rank0" not in err
    assert err.count("error:") == last_line.count("error:")
    assert not any(map(is_alive, pids(tmp_path)))


def test_launch_repeats_the_present_command(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"""import os, sys
if "RANK" in os.environ:
    open(rf"{tmp_path}/{{os.environ['RANK']}}", "w").write(repr((sys.argv[1:], sys.flags.utf8_mode)))
else:
    sys.path.insert(0, {str(ROOT)!r})
    from torch_utils.launch import launch
    sys.exit(launch(2))
""")
    subprocess.run([sys.executable, "-X", "utf8=1", str(program), "--gpus=2", "a b"], check=True, timeout=60)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["(['--gpus=2', 'a b'], 1)"] * 2
