"""Resampling with FIR filters: agreement of implementations, derivatives, closed forms, errors."""

import re

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.helpers.op_cases import (
    COMPARED,
    CPU_IMPLEMENTATIONS,
    EMPTY_CASES,
    HALF_DTYPES,
    UPFIRDN2D_CASES,
    Case,
    assert_equals_reference,
    filtering_bound,
    ids,
)
from torch_utils.ops import compiled
from torch_utils.ops.upfirdn2d import (
    down_margins,
    downsample2d,
    filter2d,
    setup_filter,
    up_margins,
    upfirdn2d,
    upsample2d,
)

CASE = {case.name: case for case in UPFIRDN2D_CASES}


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


# Agreement and derivatives


@pytest.mark.parametrize(("impl", "device"), COMPARED)
@pytest.mark.parametrize("case", **ids(UPFIRDN2D_CASES + EMPTY_CASES))
def test_upfirdn2d_every_implementation_equals_reference(case, impl, device):
    assert_equals_reference(case, impl, device)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", **ids(UPFIRDN2D_CASES))
def test_upfirdn2d_derivatives_pass_numerical_checks(case, impl):
    def op(x):
        return case.run(x, impl=impl).sin()

    assert gradcheck(op, case.inputs(), fast_mode=True)
    assert gradgradcheck(op, case.inputs(), fast_mode=True)


def test_upfirdn2d_full_jacobian_passes_numerical_check():
    # fast_mode above projects on random directions; once without.
    case = CASE["factors_per_axis"]
    assert gradcheck(lambda x: case.run(x, impl="composed"), case.inputs())


def test_upfirdn2d_third_derivative_equals_that_of_its_matrix():
    case = CASE["up_and_down"]
    x, = case.inputs()
    # Column k of the matrix is the result for the k-th pixel alone.
    pixels = torch.eye(20, dtype=torch.float64).reshape(20, 1, 5, 4).expand(-1, 2, -1, -1)
    columns = case.run(pixels)[:, 0].flatten(1)  # [20, H' * W']

    def third(y):
        value = y.sin().sum()
        for _ in range(3):
            value = torch.autograd.grad(value, x, create_graph=True)[0].square().sum()
        return torch.autograd.grad(value, x)[0]

    expected = third(x.flatten(2) @ columns)
    error = (third(case.run(x, impl="composed")) - expected).abs().max() / expected.abs().max()
    assert error < 1e-12  # float64 sums of at most 100 terms, four times over


def test_upfirdn2d_constant_filter_gets_no_gradient_and_input_without_grad_has_no_graph():
    x, f = randn(1, 2, 4, 4), randn(3, 3)
    assert not upfirdn2d(x, f, impl="composed").requires_grad
    assert upfirdn2d(x.requires_grad_(), f, impl="composed").requires_grad


@pytest.mark.parametrize("impl", ["auto", "ref"])
@pytest.mark.parametrize("taps", [(3,), (2, 3)])
def test_upfirdn2d_filter_that_requires_grad_gets_its_gradient(taps, impl):
    x, f = randn(1, 2, 4, 5).requires_grad_(), randn(*taps).requires_grad_()

    def op(x, f):
        return upfirdn2d(x, f, up=2, down=(1, 2), padding=2, gain=3, impl=impl)

    assert gradcheck(op, (x, f), fast_mode=True)
    assert gradgradcheck(op, (x, f), fast_mode=True)


