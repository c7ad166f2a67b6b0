"""Write files of weights that have the true names and shapes, random values, and little size."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn


def write_weights(path: Path, network: nn.Module, changes: dict[str, object] | None = None) -> Path:
    """Write random weights for a network, which may be on the meta device.

    changes: entries to replace; None removes
    """
    tensors = {name: _values(name, tensor.shape) for name, tensor in network.state_dict().items()}
    tensors = {name: value for name, value in (tensors | (changes or {})).items() if value is not None}
    torch.save(tensors, path)
    return path


def _values(name: str, shape: torch.Size) -> Tensor:
    """Return values that keep the scale of features; all windows of one row of numbers, so that a file is small."""
    generator = torch.Generator().manual_seed(len(name))
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    if name.endswith(("running_var", "bn.weight")):
        return 0.5 + torch.rand(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * torch.randn(shape, generator=generator)
    fan_in = math.prod(shape[1:])
    numbers = torch.randn(shape[0] + fan_in, generator=generator) * math.sqrt(2 / fan_in)
    inner = torch.empty(shape[1:], device="meta").stride()
    return numbers.as_strided(shape, (1, *inner))
