"""Choose what is projected: read images of any format and size for a network, and find where each starts.

A projection starts from the mean style of a class or label (--class, --label); the images of a set start from their own
class by default.
"""

import hashlib
import io
import os
import stat
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.files import retrying, unpack_advice
from dnnlib.progress import Progress
from generation.network import Classes, Label
from imagesets.classes import NO_LABEL, VECTOR, class_name, known_classes, missing_labels, no_labels
from imagesets.decode import Decoded, decode, may_need_range, probe, probe_range
from imagesets.pixel_formats import BEYOND_DEPTH, BadImage, Depth, depth_remark, widen
from imagesets.reader import ImageSet, excess_of
from imagesets.resize import TRANSFORMS, PixelSpec

AUTO = "auto"  # start from each class
StartClass = Label | Literal["auto"]

STRETCH = "none"  # what dataset_tool.py does without --transform
TARGET_TRANSFORMS = (*TRANSFORMS, STRETCH)
DEFAULT_TRANSFORM, DEFAULT_FILTER = "center-crop", "lanczos"

_EXPECTED = "expected an image file, such as a PNG or JPEG"
# What is wrong with a file, by BadImage's reason, and what is expected.
_REASONS = {
    "zero bytes": f"is empty; {_EXPECTED}",
    "not an image": f"is not an image; {_EXPECTED} (many images, or a data set, go with --data)",
    "unsupported format": "is an image in an unsupported format; expected another: save it as PNG or JPEG",
    "truncated": "ends too early; expected a whole image: copy or download it again",
    "corrupt": "is damaged; expected a whole image: copy or download it again",
    BEYOND_DEPTH: "has values beyond --depth; expected 0 to 2^depth - 1: choose a larger depth, or leave --depth out",
    "not-a-number pixels": "has pixels that are not finite; expected an image without them",
}


def read_target(path: str | os.PathLike, G: nn.Module, *, transform: str = DEFAULT_TRANSFORM,
                resize_filter: str = DEFAULT_FILTER, exact: bool = False, depth: Depth | None = None) -> Tensor:
    """Return the image of --target in the network's size: uint8 [C, R, R].

    transform, resize_filter, exact, depth:  see spec_for

    Prints a note if the image uses fewer bits than its format has. Raises UserError if the file does not exist, or is
    not a usable image.
    """
    spec = spec_for(G, transform, resize_filter, exact, depth)
    data = retrying(lambda: _read_file(path), path)
    try:
        found = decode(data, spec)
    except BadImage as error:
        problem = error.detail or (unpack_advice(path) if error.reason == "not an image" else None) or (
            _too_small(data, spec) if error.reason == "smaller than the wide crop" else _REASONS[error.reason])
        raise UserError(f"--target is {path}, which {problem}") from error
    values = found.values
    if values and (remark := depth_remark(f"this {values.kind} image", values.white, values.largest)):
        print(f"--target is {path}: {remark}", file=sys.stderr)
    return _as_tensor(found)


def _read_file(path: str | os.PathLike) -> bytes:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"--target is {path}, which is a folder; {_EXPECTED} (the images of a folder go with "
                            "--data)")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise UserError(f"--target is {path}, which is a pipe or a device; {_EXPECTED}")
        if excess := excess_of(status.st_size):
            raise UserError(f"--target is {path}, which {excess}")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise UserError(f"--target is {path}, which does not exist; {_EXPECTED}") from error
    except OSError as error:
        raise UserError(f"--target is {path}, which cannot be read ({error.strerror or error}); {_EXPECTED}") from error


def _too_small(data: bytes, spec: PixelSpec) -> str:
    width, height = probe(data)[:2]
    return (f"is {width}x{height}; expected a width of at least {spec.width} pixels and a height of at least 3/4 of it "
            "for --transform=center-crop-wide: use --transform=center-crop")


def spec_for(G: nn.Module, transform: str = DEFAULT_TRANSFORM, resize_filter: str = DEFAULT_FILTER,
             exact: bool = False, depth: Depth | None = None) -> PixelSpec:
    """Return how images are converted for a generator.

    G:             with img_resolution and img_channels
    transform:     "center-crop" takes the largest square, "center-crop-wide" the middle at 4:3, padded with black bars,
                   "none" stretches
    resize_filter, exact, depth:  as in PixelSpec

    Raises UserError for unknown values, and for networks with other than 1 or 3 channels.
    """
    if transform not in TARGET_TRANSFORMS:
        raise UserError(f"--transform is {transform}; expected {', '.join(TRANSFORMS)} or {STRETCH}")
    if G.img_channels not in (1, 3):
        raise UserError(f"the network of --network makes images with {G.img_channels} channels; expected a network of "
                        "gray or RGB images")
    side = G.img_resolution
    return PixelSpec(width=side, height=side * 3 // 4 if transform == "center-crop-wide" else side,
                     transform=None if transform == STRETCH else transform, resize_filter=resize_filter,
                     channels=G.img_channels, exact=exact, depth=depth or Depth())


