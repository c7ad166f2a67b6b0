"""Convert pixels to tensors and back, and draw sheets of images: grids, and pairs of a target and its projection."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from torch import Tensor

from dnnlib.files import atomic_write
from dnnlib.text import fitted, to_ascii

# Limit for sheets that users request; programs refuse larger ones. Pillow warns above 89 million pixels.
MOST_PIXELS = 80_000_000

_BACKGROUND, _INK = "white", "black"
_WHITE = 255
_LONGEST_LABEL = 24  # letters

# Layout of a sheet of pairs, in pixels.
_LARGEST_CELL = 128
_MARGIN = 8
_BETWEEN_PICTURES, _BETWEEN_PAIRS, _BETWEEN_ROWS = 2, 14, 10
_TITLE_FONT, _ROW_FONT, _CAPTION_FONT = 16, 14, 11
_TITLE_HEIGHT, _ROW_TITLE_HEIGHT, _CAPTION_HEIGHT = 28, 22, 18
_LEAST_WIDTH = 640  # room for titles


def to_pixels(images: Tensor) -> Tensor:
    """Map -1..1 to uint8 0..255 as metrics need it: 0 to 128, fractions truncated. uint8 is returned unchanged."""
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; expected floating point, -1 to 1, or uint8")
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_unit_range(pixels: Tensor) -> Tensor:
    """Map 0..255, uint8 or float, to float32 -1..1 for networks; `to_pixels` inverts it exactly for every level."""
    return pixels.float() / 127.5 - 1


def save_grid(path: str | os.PathLike, images: Tensor | Sequence[Tensor | None], *, columns: int, rows: int,
              labels: Sequence[str] | None = None, headings: Sequence[str] | None = None) -> None:
    """Write images side by side, row by row, as a PNG, completely or not at all.

    images:    [N, C, H, W], floating point -1..1 or uint8, gray or RGB, or a list of such [C, H, W], in which None
               leaves a cell white; cells beyond N stay white
    labels:    a text for each row, drawn in a column at the left; None draws none
    headings:  a text for each column, drawn above it; None draws none

    Raises ValueError when the images do not fit the grid, OSError when the file cannot be written.
    """
    grid = draw_grid(images, columns=columns, rows=rows, labels=labels, headings=headings)
    with atomic_write(path) as file:
        # Level 1 packs a grid of 31 megapixels in 3.5 s instead of 8.4 s, into 58 MB instead of 50 MB.
        grid.save(file, "png", compress_level=1)


def draw_grid(images: Tensor | Sequence[Tensor | None], *, columns: int, rows: int,
              labels: Sequence[str] | None = None, headings: Sequence[str] | None = None) -> PIL.Image.Image:
    """Return the image that `save_grid` writes: L or RGB."""
    if not isinstance(images, Tensor):
        white = torch.full_like(to_pixels(next(image for image in images if image is not None)), _WHITE)
        images = torch.stack([white if image is None else to_pixels(image) for image in images])
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are {list(images.shape)}; expected [N, 1 or 3, H, W]")
    if not 0 < len(images) <= columns * rows:
        raise ValueError(f"there are {len(images)} images; expected 1 to {columns} x {rows}")
    if labels is not None and len(labels) != rows:
        raise ValueError(f"there are {len(labels)} labels; expected one for each of the {rows} rows")
    if headings is not None and len(headings) != columns:
        raise ValueError(f"there are {len(headings)} headings; expected one for each of the {columns} columns")
    pixels = to_pixels(images).cpu()
    blank = pixels.new_full((columns * rows - len(pixels), *pixels.shape[1:]), _WHITE)
    lines = torch.cat([pixels, blank]).split(columns)
    sheet = torch.cat([torch.cat(line.unbind(), dim=2) for line in lines], dim=1)  # [C, rows * H, columns * W]
    picture = PIL.Image.fromarray(sheet[0].numpy() if len(sheet) == 1 else sheet.permute(1, 2, 0).numpy())
    if headings is not None:
        picture = _with_headings(picture, headings)
    return picture if labels is None else _with_labels(picture, labels, rows * pixels.shape[2])


def _with_headings(picture: PIL.Image.Image, headings: Sequence[str]) -> PIL.Image.Image:
    """Return a grid with a line of texts at its top, one above each column, shortened to its width."""
    width = picture.width // len(headings)
    size = max(10, min(width // 6, 30))
    font = PIL.ImageFont.load_default(size)
    top = math.ceil(1.6 * size)
    headed = PIL.Image.new(picture.mode, (picture.width, top + picture.height), _BACKGROUND)
    draw = PIL.ImageDraw.Draw(headed)
    for index, text in enumerate(headings):
        text = fitted(to_ascii(text), width - 2, font.getlength)
        draw.text(((index + 0.5) * width, top / 2), text, fill=_INK, font=font, anchor="mm")
    headed.paste(picture, (0, top))
    return headed


def _with_labels(picture: PIL.Image.Image, labels: Sequence[str], height: int) -> PIL.Image.Image:
    """Return a grid with a column of texts at its left, one beside each row. height: of all rows, below headings"""
    row_height, top = height // len(labels), picture.height - height
    size = max(min(row_height, 10), min(row_height // 4, 40))
    font = PIL.ImageFont.load_default(size)
    texts = [to_ascii(label) for label in labels]  # Pillow's own font has no other characters
    texts = [text if len(text) <= _LONGEST_LABEL else f"{text[:_LONGEST_LABEL - 2]}.." for text in texts]
    gap = math.ceil(size / 2)
    width = math.ceil(max(font.getlength(text) for text in texts)) + 2 * gap
    labeled = PIL.Image.new(picture.mode, (width + picture.width, picture.height), _BACKGROUND)
    draw = PIL.ImageDraw.Draw(labeled)
    for index, text in enumerate(texts):
        draw.text((gap, top + (index + 0.5) * row_height), text, fill=_INK, font=font, anchor="lm")
    labeled.paste(picture, (width, 0))
    return labeled


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images side by side, both uint8 [1 or 3, H, W], and the text below them."""

    target: Tensor
    projection: Tensor
    caption: str


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """A row of pairs below a title, such as "melanoma best"."""

    title: str
    pairs: Sequence[Pair]


