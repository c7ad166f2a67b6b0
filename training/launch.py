"""Start the processes of a run on one machine, and see that they end together: what --gpus=N does without torchrun."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import torch.distributed as dist

from dnnlib.cli import SIGNALS, UserError
from torch_utils.distributed import LOST_EXIT_CODE
from torch_utils.parent_death import LAUNCHER_VARIABLE

# After one process failed the others notice and end by themselves; those that have not by then are killed.
GRACE_SECONDS = 20.0
POLL_SECONDS = 0.1


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
            _say("the processes of the run cannot reach each other, or one of them hangs; all were stopped")
            return LOST_EXIT_CODE
        if first.returncode > 0:
            return first.returncode
        number = -first.returncode
        if number in self.signals:
            _say(f"stopped by {signal.Signals(number).name}")
        else:
            why = "; the system does so when memory runs out" if number == signal.SIGKILL else ""
            _say(f"process {self.members.index(first)} of {len(self.members)} was ended by "
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


def _say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