def prepare(data: bytes, spec: PixelSpec) -> Tensor:
    """Convert an image file for a network: uint8 [C, R, R]. An image of the right size and channels is not changed.

    Raises BadImage if it cannot be converted.
    """
    return _as_tensor(decode(data, spec))


def _as_tensor(found: Decoded) -> Tensor:
    with PIL.Image.open(io.BytesIO(found.png)) as picture:
        pixels = torch.from_numpy(np.array(picture))  # [R, R] or [R, R, 3]
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def read_ranges(images: ImageSet, *, shown: bool) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest value of each kind of image that Depth scales jointly for a whole set."""
    ranges: dict[str, tuple[float, float]] = {}
    names = [name for name in images.names if may_need_range(name)]
    with Progress(len(names), "values of 32-bit and float images") if shown else nullcontext() as progress:
        for name in names:
            with suppress(BadImage, UserError):  # reported when it is projected
                if (found := probe_range(images.read(name))) is not None:
                    widen(ranges, *found)
            if progress is not None:
                progress.advance()
    return ranges


def parse_start(classes: Classes, text: str | None, label: str | None = None) -> StartClass:
    """Return the number of a class, AUTO, the vector of --label, or None if neither is given. Raises UserError.

    A class named "auto" takes precedence over AUTO.
    """
    if text is None and label is None:
        return None
    if label is None and classes.kind != VECTOR and classes.count > 0 and text.strip() not in (classes.names or ()):
        if text.strip().lower() == AUTO:
            return AUTO
        if text.strip() == "all":
            raise UserError(f"--class is all; expected one class, or {AUTO} to try each")
    found = classes.choose(text, label)
    if len(found) > 1:
        raise UserError(f"--class names {len(found)} classes; expected one, or {AUTO} to try each")
    return found[0]


def starts_of_target(classes: Classes, text: str | None, label: str | None = None) -> list[Label]:
    """Return the labels that one image starts from; [None] for an unconditional network. Raises UserError."""
    start = parse_start(classes, text, label)
    if start is None and classes.kind == VECTOR:
        return classes.choose(None)  # raises, since it is missing
    if start is None and classes.count > 0:
        raise UserError("--class is missing, but this network is class-conditional; expected "
                        f"{known_classes(classes.names, classes.count)}, or {AUTO} to try each")
    return list(range(classes.count)) if start == AUTO else [start]


@dataclass(frozen=True, kw_only=True)
class TargetImage:
    """An image of a set."""

    name: str  # of its file in the set
    group: str  # patient, lesion, or the image itself
    label: Label  # in the set; None if it has none
    class_name: str | None  # of that label: its name, or its number if it has no name
    own: Label  # the network's class of that name, or the label itself if both have vectors; None if there is none
    starts: tuple[Label, ...]  # labels of the network to start from; (None,) for an unconditional one


def choose_targets(images: ImageSet, classes: Classes, *, start: StartClass, count: int | None, group_by_class: bool,
                   seed: int) -> list[TargetImage]:
    """Return images in the order of the set; class by class with group_by_class.

    classes:         of the network
    start:           what the images start from. None = their own label; images whose label the network does not know
                     are left out. A class = that class; if the network knows the set's classes, only its images
    count:           size of a random subset, chosen by `seed`; None = all
    group_by_class:  equally many images of each class of the set, as far as available

    Raises UserError if no image is left.
    """
    if count is not None and count < 1:
        raise UserError(f"--count is {count}; expected at least 1")
    labels = _classes_of(images, classes)
    own = _own_labels(images, labels, classes)
    rows = _wanted_rows(images, labels, own, classes, start)
    if group_by_class and (missing := missing_labels(labels[rows])).any():
        raise UserError(f"{images.path} has {int(missing.sum())} images without a class; expected one each "
                        "for --group-by-class")
    random = np.random.RandomState(seed % 2**32)
    if group_by_class:
        kinds = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
        counts = _equal_counts([len(kind) for kind in kinds], count)
        rows = np.concatenate([_draw(kind, number, random) for kind, number in zip(kinds, counts, strict=True)])
    else:
        rows = _draw(rows, count, random)
    every = tuple(range(classes.count)) or (None,)
    return [TargetImage(name=images.names[row], group=images.groups[row], label=_label_of(images, row),
                        class_name=_name_of(images, labels[row]), own=own[row],
                        starts=every if start == AUTO or every == (None,) else (own[row] if start is None else start,))
            for row in rows]


def count_left_out(images: ImageSet, classes: Classes, start: StartClass) -> int:
    """Return how many images of a set are left out, because the network does not know the label to start from."""
    if start is not None or classes.count == 0:
        return 0
    return _own_labels(images, _classes_of(images, classes), classes).count(None)


def _label_of(images: ImageSet, row: int) -> Label:
    label = images.label(row)
    return tuple(label) if isinstance(label, list) else label


def fingerprint(images: ImageSet, targets: Sequence[TargetImage]) -> str:
    """Return a sha256 of the targets: names, labels, sizes, and checksums (zip) or modification times (folder)."""
    known = dict(zip(images.names, images.checksums(), strict=True)) if images.is_zip else {}
    digest = hashlib.sha256()
    for target in targets:
        content = known[target.name] if known else _describe_file(images.path / images.locate(target.name))
        label = target.own if isinstance(target.own, tuple) else target.class_name
        digest.update(f"{target.name}/{content}/{target.group}/{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _describe_file(path: Path) -> tuple[int, int] | None:
    try:
        status = retrying(path.stat, path)
    except OSError:  # reading it will report the error
        return None
    return status.st_size, status.st_mtime_ns


def _own_labels(images: ImageSet, labels: np.ndarray, classes: Classes) -> list[Label]:
    """Return the network's label for each image: the class of the same name, or the image's own vector.

    labels:  the class of each image in the set, int64 [N]

    None for images whose label the network does not know.
    """
    if classes.kind == VECTOR:
        fits = images.label_kind == VECTOR and images.labels.shape[1] == classes.count
        return [_label_of(images, row) if fits else None for row in range(len(images))]
    own = {label: None if label == NO_LABEL else classes.match(label, images.classes)
           for label in np.unique(labels).tolist()}
    return [own[label] for label in labels.tolist()]


def _wanted_rows(images: ImageSet, labels: np.ndarray, own: Sequence[Label], classes: Classes,
                 start: StartClass) -> np.ndarray:
    """Return the rows that can be projected from `start`. Raises UserError if there are none."""
    rows = np.arange(len(images))
    if classes.count == 0 or start == AUTO:
        return rows
    is_known = np.array([label is not None for label in own])
    if start is None:
        rows = np.flatnonzero(is_known)
        if not len(rows) and classes.kind == VECTOR:
            raise UserError(f"{images.path} has no labels of {classes.count} numbers, as the network was trained with; "
                            f"expected such labels, or {classes.known_labels()} to start all images from")
        if not len(rows):
            known = known_classes(classes.names, classes.count)
            found = _names_of(images, labels)
            what = f"has images of {found}, which the network does not know" if found else (
                "has no classes, but this network is class-conditional")
            raise UserError(f"{images.path} {what}; expected {known}: give --class=NAME to start from, or "
                            f"--class={AUTO} to try each")
        return rows
    if isinstance(start, tuple) or not is_known.any():  # all images: the set has other classes, or none
        return rows
    rows = np.flatnonzero([label == start for label in own])
    if not len(rows):
        raise UserError(f"{images.path} has no images of class {classes.name(start)}; expected one of "
                        f"{_names_of(images, labels)}, or leave --class out")
    return rows


def _names_of(images: ImageSet, labels: np.ndarray) -> str:
    return ", ".join(_name_of(images, label) for label in np.unique(labels).tolist() if label != NO_LABEL)


def _classes_of(images: ImageSet, classes: Classes) -> np.ndarray:
    """Return the class of each image, int64 [N], NO_LABEL for none; one-hot vectors count as classes.

    For a network trained with vectors, they do not.
    """
    labels = images.labels
    if labels is None or (labels.ndim == 2 and classes.kind == VECTOR):
        return no_labels(len(images))
    if labels.ndim == 1:
        return labels
    is_one_hot = ((labels == 0) | (labels == 1)).all(axis=1) & (labels.sum(axis=1) == 1)
    return np.where(is_one_hot, np.nan_to_num(labels).argmax(axis=1), NO_LABEL)


def _name_of(images: ImageSet, label: int) -> str | None:
    return None if label == NO_LABEL else class_name(label, images.classes)


def _draw(rows: np.ndarray, count: int | None, random: np.random.RandomState) -> np.ndarray:
    """Return a random subset of rows, in ascending order."""
    return rows if count is None or count >= len(rows) else np.sort(random.permutation(rows)[:count])


def _equal_counts(available: list[int], count: int | None) -> list[int]:
    """Return how many of each class to take: equally many as far as available; the first ones get the remainder."""
    taken = [0] * len(available)
    left = sum(available) if count is None else min(count, sum(available))
    while left:
        for index, most in enumerate(available):
            if taken[index] < most and left:
                taken[index] += 1
                left -= 1
    return taken