# Closed forms


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("f", [None, setup_filter(None), setup_filter([1], separable=True)])
def test_upfirdn2d_identity_filter_returns_the_input(f, impl):
    x = randn(2, 3, 4, 5)
    torch.testing.assert_close(upfirdn2d(x, f, impl=impl), x, rtol=0, atol=0)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_upfirdn2d_order_is_x_before_y_and_convolution_flips(impl):
    x = torch.zeros(1, 1, 2, 3, dtype=torch.float64)
    x[0, 0, 1, 2] = 1  # row 1, column 2
    f = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])  # kh 3, kw 2
    y = upfirdn2d(x, f, up=(1, 2), padding=(1, 0, 2, 0), impl=impl)
    expected = torch.zeros(1, 1, 4, 3, dtype=torch.float64)
    expected[0, 0, 2:4, 2] = torch.tensor([1.0, 3.0])  # the response starts at the sample; the rest is cut
    assert torch.equal(y, expected)
    correlated = upfirdn2d(x, f, up=(1, 2), padding=(1, 0, 2, 0), flip_filter=True, impl=impl)
    expected[0, 0, 2:4, 2] = torch.tensor([6.0, 4.0])
    assert torch.equal(correlated, expected)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_upfirdn2d_one_axis_equals_numpy_convolution(impl):
    x, taps = randn(6), randn(4)
    spread = np.zeros(18)
    spread[::3] = x.numpy()
    expected = np.convolve(np.pad(spread, (2, 1)), taps.numpy(), mode="valid")[::2]
    y = upfirdn2d(x[None, None, None], taps[None], up=(3, 1), down=(2, 1), padding=(2, 1, 0, 0), impl=impl)
    np.testing.assert_allclose(y[0, 0, 0].numpy(), expected, rtol=0, atol=1e-14)  # sums of 4 terms near 1


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_upfirdn2d_separable_filter_equals_its_outer_product(impl):
    x, taps = randn(1, 2, 6, 5), randn(5)
    options = dict(up=(2, 3), down=(3, 2), padding=(3, 2, 2, 4), gain=1.7, impl=impl)
    torch.testing.assert_close(upfirdn2d(x, taps, **options), upfirdn2d(x, torch.outer(taps, taps), **options),
                               rtol=0, atol=1e-13)  # sums of 25 terms below 10


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("up", [2, (3, 2), (1, 4)])
@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 4, 6, 4, 1), (1, 2, 3, 4, 4, 3, 2, 1)])
def test_upsample2d_keeps_the_mean(taps, up, impl):
    # An impulse far from the border, so that none of its response is cut.
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 4, 4] = 3
    y = upsample2d(x, setup_filter(taps), up=up, impl=impl)
    # setup_filter computes in float32.
    torch.testing.assert_close(y.mean(), x.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("taps", "factor", "up", "down"), [
    (4, 2, [2, 1], [1, 1]), (3, 2, [2, 0], [1, 0]), (2, 2, [1, 0], [0, 0]), (6, 4, [4, 1], [1, 1]),
    (5, 1, [2, 2], [2, 2])])
def test_margins_put_the_odd_sample_in_front(taps, factor, up, down):
    f = torch.ones(1, taps)
    assert up_margins(f, (factor, 1)) == [*up, 0, 0]
    assert down_margins(f, (factor, 1)) == [*down, 0, 0]
    assert up_margins(f.T, (1, factor)) == [0, 0, *up]
    assert down_margins(f.T, (1, factor)) == [0, 0, *down]


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_downsample2d_three_taps_stand_on_the_even_samples(impl):
    x = torch.arange(36, dtype=torch.float64).reshape(1, 1, 6, 6) ** 2
    f = torch.zeros(3, 3, dtype=torch.float64)
    f[1, 1] = 1
    assert torch.equal(downsample2d(x, f, impl=impl), x[:, :, ::2, ::2])


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_upsample2d_constant_stays_constant_inside(impl):
    y = upsample2d(torch.full((1, 1, 6, 6), 0.5, dtype=torch.float64), setup_filter([1, 3, 3, 1]), impl=impl)
    torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 2, 1), (1, 2, 3, 4, 4, 3, 2, 1)])
