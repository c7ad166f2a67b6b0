"""Measure a generator or a set of images: all requested metrics in one pass over the images.

`Evaluator` opens the data set and the detectors and computes features of generated and real images; `compare` turns
them into the values of each metric.
"""

import os
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnnlib.cache import cache_folder
from dnnlib.cli import UserError
from dnnlib.progress import Progress
from metrics.detectors.base import exact_float32
from metrics.detectors.registry import open_detector, open_similarity
from metrics.features import (
    FeatureCache,
    FeatureRequest,
    Features,
    cache_key,
    choose_batch,
    compute_features,
    compute_rows,
    from_main,
    on_main,
    on_main_for_long,
    together,
)
from metrics.frechet import frechet_distance
from metrics.image_sources import (
    FakeLabels,
    GeneratedImages,
    ImageSource,
    RealSubset,
    Reference,
    SelectedImages,
    SetImages,
)
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distances
from metrics.names import IS_SPLITS, LPIPS, MetricRequest, choose_detector, parse_metrics
from metrics.perceptual_path import EPSILON, PathSteps, check_path_requests, path_length
from metrics.precision_recall import precision_recall
from torch_utils.device import find_versions
from torch_utils.distributed import any_process, is_main

Results = dict[str, dict[str, Any]]  # metric -> {"results": {key: value}, further fields of its record}
# Binkowski et al. 2018; the same numbers as in Karras et al. 2020.
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
_LARGEST_SEED = 2**32 - 1
_PROJECT_FILE = Path(__file__).parent.parent / "pyproject.toml"


