"""Do long work in pieces, shared by the processes of a run; the same command continues after any end."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from dnnlib.cli import UserError
from latent.pieces import Pieces
from torch_utils.distributed import Processes, barrier, broadcast_object


def complete(pieces: Pieces, sizes: Sequence[int], processes: Processes, *, make: Callable[[list[int]], None],
             assemble: Callable[[], None], unit: str = "images") -> None:
    """Make the pieces that are missing, then put all together; all processes of a run call this.

    pieces:    in a folder that the processes share
    sizes:     images of each piece, or what else `unit` says
    make:      saves pieces, given by their numbers: those that are this process's
    assemble:  is called by the main process when all pieces are there, which are removed after it
    LIMIT: the others wait for it, half an hour at most (see torch_utils.distributed); work that takes longer stays in
    its pieces, and --gpus=1 completes it.

    Raises UserError when another process works on it, or pieces of other work lie there.
    """
    is_main = processes.rank == 0
    with pieces.held() if is_main else nullcontext():
        with _hint(pieces, sizes, unit) if is_main else nullcontext():
            missing = broadcast_object(_find_missing(pieces, sizes, unit) if is_main else None)
            make(missing[processes.rank::processes.count])
            barrier()
            if is_main:
                with _hint(pieces, sizes, unit, UserError):  # a full disk is to be expected, where all is there twice
                    assemble()
        if is_main:
            pieces.remove()


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
def _hint(pieces: Pieces, sizes: Sequence[int], unit: str,
          ending: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
    """Say, when the program is stopped, that nothing is lost. ending: what stops it"""
    try:
        yield
    except ending:
        if done := count_images(pieces, sizes):
            print(f"{done} of {sum(sizes)} {unit} are kept in {pieces.folder}; the same command continues",
                  file=sys.stderr)
        elif pieces.is_begun():
            print(f"the work so far is kept in {pieces.folder}; the same command continues", file=sys.stderr)
        raise
