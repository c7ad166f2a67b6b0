"""Tell a failing disk or network file system from a user's mistake, and try again before giving up.

A disk that cannot read a sector, a file server that restarts or a network that is away for a moment are nobody's
mistake. `retrying` repeats what reads, and opens its file, until it works; what still fails is a DiskFailure, which is
no OSError, so that code which turns an OSError into advice for the user lets it pass. Bad content is never tried again:
a checksum that does not agree, a cut-off zip and a picture that cannot be decoded are the file's, whatever the disk.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

EXIT_TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, which may be given again

# Seconds between attempts, 31.5 in all: a file server that fails over takes about so long. Tests shorten them.
RETRY_WAITS = (0.5, 1, 2, 4, 8, 16)

# Not among them: what the user or an administrator has to put right first, such as EACCES, ENOENT, ENOSPC or EROFS.
_NAMES = (
    "EIO",  # a sector that cannot be read; a network file system that gave up (NFS mounted "soft", CIFS, FUSE)
    "ENXIO", "ENODEV", "ENOMEDIUM",  # the disk went away
    "EREMOTEIO",  # an error on the other side: a file server's disk, a drive behind USB
    "EBADMSG", "EUCLEAN",  # ext4, XFS or Btrfs found its own structures damaged
    "ESTALE",  # the server no longer knows the open file: it restarted, or another one took over
    "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET",  # the server does not answer
    "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ENOTCONN", "ESHUTDOWN",  # a connection broke (Lustre, FUSE, CIFS)
    "ENOLINK", "ECOMM", "EPROTO",  # the same, in the words of other network file systems
)  # fmt: skip
_FAILURES = frozenset(getattr(errno, name) for name in _NAMES if hasattr(errno, name))  # not every system has all


class DiskFailure(Exception):
    """A disk or network file system kept failing; the message is one line.

    It is made from that line alone, so that it comes whole out of a worker process.
    """


def find_failure(error: BaseException) -> OSError | DiskFailure | None:
    """Return the failure of a disk or network that an error is, or was raised from; None where there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, DiskFailure) or (isinstance(error, OSError) and error.errno in _FAILURES):
            return error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def describe_failure(error: OSError | DiskFailure) -> str:
    """Return one line: what failed, and that it is not the user's mistake."""
    if isinstance(error, DiskFailure):
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    return " ".join(f"{where}{error.strerror}: a disk or the network fails".split())


def retrying(read: Callable[[], T], what: str | os.PathLike, *, reset: Callable[[], None] = lambda: None) -> T:
    """Return what `read` returns; repeat it after growing waits while the disk or the network fails.

    read:   opens its file anew each time: a stale handle stays stale
    what:   is read, for the message
    reset:  is called before each repetition, to close what is still open

    Raises DiskFailure in the end, and every other error of `read` at once.
    """
    waits = list(RETRY_WAITS)
    while True:
        try:
            return read()
        except Exception as error:  # any: libraries and our own messages wrap the system's error
            failure = find_failure(error)
            if failure is None:
                raise
            if error is failure and isinstance(error, DiskFailure):  # was repeated already
                raise
            if isinstance(failure, DiskFailure):
                raise DiskFailure(str(failure)) from error
            if not waits:
                raise _give_up(what, failure) from error
        time.sleep(waits.pop(0))
        reset()


def iterate_retrying(start: Callable[[], Iterator[T]], what: str | os.PathLike) -> Iterator[T]:
    """Yield what `start` yields; where the disk or the network fails on the way, start again and skip what was yielded.

    start:  opens its file, and yields the same items each time

    Raises as `retrying` does; the waits begin anew with each item.
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


def _give_up(what: str | os.PathLike, failure: OSError) -> DiskFailure:
    tried = f"tried {len(RETRY_WAITS) + 1} times in {sum(RETRY_WAITS):.3g} s"
    text = f"{what} cannot be read ({failure.strerror}, {tried}): a disk or the network fails"
    return DiskFailure(" ".join(text.split()))
