"""Decode every image of a data set once, and keep what it is: size, mode, digest, or what is wrong with it."""

import hashlib
import io
import struct
import warnings
from array import array
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import PIL.Image

from dnnlib.cli import UserError
from imagesets.duplicates import DIGEST_SIZE
from imagesets.member_pixels import describe_excess
from imagesets.reader import ImageSet
from imagesets.workers import ordered_map

_CHUNK = 32  # images that travel together; one of 64x64 pixels takes a third of a millisecond


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Facts about N images, a row each.

    digests: uint8 [N, 32], sha256
    bytes:   int64 [N]
    sizes:   int64 [N, 2], width and height; 0 where faulty
    modes:   int64 [N], index into mode_names, Pillow's "RGB", "L", ...; meaningless where faulty
    largest: int64 [N], the largest value of any pixel and channel; 0 where faulty
    faults:  row -> why the image cannot be used
    """

    digests: np.ndarray
    bytes: np.ndarray
    sizes: np.ndarray
    modes: np.ndarray
    mode_names: list[str]
    largest: np.ndarray
    faults: dict[int, str]

    @property
    def usable(self) -> np.ndarray:
        """bool [N], False where faulty."""
        result = np.ones(len(self.bytes), dtype=bool)
        result[list(self.faults)] = False
        return result


def measure(images: ImageSet, *, workers: int = 1, on_image: Callable[[], None] = lambda: None) -> Measures:
    """Read and decode all images; a fault is noted, not raised."""
    digests, numbers, mode_names, faults = bytearray(), array("q"), {}, {}
    with closing(ordered_map(partial(_measure_one, images), images.names, workers, chunk=_CHUNK)) as results:
        for row, (digest, num_bytes, width, height, mode, largest, fault) in enumerate(results):
            digests += digest
            numbers.extend((num_bytes, width, height, mode_names.setdefault(mode, len(mode_names)), largest))
            if fault is not None:
                faults[row] = fault
            on_image()
    table = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 5)
    return Measures(digests=np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_SIZE), bytes=table[:, 0],
                    sizes=table[:, 1:3], modes=table[:, 3], mode_names=list(mode_names), largest=table[:, 4],
                    faults=faults)


def _measure_one(images: ImageSet, name: str) -> tuple[bytes, int, int, int, str, int, str | None]:
    """Return digest, number of bytes, width, height, mode, largest value, and what is wrong or None."""
    try:
        data = images.read(name)
    except UserError as error:
        why = f"damaged: {error.__cause__}" if error.__cause__ is not None else str(error)
        return bytes(DIGEST_SIZE), 0, 0, 0, "", 0, why
    except OSError as error:
        return bytes(DIGEST_SIZE), 0, 0, 0, "", 0, f"unreadable: {error.strerror}"
    digest = hashlib.sha256(data).digest()
    try:
        width, height, mode, largest = _decode(data)
    except _BadImage as error:
        return digest, len(data), 0, 0, "", 0, str(error)
    return digest, len(data), width, height, mode, largest, None


class _BadImage(ValueError):
    """The reason is the message."""


def _decode(data: bytes) -> tuple[int, int, str, int]:
    if not data:
        raise _BadImage("zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # training refuses what Pillow warns of, too
            image = PIL.Image.open(io.BytesIO(data))
            image.load()
    except PIL.UnidentifiedImageError as error:
        raise _BadImage("not an image") from error
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise _BadImage(f"too large: {describe_excess(error)}") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Warning) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise _BadImage("truncated" if "truncated" in text else text) from error
    return image.width, image.height, image.mode, _largest_value(image)


def _largest_value(image: PIL.Image.Image) -> int:
    extrema = image.getextrema()
    largest = max(high for _, high in extrema) if isinstance(extrema[0], tuple) else extrema[1]
    return int(largest) if np.isfinite(largest) else 0
