"""Encode 8-bit pixels as a PNG that is fast to write and to read, and the same bytes on every machine.

The pixels are stored neither filtered nor compressed. On 256x256 lesion images that takes 197 kB, as Pillow's
compress_level=0 does (level 1: 108 kB), but is written 14 times and read 8 times as fast, since Pillow tries filters on
every row even when it does not compress. Compressed bytes would also differ between versions of zlib.
"""

import errno
import json
import os
import shutil
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.files import atomic_write, temporary_beside
from imagesets.reader import METADATA, NO_LABEL

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_STORED_MAX = 65535  # bytes in a stored block of deflate, RFC 1951 section 3.2.4
_ZLIB_HEADER = b"\x78\x01"  # deflate with a 32 kB window, fastest; RFC 1950 section 2.2
_COLOUR_TYPES = {1: 0, 3: 2}  # channels -> grey or RGB, PNG specification section 11.2.1


def encode_png(pixels: np.ndarray) -> bytes:
    """Return the PNG file of uint8 pixels: [H, W] or [H, W, 1] grey, [H, W, 3] RGB. Raises ValueError for others."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if pixels.dtype != np.uint8 or pixels.ndim > 3 or channels not in _COLOUR_TYPES or not pixels.size:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}; expected uint8, [H, W] or [H, W, 1 or 3]")
    rows = np.zeros([height, 1 + width * channels], dtype=np.uint8)  # each row starts with its filter type, 0 = none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", _store(rows.tobytes())) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def _store(data: bytes) -> bytes:
    """Return a zlib stream of stored blocks."""
    parts = [_ZLIB_HEADER]
    for start in range(0, len(data), _STORED_MAX):
        block = data[start:start + _STORED_MAX]
        is_last = start + _STORED_MAX >= len(data)
        parts += [struct.pack("<BHH", is_last, len(block), len(block) ^ 0xFFFF), block]
    parts.append(struct.pack(">I", zlib.adler32(data)))
    return b"".join(parts)


# MERGED from imagesets.writer
# Write a data set, a zip or a folder, whole or not at all.
#
# Equal images, labels and groups give equal bytes: members have fixed dates and come in the order of their addition.
# Images pass through; what stays in memory is a label and a group an image.


_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def image_name(index: int) -> str:
    """Return the name of the index-th image, a thousand to a folder: "00000/img00000000.png"."""
    return f"{index // 1000:05d}/img{index:08d}.png"


class ImageSetWriter:
    """A context manager; the data set appears under `dest` when the block ends without an error.

    dest:     a name ending in .zip, replaced if it exists; or a folder that is missing or empty
    classes:  names of the integer labels, None when labels have none
    source:   what dataset.json says of the origin; more may be put into the dict until the block ends
    option:   the option that gave `dest`, for messages

    Raises UserError when dest cannot be written, when the disk is full, and for labels of mixed kinds.
    """

    def __init__(self, dest: str | os.PathLike, *, classes: Sequence[str] | None = None,
                 source: dict[str, Any] | None = None, option: str = "--dest"):
        self.dest = Path(dest)
        self._flag = f"{option}={self.dest}"
        self.classes = None if classes is None else list(classes)
        self.source = {} if source is None else source
        self._count = 0
        self._integers = array("q")
        self._vectors: dict[int, Sequence[float]] = {}
        self._groups: list[str | None] = []
        self._hashes: dict[int, tuple[str, int, int]] = {}
        self._check_dest()

    def __enter__(self) -> "ImageSetWriter":
        self._stack = ExitStack()
        try:
            if self.dest.suffix.lower() == ".zip":
                file = self._stack.enter_context(atomic_write(self.dest))
                self._zip = self._stack.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_STORED))
            else:
                self._zip = None
                self._folder = self._stack.enter_context(_TemporaryFolder(self.dest))
        except OSError as error:
            raise self._cannot_write(error) from error
        return self

    def __exit__(self, kind, error, traceback) -> None:
        failure = error
        try:
            if failure is None:
                self._write_metadata()
        except BaseException as raised:  # raised again below, once the files are gone
            failure = raised
        if failure is not None and self._zip is not None:
            # Nothing of it is kept; closing one that was interrupted within a member would raise an error of its own.
            self._zip.fp = None
        try:
            self._stack.__exit__(type(failure) if failure else None, failure, None)
        except OSError as raised:
            failure = raised
        if isinstance(failure, OSError) and (failure is not error or _is_full(failure)):
            raise self._cannot_write(failure) from failure
        if failure is not error:
            raise failure

    def add(self, png: bytes, label: int | Sequence[float] | None = None, group: str | None = None,
            pixel_hash: str | None = None) -> str:
        """Append an encoded image and return its name.

        group:       what must not be split, None for the image alone
        pixel_hash:  as imagesets.pixel_hashes computes it, None where it is not known
        """
        name = image_name(self._count)
        self.add_file(name, png)
        if label is None or isinstance(label, int):
            self._integers.append(NO_LABEL if label is None else label)
        else:
            self._vectors[self._count] = label
            self._integers.append(NO_LABEL)
        self._groups.append(group)
        if pixel_hash is not None:
            self._hashes[self._count] = (pixel_hash, len(png), zlib.crc32(png))
        self._count += 1
        return name

    def add_file(self, name: str, data: bytes) -> None:
        """Store another member, a table for example."""
        try:
            if self._zip is None:
                path = self._folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            else:
                self._zip.writestr(_zip_info(name), data)
        except OSError as error:
            raise self._cannot_write(error) from error

    def set_groups(self, groups: Sequence[str | None]) -> None:
        """Replace the groups of all images, for who knows them only at the end."""
        if len(groups) != self._count:
            raise ValueError(f"{len(groups)} groups for {self._count} images")
        self._groups = list(groups)

    def __len__(self) -> int:
        return self._count

    def _write_metadata(self) -> None:
        has_integers = any(label != NO_LABEL for label in self._integers)
        if has_integers and self._vectors:
            raise UserError(f"{self.dest}: labels are of mixed kinds; expected integers, or lists of one length")
        has_labels = has_integers or bool(self._vectors)
        if self._zip is None:
            with open(self._folder / METADATA, "w", encoding="utf-8") as file:
                file.writelines(self._metadata(has_labels))
        else:
            with self._zip.open(_zip_info(METADATA), "w", force_zip64=True) as file:
                for text in self._metadata(has_labels):
                    file.write(text.encode())

    def _metadata(self, has_labels: bool) -> Iterator[str]:
        """Yield dataset.json in pieces, a line an image."""
        if has_labels:
            yield '{"labels": [\n'
            for index, number in enumerate(self._integers):
                label = self._vectors.get(index, None if number == NO_LABEL else number)
                label = list(label) if isinstance(label, Sequence) else label
                yield f"{json.dumps([image_name(index), label])}{',' if index + 1 < self._count else ''}\n"
            yield "]"
        else:
            yield '{"labels": null'
        if self.classes is not None:
            yield f',\n"classes": {json.dumps(self.classes)}'
        if any(group is not None for group in self._groups):
            yield ',\n"groups": {\n'
            separator = ""
            for index, group in enumerate(self._groups):
                if group is not None:
                    yield f"{separator}{json.dumps(image_name(index))}: {json.dumps(group)}"
                    separator = ",\n"
            yield "\n}"
        if self._hashes:
            yield ',\n"pixel_hashes": {'
            separator = "\n"
            for index, record in self._hashes.items():
                yield f"{separator}{json.dumps(image_name(index))}: {json.dumps(record)}"
                separator = ",\n"
            yield "\n}"
        yield f',\n"source": {json.dumps(self.source, allow_nan=False)}}}\n'

    def _check_dest(self) -> None:
        if self.dest.suffix.lower() == ".zip":
            if self.dest.is_dir():
                raise UserError(f"{self._flag} is a folder; expected a zip file to write")
        elif self.dest.suffix:
            raise UserError(f"{self._flag} ends in {self.dest.suffix}; expected .zip, or a folder")
        elif self.dest.is_file():
            raise UserError(f"{self._flag} is a file; expected a name ending in .zip, or a folder")
        elif self.dest.is_dir() and any(self.dest.iterdir()):
            raise UserError(f"{self._flag} is a folder with files in it; expected an empty or a new one")
        if not self.dest.absolute().parent.is_dir():
            raise UserError(f"{self._flag}: there is no folder {self.dest.parent}; make it first")

    def _cannot_write(self, error: OSError) -> UserError:
        reason = "the disk is full" if _is_full(error) else error.strerror or str(error)
        return UserError(f"{self._flag} cannot be written: {reason}; nothing was left there")


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class _TemporaryFolder:
    """A folder beside `dest` that takes its place at the end, or is removed."""

    def __init__(self, dest: Path):
        self.dest = dest.absolute()
        self.path = temporary_beside(self.dest)

    def __enter__(self) -> Path:
        self.path.mkdir()
        return self.path

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            try:
                os.replace(self.path, self.dest)  # an empty folder may be replaced
                return
            except BaseException:
                shutil.rmtree(self.path, ignore_errors=True)
                raise
        shutil.rmtree(self.path, ignore_errors=True)


def _zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, date_time=_ZIP_DATE)
    info.external_attr = 0o644 << 16
    info.create_system = 3  # the same bytes on every system
    return info
