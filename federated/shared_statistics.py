"""FID against images that stay at their sites: each site sends the count, mean and covariance of their features alone.

The covariance of a union follows from those of its parts, so that the value equals that of the pooled images.

LIMIT: FEWEST_IMAGES is a convention, not a guarantee of privacy: as long as a site has fewer images than features, its
covariance shows the subspace in which all of their features lie.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import nn

from dnnlib.cli import UserError
from imagesets.classes import VECTOR
from metrics.assessment import method_fields
from metrics.detectors.base import Detector
from metrics.detectors.registry import open_detector
from metrics.evaluation import Evaluator, raise_if_stopped
from metrics.features import (
    FeatureRequest,
    choose_batch,
    compute_features,
    measuring,
    on_main,
    on_main_for_long,
    together,
)
from metrics.frechet import FeatureStats
from metrics.image_sources import FakeLabels, GeneratedImages, SetImages
from metrics.names import MetricRequest, parse_metrics
from metrics.scores import score_statistics

FEWEST_IMAGES = 100  # of a site

_METRIC = "fid_full"  # all images of a set, unflipped
_VERSION = 1  # of the bytes
_HEADER_KEY = "statistics"
# Of the bytes: the tensors, and the fields of the header
_TENSORS = ("covariance", "mean")
_TEXTS = ("site", "detector", "detector_sha256", "preprocessing")
_FIELDS = (*_TEXTS, "count", "class_counts")


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteStatistics:
    """What a site tells about its images. Raises ValueError, in one line, for what cannot be that.

    mean:          float64 [F]
    covariance:    float64 [F, F], divided by the count
    class_counts:  number of images of each class; () without classes
    """

    site: str
    count: int
    mean: np.ndarray
    covariance: np.ndarray
    class_counts: tuple[int, ...] = ()
    detector: str
    detector_sha256: str
    preprocessing: str

    def __post_init__(self):
        start = f"the statistics of site {self.site}"
        if self.count < FEWEST_IMAGES:
            raise ValueError(f"{start} are of {self.count} images; expected at least {FEWEST_IMAGES}")
        if self.class_counts and (min(self.class_counts) < 0 or sum(self.class_counts) != self.count):
            raise ValueError(f"{start} have the class counts {list(self.class_counts)}; expected numbers from 0 on "
                             f"that add up to {self.count}")
        try:
            self.stats  # noqa: B018 - checks the arrays
        except ValueError as error:
            raise ValueError(f"{start} are damaged: {error}") from error

    @cached_property
    def stats(self) -> FeatureStats:
        return FeatureStats.of_moments(self.count, self.mean, self.covariance)

    def to_bytes(self) -> bytes:
        """Return a safetensors file with mean and covariance, and all else as JSON in its header."""
        fields = {"version": _VERSION, **{name: getattr(self, name) for name in _FIELDS}}
        arrays = {name: np.ascontiguousarray(getattr(self, name), dtype="<f8") for name in _TENSORS}
        digest = hashlib.sha256(json.dumps(fields).encode())  # finds damage; it does not tell who wrote them
        for name in _TENSORS:
            digest.update(arrays[name].tobytes())
        header = json.dumps({**fields, "sha256": digest.hexdigest()})
        return safetensors.numpy.save(arrays, metadata={_HEADER_KEY: header})

    @classmethod
    def from_bytes(cls, data: bytes, site: str | None = None) -> "SiteStatistics":
        """Return the statistics that `to_bytes` wrote.

        site:  who sent them; None = anyone

        Raises ValueError, in one line, for anything else, such as bytes that hold more than the statistics.
        """
        try:
            found = dict(safetensors.deserialize(data))
            header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
            fields = json.loads(header["__metadata__"].pop(_HEADER_KEY))
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("the bytes are not statistics of a site, or are damaged "
                             f"({type(error).__name__}: {error})") from error
        if not isinstance(fields, dict) or fields.pop("version", None) != _VERSION:
            raise ValueError(f"the header of the statistics is of another version; expected version {_VERSION}: use "
                             "the same version of this program at all sites")
        if sorted(found) != sorted(_TENSORS):
            raise ValueError(f"the statistics have the tensors {sorted(found)!s:.300}; expected {sorted(_TENSORS)}")
        for name, array in found.items():
            if array["dtype"] != "F64":
                raise ValueError(f"the tensor {name} of the statistics is {array['dtype']}; expected F64")
        fields.pop("sha256", None)  # compared below
        counts = fields.get("class_counts")
        if (sorted(fields) != sorted(_FIELDS)
                or not all(isinstance(text, str) and text and text.isprintable() for text in map(fields.get, _TEXTS))
                or not isinstance(counts, list) or not all(type(each) is int for each in [fields["count"], *counts])):
            raise ValueError(f"the header of the statistics has the fields {fields!s:.300}; expected the texts "
                             f"{', '.join(_TEXTS)}, the whole number count and the list of whole numbers class_counts")
        arrays = {name: np.frombuffer(array["data"], "<f8").reshape(array["shape"]) for name, array in found.items()}
        if site not in (None, fields["site"]):
            raise ValueError(f"the statistics are of site {fields['site']}; expected those of site {site}")
        result = cls(**{**fields, "class_counts": tuple(counts)}, **arrays)
        if result.to_bytes() != data:
            raise ValueError(f"the statistics of site {result.site} were changed or damaged on the way")
        return result


def site_statistics(site: str, data: str | os.PathLike, *, c_dim: int = 0, classes: Sequence[str] | None = None,
                    detector: str | None = None, weights: Mapping[str, str | None] | None = None,
                    device: torch.device | str = "cpu", batch: int | None = None, workers: int | None = None,
                    use_cache: bool = True, log: Callable[[str], None] = lambda line: None,
                    progress: bool = False) -> SiteStatistics | None:
    """Return the statistics of a site's images; None except on the main process. All processes call it together.

    site:     name
    data:     path of its data set
    c_dim:    number of classes of the network; 0 counts no classes
    classes:  their names, None if they have none

    The others are those of `Evaluator`. Raises UserError if there are too few images, or labels do not fit.
    """
    with closing(SetImages(data)) as images:
        if len(images) < FEWEST_IMAGES:
            raise UserError(f"site {site} has {len(images)} images; expected at least {FEWEST_IMAGES}, since mean and "
                            "covariance of fewer tell too much about each: leave --share-statistics out, or this site")
        if c_dim and images.label_kind == VECTOR:
            raise UserError(f"site {site} has vectors as labels, which cannot be counted; expected classes: leave "
                            "--share-statistics out")
        counts = images.label_table(c_dim, classes).sum(dim=0, dtype=torch.int64).tolist() if c_dim else ()
    evaluator = Evaluator(_METRIC, data=data, detector=detector, weights=weights, device=device, batch=batch,
                          workers=workers, use_cache=use_cache, log=log, progress=progress)
    found = evaluator.real_statistics(_METRIC)
    if found is None:
        return None
    stats, network = found
    return SiteStatistics(site=site, count=stats.count, mean=stats.mean, covariance=stats.covariance(),
                          class_counts=tuple(counts), detector=network.name, detector_sha256=network.weights_sha256,
                          preprocessing=network.preprocessing)


class SharedStatistics:
    """The statistics of several sites, and those of the union of their images.

    sites:  {name: statistics}, ordered by name: the same for any order of arrival
    first:  one of them, for what all have in common
    union:  of all images

    Raises UserError if two sites have the same name, or their features or classes are not the same.
    """

    def __init__(self, found: Sequence[SiteStatistics]):
        self.sites = {each.site: each for each in sorted(found, key=lambda each: each.site)}
        if not found or len(self.sites) < len(found):
            raise UserError(f"there are statistics of the sites {', '.join(sorted(each.site for each in found))}; "
                            "expected some, and one of each site")
        first, *others = self.sites.values()
        for other in others:
            for what in ("detector", "detector_sha256", "preprocessing"):
                if getattr(first, what) != getattr(other, what):
                    raise UserError(f"site {first.site} has statistics with {what} {getattr(first, what)}, site "
                                    f"{other.site} with {getattr(other, what)}; expected the same: use one detector, "
                                    "and one file of its weights, at all sites")
            for what, mine, theirs in (("features", len(first.mean), len(other.mean)),
                                       ("classes", len(first.class_counts), len(other.class_counts))):
                if mine != theirs:
                    raise UserError(f"site {first.site} has statistics of {mine} {what}, site {other.site} of "
                                    f"{theirs}; expected equal numbers")
        self.first = first
        self.class_counts = tuple(map(sum, zip(*(each.class_counts for each in self.sites.values()))))
        self.union = FeatureStats(len(first.mean))
        for each in self.sites.values():
            self.union.merge(each.stats)

    def labels_of_fakes(self, c_dim: int) -> FakeLabels:
        """Return labels in proportion to the classes of the union. Raises UserError if they are not the network's."""
        if c_dim == 0:
            return FakeLabels(torch.zeros(1, 0))
        if len(self.class_counts) != c_dim:
            raise UserError(f"the network has {c_dim} classes, and the statistics of the sites count "
                            f"{len(self.class_counts)}; expected equal numbers: compute them with the network's labels")
        return FakeLabels.of_counts(list(self.class_counts))


