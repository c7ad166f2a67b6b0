"""Classifiers of images: a backbone and a linear head; the fit of the head; and files of classifiers.

A file is a .safetensors file whose header has one JSON text, so that equal classifiers give equal bytes:

    {"format": "lesion-classifier", "version": 1, "model": "efficientnet_b2", "weights_sha256": "..." | null,
     "preprocessing": {...}, "labels": ["rest", "mel"], "finetune": "head" | "all",
     "fit": {"C": 0.01, "val_auc": 0.83, "has_converged": true} | null,             of a head that `fit_head` fitted
     "tensors_sha256": "...", "info": {...}}                                        any JSON, kept as it is

Tensors are named "head.NAME", and "backbone.NAME" where the backbone is not that of a file of weights: if it was
fine-tuned, or has random weights.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from analysis.backbones import AUTO, RANDOM, Backbone, Preprocessing, hash_tensors, open_backbone
from dnnlib.cli import UserError
from dnnlib.files import atomic_write, retrying
from metrics.detectors.base import WeightsFile, check_tensors, exact_float32

FORMAT_NAME, FORMAT_VERSION = "lesion-classifier", 1
HEAD, ALL = "head", "all"  # what of a classifier was trained

_HEADER_KEY = "classifier"  # of the metadata entry
_STRENGTHS = tuple(10.0 ** (half / 2) for half in range(-10, 3))  # values of C: 1e-5 to 10
_STEPS_WORSE = 3  # of the grid, after which the search ends: the weakest penalties take by far the longest
_MOST_ITERATIONS, _TOLERANCE = 2000, 1e-4

_ROUNDING = 1e-7  # of features, which are float32
_FIT = ("C", "val_auc", "has_converged")  # of a head: numbers beside its tensors
_EXPECTED = "expected a .safetensors file of a classifier, as study.py classify writes it"


@dataclass(frozen=True, kw_only=True)
class Head:
    """Logistic regression on standardized features.

    mean, std:       of the training images' features, float64 [F]
    weight, bias:    float64 [L, F], [L]; with two labels the first row is 0, so that softmax is the logistic function
    C:               inverse strength of the penalty, as in scikit-learn
    val_auc:         on the validation images
    has_converged:   False if the solver stopped at its limit of iterations
    """

    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    C: float
    val_auc: float
    has_converged: bool

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Return float64 [N, L]. features: [N, F]"""
        return softmax(self.logits(features))

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return float64 [N, L]. features: [N, F]"""
        return ((features - self.mean) / self.std) @ self.weight.T + self.bias


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return float64 [N, L], rows of sum 1. logits: [N, L]"""
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def measure_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve of two labels, or the mean of one label against the rest.

    labels: int64 [N];  scores: [N, L], larger for more likely labels

    Raises UserError if a label has no image, or all.
    """
    from sklearn.metrics import roc_auc_score  # here: importing it takes a second

    columns = range(scores.shape[1])
    counts = np.bincount(labels, minlength=len(columns))
    if 0 in counts:
        raise UserError(f"label number {np.argmin(counts)} has no image among the {len(labels)} to validate with; "
                        "expected images of each label")
    if len(columns) == 2:
        return float(roc_auc_score(labels == 1, scores[:, 1] - scores[:, 0]))
    return float(np.mean([roc_auc_score(labels == column, scores[:, column]) for column in columns]))


def fit_head(features: np.ndarray, labels: np.ndarray, val_features: np.ndarray, val_labels: np.ndarray, *,
             class_weight: bool, seed: int = 0) -> Head:
    """Fit logistic regression with the penalty that gives the best validation AUC; of equal ones, the strongest.

    From the strongest penalty on, the search ends when three weaker ones gave a worse AUC.

    features, val_features:  [N, F], [M, F]
    labels, val_labels:      int64 [N], [M], of the same labels 0..L-1
    class_weight:            let all labels count equally, whatever the numbers of their images
    seed:                    scikit-learn's random_state. LIMIT: its solver lbfgs draws nothing, so that results depend
                             on the seed of a study only through the choice of images

    Computed in float64. Raises UserError if a label has no image.
    """
    from sklearn.exceptions import ConvergenceWarning  # here: importing it takes a second
    from sklearn.linear_model import LogisticRegression

    count = 1 + max(int(labels.max()), int(val_labels.max()))
    if len(np.unique(labels)) < max(count, 2):
        absent = next(label for label in range(max(count, 2)) if label not in labels)
        raise UserError(f"label number {absent} has no image among the {len(labels)} to train on; expected images of "
                        "each label")
    mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    std[std <= _ROUNDING * np.abs(mean)] = 1  # a feature that never varies says nothing: about 0 without its mean
    scaled, best, steps_worse = (features - mean) / std, None, 0
    model = LogisticRegression(solver="lbfgs", max_iter=_MOST_ITERATIONS, tol=_TOLERANCE, warm_start=True,
                               class_weight="balanced" if class_weight else None, random_state=seed)
    for strength in _STRENGTHS:
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # recorded instead
            model.set_params(C=strength).fit(scaled, labels)
        weight, bias = model.coef_, model.intercept_
        if count == 2:
            weight, bias = np.stack([np.zeros_like(weight[0]), weight[0]]), np.array([0.0, bias[0]])
        head = Head(mean=mean, std=std, weight=weight.copy(), bias=bias.copy(), C=strength, val_auc=0.0,
                    has_converged=bool(model.n_iter_.max() < _MOST_ITERATIONS))
        logits = head.logits(val_features)
        val_auc = measure_auc(val_labels, logits if count == 2 else softmax(logits))
        if best is None or val_auc > best.val_auc:
            best, steps_worse = replace(head, val_auc=val_auc), 0
        else:
            steps_worse += val_auc < best.val_auc
        if steps_worse == _STEPS_WORSE:
            break
    return best


class Classifier(nn.Module):
    """A backbone and a linear layer on its standardized features, in eval mode unless it is trained.

    head:           fitted to the backbone's features; None = a linear layer with random weights, to be trained
    labels:         names, as in analysis.protocol.Task
    is_fine_tuned:  whether the backbone's weights differ from those of its file
    info:           what the file of a classifier records, JSON types
    """

    def __init__(self, backbone: Backbone, head: Head | None, labels: Sequence[str], *, seed: int = 0):
        super().__init__()
        self.backbone, self.head, self.labels = backbone, head, tuple(labels)
        self.is_fine_tuned, self.info = False, {}
        self.register_buffer("mean", torch.zeros(backbone.num_features))
        self.register_buffer("std", torch.ones(backbone.num_features))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.linear = nn.Linear(backbone.num_features, len(self.labels))
        if head is not None:
            with torch.no_grad():
                for name, tensor in self.head_tensors().items():
                    tensor.copy_(torch.from_numpy(getattr(head, name)))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, L]. pixels: uint8 [N, 3, H, W]"""
        return self._classify(self.backbone(pixels))

    def logits_of(self, images: Tensor) -> Tensor:
        """Return logits [N, L] of what `Preprocessing.resize_and_crop` returns; gradients flow to the images."""
        return self._classify(self.backbone.features(images))

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return float64 [N, L] without gradients, from logits in true float32. pixels: uint8 [N, 3, H, W]"""
        with torch.no_grad(), exact_float32():
            return self(pixels).double().softmax(dim=1)

    def _classify(self, features: Tensor) -> Tensor:
        return self.linear((features.float() - self.mean) / self.std)

    def head_tensors(self) -> dict[str, Tensor]:
        """Return all tensors but those of the backbone."""
        return {"mean": self.mean, "std": self.std, "weight": self.linear.weight, "bias": self.linear.bias}


def save_classifier(path: str | os.PathLike, classifier: Classifier, info: Mapping[str, Any]) -> None:
    """Write a classifier atomically; equal ones give equal bytes.

    info: JSON types. `study.py predict` uses, where they are there, "thresholds", those of
          analysis.classification_scores as a dict, and "resolution", [height, width] of the training images
    """
    backbone = classifier.backbone
    head = classifier.head  # in float64
    tensors = {f"head.{name}": tensor if head is None else torch.from_numpy(getattr(head, name))
               for name, tensor in classifier.head_tensors().items()}
    if classifier.is_fine_tuned or backbone.weights_sha256 is None:
        tensors |= {f"backbone.{name}": tensor for name, tensor in backbone.network.state_dict().items()}
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    fit = None if head is None else {name: getattr(head, name) for name in _FIT}
    header = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "model": backbone.name,
              "weights_sha256": backbone.weights_sha256, "preprocessing": backbone.preprocessing.as_record(),
              "labels": list(classifier.labels), "finetune": ALL if classifier.is_fine_tuned else HEAD,
              "fit": fit, "tensors_sha256": hash_tensors(tensors), "info": dict(info)}
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    data = safetensors.torch.save(tensors, metadata={_HEADER_KEY: text})
    with atomic_write(path) as file:
        file.write(data)


def read_info(path: str | os.PathLike) -> dict[str, Any]:
    """Return what `save_classifier` got as info, without reading tensors. Raises as `open_classifier` does."""
    return retrying(lambda: _read_header(path), path)["info"]


def open_head(path: str | os.PathLike) -> Head:
    """Return the head of a classifier that `fit_head` fitted, bit for bit, without opening the backbone.

    Raises as `open_classifier` does.
    """
    header, tensors = _read(path)
    if header["fit"] is None:
        raise UserError(f"{path} is a classifier of which all layers were trained; expected one of a head alone")
    arrays = {name: tensors[f"head.{name}"].double().numpy() for name in ("mean", "std", "weight", "bias")}
    return Head(**arrays, **header["fit"])


def open_classifier(path: str | os.PathLike, *, weights: str = AUTO,
                    device: str | torch.device = "cpu") -> Classifier:
    """Read a classifier; no code in the file is run.

    weights: as for `open_backbone`: those of the backbone, if the file has only the head

    Raises UserError if it is another file, is damaged, or its backbone's weights cannot be obtained, and OSError if it
    cannot be opened.
    """
    header, tensors = _read(path)
    is_whole = any(name.startswith("backbone.") for name in tensors)
    backbone = open_backbone(header["model"], weights=RANDOM if is_whole else weights)
    if not is_whole and backbone.weights_sha256 != header["weights_sha256"]:
        raise UserError(f"{path} belongs to weights of {header['model']} with the sha256 {header['weights_sha256']}; "
                        f"those given have {backbone.weights_sha256 or 'random numbers'}: name the file that it was "
                        "trained with by --weights")
    backbone.preprocessing, backbone.weights_sha256 = header["preprocessing"], header["weights_sha256"]
    classifier = Classifier(backbone, None, header["labels"])
    classifier.is_fine_tuned, classifier.info = header["finetune"] == ALL, header["info"]
    own = {f"head.{name}": tensor for name, tensor in classifier.head_tensors().items()}
    if is_whole:
        own |= {f"backbone.{name}": tensor for name, tensor in backbone.network.state_dict().items()}
    _fill(own, tensors, path)
    classifier.head = None if header["fit"] is None else open_head(path)
    return classifier.to(device)


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors. Raises UserError, OSError."""
    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        header = _read_header(path)  # has better messages than safe_open
        with safetensors.safe_open(path, framework="pt") as file:
            # Copies: the originals are views of the file, and would change if it is overwritten in place.
            return header, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118

    header, tensors = retrying(read, path)
    if hash_tensors(tensors) != header["tensors_sha256"]:
        raise UserError(f"{path} is damaged: its tensors do not match their checksum; copy it again")
    return header, tensors


