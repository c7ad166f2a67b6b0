"""Compute rows of results for blocks of images, with several processes as with one."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from torch_utils.distributed import (
    any_process,
    broadcast_object,
    describe_error,
    first_text,
    gather_rows,
    is_main,
    rank,
    world_size,
)

T = TypeVar("T")

_BEAT_SECONDS = 60  # between two signs of life; far below torch_utils.distributed.COLLECTIVE_TIMEOUT
_SMALLEST_BATCH, _LARGEST_BATCH, _PIXELS = 4, 32, 1 << 20


class OtherProcessFailed(RuntimeError):
    """Work failed on another process, which has the error itself; this one says what it was."""


def choose_batch(resolution: int) -> int:
    """Return the images of a block; not by device, so that results can be compared between devices."""
    return min(max(_PIXELS // resolution**2, _SMALLEST_BATCH), _LARGEST_BATCH)


def compute_rows(count: int, batch: int, sizes: Sequence[tuple[int, int]], compute: Callable[[range], list[Tensor]],
                 on_images: Callable[[int], None] = lambda count: None) -> list[Tensor] | None:
    """Run `compute` on all blocks of `count` images and put together what it returns; None but on the main process.

    sizes:      rows and columns of each result
    compute:    takes the indices of a block, returns for each result float32 [n, columns]; n may be 0
    on_images:  is told how many images were done

    Block b is computed by process b modulo their number, so that the result does not depend on how many there are (bit
    for bit where each computes with equally many threads). All processes raise when one does.
    """
    blocks = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    results = [torch.empty(size) for size in sizes] if is_main() else None
    filled = [0] * len(sizes)
    for first in range(0, len(blocks), world_size()):
        mine = first + rank()
        nothing = [torch.empty(0, columns) for _, columns in sizes]
        parts = together(lambda mine=mine, nothing=nothing: compute(blocks[mine]) if mine < len(blocks) else nothing)
        for index, part in enumerate(parts):
            rows = gather_rows(part)
            if results is not None:
                results[index][filled[index]:filled[index] + len(rows)] = rows
                filled[index] += len(rows)
        on_images(sum(map(len, blocks[first:first + world_size()])))
    if results is not None and filled != [rows for rows, _ in sizes]:
        raise AssertionError(f"blocks gave {filled} rows; expected {sizes}")
    return results


def together(work: Callable[[], T]) -> T:
    """Run `work`; when it fails on one process, all raise, so that none waits for another in vain.

    Raises the error of the work; OtherProcessFailed on processes where it did not fail.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    if any_process(failure is not None):
        reason = first_text("" if failure is None else describe_error(failure))
        raise failure or OtherProcessFailed(reason)
    return result


def on_main(work: Callable[[], T]) -> T | None:
    """Run `work` on the main process alone; the others get None, or raise when it fails."""
    return together(lambda: work() if is_main() else None)


def on_main_for_long(work: Callable[[Callable[[], None]], T]) -> T | None:
    """As `on_main`, for work of any length: it calls the function that it gets now and then.

    Processes that wait for one that gives no sign give up after a while.
    """
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= _BEAT_SECONDS:
            any_process(False)
            last = time.monotonic()

    def work_or_wait() -> T | None:
        if is_main():
            try:
                result = work(beat)
            except Exception:
                any_process(True)
                raise
            any_process(True)
            return result
        while not any_process(False):  # the main process says that it is done
            pass
        return None

    return together(work_or_wait)


def from_main(work: Callable[[], T]) -> T:
    """Run `work` on the main process alone; all get its result."""
    return broadcast_object(on_main(work))
