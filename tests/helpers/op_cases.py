"""Small cases of every op: one table for comparisons, numerical derivative checks and precision bounds.

A new behavior is a new row; a new implementation is a new entry in the lists below.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.bias_act_ref import ACTIVATIONS
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import downsample2d, filter2d, upfirdn2d, upsample2d
from training.layers import modulated_conv2d

# What runs on a CPU, "ref" first.
CPU_IMPLEMENTATIONS = ["ref", "composed", "cpp"]
# (implementation, device) compared with "ref"
COMPARED = [*((impl, "cpu") for impl in CPU_IMPLEMENTATIONS[1:]),
            pytest.param("cuda", "cuda", marks=pytest.mark.cuda)]

# Two orders of summation of n float64 terms differ by at most 2 n eps times the sum of their magnitudes. Values and
# derivatives of these cases add up fewer than 500 products each, a few times over: 2 * 500 * 2.2e-16 = 2.2e-13.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Case:
    """One call of an op: op(*inputs, **constants, **arguments, impl=...)."""

    name: str
    op: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]  # of the inputs that are differentiated
    taps: tuple[int, ...] | None = None  # shape of the filter, which is a constant
    arguments: dict = field(default_factory=dict)
    filter_name: str = "f"

    def inputs(self, dtype=torch.float64, device="cpu") -> list[Tensor]:
        """Return fixed normal inputs of the given precision, which require gradients."""
        random = self._random()
        return [torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype).requires_grad_()
                for shape in self.shapes]

    def filter(self, dtype=torch.float64, device="cpu") -> Tensor | None:
        """Return an asymmetric filter whose taps all differ."""
        if self.taps is None:
            return None
        return torch.randn(self.taps, generator=self._random(1), dtype=torch.float64).to(device, dtype)

    def run(self, *inputs: Tensor, impl: str = "auto") -> Tensor:
        given = dict(self.arguments)
        if self.filter_name:
            given[self.filter_name] = self.filter(inputs[0].dtype, inputs[0].device)
        return self.op(*inputs, **given, impl=impl)

    def derivatives(self, impl: str, device="cpu") -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the result and its first and second derivatives."""
        inputs = self.inputs(device=device)
        result = self.run(*inputs, impl=impl)
        yield "result", result
        weights = torch.randn(result.shape, generator=self._random(2), dtype=result.dtype).to(device)
        # A sine makes derivatives of every order nonzero, also for linear ops.
        first = torch.autograd.grad((result.sin() * weights).sum(), inputs, create_graph=True)
        yield from ((f"first[{i}]", value) for i, value in enumerate(first))
        # torch cuts the graph of an empty batch, whose second derivative is zeros.
        second = torch.autograd.grad(sum(value.square().sum() for value in first), inputs, materialize_grads=True)
        yield from ((f"second[{i}]", value) for i, value in enumerate(second))

    def _random(self, stream: int = 0) -> torch.Generator:
        # Seeded by the shapes and not the name, so that two ways to compute the same use the same numbers.
        return torch.Generator().manual_seed(zlib.crc32(repr((self.shapes, self.taps)).encode()) + stream)


def ids(cases: list[Case]) -> dict:
    """Return the arguments of pytest.mark.parametrize for a table."""
    return {"argvalues": cases, "ids": [case.name for case in cases]}


def assert_equals_reference(case: Case, impl: str, device: str) -> None:
    """Compare the result and both orders of derivative with those of "ref" on the CPU in float64."""
    found = case.derivatives(impl, device)
    for (label, value), (_, expected) in zip(found, case.derivatives("ref")):
        assert value.shape == expected.shape, f"{case.name}: shape of {label}"
        # Relative to the largest value, because errors scale with the terms of a sum and not with the sum.
        largest = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
        torch.testing.assert_close(value.cpu(), expected, rtol=0, atol=TOLERANCE * largest,
                                   msg=lambda text, label=label: f"{case.name}: {label}: {text}")


def _filtering(name, x, taps, op=upfirdn2d, **arguments) -> Case:
    return Case(name, op, (x,), taps, arguments)