class Stopped(Exception):
    """Measuring was canceled, because the caller's `stop` returned True."""


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
    log:       called with a line for the user
    progress:  show progress on standard error

    With several processes, each makes an Evaluator with equal arguments, and all call its methods together.
    Raises UserError if metrics, detector, data set and class do not fit together.
    """

    def __init__(self, metrics: str | Sequence[str], *, data: str | os.PathLike | None = None,
                 detector: str | None = None, weights: Mapping[str, str | None] | None = None, mirror: bool = False,
                 chosen: str | None = None, seed: int = 0, batch: int | None = None,
                 device: torch.device | str | None = None, use_cache: bool = True,
                 log: Callable[[str], None] = lambda line: None, progress: bool = False):
        self.requests = parse_metrics(metrics)
        self.detector_names = {request.name: choose_detector(request, detector) for request in self.requests}
        self.seed, self.batch = seed, batch
        if not 0 <= seed <= _LARGEST_SEED:
            raise UserError(f"--seed is {seed}; expected 0 to {_LARGEST_SEED}")
        if batch is not None and batch < 1:
            raise UserError(f"--batch is {batch}; expected at least 1")
        self._weights, self._progress, self._log = dict(weights or {}), progress, log
        self._logged: str | None = None  # the last note on classes
        self._stop: Callable[[], bool] | None = None
        self._cache = FeatureCache(cache_folder() / "features" if use_cache else None, log)
        self._networks: dict[str, nn.Module] = {}
        self._device = None if device is None else torch.device(device)
        self.reference = Reference(self.requests, data, mirror=mirror, chosen=chosen, seed=seed)
        # by name of the detector; None except on the main process
        self._real_features: dict[tuple[str, RealSubset], Features | None] = {}

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
        requests = [request.with_fakes(self.reference.num_reals(request)) for request in self.requests]
        labels = self.reference.labels_of_fakes(G.c_dim, info or {})
        if info is not None and self.reference.note not in (None, self._logged) and is_main():
            self._logged = self.reference.note
            self._log(self._logged)
        self.reference.check_shape((G.img_channels, G.img_resolution, G.img_resolution), "the network makes {} ones")
        check_path_requests(self.requests, G.img_resolution)
        if self._device is None:
            self._device = next((parameter.device for parameter in G.parameters()), torch.device("cpu"))
        batch = self.batch or choose_batch(G.img_resolution)
        with _measuring(G, self._device):
            self._open_networks()
            wanted = self._wanted(requests)
            fakes: list[Features] | None = []
            if wanted:
                source = GeneratedImages(G, labels, count=max(each.count for each in wanted), seed=self.seed,
                                         device=self._device)
                fakes = self._features(source, wanted, batch, "generated images")
            lengths = {request.name: self._path_length(G, labels, request, batch) for request in requests
                       if request.kind == "ppl"}
            return self._finish(requests, wanted, fakes, lengths, batch, started)

    def evaluate_images(self, images: SetImages) -> Results:
        """Return the metrics of a set of generated images; {} except on the main process.

        Raises UserError if a metric needs more images, or a network, or they do not fit the data set.
        """
        started, self._stop = time.monotonic(), None
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
        self._device = self._device or torch.device("cpu")
        batch = self.batch or choose_batch(max(images.shape[1:]))
        with _measuring(None, self._device):
            self._open_networks()
            wanted = self._wanted(requests)
            source = images.select(max(each.count for each in wanted), shuffle=True, seed=self.seed)
            fakes = self._features(source, wanted, batch, "generated images")
            return self._finish(requests, wanted, fakes, {}, batch, started)

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
        cached, keys = [None] * len(wanted), []
        if isinstance(source, SelectedImages):
            keys = on_main(lambda: [cache_key(source, each, batch, self._device) for each in wanted])
            cached = on_main(lambda: [self._cache.read(key, count=each.count, classes=each.classes)
                                      for key, each in zip(keys, wanted, strict=True)])
        missing = from_main(lambda: [index for index, features in enumerate(cached) if features is None])
        if missing:
            some = [wanted[index] for index in missing]
            with self._showing(max(each.count for each in some), unit) as on_images:
                found = compute_features(source, some, batch=batch, device=self._device, on_images=on_images)
            for index, features in zip(missing, found or ()):
                cached[index] = features
                if keys:
                    self._cache.write(keys[index], features)
        return cached if is_main() else None

    def _path_length(self, G: nn.Module, labels: FakeLabels, request: MetricRequest, batch: int) -> float | None:
        steps = PathSteps(G, labels, space=request.space, sampling=request.sampling, crop=request.crop, seed=self.seed,
                          device=self._device)
        similarity = self._networks[LPIPS]
        with self._showing(request.num_fakes, "pairs of images") as on_images:
            found = compute_rows(request.num_fakes, batch, [(request.num_fakes, 1)],
                                 lambda rows: [steps.distances(rows, similarity)[:, None]], on_images)
        return None if found is None else path_length(found[0][:, 0])

    def _finish(self, requests: list[MetricRequest], wanted: list[FeatureRequest], fakes: list[Features] | None,
                lengths: Mapping[str, float | None], batch: int, started: float) -> Results:
        """Compare the features of fakes with those of reals; return the records."""
        self._compute_real_features(batch)

        def records(beat: Callable[[], None]) -> Results:
            by_detector = {each.detector.name: features for each, features in zip(wanted, fakes, strict=True)}
            found = {}
            for request in requests:
                network = self._networks[self.detector_names[request.name]]
                if request.kind == "ppl":
                    values = {"results": {request.name: lengths[request.name]}, "epsilon": EPSILON}
                else:
                    real = self._real_features.get((network.name, self.reference.subset(request)))
                    values = self._compare(request, real, by_detector[network.name].first(request.num_fakes), beat)
                found[request.name] = {**values, "total_time": time.monotonic() - started,
                                       **self._origin(request, network, batch)}
            return found

        return on_main_for_long(records) or {}

    def _compute_real_features(self, batch: int) -> None:
        """Compute the features of reals that are still missing."""
        for subset, selection in self.reference.selections.items():
            names = dict.fromkeys(self.detector_names[request.name] for request in self.requests
                                  if self.reference.subset(request) == subset)
            missing = [name for name in names if (name, subset) not in self._real_features]
            if missing:
                wanted = [FeatureRequest(detector=self._networks[name], count=len(selection)) for name in missing]
                found = self._features(selection, wanted, batch, "real images") or [None] * len(missing)
                self._real_features.update({(name, subset): features
                                            for name, features in zip(missing, found, strict=True)})

    def _compare(self, request: MetricRequest, real: Features | None, fake: Features,
                 beat: Callable[[], None]) -> Mapping[str, Any]:
        beat()
        num_rows = 2 * (len(real) + len(fake)) if request.kind == "pr" else None  # unknown for the others
        with self._showing(num_rows, f"rows for {request.name}", is_alone=True) as advance:
            return compare(request, real, fake, self.seed, lambda count: (beat(), advance(count)))

    def _origin(self, request: MetricRequest, network: nn.Module, batch: int) -> dict[str, Any]:
        """Return the fields of a record that describe how the result was computed."""
        subset = self.reference.subset(request)
        selection = self.reference.selections.get(subset)
        return {"num_real": self.reference.num_reals(request), "num_fake": request.num_fakes,
                "mirrored_reals": subset is not None and subset.mirror,
                "detector": network.name, "detector_sha256": network.weights_sha256,
                "preprocessing": network.preprocessing, "seed": self.seed, "batch": batch,
                "class": self.reference.chosen, "data_sha256": None if selection is None else selection.content_hash(),
                "device": self._device.type, "versions": _software_versions()}

    @contextmanager
    def _showing(self, total: int | None, unit: str, *, is_alone: bool = False) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts finished items; all processes call it together unless `is_alone`."""
        with Progress(total, unit) if self._progress and is_main() else nullcontext() as progress:
            def advance(count: int) -> None:
                if progress is not None:
                    progress.advance(count)
                if self._stop is not None and (self._stop() if is_alone else any_process(self._stop())):
                    raise Stopped("measuring was canceled")

            yield advance


