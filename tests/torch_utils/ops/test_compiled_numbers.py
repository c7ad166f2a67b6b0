"""Numbers in compiled operators: layouts, threads, NaN and infinity, precision, sizes of all kinds."""

import pytest
import torch

from tests.helpers.op_cases import (
    COMPARED,
    LARGE_UPFIRDN2D_CASES,
    LAYOUTS,
    UPFIRDN2D_CASES,
    assert_equals_reference,
    filtering_bound,
    ids,
    laid_out,
    randn,
    unit_roundoff,
)
from torch_utils.ops import compiled
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.bias_act_ref import ACTIVATIONS
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def operators():
    assert compiled.failure_of("cpu") is None  # else "auto" would be something else


# Layouts


def call(name, x, f=None):
    return upfirdn2d(x, f, up=2, padding=2) if name == "upfirdn2d" else bias_act(x, randn(3, dtype=x.dtype), act=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["upfirdn2d", "lrelu", "swish"])
def test_result_is_channels_last_exactly_when_the_input_is(name, layout):
    x = laid_out(randn(2, 3, 4, 5), layout).requires_grad_()
    y = call(name, x, randn(4, 4))
    first, = torch.autograd.grad(y, x, torch.zeros_like(y), create_graph=True)
    for value in (y, first):
        assert value.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
        assert value.is_contiguous() == (layout != "channels_last")


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_result_of_an_input_of_either_layout_is_in_the_plain_one(act, shape):
    x = randn(*shape).contiguous(memory_format=torch.channels_last)
    assert x.is_contiguous()
    y = bias_act(x, act=act)
    assert y.is_contiguous()
    assert y.stride() == torch.empty(shape).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_is_bit_equal_in_any_layout(act, layout, dtype):
    x = laid_out(randn(2, 3, 7, 5, dtype=dtype), layout)
    plain = x.clone(memory_format=torch.contiguous_format)
    b = randn(3, seed=6, dtype=dtype)
    found, expected = [], []
    for results, leaf in ((found, x.detach().requires_grad_()), (expected, plain.requires_grad_())):
        y = bias_act(leaf, b, act=act, clamp=1)
        results += [y, *torch.autograd.grad(y, leaf, randn(*x.shape, seed=7, dtype=dtype))]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["up2_odd_pad", "down2", "even_taps", "separable", "factors_per_axis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_upfirdn2d_is_equal_up_to_rounding_in_any_layout(name, layout, dtype):
    case = next(case for case in UPFIRDN2D_CASES if case.name == name)
    x = laid_out(case.inputs(dtype)[0].detach(), layout)
    plain = x.clone(memory_format=torch.contiguous_format)
    found, expected = case.run(x, impl="cpp"), case.run(plain, impl="cpp")
    if layout == "channels_last":
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    else:
        assert torch.equal(found, expected)


# Determinism


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["up", "down", "filter", "separable", "full", "lrelu", "swish"])
def test_result_depends_neither_on_the_number_of_threads_nor_on_the_call(name, layout):
    x = LAYOUTS[layout](randn(2, 3, 150, 150, dtype=torch.float32)).requires_grad_()  # several tasks
    b = randn(3, seed=6, dtype=torch.float32).requires_grad_()
    f = setup_filter([1, 3, 3, 1])
    ops = {"up": lambda: upfirdn2d(x, f, up=2, padding=(2, 1)), "down": lambda: upfirdn2d(x, f, down=2, padding=1),
           "filter": lambda: upfirdn2d(x, f, padding=(2, 1)), "separable": lambda: upfirdn2d(x, f[0], up=3, padding=3),
           "full": lambda: upfirdn2d(x, randn(4, 4), padding=(2, 1)), "lrelu": lambda: bias_act(x, b, act="lrelu"),
           "swish": lambda: bias_act(x, b, act="swish")}

    def results():
        y = ops[name]()
        first = torch.autograd.grad(y, [x, b], randn(*y.shape, dtype=torch.float32), allow_unused=True,
                                    create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), x)[0] if name == "swish" else y
        return [value for value in (y, *first, second) if value is not None]

    expected = results()
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, results(), expected)), f"{threads} threads"


