"""Write a labeled data set of generated images, piece by piece; the same command continues after an interruption.

The seed, the label and the piece of every image are fixed before the first is made. Labels come class by class, or are
taken from a data set.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.cli import UserError
from dnnlib.progress import Progress
from dnnlib.text import listed
from generation.image_generator import GLOBAL_CENTER, LARGEST_SEED, ImageGenerator
from generation.network import Classes, Label, OpenNetwork
from generation.pictures import as_png
from imagesets.classes import CLASS, LABELS, VECTOR, class_name, known_classes
from imagesets.pixel_hashes import hash_pixels
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from torch_utils.distributed import Processes
from torch_utils.piecework import OPERATORS, Pieces, complete, count_images, differences
from training.sampling import TrainingOrder

# Of a piece: the most that a crash loses. Larger pieces would lose more, smaller ones would be many files.
_PIECE_IMAGES, _PIECE_BYTES = 256, 16 << 20
_MOST_CENTERS = 1000  # each takes a second with a large network on a CPU


@dataclass(frozen=True, kw_only=True)
class SetContents:
    """The contents of a labeled data set. Images are numbered from 0; image i has seed first_seed + i.

    first_seed:  of image 0
    count:       number of images
    counts:      number of images of each class, [c_dim], class after class; None without classes
    piece:       images per piece, which are computed and saved together
    drawn:       the label of each image, if taken from a data set; None if they come class by class
    labels_from: name of that data set
    note:        a line for the user about how its classes were matched
    """

    first_seed: int
    count: int
    counts: tuple[int, ...] | None
    piece: int
    drawn: Sequence[Label] | None = None
    labels_from: str | None = None
    note: str | None = None

    def __post_init__(self):
        if self.first_seed + self.count - 1 > LARGEST_SEED:
            raise UserError(f"--seeds is {self.first_seed}, so the last seed of {self.count} images would be "
                            f"{self.first_seed + self.count - 1}; the largest seed is {LARGEST_SEED}: start lower, or "
                            "make fewer images")

    @property
    def num_pieces(self) -> int:
        return -(-self.count // self.piece)

    def images(self, piece: int) -> range:
        """Return the numbers of the images of a piece."""
        return range(piece * self.piece, min((piece + 1) * self.piece, self.count))

    def seeds(self, images: range) -> list[int]:
        return [self.first_seed + image for image in images]

    def labels(self, images: range) -> list[Label]:
        """Return the label of each of some images."""
        if self.drawn is not None:
            return list(self.drawn[images.start:images.stop])
        if self.counts is None:
            return [None] * len(images)
        found, end = [], 0
        for label, count in enumerate(self.counts):
            start, end = end, end + count
            found += [label] * max(min(end, images.stop) - max(start, images.start), 0)
        return found


def write_labeled_set(dest: str | os.PathLike, network: OpenNetwork, generator: ImageGenerator, contents: SetContents,
                       processes: Processes) -> bool:
    """Write the zip `dest`; return False if it already is this data set.

    All processes of a run call this; they share the folder of `dest`. The contents of a piece do not depend on the
    number of processes. Finished pieces are kept in a folder beside `dest` until all are there.
    LIMIT: bytes are equal only if each process has equally many threads. On a CPU, one thread sums in another order
    than several: about one pixel value in 10,000 changes by 1.

    Raises UserError if `dest` is another file or cannot be written, if another process is working on it, or if pieces
    of another data set are there.
    """
    # The operators in use do not belong to the origin: pieces record theirs (torch_utils.piecework).
    origin = _describe_origin(network, contents, generator)
    pieces = Pieces(dest, {**origin, "count": contents.count, "piece": contents.piece})
    sizes = [len(contents.images(number)) for number in range(contents.num_pieces)]
    # If there are still pieces, only their removal is missing, or another process is working there.
    if _is_done(Path(dest), origin, contents.count) and not pieces.is_there():  # all processes find the same
        return False

    def make(numbers: list[int]) -> None:
        is_main = processes.rank == 0
        before = count_images(pieces, sizes) if is_main else 0
        with Progress(sum(sizes) - before, "images") if is_main else nullcontext() as progress:
            for number in numbers:
                images = contents.images(number)
                labels = network.classes.labels(contents.labels(images))
                pixels = torch.cat(list(generator.generate(contents.seeds(images), labels)))
                pieces.save(number, {"pixels": pixels.numpy()})
                if progress is not None:  # counts the images of all processes
                    progress.advance(count_images(pieces, sizes) - before - progress.done)

    complete(pieces, sizes, processes, make=make, assemble=lambda: _assemble(
        dest, network, contents, pieces, {**origin, OPERATORS: pieces.operators}))
    return True


def _describe_origin(network: OpenNetwork, contents: SetContents, generator: ImageGenerator) -> dict[str, Any]:
    """Return the origin of the images for dataset.json: everything that they depend on."""
    classes, settings = network.classes, generator.settings
    origin = {
        "generated": True,
        "network": network.name,
        "network_sha256": network.sha256,
        "network_kimg": network.info.get("kimg"),
        "seeds": [contents.first_seed, contents.first_seed + contents.count - 1],
        "truncation": settings.truncation,
        "noise_mode": settings.noise_mode,
        "fp32": generator.fp32,
        "device": generator.device.type,
        "batch": generator.batch,
        "classes": None if contents.counts is None else {classes.name(i): n for i, n in enumerate(contents.counts)},
    }
    if settings.center != GLOBAL_CENTER:  # only then, so that work begun by older versions still continues
        origin["truncation_center"] = settings.center
    if contents.drawn is not None:
        labels = json.dumps(list(contents.drawn)).encode()
        origin["labels_from"] = {"data": contents.labels_from, "labels_sha256": hashlib.sha256(labels).hexdigest()}
    if network.info.get("phantom") is True:
        origin["phantom"] = True
    return origin | network.training


def _is_done(dest: Path, origin: dict[str, Any], count: int) -> bool:
    """Tell whether `dest` is a finished data set of this origin. Raises UserError if it is something else."""
    if not dest.exists():
        return False
    try:
        images = ImageSet(dest)
    except UserError as error:
        raise UserError(f"--zip is {dest}, which exists and is not a data set; choose another name, or remove "
                        "it") from error
    different = differences(images.source, json.loads(json.dumps(origin)))  # as it reads back from JSON
    if not different and len(images) != count:
        different = f"{len(images)} of {count} images"
    if different:
        raise UserError(f"--zip is {dest}, which exists and holds other images ({different}); choose another name, or "
                        "remove it")
    return True


def _assemble(dest: str | os.PathLike, network: OpenNetwork, contents: SetContents, pieces: Pieces,
              origin: dict[str, Any]) -> None:
    """Put all pieces into the zip."""
    with (Progress(contents.count, "images put together") as progress,
          ImageSetWriter(dest, classes=network.classes.names, source=origin, option="--zip") as writer):
        for number in range(contents.num_pieces):
            pixels = torch.from_numpy(pieces.load(number)["pixels"])
            for image, label in zip(pixels, contents.labels(contents.images(number)), strict=True):
                writer.add(as_png(image), label, pixel_hash=hash_pixels(image.numpy()))
            progress.advance(len(pixels))


def draw_labels(path: str | os.PathLike, classes: Classes, count: int | None,
                seed: int) -> tuple[list[Label], str | None]:
    """Return `count` labels from a data set, in the order in which a training run sees them, and a line to print.

    path:     --labels-from
    classes:  of the network; those of the data set are matched by name, or by number if either has no names
    count:    None for the number of images in the data set

    Labels come in rounds, each a random permutation of the data set's labels: joint frequencies are kept, exactly so
    in whole rounds. Raises UserError if a label is missing, or does not belong to the network.
    """
    images = ImageSet(path)
    flag = f"--labels-from={path}"
    if classes.count == 0:
        raise UserError(f"{flag} is given, but this network was trained without labels; leave it out")
    if count is not None and count < 1:
        raise UserError(f"--count is {count}; expected at least 1")
    is_vector = images.label_kind == VECTOR and images.labels.shape[1] == classes.count and classes.kind != CLASS
    is_class = images.label_kind == CLASS and classes.kind != VECTOR
    if not (is_vector or is_class):
        found = LABELS[images.label_kind] + (f" ({images.labels.shape[1]} each)" if images.label_kind == VECTOR else "")
        wanted = f"lists of {classes.count} numbers" if classes.kind == VECTOR else "numbers of classes"
        raise UserError(f"{flag} has {found}; expected {wanted}, as in the network's training set")
    if num_missing := int(images.missing_labels().sum()):
        raise UserError(f"{flag}: {num_missing} of {len(images)} images have no label; expected one each: "
                        "convert it with dataset_tool.py --unlabeled=drop")
    if is_vector:
        if classes.names is not None:
            images.use_classes(classes.names)
        own = [tuple(images.label(row)) for row in range(len(images))]
    else:
        own = _match_classes(images, classes, flag)
    note = None
    if classes.names is None or images.classes is None:
        nameless = "the network" if classes.names is None else "the data set"
        what = "the entries of its label vectors; they are matched by position" if is_vector else \
            "its classes; they are matched by number"
        note = f"{flag}: {nameless} does not name {what}"
    order = TrainingOrder(len(own), seed=seed).items(0, len(own) if count is None else count)
    return [own[row] for row in order], note


def _match_classes(images: ImageSet, classes: Classes, flag: str) -> list[int]:
    """Return the network's class of each image. Raises UserError if a class is not in the network."""
    found = {label: classes.match(label, images.classes) for label in np.unique(images.labels).tolist()}
    missing = [class_name(label, images.classes) for label, own in found.items() if own is None]
    if missing:
        raise UserError(f"{flag} has images of {listed(missing)}, which the network does not know; expected "
                        f"{known_classes(classes.names, classes.count)}: convert it with dataset_tool.py "
                        "--classes")
    return [found[label] for label in images.labels.tolist()]


def check_centers(labels: Sequence[Label], path: str | os.PathLike) -> None:
    """Raise UserError if --trunc-center=class would need the mean styles of too many different labels."""
    if (different := len(set(labels))) > _MOST_CENTERS:
        raise UserError(f"--trunc-center is class, which needs a mean style for each different label, and the images "
                        f"have {different} from {path}; expected at most {_MOST_CENTERS}: leave --trunc-center out")


def choose_piece_size(shape: Sequence[int], batch: int) -> int:
    """Return the number of images per piece: whole batches. shape: [C, R, R] of an image"""
    channels, height, width = shape
    images = min(_PIECE_IMAGES, _PIECE_BYTES // (channels * height * width))
    return max(images // batch, 1) * batch
