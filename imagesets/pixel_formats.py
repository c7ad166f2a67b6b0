"""Convert images of all kinds to 8-bit gray or sRGB: more bits, color profiles, and all modes of Pillow.

Images with more than 8 bits per channel are scaled to 8 bits, all images of a data set alike. There are three kinds:
"16-bit" (unsigned integers in PNG, TIFF, PGM, PPM and arrays), "32-bit" (other integers, including signed 16-bit ones)
and "float". Cameras and scanners store 10, 12 or 14 bits in the first kind, and the file does not record it.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import PIL.Image
from PIL import ImageCms

from dnnlib.cli import UserError

MIN_DEPTH, MAX_DEPTH = 8, 16
# Why an image cannot be used; the third: its scaling needs the range of the data set, which its name did not show.
NOT_FINITE, BEYOND_DEPTH = "not-a-number pixels", "values beyond --depth"
NOT_SURVEYED = "32-bit or float, but not named .tif or .pfm"
UNSUPPORTED = "unsupported format"
_LARGEST_16_BIT = 65535
_SAMPLE_FORMAT, _PLANAR_CONFIGURATION, _BITS_PER_SAMPLE = 339, 284, 258  # TIFF tags
# In the wrong byte order, the low byte is read in place of the high one.
_LOW_BYTES = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
# What LittleCMS and Pillow raise for profiles that are damaged or of another kind.
_PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)
_GRAY_MODES = {"1", "L", "LA", "La", "I", "F"}
_ALPHA_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}
_WHITE = {"L": 255, "RGB": (255, 255, 255)}
_NOTES = {"1": "1-bit", "P": "palette", "PA": "palette", "CMYK": "CMYK", "LAB": "LAB", "HSV": "HSV", "YCbCr": "YCbCr"}


class BadImage(ValueError):
    """An image that cannot be used; `reason` is a few words, for image files one of imagesets.decode.REASONS.

    detail: what was found, what the limit is and what to do, to follow the image's name; "" if the reason is enough
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How the images of a data set with more than 8 bits per channel are scaled.

    bits:   per value (--depth): 2^bits - 1 becomes 255. None: 16, or what the values in the data set suggest
    ranges: kind -> smallest and largest value in all images of the data set; None for a single image
    """

    bits: int | None = None
    ranges: Mapping[str, tuple[float, float]] | None = None

    def __post_init__(self):
        if self.bits is not None and not MIN_DEPTH <= self.bits <= MAX_DEPTH:
            raise UserError(f"--depth={self.bits}; expected the bits per value of images with more than 8 bits, "
                            f"{MIN_DEPTH} to {MAX_DEPTH}, such as 12 for 0 to 4095")

    def scale(self, kind: str, found: tuple[float, float]) -> tuple[float, float]:
        """Return the values that become 0 and 255. found: smallest and largest value of this image"""
        if kind == "16-bit":
            return 0, (1 << (self.bits or 16)) - 1
        if kind == "32-bit" and self.bits is not None:
            return 0, (1 << self.bits) - 1
        low, high = found if self.ranges is None else self.ranges.get(kind, (None, None))
        if low is None:
            raise BadImage(NOT_SURVEYED)
        if kind == "float" and low >= 0 and high <= 1:
            return 0, 1
        if self.bits is not None:
            return 0, (1 << self.bits) - 1
        if low < 0 or high > _LARGEST_16_BIT:
            return low, high
        return 0, 255 if kind == "float" and high <= 255 else _LARGEST_16_BIT


@dataclass(frozen=True, kw_only=True)
class Deep:
    """Facts from the header of an image with more than 8 bits.

    white:       the largest possible value according to the file, None if not given
    is_unsigned: unsigned 32-bit integers, which Pillow reads as signed
    """

    kind: str
    white: int | None = None
    is_unsigned: bool = False

    @property
    def needs_range(self) -> bool:
        """Whether scaling needs the range of values of the whole data set."""
        return self.kind != "16-bit"


@dataclass(frozen=True, kw_only=True)
class Values:
    """The values of one or more images with more than 8 bits; `black` became 0 and `white` 255."""

    kind: str
    black: float
    white: float
    largest: float
    count: int = 1


def deep_header(image: PIL.Image.Image) -> Deep | None:
    """Return facts from the header of an image that is not yet loaded; None if it has 8 bits per channel."""
    raw, codec = raw_mode(image), image.tile[0][0] if getattr(image, "tile", None) else ""
    if image.mode == "F":
        return Deep(kind="float")
    if codec == "jpeg2k":  # LIMIT: Pillow scales by the precision of the file, so --depth has no effect
        return Deep(kind="16-bit", white=_LARGEST_16_BIT) if image.mode.startswith("I") else None
    if codec.startswith("ppm"):  # scales by the file's largest value
        return _ppm_header(image, codec)
    if image.mode.startswith("I;16") or (";16" in raw and not raw.endswith("S")):
        if _is_planar(image) or raw.partition(";")[0] not in ("I", "LA", "RGB", "RGBA"):
            return None  # LIMIT: Pillow returns only the high bytes of these, and --depth has no effect
        return Deep(kind="16-bit", white=4095 if raw == "I;12" else None)
    if image.mode == "I":
        tags = getattr(image, "tag_v2", {})
        return Deep(kind="32-bit", is_unsigned=bool(tags) and "32" in raw and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1)
    return None


def _ppm_header(image: PIL.Image.Image, codec: str) -> Deep | None:
    arguments = image.tile[0][3]  # mode and largest value; a string for bitmaps
    largest = arguments[1] if isinstance(arguments, tuple) else 1
    if image.mode == "I":
        return Deep(kind="16-bit", white=None if largest == _LARGEST_16_BIT else _LARGEST_16_BIT)
    return Deep(kind="16-bit") if codec == "ppm" and largest == _LARGEST_16_BIT else None


def raw_mode(image: PIL.Image.Image) -> str:
    """Return how the decoder will read the pixels, such as "RGB;16B", or "" if Pillow does not give it."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    arguments = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return arguments if isinstance(arguments, str) else ""


