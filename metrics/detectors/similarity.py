"""Distances between two images for path lengths and projections: their interface, and those that need no download.

`PixelDistance` compares pixels at several scales, `RandomConvDistance` the outputs of the detector random-conv,
`EfficientNetDistance` the feature maps of EfficientNet-lite0; LPIPS is in lpips.py.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from dnnlib.files import sha256_of
from metrics.detectors.base import exact_float32
from metrics.detectors.efficientnet_lite0 import read_network, scale_pixels
from metrics.detectors.random_conv import RandomConv

_EPSILON = 1e-10  # of lengths, as in Zhang et al.'s program
_COARSEST = 8  # side in pixels of the coarsest scale of PixelDistance
_ENDS = (1, 3, 5, 11, 16)  # of the EfficientNet blocks with strides 2, 4, 8, 16, 32


class Similarity(nn.Module, ABC):
    """A fixed distance in eval mode: gradients flow only to the images, and images of a batch are independent.

    The distance is split into `embed` and `compare`, so that a target that is compared with many images is embedded
    only once. An image's maps and gradients depend neither on its position in a batch nor on the other images, bit for
    bit; rounding does depend on the batch size, the number of threads and the device.
    """

    name: str  # as in registry.SIMILARITY_NAMES
    weights_sha256: str  # of the files of weights, or of the tensors if there is no file; "none" without weights
    preprocessing: str  # of images before the network, in one line
    least_size: int  # smallest side of images, in pixels

    def embed(self, images: Tensor) -> list[Tensor]:
        """Return maps, float32 [N, Ci, Hi, Wi], whose sum of squared differences is the distance of two images.

        images: floating point [N, 3, H, W] in [-1, 1], H and W at least `least_size`; the caller repeats gray to RGB

        Raises ValueError for anything else.
        """
        self._check_images(images)
        # LIMIT: this covers the forward pass. On a GPU, the backward pass uses the settings at its own time (TF32,
        # autotuning): a caller that needs exact gradients enters exact_float32 around both.
        with exact_float32():
            return self._maps(images.float())

    def compare(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Return the distance of each pair of images, float32 [N].

        a, b: the results of `embed` for N images each, of one size

        Raises ValueError when their shapes differ.
        """
        shapes = [[list(x.shape) for x in maps] for maps in (a, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"maps are {shapes[0]} and {shapes[1]}; expected those of equally many images of one size")
        # One by one: a sum over stacked levels may add them up in another order for other images.
        return sum((x - y).square().sum(dim=(1, 2, 3)) for x, y in zip(a, b, strict=True))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair, float32 [N]; images as in `embed`.

        Raises ValueError for other images, or if their shapes differ.
        """
        if a.shape != b.shape or not self._is_shape_of_images(a):
            raise ValueError(f"images are {list(a.shape)} and {list(b.shape)}; expected two of one shape [N, 3, H, W], "
                             f"H and W at least {self.least_size}")
        return self.compare(self.embed(a), self.embed(b))

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Return a vector for each image, for cosine similarity, without gradients: float32 [N, F].

        images:  as in `embed`

        It is the deepest map averaged over the image, up to a factor that depends only on the size of images.

        Raises ValueError for other images.
        """
        return self.embed(images)[-1].mean(dim=(2, 3))

    @abstractmethod
    def _maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps of float32 [N, 3, H, W], see `embed`."""

    def _check_images(self, images: Tensor) -> None:
        if not (images.is_floating_point() and self._is_shape_of_images(images)):
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; expected floating point [N, 3, H, W], "
                             f"H and W at least {self.least_size}")

    def _is_shape_of_images(self, images: Tensor) -> bool:
        return images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) >= self.least_size


class PixelDistance(Similarity):
    """The mean squared difference of images at full, half, quarter, ... resolution, summed over these scales.

    Scales are 2x2 averages, down to the last one with sides of at least 8 pixels. A window cut by the lower or the
    right edge averages the pixels inside the image.
    """

    name = "pixels"
    weights_sha256 = "none"
    preprocessing = "images as they are, x in [-1, 1], and their 2x2 averages down to 8 pixels a side"
    least_size = _COARSEST

    def __init__(self):
        super().__init__()
        self.eval()

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Return the image averaged to 8x8, minus its mean color: float32 [N, 192], without gradients.

        For an image of one color, this is 0, and its cosine similarity is undefined.

        Raises ValueError for other images than `embed` takes.
        """
        self._check_images(images)
        x = adaptive_avg_pool2d(images.float(), _COARSEST)
        return (x - x.mean(dim=(2, 3), keepdim=True)).flatten(1)

    def _maps(self, images: Tensor) -> list[Tensor]:
        scales = [images]
        while min(scales[-1].shape[2:]) >= 2 * _COARSEST:
            scales.append(avg_pool2d(scales[-1], 2, ceil_mode=True))
        return [x / math.sqrt(x[0].numel()) for x in scales]


class RandomConvDistance(Similarity):
    """The mean squared difference of the outputs of each of the network's four layers, summed over the layers.

    It compares color, contrast and texture at four scales, but not what images show.
    """

    name = "random-conv"
    preprocessing = "images as they are, x in [-1, 1]; the network has random weights"
    least_size = 16

    def __init__(self):
        super().__init__()
        self.network = RandomConv()
        self.weights_sha256 = self.network.weights_sha256
        self.eval()

    def _maps(self, images: Tensor) -> list[Tensor]:
        return [x / math.sqrt(x[0].numel()) for x in self.network.layers(images)]


class EfficientNetDistance(Similarity):
    """The uncalibrated form of Zhang et al. 2018, in which all channels have weight 1, with another network.

    It compares six levels: the output of the stem, after its activation, and of the last block of each stride. It was
    not fitted to human judgments, and its values differ from those of LPIPS.
    """

    name = "efficientnet-lite0"
    preprocessing = "images as they are, (x - 127) / 128 for x in [0, 255]"
    least_size = 32

    def __init__(self, weights: str | os.PathLike):
        """Raises UserError if the file is not of this network, OSError if it cannot be opened."""
        super().__init__()
        network = read_network(weights)
        stem = nn.Sequential(network._conv_stem, network._swish)
        starts = (0, *_ENDS)
        self.levels = nn.ModuleList([stem, *(nn.Sequential(*network._blocks[start:end])
                                             for start, end in zip(starts, _ENDS))])
        self.weights_sha256 = sha256_of(weights)
        self.requires_grad_(False).eval()

    def _maps(self, images: Tensor) -> list[Tensor]:
        x, maps = scale_pixels(127.5 * (images + 1)), []
        for layers in self.levels:
            x = layers(x)
            maps.append(mean_directions(x))
        return maps


def mean_directions(x: Tensor) -> Tensor:
    """Normalize the vectors at all positions of [N, C, H, W] to length 1, scaled so that sums over positions are means.

    This is Zhang et al. 2018, eq. 1, with the factor 1 / (H * W) moved inside the square.
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True) + _EPSILON
    return x / (length * math.sqrt(x.shape[2] * x.shape[3]))
