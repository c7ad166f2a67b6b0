"""Open a data set, a zip or a folder of images with an optional dataset.json, and read its members.

dataset.json holds {"labels": [[file, label], ...] or null}; ours adds "classes", "groups", "pixel_hashes" and "source"
beside it. A label is an integer, a list of floats, or null for an image without one. What other programs write is read
as it is meant: 1.0 is the integer 1, NaN is null, and names may have "\\" between folders or begin with "./". A set may
lie in a folder inside, as zipping a folder makes it: it is then read as if its dataset.json lay at the top.
"""

import json
import math
import os
import posixpath
import re
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dnnlib.cli import UserError
from dnnlib.files import packed_names, retrying, unpack_advice
from dnnlib.text import listed
from imagesets.classes import CLASS, VECTOR, class_order

METADATA = "dataset.json"
NO_LABEL = -1
MAX_CLASSES = 1000  # more are names, ages or dates, and would make one-hot labels that fill the memory
MAX_FILE_BYTES = 1 << 30  # more is no photograph; read at once it could fill the memory
_LARGEST_NUMBER = float(np.finfo(np.float32).max)
PIXEL_HASH = re.compile(r"[0-9a-f]{32}")
NUMBERED_NAME = re.compile(r"\d{5}/img\d{8}\.png")  # of an image of a data set, and of a group of duplicates there


class MisplacedMetadata(UserError):
    """dataset.json lies in a folder inside that does not hold all images, or in several."""


def image_suffixes() -> set[str]:
    """Return the file name endings of images, as ".png"."""
    return set(PIL.Image.registered_extensions())


