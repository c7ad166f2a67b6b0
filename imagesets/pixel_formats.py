"""Make images of all kinds 8-bit gray or RGB in sRGB: more bits, color profiles, and any of Pillow's modes.

Images of more than 8 bits a channel are brought to 8 bits, all images of a set by one scale. Three kinds: "16-bit"
(unsigned integers in PNG, TIFF, PGM, PPM and arrays), "32-bit" (other integers, among them signed ones of 16 bits) and
"float". Cameras and scanners put 10, 12 or 14 bits into the first: the file does not say so.
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
# Why an image cannot be used; the third: it is scaled by the values of its set, and its name did not tell so.
NOT_FINITE, BEYOND_DEPTH = "not-a-number pixels", "values beyond --depth"
NOT_SURVEYED = "32-bit or float, but not named .tif or .pfm"
UNSUPPORTED = "unsupported format"
_LARGEST_16_BIT = 65535
_SAMPLE_FORMAT, _PLANAR_CONFIGURATION, _BITS_PER_SAMPLE = 339, 284, 258  # TIFF tags
# Read in the wrong order of bytes, the low one comes in place of the high one.
_LOW_BYTES = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
# What LittleCMS and Pillow raise for profiles that are damaged or of another kind.
_PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)
_GRAY_MODES = {"1", "L", "LA", "La", "I", "F"}
_ALPHA_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}
_WHITE = {"L": 255, "RGB": (255, 255, 255)}
_NOTES = {"1": "1-bit", "P": "palette", "PA": "palette", "CMYK": "CMYK", "LAB": "LAB", "HSV": "HSV", "YCbCr": "YCbCr"}


class BadImage(ValueError):
    """An image that cannot be used; `reason` is a few words, of an image file one of imagesets.decode.REASONS.

    detail: what was found, what the limit is and what to do, to go on from the image's name; "" where the reason says
            all
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Depth:
    """What the images of a set hold that have more than 8 bits a channel.

    bits:   of their numbers (--depth): 2^bits - 1 becomes 255. None: 16, or what the values of the set suggest
    ranges: kind -> smallest and largest value in all images of the set; None for a picture alone
    """

    bits: int | None = None
    ranges: Mapping[str, tuple[float, float]] | None = None

    def __post_init__(self):
        if self.bits is not None and not MIN_DEPTH <= self.bits <= MAX_DEPTH:
            raise UserError(f"--depth={self.bits}; expected the bits of the numbers in images of more than 8 bits, "
                            f"{MIN_DEPTH} to {MAX_DEPTH}, such as 12 for 0 to 4095")

    def scale(self, kind: str, found: tuple[float, float]) -> tuple[float, float]:
        """Return the values that become 0 and 255. found: smallest and largest value of the picture at hand"""
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
    """What the header of an image of more than 8 bits says.

    white:       the largest value by the file itself, None where it does not tell
    is_unsigned: 32-bit integers, which Pillow takes for signed ones
    """

    kind: str
    white: int | None = None
    is_unsigned: bool = False

    @property
    def needs_range(self) -> bool:
        """Whether the scale follows from the values of all images of the set."""
        return self.kind != "16-bit"


@dataclass(frozen=True, kw_only=True)
class Values:
    """The numbers that images of more than 8 bits held, in one of them or in many; black and white became 0 and 255."""

    kind: str
    black: float
    white: float
    largest: float
    count: int = 1


def deep_header(image: PIL.Image.Image) -> Deep | None:
    """Return what the header of an image, not yet loaded, says; None for one of 8 bits a channel."""
    raw, codec = raw_mode(image), image.tile[0][0] if getattr(image, "tile", None) else ""
    if image.mode == "F":
        return Deep(kind="float")
    if codec == "jpeg2k":  # LIMIT: Pillow scales by the precision of the file, so that --depth does not count here
        return Deep(kind="16-bit", white=_LARGEST_16_BIT) if image.mode.startswith("I") else None
    if codec.startswith("ppm"):  # has scaled by the file's largest value
        return _ppm_header(image, codec)
    if image.mode.startswith("I;16") or (";16" in raw and not raw.endswith("S")):
        if _is_planar(image) or raw.partition(";")[0] not in ("I", "LA", "RGB", "RGBA"):
            return None  # LIMIT: of these Pillow gives the high bytes, and --depth does not count
        return Deep(kind="16-bit", white=4095 if raw == "I;12" else None)
    if image.mode == "I":
        tags = getattr(image, "tag_v2", {})
        return Deep(kind="32-bit", is_unsigned=bool(tags) and "32" in raw and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1)
    return None


def _ppm_header(image: PIL.Image.Image, codec: str) -> Deep | None:
    arguments = image.tile[0][3]  # mode and largest value; a text for bitmaps
    largest = arguments[1] if isinstance(arguments, tuple) else 1
    if image.mode == "I":
        return Deep(kind="16-bit", white=None if largest == _LARGEST_16_BIT else _LARGEST_16_BIT)
    return Deep(kind="16-bit") if codec == "ppm" and largest == _LARGEST_16_BIT else None


