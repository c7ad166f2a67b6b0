"""Bias, activation, gain and clamp: agreement of implementations, derivatives, formulas, errors."""

import math
import re

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.helpers.op_cases import (
    BIAS_ACT_CASES,
    COMPARED,
    CPU_IMPLEMENTATIONS,
    HALF_DTYPES,
    assert_equals_reference,
    ids,
    unit_roundoff,
)
from torch_utils.ops import compiled
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.bias_act_ref import ACTIVATIONS

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017


def _logistic(x):
    return 1 / (1 + math.exp(-x))


# Number in, number out, with the default slope and before the gain.
FORMULAS = {
    "linear": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "lrelu": lambda x: x if x > 0 else 0.2 * x,
    "tanh": math.tanh,
    "sigmoid": _logistic,
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "selu": lambda x: SELU_SCALE * (x if x > 0 else SELU_ALPHA * math.expm1(x)),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "swish": lambda x: x * _logistic(x),
}
GAINS = dict.fromkeys(FORMULAS, 1.0) | dict.fromkeys(("relu", "lrelu", "swish"), math.sqrt(2))


@pytest.mark.parametrize(("impl", "device"), COMPARED)
@pytest.mark.parametrize("case", **ids(BIAS_ACT_CASES))
def test_bias_act_every_implementation_equals_reference(case, impl, device):
    assert_equals_reference(case, impl, device)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", **ids(BIAS_ACT_CASES))
def test_bias_act_derivatives_pass_numerical_checks(case, impl):
    def op(*inputs):
        return case.run(*inputs, impl=impl)

    assert gradcheck(op, case.inputs())
    assert gradgradcheck(op, case.inputs(), fast_mode=True)


@pytest.mark.parametrize("act", FORMULAS)
def test_bias_act_equals_formula(act):
    x = torch.tensor([[-3.0, -0.5, 0.0], [0.25, 1.5, 4.0]], dtype=torch.float64)
    b = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    expected = torch.tensor([[GAINS[act] * FORMULAS[act](v + offset) for v, offset in zip(row, b.tolist())]
                             for row in x.tolist()], dtype=torch.float64)
    # Ten roundings of float64 numbers near 5.
    torch.testing.assert_close(bias_act(x, b, act=act), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(bias_act(x, b, act=act, gain=-3), expected * (-3 / GAINS[act]), rtol=0, atol=5e-14)
    torch.testing.assert_close(bias_act(x, b, act=act, clamp=0.3), expected.clamp(-0.3, 0.3), rtol=0, atol=1e-14)


def test_activations_are_the_nine_with_a_formula():
    assert set(ACTIVATIONS) == set(FORMULAS)


def test_bias_act_clamp_comes_after_gain():
    x = torch.tensor([[-3.0, 1.0, 3.0]])
    assert bias_act(x, gain=2, clamp=4).tolist() == [[-4.0, 2.0, 4.0]]
    assert bias_act(x, clamp=0).tolist() == [[0.0, 0.0, 0.0]]


def test_bias_act_clamped_values_pass_no_gradient():
    x = torch.tensor([-3.0, 1.0, 3.0]).requires_grad_()
    gradient, = torch.autograd.grad(bias_act(x, dim=0, gain=2, clamp=4).sum(), x)
    assert gradient.tolist() == [0.0, 2.0, 0.0]


def test_bias_act_alpha_is_the_slope_of_lrelu():
    x = torch.tensor([[-2.0, 2.0]])
    assert bias_act(x, act="lrelu", alpha=0.5, gain=1).tolist() == [[-1.0, 2.0]]
    assert bias_act(x, act="lrelu", alpha=0, gain=1).tolist() == [[0.0, 2.0]]


def test_bias_act_linear_default_returns_the_values():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(bias_act(x), x)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_bias_act_bias_goes_along_dim(dim):
    x = torch.zeros(2, 3, 4)
    b = torch.arange(1.0, x.shape[dim] + 1)
    y = bias_act(x, b, dim=dim).movedim(dim, 0).flatten(1)
    assert torch.equal(y, b[:, None].expand_as(y))


@pytest.mark.parametrize("act", FORMULAS)
def test_bias_act_large_inputs_stay_finite_with_their_gradients(act):
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]]).requires_grad_()
    y = bias_act(x, act=act)
    first, = torch.autograd.grad(y.sum(), x, create_graph=act != "linear")
    assert y.isfinite().all()
    assert first.isfinite().all()


