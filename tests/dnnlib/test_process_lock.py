"""dnnlib.process_lock: one process at a time, and an ended one does not block others."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import SoftFileLease, Timeout

from dnnlib import process_lock
from dnnlib.files import start_of_process
from dnnlib.process_lock import HEARTBEAT_SECONDS, LEASE_SECONDS, LockHeld, LockLost, ProcessLock

ROOT = Path(__file__).parent.parent.parent
HOLD = """
import sys, time
from dnnlib.process_lock import ProcessLock
lock = ProcessLock(sys.argv[1])
print(lock.acquire(), flush=True)
time.sleep(100)
"""
CONTEND = """
import os, sys
from dnnlib.process_lock import LockHeld, ProcessLock
for line in sys.stdin:
    path, start = line.split()
    lock = ProcessLock(path)
    print("ready", flush=True)
    while not os.path.exists(start):
        pass
    try:
        lock.acquire()
        lock.require_held()
        print("held", flush=True)
    except LockHeld:
        print("refused", flush=True)
    sys.stdin.readline()  # the holder keeps it until all have tried
    lock.release()
"""
ELSEWHERE = "filelock/2\npid=17\nhost=gpu07\nmode=lease\ntoken=ab\nduration={}\n"
UNREADABLE = "took over from an unknown process, which has ended"
posix = pytest.mark.skipif(os.name != "posix", reason="sees processes as POSIX systems show them")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock.json"


@pytest.fixture
def holder(path):
    """Another living process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "None\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def no_exchange(monkeypatch):
    """File systems that cannot exchange two names, such as NFS and Lustre."""
    monkeypatch.setattr("filelock._filesystem._exchange._rename_call", lambda: (lambda *_: errno.EINVAL, 2))
    monkeypatch.setattr(process_lock, "_UNREADABLE_SECONDS", 0.2)
    monkeypatch.setattr(process_lock, "HEARTBEAT_SECONDS", 0.1)


def leave(path, content, silent_for=0):
    path.write_text(content)
    os.utime(path, (time.time() - silent_for,) * 2)


def test_acquire_names_this_process_and_release_removes_the_file(path):
    lock = ProcessLock(path)
    assert lock.acquire() is None
    assert {f"pid={os.getpid()}"} < set(path.read_text().split())
    lock.require_held()
    lock.release()
    assert os.listdir(path.parent) == []
    lock.release()  # once more does nothing


def test_with_block_that_fails_releases_the_lock(path):
    with pytest.raises(ZeroDivisionError), ProcessLock(path):
        raise ZeroDivisionError
    assert not path.exists()


def test_acquire_living_holder_is_named(path, holder):
    with pytest.raises(LockHeld) as error:
        ProcessLock(path).acquire()
    assert str(error.value) == f"process {holder.pid} on {socket.gethostname()}"
    assert os.listdir(path.parent) == ["lock.json"]


def test_acquire_own_lock_again_is_refused(path):
    with ProcessLock(path), pytest.raises(LockHeld, match=f"process {os.getpid()} on"):
        ProcessLock(path).acquire()


@posix
@pytest.mark.parametrize("is_reaped", [True, False])
def test_acquire_killed_holder_is_replaced_at_once(path, holder, is_reaped):
    holder.send_signal(signal.SIGKILL)
    if is_reaped:
        holder.wait()
    else:  # a zombie still has its number
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    lock = ProcessLock(path)
    start = time.monotonic()
    assert lock.acquire() == f"took over from process {holder.pid} on {socket.gethostname()}, which has ended"
    assert time.monotonic() - start < HEARTBEAT_SECONDS
    lock.require_held()
    lock.release()
    assert os.listdir(path.parent) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="start times come from /proc")
def test_acquire_a_later_process_of_the_same_number_is_not_the_holder(path, holder):
    content = re.sub(r"start=\d", "start=", path.read_text())
    holder.kill()
    holder.wait()
    leave(path, content.replace(f"pid={holder.pid}\n", f"pid={os.getpid()}\n"))
    with ProcessLock(path) as lock:
        lock.require_held()


def test_acquire_holder_that_cannot_be_looked_up_counts_as_alive_while_it_gives_signs_of_life(path):
    leave(path, ELSEWHERE.format(LEASE_SECONDS), silent_for=2 * HEARTBEAT_SECONDS)
    with pytest.raises(LockHeld) as error:
        ProcessLock(path).acquire()
    assert re.fullmatch(r"process 17 on gpu07 \(last heartbeat 4\d s ago\)", str(error.value))


