"""The order of training images, the labels of generated images, and the batches that a process prefetches.

Order and labels are functions of the run's seed and the number of images seen: nothing is stored, a run can continue at
any point, and the number of processes does not matter.
"""

import csv
import itertools
import math
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import SIGNALS, UserError
from dnnlib.files import DiskFailure, retrying
from dnnlib.text import shorten
from dnnlib.workers import end_with_parent
from imagesets.classes import class_name, missing_labels
from torch_utils.seeding import seed_for
from training.dataset import ImageDataset


class TrainingOrder:
    """An endless sequence of item numbers, in rounds of length num_items.

    Without weights each round is a random permutation. With weights (here of sum 1) an item of weight w occurs
    floor(w * num_items) times per round or once more, in random order; over many rounds its share is w.

    num_items:  images, mirrored ones included
    seed:       the run's seed
    weights:    float64 [num_items] >= 0, of any sum above 0; None for equal ones
    """

    def __init__(self, num_items: int, *, seed: int, weights: np.ndarray | None = None):
        if weights is not None and (weights.shape != (num_items,) or not np.isfinite(weights).all()
                                    or weights.min() < 0 or weights.sum() <= 0):
            raise ValueError(f"weights are {weights.shape}; expected {num_items} finite numbers >= 0, not all 0")
        self.num_items = num_items
        self.seed = seed
        self.weights = None if weights is None else weights / weights.sum()
        self._rounds: dict[int, np.ndarray] = {}  # the last two that were used, by number

    def items(self, start: int, count: int) -> np.ndarray:
        """Return the items at positions start, ..., start + count - 1: int64 [count]."""
        parts = []
        while count > 0:
            number, offset = divmod(start, self.num_items)
            if number not in self._rounds:
                self._rounds = {**dict([*self._rounds.items()][-1:]), number: self._draw_round(number)}
            part = self._rounds[number][offset:offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _draw_round(self, number: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64(seed_for(self.seed, number, 0, "data order")))
        order = rng.permutation(self.num_items)
        if self.weights is None:
            return order
        # Systematic sampling: evenly spaced points on the line of all weights, which are placed in random order.
        edges = np.cumsum(self.weights[order])
        points = (np.arange(self.num_items) + rng.random()) * (edges[-1] / self.num_items)
        drawn = order[np.searchsorted(edges, points, side="right").clip(max=self.num_items - 1)]
        return rng.permutation(drawn)


class LabelDistribution:
    """How often each label occurs among the training images; the labels of fakes are drawn from it.

    labels:   float32 [N, c_dim], one row per image
    weights:  as in TrainingOrder, one per image; None for equal ones
    """

    def __init__(self, labels: Tensor, weights: np.ndarray | None = None):
        if labels.shape[1] == 0:  # torch.unique rejects empty rows
            values, where = labels[:1], torch.zeros(len(labels), dtype=torch.long)
        else:
            values, where = torch.unique(labels, dim=0, return_inverse=True)
        share = torch.ones(len(labels), dtype=torch.float64) if weights is None else torch.as_tensor(weights).double()
        mass = torch.zeros(len(values), dtype=torch.float64).index_add_(0, where, share)
        seen = mass > 0
        self.values = values[seen]  # [U, c_dim]
        self.probabilities = mass[seen] / mass.sum()  # [U]

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Return float32 [count, c_dim], drawn on the CPU."""
        points = torch.rand(count, generator=rng, dtype=torch.float64)
        rows = torch.searchsorted(self.probabilities.cumsum(0), points, right=True)
        return self.values[rows.clamp(max=len(self.values) - 1)]


def iterate_batches(dataset: ImageDataset, order: TrainingOrder, *, nimg: int, batch: int, rows: range,
                    num_workers: int = 0, pin_memory: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (pixels uint8 [len(rows), C, R, R], labels float32 [len(rows), c_dim]) for each iteration from `nimg` on.

    nimg:   images seen before the first batch
    batch:  total batch size, over all processes
    rows:   the part of each batch that this process trains on

    Image i of a run is the same for any number of processes and workers. Raises UserError, naming the file, if an
    image cannot be read, and DiskFailure.
    """
    items = (order.items(start + rows.start, len(rows)).tolist() for start in itertools.count(nimg, batch))
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=items, num_workers=num_workers, pin_memory=pin_memory,
                                         worker_init_fn=partial(_leave_stopping_to_the_parent, os.getpid()))
    try:
        yield from map(tuple, loader)
    except (UserError, DiskFailure) as error:
        # A worker's exception arrives with its traceback in the message; the last line is the original message.
        kind = type(error)
        text = str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        raise kind(text) from None