UPFIRDN2D_CASES = [
    _filtering("identity", (2, 3, 4, 5), None),
    _filtering("no_filter_resampled", (1, 2, 4, 5), None, up=2, down=3, padding=1),
    _filtering("even_taps", (2, 2, 5, 4), (4, 4), padding=(2, 1, 2, 1)),
    _filtering("odd_taps", (1, 2, 5, 4), (3, 3), padding=1),
    _filtering("different_taps", (1, 2, 5, 7), (2, 5), padding=(2, 1)),
    _filtering("flipped", (1, 2, 5, 4), (4, 3), padding=2, flip_filter=True),
    _filtering("gain", (1, 2, 5, 4), (3, 2), gain=2.5),
    _filtering("separable", (2, 2, 6, 5), (4,), padding=(2, 1, 0, 3), gain=3),
    _filtering("separable_flipped_resampled", (1, 2, 4, 5), (5,), up=3, down=2, padding=3, flip_filter=True),
    _filtering("up2_odd_pad", (2, 3, 4, 4), (4, 4), up=2, padding=(2, 1)),
    _filtering("up4", (1, 1, 3, 2), (5, 6), up=4, padding=3),
    _filtering("up_more_than_taps", (1, 2, 3, 3), (2, 2), up=4, padding=(0, 3, 1, 2)),
    _filtering("down2", (2, 2, 7, 6), (4, 4), down=2, padding=(1, 1)),
    _filtering("down4_leaves_a_rest", (1, 2, 11, 9), (3, 3), down=4, padding=(1, 0)),
    _filtering("down_more_than_the_image", (1, 2, 3, 3), (2, 2), down=4),
    _filtering("up_and_down", (1, 2, 5, 4), (4, 3), up=3, down=2, padding=(2, 1, 1, 3)),
    _filtering("factors_per_axis", (1, 2, 5, 6), (4, 5), up=(1, 3), down=(4, 2), padding=(4, 1, 2, 2)),
    _filtering("up_x_down_y", (1, 2, 6, 3), (3, 4), up=(4, 1), down=(1, 3), padding=2),
    _filtering("width_one", (1, 2, 5, 1), (3, 4), padding=2),
    _filtering("one_pixel_upsampled", (2, 1, 1, 1), (4, 4), up=2, padding=(2, 1)),
    _filtering("filter_larger_than_image", (1, 2, 2, 3), (9, 8), padding=(5, 4)),
    _filtering("negative_padding", (1, 1, 9, 7), (3, 3), padding=(-1, 0, -2, -3)),
    _filtering("cropped_to_one_pixel", (1, 2, 6, 5), (2, 2), padding=(-2, -1, -3, -1)),
    _filtering("cropped_and_padded", (1, 2, 4, 5), (3, 3), up=2, down=2, padding=(-3, 4, 5, -2)),
    _filtering("padding_beyond_the_filter", (1, 1, 3, 2), (3, 2), up=2, down=3, padding=(7, 9, 11, 6)),
    _filtering("filter2d_even", (1, 2, 5, 4), (4, 4), op=filter2d, gain=2),
    _filtering("filter2d_odd_padded", (1, 2, 5, 4), (3, 5), op=filter2d, padding=(1, -1)),
    _filtering("upsample2d_even", (1, 2, 3, 4), (4, 4), op=upsample2d),
    _filtering("upsample2d_per_axis", (1, 2, 3, 4), (5,), op=upsample2d, up=(3, 2), padding=1),
    _filtering("downsample2d_even", (1, 2, 6, 4), (4, 4), op=downsample2d),
    _filtering("downsample2d_per_axis", (1, 2, 9, 8), (6,), op=downsample2d, down=(2, 3), flip_filter=True),
]

# What the small cases do not reach: filters beyond what fast bodies keep, and rows of several tiles. Their sums are of
# up to 1600 products; errors of such sums are random, so that they stay within TOLERANCE, which is relative to the
# largest value.
LARGE_UPFIRDN2D_CASES = [
    _filtering("separable_32_taps", (1, 2, 35, 37), (32,), padding=5),
    _filtering("separable_33_taps", (1, 2, 35, 37), (33,), padding=5),
    _filtering("separable_40_taps", (1, 2, 20, 21), (40,), padding=20),
    _filtering("separable_40_taps_up2", (1, 2, 12, 15), (40,), up=2, padding=(20, 19)),
    _filtering("separable_12_taps_up2", (2, 2, 9, 10), (12,), up=2, padding=(6, 5), flip_filter=True),
    _filtering("separable_12_taps_down2", (2, 2, 18, 20), (12,), down=2, padding=5),
    _filtering("full_9x7", (1, 2, 11, 12), (9, 7), padding=4),
    _filtering("full_9x7_up2", (1, 2, 8, 9), (9, 7), up=2, padding=4),
    _filtering("full_9x7_down3", (1, 2, 20, 19), (9, 7), down=3, padding=4),
    _filtering("separable_up3", (1, 2, 7, 9), (6,), up=3, padding=3),
    _filtering("up2_down3_per_axis", (1, 3, 9, 8), (5, 6), up=(2, 1), down=(1, 3), padding=3),
    *(_filtering(f"{name}_{width}_columns", (1, 2, 3, width), taps, **factors)
      for width in (7, 8, 9, 15, 16, 17) for name, taps, factors in [
          ("filter", (4,), dict(padding=(2, 1))), ("up2", (4, 4), dict(up=2, padding=(2, 1))),
          ("down2", (4,), dict(down=2, padding=1))]),
    *(_filtering(f"{name}_{width}_columns", (1, 2, 2, width), taps, **factors)
      for width in (511, 512, 513, 1030) for name, taps, factors in [
          ("filter", (4,), dict(padding=(2, 1))), ("filter_full", (4, 4), dict(padding=(2, 1))),
          ("up2", (4,), dict(up=2, padding=(2, 1))), ("down2", (4, 4), dict(down=2, padding=1))]),
]

