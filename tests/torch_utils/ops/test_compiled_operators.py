"""The compiled operators as operators of PyTorch: schemas, derivatives, tracing."""

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.op_cases import BIAS_ACT_CASES, LAYOUTS, UPFIRDN2D_CASES, ids, laid_out, randn
from torch_utils.ops import compiled
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.bias_act_ref import ACTIVATIONS
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import upfirdn2d

pytestmark = pytest.mark.usefixtures("one_thread")
PIECEWISE_LINEAR = ("linear", "relu", "lrelu")


@pytest.fixture(scope="module", autouse=True)
def operators():
    assert compiled.failure_of("cpu") is None
    return torch.ops.lesion_ops


# Schemas, shapes of fakes, registration of derivatives, tracing by torch.compile


@pytest.mark.parametrize(("shape", "layout", "dtype", "taps", "given"), [
    ((2, 3, 4, 5), "contiguous", torch.float32, (4, 4), ([1, 1], [1, 1], [2, 1, 2, 1], False, 1.0)),
    ((2, 3, 4, 5), "channels_last", torch.float64, (4,), ([2, 2], [1, 1], [2, 1, 2, 1], True, 4.0)),
    ((1, 2, 6, 7), "every_second", torch.float16, (3, 4), ([1, 1], [2, 2], [1, 1, 1, 1], False, 1.0)),
    ((2, 1, 5, 4), "transposed", torch.float64, (5, 2), ([1, 3], [2, 1], [-1, 2, 3, -2], False, -0.5)),
    ((0, 3, 4, 5), "contiguous", torch.float32, (4,), ([2, 2], [1, 1], [2, 1, 2, 1], False, 1.0)),
])
def test_upfirdn2d_operator_passes_opcheck(shape, layout, dtype, taps, given, operators):
    x = laid_out(randn(*shape, dtype=dtype), layout).requires_grad_()
    f = randn(*taps, dtype=torch.float32 if dtype == torch.float16 else dtype)
    opcheck(operators.upfirdn2d.default, (x, f, *given))


SAMPLES = {  # shape, layout, dtype, dimension of the bias, clamp
    "plain": ((2, 3, 4, 5), "contiguous", torch.float32, 1, None),
    "channels_last": ((2, 3, 4, 5), "channels_last", torch.float64, 1, 0.7),
    "slice": ((3, 4), "every_second", torch.float16, 0, 0.7),
    "no_bias": ((2, 3, 4), "transposed", torch.float64, None, None),
    "empty": ((0, 3, 2), "contiguous", torch.float32, 1, None),
}


def bias_act_sample(name, act):
    """Return (x, b), (dimension, ..., clamp)."""
    shape, layout, dtype, dim, clamp = SAMPLES[name]
    x = laid_out(randn(*shape, dtype=dtype), layout)
    b = None if dim is None else randn(shape[dim], seed=6, dtype=dtype)
    return (x, b), (dim or 0, list(ACTIVATIONS).index(act), ACTIVATIONS[act].alpha, 1.5, clamp)


