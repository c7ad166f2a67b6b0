"""Append to a file piece by piece, so that a full disk leaves no half piece and loses none."""

import os


class AppendFile:
    """A file that grows at its end. It is opened for each piece, and made by the first.

    durable: wait until a piece is on the disk, so that it outlives a power cut
    """

    def __init__(self, path: str | os.PathLike, *, durable: bool):
        self.path = path
        self._durable = durable
        self._waiting = b""

    def retry(self) -> None:
        """Write the pieces that could not be written before, if there are any. Raises OSError as `append` does."""
        if self._waiting:
            self.append(b"")

    def append(self, piece: bytes) -> None:
        """Write `piece` at the end, after pieces that could not be written before.

        Raises OSError when that is not possible; the file is then as it was, and the pieces wait for the next call.
        LIMIT: pieces that wait are lost when the process ends.
        """
        self._waiting += piece
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, self._waiting)
                if self._durable:
                    os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        self._waiting = b""


def _write_all(descriptor: int, data: bytes) -> None:
    """Write everything; the system may take less at a time, as it does just before the disk is full."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]