def save_pair_sheet(path: str | os.PathLike, rows: Sequence[PairRow], *, title: str) -> None:
    """Write a PNG with the title, and each row's title above its pairs: target left, projection right.

    Images of up to 64 pixels are enlarged by integer factors, those larger than 128 reduced. Rows without a pair are
    omitted. Texts that are too long are shortened, and characters that are not ASCII become "?".
    Raises ValueError when there is no pair, OSError when the file cannot be written.
    """
    sheet = draw_pair_sheet(rows, title=title)
    with atomic_write(path) as file:
        sheet.save(file, "png")


def draw_pair_sheet(rows: Sequence[PairRow], *, title: str) -> PIL.Image.Image:
    """Return the image that `save_pair_sheet` writes: RGB."""
    rows = [row for row in rows if row.pairs]
    if not rows:
        raise ValueError("there are no pairs; expected a row with one or more")
    side = max(max(image.shape[-2:]) for row in rows for pair in row.pairs for image in (pair.target, pair.projection))
    factor = max(1, _LARGEST_CELL // side)  # an integer, so that pixels stay square and sharp
    cell = min(_LARGEST_CELL, side * factor)
    pair_width = 2 * cell + _BETWEEN_PICTURES
    row_height = _ROW_TITLE_HEIGHT + cell + _CAPTION_HEIGHT + _BETWEEN_ROWS
    most = max(len(row.pairs) for row in rows)
    width = max(2 * _MARGIN + most * (pair_width + _BETWEEN_PAIRS) - _BETWEEN_PAIRS, _LEAST_WIDTH)
    sheet = PIL.Image.new("RGB", (width, _MARGIN + _TITLE_HEIGHT + len(rows) * row_height), _BACKGROUND)
    write = _writer(sheet)
    room = sheet.width - 2 * _MARGIN
    write((_MARGIN, _MARGIN - 2), title, _TITLE_FONT, room)
    for number, row in enumerate(rows):
        top = _MARGIN + _TITLE_HEIGHT + number * row_height
        write((_MARGIN, top), row.title, _ROW_FONT, room)
        top += _ROW_TITLE_HEIGHT
        for index, pair in enumerate(row.pairs):
            left = _MARGIN + index * (pair_width + _BETWEEN_PAIRS)
            for place, image in enumerate((pair.target, pair.projection)):
                picture = _fit(image, factor, cell)  # centered in its cell
                sheet.paste(picture, (left + place * (cell + _BETWEEN_PICTURES) + (cell - picture.width) // 2,
                                      top + (cell - picture.height) // 2))
            write((left, top + cell + 2), pair.caption, _CAPTION_FONT, pair_width)
    return sheet


def _fit(image: Tensor, factor: int, cell: int) -> PIL.Image.Image:
    """Return uint8 [1 or 3, H, W] as an RGB image, enlarged by an integer factor and then reduced to a cell."""
    picture = PIL.Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy())
    picture = picture.resize((picture.width * factor, picture.height * factor), PIL.Image.Resampling.NEAREST)
    picture.thumbnail((cell, cell), PIL.Image.Resampling.LANCZOS)
    return picture


def _writer(sheet: PIL.Image.Image) -> Callable[[tuple[int, int], str, int, int], None]:
    """Return a function that draws text at a position, in a font size, up to a width."""
    draw = PIL.ImageDraw.Draw(sheet)
    fonts = {size: PIL.ImageFont.load_default(size) for size in (_TITLE_FONT, _ROW_FONT, _CAPTION_FONT)}

    def write(corner: tuple[int, int], text: str, size: int, width: int) -> None:
        draw.text(corner, fitted(to_ascii(text), width, fonts[size].getlength), fill=_INK, font=fonts[size])

    return write
