"""Move images about: flips, turns, translations and scalings, in one resampling.

Coordinates are (x, y) in pixels from the centre of the image, y downwards.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_utils.ops.grid_sample import sample_bilinear
from torch_utils.ops.upfirdn2d import downsample2d, upsample2d
from training.augmentations.draws import Draws, rotation_probability
from training.augmentations.padding import reflect_pad
from training.augmentations.strengths import AugmentStrengths

# The sym6 low-pass has its centre of gravity 0.4 samples in front of the middle of its taps: that is how far the
# content of the doubled image is displaced. The transform turns about the displaced centre, to the nearest half.
_FILTER_DELAY = -0.5
# Source pixels that an output pixel reads around its own place: bilinear neighbours, and the taps of the upsampling.
_READING_REACH = 4


@dataclass(frozen=True)
class SourceMap:
    """Where the pixels of the result come from: source = linear @ place + shift, one map an image.

    linear: [N, 2, 2];  shift: [N, 2]

    Transforming the image further composes the inverse of the new transform on the side of `place`. The products are
    written out because matrix multiplication may round to TF32, which is a quarter of a pixel at 256.
    """

    linear: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, count: int, *, dtype: torch.dtype, device: torch.device) -> "SourceMap":
        linear = torch.eye(2, dtype=dtype, device=device).expand(count, 2, 2)
        return cls(linear, torch.zeros(count, 2, dtype=dtype, device=device))

    def apply_linear(self, vectors: Tensor) -> Tensor:
        """[N, 2] -> [N, 2] without the shift"""
        return (self.linear * vectors[:, None, :]).sum(2)

    def scaled(self, x: Tensor, y: Tensor) -> "SourceMap":
        """Enlarge the image by the factors x and y, each [N]."""
        return SourceMap(self.linear / torch.stack([x, y], dim=1)[:, None, :], self.shift)

    def turned(self, angle: Tensor) -> "SourceMap":
        """Turn the image by `angle` [N] radians, from y to x."""
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        column_x, column_y = self.linear.unbind(2)
        return SourceMap(torch.stack([column_x * cos + column_y * sin, column_y * cos - column_x * sin], dim=2),
                         self.shift)

    def moved(self, x: Tensor, y: Tensor) -> "SourceMap":
        """Move the image by x and y pixels, each [N]."""
        return SourceMap(self.linear, self.shift - self.apply_linear(torch.stack([x, y], dim=1)))

    def differs(self) -> Tensor:
        """Tell which images are changed. -> [N] bool"""
        turned = (self.linear != torch.eye(2, dtype=self.linear.dtype, device=self.linear.device)).flatten(1).any(1)
        return turned | (self.shift != 0).any(1)


def draw_source_map(strengths: AugmentStrengths, draws: Draws, p: Tensor, images: Tensor) -> SourceMap:
    """Turn the draws into one map for each of the images [N, C, H, W]. p: scalar"""
    count, _, height, width = images.shape
    source = SourceMap.identity(count, dtype=images.dtype, device=images.device)

    sign = 1 - 2 * draws.choice("xflip", strengths.xflip * p, 2)[:, 0]
    source = source.scaled(sign, torch.ones_like(sign))
    source = source.turned(draws.choice("rotate90", strengths.rotate90 * p, 4)[:, 0] * (math.pi / 2))
    step = draws.symmetric("xint", strengths.xint * p) * strengths.xint_max
    source = source.moved((step[:, 0] * width).round(), (step[:, 1] * height).round())

    factor = (draws.normal("scale", strengths.scale * p)[:, 0] * strengths.scale_std).exp2()
    source = source.scaled(factor, factor)
    angles = draws.symmetric("rotate", rotation_probability(strengths.rotate, p)) * (math.pi * strengths.rotate_max)
    source = source.turned(angles[:, 0])
    factor = (draws.normal("aniso", strengths.aniso * p)[:, 0] * strengths.aniso_std).exp2()
    source = source.scaled(factor, 1 / factor)
    source = source.turned(angles[:, 1])
    step = draws.normal("xfrac", strengths.xfrac * p) * strengths.xfrac_std
    return source.moved(step[:, 0] * width, step[:, 1] * height)


def resample(images: Tensor, source: SourceMap, taps: Tensor) -> Tensor:
    """Fill images from their source places, at twice the resolution in between (ADA paper, appendix B.1).

    images: [N, C, H, W] float32 or float64, H and W at least 2
    taps:   [k] low-pass for the doubling and, mirrored, the halving

    Images that the map leaves in place come back bit for bit. Reads the margins back to the host: one synchronisation.
    """
    differs = source.differs()
    edge = len(taps) // 4  # result pixels outside the image that the halving reads
    *margins, any_differs = torch.cat([_margins(source, edge, images), differs.any()[None]]).int().tolist()
    if not any_differs:
        return images
    left, right, top, bottom = margins
    doubled = upsample2d(reflect_pad(images, left, right, top, bottom), taps, up=2)
    offset = (left - right) / 2, (top - bottom) / 2  # of the old centre in the padded image
    grid = _sampling_grid(source, offset, images.shape, doubled.shape, edge)
    moved = downsample2d(sample_bilinear(doubled, grid), taps, down=2, padding=-2 * edge, flip_filter=True)
    return torch.where(differs[:, None, None, None], moved, images)


def _margins(source: SourceMap, edge: int, images: Tensor) -> Tensor:
    """Return the padding that the batch needs, at most the image's size less one: left, right, top, bottom."""
    most = torch.tensor([images.shape[3] - 1, images.shape[2] - 1], dtype=images.dtype, device=images.device)
    corner = most / 2 + edge
    reach = (source.linear.abs() * corner).sum(2)  # of any point of the result, along x and y: [N, 2]
    beyond = torch.stack([reach - source.shift, reach + source.shift], dim=2) + _READING_REACH - most[:, None] / 2
    return beyond.amax(0).ceil().clamp(min=0).minimum(most[:, None]).flatten()


def _sampling_grid(source: SourceMap, offset: tuple[float, float], shape, doubled_shape, edge: int) -> Tensor:
    """Return where to read in the doubled image: [N, 2 (H + 2 edge), 2 (W + 2 edge), 2], -1 to 1 from side to side.

    A sample of the result at `place` (half pixels from the centre) shows the content of place - delay, and the doubled
    image shows that of `source` at source + delay.
    """
    like = {"dtype": source.shift.dtype, "device": source.shift.device}
    height, width = 2 * (shape[2] + 2 * edge), 2 * (shape[3] + 2 * edge)
    xs = torch.arange(width, **like) - (width - 1) / 2 - _FILTER_DELAY
    ys = torch.arange(height, **like) - (height - 1) / 2 - _FILTER_DELAY
    axes = []
    for axis, size in ((0, doubled_shape[3]), (1, doubled_shape[2])):
        along_x, along_y = (source.linear[:, axis] * (2 / size)).unbind(1)
        start = (2 * (source.shift[:, axis] + offset[axis]) + _FILTER_DELAY) * (2 / size)
        rows = ys * along_y[:, None] + start[:, None]
        axes.append(xs * along_x[:, None, None] + rows[:, :, None])
    return torch.stack(axes, dim=3)
