"""What images of a map are compared by: features of a detector or a classifier, or styles; and a classifier's labels.

Legend: N points, F features, L styles of an image, K numbers of a style.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.backbones import AUTO, hash_tensors
from analysis.classifier import Classifier, open_classifier, softmax
from analysis.embedding_inputs import STYLES, EmbedRequest, is_projected
from analysis.embedding_points import Points, PointSet
from analysis.prediction import choose_labels, threshold_of
from analysis.protocol import Task
from dnnlib.cache import cache_folder
from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from dnnlib.progress import Progress
from generation.image_generator import GLOBAL_CENTER, ImageGenerator, SynthesisSettings, read_npz
from generation.network import Label, OpenNetwork, open_network, require_same
from imagesets.reader import ImageSet
from latent.image_set import STYLES as STYLES_FILE
from latent.image_set import ZIP
from metrics.detectors.base import Detector, exact_float32
from metrics.detectors.registry import is_detector, open_detector
from metrics.features import (
    FeatureCache,
    FeatureRequest,
    cached_features,
    choose_batch,
    on_main_first,
    on_main_for_long,
)
from torch_utils.distributed import Processes

_MAPPED = 1024  # seeds that are turned into styles at a time


def embedding_features(request: EmbedRequest, points: Points,
                       processes: Processes) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Return the features of all points, float32 [N, F], and what they are, as JSON values.

    The features are None except on the main process. All processes call this together.

    Raises UserError if the detector, classifier or network cannot be opened, an image cannot be read, or styles do not
    belong to their images.
    """
    if request.features == STYLES:
        return _styles(request, points, processes)
    described: dict[str, Any] = {"name": request.features}
    if is_detector(request.features):
        detector = on_main_first(lambda: open_detector(request.features, device=processes.device,
                                                       weights=request.weights))
    else:
        classifier = _open_classifier(request.features, request, processes)
        detector = _detector_of(classifier)
        described |= {"name": Path(request.features).name, "sha256": sha256_of(request.features),
                      "labels": list(classifier.labels), "model": detector.name}
    described |= {"weights_sha256": detector.weights_sha256, "preprocessing": detector.preprocessing,
                  "num_features": detector.num_features}
    return _compute(detector, request, points, processes), described


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a classifier says about all points.

    probabilities:  float64 [N, labels]
    predicted:      int64 [N], number of the predicted label, as study.py predict chooses it
    task:           tells the label of a class
    """

    task: Task
    probabilities: np.ndarray
    predicted: np.ndarray

    @property
    def labels(self) -> Sequence[str]:
        return self.task.labels


def classifier_predictions(request: EmbedRequest, points: Points, processes: Processes) -> Predictions | None:
    """Return what --classifier says about all points; None except on the main process.

    All processes call this together. Probabilities are computed from cached features, so that a classifier that is also
    --features takes no time. Raises UserError if the classifier cannot be opened.
    """
    classifier = _open_classifier(request.classifier, request, processes)
    features = _compute(_detector_of(classifier), request, points, processes)
    if features is None:
        return None
    tensors = {name: tensor.detach().double().cpu().numpy() for name, tensor in classifier.head_tensors().items()}
    probabilities = softmax((features - tensors["mean"]) / tensors["std"] @ tensors["weight"].T + tensors["bias"])
    positive = classifier.info.get("positive")
    is_binary = isinstance(positive, list) and len(classifier.labels) == 2
    return Predictions(task=Task(labels=tuple(classifier.labels), positive=tuple(positive) if is_binary else ()),
                       probabilities=probabilities, predicted=choose_labels(probabilities, threshold_of(classifier)))


def _open_classifier(path: str, request: EmbedRequest, processes: Processes) -> Classifier:
    """Open a classifier. --weights are those of a detector if --features is one."""
    weights = AUTO if request.weights is None or is_detector(request.features) else request.weights
    return on_main_first(lambda: open_classifier(path, weights=weights, device=processes.device))


def _detector_of(classifier: Classifier) -> Detector:
    """Return the backbone of a classifier as a detector; a fine-tuned one has weights of its own."""
    detector = classifier.backbone.detector()
    if classifier.is_fine_tuned:
        detector.weights_sha256 = hash_tensors(classifier.backbone.network.state_dict())
    return detector


def _compute(detector: Detector, request: EmbedRequest, points: Points, processes: Processes) -> np.ndarray | None:
    """Return the features of all points, float32 [N, F]; None except on the main process."""
    found = []
    cache = FeatureCache(None if request.no_cache else cache_folder() / "features",
                         lambda line: print(line, file=sys.stderr))
    for one in points.sets:
        features = cached_features(
            one.images, [FeatureRequest(detector=detector, count=len(one))],
            batch=choose_batch(max(one.images.images.shape[1:])), device=processes.device, cache=cache,
            workers=request.workers, showing=lambda count, name=one.name: _showing(count, name, request, processes))
        found.append(None if features is None else features[0].values)
    return np.concatenate(found) if processes.rank == 0 else None


@contextmanager
def _showing(count: int, name: str, request: EmbedRequest, processes: Processes) -> Iterator[Callable[[int], None]]:
    is_shown = request.verbose and processes.rank == 0
    with Progress(count, f"images: features of {name}") if is_shown else nullcontext() as progress:
        yield progress.advance if is_shown else lambda number: None


# Styles


def _styles(request: EmbedRequest, points: Points, processes: Processes) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Return the styles of all points, float32 [N, K], or [N, L * K] if the styles of an image differ; see
    `embedding_features`.

    LIMIT: several layers have the same weight, although those of fine layers change an image little.
    """
    network = None
    if request.network is not None:
        network = open_network(request.network, processes.device)
        require_same(network, processes)
    origin = points.sets[0].images.images.source
    for one in points.sets:
        _check_network(one, network, origin)
    found = on_main_for_long(lambda beat: _join([_styles_of(one, network, request, beat) for one in points.sets]))
    return found, {"name": STYLES, "network": origin.get("network"), "network_sha256": origin.get("network_sha256")}


