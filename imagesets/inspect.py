"""Inspect a data set: decode every image once, count classes, groups, sizes and duplicates, and find problems."""

import hashlib
import io
import os
import struct
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import PIL.Image

from dnnlib.cli import UserError
from dnnlib.text import plural
from dnnlib.workers import ordered_map
from imagesets.classes import VECTOR, class_name
from imagesets.metadata import METADATA
from imagesets.pixel_formats import MAX_DEPTH, MIN_DEPTH, depth_remark
from imagesets.pixel_hashes import DIGEST_SIZE, identical_sets, number_values
from imagesets.reader import ImageSet, describe_excess
from imagesets.resize import MAX_RESOLUTION, MIN_RESOLUTION, is_power_of_two

TRAINING, LABELS = "training", "labels"  # what a problem blocks: all training, or only training with --cond

MAX_LISTED = 1000  # names in a list; counts are always of all
_MAX_IN_SET = 5  # names of a set of identical images
_DARK = 64  # of 255: what the largest 14-bit value becomes when it is taken for a 16-bit one
_CHUNK = 32  # images that a worker takes at a time; one of 64x64 pixels takes a third of a millisecond


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """Images of one class; `share` is of all images. Classes of multi-label images overlap."""

    index: int
    name: str
    num_images: int
    share: float
    num_groups: int


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something to fix.

    kind:    its name, a word or two
    blocks:  TRAINING, LABELS, or None if training may ignore it
    count:   number of files, classes or sets of files that have it
    message: what it is, and what to do
    files:   names, with reasons where they differ; up to 1000
    """

    kind: str
    blocks: str | None
    count: int
    message: str
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found; as JSON, an object with these fields as keys.

    kind:           "zip" or "folder"
    phantom:        True if dataset.json marks the images as rendered
    num_groups:     groups; an image without a group counts as one
    label_kind:     "classes", "lists" or None
    folders:        number of images in each subfolder, if there is no dataset.json
    mixed_groups:   names of groups whose images have different labels; num_mixed_groups counts all of them
    sizes, modes:   number of usable images of each "64x64", and of each of Pillow's modes, the most frequent first
    num_duplicates: images that are byte for byte equal to an earlier one
    duplicates:     lists of the names of identical images
    other_files:    members that are not images
    problems:       objects with kind, blocks ("training", "labels" or null), count, message, and files
    ready:          whether a network can be trained on the set; ready_with_labels: also with --cond
    source:         the origin as dataset.json records it

    Lists hold up to 1000 entries.
    """

    path: str
    kind: str
    phantom: bool
    num_images: int
    num_bytes: int
    num_groups: int
    num_unlabeled: int
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


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Facts about N images, a row each.

    digests: uint8 [N, 32], sha256
    bytes:   int64 [N]
    sizes:   int64 [N, 2], width and height; 0 if faulty
    modes:   int64 [N], index into mode_names, Pillow's "RGB", "L", ...; meaningless if faulty
    largest: int64 [N], the largest value of any pixel and channel; 0 if faulty
    faults:  row -> why the image cannot be used
    """

    digests: np.ndarray
    bytes: np.ndarray
    sizes: np.ndarray
    modes: np.ndarray
    mode_names: list[str]
    largest: np.ndarray
    faults: dict[int, str]

    @property
    def usable(self) -> np.ndarray:
        """bool [N], False if faulty."""
        result = np.ones(len(self.bytes), dtype=bool)
        result[list(self.faults)] = False
        return result


def open_for_inspection(path: str | os.PathLike) -> tuple[ImageSet, str | None]:
    """Open a data set; return it, and what is wrong with its dataset.json, which is then ignored, or None.

    Raises UserError when there is no readable data set.
    """
    try:
        return ImageSet(path), None
    except UserError as error:
        # Raises again unless dataset.json was the reason.
        return ImageSet(path, with_metadata=False), str(error).removeprefix(f"{os.fspath(path)}: ")


def measure(images: ImageSet, *, workers: int = 1, on_image: Callable[[], None] = lambda: None) -> Measures:
    """Read and decode all images; a fault is noted, not raised."""
    digests, numbers, mode_names, faults = bytearray(), array("q"), {}, {}
    with closing(ordered_map(partial(_measure_one, images), images.names, workers, chunk=_CHUNK)) as results:
        for row, (digest, num_bytes, width, height, mode, largest, fault) in enumerate(results):
            digests += digest
            numbers.extend((num_bytes, width, height, mode_names.setdefault(mode, len(mode_names)), largest))
            if fault is not None:
                faults[row] = fault
            on_image()
    table = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 5)
    return Measures(digests=np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_SIZE), bytes=table[:, 0],
                    sizes=table[:, 1:3], modes=table[:, 3], mode_names=list(mode_names), largest=table[:, 4],
                    faults=faults)


def summarize(images: ImageSet, measures: Measures, metadata_fault: str | None = None) -> Inspection:
    """Summarize a data set.

    metadata_fault: why dataset.json was not read, None if it was
    """
    usable = measures.usable
    rows = np.flatnonzero(usable)
    duplicates = [rows[run] for run in identical_sets(measures.digests[usable])] if len(rows) else []
    group_of = number_values(images.groups)
    mixed = _mixed_groups(images, group_of)
    sizes = Counter(f"{width}x{height}" for width, height in measures.sizes[usable].tolist())
    modes = Counter(measures.mode_names[mode] for mode in measures.modes[usable].tolist())
    problems = _find_problems(images, measures, duplicates, metadata_fault)
    ready = not any(problem.blocks == TRAINING for problem in problems)
    has_labels = images.labels is not None and not any(problem.blocks == LABELS for problem in problems)
    folders = Counter(os.path.dirname(name) for name in images.names)
    has_folders = METADATA not in images.other_members and set(folders) != {""}
    return Inspection(
        path=os.fspath(images.path), kind="zip" if images.is_zip else "folder",
        phantom=images.source.get("phantom") is True, num_images=len(images), num_bytes=int(measures.bytes.sum()),
        num_groups=int(group_of.max()) + 1, num_unlabeled=int(images.missing_labels().sum()),
        label_kind=None if images.labels is None else "lists" if images.label_kind == VECTOR else "classes",
        classes=_count_classes(images, group_of), folders=dict(sorted(folders.items())) if has_folders else {},
        num_mixed_groups=len(mixed), mixed_groups=mixed[:MAX_LISTED],
        sizes=dict(sizes.most_common()), modes=dict(modes.most_common()),
        num_duplicates=sum(len(run) - 1 for run in duplicates),
        duplicates=[[images.names[row] for row in run[:MAX_LISTED]] for run in duplicates[:MAX_LISTED]],
        other_files=[name for name in images.other_members if name != METADATA][:MAX_LISTED],
        problems=problems, ready=ready, ready_with_labels=ready and has_labels, source=images.source)


def _count_classes(images: ImageSet, group_of: np.ndarray) -> list[ClassCount]:
    columns, findings = images.class_columns(), images.are_findings()
    return [ClassCount(index=index, name=name, num_images=int(columns[:, index].sum()),
                       share=float(columns[:, index].mean()), num_groups=len(np.unique(group_of[columns[:, index]])))
            for index, name in enumerate(images.class_names()) if findings[index]]


def _mixed_groups(images: ImageSet, group_of: np.ndarray) -> list[str]:
    """Return the groups whose images have different labels, in order; images without a label do not count."""
    if images.labels is None:
        return []
    labels = images.labels.reshape(len(images), -1)
    _, label_of = np.unique(labels, axis=0, return_inverse=True)
    pairs = np.unique(np.column_stack([group_of, label_of.reshape(-1)])[~images.missing_labels()], axis=0)
    names = list(dict.fromkeys(images.groups))
    return [names[group] for group in np.flatnonzero(np.bincount(pairs[:, 0]) > 1)]


def _measure_one(images: ImageSet, name: str) -> tuple[bytes, int, int, int, str, int, str | None]:
    """Return digest, number of bytes, width, height, mode, largest value, and why the image is unusable or None."""
    try:
        data = images.read(name)
    except UserError as error:
        why = f"damaged: {error.__cause__}" if error.__cause__ is not None else str(error)
        return bytes(DIGEST_SIZE), 0, 0, 0, "", 0, why
    except OSError as error:
        return bytes(DIGEST_SIZE), 0, 0, 0, "", 0, f"unreadable: {error.strerror}"
    digest, num_bytes = hashlib.sha256(data).digest(), len(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # training also refuses images that Pillow warns about
            image = PIL.Image.open(io.BytesIO(data))
            image.load()
    except PIL.UnidentifiedImageError:
        fault = "not an image" if data else "zero bytes"
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        fault = f"too large: {describe_excess(error)}"
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Warning) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        fault = "truncated" if "truncated" in text else text
    else:
        return digest, num_bytes, image.width, image.height, image.mode, _largest_value(image), None
    return digest, num_bytes, 0, 0, "", 0, fault


def _largest_value(image: PIL.Image.Image) -> int:
    extrema = image.getextrema()
    largest = max(high for _, high in extrema) if isinstance(extrema[0], tuple) else extrema[1]
    return int(largest) if np.isfinite(largest) else 0


def _find_problems(images: ImageSet, measures: Measures, duplicates: Sequence[np.ndarray],
                  metadata_fault: str | None) -> list[Problem]:
    """Return all problems, those that stop training first.

    duplicates:     rows of byte-identical images
    metadata_fault: why dataset.json was not read
    """
    found = [*_metadata_problems(images, metadata_fault), *_damaged(images, measures),
             *_size_problems(images, measures), *_mode_problems(images, measures),
             *_depth_problems(images, measures), *_label_problems(images), *_duplicate_problems(images, duplicates)]
    return sorted(found, key=lambda problem: [TRAINING, LABELS, None].index(problem.blocks))


def _problem(kind: str, blocks: str | None, message: str, files: Sequence[str], count: int | None = None) -> Problem:
    return Problem(kind=kind, blocks=blocks, count=len(files) if count is None else count, message=message,
                   files=list(files[:MAX_LISTED]))


def _metadata_problems(images: ImageSet, fault: str | None) -> Iterator[Problem]:
    if fault is not None:
        yield _problem("dataset.json", TRAINING, f"{fault}; labels and groups were not read: make the set again", [], 1)
    repeated = [name for name, count in Counter(images.names).items() if count > 1]
    if repeated:
        yield _problem("repeated", TRAINING, f"{plural(len(repeated), 'name')} more than once in the zip: make it "
                       "again", repeated)


def _damaged(images: ImageSet, measures: Measures) -> Iterator[Problem]:
    if measures.faults:
        yield _problem("damaged", TRAINING, f"{plural(len(measures.faults), 'file')} cannot be decoded: make or copy "
                       "the set again", [f"{images.names[row]} ({why})" for row, why in measures.faults.items()])


def _size_problems(images: ImageSet, measures: Measures) -> Iterator[Problem]:
    usable = np.flatnonzero(measures.usable)
    if not len(usable):
        return
    sizes, size_of, counts = np.unique(measures.sizes[usable], axis=0, return_inverse=True, return_counts=True)
    names = [images.names[row] for row in usable]

    def files_where(wrong: np.ndarray) -> list[str]:
        return [names[place] for place in np.flatnonzero(wrong[size_of.reshape(-1)])]

    if len(sizes) > 1:
        rare = np.arange(len(sizes)) != np.argmax(counts)
        yield _problem("mixed sizes", TRAINING, f"{len(sizes)} sizes; expected one: convert with --resolution",
                       files_where(rare))
    width, height = sizes.T
    if (wrong := width != height).any():
        files = files_where(wrong)
        yield _problem("not square", TRAINING, f"{plural(len(files), 'image is', 'images are')} not square: "
                       "convert with --transform=center-crop", files)
    is_power = np.array([is_power_of_two(side) for side in width.tolist()])
    if (wrong := (width == height) & ~is_power).any():
        files = files_where(wrong)
        yield _problem("not a power of two", TRAINING, f"{plural(len(files), 'image has', 'images have')} sides that "
                       "are not a power of two: convert with a --resolution such as 256x256", files)
    beyond = (width < MIN_RESOLUTION) | (width > MAX_RESOLUTION)
    if (wrong := (width == height) & is_power & beyond).any():
        files = files_where(wrong)
        yield _problem("size out of range", TRAINING, f"{plural(len(files), 'image is', 'images are')} not "
                       f"{MIN_RESOLUTION} to {MAX_RESOLUTION} pixels wide and high: convert with --resolution", files)


def _mode_problems(images: ImageSet, measures: Measures) -> Iterator[Problem]:
    modes = [measures.mode_names[mode] for mode in measures.modes]
    usable = np.flatnonzero(measures.usable)
    wrong = [row for row in usable if modes[row] not in ("L", "RGB")]
    if wrong:
        yield _problem("mode", TRAINING, f"{plural(len(wrong), 'image is', 'images are')} neither RGB nor 8-bit gray: "
                       "convert the set", [f"{images.names[row]} ({modes[row]})" for row in wrong])
    gray = [row for row in usable if modes[row] == "L"]
    color = [row for row in usable if modes[row] == "RGB"]
    if gray and color:
        yield _problem("mixed modes", TRAINING, f"{plural(len(gray), 'gray image')} and {len(color)} in color; "
                       "expected one kind: convert the set", [images.names[row] for row in min(gray, color, key=len)])


def _depth_problems(images: ImageSet, measures: Measures) -> Iterator[Problem]:
    """Find data sets that are nearly black, as 12-bit values in 16-bit files become."""
    recorded = _recorded_values(images.source)
    for kind, white, largest in recorded:
        if (remark := depth_remark(f"all {kind} images", white, largest)) is not None:
            yield _problem("depth", None, f"{remark}: convert the source again", [], len(images))
    is_16_bit = np.array([name.startswith("I;16") for name in measures.mode_names], dtype=bool)[measures.modes]
    deep, flat = measures.usable & is_16_bit, measures.usable & ~is_16_bit
    if deep.any():
        remark = depth_remark("all 16-bit images", (1 << MAX_DEPTH) - 1, int(measures.largest[deep].max()))
        if remark is not None:
            yield _problem("depth", None, f"{remark}: convert the set", [], int(deep.sum()))
    if flat.any() and not recorded and 0 < (largest := int(measures.largest[flat].max())) <= _DARK:
        bits = next(bits for bits in range(MIN_DEPTH, MAX_DEPTH + 1) if ((1 << bits) - 1) / 257 > largest - 0.5)
        yield _problem("dark", None, f"largest value {largest} of 255 in all images: {bits}-bit data in 16-bit files? "
                       f"convert the source again with --depth={bits}", [], int(flat.sum()))


def _recorded_values(source: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Return kind, white and largest value of images with more than 8 bits, as the conversion recorded them."""
    values = source.get("values")
    entries = values.items() if isinstance(values, dict) else ()
    return [(kind, found["white"], found["largest"]) for kind, found in entries if isinstance(found, dict)
            and all(isinstance(found.get(key), (int, float)) for key in ("white", "largest"))]


