"""Find near-duplicates: one picture in two data sets, after compression, resizing, turning, mirroring or other colors.

Equal images have equal hashes of pixels (imagesets.pixel_hashes). A copy that was saved again has other pixels, but
nearly the same low spatial frequencies. Two steps, measured on HAM10000 at 64x64 (8,011 training, 1,001 test images):

1. A perceptual hash: the signs of the 255 lowest frequencies of a gray thumbnail, without the mean. The hashes of two
   pictures differ in about 127 bits; those of a test image and the most similar of its training images in 86 (median),
   those of a copy in 0 to 25, after compression as JPEG of quality 30 in up to 47. Brightness and contrast cancel.
2. Pairs whose hashes are near are compared pixel by pixel: the correlation of the thumbnails is above 0.95 for such
   copies, and at most 0.94 for small round lesions on plain skin, whose hashes may be near.

LIMIT: crops and shifts by 2 % of the side or more are found in part only, rotations by other angles than 90 degrees and
images without contrast not at all. Of smooth drawings, some others are listed: 12 of 1,500 phantoms.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import IO, TypeVar

import numpy as np
import PIL.Image
from torch import Tensor

from dnnlib.progress import Progress
from dnnlib.workers import ordered_map
from imagesets.reader import ImageSet, Shape, load_pixels

Pixels = TypeVar("Pixels", np.ndarray, Tensor)

SIDE = 32  # pixels of a thumbnail
_KEPT = 16  # frequencies per axis
MOST_BITS = 48  # of 255 in which the hashes of near-duplicates differ at most
LEAST_CORRELATION = 0.95
_LEAST_CONTRAST = 1.0  # standard deviation of a thumbnail, in levels of 255
LUMA = (0.299, 0.587, 0.114)
_BLOCK = 1 << 22  # pairs of hashes that are compared at once: about 50 MB
_PAIRS = 1 << 12  # pairs of thumbnails that are compared at once
_CHUNK = 32  # images that a worker takes at a time
_WORDS = 4  # of 64 bits in a hash
# The symmetries of a square: (exchange the axes, then mirror left and right, then top and bottom).
ORIENTATIONS = tuple((turned, mirrored, flipped) for turned in (False, True) for mirrored in (False, True)
                     for flipped in (False, True))
_TURNS = ("as it is", "mirrored top to bottom", "mirrored left to right", "turned by 180 degrees",
          "mirrored at the diagonal", "turned by 90 degrees", "turned by 270 degrees", "mirrored at the other diagonal")


@dataclass(frozen=True, kw_only=True, eq=False)
class Thumbnails:
    """What is compared of N images.

    pixels:       float32 [N, SIDE, SIDE], with mean 0 and length 1; 0 for images without contrast
    frequencies:  float32 [N, 16, 16], the lowest coefficients of their cosine transform
    """

    pixels: np.ndarray
    frequencies: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, kw_only=True)
class Match:
    """A near-duplicate: image `row` of one set, and image `other` of another."""

    row: int
    other: int
    correlation: float  # of the thumbnails
    orientation: tuple[bool, bool, bool]  # of ORIENTATIONS, in which the first image resembles the second


def read_thumbnails(images: ImageSet, *, workers: int = 1, stream: IO[str] | None = None) -> Thumbnails:
    """Decode a data set; `workers` processes do it, and `stream` shows the progress, None = standard error.

    Raises UserError, naming the image, when one cannot be read or decoded, or has another size than the first.
    """
    shape = load_pixels(images, images.names[0]).shape
    with (Progress(len(images), f"images of {images.path.name} compared", stream=stream) as progress,
          closing(ordered_map(partial(_read_gray, images, shape), images.names, workers if len(images) > _CHUNK else 1,
                              chunk=_CHUNK)) as results):
        found = []
        for gray in results:
            found.append(gray)
            progress.advance()
    return make_thumbnails(np.stack(found))


def make_thumbnails(gray: np.ndarray) -> Thumbnails:
    """Prepare gray images of this size for comparison. gray: float32 [N, SIDE, SIDE], 0..255"""
    from scipy.fft import dctn  # here: importing it takes 0.2 s

    centered = gray - gray.mean(axis=(1, 2), keepdims=True)
    spread = centered.std(axis=(1, 2), keepdims=True)
    centered = np.where(spread < _LEAST_CONTRAST, 0, centered / np.maximum(spread * SIDE, 1e-6)).astype(np.float32)
    frequencies = dctn(centered, axes=(1, 2), norm="ortho")[:, :_KEPT, :_KEPT]
    return Thumbnails(pixels=centered, frequencies=np.ascontiguousarray(frequencies))


def find_near_duplicates(images: Thumbnails, others: Thumbnails) -> list[Match]:
    """Return, for each image with near-duplicates among the others, the one of highest correlation, by row.

    40,000 others and 10,000 images take about a minute on one core.
    """
    best: dict[int, Match] = {}
    hashes = _hash(others.frequencies)
    step = max(_BLOCK // len(others), 1)
    for orientation in ORIENTATIONS:
        mine = _hash(_orient_frequencies(images.frequencies, orientation))
        for start in range(0, len(images), step):
            near = _distances(mine[start:start + step], hashes) <= MOST_BITS
            rows, columns = np.nonzero(near)
            for match in _confirmed(images, others, rows + start, columns, orientation):
                if match.row not in best or match.correlation > best[match.row].correlation:
                    best[match.row] = match
    return [best[row] for row in sorted(best)]


def orient(pixels: Pixels, orientation: Sequence[bool]) -> Pixels:
    """Return images [..., H, H] in another orientation; a view of an array, a copy of a tensor."""
    turned, mirrored, flipped = orientation
    pixels = pixels.swapaxes(-1, -2) if turned else pixels
    axes = tuple(axis for axis, is_reversed in ((-2, flipped), (-1, mirrored)) if is_reversed)
    return np.flip(pixels, axes) if isinstance(pixels, np.ndarray) else pixels.flip(axes)


def describe_orientation(orientation: Sequence[bool]) -> str:
    """Return what turns an image into this orientation, such as "mirrored left to right"."""
    return _TURNS[ORIENTATIONS.index(tuple(orientation))]


def _confirmed(images: Thumbnails, others: Thumbnails, rows: np.ndarray, columns: np.ndarray,
               orientation: Sequence[bool]) -> Iterator[Match]:
    """Yield the pairs whose thumbnails agree. rows, columns: int64 [M], of images and of others"""
    for start in range(0, len(rows), _PAIRS):
        some, theirs = rows[start:start + _PAIRS], columns[start:start + _PAIRS]
        turned = orient(images.pixels[some], orientation)
        correlations = np.einsum("nhw,nhw->n", turned, others.pixels[theirs])
        for at in np.flatnonzero(correlations >= LEAST_CORRELATION):
            yield Match(row=int(some[at]), other=int(theirs[at]), correlation=float(correlations[at]),
                        orientation=tuple(orientation))


def _read_gray(images: ImageSet, shape: Shape, name: str) -> np.ndarray:
    """Return the gray thumbnail of an image: float32 [SIDE, SIDE], 0..255."""
    pixels = load_pixels(images, name, shape).astype(np.float32)
    gray = pixels[0] if len(pixels) == 1 else np.tensordot(np.float32(LUMA), pixels, axes=1)
    mean_of_area = PIL.Image.Resampling.BOX if min(gray.shape) >= SIDE else PIL.Image.Resampling.BILINEAR
    return np.asarray(PIL.Image.fromarray(gray).resize((SIDE, SIDE), mean_of_area))


def _orient_frequencies(frequencies: np.ndarray, orientation: Sequence[bool]) -> np.ndarray:
    """Return the frequencies [N, K, K] of images in another orientation: mirroring negates the odd ones."""
    turned, mirrored, flipped = orientation
    odd = (-1.0) ** np.arange(frequencies.shape[-1], dtype=np.float32)
    frequencies = frequencies.transpose(0, 2, 1) if turned else frequencies
    return frequencies * (odd if mirrored else 1) * (odd[:, None] if flipped else 1)


def _hash(frequencies: np.ndarray) -> np.ndarray:
    """Return the signs of all frequencies but the mean, uint64 [N, 4]; the bit of the mean is 0."""
    bits = frequencies.reshape(len(frequencies), -1) > 0
    bits[:, 0] = False
    return np.packbits(bits, axis=1).view(np.uint64)


def _distances(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return in how many bits each pair of hashes differs: uint16 [N, M]."""
    found = np.zeros((len(hashes), len(others)), dtype=np.uint16)
    for word in range(_WORDS):
        found += np.bitwise_count(hashes[:, word, None] ^ others[None, :, word])
    return found
