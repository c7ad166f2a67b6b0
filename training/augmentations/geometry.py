"""Transform images geometrically: flips, rotations, translations and scalings, in one resampling (ADA, appendix B.1).

Coordinates are (x, y) in pixels from the center of the image, y downwards.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.grid_sample import sample_bilinear
from torch_utils.ops.upfirdn2d import downsample2d, upsample2d
from training.augmentations.draws import AugmentStrengths, Draws, on_device_of, rotation_probability

# The center of gravity of the sym6 low-pass lies 0.4 samples before the middle of its taps, which shifts the content of
# the doubled image by that much. The transform rotates about the shifted center, rounded to the nearest half.
_FILTER_DELAY = -0.5
# Source pixels around its position that an output pixel reads: bilinear neighbors, and the taps of the upsampling.
_READING_REACH = 4


@dataclass(frozen=True)
class SourceMap:
    """Where the pixels of the result come from: source = linear @ position + shift, one map per image.

    linear: [N, 2, 2] float64;  shift: [N, 2] float64

    A further transform of the image composes its inverse on the side of `position`.
    """

    linear: np.ndarray
    shift: np.ndarray

    @classmethod
    def identity(cls, count: int) -> "SourceMap":
        return cls(np.tile(np.eye(2), (count, 1, 1)), np.zeros((count, 2)))

    def scaled(self, x: np.ndarray, y: np.ndarray) -> "SourceMap":
        """Scale the image by the factors x and y, each [N]."""
        return SourceMap(self.linear / np.stack([x, y], axis=1)[:, None, :], self.shift)

    def turned(self, angle: np.ndarray) -> "SourceMap":
        """Rotate the image by `angle` [N] radians, from y to x."""
        cos, sin = np.cos(angle), np.sin(angle)
        return SourceMap(self.linear @ np.moveaxis(np.array([[cos, -sin], [sin, cos]]), 2, 0), self.shift)

    def moved(self, x: np.ndarray, y: np.ndarray) -> "SourceMap":
        """Translate the image by x and y pixels, each [N]."""
        return SourceMap(self.linear, self.shift - (self.linear @ np.stack([x, y], axis=1)[:, :, None])[:, :, 0])

    def differs(self) -> np.ndarray:
        """Tell which images are changed. -> [N] bool"""
        return (self.linear != np.eye(2)).any(axis=(1, 2)) | (self.shift != 0).any(axis=1)

    def of(self, images: np.ndarray) -> "SourceMap":
        """Return the maps of the images with these indices [M]."""
        return SourceMap(self.linear[images], self.shift[images])


def draw_source_map(strengths: AugmentStrengths, draws: Draws, p: float, images: Tensor) -> SourceMap:
    """Turn the draws into one map for each of the images [N, C, H, W]."""
    count, _, height, width = images.shape
    source = SourceMap.identity(count)

    sign = 1 - 2 * draws.choice("xflip", strengths.xflip * p, 2)[:, 0]
    source = source.scaled(sign, np.ones(count))
    source = source.turned(draws.choice("rotate90", strengths.rotate90 * p, 4)[:, 0] * (math.pi / 2))
    step = draws.symmetric("xint", strengths.xint * p) * strengths.xint_max
    source = source.moved(np.round(step[:, 0] * width), np.round(step[:, 1] * height))

    factor = np.exp2(draws.normal("scale", strengths.scale * p)[:, 0] * strengths.scale_std)
    source = source.scaled(factor, factor)
    angles = draws.symmetric("rotate", rotation_probability(strengths.rotate, p)) * (math.pi * strengths.rotate_max)
    source = source.turned(angles[:, 0])
    factor = np.exp2(draws.normal("aniso", strengths.aniso * p)[:, 0] * strengths.aniso_std)
    source = source.scaled(factor, 1 / factor)
    source = source.turned(angles[:, 1])
    step = draws.normal("xfrac", strengths.xfrac * p) * strengths.xfrac_std
    return source.moved(step[:, 0] * width, step[:, 1] * height)


def resample(images: Tensor, source: SourceMap, taps: Tensor) -> Tensor:
    """Resample images by their source maps, at twice the resolution in between (ADA paper, appendix B.1).

    images: [N, C, H, W] float32 or float64, H and W at least 2
    taps:   [k] low-pass for upsampling and, mirrored, for downsampling

    Images with an identity map are returned bit for bit, at no cost.
    """
    changed = np.flatnonzero(source.differs())
    if len(changed) == 0:
        return images
    if len(changed) == len(images):
        return _resample_all(images, source, taps)
    rows = on_device_of(images, changed)
    moved = _resample_all(images.index_select(0, rows), source.of(changed), taps)
    return images.index_copy(0, rows, moved)


def _resample_all(images: Tensor, source: SourceMap, taps: Tensor) -> Tensor:
    edge = len(taps) // 4  # result pixels outside the image that downsampling reads
    left, right, top, bottom = _margins(source, edge, images.shape)
    doubled = upsample2d(reflect_pad(images, left, right, top, bottom), taps, up=2)
    offset = (left - right) / 2, (top - bottom) / 2  # of the old center in the padded image
    grid = _sampling_grid(source, offset, images, doubled.shape, edge)
    return downsample2d(sample_bilinear(doubled, grid), taps, down=2, padding=-2 * edge, flip_filter=True)


def _margins(source: SourceMap, edge: int, shape) -> list[int]:
    """Return the padding that these maps need, at most the image's size minus 1: left, right, top, bottom."""
    most = np.array([shape[3] - 1, shape[2] - 1])
    reach = abs(source.linear) @ (most / 2 + edge)  # of any point of the result, along x and y: [N, 2]
    beyond = np.stack([reach - source.shift, reach + source.shift], axis=2) + _READING_REACH - most[:, None] / 2
    return np.clip(np.ceil(beyond.max(axis=0)), 0, most[:, None]).astype(int).flatten().tolist()


