"""Read a data set made by dataset_tool.py, image by image, for training and metrics; describe its content."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dnnlib.cli import UserError
from imagesets.classes import label_vectors, missing_labels
from imagesets.metadata import origins_of
from imagesets.pixel_hashes import equal_files, hash_set, known_pixel_hashes, read_pixel_hashes
from imagesets.reader import ImageSet, Shape, describe_shape, load_pixels
from training.config import DatasetFacts

CONTENT_HASH_VERSION = 1
UNKNOWN_DATA = "unknown"


class ImageDataset(torch.utils.data.Dataset):
    """Images of one size with their labels: item i is (pixels uint8 [C, R, R], label float32 [c_dim]).

    path:        zip or folder, written by dataset_tool.py, ours or NVIDIA's
    use_labels:  False gives labels of length 0
    xflip:       add a horizontally flipped copy of each image, as a second half of items
    max_size:    size of a random subset chosen by `seed`; None for all
    seed:        of the subset
    classes:     names of classes whose numbers the labels become, if the data set has names; None keeps its numbers

    Integer labels become one-hot vectors of length max + 1, or of the number of classes if dataset.json names them;
    lists are used as they are. Files are opened in the process that reads them.
    Raises UserError if the data set cannot be read, or does not consist of square images, gray or RGB.
    """

    def __init__(self, path: str | os.PathLike, *, use_labels: bool = False, xflip: bool = False,
                 max_size: int | None = None, seed: int = 0, classes: Sequence[str] | None = None):
        self._set = ImageSet(path)
        if use_labels and classes is not None:
            self._set.use_classes(classes)
        self.path, self.classes, self.source = self._set.path, self._set.classes, self._set.source
        self.use_labels, self.xflip = use_labels, xflip
        self.name = self.path.name.removesuffix(".zip")
        self._chosen = choose_subset(len(self._set), max_size, seed)
        self._pixel_hashes: list[str] | None = None
        self.image_shape: Shape = self._check_first_image()
        if use_labels:
            self._check_labels()

    def __len__(self) -> int:
        return len(self._chosen) * (2 if self.xflip else 1)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        mirrored, row = divmod(int(index), len(self._chosen))
        pixels = load_pixels(self._set, self._set.names[self._chosen[row]], self.image_shape)
        if mirrored:
            pixels = pixels[:, :, ::-1]
        label = np.zeros(0, dtype=np.float32)
        if self.use_labels:
            label = self._set.labels[self._chosen[row]]
            label = (label if np.ndim(label) else self._class_vectors[label]).copy()
        # Copies read-only arrays, such as gray images: PyTorch warns when it makes tensors of them.
        return np.require(pixels, requirements=("C", "W")), label

    @property
    def num_images(self) -> int:
        """Number of images before mirroring."""
        return len(self._chosen)

    @property
    def resolution(self) -> int:
        return self.image_shape[1]

    @property
    def num_channels(self) -> int:
        return self.image_shape[0]

    @property
    def label_dim(self) -> int:
        """Length of a label vector of the data set, used or not."""
        return self._set.label_dim

    @property
    def label_kind(self) -> str | None:
        """Kind of the labels in use, "class" or "vector" (see imagesets.classes); None if labels are not used."""
        return self._set.label_kind if self.use_labels else None

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes in use, or of a vector's numbers; None if labels are not used or have no names."""
        return self.classes if self.use_labels else None

    def label_table(self) -> torch.Tensor:
        """Return the labels of all images, without mirrored ones: float32 [num_images, c_dim]."""
        if not self.use_labels:
            return torch.zeros(self.num_images, 0)
        return torch.from_numpy(label_vectors(self._set.labels[self._chosen], self.label_dim))

    def class_indices(self) -> np.ndarray | None:
        """Return the class of each image, int64 [num_images], NO_LABEL for none; None without integer labels."""
        labels = self._set.labels
        return None if labels is None or labels.ndim == 2 else labels[self._chosen]

    def image_names(self) -> list[str]:
        """Return the file names of the images, in order."""
        return [self._set.names[row] for row in self._chosen]

    def locate(self, name: str) -> str:
        """Return the path of an image inside the zip or folder."""
        return self._set.locate(name)

    def named_groups(self) -> list[str | None]:
        """Return the patient or lesion of each image; None if the data set does not name it."""
        groups = self._set.named_groups()
        return [groups[row] for row in self._chosen]

    def equal_files(self, other: "ImageDataset") -> list[tuple[int, int]]:
        """Return (index, index in the other) of each image whose file is also in the other data set."""
        return equal_files(self._set, self._chosen, other._set, other._chosen)

    def known_pixel_hashes(self) -> list[str] | None:
        """Return the hashes of the images' pixels if they are known without decoding, else None."""
        if self._pixel_hashes is None:
            self._pixel_hashes = known_pixel_hashes(self._set, self._chosen)
        return self._pixel_hashes

    def pixel_hashes(self, *, workers: int = 1) -> list[str]:
        """Return a hash of the pixels of each image, see imagesets.pixel_hashes.

        If the data set does not record them, all images are decoded, once, in `workers` processes.
        """
        if self._pixel_hashes is None:
            self._pixel_hashes = read_pixel_hashes(self._set, self._chosen, workers=workers)
        return self._pixel_hashes

    def training_data(self) -> dict[str, Any]:
        """Return what a network snapshot records about its training images, as plain JSON types.

        pixels_sha256:  independent of file formats, names, order, labels and mirroring
        num_groups:     patients or lesions, an image without one being its own group; None if the data set names none
        generated_from: only if some images are synthetic: what their networks were trained on, see history_of
        """
        groups, names = self.named_groups(), self.image_names()
        found = {"pixels_sha256": hash_set(self.pixel_hashes()), "num_images": self.num_images, "num_groups": None}
        if any(group is not None for group in groups):
            found["num_groups"] = len({group or f"/{name}" for group, name in zip(groups, names, strict=True)})
        histories = [history_of(part) for part in parts_of_source(self.source) if is_generated(part)]
        if histories:
            found["generated_from"] = [data for history in histories for data in history]
        return found

    def facts(self) -> DatasetFacts:
        """Return the facts that the presets need, including labels that are not used."""
        return DatasetFacts(name=self.name, resolution=self.resolution, channels=self.num_channels,
                            num_images=self.num_images, c_dim=self.label_dim)

    def content_hash(self) -> str:
        """Return a SHA-256 of the images and labels in use, in order, independent of file names, path and mirroring.

        Images enter by size and CRC-32, which a zip's directory holds, so that large sets need not be read.
        """
        labels = (self._set.labels[row].tobytes() if self.use_labels else b"" for row in self._chosen)
        return self._set.content_hash(f"{CONTENT_HASH_VERSION}/{self.label_dim if self.use_labels else 0}",
                                      self._chosen, (b"/" + label for label in labels))

    def close(self) -> None:
        """Close files that are open in this process; the next access opens them again."""
        self._set.close()

    @cached_property
    def _class_vectors(self) -> np.ndarray:
        """The label vector of each class: float32 [c_dim, c_dim]; cached for speed."""
        return label_vectors(np.arange(self.label_dim), self.label_dim)

    def _check_labels(self) -> None:
        if self._set.labels is None:
            raise UserError(f"{self.path} has no labels; expected one for each image: convert it with dataset_tool.py "
                            "--labels, or leave --cond out")
        labels = self._set.labels[self._chosen]
        missing = missing_labels(labels)
        if missing.any():
            first = self._set.names[self._chosen[int(missing.argmax())]]
            raise UserError(f"{self.path}: {int(missing.sum())} of {self.num_images} images have no label ({first}, "
                            "...); expected one for each image: convert with dataset_tool.py --unlabeled=drop, or "
                            "leave --cond out")

    def _check_first_image(self) -> Shape:
        name = self._set.names[self._chosen[0]]
        shape = load_pixels(self._set, name).shape
        _, height, width = shape
        if height != width:
            raise UserError(f"{self.path}: {name} is {describe_shape(shape)}; expected square images, gray or RGB: "
                            "convert it with dataset_tool.py --transform=center-crop --resolution=256x256")
        return shape


