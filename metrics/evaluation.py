"""Measure a generator or a set of images: all metrics asked for in one pass over the images."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dnnlib.cache import cache_folder
from dnnlib.cli import UserError
from dnnlib.progress import Progress
from metrics.detectors.base import exact_float32
from metrics.detectors.registry import open_detector, open_similarity
from metrics.features import (
    FEATURE_VERSION,
    FeatureCache,
    Features,
    Wish,
    choose_batch,
    compute_features,
    compute_rows,
    from_main,
    on_main,
    on_main_for_long,
    together,
)
from metrics.image_sources import FakeLabels, GeneratedImages, Selection, SetImages, Source
from metrics.names import SIMILARITY, MetricRequest, choose_detector, parse_metrics
from metrics.perceptual_path import EPSILON, PathSteps, check_path_requests, path_length
from metrics.records import Choice, Reference, Side, compute_results, num_rows, software_versions
from torch_utils.distributed import any_process, is_main

Results = dict[str, dict[str, Any]]  # metric -> {"results": {key: value}, further fields of its record}
_LARGEST_SEED = 2**32 - 1


class Stopped(Exception):
    """The work was given up, since the caller's `stop` said so."""


class Evaluator:
    """Measures against one data set; features of reals are computed once, and kept.

    metrics:   names, in a list or with commas between them
    data:      path of the data set; None where metrics need none
    detector:  name of the one to use in place of each metric's usual one
    weights:   files of weights by name of the network, in place of downloaded ones
    mirror:    the training saw mirrored images as well
    chosen:    name or number of a class: measure its images only
    seed:      of latents, labels, noise and random choices
    batch:     images at a time; part of the result, since noise follows from it. None chooses by resolution
    device:    of everything; None takes the generator's
    use_cache: keep features of sets of images on the disk
    say:       takes a line for the user
    progress:  show how far the work is, on standard error

    Of several processes each makes one, with equal arguments, and calls its methods together with the others.
    Raises UserError when something of this cannot be.
    """

    def __init__(self, metrics: str | Sequence[str], *, data: str | os.PathLike | None = None,
                 detector: str | None = None, weights: Mapping[str, str] | None = None, mirror: bool = False,
                 chosen: str | None = None, seed: int = 0, batch: int | None = None,
                 device: torch.device | str | None = None, use_cache: bool = True,
                 say: Callable[[str], None] = lambda line: None, progress: bool = False):
        self.requests = parse_metrics(metrics)
        self.detector_names = {request.name: choose_detector(request, detector) for request in self.requests}
        self.chosen, self.seed, self.batch = chosen, seed, batch
        if not 0 <= seed <= _LARGEST_SEED:
            raise UserError(f"--seed is {seed}; expected 0 to {_LARGEST_SEED}")
        if batch is not None and batch < 1:
            raise UserError(f"--batch is {batch}; expected at least 1")
        self._weights, self._progress, self._say = dict(weights or {}), progress, say
        self._said: str | None = None  # of classes
        self._stop: Callable[[], bool] | None = None
        self._cache = FeatureCache(cache_folder() / "features" if use_cache else None, say)
        self._networks: dict[str, nn.Module] = {}
        self._device = None if device is None else torch.device(device)
        self.reference = Reference(self.requests, data, mirror=mirror, chosen=chosen, seed=seed)
        self._sides: dict[tuple[str, Choice], Side | None] = {}  # of reals; None but on the main process

    def evaluate(self, G: nn.Module, info: Mapping[str, Any] | None = None, *,
                 stop: Callable[[], bool] | None = None) -> Results:
        """Return the metrics of a generator; {} but on the main process.

        G:     with mapping, synthesis, z_dim, c_dim, img_resolution and img_channels; it comes back in its mode, and
               the random state stays as it is
        info:  what its file says: "classes" and "class_counts" serve where there is no data set
        stop:  is asked after each block of images; once it says yes, in any process, the work is given up

        Raises UserError when data, class and network do not go together, and Stopped, which may be an
        OtherProcessFailed where another process was the first to stop.
        """
        started, self._stop = time.monotonic(), stop
        requests = [request.with_fakes(self.reference.num_reals(request)) for request in self.requests]
        labels = self.reference.labels_of_fakes(G.c_dim, info or {})
        if info is not None and self.reference.note not in (None, self._said) and is_main():
            self._said = self.reference.note
            self._say(self._said)
        self.reference.check_shape((G.img_channels, G.img_resolution, G.img_resolution), "the network makes {} ones")
        check_path_requests(self.requests, G.img_resolution)
        self._device = self._device or _device_of(G)
        batch = self.batch or choose_batch(G.img_resolution)
        with _measuring(G, self._device):
            self._open_networks()
            wishes = self._wishes(requests)
            fakes: list[Features] | None = []
            if wishes:
                source = GeneratedImages(G, labels, count=max(wish.count for wish in wishes), seed=self.seed,
                                         device=self._device)
                fakes = self._look(source, wishes, batch, "generated images")
            lengths = {request.name: self._path_length(G, labels, request, batch) for request in requests
                       if request.kind == "ppl"}
            return self._finish(requests, wishes, fakes, lengths, batch, started)

    def evaluate_images(self, images: SetImages) -> Results:
        """Return the metrics of a set of generated images; {} but on the main process.

        Raises UserError when a metric needs more of them, or a network, or they do not fit the data.
        """
        started, self._stop = time.monotonic(), None
        requests = [request.with_fakes(len(images)) for request in self.requests]
        for request in requests:
            holds = f"{images.path} holds {len(images)}{self.reference.of_class}; expected more"
            if request.kind == "ppl":
                raise UserError(f"metric {request.name} needs a network; expected --network in place of --generated")
            if request.num_fakes < request.fewest:
                raise UserError(f"metric {request.name} needs at least {request.fewest} generated images and {holds}")
            if len(images) < request.num_fakes:
                raise UserError(f"metric {request.name} needs {request.num_fakes} generated images and {holds}, or a "
                                "smaller number in the metric's name")
        self.reference.check_shape(images.shape, f"{images.path} holds {{}} ones")
        self.reference.check_class(images)
        self._device = self._device or torch.device("cpu")
        batch = self.batch or choose_batch(max(images.shape[1:]))
        with _measuring(None, self._device):
            self._open_networks()
            wishes = self._wishes(requests)
            source = images.select(max(wish.count for wish in wishes), shuffle=True, seed=self.seed)
            fakes = self._look(source, wishes, batch, "generated images")
            return self._finish(requests, wishes, fakes, {}, batch, started)

    def _open_networks(self) -> None:
        """Open what looks at images, where it is not open yet. Raises UserError when weights are missing."""
        if not self._networks:
            on_main(self._open_each)  # first, since it may download
            together(lambda: self._networks or self._open_each())

    def _open_each(self) -> None:
        for name in dict.fromkeys(self.detector_names.values()):
            weights = self._weights.get(name)
            self._networks[name] = (open_similarity(device=self._device, weights=weights) if name == SIMILARITY
                                    else open_detector(name, device=self._device, weights=weights))

    def _finish(self, requests: list[MetricRequest], wishes: list[Wish], fakes: list[Features] | None,
                lengths: Mapping[str, float | None], batch: int, started: float) -> Results:
        """Compare the features of fakes with those of reals, and put records together."""
        self._see_reals(batch)
        results = on_main_for_long(lambda beat: self._records(requests, wishes, fakes, lengths, batch, started,
                                                                   beat))
        return results or {}

    def _records(self, requests: list[MetricRequest], wishes: list[Wish], fakes: list[Features],
                 lengths: Mapping[str, float], batch: int, started: float, beat: Callable[[], None]) -> Results:
        sides = {wish.detector.name: Side(features) for wish, features in zip(wishes, fakes, strict=True)}
        records = {}
        for request in requests:
            network = self._networks[self.detector_names[request.name]]
            choice = self.reference.choice(request)
            selection = self.reference.selections.get(choice)
            if request.kind == "ppl":
                found = {"results": {request.name: lengths[request.name]}, "epsilon": EPSILON}
            else:
                real = None if selection is None else self._sides[network.name, choice]
                found = self._compare(request, real, sides[network.name].first(request.num_fakes), beat)
            records[request.name] = {
                **found, "total_time": time.monotonic() - started,
                "num_real": self.reference.num_reals(request), "num_fake": request.num_fakes,
                "mirrored_reals": choice is not None and choice.mirror,
                "detector": network.name, "detector_sha256": network.weights_sha256,
                "preprocessing": network.preprocessing, "seed": self.seed, "batch": batch, "class": self.chosen,
                "data_sha256": None if selection is None else selection.content_hash(),
                "device": self._device.type, "versions": software_versions()}
        return records

    def _compare(self, request: MetricRequest, real: Side | None, fake: Side,
                 beat: Callable[[], None]) -> Mapping[str, Any]:
        beat()
        with self._showing(num_rows(request, real, fake), f"rows for {request.name}", is_alone=True) as advance:
            return compute_results(request, real, fake, self.seed, lambda count: (beat(), advance(count)))

    def _wishes(self, requests: list[MetricRequest]) -> list[Wish]:
        """Return what each detector is to see of the fakes."""
        by_detector: dict[str, list[MetricRequest]] = {}
        for request in requests:
            if request.kind != "ppl":
                by_detector.setdefault(self.detector_names[request.name], []).append(request)
        return [Wish(detector=self._networks[name], count=max(request.num_fakes for request in some),
                     classes=any(request.kind == "is" for request in some)) for name, some in by_detector.items()]

    def _see_reals(self, batch: int) -> None:
        """Compute the features of reals that are not there yet."""
        for choice, selection in self.reference.selections.items():
            names = dict.fromkeys(self.detector_names[request.name] for request in self.requests
                                  if self.reference.choice(request) == choice)
            missing = [name for name in names if (name, choice) not in self._sides]
            if not missing:
                continue
            wishes = [Wish(detector=self._networks[name], count=len(selection)) for name in missing]
            found = self._look(selection, wishes, batch, "real images")
            for index, name in enumerate(missing):
                self._sides[name, choice] = None if found is None else Side(found[index])

    def _look(self, source: Source, wishes: list[Wish], batch: int, unit: str) -> list[Features] | None:
        """Return the features for each wish, from the cache where they are there; None but on the main process."""
        cached, keys = [None] * len(wishes), []
        if isinstance(source, Selection):
            keys = on_main(lambda: [_cache_key(source, wish, batch, self._device) for wish in wishes])
            cached = on_main(lambda: [self._cache.read(key, count=wish.count, classes=wish.classes)
                                      for key, wish in zip(keys, wishes, strict=True)])
        missing = from_main(lambda: [index for index, features in enumerate(cached) if features is None])
        if missing:
            some = [wishes[index] for index in missing]
            with self._showing(max(wish.count for wish in some), unit) as on_images:
                found = compute_features(source, some, batch=batch, device=self._device, on_images=on_images)
            for index, features in zip(missing, found or ()):
                cached[index] = features
                if keys:
                    self._cache.write(keys[index], features)
        return cached if is_main() else None

    def _path_length(self, G: nn.Module, labels: FakeLabels, request: MetricRequest, batch: int) -> float | None:
        steps = PathSteps(G, labels, space=request.space, sampling=request.sampling, crop=request.crop, seed=self.seed,
                          device=self._device)
        similarity = self._networks[SIMILARITY]
        with self._showing(request.num_fakes, "pairs of images") as on_images:
            found = compute_rows(request.num_fakes, batch, [(request.num_fakes, 1)],
                                 lambda rows: [steps.distances(rows, similarity)[:, None]], on_images)
        return None if found is None else path_length(found[0][:, 0])

    @contextmanager
    def _showing(self, total: int | None, unit: str, *, is_alone: bool = False) -> Iterator[Callable[[int], None]]:
        """Give what is told of items that were done, by all processes together unless this one `is_alone`."""
        with Progress(total, unit) if self._progress and is_main() else nullcontext() as progress:
            def advance(count: int) -> None:
                if progress is not None:
                    progress.advance(count)
                if self._stop is not None and (self._stop() if is_alone else any_process(self._stop())):
                    raise Stopped("metrics were given up")

            yield advance


def _cache_key(source: Selection, wish: Wish, batch: int, device: torch.device) -> dict[str, object]:
    detector = wish.detector
    return {"version": FEATURE_VERSION, "content": source.content_hash(wish.count), "count": wish.count,
            "detector": detector.name, "weights": detector.weights_sha256, "preprocessing": detector.preprocessing,
            "classes": wish.classes, "batch": batch, "device": device.type, "torch": torch.__version__}


def _device_of(G: nn.Module) -> torch.device:
    parameter = next(G.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def _measuring(G: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Bring G into eval mode, and take no gradients, exact products and no random numbers of others."""
    modes = {} if G is None else {module: module.training for module in G.modules()}
    random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        if G is not None:
            G.eval()
        with random_state, exact_float32(), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
