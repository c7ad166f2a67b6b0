"""Do long work in pieces, shared by the processes of a run; after an interruption the same command continues.

`complete` computes the missing pieces and assembles all of them. Finished pieces are kept in a folder beside the
result, under the name of the result with ".parts" appended:

    settings.json       settings that determine the pieces, and the operators that compute them; written first
    piece-000000.npz    named arrays; each piece is written completely or not at all
    state-000001.pt     of an unfinished piece, if the work saves states
    lock                while a process works on it
"""

import json
import os
import re
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.files import TEMPORARY, DiskFailure, atomic_write, retrying
from dnnlib.process_lock import LockHeld, ProcessLock
from torch_utils.device import OutOfMemory, ran_out_of_memory
from torch_utils.distributed import Processes, broadcast_object
from torch_utils.ops.compiled import auto_means_as_before

SETTINGS, LOCK = "settings.json", "lock"
OPERATORS = "operators"  # in settings.json, and in the "source" of a finished set

_OURS = re.compile(r"piece-(\d{6,})\.np[yz]|state-\d{6,}\.pt|" + TEMPORARY.pattern)  # npy: from version 1
_FORMAT = "stylegan2-ada-pieces"
_POLL_SECONDS = 0.2


def complete(pieces: "Pieces", sizes: Sequence[int], processes: Processes, *, make: Callable[[list[int]], None],
             assemble: Callable[[], None], unit: str = "images") -> None:
    """Compute the missing pieces, then assemble all of them; all processes of a run call this.

    pieces:    in a folder that the processes share
    sizes:     number of images, or of another `unit`, in each piece
    make:      computes and saves the pieces with the given numbers, this process's share
    assemble:  called by the main process when all pieces are finished; the pieces are removed after it

    Processes wait for each other as long as needed; those that die are detected (see torch_utils.launch).
    Raises UserError when another program works on it, or the folder has pieces of other work.
    """
    is_main = processes.rank == 0
    with pieces.held() if is_main else nullcontext():
        with (_hint(pieces, sizes, unit, KeyboardInterrupt, DiskFailure) if is_main else nullcontext(),
              _memory_advice(pieces, sizes, unit), _shared(pieces, sizes, unit, processes) as missing):
            make(missing[processes.rank::processes.count])
            # Not a barrier, which would time out while one process is still busy.
            if is_main:
                _wait_until(lambda: len(pieces.finished()) == len(sizes))
                # The disk may become full, since all data exists twice now.
                with _hint(pieces, sizes, unit, UserError, OSError):
                    assemble()
        if is_main:
            pieces.remove()
    if not is_main:
        _wait_until(lambda: not pieces.is_there())


@contextmanager
def _shared(pieces: "Pieces", sizes: Sequence[int], unit: str, processes: Processes) -> Iterator[list[int]]:
    """Yield the missing pieces, all to be computed with the operators of the first; the main process decides."""
    work, device = f"the work in {pieces.folder}", processes.device.type
    if processes.rank == 0:
        finished = set(pieces.finished())
        if finished:
            print(f"{pieces.folder}: {count_images(pieces, sizes)} of {sum(sizes)} {unit} are already done; continuing",
                  file=sys.stderr)
        missing = [number for number in range(len(sizes)) if number not in finished]
        with auto_means_as_before(pieces.operators, device, work) as operators:
            with pieces.writing():
                pieces.keep_operators(operators)
            broadcast_object((missing, operators))
            yield missing
    else:
        missing, operators = broadcast_object(None)
        with auto_means_as_before(operators, device, work):
            yield missing


def _wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(_POLL_SECONDS)


def count_images(pieces: "Pieces", sizes: Sequence[int]) -> int:
    """Return the number of images, or of another unit, in finished pieces."""
    return sum(sizes[number] for number in pieces.finished())


@contextmanager
def _hint(pieces: "Pieces", sizes: Sequence[int], unit: str, *endings: type[BaseException]) -> Iterator[None]:
    """Print, when the program is stopped, that finished work is kept. endings: exceptions that stop it"""
    try:
        yield
    except endings:
        if kept := _describe_kept(pieces, sizes, unit):
            print(f"{kept}; the same command continues", file=sys.stderr)
        raise


@contextmanager
def _memory_advice(pieces: "Pieces", sizes: Sequence[int], unit: str) -> Iterator[None]:
    """Raise advice when memory runs out after a part is done: another batch size cannot continue from these pieces."""
    try:
        yield
    except Exception as error:
        kept = ran_out_of_memory(error) and pieces.is_there() and _describe_kept(pieces, sizes, unit)
        if not kept:
            raise
        raise OutOfMemory(f"out of memory; {kept}: the same command continues once memory is free; to use a "
                          "smaller --batch, remove that folder and start from scratch") from error


def _describe_kept(pieces: "Pieces", sizes: Sequence[int], unit: str) -> str | None:
    """Return a text about how much is done; None for nothing."""
    if done := count_images(pieces, sizes):
        return f"{done} of {sum(sizes)} {unit} are kept in {pieces.folder}"
    return f"the work so far is saved in {pieces.folder}" if pieces.is_begun() else None


