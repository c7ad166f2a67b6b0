"""Save the state of a program in files whose damage is detected.

A checkpoint is the zip archive that torch.save writes, so torch.load(path, weights_only=True) opens it; the archive's
comment, which other readers ignore, is a sha256 of everything before it:

    PK ... | length of the comment, 2 bytes | checkpoint-1 sha256 <64 hexadecimal digits>

The digest is that of the archive without a comment: the two bytes of the length count as zeros.
"""

import hashlib
import os
import pickle
import struct
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dnnlib.files import DiskFailure, atomic_write, retrying

_NO_COMMENT = b"\0\0"
_MARK = b"checkpoint-1 sha256 "
_TAIL_BYTES = len(_NO_COMMENT) + len(_MARK) + 64
_CHUNK_BYTES = 1 << 20
_MOST_BITS = 64  # torch's weights-only reader fails on integers of more than 255 bytes; 64 bits are enough for seeds


class DamagedCheckpoint(ValueError):
    """The file differs from what was written; the message is one line."""


def write_checkpoint(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write a state completely or not at all; `path` keeps its old content until the new one is on the disk.

    state: nested dicts with string keys, lists, tensors, numbers, strings and None. Tensors are written one at a time,
           without a copy of the whole state in memory; those on other devices are copied to the CPU first.

    Raises TypeError naming the first entry of another type, before a file is created, and OSError when the file
    cannot be written, for example because the disk is full.
    """
    if type(state) is not dict:
        raise TypeError(f"the state is a {type(state).__name__}; expected a dict")
    content = _plain(state, "state")
    with atomic_write(path) as file:
        sink = _DigestSink(file)
        torch.save(content, sink)
        sink.finish()
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        file.write(_tail(sink.digest.hexdigest()))


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Return the state that `write_checkpoint` wrote, tensors on the CPU; no code in the file is run.

    Raises FileNotFoundError, DamagedCheckpoint when a byte was changed, removed or added, and DiskFailure: a state that
    the disk cannot read now is not damaged.
    """
    return retrying(lambda: _read(path), path)


def _read(path: str | os.PathLike) -> dict[str, Any]:
    with open(path, "rb") as file:
        _check_digest(path, file)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # a valid checksum around foreign content
            raise DamagedCheckpoint(f"{path} contains more than tensors, numbers and strings; not opened") from error


class CheckpointPair:
    """The newest state of a run and the one before it: training-state.pt and training-state.prev.pt.

    One process at a time may save; any number may load while none saves. A process that is killed while saving may
    leave training-state.next.pt, a complete state that is about to become the newest.
    """

    def __init__(self, folder: str | os.PathLike):
        self.newest = Path(folder) / "training-state.pt"
        self.previous = self.newest.with_name("training-state.prev.pt")
        self._incoming = self.newest.with_name("training-state.next.pt")
        self._damaged: set[Path] = set()  # damaged files that `load` found, not worth keeping

    def save(self, state: dict[str, Any]) -> None:
        """Make `state` the newest, and the newest the previous one.

        The new state is complete on the disk, under a name that `load` knows, before the others are renamed. So neither
        a kill nor a power cut between the two renames loses it, and the renames need no sync of their own.
        Raises what `write_checkpoint` raises, with both states unchanged.
        """
        write_checkpoint(self._incoming, state)
        if self.newest not in self._damaged:
            with suppress(FileNotFoundError):
                os.replace(self.newest, self.previous)
        os.replace(self._incoming, self.newest)
        self._damaged.clear()

    def load(self) -> tuple[dict[str, Any], str | None] | None:
        """Return the newest undamaged state and a line about skipped ones, or None for that; None without any state.

        Raises DamagedCheckpoint when all existing states are damaged, and DiskFailure when the newest one cannot be
        read now: to continue from an older one would lose the training since then.
        """
        troubles: list[str] = []
        for path in (self._incoming, self.newest, self.previous):
            try:
                state = read_checkpoint(path)
            except FileNotFoundError:
                continue
            except DiskFailure as error:
                if path == self.previous or not self.previous.exists():
                    raise
                raise DiskFailure(f"{error}; if it stays unreadable, move that file away to continue the run from "
                                  f"{self.previous.name}") from error
            except DamagedCheckpoint as error:
                troubles.append(str(error))
                self._damaged.add(path)
                continue
            if path == self.previous and not troubles:
                troubles.append(f"{self.newest} is missing")
            return state, f"{'; '.join(troubles)}; {path.name} is used instead" if troubles else None
        if troubles:
            raise DamagedCheckpoint(f"{'; '.join(troubles)}; expected one intact state: "
                                    "restore one from a backup, or start from scratch")
        return None


class _DigestSink:
    """The file object for torch.save: forwards all data to a file and a checksum.

    An error is kept until `finish`: raised into torch's writer it would be replaced by another one, without its cause.
    """

    def __init__(self, file: IO[bytes]):
        self.digest = hashlib.sha256()
        self._file = file
        self._error: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        if self._error is None:
            try:
                self._file.write(data)
                self.digest.update(data)
            except BaseException as error:  # Ctrl-C too: it can arrive at any time
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Do nothing: the file is flushed once, at the end."""

    def finish(self) -> None:
        """Raise the error of `write`, if any."""
        if self._error is not None:
            raise self._error


def _plain(value: Any, where: str) -> Any:
    """Return `value` as it is written; raise TypeError unless torch's weights-only reader can load it."""
    kind = type(value)  # Not isinstance: numpy's float64 is a float, an enum may be an int; neither can be loaded.
    if kind is dict:
        for key in value:
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}; expected string keys")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if kind is list:
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if kind is Tensor and value.layout == torch.strided and not (value.is_meta or value.is_quantized):
        return _compact(value)
    if kind is int and value.bit_length() > _MOST_BITS:
        raise TypeError(f"{where} is an integer of {value.bit_length()} bits; expected at most {_MOST_BITS}")
    if value is None or kind in (bool, int, float, str):
        return value
    described = f"a {value.device.type} tensor, {value.layout}" if kind is Tensor else f"a {kind.__name__}"
    raise TypeError(f"{where} is {described}; expected a plain tensor, number, string, list or dict")


def _compact(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, without a gradient, in a storage of its own.

    torch.save writes whole storages; only tensors that are part of one are copied.
    """
    tensor = tensor.detach().cpu()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _tail(digest: str) -> bytes:
    """Return what replaces the archive's last two bytes, the length of an empty comment."""
    comment = _MARK + digest.encode("ascii")
    return struct.pack("<H", len(comment)) + comment


def _check_digest(path: str | os.PathLike, file: IO[bytes]) -> None:
    """Raise DamagedCheckpoint unless the file ends with the checksum of everything before it."""
    left = os.fstat(file.fileno()).st_size - _TAIL_BYTES
    digest = hashlib.sha256()
    while left > 0:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if not chunk:
            break
        digest.update(chunk)
        left -= len(chunk)
    digest.update(_NO_COMMENT)
    tail = file.read()
    if tail == _tail(digest.hexdigest()):
        return
    if not tail.startswith(_MARK, len(_NO_COMMENT)):
        raise DamagedCheckpoint(f"{path} is damaged: it does not end with a checksum")
    raise DamagedCheckpoint(f"{path} is damaged: its content does not match its checksum")
