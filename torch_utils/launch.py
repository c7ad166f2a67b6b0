"""Start the processes of a run on one machine, and see that they end together: what --gpus=N does without torchrun.

`launch` ends the others when one of its processes fails; the system ends all of them when it ends itself, however that
happens (`follow_launcher`). Processes of several machines, and of torchrun, watch each other (`ProcessWatch`): a
collective operation that waits for a dead process may return an error at once (gloo, when the connection breaks) or
never (NCCL), so that each process tells the store that joined them every two seconds that it lives, and looks whether
the others do. The first one that fails leaves its error there for the others.
"""

import ctypes
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

# A process that ends because another one did, when `launch` started it: that program tells the user why.
LOST_EXIT_CODE = 76
LAUNCHER_VARIABLE = "LESION_STYLEGAN_LAUNCHER"  # process id of `launch`, in the environment of what it starts
# After one process failed the others notice and end by themselves; those that have not by then are killed.
GRACE_SECONDS = 20.0
POLL_SECONDS = 0.1

HEARTBEAT_SECONDS = 2.0
# Silent for this long means dead. With WATCH_GRACE_SECONDS less than a minute, and long enough for a process that loads
# a large library from a network file system and can do nothing else meanwhile.
SILENT_SECONDS = 40.0
# The main thread may come out of its collective operation by itself, with an error to handle; then the process ends.
WATCH_GRACE_SECONDS = 10.0

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FAILURE_KEY = "failure"


def launch(count: int, command: Sequence[str] | None = None) -> int:
    """Run `count` processes of a command, by default the present one, and return an exit code once all have ended.

    The code is 0, or that of the first process that failed (128 + the signal that killed it, as in a shell). It has
    said itself what was wrong; for one that was killed a line is printed here. SIGTERM, SIGINT and SIGUSR1 are handed
    on. Nothing is left running, whatever ends this process (on other systems than Linux: SIGKILL excepted).
    Raises UserError where the system has no process groups, as Windows.
    """
    if not hasattr(os, "killpg"):
        raise UserError(f"--gpus is {count}; expected 1 on this system, which does not have process groups: leave "
                        "--gpus out, or use Linux")
    command = [sys.executable, *sys.orig_argv[1:]] if command is None else list(command)
    listener = socket.create_server(("127.0.0.1", 0))  # reached from this machine alone
    port = listener.getsockname()[1]
    # Kept by this process, so that it outlives each of the others: what they say of a failure can be read.
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
        # A process group each: Ctrl-C at the terminal reaches this program alone, which hands it on, once; and what a
        # process starts, such as readers of images, is killed with it.
        self.members.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0))

    def wait(self) -> int:
        """Wait for all; return the exit code of the whole."""
        while any([member.poll() is None for member in self.members]):  # a list: poll each
            self._note_failures()
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                self._kill()
                return self._verdict()  # those that were killed here are no failures of their own
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
            why = "; the system does so when memory runs out" if number == signal.SIGKILL else ""
            _print_error(f"process {self.members.index(first)} of {len(self.members)} was ended by "
                 f"{signal.Signals(number).name}{why}; the others were stopped")
        return 128 + number

    def _forward(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.signals:  # whoever asks twice does not want to wait
            self._end_soon()
        self.signals.append(number)
        for member in self.members:
            member.send_signal(number)  # does nothing to one that has ended

    def _end_soon(self) -> None:
        if self.kill_at is None:
            self.kill_at = time.monotonic() + GRACE_SECONDS

    def _kill(self) -> None:
        for member in self.members:
            with suppress(ProcessLookupError, PermissionError):  # all of it has ended; macOS says the latter
                os.killpg(member.pid, signal.SIGKILL)


def _environment(index: int, count: int, port: int) -> dict[str, str]:
    """Return what torchrun would set, so that the processes need not know who started them."""
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
             LAUNCHER_VARIABLE: os.getpid()}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
    if sys.platform.startswith("linux"):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve must not matter
    return environment


def _print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def find_launcher() -> int | None:
    """Return the process id of the program that started this one as a part of a run, if one did."""
    text = os.environ.get(LAUNCHER_VARIABLE, "")
    return int(text) if text.isdigit() else None


def follow_launcher() -> None:
    """Let the system kill this process when the launcher ends. Without a launcher, does nothing.

    LIMIT: Linux alone can do this. Elsewhere the processes notice the loss of the launcher's store within a minute.
    """
    pid = find_launcher()
    if pid is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != pid:  # it ended before
        os._exit(1)


class ProcessWatch:
    """One process's view of whether the others live.

    store:  a connection of its own: the watch must not wait for the main thread's requests
    end:    ends this process, given what became of another; called from the watching thread
    """

    def __init__(self, store: dist.Store, *, rank: int, count: int, end: Callable[[str], None]):
        self._store = store
        self._rank, self._count = rank, count
        self._end = end
        self._beats = 0
        # other process -> (what it last said, when that was heard first)
        self._heard = {other: (b"", time.monotonic()) for other in range(count) if other != rank}
        self._reason: str | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="process watch", daemon=True)
        self._beat()

    def start(self) -> None:
        """Start watching. Every process must have made its watch by now."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching: from now on the others may end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(WATCH_GRACE_SECONDS)

    def post_failure(self, error: str) -> str | None:
        """Tell the others why this process fails; return the words of another one that failed before, if one did."""
        mine = f"process {self._rank} of {self._count} failed: {error}"
        try:
            first = self._store.compare_set(_FAILURE_KEY, "", mine).decode()
        except RuntimeError:  # the store went with the process that held it: nobody else has said anything
            return None
        return None if first == mine else first

    def find_reason(self) -> str | None:
        """Return what became of another process, given that something did; None when it cannot be told."""
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
                self._reason = "the connection to the process that joins the others broke"
        if not self._stopping.wait(WATCH_GRACE_SECONDS):
            self._end(self._reason)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"alive/{self._rank}", str(self._beats))

    def _look(self) -> str | None:
        """Return what is wrong with another process, or None."""
        if self._store.check([_FAILURE_KEY]):
            return self._store.get(_FAILURE_KEY).decode()
        said = self._store.multi_get([f"alive/{other}" for other in self._heard])
        now = time.monotonic()
        for other, words in zip(list(self._heard), said, strict=True):
            if words != self._heard[other][0]:
                self._heard[other] = (words, now)
        silent = self._longest_silent()
        if now - self._heard[silent][1] > SILENT_SECONDS:
            return self._describe_silent(silent)
        return None

    def _longest_silent(self) -> int:
        return min(self._heard, key=lambda other: self._heard[other][1])

    def _describe_silent(self, other: int) -> str:
        return (f"process {other} of {self._count} is gone without a word; it may have been killed, for example for "
                "want of memory")
