"""Records as lines of strict JSON, and files of them cut where a run continues."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dnnlib.appending import only_writer
from dnnlib.disk_failures import retrying
from dnnlib.files import atomic_write


def to_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line. NaN and infinities, which JSON has not, become null."""
    return (json.dumps(_strict(record), allow_nan=False) + "\n").encode()


def read_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the records of a file, without lines that are none, as a killed process may leave; [] for no file."""
    try:
        lines = retrying(Path(path).read_bytes, path).splitlines()
    except FileNotFoundError:
        return []
    records = (_parse(line) for line in lines)
    return [record for record in records if record is not None]


def cut_lines(path: str | os.PathLike, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Leave only whole records that `keep` accepts, each as it was; return how many lines went.

    A file that loses nothing is not touched. A line that another process adds meanwhile, by a shared AppendFile, is
    kept. Raises OSError when it cannot be read or replaced, and DiskFailure.
    """
    with only_writer(path):
        return _cut(path, keep)


def insert_line(path: str | os.PathLike, line: bytes, before: Callable[[dict[str, Any]], bool]) -> bool:
    """Put a line in front of the first record that `before` accepts; return False, and do nothing, where none is.

    Other processes may add lines meanwhile, as with `cut_lines`. Raises OSError, and DiskFailure.
    """
    with only_writer(path):
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


def _cut(path: str | os.PathLike, keep: Callable[[dict[str, Any]], bool]) -> int:
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


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
