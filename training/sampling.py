"""In which order a run sees its images, and which labels its fakes take.

Both are functions of the run's seed and the number of images seen: nothing is stored, a run continues anywhere, and
any number of processes share one order.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from torch_utils.seeding import seed_for


class TrainingOrder:
    """An endless sequence of item numbers, in rounds of as many as there are items.

    Without weights each round is a random permutation. With weights an item of weight w comes floor(w * items) or one
    more times a round, in random order; over many rounds its share is w.

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
        self._round = lru_cache(maxsize=2)(self._draw_round)

    def items(self, start: int, count: int) -> np.ndarray:
        """Return what is seen at positions start, ..., start + count - 1: int64 [count]."""
        parts = []
        while count > 0:
            number, offset = divmod(start, self.num_items)
            part = self._round(number)[offset:offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_round"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._round = lru_cache(maxsize=2)(self._draw_round)

    def _draw_round(self, number: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64(seed_for(self.seed, number, 0, "data order")))
        order = rng.permutation(self.num_items)
        if self.weights is None:
            return order
        # Systematic sampling: evenly spaced points on the line of all weights, laid out in random order.
        edges = np.cumsum(self.weights[order])
        points = (np.arange(self.num_items) + rng.random()) * (edges[-1] / self.num_items)
        drawn = order[np.searchsorted(edges, points, side="right").clip(max=self.num_items - 1)]
        return rng.permutation(drawn)


class LabelLaw:
    """How often each label occurs among the images a run sees; fakes draw theirs from it.

    labels:   float32 [N, c_dim], one row an image
    weights:  as in TrainingOrder, one an image; None for equal ones
    """

    def __init__(self, labels: Tensor, weights: np.ndarray | None = None):
        if labels.shape[1] == 0:  # torch.unique refuses rows of nothing
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
