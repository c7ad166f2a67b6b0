"""Let one process at a time work on something, on local and network file systems, in containers and on several hosts.

A lease of `filelock`: a file that is created exclusively, names its owner, and is renewed as long as that lives. The
owner of a lock that was left behind is found to be gone

- where its process table can be seen (same host and process name space): at once, by process number and start;
- elsewhere: when the file was not renewed while another process watched it for LEASE_SECONDS.

LIMIT: hosts of the same name take each other's processes for their own that are gone. A process that is suspended for
LEASE_SECONDS loses its lock to one that waits for it (`patience`), which `require_held` tells.

The system's own locks (flock) would not do: on network file systems they may be missing or reach no further than one
machine.
"""

import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from dnnlib.files import retrying, start_of_process, temporary_beside

HEARTBEAT_SECONDS = 20
LEASE_SECONDS = 120  # network file systems may show a file's time up to a minute late
_QUIET_SECONDS = 3 * HEARTBEAT_SECONDS  # an owner on another host that is silent for so long is watched
_UNREADABLE_SECONDS = 5  # a file that names nobody is one that is being written, or after two seconds one left behind
_POLL_SECONDS = 0.05


class LockHeld(Exception):
    """Another process holds the lock; the text says which."""


class LockLost(Exception):
    """Another process took the lock over."""