@pytest.mark.parametrize("act", FORMULAS)
def test_bias_act_empty_batch_stays_empty(act):
    x = torch.zeros(0, 3, 4, 4).requires_grad_()
    y = bias_act(x, torch.zeros(3), act=act, clamp=1)
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_bias_act_layout_of_the_input_does_not_matter():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    b = torch.tensor([1.0, 2.0, 3.0])
    expected = bias_act(x, b, act="lrelu")
    for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(0, 3).contiguous().transpose(0, 3)):
        assert torch.equal(bias_act(other, b, act="lrelu"), expected)
    kept = bias_act(x.contiguous(memory_format=torch.channels_last), b, act="lrelu")
    assert kept.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("act", FORMULAS)
def test_bias_act_half_precision_error_is_bounded(act, dtype):
    random = torch.Generator().manual_seed(3)
    x = (2 * torch.randn(50, 3, generator=random)).to(dtype)
    b = torch.randn(3, generator=random).to(dtype)
    found = bias_act(x, b, act=act)
    exact = bias_act(x.double(), b.double(), act=act)
    assert found.dtype == dtype
    # The sum x + b is rounded, and no activation is steeper than selu (1.76). Then the result is rounded by the
    # activation (two steps in swish, each maybe a unit off) and by the gain.
    roundings = 1.76 * (x.double() + b.double()).abs() * GAINS[act] + 5 * exact.abs()
    bound = unit_roundoff(dtype) * 1.01 * roundings + torch.finfo(dtype).smallest_normal
    assert ((found.double() - exact).abs() <= bound).all()


def test_bias_act_inputs_without_grad_have_no_graph():
    assert not bias_act(torch.ones(2, 3), torch.ones(3), act="swish").requires_grad


X = torch.zeros(2, 3)
DTYPE_AND_SHAPE = "expected one value of the same dtype per index of that dimension"


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(act="gelu"),
     "act is 'gelu'; expected one of linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish"),
    (dict(clamp=-1), "clamp is -1; expected a limit >= 0, or None"),
    (dict(b=torch.zeros(2)),
     f"bias is torch.float32 [2] along dimension 1 of x, torch.float32 [2, 3]; {DTYPE_AND_SHAPE}"),
    (dict(b=torch.zeros(3, 1)),
     f"bias is torch.float32 [3, 1] along dimension 1 of x, torch.float32 [2, 3]; {DTYPE_AND_SHAPE}"),
    (dict(b=torch.zeros(3), dim=2),
     f"bias is torch.float32 [3] along dimension 2 of x, torch.float32 [2, 3]; {DTYPE_AND_SHAPE}"),
    (dict(b=torch.zeros(3, dtype=torch.float64)),
     f"bias is torch.float64 [3] along dimension 1 of x, torch.float32 [2, 3]; {DTYPE_AND_SHAPE}"),
    (dict(impl="slow"), "impl is 'slow'; expected one of auto, ref, composed, cpp, cuda"),
])
def test_bias_act_bad_argument_raises(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape('bias_act: ' + message)}$"):
        bias_act(X, **arguments)


@pytest.mark.parametrize(("impl", "device", "expected"), [("cuda", "cpu", "cuda"), ("cpp", "meta", "cpu")])
def test_bias_act_implementation_of_another_device_raises(impl, device, expected):
    message = f"bias_act: impl is '{impl}' and x is on {device}; expected x on {expected}: move it, or use 'auto'"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        bias_act(X.to(device), impl=impl)


def test_bias_act_implementation_that_could_not_be_built_raises(monkeypatch):
    monkeypatch.setattr(compiled, "_failures", {"cpu": "there is no compiler"})
    message = "bias_act: impl is 'cpp', which cannot run here: there is no compiler"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        bias_act(X, impl="cpp")
