"""Start the processes of a run on one machine, and make them end together: the implementation of --gpus=N.

When one process fails, `launch` ends the others; when the launcher itself ends, for whatever reason, the system kills
them (`follow_launcher`). All processes, including those of torchrun and of several machines, watch each other
(`ProcessWatch`): a collective operation that waits for a dead process may fail at once (gloo, when the connection
breaks) or never return (NCCL). So each process writes a heartbeat to the shared store every two seconds, and checks
those of the others. The first process that fails leaves its error in the store for the others.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType

import torch.distributed as dist

from dnnlib.cli import SIGNALS, UserError
from dnnlib.workers import end_with_parent

# Of a process that ends because another one did, when `launch` started it, which then prints the reason.
LOST_EXIT_CODE = 76
LAUNCHER_VARIABLE = "LESION_STYLEGAN_LAUNCHER"  # process id of `launch`, in the environment of its processes
# After one process fails the others notice and end by themselves; those still running after this time are killed.
GRACE_SECONDS = 20.0
POLL_SECONDS = 0.1

HEARTBEAT_SECONDS = 2.0
# A process without a heartbeat for this long counts as dead. Together with WATCH_GRACE_SECONDS less than a minute, yet
# long enough for a process that is blocked while it loads a large library from a network file system.
SILENT_SECONDS = 40.0
# Time for the main thread to return from its collective operation by itself, with an error to handle.
WATCH_GRACE_SECONDS = 10.0

_FAILURE_KEY = "failure"


def launch(count: int, command: Sequence[str] | None = None) -> int:
    """Run `count` processes of a command, by default the present one, and return an exit code once all have ended.

    The code is 0, or that of the first process that failed (128 + the signal that killed it, as in a shell). That
    process has printed its error itself; for one that was killed a line is printed here. SIGTERM, SIGINT and SIGUSR1
    are forwarded. Nothing is left running, whatever ends this process (except SIGKILL on systems other than Linux).
    Raises UserError on systems without process groups, such as Windows.
    """
    if not hasattr(os, "killpg"):
        raise UserError(f"--gpus is {count}; expected 1 on this system, which does not have process groups: leave "
                        "--gpus out, or use Linux")
    command = [sys.executable, *sys.orig_argv[1:]] if command is None else list(command)
    listener = socket.create_server(("127.0.0.1", 0))  # reachable only from this machine
    port = listener.getsockname()[1]
    # Held by this process, so that it outlives all others and their errors can be read.
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False,
                          master_listen_fd=listener.detach())
    with _Family() as family:
        for index in range(count):
            family.start(command, _environment(index, count, port))
        code = family.wait()
    del store
    return code


class _Family:
    """Processes that live and end together."""

    def __init__(self) -> None:
        self.members: list[subprocess.Popen] = []
        self.failed: list[subprocess.Popen] = []  # in the order in which they were noticed
        self.signals: list[int] = []
        self.kill_at: float | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "_Family":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_) -> None:
        self._kill()
        for member in self.members:
            member.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        # Each in its own process group: Ctrl-C at the terminal reaches only this program, which forwards it once; and
        # the children of a process, such as data loading workers, are killed with it.
        self.members.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0))

    def wait(self) -> int:
        """Wait for all; return the exit code of the run."""
        while any([member.poll() is None for member in self.members]):  # a list: poll each
            self._note_failures()
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                self._kill()
                return self._verdict()  # processes killed here do not count as failed
            time.sleep(POLL_SECONDS)
        self._note_failures()
        return self._verdict()

    def _note_failures(self) -> None:
        for member in self.members:
            if member.returncode and member not in self.failed:
                self.failed.append(member)
                self._end_soon()

    def _verdict(self) -> int:
        if not self.failed:
            return 128 + self.signals[-1] if self.kill_at is not None else 0
        first = next((member for member in self.failed if member.returncode != LOST_EXIT_CODE), None)
        if first is None:
            _print_error("the processes of the run cannot reach each other, or one of them hangs; all were stopped")
            return LOST_EXIT_CODE
        if first.returncode > 0:
            return first.returncode
        number = -first.returncode
        if number in self.signals:
            _print_error(f"stopped by {signal.Signals(number).name}")
        else:
            why = ", often because memory ran out" if number == signal.SIGKILL else ""
            _print_error(f"process {self.members.index(first)} of {len(self.members)} was killed by "
                 f"{signal.Signals(number).name}{why}; the others were stopped")
        return 128 + number

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.signals:  # a second Ctrl-C means do not wait
            self._end_soon()
        self.signals.append(number)
        for member in self.members:
            member.send_signal(number)  # does nothing if it has ended

    def _end_soon(self) -> None:
        if self.kill_at is None:
            self.kill_at = time.monotonic() + GRACE_SECONDS

    def _kill(self) -> None:
        for member in self.members:
            with suppress(ProcessLookupError, PermissionError):  # all have ended; macOS raises the latter
                os.killpg(member.pid, signal.SIGKILL)


def _environment(index: int, count: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set, so that the processes do not depend on what started them."""
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
             LAUNCHER_VARIABLE: os.getpid()}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    if sys.platform.startswith("linux"):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # works even if the host name does not resolve
    return environment


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def find_launcher() -> int | None:
    """Return the process id of the launcher that started this process; None when there is none."""
    text = os.environ.get(LAUNCHER_VARIABLE, "")
    return int(text) if text.isdigit() else None


