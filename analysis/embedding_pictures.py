"""The pictures of a map: thumbnails of images, and sheets of them (sprites) as WebP files.

Legend: M points with pictures.
"""

import base64
import html
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import PIL.Image
import PIL.ImageOps

from analysis.embedding_points import Points
from dnnlib.workers import ordered_map, usable_cores
from imagesets.reader import Shape
from metrics.image_sources import SetImages, decode_batches

MIME = "image/webp"
PER_ROW = 16  # tiles beside each other on a sheet
PER_SPRITE = PER_ROW**2
# A side of a tile is a multiple of the blocks of 16x16 pixels that WebP codes, so that no block has parts of two tiles.
# Its method 2 is the best one that leaves their borders alone: the decoder's filter, which methods 3 to 6 strengthen,
# smooths across them. With 1,024 images of HAM10000 at 64x64 the signal-to-noise ratio at the borders is 31.1 dB (26.1
# dB by method 4), inside the tiles 34.1 dB (33.1 dB), for 300 bytes per tile (275 bytes).
_BLOCK = 16
_METHOD = 2
_QUALITY = 60
_PADDING = (128, 128, 128)  # beside images that are not square
_BATCH = 256  # images between two reports of progress
_CURVE_BITS = 16  # of each coordinate along the curve


def make_thumbnails(points: Points, side: int, workers: int | None,
                    on_images: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """Return the reduced images of those sets whose pictures are shown, and which points they are.

    side:       at most so many pixels, see `thumbnail_side`; images that are not square are fitted into it
    workers:    processes that decode images, as for `SelectedImages.batches`
    on_images:  called with the number of images after each batch

    Return uint8 [M, side, side, 3] and int64 [M]. Raises UserError if an image cannot be read.
    """
    shown = [number for number, one in enumerate(points.sets) if one.shows_pictures and len(one)]
    pictured = np.flatnonzero(np.isin(points.set_numbers, shown))
    side = thumbnail_side(side, [points.sets[number].images.images.shape for number in shown])
    thumbnails = np.empty((len(pictured), side, side, 3), dtype=np.uint8)
    start = 0
    for number in shown:
        selected = points.sets[number].images
        batches = [selected.items[first:first + _BATCH].tolist() for first in range(0, len(selected), _BATCH)]
        reduce = partial(_reduced, selected.images, side)
        with closing(decode_batches(reduce, batches, math.prod(selected.images.shape), workers)) as reduced:
            for batch in reduced:
                thumbnails[start:start + len(batch)] = batch.permute(0, 2, 3, 1).numpy()
                start += len(batch)
                on_images(len(batch))
    return thumbnails, pictured


def thumbnail_side(side: int, shapes: Sequence[Shape]) -> int:
    """Return the side of thumbnails: a multiple of 16, and not above that of the smallest images, unless that is 16.

    side:    the largest one that is wanted, at least 16
    shapes:  of the images of each set
    """
    smallest = min((max(height, width) for _, height, width in shapes), default=side)
    return max(min(side, smallest) // _BLOCK, 1) * _BLOCK


def curve_order(coordinates: np.ndarray) -> np.ndarray:
    """Return points in order along Hilbert's curve (1891): those near each other in the order are so on the map.

    coordinates:  float64 [M, 2]

    Return int64 [M]. Points at one place keep their order.
    """
    if not len(coordinates):
        return np.empty(0, dtype=np.int64)
    size = 1 << _CURVE_BITS
    x, y = _on_grid(coordinates, size).T.astype(np.int64)
    places = np.zeros(len(coordinates), dtype=np.int64)
    step = size // 2
    while step:
        right, upper = (x & step) > 0, (y & step) > 0
        places += step * step * ((3 * right) ^ upper)
        turned = right & ~upper
        x, y = np.where(turned, size - 1 - x, x), np.where(turned, size - 1 - y, y)
        x, y = np.where(upper, x, y), np.where(upper, y, x)
        step //= 2
    return np.argsort(places, kind="stable")


def quantize(coordinates: np.ndarray) -> np.ndarray:
    """Return coordinates as uint16 [N, 2]: the longer axis fills 0 to 65535, the other is centered, at one scale.

    coordinates:  float64 [N, 2]
    """
    return _on_grid(coordinates, 1 << 16).astype(np.uint16)


def make_sprites(thumbnails: np.ndarray, order: np.ndarray, workers: int | None) -> Iterator[bytes]:
    """Yield sheets of 16x16 thumbnails as WebP files; the last one may have fewer rows. The bytes are always the same.

    thumbnails:  uint8 [M, side, side, 3]
    order:       int64 [M], the thumbnail of each tile
    workers:     processes that encode them, None = one for each core; their number changes nothing else

    The processes end with the iterator: a caller that may be interrupted wraps it in contextlib.closing.
    """
    sheets = (_sheet(thumbnails[order[start:start + PER_SPRITE]]) for start in range(0, len(order), PER_SPRITE))
    count = -(-len(order) // PER_SPRITE)
    return ordered_map(_encode, sheets, max(min(usable_cores() if workers is None else workers, count), 1))


def picture_tag(thumbnail: np.ndarray, alt: str, size: int = 96) -> str:
    """Return a thumbnail as a part of a page, coded as on the sheets.

    thumbnail:  uint8 [side, side, 3]
    alt:        text for those who do not see it
    size:       of a side, in pixels of the screen
    """
    data = base64.b64encode(_encode(thumbnail)).decode()
    return f'<img src="data:{MIME};base64,{data}" alt="{html.escape(alt)}" width="{size}" height="{size}">'


def _on_grid(coordinates: np.ndarray, size: int) -> np.ndarray:
    """Return coordinates scaled to whole numbers from 0 to size - 1, float64 [N, 2], with one scale for both axes."""
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    widest = float((high - low).max()) or 1.0
    middle = (size - 1) / 2
    return np.clip(np.rint(middle + (coordinates - (low + high) / 2) * ((size - 1) / widest)), 0, size - 1)


def _reduced(images: SetImages, side: int, index: int) -> np.ndarray:
    """Return an image fitted into a square, uint8 [side, side, C]."""
    pixels = images.item(index)
    if pixels.shape[:2] == (side, side):
        return pixels
    is_gray = pixels.shape[2] == 1
    picture = PIL.ImageOps.pad(PIL.Image.fromarray(pixels[:, :, 0] if is_gray else pixels), (side, side),
                               PIL.Image.Resampling.LANCZOS, color=_PADDING[0] if is_gray else _PADDING)
    return np.asarray(picture).reshape(side, side, -1)


def _sheet(tiles: np.ndarray) -> np.ndarray:
    """Return up to 256 tiles side by side: uint8 [rows * side, 16 * side, 3], gray where there are none."""
    side, rows = tiles.shape[1], -(-len(tiles) // PER_ROW)
    sheet = np.full((rows * PER_ROW, side, side, 3), _PADDING[0], dtype=np.uint8)
    sheet[:len(tiles)] = tiles
    return sheet.reshape(rows, PER_ROW, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * side, PER_ROW * side, 3)


def _encode(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as a WebP file."""
    with io.BytesIO() as file:
        PIL.Image.fromarray(pixels).save(file, "webp", quality=_QUALITY, method=_METHOD)
        return file.getvalue()