def _leave_stopping_to_the_parent(parent: int, _: int) -> None:
    """Ignore the signals that ask a whole run to stop: it still needs images to finish an iteration.

    SIGTERM from the parent process, which terminates its workers in this way, is obeyed; and the worker ends when the
    parent is killed. PyTorch's own check misses a parent that is killed while the worker starts.
    """
    end_with_parent(parent)
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # LIMIT: on other systems a SIGTERM to all processes ends the workers
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_parent, args=(os.getppid(),), daemon=True).start()


def _obey_the_parent(parent: int) -> None:
    """Wait for a SIGTERM from the parent, then end this process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def image_weights(balance: str | os.PathLike, dataset: ImageDataset) -> np.ndarray | None:
    """Return the sampling weights of all items, float64 [len(dataset)], or None for equal ones.

    balance:  "none"; "classes": every class that has images is seen equally often; or a CSV file with the columns
              `class,weight` (the share of a class, divided equally among its images) or `file,weight` (one per image,
              by its name in the data set). Classes and files that are not listed get 0. Classes without images have
              no effect, as at an institution that has none: a CSV file may be the same for all.

    Raises UserError if the file or the data set's labels are not suitable.
    """
    if balance == "none":
        return None
    if balance == "classes":
        weights = _of_classes(dataset, None, "--balance=classes")
    else:
        weights = _from_file(Path(balance), dataset)
    return np.tile(weights, len(dataset) // dataset.num_images)


def _of_classes(dataset: ImageDataset, shares: dict[int, float] | None, flag: str) -> np.ndarray:
    """Return weights that divide each class's share equally among its images; None gives all classes equal shares."""
    classes = dataset.class_indices()
    if classes is None or (missing := missing_labels(classes)).all():
        raise UserError(f"{flag}: {dataset.path} has no classes; expected integer labels")
    weights = np.zeros(len(classes))
    for label in np.unique(classes[~missing]):
        members = classes == label
        weights[members] = (1 if shares is None else shares.pop(int(label), 0)) / members.sum()
    absent = {label: share for label, share in (shares or {}).items() if share > 0}
    if absent and weights.sum() == 0:
        name = class_name(min(absent), dataset.classes)
        raise UserError(f"{flag}: class {name} has a weight, but no images in {dataset.path}")
    return weights


def _from_file(path: Path, dataset: ImageDataset) -> np.ndarray:
    """Return the weights of a CSV file, float64 [num_images]."""
    flag, files = f"--balance={path}", dataset.image_names()
    kind, given = _read_weights(path, flag)
    labels = {class_name(label, dataset.classes): label for label in range(dataset.label_dim)}
    known = labels if kind == "class" else dict.fromkeys(files)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UserError(f"{flag} lists the {kind} {unknown[0]}, which is not in the data set; expected "
                        f"{shorten([*known], 5)}")
    if kind == "class":
        weights = _of_classes(dataset, {labels[name]: weight for name, weight in given.items()}, flag)
    else:
        weights = np.array([given.get(name, 0.0) for name in files])
    if weights.sum() <= 0:
        raise UserError(f"{flag}: all weights are 0; expected at least one above 0")
    return weights


def _read_weights(path: Path, flag: str) -> tuple[str, dict[str, float]]:
    """Return the kind of names in a CSV file, "class" or "file", and {name: weight}."""
    def read() -> list[list[str]]:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))

    try:
        table = retrying(read, path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{flag} cannot be read ({error}); expected none, classes, or a CSV file") from error
    header = [name.strip() for name in table[0]] if table else []
    if header not in (["class", "weight"], ["file", "weight"]):
        raise UserError(f"{flag} has the columns {', '.join(header) or 'none'}; expected class,weight or file,weight")
    weights: dict[str, float] = {}
    for number, row in enumerate(table[1:], start=2):
        if not row:
            continue
        try:
            name, text = row
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise UserError(f"{flag}, line {number} is {','.join(row)}; expected {header[0]},weight with a number >= 0")
        name = name.strip()
        if name in weights:
            raise UserError(f"{flag}, line {number} lists {header[0]} {name} a second time")
        weights[name] = weight
    return header[0], weights