def _read_header(path: str | os.PathLike) -> dict[str, Any]:
    """Return the header, with preprocessing as Preprocessing. Raises UserError, OSError."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; {_EXPECTED}")
    open(path, "rb").close()  # raises the error of the system if that fails
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER_KEY)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or of another kind ({error}); {_EXPECTED}") from error
    if text is None:
        raise UserError(f"{path} holds tensors, but is not a classifier; {_EXPECTED}")
    try:
        header = json.loads(text)
        if header["format"] != FORMAT_NAME or header["version"] != FORMAT_VERSION:
            raise ValueError(f"version {header['version']!r:.20}")
        texts = [header[name] for name in ("model", "finetune", "tensors_sha256")] + [header["weights_sha256"] or ""]
        if not (all(type(each) is str for each in [*texts, *header["labels"]]) and len(header["labels"]) > 1
                and type(header["info"]) is dict and (header["fit"] is None or header["fit"].keys() == set(_FIT))):
            raise ValueError("an entry of another type")
        return header | {"preprocessing": Preprocessing.from_record(header["preprocessing"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has a header that cannot be read ({type(error).__name__}: {error}); it is "
                        f"damaged or of another version: {_EXPECTED}") from error


def _fill(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Copy the tensors of a file into those of a classifier. Raises UserError if they do not fit."""
    layout = {name: tensor.shape for name, tensor in own.items() if tensor.is_floating_point()}
    counts = {name: tensor for name, tensor in tensors.items() if name in own and name not in layout}
    found = {name: tensor for name, tensor in tensors.items() if name not in counts}
    found = check_tensors(found, layout, path, WeightsFile(name="a classifier of this model"))
    with torch.no_grad():
        for name, tensor in {**found, **counts}.items():
            own[name].copy_(tensor)