def follow_launcher() -> None:
    """Let the system kill this process when the launcher ends. Without a launcher, does nothing.

    LIMIT: only on Linux. Elsewhere the processes notice the loss of the launcher's store within a minute.
    """
    pid = find_launcher()
    if pid is not None:
        end_with_parent(pid)


class ProcessWatch:
    """Watches from one process whether the others are alive.

    store:  a separate connection: the watch must not wait for requests of the main thread
    end:    ends this process, given what happened to another; called from the watching thread
    """

    def __init__(self, store: dist.Store, *, rank: int, count: int, end: Callable[[str], None]):
        self._store = store
        self._rank, self._count = rank, count
        self._end = end
        self._beats = 0
        # other process -> (its last heartbeat, when that was first seen)
        self._heard = {other: (b"", time.monotonic()) for other in range(count) if other != rank}
        self._reason: str | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="process watch", daemon=True)
        self._beat()

    def start(self) -> None:
        """Start watching. Every process must have created its watch by now."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching: from now on the other processes may end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(WATCH_GRACE_SECONDS)

    def post_failure(self, error: str) -> str | None:
        """Post why this process fails for the others; return the error of one that failed earlier, if any."""
        mine = f"process {self._rank} of {self._count} failed: {error}"
        try:
            first = self._store.compare_set(_FAILURE_KEY, "", mine).decode()
        except RuntimeError:  # the process that held the store is gone: no earlier error is known
            return None
        return None if first == mine else first

    def find_reason(self) -> str | None:
        """Return what happened to another process, given that something did; None when it is unknown."""
        deadline = time.monotonic() + 4 * HEARTBEAT_SECONDS
        while time.monotonic() < deadline and self._thread.is_alive():
            if self._reason is not None:
                return self._reason
            silent = self._longest_silent()
            if time.monotonic() - self._heard[silent][1] > 2.5 * HEARTBEAT_SECONDS:
                return self._describe_silent(silent)
            time.sleep(0.05)
        return self._reason

    def _run(self) -> None:
        while self._reason is None:
            if self._stopping.wait(HEARTBEAT_SECONDS):
                return
            try:
                self._beat()
                self._reason = self._look()
            except RuntimeError:
                self._reason = "lost the connection to the process that connects the others"
        if not self._stopping.wait(WATCH_GRACE_SECONDS):
            self._end(self._reason)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"alive/{self._rank}", str(self._beats))

    def _look(self) -> str | None:
        """Return the failure of another process, or None."""
        if self._store.check([_FAILURE_KEY]):
            return self._store.get(_FAILURE_KEY).decode()
        beats = self._store.multi_get([f"alive/{other}" for other in self._heard])
        now = time.monotonic()
        for other, beat in zip(list(self._heard), beats, strict=True):
            if beat != self._heard[other][0]:
                self._heard[other] = (beat, now)
        silent = self._longest_silent()
        if now - self._heard[silent][1] > SILENT_SECONDS:
            return self._describe_silent(silent)
        return None

    def _longest_silent(self) -> int:
        return min(self._heard, key=lambda other: self._heard[other][1])

    def _describe_silent(self, other: int) -> str:
        return (f"process {other} of {self._count} stopped responding; it may have been killed, for example "
                "because memory ran out")
