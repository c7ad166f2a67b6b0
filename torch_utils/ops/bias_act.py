"""Add a bias, apply an activation, scale and clamp, in one differentiable op."""

from torch import Tensor

from torch_utils.ops.bias_act_ref import activation_named, bias_act_ref
from torch_utils.ops.compiled import bias_act_compiled, resolve_impl


def bias_act(x: Tensor, b: Tensor | None = None, dim: int = 1, act: str = "linear", alpha: float | None = None,
             gain: float | None = None, clamp: float | None = None, impl: str = "auto") -> Tensor:
    """Return clamp(gain * act(x + b)).

    x:      any shape, floating point
    b:      [x.shape[dim]] of x's dtype, or None for no bias
    act:    a name in ACTIVATIONS
    alpha:  slope of lrelu for negative inputs, ignored by other activations; None takes the default
    gain:   factor after the activation; None takes the activation's default
    clamp:  the result is limited to [-clamp, clamp]; None does not limit

    Returns the shape and dtype of x. Differentiable to any order in x and b. Implementations differ in two points:
    whether a gradient passes where a result is exactly at the limit, and whether the gradient of linear, relu and
    lrelu, which does not depend on x, has a derivative of zeros or none. Raises ValueError for an unknown activation, a
    bias that does not fit, or a negative clamp.
    """
    activation = activation_named(act)
    if clamp is not None and clamp < 0:
        raise ValueError(f"bias_act: clamp is {clamp}; expected a limit >= 0, or None")
    if b is not None and (not -x.ndim <= dim < x.ndim or b.shape != (x.shape[dim],) or b.dtype != x.dtype):
        raise ValueError(f"bias_act: bias is {b.dtype} {list(b.shape)} along dimension {dim} of x, {x.dtype} "
                         f"{list(x.shape)}; expected one value of the same dtype per index of that dimension")
    alpha = activation.alpha if alpha is None else alpha
    gain = activation.gain if gain is None else gain
    impl = resolve_impl("bias_act", impl, x)
    if b is None and act == "linear" and gain == 1 and clamp is None:
        return x
    # The compiled slope of lrelu follows from the sign of the result, which a negative alpha would hide.
    if impl in ("cpp", "cuda") and not (act == "lrelu" and alpha < 0):
        return bias_act_compiled(x, b, dim, act, alpha, gain, clamp)
    return bias_act_ref(x, b, dim, act, alpha, gain, clamp)  # "composed" too: nothing else is faster
