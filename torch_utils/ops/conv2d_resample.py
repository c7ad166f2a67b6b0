"""Convolve images with upsampling before or downsampling after, in the cheapest equivalent order.

By definition, images are upsampled with the filter, convolved, and downsampled with the filter. Each step is linear
and shift-invariant, so neighboring steps may be swapped:

- a 1x1 convolution commutes with the filter and runs on the smaller image;
- "convolve, filter, keep every n-th" is "filter, convolve with stride n";
- "spread, filter, convolve" is "transposed convolution of stride n, filter".
"""

from numbers import Integral

import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.compiled import resolve_impl
from torch_utils.ops.upfirdn2d import as_filter, down_margins, four_sides, up_margins, upfirdn2d


def conv2d_resample(x: Tensor, w: Tensor, f: Tensor | None = None, up: int = 1, down: int = 1, padding=0,
                    groups: int = 1, flip_weight: bool = True, flip_filter: bool = False,
                    impl: str = "auto") -> Tensor:
    """Convolve x with w, between upsampling by `up` and downsampling by `down`.

    x:            [N, I, H, W]
    w:            [O, I / groups, kh, kw] of x's dtype
    f:            filter of setup_filter for both resamplings, None for the identity
    padding:      of the upsampled image, as in upfirdn2d, in addition to what keeps the filters centered
    impl:         of the filters; "ref" also follows the order of the definition
    flip_weight:  True correlates (as torch does), False convolves

    Returns [N, O, H', W']. Differentiable to any order in x and w. Raises ValueError for malformed factors, padding or
    filter.
    """
    resolve_impl("conv2d_resample", impl, x)
    for name, factor in (("up", up), ("down", down)):
        if not isinstance(factor, Integral) or factor < 1:
            raise ValueError(f"conv2d_resample: {name} is {factor!r}; expected an integer >= 1")
    if f is not None or up > 1 or down > 1:
        f = as_filter(f, x)
    border = four_sides(padding)
    if up > 1:
        border = [side + extra for side, extra in zip(border, up_margins(f, up))]
    if down > 1:
        border = [side + extra for side, extra in zip(border, down_margins(f, down))]

    if impl != "ref" and (up > 1 or down > 1):
        result = _fast_path(x, w, f, up, down, border, groups, flip_weight, flip_filter, impl)
        if result is not None:
            return result
    if up == 1 and border[0] == border[1] >= 0 and border[2] == border[3] >= 0:
        x = _convolve(x, w, groups, flip_weight, padding=(border[2], border[0]))
    else:
        x = upfirdn2d(x, f if up > 1 else None, up, padding=border, flip_filter=flip_filter, gain=up**2, impl=impl)
        x = _convolve(x, w, groups, flip_weight)
    return x if down == 1 else upfirdn2d(x, f, down=down, flip_filter=flip_filter, impl=impl)


def _fast_path(x, w, f, up, down, border, groups, flip_weight, flip_filter, impl) -> Tensor | None:
    """Return the result by an order that filters or convolves fewer samples, or None if there is none."""
    pointwise = w.shape[2:] == (1, 1)
    if up == 1:
        x = upfirdn2d(x, f, down=down if pointwise else 1, padding=border, flip_filter=flip_filter, impl=impl)
        return _convolve(x, w, groups, flip_weight, stride=1 if pointwise else down)
    if pointwise and down == 1:
        x = _convolve(x, w, groups, flip_weight)
        return upfirdn2d(x, f, up, padding=border, flip_filter=flip_filter, gain=up**2, impl=impl)
    x, border = _spread_and_convolve(x, w, up, border, groups, flip_weight)
    x = upfirdn2d(x, f, padding=border, flip_filter=flip_filter, gain=up**2, impl=impl)
    return x if down == 1 else upfirdn2d(x, f, down=down, flip_filter=flip_filter, impl=impl)


def _convolve(x, w, groups, flip_weight, stride=1, padding=0) -> Tensor:
    return F.conv2d(x, w if flip_weight else w.flip([2, 3]), stride=stride, padding=padding, groups=groups)


def _spread_and_convolve(x, w, up, border, groups, flip_weight) -> tuple[Tensor, list[int]]:
    """Convolve the spread image before it is filtered; return it and the border that the filter still has to add.

    A transposed convolution yields every position that w touches: (kw - 1) more than the definition in front, and
    (kw - up) more behind, or (up - kw) fewer, because it ends with the last sample and not with the zeros after it.
    """
    kh, kw = w.shape[2:]
    left, right, top, bottom = (side - extra for side, extra in zip(border, (kw - 1, kw - up, kh - 1, kh - up)))
    crop_x, crop_y = (max(min(-a, -b), 0) for a, b in ((left, right), (top, bottom)))
    out_channels, in_channels = w.shape[:2]
    w = w.unflatten(0, (groups, out_channels // groups)).transpose(1, 2)  # [groups, I / groups, O / groups, kh, kw]
    w = w.reshape(groups * in_channels, out_channels // groups, kh, kw)
    if flip_weight:
        w = w.flip([2, 3])
    x = F.conv_transpose2d(x, w, stride=up, padding=(crop_y, crop_x), groups=groups)
    return x, [left + crop_x, right + crop_x, top + crop_y, bottom + crop_y]
