"""Convert features to tensors and check them, for all metrics."""

import warnings

import numpy as np
import torch
from torch import Tensor

_BLOCK = 256  # rows checked at a time: these fit into the CPU's cache


def as_features(features: np.ndarray | Tensor, name: str = "features", *, at_least: int = 0) -> Tensor:
    """Return features as a floating point tensor [N, F], on their device and without copying.

    name:      what they are, for messages
    at_least:  the smallest N allowed

    Raises ValueError if they have another shape or type, are not finite, or are too few.
    """
    if isinstance(features, np.ndarray):
        with warnings.catch_warnings():
            # Memory-mapped arrays are read-only, and nothing here writes to features.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            features = torch.from_numpy(np.ascontiguousarray(features))
    features = features.detach()
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} are {list(features.shape)}; expected [N, F]")
    if not features.is_floating_point():
        raise ValueError(f"{name} are {features.dtype}; expected floating point")
    if len(features) < at_least:
        raise ValueError(f"{name} are of {len(features)} images; expected at least {at_least}")
    finite = sum(int(block.isfinite().count_nonzero()) for block in features.split(_BLOCK))
    if finite < features.numel():
        raise ValueError(f"{name} have {features.numel() - finite} values that are not finite, "
                         f"of {features.numel()}; expected none")
    return features


def as_feature_pair(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Return real [N, F] and fake [M, F] as tensors, see `as_features`, both on the device of the real ones.

    Raises ValueError as `as_features` does, and if F differs.
    """
    real = as_features(real, "real features", at_least=at_least)
    fake = as_features(fake, "fake features", at_least=at_least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, fake ones {fake.shape[1]}; expected equal "
                         "numbers: compute both with the same detector")
    return real, fake.to(real.device)
