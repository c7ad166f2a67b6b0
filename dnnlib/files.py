"""Read and write files safely: whole or not at all, with retries while a disk or the network fails.

- Writing (`atomic_write`): under a temporary name that identifies the writer, then renamed; a reader never sees half a
  file.
- Reading (`retrying`): a bad sector, a file server that restarts or a short network outage is nobody's mistake. The
  function that opens and reads the file is repeated until it works; if it keeps failing, a DiskFailure is raised. That
  is not an OSError, so code that turns an OSError into advice for the user lets it pass. Bad content (a wrong checksum,
  a truncated zip, an image that cannot be decoded) is never retried.
- Packed files (`unpack_advice`): archives that must be unpacked before use, and the command that does it.
"""

import errno
import gzip
import hashlib
import lzma
import os
import re
import secrets
import shlex
import socket
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

T = TypeVar("T")

EXIT_TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h: the command is correct and may be run again

# Seconds between attempts, 31.5 in all: about the time a file server takes to fail over. Tests shorten them.
RETRY_WAITS = (0.5, 1, 2, 4, 8, 16)

# Excludes what the user or an administrator has to fix first, such as EACCES, ENOENT, ENOSPC or EROFS.
_NAMES = (
    "EIO",  # a sector that cannot be read; a network file system that gave up (NFS mounted "soft", CIFS, FUSE)
    "ENXIO", "ENODEV", "ENOMEDIUM",  # the disk went away
    "EREMOTEIO",  # a remote error: a file server's disk, a USB drive
    "EBADMSG", "EUCLEAN",  # ext4, XFS or Btrfs found its own structures damaged
    "ESTALE",  # the server no longer knows the open file: it restarted, or another one took over
    "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET",  # the server does not answer
    "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ENOTCONN", "ESHUTDOWN",  # a connection broke (Lustre, FUSE, CIFS)
    "ENOLINK", "ECOMM", "EPROTO",  # the same, on other network file systems
)  # fmt: skip
_FAILURES = frozenset(getattr(errno, name) for name in _NAMES if hasattr(errno, name))  # not every system has all

# Temporary files: .tmp-<place>-<process id>-<its start time>-<random>, so that only files of ended processes are
# removed. The place is a digest of host, boot and process name space, within which a process id can be looked up.
# Names without an owner come from earlier versions.
TEMPORARY = re.compile(r"\.tmp-(?:([0-9a-f]{8})-(\d+)-(\d*)-)?[0-9a-f]{16}")
# An owner that cannot be looked up, as on another host, counts as ended when its file did not change for this long.
SILENT_SECONDS = 3600

# First bytes -> the kind, and the command that unpacks {file} into {folder}.
_ARCHIVES = {
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x {file} -o{folder}"),
    b"Rar!\x1a\x07": ("a rar archive", "unrar x {file} {folder}/"),
}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip -k {file}"),
    b"BZh": ("bzip2", "bunzip2 -k {file}"),
    b"\xfd7zXZ\x00": ("xz", "unxz -k {file}"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd {file}"),
}
_TAR, _UNTAR = "a tar archive", "mkdir -p {folder} && tar -xf {file} -C {folder}"
_COMPRESSED_NAMES = (".gz", ".bz2", ".xz", ".zst")
_TAR_NAMES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")  # and .tar.gz and so on
_ENDINGS = (*_COMPRESSED_NAMES, ".7z", ".rar", *_TAR_NAMES)
_DAMAGED = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


# Writing


@contextmanager
def atomic_write(path: str | os.PathLike, *, text: bool = False) -> Iterator[IO]:
    """Open a temporary file that takes the place of `path` when the block ends without an error.

    The temporary file is in the same folder (a rename is atomic only within one file system), is flushed to the disk
    before the rename, and is removed when the block raises. Until then `path` keeps its old content, if any.

    text: True opens for str (UTF-8, "\\n" line endings on every system), False for bytes.
    Raises OSError as `open` would, for example FileNotFoundError when the folder is missing.
    """
    # A symbolic link stays a link: its target is replaced.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file name")
    # Not tempfile: its files are private to the user (0600), but other members of a group read the files of a run.
    temporary = temporary_beside(target)
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") if text else open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system supports that."""
    if os.name != "posix":  # LIMIT: other systems cannot open a folder: a rename may be lost, never half done.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some network file systems refuse to sync a folder; the file itself is complete and in place.
    finally:
        os.close(descriptor)


def temporary_beside(path: str | os.PathLike) -> Path:
    """Return a new name in the folder of `path`: a rename is atomic only within one file system."""
    return Path(path).with_name(f".tmp-{_owner(os.getpid())}-{secrets.token_hex(8)}")


def remove_abandoned(folder: str | os.PathLike) -> None:
    """Remove the temporary files in a folder whose writers have ended. Raises OSError."""
    for path in Path(folder).iterdir():
        found = TEMPORARY.fullmatch(path.name)
        with suppress(FileNotFoundError):  # its writer, or another process that cleans up, was faster
            if found and path.is_file() and _is_abandoned(path, found):
                path.unlink()


@cache  # a forked process has another id
def _owner(pid: int) -> str:
    return f"{_place()}-{pid}-{start_of_process(pid) or ''}"


@cache
def _place() -> str:
    return hashlib.sha256("/".join(place_of_process()).encode(errors="backslashreplace")).hexdigest()[:8]


