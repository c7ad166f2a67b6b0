"""Several folders and zips of one set as one source: HAM10000, for example, comes as two."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from imagesets.labels.classes import order_classes
from imagesets.naming import listed
from imagesets.reader import NO_LABEL
from imagesets.sources.files import class_folders, enclosing_folders, is_numbered
from imagesets.sources.source import Items, Loader, Source


@dataclass(frozen=True)
class _JoinedItems:
    """An item is (number of the source, item there)."""
    parts: Sequence[tuple[int, Items]]  # number of images, items

    def __call__(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        start = 0
        for number, (count, items) in enumerate(self.parts):
            for item in items(wanted[start:start + count]):
                yield number, item
            start += count


@dataclass(frozen=True)
class _JoinedLoader:
    loaders: Sequence[Loader]

    def __call__(self, item: tuple[int, Any], limit: int | None = None) -> bytes | np.ndarray:
        number, inner = item
        return self.loaders[number](inner, limit)


def join(sources: Sequence[Source], names: Sequence[str]) -> Source:
    """Return the images of all sources, one after the other, each named by its source and its name there.

    names: of the sources, all different

    Classes are the same where their names are. Data sets (with a dataset.json) must have the same classes, and folders
    beside them no others; the source's `fault` says where that is not so, for a table may give other labels. Groups of
    the same name are one group. Raises UserError for sources that are no files.
    """
    for source, name in zip(sources, names, strict=True):
        if not source.has_files:
            raise UserError(f"--source: {name} ({source.kind}) cannot be joined with others; expected folders or zips "
                            "of images: convert it alone")
    fault = next((source.fault for source in sources if source.fault is not None), None)
    labels, classes = None, None
    if fault is None:
        try:
            labels, classes = _join_labels(sources, names)
        except UserError as error:
            fault = str(error)
    origins = {name: dict(source.origin) for source, name in zip(sources, names) if source.origin}
    phantom = any(source.origin.get("phantom") for source in sources)
    return Source(
        kind=" + ".join(dict.fromkeys(source.kind for source in sources)), name=" + ".join(names),
        names=[f"{name}/{image}" for source, name in zip(sources, names) for image in source.names],
        items=_JoinedItems([(len(source), source.items) for source in sources]),
        load=_JoinedLoader([source.load for source in sources]), labels=labels, classes=classes,
        groups=_join_groups(sources, names), has_files=True,
        ignored=[f"{name}/{file}" for source, name in zip(sources, names) for file in source.ignored],
        not_chosen=[f"{name}/{file}" for source, name in zip(sources, names) for file in source.not_chosen],
        origin=({"sources": origins} if origins else {}) | ({"phantom": True} if phantom else {}),
        hints=[*(f"{name}: {hint}" for source, name in zip(sources, names) for hint in source.hints),
               *_hints_on_folders(sources, labels)],
        fault=fault, parts=[replace(source, name=name) for source, name in zip(sources, names)])


def repeated_names(source: Source) -> list[str]:
    """Return the names that images of several parts have, apart from those that a data set gives by number."""
    counts = Counter(name for part in source.parts if not is_numbered(part.names) for name in part.names)
    return [name for name, count in counts.items() if count > 1]


def _join_groups(sources: Sequence[Source], names: Sequence[str]) -> list[str | None] | None:
    if all(source.groups is None for source in sources):
        return None
    groups: list[str | None] = []
    for source, name in zip(sources, names):
        # A group may be named by its first image, whose name is another image's elsewhere.
        own = set(source.names)
        known = [None] * len(source) if source.groups is None else source.groups
        groups += [f"{name}/{group}" if group in own else group for group in known]
    return groups


def _join_labels(sources: Sequence[Source], names: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Return the labels of all images, in order. Raises UserError where the sources do not agree on classes."""
    ready = [(source, name) for source, name in zip(sources, names) if source.is_ready and source.labels is not None]
    for source, name in ready[1:]:
        _check_same_classes(*ready[0], source, name)
    folders = _class_folders(sources, ready[0][0].classes if ready else None)
    found = order_classes({folder for part in folders if part is not None for folder in part if folder is not None})
    if ready and found:
        source, name = ready[0]
        other = next((folder for folder in found if folder not in (source.classes or [])), None)
        if source.has_vectors or other is not None:
            kind = (f"lists of {source.labels.shape[1]} numbers" if source.has_vectors else
                    f"the classes {listed(source.classes)}" if source.classes else "numbers of classes without names")
            raise UserError(f"{name} has {kind} as labels, and the folders of other sources are named {listed(found)}; "
                            "expected the same classes in all: convert each alone, or give --labels")
    if not ready and not found:
        return None, None
    classes = ready[0][0].classes if ready else found
    shape = ready[0][0].labels.shape[1:] if ready else ()
    return np.concatenate([_labels_of(source, part, classes, shape) for source, part in zip(sources, folders)]), classes


