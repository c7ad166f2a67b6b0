"""Let one process at a time work on something, on local and network file systems, in containers and on several hosts.

A lease of `filelock`: a file that is created exclusively, names its owner, and is renewed while the owner lives. An
owner that ended without releasing its lock is detected

- where its process can be looked up (same host and process name space): at once, by process id and start time;
- elsewhere: when the file was not renewed while another process watched it for LEASE_SECONDS.

LIMIT: hosts with the same name take each other's processes for ended processes of their own. A process that is
suspended for LEASE_SECONDS loses its lock to one that waits for it (`patience`); `require_held` detects that.

The system's own locks (flock) are not enough: on network file systems they may be missing, or work only within one
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
LEASE_SECONDS = 120  # network file systems may report a file's time up to a minute late
_QUIET_SECONDS = 3 * HEARTBEAT_SECONDS  # an owner on another host without a heartbeat for this long is watched
_UNREADABLE_SECONDS = 5  # a file without an owner is being written, or, after two seconds, abandoned
_POLL_SECONDS = 0.05


class LockHeld(Exception):
    """Another process holds the lock; the message names it."""


class LockLost(Exception):
    """Another process took the lock over."""


class ProcessLock:
    """A lock file; a context manager that holds it."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._lease = SoftFileLease(self.path, lease_duration=LEASE_SECONDS, heartbeat_interval=HEARTBEAT_SECONDS,
                                    thread_local=False)
        self._token: str | None = None  # of the last lock that was acquired

    @classmethod
    def beside(cls, path: Path) -> Self:
        """Return the lock of a file or folder, in its parent folder."""
        return cls(path.with_name(f".{path.name}.lock"))

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def acquire(self, *, patience: float = 0) -> str | None:
        """Acquire the lock; return a line when it was taken over from a process that has ended.

        patience: seconds to wait for a living holder

        Watches for up to LEASE_SECONDS when the holder seems to have ended but cannot be looked up, and prints that on
        standard error. Raises LockHeld, or OSError when the file cannot be written.
        """
        self.path.parent.stat()  # filelock would create the folder
        holder = self._describe_holder() if self.path.exists() else None
        try:
            if not self._acquire(0):
                holder = self._wait(patience)
        except OSError as error:
            if holder is not None and isinstance(error, PermissionError):
                raise LockHeld(f"{holder}, whose lock this user may not change") from error
            error.filename = error.filename or str(self.path)  # the error of a full disk does not name the file
            raise
        self._token = self._lease.token
        return f"took over from {holder}, which has ended" if holder else None

    @contextmanager
    def awaited(self, waiting: str) -> Iterator[None]:
        """Hold the lock while a block runs; wait as long as needed for another process that holds it.

        waiting:  printed on standard error before waiting, with {holder} filled in

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
        """Raise LockLost when another process took the lock over, as can happen after a long suspension of this one."""
        lost = "is not held"
        for _ in range(20):  # a process that fails to take over puts the file back after a moment
            try:
                if self._token and f"token={self._token}".encode() in retrying(self.path.read_bytes, self.path).split():
                    return
                lost = f"was taken over by {self._describe_holder()}"
            except FileNotFoundError:
                lost = "was removed"
            time.sleep(_POLL_SECONDS)
        raise LockLost(f"{self.path} {lost}")

    def release(self) -> None:
        """Release the lock; does nothing when it is not held, or in a child process of its holder."""
        with suppress(OSError):  # A failing disk: the file stays, and its owner counts as ended.
            self._lease.release()

    def _wait(self, patience: float) -> str | None:
        """Get the lock from a holder that releases it in time, or has ended: return which one. Raises LockHeld."""
        end, is_announced = time.monotonic() + patience, False
        while True:
            holder, silence, watch = self._describe_holder(), self._silence(), 0
            owner = self._lease.owner
            if owner is None:  # it is being written, or its process was killed while writing
                time.sleep(max(1 - silence, 0))
            if self._disown():
                watch = _UNREADABLE_SECONDS
            elif silence > _QUIET_SECONDS and owner is not None and owner.hostname != _host():
                watch = max(LEASE_SECONDS, owner.lease_duration or 0) + _UNREADABLE_SECONDS
                if not is_announced:
                    print(f"watching {self.path} of {holder}: taken over after {LEASE_SECONDS} s without a heartbeat",
                          file=sys.stderr)
                is_announced = True
            seen = _state(self.path)
            if self._acquire(watch or min(end - time.monotonic(), HEARTBEAT_SECONDS)):
                return holder if watch else None
            if watch and self._remove(seen) and self._acquire(0):
                return holder
            if time.monotonic() >= end:
                raise LockHeld(self._describe_holder())

    def _acquire(self, timeout: float) -> bool:
        """Try for some seconds, and at least once; return whether the lock is held."""
        end = time.monotonic() + timeout
        while True:
            try:
                self._lease.acquire(timeout=max(end - time.monotonic(), 0), poll_interval=_POLL_SECONDS)
                return True
            except Timeout:
                return False
            except LeaseSettingsMismatch:  # of a version with another LEASE_SECONDS, which filelock never takes over
                if time.monotonic() >= end:
                    return False
                time.sleep(_POLL_SECONDS)

    def _remove(self, seen: tuple[int, bytes] | None) -> bool:
        """Remove the file of an ended owner if it is unchanged since `seen`; return whether it was removed.

        filelock takes over by exchanging two names, which NFS, Lustre and other network file systems do not support,
        and only from owners with the same LEASE_SECONDS.
        """
        aside = temporary_beside(self.path)
        with suppress(FileNotFoundError, PermissionError):
            if seen is not None and _state(self.path) == seen:
                os.rename(self.path, aside)
                if _state(aside) == seen:
                    aside.unlink()
                    return True
                # The lock of a process that was faster.
                # LIMIT: one that comes between the two renames loses it again; `require_held` detects that.
                os.rename(aside, self.path)
        return False

    def _disown(self) -> bool:
        """Make the file unreadable if its owner has ended unnoticed by filelock; return whether it is unreadable.

        filelock takes over files that it cannot read, but neither empty ones, which a process leaves when it is killed
        during startup, nor those of zombies, which are common in a container without an init process.
        """
        for mode in ("r+b", "rb"):  # on some systems only its owner may write it
            try:
                with open(self.path, mode) as file:  # the process that takes over creates another file
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
            return "an unknown process"
        text = f"process {owner.pid} on {owner.hostname.partition('?')[0]}"  # after it: which container on that host
        if owner.hostname == _host():
            return text
        return f"{text} (last heartbeat {self._silence():.0f} s ago)"

    def _silence(self) -> float:
        """Return the seconds since the last heartbeat, by the clock of the file system; 0 without a file."""
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
    """Return the time and content of a lock file, which identify it; None when it cannot be read."""
    with suppress(FileNotFoundError, PermissionError):
        return path.stat().st_mtime_ns, retrying(path.read_bytes, path)
    return None


def _host() -> str:
    """Return the host, and container, in which processes can be looked up, as filelock writes it."""
    initial = 0xEFFFFFFC  # Linux's process name space outside containers
    with suppress(OSError):
        if (number := os.stat("/proc/self/ns/pid").st_ino) != initial:
            return f"{socket.gethostname()}?pidns-{number:x}"
    return socket.gethostname()