def raw_mode(image: PIL.Image.Image) -> str:
    """Return how the decoder will read the pixels, such as "RGB;16B", as far as Pillow tells."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    arguments = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return arguments if isinstance(arguments, str) else ""


def check_readable(image: PIL.Image.Image) -> None:
    """Raise BadImage for what Pillow reads wrongly: uncompressed 16-bit colors that lie one after the other."""
    if _is_planar(image) and image.tile[0][0] == "raw" and max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) > 8:
        raise BadImage(UNSUPPORTED)


def _is_planar(image: PIL.Image.Image) -> bool:
    return getattr(image, "tag_v2", {}).get(_PLANAR_CONFIGURATION) == 2 and image.mode not in ("I", "F", "L")


def split_bytes(high: PIL.Image.Image, low: PIL.Image.Image) -> list[PIL.Image.Image]:
    """Return what to load for all 16 bits of an image, of its two copies that are not yet loaded.

    Pillow has no mode for 16 bits in color and gives the high bytes: the second copy is made to give the low ones.
    """
    raw = raw_mode(high)
    if high.mode not in ("RGB", "RGBA"):
        return [high]
    if raw.startswith("LA;16"):  # both bytes of both channels, as if they were four
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
    """Return the numbers of an image, [H, W] or [H, W, C]: of what split_bytes returned, loaded."""
    pixels = [np.asarray(layer) for layer in layers]
    if len(pixels) == 2:
        return pixels[0].astype(np.uint16) << 8 | pixels[1]
    if pixels[0].ndim == 3:  # gray and alpha, two bytes each
        return pixels[0][..., 0::2].astype(np.uint16) << 8 | pixels[0][..., 1::2]
    return pixels[0].view(np.uint32) if deep.is_unsigned else pixels[0]


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest number. Raises BadImage where one is not finite."""
    low, high = values.min().item(), values.max().item()
    if not (np.isfinite(low) and np.isfinite(high)):  # also where any is NaN
        raise BadImage(NOT_FINITE)
    return low, high


def widen(ranges: dict[str, tuple[float, float]], kind: str, low: float, high: float) -> None:
    """Let the range of a kind in `ranges` hold these values, too."""
    known = ranges.get(kind, (low, high))
    ranges[kind] = (min(low, known[0]), max(high, known[1]))


def reduce_values(values: np.ndarray, deep: Deep, depth: Depth) -> tuple[np.ndarray, Values | None]:
    """Return the numbers of an image as uint8, rounded to the nearest, and what they were.

    values: [H, W], or [H, W, 2 or 4] with alpha in the last place, or [H, W, 3]

    None in place of Values where the file itself says which number is white. Raises BadImage for numbers that are not
    finite, or that the depth has no place for, and where the values of the set were not looked at.
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
        # An opaque image may have 4095 there, or 65535 beside colors of 12 bits.
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
    """Return uint8 [white + 1]: what 0 to `white` become. None lies between two: (2^n - 1) is odd, 255 * 2 even."""
    return np.rint(np.arange(white + 1) * (255 / white)).astype(np.uint8)


def depth_remark(images: str, white: float, largest: float) -> str | None:
    """Return a remark where all numbers would go into fewer bits than they were taken for.

    images: where they are, as "all 16-bit images"
    """
    bits = max(int(largest).bit_length(), MIN_DEPTH)
    if largest <= 0 or white not in [(1 << depth) - 1 for depth in range(bits + 1, MAX_DEPTH + 1)]:
        return None
    return (f"largest value {largest:g} of {white:g} in {images}: {bits}-bit data? --depth={bits} makes "
            f"{(1 << bits) - 1} white")


# Color profiles (ICC) and modes


def is_gray(image: PIL.Image.Image) -> bool:
    """Tell whether the header promises an image without color; reads no pixels."""
    if image.mode in _GRAY_MODES or image.mode.startswith("I;16"):
        return True
    if image.mode in ("P", "PA"):
        return _palette_is_gray(image)
    return raw_mode(image).startswith("LA")  # 16-bit gray with alpha, which Pillow opens as RGBA


def flatten(image: PIL.Image.Image, *, gray: bool) -> tuple[PIL.Image.Image, set[str]]:
    """Return a loaded image of 8 bits a channel as L, if `gray`, or RGB, and notes; transparency goes on white."""
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
        image = image.convert("LA" if image.mode == "La" else "RGBA")  # color comes multiplied with alpha
    elif image.mode not in ("LA", "RGBA"):
        image = image.convert("RGBA")  # a palette, or one color that stands for transparency
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
    """Return an RGB image in sRGB, and a note if the profile asked for anything; a gray image stays as it is."""
    if not profile:
        return image, None
    if image.mode != "RGB":
        return image, "colour profile ignored"
    try:
        transform = _transform(profile, "RGB")
        if transform is None:
            return image, None
        return ImageCms.applyTransform(image, transform), "colour profile to sRGB"
    except _PROFILE_ERRORS:
        return image, "colour profile ignored"


def cmyk_to_srgb(image: PIL.Image.Image) -> tuple[PIL.Image.Image, str | None]:
    """Return a CMYK image as RGB, by its profile where it has a usable one, else by the plain formula, and a note."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB"), None
    try:
        return ImageCms.applyTransform(image, _transform(profile, "CMYK")), "colour profile to sRGB"
    except _PROFILE_ERRORS:  # many CMYK files carry a profile of another kind
        return image.convert("RGB"), "colour profile ignored"


@lru_cache(maxsize=8)  # the images of one camera carry the same profile
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the way from a profile to sRGB, None when it is sRGB; raises one of _PROFILE_ERRORS when unusable."""
    parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(parsed).lower():
        return None
    return ImageCms.buildTransform(parsed, ImageCms.createProfile("sRGB"), mode, "RGB")
