"""Call the compiled upfirdn2d, and tell PyTorch the shape of what it returns."""

import torch
from torch import Tensor

from torch_utils.ops.layouts import empty_as
from torch_utils.ops.resampling_axis import Axis


def upfirdn2d_compiled(x: Tensor, f: Tensor, up: tuple[int, int], down: tuple[int, int],
                       padding: tuple[int, int, int, int], flip_filter: bool, gain: float) -> Tensor:
    """Compute what `upfirdn2d_ref` computes times gain; differentiable to any order in x, constant in f.

    x:  [N, C, H, W];  f: [kh, kw], or [k] for a separable filter;  up, down: (x, y);  padding: (x0, x1, y0, y1)
    """
    return torch.ops.lesion_ops.upfirdn2d.default(x, f, up, down, padding, flip_filter, gain)


def register() -> None:
    """Register the shape. The library has to be loaded."""
    torch.library.register_fake("lesion_ops::upfirdn2d", _fake)


def _fake(x, f, up, down, padding, flip_filter, gain):
    height, width = (
        Axis(up=up[i], down=down[i], front=padding[2 * i], back=padding[2 * i + 1]).output_size(x.shape[3 - i], taps)
        for i, taps in ((1, f.shape[0]), (0, f.shape[-1])))
    return empty_as(x, [x.shape[0], x.shape[1], height, width])
