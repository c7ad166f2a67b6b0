"""Attributes of images from a table, such as age or body site: find its key column, and look up each image.

The key is the column whose values match most images, by their file names or by their named groups (patients or
lesions). Converted data sets number their images, so for them the groups are the usual way. A name or group that occurs
in several parts, as the patients of phantoms of different seeds do, identifies none and is not matched; nor are the
file names that dataset_tool.py gives, which every data set has.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from dnnlib.text import shorten
from dnnlib.typed_config import Config, FrozenMapping
from imagesets.metadata import NUMBERED_NAME
from imagesets.tables import DelimitedFile, image_key

IMAGE, GROUP = "image", "group"  # kinds of keys
_UNKNOWN = frozenset({"", "unknown", "na", "n/a", "nan", "null"})  # values, in lower case
_FEWEST_IDS = 20  # fewer rows do not show that a column holds ids
_DISTINCT = 0.9  # share of different values from which texts are ids


@dataclass(frozen=True, kw_only=True)
class AttributeTable(Config):
    """A table of attributes, as a protocol records it."""

    path: str
    sha256: str
    key: str  # IMAGE or GROUP
    key_column: str
    columns: tuple[str, ...]
    left_out: tuple[str, ...]  # columns of ids, and empty ones
    matched: FrozenMapping  # part -> number of images with a row

    def check(self) -> None:
        self.require(self.key in (IMAGE, GROUP), "key", f"{IMAGE} or {GROUP}")


@dataclass(frozen=True, kw_only=True)
class Keys:
    """By what the images of a part are looked up: the key of each image by kind; None for those without one."""

    by_kind: Mapping[str, Sequence[str | None]]

    @classmethod
    def of(cls, files: Sequence[str], groups: Sequence[str | None]) -> "Keys":
        """Return the keys of images by the names of their files, and of their groups; None = no named group."""
        names = [None if NUMBERED_NAME.fullmatch(name) else _base_name(name) for name in files]
        count = Counter(names)
        return cls(by_kind={IMAGE: [name if count[name] == 1 else None for name in names], GROUP: list(groups)})


@dataclass(kw_only=True)
class _Column:
    """The values of a column by key: those that all rows of the key agree on, "" else."""

    values: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, value: str) -> None:
        if self.values.setdefault(key, value) != value:
            self.values[key] = ""

    def is_attribute(self) -> bool:
        """Tell whether the column describes images: not ids, which are texts that are nearly all different."""
        texts = [value for value in self.values.values() if value]
        if not texts:
            return False
        are_ids = len(texts) >= _FEWEST_IDS and len(set(texts)) > _DISTINCT * len(texts)
        return not are_ids or all(map(_is_number, texts))


def open_table(path: str | os.PathLike, parts: Mapping[str, Keys]) -> AttributeTable:
    """Choose the key column of a table and its attributes.

    parts:  name -> keys of its images

    Raises UserError if the table cannot be read, no column names images or groups, or there are no attributes.
    """
    file = DelimitedFile(path)
    repeated = [name for name in dict.fromkeys(file.header) if file.header.count(name) > 1]
    if repeated:
        raise UserError(f"--attributes={path} has several columns named {shorten(repeated)}; expected different names: "
                        "rename or remove some")
    kind, key_column = _choose_key(file, parts)
    columns = _read_columns(file, kind, key_column, _known_keys(kind, parts))
    used = [name for name, column in columns.items() if column.is_attribute()]
    left_out = [name for name in columns if name not in used]
    if not used:
        raise UserError(f"--attributes={path} has no attributes beside {key_column}: {shorten(left_out)} hold ids or "
                        "nothing; expected columns such as sex or localization")
    rows = columns[used[0]].values
    matched = {name: sum(key in rows for key in _unique_keys(kind, name, parts)) for name in parts}
    return AttributeTable(path=os.path.abspath(path), sha256=sha256_of(path), key=kind, key_column=key_column,
                          columns=tuple(used), left_out=tuple(left_out), matched=FrozenMapping(matched))


def look_up(table: AttributeTable, part: str, parts: Mapping[str, Keys]) -> dict[str, list[str]]:
    """Return column -> value of each image of a part, "" where it is unknown or the rows of a group differ.

    parts:  as `open_table` had them, so that keys that occur in several parts are known

    Raises UserError if the table is missing or has changed.
    """
    file = DelimitedFile(table.path)
    if sha256_of(table.path) != table.sha256:
        raise UserError(f"{table.path} is not the table of attributes of the protocol anymore: its content has "
                        "changed; expected the same file: restore it, or make another protocol")
    columns = _read_columns(file, table.key, table.key_column, _known_keys(table.key, parts))
    keys = list(_unique_keys(table.key, part, parts))
    return {name: [columns[name].values.get(key, "") for key in keys] for name in table.columns}


def _choose_key(file: DelimitedFile, parts: Mapping[str, Keys]) -> tuple[str, str]:
    """Return the kind and name of the column that identifies most images; of equal ones the first."""
    num_images: dict[str, dict[str, int]] = {IMAGE: {}, GROUP: {}}  # kind -> key -> number of images
    for kind, counts in num_images.items():
        for name in parts:
            for key in filter(None, _unique_keys(kind, name, parts)):
                counts[key] = counts.get(key, 0) + 1
    found = {(kind, name): set() for kind in num_images for name in file.header}
    for _, cells in file.rows():
        for name, cell in zip(file.header, cells, strict=True):
            for kind, counts in num_images.items():
                key = _as_key(kind, cell) if counts else ""
                if key in counts:
                    found[kind, name].add(key)
    matches = {choice: sum(num_images[choice[0]][key] for key in keys) for choice, keys in found.items()}
    best = max(matches, key=matches.__getitem__)
    if not matches[best]:
        raise UserError(f"--attributes={file.path}: no column names images or groups (patients, lesions) of the data "
                        f"sets; its columns are {shorten(file.header, 10)}: expected the ids that dataset.json has as "
                        "groups, or file names that dataset_tool.py did not give")
    return best


def _read_columns(file: DelimitedFile, kind: str, key_column: str, known: frozenset[str]) -> dict[str, _Column]:
    """Return the other columns by name, with the values of known keys."""
    place = file.header.index(key_column)
    columns = {name: _Column() for name in file.header if name != key_column}
    for _, cells in file.rows():
        key = _as_key(kind, cells[place])
        if key in known:
            for name, cell in zip(file.header, cells, strict=True):
                if name != key_column:
                    columns[name].add(key, "" if cell.lower() in _UNKNOWN else cell)
    return columns


def _known_keys(kind: str, parts: Mapping[str, Keys]) -> frozenset[str]:
    return frozenset(key for name in parts for key in _unique_keys(kind, name, parts) if key is not None)


def _unique_keys(kind: str, part: str, parts: Mapping[str, Keys]) -> Iterator[str | None]:
    """Yield the key of each image of a part; None for keys that also occur in another part."""
    elsewhere = set(_flatten(keys.by_kind[kind] for name, keys in parts.items() if name != part))
    return (None if key in elsewhere else key for key in parts[part].by_kind[kind])


def _flatten(lists: Iterable[Sequence[str | None]]) -> Iterator[str | None]:
    return (key for keys in lists for key in keys)


def _as_key(kind: str, cell: str) -> str:
    return _base_name(cell) if kind == IMAGE else cell


def _base_name(name: str) -> str:
    """Return the name of an image without folders and extension."""
    return image_key(name).rpartition("/")[2]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
