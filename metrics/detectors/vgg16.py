"""The VGG16 of precision and recall; LPIPS uses its convolutions."""

import os

import torch
from torch import Tensor, nn

from dnnlib.files import sha256_of
from metrics.detectors.base import VGG16, Detector, load_weights

_SIZE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, for pixels in [0, 1]


class VGG16Features(Detector):
    """The features are the outputs of the second fully connected layer, after its ReLU (Kynkaanniemi et al. 2019)."""

    name = "vgg16"
    preprocessing = ("resized to 224x224 (bilinear as in TensorFlow 1, not antialiased), x / 255, "
                     "(x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]")
    num_features = 4096

    def __init__(self, weights: str | os.PathLike):
        """Raises UserError if the file is not of this network, OSError if it cannot be opened."""
        super().__init__()
        network = read_network(weights)
        self.convolutions = network.features
        self.layers = network.classifier[:5]  # linear, ReLU, dropout, linear, ReLU
        self.register_buffer("mean", 255 * torch.tensor(_MEAN).reshape(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(_STD).reshape(3, 1, 1))
        self.weights_sha256 = sha256_of(weights)
        self.eval()

    def _features(self, pixels: Tensor) -> Tensor:
        # Here: importing it takes seconds, and changes warning filters.
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        x = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(_SIZE, _SIZE), align_corners=False)
        x = self.convolutions((x - self.mean) / self.std)  # [N, 512, 7, 7]
        return self.layers(x.flatten(1))


def read_network(weights: str | os.PathLike) -> nn.Module:
    """Return torchvision's VGG16 with the weights of a file.

    Raises UserError if the file is not of this network, OSError if it cannot be opened.
    """
    import torchvision  # here: importing it takes seconds, and changes warning filters

    with torch.device("meta"):  # skips drawing 138 million random numbers
        network = torchvision.models.vgg16(weights=None)
    load_weights(network, weights, VGG16)
    return network
