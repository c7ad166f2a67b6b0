"""Choose the implementation of an op from its `impl` argument and the device it is to run on."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from torch_utils.ops import compiled

IMPLEMENTATIONS = ("auto", "ref", "composed", "cpp", "cuda")
_auto = "auto"  # what "auto" means


def resolve_impl(op: str, impl: str, x: Tensor) -> str:
    """Return the implementation to run on x: "ref", "composed", "cpp" or "cuda".

    "auto" means the fastest one that is present: compiled for the device of x, else "composed", which puts the op
    together from PyTorch's. "ref" follows the definition.

    Raises ValueError for an unknown name and RuntimeError for one that cannot run, with the reason.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl is {impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        impl = _auto
    if impl == "auto":
        return compiled.fast_implementation(x.device.type)
    if impl in ("cpp", "cuda"):
        expected = compiled.DEVICE_OF[impl]
        if x.device.type != expected:
            raise RuntimeError(f"{op}: impl is {impl!r} and x is on {x.device.type}; expected x on {expected}: move "
                               "it, or use 'auto'")
        failure = compiled.failure_of(expected)
        if failure is not None:
            raise RuntimeError(f"{op}: impl is {impl!r}, which cannot run here: {failure}")
    return impl


@contextmanager
def auto_means(impl: str) -> Iterator[None]:
    """Let "auto" mean another implementation for a while, in this process: to compare whole networks."""
    global _auto
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    before, _auto = _auto, impl
    try:
        yield
    finally:
        _auto = before
