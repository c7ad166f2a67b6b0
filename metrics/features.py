"""Compute features of images, once for all metrics that need them, in one process or several.

Images are processed in batches: process b % world_size computes batch b, and the main process gathers the rows.
Features of image sets are cached on disk, in a file named by a hash of everything that they depend on.
"""

import hashlib
import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dnnlib.files import DiskFailure, atomic_write, retrying
from metrics.detectors.base import Detector
from metrics.frechet import FeatureStats
from metrics.image_sources import ImageSource, SelectedImages
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

_FEATURE_VERSION = 1  # of how features are computed; changing it invalidates the cache
_PROBE_SIZE = 32
_SMALLEST_BATCH, _LARGEST_BATCH, _PIXELS = 4, 32, 1 << 20
_DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # what damaged files raise
_BEAT_SECONDS = 60  # between two heartbeats; far below torch_utils.distributed.COLLECTIVE_TIMEOUT


@dataclass(frozen=True, kw_only=True)
class Features:
    """The outputs of a detector for images."""

    values: np.ndarray  # float32 [N, F]
    probabilities: np.ndarray | None = None  # float32 [N, K], if requested

    def __len__(self) -> int:
        return len(self.values)

    def first(self, count: int) -> "Features":
        """Return the features of the first `count` images."""
        if count >= len(self):
            return self
        return Features(values=self.values[:count],
                        probabilities=None if self.probabilities is None else self.probabilities[:count])

    @cached_property
    def stats(self) -> FeatureStats:
        return FeatureStats.of(self.values)


@dataclass(frozen=True, kw_only=True)
class FeatureRequest:
    """A request for features of the first images of a source."""

    detector: Detector
    count: int  # LIMIT: 4 F bytes each in memory: 0.8 GB for 100,000 images with Inception
    classes: bool = False  # also class probabilities

    @torch.no_grad()
    def compute(self, pixels: Tensor) -> Tensor:
        """Return features of pixels [n, 3, H, W], then class probabilities: float32 [n, F] or [n, F + K]."""
        return torch.cat(self.detector.classify(pixels), dim=1) if self.classes else self.detector(pixels)


def compute_features(source: ImageSource, requests: Sequence[FeatureRequest], *, batch: int,
                     device: torch.device | str,
                     on_images: Callable[[int], None] = lambda count: None) -> list[Features] | None:
    """Return the features for each request; None except on the main process. All processes call it together.

    batch:      batch size, of the source and of detectors
    on_images:  called with the number of images that were finished

    Raises UserError if an image cannot be read.
    """
    def compute(rows: range) -> list[Tensor]:
        pixels = source.pixels(rows).to(device)
        found = []
        for request, width in zip(requests, widths, strict=True):
            wanted = pixels[:max(request.count - rows.start, 0)]
            found.append(request.compute(wanted) if len(wanted) else torch.zeros(0, width))
        return found

    probe = torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE, dtype=torch.uint8, device=device)
    widths = [request.compute(probe).shape[1] for request in requests]
    sizes = [(request.count, width) for request, width in zip(requests, widths, strict=True)]
    tables = compute_rows(max(request.count for request in requests), batch, sizes, compute, on_images)
    if tables is None:
        return None
    found = []
    for request, table in zip(requests, tables, strict=True):
        values, size = table.numpy(), request.detector.num_features
        found.append(Features(values=values[:, :size], probabilities=values[:, size:]) if request.classes
                     else Features(values=values))
    return found


def compute_rows(count: int, batch: int, sizes: Sequence[tuple[int, int]], compute: Callable[[range], list[Tensor]],
                 on_images: Callable[[int], None] = lambda count: None) -> list[Tensor] | None:
    """Run `compute` on `count` images in batches and gather its results; return None except on the main process.

    sizes:      rows and columns of each result
    compute:    takes the indices of a batch, returns float32 [n, columns] for each result; n may be 0
    on_images:  called with the number of images that were finished

    The result does not depend on the number of processes (bit for bit if all use equally many threads). If one process
    raises, all do.
    """
    batches = [range(start, min(start + batch, count)) for start in range(0, count, batch)]
    results = [torch.empty(size) for size in sizes] if is_main() else None
    filled = [0] * len(sizes)
    for first in range(0, len(batches), world_size()):
        mine = first + rank()
        nothing = [torch.empty(0, columns) for _, columns in sizes]
        parts = together(lambda mine=mine, nothing=nothing: compute(batches[mine]) if mine < len(batches) else nothing)
        for index, part in enumerate(parts):
            rows = gather_rows(part)
            if results is not None:
                results[index][filled[index]:filled[index] + len(rows)] = rows
                filled[index] += len(rows)
        on_images(sum(map(len, batches[first:first + world_size()])))
    if results is not None and filled != [rows for rows, _ in sizes]:
        raise AssertionError(f"batches gave {filled} rows; expected {sizes}")
    return results


