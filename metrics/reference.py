"""The data set that is measured against: which of its images each metric takes, and the labels of fakes."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dnnlib.cli import UserError
from imagesets.class_names import LABELS, VECTOR, find_class, label_kind_of, named_classes
from imagesets.member_pixels import Shape, describe_shape
from metrics.names import MetricRequest
from metrics.sources import FakeLabels, Selection, SetImages


class Choice(NamedTuple):
    """Which reals a metric takes."""

    count: int | None  # at most; None = all
    mirror: bool  # mirrored ones too


class Reference:
    """The real images, opened and checked.

    data:    path of the data set; None where metrics need none
    mirror:  the training saw mirrored images as well
    chosen:  name or number of a class: take its images only
    seed:    of the choice where a metric takes not all

    Raises UserError when they are missing or too few.
    """

    def __init__(self, requests: Sequence[MetricRequest], data: str | os.PathLike | None, *, mirror: bool,
                 chosen: str | None, seed: int):
        self.images = None if data is None else SetImages(data, chosen)
        self.mirror, self.chosen, self.seed = mirror, chosen, seed
        self.of_class = "" if chosen is None else f" of class {chosen}"  # behind numbers of images, in messages
        self.note: str | None = None  # a line on how classes of data set and network were matched
        self.selections: dict[Choice, Selection] = {
            self.choice(request): self._select(request) for request in requests if request.needs_reals}

    def choice(self, request: MetricRequest) -> Choice | None:
        """Return which reals a metric takes; None where it takes none."""
        return Choice(request.num_reals, self.mirror and not request.full) if request.needs_reals else None

    def num_reals(self, request: MetricRequest) -> int:
        """Return how many reals a metric takes; 0 where it looks at none."""
        return len(self.selections.get(self.choice(request), ()))

    def check_shape(self, shape: Shape, other: str) -> None:
        """Raise UserError when reals are compared with fakes of another shape.

        other:  says whose shape it is, "the network makes {} ones"
        """
        if self.selections and self.images.shape != shape:
            raise UserError(f"{self.images.path} holds {describe_shape(self.images.shape)} images and "
                            f"{other.format(describe_shape(shape))}; expected the same: convert the data set with "
                            "dataset_tool.py")

    def check_class(self, fakes: SetImages) -> None:
        """Raise UserError when the number of the class stands for another name in the set of fakes."""
        names = [None if images is None else images.class_name for images in (self.images, fakes)]
        if None not in names and names[0] != names[1]:
            raise UserError(f"--class is {self.chosen}, which is {names[0]} in {self.images.path} and {names[1]} in "
                            f"{fakes.path}; expected the same in both: give its name")

    def labels_of_fakes(self, c_dim: int, info: Mapping[str, Any]) -> FakeLabels:
        """Return what labels of fakes are drawn from: the class, the data set, or what the network learned from.

        c_dim:  of the network;  info: what its file says

        Raises UserError when network, data set and class do not go together.
        """
        if c_dim == 0:
            if self.chosen is not None:
                raise UserError(f"--class is {self.chosen}, but the network was trained without classes; leave --class "
                                "out, or take a network that was trained with train.py --cond=1")
            return FakeLabels(torch.zeros(1, 0))
        names, counts = named_classes(info, c_dim), info.get("class_counts")
        counts = counts if counts and len(counts) == c_dim else None
        table, kind, chosen = None, label_kind_of(info, c_dim), self.chosen
        if self.chosen is not None and kind == VECTOR:
            raise UserError(f"--class is {self.chosen}, but the network's labels are not classes but vectors; leave "
                            "--class out")
        if self.images is not None:
            self._check_kind(kind)
            if (names is None) != (self.images.classes is None):
                nameless = "the network file" if names is None else self.images.path
                self.note = f"classes are taken by number, since {nameless} does not name its own"
            table = self.images.label_table(c_dim, names)
            if names is None:
                names = self.images.classes
            elif self.images.class_name is not None:
                chosen = self.images.class_name  # a number is that of the data set, and may be another's here
        if chosen is not None:
            return FakeLabels.of_class(find_class(chosen, names, c_dim), c_dim)
        if table is not None:
            return FakeLabels(table)
        if not counts or sum(counts) == 0:
            what = ("the network's labels are vectors; expected the data set to draw them from" if kind == VECTOR else
                    "the network file does not say how many images of each class it learned from; expected the data "
                    "set, or --class")
            raise UserError(f"--data is missing, and {what}")
        return FakeLabels.of_counts(counts)

    def _check_kind(self, of_network: str | None) -> None:
        """Raise UserError where one has classes and the other vectors, which may be equally long."""
        found = self.images.label_kind
        if None not in (found, of_network) and found != of_network:
            raise UserError(f"{self.images.path} has {LABELS[found]}, and the network learned from "
                            f"{LABELS[of_network]}; expected the data set that it was trained on, or a part of it")

    def _select(self, request: MetricRequest) -> Selection:
        if self.images is None:
            raise UserError(f"--data is missing; expected the real images that {request.name} compares with")
        count, mirror = self.choice(request)
        selection = self.images.select(count, mirror=mirror, seed=self.seed)
        if len(selection) < request.fewest:
            raise UserError(f"metric {request.name} needs at least {request.fewest} real images and "
                            f"{self.images.path} holds {len(selection)}{self.of_class}; expected more")
        return selection
