"""Compare operators with their reference on small inputs, before a run trusts them on a device that is new to them."""

import torch
from torch import Tensor

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import upfirdn2d

# float32 sums of 16 products in two orders, through an activation and two derivatives; a wrong index or sign gives
# errors near 1.
_TOLERANCE = 1e-4


@torch.inference_mode(False)
@torch.enable_grad()
def first_difference(device: torch.device, impl: str) -> str | None:
    """Return which operator differs from "ref" on the CPU and by how much, in one line; None when all agree.

    impl: the implementation to look at, which runs on `device`
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 37, generator=random, dtype=torch.float64)
    b = torch.randn(3, generator=random, dtype=torch.float64)
    taps = torch.randn(4, 4, generator=random, dtype=torch.float64)
    for name, call in _calls(b, taps):
        expected = _with_derivatives(call, x, "ref", torch.device("cpu"), torch.float64)
        for layout in (torch.contiguous_format, torch.channels_last):
            found = _with_derivatives(call, x.to(memory_format=layout), impl, device, torch.float32)
            for order, (value, wanted) in enumerate(zip(found, expected)):
                error = (value.cpu().double() - wanted).abs().max().item() / max(wanted.abs().max().item(), 1)
                if not error <= _TOLERANCE:
                    return (f"{name} on {device} differs from the reference by {error:.2g} in derivative {order} "
                            f"({layout}); expected {_TOLERANCE:g} at most: please report it")
    return None


def _calls(b: Tensor, taps: Tensor):
    """Yield (name, function of x and implementation): the ways in which the networks use the operators."""
    def resampled(x, impl, f, **arguments):
        return upfirdn2d(x, f.to(x), **arguments, impl=impl)

    def activated(x, impl, act):
        return bias_act(x, b.to(x), act=act, clamp=1, impl=impl)

    for filter_name, f in (("4 x 4", taps), ("separable", taps[0])):
        for factors in ({"padding": (2, 1)}, {"up": 2, "padding": (2, 1)}, {"down": 2, "padding": 1}):
            yield (f"upfirdn2d with a {filter_name} filter and {factors}",
                   lambda x, impl, f=f, factors=factors: resampled(x, impl, f, **factors))
    for act in ("linear", "lrelu", "swish"):
        yield f"bias_act with {act}", lambda x, impl, act=act: activated(x, impl, act)


def _with_derivatives(call, x: Tensor, impl: str, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return the result and its first two derivatives, of a scalar that has all of them."""
    x = x.to(device, dtype).requires_grad_()
    result = call(x, impl)
    first, = torch.autograd.grad(result.sin().sum(), x, create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), x)
    return [result.detach(), first.detach(), second]
