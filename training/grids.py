"""Choose and write the picture grids of a run: some of its images, and what the generator makes of fixed latents.

With classes, a row shows one class, and each class has as many rows as fit; reals and fakes of a cell share a label.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from imagesets.reader import NO_LABEL
from torch_utils.images import save_grid, to_pixels
from torch_utils.seeding import generator_for, seed_for
from training.dataset import ImageDataset

_EMPTY = -1  # the item of a cell that no image of the class is left for
_WHITE = 255


@dataclass(frozen=True, kw_only=True)
class Screen:
    """How large a grid may be."""

    width: int  # pixels
    height: int
    fewest: tuple[int, int]  # columns and rows, whatever the size of an image
    most: tuple[int, int]

    def cells(self, resolution: int) -> tuple[int, int]:
        """Return the columns and rows that fit."""
        columns, rows = (min(max(pixels // resolution, fewest), most) for pixels, fewest, most in
                         zip((self.width, self.height), self.fewest, self.most))
        return columns, rows


# An 8K screen: 30 x 16 images of 256 pixels.
LARGE_SCREEN = Screen(width=7680, height=4320, fewest=(7, 4), most=(32, 32))
# Without a GPU a grid is to take seconds: 12 x 8 up to 64 pixels, 6 x 4 at 128, 4 x 2 from 256 on.
SMALL_SCREEN = Screen(width=768, height=512, fewest=(4, 2), most=(12, 8))


def screen_for(device: torch.device | str) -> Screen:
    """Return the size of grid that a device makes in seconds."""
    return SMALL_SCREEN if torch.device(device).type == "cpu" else LARGE_SCREEN


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """What the cells of a run's grids show, row by row; the same whenever the run continues."""

    columns: int
    rows: int
    items: np.ndarray  # int64 [cells], of the data set; _EMPTY leaves the cell white among the reals
    labels: Tensor  # float32 [cells, c_dim], of reals and fakes
    z: Tensor  # float32 [cells, Z]
    row_names: tuple[str, ...] | None  # the class of each row, or None

    @property
    def num_cells(self) -> int:
        return self.columns * self.rows


def choose_grid(dataset: ImageDataset, *, z_dim: int, seed: int, screen: Screen) -> SampleGrid:
    """Choose images, labels and latents by the run's seed. Mirrored images are not shown.

    With classes in use a row shows one class: classes get equally many rows, and where the screen has fewer rows than
    there are classes, the largest classes are shown. Otherwise images are drawn from the whole set.
    """
    columns, rows = screen.cells(dataset.resolution)
    rng = np.random.Generator(np.random.PCG64(seed_for(seed, 0, 0, "grid/images")))
    order = rng.permutation(dataset.num_images)
    classes = dataset.class_indices() if dataset.use_labels else None
    if classes is None:
        names = None
        rows = min(rows, max(-(-len(order) // columns), 1))
        items = _fill(order, columns * rows)
        sources = np.resize(order, columns * rows)  # labels go round where images do not suffice
        labels = dataset.label_table()[sources]
    else:
        shown = _largest(classes, rows)
        each = rows // len(shown)
        items = np.concatenate([_fill(order[classes[order] == label], columns * each) for label in shown])
        row_labels = np.repeat(shown, each)
        rows = len(row_labels)
        names = tuple(_class_name(dataset, label) for label in row_labels)
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(row_labels), dataset.label_dim).float()
        labels = one_hot.repeat_interleave(columns, dim=0)
    latents = generator_for(seed_for(seed, 0, 0, "grid/latents"))
    return SampleGrid(columns=columns, rows=rows, items=items, labels=labels, row_names=names,
                      z=torch.randn(columns * rows, z_dim, generator=latents))


def save_reals(path: str | os.PathLike, grid: SampleGrid, dataset: ImageDataset) -> None:
    """Write the images of a grid. Raises OSError, and UserError when an image cannot be read."""
    pixels = torch.full((grid.num_cells, *dataset.image_shape), _WHITE, dtype=torch.uint8)
    for cell, item in enumerate(grid.items):
        if item != _EMPTY:
            pixels[cell] = torch.from_numpy(dataset[item][0])
    save_grid(path, pixels, columns=grid.columns, rows=grid.rows, labels=grid.row_names)


@torch.no_grad()
def save_fakes(path: str | os.PathLike, grid: SampleGrid, G: nn.Module, *, batch: int) -> None:
    """Write what `G` makes of a grid's latents and labels, with its own noise maps. Raises OSError.

    G:      the averaged generator, in eval mode
    batch:  images of a pass: as many as a training pass takes are sure to fit
    """
    device = next(G.parameters()).device
    parts = [to_pixels(G(z.to(device), c.to(device), noise_mode="const")).cpu()
             for z, c in zip(grid.z.split(batch), grid.labels.split(batch))]
    save_grid(path, torch.cat(parts), columns=grid.columns, rows=grid.rows, labels=grid.row_names)


def _fill(items: np.ndarray, cells: int) -> np.ndarray:
    """Return the first `cells` items, with empty cells after them where there are fewer."""
    filled = np.full(cells, _EMPTY, dtype=np.int64)
    filled[:min(len(items), cells)] = items[:cells]
    return filled


def _largest(classes: np.ndarray, limit: int) -> np.ndarray:
    """Return up to `limit` classes that have images, those with most images, in the order of their numbers."""
    labels, counts = np.unique(classes[classes != NO_LABEL], return_counts=True)
    return np.sort(labels[np.argsort(-counts, kind="stable")[:limit]])


def _class_name(dataset: ImageDataset, label: int) -> str:
    return dataset.classes[label] if dataset.classes is not None else f"class {label}"
