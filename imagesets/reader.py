"""Open a data set, a zip or a folder of images with an optional dataset.json, and decode its images to pixels.

A data set may be in a folder inside, as after zipping a folder: it is read as if its dataset.json were at the top.
"""

import hashlib
import io
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dnnlib.cli import UserError
from dnnlib.files import packed_names, retrying, unpack_advice
from dnnlib.text import listed, shorten
from imagesets.classes import CLASS, NO_LABEL, VECTOR, class_names, class_order, missing_labels
from imagesets.metadata import METADATA, NUMBERED_NAME, Metadata

MAX_FILE_BYTES = 1 << 30  # a larger file is not a photograph and could fill the memory
PRESENT = 0.5  # if a vector's number is above this, the image is of that class

Shape = tuple[int, int, int]  # channels, height, width


class MisplacedMetadata(UserError):
    """dataset.json is in a subfolder that does not hold all images, or in several folders."""


@cache
def image_suffixes() -> frozenset[str]:
    """Return the file name endings of images, as ".png"."""
    return frozenset(PIL.Image.registered_extensions())


class ImageSet:
    """The images of a data set in the order of their names, with labels and groups.

    names:    paths inside the zip or folder, with "/"; relative to dataset.json if that is in a subfolder
    labels, num_unnamed, classes, groups, source: see imagesets.metadata.Metadata
    other_members: files that are not images

    with_metadata=False ignores dataset.json, so that images beside a faulty one can be inspected. The zip is opened on
    first use in each process, so that an ImageSet may be sent to workers. Raises UserError when the path is missing, is
    not a readable zip, holds no images, or its dataset.json is faulty; MisplacedMetadata, a subclass, when dataset.json
    is in a subfolder but images are outside of it, or when there are several.
    """

    def __init__(self, path: str | os.PathLike, *, with_metadata: bool = True):
        self.path = Path(path)
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self._checksums: list[tuple[int, int]] | None = None
        self._raw_names: dict[str, str] = {}  # of members with another name in `names`
        self._folder = ""  # inside, that holds dataset.json, with "/" at its end
        members = retrying(self._list_members, self.path, reset=self.close)
        self.names = sorted(filter(_is_image, members))
        if not self.names:
            raise UserError(f"{self.path} holds no images; {_what_else(members)}")
        found = _find_metadata(self.path, members, self.names) if with_metadata else None
        if found not in (None, METADATA):
            members = self._enter_folder_of(found, members)
            self.names = [name.removeprefix(self._folder) for name in self.names]
        metadata = Metadata.parse(self.path, b"{}" if found is None else self.read(METADATA), self.names)
        self.labels, self.num_unnamed, self.classes = metadata.labels, metadata.num_unnamed, metadata.classes
        self.groups, self.source, self._hashes = metadata.groups, metadata.source, metadata.hashes
        self.other_members = sorted(set(members) - set(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        # Checksums and hashes are large, and workers, who get the copies, only read images.
        return {**self.__dict__, "_archive": None, "_checksums": None, "_hashes": {}}

    @property
    def is_zip(self) -> bool:
        return self.path.is_file()

    @property
    def label_kind(self) -> str | None:
        """CLASS for integers, VECTOR for lists, None without labels."""
        if self.labels is None:
            return None
        return CLASS if self.labels.ndim == 1 else VECTOR

    @property
    def label_dim(self) -> int:
        """Length of a label as networks take it: the number of classes, or of a vector's numbers; 0 without labels."""
        return self.labels.shape[1] if self.label_kind == VECTOR else len(self.class_names())

    def missing_labels(self) -> np.ndarray:
        """Return which images have no label: bool [N]."""
        return missing_labels(self.labels, len(self))

    def class_names(self) -> list[str]:
        """Return a name for each class; its number if dataset.json has no names."""
        return class_names(self.labels, self.classes)

    def class_columns(self) -> np.ndarray:
        """Return which images are of which classes: bool [N, C], C = len(self.class_names()); measurements False."""
        columns = np.zeros((len(self), len(self.class_names())), dtype=bool)
        if self.label_kind == VECTOR:
            columns[:, :self.labels.shape[1]] = self.labels > PRESENT
            return columns & self.are_findings()
        return columns if self.labels is None else self.labels[:, None] == np.arange(columns.shape[1])

    def are_findings(self) -> np.ndarray:
        """Return which columns are findings, present or absent: bool [C]; for vectors those with numbers from 0 to 1.

        Others are measurements, such as an age, which do not put an image into a class.
        """
        found = np.ones(len(self.class_names()), dtype=bool)
        if self.label_kind == VECTOR:
            values = np.nan_to_num(self.labels)
            found[:values.shape[1]] = ((values >= 0) & (values <= 1)).all(axis=0)
        return found

    def label(self, row: int) -> int | list[float] | None:
        """Return the label of an image as in dataset.json."""
        if self.labels is None or missing_labels(self.labels[row:row + 1])[0]:
            return None
        # The shortest text that gives the same float32: 0.1, not 0.10000000149.
        return int(self.labels[row]) if self.label_kind == CLASS else [float(str(x)) for x in self.labels[row]]

    def locate(self, name: str) -> str:
        """Return the path of a file as it is stored in the zip or folder."""
        return self._raw_names.get(name, self._folder + name)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file. Raises UserError, naming it, when it is missing or damaged, and DiskFailure."""
        return retrying(lambda: self._read(name), f"{self.path}: {name}", reset=self.close)

    def _read(self, name: str) -> bytes:
        try:
            if not self.is_zip:
                return _read_file(self.path / self.locate(name))
            archive, member = self._zip(), self.locate(name)
            if excess := excess_of(archive.getinfo(member).file_size):
                raise UserError(f"{self.path}: {member} {excess}")
            return archive.read(member)
        except (KeyError, FileNotFoundError) as error:
            raise UserError(f"{self.path} has no member {name}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{self.path}: {name} is damaged ({error}); make or copy the data set again") from error
        except OSError as error:  # no permission, or an offset outside a damaged zip; a failing disk raised DiskFailure
            raise UserError(f"{self.path}: {name} cannot be read ({error.strerror}); make or copy the data set "
                            "again") from error

    def checksums(self) -> list[tuple[int, int]]:
        """Return (size, CRC-32) of each image; from a zip's directory, or by reading a folder's files once."""
        if self._checksums is None:
            self._checksums = retrying(self._read_checksums, self.path, reset=self.close)
        return self._checksums

    def content_hash(self, start: str, rows: Iterable[int], more: Iterable[bytes] = repeat(b"")) -> str:
        """Return a sha256 of images in this order, by size and CRC-32, so that a large zip need not be read.

        start:  other text to hash first
        more:   other bytes to hash with each image, such as its label
        """
        digest, checksums = hashlib.sha256(start.encode()), self.checksums()
        for row, extra in zip(rows, more):
            digest.update("/{}/{}".format(*checksums[row]).encode() + extra)
        return digest.hexdigest()

    def recorded_hash(self, name: str, size: int, crc: int) -> str | None:
        """Return the hash of an image's pixels from dataset.json; None if there is none, or the file was changed.

        size, crc:  of the file now, as `checksums` returns them
        """
        found, *file = self._hashes.get(name, (None,))
        return found if file == [size, crc] else None

    def named_groups(self) -> list[str | None]:
        """Return the patient or lesion of each image; None if its group is only an image's name."""
        names = set(self.names)
        return [None if group in names or NUMBERED_NAME.fullmatch(group) else group for group in self.groups]

    def use_classes(self, wanted: Sequence[str]) -> None:
        """Renumber labels to the classes `wanted`, by name; without class names nothing changes.

        Raises UserError if images are of other classes, or vectors have other columns.
        """
        if self.classes is None or self.labels is None or list(wanted) == self.classes:
            return
        if self.label_kind == VECTOR:
            order = class_order(self.classes, wanted)
            missing = self.classes if order is None else []
        else:
            order = [list(wanted).index(name) if name in wanted else NO_LABEL for name in self.classes]
            missing = [name for index, name in enumerate(self.classes)
                       if order[index] == NO_LABEL and (self.labels == index).any()]
        if missing:
            raise UserError(f"{self.path} has labels of {listed(missing)}; expected those of {listed(wanted)}: convert "
                            "it with dataset_tool.py and the same --classes")
        # NO_LABEL is -1, and so takes the last.
        self.labels = self.labels[:, order] if self.label_kind == VECTOR else np.array([*order, NO_LABEL])[self.labels]
        self.classes = list(wanted)

    def close(self) -> None:
        if self._archive is not None:
            with suppress(OSError):  # stale file handle
                self._archive[1].close()
            self._archive = None

    def _read_checksums(self) -> list[tuple[int, int]]:
        if self.is_zip:
            entries = {info.filename: (info.file_size, info.CRC) for info in self._zip().infolist()}
            return [entries[self.locate(name)] for name in self.names]
        contents = (self.read(name) for name in self.names)
        return [(len(data), zlib.crc32(data)) for data in contents]

    def _zip(self) -> zipfile.ZipFile:
        # Not a handle of the parent before a fork: both would move its file position.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = (os.getpid(), _open_zip(self.path))
        return self._archive[1]

    def _list_members(self) -> list[str]:
        if self.path.is_dir():
            return _files_below(self.path)
        if not self.path.exists():
            raise UserError(f"{self.path} does not exist; expected a data set: a zip or a folder of images")
        names = [info.filename for info in self._zip().infolist() if not info.filename.endswith("/")]
        self._raw_names = {path: name for name in names if (path := _member_path(name)) != name}
        return [_member_path(name) for name in names]

    def _enter_folder_of(self, metadata: str, members: list[str]) -> list[str]:
        """Rename members so that `metadata`, one of them, is dataset.json at the top; return the new names.

        Members outside its folder keep their paths.
        """
        folder = metadata[:-len(METADATA)]
        inside = {METADATA if member == metadata else member.removeprefix(folder): member
                  for member in members if member.startswith(folder)}
        listed = {member: member for member in members if not member.startswith(folder)} | inside
        stored = {name: self._raw_names.get(member, member) for name, member in listed.items()}
        self._folder = folder
        self._raw_names = {name: raw for name, raw in stored.items() if raw != folder + name}
        return list(listed)


def load_pixels(images: ImageSet, name: str, shape: Shape | None = None) -> np.ndarray:
    """Return the pixels of an image: uint8 [C, H, W], C 1 or 3, as a view that may be read-only and not contiguous.

    shape:  that of the first image, which this one must also have; None for any

    Raises UserError, naming the image, when it cannot be read or decoded, is neither 8-bit gray nor RGB, or has
    another shape.
    """
    data = images.read(name)
    try:
        image = PIL.Image.open(io.BytesIO(data))
        pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
        # Pillow's message for unknown files contains the address of our buffer, which varies.
        reason = "it is not an image" if isinstance(error, PIL.UnidentifiedImageError) else error
        if isinstance(error, PIL.Image.DecompressionBombError):
            raise UserError(f"{images.path}: {name} {describe_excess(error)}") from error
        raise UserError(f"{images.path}: {name} cannot be decoded ({reason}); make or copy it again") from error
    if image.mode not in ("L", "RGB"):
        raise UserError(f"{images.path}: {name} has mode {image.mode}; expected 8-bit gray or RGB: convert it with "
                        "dataset_tool.py")
    pixels = channels_first(pixels)
    if shape is not None and pixels.shape != shape:
        raise UserError(f"{images.path}: {name} is {describe_shape(pixels.shape)}, the first image "
                        f"{describe_shape(shape)}; expected one size: convert it with dataset_tool.py")
    return pixels


def describe_excess(error: Exception) -> str:
    """Return why Pillow refused an image with too many pixels, to follow the image's name."""
    match = re.search(r"\((\d+) pixels\) exceeds limit of (\d+)", str(error))
    if match is None:  # another version of Pillow
        return f"has too many pixels ({error}): reduce its size"
    return f"has {int(match[1]):,} pixels; at most {int(match[2]):,} are read: reduce its size"


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """Return [H, W] or [H, W, C] as [C, H, W]; a view."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def describe_shape(shape: Shape) -> str:
    """Return "64x64 RGB" for (3, 64, 64)."""
    channels, height, width = shape
    return f"{width}x{height} {'gray' if channels == 1 else 'RGB'}"


def _member_path(name: str) -> str:
    """Return a zip member's name with "/" between folders (some programs for Windows write "\\"), without "./"."""
    path = name.replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    return path


def _files_below(path: Path) -> list[str]:
    """Return the files in a folder, linked folders included, as paths with "/"."""
    found, entered = [], {os.path.realpath(path)}
    for folder, subfolders, files in os.walk(path, followlinks=True, onerror=_refuse_folder):
        # Each folder once, under its first name: circular links would never end.
        reached = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(subfolders)}
        subfolders[:] = [name for name, real in reached.items() if not (real in entered or entered.add(real))]
        prefix = os.path.relpath(folder, path)
        found += [name if prefix == "." else f"{prefix}/{name}".replace(os.sep, "/") for name in files]
    return found


def _read_file(path: Path) -> bytes:
    """Return the bytes of a file. Raises UserError for a pipe, which would block when opened, or a device."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is a pipe or a device; expected a file")
    if excess := excess_of(status.st_size):
        raise UserError(f"{path} {excess}")
    return path.read_bytes()


def excess_of(size: int) -> str | None:
    """Return why a file of this size is too large, to follow its name; None if it is not."""
    if size <= MAX_FILE_BYTES:
        return None
    return f"has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read: reduce its size, or leave it out"


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}); expected only readable folders") from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        if (advice := unpack_advice(path)) is not None:
            raise UserError(f"{path} {advice}") from error
        raise UserError(f"{path} cannot be read as a zip ({error}): it is truncated or not a zip; make or "
                        "copy it again") from error


def _what_else(members: Sequence[str]) -> str:
    """Return what to do with a folder or zip without images."""
    packed = packed_names(sorted(name for name in members if not _is_hidden(name)))
    if not packed:
        return "expected files such as .png or .jpg"
    return f"expected files such as .png or .jpg, not packed ones: give or unpack the one inside ({listed(packed)})"


def _is_image(name: str) -> bool:
    return not _is_hidden(name) and os.path.splitext(name)[1].lower() in image_suffixes()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _find_metadata(path: Path, members: Iterable[str], images: Iterable[str]) -> str | None:
    """Return the path of dataset.json inside; None if there is none."""
    found = sorted({name for name in members if name.lower().rpartition("/")[2] == METADATA and not _is_hidden(name)})
    if not found:
        return None
    if len(found) > 1:
        raise MisplacedMetadata(f"{path}: {METADATA} is in {len(found)} places ({shorten(found)}); expected one: "
                                "give one of these folders, remove the others, or join them with dataset_tool.py and "
                                "a --source for each")
    outside = next((name for name in images if not name.startswith(found[0][:-len(METADATA)])), None)
    if outside is not None:
        raise MisplacedMetadata(f"{path}: {METADATA} is in a subfolder ({found[0]}), but images are outside of it "
                                f"({outside}); expected it at the top: give that subfolder, or zip its content without "
                                "the subfolder")
    return found[0]
