"""The images to measure, from a data set or a generator; both return uint8 [n, 3, H, W] by index.

`metrics.reference` chooses the real images of each metric, and the labels of fakes.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.workers import ordered_map, usable_cores
from imagesets.classes import class_names, find_class, label_vectors, missing_labels
from imagesets.pixel_hashes import equal_files, equal_images, known_pixel_hashes
from imagesets.reader import ImageSet, Shape, load_pixels
from metrics.intervals import group_numbers
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

    path:    zip or folder, or one that is open
    chosen:  name or number of a class; None = all images

    Raises UserError if the set cannot be read, or does not have the class, or images of it.
    """

    def __init__(self, path: str | os.PathLike | ImageSet, chosen: str | None = None):
        self._set = path if isinstance(path, ImageSet) else ImageSet(path)
        self.path, self.source = self._set.path, self._set.source
        self.classes, self.label_kind = self._set.classes, self._set.label_kind
        self.rows = np.arange(len(self._set))
        self.class_name: str | None = None  # of `chosen`, if it has a name
        if chosen is not None:
            indices = self._class_indices("--class")
            index = find_class(chosen, self.classes, self._set.label_dim)
            self.class_name = None if self.classes is None else self.classes[index]
            self.rows = np.flatnonzero(indices == index)
            if not len(self.rows):
                raise UserError(f"{self.path} has no images of class {chosen}; expected some")
        self.shape: Shape = load_pixels(self._set, self._set.names[self.rows[0]]).shape
        self._groups = group_numbers(self._set.groups, len(self._set))

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, count: int | None = None, *, mirror: bool = False, shuffle: bool = False, seed: int = 0,
               label: int | None = None) -> "SelectedImages":
        """Return `count` images, or all if there are fewer; a random subset (chosen by `seed`).

        mirror:   choose from the images and their flipped copies
        shuffle:  return them in random order, so that each part represents the whole; otherwise in the set's order
        label:    number of a class: choose from its images as from a set that has no others; None = all images
        """
        places = np.arange(len(self))
        if label is not None:
            places = places[self._class_indices("--per-class")[self.rows] == label]
        if mirror:
            places = np.concatenate([places, places + len(self)])
        count = len(places) if count is None else min(count, len(places))
        if count == len(places) and not shuffle:
            return SelectedImages(self, places)
        chosen = np.random.RandomState(seed).permutation(len(places))[:count]
        return SelectedImages(self, places[chosen if shuffle else np.sort(chosen)])

    def item(self, index: int) -> np.ndarray:
        """Return an image, uint8 [H, W, C], contiguous; indices from len(self) on are the flipped images."""
        mirrored, row = divmod(int(index), len(self))
        pixels = load_pixels(self._set, self._set.names[self.rows[row]], self.shape).transpose(1, 2, 0)
        return np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)

    def groups(self, items: np.ndarray) -> np.ndarray | None:
        """Return the number of the group of each image, int64 [n]: that of the original for a flipped image.

        None if each image is its own group.
        """
        found = self._groups[self.rows[items % len(self)]]
        return None if len(np.unique(found)) == len(found) else found

    def content_hash(self, items: np.ndarray) -> str:
        """Return a sha256 of images in this order, from their sizes and CRC-32, without names and labels."""
        mirrored, places = np.divmod(items, len(self))
        return self._set.content_hash(f"{CONTENT_VERSION}", self.rows[places],
                                      (f"/{half}".encode() for half in mirrored))

    def num_shared(self, other: "SetImages") -> int:
        """Return how many images are also in the other set: by pixel hashes if both sets have them, else by file."""
        return self.select().num_shared(other.select())

    def shared_groups(self, other: "SetImages") -> tuple[list[str], int]:
        """Return the named groups that also occur in the other set, and how many images of this set they have.

        None do if the sets are drawings by different seeds, whose patients are others although they have equal names.
        """
        sources = [images._set.source or {} for images in (self, other)]
        if all(source.get("phantom") for source in sources) and sources[0].get("seed") != sources[1].get("seed"):
            return [], 0
        named = [images._set.named_groups() for images in (self, other)]
        mine, theirs = ([groups[row] for row in images.rows] for groups, images in zip(named, (self, other)))
        known = set(theirs) - {None}
        shared = [group for group in mine if group in known]
        return list(dict.fromkeys(shared)), len(shared)

    def class_names(self) -> list[str]:
        """Return a name for each class; its number if it has none. Raises UserError if labels are not classes."""
        return class_names(self._class_indices("--per-class"), self.classes)

    def num_unlabeled(self) -> int:
        """Return how many images have no label."""
        return int(missing_labels(self._set.labels, len(self._set))[self.rows].sum())

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

    def _class_indices(self, flag: str) -> np.ndarray:
        """Return the number of each image's class, int64 [N] of the whole set; flag: what needs it, for messages."""
        labels = self._set.labels
        if labels is None or labels.ndim == 2:
            what = "no labels" if labels is None else "vectors as labels"
            raise UserError(f"{self.path} has {what}, but {flag} is given; expected classes: leave {flag} out")
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
        batches = [self.items[rows.start:rows.stop].tolist() for rows in ranges]
        yield from decode_batches(self.images.item, batches, math.prod(self.images.shape), workers)

    def num_shared(self, other: "SelectedImages") -> int:
        """Return how many images are also in the other selection, see `SetImages.num_shared`; flipped ones count."""
        (one, rows), (two, others) = ((each.images._set, each.images.rows[each.items % len(each.images)])
                                      for each in (self, other))
        hashes = known_pixel_hashes(one, rows), known_pixel_hashes(two, others)
        return len(equal_files(one, rows, two, others) if None in hashes else equal_images(*hashes))

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


def decode_batches(item: Callable[[int], np.ndarray], batches: Sequence[Sequence[int]], image_bytes: int,
                   workers: int | None = None) -> Iterator[Tensor]:
    """Yield the images of each batch, uint8 [n, 3, H, W]; other processes decode them ahead if there are many.

    item:         returns an image, uint8 [H, W, C], by its number in `batches`; picklable
    image_bytes:  of the pixels of one
    workers:      as for `SelectedImages.batches`
    """
    items = [number for batch in batches for number in batch]
    if len(items) < _FEWEST_IMAGES:
        workers = 1
    elif workers is None:  # the processes of a run on one machine share its cores
        workers = min(max(usable_cores() // Place.from_environment().local_count, 1), _MOST_WORKERS)
    chunk = min(max(_CHUNK_BYTES // image_bytes, 1), 32)
    with closing(ordered_map(item, items, workers, chunk=chunk)) as decoded:
        for batch in batches:
            yield _stack(islice(decoded, len(batch)))


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
