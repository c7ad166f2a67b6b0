"""Bring what was decided on the host to the images."""

import numpy as np
import torch
from torch import Tensor


def on_device_of(images: Tensor, values: np.ndarray) -> Tensor:
    """Return `values`, floating point ones in the dtype of the images, on their device, without waiting for it."""
    dtype = images.dtype if values.dtype.kind == "f" else None
    return torch.from_numpy(values).to(images.device, dtype, non_blocking=True)