def _label_problems(images: ImageSet) -> Iterator[Problem]:
    if images.labels is None:
        return
    missing = [images.names[row] for row in np.flatnonzero(images.missing_labels())]
    if missing:
        yield _problem("unlabeled", LABELS, f"{plural(len(missing), 'image')} without a label ({images.num_unnamed} "
                       f"not named in {METADATA}): convert with --unlabeled=drop, or run train.py without --cond",
                       missing)
    is_empty = images.are_findings() & ~images.class_columns().any(axis=0)
    empty = [name for name, empty in zip(images.class_names(), is_empty, strict=True) if empty]
    if empty:
        # A class without images still takes a place in the label, and nothing trains it.
        yield _problem("empty class", None, f"{plural(len(empty), 'class', 'classes')} without an image: "
                       f"{', '.join(empty)}", [], len(empty))


def _duplicate_problems(images: ImageSet, duplicates: Sequence[np.ndarray]) -> Iterator[Problem]:
    contradictory, scattered = [], []
    for rows in duplicates:
        # One image of each label, and of each group, is enough to find the others.
        by_label = {_label_text(images, label): row for row in rows[::-1] if (label := images.label(row)) is not None}
        if len(by_label) > 1:
            texts = [f"{images.names[row]} ({text})" for text, row in by_label.items()]
            contradictory.append(" = ".join(sorted(texts)[:_MAX_IN_SET]))
        by_group = {images.groups[row]: row for row in rows[::-1]}
        if len(by_group) > 1:
            scattered.append(" = ".join(images.names[row] for row in sorted(by_group.values())[:_MAX_IN_SET]))
    if contradictory:
        yield _problem("contradictory labels", None, f"{plural(len(contradictory), 'set')} of identical images with "
                       "different labels: correct the table and convert again", contradictory)
    if scattered:
        yield _problem("identical across groups", None, f"{plural(len(scattered), 'set')} of identical images in "
                       "different groups; split keeps these together", scattered)


def _label_text(images: ImageSet, label: int | list[float]) -> str:
    """Return a label as text: the name of a class, or the numbers of a vector."""
    return str(label) if isinstance(label, list) else class_name(label, images.classes)
