"""Calls of the kernels and their results in float64: from the table of cases, and for various grid sizes."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor

from tests.helpers.kernel_programs import Manner, Order
from tests.helpers.op_cases import BIAS_ACT_CASES, UPFIRDN2D_CASES, Case, unit_roundoff
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.bias_act_ref import ACTIVATIONS
from torch_utils.ops.upfirdn2d_ref import upfirdn2d_ref

_GAIN = 1.5
USES_OUT = ("linear", "relu", "lrelu")  # activations whose derivative is computed from the result


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the format in which the kernels sum."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _stored(value: Tensor, magnitudes: Tensor, num_roundings: float, dtype: torch.dtype) -> Tensor:
    """Bound the error of a result: `num_roundings` of numbers no larger than `magnitudes`, and that of storing it."""
    computed = math.expm1(num_roundings * math.log1p(unit_roundoff(sum_dtype(dtype)))) * magnitudes
    # Subnormal numbers are off by up to half the smallest of them.
    return computed + unit_roundoff(dtype) * (value.abs() + computed) + torch.finfo(dtype).tiny * unit_roundoff(dtype)


@dataclass(frozen=True, kw_only=True)
class FilterCall:
    """A call of the upfirdn2d kernels.

    x:         [N, C, H, W]
    taps:      ([kx], [ky]), or one [ky, kx]; in what sums are made in
    up, down, pad, out: (x, y)
    gradient_of: a call, where this one is to compute its derivative and x is that of its result
    """

    name: str
    x: Tensor
    taps: tuple[Tensor, ...]
    up: tuple[int, int] = (1, 1)
    down: tuple[int, int] = (1, 1)
    pad: tuple[int, int]
    out: tuple[int, int]
    reversed: bool = False
    gain: float = _GAIN
    channels_last: bool = False
    gradient_of: "FilterCall | None" = None

    @property
    def num_taps(self) -> tuple[int, int]:
        shape = self.taps[0].shape
        return (shape[1], shape[0]) if len(shape) == 2 else (shape[0], len(self.taps[1]))

    def order(self, manner: Manner, whole_planes: int = 0) -> Order:
        """Return the call for a program; x is the end of a number of planes or, for channels_last, images."""
        num, channels, *size = self.x.shape
        x = self.x.permute(0, 2, 3, 1) if self.channels_last else self.x
        planes, depth = (num, channels) if self.channels_last else (num * channels, 1)
        taps = self.taps if len(self.taps) == 2 else (None, None, *self.taps)
        axes = [number for i in (0, 1) for number in (size[1 - i], self.out[i], self.up[i], self.down[i], self.pad[i],
                                                      self.num_taps[i])]
        result = (num, self.out[1], self.out[0], channels) if self.channels_last else (num, channels, *self.out[::-1])
        return Order(work=0, dtype=x.dtype, arrays=(x, *taps), result=result, result_dtype=x.dtype,
                     numbers=(whole_planes or planes, depth, self.reversed, *axes), reals=(self.gain,),
                     whole_x=whole_planes * depth * math.prod(size),
                     whole_y=whole_planes * depth * math.prod(self.out), manner=manner)

    @functools.cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """Return the result in float64, and a bound of the error."""
        value = self._judge(self.x.double(), absolute=False)
        magnitudes = self._judge(self.x.double().abs(), absolute=True)
        # Roundings of the gain, and of a tap, a product and an addition for each term.
        return value, _stored(value, magnitudes, 2 * sum(self.num_taps) + math.prod(self.num_taps) + 4, self.x.dtype)

    def found(self, result: Tensor) -> Tensor:
        return result.permute(0, 3, 1, 2) if self.channels_last else result

    def gradient(self) -> "FilterCall":
        """Return the call that backward makes, with a random derivative of the result."""
        shape = (*self.x.shape[:2], *self.out[::-1])
        taps = self.num_taps
        return replace(self, name=f"{self.name}_gradient", x=drawn(shape, self.x.dtype), up=self.down, down=self.up,
                       pad=tuple(taps[i] - 1 - self.pad[i] for i in (0, 1)), out=(self.x.shape[3], self.x.shape[2]),
                       reversed=not self.reversed, gradient_of=self)

    def _judge(self, x: Tensor, absolute: bool) -> Tensor:
        if self.gradient_of is not None:
            inputs = torch.zeros(self.gradient_of.x.shape, dtype=torch.float64, requires_grad=True)
            return torch.autograd.grad(self.gradient_of._judge(inputs, absolute), inputs, x)[0]
        taps = [tap.double() for tap in self.taps]
        kernel = (taps[0] if len(taps) == 1 else torch.outer(taps[1], taps[0])) * self.gain
        sides = []
        for i in (0, 1):
            covered = (self.out[i] - 1) * self.down[i] + self.num_taps[i]
            sides += [self.pad[i], covered - self.pad[i] - x.shape[3 - i] * self.up[i]]
        return upfirdn2d_ref(x, kernel.abs() if absolute else kernel, self.up, self.down, tuple(sides),
                             flip_filter=not self.reversed)


@dataclass(frozen=True, kw_only=True)
class BiasCall:
    """A call of the bias_act kernels. x: [outer, biases, step]; b: [biases] or None; order: of the derivative"""

    name: str
    x: Tensor
    b: Tensor | None
    act: str
    alpha: float
    gain: float
    clamp: float = math.inf
    order_of_derivative: int = 0

    def order(self, manner: Manner, whole_size: int = 0) -> Order:
        """Return the call for a program; x is the end of an array of a number of elements."""
        uses_out = self.act in USES_OUT
        dy, ddx = (drawn(self.x.shape, self.x.dtype, stream) for stream in (1, 2))
        out = self._forward(self.x.double()).to(self.x.dtype)
        at = self.order_of_derivative
        arrays = (self.x if at == 0 or not uses_out else None, self.b, out if at and uses_out else None,
                  dy if at else None, ddx if at == 2 else None)
        biases, step = (1, 1) if self.b is None else self.x.shape[1:]
        return Order(work=1, dtype=self.x.dtype, arrays=arrays, result=tuple(self.x.shape),
                     result_dtype=self.x.dtype,
                     numbers=(at, list(ACTIVATIONS).index(self.act), whole_size or self.x.numel(), biases, step),
                     reals=(self.alpha, self.gain, self.clamp), whole_x=whole_size, whole_y=whole_size, manner=manner)

    @functools.cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """Return the result in float64, and a bound of the error."""
        x = self.x.double().requires_grad_()
        value = self._forward(x)
        unclamped = replace(self, clamp=math.inf)._forward(x.detach())
        weight = torch.full_like(value, self.gain)
        for stream in range(1, self.order_of_derivative + 1):
            factor = drawn(self.x.shape, self.x.dtype, stream).double()
            weight = weight * factor
            value, = torch.autograd.grad(value, x, factor, create_graph=True)
        total = x.detach() if self.b is None else x.detach() + self.b.double()[:, None]
        # Fewer than 40 roundings (functions of the C library make up to 4 each) of numbers below
        # 2 (1 + |x + b|), which no activation and no derivative exceeds.
        magnitudes = 2 * (1 + total.abs()) * max(1, abs(self.alpha)) * weight.abs()
        bound = _stored(value, magnitudes, 40, self.x.dtype).detach()
        if self.order_of_derivative and self.clamp < math.inf:
            # The derivative jumps where the result reaches the limit, and the result is known as it was stored.
            slack = 8 * unit_roundoff(self.x.dtype) * (1 + unclamped.abs())
            bound[(unclamped.abs() - self.clamp).abs() <= slack] = math.inf
        if self.order_of_derivative == 2:
            bound[total == 0] = math.inf  # where the second derivative of elu and selu jumps
        return value.detach(), bound

    def found(self, result: Tensor) -> Tensor:
        return result

    def derivatives(self) -> list["BiasCall"]:
        """Return this call and the calls that its derivatives make."""
        most = 1 if self.act in USES_OUT else 2
        if self.act == "lrelu" and self.alpha < 0:  # other operators do: the result would hide the slope
            most = 0
        return [replace(self, name=f"{self.name}_{order}", order_of_derivative=order) for order in range(most + 1)]

    def _forward(self, x: Tensor) -> Tensor:
        return bias_act(x, None if self.b is None else self.b.double(), dim=1, act=self.act, alpha=self.alpha,
                        gain=self.gain, clamp=None if self.clamp == math.inf else self.clamp, impl="ref")


Call = FilterCall | BiasCall


def drawn(shape, dtype: torch.dtype, stream: int = 0) -> Tensor:
    """Return normal numbers, the same for the same shape and stream."""
    seed = hash((*shape, stream)) % 2**31
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@functools.cache
def filter_table(dtype: torch.dtype) -> list[FilterCall]:
    """Return the calls that the table of cases and their derivatives make, in both layouts."""
    calls = []
    for case in UPFIRDN2D_CASES:
        call = _filter_call(case, dtype)
        for each in (call, replace(call, name=f"{call.name}_channels_last", channels_last=True)):
            calls += [each, each.gradient()]
    return calls


@functools.cache
def bias_table(dtype: torch.dtype) -> list[BiasCall]:
    """Return the calls that the table of cases and their derivatives make."""
    return [call for case in BIAS_ACT_CASES for call in _bias_call(case, dtype).derivatives()]


def _filter_call(case: Case, dtype: torch.dtype) -> FilterCall:
    with patch("torch_utils.ops.upfirdn2d.upfirdn2d_ref", wraps=upfirdn2d_ref) as reference:
        result = case.run(*case.inputs(), impl="ref")
    x, f, up, down, padding, flip_filter = reference.call_args.args
    # The call's own gain restores the gain of the case.
    taps = (f, f / _GAIN) if f.ndim == 1 else (f / _GAIN,)
    return FilterCall(name=f"{case.name}_{_short(dtype)}", x=x.detach().to(dtype),
                      taps=tuple(tap.to(sum_dtype(dtype)) for tap in taps), up=up, down=down,
                      pad=(padding[0], padding[2]), out=(result.shape[3], result.shape[2]), reversed=not flip_filter)


def _bias_call(case: Case, dtype: torch.dtype) -> BiasCall:
    x, *biases = case.inputs(dtype)
    defaults = ACTIVATIONS[case.arguments["act"]]
    dim = case.arguments.get("dim", 1) % x.ndim
    x = x.detach().reshape(math.prod(x.shape[:dim]), x.shape[dim], -1)
    return BiasCall(name=f"{case.name}_{_short(dtype)}", x=x, b=biases[0].detach() if biases else None,
                    act=case.arguments["act"], alpha=case.arguments.get("alpha", defaults.alpha),
                    gain=case.arguments.get("gain", defaults.gain), clamp=case.arguments.get("clamp", math.inf))


# (up, down, taps, separable): every body that is compiled, and factors and filters that take the general one
KINDS = [(1, 1, 4, True), (2, 1, 4, True), (1, 2, 4, True), (1, 1, 4, False), (2, 1, 4, False), (1, 2, 4, False),
         (1, 1, 12, True), (2, 1, 12, True), (1, 2, 12, True), (1, 1, 1, True), (2, 1, 5, True), (1, 2, 3, True),
         (2, 1, 32, True), (1, 2, 31, True), (3, 2, 5, True), (2, 2, 3, False), (1, 1, 33, True), (4, 1, 6, False)]
# (planes or images, channels, rows, columns) of results: around the widths of tiles (32 and 128 columns, twice that
# for up 2; 16 for channels_last) and the rows of a block, and numbers that fill the last ones partly
_PLANES = [(5, 1, 7, 31), (1, 3, 33, 32), (2, 1, 9, 33), (1, 1, 5, 65), (1, 1, 3, 129), (2, 1, 5, 256), (1, 1, 2, 515),
           (40, 1, 1, 2), (17, 1, 4, 4)]
_IMAGES = [(2, 3, 5, 17), (1, 32, 9, 16), (1, 33, 6, 18), (2, 70, 3, 7), (1, 1, 5, 40)]


@functools.cache
def filter_grids() -> list[FilterCall]:
    """Return calls and their derivatives for every kind and every size; the formats of numbers take turns."""
    return [each for call in _filter_grids() for each in (call, call.gradient())]


def _filter_grids() -> Iterator[FilterCall]:
    dtypes = [torch.float32, torch.float16, torch.float64, torch.bfloat16]
    for i, (up, down, taps, separable) in enumerate(KINDS):
        for j, (num, channels, rows, columns) in enumerate(_PLANES + _IMAGES):
            dtype = dtypes[(i + j) % 4]
            pad = ((taps + up - 1) // 2 - j % 3, (taps - down) // 2 + i % 2)
            size = [max(-(-(out * down) // up), 1) for out in (columns, rows)]
            shapes = [(taps,), (taps,)] if separable else [(taps, taps)]
            yield FilterCall(name=f"up{up}_down{down}_taps{taps}_{num}x{channels}x{rows}x{columns}_{_short(dtype)}",
                             x=drawn((num, channels, size[1], size[0]), dtype),
                             taps=tuple(drawn(shape, sum_dtype(dtype), k) for k, shape in enumerate(shapes)),
                             up=(up, up), down=(down, down), pad=pad, out=(columns, rows),
                             reversed=bool((i + j) % 2), channels_last=j >= len(_PLANES))


# [outer, biases, step]: rows of one bias and rows of all biases, shorter and longer than a tile, in odd numbers
_BIAS_SHAPES = [(1, 1, 1), (2, 3, 5), (3, 2, 8), (2, 5, 255), (1, 3, 256), (2, 1, 257), (1, 2, 1025), (1, 1, 3001),
                (3, 7, 1), (9, 64, 1), (3, 1030, 1), (130, 3, 1), (70, 1, 4)]


@functools.cache
def bias_grids() -> list[BiasCall]:
    """Return calls for every activation, size and order, some with a bias; the formats of numbers take turns."""
    return [each for call in _bias_grids() for each in call.derivatives()]


def _bias_grids() -> Iterator[BiasCall]:
    dtypes = [torch.float16, torch.float32, torch.bfloat16, torch.float64]
    for i, act in enumerate(ACTIVATIONS):
        for j, shape in enumerate(_BIAS_SHAPES):
            dtype = dtypes[(i + j) % 4]
            yield BiasCall(name=f"{act}_{'x'.join(map(str, shape))}_{_short(dtype)}", x=drawn(shape, dtype),
                           b=drawn(shape[1:2], dtype, 3) if (i + j) % 3 else None, act=act, alpha=0.3,
                           gain=-0.8 if j % 2 else 1.3, clamp=0.7 if (i + j) % 2 else math.inf)


# Results or inputs of more than 2^31 elements, of which memory holds the last image alone: (up, down, taps, separable,
# channels, rows, columns of the result), the last two so that kernels meet odd ends.
_HUGE = {
    "rows": (1, 1, 4, True, 1, 65, 67),
    "rows_up": (2, 1, 4, True, 1, 66, 130),
    "rows_down": (1, 2, 4, False, 1, 33, 67),
    "channels": (1, 1, 4, True, 33, 17, 19),
    "channels_up": (2, 1, 6, True, 33, 18, 22),
    "channels_down": (1, 2, 4, False, 34, 17, 19),
    "anything": (3, 2, 5, True, 1, 65, 67),
    "anything_channels": (1, 1, 3, False, 5, 17, 19),
}
# [outer, biases, step], with a bias or without
_HUGE_BIAS = [((1, 3, 4095), True), ((5, 4095, 1), True), ((1, 1, 12285), False)]
_MORE_THAN_INT32 = 2**31 + 2**20


def huge_orders() -> list[tuple[Call, Order, Order]]:
    """Return small calls, orders that run them as the end of a huge one, and orders that run them as they are."""
    rows = []
    for name, (up, down, taps, separable, channels, *result) in _HUGE.items():
        size = [out * down // up for out in result]
        shapes = [(taps,), (taps,)] if separable else [(taps, taps)]
        call = FilterCall(name=name, x=drawn((1, channels, *size), torch.float16),
                          taps=tuple(drawn(shape, torch.float32, i) for i, shape in enumerate(shapes)), up=(up, up),
                          down=(down, down), pad=(1, 2), out=(result[1], result[0]), channels_last=channels > 1)
        planes = _MORE_THAN_INT32 // (channels * max(math.prod(size), math.prod(result))) + 1
        rows.append((call, call.order(Manner(last_blocks=40), planes), call.order(Manner())))
    for shape, biased in _HUGE_BIAS:
        call = BiasCall(name=f"bias {shape}", x=drawn(shape, torch.float16), act="lrelu", alpha=0.2, gain=1.4,
                        b=drawn(shape[1:2], torch.float16, 3) if biased else None, clamp=2.0)
        size = (_MORE_THAN_INT32 // call.x.numel() + 1) * call.x.numel()
        rows.append((call, call.order(Manner(last_blocks=200), size), call.order(Manner())))
    return rows


def wrong_results(calls: list[Call], results: list[Tensor]) -> list[str]:
    """Return a line for each call whose result differs from float64 by more than its bound."""
    lines = []
    for call, result in zip(calls, results, strict=True):
        value, bound = call.expected
        error = (call.found(result).double() - value).abs()
        wrong = ~(error <= bound)  # NaN is wrong
        if wrong.any():
            worst = torch.where(wrong, (error / bound).nan_to_num(nan=math.inf), 0).max().item()
            lines.append(f"{call.name}: {int(wrong.sum())} of {value.numel()} elements, up to {worst:.3g} bounds off")
    return lines


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