def _sampling_grid(source: SourceMap, offset: tuple[float, float], images: Tensor, doubled_shape, edge: int) -> Tensor:
    """Return the grid of positions to sample in the doubled image: [N, 2 (H + 2 edge), 2 (W + 2 edge), 2], in [-1, 1].

    A sample of the result at `position` (in half pixels from the center) shows the content of position - delay, and the
    doubled image shows that of `source` at source + delay.
    """
    like = {"dtype": images.dtype, "device": images.device}
    columns, rows = 2 * (images.shape[3] + 2 * edge), 2 * (images.shape[2] + 2 * edge)
    xs = torch.linspace(-(columns - 1) / 2, (columns - 1) / 2, columns, **like)
    ys = torch.linspace(-(rows - 1) / 2, (rows - 1) / 2, rows, **like)
    unit = 2 / np.array([doubled_shape[3], doubled_shape[2]])  # half a pixel, where the image is 2 wide
    start = 2 * (source.shift + offset) + _FILTER_DELAY - source.linear.sum(axis=2) * _FILTER_DELAY
    maps = np.concatenate([source.linear, start[:, :, None]], axis=2) * unit[:, None]  # [N, 2, 3]
    per_x, per_y, start = on_device_of(images, maps).unsqueeze(3).unbind(2)  # [N, 2, 1] each
    planes = (per_x * xs).unsqueeze(2) + torch.addcmul(start, per_y, ys).unsqueeze(3)  # [N, 2, rows, columns]
    return planes.permute(0, 2, 3, 1)


def reflect_pad(images: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """Pad by reflection about the centers of the border pixels, repeatedly if an image is small.

    images: [N, C, H, W], H and W at least 2;  left, right, top, bottom: pixels to add, 0 or more
    """
    while max(left, right, top, bottom) > 0:
        # One reflection adds at most size - 1 pixels. After a full step the border is again an axis of symmetry of the
        # periodic pattern, so that the next round continues it; after a smaller step it would not be.
        height, width = images.shape[2:]
        step = [min(left, width - 1), min(right, width - 1), min(top, height - 1), min(bottom, height - 1)]
        images = F.pad(images, step, mode="reflect")
        left, right, top, bottom = left - step[0], right - step[1], top - step[2], bottom - step[3]
    return images
