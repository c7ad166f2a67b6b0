"""Write a labelled data set of generated images, piece by piece; the same command continues after any end."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.cli import UserError
from dnnlib.progress import Progress
from imagesets.pixel_hashes import hash_pixels
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from latent.network import OpenNetwork
from latent.pictures import as_png
from latent.pieces import OPERATORS, Pieces, differences
from latent.piecework import complete, count_images
from latent.sampling import Painter
from latent.set_plan import SetPlan, describe_origin
from torch_utils.distributed import Processes


def write_labelled_set(dest: str | os.PathLike, network: OpenNetwork, painter: Painter, plan: SetPlan,
                       processes: Processes) -> bool:
    """Write the zip `dest`; False where it holds just this set already. What was drawn is what is written.

    All processes of a run call this; they share the folder of `dest`. What a piece holds does not depend on their
    number. Finished pieces wait in a folder beside `dest` until all are there.
    LIMIT: equal plans give equal bytes where each process has equally many threads. On a CPU a process with a single
    one sums in another order than one with several: one value in some 10,000 moves by a level.

    Raises UserError when `dest` is another file, or cannot be written, another process works on it, or other pieces
    lie there.
    """
    # The operators that computed it are no part of what it follows from: pieces keep to theirs, see latent.piecework.
    origin = describe_origin(network, plan, painter)
    pieces = Pieces(dest, {**origin, "count": plan.count, "piece": plan.piece})
    sizes = [len(plan.images(number)) for number in range(plan.num_pieces)]
    # Where pieces lie beside it, only their removal is missing, or another process is at work there.
    if _is_done(Path(dest), origin, plan.count) and not pieces.is_there():  # all processes find the same
        return False

    def make(numbers: list[int]) -> None:
        with _progress(pieces, sizes, shown=processes.rank == 0) as advance:
            for number in numbers:
                pieces.save(number, {"pixels": _paint_piece(network, painter, plan, number)})
                advance()

    complete(pieces, sizes, processes, make=make, assemble=lambda: _assemble(
        dest, network, plan, pieces, {**origin, OPERATORS: pieces.operators}))
    return True


def _is_done(dest: Path, origin: dict[str, Any], count: int) -> bool:
    """Tell whether `dest` is a finished set of this origin. Raises UserError where it is something else."""
    if not dest.exists():
        return False
    try:
        images = ImageSet(dest)
    except UserError as error:
        raise UserError(f"--zip is {dest}, which exists and is not a data set; choose another name, or remove "
                        "it") from error
    different = differences(images.source, json.loads(json.dumps(origin)))  # both as JSON gives them back
    if not different and len(images) != count:
        different = f"{len(images)} images are there, of {count}"
    if different:
        raise UserError(f"--zip is {dest}, which exists and holds other images ({different}); choose another name, or "
                        "remove it")
    return True


def _paint_piece(network: OpenNetwork, painter: Painter, plan: SetPlan, number: int) -> np.ndarray:
    images = plan.images(number)
    labels = network.classes.labels(plan.labels(images))
    return torch.cat(list(painter.paint(plan.seeds(images), labels))).numpy()


@contextmanager
def _progress(pieces: Pieces, sizes: list[int], *, shown: bool) -> Iterator[Callable[[], None]]:
    """Yield what is to be called after each piece; it counts those of all processes."""
    if not shown:
        yield lambda: None
        return
    before = count_images(pieces, sizes)
    with Progress(sum(sizes) - before, "images") as progress:
        yield lambda: progress.advance(count_images(pieces, sizes) - before - progress.done)


def _assemble(dest: str | os.PathLike, network: OpenNetwork, plan: SetPlan, pieces: Pieces, origin: dict) -> None:
    """Put all pieces into the zip."""
    with (Progress(plan.count, "images put together") as progress,
          ImageSetWriter(dest, classes=network.classes.names, source=origin, option="--zip") as writer):
        for number in range(plan.num_pieces):
            pixels = torch.from_numpy(pieces.load(number)["pixels"])
            for image, label in zip(pixels, plan.labels(plan.images(number)), strict=True):
                writer.add(as_png(image), label, pixel_hash=hash_pixels(image.numpy()))
            progress.advance(len(pixels))
