"""What the metrics ask of a network that turns images into features."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from metrics.detectors.precision import exact_float32


class Detector(nn.Module, ABC):
    """A fixed network; in eval mode and without gradients, so that an image's features are those of its batch of one.

    They agree to float rounding, which depends on the batch size and the device.
    """

    name: str  # as in opening.DETECTOR_NAMES
    weights_sha256: str  # of the file of weights; of the tensors themselves where there is no file
    preprocessing: str  # one line: what happens to pixels before the network
    num_features: int
    has_classes: bool = False  # `classify` works

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features, float32 [N, F].

        pixels: uint8 [N, 3, H, W]; grey images are repeated to RGB by the caller

        Raises ValueError for anything else.
        """
        _check_pixels(pixels)
        with torch.no_grad(), exact_float32():
            return self._features(pixels)

    def classify(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return features, float32 [N, F], and the probabilities of classes, float32 [N, K].

        pixels: as in `forward`

        Raises ValueError for anything else, and where has_classes is False.
        """
        if not self.has_classes:
            raise ValueError(f"{self.name} knows no classes; expected a detector that does: inception-v3")
        _check_pixels(pixels)
        with torch.no_grad(), exact_float32():
            return self._features_with_classes(pixels)

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """Return float32 [N, F] of uint8 [N, 3, H, W]."""

    def _features_with_classes(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def _check_pixels(pixels: Tensor) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape[2:]:
        raise ValueError(f"pixels are {pixels.dtype} {list(pixels.shape)}; expected torch.uint8 [N, 3, H, W]")