class ImageSet:
    """The images of a data set in the order of their names, with labels and groups.

    names:    paths inside the zip or folder, with "/"; those beside dataset.json where that lies in a folder inside
    labels:   None, or int64 [N] with NO_LABEL where there is none, or float32 [N, D] with NaN there
    num_unnamed: images that the labels of dataset.json do not name at all; all of them when there are no labels
    classes:  names of the integer labels, or None when the file names none
    groups:   one text an image: what must not be split; the image's own name where the file names none
    source:   what the file says of its origin

    with_metadata=False leaves dataset.json unread, so that images beside an unfit one can be looked at. The zip is
    opened on first use in each process, so that an ImageSet may be handed to workers. Raises UserError when the path is
    missing, is no readable zip, holds no images, or its dataset.json does not fit; MisplacedMetadata, one of these,
    when dataset.json lies in a folder inside and images lie outside of that, or when there are several.
    """

    def __init__(self, path: str | os.PathLike, *, with_metadata: bool = True):
        self.path = Path(path)
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self._checksums: list[tuple[int, int]] | None = None
        self._raw_names: dict[str, str] = {}  # of members that are listed under another name
        self._folder = ""  # inside, that holds dataset.json, with "/" at its end
        members = retrying(self._list_members, self.path, reset=self.close)
        suffixes = image_suffixes()
        self.names = sorted(name for name in members if _is_image(name, suffixes))
        if not self.names:
            raise UserError(f"{self.path} holds no images; {_what_else(members)}")
        found = _find_metadata(self.path, members, self.names) if with_metadata else None
        if found not in (None, METADATA):
            members = self._enter_folder_of(found, members)
            self.names = [name.removeprefix(self._folder) for name in self.names]
        metadata = {} if found is None else _parse_metadata(self.path, self.read(METADATA), self.names)
        self.labels = _labels_of(self.path, self.names, metadata.get("labels"))
        self.num_unnamed = len(set(self.names).difference(name for name, _ in metadata.get("labels") or []))
        self.classes = _classes_of(self.path, self.labels, metadata.get("classes"))
        self.groups = _groups_of(self.path, self.names, metadata.get("groups"))
        self._hashes = _hashes_of(self.path, self.names, metadata.get("pixel_hashes"))
        source = metadata.get("source")
        self.source: dict[str, Any] = source if isinstance(source, dict) else {}
        self.other_members = sorted(set(members) - set(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        # Checksums and hashes are as long as the set, and workers, who get the copies, read images only.
        return {**self.__dict__, "_archive": None, "_checksums": None, "_hashes": {}}

    @property
    def is_zip(self) -> bool:
        return self.path.is_file()

    @property
    def label_kind(self) -> str | None:
        """CLASS for integers, VECTOR for lists, None where there are no labels."""
        if self.labels is None:
            return None
        return CLASS if self.labels.ndim == 1 else VECTOR

    @property
    def num_unlabelled(self) -> int:
        """Number of images without a label; all of them when there are no labels."""
        if self.labels is None:
            return len(self)
        missing = self.labels == NO_LABEL if self.labels.ndim == 1 else np.isnan(self.labels).any(axis=1)
        return int(missing.sum())

    def locate(self, name: str) -> str:
        """Return the path of a member inside the zip or folder, as it is stored there."""
        return self._raw_names.get(name, self._folder + name)

    def read(self, name: str) -> bytes:
        """Return the bytes of a member. Raises UserError, naming it, when it is missing or damaged, and DiskFailure."""
        return retrying(lambda: self._read(name), f"{self.path}: {name}", reset=self.close)

    def _read(self, name: str) -> bytes:
        try:
            if not self.is_zip:
                return _read_file(self.path / self.locate(name))
            return _read_member(self._zip(), self.locate(name), self.path)
        except (KeyError, FileNotFoundError) as error:
            raise UserError(f"{self.path} has no member {name}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{self.path}: {name} is damaged ({error}); make or copy the data set again") from error
        except OSError as error:  # no permission, or a place outside of a damaged zip; a failing disk was told apart
            raise UserError(f"{self.path}: {name} cannot be read ({error.strerror}); make or copy the data set "
                            "again") from error

    def checksums(self) -> list[tuple[int, int]]:
        """Return (size, CRC-32) of each image; from a zip's directory, while a folder's files are read for it, once."""
        if self._checksums is None:
            self._checksums = retrying(self._read_checksums, self.path, reset=self.close)
        return self._checksums

    def recorded_hash(self, name: str, size: int, crc: int) -> str | None:
        """Return the hash of an image's pixels in dataset.json; None where there is none, or of another file.

        size, crc:  of the file now, as `checksums` returns them
        """
        found, *file = self._hashes.get(name, (None,))
        return found if file == [size, crc] else None

    def named_groups(self) -> list[str | None]:
        """Return the patient or lesion of each image; None where its group is but an image's name."""
        names = set(self.names)
        return [None if group in names or NUMBERED_NAME.fullmatch(group) else group for group in self.groups]

    def use_classes(self, wanted: Sequence[str]) -> None:
        """Let labels be those of the classes `wanted`, by name; a set that names none stays as it is.

        Raises UserError where images are of other classes, or vectors of other columns.
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
        # NO_LABEL is -1, and so takes the last one.
        self.labels = self.labels[:, order] if self.label_kind == VECTOR else np.array([*order, NO_LABEL])[self.labels]
        self.classes = list(wanted)

    def close(self) -> None:
        if self._archive is not None:
            with suppress(OSError):  # of a handle that went stale
                self._archive[1].close()
            self._archive = None

    def _read_checksums(self) -> list[tuple[int, int]]:
        if self.is_zip:
            entries = {info.filename: (info.file_size, info.CRC) for info in self._zip().infolist()}
            return [entries[self.locate(name)] for name in self.names]
        contents = (self.read(name) for name in self.names)
        return [(len(data), zlib.crc32(data)) for data in contents]

    def _zip(self) -> zipfile.ZipFile:
        # A file position shared with a forked parent would be moved by both.
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
        """Return the members under the names that they have when `metadata`, one of them, is dataset.json at the top.

        Those outside of its folder keep their paths.
        """
        folder = metadata[:-len(METADATA)]
        inside = {METADATA if member == metadata else member.removeprefix(folder): member
                  for member in members if member.startswith(folder)}
        listed = {member: member for member in members if not member.startswith(folder)} | inside
        stored = {name: self._raw_names.get(member, member) for name, member in listed.items()}
        self._folder = folder
        self._raw_names = {name: raw for name, raw in stored.items() if raw != folder + name}
        return list(listed)


def plain_path(name: str) -> str:
    """Return the name of a file as a table or a list gives it, with "/" between folders and no "./" or first "/"."""
    path = name.replace("\\", "/")
    if not path.isascii():  # some systems write an accent as a character of its own
        path = unicodedata.normalize("NFC", path)
    return posixpath.normpath(path).lstrip("/") if "/" in path else path


def names_of_files(written: Collection[str], files: Iterable[str]) -> list[str]:
    """Return each name as the file has it; those of no file as they are."""
    known = set(files)
    # A name as it stands comes first: on some systems a file's own name may hold a backslash.
    if known.issuperset(written):
        return list(written)
    by_plain_path: dict[str, str | None] = {}
    for name in known:
        path = plain_path(name)
        by_plain_path[path] = None if path in by_plain_path else name  # of two such files neither is meant
    return [name if name in known else by_plain_path.get(plain_path(name)) or name for name in written]


def _member_path(name: str) -> str:
    """Return a zip member's name with "/" between folders, where some programs of Windows write "\\"; without "./"."""
    path = name.replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    return path


def label_vectors(labels: np.ndarray, length: int) -> np.ndarray:
    """Return labels as networks take them: float32 [N, length]; classes become one-hot, NO_LABEL zeros.

    labels:  int64 [N] below `length`, or float32 [N, length], which come back as they are
    """
    return labels if labels.ndim == 2 else (labels[:, None] == np.arange(length)).astype(np.float32)


def _files_below(path: Path) -> list[str]:
    """Return the files in a folder, linked folders included, as paths with "/"."""
    found, entered = [], {os.path.realpath(path)}
    for folder, subfolders, files in os.walk(path, followlinks=True, onerror=_refuse_folder):
        # Each folder once, by whichever name comes first: links in a circle would never come to an end.
        reached = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(subfolders)}
        subfolders[:] = [name for name, real in reached.items() if not (real in entered or entered.add(real))]
        prefix = os.path.relpath(folder, path)
        found += [name if prefix == "." else f"{prefix}/{name}".replace(os.sep, "/") for name in files]
    return found


def _read_file(path: Path) -> bytes:
    """Return the bytes of a file. Raises UserError for what is none: opening a pipe would wait for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is a pipe or a device; expected a file")
    if excess := excess_of(status.st_size):
        raise UserError(f"{path} {excess}")
    return path.read_bytes()


def _read_member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    """Return the bytes of a zip's member. Raises UserError for one that would fill the memory."""
    if excess := excess_of(archive.getinfo(name).file_size):
        raise UserError(f"{path}: {name} {excess}")
    return archive.read(name)


def excess_of(size: int) -> str | None:
    """Return why a file of so many bytes is too large, to go on from its name; None for one that is not."""
    if size <= MAX_FILE_BYTES:
        return None
    return f"has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read: save it smaller, or leave it out"


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}); expected folders that can") from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        if (advice := unpack_advice(path)) is not None:
            raise UserError(f"{path} {advice}") from error
        raise UserError(f"{path} cannot be read as a zip ({error}): it is cut off or no zip; make or copy it "
                        "again") from error


