"""End a process when the program that started it ends, however that happens."""

import ctypes
import os
import signal
import sys

LAUNCHER_VARIABLE = "LESION_STYLEGAN_LAUNCHER"  # process id of training.launch, in the environment of what it starts

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launcher() -> int | None:
    """Return the process id of the program that started this one as a part of a run, if one did."""
    text = os.environ.get(LAUNCHER_VARIABLE, "")
    return int(text) if text.isdigit() else None


def follow_launcher() -> None:
    """Let the system kill this process when the launcher ends. Without a launcher, does nothing.

    LIMIT: Linux alone can do this. Elsewhere the processes notice the loss of the launcher's store within a minute.
    """
    pid = launcher()
    if pid is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != pid:  # it ended before
        os._exit(1)