def asking(*tensors):
    return [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize(("sample", "act"), [
    *((sample, act) for sample in SAMPLES for act in ("lrelu", "swish")),
    *(("channels_last", act) for act in ACTIVATIONS if act not in ("lrelu", "swish"))])
def test_bias_act_operator_passes_opcheck(sample, act, operators):
    (x, b), given = bias_act_sample(sample, act)
    opcheck(operators.bias_act.default, (*asking(x, b), *given))


@pytest.mark.parametrize(("sample", "act", "sum_bias"), [
    *((sample, act, True) for sample in SAMPLES for act in ("lrelu", "tanh")), ("plain", "linear", True),
    *(("channels_last", act, False) for act in ("linear", "lrelu", "tanh"))])
def test_bias_act_grad_operator_passes_opcheck(sample, act, sum_bias, operators):
    (x, b), given = bias_act_sample(sample, act)
    dy = randn(*x.shape, seed=7, dtype=x.dtype)
    if act in PIECEWISE_LINEAR:
        arguments = (*asking(dy), None, None, operators.bias_act(x, b, *given))
    else:
        arguments = (*asking(dy, x, b), None)
    opcheck(operators.bias_act_grad.default, (*arguments, *given, sum_bias))


@pytest.mark.parametrize("sample", SAMPLES)
def test_bias_act_grad2_operator_passes_opcheck(sample, operators):
    (x, b), given = bias_act_sample(sample, "swish")
    ddx, dy = (randn(*x.shape, seed=seed, dtype=x.dtype) for seed in (7, 8))
    opcheck(operators.bias_act_grad2.default, (*asking(ddx, dy, x, b), *given))


@pytest.mark.parametrize("act", PIECEWISE_LINEAR)
def test_bias_act_grad2_operator_without_second_derivative_raises(act, operators):
    x, number = randn(2, 3), list(ACTIVATIONS).index(act)
    with pytest.raises(RuntimeError, match=f"bias_act_grad2: activation {number} has no second derivative"):
        operators.bias_act_grad2(x, x, x, None, 1, number, 0.0, 1.0, None)


# Derivatives


def tower(y, inputs, orders):
    """Return derivatives of every order of a scalar that has them all; each is derived from the one before.

    All are brought near 1, since the sine of a large number has none of its digits.
    """
    found, value = [], y.sin().sum()
    for order in range(orders):
        derivatives = torch.autograd.grad(value, inputs, create_graph=order + 1 < orders, materialize_grads=True)
        found.append(derivatives)
        value = sum((each / each.detach().abs().max().clamp(min=1)).sin().sum() for each in derivatives)
    return found


def assert_towers_equal(case, orders):
    inputs = case.inputs()
    found, expected = (tower(case.run(*inputs, impl=impl), inputs, orders) for impl in ("cpp", "ref"))
    for order, (values, references) in enumerate(zip(found, expected), 1):
        for i, (value, reference) in enumerate(zip(values, references)):
            largest = max(reference.abs().max().item(), 1)
            # Hundreds of float64 roundings, a few derivatives deep
            assert (value - reference).abs().max() <= 1e-11 * largest, f"derivative {order} in input {i}"


@pytest.mark.parametrize("case", **ids(BIAS_ACT_CASES))
def test_bias_act_derivatives_up_to_the_fourth_equal_those_of_the_reference(case):
    assert_towers_equal(case, orders=4)


@pytest.mark.parametrize("case", **ids(UPFIRDN2D_CASES))
def test_upfirdn2d_derivatives_up_to_the_third_equal_those_of_the_reference(case):
    assert_towers_equal(case, orders=3)


@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
@pytest.mark.parametrize("wanted", ["x", "b"])
def test_bias_act_gradient_of_one_input_equals_that_beside_the_other(wanted, act):
    x, b = randn(2, 3, 4).requires_grad_(), randn(3).requires_grad_()
    both = dict(zip("xb", torch.autograd.grad(bias_act(x, b, act=act, clamp=1).sin().sum(), [x, b])))
    given = {"x": x.detach(), "b": b.detach()}
    given[wanted] = given[wanted].clone().requires_grad_()
    alone, = torch.autograd.grad(bias_act(**given, act=act, clamp=1).sin().sum(), given[wanted])
    assert torch.equal(alone, both[wanted])


@pytest.mark.parametrize("asks", [True, False])
def test_bias_act_bias_is_summed_only_where_it_asks_for_a_gradient(asks):
    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name() == "lesion_ops::bias_act_grad":
                sums.append(args[-1])
            return function(*args, **(kwargs or {}))

    sums = []
    y = bias_act(randn(2, 3, 4).requires_grad_(), randn(3).requires_grad_(asks), act="lrelu")
    with Sums():
        y.sum().backward()
    assert sums == [asks]


@pytest.mark.parametrize("impl", ["ref", "cpp"])
@pytest.mark.parametrize("used", [("x",), ("b",), ("x", "b")])
@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_bias_act_second_derivative_of_either_gradient_equals_the_formula(act, used, impl):
    x, b, dy = randn(2, 3, 4).requires_grad_(), randn(3, seed=6).requires_grad_(), randn(2, 3, 4, seed=7)
    first = torch.autograd.grad(bias_act(x, b, act=act, gain=2, impl=impl), [x, b], dy, create_graph=True)
    weight = {"x": randn(2, 3, 4, seed=8), "b": randn(3, seed=9)}
    value = sum((gradient * weight[name]).sum() for name, gradient in zip("xb", first) if name in used)
    if act == "lrelu" and impl == "cpp":
        assert not value.requires_grad  # a constant factor; the reference computes zeros at some expense
        return
    found = torch.autograd.grad(value, [x, b], materialize_grads=True)

    total = sum(weight[name].reshape(shape) for name, shape in (("x", (2, 3, 4)), ("b", (3, 1))) if name in used)
    v = (x + b[:, None]).detach()
    s = torch.sigmoid(v)
    second = s * (1 - s) * (2 + v * (1 - 2 * s)) if act == "swish" else torch.zeros_like(v)
    expected = 2 * dy * second * total
    torch.testing.assert_close(found, (expected, expected.sum([0, 2])), rtol=0, atol=1e-13)


@pytest.mark.parametrize("op", ["upfirdn2d", "bias_act"])
def test_backward_may_be_repeated_where_the_graph_is_kept(op):
    x = randn(1, 2, 4, 4).requires_grad_()
    y = bias_act(x, act="swish") if op == "bias_act" else upfirdn2d(x, randn(3, 3), padding=1)
    once, twice = (torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)
    torch.autograd.grad(y, x, torch.ones_like(y))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, torch.ones_like(y))


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["upfirdn2d", "lrelu", "swish"])
def test_gradient_in_any_layout_gives_the_same(name, layout, grad_layout):
    x, b = LAYOUTS[layout](randn(2, 3, 4, 5)).requires_grad_(), randn(3, seed=6).requires_grad_()
    y = (upfirdn2d(x + b[:, None, None], randn(3, 3), padding=1) if name == "upfirdn2d" else
         bias_act(x, b, act=name, clamp=1))
    dy = laid_out(randn(*y.shape, seed=7), grad_layout)
    found = torch.autograd.grad(y, [x, b], dy, create_graph=True)
    expected = torch.autograd.grad(y, [x, b], dy.clone(memory_format=torch.contiguous_format), create_graph=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)  # the sum over pixels, in another order
    if name == "swish":
        second = [torch.autograd.grad(sum(g.square().sum() for g in first), [x, b]) for first in (found, expected)]
        torch.testing.assert_close(*second, rtol=0, atol=1e-13)


