"""The protocol of a study: the task, the data sets that play each part, and what was checked of them.

protocol.json is made once (analysis.make_protocol), and all later commands read it: they refuse data sets that have
changed since, and their results name its `sha256`, which depends on the contents of the parts, not on their places.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from analysis.attributes import AttributeTable, Keys, look_up
from dnnlib.cli import UserError
from dnnlib.files import atomic_write, retrying
from dnnlib.text import listed
from dnnlib.typed_config import Config, ConfigError, FrozenMapping
from imagesets.classes import CLASS, LABELS, class_name
from imagesets.reader import ImageSet
from metrics.image_sources import SetImages
from metrics.intervals import group_numbers

FORMAT, VERSION = "lesion-study-protocol", 1
TRAIN, VAL, TEST, EXTERNAL = "train", "val", "test", "external"  # roles; the first three are also names of parts
SYNTHETIC = "synthetic"  # name of the synthetic set as a part
REST = "rest"  # the negative label of a binary task
LEAST_GROUPS = 2  # of each label, in a part and among the training images in use: one group has no variance
_CONTENT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Task(Config):
    """What classifiers learn. The label of an image is an index into `labels`.

    labels:    (REST, positive label), or the class names of the training part
    positive:  class names that count as positive in any part; () for all classes
    """

    labels: tuple[str, ...]
    positive: tuple[str, ...] = ()

    def check(self) -> None:
        self.require(len(set(self.labels)) == len(self.labels) >= 2, "labels", "two or more different names")
        self.require(not self.positive or len(self.labels) == 2, "labels", "two names for a binary task")

    @property
    def is_binary(self) -> bool:
        return bool(self.positive)

    def label_of(self, class_name: str) -> int | None:
        """Return the label of a class; None if it is not a class of the task, which only occurs with all classes."""
        if self.is_binary:
            return int(class_name in self.positive)
        return self.labels.index(class_name) if class_name in self.labels else None


@dataclass(frozen=True, kw_only=True)
class Part(Config):
    """A data set of the study."""

    name: str
    role: str  # TRAIN, VAL, TEST or EXTERNAL
    path: str
    content_sha256: str  # of files, labels and groups, in order
    pixels_sha256: str  # of decoded pixels: what networks record of their training images
    num_images: int
    num_groups: int
    class_counts: FrozenMapping  # class name -> number of images, only of classes that have some
    class_labels: FrozenMapping  # class name -> label
    label_counts: FrozenMapping  # name of the label -> number of images
    shape: tuple[int, ...]  # channels, height, width


@dataclass(frozen=True, kw_only=True)
class Subset(Config):
    """A part of the training part, on which networks may be trained."""

    name: str
    pixels_sha256: str
    num_images: int


@dataclass(frozen=True, kw_only=True)
class NearDuplicate(Config):
    """An image that resembles a training image as a changed copy does, see analysis.near_duplicates."""

    part: str
    image: str
    training_image: str
    correlation: float
    orientation: str  # how the image is turned before it resembles the training image


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol; see the module.

    parts:                the training part, then validation, test, and external ones
    near_duplicates:      at most the first thousands of `num_near_duplicates`
    created_by:           version of this project
    location:             of the file, for messages
    """

    task: Task
    parts: tuple[Part, ...]
    subsets: tuple[Subset, ...] = ()
    attributes: AttributeTable | None = None
    near_duplicates: tuple[NearDuplicate, ...] = ()
    num_near_duplicates: int = 0
    created_by: str
    location: Path = field(compare=False)

    @property
    def evaluated(self) -> tuple[Part, ...]:
        """The test part and the external sets."""
        return tuple(part for part in self.parts if part.role in (TEST, EXTERNAL))

    def part(self, name: str) -> Part:
        """Return a part by name. Raises UserError if there is none."""
        found = next((part for part in self.parts if part.name == name), None)
        if found is None:
            raise UserError(f"{self.location} has no part {name}; expected one of "
                            f"{listed([part.name for part in self.parts])}")
        return found

    @cached_property
    def sha256(self) -> str:
        """The identity of the protocol, for results: of its content without paths, versions and near-duplicates."""
        record = self.to_dict()
        content = {"version": VERSION, **{name: record[name] for name in ("task", "parts", "subsets", "attributes")}}
        for entry in [*content["parts"], content["attributes"] or {}]:
            entry.pop("path", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the content of protocol.json, with absolute paths."""
        lists = {name: [entry.to_dict() for entry in getattr(self, name)]
                 for name in ("parts", "subsets", "near_duplicates")}
        attributes = None if self.attributes is None else self.attributes.to_dict()
        return {"format": FORMAT, "version": VERSION, "created_by": self.created_by, "task": self.task.to_dict(),
                "parts": lists["parts"], "subsets": lists["subsets"], "attributes": attributes,
                "num_near_duplicates": self.num_near_duplicates, "near_duplicates": lists["near_duplicates"]}

    def write(self, path: str | os.PathLike) -> None:
        """Write protocol.json; data sets below its folder are named relative to it, so that both can be moved."""
        folder = Path(path).absolute().parent
        record = self.to_dict()
        for entry in _with_paths(record):
            place = Path(entry["path"])
            entry["path"] = place.relative_to(folder).as_posix() if place.is_relative_to(folder) else str(place)
        with atomic_write(path, text=True) as file:
            json.dump(record, file, indent=1)
            file.write("\n")

    @classmethod
    def read(cls, path: str | os.PathLike) -> Self:
        """Read protocol.json. Raises UserError if it is missing, is another file or damaged, or of another version."""
        record = _read_record(Path(path))
        try:
            return cls(task=Task.from_dict(record["task"], where="task"),
                       parts=_read_list(Part, record, "parts"), subsets=_read_list(Subset, record, "subsets"),
                       attributes=None if record["attributes"] is None
                       else AttributeTable.from_dict(record["attributes"], where="attributes"),
                       near_duplicates=_read_list(NearDuplicate, record, "near_duplicates"),
                       num_near_duplicates=record["num_near_duplicates"], created_by=record["created_by"],
                       location=Path(path))
        except (ConfigError, KeyError, TypeError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{path} is damaged ({reason}); make it again with study.py protocol") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class LabeledImages:
    """The N images of a data set with what a study knows of them.

    images:       the pixels, by index
    labels:       int64 [N], indices into the labels of the task
    groups:       int64 [N], one number for all images of a patient or lesion
    group_names:  the same as texts; for an image without a group, its own name
    names:        of the files
    classes:      the class name of each image
    """

    images: SetImages
    labels: np.ndarray
    groups: np.ndarray
    group_names: list[str]
    names: list[str]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.names)


def open_part(protocol: Protocol, name: str) -> LabeledImages:
    """Open a part. Raises UserError if it cannot be read, or is not as it was when the protocol was made."""
    return label_images(open_unchanged(protocol, name), protocol.task, protocol.part(name).path)


def open_unchanged(protocol: Protocol, name: str) -> ImageSet:
    """Open the data set of a part. Raises UserError as `open_part` does."""
    part = protocol.part(name)
    images = ImageSet(part.path)
    if hash_part(images) != part.content_sha256:
        raise UserError(f"{part.path} is not the {name} part of {protocol.location} anymore: its images, labels or "
                        "groups have changed; expected the same data set: restore it, or make another protocol with "
                        "study.py protocol")
    return images


def hash_part(images: ImageSet) -> str:
    """Return a sha256 of the images in order, by size and CRC-32, with their classes and groups."""
    names = ["" if label is None else f"{label}" for label in map(images.label, range(len(images)))]
    more = (json.dumps([label, group]).encode() for label, group in zip(names, images.groups, strict=True))
    return images.content_hash(f"{_CONTENT_VERSION}/{json.dumps(images.class_names())}", range(len(images)), more)


def label_images(images: ImageSet, task: Task, name: str) -> LabeledImages:
    """Return the images of a data set with the labels of a task.

    name:  of the data set, for messages

    Raises UserError if labels are missing or of another kind, or images are of classes that the task does not have.
    """
    check_labels(images, name)
    names = [class_name(label, images.classes) for label in images.labels.tolist()]
    label_of = {one: task.label_of(one) for one in dict.fromkeys(names)}
    unknown = [one for one, label in label_of.items() if label is None]
    if unknown:
        raise UserError(f"{name} has images of {listed(unknown)}, which the training part does not "
                        f"have; expected images of {listed(task.labels)}: rename, merge or leave out classes with "
                        "dataset_tool.py --merge and --classes")
    return LabeledImages(images=SetImages(images), labels=np.array([label_of[one] for one in names], dtype=np.int64),
                         groups=group_numbers(images.groups, len(images)), group_names=list(images.groups),
                         names=list(images.names), classes=names)


def check_labels(images: ImageSet, name: str) -> None:
    """Raise UserError unless each image has a class. name: of the data set, for messages"""
    if images.label_kind != CLASS:
        raise UserError(f"{name} has {LABELS[images.label_kind]}; expected the class of each image: "
                        "convert it with dataset_tool.py --labels")
    missing = images.missing_labels()
    if missing.any():
        raise UserError(f"{name} has no label for {int(missing.sum())} of {len(images)} images "
                        f"({images.names[int(missing.argmax())]}, ...); expected one each: convert it with "
                        "dataset_tool.py --unlabeled=drop")


def attributes_of(protocol: Protocol, name: str) -> dict[str, list[str]]:
    """Return column -> value of each image of a part, "" where it is unknown; {} without a table of attributes.

    Raises UserError if the table or a part is missing or has changed.
    """
    protocol.part(name)
    if protocol.attributes is None:
        return {}
    opened = {part.name: open_unchanged(protocol, part.name) for part in protocol.parts}
    keys = {part: Keys.of(images.names, images.named_groups()) for part, images in opened.items()}
    return look_up(protocol.attributes, name, keys)


def _with_paths(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the entries of protocol.json that have a path."""
    yield from record["parts"]
    if record["attributes"] is not None:
        yield record["attributes"]


def _read_record(path: Path) -> dict[str, Any]:
    """Return the content of protocol.json, with absolute paths."""
    try:
        record = json.loads(retrying(lambda: path.read_text(encoding="utf-8"), path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected the file that study.py protocol "
                        "wrote") from error
    except ValueError as error:
        raise UserError(f"{path} is not a protocol ({error}); expected the file that study.py protocol "
                        "wrote") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is not a protocol; expected the file that study.py protocol wrote")
    if record.get("version") != VERSION:
        raise UserError(f"{path} is a protocol of version {record.get('version')}; this program reads version "
                        f"{VERSION}: make it again with study.py protocol")
    try:
        for entry in _with_paths(record):
            entry["path"] = os.path.normpath(path.absolute().parent / entry["path"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged (parts or attributes have no path); make it again with study.py "
                        "protocol") from error
    return record


def _read_list(kind: type[Config], record: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    return tuple(kind.from_dict(entry, where=f"{name}[{index}]") for index, entry in enumerate(record[name]))
