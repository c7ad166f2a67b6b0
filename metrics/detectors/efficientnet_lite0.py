"""EfficientNet-lite0 with ImageNet weights: a detector from a Python package, for use without a download."""

import os

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dnnlib.files import sha256_of
from metrics.detectors.base import EFFICIENTNET_LITE0, Detector, load_weights

_SIZE = 224
_MEAN, _STD = 127, 128  # of the TensorFlow models of these weights; the first layer's statistics agree
_CPU_IMAGES = 4  # at a time on a CPU: twice as fast as 16, since they fit into its caches
# in the network and in each block: a convolution and the batch normalization of its outputs
_PAIRS = (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"),
          ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))


class EfficientNetLite0(Detector):
    """The features are the outputs of the last convolution, averaged over the image."""

    name = "efficientnet-lite0"
    preprocessing = "resized to 224x224 (bilinear, antialiased), (x - 127) / 128"
    num_features = 1280

    def __init__(self, weights: str | os.PathLike):
        """Raises UserError if the file is not of this network, OSError if it cannot be opened."""
        super().__init__()
        self.network = read_network(weights)
        self.weights_sha256 = sha256_of(weights)
        self.eval()

    def _features(self, pixels: Tensor) -> Tensor:
        if pixels.device.type != "cpu":
            return self._average(pixels)
        return torch.cat([self._average(few) for few in pixels.split(_CPU_IMAGES)])

    def _average(self, pixels: Tensor) -> Tensor:
        x = interpolate(pixels.float(), size=(_SIZE, _SIZE), mode="bilinear", antialias=True)
        return self.network.extract_features(scale_pixels(x)).mean(dim=(2, 3))  # of [N, 1280, 7, 7]


def scale_pixels(pixels: Tensor) -> Tensor:
    """Normalize pixels in [0, 255] for the network."""
    return (pixels - _MEAN) / _STD


def read_network(weights: str | os.PathLike) -> nn.Module:
    """Return the network with the weights of a file, in eval mode, with batch normalization folded into convolutions.

    Raises UserError if the file is not of this network, OSError if it cannot be opened.
    """
    from efficientnet_lite_pytorch import EfficientNet  # optional: the extra `offline`

    with torch.device("meta"):
        network = EfficientNet.from_name("efficientnet-lite0")
    load_weights(network, weights, EFFICIENTNET_LITE0)
    for part in (network, *network._blocks):
        _fold_normalization(part)
        part._swish = nn.ReLU6(inplace=True)
    return network.requires_grad_(False).eval()


def _fold_normalization(part: nn.Module) -> None:
    """Fold batch normalization into the convolutions of a network, or of one of its blocks."""
    for conv_name, norm_name in _PAIRS:
        conv, norm = getattr(part, conv_name, None), getattr(part, norm_name, None)
        if conv is not None and norm is not None:
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            setattr(part, norm_name, nn.Identity())
