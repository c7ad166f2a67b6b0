"""What every archive of images is to the conversion, a `Source`; and folders and zips of images as such.

Labels come from dataset.json, else from sub-folders.
"""

import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
# Words of folder names that divide a set rather than name a class: alone, or with a number behind them.
_PARTS = {"dev", "eval", "evaluation", "holdout", "part", "parts", "test", "testing", "testset", "train", "training",
          "trainset", "val", "valid", "validation", "valset"}
_CONTENTS = {"annotations", "archive", "batch", "chunk", "data", "dataset", "folder", "fold", "image", "images", "img",
             "imgs", "input", "jpeg", "jpg", "masks", "photos", "pictures", "png", "segmentations", "set", "shard",
             "split", "vol", "volume"}
_UNITS = {"case", "lesion", "patient", "subject"}


class Loader(Protocol):
    """Turns an item into an image, in any process; picklable and small."""

    def __call__(self, item: Any, limit: int | None = None) -> bytes | np.ndarray:
        """Return an encoded image, or the pixels uint8/uint16 [H, W] or [H, W, C]; raises BadImage.

        limit: so many bytes of an encoded image are enough
        """


class Items(Protocol):
    """The items of the wanted images, in their order; small where the archive can be read anywhere."""

    def __call__(self, wanted: np.ndarray) -> Iterator[Any]:
        """wanted: bool [N]"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The N images of an archive, in the order in which they are numbered.

    kind:      for people, as "image folder"
    name:      of the file or folder, without its path
    names:     of the images inside
    labels:    None, int64 [N] with NO_LABEL where there is none, or float32 [N, D] with NaN there
    classes:   names of the integer labels, or None
    groups:    None, or what must not be split; None for an image alone
    items:     what `load` takes
    shape:     (width, height, channels) of all images where the archive says so
    has_files: its images are files, which a table may name
    ignored:   other members, which are no images by their names
    not_chosen: images that --include and --exclude leave out
    left_out:  images of other splits, by split
    origin:    what a ready data set says of its own origin
    hints:     advice on what was found beside the images
    is_ready:  a data set with a dataset.json, from which labels and groups come
    fault:     why labels cannot be taken from it: where its dataset.json lies, or other classes in another part
    parts:     of several folders and zips that were joined: they themselves, in order
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
    """Open a folder of images, with all its sub-folders. Raises UserError when there are none."""
    images, fault = _open(path)
    places = [images.locate(name) for name in images.names]
    return _describe(images, "image folder", _ListedItems(places), _FolderLoader(root=str(path)), fault)


def open_zip(path: Path) -> Source:
    """Open a zip of images. Raises UserError when it holds none, or is cut off."""
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
    """Return the images, and why a dataset.json inside was left aside: a table of labels may stand in for it."""
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
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                raise BadImage("not a file")
            if excess := excess_of(status.st_size):
                raise BadImage("too large", excess)
            with open(path, "rb") as file:
                return file.read() if limit is None else file.read(limit)
        except OSError as error:
            raise BadImage("cannot be opened") from error


@dataclass(frozen=True, kw_only=True)
class _ZipLoader:
    """Reads members by their place in the file.

    The list of members, which is large for a large zip, is thus needed in one process only. An item is (place of the
    local header, packed size, size, CRC-32, compression | flags << 16).
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
        except (zlib.error, OSError) as error:  # OSError for a place outside of the file
            raise BadImage("damaged in the zip") from error
        if limit is None and (len(data) != size or zlib.crc32(data) != checksum):
            raise BadImage("damaged in the zip")
        return data

    def _read(self, place: int, count: int) -> bytes:
        # Opened each time, as the files of a folder are: an open file cannot be shared with other processes.
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
    hints = [f"{name} lies among the images; --labels=FILE would take labels from a table" for name in tables[:1]]
    return Source(kind=kind, labels=labels, classes=classes, hints=hints, **fields)


def labels_of_folders(names: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Return int64 [N] and class names from the outermost folder that tells images apart.

    Folders around all images are skipped, so that "set/benign/a.png" and "set/mel/2019/b.png" are of the classes
    "benign" and "mel"; an image beside such folders has none. None, None when all images lie in one folder, or in
    numbered ones as a data set has.
    """
    found = class_folders(names)
    if found is None:
        return None, None
    classes = order_classes({folder for folder in found if folder is not None})
    return numbers_of(found, classes), classes


def class_folders(names: Sequence[str]) -> list[str | None] | None:
    """Return the outermost folder that tells images apart, for each image; None where no folder does."""
    depth = len(enclosing_folders(names))
    folders = [name.split("/")[:-1] for name in names]
    found = [parts[depth] if len(parts) > depth else None for parts in folders]
    return None if not any(found) or is_numbered(names) else found


def enclosing_folders(names: Sequence[str]) -> list[str]:
    """Return the folders around all images, from the outermost to the innermost."""
    folders = [name.split("/")[:-1] for name in names]
    pairs = zip(min(folders), max(folders))  # what these two begin with, all between them do
    return [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def is_numbered(names: Sequence[str]) -> bool:
    """Return whether images are named as in a data set, whose folders are no classes."""
    return all(NUMBERED_NAME.fullmatch("/".join(name.split("/")[-2:])) for name in names)


def refuse_doubtful_folders(source: Source, are_classes: bool = False) -> None:
    """Raise UserError where some sub-folders are parts of a set rather than classes, or hold its dataset.json.

    are_classes: the user says so
    """
    if source.fault is not None:
        raise UserError(source.fault)
    parts = [] if are_classes or not source.has_files or source.is_ready else parts_among(source.classes or [])
    if parts:
        tables = [name for name in source.ignored if name.lower().endswith(_TABLES)]
        there = f" ({tables[0]} lies there)" if tables else ""
        raise UserError(f"{source.name}: the folders {listed(parts)} look like parts of a data set, not like "
                        f"classes; give labels by --labels=FILE{there}, or each of them as --source, or say what they "
                        "are: --folders=classes, or --folders=ignore for images without labels")


def parts_among(folders: Sequence[str]) -> list[str]:
    """Return the folders that differ from another by nothing but what tells parts of a set.

    So do images_part_1 and images_part_2, train and test, images and masks, patient_1 and patient_2; not 0 and 1,
    stage_1 and stage_2.
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