def test_downsample2d_constant_stays_constant_inside(taps, impl):
    x = torch.full((1, 2, 16, 16), -0.7, dtype=torch.float64)
    y = downsample2d(x, setup_filter(taps), impl=impl)
    assert y.shape == (1, 2, 8, 8)
    inside = y[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(inside, torch.full_like(inside, -0.7), rtol=1e-6, atol=0)  # float32 taps


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("num_taps", [1, 2, 3, 4, 5])
def test_filter2d_centered_impulse_shifts_nothing(num_taps, impl):
    x = randn(1, 2, 5, 4)
    f = torch.zeros(num_taps, num_taps, dtype=torch.float64)
    center = (num_taps - 1) // 2  # with an even number, the first of the two middle taps
    f[center, center] = 1
    assert torch.equal(filter2d(x, f, impl=impl), x)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
def test_resampling_mirrored_image_gives_mirrored_result(impl):
    # A symmetric filter must not move the center of the image.
    x, f = randn(1, 1, 6, 8), setup_filter([1, 3, 3, 1])
    for op in (upsample2d, downsample2d):
        torch.testing.assert_close(op(x.flip([2, 3]), f, impl=impl), op(x, f, impl=impl).flip([2, 3]),
                                   rtol=0, atol=1e-14)


# Layouts and precisions


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["up2_odd_pad", "down2", "even_taps", "separable"])
def test_upfirdn2d_layout_of_the_input_does_not_matter(name, impl):
    case = CASE[name]
    x = case.inputs()[0].detach()
    expected = case.run(x, impl=impl)
    wide = x.new_zeros(*x.shape[:3], x.shape[3] * 2)
    strided = wide[..., ::2].copy_(x)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (strided, transposed, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(case.run(other, impl=impl), expected, rtol=0, atol=1e-14)
        leaf = other.detach().requires_grad_()
        reference = x.clone().requires_grad_()
        found, = torch.autograd.grad(case.run(leaf, impl=impl).sin().sum(), leaf)
        wanted, = torch.autograd.grad(case.run(reference, impl=impl).sin().sum(), reference)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("case", **ids(UPFIRDN2D_CASES))
def test_upfirdn2d_half_precision_error_is_bounded(case: Case, dtype, impl):
    x = case.inputs()[0].detach().to(dtype)
    # In double the filter keeps its precision: rounding it to half is part of the error.
    exact = case.op(x.double(), **case.arguments, f=case.filter(), impl="ref")
    found = case.op(x, **case.arguments, f=case.filter(), impl=impl)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= filtering_bound(case, dtype)).all()


# Filters


def test_setup_filter_normalizes_flips_and_scales():
    expected = torch.tensor([[1.0, 3.0], [3.0, 9.0]]) / 16
    torch.testing.assert_close(setup_filter([1, 3]), expected)
    torch.testing.assert_close(setup_filter([1, 3], flip_filter=True), expected.flip([0, 1]))
    torch.testing.assert_close(setup_filter(np.array([[1, 3], [3, 9]])), expected)
    torch.testing.assert_close(setup_filter([1, 3], normalize=False, gain=2), expected * 32)
    torch.testing.assert_close(setup_filter([1, 3], separable=True, gain=4), torch.tensor([0.5, 1.5]))
    torch.testing.assert_close(setup_filter(5), torch.ones(1, 1))
    assert setup_filter([1] * 7).shape == (7, 7)
    assert setup_filter([1] * 8).shape == (8,)
    assert setup_filter([1.0], device="meta").device.type == "meta"


