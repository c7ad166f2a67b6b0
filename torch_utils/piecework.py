"""Do long work in pieces, shared by the processes of a run; the same command continues after any end.

`complete` makes the pieces that are missing and puts all together. Finished ones are kept in a folder; it lies beside
what is being made, under its name with ".parts" behind it:

    settings.json       what the pieces follow from, and the operators that compute them; written before the first
    piece-000000.npz    named arrays; each piece appears whole or not at all
    state-000001.pt     of a piece that is not finished, where the work keeps states
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
OPERATORS = "operators"  # in settings.json, and in the source of a finished set

_OURS = re.compile(r"piece-(\d{6,})\.np[yz]|state-\d{6,}\.pt|" + TEMPORARY.pattern)  # npy: of version 1
_FORMAT = "stylegan2-ada-pieces"
_POLL_SECONDS = 0.2


def complete(pieces: "Pieces", sizes: Sequence[int], processes: Processes, *, make: Callable[[list[int]], None],
             assemble: Callable[[], None], unit: str = "images") -> None:
    """Make the pieces that are missing, then put all together; all processes of a run call this.

    pieces:    in a folder that the processes share
    sizes:     images of each piece, or what else `unit` says
    make:      saves pieces, given by their numbers: those that are this process's
    assemble:  is called by the main process when all pieces are there, which are removed after it

    Processes wait for each other as long as it takes; those that die are noticed (see torch_utils.launch).
    Raises UserError when another program works on it, or pieces of other work lie there.
    """
    is_main = processes.rank == 0
    with pieces.held() if is_main else nullcontext():
        with (_hint(pieces, sizes, unit, KeyboardInterrupt, DiskFailure) if is_main else nullcontext(),
              _memory_advice(pieces, sizes, unit), _shared(pieces, sizes, unit, processes) as missing):
            make(missing[processes.rank::processes.count])
            # Not by a barrier, which would give up while one process is still busy for long.
            if is_main:
                _wait_until(lambda: len(pieces.finished()) == len(sizes))
                # A full disk is to be expected, where all is there twice.
                with _hint(pieces, sizes, unit, UserError, OSError):
                    assemble()
        if is_main:
            pieces.remove()
    if not is_main:
        _wait_until(lambda: not pieces.is_there())


@contextmanager
def _shared(pieces: "Pieces", sizes: Sequence[int], unit: str, processes: Processes) -> Iterator[list[int]]:
    """Yield the pieces that are to be made, all with the operators of the first; the main process decides for all."""
    work, device = f"the work in {pieces.folder}", processes.device.type
    if processes.rank == 0:
        finished = set(pieces.finished())
        if finished:
            print(f"{pieces.folder}: {count_images(pieces, sizes)} of {sum(sizes)} {unit} are there already; going on",
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
    """Return how much is in finished pieces."""
    return sum(sizes[number] for number in pieces.finished())


@contextmanager
def _hint(pieces: "Pieces", sizes: Sequence[int], unit: str, *endings: type[BaseException]) -> Iterator[None]:
    """Print, when the program is stopped, that nothing is lost. endings: what stops it"""
    try:
        yield
    except endings:
        if kept := _describe_kept(pieces, sizes, unit):
            print(f"{kept}; the same command continues", file=sys.stderr)
        raise


@contextmanager
def _memory_advice(pieces: "Pieces", sizes: Sequence[int], unit: str) -> Iterator[None]:
    """Raise what to do when memory runs out after a part was done: pieces of another size do not go on with it."""
    try:
        yield
    except Exception as error:
        kept = ran_out_of_memory(error) and pieces.is_there() and _describe_kept(pieces, sizes, unit)
        if not kept:
            raise
        raise OutOfMemory(f"out of memory; {kept}: the same command continues once memory is free; with a smaller "
                          "--batch it begins anew, after that folder is removed") from error


def _describe_kept(pieces: "Pieces", sizes: Sequence[int], unit: str) -> str | None:
    """Return how much is there; None where nothing is."""
    if done := count_images(pieces, sizes):
        return f"{done} of {sum(sizes)} {unit} are kept in {pieces.folder}"
    return f"the work so far is kept in {pieces.folder}" if pieces.is_begun() else None


class Pieces:
    """The pieces of one work. Only one process opens and removes the folder; all of a run may add to it.

    dest:      what is being made
    settings:  JSON; pieces of other settings are refused

    operators: the implementation that the pieces are computed with (torch_utils.ops.compiled); None where there is
               nothing that was, or it was computed by a version that did not say. Known in `held`.
    """

    operators: str | None = None

    def __init__(self, dest: str | os.PathLike, settings: Mapping[str, Any]):
        self.dest = Path(dest)
        self.folder = self.dest.with_name(self.dest.name + ".parts")
        self._settings = {"format": _FORMAT, "version": 2, **settings}
        self._lock = ProcessLock(self.folder / LOCK)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder or enter it, and keep other processes out; an empty one is removed at the end.

        Raises UserError when another process works on it, or it holds pieces of another work.
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
            with suppress(OSError):  # it stays where pieces are left in it
                self.folder.rmdir()

    def finished(self) -> list[int]:
        """Return the numbers of the pieces that are there."""
        matches = (_OURS.fullmatch(name) for name in os.listdir(self.folder))
        return sorted(int(match[1]) for match in matches if match and match[1])

    def is_there(self) -> bool:
        """Tell whether the work is going on: from the first moment of `held` to `remove`."""
        return (self.folder / SETTINGS).exists()

    def is_begun(self) -> bool:
        """Tell whether there is something that would be missed: a piece, or the state of one."""
        return any(name.startswith(("piece-", "state-")) and _OURS.fullmatch(name) for name in os.listdir(self.folder))

    def keep_operators(self, operators: str) -> None:
        """Note the implementation that all pieces are computed with, before the first one."""
        if operators != self.operators:
            self.operators = operators
            self._write_settings()

    def save(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a piece; its state, if there is one, goes. Raises UserError when it cannot be written."""
        with self.writing(), atomic_write(self._path(number)) as file:
            np.savez(file, **arrays)
        self.state_path(number).unlink(missing_ok=True)

    def load(self, number: int) -> dict[str, np.ndarray]:
        """Return the arrays of a piece. Raises UserError when the file was damaged since."""
        path = self._path(number)

        def read() -> dict[str, np.ndarray]:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)

        try:
            return retrying(read, path)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} cannot be read ({error}); remove it, and give the same command again") from error

    def state_path(self, number: int) -> Path:
        """Return where the state of an unfinished piece is kept."""
        return self.folder / f"state-{number:06d}.pt"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a failure to write into the folder into UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written to ({error.strerror or error}); the pieces there are "
                            "kept: put that right, and give the same command again") from error

    def remove(self) -> None:
        """Remove all pieces; the folder goes when it is given back."""
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
            raise UserError(f"{self.folder} is no folder; it is where finished pieces go: rename it") from error
        except LockHeld as error:
            raise UserError(f"{self.dest} is being made by {error}; wait for it, or choose another name") from error
        except OSError as error:
            with suppress(OSError):  # it stays where something is in it
                self.folder.rmdir()
            raise UserError(f"{self.folder}, where finished pieces go, is not writable ({error.strerror}); choose a "
                            "writable folder") from error

    def _enter(self) -> None:
        """Check what lies in the folder, and leave in it the settings and pieces that belong to them."""
        found = self._read_settings()
        if found is None:
            foreign = sorted(name for name in os.listdir(self.folder)
                             if name.split(".")[0] != LOCK and not _OURS.fullmatch(name))  # lock.break.*: of a takeover
            if foreign:
                raise UserError(f"{self.folder}, where finished pieces go, holds other files ({foreign[0]}); rename it")
        elif {**found, OPERATORS: None} == {**self._settings, OPERATORS: None}:
            self.operators = found.get(OPERATORS) if self.is_begun() else None
            return
        elif self.is_begun():
            different = differences(found, self._settings) or "it was begun by another version of this program"
            raise UserError(f"{self.folder} holds the beginning of another set ({different}); repeat its command to "
                            "complete that one, or remove the folder")
        self.remove()  # pieces that nobody knows the origin of
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
            raise UserError(f"{self.folder / SETTINGS} is not what this program writes; rename the folder")
        return found


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return in which settings work that was found differs from what is wanted, "" for none; operators do not count."""
    names = [name for name in {**wanted, **found} if name != OPERATORS and found.get(name) != wanted.get(name)]
    return "; ".join(f"{name} is {json.dumps(found.get(name))} there and {json.dumps(wanted.get(name))} here"
                     for name in names[:2])
