"""Make a protocol: open the parts of a study, label them, and refuse those that share an image or a group."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from analysis.attributes import Keys, open_table
from analysis.near_duplicates import describe_orientation, find_near_duplicates, read_thumbnails
from analysis.protocol import (
    EXTERNAL,
    LEAST_GROUPS,
    REST,
    SYNTHETIC,
    TEST,
    TRAIN,
    VAL,
    LabeledImages,
    NearDuplicate,
    Part,
    Protocol,
    Subset,
    Task,
    check_labels,
    hash_part,
    label_images,
)
from dnnlib.cli import UserError
from dnnlib.text import listed, plural, shorten, suggestion
from dnnlib.typed_config import FrozenMapping
from imagesets.classes import split_names
from imagesets.pixel_hashes import equal_images, hash_set, read_pixel_hashes
from imagesets.reader import ImageSet
from torch_utils.device import find_project_version
from training.dataset import is_generated, parts_of_source

MOST_LISTED = 5000  # near-duplicates in protocol.json


@dataclass(frozen=True, kw_only=True)
class ProtocolRequest:
    """The options of `study.py protocol`.

    positive:  class names separated by commas; None with multiclass
    """

    train: str
    val: str
    test: str
    external: Sequence[str] = ()
    positive: str | None = None
    multiclass: bool = False
    attributes: str | None = None
    subset: Sequence[str] = ()

    def __post_init__(self):
        if (self.positive is None) != self.multiclass:
            found = "both given" if self.multiclass else "both missing"
            raise UserError(f"--positive and --multiclass are {found}; expected one: --positive=mel for one class "
                            "against the rest, or --multiclass for all classes")

    def given(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield (option, role, name, path) of each part. Raises UserError for names or paths given twice."""
        parts = [(f"--{role}={path}", role, role, path)
                 for role, path in ((TRAIN, self.train), (VAL, self.val), (TEST, self.test))]
        parts += [(f"--external={path}", EXTERNAL, name_of(path), path) for path in self.external]
        names, places = {SYNTHETIC: ""}, {}
        for option, _, name, path in parts:
            place = os.path.realpath(path)
            if place in places:
                raise UserError(f"{option} is the same data set as {places[place]}; expected different parts: split "
                                "one with dataset_tool.py split")
            if name in names:
                taken = f" of {names[name]}" if names[name] else ""
                raise UserError(f"{option} would be named {name}, which is the name{taken} of another part; expected "
                                "different names: rename the file")
            names[name], places[place] = option, option
        yield from parts


@dataclass(frozen=True, kw_only=True, eq=False)
class _Given:
    """A part while the protocol is made."""

    option: str  # with its value, for messages
    role: str
    name: str
    data: ImageSet
    labeled: LabeledImages
    hashes: list[str]


def name_of(path: str) -> str:
    """Return the name of a data set: that of the file without .zip."""
    return Path(path).absolute().name.removesuffix(".zip")


def make_protocol(request: ProtocolRequest, out: str | os.PathLike, *, workers: int = 1) -> Protocol:
    """Check the parts and return their protocol, which is not written yet.

    out:      its file, for messages
    workers:  processes that decode images

    Raises UserError if a data set cannot be read or does not fit the task, if parts share an image or a named group,
    if a subset has other images than the training part, or if the table of attributes cannot be used.
    """
    given = list(request.given())
    opened = {option: _open_real(option, path) for option, _, _, path in given}
    task = choose_task(opened, request.positive)
    parts = []
    for option, role, name, _ in given:
        data = opened[option]
        labeled = label_images(data, task, option)
        _check_counts(option, data, labeled, task, role)
        parts.append(_Given(option=option, role=role, name=name, data=data, labeled=labeled,
                            hashes=read_pixel_hashes(data, workers=workers)))
    _refuse_shared_images(parts)
    _refuse_shared_groups(parts)
    subsets = _read_subsets(request.subset, parts, workers)
    near = _list_near_duplicates(parts, workers)
    keys = {part.name: Keys.of(part.data.names, part.data.named_groups()) for part in parts}
    return Protocol(
        task=task, parts=tuple(_describe(part, task) for part in parts), subsets=subsets,
        attributes=None if request.attributes is None else open_table(request.attributes, keys),
        near_duplicates=tuple(near[:MOST_LISTED]), num_near_duplicates=len(near), created_by=find_project_version(),
        location=Path(out))


def choose_task(parts: Mapping[str, ImageSet], positive: str | None) -> Task:
    """Return the task for the classes of the parts.

    parts:     option -> data set, the training part first
    positive:  --positive; None for all classes

    Raises UserError if a positive class is in no part, or the training part has too few classes.
    """
    used = {option: [name for name, count in _count_classes(data).items() if count] for option, data in parts.items()}
    option, trained = next(iter(used.items()))
    if positive is None:
        if len(trained) < 2:
            raise UserError(f"{option} has images of {listed(trained)} only; expected at least two classes")
        return Task(labels=tuple(trained))
    known = list(dict.fromkeys(name for names in used.values() for name in names))
    names = tuple(dict.fromkeys(split_names(positive, known)))
    for name in names:
        if name not in known:
            raise UserError(f"--positive names {name or 'an empty text'}, which is a class of no part"
                            f"{suggestion(name, known)}; expected some of {listed(known)}")
    label = "+".join(name for name in names if name in trained) or names[0]
    if label == REST:
        raise UserError(f"--positive names the class {REST}, which is the name of all other classes; expected another "
                        "name: rename the class with dataset_tool.py --merge")
    return Task(labels=(REST, label), positive=names)


