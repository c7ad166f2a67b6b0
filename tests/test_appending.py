"""dnnlib.appending: pieces whole and in order, or waiting."""

import os
import stat

import pytest

from dnnlib.appending import AppendFile


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
    monkeypatch.setattr("dnnlib.appending.os.write", one_then_full)
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
