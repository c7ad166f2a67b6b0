"""Fixed numbers for tests of the ops, in every memory layout."""

import torch


def randn(*shape, seed=5, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def every_second(x):
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every_second": every_second,
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand_as(x),
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),  # not aligned to vectors
}


def laid_out(x, layout):
    """Return x in another layout; the values too are others where it is "expanded"."""
    y = LAYOUTS[layout](x)
    assert layout in ("contiguous", "channels_last", "offset") or len(x) == 1 or not y.is_contiguous()
    return y
