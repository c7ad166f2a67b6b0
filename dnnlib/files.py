"""Write files so that a reader never sees half of one."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dnnlib.disk_failures import retrying
from dnnlib.temporary_files import temporary_beside


@contextmanager
def atomic_write(path: str | os.PathLike, *, text: bool = False) -> Iterator[IO]:
    """Open a temporary file that takes the place of `path` when the block ends without an error.

    The temporary file lies in the same folder (a rename is atomic only within one file system), is flushed to the disk
    before the rename, and is removed when the block raises. Until then `path` keeps its old content, if it had any.

    text: True opens for str (UTF-8, "\\n" line ends on every system), False for bytes.
    Raises OSError as `open` would, for example FileNotFoundError when the folder is missing.
    """
    # A symbolic link stays a link: what it points to is replaced.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file name to write to")
    # Not tempfile: its files are private to the user (0600), and others in a group read what a run writes.
    temporary = temporary_beside(target)
    try:
        with _create(temporary, text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def sha256_of(path: str | os.PathLike) -> str:
    """Return the sha256 of a file's content. Raises OSError, and DiskFailure."""
    def read() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retrying(read, path)


def _create(path: Path, text: bool) -> IO:
    """Open a file that must not exist yet."""
    return open(path, "x", encoding="utf-8", newline="\n") if text else open(path, "xb")


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if os.name != "posix":  # LIMIT: other systems cannot open a folder; there the rename may be lost, never half done.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # Some network file systems refuse to sync a folder; the file itself is complete and in place.
    finally:
        os.close(descriptor)
