"""The GPU's kernels, compiled for the host and executed: cases and derivatives, sizes of grids, formats, extents."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.kernel_calls import (
    BiasCall,
    FilterCall,
    bias_grids,
    bias_table,
    drawn,
    filter_grids,
    filter_table,
    huge_orders,
    sum_dtype,
    wrong_results,
)
from tests.helpers.kernel_programs import PLAIN, SCALARS, Manner, Order, kernel_program
from tests.helpers.op_cases import HALF_DTYPES
from torch_utils.ops.bias_act_ref import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")

MANNERS = {
    "forwards": Manner(),
    "backwards_off_alignment": Manner(backwards=True, shift=1),
    "few_blocks_that_walk": Manner(most_blocks=2),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return kernel_program(tmp_path_factory.mktemp("kernels"), *PLAIN)


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("dtype", SCALARS)
def test_kernels_every_case_and_derivative_equals_float64(program, dtype, manner):
    calls = [*filter_table(dtype), *bias_table(dtype)]
    assert wrong_results(calls, program.run([call.order(MANNERS[manner]) for call in calls])) == []


@pytest.mark.parametrize("manner", MANNERS)
def test_kernels_any_size_of_grid_equals_float64(program, manner):
    calls = [*filter_grids(), *bias_grids()]
    assert wrong_results(calls, program.run([call.order(MANNERS[manner]) for call in calls])) == []


def test_kernels_order_of_threads_does_not_change_a_bit(program):
    calls = [*filter_grids(), *bias_grids()]
    results = [program.run([call.order(manner) for call in calls]) for manner in (Manner(), Manner(backwards=True))]
    assert [call.name for call, one, other in zip(calls, *results) if not torch.equal(one, other)] == []


@st.composite
def _filter_calls(draw) -> FilterCall:
    def pair(values):
        return draw(values), draw(values)

    dtype = draw(st.sampled_from(SCALARS))
    separable = draw(st.booleans())
    taps = pair(st.integers(1, 9))
    up, down = (pair(st.integers(1, 3)) if draw(st.booleans()) else (draw(st.integers(1, 2)),) * 2 for _ in range(2))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 20)), draw(st.integers(1, 70)))
    shapes = [taps[:1], taps[1:]] if separable else [taps[::-1]]
    # Far outside the image there are only zeros; cropping leaves at least one pixel.
    pad = tuple(draw(st.integers(-(shape[3 - i] - 1) * up[i], taps[i] + 2)) for i in (0, 1))
    out = tuple(max((shape[3 - i] * up[i] + pad[i] + draw(st.integers(-3, 3)) - taps[i]) // down[i] + 1, 1)
                for i in (0, 1))
    return FilterCall(name="drawn", x=drawn(shape, dtype),
                      taps=tuple(drawn(size, sum_dtype(dtype), i) for i, size in enumerate(shapes)), up=up, down=down,
                      pad=pad, out=out, reversed=draw(st.booleans()), gain=draw(st.sampled_from([1.0, -0.5, 4.0])),
                      channels_last=draw(st.booleans()))


@settings(derandomize=True, max_examples=100, deadline=None, database=None)
@given(call=_filter_calls(), manner=st.sampled_from(list(MANNERS)))
def test_upfirdn2d_kernels_any_call_equals_float64(program, call, manner):
    assert wrong_results([call], program.run([call.order(MANNERS[manner])])) == []


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_kernels_keep_what_is_not_a_number_or_infinite(program, act):
    x = torch.tensor([[[math.nan, math.inf, -math.inf, 0.0, 1e4, -1e4]]])
    for clamp in (math.inf, 3.0):
        call = BiasCall(name=act, x=x, b=None, act=act, alpha=0.2, gain=1.5, clamp=clamp)
        found, = program.run([call.order(Manner())])
        torch.testing.assert_close(found, call.expected[0].float(), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_widen_every_pattern_equals_pytorch(program, dtype):
    x = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    found, = program.run([_conversion(2, x, dtype, torch.float32)])
    torch.testing.assert_close(found, x.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), x.float().signbit())


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_narrow_rounds_as_pytorch(program, dtype):
    x = floats_to_narrow(dtype)
    found, = program.run([_conversion(3, x, dtype, dtype)])
    torch.testing.assert_close(found, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[~x.isnan()], x.signbit()[~x.isnan()])


def floats_to_narrow(dtype: torch.dtype) -> torch.Tensor:
    """Return every number of the format, the midpoints between neighbors, numbers beside those, and random bits."""
    every = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()].sort().values
    middles = (finite[1:].double() + finite[:-1].double()).div(2).float()
    beside = [middles.nextafter(torch.tensor(side)) for side in (-math.inf, math.inf)]
    random = torch.randint(-2**31, 2**31, (200_000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(torch.float32).max])
    limits = torch.cat([largest, largest.nextafter(torch.tensor(math.inf)), torch.tensor([65519.99, 65520.0])])
    return torch.cat([every, middles, *beside, limits, -limits, random.view(torch.float32)])


def _conversion(work: int, x: torch.Tensor, dtype: torch.dtype, result: torch.dtype) -> Order:
    return Order(work=work, dtype=dtype, arrays=(x,), result=tuple(x.shape), result_dtype=result, numbers=())


HUGE = huge_orders()


@pytest.mark.parametrize(("call", "huge", "small"), HUGE, ids=[call.name for call, *_ in HUGE])
def test_kernels_beyond_int32_equal_a_small_call(program, call, huge, small):
    found, expected = program.run([huge, small])
    assert torch.equal(found, expected)
    assert wrong_results([call], [expected]) == []