class ProcessLock:
    """A lock file; a context manager that holds it."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._lease = SoftFileLease(self.path, lease_duration=LEASE_SECONDS, heartbeat_interval=HEARTBEAT_SECONDS,
                                    thread_local=False)
        self._token: str | None = None  # of the lock that was acquired last

    @classmethod
    def beside(cls, path: Path) -> Self:
        """Return the lock of a file or folder, in the folder where that lies."""
        return cls(path.with_name(f".{path.name}.lock"))

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def acquire(self, *, patience: float = 0) -> str | None:
        """Take the lock; return a line when it was taken over from a process that is gone.

        patience: seconds to wait for a living holder

        Watches for up to LEASE_SECONDS where the holder seems to be gone but cannot be looked up, and says so on
        standard error. Raises LockHeld, or OSError when the file cannot be written.
        """
        self.path.parent.stat()  # filelock would make the folder
        holder = self._describe_holder() if self.path.exists() else None
        try:
            if not self._acquire(0):
                holder = self._wait(patience)
        except OSError as error:
            if holder is not None and isinstance(error, PermissionError):
                raise LockHeld(f"{holder}, whose lock this user may not change") from error
            error.filename = error.filename or str(self.path)  # a full disk does not say it
            raise
        self._token = self._lease.token
        return f"took over from {holder}, which is gone" if holder else None

    @contextmanager
    def awaited(self, waiting: str) -> Iterator[None]:
        """Hold the lock while a block runs; wait for another process that holds it, however long that takes.

        waiting:  is printed on standard error before, with its {holder}

        Raises OSError when the file cannot be written.
        """
        try:
            self.acquire()
        except LockHeld as holder:
            print(waiting.replace("{holder}", str(holder)), file=sys.stderr)
            self.acquire(patience=math.inf)
        try:
            yield
        finally:
            self.release()

    def require_held(self) -> None:
        """Raise LockLost when another process took the lock over, as it may after this one was suspended for long."""
        lost = "is not held"
        for _ in range(20):  # a process that finds that it cannot take over puts back what it moved, in a moment
            try:
                if self._token and f"token={self._token}".encode() in retrying(self.path.read_bytes, self.path).split():
                    return
                lost = f"was taken over by {self._describe_holder()}"
            except FileNotFoundError:
                lost = "was removed"
            time.sleep(_POLL_SECONDS)
        raise LockLost(f"{self.path} {lost}")

    def release(self) -> None:
        """Give the lock back; does nothing when it is not held, or in a child process of its holder."""
        with suppress(OSError):  # A failing disk: the file stays, and its owner counts as gone.
            self._lease.release()

    def _wait(self, patience: float) -> str | None:
        """Get the lock from a holder that ends in time, or is gone after all: return which. Raises LockHeld."""
        end, is_announced = time.monotonic() + patience, False
        while True:
            holder, silence, watch = self._describe_holder(), self._silence(), 0
            owner = self._lease.owner
            if owner is None:  # it is being written, or was left behind by a process that was killed meanwhile
                time.sleep(max(1 - silence, 0))
            if self._disown():
                watch = _UNREADABLE_SECONDS
            elif silence > _QUIET_SECONDS and owner is not None and owner.hostname != _host():
                watch = max(LEASE_SECONDS, owner.lease_duration or 0) + _UNREADABLE_SECONDS
                if not is_announced:
                    print(f"watching {self.path} of {holder}, which counts as gone after {LEASE_SECONDS} s without "
                          "another", file=sys.stderr)
                is_announced = True
            seen = _state(self.path)
            if self._acquire(watch or min(end - time.monotonic(), HEARTBEAT_SECONDS)):
                return holder if watch else None
            if watch and self._remove(seen) and self._acquire(0):
                return holder
            if time.monotonic() >= end:
                raise LockHeld(self._describe_holder())

    def _acquire(self, timeout: float) -> bool:
        """Try for some seconds, and at least once; tell whether the lock is held."""
        end = time.monotonic() + timeout
        while True:
            try:
                self._lease.acquire(timeout=max(end - time.monotonic(), 0), poll_interval=_POLL_SECONDS)
                return True
            except Timeout:
                return False
            except LeaseSettingsMismatch:  # of a version with other LEASE_SECONDS, which filelock never takes over
                if time.monotonic() >= end:
                    return False
                time.sleep(_POLL_SECONDS)

    def _remove(self, seen: tuple[int, bytes] | None) -> bool:
        """Remove the file of an owner that is gone if it is as it was seen; tell whether it was removed.

        filelock takes over by exchanging two names, which NFS, Lustre and other network file systems cannot do, and
        only from owners with the same LEASE_SECONDS.
        """
        aside = temporary_beside(self.path)
        with suppress(FileNotFoundError, PermissionError):
            if seen is not None and _state(self.path) == seen:
                os.rename(self.path, aside)
                if _state(aside) == seen:
                    aside.unlink()
                    return True
                # The lock of a process that was faster.
                # LIMIT: one that comes between the two renames loses it again, which `require_held` tells.
                os.rename(aside, self.path)
        return False

    def _disown(self) -> bool:
        """Make a file unreadable whose owner is gone though filelock does not see it; tell whether it is unreadable.

        filelock takes over what it cannot read, but neither empty files, which a process leaves that is killed as it
        starts, nor those of zombies, of which a container without an init process is full.
        """
        for mode in ("r+b", "rb"):  # on some systems its owner alone may write it
            try:
                with open(self.path, mode) as file:  # whoever takes over makes another file
                    lines = file.read().decode(errors="replace").splitlines()
                    values = dict(line.partition("=")[::2] for line in lines)
                    pid = values.get("pid", "")
                    is_gone = pid.isdecimal() and values.get("host") == _host() and start_of_process(int(pid)) is None
                    if not is_gone and self._lease.owner is not None:
                        return False
                    if mode == "r+b":
                        file.write(b"gone\n" if is_gone else b"\n")
                    return True
            except FileNotFoundError:
                return True
            except PermissionError:
                continue
        return False

    def _describe_holder(self) -> str:
        owner = self._lease.owner
        if owner is None:
            if self.path.exists() and not os.access(self.path, os.R_OK):
                return "a process of another user"
            return "a process that ended while it started"
        text = f"process {owner.pid} on {owner.hostname.partition('?')[0]}"  # after it: which container of that name
        if owner.hostname == _host():
            return text
        return f"{text} (last sign of life {self._silence():.0f} s ago)"

    def _silence(self) -> float:
        """Return the seconds since the last heartbeat, by the clock of the file system; 0 when the file is gone."""
        probe = temporary_beside(self.path)
        with suppress(FileNotFoundError):
            beat = self.path.stat().st_mtime
            try:
                probe.touch(exist_ok=False)
                return max(probe.stat().st_mtime - beat, 0)
            finally:
                probe.unlink(missing_ok=True)
        return 0


def _state(path: Path) -> tuple[int, bytes] | None:
    """Return the time of a lock file and what it holds, which tell it from all others; None when it cannot be read."""
    with suppress(FileNotFoundError, PermissionError):
        return path.stat().st_mtime_ns, retrying(path.read_bytes, path)
    return None


def _host() -> str:
    """Return the name of the place where processes can be looked up, as filelock writes it."""
    initial = 0xEFFFFFFC  # the process name space of Linux that is no container's
    with suppress(OSError):
        if (number := os.stat("/proc/self/ns/pid").st_ino) != initial:
            return f"{socket.gethostname()}?pidns-{number:x}"
    return socket.gethostname()
