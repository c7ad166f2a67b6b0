"""Write a data set, a zip or a folder, whole or not at all; and encode its images.

Equal images, labels and groups give equal bytes: members have fixed dates and are stored in the order of the calls.
Images are written at once; only a label, a group and a hash per image stay in memory.
"""

import errno
import os
import shutil
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.files import atomic_write, temporary_beside
from imagesets.classes import NO_LABEL
from imagesets.metadata import METADATA, format_metadata, image_name

_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_STORED_MAX = 65535  # bytes in a stored block of deflate, RFC 1951 section 3.2.4
_ZLIB_HEADER = b"\x78\x01"  # deflate with a 32 kB window, fastest; RFC 1950 section 2.2
_COLOR_TYPES = {1: 0, 3: 2}  # channels -> gray or RGB, PNG specification section 11.2.1


class ImageSetWriter:
    """A context manager; the data set appears under `dest` when the block ends without an error.

    dest:     a name ending in .zip, replaced if it exists; or a folder that is missing or empty
    classes:  names of the integer labels, None when labels have none
    source:   the origin that dataset.json records; the dict may be extended until the block ends
    option:   the option that gave `dest`, for messages

    Raises UserError when dest cannot be written, when the disk is full, and for labels of mixed kinds.
    """

    def __init__(self, dest: str | os.PathLike, *, classes: Sequence[str] | None = None,
                 source: dict[str, Any] | None = None, option: str = "--dest"):
        self.dest = Path(dest)
        self._option, self._flag = option, f"{option}={self.dest}"
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
                self._folder = self._stack.enter_context(_new_folder(self.dest.absolute()))
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
            # Nothing of it is kept; closing a zip that was interrupted within a member would raise another error.
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

        group:       images of one group must not be split; None for an image in no group
        pixel_hash:  as imagesets.pixel_hashes computes it, None if not known
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
        """Store another file, such as a table."""
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
        """Replace the groups of all images, if they are known only at the end."""
        if len(groups) != self._count:
            raise ValueError(f"{len(groups)} groups for {self._count} images")
        self._groups = list(groups)

    def __len__(self) -> int:
        return self._count

    def _write_metadata(self) -> None:
        has_integers = any(label != NO_LABEL for label in self._integers)
        if has_integers and self._vectors:
            raise UserError(f"{self.dest}: labels are of mixed kinds; expected integers, or lists of one length")
        labels = (self._vectors.get(index, None if number == NO_LABEL else number)
                  for index, number in enumerate(self._integers))
        text = format_metadata(labels=labels if has_integers or self._vectors else None, classes=self.classes,
                               groups=self._groups, hashes=self._hashes, source=self.source)
        if self._zip is None:
            with open(self._folder / METADATA, "w", encoding="utf-8") as file:
                file.writelines(text)
        else:
            with self._zip.open(_zip_info(METADATA), "w", force_zip64=True) as file:
                file.writelines(part.encode() for part in text)

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
        check_parent(self._option, self.dest)

    def _cannot_write(self, error: OSError) -> UserError:
        reason = "the disk is full" if _is_full(error) else error.strerror or str(error)
        return UserError(f"{self._flag} cannot be written: {reason}; nothing was left there")


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _new_folder(dest: Path) -> Iterator[Path]:
    """Yield a folder beside `dest` that is renamed to it at the end, or removed after an error."""
    temporary = temporary_beside(dest)
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, dest)  # an empty folder may be replaced
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def fill_folder(folder: Path, name: str) -> Iterator[Path]:
    """Yield a temporary folder; at the end its files move into `folder`, `name` last, unless there was an error.

    folder:  created if missing; files of the same names are replaced
    """
    is_new = not folder.exists()
    temporary = temporary_beside(folder / name)
    try:
        temporary.mkdir(parents=is_new)
        yield temporary
        for path in sorted(temporary.iterdir(), key=lambda path: (path.name == name, path.name)):
            os.replace(path, folder / path.name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and folder.is_dir():
            folder.rmdir()
        raise
    temporary.rmdir()


def check_folder(folder: Path, option: str, content: str) -> None:
    """Raise UserError when a folder that an option names is a file, or cannot be made. content: what it is for"""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option}={folder} is a file; expected a folder for {content}")
    check_parent(option, folder)


def check_parent(option: str, path: Path) -> None:
    """Raise UserError when the folder of a path that an option names does not exist."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option}={path}: there is no folder {path.parent}; make it first")


def _zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, date_time=_ZIP_DATE)
    info.external_attr = 0o644 << 16
    info.create_system = 3  # the same bytes on every system
    return info


def encode_png(pixels: np.ndarray) -> bytes:
    """Return the PNG file of uint8 pixels: [H, W] or [H, W, 1] gray, [H, W, 3] RGB. Raises ValueError for others.

    Pixels are neither filtered nor compressed, so that the file is fast to write and to read and has the same bytes on
    every machine; compressed bytes differ between versions of zlib. A 256x256 image takes 197 kB, as with Pillow's
    compress_level=0 (level 1: 108 kB for lesions), but is written 14 times and read 8 times as fast, because Pillow
    tries filters on every row even when it does not compress.
    """
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if pixels.dtype != np.uint8 or pixels.ndim > 3 or channels not in _COLOR_TYPES or not pixels.size:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}; expected uint8, [H, W] or [H, W, 1 or 3]")
    rows = np.zeros([height, 1 + width * channels], dtype=np.uint8)  # each row starts with its filter type, 0 = none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
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
