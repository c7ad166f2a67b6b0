"""Bring an image of any of Pillow's modes to 8-bit grey or RGB."""

import numpy as np
import PIL.Image

from imagesets.pixels.depth import raw_mode
from imagesets.pixels.profiles import cmyk_to_srgb

_GREY_MODES = {"1", "L", "LA", "La", "I", "F"}
_ALPHA_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}
_WHITE = {"L": 255, "RGB": (255, 255, 255)}
_NOTES = {"1": "1-bit", "P": "palette", "PA": "palette", "CMYK": "CMYK", "LAB": "LAB", "HSV": "HSV", "YCbCr": "YCbCr"}


def is_grey(image: PIL.Image.Image) -> bool:
    """Say whether the header promises an image without colour; reads no pixels."""
    if image.mode in _GREY_MODES or image.mode.startswith("I;16"):
        return True
    if image.mode in ("P", "PA"):
        return _palette_is_grey(image)
    return raw_mode(image).startswith("LA")  # 16-bit grey with alpha, which Pillow opens as RGBA


def flatten(image: PIL.Image.Image, *, grey: bool) -> tuple[PIL.Image.Image, set[str]]:
    """Return a loaded image of 8 bits a channel as L, if `grey`, or RGB, and notes; transparency goes on white."""
    notes = {_NOTES[image.mode]} if image.mode in _NOTES else set()
    target = "L" if grey else "RGB"
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image, note = _put_on_white(image, target)
        notes.add(note)
    if image.mode == "CMYK":
        image, note = cmyk_to_srgb(image)
        notes |= {note} - {None}
    return (image if image.mode == target else image.convert(target)), notes


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
