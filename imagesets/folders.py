"""The common form of all archives of images, `Source`; and how folders and zips of images become one.

Labels come from dataset.json, else from subfolders.
"""

import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dnnlib.cli import UserError
from dnnlib.files import retrying
from dnnlib.text import listed
from imagesets.classes import numbers_of, order_classes
from imagesets.metadata import METADATA, NUMBERED_NAME
from imagesets.pixel_formats import BadImage
from imagesets.reader import ImageSet, MisplacedMetadata, excess_of

_TABLES = (".csv", ".tsv", ".xlsx")
# Words in folder names that mean a part of a data set, not a class: alone, or followed by a number.
_PARTS = {"dev", "eval", "evaluation", "holdout", "part", "parts", "test", "testing", "testset", "train", "training",
          "trainset", "val", "valid", "validation", "valset"}
_CONTENTS = {"annotations", "archive", "batch", "chunk", "data", "dataset", "folder", "fold", "image", "images", "img",
             "imgs", "input", "jpeg", "jpg", "masks", "photos", "pictures", "png", "segmentations", "set", "shard",
             "split", "vol", "volume"}
_UNITS = {"case", "lesion", "patient", "subject"}


class Loader(Protocol):
    """A function that turns an item into an image, in any process; picklable and small."""

    def __call__(self, item: Any, limit: int | None = None) -> bytes | np.ndarray:
        """Return an encoded image, or the pixels uint8/uint16 [H, W] or [H, W, C]; raises BadImage.

        limit: only this many bytes of an encoded image are needed
        """


class Items(Protocol):
    """A function that yields the items of the wanted images, in order; small if any process can read the archive."""

    def __call__(self, wanted: np.ndarray) -> Iterator[Any]:
        """wanted: bool [N]"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The N images of an archive, in the order in which they are numbered.

    kind:      for messages, such as "image folder"
    name:      of the file or folder, without its path
    names:     of the images inside
    labels:    None, int64 [N] with NO_LABEL for an image without one, or float32 [N, D] with NaN there
    classes:   names of the integer labels, or None
    groups:    None, or the group of each image, which must not be split; None for an image in no group
    items:     what `load` takes
    shape:     (width, height, channels) of all images if the archive gives it
    has_files: its images are files, which a table may name
    ignored:   other files, which are not images by their names
    not_chosen: images that --include and --exclude leave out
    left_out:  number of images in each of the other splits
    origin:    the `source` of a dataset.json
    hints:     advice about what was found beside the images
    is_ready:  a data set with a dataset.json, which gives labels and groups
    fault:     why its labels cannot be used: a misplaced dataset.json, or different classes in another part
    parts:     the folders and zips that were joined, in order
    """
    kind: str
    name: str
    names: Sequence[str]
    items: Items
    load: Loader
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    groups: Sequence[str | None] | None = None
    shape: tuple[int, int, int] | None = None
    has_files: bool = False
    ignored: Sequence[str] = ()
    not_chosen: Sequence[str] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    hints: Sequence[str] = ()
    is_ready: bool = False
    fault: str | None = None
    parts: Sequence["Source"] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_vectors(self) -> bool:
        return self.labels is not None and self.labels.ndim == 2


def open_folder(path: Path) -> Source:
    """Open a folder of images, with all its subfolders. Raises UserError when it holds no images."""
    images, fault = _open(path)
    places = [images.locate(name) for name in images.names]
    return _describe(images, "image folder", _ListedItems(places), _FolderLoader(root=str(path)), fault)


def open_zip(path: Path) -> Source:
    """Open a zip of images. Raises UserError when it holds no images or is truncated."""
    images, fault = _open(path)
    members = retrying(lambda: _list_members(path), path)
    images.close()
    doubled = [name for name, count in Counter(images.names).items() if count > 1]
    if doubled:
        raise UserError(f"{path} holds {doubled[0]} more than once ({len(doubled)} such names); expected each name "
                        "once: unpack it and use the folder")
    places = np.array([members[images.locate(name)] for name in images.names], dtype=np.int64)
    return _describe(images, "zip of images", _ListedItems(places), _ZipLoader(path=str(path)), fault)