def compare(request: MetricRequest, real: Features | None, fake: Features, seed: int,
            on_rows: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Return {"results": {key: value}, further fields} of a metric other than ppl.

    real:     None if the metric needs no reals
    seed:     random seed of subsets
    on_rows:  for kid and pr, called with the number of finished rows of the matrix of all pairs of images

    Raises ValueError if there are too few images.
    """
    name = request.name
    if request.kind == "fid":
        distance = frechet_distance(real.stats.mean, real.stats.covariance(), fake.stats.mean, fake.stats.covariance())
        fewest, num_features = min(len(real), len(fake)), real.values.shape[1]
        note = {} if fewest > num_features else {
            "note": f"{fewest} images span less than the {num_features} dimensions of the features: the value is too "
                    "high by an amount that depends on the numbers of images; compare only values for equal numbers, "
                    "or use kid"}
        return {"results": {name: distance}, **note}
    if request.kind == "kid":
        size = min(len(real), len(fake), KID_SUBSET_SIZE)
        differ = size < max(len(real), len(fake))  # otherwise each subset would be the whole set
        distances = kernel_distances(real.values, fake.values, KID_SUBSETS if differ else 1, size, seed, on_rows)
        spread = {"subset_std": float(distances.std())} if differ else {}
        return {"results": {name: float(distances.mean())}, "subsets": len(distances), "subset_size": size, **spread}
    if request.kind == "pr":
        found = precision_recall(real.values, fake.values, request.k, on_rows)
        return {"results": dict(zip(request.keys, (float(found.precision), float(found.recall)), strict=True))}
    score = inception_score(fake.probabilities, IS_SPLITS)
    return {"results": dict(zip(request.keys, (float(score.mean), float(score.std)), strict=True))}


def _software_versions() -> dict[str, str]:
    """Return the versions of torch, numpy and the project ("unknown" if its file cannot be read)."""
    try:  # not from installed metadata: the project also runs without being installed
        project = tomllib.loads(_PROJECT_FILE.read_text(encoding="utf-8"))["project"]["version"]
    except (OSError, ValueError, KeyError):
        project = "unknown"
    return {**find_versions("torch", "numpy"), "project": project}


@contextmanager
def _measuring(G: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Put G in eval mode; disable gradients and TF32; leave the global random state as it was."""
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
