"""The nine activations of bias_act with their defaults, and the op step by step in PyTorch's own operators."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An activation with the defaults that networks use."""

    apply: Callable[[Tensor, float], Tensor]  # (x, alpha)
    alpha: float = 0.0
    gain: float = 1.0  # keeps the variance of a unit normal input near 1 where the activation halves it


_HALVING_GAIN = math.sqrt(2)

# In the order of the enumeration in csrc/calls.h.
ACTIVATIONS = {
    "linear": Activation(lambda x, alpha: x),
    "relu": Activation(lambda x, alpha: F.relu(x), gain=_HALVING_GAIN),
    "lrelu": Activation(F.leaky_relu, alpha=0.2, gain=_HALVING_GAIN),
    "tanh": Activation(lambda x, alpha: torch.tanh(x)),
    "sigmoid": Activation(lambda x, alpha: torch.sigmoid(x)),
    "elu": Activation(lambda x, alpha: F.elu(x)),
    "selu": Activation(lambda x, alpha: F.selu(x)),
    "softplus": Activation(lambda x, alpha: F.softplus(x)),
    "swish": Activation(lambda x, alpha: torch.sigmoid(x) * x, gain=_HALVING_GAIN),
}


def activation_named(act: str) -> Activation:
    """Return an entry of ACTIVATIONS. Raises ValueError for an unknown name."""
    if act not in ACTIVATIONS:
        raise ValueError(f"bias_act: act is {act!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]


def bias_act_ref(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float,
                 clamp: float | None) -> Tensor:
    """Return clamp(gain * act(x + b)); differentiable to any order in x and b by plain autograd.

    x:  any shape;  b: [x.shape[dim]], or None for no bias;  act: a name in ACTIVATIONS;  clamp: None does not limit
    """
    if b is not None:
        sizes = [1] * x.ndim
        sizes[dim] = -1
        x = x + b.reshape(sizes).expand(x.shape)
    x = activation_named(act).apply(x, alpha)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)
