"""Which image sizes there are, and crop and resize to them, equal to the original's transforms.

Networks take squares with a power of two a side, within the limits here.
"""

import re
from dataclasses import dataclass, field
from math import ceil, floor
from typing import Literal

import PIL.Image

from dnnlib.cli import UserError
from imagesets.pixel_formats import Depth

Box = tuple[int, int, int, int]  # left, top, right, bottom
Size = tuple[int, int]  # width, height

# A discriminator has a block with an RGB input from 8 on; at 4096 --cfg=auto would pass one image at a time.
MIN_RESOLUTION, MAX_RESOLUTION = 8, 2048
RESOLUTIONS = f"a power of two from {MIN_RESOLUTION} to {MAX_RESOLUTION}"  # for messages
TRANSFORMS = ("center-crop", "center-crop-wide")
_FILTERS = {"box": PIL.Image.Resampling.BOX, "lanczos": PIL.Image.Resampling.LANCZOS}
FILTERS = tuple(_FILTERS)
_DECODER_REDUCTIONS = (8, 4, 2)  # what JPEG decoders do by themselves
_SPARE = 2  # a reduced image has at least this many times the wanted pixels a side, so that our filter still shapes it


def is_power_of_two(number: int) -> bool:
    """Tell whether a whole number is 1, 2, 4, 8, ..."""
    return number >= 1 and number & (number - 1) == 0


def is_resolution(side: int) -> bool:
    """Tell whether networks can be trained on images of this many pixels a side."""
    return is_power_of_two(side) and MIN_RESOLUTION <= side <= MAX_RESOLUTION


def nearest_resolution(side: int, largest: int = MAX_RESOLUTION) -> int:
    """Return the resolution, up to `largest`, that is nearest."""
    powers = [1 << exponent for exponent in range(MIN_RESOLUTION.bit_length() - 1, largest.bit_length())]
    return min(powers, key=lambda power: abs(power - side))


def parse_resolution(text: str) -> tuple[int, int]:
    """Return (width, height) of "256x256"."""
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip())
    if match is None:
        raise UserError(f"--resolution={text}; expected WIDTHxHEIGHT, such as 256x256")
    return int(match[1]), int(match[2])


def check_resolution(width: int, height: int, transform: str | None) -> None:
    """Raise UserError when images of this size would not become squares with a power of two a side."""
    given = f"--resolution={width}x{height}"
    near = nearest_resolution(width)
    if transform == "center-crop-wide":
        if height > width:
            raise UserError(f"{given} is higher than wide; center-crop-wide expects the width first, such as "
                            f"{near}x{near * 3 // 4}")
        if height < 1:
            raise UserError(f"{given} has no height; expected for example {near}x{near * 3 // 4}")
    elif width != height:
        near = nearest_resolution(min(width, height))
        raise UserError(f"{given} is not square; expected equal sides, such as {near}x{near}, or "
                        "--transform=center-crop-wide, which pads with black to a square")
    if not is_resolution(width):
        other = near if transform != "center-crop-wide" else max(1, near * height // max(width, 1))
        raise UserError(f"{given}: {width} is not {RESOLUTIONS}, as networks take; expected for example "
                        f"{near}x{other}")


@dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """What every image of a data set is made to be.

    width, height: of the result, None for the image's own; with center-crop-wide of the picture between black bars
    transform:     None stretches; center-crop takes the largest square; center-crop-wide takes full rows around the
                   middle and puts the picture into a black square of `width`
    exact:         do without the JPEG decoder's own downscaling
    depth:         how images of more than 8 bits become 8 bits

    Raises UserError when the sizes do not fit the transform.
    """

    width: int | None
    height: int | None
    transform: Literal["center-crop", "center-crop-wide"] | None
    resize_filter: Literal["box", "lanczos"]
    channels: Literal[1, 3]
    exact: bool
    depth: Depth = field(default_factory=Depth)

    def __post_init__(self):
        if self.transform not in (None, *TRANSFORMS):
            raise UserError(f"--transform is {self.transform}; expected {' or '.join(TRANSFORMS)}")
        if self.resize_filter not in _FILTERS:
            raise UserError(f"--resize-filter is {self.resize_filter}; expected {' or '.join(FILTERS)}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; expected 1 or 3")
        for name, size in (("width", self.width), ("height", self.height)):
            if size is not None and size < 1:
                raise UserError(f"--{name} is {size}; expected at least 1")
        if self.transform == "center-crop" and (self.width is None) != (self.height is None):
            raise UserError("--transform=center-crop has only one of width and height; give both, as "
                            "--resolution=256x256, or none to keep the square that it cuts")
        if self.transform == "center-crop-wide":
            if self.width is None or self.height is None:
                raise UserError("--transform=center-crop-wide needs the picture's size; give --resolution=WxH, for "
                                "example 256x192")
            if self.height > self.width:
                raise UserError(f"--transform=center-crop-wide is for pictures wider than high, and {self.width}x"
                                f"{self.height} is not; turn the numbers round, or use center-crop")


def crop_box(size: Size, spec: PixelSpec) -> Box | None:
    """Return what is kept of an image of that size, or None when it is too small for center-crop-wide."""
    width, height = size
    if spec.transform is None:
        return (0, 0, width, height)
    if spec.transform == "center-crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return (left, top, left + side, top + side)
    # LIMIT: kept from the original, whose data sets ours must equal: so many rows as the result's width would have at
    # the image's proportions. All columns are kept, so a picture of more than the result's width is stretched upwards.
    rows = round(spec.width * height / width)
    if width < spec.width or rows < spec.height:
        return None
    top = (height - rows) // 2
    return (0, top, width, top + rows)


def picture_size(box: Box, spec: PixelSpec) -> Size:
    """Return the size of the resized picture, without black bars."""
    return (spec.width or box[2] - box[0], spec.height or box[3] - box[1])


def decoder_reduction(box: Box, spec: PixelSpec) -> int:
    """Return by how much the JPEG decoder may divide the image's sides: 1, 2, 4 or 8."""
    if spec.exact:
        return 1
    width, height = picture_size(box, spec)
    for factor in _DECODER_REDUCTIONS:
        if box[2] - box[0] >= _SPARE * factor * width and box[3] - box[1] >= _SPARE * factor * height:
            return factor
    return 1


def crop_and_resize(image: PIL.Image.Image, box: Box, spec: PixelSpec, *, reduction: int = 1) -> PIL.Image.Image:
    """Return the data set's picture of an L or RGB image.

    box:       what to keep, in pixels of the image before `reduction`
    reduction: by how much the decoder has divided the sides already
    """
    size = picture_size(box, spec)
    exact_box = tuple(edge / reduction for edge in box)
    # The crop comes first, as in the original: a filter must not reach over the edge for pixels that are cut off.
    outer = (floor(exact_box[0]), floor(exact_box[1]), ceil(exact_box[2]), ceil(exact_box[3]))
    if outer != (0, 0, *image.size):
        image = image.crop(outer)
    if image.size != size or reduction > 1:
        left, top = outer[:2]
        within = (exact_box[0] - left, exact_box[1] - top, exact_box[2] - left, exact_box[3] - top)
        image = image.resize(size, _FILTERS[spec.resize_filter], box=within)
    if spec.transform == "center-crop-wide":
        square = PIL.Image.new(image.mode, (spec.width, spec.width))
        square.paste(image, (0, (spec.width - spec.height) // 2))
        return square
    return image
