"""The valid image sizes, and cropping and resizing to them, equal to the transforms of the original StyleGAN2-ADA.

Networks take square images whose side is a power of two, within the limits here.
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

# A discriminator has a block with an RGB input from 8 on; at 4096 the batch of --cfg=auto would be 1 per device.
MIN_RESOLUTION, MAX_RESOLUTION = 8, 2048
RESOLUTIONS = f"a power of two from {MIN_RESOLUTION} to {MAX_RESOLUTION}"  # for messages
TRANSFORMS = ("center-crop", "center-crop-wide")
_FILTERS = {"box": PIL.Image.Resampling.BOX, "lanczos": PIL.Image.Resampling.LANCZOS}
FILTERS = tuple(_FILTERS)
_DECODER_REDUCTIONS = (8, 4, 2)  # factors that JPEG decoders support
_SPARE = 2  # a reduced image is at least this many times the target size, so that our filter determines the result


def is_power_of_two(number: int) -> bool:
    """Return whether a whole number is 1, 2, 4, 8, ..."""
    return number >= 1 and number & (number - 1) == 0


def is_resolution(side: int) -> bool:
    """Return whether networks can be trained on square images of this many pixels a side."""
    return is_power_of_two(side) and MIN_RESOLUTION <= side <= MAX_RESOLUTION


def nearest_resolution(side: int, largest: int = MAX_RESOLUTION) -> int:
    """Return the nearest valid resolution up to `largest`."""
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
            raise UserError(f"{given} is taller than wide; --transform=center-crop-wide expects a wide size, such as "
                            f"{near}x{near * 3 // 4}")
        if height < 1:
            raise UserError(f"{given} has the height 0; expected for example {near}x{near * 3 // 4}")
    elif width != height:
        near = nearest_resolution(min(width, height))
        raise UserError(f"{given} is not square; expected equal sides, such as {near}x{near}, or "
                        "--transform=center-crop-wide, which pads with black to a square")
    if not is_resolution(width):
        other = near if transform != "center-crop-wide" else max(1, near * height // max(width, 1))
        raise UserError(f"{given}: {width} is not {RESOLUTIONS}; expected for example "
                        f"{near}x{other}")


@dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """The form to which every image of a data set is converted.

    width, height: of the result, None for the image's own; with center-crop-wide of the part between black bars
    transform:     None stretches; center-crop takes the largest square; center-crop-wide takes full rows around the
                   center and puts them into a black square of side `width`
    exact:         do not use the JPEG decoder's own downscaling
    depth:         how images with more than 8 bits are scaled to 8 bits

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
            raise UserError("--transform=center-crop has only one of width and height; give both, such as "
                            "--resolution=256x256, or neither to keep the size of the square")
        if self.transform == "center-crop-wide":
            if self.width is None or self.height is None:
                raise UserError("--transform=center-crop-wide needs a size; give --resolution=WxH, for example "
                                "256x192")
            if self.height > self.width:
                raise UserError(f"--transform=center-crop-wide needs a width above the height, but the size is "
                                f"{self.width}x{self.height}; swap the numbers, or use center-crop")


def crop_box(size: Size, spec: PixelSpec) -> Box | None:
    """Return the part to keep of an image of this size, or None if it is too small for center-crop-wide."""
    width, height = size
    if spec.transform is None:
        return (0, 0, width, height)
    if spec.transform == "center-crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return (left, top, left + side, top + side)
    # LIMIT: kept from the original, whose data sets ours must equal: as many rows as an image of the result's width
    # and the original's proportions has. All columns are kept, so an image wider than the result is stretched upwards.
    rows = round(spec.width * height / width)
    if width < spec.width or rows < spec.height:
        return None
    top = (height - rows) // 2
    return (0, top, width, top + rows)


def picture_size(box: Box, spec: PixelSpec) -> Size:
    """Return the size of the resized image, without black bars."""
    return (spec.width or box[2] - box[0], spec.height or box[3] - box[1])


def decoder_reduction(box: Box, spec: PixelSpec) -> int:
    """Return by which factor the JPEG decoder may reduce the image: 1, 2, 4 or 8."""
    if spec.exact:
        return 1
    width, height = picture_size(box, spec)
    for factor in _DECODER_REDUCTIONS:
        if box[2] - box[0] >= _SPARE * factor * width and box[3] - box[1] >= _SPARE * factor * height:
            return factor
    return 1


def crop_and_resize(image: PIL.Image.Image, box: Box, spec: PixelSpec, *, reduction: int = 1) -> PIL.Image.Image:
    """Crop and resize an L or RGB image to the form of the data set.

    box:       the part to keep, in pixels of the image before `reduction`
    reduction: by which factor the decoder has already reduced the image
    """
    size = picture_size(box, spec)
    exact_box = tuple(edge / reduction for edge in box)
    # Crop first, as in the original: the filter must not use pixels outside the crop.
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