def test_acquire_holder_that_cannot_be_looked_up_is_watched_and_then_replaced(path, monkeypatch, capfd):
    monkeypatch.setattr(process_lock, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(process_lock, "HEARTBEAT_SECONDS", 0.1)
    leave(path, ELSEWHERE.format(0.5), silent_for=500)
    lock = ProcessLock(path)
    start = time.monotonic()
    assert re.fullmatch(r"took over from process 17 on gpu07 \(last heartbeat 50\d s ago\), which has ended",
                        lock.acquire())
    assert time.monotonic() - start >= 0.5
    assert re.fullmatch(rf"watching {re.escape(str(path))} of process 17 on gpu07 \(last heartbeat 50\d s ago\): "
                        r"taken over after 0\.5 s without a heartbeat\n", capfd.readouterr().err)
    lock.require_held()
    lock.release()


def test_acquire_holder_with_another_lease_is_named_while_it_lives_and_replaced_when_silent(path, monkeypatch):
    monkeypatch.setattr(process_lock, "LEASE_SECONDS", 0.2)
    monkeypatch.setattr(process_lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(process_lock, "_UNREADABLE_SECONDS", 0.1)
    leave(path, ELSEWHERE.format(0.6))
    with pytest.raises(LockHeld, match=r"^process 17 on gpu07 "):
        ProcessLock(path).acquire()
    leave(path, ELSEWHERE.format(0.6), silent_for=500)
    start = time.monotonic()
    lock = ProcessLock(path)
    assert re.fullmatch(r"took over from process 17 on gpu07 \(last heartbeat 50\d s ago\), which has ended",
                        lock.acquire())
    assert time.monotonic() - start >= 0.6
    lock.require_held()
    lock.release()
    assert os.listdir(path.parent) == []


def test_acquire_holder_that_is_watched_and_gives_a_sign_of_life_is_left_its_lock(path, monkeypatch):
    monkeypatch.setattr(process_lock, "LEASE_SECONDS", 4)  # longer than it takes to start a process on a busy machine
    monkeypatch.setattr(process_lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(process_lock, "_UNREADABLE_SECONDS", 0.5)
    code = "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.1)"
    leave(path, ELSEWHERE.format(4), silent_for=500)
    other = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        with pytest.raises(LockHeld, match=r"process 17 on gpu07 \(last heartbeat \d s ago\)"):
            ProcessLock(path).acquire()
    finally:
        other.kill()
        other.wait()


def test_heartbeat_comes_several_times_before_silence_is_noticed():
    assert HEARTBEAT_SECONDS * 5 < LEASE_SECONDS


def test_heartbeat_renews_the_time_of_the_file(path, monkeypatch):
    monkeypatch.setattr(process_lock, "HEARTBEAT_SECONDS", 0.02)
    with ProcessLock(path):
        os.utime(path, (1000, 1000))
        end = time.monotonic() + 10
        while path.stat().st_mtime == 1000 and time.monotonic() < end:
            time.sleep(0.01)
        assert abs(path.stat().st_mtime - time.time()) < 20


# The last one is a lock of the versions that had their own.
@pytest.mark.parametrize("content", ["", "filelock/2\npid=", '{"host": "a", "pid": 5, "token": "0f"}'])
def test_acquire_a_file_that_names_nobody_is_replaced_after_a_while(path, content):
    leave(path, content, silent_for=2)
    lock = ProcessLock(path)
    assert lock.acquire() == UNREADABLE
    lock.require_held()
    lock.release()
    assert os.listdir(path.parent) == []


@posix
def test_acquire_where_names_cannot_be_exchanged_killed_holder_is_replaced(path, holder, no_exchange):
    holder.kill()
    holder.wait()
    with pytest.raises(Timeout):
        SoftFileLease(path, lease_duration=LEASE_SECONDS).acquire(timeout=0.1)
    lock = ProcessLock(path)
    assert lock.acquire() == f"took over from process {holder.pid} on {socket.gethostname()}, which has ended"
    lock.require_held()
    lock.release()
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("content", ["", ELSEWHERE.format(0.5)])
def test_acquire_where_names_cannot_be_exchanged_silent_holder_is_replaced(path, content, no_exchange, monkeypatch):
    monkeypatch.setattr(process_lock, "LEASE_SECONDS", 0.5)
    leave(path, content, silent_for=500)
    with ProcessLock(path) as lock:
        lock.require_held()
    assert os.listdir(path.parent) == []


@posix
def test_acquire_where_names_cannot_be_exchanged_patience_sees_the_end_of_the_holder(path, holder, no_exchange):
    timer = threading.Timer(0.5, holder.kill)
    timer.start()
    lock = ProcessLock(path)
    lock.acquire(patience=60)
    lock.require_held()
    lock.release()
    assert os.listdir(path.parent) == []


@posix
def test_acquire_where_names_cannot_be_exchanged_a_faster_process_keeps_its_lock(path, no_exchange, monkeypatch):
    leave(path, "", silent_for=500)
    rename, other = os.rename, ELSEWHERE.format(0.5)

    def rename_later(*names):
        monkeypatch.setattr(os, "rename", rename)
        leave(path, other)
        rename(*names)

    monkeypatch.setattr(os, "rename", rename_later)
    with pytest.raises(LockHeld, match="process 17 on gpu07"):
        ProcessLock(path).acquire()
    assert path.read_text() == other
    assert os.listdir(path.parent) == ["lock.json"]


@posix
def test_acquire_suspended_holder_on_this_host_keeps_its_lock(path, holder, capfd):
    holder.send_signal(signal.SIGSTOP)
    os.utime(path, (time.time() - 500,) * 2)
    with pytest.raises(LockHeld, match=f"^process {holder.pid} on "):
        ProcessLock(path).acquire()
    assert capfd.readouterr().err == ""


def test_acquire_patience_waits_for_the_holder(path, holder):
    lock = ProcessLock(path)
    with pytest.raises(LockHeld):
        lock.acquire(patience=0.2)
    timer = threading.Timer(0.5, lambda: (holder.kill(), holder.wait()))
    timer.start()
    lock.acquire(patience=60)
    lock.require_held()
    lock.release()


def test_require_held_tells_who_took_over(path):
    lock = ProcessLock(path)
    lock.acquire()
    path.unlink()
    leave(path, ELSEWHERE.format(LEASE_SECONDS))
    with pytest.raises(LockLost) as error:
        lock.require_held()
    assert re.fullmatch(rf"{re.escape(str(path))} was taken over by process 17 on gpu07 \(last heartbeat \d s ago\)",
                        str(error.value))
    lock.release()
    assert "gpu07" in path.read_text()  # not ours to remove


def test_require_held_tells_when_the_file_is_gone(path):
    lock = ProcessLock(path)
    lock.acquire()
    path.unlink()
    with pytest.raises(LockLost, match=rf"^{re.escape(str(path))} was removed$"):
        lock.require_held()
    lock.release()


@posix
def test_release_in_a_child_process_does_nothing(path):
    with ProcessLock(path) as lock:
        pid = os.fork()
        if pid == 0:
            lock.release()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        lock.require_held()


@posix
def test_acquire_several_at_once_one_holds(tmp_path):
    kill = HOLD.replace("time.sleep(100)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    processes = [subprocess.Popen([sys.executable, "-c", CONTEND], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE) for _ in range(6)]
    for turn in range(12):
        path, start = tmp_path / f"{turn}.lock", tmp_path / f"{turn}.start"
        if turn % 4:  # left by a process that was killed
            subprocess.run([sys.executable, "-c", kill, str(path)], cwd=ROOT, stdout=subprocess.DEVNULL)
            assert path.exists()
        for process in processes:
            print(path, start, file=process.stdin, flush=True)
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 6
        start.touch()
        assert sorted(process.stdout.readline() for process in processes) == ["held\n"] + ["refused\n"] * 5
        for process in processes:
            print(file=process.stdin, flush=True)
    for process in processes:
        process.communicate()
    assert list(tmp_path.glob("*.lock*")) == []


def test_acquire_on_a_full_disk_names_the_file_and_leaves_none(path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("filelock.SoftFileLease._write_lock_info", refuse)
    with pytest.raises(OSError, match=f"No space left on device: '{re.escape(str(path))}'"):
        ProcessLock(path).acquire()
    assert os.listdir(path.parent) == []


def test_acquire_in_a_missing_folder_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        ProcessLock(tmp_path / "missing" / "lock.json").acquire()


def test_start_of_without_proc_tells_living_from_gone(monkeypatch):
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert start_of_process(os.getpid()) == ""
    if os.name == "posix":
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        assert start_of_process(process.pid) is None
