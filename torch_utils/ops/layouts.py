"""Choose the memory layout of results as the compiled operators do."""

import torch
from torch import Tensor


def empty_as(x: Tensor, size) -> Tensor:
    """Return an empty tensor of x's layout: channels_last where x is just that."""
    is_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
