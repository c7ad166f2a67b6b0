"""Draw contact sheets: some images of each class on one picture, with a title."""

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from dnnlib.text import plural, to_ascii
from imagesets.reader import ImageSet
from imagesets.writer import check_folder, fill_folder

_MAX_COLUMNS = 10
MAX_IMAGES = _MAX_COLUMNS**2
_SMALLEST_CELL, _LARGEST_CELL = 64, 128  # pixels
_GAP = 4
_FONT_SIZE = 16
_TITLE_HEIGHT = 28
_BACKGROUND, _INK = (255, 255, 255), (0, 0, 0)


def write_sheets(images: ImageSet, usable: np.ndarray, folder: str | os.PathLike) -> list[Path]:
    """Write a PNG for each class with images, and one for images without a label; return the files.

    usable: bool [N], images that can be decoded
    folder: created if missing; files of the same names are replaced

    Raises UserError when the folder cannot be used. After any error no sheet is left.
    """
    folder, names = Path(folder), []
    check_folder(folder, "--sheet", "the sheets")
    with fill_folder(folder, "sheet") as temporary:
        for file_name, title, rows in _sheets(images, usable):
            _draw_sheet(images, title, rows, choose_evenly([images.groups[row] for row in rows], MAX_IMAGES)
                        ).save(temporary / file_name)
            names.append(file_name)
    return [folder / name for name in names]


def _sheets(images: ImageSet, usable: np.ndarray) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield file name, title and rows of each sheet."""
    columns, names = images.class_columns(), images.class_names()
    for index, name in enumerate(names):
        rows = np.flatnonzero(columns[:, index] & usable)
        if len(rows):
            yield sheet_name(index, len(names), name), name, rows
    rows = np.flatnonzero(images.missing_labels() & usable)
    if len(rows):
        yield ("all.png", "all images", rows) if images.labels is None else ("unlabeled.png", "no label", rows)


def sheet_name(index: int, count: int, name: str) -> str:
    """Return a file name that is safe on every system and different for each class, such as "04-melanoma.png"."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", to_ascii(name)).strip("-")[:60]
    number = str(index).zfill(len(str(count - 1)))
    return f"{number}-{plain}.png" if plain else f"{number}.png"


def choose_evenly(groups: Sequence[str], limit: int) -> list[int]:
    """Return up to `limit` indices in ascending order: as many groups as possible, spread evenly over the data set.

    groups: the group of each image, in the order of the images
    """
    seen: dict[str, int] = {}
    rounds: dict[int, list[int]] = {}  # the first images of the groups, then their second ones, ...
    for place, group in enumerate(groups):
        turn = seen[group] = seen.get(group, -1) + 1
        rounds.setdefault(turn, []).append(place)
    chosen: list[int] = []
    for turn in sorted(rounds):
        wanted = min(limit - len(chosen), len(rounds[turn]))
        chosen += [rounds[turn][index * len(rounds[turn]) // wanted] for index in range(wanted)]
    return sorted(chosen)


def _draw_sheet(images: ImageSet, name: str, rows: np.ndarray, places: Sequence[int]) -> PIL.Image.Image:
    pictures = [_open(images.read(images.names[rows[place]])) for place in places]
    # Small images are enlarged by a power of two without interpolation; large ones are reduced.
    side = max(max(picture.size) for picture in pictures)
    factor = 2 ** max(0, math.ceil(math.log2(_SMALLEST_CELL / side)))
    cell = min(side * factor, _LARGEST_CELL)
    columns = min(_MAX_COLUMNS, math.ceil(math.sqrt(len(pictures))))
    num_rows = math.ceil(len(pictures) / columns)
    num_groups = len({images.groups[row] for row in rows})
    shown = "" if len(pictures) == len(rows) else f", {len(pictures)} shown"
    title = f"{to_ascii(name)}: {plural(len(rows), 'image')}, {plural(num_groups, 'group')}{shown}"
    font = PIL.ImageFont.load_default(_FONT_SIZE)
    width = max(columns * (cell + _GAP) + _GAP, math.ceil(font.getlength(title)) + 2 * _GAP)
    sheet = PIL.Image.new("RGB", (width, _TITLE_HEIGHT + num_rows * (cell + _GAP)), _BACKGROUND)
    PIL.ImageDraw.Draw(sheet).text((_GAP, _GAP), title, fill=_INK, font=font)
    for index, picture in enumerate(pictures):
        picture = _fit(picture, factor, cell)
        row, column = divmod(index, columns)
        sheet.paste(picture, (_GAP + column * (cell + _GAP) + (cell - picture.width) // 2,
                              _TITLE_HEIGHT + row * (cell + _GAP) + (cell - picture.height) // 2))
    return sheet


def _open(data: bytes) -> PIL.Image.Image:
    """Decode an image to RGB, not much larger than a cell, so that a sheet of large images fits in memory."""
    image = PIL.Image.open(io.BytesIO(data))
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit values at 255.
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    image.thumbnail((_LARGEST_CELL, _LARGEST_CELL), PIL.Image.Resampling.LANCZOS)
    return image


def _fit(picture: PIL.Image.Image, factor: int, cell: int) -> PIL.Image.Image:
    enlarged = picture.resize((picture.width * factor, picture.height * factor), PIL.Image.Resampling.NEAREST)
    enlarged.thumbnail((cell, cell), PIL.Image.Resampling.LANCZOS)
    return enlarged
