"""LPIPS, the learned distance between two images: for path lengths and projections."""

import os

import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from metrics.detectors.base import LPIPS_VGG16, read_weights
from metrics.detectors.similarity import Similarity, mean_directions
from metrics.detectors.vgg16 import read_network

# The layers of VGG16 whose outputs are compared, the last ReLU before each pooling: end index, channels.
_LEVELS = ((4, 64), (9, 128), (16, 256), (23, 512), (30, 512))
# Zhang et al. 2018, for images in [-1, 1]
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class PerceptualDistance(Similarity):
    """LPIPS with VGG16, version 0.1 (Zhang et al. 2018, eq. 1)."""

    name = "lpips-vgg16"
    preprocessing = "images as they are, (x - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450] for x in [-1, 1]"
    least_size = 16

    def __init__(self, vgg16: str | os.PathLike, linear: str | os.PathLike):
        """Read both files of weights.

        Raises UserError if a file is not of these networks, OSError if it cannot be opened.
        """
        super().__init__()
        names = [f"lin{level}.model.1.weight" for level in range(len(_LEVELS))]  # in the file
        layout = {name: torch.Size([1, channels, 1, 1]) for name, (_, channels) in zip(names, _LEVELS, strict=True)}
        weights = read_weights(linear, layout, LPIPS_VGG16)
        convolutions = read_network(vgg16).features
        starts = (0, *(end for end, _ in _LEVELS))
        self.levels = nn.ModuleList(convolutions[start:end] for start, (end, _) in zip(starts, _LEVELS))
        for level, name in enumerate(names):
            if (weights[name] < 0).any():
                raise UserError(f"{linear}: {name} has values below 0; expected none, as in {LPIPS_VGG16.name}: does "
                                "the file belong to another network?")
            # The root, since differences are squared after weighting: [C, 1, 1].
            self.register_buffer(f"root{level}", weights[name][0].sqrt())
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(3, 1, 1))
        self.weights_sha256 = f"{sha256_of(vgg16)}+{sha256_of(linear)}"
        self.requires_grad_(False).eval()

    def _maps(self, images: Tensor) -> list[Tensor]:
        x, maps = (images - self.shift) / self.scale, []
        for level, layers in enumerate(self.levels):
            x = layers(x)
            maps.append(mean_directions(x) * getattr(self, f"root{level}"))
        return maps
