"""dnnlib.process_lock: one process at a time, and none that is gone keeps others away."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dnnlib import process_lock
from dnnlib.process_lock import HEARTBEAT_SECONDS, SILENT_SECONDS, LockHeld, LockLost, Owner, ProcessLock
from dnnlib.temporary_files import start_of_process

ROOT = Path(__file__).parent.parent
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
print("ready", flush=True)
while not os.path.exists(sys.argv[2]):
    pass
try:
    ProcessLock(sys.argv[1]).acquire()
    print("held", flush=True)
except LockHeld:
    print("refused", flush=True)
sys.stdin.read()  # the holder lives until all have tried
"""
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


def owner(**changes):
    return replace(Owner.this_process(), **changes)


def write(path, owner, age=0):
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age,) * 2)


def test_acquire_names_this_process_and_release_removes_the_file(path):
    lock = ProcessLock(path)
    assert lock.acquire() is None
    content = json.loads(path.read_text())
    assert (content["host"], content["pid"]) == (socket.gethostname(), os.getpid())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", content["since"])
    lock.require_held()
    lock.release()
    assert os.listdir(path.parent) == []
    lock.release()  # once more does nothing


def test_with_block_holds_the_lock_until_its_end(path):
    with ProcessLock(path) as lock:
        lock.require_held()
    assert not path.exists()


def test_with_block_that_fails_releases_the_lock(path):
    with pytest.raises(ZeroDivisionError), ProcessLock(path):
        raise ZeroDivisionError
    assert not path.exists()


@posix
def test_acquire_living_holder_is_named(path, holder):
    with pytest.raises(LockHeld) as error:
        ProcessLock(path).acquire()
    since = Owner.parse(path.read_bytes()).since
    assert str(error.value) == f"process {holder.pid} on {socket.gethostname()} since {since}"
    assert sorted(os.listdir(path.parent)) == ["lock.json"]


@posix
def test_acquire_own_lock_again_is_refused(path):
    with ProcessLock(path), pytest.raises(LockHeld, match=f"process {os.getpid()} on"):
        ProcessLock(path).acquire()


@posix
@pytest.mark.parametrize("is_reaped", [True, False])
def test_acquire_killed_holder_is_replaced_at_once(path, holder, is_reaped):
    since = Owner.parse(path.read_bytes()).since
    holder.send_signal(signal.SIGKILL)
    if is_reaped:
        holder.wait()
    else:  # a zombie still has its number
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    lock = ProcessLock(path)
    message = f"took over from process {holder.pid} on {socket.gethostname()} since {since}, which is gone"
    assert lock.acquire() == message
    lock.require_held()
    lock.release()
    assert os.listdir(path.parent) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="start times come from /proc")
def test_acquire_a_later_process_of_the_same_number_is_not_the_holder(path):
    write(path, owner(started="1", token="old"))
    with ProcessLock(path):
        assert Owner.parse(path.read_bytes()).token != "old"


@posix
@pytest.mark.parametrize("place", [{"host": "gpu07"}, {"boot": "another"}, {"namespace": "pid:[1]"}])
def test_acquire_unseen_holder_counts_as_alive_until_it_was_silent_for_long(path, place):
    other = owner(pid=17, started="5", since="2026-03-01 10:00:00+00:00", **place)
    write(path, other, age=SILENT_SECONDS - 30)
    with pytest.raises(LockHeld) as error:
        ProcessLock(path).acquire()
    assert re.fullmatch(re.escape(f"process 17 on {other.host} since 2026-03-01 10:00:00+00:00 (last sign of life ")
                        + r"1[45]\d s ago; after 180 s without one it counts as gone\)", str(error.value))
    write(path, other, age=SILENT_SECONDS + 5)
    lock = ProcessLock(path)
    assert lock.acquire() == f"took over from process 17 on {other.host} since 2026-03-01 10:00:00+00:00, which is gone"
    lock.release()


def test_heartbeat_comes_several_times_before_silence_is_noticed():
    assert HEARTBEAT_SECONDS * 5 < SILENT_SECONDS


def test_heartbeat_renews_the_time_of_the_file(path, monkeypatch):
    monkeypatch.setattr(process_lock, "HEARTBEAT_SECONDS", 0.02)
    with ProcessLock(path):
        os.utime(path, (1000, 1000))
        end = time.monotonic() + 10
        while path.stat().st_mtime == 1000 and time.monotonic() < end:
            time.sleep(0.01)
        assert abs(path.stat().st_mtime - time.time()) < 20


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": "a"}', b"\xff"])
def test_acquire_a_file_that_names_nobody_is_replaced_after_a_while(path, monkeypatch, content):
    monkeypatch.setattr(process_lock, "_WRITING_SECONDS", 0.1)
    path.write_bytes(content)
    lock = ProcessLock(path)
    assert lock.acquire() == "took over from a process that ended while it started, which is gone"
    lock.release()


@posix
def test_acquire_a_file_that_is_being_written_is_waited_for(path, monkeypatch):
    path.write_bytes(b"")
    monkeypatch.setattr(time, "sleep", lambda seconds: write(path, Owner.this_process()))
    with pytest.raises(LockHeld):
        ProcessLock(path).acquire()


@posix
def test_acquire_patience_waits_for_the_holder(path, monkeypatch):
    first = ProcessLock(path)
    first.acquire()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            first.release()

    monkeypatch.setattr(time, "sleep", sleep)
    second = ProcessLock(path)
    assert second.acquire(patience=60) is None
    assert len(waits) == 3
    second.release()


def test_require_held_tells_who_took_over(path):
    lock = ProcessLock(path)
    lock.acquire()
    write(path, owner(host="gpu07", pid=3, since="2026-03-01 10:00:00+00:00", token="new"))
    with pytest.raises(LockLost) as error:
        lock.require_held()
    assert str(error.value) == f"{path} was taken over by process 3 on gpu07 since 2026-03-01 10:00:00+00:00"
    lock.release()
    assert Owner.parse(path.read_bytes()).host == "gpu07"  # not ours to remove


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
def test_remove_stale_puts_back_the_lock_of_a_faster_process(path, monkeypatch):
    write(path, owner(started="1", token="stale"))
    faster = owner(token="faster")
    rename = os.rename

    def rename_after_another(source, target):
        monkeypatch.setattr(os, "rename", rename)
        write(path, faster)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_after_another)
    with pytest.raises(LockHeld):
        ProcessLock(path).acquire()
    assert Owner.parse(path.read_bytes()) == faster
    assert os.listdir(path.parent) == ["lock.json"]


@posix
@pytest.mark.parametrize("is_stale", [False, True])
def test_acquire_several_at_once_one_holds(path, tmp_path, is_stale):
    if is_stale:
        write(path, owner(started="1"))
    start = tmp_path / "start"
    processes = [subprocess.Popen([sys.executable, "-c", CONTEND, str(path), str(start)], cwd=ROOT, text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(5)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 5
    start.touch()
    results = sorted(process.stdout.readline() for process in processes)
    for process in processes:
        process.communicate()
    assert results == ["held\n"] + ["refused\n"] * 4


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
