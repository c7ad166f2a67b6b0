"""The real images to compare with: those of each metric and class, held-out ones, and the labels of fakes."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dnnlib.cli import UserError
from dnnlib.text import listed
from imagesets.classes import LABELS, VECTOR, find_class, label_kind_of, named_classes
from imagesets.reader import Shape, describe_shape
from metrics.image_sources import FakeLabels, SelectedImages, SetImages
from metrics.names import MetricRequest


class RealSubset(NamedTuple):
    """The real images that a metric uses."""

    count: int | None  # the largest number; None = all
    mirror: bool  # flipped ones too


class Reference:
    """The data set of real images and, if there is one, that of held-out images, opened and checked.

    data:       path of the data set; None if no metric needs one
    mirror:     training used flipped images too
    chosen:     name or number of a class: use only its images
    seed:       random seed of subsets
    holdout:    path of a data set with other real images, or None
    per_class:  the classes are also measured one by one

    Raises UserError if images are missing or too few.
    """

    def __init__(self, requests: Sequence[MetricRequest], data: str | os.PathLike | None, *, mirror: bool,
                 chosen: str | None, seed: int, holdout: str | os.PathLike | None = None, per_class: bool = False):
        for flag, given in (("--holdout", holdout is not None), ("--per-class", per_class)):
            if given and data is None:
                raise UserError(f"{flag} is given, but --data is missing; expected the real images to compare with")
        if per_class and chosen is not None:
            raise UserError(f"--per-class is given with --class={chosen}; expected one of the two")
        self.images = None if data is None else SetImages(data, chosen)
        self.holdout = None if holdout is None else SetImages(holdout, chosen)
        self.mirror, self.chosen, self.seed = mirror, chosen, seed
        self.of_class = "" if chosen is None else f" of class {chosen}"  # follows numbers of images in messages
        self.note: str | None = None  # a line about how classes of data set and network were matched
        # The names of classes, in the data set's order, or their numbers; empty without --per-class.
        self.class_names = self.images.class_names() if per_class else []
        self.selections: dict[RealSubset, SelectedImages] = {
            self.subset(request): self._select(request) for request in requests if request.needs_reals}

    def subset(self, request: MetricRequest) -> RealSubset | None:
        """Return which reals a metric uses; None if it needs none."""
        return RealSubset(request.num_reals, self.mirror and not request.full) if request.needs_reals else None

    def num_reals(self, request: MetricRequest) -> int:
        """Return how many reals a metric uses; 0 if it needs none."""
        return len(self.selections.get(self.subset(request), ()))

    def class_items(self, images: SetImages, count: int | None = None, mirror: bool = False, *,
                    shuffle: bool = False) -> dict[str, np.ndarray]:
        """Return which images of a set are measured for each class, as `SetImages.select` chooses them.

        images:  the data set, the held-out one, or a set of fakes, whose classes may have other numbers
        """
        numbers = {name: self._class_number(images, name) for name in self.class_names}
        return {name: np.empty(0, dtype=np.int64) if number is None else images.select(
            count, mirror=mirror, shuffle=shuffle, seed=self.seed, label=number).items
            for name, number in numbers.items()}

    def _class_number(self, images: SetImages, name: str) -> int | None:
        """Return the number of one of `class_names` in a set: by name if both sets have names; None if it has none."""
        if self.images.classes is None or images.classes is None:
            return self.class_names.index(name)
        return images.classes.index(name) if name in images.classes else None

    def notes_on_classes(self, fakes: SetImages | None) -> list[str]:
        """Return lines on images that --per-class leaves out, and on classes that are matched by number."""
        lines = []
        for images in (self.images, self.holdout, fakes) if self.class_names else ():
            if images is None:
                continue
            if unlabeled := images.num_unlabeled():
                lines.append(f"{images.path}: {unlabeled} of {len(images)} images have no label; --per-class leaves "
                             "them out")
            if images is not self.images and (images.classes is None) != (self.images.classes is None):
                nameless = self.images.path if images.classes is not None else images.path
                lines.append(f"classes are matched by number, since {nameless} does not name its own")
            elif others := [name for name in images.class_names() if name not in self.class_names]:
                lines.append(f"{images.path} has classes that are not in {self.images.path} ({listed(others)}); "
                             "--per-class leaves them out")
        return lines

    def check_shape(self, shape: Shape, other: str) -> None:
        """Raise UserError if reals would be compared with fakes of another shape.

        other:  whose shape it is, for the message: "the network makes {} ones"
        """
        if self.selections and self.images.shape != shape:
            found = other.replace("{}", describe_shape(shape))
            raise UserError(f"{self.images.path} has {describe_shape(self.images.shape)} images, but {found}; expected "
                            "the same: convert the data set with dataset_tool.py")

    def check_class(self, other: SetImages) -> None:
        """Raise UserError if the number of the class has another name in another set, or it needs classes."""
        names = [None if images is None else images.class_name for images in (self.images, other)]
        if None not in names and names[0] != names[1]:
            raise UserError(f"--class is {self.chosen}, which is {names[0]} in {self.images.path} and {names[1]} in "
                            f"{other.path}; expected the same class in both: give its name")
        if self.class_names:
            other.class_names()

    def check_holdout(self, requests: Sequence[MetricRequest]) -> None:
        """Raise UserError if held-out images do not fit the data set, are too few, or are also in it."""
        self.check_shape(self.holdout.shape, f"--holdout={self.holdout.path} has {{}} ones")
        self.check_class(self.holdout)
        for request in requests:
            if request.needs_reals and len(self.holdout) < request.fewest:
                raise UserError(f"metric {request.name} needs at least {request.fewest} held-out images and "
                                f"{self.holdout.path} has {len(self.holdout)}{self.of_class}; expected more")
        start, among = f"--holdout={self.holdout.path}", f"are also in --data={self.images.path}"
        advice = "the floor would be too low: hold out part of one data set with dataset_tool.py split"
        if shared := self.holdout.num_shared(self.images):
            raise UserError(f"{start}: {shared} of {len(self.holdout)} images {among}; expected other images, since "
                            f"{advice}")
        groups, count = self.holdout.shared_groups(self.images)
        if groups:
            raise UserError(f"{start}: {len(groups)} groups (patients or lesions) {among} ({', '.join(groups[:3])}"
                            f"{', ...' if len(groups) > 3 else ''}), with {count} of {len(self.holdout)} images; "
                            f"expected other groups, since {advice}")

    def labels_of_fakes(self, c_dim: int, info: Mapping[str, Any]) -> FakeLabels:
        """Return the distribution of labels for fakes: the class, the data set's, or the training set's.

        c_dim:  of the network
        info:   metadata of its file

        Raises UserError if network, data set and class do not fit together.
        """
        flag, is_given = ("--per-class", "--per-class is given") if self.class_names else (
            "--class", None if self.chosen is None else f"--class is {self.chosen}")
        if c_dim == 0:
            if is_given is not None:
                raise UserError(f"{is_given}, but the network was trained without classes; leave {flag} out, or use a "
                                "network that was trained with train.py --cond=1")
            return FakeLabels(torch.zeros(1, 0))
        names, counts = named_classes(info, c_dim), info.get("class_counts")
        counts = counts if counts and len(counts) == c_dim else None
        table, kind, chosen = None, label_kind_of(info, c_dim), self.chosen
        if is_given is not None and kind == VECTOR:
            raise UserError(f"{is_given}, but the network's labels are vectors, not classes; leave {flag} out")
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

    def labels_by_class(self, c_dim: int) -> dict[str, FakeLabels]:
        """Return the labels of fakes of each class, for a network that `labels_of_fakes` accepted."""
        numbers = {name: self._class_number(self.images, name) for name in self.class_names}  # now the network's
        return {name: FakeLabels.of_class(number, c_dim) for name, number in numbers.items() if number is not None}

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