def _check_network(one: PointSet, network: OpenNetwork | None, origin: Mapping[str, Any]) -> None:
    """Raise UserError unless a set is of --network, or if that is not given, of the network of the first set.

    origin:  `source` of the first set
    """
    own = one.images.images.source
    wanted, text = (origin.get("network_sha256"), f"{origin.get('network')}, the network of the first set") \
        if network is None else (network.sha256, f"--network, {network.name}")
    if own.get("network_sha256") != wanted:
        raise UserError(f"{one.images.images.path} is of {own.get('network')}, another network than {text}; expected "
                        "sets of one network, whose styles alone can be compared")


def _styles_of(one: PointSet, network: OpenNetwork | None, request: EmbedRequest,
               beat: Callable[[], None]) -> np.ndarray:
    """Return the styles of a set's images, float32 [n, L, K], or [n, 1, K] if those of each image are equal."""
    data, rows = ImageSet(one.images.images.path), one.images.items
    if is_projected(data.source):
        return _read_styles(data)[rows]
    source, flag = data.source, str(data.path)
    seeds = source.get("seeds")
    if not (isinstance(seeds, list) and len(seeds) == 2 and all(type(seed) is int for seed in seeds)
            and seeds[1] - seeds[0] + 1 == len(data)):
        raise UserError(f"{flag} has {len(data)} images, but records the seeds {seeds}; expected one seed for each "
                        "image, in a file as generate.py --zip wrote it")
    generator = ImageGenerator(network.G, SynthesisSettings(
        truncation=source.get("truncation", 1.0), center=source.get("truncation_center", GLOBAL_CENTER)), batch=1)
    found = []
    with (Progress(len(rows), f"styles of {one.name}") if request.verbose else nullcontext() as progress,
          exact_float32()):
        for start in range(0, len(rows), _MAPPED):
            some = rows[start:start + _MAPPED].tolist()
            labels = network.classes.labels([_label(data, row, network) for row in some])
            ws = generator.map_seeds([seeds[0] + row for row in some], labels)
            found.append(ws[:, :1].cpu().numpy())  # generate.py gives all layers of an image the same style
            beat()
            if progress is not None:
                progress.advance(len(some))
    return np.concatenate(found)


def _label(data: ImageSet, row: int, network: OpenNetwork) -> Label:
    """Return the label from which a network made an image of a set. Raises UserError if it is not there."""
    label = data.label(row)
    if network.classes.count == 0:
        return None
    found = tuple(label) if isinstance(label, list) else label
    length = len(found) if isinstance(found, tuple) else network.classes.count
    if found is None or length != network.classes.count or (isinstance(found, int) and found >= length):
        raise UserError(f"{data.path}: {data.names[row]} has the label {label}; expected one of {network.name}, which "
                        f"has {network.classes.count} classes: name the file as generate.py --zip wrote it")
    return found


def _read_styles(data: ImageSet) -> np.ndarray:
    """Return the styles of projections from the file beside them, float32 [n, L, K], or [n, 1, K] if those of each
    image are equal."""
    path = data.path.with_name(STYLES_FILE)
    advice = f"expected {STYLES_FILE} as projector.py --data writes it beside {ZIP}: keep both in one folder"
    arrays = read_npz(path, ["w", "group"], flag=str(path), expected=advice)
    w, groups = arrays["w"], arrays["group"].tolist()
    if w.ndim != 3 or w.dtype.kind != "f" or not np.isfinite(w).all():
        raise UserError(f"{path} has w of shape {list(w.shape)} and type {w.dtype}; {advice}")
    if len(w) != len(data):
        raise UserError(f"{path} has styles of {len(w)} images, {data.path} has {len(data)} images; {advice}")
    if len(groups) != len(data) or any(own not in (None, group)
                                       for group, own in zip(groups, data.named_groups(), strict=True)):
        raise UserError(f"{path} has styles of other images than {data.path}; {advice}")
    w = w.astype(np.float32, copy=False)
    return w[:, :1] if (w == w[:, :1]).all() else w


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the styles of all sets as features: float32 [N, K], or [N, L * K] if they differ between layers."""
    layers, width = max(part.shape[1] for part in parts), parts[0].shape[2]
    for part in parts:
        if part.shape[2] != width or part.shape[1] not in (1, layers):
            raise UserError(f"the styles of the sets are of {part.shape[1]}x{part.shape[2]} and {layers}x{width} "
                            "numbers; expected those of one network")
    return np.concatenate([np.broadcast_to(part, (len(part), layers, width)).reshape(len(part), -1) for part in parts])
