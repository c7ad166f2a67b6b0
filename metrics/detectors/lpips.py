"""The learned distance between two images (LPIPS) that the perceptual path length is measured with."""

import os

import torch
from torch import Tensor, nn

from dnnlib.files import sha256_of
from metrics.detectors.files import LPIPS_VGG16
from metrics.detectors.precision import exact_float32
from metrics.detectors.vgg16 import read_network
from metrics.detectors.weights import read_weights

# The layers of VGG16 whose outputs are compared, the last ReLU before each pooling: where they end, their channels.
_LEVELS = ((4, 64), (9, 128), (16, 256), (23, 512), (30, 512))
# Zhang et al. 2018, for images in [-1, 1]
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class PerceptualDistance(nn.Module):
    """LPIPS with VGG16, version 0.1 (Zhang et al. 2018, eq. 1); gradients flow to the images."""

    name = "lpips-vgg16"
    preprocessing = "images as they are, (x - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450] for x in [-1, 1]"

    def __init__(self, vgg16: str | os.PathLike, linear: str | os.PathLike):
        """Take the files of both networks' weights.

        Raises UserError when a file is not of these networks, OSError when it cannot be opened.
        """
        super().__init__()
        layout = {_name(level): torch.Size([1, channels, 1, 1]) for level, (_, channels) in enumerate(_LEVELS)}
        weights = read_weights(linear, layout, LPIPS_VGG16)
        convolutions = read_network(vgg16).features
        starts = (0, *(end for end, _ in _LEVELS))
        self.levels = nn.ModuleList(convolutions[start:end] for start, (end, _) in zip(starts, _LEVELS))
        for level in range(len(_LEVELS)):
            self.register_buffer(f"weight{level}", weights[_name(level)][0])  # [C, 1, 1]
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(3, 1, 1))
        self.weights_sha256 = f"{sha256_of(vgg16)}+{sha256_of(linear)}"
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair, float32 [N].

        a, b: [N, 3, H, W] float in [-1, 1], H and W at least 16

        Raises ValueError when they are not.
        """
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[2:]) < 16:
            raise ValueError(f"images are {list(a.shape)} and {list(b.shape)}; expected two of one shape [N, 3, H, W], "
                             "H and W at least 16")
        with exact_float32():
            x = (torch.cat([a, b]).float() - self.shift) / self.scale
            distance = x.new_zeros(len(a))
            for level, layers in enumerate(self.levels):
                x = layers(x)
                direction = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _EPSILON)
                of_a, of_b = direction.chunk(2)
                weighted = (of_a - of_b).square() * getattr(self, f"weight{level}")
                distance = distance + weighted.sum(dim=1).mean(dim=(1, 2))
        return distance


def _name(level: int) -> str:
    """Return the name of a level's weights in the file."""
    return f"lin{level}.model.1.weight"
