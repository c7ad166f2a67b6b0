"""Train all layers of a classifier on labeled images, with early stopping on the validation AUC.

Everything random follows from the seed and the position in training (epoch, step): the order of images, their
augmentation, dropout and stochastic depth. So a training that was stopped continues bit for bit on a CPU from the state
that is saved after each epoch.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from analysis.backbones import Backbone
from analysis.classifier import Classifier, measure_auc
from analysis.lesion_augmentation import augment
from analysis.prediction import predict_probabilities
from dnnlib.cli import UserError
from metrics.image_sources import SelectedImages, SetImages, decode_batches
from torch_utils.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint
from torch_utils.device import memory_advice
from torch_utils.seeding import generator_for, seed_for

_STATE_VERSION = 1
# Of batch normalization: statistics follow within tens of steps. Some networks have 0.01 or less, for trainings of
# hundreds of thousands of steps, and a study of few images would be over before they fit: with EfficientNet-lite0 and
# 800 images of 64x64, the validation AUC after two epochs was 0.61, and is 0.78.
_MOMENTUM = 0.1
_LEAST_BATCH = 2  # batch normalization needs the deviations of several images


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings:
    """How long and how fast all layers of a classifier are trained."""

    epochs: int = 30  # at most
    lr: float = 1e-3  # of AdamW after the first epoch, in which it rises from 0; then it falls to 0 along a cosine.
    # Three epochs with 800 images of 64x64: validation AUC 0.82, and 0.79 with 3e-4. LIMIT: too high for transformers
    batch: int = 32  # images per step
    weight_decay: float = 0.01  # decoupled, of matrices and filters; biases and normalizations have none
    patience: int = 8  # stop after so many epochs without a better validation AUC

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", _LEAST_BATCH), ("patience", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}; expected at least {least}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr is {self.lr:g}; expected a number above 0, such as --lr={FineTuneSettings.lr:g}")


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """Some images of a set, with their labels.

    rows:    places in the set, int64 [n]
    labels:  int64 [n]
    """

    images: SetImages
    rows: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What an epoch gave; number starts with 1."""

    number: int
    images_per_second: float
    loss: float  # mean of its steps
    val_auc: float
    is_best: bool  # so far


def fine_tune(backbone: Backbone, labels: Sequence[str], train: Sequence[TrainingImages], val: TrainingImages,
              settings: FineTuneSettings, *, seed: int, class_weight: bool = False, state_path: Path | None = None,
              identity: Mapping[str, Any] | None = None, device: str | torch.device = "cpu", workers: int | None = None,
              on_epoch: Callable[[Epoch], None] = lambda epoch: None,
              log: Callable[[str], None] = lambda line: None) -> tuple[Classifier, list[Epoch]]:
    """Train a copy of a backbone with a new linear layer; return the classifier of the best epoch, and all epochs.

    labels:        names of the labels
    train:         of one or several sets, whose images are of one size
    class_weight:  let all labels count equally, whatever the numbers of their images
    state_path:    file of the state after each epoch, from which training continues; the caller removes it in the end
    identity:      JSON types on which training depends beside the arguments before `state_path`, such as hashes of
                   images: a state of another identity is not used
    workers:       number of processes that decode images; None = one that suits the machine
    on_epoch:      called after each epoch, when its state is saved
    log:           called with a line for the user when a state cannot be used

    Of equally good epochs, the first counts. Raises UserError if a label has no images, images cannot be read, or the
    loss is not finite.
    """
    device = torch.device(device)
    training = _Training(backbone, labels, train, val, settings, seed=seed, class_weight=class_weight, device=device,
                         workers=workers)
    known = json.dumps([backbone.name, backbone.weights_sha256, backbone.preprocessing.as_record(), list(labels),
                        asdict(settings), seed, class_weight, identity, device.type], sort_keys=True)
    if state_path is not None:
        training.restore(state_path, known, log)
    while not training.is_done:
        epoch = training.run_epoch()
        if state_path is not None:
            write_checkpoint(state_path, training.state(known))
        on_epoch(epoch)
    training.classifier.load_state_dict(training.best)
    training.classifier.is_fine_tuned = True
    return training.classifier.eval(), training.history


