"""Decode an image file of any kind and convert it to the form of the data set, or give the reason if that fails.

Messages of Pillow and its C libraries about damaged or unusual files are not shown.
"""

import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.PngImagePlugin

from imagesets.pixel_formats import (
    BEYOND_DEPTH,
    NOT_FINITE,
    NOT_SURVEYED,
    UNSUPPORTED,
    BadImage,
    Deep,
    Depth,
    Values,
    check_readable,
    deep_header,
    flatten,
    is_gray,
    read_values,
    reduce_values,
    split_bytes,
    to_srgb,
    value_range,
)
from imagesets.pixel_hashes import hash_pixels
from imagesets.reader import channels_first, describe_excess
from imagesets.resize import PixelSpec, Size, crop_and_resize, crop_box, decoder_reduction, picture_size
from imagesets.writer import encode_png

# Pillow's own limit against files that claim to be huge, about 13,000 x 13,000; written here so that it stays.
MAX_PIXELS = 178_956_970
TOO_SMALL = "smaller than the wide crop"  # such an image is readable
REASONS = ("zero bytes", "not an image", UNSUPPORTED, "truncated", "corrupt", "too large", NOT_FINITE, BEYOND_DEPTH,
           NOT_SURVEYED, TOO_SMALL)
# Formats recognized by their content; without those that start another program (EPS) or match nearly anything.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|II\*\0|MM\0\*|RIFF....WEBP|BM....\0\0\0\0|\0\0\0\x0cjP", re.DOTALL)
_PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # where Pillow finds an orientation
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {2: PIL.Image.Transpose.FLIP_LEFT_RIGHT, 3: PIL.Image.Transpose.ROTATE_180,
            4: PIL.Image.Transpose.FLIP_TOP_BOTTOM, 5: PIL.Image.Transpose.TRANSPOSE,
            6: PIL.Image.Transpose.ROTATE_270, 7: PIL.Image.Transpose.TRANSVERSE, 8: PIL.Image.Transpose.ROTATE_90}
_STDERR = 2


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """An image as the data set holds it, and facts about the image file.

    png:         the encoded image
    source_size: width and height of the original, after its EXIF rotation
    source_mode: Pillow's mode of the original, such as "RGB"
    pixel_hash:  of the encoded image, see imagesets.pixel_hashes
    values:      of an original with more than 8 bits per channel, see imagesets.pixel_formats
    notes:       sorted: "1-bit", "16-bit scaled", "32-bit scaled", "CMYK", "HSV", "LAB", "RGB to gray", "YCbCr",
                 "alpha on white", "color profile ignored", "color profile to sRGB", "decoder downscaling",
                 "first frame of N" or "of several", "float scaled", "gray to RGB", "opaque alpha dropped", "palette",
                 "rotated by EXIF", "upscaled"
    """

    png: bytes
    width: int
    height: int
    source_size: Size
    source_mode: str
    pixel_hash: str
    notes: tuple[str, ...]
    values: Values | None = None


class Header(NamedTuple):
    """Size after EXIF rotation, 1 or 3 channels, and whether scaling needs the range of the whole data set."""

    width: int
    height: int
    channels: int
    needs_range: bool = False


def probe(data: bytes) -> Header:
    """Read the header of an image file. Raises BadImage."""
    with _failures_named():
        image = _open(data)
        deep = deep_header(image)
        width, height = _upright_size(image, _orientation(image, data))
        return Header(width, height, 1 if is_gray(image) else 3, deep is not None and deep.needs_range)


def probe_range(data: bytes) -> tuple[str, float, float] | None:
    """Return the kind, the smallest and the largest value of an image whose scaling needs the range of the data set.

    None for any other image, by its header. Raises BadImage.
    """
    with _failures_named():
        image = _open(data)
        deep = deep_header(image)
        if deep is None or not deep.needs_range:
            return None
        with _libtiff_silenced(image):
            image.load()
        return deep.kind, *value_range(read_values([image], deep))


def may_need_range(name: str) -> bool:
    """Return whether probe_range may be needed for an image file, judged by its name."""
    return PIL.Image.registered_extensions().get(os.path.splitext(name)[1].lower()) in ("TIFF", "PPM")


