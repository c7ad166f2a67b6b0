"""Upsample, FIR-filter and downsample batches of images in one differentiable op."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.compiled import resolve_impl, upfirdn2d_compiled
from torch_utils.ops.upfirdn2d_ref import Axis, upfirdn2d_ref

_SEPARABLE_FROM_TAPS = 8  # shorter 1-D filters cost less as one 2-D pass than as two 1-D passes


def setup_filter(f, device="cpu", normalize: bool = True, flip_filter: bool = False, gain: float = 1,
                 separable: bool | None = None) -> Tensor:
    """Prepare a FIR filter for the ops of this module.

    f:          taps as a tensor, array or list: [k], [kh, kw], a number, or None for the identity
    normalize:  scale the taps to sum 1
    separable:  keep 1-D taps as [k], to be applied along both axes; None: if there are at least 8

    Returns [k] or [kh, kw] float32. Raises ValueError for any other shape.
    """
    taps = torch.as_tensor(1 if f is None else f, dtype=torch.float32, device="cpu")
    if taps.ndim == 0:
        taps = taps[None]
    if taps.ndim > 2 or taps.numel() == 0:
        raise ValueError(f"filter has shape {list(taps.shape)}; expected [k] or [kh, kw] with at least one tap")
    if separable is None:
        separable = taps.ndim == 1 and taps.numel() >= _SEPARABLE_FROM_TAPS
    if taps.ndim == 2 and separable:
        raise ValueError(f"filter has shape {list(taps.shape)}; separable=True expects [k]")
    if taps.ndim == 1 and not separable:
        taps = torch.outer(taps, taps)
    if gain < 0 and taps.ndim == 1:
        raise ValueError(f"filter gain is {gain}; expected a gain >= 0 for a separable filter, which is applied twice")
    if normalize:
        if taps.sum() == 0:
            raise ValueError("filter sums to 0; expected another sum, or normalize=False")
        taps = taps / taps.sum()
    if flip_filter:
        taps = taps.flip(list(range(taps.ndim)))
    taps = taps * gain ** (taps.ndim / 2)  # a separable filter is applied twice
    return taps.to(device)


def upfirdn2d(x: Tensor, f: Tensor | None, up=1, down=1, padding=0, flip_filter: bool = False, gain: float = 1,
              impl: str = "auto") -> Tensor:
    """Spread by `up`, pad, filter, multiply by `gain`, and keep every `down`-th sample.

    x:            [N, C, H, W] floating point
    f:            [kh, kw], [k] (separable) or None (identity); a constant, except that "ref" and "auto"
                  differentiate with respect to it if it requires gradients
    up, down:     integer or (x, y)
    padding:      zeros around the spread image: integer, (x, y) or (x0, x1, y0, y1); negative values crop
    flip_filter:  False convolves, True correlates

    Returns [N, C, (H * up_y + y0 + y1 - kh) // down_y + 1, likewise for W] of x's dtype. Differentiable in x to any
    order. Raises ValueError for malformed arguments.
    """
    differentiates_f = impl in ("auto", "ref") and isinstance(f, Tensor) and f.requires_grad
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"upfirdn2d: x is {x.dtype} {list(x.shape)}; expected floating point [N, C, H, W]")
    f = as_filter(f, x)
    up, down = _pair("up", up), _pair("down", down)
    padding = four_sides(padding)
    for name, size, taps, factor, pad in (("width", x.shape[3], f.shape[-1], up[0], padding[:2]),
                                          ("height", x.shape[2], f.shape[0], up[1], padding[2:])):
        if size * factor + min(pad[0], 0) + min(pad[1], 0) < 0:
            raise ValueError(f"upfirdn2d: padding {pad} crops more than the {name}, which is {size * factor}")
        if size * factor + sum(pad) < taps:
            raise ValueError(f"upfirdn2d: padded {name} is {size * factor + sum(pad)}; expected at least the "
                             f"{taps} taps of the filter")
    impl = "ref" if differentiates_f else resolve_impl("upfirdn2d", impl, x)
    f, gain = _with_gain(f, gain, keeps_exact=impl in ("cpp", "cuda"))
    if impl in ("cpp", "cuda"):
        return upfirdn2d_compiled(x, f, up, down, padding, flip_filter, gain)
    run = upfirdn2d_ref if impl == "ref" else _composed
    y = run(x, f, up, down, padding, flip_filter)
    return y if gain == 1 else y * gain


def _with_gain(f: Tensor, gain: float, *, keeps_exact: bool) -> tuple[Tensor, float]:
    """Multiply the taps by a gain, in their own precision as the original does; return them and the remaining gain.

    keeps_exact: leave powers of four alone, which are exact wherever they are applied

    A separable filter is applied twice, each time with the square root of the gain; a negative sign remains.
    """
    if gain == 1:
        return f, gain
    root = abs(gain) ** 0.5
    if keeps_exact and math.frexp(root)[0] == 0.5:
        return f, gain
    return (f * gain, 1) if f.ndim == 2 else (f * root, 1 if gain > 0 else -1)


def filter2d(x: Tensor, f: Tensor | None, padding=0, flip_filter: bool = False, gain: float = 1,
             impl: str = "auto") -> Tensor:
    """Filter images; with padding=0 their size stays. [N, C, H, W] -> [N, C, H, W]"""
    f = as_filter(f, x)
    margins = _margins(f, lambda taps, i: (taps // 2, (taps - 1) // 2))
    return upfirdn2d(x, f, padding=_added(padding, margins), flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(x: Tensor, f: Tensor | None, up=2, padding=0, flip_filter: bool = False, gain: float = 1,
               impl: str = "auto") -> Tensor:
    """Upsample images by integer factors and keep their mean. [N, C, H, W] -> [N, C, H * up_y, W * up_x]"""
    f = as_filter(f, x)
    factors = _pair("up", up)
    return upfirdn2d(x, f, up=factors, padding=_added(padding, up_margins(f, up)), flip_filter=flip_filter,
                     gain=gain * math.prod(factors), impl=impl)


def downsample2d(x: Tensor, f: Tensor | None, down=2, padding=0, flip_filter: bool = False, gain: float = 1,
                 impl: str = "auto") -> Tensor:
    """Downsample images by integer factors. [N, C, H, W] -> [N, C, H / down_y, W / down_x]"""
    f = as_filter(f, x)
    return upfirdn2d(x, f, down=down, padding=_added(padding, down_margins(f, down)), flip_filter=flip_filter,
                     gain=gain, impl=impl)


def up_margins(f: Tensor, up) -> list[int]:
    """Return (x0, x1, y0, y1), the padding that keeps the image centered when upsampling with f."""
    factors = _pair("up", up)
    return _margins(f, lambda taps, i: ((taps + factors[i] - 1) // 2, (taps - factors[i]) // 2))


def down_margins(f: Tensor, down) -> list[int]:
    """Return (x0, x1, y0, y1), the padding that keeps the image centered when downsampling with f."""
    factors = _pair("down", down)
    return _margins(f, lambda taps, i: ((taps - factors[i] + 1) // 2, (taps - factors[i]) // 2))


def _added(padding, margins: list[int]) -> list[int]:
    return [side + margin for side, margin in zip(four_sides(padding), margins)]


def _margins(f: Tensor, rule) -> list[int]:
    return [*rule(f.shape[-1], 0), *rule(f.shape[0], 1)]


def as_filter(f: Tensor | None, x: Tensor) -> Tensor:
    """Return an `f` argument as a tensor, None as the identity. Raises ValueError for anything else."""
    if f is None:
        return torch.ones(1, 1, dtype=x.dtype, device=x.device)
    if not isinstance(f, Tensor) or f.ndim not in (1, 2) or not f.is_floating_point():
        found = f"{f.dtype} {list(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
        raise ValueError(f"upfirdn2d: filter is {found}; expected a floating point [k] or [kh, kw]: use setup_filter")
    return f


def _pair(name: str, value) -> tuple[int, int]:
    if type(value) is int and value >= 1:  # the usual case; what follows takes as long as a call on a small image
        return value, value
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) != 2 or not all(isinstance(v, Integral) and v >= 1 for v in values):
        raise ValueError(f"upfirdn2d: {name} is {value!r}; expected a positive integer or a pair (x, y)")
    return int(values[0]), int(values[1])


def four_sides(value) -> tuple[int, int, int, int]:
    """Return a `padding` argument as (x0, x1, y0, y1)."""
    if type(value) is int:
        return value, value, value, value
    if type(value) in (list, tuple) and len(value) == 4 and {*map(type, value)} == {int}:
        return tuple(value)
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) == 2:
        values = (values[0], values[0], values[1], values[1])
    if len(values) != 4 or not all(isinstance(v, Integral) for v in values):
        raise ValueError(f"upfirdn2d: padding is {value!r}; expected an integer, (x, y) or (x0, x1, y0, y1)")
    return tuple(int(v) for v in values)


def _composed(x: Tensor, f: Tensor, up: tuple[int, int], down: tuple[int, int], padding: tuple[int, int, int, int],
              flip_filter: bool) -> Tensor:
    """Compute what `upfirdn2d_ref` computes, with f constant, by strided and transposed depthwise convolutions.

    For up = 1 the definition is a depthwise convolution of stride `down`. For up > 1 it is a window of the transposed
    depthwise convolution of stride `up`, which multiplies no inserted zeros (the polyphase form). Its derivative is the
    same op with transposed axes; no gradient of the constant filter is computed.
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


def _strided(x: Tensor, kernel: Tensor, horizontal: Axis, vertical: Axis) -> Tensor:
    border = (vertical.front, horizontal.front)
    if border != (vertical.back, horizontal.back) or min(border) < 0:
        x = F.pad(x, [horizontal.front, horizontal.back, vertical.front, vertical.back])
        border = (0, 0)
    weight = kernel.flip([0, 1]).expand(x.shape[1], 1, *kernel.shape)  # F.conv2d correlates
    return F.conv2d(x, weight, stride=(vertical.down, horizontal.down), padding=border, groups=x.shape[1])


def _transposed(x: Tensor, kernel: Tensor, horizontal: Axis, vertical: Axis) -> Tensor:
    crops, inner = [], []
    for axis, size, taps in ((vertical, x.shape[2], kernel.shape[0]), (horizontal, x.shape[3], kernel.shape[1])):
        wanted = size * axis.up + axis.front + axis.back - taps + 1
        front = taps - 1 - axis.front  # samples of the full transposed convolution before the window
        back = (size - 1) * axis.up + taps - front - wanted
        crop = max(min(front, back), 0)  # what the convolution itself can omit
        crops.append(crop)
        inner.append((front - crop, back - crop))
    weight = kernel.expand(x.shape[1], 1, *kernel.shape)
    full = F.conv_transpose2d(x, weight, stride=(vertical.up, horizontal.up), padding=crops, groups=x.shape[1])
    (top, bottom), (left, right) = inner
    if (top, bottom, left, right) != (0, 0, 0, 0):
        full = F.pad(full, [-left, -right, -top, -bottom])
    if (horizontal.down, vertical.down) != (1, 1):
        full = full[:, :, ::vertical.down, ::horizontal.down].contiguous()
    return full
