"""A small network with fixed random weights: a fast detector that needs no file."""

import hashlib
import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate

from metrics.detectors.base import Detector
from torch_utils.images import to_unit_range

_SIZE = 64
_CHANNELS = (3, 32, 32, 32, 32)
_KERNEL = 3
_SEED = 1
_STEPS = 1 << 15  # weights are multiples of 1 / _STEPS times their largest
_LARGEST_BIAS = 0.2  # so that units respond to different brightness
_LEAST_DEVIATION = 0.02  # about two of 255 pixel levels: smaller deviations count as equal


class RandomConv(Detector):
    """Four convolutions of stride 2, each with ReLU; features are the means and log deviations of their channels.

    They describe color, contrast and texture at four scales, but not what an image shows: useful to see whether
    training makes progress, not to judge quality.
    """

    name = "random-conv"
    preprocessing = "resized to 64x64 (bilinear, antialiased), x / 127.5 - 1; the network has random weights"
    num_features = 2 * sum(_CHANNELS[1:])

    def __init__(self):
        super().__init__()
        random = np.random.RandomState(_SEED)  # numpy guarantees its numbers for all versions; torch does not
        weights, biases = [], []
        for inputs, outputs in itertools.pairwise(_CHANNELS):
            weights.append(_draw_filters(random, inputs, outputs))
            biases.append(_scaled(_draw_steps(random, (outputs,)), _LARGEST_BIAS))
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)
        self.requires_grad_(False).eval()
        self.weights_sha256 = _digest([*weights, *biases])

    def _features(self, pixels: Tensor) -> Tensor:
        images = to_unit_range(interpolate(pixels.float(), size=(_SIZE, _SIZE), mode="bilinear", antialias=True))
        features = []
        for x in self.layers(images):
            # The logarithm, because differences in color would otherwise hide changes of fine texture.
            features += [x.mean(dim=(2, 3)), (x.std(dim=(2, 3), correction=0) + _LEAST_DEVIATION).log()]
        return torch.cat(features, dim=1)

    def layers(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of the four layers, [N, 32, H / 2, W / 2] to [N, 32, H / 16, W / 16], rounded up.

        images: float32 [N, 3, H, W] in [-1, 1]; gradients flow to them
        """
        x, outputs = images, []
        for weight, bias in zip(self.weights, self.biases):
            x = conv2d(x, weight, bias, stride=2, padding=_KERNEL // 2).relu()
            outputs.append(x)
        return outputs


def _draw_filters(random: np.random.RandomState, inputs: int, outputs: int) -> Tensor:
    """Return filters [O, I, k, k] float32; every other one has zero mean, and so ignores brightness."""
    steps = _draw_steps(random, (outputs, inputs, _KERNEL, _KERNEL))
    taps = _KERNEL**2
    steps[::2] -= steps[::2].sum(axis=(2, 3), keepdims=True) / taps  # sums of integers: the same in any order
    return _scaled(steps, math.sqrt(6 / (inputs * taps)))  # He et al. 2015: variance 2 / fan-in keeps the scale


def _draw_steps(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Return integers from -_STEPS to _STEPS, as float64."""
    return random.randint(-_STEPS, _STEPS + 1, shape, dtype=np.int64).astype(np.float64)


def _scaled(steps: np.ndarray, largest: float) -> Tensor:
    return torch.from_numpy((steps * (largest / _STEPS)).astype(np.float32))


def _digest(tensors: list[Tensor]) -> str:
    """Return the sha256 of the values, as little-endian float32."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().astype("<f4").tobytes())
    return digest.hexdigest()