def decode(data: bytes, spec: PixelSpec) -> Decoded:
    """Convert an image file. Raises BadImage."""
    # LIMIT: JPEG has no checksum; flipped bits inside one may give stripes of a wrong color, without an error.
    with _failures_named():
        image = _open(data)
        check_readable(image)
        gray, mode, deep, notes = is_gray(image), image.mode, deep_header(image), set()
        orientation = _orientation(image, data)
        if (frames := _frame_count(image)) != 1:
            notes.add(f"first frame of {frames or 'several'}")
        size = _upright_size(image, orientation)
        reduction = _reduce_in_decoder(image, size, spec)
        layers = [image] if deep is None else split_bytes(image, _open(data))
        with _libtiff_silenced(image):
            for layer in layers:
                layer.load()
        if orientation != 1:
            notes.add("rotated by EXIF")
            layers = [_turn_upright(layer, data) for layer in layers]
        image, values = layers[0], None
        if deep is not None:
            image, values = _to_8_bits(layers, deep, spec.depth)
            notes.add(f"{deep.kind} scaled")
        profile = None if mode == "CMYK" else image.info.get("icc_profile")
        flat, more = flatten(image, gray=gray)
    return _finish(flat, spec, size=size, mode=mode, notes=notes | more, values=values, reduction=reduction,
                   profile=profile)


