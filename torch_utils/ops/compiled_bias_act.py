"""Call the compiled bias_act, and tell PyTorch the shapes of what it returns.

Its first and second derivatives are compiled too. Those of linear, relu and lrelu need only the result, which the next
layer keeps anyway, and are constant where they exist; the others are computed from x + b. The third derivative and all
beyond are put together from PyTorch's operators.
"""

import torch
from torch import Tensor

from torch_utils.ops.layouts import empty_as

# In the order of the compiled enumeration
NAMES = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")


def bias_act_compiled(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float,
                      clamp: float | None) -> Tensor:
    """Return clamp(gain * act(x + b)); differentiable to any order in x and b.

    x: any shape;  b: [x.shape[dim]];  act: one of NAMES

    Where the result is at the limit of linear, relu or lrelu, no gradient passes.
    """
    return torch.ops.lesion_ops.bias_act.default(x, b, dim % max(x.ndim, 1), NAMES.index(act), alpha, gain, clamp)


def register() -> None:
    """Register shapes. The library has to be loaded."""
    for name, fake in [("bias_act", _fake), ("bias_act_grad", _fake_grad), ("bias_act_grad2", _fake_grad2)]:
        torch.library.register_fake(f"lesion_ops::{name}", fake)


def _fake(x, b, dim, act, alpha, gain, clamp):
    return empty_as(x, x.shape)


def _fake_grad(dy, x, b, out, dim, act, alpha, gain, clamp, sum_bias):
    size = 0 if not sum_bias else dy.shape[dim] if dy.ndim else 1
    return empty_as(dy, dy.shape), dy.new_empty([size])


def _fake_grad2(ddx, dy, x, b, dim, act, alpha, gain, clamp):
    return empty_as(x, x.shape)
