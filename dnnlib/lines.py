"""Records as lines of strict JSON, in files that only grow: a full disk neither leaves half a line nor loses one.

Several processes may append to one file, and one of them may shorten it where a run continues; each holds the file's
lock meanwhile. Appending alone is not enough: lines appended while another process replaces the file by a shorter one
would be lost, and on network file systems appends are not atomic.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dnnlib.files import atomic_write, retrying
from dnnlib.process_lock import LEASE_SECONDS, LockHeld, ProcessLock

# Longer than it takes until the lock of a process that was killed on another host counts as abandoned.
_PATIENCE_SECONDS = LEASE_SECONDS + 60


class AppendFile:
    """A file that is only appended to. It is opened for each piece, and created by the first.

    durable: wait until a piece is on the disk, so that it survives a power cut
    shared:  other processes append lines as well; each piece is one or more lines
    """

    def __init__(self, path: str | os.PathLike, *, durable: bool, shared: bool = False):
        self.path = path
        self._durable, self._shared = durable, shared
        self._waiting = b""

    def retry(self) -> None:
        """Write the pieces that could not be written before, if any. Raises OSError as `append` does."""
        if self._waiting:
            self.append(b"")

    def append(self, piece: bytes) -> None:
        """Append `piece`, after pieces that could not be written before.

        Raises OSError when that fails; the file is then unchanged, and the pieces are kept for the next call.
        LIMIT: pieces that are kept are lost when the process ends.
        """
        self._waiting += piece
        with _only_writer(self.path) if self._shared else nullcontext():
            self._write()
        self._waiting = b""

    def _write(self) -> None:
        # Opened only while the lock is held: another process may have replaced the file.
        binary = getattr(os, "O_BINARY", 0)  # else Windows changes the line endings
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | binary, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            # A killed process may have left half a line; ours must not be joined to it.
            is_cut = False
            if self._shared and size > 0:
                os.lseek(descriptor, -1, os.SEEK_END)
                is_cut = os.read(descriptor, 1) != b"\n"
            view = memoryview(b"\n" * is_cut + self._waiting)
            try:
                while view:  # the system may write only a part, as it does just before the disk is full
                    view = view[os.write(descriptor, view):]
                if self._durable:
                    os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def to_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line. NaN and infinities, which JSON does not have, become null."""
    return (json.dumps(strict(record), allow_nan=False) + "\n").encode()


def strict(value: Any) -> Any:
    """Return a value of strict JSON: NaN and infinities become null, what is of NumPy plain numbers and lists."""
    if isinstance(value, Mapping):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a number of NumPy
        return strict(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the records of a file, skipping invalid lines, such as those of a killed process; [] without a file."""
    try:
        lines = retrying(Path(path).read_bytes, path).splitlines()
    except FileNotFoundError:
        return []
    records = (_parse(line) for line in lines)
    return [record for record in records if record is not None]


def cut_lines(path: str | os.PathLike, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Keep only valid records that `keep` accepts, unchanged; return how many lines were removed.

    A file that loses nothing is not touched. A line that another process appends meanwhile through a shared AppendFile
    is kept. Raises OSError when the file cannot be read or replaced, and DiskFailure.
    """
    with _only_writer(path):
        try:
            lines = retrying(Path(path).read_bytes, path).splitlines(keepends=True)
        except FileNotFoundError:
            return 0
        kept = []
        for line in lines:
            record = _parse(line) if line.endswith(b"\n") else None
            if record is not None and keep(record):
                kept.append(line)
        if len(kept) < len(lines):
            with atomic_write(path) as file:
                file.write(b"".join(kept))
        return len(lines) - len(kept)


def insert_line(path: str | os.PathLike, line: bytes, before: Callable[[dict[str, Any]], bool]) -> bool:
    """Insert a line before the first record that `before` accepts; return False, and do nothing, when there is none.

    Other processes may append lines meanwhile, as with `cut_lines`. Raises OSError, and DiskFailure.
    """
    with _only_writer(path):
        try:
            lines = retrying(Path(path).read_bytes, path).splitlines(keepends=True)
        except FileNotFoundError:
            return False
        for index, found in enumerate(lines):
            record = _parse(found)
            if record is not None and before(record):
                with atomic_write(path) as file:
                    file.write(b"".join([*lines[:index], line, *lines[index:]]))
                return True
    return False


@contextmanager
def _only_writer(path: str | os.PathLike) -> Iterator[None]:
    """Keep other processes from writing to a file of lines; wait for one that does. Raises OSError."""
    lock = ProcessLock.beside(Path(path))
    try:
        lock.acquire(patience=_PATIENCE_SECONDS)
    except LockHeld as holder:
        raise OSError(errno.EBUSY, f"it is being written by {holder}", str(path)) from holder
    try:
        yield
    finally:
        lock.release()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