def decode_array(pixels: np.ndarray, spec: PixelSpec) -> Decoded:
    """Convert uint8 or uint16 pixels: [H, W] or [H, W, 1] gray, [H, W, 3] RGB, [H, W, 4] RGBA.

    Raises ValueError for other arrays, BadImage for images too small for the transform.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    fits = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if not fits or pixels.dtype not in (np.uint8, np.uint16) or not pixels.size:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}; expected uint8 or uint16, [H, W] or "
                         "[H, W, 1, 3 or 4]")
    notes, values = set(), None
    if pixels.dtype == np.uint16:
        with _failures_named():
            pixels, values = reduce_values(pixels, Deep(kind="16-bit"), spec.depth)
        notes.add("16-bit scaled")
    image = PIL.Image.fromarray(np.ascontiguousarray(pixels))
    flat, more = flatten(image, gray=pixels.ndim == 2)
    return _finish(flat, spec, size=image.size, mode=image.mode, notes=notes | more, values=values)


def _to_8_bits(layers: Sequence[PIL.Image.Image], deep: Deep,
               depth: Depth) -> tuple[PIL.Image.Image, Values | None]:
    pixels = read_values(layers, deep)
    transparent = layers[0].info.get("transparency")
    if transparent is not None and deep.kind == "16-bit":  # one color of 16 bits; after scaling others would equal it
        opaque = (pixels.reshape(*pixels.shape[:2], -1) != np.atleast_1d(transparent)).any(axis=2)
    reduced, values = reduce_values(pixels, deep, depth)
    image = PIL.Image.fromarray(reduced)
    image.info = {key: value for key, value in layers[0].info.items() if key != "transparency"}
    if transparent is not None and deep.kind == "16-bit":
        image.putalpha(PIL.Image.fromarray(opaque.astype(np.uint8) * 255))
    return image, values


def _finish(flat: PIL.Image.Image, spec: PixelSpec, *, size: Size, mode: str, notes: set[str],
            values: Values | None = None, reduction: int = 1, profile: bytes | None = None) -> Decoded:
    """Crop, resize and encode an L or RGB image whose sides the decoder divided by `reduction`."""
    box = crop_box(size, spec)
    if box is None:
        raise BadImage(TOO_SMALL)
    picture = crop_and_resize(flat, box, spec, reduction=reduction)
    notes = set(notes)
    if reduction > 1:
        notes.add("decoder downscaling")
    width, height = picture_size(box, spec)
    if width > box[2] - box[0] or height > box[3] - box[1]:
        notes.add("upscaled")
    picture, note = to_srgb(picture, profile)  # after resizing, because there are fewer pixels then
    notes |= {note} - {None}
    wanted = "L" if spec.channels == 1 else "RGB"
    if picture.mode != wanted:
        notes.add("gray to RGB" if wanted == "RGB" else "RGB to gray")
        picture = picture.convert(wanted)
    pixels = np.asarray(picture)
    return Decoded(png=encode_png(pixels), width=picture.width, height=picture.height, source_size=size,
                   source_mode=mode, notes=tuple(sorted(notes)), pixel_hash=hash_pixels(channels_first(pixels)),
                   values=values)


def _open(data: bytes) -> PIL.Image.Image:
    """Read the header. Raises BadImage, or what Pillow raises."""
    if not data:
        raise BadImage("zero bytes")
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=_formats())
    except PIL.UnidentifiedImageError as error:
        raise BadImage(_why_unidentified(data)) from error
    if image.width * image.height > MAX_PIXELS:  # if a program changed Pillow's own limit
        raise BadImage("too large", f"is {image.width}x{image.height}; at most {MAX_PIXELS:,} pixels are read: save it "
                                    "smaller")
    return image


def _why_unidentified(data: bytes) -> str:
    if _MAGIC.match(data) or (data[4:12] == b"ftypavif" and "AVIF" in _formats()):
        return "corrupt"
    if data[4:8] == b"ftyp" or data[128:132] == b"DICM":  # HEIC photographs of phones, DICOM
        return UNSUPPORTED
    return "not an image"


@cache
def _formats() -> tuple[str, ...]:
    """Return those of our formats that this Pillow was built with."""
    PIL.Image.init()
    return tuple(name for name in _FORMATS if name in PIL.Image.OPEN)


def _orientation(image: PIL.Image.Image, data: bytes) -> int:
    """Return the EXIF orientation, 1 (upright) to 8."""
    # Pillow would decode all pixels of a PNG to read the chunks after them.
    if image.format == "PNG" and not any(word in data for word in _PNG_EXIF):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as in _failures_named; faulty EXIF data do not make the image bad
        return 1
    return value if value in _UPRIGHT else 1


def _upright_size(image: PIL.Image.Image, orientation: int) -> Size:
    if orientation >= 5 and image.format != "TIFF":  # Pillow rotates TIFF itself, as `size` shows
        return image.height, image.width
    return image.size


def _turn_upright(image: PIL.Image.Image, data: bytes) -> PIL.Image.Image:
    orientation = _orientation(image, data)  # Pillow rotated a TIFF while loading it, and removed the tag
    if orientation == 1:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    turned.info = image.info
    return turned


def _frame_count(image: PIL.Image.Image) -> int | None:
    """Return the number of frames in the file, None if a damaged one after the first hides it."""
    with _libtiff_silenced(image):
        try:
            return getattr(image, "n_frames", 1)
        except Exception:  # as in _failures_named; the first frame, which is all we need, may be intact
            return None
        finally:
            image.seek(0)


def _reduce_in_decoder(image: PIL.Image.Image, size: Size, spec: PixelSpec) -> int:
    """Let the JPEG decoder divide the sides, if it may; return by which factor."""
    box = crop_box(size, spec)
    reduction = 1 if box is None or image.format not in ("JPEG", "MPO") else decoder_reduction(box, spec)
    if reduction > 1:
        width = image.width
        _, extent = image.draft(None, (image.width // reduction, image.height // reduction))
        reduction = round(width / extent[2])
    return reduction


def _libtiff_silenced(image: PIL.Image.Image) -> AbstractContextManager[None]:
    return stderr_silenced() if image.format == "TIFF" else nullcontext()


@contextmanager
def _failures_named() -> Iterator[None]:
    """Turn all exceptions that Pillow raises for damaged files into BadImage."""
    try:
        with pillow_silenced():
            yield
    except (BadImage, MemoryError):  # the second is not the file's fault
        raise
    except PIL.Image.DecompressionBombError as error:
        raise BadImage("too large", describe_excess(error)) from error
    except Exception as error:  # damaged files make Pillow raise nearly every kind of exception
        text = str(error).lower()
        if "max_text_" in text:
            raise BadImage("too large", "has a text or a color profile inside that is longer than the "
                           f"{PIL.PngImagePlugin.MAX_TEXT_CHUNK:,} bytes that are read (all together "
                           f"{PIL.PngImagePlugin.MAX_TEXT_MEMORY:,}): save it without") from error
        raise BadImage("truncated" if "truncated" in text or "end of file" in text else "corrupt") from error


@contextmanager
def pillow_silenced() -> Iterator[None]:
    """Drop Pillow's warnings, and its log unless the program handles it; afterwards all is as before."""
    log, deaf = logging.getLogger("PIL"), logging.NullHandler()
    log.addHandler(deaf)  # without any handler, Python prints log messages
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(deaf)


@contextmanager
def stderr_silenced() -> Iterator[None]:
    """Drop everything that this process writes to standard error, as libtiff does, bypassing Python."""
    try:
        screen = os.dup(_STDERR)
    except OSError:  # closed: nothing can be written there
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, _STDERR)
        yield
    finally:
        os.dup2(screen, _STDERR)
        os.close(screen)
        os.close(nowhere)
