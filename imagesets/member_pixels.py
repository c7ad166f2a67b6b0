"""Decode the members of a data set to pixels: 8-bit, grey or RGB, of one shape."""

import io
import re

import numpy as np
import PIL.Image

from dnnlib.cli import UserError
from imagesets.reader import ImageSet

Shape = tuple[int, int, int]  # channels, height, width


def load_pixels(images: ImageSet, name: str, shape: Shape | None = None) -> np.ndarray:
    """Return the pixels of a member: uint8 [C, H, W], C 1 or 3, as a view that may be read-only and not contiguous.

    shape:  that of the first image, which this one must have too; None takes any

    Raises UserError, naming the member, when it cannot be read or decoded, is neither 8-bit grey nor RGB, or has
    another shape.
    """
    data = images.read(name)
    try:
        image = PIL.Image.open(io.BytesIO(data))
        pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
        # Pillow's own words for what it cannot identify hold the address of our buffer, another one each time.
        reason = "it is no image" if isinstance(error, PIL.UnidentifiedImageError) else error
        if isinstance(error, PIL.Image.DecompressionBombError):
            raise UserError(f"{images.path}: {name} {describe_excess(error)}") from error
        raise UserError(f"{images.path}: {name} cannot be decoded ({reason}); make or copy it again") from error
    if image.mode not in ("L", "RGB"):
        raise UserError(f"{images.path}: {name} has mode {image.mode}; expected 8-bit grey or RGB: convert it with "
                        "dataset_tool.py")
    pixels = channels_first(pixels)
    if shape is not None and pixels.shape != shape:
        raise UserError(f"{images.path}: {name} is {describe_shape(pixels.shape)}, the first image "
                        f"{describe_shape(shape)}; expected one size: convert it with dataset_tool.py")
    return pixels


def describe_excess(error: Exception) -> str:
    """Return what Pillow's refusal of an image with too many pixels says, to go on from the image's name."""
    match = re.search(r"\((\d+) pixels\) exceeds limit of (\d+)", str(error))
    if match is None:  # in the words of another version
        return f"has too many pixels ({error}): save it smaller"
    return f"has {int(match[1]):,} pixels; at most {int(match[2]):,} are read: save it smaller"


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """Return [H, W] or [H, W, C] as [C, H, W]; a view."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def describe_shape(shape: Shape) -> str:
    """Return "64x64 RGB" for (3, 64, 64)."""
    channels, height, width = shape
    return f"{width}x{height} {'grey' if channels == 1 else 'RGB'}"
