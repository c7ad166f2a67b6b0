"""Sample images bilinearly at given points, differentiable in the image to any order.

The op is linear in the image, so two maps give derivatives of every order: reading four weighted neighbors, and its
transpose, which spreads a value over the same four. PyTorch's own sampling does not have a second derivative in some
versions; these two need only its first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_bilinear(images: Tensor, grid: Tensor) -> Tensor:
    """Read images at points between their pixels; the outside of an image is zero.

    images: [N, C, H, W] floating point
    grid:   [N, H2, W2, 2] of the same dtype, a constant: (x, y), where -1 and 1 are the outer edges of the image

    Returns [N, C, H2, W2]. Raises ValueError for other shapes and for a grid that requires gradients.
    """
    if images.ndim != 4 or grid.ndim != 4 or grid.shape[0] != images.shape[0] or grid.shape[3] != 2:
        raise ValueError(f"sample_bilinear: images {list(images.shape)} and grid {list(grid.shape)}; "
                         "expected [N, C, H, W] and [N, H2, W2, 2]")
    if grid.requires_grad:
        raise ValueError("sample_bilinear: the grid requires gradients; expected a constant: detach it")
    return _Read.apply(images, grid)


class _Read(torch.autograd.Function):
    """[N, C, H, W] -> [N, C, H2, W2]"""

    @staticmethod
    def forward(ctx, images, grid):
        ctx.save_for_backward(grid)
        ctx.image_size = images.shape[2:]
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx, values):
        grid, = ctx.saved_tensors
        return _Spread.apply(values, grid, ctx.image_size), None


class _Spread(torch.autograd.Function):
    """The transpose of _Read: [N, C, H2, W2] -> [N, C, H, W]"""

    @staticmethod
    def forward(ctx, values, grid, image_size):
        ctx.save_for_backward(grid)
        # The output that is asked for depends only on the shape of this argument.
        shape_only = values.new_empty([*values.shape[:2], *image_size])
        spread, _ = torch.ops.aten.grid_sampler_2d_backward(
            values, shape_only, grid, interpolation_mode=0, padding_mode=0, align_corners=False,
            output_mask=[True, False])
        return spread

    @staticmethod
    def backward(ctx, images):
        grid, = ctx.saved_tensors
        return _Read.apply(images, grid), None, None
