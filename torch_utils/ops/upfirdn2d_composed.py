"""Upsample, filter and downsample images through strided and transposed depthwise convolutions.

With x spread by `up`, padded by p0 in front and filtered with k taps, output j of one axis is

    y[j] = sum_i x[i] * f[down * j + k - 1 - p0 - up * i].

For up = 1 this is a depthwise convolution of stride `down`. For up > 1 it is a window of the transposed depthwise
convolution of stride `up`, so that no multiplication ever meets an inserted zero (the polyphase form). Read with i and
j exchanged, the same formula is the derivative: up and down change places, the filter is flipped, and the front padding
becomes k - 1 - p0. The op is therefore its own derivative of every order, and no gradient of the constant filter is
ever computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.resampling_axis import Axis


def upfirdn2d_composed(x: Tensor, f: Tensor, up: tuple[int, int], down: tuple[int, int],
                       padding: tuple[int, int, int, int], flip_filter: bool) -> Tensor:
    """Compute what `upfirdn2d_ref` computes; differentiable to any order in x, constant in f.

    x:  [N, C, H, W];  f: [kh, kw], or [k] for a separable filter;  up, down: (x, y);  padding: (x0, x1, y0, y1)
    """
    horizontal = Axis(up[0], down[0], padding[0], padding[1])
    vertical = Axis(up[1], down[1], padding[2], padding[3])
    kernel = f.detach().to(x.dtype)
    if flip_filter:
        kernel = kernel.flip(list(range(kernel.ndim)))
    if kernel.ndim == 2:
        return _Resample.apply(x, kernel, horizontal, vertical)
    still = Axis(up=1, down=1, front=0, back=0)
    rows = _Resample.apply(x, kernel[None, :], horizontal, still)
    return _Resample.apply(rows, kernel[:, None], still, vertical)


class _Resample(torch.autograd.Function):
    """Resample both axes with a two-dimensional kernel [kh, kw]."""

    @staticmethod
    def forward(ctx, x, kernel, horizontal, vertical):
        ctx.save_for_backward(kernel)
        ctx.input_size = x.shape[2:]
        ctx.axes = (horizontal, vertical)
        if horizontal.up == 1 and vertical.up == 1:
            return _strided(x, kernel, horizontal, vertical)
        return _transposed(x, kernel, horizontal, vertical)

    @staticmethod
    def backward(ctx, grad):
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        kernel, = ctx.saved_tensors
        height, width = ctx.input_size
        horizontal = ctx.axes[0].transposed(width, kernel.shape[1])
        vertical = ctx.axes[1].transposed(height, kernel.shape[0])
        return _Resample.apply(grad, kernel.flip([0, 1]), horizontal, vertical), None, None, None


def _depthwise(kernel: Tensor, channels: int) -> Tensor:
    return kernel.expand(channels, 1, *kernel.shape)


def _strided(x: Tensor, kernel: Tensor, horizontal: Axis, vertical: Axis) -> Tensor:
    border = (vertical.front, horizontal.front)
    if border != (vertical.back, horizontal.back) or min(border) < 0:
        x = F.pad(x, [horizontal.front, horizontal.back, vertical.front, vertical.back])
        border = (0, 0)
    weight = _depthwise(kernel.flip([0, 1]), x.shape[1])  # F.conv2d correlates
    return F.conv2d(x, weight, stride=(vertical.down, horizontal.down), padding=border, groups=x.shape[1])


def _transposed(x: Tensor, kernel: Tensor, horizontal: Axis, vertical: Axis) -> Tensor:
    crops, inner = [], []
    for axis, size, taps in ((vertical, x.shape[2], kernel.shape[0]), (horizontal, x.shape[3], kernel.shape[1])):
        wanted = size * axis.up + axis.front + axis.back - taps + 1
        front = taps - 1 - axis.front  # samples of the full transposed convolution before the window
        back = (size - 1) * axis.up + taps - front - wanted
        crop = max(min(front, back), 0)  # what the convolution can leave out itself
        crops.append(crop)
        inner.append((front - crop, back - crop))
    weight = _depthwise(kernel, x.shape[1])
    full = F.conv_transpose2d(x, weight, stride=(vertical.up, horizontal.up), padding=crops, groups=x.shape[1])
    (top, bottom), (left, right) = inner
    if (top, bottom, left, right) != (0, 0, 0, 0):
        full = F.pad(full, [-left, -right, -top, -bottom])
    if (horizontal.down, vertical.down) != (1, 1):
        full = full[:, :, ::vertical.down, ::horizontal.down].contiguous()
    return full
