"""Upsample, filter and downsample images step by step, exactly as the definition reads."""

import torch
import torch.nn.functional as F
from torch import Tensor


def upfirdn2d_ref(x: Tensor, f: Tensor, up: tuple[int, int], down: tuple[int, int], padding: tuple[int, int, int, int],
                  flip_filter: bool) -> Tensor:
    """Follow the definition literally; slow, and differentiable in x and f by plain autograd.

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
