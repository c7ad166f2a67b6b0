"""dnnlib.files: a file is complete or absent."""
import os
import stat

import pytest

from dnnlib.files import atomic_write


def test_atomic_write_bytes_writes_exactly_them(tmp_path):
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"\x00\r\n\xff")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\r\n\xff"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_atomic_write_text_keeps_line_ends_and_is_utf8(tmp_path):
    with atomic_write(tmp_path / "a.txt", text=True) as file:
        file.write("m\u00e9l\n")
    assert (tmp_path / "a.txt").read_bytes() == b"m\xc3\xa9l\n"


def test_atomic_write_old_content_stays_until_the_block_ends(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_atomic_write_error_leaves_nothing_behind(tmp_path, error, existing):
    path = tmp_path / "a.bin"
    if existing:
        path.write_bytes(b"old")
    def fail_halfway():
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert os.listdir(tmp_path) == (["a.bin"] if existing else [])
    assert not existing or path.read_bytes() == b"old"


def test_atomic_write_failed_rename_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no rename")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="no rename"), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"whole")
    assert os.listdir(tmp_path) == []


def test_atomic_write_syncs_the_file_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"sync {stat.S_ISDIR(os.fstat(fd).st_mode)}"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"x")
    assert calls[:2] == ["sync False", "rename"]
    assert os.name != "posix" or calls[2:] == ["sync True"]


def test_atomic_write_missing_folder_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "missing" / "a.bin"):
        pass


def test_atomic_write_folder_as_target_raises(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; expected a file name"), atomic_write(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="symbolic links and permission bits are those of POSIX systems")
def test_atomic_write_symbolic_link_keeps_the_link_and_default_permissions(tmp_path):
    target, link = tmp_path / "target.bin", tmp_path / "link.bin"
    target.write_bytes(b"old")
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    plain = tmp_path / "plain.bin"
    plain.write_bytes(b"")
    assert target.stat().st_mode == plain.stat().st_mode