def _open_real(option: str, path: str) -> ImageSet:
    """Open a part. Raises UserError if it has no classes, or holds images of a network."""
    data = ImageSet(path)
    if any(is_generated(source) for source in parts_of_source(data.source)):
        raise UserError(f"{option} holds images that a network generated; expected photographs: synthetic images are "
                        "no part of a protocol")
    check_labels(data, option)
    return data


def _count_classes(data: ImageSet) -> dict[str, int]:
    """Return class name -> number of images."""
    return {name: int((data.labels == number).sum()) for number, name in enumerate(data.class_names())}


def _check_counts(option: str, data: ImageSet, labeled: LabeledImages, task: Task, role: str) -> None:
    """Raise UserError if a label of the task has no images, or too few groups."""
    where = "each external set" if role == EXTERNAL else "each part"
    for label, name in enumerate(task.labels):
        mine = labeled.labels == label
        groups = {labeled.group_names[row] for row in np.flatnonzero(mine)}
        if not groups:
            meant = f" (classes {listed(task.positive)})" if task.is_binary and label else ""
            have = [one for one, count in _count_classes(data).items() if count]
            raise UserError(f"{option} has no images of {name}{meant}, only of {listed(have)}; expected images of "
                            f"{listed(task.labels)} in {where}: choose other parts, or rename classes with "
                            "dataset_tool.py --merge")
        if len(groups) < LEAST_GROUPS:
            raise UserError(f"{option} has {plural(int(mine.sum()), 'image')} of {name}, all of the group "
                            f"{next(iter(groups))}; expected at least {LEAST_GROUPS} groups (patients or lesions) of "
                            f"each label in {where}, as intervals need: choose larger parts")


def _describe(part: _Given, task: Task) -> Part:
    labeled = part.labeled
    counts = {name: count for name, count in _count_classes(part.data).items() if count}
    return Part(name=part.name, role=part.role, path=os.path.abspath(part.data.path),
                content_sha256=hash_part(part.data), pixels_sha256=hash_set(part.hashes), num_images=len(labeled),
                num_groups=len(np.unique(labeled.groups)),
                class_counts=FrozenMapping(counts),
                class_labels=FrozenMapping({name: task.label_of(name) for name in counts}),
                label_counts=FrozenMapping({name: int((labeled.labels == label).sum())
                                            for label, name in enumerate(task.labels)}),
                shape=tuple(labeled.images.shape))


def _refuse_shared_images(parts: Sequence[_Given]) -> None:
    """Raise UserError if two parts have an image in common, mirrored or not, under any name."""
    faults = []
    for one, other in combinations(parts, 2):
        shared = equal_images(one.hashes, other.hashes)
        if shared:
            names = [f"{one.labeled.names[mine]} is {other.labeled.names[theirs]}" for mine, theirs in shared]
            faults.append(f"{one.option} and {other.option} share {plural(len(shared), 'image')} ({shorten(names)})")
    if faults:
        raise UserError(f"{faults[0]}{_and_more(faults)}; expected no image in two parts, also mirrored: split one "
                        "data set with dataset_tool.py split, which keeps equal images together")


def _refuse_shared_groups(parts: Sequence[_Given]) -> None:
    """Raise UserError if two parts have images of the same patient or lesion."""
    faults = []
    for one, other in combinations(parts, 2):
        groups, num_images = one.labeled.images.shared_groups(other.labeled.images)
        if groups:
            faults.append(f"{one.option} and {other.option} share {plural(len(groups), 'group')} ({shorten(groups)}), "
                          f"{plural(num_images, 'image')} of the first")
    if faults:
        raise UserError(f"{faults[0]}{_and_more(faults)}; expected each patient or lesion in one part: split one data "
                        "set with dataset_tool.py split; if equal names mean different patients, convert one data set "
                        "with dataset_tool.py --groups and a table of other names")


def _and_more(faults: Sequence[str]) -> str:
    return f" (and {plural(len(faults) - 1, 'more pair')} of parts)" if len(faults) > 1 else ""


def _read_subsets(paths: Sequence[str], parts: Sequence[_Given], workers: int) -> tuple[Subset, ...]:
    """Return the named parts of the training part. Raises UserError if one has other images."""
    known = Counter(parts[0].hashes)
    found: dict[str, Subset] = {}
    for path in paths:
        images = ImageSet(path)
        hashes = read_pixel_hashes(images, workers=workers)
        strange = [name for name, one in zip(images.names, hashes, strict=True) if one not in known]
        if strange:
            raise UserError(f"--subset={path} has {plural(len(strange), 'image')} ({shorten(strange)}) that "
                            f"{parts[0].option} does not have; expected a subset of the training part")
        name = name_of(path)
        if name in found:
            raise UserError(f"--subset={path} has the name {name} of another subset; expected different names: rename "
                            "the file")
        found[name] = Subset(name=name, pixels_sha256=hash_set(hashes), num_images=len(hashes))
    return tuple(found.values())


def _list_near_duplicates(parts: Sequence[_Given], workers: int) -> list[NearDuplicate]:
    """Return the images of other parts that resemble training images, those of highest correlation first."""
    trained = read_thumbnails(parts[0].data, workers=workers)
    found = []
    for part in parts[1:]:
        for match in find_near_duplicates(read_thumbnails(part.data, workers=workers), trained):
            found.append(NearDuplicate(
                part=part.name, image=part.labeled.names[match.row], training_image=parts[0].labeled.names[match.other],
                correlation=round(match.correlation, 4), orientation=describe_orientation(match.orientation)))
    return sorted(found, key=lambda one: -one.correlation)
