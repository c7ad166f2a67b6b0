"""The CIFAR-10 python archive as a source; its pickles are read without importing or calling what they name."""

import gzip
import io
import math
import os
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.disk_failures import retrying
from dnnlib.packed_files import unpack_advice
from imagesets.reader import image_suffixes
from imagesets.sources.arrays import ArrayLoader, numbered_names
from imagesets.sources.source import Source

_MEMBERS = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_NUM_CLASSES = 10
_SIZE = 32
_MAX_BATCH_BYTES = 64 << 20  # twice what the archive has
_DAMAGED = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, OSError)


def open_cifar(path: Path, split: str) -> Source:
    """Open cifar-10-python.tar.gz. Raises UserError when members are missing, damaged, or not what is expected."""
    if split == "val":
        raise UserError(f"{path.name} (CIFAR-10) has no part val; --split can be train, test or all")
    chosen = tuple(_MEMBERS) if split == "all" else (split,)
    members = [member for part in chosen for member in _MEMBERS[part]]
    classes, labels, counts = retrying(lambda: _read_labels(path, members), path)
    names = [name for part in chosen for name in numbered_names(part, sum(counts[m] for m in _MEMBERS[part]))]
    return Source(kind="CIFAR-10", name=path.name, names=names, load=ArrayLoader(), labels=labels, classes=classes,
                  items=_CifarItems(path=path, members=tuple(members), counts=tuple(counts[m] for m in members)),
                  shape=(_SIZE, _SIZE, 3),
                  left_out={part: sum(counts[m] for m in _MEMBERS[part]) for part in _MEMBERS if part not in chosen})


@dataclass(frozen=True, kw_only=True)
class _CifarItems:
    path: Path
    members: Sequence[str]
    counts: Sequence[int]

    def __call__(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """Yield uint8 [32, 32, 3]; one batch at a time is in memory."""
        start = 0
        for member, count in zip(self.members, self.counts):
            chosen = wanted[start:start + count]
            start += count
            if chosen.any():
                pixels, _ = _read_batch(self.path, member, _read_member(self.path, member))
                for row in pixels[chosen]:
                    yield np.ascontiguousarray(row.reshape(3, _SIZE, _SIZE).transpose(1, 2, 0))


def _read_labels(path: Path, members: Sequence[str]) -> tuple[list[str] | None, np.ndarray, dict[str, int]]:
    """Return the class names, int64 [N] in the order of the members, and the images of each member of the archive."""
    classes, labels, counts = None, {}, {}
    for name, data in _walk(path):
        if name == "batches.meta":
            classes = _read_classes(path, data)
        elif any(name in batches for batches in _MEMBERS.values()):
            labels[name] = _read_batch(path, name, data)[1]
            counts[name] = len(labels[name])
    if not counts and classes is None:
        raise UserError(f"--source={path} {unpack_advice(path)}")
    missing = [name for batches in _MEMBERS.values() for name in batches if name not in counts]
    if missing:
        raise UserError(f"{path} has no member {missing[0]}; expected the CIFAR-10 python archive, "
                        "cifar-10-python.tar.gz: download it again")
    return classes, np.concatenate([labels[name] for name in members]), counts


def _read_member(path: Path, wanted: str) -> bytes:
    return retrying(lambda: next(data for name, data in _walk(path, wanted)), path)


def _walk(path: Path, wanted: str | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield (name without folders, content) of the files in the archive, or of the wanted one."""
    known = {"batches.meta", *(name for batches in _MEMBERS.values() for name in batches)}
    suffixes = image_suffixes()
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and os.path.splitext(name)[1].lower() in suffixes:  # CIFAR's archive has none
                    raise UserError(f"--source={path} {unpack_advice(path)}")
                if not member.isfile() or name not in known or wanted not in (None, name):
                    continue
                if member.size > _MAX_BATCH_BYTES:
                    raise UserError(f"{path}: {member.name} has {member.size:,} bytes; expected about 31 million, and "
                                    f"at most {_MAX_BATCH_BYTES:,}: is it CIFAR-10's archive? Download it again")
                file = archive.extractfile(member)
                yield name, file.read()
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be read as a tar.gz file ({error}); download it again") from error


def _read_batch(path: Path, name: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 [N, 3072] and int64 [N]."""
    content = _load(path, name, data)
    pixels, labels = _array(content.get("data")), content.get("labels")
    fits = (pixels is not None and pixels.ndim == 2 and pixels.shape[1] == 3 * _SIZE * _SIZE
            and isinstance(labels, list) and len(labels) == len(pixels)
            and all(type(x) is int and 0 <= x < _NUM_CLASSES for x in labels))
    if not fits:
        raise UserError(f"{path}: {name} does not hold data [N, 3072] and labels [N] from 0 to 9; expected a batch of "
                        "CIFAR-10")
    return pixels, np.array(labels, dtype=np.int64)


def _read_classes(path: Path, data: bytes) -> list[str]:
    names = _load(path, "batches.meta", data).get("label_names")
    if not isinstance(names, list) or len(names) != _NUM_CLASSES or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: batches.meta does not hold 10 label_names; expected that of CIFAR-10")
    return names


def _load(path: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="latin-1").load()
    except Exception as error:  # a damaged or hostile stream can raise anything
        raise UserError(f"{path}: {name} cannot be read ({type(error).__name__}: {error}); expected the pickles of "
                        "CIFAR-10: download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: {name} holds a {type(content).__name__}; expected the dict of a CIFAR-10 batch")
    return content


class _ArrayUnpickler(pickle.Unpickler):
    """Knows three names, for which records of ours stand in: nothing of the stream is ever imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        known = {("numpy.core.multiarray", "_reconstruct"): _NewArray, ("numpy._core.multiarray", "_reconstruct"):
                 _NewArray, ("numpy", "ndarray"): _Name, ("numpy", "dtype"): _Type}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")
        return known[module, name]

    def persistent_load(self, identifier: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


class _Name:
    """A name that may be mentioned."""
    __slots__ = ()


class _Type:
    """What stands for numpy.dtype(code, ...)."""
    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment, which bytes do not have


class _NewArray:
    """What stands for an array: filled by the state (version, shape, type, Fortran order, bytes)."""
    __slots__ = ("state",)

    def __init__(self, *_: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _array(record: Any) -> np.ndarray | None:
    """Return the uint8 array of a record, None when it is something else."""
    state = record.state if isinstance(record, _NewArray) else None
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    _, shape, dtype, fortran, data = state
    if isinstance(data, str):  # Python 2 had one type for text and bytes
        data = data.encode("latin-1")
    if not isinstance(dtype, _Type) or dtype.code != "u1" or fortran or not isinstance(data, bytes):
        return None
    if not isinstance(shape, tuple) or not all(type(x) is int and x >= 0 for x in shape):
        return None
    pixels = np.frombuffer(data, dtype=np.uint8)
    return pixels.reshape(shape) if pixels.size == math.prod(shape) else None
