"""Write images as files of their own, and many of them on one sheet."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.files import atomic_write
from imagesets.pixels.png import encode_png
from torch_utils.images import save_grid

# Of a sheet. Programs refuse larger pictures: Pillow warns from 89 million pixels on.
MOST_PIXELS = 80_000_000

_WHITE = 255
_LONGEST_ROW = 32  # images of one class, side by side


def as_png(pixels: Tensor) -> bytes:
    """Return the PNG file of an image: uint8 [1 or 3, H, W]."""
    return encode_png(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def save_picture(path: str | os.PathLike, pixels: Tensor) -> None:
    """Write uint8 [1 or 3, H, W] as a PNG, whole or not at all. Raises OSError."""
    with atomic_write(path) as file:
        file.write(as_png(pixels))


class Sheet:
    """A picture of many images: those of each class from a new row on, with its name beside it.

    names:       of the classes, or None for images that are all alike
    per_class:   images of each
    channels, resolution:  of an image

    Raises UserError when the picture would be too large for most programs.
    """

    def __init__(self, names: Sequence[str] | None, per_class: int, *, channels: int, resolution: int):
        classes = 1 if names is None else len(names)
        self.columns = min(math.ceil(math.sqrt(per_class)) if names is None else per_class, _LONGEST_ROW)
        rows_each = -(-per_class // self.columns)
        self.rows = classes * rows_each
        if self.rows * self.columns * resolution**2 > MOST_PIXELS:
            most = MOST_PIXELS // resolution**2
            raise UserError(f"--grid would show {classes * per_class} images of {resolution}x{resolution}; expected "
                            f"at most {most}: name fewer --seeds, or leave --grid out")
        self._row_names = None if names is None else [name for name in names for _ in range(rows_each)]
        self._cells = torch.full((self.rows * self.columns, channels, resolution, resolution), _WHITE,
                                 dtype=torch.uint8)
        self._places = iter([(label * rows_each * self.columns) + index
                             for label in range(classes) for index in range(per_class)])

    def add(self, images: Tensor) -> None:
        """Put images into the next cells: uint8 [n, C, R, R]."""
        for image in images:
            self._cells[next(self._places)] = image

    def save(self, path: str | os.PathLike) -> None:
        """Write the picture as a PNG. Raises OSError."""
        save_grid(path, self._cells, columns=self.columns, rows=self.rows, labels=self._row_names)


def make_outdir(path: str | os.PathLike) -> Path:
    """Make the folder of --outdir where it is missing; return it. Raises UserError when that cannot be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--outdir is {path}, which cannot be made ({error.strerror}); expected a folder that "
                        "can") from error
    return folder


def check_file(flag: str, path: str, ending: str) -> None:
    """Raise UserError unless a file of this name can be written in a folder that exists."""
    target = Path(path)
    if target.suffix.lower() != ending:
        raise UserError(f"{flag} is {path}; expected a name ending in {ending}")
    if target.is_dir():
        raise UserError(f"{flag} is {path}, which is a folder; expected a name of a file to write")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{flag} is {path}, but there is no folder {target.parent}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} is {path}, but the folder {target.parent} cannot be written to; expected one that can")
