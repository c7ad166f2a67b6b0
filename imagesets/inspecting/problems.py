"""Find what is wrong with a data set, and what that stops."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imagesets.class_columns import are_findings, class_columns, class_names, label_of, label_text
from imagesets.inspecting.measure import Measures
from imagesets.pixels.depth import MAX_DEPTH, MIN_DEPTH, depth_remark
from imagesets.reader import METADATA, ImageSet
from imagesets.resolutions import MAX_RESOLUTION, MIN_RESOLUTION
from imagesets.text_table import plural

TRAINING, LABELS = "training", "labels"  # what a problem blocks: all training, or only training with --cond

MAX_LISTED = 1000  # names in a list; counts are always of all
_MAX_IN_SET = 5  # names of a set of identical images
_DARK = 64  # of 255: what the largest number of 14 bits becomes when it is taken for one of 16


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something to put right.

    kind:    which, in a word or two
    blocks:  TRAINING, LABELS, or None where training may ignore it
    count:   number of files, classes or sets of files that have it
    message: what it is, and what to do
    files:   names, with reasons where they differ; up to 1000
    """

    kind: str
    blocks: str | None
    count: int
    message: str
    files: list[str]


def find_problems(images: ImageSet, measures: Measures, duplicates: Sequence[np.ndarray],
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
        yield _problem("repeated", TRAINING, f"{plural(len(repeated), 'name')} twice in the zip: make it again",
                       repeated)


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
    if (wrong := (width == height) & (width & (width - 1) != 0)).any():
        files = files_where(wrong)
        yield _problem("not a power of two", TRAINING, f"{plural(len(files), 'image has', 'images have')} sides that "
                       "are no power of two: convert with --resolution=256x256, say", files)
    beyond = (width < MIN_RESOLUTION) | (width > MAX_RESOLUTION)
    if (wrong := (width == height) & (width & (width - 1) == 0) & beyond).any():
        files = files_where(wrong)
        yield _problem("size out of range", TRAINING, f"{plural(len(files), 'image is', 'images are')} not of "
                       f"{MIN_RESOLUTION} to {MAX_RESOLUTION} pixels a side: convert with --resolution", files)


def _mode_problems(images: ImageSet, measures: Measures) -> Iterator[Problem]:
    modes = [measures.mode_names[mode] for mode in measures.modes]
    usable = np.flatnonzero(measures.usable)
    wrong = [row for row in usable if modes[row] not in ("L", "RGB")]
    if wrong:
        yield _problem("mode", TRAINING, f"{plural(len(wrong), 'image is', 'images are')} neither RGB nor 8-bit grey: "
                       "convert the set", [f"{images.names[row]} ({modes[row]})" for row in wrong])
    grey = [row for row in usable if modes[row] == "L"]
    colour = [row for row in usable if modes[row] == "RGB"]
    if grey and colour:
        yield _problem("mixed modes", TRAINING, f"{plural(len(grey), 'grey image')} and {len(colour)} in colour; "
                       "expected one kind: convert the set", [images.names[row] for row in min(grey, colour, key=len)])


def _depth_problems(images: ImageSet, measures: Measures) -> Iterator[Problem]:
    """Tell sets that are nearly black, as numbers of 12 bits in 16-bit files become."""
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
    """Return kind, white and largest value of images of more than 8 bits, as the conversion has recorded them."""
    values = source.get("values")
    entries = values.items() if isinstance(values, dict) else ()
    return [(kind, found["white"], found["largest"]) for kind, found in entries if isinstance(found, dict)
            and all(isinstance(found.get(key), (int, float)) for key in ("white", "largest"))]


def _label_problems(images: ImageSet) -> Iterator[Problem]:
    if images.labels is None:
        return
    missing = [name for row, name in enumerate(images.names) if label_of(images, row) is None]
    if missing:
        yield _problem("unlabelled", LABELS, f"{plural(len(missing), 'image')} without a label ({images.num_unnamed} "
                       f"not named in {METADATA}): convert with --unlabelled=drop, or run train.py without --cond",
                       missing)
    is_empty = are_findings(images) & ~class_columns(images).any(axis=0)
    empty = [name for name, empty in zip(class_names(images), is_empty, strict=True) if empty]
    if empty:
        # A class without images still takes a place in the label, and nothing trains it.
        yield _problem("empty class", None, f"{plural(len(empty), 'class', 'classes')} without an image: "
                       f"{', '.join(empty)}", [], len(empty))


def _duplicate_problems(images: ImageSet, duplicates: Sequence[np.ndarray]) -> Iterator[Problem]:
    contradictory, scattered = [], []
    for rows in duplicates:
        # One image of each label, and of each group, is enough to find the others.
        by_label = {label_text(images, row): row for row in rows[::-1] if label_of(images, row) is not None}
        if len(by_label) > 1:
            texts = [f"{images.names[row]} ({label})" for label, row in by_label.items()]
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
