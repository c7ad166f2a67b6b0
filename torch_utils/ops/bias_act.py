"""Add a bias, apply an activation, scale and clamp, in one differentiable op."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_utils.ops.dispatch import resolve_impl


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


def bias_act(x: Tensor, b: Tensor | None = None, dim: int = 1, act: str = "linear", alpha: float | None = None,
             gain: float | None = None, clamp: float | None = None, impl: str = "auto") -> Tensor:
    """Return clamp(gain * act(x + b)).

    x:      any shape, floating point
    b:      [x.shape[dim]] of x's dtype, or None for no bias
    act:    a name in ACTIVATIONS
    alpha:  slope for negative inputs of lrelu, other activations ignore it; None takes the default
    gain:   factor after the activation; None takes the activation's default
    clamp:  the result is limited to [-clamp, clamp]; None does not limit

    Returns the shape and dtype of x. Differentiable to any order in x and b. Raises ValueError for an unknown
    activation, a bias that does not fit, or a negative clamp.
    """
    resolve_impl("bias_act", impl)  # "ref" and "composed" are the same code
    activation = activation_named(act)
    if clamp is not None and clamp < 0:
        raise ValueError(f"bias_act: clamp is {clamp}; expected a limit >= 0, or None")
    if b is not None:
        x = x + _along(b, x, dim)
    x = activation.apply(x, activation.alpha if alpha is None else alpha)
    gain = activation.gain if gain is None else gain
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def activation_named(act: str) -> Activation:
    """Return an entry of ACTIVATIONS. Raises ValueError for an unknown name."""
    if act not in ACTIVATIONS:
        raise ValueError(f"bias_act: act is {act!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]


def _along(b: Tensor, x: Tensor, dim: int) -> Tensor:
    """Shape the bias so that it broadcasts along one dimension of x."""
    if not -x.ndim <= dim < x.ndim or b.shape != (x.shape[dim],) or b.dtype != x.dtype:
        raise ValueError(f"bias_act: bias is {b.dtype} {list(b.shape)} along dimension {dim} of x, {x.dtype} "
                         f"{list(x.shape)}; expected one value of the same dtype per index of that dimension")
    shape = [1] * x.ndim
    shape[dim] = -1
    return b.reshape(shape)