def test_gradient_of_a_sum_is_that_of_ones():
    x, b = randn(2, 3, 4, 5).requires_grad_(), randn(3).requires_grad_()
    for y in (upfirdn2d(x + b[:, None, None], randn(4), up=2, padding=2), bias_act(x, b, act="softplus")):
        expected = torch.autograd.grad(y, [x, b], torch.ones_like(y), retain_graph=True)
        assert all(map(torch.equal, torch.autograd.grad(y.sum(), [x, b]), expected))


@pytest.mark.parametrize("size", [(0, 5), (4, 0)])
def test_upfirdn2d_image_without_pixels_gives_the_padding_and_an_empty_gradient(size):
    x = torch.zeros(2, 3, *size, dtype=torch.float64).requires_grad_()
    y = upfirdn2d(x, randn(2, 3), up=2, padding=2)
    assert torch.equal(y, torch.zeros(2, 3, 2 * size[0] + 3, 2 * size[1] + 2, dtype=torch.float64))
    first, = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    assert first.shape == x.shape


@pytest.mark.parametrize("shape", [(2, 0, 4, 5), (0, 3, 4, 5), (2, 3, 0, 5)])
@pytest.mark.parametrize("act", ["linear", "lrelu", "elu"])
def test_bias_act_without_elements_has_the_gradient_zero(act, shape):
    x, b = torch.zeros(shape).requires_grad_(), torch.ones(shape[1]).requires_grad_()
    y = bias_act(x, b, act=act)
    dx, db = torch.autograd.grad(y.sum(), [x, b])
    assert y.shape == dx.shape == shape
    assert torch.equal(db, torch.zeros(shape[1]))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_one_number_equals_the_reference(act):
    x = torch.tensor(-0.7, dtype=torch.float64).requires_grad_()
    found, expected = ((y := bias_act(x, act=act, gain=1.5, impl=impl), *tower(y, [x], 2)) for impl in ("cpp", "ref"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


# torch.compile


def resampled(x, w, b, f):
    """Use every op, as a layer does."""
    x = upfirdn2d(x, f, up=2, padding=(2, 1), gain=4)
    x = bias_act(x, b, act="swish", clamp=2)
    x = conv2d_resample(x, w, f, down=2, padding=1)
    return bias_act(x, b, act="lrelu", clamp=1)


def layer_inputs(size=6):
    return [randn(2, 3, size, size + 2).requires_grad_(), randn(3, 3, 3, 3, seed=6).requires_grad_(),
            randn(3, seed=7).requires_grad_()]


def assert_compiled_equals_eager(function, inputs, f):
    expected = resampled(*inputs, f)
    found = function(*inputs, f)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # sums of some 500 float64 products
    torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), inputs),
                               torch.autograd.grad(expected.sin().sum(), inputs), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_torch_compile_traces_forward_and_backward_in_one_graph(dynamic):
    torch._dynamo.reset()
    function = torch.compile(resampled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (6, 9):
        assert_compiled_equals_eager(function, layer_inputs(size), randn(4, 4))


def test_torch_compile_double_backward_is_refused_by_torch():
    torch._dynamo.reset()
    x, w, b = layer_inputs()
    y = torch.compile(resampled, fullgraph=True, backend="aot_eager")(x, w, b, randn(4, 4))
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(torch.autograd.grad(y.sum(), x, create_graph=True)[0].square().sum(), w)


@pytest.mark.slow
def test_torch_compile_with_compiled_code_around_the_operators_equals_eager(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # so that g++ runs
    torch._dynamo.reset()
    assert_compiled_equals_eager(torch.compile(resampled, fullgraph=True), layer_inputs(), randn(4, 4))
    assert list(tmp_path.rglob("*.so"))