class Pieces:
    """The pieces of one result. Only one process opens and removes the folder; all of a run may add to it.

    dest:      path of the result
    settings:  JSON; pieces with other settings are refused

    operators: the implementation that computes the pieces (torch_utils.ops.compiled); None when nothing was computed
               yet, or by a version that did not record it. Set in `held`.
    """

    operators: str | None = None

    def __init__(self, dest: str | os.PathLike, settings: Mapping[str, Any]):
        self.dest = Path(dest)
        self.folder = self.dest.with_name(self.dest.name + ".parts")
        self._settings = {"format": _FORMAT, "version": 2, **settings}
        self._lock = ProcessLock(self.folder / LOCK)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create or reuse the folder, and keep other processes out; an empty one is removed at the end.

        Raises UserError when another process works on it, or it contains pieces of other work.
        """
        self._acquire()
        try:
            self._enter()
            try:
                yield
            finally:
                if not self.is_begun():
                    self.remove()
        finally:
            self._lock.release()
            with suppress(OSError):  # it stays if pieces are left in it
                self.folder.rmdir()

    def finished(self) -> list[int]:
        """Return the numbers of the finished pieces."""
        matches = (_OURS.fullmatch(name) for name in os.listdir(self.folder))
        return sorted(int(match[1]) for match in matches if match and match[1])

    def is_there(self) -> bool:
        """Return whether the work is in progress: from the start of `held` to `remove`."""
        return (self.folder / SETTINGS).exists()

    def is_begun(self) -> bool:
        """Return whether there is something to lose: a piece, or the state of one."""
        return any(name.startswith(("piece-", "state-")) and _OURS.fullmatch(name) for name in os.listdir(self.folder))

    def keep_operators(self, operators: str) -> None:
        """Record the implementation that computes all pieces, before the first one."""
        if operators != self.operators:
            self.operators = operators
            self._write_settings()

    def save(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a piece and remove its state, if any. Raises UserError when it cannot be written."""
        with self.writing(), atomic_write(self._path(number)) as file:
            np.savez(file, **arrays)
        self.state_path(number).unlink(missing_ok=True)

    def load(self, number: int) -> dict[str, np.ndarray]:
        """Return the arrays of a piece. Raises UserError when the file is damaged."""
        path = self._path(number)

        def read() -> dict[str, np.ndarray]:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)

        try:
            return retrying(read, path)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} cannot be read ({error}); remove it, and run the same command again") from error

    def state_path(self, number: int) -> Path:
        """Return the path for the state of an unfinished piece."""
        return self.folder / f"state-{number:06d}.pt"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError of writing to the folder into UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.folder} is not writable ({error.strerror or error}); finished pieces are kept: "
                            "fix this, and run the same command again") from error

    def remove(self) -> None:
        """Remove all pieces; the folder is removed at the end of `held`."""
        for name in os.listdir(self.folder):
            if _OURS.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)  # another process of the run may be ending
        (self.folder / SETTINGS).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"piece-{number:06d}.npz"

    def _acquire(self) -> None:
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock.acquire()
        except FileExistsError as error:
            raise UserError(f"{self.folder} is not a folder, but finished pieces go there; rename it") from error
        except LockHeld as error:
            raise UserError(f"{self.dest} is being made by {error}; wait for it, or choose another name") from error
        except OSError as error:
            with suppress(OSError):  # it stays if it is not empty
                self.folder.rmdir()
            raise UserError(f"{self.folder}, where finished pieces go, is not writable ({error.strerror}); choose a "
                            "writable folder") from error

    def _enter(self) -> None:
        """Check the content of the folder; keep only the current settings and pieces that match them."""
        found = self._read_settings()
        if found is None:
            foreign = sorted(name for name in os.listdir(self.folder)
                             if name.split(".")[0] != LOCK and not _OURS.fullmatch(name))  # lock.break.*: a takeover
            if foreign:
                raise UserError(f"{self.folder}, where finished pieces go, has other files ({foreign[0]}); rename it")
        elif {**found, OPERATORS: None} == {**self._settings, OPERATORS: None}:
            self.operators = found.get(OPERATORS) if self.is_begun() else None
            return
        elif self.is_begun():
            different = differences(found, self._settings) or "it was started by another version of this program"
            raise UserError(f"{self.folder} contains unfinished work with other settings ({different}); run its "
                            "command again to complete it, or remove the folder")
        self.remove()  # pieces of unknown origin
        self.operators = None
        self._write_settings()

    def _write_settings(self) -> None:
        known = {} if self.operators is None else {OPERATORS: self.operators}
        with atomic_write(self.folder / SETTINGS, text=True) as file:
            file.write(json.dumps({**self._settings, **known}, indent=1, allow_nan=False) + "\n")

    def _read_settings(self) -> dict[str, Any] | None:
        try:
            found = json.loads(retrying(lambda: (self.folder / SETTINGS).read_text(encoding="utf-8"),
                                        self.folder / SETTINGS))
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise UserError(f"{self.folder / SETTINGS} was not written by this program; rename the folder")
        return found


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the settings in which existing work differs from what is wanted, "" for none; operators do not count."""
    names = [name for name in {**wanted, **found} if name != OPERATORS and found.get(name) != wanted.get(name)]
    return "; ".join(f"{name} is {json.dumps(found.get(name))} there and {json.dumps(wanted.get(name))} here"
                     for name in names[:2])