# NaN and infinity


def special_numbers(count):
    values = randn(count, dtype=torch.float32)
    values[3::7], values[4::7], values[5::7] = torch.nan, torch.inf, -torch.inf
    return values


@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_passes_nan_and_infinity_as_the_reference_does(act, clamp):
    x, b = special_numbers(35)[None, :, None].expand(2, 35, 9), torch.zeros(35)  # whole vectors and a rest
    found, expected = (bias_act(x, b, act=act, clamp=clamp, impl=impl) for impl in ("cpp", "ref"))
    assert expected.isnan().any()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_gradient_passes_nan_and_infinity_where_there_is_a_slope(act, clamp):
    x = torch.linspace(-2, 2, 60).reshape(4, 15).requires_grad_()
    y = bias_act(x, act=act, clamp=clamp)
    dy = special_numbers(60).reshape(4, 15)
    slope, found = (torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in (torch.ones_like(y), dy))
    # Where the slope is zero by definition, nothing passes.
    torch.testing.assert_close(found, torch.where(slope == 0, 0, dy * slope), rtol=1e-6, atol=0, equal_nan=True)
    assert found.isnan().any()
    assert (slope == 0).any() == (act == "relu" or clamp is not None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("factors", "taps"), [
    (dict(padding=(2, 1)), (4, 4)), (dict(padding=2), (5,)), (dict(up=2, padding=(2, 1)), (4, 4)),
    (dict(up=2, padding=(2, 1)), (4,)), (dict(down=2, padding=(1, 1)), (4, 4)), (dict(down=2, padding=(1, 1)), (4,)),
    (dict(up=3, down=2, padding=2), (4, 3)), (dict(up=2, padding=(3, 2)), (6,))])
def test_upfirdn2d_bad_pixel_reaches_only_outputs_whose_taps_read_it(factors, taps, value, layout):
    f = randn(*taps, dtype=torch.float32)
    clean = randn(2, 9, 11, 21, dtype=torch.float32)
    for channel, row, column in ((0, 0, 0), (8, 10, 20), (4, 5, 16), (3, 1, 7)):
        x, mark = clean.clone(), torch.zeros_like(clean)
        x[1, channel, row, column], mark[1, channel, row, column] = value, 1
        found, before = (upfirdn2d(LAYOUTS[layout](image), f, **factors) for image in (x, clean))
        reached = upfirdn2d(mark, torch.ones_like(f), **factors, impl="ref") > 0
        assert reached.any()
        assert not found[reached].isfinite().any()
        assert torch.equal(found[~reached], before[~reached])


# Precision


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("act", "wide"), [("lrelu", True), ("swish", True), ("linear", False)])
def test_bias_act_bias_gradient_of_many_elements_is_accurate(act, wide, layout):
    shape = (1, 2, 250, 400) if wide else (1000, 2, 10, 10)
    x = LAYOUTS[layout](randn(*shape, dtype=torch.float32)).requires_grad_()
    b = torch.tensor([0.3, -0.2], requires_grad=True)
    dy = randn(*shape, seed=6, dtype=torch.float32) + 1
    found, = torch.autograd.grad(bias_act(x, b, act=act), b, dy)
    expected, = torch.autograd.grad(bias_act(x.double(), b.double(), act=act, impl="ref"), b, dy.double())
    # A sum in float32 would be off by up to 100000 * 6e-8, and by about 1e-5 on average.
    assert ((found - expected).abs() <= 1e-6 * expected.abs()).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", **ids(UPFIRDN2D_CASES + LARGE_UPFIRDN2D_CASES))