EMPTY_CASES = [
    _filtering("empty_batch", (0, 3, 4, 5), (3, 4), padding=2),
    _filtering("empty_batch_upsampled", (0, 3, 4, 5), (3, 4), up=2, down=3, padding=2),
]

BIAS_ACT_CASES = [
    Case(f"{act}{suffix}", bias_act, ((2, 3, 4), (3,))[:num_inputs], None, {"act": act, **arguments}, filter_name="")
    for act in ACTIVATIONS
    for suffix, num_inputs, arguments in [
        ("", 1, {}),
        ("_biased", 2, {}),
        ("_gain", 2, {"gain": 0.7, "alpha": 0.35}),
        ("_clamp", 2, {"clamp": 0.6}),
        ("_clamp_gain_no_bias", 1, {"clamp": 0.4, "gain": -1.5}),
    ]
] + [
    Case("odd_length", bias_act, ((2, 3, 5), (3,)), arguments={"act": "lrelu", "clamp": 0.9}, filter_name=""),
    Case("negative_slope", bias_act, ((2, 3, 5), (3,)), arguments={"act": "lrelu", "alpha": -0.3}, filter_name=""),
    Case("bias_along_the_first", bias_act, ((3, 4), (3,)), arguments={"act": "swish", "dim": 0}, filter_name=""),
    Case("bias_along_the_last", bias_act, ((2, 3, 4), (4,)), arguments={"act": "elu", "dim": -1}, filter_name=""),
]


def _resampling(name, x, w, taps=None, **arguments) -> Case:
    return Case(name, conv2d_resample, (x, w), taps, arguments)


CONV2D_RESAMPLE_CASES = [
    _resampling("plain_1x1", (2, 3, 4, 5), (2, 3, 1, 1)),
    _resampling("plain_3x3", (1, 2, 4, 5), (3, 2, 3, 3), padding=1),
    _resampling("asymmetric_padding", (1, 2, 4, 5), (3, 2, 3, 2), padding=(1, 2, 0, 3)),
    _resampling("crop", (1, 2, 6, 6), (1, 2, 2, 2), padding=-1),
    _resampling("convolve", (1, 2, 4, 5), (3, 2, 3, 3), padding=1, flip_weight=False),
    _resampling("grouped", (2, 4, 4, 3), (6, 2, 3, 3), padding=1, groups=2),
    _resampling("up_1x1", (1, 2, 4, 3), (3, 2, 1, 1), (4, 4), up=2),
    _resampling("up_3x3", (1, 2, 4, 3), (3, 2, 3, 3), (4, 4), up=2, padding=1),
    _resampling("up_3x3_convolve", (1, 2, 4, 3), (3, 2, 3, 3), (4, 4), up=2, padding=1, flip_weight=False),
    _resampling("up_3x3_grouped", (1, 4, 3, 3), (6, 2, 3, 3), (4, 4), up=2, padding=1, groups=2),
    _resampling("up_3x3_flipped_filter", (1, 2, 3, 3), (2, 2, 3, 3), (4, 3), up=2, padding=1, flip_filter=True),
    _resampling("up_3x3_no_filter", (1, 2, 3, 4), (2, 2, 3, 3), up=2, padding=1),
    _resampling("up_2x4_separable", (1, 2, 3, 3), (2, 2, 2, 4), (5,), up=2, padding=(1, 2, 0, 1)),
    _resampling("up_3x3_crop", (1, 2, 5, 5), (2, 2, 3, 3), (4, 4), up=2, padding=(-2, -3, 1, -2)),
    _resampling("up3_2x2", (1, 2, 3, 3), (2, 2, 2, 2), (4, 4), up=3, padding=1),
    _resampling("up4_5x4", (1, 1, 3, 2), (2, 1, 5, 4), (6, 6), up=4, padding=2),
    _resampling("down_1x1", (1, 2, 6, 4), (3, 2, 1, 1), (4, 4), down=2),
    _resampling("down_3x3", (1, 2, 6, 4), (3, 2, 3, 3), (4, 4), down=2, padding=1),
    _resampling("down_3x3_convolve", (1, 2, 6, 5), (3, 2, 3, 3), (4, 4), down=2, padding=1, flip_weight=False),
    _resampling("down_3x3_grouped", (1, 4, 6, 4), (2, 2, 3, 3), (4, 4), down=2, padding=1, groups=2),
    _resampling("down_3x3_flipped_filter", (1, 2, 5, 6), (2, 2, 3, 3), (3, 4), down=2, padding=1, flip_filter=True),
    _resampling("down3_2x3_separable", (1, 2, 7, 8), (2, 2, 2, 3), (5,), down=3, padding=(1, 0, 2, 1)),
    _resampling("up_and_down_1x1", (1, 2, 4, 5), (2, 2, 1, 1), (4, 4), up=2, down=3),
    _resampling("up_and_down_3x3", (1, 2, 4, 5), (2, 2, 3, 3), (4, 4), up=2, down=3, padding=1),
    _resampling("up_and_down_grouped", (1, 2, 3, 4), (4, 1, 3, 3), (3, 3), up=3, down=2, padding=1, groups=2),
]