def check_readable(image: PIL.Image.Image) -> None:
    """Raise BadImage for what Pillow reads wrongly: uncompressed 16-bit images with one plane per color."""
    if _is_planar(image) and image.tile[0][0] == "raw" and max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8:
        raise BadImage(UNSUPPORTED)


def _is_planar(image: PIL.Image.Image) -> bool:
    return getattr(image, "tag_v2", {}).get(_PLANAR_CONFIGURATION) == 2 and image.mode not in ("I", "F", "L")


def split_bytes(high: PIL.Image.Image, low: PIL.Image.Image) -> list[PIL.Image.Image]:
    """Return the layers to load for all 16 bits of an image, given two copies of it that are not yet loaded.

    Pillow has no mode for 16 bits in color and returns the high bytes: the second copy is set to return the low ones.
    """
    raw = raw_mode(high)
    if high.mode not in ("RGB", "RGBA"):
        return [high]
    if raw.startswith("LA;16"):  # both bytes of both channels, as four channels
        _read_as(high, "RGBA")
        return [high]
    if high.tile[0][0] == "ppm":
        for copy, order in ((high, "RGB;16B"), (low, "RGB;16L")):
            copy.tile = [tile._replace(codec_name="raw", args=(order, 0, 1)) for tile in copy.tile]
        return [high, low]
    layout, _, order = raw.partition(";")
    _read_as(low, f"{layout};{_LOW_BYTES[order]}")
    return [high, low]


def _read_as(image: PIL.Image.Image, raw: str) -> None:
    def changed(arguments: Any) -> Any:
        return (raw, *arguments[1:]) if isinstance(arguments, tuple) else raw

    image.tile = [tile._replace(args=changed(tile.args)) for tile in image.tile]