class _Training:
    """A classifier in training, and what its next steps depend on."""

    def __init__(self, backbone: Backbone, labels: Sequence[str], train: Sequence[TrainingImages], val: TrainingImages,
                 settings: FineTuneSettings, *, seed: int, class_weight: bool, device: torch.device,
                 workers: int | None):
        self.settings, self.seed, self.device, self.workers = settings, seed, device, workers
        self.train, self.val = _Joined(train), val
        counts = np.bincount(self.train.labels, minlength=len(labels))
        if counts.min() == 0:
            raise UserError(f"{labels[int(counts.argmin())]} has no image among the {len(self.train)} to train on; "
                            "expected images of each label")
        weights = counts.sum() / (len(counts) * counts)
        self.weights = torch.tensor(weights, dtype=torch.float32, device=device) if class_weight else None
        self.classifier = Classifier(deepcopy(backbone), None, labels, seed=seed).to(device)
        for layer in self.classifier.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = _MOMENTUM
        self.optimizer = self._make_optimizer()
        # Half precision is what makes a GPU fast; bfloat16 has the range of float32, and needs no loss scale.
        is_gpu = device.type == "cuda"
        self.half = (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16) if is_gpu else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half == torch.float16)
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}

    def _make_optimizer(self) -> torch.optim.AdamW:
        parameters = list(self.classifier.parameters())
        return torch.optim.AdamW([
            {"params": [each for each in parameters if each.ndim > 1], "weight_decay": self.settings.weight_decay},
            {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0}])

    @property
    def is_done(self) -> bool:
        if not self.history:
            return False
        last_best = max(epoch.number for epoch in self.history if epoch.is_best)
        return len(self.history) >= min(self.settings.epochs, last_best + self.settings.patience)

    def run_epoch(self) -> Epoch:
        number, started = len(self.history), time.monotonic()
        batches = self._divide(number)
        total = 0.0
        self.classifier.train()
        with memory_advice(self.settings.batch), closing(self.train.batches(batches, self.workers)) as decoded:
            for step, (rows, pixels) in enumerate(zip(batches, decoded)):
                rate = self._rate(number + (step + 0.5) / len(batches))
                total += self._step(number, step, pixels, self.train.labels[rows], rate)
        loss, seconds = total / len(batches), time.monotonic() - started
        probabilities = predict_probabilities(self.classifier.eval(), SelectedImages(self.val.images, self.val.rows),
                                              workers=self.workers)
        if not np.isfinite(probabilities).all():
            raise self._diverged("probabilities are not finite")
        val_auc = measure_auc(self.val.labels, probabilities)
        is_best = all(val_auc > epoch.val_auc for epoch in self.history)
        if is_best:
            self.best = {name: value.detach().to("cpu", copy=True)
                         for name, value in self.classifier.state_dict().items()}
        self.history.append(Epoch(number=number + 1, images_per_second=len(self.train) / seconds, loss=loss,
                                  val_auc=val_auc, is_best=is_best))
        return self.history[-1]

    def _diverged(self, what: str) -> UserError:
        return UserError(f"{what} in epoch {len(self.history) + 1}; expected finite numbers: try a smaller --lr, such "
                         f"as --lr={self.settings.lr / 10:g}")

    def _divide(self, epoch: int) -> list[np.ndarray]:
        """Return the images of each step of an epoch; a single image that is left joins the batch before it."""
        rng = np.random.Generator(np.random.PCG64(seed_for(self.seed, epoch, 0, "order")))
        order = rng.permutation(len(self.train))
        starts = list(range(0, len(order), self.settings.batch))
        if len(order) - starts[-1] < _LEAST_BATCH and len(starts) > 1:
            starts.pop()
        return np.split(order, starts[1:])

    def _rate(self, epochs: float) -> float:
        """Return the learning rate after a number of epochs: a linear rise over the first one, then half a cosine."""
        if epochs < 1:
            return self.settings.lr * epochs
        return self.settings.lr * (1 + math.cos(math.pi * (epochs - 1) / (self.settings.epochs - 1))) / 2

    def _step(self, epoch: int, step: int, pixels: Tensor, labels: np.ndarray, rate: float) -> float:
        """Change the weights once; return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = self.classifier.backbone.preprocessing.resize_and_crop(pixels.to(self.device, non_blocking=True))
        images = augment(images, generator_for(seed_for(self.seed, epoch, step, "augmentation")))
        target = torch.from_numpy(labels).to(self.device)
        mixed = nullcontext() if self.half is None else torch.autocast(self.device.type, self.half)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed_for(self.seed, epoch, step, "dropout"))
            with mixed:
                logits = self.classifier.logits_of(images)
        loss = cross_entropy(logits.float(), target, weight=self.weights)
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value}")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value

    def state(self, identity: str) -> dict[str, Any]:
        """Return everything that the next epochs depend on."""
        moments = self.optimizer.state_dict()["state"]
        return {"version": _STATE_VERSION, "identity": identity,
                "history": [asdict(epoch) for epoch in self.history],
                "weights": dict(self.classifier.state_dict()), "best": self.best,
                "optimizer": {str(number): dict(each) for number, each in moments.items()},
                "scaler": self.scaler.state_dict()}

    def restore(self, path: Path, identity: str, log: Callable[[str], None]) -> None:
        """Continue from a file if there is one, and it is whole and of this training."""
        try:
            state = read_checkpoint(path)
        except FileNotFoundError:
            return
        except DamagedCheckpoint as error:
            log(f"{error}; training starts again")
            return
        if (state.get("version"), state.get("identity")) != (_STATE_VERSION, identity):
            log(f"{path} is the state of another training; this one starts anew")
            return
        self.classifier.load_state_dict(state["weights"])
        groups = self.optimizer.state_dict()["param_groups"]
        moments = {int(number): each for number, each in state["optimizer"].items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.history, self.best = [Epoch(**epoch) for epoch in state["history"]], state["best"]


class _Joined:
    """The images of several sets, one after the other.

    Raises UserError if their sizes differ, which would not fit into a batch.
    """

    def __init__(self, parts: Sequence[TrainingImages]):
        self.parts = parts
        self.labels = np.concatenate([part.labels for part in parts])
        self._places = [(part.images, int(row)) for part in parts for row in part.rows]
        for part in parts[1:]:
            first, other = parts[0].images.path, part.images.path
            size, other_size = parts[0].images.shape[1:], part.images.shape[1:]
            if size != other_size:
                raise UserError(f"{other} has images of {other_size[1]}x{other_size[0]} pixels, {first} of "
                                f"{size[1]}x{size[0]}; expected one size: convert one with dataset_tool.py")

    def __len__(self) -> int:
        return len(self._places)

    def item(self, place: int) -> np.ndarray:
        """Return an image, uint8 [H, W, 3]."""
        images, row = self._places[place]
        pixels = images.item(row)
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels

    def batches(self, divided: Sequence[np.ndarray], workers: int | None) -> Iterator[Tensor]:
        """Yield the images of each part of `divided`, uint8 [n, 3, H, W]; close it when it may be interrupted."""
        size = math.prod(self._places[0][0].shape[1:]) * 3
        return decode_batches(self.item, [part.tolist() for part in divided], size, workers)
