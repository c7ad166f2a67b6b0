"""The definition of upfirdn2d, followed step by step, and what it does to the size of one image axis.

With x spread by `up`, padded by `front` and filtered with k taps, output j of one axis is

    y[j] = sum_i x[i] * f[down * j + k - 1 - front - up * i].

With i and j exchanged, the same formula is the derivative: up and down are swapped, the filter is flipped, and the
front padding becomes k - 1 - front. So every derivative is the same op with other arguments.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def upfirdn2d_ref(x: Tensor, f: Tensor, up: tuple[int, int], down: tuple[int, int], padding: tuple[int, int, int, int],
                  flip_filter: bool) -> Tensor:
    """Follow the definition literally: slow, but differentiable in x and f by plain autograd.

    x:  [N, C, H, W];  f: [kh, kw], or [k] for a separable filter;  up, down: (x, y);  padding: (x0, x1, y0, y1)
    """
    kernel = f.to(x.dtype)
    if kernel.ndim == 1:
        kernel = torch.outer(kernel, kernel)
    if not flip_filter:
        kernel = kernel.flip([0, 1])  # F.conv2d correlates, the definition convolves

    num, channels, height, width = x.shape
    spread = x.new_zeros(num * channels, 1, height * up[1], width * up[0])
    spread[:, :, ::up[1], ::up[0]] = x.reshape(num * channels, 1, height, width)
    padded = F.pad(spread, list(padding))  # negative entries crop
    filtered = F.conv2d(padded, kernel[None, None])
    kept = filtered[:, :, ::down[1], ::down[0]]
    return kept.reshape(num, channels, *kept.shape[2:])


@dataclass(frozen=True)
class Axis:
    """Resampling along one image axis."""

    up: int
    down: int
    front: int  # zeros before the first spread sample; negative crops
    back: int

    def output_size(self, size: int, taps: int) -> int:
        return (size * self.up + self.front + self.back - taps) // self.down + 1

    def transposed(self, size: int, taps: int) -> "Axis":
        """Return the axis of the derivative with respect to an input of `size` samples."""
        front = taps - 1 - self.front
        covered = self.output_size(size, taps) * self.down
        return Axis(up=self.down, down=self.up, front=front, back=(size - 1) * self.up + taps - covered - front)
