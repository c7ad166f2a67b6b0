"""A distance through the random filters of the detector random-conv: quick, without a file."""

import math

from torch import Tensor

from metrics.detectors.random_conv import RandomConv
from metrics.detectors.similarity import Similarity


class RandomConvDistance(Similarity):
    """The mean squared difference of each of the network's four layers, summed over them.

    It sees colour, contrast and texture at four scales, and knows nothing of what is shown.
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
