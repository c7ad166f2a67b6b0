"""The images to measure, from a data set or a generator; both return uint8 [n, 3, H, W] by index.

`Reference` is the data set to compare with: it chooses the real images of each metric, and the labels of fakes.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.workers import ordered_map, usable_cores
from imagesets.classes import (
    LABELS,
    VECTOR,
    find_class,
    label_kind_of,
    label_vectors,
    missing_labels,
    named_classes,
)
from imagesets.pixel_hashes import equal_images, known_pixel_hashes
from imagesets.reader import ImageSet, Shape, describe_shape, load_pixels
from metrics.names import MetricRequest
from torch_utils.distributed import Place
from torch_utils.images import to_pixels
from torch_utils.seeding import generator_for, seed_for

CONTENT_VERSION = 1

_MOST_WORKERS = 8  # a PNG of 256x256 takes one of them 2 ms, and the process that receives it 0.2 ms
_FEWEST_IMAGES = 256  # fewer are decoded before processes have started
_CHUNK_BYTES = 1 << 20  # of pixels that a worker takes at a time


class ImageSource(Protocol):
    """Images in a fixed order."""

    def __len__(self) -> int: ...

    def pixels(self, rows: range) -> Tensor:
        """Return images by index: uint8 [n, 3, H, W]; gray images are repeated to RGB."""
        ...


class SetImages:
    """The images of a data set, or of any folder or zip of images of one size; with `chosen`, only those of one class.

    path:    zip or folder
    chosen:  name or number of a class; None = all images

    Raises UserError if the set cannot be read, or does not have the class, or images of it.
    """

    def __init__(self, path: str | os.PathLike, chosen: str | None = None):
        self._set = ImageSet(path)
        self.path, self.classes, self.label_kind = self._set.path, self._set.classes, self._set.label_kind
        self.rows = np.arange(len(self._set))
        self.class_name: str | None = None  # of `chosen`, if it has a name
        if chosen is not None:
            indices = self._class_indices()
            index = find_class(chosen, self.classes, self._set.label_dim)
            self.class_name = None if self.classes is None else self.classes[index]
            self.rows = np.flatnonzero(indices == index)
            if not len(self.rows):
                raise UserError(f"{self.path} has no images of class {chosen}; expected some")
        self.shape: Shape = load_pixels(self._set, self._set.names[self.rows[0]]).shape

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, count: int | None = None, *, mirror: bool = False, shuffle: bool = False,
               seed: int = 0) -> "SelectedImages":
        """Return `count` images, or all if there are fewer; a random subset (chosen by `seed`).

        mirror:   choose from the images and their flipped copies
        shuffle:  return them in random order, so that each part represents the whole; otherwise in the set's order
        """
        total = len(self) * (2 if mirror else 1)
        count = total if count is None else min(count, total)
        if count == total and not shuffle:
            return SelectedImages(self, np.arange(total))
        items = np.random.RandomState(seed).permutation(total)[:count]
        return SelectedImages(self, items if shuffle else np.sort(items))

    def item(self, index: int) -> np.ndarray:
        """Return an image, uint8 [H, W, C], contiguous; indices from len(self) on are the flipped images."""
        mirrored, row = divmod(int(index), len(self))
        pixels = load_pixels(self._set, self._set.names[self.rows[row]], self.shape).transpose(1, 2, 0)
        return np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)

    def content_hash(self, items: np.ndarray) -> str:
        """Return a sha256 of images in this order, from their sizes and CRC-32, without names and labels."""
        mirrored, places = np.divmod(items, len(self))
        return self._set.content_hash(f"{CONTENT_VERSION}", self.rows[places],
                                      (f"/{half}".encode() for half in mirrored))

    def num_shared(self, other: "SetImages") -> int:
        """Return how many images are also in the other set: by pixel hashes if both sets have them, else by file."""
        hashes = known_pixel_hashes(self._set, self.rows), known_pixel_hashes(other._set, other.rows)
        if None in hashes:
            hashes = tuple([images._set.checksums()[row] for row in images.rows] for images in (self, other))
        return len(equal_images(*hashes))

    def label_table(self, c_dim: int, names: Sequence[str] | None = None) -> Tensor:
        """Return the labels of the images as network inputs: float32 [N, c_dim].

        names:  of the network's classes; if the set has names too, its classes are renumbered to match

        Raises UserError if labels do not fit, or some are missing.
        """
        if names is not None and self.classes is not None:
            self._set.use_classes(names)
            self.classes = self._set.classes
        labels = self._set.labels
        if labels is None:
            raise UserError(f"{self.path} has no labels; expected them, since the network has {c_dim} classes")
        found = self._set.label_dim
        named = labels.ndim == 2 or self.classes is not None
        if found > c_dim or (named and found != c_dim):
            raise UserError(f"{self.path} has labels of length {found}, but the network takes {c_dim}; expected the "
                            "data set that it was trained on, or a held-out part of it")
        labels = labels[self.rows]
        missing = int(missing_labels(labels).sum())
        if missing:
            raise UserError(f"{self.path}: {missing} of {len(labels)} images have no label; expected one each: convert "
                            "it with dataset_tool.py --unlabeled=drop")
        return torch.from_numpy(label_vectors(labels, c_dim))

    def close(self) -> None:
        self._set.close()

    def _class_indices(self) -> np.ndarray:
        labels = self._set.labels
        if labels is None or labels.ndim == 2:
            what = "no labels" if labels is None else "vectors as labels"
            raise UserError(f"{self.path} has {what}, but --class is given; expected classes: leave --class out")
        return labels


class SelectedImages:
    """Some images of a set in a fixed order; an `ImageSource`."""

    def __init__(self, images: SetImages, items: np.ndarray):
        self.images, self.items = images, items

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self, rows: range) -> Tensor:
        return _stack(self.images.item(index) for index in self.items[rows.start:rows.stop])

    def batches(self, ranges: Sequence[range], workers: int | None = None) -> Iterator[Tensor]:
        """Yield the `pixels` of each range; other processes decode them ahead if there are many.

        workers:  number of processes, 1 decodes in this one; None = a process's share of the cores, at most 8

        These processes end with the iterator: a caller that may be interrupted wraps it in contextlib.closing.
        """
        items = [item for rows in ranges for item in self.items[rows.start:rows.stop].tolist()]
        if len(items) < _FEWEST_IMAGES:
            workers = 1
        elif workers is None:  # the processes of a run on one machine share its cores
            workers = min(max(usable_cores() // Place.from_environment().local_count, 1), _MOST_WORKERS)
        chunk = min(max(_CHUNK_BYTES // math.prod(self.images.shape), 1), 32)
        with closing(ordered_map(self.images.item, items, workers, chunk=chunk)) as decoded:
            for rows in ranges:
                yield _stack(islice(decoded, len(rows)))

    def content_hash(self, count: int | None = None) -> str:
        """Return the hash of the first `count` images, or of all."""
        return self.images.content_hash(self.items[:count])


class FakeLabels:
    """Labels of fakes, each drawn from a table, seeded by the number of the fake.

    table:  float32 [rows, c_dim]; c_dim is 0 for unconditional networks
    """

    def __init__(self, table: Tensor):
        self.table = table

    @classmethod
    def of_class(cls, index: int, c_dim: int) -> "FakeLabels":
        return cls(torch.eye(c_dim)[[index]])

    @classmethod
    def of_counts(cls, counts: list[int]) -> "FakeLabels":
        """Draw each class in proportion to its count."""
        classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return cls(torch.eye(len(counts))[classes])

    def draw(self, rows: range, seed: int) -> Tensor:
        """Return labels [n, c_dim]."""
        chosen = [torch.randint(len(self.table), (), generator=generator_for(seed_for(seed, row, 0, "metrics/label")))
                  for row in rows]
        return self.table[torch.stack(chosen)]


class GeneratedImages:
    """Images of a generator, whose latents are seeded by (seed, number of the image); an `ImageSource`.

    Noise is seeded by (seed, first image of the batch), so results depend on the batch size.

    G:       with mapping, synthesis, z_dim and img_channels, in eval mode
    labels:  of the fakes
    device:  of G
    """

    def __init__(self, G: nn.Module, labels: FakeLabels, *, count: int, seed: int, device: torch.device | str):
        self.G, self.labels, self.count, self.seed, self.device = G, labels, count, seed, device

    def __len__(self) -> int:
        return self.count

    def pixels(self, rows: range) -> Tensor:
        z = draw_latents(rows, self.G.z_dim, self.seed, "metrics/z").to(self.device)
        ws = self.G.mapping(z, self.labels.draw(rows, self.seed).to(self.device))
        noise = generator_for(seed_for(self.seed, rows.start, 0, "metrics/noise"), self.device)
        # Half precision is what makes a GPU fast; most CPUs are slower with it.
        fp32 = torch.device(self.device).type == "cpu"
        return to_rgb(to_pixels(self.G.synthesis(ws, noise_mode="random", force_fp32=fp32, generator=noise)))


class RealSubset(NamedTuple):
    """The real images that a metric uses."""

    count: int | None  # the largest number; None = all
    mirror: bool  # flipped ones too


class Reference:
    """The data set of real images, opened and checked.

    data:    path of the data set; None if no metric needs one
    mirror:  training used flipped images too
    chosen:  name or number of a class: use only its images
    seed:    random seed of subsets

    Raises UserError if images are missing or too few.
    """

    def __init__(self, requests: Sequence[MetricRequest], data: str | os.PathLike | None, *, mirror: bool,
                 chosen: str | None, seed: int):
        self.images = None if data is None else SetImages(data, chosen)
        self.mirror, self.chosen, self.seed = mirror, chosen, seed
        self.of_class = "" if chosen is None else f" of class {chosen}"  # follows numbers of images in messages
        self.note: str | None = None  # a line about how classes of data set and network were matched
        self.selections: dict[RealSubset, SelectedImages] = {
            self.subset(request): self._select(request) for request in requests if request.needs_reals}

    def subset(self, request: MetricRequest) -> RealSubset | None:
        """Return which reals a metric uses; None if it needs none."""
        return RealSubset(request.num_reals, self.mirror and not request.full) if request.needs_reals else None

    def num_reals(self, request: MetricRequest) -> int:
        """Return how many reals a metric uses; 0 if it needs none."""
        return len(self.selections.get(self.subset(request), ()))

    def check_shape(self, shape: Shape, other: str) -> None:
        """Raise UserError if reals would be compared with fakes of another shape.

        other:  whose shape it is, for the message: "the network makes {} ones"
        """
        if self.selections and self.images.shape != shape:
            raise UserError(f"{self.images.path} has {describe_shape(self.images.shape)} images, but "
                            f"{other.format(describe_shape(shape))}; expected the same: convert the data set with "
                            "dataset_tool.py")

    def check_class(self, fakes: SetImages) -> None:
        """Raise UserError if the number of the class has another name in the set of fakes."""
        names = [None if images is None else images.class_name for images in (self.images, fakes)]
        if None not in names and names[0] != names[1]:
            raise UserError(f"--class is {self.chosen}, which is {names[0]} in {self.images.path} and {names[1]} in "
                            f"{fakes.path}; expected the same class in both: give its name")

    def labels_of_fakes(self, c_dim: int, info: Mapping[str, Any]) -> FakeLabels:
        """Return the distribution of labels for fakes: the class, the data set's, or the training set's.

        c_dim:  of the network
        info:   metadata of its file

        Raises UserError if network, data set and class do not fit together.
        """
        if c_dim == 0:
            if self.chosen is not None:
                raise UserError(f"--class is {self.chosen}, but the network was trained without classes; leave --class "
                                "out, or use a network that was trained with train.py --cond=1")
            return FakeLabels(torch.zeros(1, 0))
        names, counts = named_classes(info, c_dim), info.get("class_counts")
        counts = counts if counts and len(counts) == c_dim else None
        table, kind, chosen = None, label_kind_of(info, c_dim), self.chosen
        if self.chosen is not None and kind == VECTOR:
            raise UserError(f"--class is {self.chosen}, but the network's labels are vectors, not classes; leave "
                            "--class out")
        if self.images is not None:
            self._check_kind(kind)
            if (names is None) != (self.images.classes is None):
                nameless = "the network file" if names is None else self.images.path
                self.note = f"classes are matched by number, since {nameless} does not name its own"
            table = self.images.label_table(c_dim, names)
            if names is None:
                names = self.images.classes
            elif self.images.class_name is not None:
                chosen = self.images.class_name  # numbers are the data set's; the network's may differ
        if chosen is not None:
            return FakeLabels.of_class(find_class(chosen, names, c_dim), c_dim)
        if table is not None:
            return FakeLabels(table)
        if not counts or sum(counts) == 0:
            what = ("the network's labels are vectors; expected a data set to draw them from" if kind == VECTOR else
                    "the network file does not record how many training images each class had; expected a data set, "
                    "or --class")
            raise UserError(f"--data is missing, and {what}")
        return FakeLabels.of_counts(counts)

    def _check_kind(self, of_network: str | None) -> None:
        """Raise UserError if one has classes and the other vectors; their lengths may be equal."""
        found = self.images.label_kind
        if None not in (found, of_network) and found != of_network:
            raise UserError(f"{self.images.path} has {LABELS[found]}, but the network was trained with "
                            f"{LABELS[of_network]}; expected the data set that it was trained on, or a part of it")

    def _select(self, request: MetricRequest) -> SelectedImages:
        if self.images is None:
            raise UserError(f"--data is missing; expected the real images that {request.name} compares with")
        count, mirror = self.subset(request)
        selection = self.images.select(count, mirror=mirror, seed=self.seed)
        if len(selection) < request.fewest:
            raise UserError(f"metric {request.name} needs at least {request.fewest} real images and "
                            f"{self.images.path} has {len(selection)}{self.of_class}; expected more")
        return selection


def draw_latents(rows: range, z_dim: int, seed: int, stream: str) -> Tensor:
    """Return a latent for each index, independent of the other indices: float32 [n, Z]."""
    return torch.stack([torch.randn(z_dim, generator=generator_for(seed_for(seed, row, 0, stream))) for row in rows])


def to_rgb(images: Tensor) -> Tensor:
    """Repeat gray [N, 1, H, W] to [N, 3, H, W]; leave color images unchanged."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _stack(images: Iterable[np.ndarray]) -> Tensor:
    """Return images [H, W, C] as one batch, uint8 [n, 3, H, W].

    Channels stay last in memory, wherever images were decoded: the last bits of features depend on it.
    """
    return to_rgb(torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2))
