"""Read, check and write dataset.json, which holds the labels and groups of the images of a data set.

It is {"labels": [[file, label], ...] or null}; ours also has "classes", "groups", "pixel_hashes" and "source". A label
is an integer, a list of floats, or null for an image without one. Variants that other programs write are accepted: 1.0
is the integer 1, NaN is null, and names may have "\\" between folders or begin with "./".
"""

import json
import math
import posixpath
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.text import plural, shorten
from imagesets.classes import MAX_CLASSES, no_labels

METADATA = "dataset.json"
PIXEL_HASH = re.compile(r"[0-9a-f]{32}")
NUMBERED_NAME = re.compile(r"\d{5}/img\d{8}\.png")  # of an image of a data set, or a group of duplicates
_LARGEST_NUMBER = float(np.finfo(np.float32).max)


def image_name(index: int) -> str:
    """Return the name of the image with this index, a thousand per folder: "00000/img00000000.png"."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def plain_path(name: str) -> str:
    """Return a file name from a table or list with "/" between folders, and without "./" or "/" at its start."""
    path = name.replace("\\", "/")
    if not path.isascii():  # some systems write an accent as a separate character
        path = unicodedata.normalize("NFC", path)
    return posixpath.normpath(path).lstrip("/") if "/" in path else path


def names_of_files(written: Collection[str], files: Iterable[str]) -> list[str]:
    """Return the name of the file that each written name means; names without a file stay as they are."""
    known = set(files)
    # An exact match comes first: on some systems file names may contain a backslash.
    if known.issuperset(written):
        return list(written)
    by_plain_path: dict[str, str | None] = {}
    for name in known:
        path = plain_path(name)
        by_plain_path[path] = None if path in by_plain_path else name  # two such files are ambiguous: use neither
    return [name if name in known else by_plain_path.get(plain_path(name)) or name for name in written]


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The content of dataset.json for N images.

    labels:      see imagesets.classes
    num_unnamed: number of images that the labels do not name; all of them if there are no labels
    classes:     names of the integer labels, or of a vector's numbers; None if the file names none
    groups:      one text per image; images of one group must not be split; without a group, the image's own name
    hashes:      file -> [hash of its pixels, size, CRC-32]
    source:      the origin of the data set
    """

    labels: np.ndarray | None
    num_unnamed: int
    classes: list[str] | None
    groups: list[str]
    hashes: dict[str, list[Any]]
    source: dict[str, Any]

    @classmethod
    def parse(cls, path: Path, data: bytes, names: list[str]) -> "Metadata":
        """Read dataset.json of the data set `path`, whose images have these names. Raises UserError."""
        fields = _read_fields(path, data, names)
        labels, source = _labels_of(path, names, fields.get("labels")), fields.get("source")
        named = {name for name, _ in fields.get("labels") or []}
        return cls(labels=labels, num_unnamed=len(set(names) - named),
                   classes=_classes_of(path, labels, fields.get("classes")),
                   groups=_groups_of(path, names, fields.get("groups")),
                   hashes=_hashes_of(path, names, fields.get("pixel_hashes")),
                   source=source if isinstance(source, dict) else {})


def origins_of(source: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the `source` of the data that a data set was converted from, or of each part that was joined; [] if it
    was not converted. {} stands for a part that has none.

    source:  of a data set; dataset_tool.py keeps that of the data it converted as "origin", and those of several
             --source that it joined as "sources" in "origin", in which sources without an origin are missing
    """
    origin = source.get("origin")
    if not isinstance(origin, Mapping):
        return []
    parts = origin.get("sources")
    if not isinstance(parts, Mapping):
        return [origin]
    joined = source.get("sources")
    names = [part.get("name") for part in joined if isinstance(part, Mapping)] if isinstance(joined, list) else []
    return [part for part in [*parts.values(), *({} for name in names if name not in parts)]
            if isinstance(part, Mapping)]


def may_be_redistributed(source: Mapping[str, Any]) -> bool | None:
    """Return whether the images of a data set may be passed on to anyone; None if its `source` does not tell.

    Its own record counts, which dataset_tool.py --redistribution makes; without one, phantoms may, and a set that was
    converted may if all data may that it was made from. Projections onto a network of phantoms may not for that reason:
    they show their originals.
    """
    own = source.get("redistribution")
    if isinstance(own, bool):
        return own
    origins = origins_of(source)
    if not origins:
        return True if source.get("phantom") is True and source.get("projected") is not True else None
    found = [may_be_redistributed(origin) for origin in origins]
    return False if False in found else None if None in found else True


def format_metadata(*, labels: Iterable[int | Sequence[float] | None] | None, classes: Sequence[str] | None,
                    groups: Sequence[str | None], hashes: Mapping[int, Sequence[Any]],
                    source: Mapping[str, Any]) -> Iterator[str]:
    """Yield dataset.json of images that are named by image_name(), in pieces, one line per image.

    labels:  of all images, None if no image has one
    hashes:  index of an image -> (hash of its pixels, size, CRC-32)
    """
    if labels is None:
        yield '{"labels": null'
    else:
        separator = '{"labels": [\n'
        for index, label in enumerate(labels):
            yield separator + json.dumps([image_name(index), list(label) if isinstance(label, Sequence) else label])
            separator = ",\n"
        yield "\n]"
    if classes is not None:
        yield f',\n"classes": {json.dumps(classes)}'
    known = ((index, group) for index, group in enumerate(groups) if group is not None)
    for field, entries in (("groups", known), ("pixel_hashes", hashes.items())):
        separator = f',\n"{field}": {{\n'
        for index, value in entries:
            yield f"{separator}{json.dumps(image_name(index))}: {json.dumps(value)}"
            separator = ",\n"
        if separator == ",\n":
            yield "\n}"
    yield f',\n"source": {json.dumps(source, allow_nan=False)}}}\n'


def _read_fields(path: Path, data: bytes, images: Iterable[str]) -> dict[str, Any]:
    """Return the content of dataset.json, with files named as in `images`."""
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
    labels = no_labels(len(names), () if kind == "integers" else (int(kind.split()[2]),))
    for row, name in enumerate(names):
        if by_name.get(name) is not None:
            labels[row] = by_name[name]
    return labels


def _plain_label(label: Any) -> Any:
    """Return 1 for 1.0, and None for NaN: pandas turns a column of integers with missing ones into floats."""
    if isinstance(label, float):
        return None if math.isnan(label) else int(label) if label.is_integer() and abs(label) < 1 << 53 else label
    return label


def _kind_of(path: Path, name: str, label: Any) -> str:
    if isinstance(label, int) and not isinstance(label, bool) and label >= 0:
        if label >= MAX_CLASSES:
            raise UserError(f"{path}: {METADATA} gives {name} the label {label}; expected the number of a "
                            f"class, below {MAX_CLASSES}")
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
                        "field, then they are computed again")
    _refuse_unknown(path, "pixel_hashes", hashes, names)
    return hashes


def _is_hash(record: Any) -> bool:
    return (isinstance(record, list) and len(record) == 3 and isinstance(record[0], str)
            and PIXEL_HASH.fullmatch(record[0]) is not None and all(type(number) is int for number in record[1:]))


def _refuse_unknown(path: Path, field: str, found: Mapping[str, Any], names: Iterable[str]) -> None:
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise UserError(f"{path}: {field} in {METADATA} name "
                        f"{plural(len(unknown), 'file that is', 'files that are')} not there ({shorten(unknown)})")