def _open(path: Path) -> tuple[ImageSet, str | None]:
    """Return the images, and why a dataset.json inside was ignored (a table of labels may replace it), or None."""
    try:
        return ImageSet(path), None
    except MisplacedMetadata as error:
        return ImageSet(path, with_metadata=False), str(error)


@dataclass(frozen=True)
class _ListedItems:
    """items: names of files, or int64 [N, 5] as _ZipLoader takes them"""
    items: Sequence[str] | np.ndarray

    def __call__(self, wanted: np.ndarray) -> Iterator[str | np.ndarray]:
        return (item for item, want in zip(self.items, wanted) if want)


@dataclass(frozen=True, kw_only=True)
class _FolderLoader:
    root: str

    def __call__(self, item: str, limit: int | None = None) -> bytes:
        """Return the bytes of a file, at most the first `limit` ones. Raises BadImage, and DiskFailure."""
        path = os.path.join(self.root, item)
        return retrying(lambda: self._read(path, limit), path)

    def _read(self, path: str, limit: int | None) -> bytes:
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
                raise BadImage("not a file")
            if excess := excess_of(status.st_size):
                raise BadImage("too large", excess)
            with open(path, "rb") as file:
                return file.read() if limit is None else file.read(limit)
        except OSError as error:
            raise BadImage("cannot be opened") from error


@dataclass(frozen=True, kw_only=True)
class _ZipLoader:
    """Reads members by their offset in the zip.

    So the list of members, which can be large, is needed in only one process. An item is (offset of the local header,
    packed size, size, CRC-32, compression | flags << 16).
    """
    path: str

    def __call__(self, item: np.ndarray, limit: int | None = None) -> bytes:
        """Return the bytes of a member, at most the first `limit` ones. Raises BadImage, and DiskFailure."""
        return retrying(lambda: self._unpack(item, limit), self.path)

    def _unpack(self, item: np.ndarray, limit: int | None) -> bytes:
        place, packed_size, size, checksum, kind = item.tolist()
        method, flags = kind & 0xffff, kind >> 16
        if flags & 1:
            raise BadImage("encrypted in the zip")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadImage("unknown compression in the zip")
        if excess := excess_of(max(size, packed_size)):
            raise BadImage("too large", excess)
        try:
            packed = self._read(place, packed_size if limit is None else min(packed_size, limit))
            unpack = zlib.decompressobj(-zlib.MAX_WBITS).decompress
            data = packed if method == zipfile.ZIP_STORED else unpack(packed, limit or size + 1)
        except (zlib.error, OSError) as error:  # OSError for an offset outside the file
            raise BadImage("damaged in the zip") from error
        if limit is None and (len(data) != size or zlib.crc32(data) != checksum):
            raise BadImage("damaged in the zip")
        return data

    def _read(self, place: int, count: int) -> bytes:
        # Opened each time: an open file cannot be shared with other processes.
        with open(self.path, "rb") as file:
            file.seek(place)
            header = file.read(30)
            if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
                raise BadImage("damaged in the zip")
            name_size, extra_size = struct.unpack("<HH", header[26:30])
            file.seek(name_size + extra_size, os.SEEK_CUR)
            return file.read(count)


def _list_members(path: Path) -> dict[str, tuple[int, ...]]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: (info.header_offset, info.compress_size, info.file_size, info.CRC,
                                info.compress_type | info.flag_bits << 16) for info in archive.infolist()}


def _describe(images: ImageSet, kind: str, items: Any, load: Any, fault: str | None) -> Source:
    fields = dict(name=images.path.resolve().name, names=images.names, items=items, load=load, has_files=True,
                  fault=fault, ignored=[name for name in images.other_members if name != METADATA])
    if METADATA in images.other_members and fault is None:
        groups = None if images.groups == images.names else [
            None if group == name else group for group, name in zip(images.groups, images.names)]
        return Source(kind=f"{kind} with {METADATA}", labels=images.labels, classes=images.classes, groups=groups,
                      origin=images.source, is_ready=True, **fields)
    labels, classes = labels_of_folders(images.names)
    tables = [name for name in images.other_members if name.lower().endswith(_TABLES)]
    hints = [f"{name} is among the images; to use it as the table of labels, give --labels=FILE" for name in tables[:1]]
    return Source(kind=kind, labels=labels, classes=classes, hints=hints, **fields)


