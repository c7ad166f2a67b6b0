"""A disk that fails: what Python opens for reading raises the system's errors, at opening or at each read.

As a program, `python -m tests.helpers.failing_disk PROGRAM FILE TRIGGER RANK ARGUMENTS...` runs train.py and its like
while reads of FILE fail as soon as a file TRIGGER exists, in the process of that RANK of several ("" for one alone).
"""

import builtins
import errno
import io
import os
import runpy
import sys
from pathlib import Path

from dnnlib import files


class FailingDisk:
    """Reads of a file fail while `fails(read)` says so; a file stays good otherwise.

    path:    of the file, or of the folder that it lies in
    number:  of the error
    where:   "open" or "read", what fails
    """

    def __init__(self, path, *, number=errno.EIO, where="read", fails=lambda: True):
        self.path, self.number, self.where, self.fails = Path(os.path.realpath(path)), number, where, fails
        self.attempts = 0  # that failed

    def check(self, where, name=None):
        if where == self.where and self.fails():
            self.attempts += 1
            raise OSError(self.number, os.strerror(self.number), *([] if name is None else [str(name)]))

    def covers(self, file):
        if not isinstance(file, (str, os.PathLike)):
            return False
        path = Path(os.path.realpath(file))
        return path == self.path or self.path in path.parents

    def install(self, patch):
        """Put the disk under Python's `open`. patch: as monkeypatch.setattr"""
        original = io.open

        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest, **named):
            if set(mode) & set("wxa+") or not self.covers(file):
                return original(file, mode, buffering, encoding, errors, newline, *rest, **named)
            self.check("open", file)
            buffered = io.BufferedReader(_Raw(file, self), buffer_size=64)  # little is read ahead
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

        patch(io, "open", opened)
        patch(builtins, "open", opened)
        return self


class _Raw(io.FileIO):
    def __init__(self, file, disk):
        super().__init__(file, "r")
        self._disk = disk

    def readinto(self, buffer):
        self._disk.check("read")
        return super().readinto(buffer)

    def readall(self):
        self._disk.check("read")
        return super().readall()


def failing_times(count):
    """Return what `fails` may be: yes so many times, then no."""
    left = [count]

    def fails():
        left[0] -= 1
        return left[0] >= 0

    return fails


def main():
    program, file, trigger, rank, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "") == rank:
        FailingDisk(file, fails=lambda: os.path.exists(trigger)).install(setattr)
    files.RETRY_WAITS = (0.01, 0.01)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
