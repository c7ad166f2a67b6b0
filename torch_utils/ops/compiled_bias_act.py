"""Make the compiled bias_act traceable and differentiable.

Its first and second derivatives are compiled too. Those of linear, relu and lrelu need only the result, which the next
layer keeps anyway, and are constant where they exist; the others are computed from x + b. The third derivative and all
beyond are put together from PyTorch's operators.
"""

import torch
from torch import Tensor

from torch_utils.ops.activations import ACTIVATIONS
from torch_utils.ops.layouts import empty_as

# In the order of the compiled enumeration
NAMES = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")
_PIECEWISE_LINEAR = 3  # the first of NAMES


def bias_act_compiled(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float,
                      clamp: float | None) -> Tensor:
    """Return clamp(gain * act(x + b)); differentiable to any order in x and b.

    x: any shape;  b: [x.shape[dim]];  act: one of NAMES

    Where the result is at the limit of linear, relu or lrelu, no gradient passes.
    """
    return torch.ops.lesion_ops.bias_act(x, b, dim % max(x.ndim, 1), NAMES.index(act), alpha, gain, clamp)


def register() -> None:
    """Register shapes and derivatives. The library has to be loaded."""
    for name, fake, backward, keep in [("bias_act", _fake, _backward, _keep),
                                       ("bias_act_grad", _fake_grad, _backward_grad, _keep_grad),
                                       ("bias_act_grad2", _fake_grad2, _backward_grad2, _keep_grad2)]:
        torch.library.register_fake(f"lesion_ops::{name}", fake)
        torch.library.register_autograd(f"lesion_ops::{name}", backward, setup_context=keep)


def _fake(x, b, dim, act, alpha, gain, clamp):
    return empty_as(x, x.shape)


def _keep(ctx, inputs, output):
    x, b, *ctx.arguments = inputs
    act, clamp = ctx.arguments[1], ctx.arguments[4]
    ctx.biased = b is not None
    if act >= _PIECEWISE_LINEAR:
        ctx.save_for_backward(x, b, None)
    else:
        ctx.save_for_backward(None, None, None if act == 0 and clamp is None else output)


def _backward(ctx, dy):
    sum_bias = ctx.biased and ctx.needs_input_grad[1]
    dx, db = torch.ops.lesion_ops.bias_act_grad(dy, *ctx.saved_tensors, *ctx.arguments, sum_bias)
    return dx, db if sum_bias else None, None, None, None, None, None


def _fake_grad(dy, x, b, out, dim, act, alpha, gain, clamp, sum_bias):
    size = 0 if not sum_bias else dy.shape[dim] if dy.ndim else 1
    return empty_as(dy, dy.shape), dy.new_empty([size])


def _keep_grad(ctx, inputs, output):
    dy, x, b, out, dim, act, alpha, gain, clamp, ctx.sum_bias = inputs
    ctx.arguments = (dim, act, alpha, gain, clamp)
    ctx.shape = dy.shape
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dy if x is not None else None, x, b, out)


def _backward_grad(ctx, ddx, ddb):
    dy, x, b, out = ctx.saved_tensors
    dim = ctx.arguments[0]
    total = ddx
    if ctx.sum_bias and ddb is not None:  # db is the sum of dx
        along = along_dimension(ddb, dim, ctx.shape)
        total = along if total is None else total + along
    if total is None:
        return (None,) * 10
    grad_dy = torch.ops.lesion_ops.bias_act_grad(total, x, b, out, *ctx.arguments, False)[0]
    grad_x = grad_b = None
    if x is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
        grad_x = torch.ops.lesion_ops.bias_act_grad2(total, dy, x, b, *ctx.arguments)
        grad_b = _bias_sum(grad_x, b, dim)
    return grad_dy, grad_x, grad_b, None, None, None, None, None, None, None


def _fake_grad2(ddx, dy, x, b, dim, act, alpha, gain, clamp):
    return empty_as(x, x.shape)


def _keep_grad2(ctx, inputs, output):
    ddx, dy, x, b, *ctx.arguments = inputs
    ctx.save_for_backward(ddx, dy, x, b)


def _backward_grad2(ctx, grad):
    ddx, dy, x, b = ctx.saved_tensors
    dim, act, _, gain, clamp = ctx.arguments
    grad_ddx = torch.ops.lesion_ops.bias_act_grad2(grad, dy, x, b, *ctx.arguments)
    grad_dy = torch.ops.lesion_ops.bias_act_grad2(grad, ddx, x, b, *ctx.arguments)
    grad_x = grad * ddx * dy * gain * _third_derivative(x, b, dim, NAMES[act], gain, clamp)
    return grad_ddx, grad_dy, grad_x, _bias_sum(grad_x, b, dim), None, None, None, None, None


def along_dimension(b: Tensor, dim: int, shape) -> Tensor:
    """Spread a bias over a shape, along one of its dimensions."""
    sizes = [1] * len(shape)
    sizes[dim] = -1
    return b.reshape(sizes).expand(shape)


def _bias_sum(grad: Tensor, b: Tensor | None, dim: int) -> Tensor | None:
    if b is None:
        return None
    others = [d for d in range(grad.ndim) if d != dim]
    return grad.sum(others) if others else grad


def _third_derivative(x: Tensor, b: Tensor | None, dim: int, act: str, gain: float, clamp: float | None) -> Tensor:
    """Return the third derivative of the activation at x + b, zero where the clamp acts."""
    v = x if b is None else x + along_dimension(b, dim, x.shape)
    third = _THIRD[act](v)
    if clamp is None:
        return third
    value = gain * ACTIVATIONS[act].apply(v.detach(), 0.0)
    return torch.where(value.abs() <= clamp, third, 0)


def _logistic_slopes(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first three derivatives of the logistic function."""
    s = torch.sigmoid(v)
    slope = s * (1 - s)
    return slope, slope * (1 - 2 * s), slope * (1 - 6 * slope)


def _third_of_tanh(v: Tensor) -> Tensor:
    t = torch.tanh(v)
    return (1 - t * t) * (6 * t * t - 2)


def _third_of_swish(v: Tensor) -> Tensor:
    _, second, third = _logistic_slopes(v)
    return 3 * second + v * third


_SELU_SCALE = 1.0507009873554804934193349852946 * 1.6732632423543772848170429916717  # Klambauer et al. 2017
_THIRD = {
    "tanh": _third_of_tanh,
    "sigmoid": lambda v: _logistic_slopes(v)[2],
    "elu": lambda v: torch.where(v > 0, 0, v.clamp(max=0).exp()),
    "selu": lambda v: torch.where(v > 0, 0, v.clamp(max=0).exp() * _SELU_SCALE),
    "softplus": lambda v: _logistic_slopes(v)[1],
    "swish": _third_of_swish,
}
