"""Features as tensors, checked: what each metric takes."""

import warnings

import numpy as np
import torch
from torch import Tensor

_BLOCK = 4096  # features checked at a time: bounds the memory


def as_features(features: np.ndarray | Tensor, name: str = "features", *, at_least: int = 0) -> Tensor:
    """Return features as a tensor [N, F], floating point, where they are and without copying.

    name:      what they are, for the message
    at_least:  the least N

    Raises ValueError when they have another shape or type, are not finite, or are too few.
    """
    if isinstance(features, np.ndarray):
        with warnings.catch_warnings():
            # Arrays mapped from a file are read-only, and nothing here writes into features.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            features = torch.from_numpy(np.ascontiguousarray(features))
    features = features.detach()
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} are {list(features.shape)}; expected [N, F]")
    if not features.is_floating_point():
        raise ValueError(f"{name} are {features.dtype}; expected floating point")
    if len(features) < at_least:
        raise ValueError(f"{name} are of {len(features)} images; expected at least {at_least}")
    finite = sum(int(block.isfinite().sum()) for block in features.split(_BLOCK))
    if finite < features.numel():
        raise ValueError(f"{name} have {features.numel() - finite} values that are not finite, "
                         f"of {features.numel()}; expected none")
    return features


def as_feature_pair(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Return real [N, F] and fake [M, F] as `as_features` does, on the device of the real ones.

    Raises ValueError as `as_features` does, and when F differs.
    """
    real = as_features(real, "real features", at_least=at_least)
    fake = as_features(fake, "fake features", at_least=at_least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, fake ones {fake.shape[1]}; expected as many: "
                         "take both from one detector")
    return real, fake.to(real.device)
