"""A small network of fixed random weights: a detector that needs no file and little time."""

import hashlib
import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate

from metrics.detectors.detector import Detector

_SIZE = 64
_CHANNELS = (3, 32, 32, 32, 32)
_KERNEL = 3
_SEED = 1
_SPREAD_OF_BIAS = 0.2  # so that units switch at different brightness


class RandomConv(Detector):
    """Four convolutions of stride 2, each with ReLU; features are means and deviations of each one's channels.

    They describe colour, contrast and texture at four scales, and know nothing of what is shown: good to see whether
    training makes progress, not for statements about quality.
    """

    name = "random-conv"
    preprocessing = "resized to 64x64 (bilinear, antialiased), x / 127.5 - 1; the network has random weights"
    num_features = 2 * sum(_CHANNELS[1:])

    def __init__(self):
        super().__init__()
        # numpy promises that these numbers never change; torch's may with its version and the processor.
        random = np.random.RandomState(_SEED)
        weights, biases = [], []
        for inputs, outputs in itertools.pairwise(_CHANNELS):
            reach = math.sqrt(6 / (inputs * _KERNEL**2))  # He et al. 2015: variance 2 / fan-in keeps the scale
            weights.append(_uniform(random, reach, (outputs, inputs, _KERNEL, _KERNEL)))
            biases.append(_uniform(random, _SPREAD_OF_BIAS, (outputs,)))
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)
        self.requires_grad_(False).eval()
        self.weights_sha256 = _digest([*weights, *biases])

    def _features(self, pixels: Tensor) -> Tensor:
        x = interpolate(pixels.float(), size=(_SIZE, _SIZE), mode="bilinear", antialias=True) / 127.5 - 1
        features = []
        for weight, bias in zip(self.weights, self.biases):
            x = conv2d(x, weight, bias, stride=2, padding=_KERNEL // 2).relu()
            features += [x.mean(dim=(2, 3)), x.std(dim=(2, 3), correction=0)]
        return torch.cat(features, dim=1)


def _uniform(random: np.random.RandomState, reach: float, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(random.uniform(-reach, reach, shape).astype(np.float32))


def _digest(tensors: list[Tensor]) -> str:
    """Return the sha256 of the values, as little-endian float32."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().astype("<f4").tobytes())
    return digest.hexdigest()