def _what_else(members: Sequence[str]) -> str:
    """Say what to do with a folder or zip without images."""
    packed = packed_names(sorted(name for name in members if not _is_hidden(name)))
    if not packed:
        return "expected files such as .png or .jpg"
    return f"expected files such as .png or .jpg, not packed ones: take or unpack what lies in it ({listed(packed)})"


def _is_image(name: str, suffixes: set[str]) -> bool:
    return not _is_hidden(name) and os.path.splitext(name)[1].lower() in suffixes


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _find_metadata(path: Path, members: Iterable[str], images: Iterable[str]) -> str | None:
    """Return which member is dataset.json, for all images; None where there is none."""
    found = sorted({name for name in members if name.lower().rpartition("/")[2] == METADATA and not _is_hidden(name)})
    if not found:
        return None
    if len(found) > 1:
        examples = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise MisplacedMetadata(f"{path}: {METADATA} lies in {len(found)} places ({examples}); expected one: give one "
                                "of these folders, take the others out, or join them by dataset_tool.py with a "
                                "--source for each")
    outside = next((name for name in images if not name.startswith(found[0][:-len(METADATA)])), None)
    if outside is not None:
        raise MisplacedMetadata(f"{path}: {METADATA} lies in a folder inside ({found[0]}), and images lie outside of "
                                f"that folder ({outside}); expected it at the top: give that folder, or zip its "
                                "content without the folder")
    return found[0]


def _parse_metadata(path: Path, data: bytes, images: Iterable[str]) -> dict[str, Any]:
    """Return what dataset.json holds, with the files in it under the names that they have in `images`."""
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {METADATA} is not JSON ({error}); expected an object with labels") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: {METADATA} holds a {type(metadata).__name__}; expected an object with labels")
    for field, value in metadata.items():
        if field == "labels" and _are_label_rows(value):
            found = names_of_files([name for name, _ in value], images)
            metadata[field] = [[name, label] for name, (_, label) in zip(found, value)]
        elif field in ("groups", "pixel_hashes") and isinstance(value, dict):
            metadata[field] = dict(zip(names_of_files(value, images), value.values()))
            if len(metadata[field]) != len(value):
                raise UserError(f"{path}: {field} in {METADATA} name a file twice")
    return metadata