class StatisticsEvaluator:
    """Measures generators against shared statistics; `evaluate` is what a training run calls.

    metrics:  names, in a list or separated by commas; fidN_full alone
    weights:  files of weights by name of the detector, as for `Evaluator`; also seed, batch and device

    Raises UserError for other metrics. With several processes, all call it together.
    """

    def __init__(self, metrics: str | Sequence[str], shared: SharedStatistics, *,
                 weights: Mapping[str, str | None] | None = None, seed: int = 0, batch: int | None = None,
                 device: torch.device | str | None = None):
        self.requests = parse_shared_metrics(metrics)
        self._shared, self._weights, self._seed, self._batch = shared, dict(weights or {}), seed, batch
        self._device = None if device is None else torch.device(device)
        self._detector: Detector | None = None

    def evaluate(self, G: nn.Module, *, stop: Callable[[], bool] | None = None) -> dict[str, dict[str, Any]]:
        """Return the records of the metrics; {} except on the main process.

        G:     as for `Evaluator.evaluate`, and with the same fakes for the same labels
        stop:  called after each batch and before each site; once it returns True, in any process, measuring is canceled

        The field "sites" holds the value against each site by name, "num_real_of_sites" its number of images: values
        for unequal numbers have unequal bias. Raises UserError if classes or weights do not fit, and as `Evaluator`
        does if canceled.
        """
        started, labels = time.monotonic(), self._shared.labels_of_fakes(G.c_dim)
        if self._device is None:
            self._device = next((parameter.device for parameter in G.parameters()), torch.device("cpu"))
        batch = self._batch or choose_batch(G.img_resolution)
        requests = [request.with_fakes(self._shared.union.count) for request in self.requests]
        count = max(request.num_fakes for request in requests)
        with measuring(G, self._device):
            self._open_detector()
            source = GeneratedImages(G, labels, count=count, seed=self._seed, device=self._device)
            found = compute_features(source, [FeatureRequest(detector=self._detector, count=count)], batch=batch,
                                     device=self._device, on_images=lambda count: raise_if_stopped(stop))

        def records(beat: Callable[[], None]) -> dict[str, dict[str, Any]]:
            method = method_fields(self._detector, seed=self._seed, batch=batch, device=self._device)
            return {request.name: {
                **self._compare(request, found[0].first(request.num_fakes).stats, beat, stop),
                "total_time": time.monotonic() - started, "num_real": self._shared.union.count,
                "num_fake": request.num_fakes, "mirrored_reals": False, **method, "class": None, "data_sha256": None}
                for request in requests}

        return on_main_for_long(records) or {}

    def _compare(self, request: MetricRequest, fakes: FeatureStats, beat: Callable[[], None],
                 stop: Callable[[], bool] | None) -> dict[str, Any]:
        """Return the fields of a record that hold values."""
        union, sites = score_statistics(request, self._shared.union, fakes), {}
        for name, site in self._shared.sites.items():
            beat()
            raise_if_stopped(stop, is_alone=True)
            sites |= {name: score_statistics(request, site.stats, fakes).results[request.name]}
        return {"results": union.results, **union.fields, "sites": sites,
                "num_real_of_sites": {name: site.count for name, site in self._shared.sites.items()}}

    def _open_detector(self) -> None:
        """Open the detector, if not open yet. Raises UserError if it is not that of the sites."""
        sites, name = self._shared.first, self._shared.first.detector

        def open_it() -> None:
            detector = open_detector(name, device=self._device, weights=self._weights.get(name))
            for what, mine, theirs in (("weights with the sha256", detector.weights_sha256, sites.detector_sha256),
                                       ("the preprocessing", detector.preprocessing, sites.preprocessing),
                                       ("the number of features", detector.num_features, len(sites.mean))):
                if mine != theirs:
                    raise UserError(f"{name} has {what} {mine} here, and {theirs} at the sites; expected the same: use "
                                    "the same version of this program, and the same --detector-weights")
            self._detector = detector

        if self._detector is None:
            on_main(open_it)  # first, since this may download
            together(lambda: self._detector or open_it())


def parse_shared_metrics(metrics: str | Sequence[str]) -> tuple[MetricRequest, ...]:
    """Parse names of metrics. Raises UserError if one cannot be computed from shared statistics."""
    requests = parse_metrics(metrics)
    if others := [request.name for request in requests if request.kind != "fid"]:
        raise UserError(f"--metrics has {', '.join(others)}, which cannot be computed from --share-statistics; "
                        "expected fid metrics alone, such as fid50k_full: leave out the others, or --share-statistics")
    if parts := [request.name for request in requests if not request.full]:
        raise UserError(f"--metrics has {', '.join(parts)}, which may take a part of the images, or flipped ones; "
                        f"expected {', '.join(f'{name}_full' for name in parts)} with --share-statistics, which is of "
                        "all images")
    return requests
