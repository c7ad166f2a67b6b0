"""Bring an image of any of Pillow's modes to 8-bit grey or RGB."""

import numpy as np
import PIL.Image

from imagesets.pixels.profiles import cmyk_to_srgb

_GREY_MODES = {"1", "L", "LA", "La", "I", "F"}
_ALPHA_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}
_WHITE = {"L": 255, "RGB": (255, 255, 255)}
_NOTES = {"1": "1-bit", "P": "palette", "PA": "palette", "CMYK": "CMYK", "LAB": "LAB", "HSV": "HSV", "YCbCr": "YCbCr"}


class NotFinite(ValueError):
    """A float image holds NaN or infinity."""


def is_grey(image: PIL.Image.Image) -> bool:
    """Say whether the header promises an image without colour; reads no pixels."""
    if image.mode in _GREY_MODES or image.mode.startswith("I;16"):
        return True
    if image.mode in ("P", "PA"):
        return _palette_is_grey(image)
    return _raw_mode(image).startswith("LA")  # 16-bit grey with alpha, which Pillow opens as RGBA


def is_16_bit(image: PIL.Image.Image) -> bool:
    """Say whether the file, not yet loaded, holds 16 bits a channel."""
    return image.mode.startswith("I;16") or ";16" in _raw_mode(image)


def flatten(image: PIL.Image.Image, *, grey: bool) -> tuple[PIL.Image.Image, set[str]]:
    """Return a loaded image as L, if `grey`, or RGB, and notes on what was done.

    Transparency goes on white. More than 8 bits a channel are scaled. Raises NotFinite.
    """
    notes = {_NOTES[image.mode]} if image.mode in _NOTES else set()
    target = "L" if grey else "RGB"
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image, note = _scale(image)
        notes.add(note)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image, note = _put_on_white(image, target)
        notes.add(note)
    if image.mode == "CMYK":
        image, note = cmyk_to_srgb(image)
        notes |= {note} - {None}
    return (image if image.mode == target else image.convert(target)), notes


def reduce_16_bit(values: np.ndarray) -> np.ndarray:
    """Return whole numbers in 0..65535 as uint8, rounded to the nearest: 65535 becomes 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _scale(image: PIL.Image.Image) -> tuple[PIL.Image.Image, str]:
    values = np.asarray(image)
    if image.mode == "F":
        pixels, note = _scale_float(values), "float scaled"
    elif image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        pixels, note = _stretch(values.astype(np.float64)), "32-bit scaled"
    else:
        pixels, note = reduce_16_bit(values), "16-bit scaled"
    return PIL.Image.fromarray(pixels), note


def _scale_float(values: np.ndarray) -> np.ndarray:
    """Take values for what their range suggests: 0..1, 8 bits, 16 bits, else stretch them over the whole range."""
    if not np.isfinite(values).all():
        raise NotFinite
    if values.min() < 0 or values.max() > 65535:
        return _stretch(values.astype(np.float64))
    largest = next(limit for limit in (1, 255, 65535) if values.max() <= limit)
    return np.rint(values * (255 / largest)).astype(np.uint8)


def _stretch(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return np.rint((values - low) * (255 / max(high - low, 1e-300))).astype(np.uint8)


def _put_on_white(image: PIL.Image.Image, target: str) -> tuple[PIL.Image.Image, str]:
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")  # colour comes multiplied with alpha
    elif image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")  # a palette, or one colour that stands for transparency
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image.convert(target), "opaque alpha dropped"
    canvas = PIL.Image.new(target, image.size, _WHITE[target])
    canvas.paste(image.convert(target), mask=alpha)
    return canvas, "alpha on white"


def _palette_is_grey(image: PIL.Image.Image) -> bool:
    if image.palette is None:
        return False
    layout, data = image.palette.getdata()
    if layout == "RGB;L":  # all reds, then all greens, then all blues
        red, green, blue = np.frombuffer(data, dtype=np.uint8).reshape(3, -1)
    elif layout[:3] in ("RGB", "BGR") and layout.isalpha():
        colours = np.frombuffer(data[:len(data) // len(layout) * len(layout)], dtype=np.uint8)
        red, green, blue = colours.reshape(-1, len(layout)).T[:3]
    else:
        return False
    return bool((red == green).all() and (red == blue).all())


def _raw_mode(image: PIL.Image.Image) -> str:
    """Return how the decoder will read the pixels, such as "RGB;16B", as far as Pillow tells."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    arguments = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return arguments if isinstance(arguments, str) else ""
