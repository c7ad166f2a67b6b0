"""Say what a data set holds: classes, groups, sizes, duplicates, problems, and whether it can be trained on."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from imagesets.class_columns import are_findings, class_columns, class_names
from imagesets.duplicates import identical_sets
from imagesets.inspecting.measure import Measures
from imagesets.inspecting.problems import LABELS, MAX_LISTED, TRAINING, Problem, find_problems
from imagesets.reader import METADATA, ImageSet


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """Images of one class; `share` is of all images. Classes of multi-label images overlap."""

    index: int
    name: str
    num_images: int
    share: float
    num_groups: int


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found; as JSON, an object with these fields as keys.

    kind:           "zip" or "folder"
    phantom:        True where dataset.json says that the images are rendered
    num_groups:     groups; an image that is in none counts as one
    label_kind:     "classes", "lists" or None
    folders:        images by sub-folder, where there is no dataset.json
    mixed_groups:   names of groups whose images have different labels, of num_mixed_groups
    sizes, modes:   number of usable images of each "64x64", and of each of Pillow's modes, the most frequent first
    num_duplicates: images that are byte for byte equal to an earlier one
    duplicates:     lists of the names of identical images
    other_files:    members that are not images
    problems:       objects with kind, blocks ("training", "labels" or null), count, message, and files
    ready:          whether a network can be trained on the set; ready_with_labels: also with --cond
    source:         what dataset.json says of the origin

    Lists hold up to 1000 entries.
    """

    path: str
    kind: str
    phantom: bool
    num_images: int
    num_bytes: int
    num_groups: int
    num_unlabelled: int
    label_kind: str | None
    classes: list[ClassCount]
    folders: dict[str, int]
    num_mixed_groups: int
    mixed_groups: list[str]
    sizes: dict[str, int]
    modes: dict[str, int]
    num_duplicates: int
    duplicates: list[list[str]]
    other_files: list[str]
    problems: list[Problem]
    ready: bool
    ready_with_labels: bool
    source: dict[str, Any]


def open_for_inspection(path: str | os.PathLike) -> tuple[ImageSet, str | None]:
    """Open a data set, and return with it what is wrong with its dataset.json, which is then left aside.

    Raises UserError when there is no data set to look at.
    """
    try:
        return ImageSet(path), None
    except UserError as error:
        # Raises again unless dataset.json was the reason.
        return ImageSet(path, with_metadata=False), str(error).removeprefix(f"{os.fspath(path)}: ")


def summarize(images: ImageSet, measures: Measures, metadata_fault: str | None = None) -> Inspection:
    """Draw up what is known of a data set."""
    usable = measures.usable
    rows = np.flatnonzero(usable)
    duplicates = [rows[run] for run in identical_sets(measures.digests[usable])] if len(rows) else []
    group_of = number(images.groups)
    mixed = _mixed_groups(images, group_of)
    sizes = Counter(f"{width}x{height}" for width, height in measures.sizes[usable].tolist())
    modes = Counter(measures.mode_names[mode] for mode in measures.modes[usable].tolist())
    problems = find_problems(images, measures, duplicates, metadata_fault)
    ready = not any(problem.blocks == TRAINING for problem in problems)
    has_labels = images.labels is not None and not any(problem.blocks == LABELS for problem in problems)
    has_metadata = METADATA in images.other_members
    return Inspection(
        path=os.fspath(images.path), kind="zip" if images.is_zip else "folder",
        phantom=images.source.get("phantom") is True, num_images=len(images), num_bytes=int(measures.bytes.sum()),
        num_groups=int(group_of.max()) + 1, num_unlabelled=images.num_unlabelled,
        label_kind=None if images.labels is None else "classes" if images.labels.ndim == 1 else "lists",
        classes=_count_classes(images, group_of), folders={} if has_metadata else _count_folders(images.names),
        num_mixed_groups=len(mixed), mixed_groups=mixed[:MAX_LISTED],
        sizes=dict(sizes.most_common()), modes=dict(modes.most_common()),
        num_duplicates=sum(len(run) - 1 for run in duplicates),
        duplicates=[[images.names[row] for row in run[:MAX_LISTED]] for run in duplicates[:MAX_LISTED]],
        other_files=[name for name in images.other_members if name != METADATA][:MAX_LISTED],
        problems=problems, ready=ready, ready_with_labels=ready and has_labels, source=images.source)


def number(texts: Sequence[str]) -> np.ndarray:
    """Number texts in the order in which they first appear: int64 [N]."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.int64)


def _count_classes(images: ImageSet, group_of: np.ndarray) -> list[ClassCount]:
    columns, findings = class_columns(images), are_findings(images)
    return [ClassCount(index=index, name=name, num_images=int(columns[:, index].sum()),
                       share=float(columns[:, index].mean()), num_groups=len(np.unique(group_of[columns[:, index]])))
            for index, name in enumerate(class_names(images)) if findings[index]]


def _count_folders(names: Sequence[str]) -> dict[str, int]:
    folders = Counter(os.path.dirname(name) for name in names)
    return dict(sorted(folders.items())) if set(folders) != {""} else {}


def _mixed_groups(images: ImageSet, group_of: np.ndarray) -> list[str]:
    """Return the groups whose images have different labels, in order; images without a label do not count."""
    if images.labels is None:
        return []
    labels = images.labels.reshape(len(images), -1)
    _, label_of = np.unique(labels, axis=0, return_inverse=True)
    known = labels[:, 0] >= 0 if images.labels.ndim == 1 else ~np.isnan(labels).any(axis=1)
    pairs = np.unique(np.column_stack([group_of, label_of.reshape(-1)])[known], axis=0)
    names = list(dict.fromkeys(images.groups))
    return [names[group] for group in np.flatnonzero(np.bincount(pairs[:, 0]) > 1)]
