"""Compute features of images, once for all metrics that need them, in one process or several.

Images are processed in batches: process b % world_size computes batch b, and the main process gathers the rows.
Features of image sets are cached on disk, in a file named by a hash of everything that they depend on.
Large tables of features are memory-mapped files, never whole in memory: while they are computed (`RowTable`), and when
they come from the cache.
"""

import hashlib
import json
import os
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.files import DiskFailure, atomic_write, retrying
from metrics.detectors.base import Detector, exact_float32
from metrics.frechet import FeatureStats
from metrics.image_sources import ImageSource, SelectedImages
from torch_utils.distributed import (
    OtherProcessFailed,
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
_IN_MEMORY = 128 << 20  # bytes; a larger table is a file. 16,384 images with Inception
_BLOCK = 4 << 20  # bytes of a cached table that are read at a time
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
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


class RowTable:
    """A table of float32 numbers that is filled from its first row on.

    folder:  of a temporary file that holds the numbers; it has no name, so that nothing of it is left, however the
             process ends. None = memory
    log:     called with a line for the user when the file cannot be written: then the numbers are kept in memory
    """

    def __init__(self, rows: int, columns: int, folder: Path | None = None,
                 log: Callable[[str], None] = lambda line: None):
        self.shape, self._filled = (rows, columns), 0
        self._folder, self._log = folder, log
        self._file: BinaryIO | None = None
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed when full)
                self._file.truncate(4 * rows * columns)
                self._values = np.memmap(self._file, np.float32, "r", shape=self.shape)
                self._file.seek(0)
            except OSError as error:
                self._leave_file(error)
        if self._file is None:
            self._values = np.empty(self.shape, np.float32)

    def append(self, rows: np.ndarray) -> None:
        """Add rows: float32 [n, columns]."""
        end = self._filled + len(rows)
        if self._file is not None:
            # Not through the map: there a full disk would end the process by SIGBUS.
            left = memoryview(np.ascontiguousarray(rows, np.float32).reshape(-1)).cast("B")
            try:
                while left:
                    left = left[self._file.write(left):]
            except OSError as error:
                self._leave_file(error)
                mapped, self._values = self._values, np.empty(self.shape, np.float32)
                self._values[:self._filled] = mapped[:self._filled]
        if self._file is None:
            self._values[self._filled:end] = rows
        self._filled = end

    def finish(self) -> np.ndarray:
        """Return the full table, float32 [rows, columns]: read-only if it is a file."""
        if self._filled != len(self._values):
            raise AssertionError(f"batches gave {self._filled} rows; expected {len(self._values)}")
        if self._file is not None:
            self._file.close()  # the map keeps what it needs
        return self._values

    def _leave_file(self, error: OSError) -> None:
        self._log(f"features cannot be stored in {self._folder} ({error.strerror or error}); they are kept in memory")
        if self._file is not None:
            self._file.close()
        self._file = None


@dataclass(frozen=True, kw_only=True)
class FeatureRequest:
    """A request for features of the first images of a source."""

    detector: Detector
    count: int  # 4 F bytes each: 0.8 GB for 100,000 images with Inception, as a memory-mapped file
    classes: bool = False  # also class probabilities

    @torch.no_grad()
    def compute(self, pixels: Tensor) -> list[Tensor]:
        """Return features of pixels [n, 3, H, W], float32 [n, F], and class probabilities [n, K] if requested."""
        return list(self.detector.classify(pixels)) if self.classes else [self.detector(pixels)]


def compute_features(source: ImageSource, requests: Sequence[FeatureRequest], *, batch: int,
                     device: torch.device | str, on_images: Callable[[int], None] = lambda count: None,
                     cache: "FeatureCache | None" = None, workers: int | None = None) -> list[Features] | None:
    """Return the features for each request; None except on the main process. All processes call it together.

    batch:      batch size, of the source and of detectors
    on_images:  called with the number of images that were finished
    cache:      whose folder holds large tables while they are in use; None = the folder for temporary files
    workers:    number of processes that decode files for this one, see `SelectedImages.batches`

    Raises UserError if an image cannot be read.
    """
    cache = cache or FeatureCache(None)
    count = max(request.count for request in requests)
    mine = _split(count, batch)[rank()::world_size()]
    ahead: Tensor | None = None  # the next batch

    def compute(rows: range) -> list[Tensor]:
        nonlocal ahead
        pixels = (next(batches) if ahead is None else ahead).to(device)
        found = []
        for request, some in zip(requests, widths, strict=True):
            wanted = pixels[:max(request.count - rows.start, 0)]
            found += request.compute(wanted) if len(wanted) else [torch.zeros(0, width) for width in some]
        ahead = next(batches, None)  # before anything waits for the results of a GPU
        return found

    probe = torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE, dtype=torch.uint8, device=device)
    widths = [[part.shape[1] for part in request.compute(probe)] for request in requests]
    sizes = [(request.count, width) for request, some in zip(requests, widths, strict=True) for width in some]
    is_set = isinstance(source, SelectedImages)
    with closing(source.batches(mine, workers) if is_set else (source.pixels(rows) for rows in mine)) as batches:
        tables = _fill_tables(count, batch, sizes, cache.table, compute, on_images)
    if tables is None:
        return None
    parts = iter(tables)
    return [Features(values=next(parts), probabilities=next(parts) if request.classes else None)
            for request in requests]


