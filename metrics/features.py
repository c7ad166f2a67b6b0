"""Compute rows of results for blocks of images, with several processes as with one."""

import hashlib
import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from dnnlib.files import DiskFailure, atomic_write, retrying
from metrics.image_sources import Source
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


# MERGED from metrics.features
# Compute the features of images: one pass over them for all detectors that want to see them.


if TYPE_CHECKING:
    from metrics.detectors.base import Detector

FEATURE_VERSION = 1  # of what features are, beside detector and images; changing it makes cached ones useless
_PROBE_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a detector says of images."""

    values: np.ndarray  # float32 [N, F]
    probabilities: np.ndarray | None = None  # float32 [N, K], where they were wanted

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A detector that is to see the first images of a source."""

    detector: "Detector"
    count: int  # LIMIT: 4 F bytes each are kept: with Inception 0.8 GB for 100,000 images
    classes: bool = False  # probabilities of classes are wanted too


@torch.no_grad()
def compute_features(source: Source, wishes: Sequence[Wish], *, batch: int, device: torch.device | str,
                     on_images: Callable[[int], None] = lambda count: None) -> list[Features] | None:
    """Return the features for each wish; None but on the main process. All processes call it together.

    batch:      images that are made, and seen, at a time
    on_images:  is told how many images were done

    Raises UserError when an image cannot be read.
    """
    def see(rows: range) -> list[Tensor]:
        pixels = source.pixels(rows).to(device)
        return [_see(wish, pixels[:max(wish.count - rows.start, 0)], columns)
                for wish, columns in zip(wishes, widths, strict=True)]

    widths = [_see(wish, torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE, dtype=torch.uint8, device=device)).shape[1]
              for wish in wishes]
    sizes = [(wish.count, columns) for wish, columns in zip(wishes, widths, strict=True)]
    found = compute_rows(max(wish.count for wish in wishes), batch, sizes, see, on_images)
    return None if found is None else [_unpack(wish, rows.numpy()) for wish, rows in zip(wishes, found, strict=True)]


def _see(wish: Wish, pixels: Tensor, columns: int = 0) -> Tensor:
    """Return features, and probabilities beside them, of pixels [n, 3, H, W]; zeros [0, columns] of no pixels."""
    if not len(pixels):
        return torch.zeros(0, columns)
    return torch.cat(wish.detector.classify(pixels), dim=1) if wish.classes else wish.detector(pixels)


def _unpack(wish: Wish, rows: np.ndarray) -> Features:
    if not wish.classes:
        return Features(values=rows)
    size = wish.detector.num_features
    return Features(values=rows[:, :size], probabilities=rows[:, size:])


# MERGED from metrics.feature_cache
# Keep the features of image sets on the disk, under a name that follows from all that they depend on.


_TROUBLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class FeatureCache:
    """Features in files of one folder; each file appears whole or not at all.

    folder:  made when something is written; None keeps nothing
    say:     takes a line for the user

    A file that is damaged is said to be so, and counts as missing; one that cannot be written is said to be so.
    """

    def __init__(self, folder: str | os.PathLike | None, say: Callable[[str], None] = lambda line: None):
        self._folder = None if folder is None else Path(folder)
        self._say = say

    def path(self, key: Mapping[str, object]) -> Path | None:
        """Return the file for a key, plain JSON values by name; None where nothing is kept."""
        return None if self._folder is None else self._folder / f"{hashlib.sha256(_text(key)).hexdigest()}.npz"

    def read(self, key: Mapping[str, object], *, count: int, classes: bool) -> Features | None:
        """Return the features of `count` images, with probabilities where `classes`; None when they are not there."""
        path = self.path(key)
        if path is None:
            return None
        names = ("key", "values", "probabilities") if classes else ("key", "values")

        def load() -> dict[str, np.ndarray]:
            with np.load(path, allow_pickle=False) as file:  # reading a member to its end checks its CRC
                return {name: file[name] for name in names}

        try:
            arrays = retrying(load, path)
        except FileNotFoundError:
            return None
        except DiskFailure as error:  # slow, but no reason to end what may have taken hours
            self._say(f"{error}; its features are computed again")
            return None
        except _TROUBLE as error:
            self._say(f"{path} is damaged ({error}); its features are computed again")
            return None
        tables = [arrays[name] for name in names[1:]]
        if arrays["key"].tobytes() != _text(key) or any(
                table.dtype != np.float32 or table.ndim != 2 or len(table) != count for table in tables):
            self._say(f"{path} holds something else; its features are computed again")
            return None
        return Features(values=arrays["values"], probabilities=arrays.get("probabilities"))

    def write(self, key: Mapping[str, object], features: Features) -> None:
        """Keep features under a key."""
        path = self.path(key)
        if path is None:
            return
        arrays = {"key": np.frombuffer(_text(key), dtype=np.uint8), "values": features.values}
        if features.probabilities is not None:
            arrays["probabilities"] = features.probabilities
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                np.savez(file, **arrays)
        except OSError as error:
            self._say(f"features cannot be kept in {path.parent} ({error.strerror or error}); they will be computed "
                      "again the next time")


def _text(key: Mapping[str, object]) -> bytes:
    return json.dumps(key, sort_keys=True, allow_nan=False).encode()