# Errors


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(f=np.zeros((2, 2, 2))), "filter has shape [2, 2, 2]; expected [k] or [kh, kw] with at least one tap"),
    (dict(f=[]), "filter has shape [0]; expected [k] or [kh, kw] with at least one tap"),
    (dict(f=[[1, 2]], separable=True), "filter has shape [1, 2]; separable=True expects [k]"),
])
def test_setup_filter_bad_taps_raise(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        setup_filter(**arguments)


FACTORS = "expected a positive integer or a pair (x, y)"
SIDES = "expected an integer, (x, y) or (x0, x1, y0, y1)"
FILTER = "expected a floating point [k] or [kh, kw]: use setup_filter"
IMPLS = "expected one of auto, ref, composed, cpp, cuda"


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(x=torch.zeros(2, 3, 4)), "x is torch.float32 [2, 3, 4]; expected floating point [N, C, H, W]"),
    (dict(x=torch.zeros(1, 1, 2, 2, dtype=torch.uint8)),
     "x is torch.uint8 [1, 1, 2, 2]; expected floating point [N, C, H, W]"),
    (dict(f=[1, 2]), f"filter is list; {FILTER}"),
    (dict(f=torch.ones(2, 2, 2)), f"filter is torch.float32 [2, 2, 2]; {FILTER}"),
    (dict(f=torch.ones(2, dtype=torch.int64)), f"filter is torch.int64 [2]; {FILTER}"),
    (dict(up=0), f"up is 0; {FACTORS}"),
    (dict(up=1.5), f"up is 1.5; {FACTORS}"),
    (dict(down=(1, 2, 3)), f"down is (1, 2, 3); {FACTORS}"),
    (dict(padding=1.0), f"padding is 1.0; {SIDES}"),
    (dict(padding=(1, 2, 3)), f"padding is (1, 2, 3); {SIDES}"),
    (dict(padding=(-3, 0, 0, 0)), "padded width is 2; expected at least the 3 taps of the filter"),
    (dict(up=(2, 1), padding=(0, -2)), "padded height is 0; expected at least the 2 taps of the filter"),
    (dict(impl="fast"), f"impl is 'fast'; {IMPLS}"),
])
def test_upfirdn2d_bad_argument_raises(arguments, message):
    arguments = {"x": torch.zeros(1, 1, 4, 5), "f": torch.ones(2, 3), **arguments}
    with pytest.raises(ValueError, match=f"^{re.escape('upfirdn2d: ' + message)}$"):
        upfirdn2d(**arguments)


@pytest.mark.parametrize(("impl", "device", "expected"), [("cuda", "cpu", "cuda"), ("cpp", "meta", "cpu")])
def test_upfirdn2d_implementation_of_another_device_raises(impl, device, expected):
    message = f"upfirdn2d: impl is '{impl}' and x is on {device}; expected x on {expected}: move it, or use 'auto'"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        upfirdn2d(torch.zeros(1, 1, 2, 2, device=device), None, impl=impl)


def test_upfirdn2d_implementation_that_could_not_be_built_raises(monkeypatch):
    monkeypatch.setattr(compiled, "_failures", {"cpu": "there is no compiler"})
    message = "upfirdn2d: impl is 'cpp', which cannot run here: there is no compiler"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        upfirdn2d(torch.zeros(1, 1, 2, 2), None, impl="cpp")


@pytest.mark.parametrize("op", [filter2d, upsample2d, downsample2d])
def test_filter_family_bad_filter_raises(op):
    message = f"upfirdn2d: filter is list; {FILTER}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        op(torch.zeros(1, 1, 4, 4), [1, 2])


@pytest.mark.parametrize("impl", ["ref", "composed"])
def test_upfirdn2d_negative_gain_of_a_separable_filter_changes_the_sign(impl):
    x, f = torch.randn(1, 2, 6, 6, dtype=torch.float64), setup_filter([1, 2, 1], separable=True)
    positive = upfirdn2d(x, f, padding=1, gain=3, impl=impl)
    assert torch.equal(upfirdn2d(x, f, padding=1, gain=-3, impl=impl), -positive)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: setup_filter([1.0, -1.0]), "filter sums to 0; expected another sum, or normalize=False"),
    (lambda: setup_filter([1.0] * 8, gain=-1),
     "filter gain is -1; expected a gain >= 0 for a separable filter, which is applied twice"),
    (lambda: upfirdn2d(torch.zeros(1, 1, 3, 3), None, padding=(-10, 13, 2, 2)),
     "upfirdn2d: padding (-10, 13) crops more than the width, which is 3"),
])
def test_filters_and_padding_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