def cached_features(source: ImageSource, requests: Sequence[FeatureRequest], *, batch: int,
                    device: torch.device, cache: "FeatureCache", workers: int | None = None,
                    showing: Callable[[int], AbstractContextManager[Callable[[int], None]]]) -> list[Features] | None:
    """Return what `compute_features` does, for images of a set from the cache where they are there.

    showing:  called with the number of images that are computed, if any; gives the `on_images` for them
    """
    cached, keys = [None] * len(requests), []
    if isinstance(source, SelectedImages):
        keys = on_main(lambda: [cache_key(source, each, batch, device) for each in requests])
        cached = on_main(lambda: [cache.read(key, count=each.count, classes=each.classes)
                                  for key, each in zip(keys, requests, strict=True)])
    missing = from_main(lambda: [index for index, features in enumerate(cached) if features is None])
    if missing:
        some = [requests[index] for index in missing]
        with showing(max(each.count for each in some)) as on_images:
            found = compute_features(source, some, batch=batch, device=device, on_images=on_images, cache=cache,
                                     workers=workers)
        for index, features in zip(missing, found or ()):
            cached[index] = features
            if keys:
                cache.write(keys[index], features)
    return cached if is_main() else None


def compute_rows(count: int, batch: int, sizes: Sequence[tuple[int, int]], compute: Callable[[range], list[Tensor]],
                 on_images: Callable[[int], None] = lambda count: None) -> list[Tensor] | None:
    """Run `compute` on `count` images in batches and gather its results; return None except on the main process.

    sizes:      rows and columns of each result
    compute:    takes the indices of a batch, returns float32 [n, columns] for each result; n may be 0
    on_images:  called with the number of images that were finished

    The result does not depend on the number of processes (bit for bit if all use equally many threads). If one process
    raises, all do.
    """
    tables = _fill_tables(count, batch, sizes, RowTable, compute, on_images)
    return None if tables is None else [torch.from_numpy(table) for table in tables]


def _fill_tables(count: int, batch: int, sizes: Sequence[tuple[int, int]], new_table: Callable[[int, int], RowTable],
                 compute: Callable[[range], list[Tensor]],
                 on_images: Callable[[int], None]) -> list[np.ndarray] | None:
    """Do the work of `compute_rows`, in tables that `new_table` makes."""
    batches = _split(count, batch)
    tables = [new_table(*size) for size in sizes] if is_main() else None
    for first in range(0, len(batches), world_size()):
        mine = first + rank()
        nothing = [torch.empty(0, columns) for _, columns in sizes]
        parts = together(lambda mine=mine, nothing=nothing: compute(batches[mine]) if mine < len(batches) else nothing)
        for index, part in enumerate(parts):
            rows = gather_rows(part)
            if tables is not None:
                tables[index].append(rows.numpy())
        on_images(sum(map(len, batches[first:first + world_size()])))
    return None if tables is None else [table.finish() for table in tables]


def _split(count: int, batch: int) -> list[range]:
    """Return the images of each batch."""
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


