"""Give images of some seeds layers of the styles of others: coarse ones carry shape, fine ones colour."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.progress import Progress
from latent.pictures import MOST_PIXELS, make_outdir, save_picture
from latent.sampling import Painter
from latent.seeds import parse_ranges
from torch_utils.images import save_grid

USUAL_LAYERS = 7  # 0 to 6, as in the original

_WHITE = 255


def choose_layers(text: str | None, num_ws: int) -> list[int]:
    """Return the layers of --styles, each once and in order.

    Without the flag they are 0-6. Where a network has no more than these, taking all would copy the whole image: it
    is the first half then. Raises UserError for layers that the network does not have.
    """
    if text is None:
        return list(range(USUAL_LAYERS if num_ws > USUAL_LAYERS else num_ws // 2))
    ranges = parse_ranges("--styles", text, largest=num_ws - 1, what="layer of this network")
    return sorted({layer for some in ranges for layer in some})


def mix(row: Tensor, column: Tensor, layers: Sequence[int]) -> Tensor:
    """Return the styles of `row` with some layers from `column`: all [L, W]."""
    mixed = row.clone()
    mixed[list(layers)] = column[list(layers)]
    return mixed


def check_mix_size(rows: int, columns: int, resolution: int) -> None:
    """Raise UserError when the sheet would be too large for most programs."""
    cells = (rows + 1) * (columns + 1)
    if cells * resolution**2 > MOST_PIXELS:
        raise UserError(f"grid.png would show {cells} images of {resolution}x{resolution}; expected at most "
                        f"{MOST_PIXELS // resolution**2}: name fewer --rows or --cols")


def write_style_mix(outdir: str | os.PathLike, painter: Painter, rows: Sequence[int], columns: Sequence[int], *,
                    layers: Sequence[int], label: Tensor) -> int:
    """Write R-C.png for each pair of seeds, S-S.png for each seed alone, and all of them on grid.png.

    rows, columns:  seeds, each once; an image is that of its row, with layers of its column's style
    label:          float32 [1, c_dim], of all images

    Returns the number of images. Where a seed is both row and column its pair is the image of the seed itself.
    """
    seeds = list(dict.fromkeys([*rows, *columns]))
    ws = torch.cat([painter.styles([seed], label) for seed in seeds])
    styles = dict(zip(seeds, ws, strict=True))
    pairs = list(dict.fromkeys([*((seed, seed) for seed in seeds), *((r, c) for r in rows for c in columns)]))
    pictures = {}
    folder = make_outdir(outdir)
    with Progress(len(pairs), "images") as progress:
        for start in range(0, len(pairs), painter.batch):
            some = pairs[start:start + painter.batch]
            mixed = torch.stack([mix(styles[row], styles[column], layers) for row, column in some])
            pixels = painter.pixels(mixed, [row for row, _ in some])
            for pair, image in zip(some, pixels, strict=True):
                save_picture(folder / f"{pair[0]}-{pair[1]}.png", image)
                pictures[pair] = image
            progress.advance(len(some))
    corner = torch.full_like(next(iter(pictures.values())), _WHITE)
    lines = [corner, *(pictures[column, column] for column in columns)]
    for row in rows:
        lines += [pictures[row, row], *(pictures[row, column] for column in columns)]
    save_grid(folder / "grid.png", torch.stack(lines), columns=len(columns) + 1, rows=len(rows) + 1)
    return len(pairs)
