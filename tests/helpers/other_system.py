"""Take from Python what Linux alone or POSIX alone has: as sitecustomize, of a program and of what it starts.

What stays is that of Windows, as far as one can tell on Linux: paths, the loader of C libraries and the file system are
those of Linux, and so is sys.platform.
"""

import builtins
import ctypes.util  # noqa: F401  it asks os.name which loader there is
import io
import multiprocessing.popen_spawn_posix  # this and the next two start and end processes, as each system can
import multiprocessing.resource_tracker
import os
import pathlib
import signal
import subprocess  # noqa: F401
import sys
import types

import filelock  # noqa: F401  it keeps the locks of this system, as it has some on each

SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "SIGHUP", "SIGQUIT", "SIGCONT", "SIGSTOP", "SIGTSTP", "alarm",
           "setitimer", "pthread_kill", "pthread_sigmask", "sigwait", "sigwaitinfo", "sigtimedwait", "sigpending")
NAMES = ("fork", "forkpty", "killpg", "getpgid", "getpgrp", "setpgid", "setsid", "getuid",
             "geteuid", "getgid", "getegid", "getgroups", "getloadavg", "nice", "sched_getaffinity", "statvfs",
             "fstatvfs", "fchmod", "fchown", "chown", "mkfifo", "pread", "pwrite", "posix_fallocate", "posix_fadvise",
             "sysconf", "waitid", "wait3", "wait4", "ttyname", "sendfile", "copy_file_range", "O_DIRECTORY",
             "O_NOFOLLOW")


def _hide_proc(function):
    def seen(path, *arguments, **named):
        if isinstance(path, (str, pathlib.PurePath)) and str(path).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return function(path, *arguments, **named)
    return seen


for module in ("fcntl", "resource", "pwd", "grp", "termios", "triton"):
    sys.modules[module] = None  # import fails
sys.modules["signal"] = types.ModuleType("signal")
vars(sys.modules["signal"]).update({name: value for name, value in vars(signal).items() if name not in SIGNALS})
for name in NAMES:
    delattr(os, name)
for name in ("stat", "readlink", "open"):
    setattr(os, name, _hide_proc(getattr(os, name)))
builtins.open = io.open = _hide_proc(io.open)
os.name = "other"  # "nt" would make paths those of Windows
multiprocessing.set_start_method("spawn")