def _check_same_classes(first: Source, first_name: str, source: Source, name: str) -> None:
    if first.labels.shape[1:] != source.labels.shape[1:]:
        kinds = [f"lists of {one.labels.shape[1]} numbers" if one.has_vectors else "classes" for one in (first, source)]
        raise UserError(f"the labels of {first_name} are {kinds[0]}, those of {name} {kinds[1]}; expected one kind: "
                        "convert each alone, or give --labels")
    one, other = first.classes, source.classes
    same = one == other or (one and other and not first.has_vectors and set(one) == set(other))
    if not same:
        what = [listed(classes) if classes else "numbers without names" for classes in (one, other)]
        raise UserError(f"the classes of {first_name} are {what[0]}, those of {name} {what[1]}; expected the same in "
                        "both: make both with the same --classes, or give --labels")


def _class_folders(sources: Sequence[Source], known: Sequence[str] | None) -> list[list[str | None] | None]:
    """Return the class folder of each image, for each source, None for one without such folders.

    known: classes of data sets among the sources

    In a source whose images all lie in one folder, that is a class where others have it, or have theirs at that depth.
    """
    found = [None if source.is_ready else class_folders(source.names) for source in sources]
    depths = {len(enclosing_folders(source.names)) for source, part in zip(sources, found) if part is not None}
    classes = {*(known or []), *(folder for part in found if part is not None for folder in part)}
    for number, source in enumerate(sources):
        if source.is_ready or found[number] is not None or is_numbered(source.names):
            continue
        around = enclosing_folders(source.names)
        folder = next((name for name in reversed(around) if name in classes), None)
        if folder is None and depths == {len(around) - 1}:
            folder = around[-1]
        found[number] = None if folder is None else [folder] * len(source)
    return found


def _labels_of(source: Source, folders: Sequence[str | None] | None, classes: Sequence[str] | None,
               shape: tuple[int, ...]) -> np.ndarray:
    """Return the labels of a source as numbers of `classes`, or lists of numbers of this shape."""
    if folders is not None:
        index = {name: number for number, name in enumerate(classes)} | {None: NO_LABEL}
        return np.array([index[folder] for folder in folders], dtype=np.int64)
    if not source.is_ready or source.labels is None:
        return np.full((len(source), *shape), np.nan if shape else NO_LABEL, dtype=np.float32 if shape else np.int64)
    if classes is None or source.has_vectors:
        return source.labels
    new_number = np.array([*(classes.index(name) for name in source.classes), NO_LABEL], dtype=np.int64)
    return new_number[source.labels]  # NO_LABEL takes the last


def _hints_on_folders(sources: Sequence[Source], labels: np.ndarray | None) -> Iterator[str]:
    around = [[] if source.is_ready or is_numbered(source.names) else enclosing_folders(source.names)
              for source in sources]
    if labels is None and all(around) and len({tuple(folders) for folders in around}) > 1:
        yield (f"the folders {listed([folders[-1] for folders in around])} are not taken as classes, since each source "
               "has one only; if they are classes, put them into one folder, or give --labels=FILE")
