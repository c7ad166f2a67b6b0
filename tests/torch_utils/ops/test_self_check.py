"""The comparison of operators before their first use: what agrees, and that what is wrong is named."""

import re

import pytest
import torch

from torch_utils.ops import self_check
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.self_check import first_difference
from torch_utils.ops.upfirdn2d import upfirdn2d

CPU = torch.device("cpu")
OPS = {"upfirdn2d": upfirdn2d, "bias_act": bias_act}


@pytest.mark.parametrize("impl", ["ref", "composed", "cpp"])
def test_first_difference_right_operators_agree(impl):
    assert first_difference(CPU, impl) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_first_difference_is_found_where_derivatives_are_off(mode, monkeypatch):
    with mode():
        assert first_difference(CPU, "cpp") is None
        monkeypatch.setattr(self_check, "bias_act", broken("bias_act", slope_scaled))
        assert "in derivative 1" in first_difference(CPU, "cpp")


def shifted(op, *given, **more):
    return op(*given, **more).roll(1, 3)


def slope_scaled(op, *given, **more):
    """Keep the values, and make derivatives 1 % too large."""
    y = op(*given, **more)
    return y.detach() + 1.01 * (y - y.detach())


def slope_held(op, x, *given, **more):
    """Replace an activation by its tangents: its second derivative is lost."""
    leaf = x.detach().requires_grad_()
    y = op(leaf, *given, **more)
    slope, = torch.autograd.grad(y.sum(), leaf)
    return y.detach() + slope * (x - x.detach())


def flipped(op, *given, **more):
    return op(*given, **more, flip_filter=True)


def slightly_off(op, *given, **more):
    return op(*given, **more) + 2e-4


def undefined(op, *given, **more):
    y = op(*given, **more)
    return y + torch.where(torch.arange(y.shape[3]) == 5, torch.nan, 0)


def wrong_in_channels_last(op, x, *given, **more):
    y = op(x, *given, **more)
    return y if x.is_contiguous() else y.flip(2)


def broken(op, fault):
    """Return an op of which all implementations but the reference have a fault."""
    def run(*given, impl, **more):
        if impl == "ref":
            return OPS[op](*given, **more, impl=impl)
        return fault(OPS[op], *given, **more, impl=impl)

    return run


FIRST_FILTERING = "a 4 x 4 filter and {'padding': (2, 1)}"


@pytest.mark.parametrize(("op", "fault", "case", "order", "layout"), [
    ("upfirdn2d", shifted, FIRST_FILTERING, 0, "contiguous_format"),
    ("upfirdn2d", flipped, FIRST_FILTERING, 0, "contiguous_format"),
    ("upfirdn2d", undefined, FIRST_FILTERING, 0, "contiguous_format"),
    ("upfirdn2d", slope_scaled, FIRST_FILTERING, 1, "contiguous_format"),
    ("upfirdn2d", wrong_in_channels_last, FIRST_FILTERING, 0, "channels_last"),
    ("bias_act", shifted, "linear", 0, "contiguous_format"),
    ("bias_act", slightly_off, "linear", 0, "contiguous_format"),
    ("bias_act", slope_scaled, "linear", 1, "contiguous_format"),
    ("bias_act", slope_held, "swish", 2, "contiguous_format"),
    ("bias_act", wrong_in_channels_last, "linear", 0, "channels_last"),
])
def test_first_difference_names_the_operator_and_the_derivative(op, fault, case, order, layout, monkeypatch):
    monkeypatch.setattr(self_check, op, broken(op, fault))
    message = (re.escape(f"{op} with {case} on cpu differs from the reference by ") + "([0-9.e+-]+|nan)" +
               re.escape(f" in derivative {order} (torch.{layout}); expected 0.0001 at most: please report it"))
    found = first_difference(CPU, "cpp")
    assert re.fullmatch(message, found), found