def hash_content(dataset: ImageDataset, weights: np.ndarray | None) -> str:
    """Return a SHA-256 of the images and labels in use, and of weights from `training.sampling.image_weights`."""
    content = dataset.content_hash()
    return content if weights is None else hashlib.sha256(content.encode() + weights.tobytes()).hexdigest()


def history_of(info: Mapping[str, Any]) -> list[Any]:
    """Return the data that a network was trained on, the newest first; "unknown" for data that its file lacks.

    info:  of its file, or `source` of a data set that it generated
    """
    before = info.get("training_data_before")
    return [info.get("training_data") or UNKNOWN_DATA, *(before if isinstance(before, list) else [])]


def choose_subset(num_images: int, max_size: int | None, seed: int) -> np.ndarray:
    """Return the rows of a random subset in ascending order, int64 [min(max_size, num_images)].

    NVIDIA's code chooses the same rows.
    """
    rows = np.arange(num_images)
    if max_size is None or max_size >= num_images:
        return rows
    np.random.RandomState(seed % 2**31).shuffle(rows)
    return np.sort(rows[:max_size])


def is_generated(source: Mapping[str, Any]) -> bool:
    """Return whether the `source` of a part, see parts_of_source, says that a network generated it."""
    return source.get("generated") is True


def parts_of_source(source: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the first `source` of each part of a data set, from before it was converted; {} where it is unknown."""
    origins = [] if is_generated(source) else origins_of(source)
    if not origins:
        yield source
    for origin in origins:
        yield from parts_of_source(origin)
