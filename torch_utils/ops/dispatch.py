"""Choose the implementation of an op from its `impl` argument and the device it is to run on."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from dnnlib.cli import UserError
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
        return auto_implementation(x.device.type)
    if impl in ("cpp", "cuda"):
        expected = compiled.DEVICE_OF[impl]
        if x.device.type != expected:
            raise RuntimeError(f"{op}: impl is {impl!r} and x is on {x.device.type}; expected x on {expected}: move "
                               "it, or use 'auto'")
        failure = compiled.failure_of(expected)
        if failure is not None:
            raise RuntimeError(f"{op}: impl is {impl!r}, which cannot run here: {failure}")
    return impl


def auto_implementation(device_type: str) -> str:
    """Return what "auto" means now on a type of device."""
    return compiled.fast_implementation(device_type) if _auto == "auto" else _auto


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


@contextmanager
def auto_means_as_before(before: str | None, device_type: str, work: str) -> Iterator[str]:
    """Let "auto" mean what it meant when some work was begun, so that its end fits its beginning; yield what it means.

    before:  as `auto_implementation` returned it then; None where there is nothing to continue
    work:    what is continued, for messages, such as "the work in synthetic.zip.parts"

    Raises UserError where that implementation cannot run.
    """
    if before is not None and before not in IMPLEMENTATIONS:
        raise UserError(f"{work} was begun with operators of another version of this program ({before}); remove it to "
                        "begin anew")
    failure = compiled.failure_of(compiled.DEVICE_OF[before]) if before in compiled.DEVICE_OF else None
    if failure is not None:
        raise UserError(f"{work} was begun with the compiled operators ({before}), which cannot run here ({failure}): "
                        "put that right and give the same command again, or remove it to begin anew")
    now = auto_implementation(device_type)
    if before in (None, now):
        yield now
        return
    if before == "composed":
        compiled.tell(f"{work} was begun with PyTorch's operators and goes on with them, so that all of it is alike")
    with auto_means(before):
        yield before