def _modulating(name, w, *, fused, x=(2, 3, 4, 4), noise=None, taps=None, **arguments) -> Case:
    if "padding" not in arguments:
        arguments["padding"] = w[2] // 2
    shapes = (x, w, (x[0], x[1])) + (() if noise is None else (noise,))
    arguments["fused_modconv"] = fused
    return Case(f"{name}_{'fused' if fused else 'scaled'}", modulated_conv2d, shapes, taps, arguments,
                filter_name="resample_filter")


MODULATED_CONV2D_CASES = [
    make(fused=fused)
    for make in [
        partial(_modulating, "3x3", (2, 3, 3, 3)),
        partial(_modulating, "3x3_not_demodulated", (2, 3, 3, 3), demodulate=False),
        partial(_modulating, "1x1_not_demodulated", (2, 3, 1, 1), demodulate=False),
        partial(_modulating, "noise_per_image", (2, 3, 3, 3), noise=(2, 1, 4, 4)),
        partial(_modulating, "noise_shared_convolve", (2, 3, 3, 3), noise=(4, 4), flip_weight=False),
        partial(_modulating, "up", (2, 3, 3, 3), taps=(4, 4), up=2, flip_weight=False),
        partial(_modulating, "up_noise", (2, 2, 3, 3), x=(2, 2, 3, 3), noise=(2, 1, 6, 6), taps=(4, 4), up=2),
        partial(_modulating, "down", (2, 3, 3, 3), taps=(4, 4), down=2),
        partial(_modulating, "up_not_demodulated", (2, 3, 1, 1), taps=(4, 4), up=2, demodulate=False),
        partial(_modulating, "one_image", (2, 3, 3, 3), x=(1, 3, 4, 4)),
    ]
    for fused in (True, False)
]

HALF_DTYPES = [torch.float16, torch.bfloat16]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def filtering_bound(case: Case, dtype: torch.dtype) -> Tensor:
    """Bound the error of a filtering case in half precision, element by element.

    A sum of n products whose factors and partial sums are rounded is off by at most ((1 + u)^(n + 2) - 1) times the sum
    of the products' magnitudes (n + 2: the tap, the product, and n additions or fewer; the rounding of the result is
    one of them). That sum is what the op makes of absolute values. Separable filters do it twice. Rounding the scaled
    filter adds one more.
    """
    passes = 2 if case.taps is not None and len(case.taps) == 1 else 1
    num_terms = math.prod(case.taps or (1,)) + 3
    magnitudes = case.op(*(x.detach().to(dtype).double().abs() for x in case.inputs()), **_absolute(case), impl="ref")
    relative = (1 + unit_roundoff(dtype)) ** (passes * num_terms) - 1
    return relative * magnitudes + torch.finfo(dtype).smallest_normal


def _absolute(case: Case) -> dict:
    taps = case.filter()
    return {**case.arguments, "f": None if taps is None else taps.abs(), "gain": abs(case.arguments.get("gain", 1))}


# Fixed numbers, in every memory layout


def randn(*shape, seed=5, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def every_second(x):
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every_second": every_second,
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand_as(x),
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),  # not aligned to vectors
}


def laid_out(x, layout):
    """Return x in another layout; "expanded" changes its values too."""
    y = LAYOUTS[layout](x)
    assert layout in ("contiguous", "channels_last", "offset") or len(x) == 1 or not y.is_contiguous()
    return y