def test_upfirdn2d_rounding_error_is_bounded_in_either_layout(case, dtype, layout):
    x = case.inputs()[0].detach().to(dtype)
    exact = case.op(x.double(), **case.arguments, f=case.filter(), impl="ref")
    found = case.op(LAYOUTS[layout](x), **case.arguments, f=case.filter(), impl="cpp")
    # The taps are kept in float32, and so are the sums.
    bound = filtering_bound(case, torch.float32) + unit_roundoff(dtype) * exact.abs() + torch.finfo(dtype).tiny
    assert ((found.double() - exact).abs() <= 1.01 * bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factors", [dict(padding=(2, 1)), dict(up=2, padding=(2, 1)), dict(down=2, padding=1)])
def test_upfirdn2d_filter_that_is_an_outer_product_equals_the_reference(factors, dtype):
    x, f = randn(2, 3, 9, 21, dtype=dtype), setup_filter([1, 3, 3, 1])
    expected = upfirdn2d(x.double(), f, **factors, impl="ref")
    magnitudes = upfirdn2d(x.double().abs(), f.abs(), **factors, impl="ref")
    # Sums of 16 products, each with a tap that is two factors: 1 / 3 of 1 and 3 is rounded.
    assert ((upfirdn2d(x, f, **factors) - expected).abs() <= 24 * unit_roundoff(dtype) * magnitudes).all()


# Sizes


@pytest.mark.parametrize(("impl", "device"), COMPARED)
@pytest.mark.parametrize("case", **ids(LARGE_UPFIRDN2D_CASES))
def test_upfirdn2d_large_case_equals_the_reference(case, impl, device):
    assert_equals_reference(case, impl, device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("taps", [(4, 4), (4,), (3,), (6,)])
@pytest.mark.parametrize("factors", [dict(padding=(2, 1)), dict(up=2, padding=(2, 1)), dict(down=2, padding=(1, 2))])
def test_upfirdn2d_every_width_equals_the_reference(factors, taps, layout):
    f = randn(*taps)
    for width in (*range(4, 21), 31, 32, 33):
        x = randn(2, 3, 5, width, dtype=torch.float32)
        for image in (x, x.double()):
            found = upfirdn2d(LAYOUTS[layout](image), f, **factors)
            expected = upfirdn2d(x.double(), f, **factors, impl="ref")
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 if image is x else 1e-12,
                                       msg=lambda text, width=width: f"width {width}: {text}")


@pytest.mark.parametrize("taps", [(4, 4), (4,), (5,)])
@pytest.mark.parametrize("factors", [dict(padding=(2, 1)), dict(up=2, padding=(2, 1)), dict(down=2, padding=(1, 2))])
def test_upfirdn2d_every_number_of_channels_equals_the_reference(factors, taps):
    f = randn(*taps)
    for channels in (2, 3, 4, 7, 8, 9, 63, 64, 65, 72, 130):
        x = randn(1, channels, 3, 19)
        found = upfirdn2d(LAYOUTS["channels_last"](x), f, **factors)
        torch.testing.assert_close(found, upfirdn2d(x, f, **factors, impl="ref"), rtol=0, atol=1e-12,
                                   msg=lambda text, channels=channels: f"{channels} channels: {text}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [256, 300])
def test_large_result_is_that_of_its_parts(width, threads):
    # Where results are stored past the caches, and where they are not
    x, b, f = randn(9, 16, 256, width, dtype=torch.float32), randn(16, dtype=torch.float32), setup_filter([1, 3, 3, 1])
    assert x[:1].nbytes < 1 << 25 < x.nbytes
    works = {
        "bias_act": lambda x: bias_act(x, b, act="lrelu", clamp=1),
        "gradient": lambda x: torch.ops.lesion_ops.bias_act_grad(x, None, b, x, 1, 2, 0.2, 1.5, None, True)[0],
        "gradient alone": lambda x: torch.ops.lesion_ops.bias_act_grad(x, None, b, x, 1, 2, 0.2, 1.5, None, False)[0],
        "filter": lambda x: upfirdn2d(x, f, padding=(2, 1)),
        "up": lambda x: upfirdn2d(x[:, :, :128], f, up=2, padding=(2, 1)),
        "down": lambda x: upfirdn2d(x.repeat(1, 2, 1, 2), f, down=2, padding=1),
    }
    torch.set_num_threads(threads)
    for name, work in works.items():
        parts = torch.cat([work(part) for part in x.split(1)])
        assert torch.equal(work(x), parts), name