def labels_of_folders(names: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Return labels, int64 [N], and class names from the outermost folders that differ.

    Folders around all images are skipped, so that "set/benign/a.png" and "set/mel/2019/b.png" are of the classes
    "benign" and "mel"; an image beside such folders has no label. None, None when all images are in one folder, or in
    numbered ones like those of a data set.
    """
    found = class_folders(names)
    if found is None:
        return None, None
    classes = order_classes({folder for folder in found if folder is not None})
    return numbers_of(found, classes), classes


def labels_of_one_folder(source: Source,
                         is_class: Callable[[str], bool]) -> tuple[np.ndarray | None, list[str] | None]:
    """Return labels and class names if all images are in one folder, and `is_class` of its name; else None, None.

    For a source that has images of one class only, of those that the user names.
    """
    if not source.has_files or source.is_ready or source.parts or is_numbered(source.names):
        return None, None
    folder = next(filter(is_class, reversed(enclosing_folders(source.names))), None)
    return (None, None) if folder is None else (np.zeros(len(source), dtype=np.int64), [folder])


def class_folders(names: Sequence[str]) -> list[str | None] | None:
    """Return the outermost folder of each image below those around all of them; None if there are none."""
    depth = len(enclosing_folders(names))
    folders = [name.split("/")[:-1] for name in names]
    found = [parts[depth] if len(parts) > depth else None for parts in folders]
    return None if not any(found) or is_numbered(names) else found


def enclosing_folders(names: Sequence[str]) -> list[str]:
    """Return the folders around all images, from the outermost to the innermost."""
    folders = [name.split("/")[:-1] for name in names]
    pairs = zip(min(folders), max(folders))  # the common start of these two is common to all
    return [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def is_numbered(names: Sequence[str]) -> bool:
    """Return whether images are named as in a data set, whose folders are not classes."""
    return all(NUMBERED_NAME.fullmatch("/".join(name.split("/")[-2:])) for name in names)


def refuse_doubtful_folders(source: Source, are_classes: bool = False) -> None:
    """Raise UserError if some subfolders look like parts of a data set, not classes, or the source has a fault.

    are_classes: the subfolders are classes, as the user stated
    """
    if source.fault is not None:
        raise UserError(source.fault)
    parts = [] if are_classes or not source.has_files or source.is_ready else parts_among(source.classes or [])
    if parts:
        tables = [name for name in source.ignored if name.lower().endswith(_TABLES)]
        there = f" ({tables[0]} is there)" if tables else ""
        raise UserError(f"{source.name}: the folders {listed(parts)} look like parts of a data set, not like "
                        f"classes; give labels with --labels=FILE{there}, or each of them as --source, or "
                        "--folders=classes if they are classes, or --folders=ignore for images without labels")


def parts_among(folders: Sequence[str]) -> list[str]:
    """Return the folders that differ from another one only in words for parts of a data set.

    Examples are images_part_1 and images_part_2, train and test, images and masks, patient_1 and patient_2; but not
    0 and 1, or stage_1 and stage_2.
    """
    counts = Counter(map(_without_part, folders))
    return [folder for folder in folders if counts[_without_part(folder)] > 1]


def _without_part(folder: str) -> tuple[str, ...]:
    separated = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", folder)  # TrainImages
    words = re.findall(r"[^\W\d_]+|\d+", separated.lower())
    counted = _PARTS | _CONTENTS | _UNITS
    kept = [word for before, word in zip(["", *words], words)
            if word not in _PARTS and not (word.isdigit() and before in counted)]
    return () if set(kept) <= _CONTENTS else tuple(kept)
