"""Read pictures of any kind and size as images of a network."""

import io
import os
import stat
import sys
from contextlib import nullcontext, suppress

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.disk_failures import retrying
from dnnlib.packed_files import unpack_advice
from dnnlib.progress import Progress
from imagesets.conversion.options import TRANSFORMS
from imagesets.pixels.decode import (
    BEYOND_DEPTH,
    BadImage,
    Decoded,
    decode,
    may_need_range,
    probe,
    probe_range,
)
from imagesets.pixels.depth import Depth, depth_remark, widen
from imagesets.pixels.resize import PixelSpec
from imagesets.reader import ImageSet, excess_of

STRETCH = "none"  # what dataset_tool.py does without --transform
TARGET_TRANSFORMS = (*TRANSFORMS, STRETCH)
DEFAULT_TRANSFORM = "center-crop"

_EXPECTED = "expected an image file, such as a PNG or JPEG"
# What is wrong with a file, by BadImage's reason, and what to give instead.
_REASONS = {
    "zero bytes": f"is empty; {_EXPECTED}",
    "not an image": f"is not an image; {_EXPECTED} (many images, or a data set, go with --data)",
    "unsupported format": "is an image of a format that is not read here; expected another: save it as PNG or JPEG",
    "truncated": "ends too early; expected a whole image: copy or download it again",
    "corrupt": "is damaged; expected a whole image: copy or download it again",
    BEYOND_DEPTH: "has values for which --depth has no place; expected 0 to 2^depth - 1: choose a larger one, or leave "
                  "--depth out",
    "not-a-number pixels": "has pixels that are no finite numbers; expected an image without them",
}


def spec_for(G: nn.Module, transform: str = DEFAULT_TRANSFORM, resize_filter: str = "lanczos",
             exact: bool = False, depth: Depth | None = None) -> PixelSpec:
    """Return what makes pictures into images of a generator.

    G:             with img_resolution and img_channels
    transform:     "center-crop" takes the largest square, "center-crop-wide" the middle in the proportions 4:3, put
                   between black bars, "none" stretches
    resize_filter, exact, depth:  as in PixelSpec

    Raises UserError for unknown values, and for networks whose images are no pictures.
    """
    if transform not in TARGET_TRANSFORMS:
        raise UserError(f"--transform is {transform}; expected {', '.join(TRANSFORMS)} or {STRETCH}")
    if G.img_channels not in (1, 3):
        raise UserError(f"the network of --network makes images of {G.img_channels} channels; expected one of grey or "
                        "RGB images")
    side = G.img_resolution
    return PixelSpec(width=side, height=side * 3 // 4 if transform == "center-crop-wide" else side,
                     transform=None if transform == STRETCH else transform, resize_filter=resize_filter,
                     channels=G.img_channels, exact=exact, depth=depth or Depth())


def prepare(data: bytes, spec: PixelSpec) -> Tensor:
    """Return an image file as a network's image: uint8 [C, R, R]. A picture of its size and channels keeps every pixel.

    Raises BadImage where that cannot be done.
    """
    return _as_tensor(decode(data, spec))


def _as_tensor(found: Decoded) -> Tensor:
    with PIL.Image.open(io.BytesIO(found.png)) as picture:
        pixels = torch.from_numpy(np.array(picture))  # [R, R] or [R, R, 3]
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def read_target(path: str | os.PathLike, G: nn.Module, *, transform: str = DEFAULT_TRANSFORM,
                resize_filter: str = "lanczos", exact: bool = False, depth: Depth | None = None) -> Tensor:
    """Return the picture of --target as an image of the network: uint8 [C, R, R].

    transform, resize_filter, exact, depth:  see spec_for

    Prints a note where the picture's numbers need fewer bits than its file has. Raises UserError, one line, when there
    is no such file, or it is no picture that can be used.
    """
    spec = spec_for(G, transform, resize_filter, exact, depth)
    data = retrying(lambda: _read_file(path), path)
    try:
        found = decode(data, spec)
    except BadImage as error:
        problem = error.detail or (unpack_advice(path) if error.reason == "not an image" else None) or (
            _too_small(data, spec) if error.reason == "smaller than the wide crop" else _REASONS[error.reason])
        raise UserError(f"--target is {path}, which {problem}") from error
    values = found.values
    if values and (remark := depth_remark(f"this {values.kind} image", values.white, values.largest)):
        print(f"--target is {path}: {remark}", file=sys.stderr)
    return _as_tensor(found)


def read_ranges(images: ImageSet, *, shown: bool) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest value of each kind of images that are scaled alike in a whole set, see Depth."""
    ranges: dict[str, tuple[float, float]] = {}
    names = [name for name in images.names if may_need_range(name)]
    with Progress(len(names), "values of 32-bit and float images") if shown else nullcontext() as progress:
        for name in names:
            with suppress(BadImage, UserError):  # told when it is projected
                if (found := probe_range(images.read(name))) is not None:
                    widen(ranges, *found)
            if progress is not None:
                progress.advance()
    return ranges


def _read_file(path: str | os.PathLike) -> bytes:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"--target is {path}, which is a folder; {_EXPECTED} (the images of a folder go with "
                            "--data)")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise UserError(f"--target is {path}, which is a pipe or a device; {_EXPECTED}")
        if excess := excess_of(status.st_size):
            raise UserError(f"--target is {path}, which {excess}")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise UserError(f"--target is {path}, which does not exist; {_EXPECTED}") from error
    except OSError as error:
        raise UserError(f"--target is {path}, which cannot be read ({error.strerror or error}); {_EXPECTED}") from error


def _too_small(data: bytes, spec: PixelSpec) -> str:
    width, height = probe(data)[:2]
    return (f"is {width}x{height}; expected at least {spec.width} pixels of width, and no more than 4:3 of its height, "
            "for --transform=center-crop-wide: use --transform=center-crop")
