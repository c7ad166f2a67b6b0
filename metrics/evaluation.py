"""Measure a generator or a set of images: all requested metrics in one pass over the images.

`Evaluator` opens the data sets and the detectors and computes features of generated, real and held-out images, of all
and of each class; `metrics.scores` turns them into the values of each metric.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.cache import cache_folder
from dnnlib.cli import UserError
from dnnlib.progress import Progress
from metrics.assessment import Assessment, assess, assess_classes, assess_paths, method_fields
from metrics.detectors.base import Detector
from metrics.detectors.registry import open_detector, open_similarity
from metrics.features import (
    FeatureCache,
    FeatureRequest,
    Features,
    cached_features,
    choose_batch,
    compute_features,
    compute_rows,
    measuring,
    on_main,
    on_main_for_long,
    together,
)
from metrics.frechet import FeatureStats
from metrics.image_sources import FakeLabels, GeneratedImages, ImageSource, SelectedImages, SetImages
from metrics.intervals import Jackknife, TooFew
from metrics.names import LPIPS, MetricRequest, choose_detector, parse_metrics
from metrics.perceptual_path import PathSteps, check_path_requests
from metrics.reference import RealSubset, Reference
from metrics.samples import Sample, Samples, missing_items
from metrics.scores import Scoring, share_work
from torch_utils.distributed import any_process, is_main

_LARGEST_SEED = 2**32 - 1


class Stopped(Exception):
    """Measuring was canceled, because the caller's `stop` returned True."""


def raise_if_stopped(stop: Callable[[], bool] | None, *, is_alone: bool = False) -> None:
    """Raise Stopped if `stop` returns True, in any process; all call it together unless `is_alone`."""
    if stop is not None and (stop() if is_alone else any_process(stop())):
        raise Stopped("measuring was canceled")


class Results(dict[str, dict[str, Any]]):
    """The records of metrics by name: {"results": {key: value}, further fields}.

    jackknives:  with intervals, by metric and key, of the values for which there are some; two evaluators' are paired
                 on the side "real" if their data, seeds and metrics are equal
    """

    def __init__(self, records: Mapping[str, dict[str, Any]], jackknives: Mapping[str, dict[str, Jackknife]]):
        super().__init__(records)
        self.jackknives = dict(jackknives)


