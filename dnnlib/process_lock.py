"""Let one process at a time work on something, on local and network file systems.

The lock is a file that is created exclusively: other kinds of locks are missing or local to a machine on many network
file systems. It says who holds it. A process that ended without releasing it is recognised

- where its process table can be seen (same host, boot and process name space): when no process has its number and
  start time;
- elsewhere: when the file's time is more than SILENT_SECONDS old. The holder renews it every HEARTBEAT_SECONDS.
"""

import json
import os
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Self

from dnnlib.disk_failures import DiskFailure, find_failure, retrying
from dnnlib.temporary_files import place_of_process, start_of_process, temporary_beside

HEARTBEAT_SECONDS = 20
SILENT_SECONDS = 180  # network file systems may show a file's time up to a minute late
_WRITING_SECONDS = 5  # for so long a lock without content may be one that is being written
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a lock."""

    host: str
    boot: str  # changes when the machine is started anew; "" where unknown
    namespace: str  # containers of one machine do not see each other's processes; "" where unknown
    pid: int
    started: str  # tells the process from a later one of the same number; "" where unknown
    since: str  # local time, for people
    token: str  # tells this lock from all others

    @classmethod
    def this_process(cls) -> Self:
        host, boot, namespace = place_of_process()
        return cls(host=host, boot=boot, namespace=namespace, pid=os.getpid(),
                   started=start_of_process(os.getpid()) or "",
                   since=datetime.now().astimezone().isoformat(" ", "seconds"),
                   token=secrets.token_hex(8))

    @classmethod
    def parse(cls, content: bytes) -> Self | None:
        """Return the owner that a lock file names; None for anything else."""
        try:
            data = json.loads(content)
        except ValueError:
            return None
        types = {field.name: field.type for field in fields(cls)}
        if not isinstance(data, dict) or {name: type(value) for name, value in data.items()} != types:
            return None
        return cls(**data)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def is_visible_from(self, other: "Owner") -> bool:
        """Tell whether `other` can look the process up."""
        mine, theirs = ((owner.host, owner.boot, owner.namespace) for owner in (self, other))
        return os.name == "posix" and mine == theirs


class LockHeld(Exception):
    """Another process holds the lock; the text says which, and since when."""


class LockLost(Exception):
    """Another process took the lock over."""


class ProcessLock:
    """A lock file; a context manager that holds it."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._owner: Owner | None = None
        self._stop: threading.Event | None = None
        self._heart: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def acquire(self, *, patience: float = 0) -> str | None:
        """Take the lock; return a line when it was taken over from a process that is gone.

        patience: seconds to wait for a living holder

        Raises LockHeld, or OSError when the file cannot be written.
        """
        end = time.monotonic() + patience
        owner, taken_over = Owner.this_process(), None
        while not self._create(owner):
            try:
                taken_over = self._remove_stale(owner) or taken_over
            except LockHeld:
                if time.monotonic() >= end:
                    raise
                time.sleep(_POLL_SECONDS)
        self._owner, self._stop = owner, threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(self._stop,), daemon=True, name="lock heartbeat")
        self._heart.start()
        return taken_over

    def require_held(self) -> None:
        """Raise LockLost when another process took the lock over, as it may after this one was suspended for long."""
        content = self._read()
        if self._owner is None or content != _encode(self._owner):
            other = Owner.parse(content or b"")
            raise LockLost(f"{self.path} was {'removed' if other is None else f'taken over by {other}'}")

    def release(self) -> None:
        """Give the lock back; does nothing when it is not held, or in a child process of its holder."""
        if self._owner is None or self._owner.pid != os.getpid():
            return
        self._stop.set()
        self._heart.join()
        try:
            if self._read() == _encode(self._owner):
                self.path.unlink(missing_ok=True)
        except (OSError, DiskFailure) as error:
            if find_failure(error) is None:
                raise
            # The file stays, and its owner counts as gone: what ends here had better not fail for it.
        self._owner = None

    def _create(self, owner: Owner) -> bool:
        """Make the file; return False when there is one."""
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "wb") as file:
                file.write(_encode(owner))
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _remove_stale(self, me: Owner) -> str | None:
        """Remove the file of a process that is gone and say whose it was; raise LockHeld when its process lives."""
        content = self._read_written()
        if content is None:
            return None
        owner = Owner.parse(content)
        if owner is not None:
            self._refuse_living(owner, me)
        # Several processes may be here at once: one rename succeeds for each file, and shows what was renamed.
        aside = temporary_beside(self.path)
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return None
        if aside.read_bytes() != content:  # The lock of a process that was faster.
            # LIMIT: a third process that comes between the two renames could hold the lock as well.
            os.rename(aside, self.path)
            return None
        aside.unlink()
        return f"took over from {owner or 'a process that ended while it started'}, which is gone"

    def _refuse_living(self, owner: Owner, me: Owner) -> None:
        if owner.is_visible_from(me):
            started = start_of_process(owner.pid)
            # LIMIT: where start times are unknown, a later process of the same number is taken for the holder.
            if started is not None and started == owner.started:
                raise LockHeld(f"{owner}")
            return
        age = self._age()
        if age is not None and age < SILENT_SECONDS:
            raise LockHeld(f"{owner} (last sign of life {max(age, 0):.0f} s ago; after {SILENT_SECONDS} s without one "
                           "it counts as gone)")

    def _read(self) -> bytes | None:
        try:
            return retrying(self.path.read_bytes, self.path)
        except FileNotFoundError:
            return None

    def _read_written(self) -> bytes | None:
        """Return the file's content, and wait a little for one that is being written."""
        end = time.monotonic() + _WRITING_SECONDS
        while True:
            content = self._read()
            if content is None or Owner.parse(content) is not None or time.monotonic() >= end:
                return content
            time.sleep(_POLL_SECONDS)

    def _age(self) -> float | None:
        """Return the seconds since the last heartbeat, by the clock of the file system; None when the file is gone."""
        probe = temporary_beside(self.path)
        with suppress(FileNotFoundError):
            beat = self.path.stat().st_mtime
            try:
                probe.touch(exist_ok=False)
                return probe.stat().st_mtime - beat
            finally:
                probe.unlink(missing_ok=True)
        return None

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # A file system that is away for a moment; `require_held` finds a lost lock.
                os.utime(self.path)


def _encode(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode()
