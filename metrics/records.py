"""Say what a result was computed from, so that it can be told which results may be compared."""

import json
import math
import os
import platform
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dnnlib.cli import UserError
from dnnlib.progress import format_seconds
from imagesets.classes import LABELS, VECTOR, find_class, label_kind_of, named_classes
from imagesets.pixel_hashes import Shape, describe_shape
from metrics.feature_stats import FeatureStats
from metrics.features import Features
from metrics.frechet import frechet_distance
from metrics.image_sources import FakeLabels, Selection, SetImages
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distances
from metrics.names import IS_SPLITS, MetricRequest
from metrics.precision_recall import precision_recall

_PROJECT_FILE = Path(__file__).parent.parent / "pyproject.toml"


def software_versions() -> dict[str, str]:
    """Return the versions of what computes; "unknown" where they are not known."""
    packages = {name: metadata.version(name) for name in ("torch", "numpy")}
    return {"python": platform.python_version(), **packages, "project": _project_version()}


def _project_version() -> str:
    """Read the version from the project's own file, which lies beside the packages: it is run without installing."""
    try:
        return tomllib.loads(_PROJECT_FILE.read_text(encoding="utf-8"))["project"]["version"]
    except (OSError, ValueError, KeyError):
        return "unknown"


def result_record(name: str, found: Mapping[str, Any], *, num_gpus: int, snapshot: str | None,
                  **more: Any) -> dict[str, Any]:
    """Return one result with the fields of the original's lines, and ours behind them.

    found:     what `Evaluator` returned for the metric: results, total_time and further fields
    snapshot:  name of the network file, relative to its run's folder; None when images were measured
    more:      further fields
    """
    seconds = found["total_time"]
    usual = {"results": dict(found["results"]), "metric": name, "total_time": seconds,
             "total_time_str": format_seconds(seconds), "num_gpus": num_gpus, "snapshot_pkl": snapshot,
             "timestamp": time.time()}
    return {**usual, **{key: value for key, value in found.items() if key not in usual}, **more}


def to_json(record: Mapping[str, Any]) -> str:
    """Return a record as one line of strict JSON; results that are not finite become null."""
    results = {key: value if math.isfinite(value) else None for key, value in record["results"].items()}
    return json.dumps({**record, "results": results}, allow_nan=False)


# MERGED from metrics.reference
# The data set that is measured against: which of its images each metric takes, and the labels of fakes.


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


# MERGED from metrics.results
# Turn features into the numbers of a metric.


# Binkowski et al. 2018; the same numbers as in Karras et al. 2020.
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


class Side:
    """The features of one side, real or generated."""

    def __init__(self, features: Features):
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    @property
    def values(self):
        return self.features.values

    @cached_property
    def stats(self) -> FeatureStats:
        return FeatureStats.of(self.values)

    def first(self, count: int) -> "Side":
        """Return a side of the first images."""
        if count >= len(self):
            return self
        probabilities = self.features.probabilities
        return Side(Features(values=self.values[:count],
                             probabilities=None if probabilities is None else probabilities[:count]))


def num_rows(request: MetricRequest, real: Side | None, fake: Side) -> int | None:
    """Return of how many rows `compute_results` tells; None where that is not known."""
    return 2 * (len(real) + len(fake)) if request.kind == "pr" else None


def compute_results(request: MetricRequest, real: Side | None, fake: Side, seed: int,
                    on_rows: Callable[[int], None] = lambda count: None) -> Mapping[str, Any]:
    """Return {"results": {key: value}, further fields} of a metric other than ppl.

    real:     None where the metric looks at no reals
    seed:     of random subsets
    on_rows:  is told how many rows of a table of all pairs of images were done, for kid and pr

    Raises ValueError when there are too few images.
    """
    name = request.name
    if request.kind == "fid":
        distance = frechet_distance(real.stats.mean, real.stats.covariance(), fake.stats.mean, fake.stats.covariance())
        return {"results": {name: distance}, **_rank_note(len(real), len(fake), real.values.shape[1])}
    if request.kind == "kid":
        size = min(len(real), len(fake), KID_SUBSET_SIZE)
        differ = size < max(len(real), len(fake))  # otherwise each subset would be everything
        distances = kernel_distances(real.values, fake.values, KID_SUBSETS if differ else 1, size, seed, on_rows)
        spread = {"subset_std": float(distances.std())} if differ else {}
        return {"results": {name: float(distances.mean())}, "subsets": len(distances), "subset_size": size, **spread}
    if request.kind == "pr":
        found = precision_recall(real.values, fake.values, request.k, on_rows)
        return {"results": dict(zip(request.keys, (float(found.precision), float(found.recall)), strict=True))}
    score = inception_score(fake.features.probabilities, IS_SPLITS)
    return {"results": dict(zip(request.keys, (float(score.mean), float(score.std)), strict=True))}


def _rank_note(num_real: int, num_fake: int, num_features: int) -> dict[str, str]:
    fewest = min(num_real, num_fake)
    if fewest > num_features:
        return {}
    return {"note": f"{fewest} images span less than the {num_features} dimensions of the features: the value is too "
                    "high by an amount that depends on the numbers of images; compare it at equal numbers only, or "
                    "take kid"}