class Evaluator:
    """Measures against one data set; features of real images are computed only once.

    metrics:   names, in a list or separated by commas
    data:      path of the data set; None if no metric needs one
    detector:  name of the detector to use instead of each metric's usual one
    weights:   files of weights by name of the detector, instead of downloaded ones, as `needed_detectors` returns them
    mirror:    training used flipped images too
    chosen:    name or number of a class: measure only its images
    seed:      random seed of latents, labels, noise and subsets
    batch:     batch size; results depend on it, since noise is drawn per batch. None = chosen by resolution
    device:    None = the generator's
    use_cache: keep features of image sets on disk
    workers:   number of processes that decode the images of sets, for each process; None = its share of the cores
    ci:        level of intervals, such as 0.95; None computes none
    holdout:   path of other real images, which give the floor: the same metric between them and the data set
    per_class: also measure each class of the data set
    log:       called with a line for the user
    progress:  show progress on standard error

    With several processes, each makes an Evaluator with equal arguments, and all call its methods together.
    Raises UserError if metrics, detector, data set and class do not fit together.
    """

    def __init__(self, metrics: str | Sequence[str], *, data: str | os.PathLike | None = None,
                 detector: str | None = None, weights: Mapping[str, str | None] | None = None, mirror: bool = False,
                 chosen: str | None = None, seed: int = 0, batch: int | None = None,
                 device: torch.device | str | None = None, use_cache: bool = True, workers: int | None = None,
                 ci: float | None = None, holdout: str | os.PathLike | None = None, per_class: bool = False,
                 log: Callable[[str], None] = lambda line: None, progress: bool = False):
        self.requests = parse_metrics(metrics)
        self.detector_names = {request.name: choose_detector(request, detector) for request in self.requests}
        self.seed, self.batch = seed, batch
        if not 0 <= seed <= _LARGEST_SEED:
            raise UserError(f"--seed is {seed}; expected 0 to {_LARGEST_SEED}")
        if batch is not None and batch < 1:
            raise UserError(f"--batch is {batch}; expected at least 1")
        if workers is not None and workers < 1:
            raise UserError(f"--workers is {workers}; expected at least 1")
        if ci is not None and not 0 < ci < 1:
            raise UserError(f"--ci is {ci:g}; expected a level between 0 and 1, such as 0.95")
        self.ci, self._workers = ci, workers
        self._weights, self._progress, self._log = dict(weights or {}), progress, log
        self._logged: set[str] = set()  # notes on classes
        self._stop: Callable[[], bool] | None = None
        self._cache = FeatureCache(cache_folder() / "features" if use_cache else None, log)
        self._networks: dict[str, nn.Module] = {}
        self._device = None if device is None else torch.device(device)
        self.reference = Reference(self.requests, data, mirror=mirror, chosen=chosen, seed=seed, holdout=holdout,
                                   per_class=per_class)
        if holdout is not None:
            on_main(lambda: self.reference.check_holdout(self.requests))  # which may read all files
        self._reals: dict[RealSubset, Samples] = {}
        self._heldout: dict[bool, Samples] = {}  # without flipped copies, and with

    def check_network(self, G: nn.Module, info: Mapping[str, Any] | None = None) -> FakeLabels:
        """Return the labels of a generator's fakes, before it is measured. Raises UserError as `evaluate` does."""
        labels = self.reference.labels_of_fakes(G.c_dim, info or {})
        if info is not None:
            self._log_once([] if self.reference.note is None else [self.reference.note])
            self._log_once(self.reference.notes_on_classes(None))
        self.reference.check_shape((G.img_channels, G.img_resolution, G.img_resolution), "the network makes {} ones")
        check_path_requests(self.requests, G.img_resolution)
        return labels

    def check_images(self, images: SetImages) -> list[MetricRequest]:
        """Return the metrics with the numbers of images of a set, before it is measured.

        Raises UserError as `evaluate_images` does.
        """
        requests = [request.with_fakes(len(images)) for request in self.requests]
        for request in requests:
            holds = f"{images.path} has {len(images)}{self.reference.of_class}; expected more"
            if request.kind == "ppl":
                raise UserError(f"metric {request.name} needs a network; expected --network instead of --generated")
            if request.num_fakes < request.fewest:
                raise UserError(f"metric {request.name} needs at least {request.fewest} generated images and {holds}")
            if len(images) < request.num_fakes:
                raise UserError(f"metric {request.name} needs {request.num_fakes} generated images and {holds}, or a "
                                "smaller number in the metric's name")
        self.reference.check_shape(images.shape, f"{images.path} has {{}} ones")
        self.reference.check_class(images)
        self._log_once(self.reference.notes_on_classes(images))
        return requests

    def evaluate(self, G: nn.Module, info: Mapping[str, Any] | None = None, *,
                 stop: Callable[[], bool] | None = None) -> Results:
        """Return the metrics of a generator; {} except on the main process.

        G:     with mapping, synthesis, z_dim, c_dim, img_resolution and img_channels; its mode and the global random
               state are restored
        info:  metadata of its file; "classes" and "class_counts" are used if there is no data set
        stop:  called after each batch of images; once it returns True, in any process, measuring is canceled

        Raises UserError if data, class and network do not fit together. Raises Stopped if canceled, or
        OtherProcessFailed if another process was canceled first.
        """
        started, self._stop = time.monotonic(), stop
        labels = self.check_network(G, info)
        requests = [request.with_fakes(self.reference.num_reals(request)) for request in self.requests]
        if self._device is None:
            self._device = next((parameter.device for parameter in G.parameters()), torch.device("cpu"))
        batch = self.batch or choose_batch(G.img_resolution)
        with measuring(G, self._device):
            self._open_networks()
            wanted = self._wanted(requests)
            fakes, counts = Samples(), self._class_counts(requests)
            if wanted:
                source = GeneratedImages(G, labels, count=max(each.count for each in wanted), seed=self.seed,
                                         device=self._device)
                found = self._features(source, wanted, batch, "generated images")
                for each, features in zip(wanted, found or ()):
                    fakes.add(each.detector.name, Sample(features=features))
            self._add_classes(fakes, G, requests, counts, batch)
            lengths = {request.name: self._path_distances(G, labels, request, batch) for request in requests
                       if request.kind == "ppl"}
            return self._finish(requests, fakes, counts, lengths, batch, started)

    def evaluate_images(self, images: SetImages) -> Results:
        """Return the metrics of a set of generated images; {} except on the main process.

        Raises UserError if a metric needs more images, or a network, or they do not fit the data set.
        """
        started, self._stop = time.monotonic(), None
        requests = self.check_images(images)
        self._device = self._device or torch.device("cpu")
        batch = self.batch or choose_batch(max(images.shape[1:]))
        with measuring(None, self._device):
            self._open_networks()
            wanted = self._wanted(requests)
            count = max(each.count for each in wanted)
            classes = self.reference.class_items(images, count, shuffle=True)
            fakes = self._samples(images.select(count, shuffle=True, seed=self.seed), wanted, classes, batch,
                                  "generated images")
            counts = {(request.name, name): min(request.num_fakes, len(items)) for request in requests
                      for name, items in classes.items()}
            return self._finish(requests, fakes, counts, {}, batch, started)

    def real_statistics(self, name: str) -> tuple[FeatureStats, Detector] | None:
        """Return the statistics of the reals that a metric uses, and its detector; None except on the main process."""
        request = next(each for each in self.requests if each.name == name)
        self._device, self._stop = self._device or torch.device("cpu"), None
        with measuring(None, self._device):
            self._open_networks()
            self._compute_reals(self.batch or choose_batch(max(self.reference.images.shape[1:])))
        detector = self.detector_names[name]
        sample = self._reals[self.reference.subset(request)].get(detector)
        return None if sample is None else (sample.features.stats, self._networks[detector])

    def _open_networks(self) -> None:
        """Open the detectors, if not open yet. Raises UserError if weights are missing."""
        def open_each() -> None:
            for name in dict.fromkeys(self.detector_names.values()):
                open_one = open_similarity if name == LPIPS else open_detector
                self._networks[name] = open_one(name, device=self._device, weights=self._weights.get(name))

        if not self._networks:
            on_main(open_each)  # first, since this may download
            together(lambda: self._networks or open_each())

    def _wanted(self, requests: list[MetricRequest]) -> list[FeatureRequest]:
        """Return the features of fakes that the metrics need, by detector."""
        by_detector: dict[str, list[MetricRequest]] = {}
        for request in requests:
            if request.kind != "ppl":
                by_detector.setdefault(self.detector_names[request.name], []).append(request)
        return [FeatureRequest(detector=self._networks[name], count=max(request.num_fakes for request in some),
                               classes=any(request.kind == "is" for request in some))
                for name, some in by_detector.items()]

    def _features(self, source: ImageSource, wanted: list[FeatureRequest], batch: int,
                  unit: str) -> list[Features] | None:
        """Return the features for each request, from the cache if possible; None except on the main process."""
        return cached_features(source, wanted, batch=batch, device=self._device, cache=self._cache,
                               workers=self._workers, showing=lambda count: self._showing(count, unit))

    def _samples(self, selection: SelectedImages, wanted: list[FeatureRequest], classes: Mapping[str, np.ndarray],
                 batch: int, unit: str) -> Samples:
        """Return the first images of a selection, and those of each class, with features.

        classes:  which images each class has, in the order in which they count; features of those that are not in the
                  selection are computed in addition
        """
        found = self._features(selection, wanted, batch, unit)
        of_classes = [{name: items[:each.count] for name, items in classes.items()} for each in wanted]
        extra = [missing_items(some, selection.items[:each.count]) for some, each in zip(of_classes, wanted)]
        parts = [[(selection.items[:each.count], features)] for each, features in zip(wanted, found or ())]
        for items in {items.tobytes(): items for items in extra if len(items)}.values():
            places = [place for place in range(len(wanted)) if np.array_equal(extra[place], items)]
            more = self._features(SelectedImages(selection.images, items),
                                  [replace(wanted[place], count=len(items)) for place in places], batch,
                                  f"{unit} of classes")
            for place, features in zip(places, more or ()):
                parts[place].append((items, features))
        samples, groups = Samples(), selection.images.groups
        for each, some, by_class in zip(wanted, parts, of_classes):
            items, features = some[0]
            samples.add(each.detector.name, Sample(features=features, groups=groups(items)))
            samples.add_classes(each.detector.name, some, by_class, groups)
        return samples

    def _class_counts(self, requests: list[MetricRequest]) -> dict[tuple[str, str], int]:
        """Return how many fakes a network makes of each class: as many as there are reals, at most the metric's number.

        By name of the metric and of the class; {} without --per-class.
        """
        counts = {}
        for request in requests if self.reference.class_names else ():
            reals = self.reference.class_items(self.reference.images, *(self.reference.subset(request) or ()))
            counts |= {(request.name, name): min(request.num_fakes, len(items)) for name, items in reals.items()}
        return counts

    def _add_classes(self, samples: Samples, G: nn.Module, requests: list[MetricRequest],
                     counts: Mapping[tuple[str, str], int], batch: int) -> None:
        """Add a network's fakes of each class, as many as `_class_counts` returned; none without --per-class.

        Batches do not cross classes: noise is drawn per batch, and a class gives the values that --class gives.
        """
        wanted = {name: self._wanted([replace(request, num_fakes=counts[request.name, name]) for request in requests
                                      if counts[request.name, name] > 0]) for name in self.reference.class_names}
        totals = {name: max(each.count for each in some) for name, some in wanted.items() if some}
        if not totals:
            return
        labels = self.reference.labels_by_class(G.c_dim)
        with self._showing(sum(totals.values()), "generated images of classes") as on_images:
            for name, total in totals.items():
                source = GeneratedImages(G, labels[name], count=total, seed=self.seed, device=self._device)
                found = compute_features(source, wanted[name], batch=batch, device=self._device, on_images=on_images,
                                         cache=self._cache, workers=self._workers)
                for each, features in zip(wanted[name], found or ()):
                    samples.add(each.detector.name, Sample(features=features), name)

    def _path_distances(self, G: nn.Module, labels: FakeLabels, request: MetricRequest, batch: int) -> Tensor | None:
        steps = PathSteps(G, labels, space=request.space, sampling=request.sampling, crop=request.crop, seed=self.seed,
                          device=self._device)
        similarity = self._networks[LPIPS]
        with self._showing(request.num_fakes, "pairs of images") as on_images:
            found = compute_rows(request.num_fakes, batch, [(request.num_fakes, 1)],
                                 lambda rows: [steps.distances(rows, similarity)[:, None]], on_images)
        return None if found is None else found[0][:, 0]

    def _finish(self, requests: list[MetricRequest], fakes: Samples, counts: Mapping[tuple[str, str], int],
                lengths: Mapping[str, Tensor | None], batch: int, started: float) -> Results:
        """Compare the features of fakes with those of reals; return the records.

        counts:   how many fakes of each class a metric uses, by name of the metric and of the class
        lengths:  distances along paths, by name of the metric
        """
        self._compute_reals(batch)
        self._compute_heldout(batch)

        def records(beat: Callable[[], None]) -> Results:
            found, jackknives, held = {}, {}, self.reference.holdout
            holdout_hash = None if held is None else held.select().content_hash()
            for some in self._share_work(requests):
                if some[0].kind == "ppl":
                    assessed = {some[0].name: assess_paths(some[0], lengths[some[0].name], self.ci,
                                                           self.reference.class_names)}
                else:
                    assessed = self._assess(some, fakes, counts, beat)
                for request in some:
                    record = assessed[request.name].record
                    if "floor" in record:
                        record["floor"]["holdout_sha256"] = holdout_hash
                    found[request.name] = {
                        **record, "total_time": time.monotonic() - started,
                        **self._origin(request, self._networks[self.detector_names[request.name]], batch)}
                    jackknives[request.name] = assessed[request.name].jackknives
            return Results({request.name: found[request.name] for request in requests}, jackknives)

        return on_main_for_long(records) or Results({}, {})

    def _compute_reals(self, batch: int) -> None:
        """Compute the features of reals that are still missing."""
        for subset, selection in self.reference.selections.items():
            if subset not in self._reals:
                names = dict.fromkeys(self.detector_names[request.name] for request in self.requests
                                      if self.reference.subset(request) == subset)
                wanted = [FeatureRequest(detector=self._networks[name], count=len(selection)) for name in names]
                classes = self.reference.class_items(self.reference.images, *subset)
                self._reals[subset] = self._samples(selection, wanted, classes, batch, "real images")

    def _compute_heldout(self, batch: int) -> None:
        """Compute the features of held-out images that are still missing: as many as the metrics' numbers of fakes."""
        images = self.reference.holdout
        for mirror in sorted({subset.mirror for subset in self.reference.selections} if images is not None else ()):
            if mirror in self._heldout:
                continue
            selection = images.select(mirror=mirror, shuffle=True, seed=self.seed)
            counts: dict[str, int] = {}
            for request in self.requests:
                subset, name = self.reference.subset(request), self.detector_names[request.name]
                if subset is not None and subset.mirror == mirror:
                    needs_all = request.num_fakes is None or request.kind == "auth"  # C_T takes them all
                    count = len(selection) if needs_all else min(request.num_fakes, len(selection))
                    counts[name] = max(counts.get(name, 0), count)
            wanted = [FeatureRequest(detector=self._networks[name], count=count) for name, count in counts.items()]
            classes = self.reference.class_items(images, mirror=mirror, shuffle=True)
            self._heldout[mirror] = self._samples(selection, wanted, classes, batch, "held-out images")

    def _share_work(self, requests: list[MetricRequest]) -> list[list[MetricRequest]]:
        """Return the metrics, those together that one computation gives."""
        found: dict[tuple, list[MetricRequest]] = {}
        for request in requests:
            samples = self.detector_names[request.name], self.reference.subset(request), request.num_fakes
            found.setdefault((*samples, share_work(request)), []).append(request)
        return list(found.values())

    def _assess(self, some: list[MetricRequest], fakes: Samples, counts: Mapping[tuple[str, str], int],
                beat: Callable[[], None]) -> dict[str, Assessment]:
        """Return what is found by metrics that share their work, with the fields on classes."""
        first, detector = some[0], self.detector_names[some[0].name]
        subset = self.reference.subset(first)
        reals, heldout = self._reals.get(subset), None if subset is None else self._heldout.get(subset.mirror)
        real, fake = None if reals is None else reals.get(detector), fakes.get(detector).first(first.num_fakes)
        scoring = Scoring(seed=self.seed, level=self.ci, device=self._device)
        is_known = first.k is not None and self.ci is None and heldout is None and not counts
        num_rows = 2 * len(real) + len(fake) if is_known else None
        beat()
        with self._showing(num_rows, f"rows for {', '.join(request.name for request in some)}",
                           is_alone=True) as advance:
            def on_rows(count: int) -> None:
                beat()
                advance(count)

            try:
                found = assess(some, real, fake, None if heldout is None else heldout.get(detector), scoring, on_rows)
            except TooFew as error:
                raise UserError(f"metric {first.name}: {error}") from error
            if counts:
                of_class = {name: counts[first.name, name] for name in self.reference.class_names}
                fields = assess_classes(some, detector, of_class, real=reals, fake=fakes, heldout=heldout,
                                        scoring=scoring, on_rows=on_rows)
                for request in some:
                    found[request.name].record.update(fields[request.name])
        return found

    def _origin(self, request: MetricRequest, network: nn.Module, batch: int) -> dict[str, Any]:
        """Return the fields of a record that describe how the result was computed."""
        subset = self.reference.subset(request)
        selection = self.reference.selections.get(subset)
        return {"num_real": self.reference.num_reals(request), "num_fake": request.num_fakes,
                "mirrored_reals": subset is not None and subset.mirror,
                **method_fields(network, seed=self.seed, batch=batch, device=self._device),
                "class": self.reference.chosen, "data_sha256": None if selection is None else selection.content_hash()}

    def _log_once(self, lines: Sequence[str]) -> None:
        for line in lines:
            if line not in self._logged and is_main():
                self._logged.add(line)
                self._log(line)

    @contextmanager
    def _showing(self, total: int | None, unit: str, *, is_alone: bool = False) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts finished items; all processes call it together unless `is_alone`."""
        with Progress(total, unit) if self._progress and is_main() else nullcontext() as progress:
            def advance(count: int) -> None:
                if progress is not None:
                    progress.advance(count)
                raise_if_stopped(self._stop, is_alone=is_alone)

            yield advance