def choose_batch(resolution: int) -> int:
    """Return the batch size; not by device, so that results can be compared between devices."""
    return min(max(_PIXELS // resolution**2, _SMALLEST_BATCH), _LARGEST_BATCH)


@contextmanager
def measuring(G: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Put G in eval mode; disable gradients and TF32; leave the global random state as it was."""
    modes = {} if G is None else {module: module.training for module in G.modules()}
    random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        if G is not None:
            G.eval()
        with random_state, exact_float32(), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class FeatureCache:
    """Features in files of one folder, each written atomically.

    folder:     created when needed; None disables the cache
    log:        called with a line for the user
    in_memory:  size of tables, in bytes, above which they are memory-mapped files

    A damaged file counts as missing. That, and a file that cannot be written, is logged.
    """

    def __init__(self, folder: str | os.PathLike | None, log: Callable[[str], None] = lambda line: None,
                 in_memory: int = _IN_MEMORY):
        self._folder = None if folder is None else Path(folder)
        self._log, self._in_memory = log, in_memory

    def path(self, key: Mapping[str, object]) -> Path | None:
        """Return the file for a key, plain JSON values by name; None if the cache is disabled."""
        return None if self._folder is None else self._folder / f"{hashlib.sha256(_text(key)).hexdigest()}.npz"

    def table(self, rows: int, columns: int) -> RowTable:
        """Return a table to fill; if it is large, it is in the folder, or in that for temporary files if disabled."""
        is_large = 4 * rows * columns > self._in_memory
        return RowTable(rows, columns, (self._folder or Path(tempfile.gettempdir())) if is_large else None, self._log)

    def read(self, key: Mapping[str, object], *, count: int, classes: bool) -> Features | None:
        """Return the features of `count` images, with probabilities if `classes`; None if they are not cached.

        Large tables are read-only, and mapped from the file after all of it was read once to check it.
        """
        path = self.path(key)
        if path is None:
            return None

        def load() -> list[np.ndarray] | None:
            with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                with archive.open("key.npy") as member:
                    if np.lib.format.read_array(member, allow_pickle=False).tobytes() != _text(key):
                        return None
                tables = [self._load_table(file, archive, name, count)
                          for name in ("values", "probabilities")[:1 + classes]]
                return None if any(table is None for table in tables) else tables

        try:
            tables = retrying(load, path)
        except FileNotFoundError:
            return None
        except DiskFailure as error:  # computing them again is slow, but better than ending a run of hours
            self._log(f"{error}; its features are computed again")
            return None
        except _DAMAGE as error:
            self._log(f"{path} is damaged ({error}); its features are computed again")
            return None
        if tables is None:
            self._log(f"{path} has other contents; its features are computed again")
            return None
        return Features(values=tables[0], probabilities=tables[1] if classes else None)

    def _load_table(self, file: BinaryIO, archive: zipfile.ZipFile, name: str, count: int) -> np.ndarray | None:
        """Return a member of an .npz file as float32 [count, columns]; None if it is anything else.

        Raises one of `_DAMAGE` if it is damaged.
        """
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as member:
            shape, is_transposed, dtype = _HEADERS[np.lib.format.read_magic(member)](member)
            if dtype != np.float32 or is_transposed or len(shape) != 2 or shape[0] != count or shape[1] == 0:
                return None
            row_bytes = 4 * shape[1]
            if info.file_size != member.tell() + count * row_bytes:
                raise ValueError(f"{name} is {info.file_size} bytes long, which does not fit its shape {shape}")
            file.seek(info.header_offset + 26)  # the lengths of two fields at the end of the member's header
            offset = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + member.tell()
            # Tensors have to be aligned. The values are in the files that `write` makes, but not in those of earlier
            # versions; probabilities are by chance.
            is_mapped = (count * row_bytes > self._in_memory and info.compress_type == zipfile.ZIP_STORED
                         and offset % 4 == 0)
            table = None if is_mapped else self.table(*shape)
            while block := member.read(max(_BLOCK // row_bytes, 1) * row_bytes):  # reading all of it checks its CRC
                if table is not None:
                    table.append(np.frombuffer(block, np.float32).reshape(-1, shape[1]))
        # LIMIT: a disk that fails later, while mapped numbers are used, ends the process by SIGBUS.
        return table.finish() if table is not None else np.memmap(file, np.float32, "r", offset, shape)

    def write(self, key: Mapping[str, object], features: Features) -> None:
        """Save features under a key."""
        path = self.path(key)
        if path is None:
            return
        arrays = {"values": features.values}  # first, so that they are aligned
        if features.probabilities is not None:
            arrays["probabilities"] = features.probabilities
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                np.savez(file, **arrays, key=np.frombuffer(_text(key), dtype=np.uint8))
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


def on_main_first(work: Callable[[], T]) -> T:
    """Run `work` on the main process, then on the others, which find what it downloaded; return each one's result."""
    result = on_main(work)
    return work() if result is None else result


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
