"""dnnlib.lines: lines are complete and in order, or kept for later."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dnnlib.lines import AppendFile, cut_lines, read_lines, to_line

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("durable", [True, False])
def test_append_adds_at_the_end_of_what_is_there(tmp_path, durable):
    path = tmp_path / "file"
    path.write_bytes(b"old\n")
    file = AppendFile(path, durable=durable)
    file.append(b"one\n")
    file.append(b"two\n")
    assert path.read_bytes() == b"old\none\ntwo\n"


def test_append_makes_a_file_that_others_may_read(tmp_path):
    before = os.umask(0o022)
    try:
        AppendFile(tmp_path / "file", durable=True).append(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_append_cut_short_by_a_full_disk_takes_back_and_follows_later(tmp_path, monkeypatch):
    path, write, calls = tmp_path / "file", os.write, []

    def one_then_full(descriptor, data):
        calls.append(len(data))
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:3])

    file = AppendFile(path, durable=False)
    monkeypatch.setattr("dnnlib.lines.os.write", one_then_full)
    with pytest.raises(OSError, match="No space left on device"):
        file.append(b"first\n")
    assert path.read_bytes() == b""
    file.append(b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"
    assert len(calls) > 5  # in pieces of three bytes


def test_append_to_a_missing_folder_raises_and_follows_later(tmp_path):
    file = AppendFile(tmp_path / "folder" / "file", durable=True)
    with pytest.raises(FileNotFoundError):
        file.append(b"one\n")
    (tmp_path / "folder").mkdir()
    file.append(b"two\n")
    assert (tmp_path / "folder" / "file").read_bytes() == b"one\ntwo\n"


# ---- several writers

# Appends lines that belong to no tick, as calc_metrics.py does, until a file tells it to stop.
MEASURE = """
import os, sys, time
from dnnlib.lines import AppendFile
from dnnlib.lines import to_line
number = 0
while not os.path.exists(sys.argv[2]):
    AppendFile(sys.argv[1], durable=True, shared=True).append(to_line({"measured": number}))
    number += 1
    if number == 1:
        print("ready", flush=True)
    time.sleep(0.002)
print(number)
"""


def test_append_and_cut_of_two_processes_lose_no_line(tmp_path):
    path, enough, rounds = tmp_path / "run" / "metric-fid50k_full.jsonl", tmp_path / "enough", 8
    path.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", MEASURE, str(path), str(enough)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            for _ in range(rounds):  # what a run does that reports, and is continued, again and again
                AppendFile(path, durable=True, shared=True).append(to_line({"tick": 0}))
                AppendFile(path, durable=True, shared=True).append(to_line({"tick": 1}))
                assert cut_lines(path, lambda record: record.get("tick", -1) < 1) == 1
        finally:
            enough.touch()
        measured = int(process.stdout.readline())
    lines = read_lines(path)
    assert [line["measured"] for line in lines if "measured" in line] == list(range(measured))
    assert [line["tick"] for line in lines if "tick" in line] == [0] * rounds
    assert os.listdir(path.parent) == [path.name]


def test_append_to_a_shared_file_begins_a_new_line_behind_half_a_one(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n{"killed": "he')
    AppendFile(path, durable=False, shared=True).append(to_line({"b": 2}))
    assert read_lines(path) == [{"a": 1}, {"b": 2}]


def test_append_to_a_shared_file_takes_over_from_a_process_that_is_gone(tmp_path):
    path = tmp_path / "lines"
    code = ("import os, sys; from dnnlib.process_lock import ProcessLock; lock = ProcessLock(sys.argv[1]); "
            "lock.acquire(); os._exit(0)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / ".lines.lock")], cwd=ROOT, check=True)
    assert "pid=" in (tmp_path / ".lines.lock").read_text()
    AppendFile(path, durable=False, shared=True).append(b"line\n")
    assert path.read_bytes() == b"line\n"
    assert os.listdir(tmp_path) == ["lines"]
