"""A perceptual distance through EfficientNet-lite0, for places without a network."""

import os

from torch import Tensor, nn

from dnnlib.files import sha256_of
from metrics.detectors.efficientnet_lite0 import read_network, scale_pixels
from metrics.detectors.similarity import Similarity, mean_directions

_ENDS = (1, 3, 5, 11, 16)  # of the blocks whose maps have strides 2, 4, 8, 16, 32


class EfficientNetDistance(Similarity):
    """Zhang et al.'s (2018) uncalibrated form, in which all channels weigh 1, with another network than theirs.

    Compared are six levels: the stem's output, after its activation, and that of the last block of each stride. It
    was fitted to no judgements of people, and its values are not those of LPIPS.
    """

    name = "efficientnet-lite0"
    preprocessing = "images as they are, (x - 127) / 128 for x in [0, 255]"
    least_size = 32

    def __init__(self, weights: str | os.PathLike):
        """Raises UserError when the file is not of this network, OSError when it cannot be opened."""
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
