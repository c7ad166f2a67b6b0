"""Write a labelled data set of generated images, piece by piece; the same command continues after any end."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from dnnlib.cli import UserError
from dnnlib.progress import Progress
from imagesets.writer import ImageSetWriter
from latent.network import OpenNetwork
from latent.pictures import as_png
from latent.pieces import Pieces
from latent.sampling import Painter
from latent.set_plan import SetPlan, describe_origin
from torch_utils.distributed import Processes, barrier, broadcast_object


def write_labelled_set(dest: str | os.PathLike, network: OpenNetwork, painter: Painter, plan: SetPlan,
                       processes: Processes) -> None:
    """Write the zip `dest`. What was drawn is what is written; nothing is left out or chosen.

    All processes of a run call this; they share the folder of `dest`. What a piece holds does not depend on their
    number. Finished pieces wait in a folder beside `dest` until all are there.
    LIMIT: equal plans give equal bytes where each process has equally many threads. On a CPU a process with a single
    one sums in another order than one with several: one value in some 10,000 moves by a level.
    LIMIT: of several processes the others wait while one puts the pieces together, half an hour at most (see
    torch_utils.distributed); a set that takes longer stays in its pieces, and --gpus=1 completes it.

    Raises UserError when `dest` cannot be written, another process works on it, or other pieces lie there.
    """
    origin = describe_origin(network, plan, painter)
    pieces = Pieces(dest, {**origin, "count": plan.count, "piece": plan.piece})
    is_main = processes.rank == 0
    with pieces.held() if is_main else nullcontext():
        with _hint(pieces, plan) if is_main else nullcontext():
            missing = broadcast_object(_find_missing(pieces, plan) if is_main else None)
            with _progress(pieces, plan, shown=is_main) as advance:
                for number in missing[processes.rank::processes.count]:
                    pieces.save(number, _paint_piece(network, painter, plan, number))
                    advance()
            barrier()
            if is_main:
                _assemble(dest, network, plan, pieces, origin)
        if is_main:
            pieces.remove()


def _find_missing(pieces: Pieces, plan: SetPlan) -> list[int]:
    """Return the pieces that are to be computed; say so when others are there already."""
    finished = set(pieces.finished())
    if finished:
        print(f"{pieces.folder}: {_count(plan, finished)} of {plan.count} images are there already; going on",
              file=sys.stderr)
    return [number for number in range(plan.num_pieces) if number not in finished]


def _count(plan: SetPlan, finished: set[int]) -> int:
    return sum(len(plan.images(number)) for number in finished)


def _paint_piece(network: OpenNetwork, painter: Painter, plan: SetPlan, number: int) -> np.ndarray:
    images = plan.images(number)
    labels = network.classes.labels(plan.classes(images))
    return torch.cat(list(painter.paint(plan.seeds(images), labels))).numpy()


@contextmanager
def _progress(pieces: Pieces, plan: SetPlan, *, shown: bool) -> Iterator[Callable[[], None]]:
    """Yield what is to be called after each piece; it counts those of all processes."""
    if not shown:
        yield lambda: None
        return
    before = _count(plan, set(pieces.finished()))
    with Progress(plan.count - before, "images") as progress:
        yield lambda: progress.advance(_count(plan, set(pieces.finished())) - before - progress.done)


@contextmanager
def _hint(pieces: Pieces, plan: SetPlan, ending: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
    """Say, when the program is stopped, that nothing is lost. ending: what stops it"""
    try:
        yield
    except ending:
        if done := _count(plan, set(pieces.finished())):
            print(f"{done} of {plan.count} images are kept in {pieces.folder}; the same command continues",
                  file=sys.stderr)
        raise


def _assemble(dest: str | os.PathLike, network: OpenNetwork, plan: SetPlan, pieces: Pieces, origin: dict) -> None:
    """Put all pieces into the zip."""
    # A full disk is to be expected here, where all images are there twice for a while.
    with (_hint(pieces, plan, UserError), Progress(plan.count, "images put together") as progress,
          ImageSetWriter(dest, classes=network.classes.names, source=origin, option="--zip") as writer):
        for number in range(plan.num_pieces):
            pixels = torch.from_numpy(pieces.load(number))
            for image, label in zip(pixels, plan.classes(plan.images(number)), strict=True):
                writer.add(as_png(image), label)
            progress.advance(len(pixels))
