"""Write images as files: one by one, as a sheet, or as style mixing of all pairs of seeds.

In style mixing, some layers of an image take the style of another seed: coarse layers carry shape, fine ones color.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.files import atomic_write
from dnnlib.progress import Progress
from generation.image_generator import ImageGenerator, parse_ranges
from imagesets.writer import encode_png
from torch_utils.images import MOST_PIXELS, save_grid

GRID = "grid.png"  # the sheet in --outdir
COARSE_LAYERS = 7  # --style-mix takes these from the column: 0 to 6, as in the original

_LONGEST_ROW = 32  # images


def make_outdir(path: str | os.PathLike) -> Path:
    """Create the folder of --outdir if it is missing; return it. Raises UserError if that fails."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--outdir is {path}, which cannot be created ({error.strerror}); choose another "
                        "folder") from error
    return folder


def check_file(flag: str, path: str, ending: str) -> None:
    """Raise UserError unless a file of this name can be written and its folder exists."""
    target = Path(path)
    if target.suffix.lower() != ending:
        raise UserError(f"{flag} is {path}; expected a name ending in {ending}")
    if target.is_dir():
        raise UserError(f"{flag} is {path}, which is a folder; expected a file name")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{flag} is {path}, but the folder {target.parent} does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} is {path}, but the folder {target.parent} is not writable; choose a writable folder")


def as_png(pixels: Tensor) -> bytes:
    """Encode an image as PNG: uint8 [1 or 3, H, W]."""
    return encode_png(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def save_picture(path: str | os.PathLike, pixels: Tensor) -> None:
    """Write uint8 [1 or 3, H, W] as a PNG, whole or not at all. Raises OSError."""
    with atomic_write(path) as file:
        file.write(as_png(pixels))


class Sheet:
    """The sheet of --grid: each class starts a new row, with its name beside it.

    names:       of the classes; None for a single class, or none
    per_class:   images of each class
    resolution:  of an image

    Raises UserError if the sheet would be too large for most image viewers.
    """

    def __init__(self, names: Sequence[str] | None, per_class: int, *, resolution: int):
        classes = 1 if names is None else len(names)
        self.columns = min(math.ceil(math.sqrt(per_class)) if names is None else per_class, _LONGEST_ROW)
        rows_each = -(-per_class // self.columns)
        self.rows = classes * rows_each
        _check_size(self.rows * self.columns, resolution, f"--grid would show {classes * per_class}",
                    "name fewer --seeds, or leave --grid out")
        self._labels = None if names is None else [name for name in names for _ in range(rows_each)]
        self._per_class, self._gap = per_class, [None] * (rows_each * self.columns - per_class)
        self._images: list[Tensor] = []

    def add(self, images: Tensor) -> None:
        """Put images in the next cells: uint8 [n, C, R, R]."""
        self._images.extend(images)

    def save(self, path: str | os.PathLike) -> None:
        """Write the sheet as a PNG. Raises OSError."""
        cells = [cell for first in range(0, len(self._images), self._per_class)
                 for cell in (*self._images[first:first + self._per_class], *self._gap)]
        save_grid(path, cells, columns=self.columns, rows=self.rows, labels=self._labels)


def _check_size(cells: int, resolution: int, found: str, advice: str) -> None:
    """Raise UserError if a sheet would be too large for most image viewers."""
    if cells * resolution**2 > MOST_PIXELS:
        raise UserError(f"{found} images of {resolution}x{resolution}; expected at most "
                        f"{MOST_PIXELS // resolution**2}: {advice}")


def choose_layers(text: str | None, num_ws: int) -> list[int]:
    """Return the layers of --styles, each once and in order.

    The default is 0-6. If the network has only these, which would copy the whole image, it is the first half. Raises
    UserError for layers that the network does not have.
    """
    if text is None:
        return list(range(COARSE_LAYERS if num_ws > COARSE_LAYERS else num_ws // 2))
    ranges = parse_ranges("--styles", text, largest=num_ws - 1, what="layer of this network")
    return sorted({layer for some in ranges for layer in some})


def mix(row: Tensor, column: Tensor, layers: Sequence[int]) -> Tensor:
    """Return the styles of `row` with some layers from `column`: all [L, K]."""
    mixed = row.clone()
    mixed[list(layers)] = column[list(layers)]
    return mixed


def write_style_mix(outdir: str | os.PathLike, generator: ImageGenerator, rows: Sequence[int], columns: Sequence[int],
                    *, layers: Sequence[int], label: Tensor) -> int:
    """Write R-C.png for each pair of seeds, S-S.png for each single seed, and all of them in GRID.

    rows, columns:  seeds; an image is that of its row's seed, with `layers` of the column's style
    label:          float32 [1, c_dim], of all images

    Returns the number of images. A seed that is both row and column gives its own, unmixed image. Raises UserError if
    the sheet would be too large for most image viewers.
    """
    cells = (len(rows) + 1) * (len(columns) + 1)
    _check_size(cells, generator.G.img_resolution, f"{GRID} would show {cells}", "name fewer --rows or --cols")
    seeds = list(dict.fromkeys([*rows, *columns]))
    styles = {seed: generator.map_seeds([seed], label)[0] for seed in seeds}
    pairs = list(dict.fromkeys([*((seed, seed) for seed in seeds), *((r, c) for r in rows for c in columns)]))
    pictures = {}
    folder = make_outdir(outdir)
    with Progress(len(pairs), "images") as progress:
        for start in range(0, len(pairs), generator.batch):
            some = pairs[start:start + generator.batch]
            mixed = torch.stack([mix(styles[row], styles[column], layers) for row, column in some])
            pixels = generator.render(mixed, [row for row, _ in some])
            for pair, picture in zip(some, pixels, strict=True):
                save_picture(folder / f"{pair[0]}-{pair[1]}.png", picture)
                pictures[pair] = picture
            progress.advance(len(some))
    cells = [None, *(pictures[column, column] for column in columns)]
    for row in rows:
        cells += [pictures[row, row], *(pictures[row, column] for column in columns)]
    save_grid(folder / GRID, cells, columns=len(columns) + 1, rows=len(rows) + 1)
    return len(pairs)