def choose_batch(resolution: int) -> int:
    """Return the batch size; not by device, so that results can be compared between devices."""
    return min(max(_PIXELS // resolution**2, _SMALLEST_BATCH), _LARGEST_BATCH)


class FeatureCache:
    """Features in files of one folder, each written atomically.

    folder:  created when needed; None disables the cache
    log:     called with a line for the user

    A damaged file counts as missing. That, and a file that cannot be written, is logged.
    """

    def __init__(self, folder: str | os.PathLike | None, log: Callable[[str], None] = lambda line: None):
        self._folder = None if folder is None else Path(folder)
        self._log = log

    def path(self, key: Mapping[str, object]) -> Path | None:
        """Return the file for a key, plain JSON values by name; None if the cache is disabled."""
        return None if self._folder is None else self._folder / f"{hashlib.sha256(_text(key)).hexdigest()}.npz"

    def read(self, key: Mapping[str, object], *, count: int, classes: bool) -> Features | None:
        """Return the features of `count` images, with probabilities if `classes`; None if they are not cached."""
        path = self.path(key)
        if path is None:
            return None
        names = ("key", "values", "probabilities") if classes else ("key", "values")

        def load() -> dict[str, np.ndarray]:
            with np.load(path, allow_pickle=False) as file:  # reading a member fully checks its CRC
                return {name: file[name] for name in names}

        try:
            arrays = retrying(load, path)
        except FileNotFoundError:
            return None
        except DiskFailure as error:  # computing them again is slow, but better than ending a run of hours
            self._log(f"{error}; its features are computed again")
            return None
        except _DAMAGE as error:
            self._log(f"{path} is damaged ({error}); its features are computed again")
            return None
        tables = [arrays[name] for name in names[1:]]
        if arrays["key"].tobytes() != _text(key) or any(
                table.dtype != np.float32 or table.ndim != 2 or len(table) != count for table in tables):
            self._log(f"{path} has other contents; its features are computed again")
            return None
        return Features(values=arrays["values"], probabilities=arrays.get("probabilities"))

    def write(self, key: Mapping[str, object], features: Features) -> None:
        """Save features under a key."""
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
            self._log(f"features cannot be saved in {path.parent} ({error.strerror or error}); they will be computed "
                      "again next time")


def cache_key(images: SelectedImages, request: FeatureRequest, batch: int, device: torch.device) -> dict[str, object]:
    """Return everything that features of a set's images depend on, as plain JSON values."""
    detector = request.detector
    return {"version": _FEATURE_VERSION, "content": images.content_hash(request.count), "count": request.count,
            "detector": detector.name, "weights": detector.weights_sha256, "preprocessing": detector.preprocessing,
            "classes": request.classes, "batch": batch, "device": device.type, "torch": torch.__version__}


def _text(key: Mapping[str, object]) -> bytes:
    return json.dumps(key, sort_keys=True, allow_nan=False).encode()


class OtherProcessFailed(RuntimeError):
    """Work failed on another process, which raises the error itself; this one carries its message."""


def together(work: Callable[[], T]) -> T:
    """Run `work` on all processes; if it fails on one, all raise, so that none waits forever.

    Raises the error of the work, or OtherProcessFailed on processes where it did not fail.
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
    """Run `work` on the main process only; the others return None, or raise if it fails."""
    return together(lambda: work() if is_main() else None)


def on_main_for_long(work: Callable[[Callable[[], None]], T]) -> T | None:
    """Like `on_main`, for work of any length, which has to call its argument now and then.

    These calls keep the waiting processes from timing out.
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
        while not any_process(False):  # until the main process is done
            pass
        return None

    return together(work_or_wait)


def from_main(work: Callable[[], T]) -> T:
    """Run `work` on the main process only; return its result on all."""
    return broadcast_object(on_main(work))
