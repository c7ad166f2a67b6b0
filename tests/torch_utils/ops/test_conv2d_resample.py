"""Convolution with resampling: agreement with its definition, derivatives, closed forms, errors."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from tests.helpers.op_cases import (
    COMPARED,
    CONV2D_RESAMPLE_CASES,
    CPU_IMPLEMENTATIONS,
    HALF_DTYPES,
    assert_equals_reference,
    ids,
    unit_roundoff,
)
from torch_utils.ops import compiled
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize(("impl", "device"), COMPARED)
@pytest.mark.parametrize("case", **ids(CONV2D_RESAMPLE_CASES))
def test_conv2d_resample_every_implementation_equals_reference(case, impl, device):
    assert_equals_reference(case, impl, device)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", **ids(CONV2D_RESAMPLE_CASES))
def test_conv2d_resample_derivatives_pass_numerical_checks(case, impl):
    def op(x, w):
        return case.run(x, w, impl=impl)

    assert gradcheck(op, case.inputs(), fast_mode=True)
    assert gradgradcheck(op, case.inputs(), fast_mode=True)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize(("up", "down"), [(2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("size", [1, 3])
def test_conv2d_resample_equals_its_three_steps(size, up, down, impl):
    x, w, f = randn(1, 2, 6, 4), randn(3, 2, size, size), randn(4, 4)
    margin = size // 2
    # What keeps 4 taps centered.
    front = margin + ((3 + up) // 2 if up > 1 else 0) + ((5 - down) // 2 if down > 1 else 0)
    back = margin + ((4 - up) // 2 if up > 1 else 0) + ((4 - down) // 2 if down > 1 else 0)
    y = upfirdn2d(x, f if up > 1 else None, up=up, padding=(front, back, front, back), gain=up**2, impl="ref")
    y = F.conv2d(y, w)
    if down > 1:
        y = upfirdn2d(y, f, down=down, impl="ref")
    found = conv2d_resample(x, w, f, up=up, down=down, padding=margin, impl=impl)
    torch.testing.assert_close(found, y, rtol=0, atol=1e-12)  # sums of 300 terms below 100
    assert found.shape == (1, 3, 6 * up // down, 4 * up // down)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_resample_without_resampling_is_a_convolution(groups, impl):
    x, w = randn(2, 4, 5, 6), randn(6, 4 // groups, 3, 3)
    expected = F.conv2d(x, w, padding=(1, 2), groups=groups)  # (y, x)
    for padding in ((2, 1), (2, 2, 1, 1)):
        assert torch.equal(conv2d_resample(x, w, padding=padding, groups=groups, impl=impl), expected)
    wider = conv2d_resample(x, w, padding=(2, 3, 1, 1), groups=groups, impl=impl)
    torch.testing.assert_close(wider[..., :-1], expected, rtol=0, atol=1e-13)  # padded first: another kernel may run
    convolved = conv2d_resample(x, w.flip([2, 3]), padding=(2, 1), groups=groups, flip_weight=False, impl=impl)
    assert torch.equal(convolved, expected)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [dict(up=2), dict(down=2), dict(up=2, down=2)])
def test_conv2d_resample_constant_image_stays_constant_inside(options, impl):
    x = torch.full((1, 2, 16, 16), 0.5, dtype=torch.float64)
    w = randn(3, 2, 3, 3)
    f = setup_filter([1, 3, 3, 1])
    inside = conv2d_resample(x, w, f, padding=1, impl=impl, **options)[:, :, 3:-3, 3:-3]
    expected = 0.5 * w.sum(dim=[1, 2, 3])[None, :, None, None].expand_as(inside)
    torch.testing.assert_close(inside, expected, rtol=0, atol=1e-12)  # taps of 1/64 are exact in float32


@pytest.mark.parametrize("options", [dict(up=2), dict(down=2)])
@pytest.mark.parametrize("size", [1, 3])
def test_conv2d_resample_filter_that_requires_grad_gets_its_gradient(size, options):
    x, w, f = randn(1, 2, 4, 4), randn(2, 2, size, size), randn(4, 4).requires_grad_()
    gradients = [torch.autograd.grad(conv2d_resample(x, w, f, padding=size // 2, impl=impl, **options).sin().sum(), f)
                 for impl in ("auto", "ref")]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)  # sums of 64 products of terms near 100


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, dict(up=2), dict(down=2), dict(up=2, down=2)])
def test_conv2d_resample_empty_batch_stays_empty(options, impl):
    shape = conv2d_resample(randn(1, 2, 4, 6), randn(3, 2, 3, 3), randn(4, 4), padding=1, impl=impl, **options).shape
    x = torch.zeros(0, 2, 4, 6, dtype=torch.float64).requires_grad_()
    y = conv2d_resample(x, randn(3, 2, 3, 3), randn(4, 4), padding=1, impl=impl, **options)
    assert y.shape == (0, *shape[1:])
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, dict(up=2), dict(down=2)])
def test_conv2d_resample_layout_of_the_input_does_not_matter(options, impl):
    x, w, f = randn(2, 3, 6, 4), randn(2, 3, 3, 3), randn(4, 4)
    expected = conv2d_resample(x, w, f, padding=1, impl=impl, **options)
    last = torch.channels_last
    for a, b in [(x.contiguous(memory_format=last), w), (x.contiguous(memory_format=last),
                 w.contiguous(memory_format=last)), (x.transpose(2, 3).contiguous().transpose(2, 3), w)]:
        found = conv2d_resample(a, b, f, padding=1, impl=impl, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # another order of 100 terms near 10


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", **ids(CONV2D_RESAMPLE_CASES))
def test_conv2d_resample_half_precision_error_is_bounded(case, impl, dtype):
    x, w = (value.detach().to(dtype).double() for value in case.inputs())
    f = case.filter()
    exact = conv2d_resample(x, w, f, impl="ref", **case.arguments)
    found = conv2d_resample(x.to(dtype), w.to(dtype), f, impl=impl, **case.arguments)
    # A chain of sums, each of n products, is off by at most ((1 + u)^(total n + 2 per step) - 1) times the result of
    # absolute values, whatever the order of the steps.
    magnitudes = conv2d_resample(x.abs(), w.abs(), None if f is None else f.abs(), impl="ref", **case.arguments)
    num_filters = (case.arguments.get("up", 1) > 1) + (case.arguments.get("down", 1) > 1)
    num_terms = w[0].numel() + 2 + num_filters * (1 if f is None else f.numel() ** (2 / f.ndim) + 4)
    bound = ((1 + unit_roundoff(dtype)) ** num_terms - 1) * magnitudes + torch.finfo(dtype).smallest_normal
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(up=0), "conv2d_resample: up is 0; expected an integer >= 1"),
    (dict(up=1.5), "conv2d_resample: up is 1.5; expected an integer >= 1"),
    (dict(down=-1), "conv2d_resample: down is -1; expected an integer >= 1"),
    (dict(down=(2, 2)), "conv2d_resample: down is (2, 2); expected an integer >= 1"),
    (dict(padding="same"),
     "upfirdn2d: padding is 'same'; expected an integer, (x, y) or (x0, x1, y0, y1)"),
    (dict(impl="native"), "conv2d_resample: impl is 'native'; expected one of auto, ref, composed, cpp, cuda"),
])
def test_conv2d_resample_bad_argument_raises(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        conv2d_resample(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3), **arguments)


@pytest.mark.parametrize(("impl", "device", "expected"), [("cuda", "cpu", "cuda"), ("cpp", "meta", "cpu")])
def test_conv2d_resample_implementation_of_another_device_raises(impl, device, expected):
    message = (f"conv2d_resample: impl is '{impl}' and x is on {device}; expected x on {expected}: move it, or use "
               "'auto'")
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        conv2d_resample(torch.zeros(1, 1, 4, 4, device=device), torch.zeros(1, 1, 3, 3, device=device), impl=impl)


def test_conv2d_resample_implementation_that_could_not_be_built_raises(monkeypatch):
    monkeypatch.setattr(compiled, "_failures", {"cpu": "there is no compiler"})
    message = "conv2d_resample: impl is 'cpp', which cannot run here: there is no compiler"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        conv2d_resample(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3), impl="cpp")