def _is_abandoned(path: Path, found: re.Match[str]) -> bool:
    place, pid, start = found.groups()
    if place == _place() and os.name == "posix":
        # LIMIT: where start times are unknown, a later process with the same id is taken for the writer.
        return start_of_process(int(pid)) != start
    probe = temporary_beside(path)  # read the clock of the file system, which may be another host's
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime - path.stat().st_mtime > SILENT_SECONDS
    finally:
        probe.unlink(missing_ok=True)


def place_of_process() -> tuple[str, str, str]:
    """Return host, boot id and process name space ("" when unknown), which identify where this process runs."""
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot, namespace


def start_of_process(pid: int) -> str | None:
    """Return the start time of a living process, "" when unknown; None when there is no such process."""
    if os.path.exists("/proc/self/stat"):
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # proc(5): the name in parentheses may contain anything; after it come the state (3rd field) and more
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


# Reading


class DiskFailure(Exception):
    """A disk or network file system kept failing; the message is one line.

    That line is its only argument, so that it survives pickling in a worker process.
    """


def find_failure(error: BaseException) -> OSError | DiskFailure | None:
    """Return the disk or network failure that an error is or was raised from; None when there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, DiskFailure) or (isinstance(error, OSError) and error.errno in _FAILURES):
            return error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def describe_failure(error: OSError | DiskFailure) -> str:
    """Return one line: what failed, and that the disk or network is the cause."""
    if isinstance(error, DiskFailure):
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    return " ".join(f"{where}{error.strerror}: a disk or network failure".split())


def retrying(read: Callable[[], T], what: str | os.PathLike, *, reset: Callable[[], None] = lambda: None) -> T:
    """Return what `read` returns; retry after increasing waits while the disk or the network fails.

    read:   opens its file each time: a stale handle stays stale
    what:   name of what is read, for the message
    reset:  called before each retry, to close what is still open

    Raises DiskFailure after the last attempt, and every other error of `read` at once.
    """
    waits = list(RETRY_WAITS)
    while True:
        try:
            return read()
        except Exception as error:  # any type: libraries and our own messages wrap the system's error
            failure = find_failure(error)
            if failure is None:
                raise
            if error is failure and isinstance(error, DiskFailure):  # was retried already
                raise
            if isinstance(failure, DiskFailure):
                raise DiskFailure(str(failure)) from error
            if not waits:
                tried = f"tried {len(RETRY_WAITS) + 1} times in {sum(RETRY_WAITS):.3g} s"
                text = f"{what} cannot be read ({failure.strerror}, {tried}): a disk or network failure"
                raise DiskFailure(" ".join(text.split())) from error
        time.sleep(waits.pop(0))
        reset()


def iterate_retrying(start: Callable[[], Iterator[T]], what: str | os.PathLike) -> Iterator[T]:
    """Yield what `start` yields; when the disk or the network fails, start again and skip what was already yielded.

    start:  opens its file, and yields the same items each time

    Raises as `retrying` does; the waits start over with each item.
    """
    done, end = 0, object()
    items = start()

    def restart() -> None:
        nonlocal items
        items = islice(start(), done, None)

    while True:
        item = retrying(lambda: next(items, end), what, reset=restart)
        if item is end:
            return
        done += 1
        yield item


def sha256_of(path: str | os.PathLike) -> str:
    """Return the sha256 of a file's content. Raises OSError, and DiskFailure."""
    def read() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retrying(read, path)


# Archives


def packed_names(names: list[str]) -> list[str]:
    """Return those file names that are archives or compressed files, including zips."""
    return [name for name in names if name.lower().endswith((".zip", *_ENDINGS))]


def unpack_advice(path: str | os.PathLike) -> str | None:
    """Return what a packed file is and the command that unpacks it; None for other files, including zips.

    The text follows the name of the file: "is a tar archive; unpack it: mkdir ...".
    """
    kind, command = _recognize(Path(path)) or (None, "")
    if kind is None:
        return None
    file, folder = shlex.quote(str(path)), shlex.quote(str(Path(path).parent / _stem(Path(path).name)))
    return f"is {kind}; unpack it: {command.format(file=file, folder=folder)}"


def _recognize(path: Path) -> tuple[str, str] | None:
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:  # raised again when the content is read
        return None
    for magic, archive in _ARCHIVES.items():
        if start.startswith(magic):
            return archive
    packed = next((entry for magic, entry in _COMPRESSED.items() if start.startswith(magic)), None)
    name = path.name.lower()
    for ending in _COMPRESSED_NAMES:
        name = name.removesuffix(ending)
    has_tar_name = name.endswith(_TAR_NAMES)
    if start[257:262] == b"ustar" or (has_tar_name and packed is not None) or (packed is not None and _is_tar(path)):
        return _TAR, _UNTAR
    return None if packed is None else (f"a file compressed by {packed[0]}", packed[1])


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path) as archive:
            return archive.next() is not None  # reads only the first header; zeros are an empty archive
    except _DAMAGED:
        return False


def _stem(name: str) -> str:
    """Return the name of a folder for the content: "images" for "images.tar.gz"."""
    stem = name
    for _ in range(2):
        root, ending = os.path.splitext(stem)
        stem = root if root and ending.lower() in _ENDINGS else stem
    return stem if stem != name else f"{name}-unpacked"
