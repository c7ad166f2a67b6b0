"""The Inception-v3 of FID, KID and IS: the network of 2015, as computed by TensorFlow."""

import io
import os

import torch
from torch import Tensor, nn

from dnnlib.files import sha256_of
from metrics.detectors.base import INCEPTION_V3, Detector, load_weights


class InceptionV3(Detector):
    """torch-fidelity's network: features of the last pooling layer, and the softmax of the outputs without bias.

    The original FID, KID and IS are computed from these.
    """

    name = "inception-v3"
    preprocessing = "resized to 299x299 (bilinear as in TensorFlow 1, not antialiased), (x - 128) / 128"
    num_features = 2048
    has_classes = True

    def __init__(self, weights: str | os.PathLike):
        """Raises UserError if the file is not of this network, OSError if it cannot be opened."""
        super().__init__()
        self.network = unloaded_network()
        load_weights(self.network, weights, INCEPTION_V3)
        self.weights_sha256 = sha256_of(weights)
        self.eval()

    def _features(self, pixels: Tensor) -> Tensor:
        return self.network(pixels)[0]

    def _features_with_classes(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(pixels)
        return features, logits.double().softmax(dim=1).float()


def unloaded_network() -> nn.Module:
    """Return torch-fidelity's network on the meta device, without weights.

    Its constructor would read a file unsafely, running code in it: it is given an empty one.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # here: it takes seconds

    class Network(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.device("meta"):
        return Network("inception-v3", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)
