"""Make the compiled upfirdn2d traceable and differentiable: it is its own derivative of every order."""

import torch
from torch import Tensor

from torch_utils.ops.layouts import empty_as
from torch_utils.ops.resampling_axis import Axis


def upfirdn2d_compiled(x: Tensor, f: Tensor, up: tuple[int, int], down: tuple[int, int],
                       padding: tuple[int, int, int, int], flip_filter: bool, gain: float) -> Tensor:
    """Compute what `upfirdn2d_ref` computes times gain; differentiable to any order in x, constant in f.

    x:  [N, C, H, W];  f: [kh, kw], or [k] for a separable filter;  up, down: (x, y);  padding: (x0, x1, y0, y1)
    """
    return torch.ops.lesion_ops.upfirdn2d(x, f.detach(), up, down, padding, flip_filter, gain)


def register() -> None:
    """Register shapes and derivative. The library has to be loaded."""
    torch.library.register_fake("lesion_ops::upfirdn2d", _fake)
    torch.library.register_autograd("lesion_ops::upfirdn2d", _backward, setup_context=_keep)


def _axes(x_size, f: Tensor, up, down, padding) -> list[tuple[Axis, int, int]]:
    """Return (axis, size, taps) along x and y."""
    return [(Axis(up=up[i], down=down[i], front=padding[2 * i], back=padding[2 * i + 1]), x_size[3 - i],
             f.shape[-1] if i == 0 else f.shape[0]) for i in range(2)]


def _fake(x, f, up, down, padding, flip_filter, gain):
    width, height = (axis.output_size(size, taps) for axis, size, taps in _axes(x.shape, f, up, down, padding))
    return empty_as(x, [x.shape[0], x.shape[1], height, width])


def _keep(ctx, inputs, output):
    x, f, *ctx.arguments = inputs
    ctx.input_size = x.shape
    ctx.save_for_backward(f)


def _backward(ctx, grad):
    up, down, padding, flip_filter, gain = ctx.arguments
    f, = ctx.saved_tensors
    if 0 in ctx.input_size[2:]:  # the formula needs a first sample
        return grad.new_zeros(ctx.input_size), None, None, None, None, None, None
    axes = [axis.transposed(size, taps) for axis, size, taps in _axes(ctx.input_size, f, up, down, padding)]
    sides = [side for axis in axes for side in (axis.front, axis.back)]
    grad_x = torch.ops.lesion_ops.upfirdn2d(grad, f, down, up, sides, not flip_filter, gain)
    return grad_x, None, None, None, None, None, None
