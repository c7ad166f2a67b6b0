"""Do long work in pieces, shared by the processes of a run; the same command continues after any end."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from dnnlib.cli import UserError
from dnnlib.disk_failures import DiskFailure
from latent.pieces import Pieces
from torch_utils.distributed import Processes, broadcast_object
from torch_utils.ops.dispatch import auto_means_as_before
from training.trouble import OutOfMemory, ran_out_of_memory

_POLL_SECONDS = 0.2


def complete(pieces: Pieces, sizes: Sequence[int], processes: Processes, *, make: Callable[[list[int]], None],
             assemble: Callable[[], None], unit: str = "images") -> None:
    """Make the pieces that are missing, then put all together; all processes of a run call this.

    pieces:    in a folder that the processes share
    sizes:     images of each piece, or what else `unit` says
    make:      saves pieces, given by their numbers: those that are this process's
    assemble:  is called by the main process when all pieces are there, which are removed after it

    Processes wait for each other as long as it takes; those that die are noticed (see torch_utils.process_watch).
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
def _shared(pieces: Pieces, sizes: Sequence[int], unit: str, processes: Processes) -> Iterator[list[int]]:
    """Yield the pieces that are to be made, all with the operators of the first; the main process decides for all."""
    work, device = f"the work in {pieces.folder}", processes.device.type
    if processes.rank == 0:
        missing = _find_missing(pieces, sizes, unit)
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


def count_images(pieces: Pieces, sizes: Sequence[int]) -> int:
    """Return how much is in finished pieces."""
    return sum(sizes[number] for number in pieces.finished())


def _find_missing(pieces: Pieces, sizes: Sequence[int], unit: str) -> list[int]:
    """Return the pieces that are to be made; say so when others are there already."""
    finished = set(pieces.finished())
    if finished:
        print(f"{pieces.folder}: {count_images(pieces, sizes)} of {sum(sizes)} {unit} are there already; going on",
              file=sys.stderr)
    return [number for number in range(len(sizes)) if number not in finished]


@contextmanager
def _hint(pieces: Pieces, sizes: Sequence[int], unit: str, *endings: type[BaseException]) -> Iterator[None]:
    """Say, when the program is stopped, that nothing is lost. endings: what stops it"""
    try:
        yield
    except endings:
        if kept := _describe_kept(pieces, sizes, unit):
            print(f"{kept}; the same command continues", file=sys.stderr)
        raise


@contextmanager
def _memory_advice(pieces: Pieces, sizes: Sequence[int], unit: str) -> Iterator[None]:
    """Say what to do when memory runs out after a part was done: pieces of another size do not go on with it."""
    try:
        yield
    except Exception as error:
        kept = ran_out_of_memory(error) and pieces.is_there() and _describe_kept(pieces, sizes, unit)
        if not kept:
            raise
        raise OutOfMemory(f"out of memory; {kept}: the same command continues once memory is free; with a smaller "
                          "--batch it begins anew, after that folder is removed") from error


def _describe_kept(pieces: Pieces, sizes: Sequence[int], unit: str) -> str | None:
    """Say how much is there; None where nothing is."""
    if done := count_images(pieces, sizes):
        return f"{done} of {sum(sizes)} {unit} are kept in {pieces.folder}"
    return f"the work so far is kept in {pieces.folder}" if pieces.is_begun() else None
