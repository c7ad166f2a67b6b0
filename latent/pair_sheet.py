"""Draw a sheet of pairs: each image that was projected beside what the network makes of it."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from torch import Tensor

from dnnlib.files import atomic_write
from dnnlib.text import fitted, to_ascii

_LARGEST_CELL = 128  # pixels, as all lengths here
_MARGIN = 8
_BETWEEN_PICTURES, _BETWEEN_PAIRS, _BETWEEN_ROWS = 2, 14, 10
_TITLE_FONT, _ROW_FONT, _CAPTION_FONT = 16, 14, 11
_TITLE_HEIGHT, _ROW_TITLE_HEIGHT, _CAPTION_HEIGHT = 28, 22, 18
_LEAST_WIDTH = 640  # room for titles
_BACKGROUND, _INK = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What lies side by side: uint8 [1 or 3, H, W] both, and the text below them."""

    target: Tensor
    projection: Tensor
    caption: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """Pairs in a line below a title, such as "melanoma best"."""

    title: str
    pairs: Sequence[Pair]


def choose_examples(distances: Sequence[float], count: int) -> dict[str, list[int]]:
    """Return indices of the nearest, of those around the median and of the farthest: "best", "median", "worst".

    count: of each; where there are too few, "best" is filled first and "median" last, so that none is in two lists

    Nearest come first, but farthest first among the "worst". Equal distances count as growing with the index, and
    those that are not finite as the farthest.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected 1 or more")
    finite_first = [(distance if math.isfinite(distance) else math.inf, index)
                    for index, distance in enumerate(map(float, distances))]
    order = [index for _, index in sorted(finite_first)]
    best, rest = order[:count], order[count:]
    middle, worst = rest[:-count], rest[-count:]
    start = max(0, len(middle) - count) // 2
    return {"best": best, "median": middle[start:start + count], "worst": worst[::-1]}


def save_pair_sheet(path: str | os.PathLike, rows: Sequence[Row], *, title: str) -> None:
    """Write a PNG with the title, and each row's title above its pairs: target left, projection right.

    Images of up to 64 pixels are enlarged by whole factors, those larger than 128 reduced. Rows without a pair are
    left out. Texts that are too long are shortened, and letters that are not ASCII become "?".
    Raises ValueError when there is no pair, OSError when the file cannot be written.
    """
    sheet = draw_pair_sheet(rows, title=title)
    with atomic_write(path) as file:
        sheet.save(file, "png")


def draw_pair_sheet(rows: Sequence[Row], *, title: str) -> PIL.Image.Image:
    """Return the picture that `save_pair_sheet` writes: RGB."""
    rows = [row for row in rows if row.pairs]
    if not rows:
        raise ValueError("there are no pairs; expected a row with one or more")
    layout = _Layout(rows)
    sheet = PIL.Image.new("RGB", layout.size, _BACKGROUND)
    write = _writer(sheet)
    room = sheet.width - 2 * _MARGIN
    write((_MARGIN, _MARGIN - 2), title, _TITLE_FONT, room)
    for number, row in enumerate(rows):
        top = layout.top(number)
        write((_MARGIN, top), row.title, _ROW_FONT, room)
        top += _ROW_TITLE_HEIGHT
        for index, pair in enumerate(row.pairs):
            left = layout.left(index)
            for side, image in enumerate((pair.target, pair.projection)):
                layout.paste(sheet, image, (left + side * (layout.cell + _BETWEEN_PICTURES), top))
            write((left, top + layout.cell + 2), pair.caption, _CAPTION_FONT, layout.pair_width)
    return sheet


class _Layout:
    """Where pairs lie, and how large their pictures are."""

    def __init__(self, rows: Sequence[Row]):
        images = [image for row in rows for pair in row.pairs for image in (pair.target, pair.projection)]
        side = max(max(image.shape[-2:]) for image in images)
        self.factor = max(1, _LARGEST_CELL // side)  # whole, so that pixels stay pixels
        self.cell = min(_LARGEST_CELL, side * self.factor)
        self.pair_width = 2 * self.cell + _BETWEEN_PICTURES
        self._row_height = _ROW_TITLE_HEIGHT + self.cell + _CAPTION_HEIGHT + _BETWEEN_ROWS
        width = self.left(max(len(row.pairs) for row in rows)) - _BETWEEN_PAIRS + _MARGIN
        self.size = (max(width, _LEAST_WIDTH), self.top(len(rows)))

    def left(self, index: int) -> int:
        """Return where the pair `index` of a row begins."""
        return _MARGIN + index * (self.pair_width + _BETWEEN_PAIRS)

    def top(self, number: int) -> int:
        """Return where the row `number` begins, with its title."""
        return _MARGIN + _TITLE_HEIGHT + number * self._row_height

    def paste(self, sheet: PIL.Image.Image, image: Tensor, corner: tuple[int, int]) -> None:
        """Put an image into the middle of the cell at `corner`: uint8 [1 or 3, H, W]."""
        picture = PIL.Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy())
        picture = picture.resize((picture.width * self.factor, picture.height * self.factor),
                                 PIL.Image.Resampling.NEAREST)
        picture.thumbnail((self.cell, self.cell), PIL.Image.Resampling.LANCZOS)
        sheet.paste(picture, (corner[0] + (self.cell - picture.width) // 2,
                              corner[1] + (self.cell - picture.height) // 2))


def _writer(sheet: PIL.Image.Image) -> Callable[[tuple[int, int], str, int, int], None]:
    """Return a function that writes a text at a corner, in a font size, no wider than it may be."""
    draw = PIL.ImageDraw.Draw(sheet)
    fonts = {size: PIL.ImageFont.load_default(size) for size in (_TITLE_FONT, _ROW_FONT, _CAPTION_FONT)}

    def write(corner: tuple[int, int], text: str, size: int, width: int) -> None:
        draw.text(corner, fitted(to_ascii(text), width, fonts[size].getlength), fill=_INK, font=fonts[size])

    return write
