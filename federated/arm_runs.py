"""Run the arms of a comparison: train.py and federate.py as child processes, a few at a time, which end together.

An arm is an ordinary run in a folder of its own, so that the same command continues it, or leaves it alone when it is
finished. Signals are forwarded, and the system ends the children if this process is killed.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dnnlib.cli import SIGNALS, UserError
from dnnlib.files import EXIT_TEMPORARY

CENTRAL, ALONE, FEDERATED = "central", "alone-", "federated"  # names of arms; that of an institution follows alone-

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 0.1


class ArmStopped(UserError):
    """An arm ended before its training did; `exit_code` is that of the arm."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What --dry-run tells about an arm."""

    folder: Path  # of its run, which may not exist yet
    is_finished: bool
    batch: int  # images of an iteration


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A training whose result is compared with those of the others."""

    name: str
    program: tuple[str, ...]  # script and subcommand
    flags: tuple[str, ...]

    def command(self, *more: str) -> list[str]:
        """Return the command with further flags."""
        return [sys.executable, *self.program, *self.flags, *more]

    def describe(self, plan: PlannedRun | None) -> dict[str, Any]:
        """Return the command and, if it is known, the run, as plain JSON values."""
        known = {} if plan is None else {"run_folder": str(plan.folder), "already_finished": plan.is_finished}
        return {"command": self.command(), **known}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may use."""

    slots: int = 1  # arms at a time, and processes of the federated one
    device: str = "cpu"  # with several slots on GPUs, "cuda": each arm takes one of them
    deadline: float | None = None  # of time.monotonic(); None = no limit

    def flags(self, slot: int) -> list[str]:
        """Return the flags of an arm that starts now in a slot. Raises ArmStopped after the deadline."""
        flags = [f"--device=cuda:{slot}"] if self.slots > 1 and self.device == "cuda" else [f"--device={self.device}"]
        left = self.hours_left()
        return flags if left is None else [*flags, f"--max-hours={left:.6g}"]

    def hours_left(self) -> float | None:
        """Return the hours until the deadline, None without one. Raises ArmStopped after it."""
        if self.deadline is None:
            return None
        left = (self.deadline - time.monotonic()) / 3600
        if left <= 1e-6:
            raise ArmStopped("the --max-hours limit was reached; the same command continues", EXIT_TEMPORARY)
        return left


def plan_arm(arm: Arm, device: str) -> PlannedRun:
    """Check an arm's command by its --dry-run, and return what that prints. Raises ArmStopped if it is refused."""
    found = subprocess.run(arm.command(f"--device={device}", "--dry-run"), stdin=subprocess.DEVNULL,
                           capture_output=True, text=True, check=False)
    if found.returncode:
        lines = found.stderr.strip().splitlines() or [f"its --dry-run ended with exit code {found.returncode}"]
        if found.returncode < 0 or not lines[-1].startswith("error: "):
            sys.stderr.write(found.stderr)
        raise ArmStopped(f"{arm.name}: {lines[-1].removeprefix('error: ')}", _shell_code(found.returncode))
    plan = json.loads(found.stdout)
    return PlannedRun(folder=Path(plan["run_folder"]), is_finished=plan["already_finished"], batch=plan["batch"])


def run_arms(arms: Sequence[Arm], limits: Limits) -> None:
    """Run arms to their ends, at most `limits.slots` at a time; nothing is left running, whatever happens.

    Raises ArmStopped if one fails, or this process is asked to stop: the others then save their states and end, too.
    """
    if not hasattr(os, "killpg"):
        raise UserError("this system does not have process groups, with which compare ends its trainings; expected "
                        "Linux or macOS: run train.py and federate.py simulate one after the other")
    with _Children() as children:
        waiting, free = list(arms), list(range(limits.slots))
        while children.running or (waiting and not children.is_stopping):
            while waiting and free and not children.is_stopping:
                children.start(waiting.pop(0), free.pop(0), limits)
            time.sleep(_POLL_SECONDS)
            free = sorted([*free, *children.collect()])
        children.check()


class _Children:
    """Programs that run at the same time, and end together."""

    def __init__(self) -> None:
        self.running: dict[subprocess.Popen, tuple[Arm, int]] = {}  # with the slot
        self.failed: list[tuple[Arm, int]] = []  # with the exit code, in the order in which they were noticed
        self.signals: list[int] = []
        self.late: ArmStopped | None = None  # the time limit was reached
        self._previous: dict[int, object] = {}

    @property
    def is_stopping(self) -> bool:
        return bool(self.failed or self.signals or self.late)

    def __enter__(self) -> "_Children":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_) -> None:
        for child in self.running:  # after an error here
            with suppress(ProcessLookupError, PermissionError):  # macOS raises the latter for one that has ended
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def start(self, arm: Arm, slot: int, limits: Limits) -> None:
        """Start an arm, unless it is too late."""
        try:
            command = arm.command(*limits.flags(slot))
        except ArmStopped as late:
            self.late = late
            return
        # Each in its own process group: Ctrl-C at the terminal reaches only this program, which forwards it once.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_follow_parent())
        self.running[child] = arm, slot
        if self.signals:  # it arrived before the child was known
            child.send_signal(self.signals[-1])

    def collect(self) -> list[int]:
        """Return the slots of programs that have ended; once one fails, ask the others to stop."""
        freed = []
        for child in [child for child in self.running if child.poll() is not None]:
            arm, slot = self.running.pop(child)
            freed.append(slot)
            if child.returncode:
                if not self.is_stopping:
                    self._send(signal.SIGTERM)
                self.failed.append((arm, child.returncode))
        return freed

    def check(self) -> None:
        """Raise ArmStopped unless all programs ended well and this one was not asked to stop."""
        if self.failed:
            arm, code = self.failed[0]
            if code > 0:
                raise ArmStopped(f"the arm {arm.name} ended with exit code {code}; the same command continues with it "
                                 "once the reason above is gone", code)
            name = signal.Signals(-code).name
            why = ", often because memory ran out" if -code == signal.SIGKILL else ""
            raise ArmStopped(f"the arm {arm.name} was killed by {name}{why}; the same command continues with it",
                             _shell_code(code))
        if self.signals:
            raise ArmStopped(f"stopped by {signal.Signals(self.signals[-1]).name}; the same command continues",
                             EXIT_TEMPORARY)
        if self.late is not None:
            raise self.late

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        self._send(number)

    def _send(self, number: int) -> None:
        for child in list(self.running):
            child.send_signal(number)  # does nothing if it has ended


def _follow_parent():
    """Return a function that a child calls before it becomes another program: it gets SIGTERM when this process ends.

    LIMIT: None outside of Linux, where children of a killed program train on, to their ends.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def follow() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before
            os._exit(1)

    return follow


def _shell_code(code: int) -> int:
    """Return an exit code as a shell gives it: 128 + the signal that killed the program."""
    return 128 - code if code < 0 else code
