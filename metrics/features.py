"""Compute the features of images: one pass over them for all detectors that want to see them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from metrics.blocks import compute_rows
from metrics.sources import Source

if TYPE_CHECKING:
    from metrics.detectors.detector import Detector

FEATURE_VERSION = 1  # of what features are, beside detector and images; changing it makes cached ones useless
_PROBE_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a detector says of images."""

    values: np.ndarray  # float32 [N, F]
    probabilities: np.ndarray | None = None  # float32 [N, K], where they were wanted

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A detector that is to see the first images of a source."""

    detector: "Detector"
    count: int  # LIMIT: 4 F bytes each are kept: with Inception 0.8 GB for 100,000 images
    classes: bool = False  # probabilities of classes are wanted too


@torch.no_grad()
def compute_features(source: Source, wishes: Sequence[Wish], *, batch: int, device: torch.device | str,
                     on_images: Callable[[int], None] = lambda count: None) -> list[Features] | None:
    """Return the features for each wish; None but on the main process. All processes call it together.

    batch:      images that are made, and seen, at a time
    on_images:  is told how many images were done

    Raises UserError when an image cannot be read.
    """
    def see(rows: range) -> list[Tensor]:
        pixels = source.pixels(rows).to(device)
        return [_see(wish, pixels[:max(wish.count - rows.start, 0)], columns)
                for wish, columns in zip(wishes, widths, strict=True)]

    widths = [_see(wish, torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE, dtype=torch.uint8, device=device)).shape[1]
              for wish in wishes]
    sizes = [(wish.count, columns) for wish, columns in zip(wishes, widths, strict=True)]
    found = compute_rows(max(wish.count for wish in wishes), batch, sizes, see, on_images)
    return None if found is None else [_unpack(wish, rows.numpy()) for wish, rows in zip(wishes, found, strict=True)]


def _see(wish: Wish, pixels: Tensor, columns: int = 0) -> Tensor:
    """Return features, and probabilities beside them, of pixels [n, 3, H, W]; zeros [0, columns] of no pixels."""
    if not len(pixels):
        return torch.zeros(0, columns)
    return torch.cat(wish.detector.classify(pixels), dim=1) if wish.classes else wish.detector(pixels)


def _unpack(wish: Wish, rows: np.ndarray) -> Features:
    if not wish.classes:
        return Features(values=rows)
    size = wish.detector.num_features
    return Features(values=rows[:, :size], probabilities=rows[:, size:])