def read_values(layers: Sequence[PIL.Image.Image], deep: Deep) -> np.ndarray:
    """Return the values of an image, [H, W] or [H, W, C], from the loaded layers of split_bytes."""
    pixels = [np.asarray(layer) for layer in layers]
    if len(pixels) == 2:
        return pixels[0].astype(np.uint16) << 8 | pixels[1]
    if pixels[0].ndim == 3:  # gray and alpha, two bytes each
        return pixels[0][..., 0::2].astype(np.uint16) << 8 | pixels[0][..., 1::2]
    return pixels[0].view(np.uint32) if deep.is_unsigned else pixels[0]


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest value. Raises BadImage if any is not finite."""
    low, high = values.min().item(), values.max().item()
    if not (np.isfinite(low) and np.isfinite(high)):  # also catches NaN
        raise BadImage(NOT_FINITE)
    return low, high


def widen(ranges: dict[str, tuple[float, float]], kind: str, low: float, high: float) -> None:
    """Extend the range of a kind in `ranges` to these values."""
    known = ranges.get(kind, (low, high))
    ranges[kind] = (min(low, known[0]), max(high, known[1]))


def reduce_values(values: np.ndarray, deep: Deep, depth: Depth) -> tuple[np.ndarray, Values | None]:
    """Scale the values of an image to uint8, rounded to the nearest; also return what they were.

    values: [H, W], or [H, W, 2 or 4] with alpha as the last channel, or [H, W, 3]

    The second result is None if the file itself defines the value of white. Raises BadImage for values that are not
    finite or exceed the depth, and if the range of the data set is needed but was not read.
    """
    has_alpha = values.ndim == 3 and values.shape[2] in (2, 4)
    colors = values[..., :-1] if has_alpha else values
    low, high = value_range(colors)
    black, white = (0, deep.white) if deep.white is not None else depth.scale(deep.kind, (low, high))
    if low < black or high > white:
        raise BadImage(NOT_SURVEYED if depth.bits is None else BEYOND_DEPTH)
    reduced = _scale(colors, black, white)
    if has_alpha:
        alpha = values[..., -1:]
        # With 12-bit colors, opaque may be 4095 or 65535.
        alpha = _scale(alpha, 0, white if alpha.max() <= white else _LARGEST_16_BIT)
        reduced = np.concatenate([reduced, alpha], axis=2)
    told = deep.white is not None
    return reduced, None if told else Values(kind=deep.kind, black=black, white=white, largest=high)


def _scale(values: np.ndarray, black: float, white: float) -> np.ndarray:
    if values.dtype.kind in "iu" and black == 0 and white <= _LARGEST_16_BIT:
        return _table(white)[values]
    if black != 0 or white > _LARGEST_16_BIT:
        values = values.astype(np.float64) - black
    return np.rint(values * (255 / max(white - black, 1e-300))).astype(np.uint8)


@cache
def _table(white: int) -> np.ndarray:
    """Return uint8 [white + 1]: 0 to `white`, scaled. There are no ties: 2^n - 1 is odd, 255 * 2 is even."""
    return np.rint(np.arange(white + 1) * (255 / white)).astype(np.uint8)


def depth_remark(images: str, white: float, largest: float) -> str | None:
    """Return a remark if all values would fit into fewer bits than assumed.

    images: where the values are, such as "all 16-bit images"
    """
    bits = max(int(largest).bit_length(), MIN_DEPTH)
    if largest <= 0 or white not in [(1 << depth) - 1 for depth in range(bits + 1, MAX_DEPTH + 1)]:
        return None
    return (f"largest value {largest:g} of {white:g} in {images}: {bits}-bit data? --depth={bits} makes "
            f"{(1 << bits) - 1} white")


# Color profiles (ICC) and modes


def is_gray(image: PIL.Image.Image) -> bool:
    """Return whether an image has no color according to its header; reads no pixels."""
    if image.mode in _GRAY_MODES or image.mode.startswith("I;16"):
        return True
    if image.mode in ("P", "PA"):
        return _palette_is_gray(image)
    return raw_mode(image).startswith("LA")  # 16-bit gray with alpha, which Pillow opens as RGBA


def flatten(image: PIL.Image.Image, *, gray: bool) -> tuple[PIL.Image.Image, set[str]]:
    """Return a loaded image with 8 bits per channel as L if `gray`, else RGB, on white; and notes."""
    notes = {_NOTES[image.mode]} if image.mode in _NOTES else set()
    target = "L" if gray else "RGB"
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image, note = _put_on_white(image, target)
        notes.add(note)
    if image.mode == "CMYK":
        image, note = cmyk_to_srgb(image)
        notes |= {note} - {None}
    return (image if image.mode == target else image.convert(target)), notes


def _put_on_white(image: PIL.Image.Image, target: str) -> tuple[PIL.Image.Image, str]:
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")  # color is premultiplied with alpha
    elif image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")  # a palette, or one color that means transparent
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image.convert(target), "opaque alpha dropped"
    canvas = PIL.Image.new(target, image.size, _WHITE[target])
    canvas.paste(image.convert(target), mask=alpha)
    return canvas, "alpha on white"


def _palette_is_gray(image: PIL.Image.Image) -> bool:
    if image.palette is None:
        return False
    layout, data = image.palette.getdata()
    if layout == "RGB;L":  # all reds, then all greens, then all blues
        red, green, blue = np.frombuffer(data, dtype=np.uint8).reshape(3, -1)
    elif layout[:3] in ("RGB", "BGR") and layout.isalpha():
        colors = np.frombuffer(data[:len(data) // len(layout) * len(layout)], dtype=np.uint8)
        red, green, blue = colors.reshape(-1, len(layout)).T[:3]
    else:
        return False
    return bool((red == green).all() and (red == blue).all())


def to_srgb(image: PIL.Image.Image, profile: bytes | None) -> tuple[PIL.Image.Image, str | None]:
    """Convert an RGB image to sRGB by its profile; return it and a note if it had one. Gray images stay as they are."""
    if not profile:
        return image, None
    if image.mode != "RGB":
        return image, "color profile ignored"
    try:
        transform = _transform(profile, "RGB")
        if transform is None:
            return image, None
        return ImageCms.applyTransform(image, transform), "color profile to sRGB"
    except _PROFILE_ERRORS:
        return image, "color profile ignored"


def cmyk_to_srgb(image: PIL.Image.Image) -> tuple[PIL.Image.Image, str | None]:
    """Convert a CMYK image to RGB, by its profile if that is usable, else by the plain formula; also return a note."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB"), None
    try:
        return ImageCms.applyTransform(image, _transform(profile, "CMYK")), "color profile to sRGB"
    except _PROFILE_ERRORS:  # many CMYK files carry a profile of another kind
        return image.convert("RGB"), "color profile ignored"


@lru_cache(maxsize=8)  # the images of one camera have the same profile
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB, None if it is sRGB; raises one of _PROFILE_ERRORS if unusable."""
    parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(parsed).lower():
        return None
    return ImageCms.buildTransform(parsed, ImageCms.createProfile("sRGB"), mode, "RGB")
