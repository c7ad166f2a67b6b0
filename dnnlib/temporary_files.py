"""Name temporary files so that they tell who writes them: only those of processes that are gone are removed.

    .tmp-<place>-<process id>-<its start>-<random>

The place is a digest of host, boot and process name space, within which a process id can be looked up.
"""

import hashlib
import os
import re
import secrets
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

TEMPORARY = re.compile(r"\.tmp-(?:([0-9a-f]{8})-(\d+)-(\d*)-)?[0-9a-f]{16}")  # without an owner: of earlier versions

# An owner that cannot be looked up, as on another host, counts as gone when its file did not change for so long.
SILENT_SECONDS = 3600


def temporary_beside(path: str | os.PathLike) -> Path:
    """Return a new name in the folder of `path`: a rename is atomic only within one file system."""
    return Path(path).with_name(f".tmp-{_owner(os.getpid())}-{secrets.token_hex(8)}")


def remove_abandoned(folder: str | os.PathLike) -> None:
    """Remove the temporary files in a folder whose writers are gone. Raises OSError."""
    for path in Path(folder).iterdir():
        found = TEMPORARY.fullmatch(path.name)
        with suppress(FileNotFoundError):  # its writer, or another process that cleans, was faster
            if found and path.is_file() and _is_abandoned(path, found):
                path.unlink()


def place_of_process() -> tuple[str, str, str]:
    """Return host, boot and process name space, "" where the system does not say: they tell where this process is."""
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot, namespace


def start_of_process(pid: int) -> str | None:
    """Return the start time of a living process, "" where the system does not tell; None when there is none."""
    if os.path.exists("/proc/self/stat"):
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # proc(5): the name in parentheses may hold anything; after it come the state (3rd field) and more
        values = stat.rpartition(b")")[2].split()
        return None if values[0] in (b"Z", b"X") else values[22 - 3].decode()
    if os.name != "posix":  # There the call below would end the process.
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


@cache  # a process that was forked has another id
def _owner(pid: int) -> str:
    return f"{_place()}-{pid}-{start_of_process(pid) or ''}"


@cache
def _place() -> str:
    return hashlib.sha256("/".join(place_of_process()).encode(errors="backslashreplace")).hexdigest()[:8]


def _is_abandoned(path: Path, found: re.Match[str]) -> bool:
    place, pid, start = found.groups()
    if place == _place() and os.name == "posix":
        # LIMIT: where start times are unknown, a later process of the same number is taken for the writer.
        return start_of_process(int(pid)) != start
    probe = temporary_beside(path)  # the clock of the file system, which may be another host's
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime - path.stat().st_mtime > SILENT_SECONDS
    finally:
        probe.unlink(missing_ok=True)
