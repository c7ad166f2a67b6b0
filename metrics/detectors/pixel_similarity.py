"""A distance of pixels at several scales, without a network."""

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from metrics.detectors.similarity import Similarity

_LEAST = 8  # pixels a side of the coarsest scale


class PixelDistance(Similarity):
    """The mean squared difference of images, of their 2x2 averages, of those of these ..., summed over the scales.

    The finest scale is the image's own, the coarsest the last with 8 pixels a side or more. A window that the lower
    or the right edge cuts averages the pixels it has.
    """

    name = "pixels"
    weights_sha256 = "none"
    preprocessing = "images as they are, x in [-1, 1], and their 2x2 averages down to 8 pixels a side"
    least_size = _LEAST

    def __init__(self):
        super().__init__()
        self.eval()

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Return the image averaged to 8x8 less its mean colour, float32 [N, 192], without gradients.

        An image of one colour has zeros, and no cosine.

        Raises ValueError for other images than `embed` takes.
        """
        self._check_images(images)
        x = adaptive_avg_pool2d(images.float(), _LEAST)
        return (x - x.mean(dim=(2, 3), keepdim=True)).flatten(1)

    def _maps(self, images: Tensor) -> list[Tensor]:
        scales = [images]
        while min(scales[-1].shape[2:]) >= 2 * _LEAST:
            scales.append(avg_pool2d(scales[-1], 2, ceil_mode=True))
        return [x / math.sqrt(x[0].numel()) for x in scales]
