"""Know the nine activations of bias_act and their defaults."""

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