def _are_label_rows(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)
                                          for row in rows)


def _labels_of(path: Path, names: list[str], rows: Any) -> np.ndarray | None:
    if rows is None:
        return None
    if not _are_label_rows(rows):
        raise UserError(f"{path}: labels in {METADATA} are not [[file, label], ...]")
    by_name = {name: _plain_label(label) for name, label in rows}
    if len(by_name) != len(rows):
        raise UserError(f"{path}: {METADATA} labels a file twice")
    _refuse_unknown(path, "labels", by_name, names)
    kinds = {_kind_of(path, name, label) for name, label in by_name.items() if label is not None}
    if len(kinds) > 1:
        raise UserError(f"{path}: labels in {METADATA} are of mixed kinds ({', '.join(sorted(kinds))}); expected "
                        "integers, or lists of one length")
    if not kinds:
        return None
    kind = kinds.pop()
    if kind == "integers":
        return np.array([NO_LABEL if by_name.get(name) is None else by_name[name] for name in names], dtype=np.int64)
    missing = [float("nan")] * int(kind.split()[2])
    return np.array([missing if by_name.get(name) is None else by_name[name] for name in names], dtype=np.float32)


def _plain_label(label: Any) -> Any:
    """Return 1 for 1.0, and None for NaN: a column of integers of which some are missing is one of floats in pandas."""
    if isinstance(label, float):
        return None if math.isnan(label) else int(label) if label.is_integer() and abs(label) < 1 << 53 else label
    return label


def _kind_of(path: Path, name: str, label: Any) -> str:
    if isinstance(label, int) and not isinstance(label, bool) and label >= 0:
        if label >= MAX_CLASSES:
            raise UserError(f"{path}: {METADATA} gives {name} the label {label}; expected less than {MAX_CLASSES}, the "
                            "number of a class")
        return "integers"
    if isinstance(label, list) and label and all(isinstance(x, (int, float)) and not isinstance(x, bool) and
                                                 abs(x) <= _LARGEST_NUMBER for x in label):
        return f"lists of {len(label)}"
    raise UserError(f"{path}: {METADATA} gives {name} the label {label!r}; expected an integer >= 0, a list of "
                    "numbers, or null")


def _classes_of(path: Path, labels: np.ndarray | None, classes: Any) -> list[str] | None:
    if classes is None:
        return None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{path}: classes in {METADATA} are {classes!r}; expected a list of names")
    if len(set(classes)) != len(classes):
        raise UserError(f"{path}: classes in {METADATA} name one twice; expected {len(classes)} different names")
    if labels is not None:
        needed = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
        if needed > len(classes):
            raise UserError(f"{path}: {METADATA} names {len(classes)} classes; expected {needed}, as its labels need")
    return classes


def _groups_of(path: Path, names: list[str], groups: Any) -> list[str]:
    if groups is None:
        return list(names)
    if not isinstance(groups, dict) or not all(isinstance(group, str) for group in groups.values()):
        raise UserError(f"{path}: groups in {METADATA} are not an object of texts")
    _refuse_unknown(path, "groups", groups, names)
    return [groups.get(name, name) for name in names]


def _hashes_of(path: Path, names: list[str], hashes: Any) -> dict[str, list[Any]]:
    if hashes is None:
        return {}
    if not isinstance(hashes, dict) or not all(map(_is_hash, hashes.values())):
        raise UserError(f"{path}: pixel_hashes in {METADATA} are not an object of [hash, size, CRC-32]; remove the "
                        "field, and they are computed anew")
    _refuse_unknown(path, "pixel_hashes", hashes, names)
    return hashes


def _is_hash(record: Any) -> bool:
    return (isinstance(record, list) and len(record) == 3 and isinstance(record[0], str)
            and PIXEL_HASH.fullmatch(record[0]) is not None and all(type(number) is int for number in record[1:]))


def _refuse_unknown(path: Path, field: str, found: Mapping[str, Any], names: Iterable[str]) -> None:
    unknown = sorted(set(found) - set(names))
    if unknown:
        examples = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise UserError(f"{path}: {field} in {METADATA} name {len(unknown)} files that are not there ({examples})")
