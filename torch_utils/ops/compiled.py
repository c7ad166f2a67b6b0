"""The compiled operators: which implementation of an op runs where, and how the libraries are loaded and checked.

An op's `impl` is one of IMPLEMENTATIONS: "ref" follows the definition, "composed" combines PyTorch's own operators,
"cpp" and "cuda" are compiled for the CPU or a GPU. "auto" is the compiled one if its library is built, else "composed",
with one warning that gives the reason. Nothing is built here unless `make_ready` is called. The CUDA library, which no
test machine could run, is compared with the reference on small inputs before it is used.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

import torch
from torch import Tensor

from dnnlib.cli import UserError
from torch_utils.distributed import is_first_process
from torch_utils.ops.bias_act_ref import ACTIVATIONS, activation_named, bias_act_ref
from torch_utils.ops.build import BuildError, find, library
from torch_utils.ops.upfirdn2d_ref import Axis, upfirdn2d_ref

IMPLEMENTATIONS = ("auto", "ref", "composed", "cpp", "cuda")
IMPLEMENTATION_ON = {"cpu": "cpp", "cuda": "cuda"}  # device type -> its compiled implementation
DEVICE_OF = {impl: device for device, impl in IMPLEMENTATION_ON.items()}
_NUMBERS = {act: number for number, act in enumerate(ACTIVATIONS)}  # as the compiled operators number them
# float32 sums of 16 products in two orders, through an activation and two derivatives; a wrong index or sign gives
# errors near 1.
_TOLERANCE = 1e-4

_LOCK = RLock()
_auto = "auto"  # what "auto" means
_failures: dict[str, str | None] = {}  # kind of library -> why it cannot run, None where it can
_told: set[str] = set()  # kinds of library that a warning was printed for
_is_estimating = False


# The choice


def resolve_impl(op: str, impl: str, x: Tensor) -> str:
    """Return the implementation to run on x: "ref", "composed", "cpp" or "cuda".

    "auto" means the fastest one available: compiled for the device of x, else "composed".

    Raises ValueError for an unknown name and RuntimeError for one that cannot run, with the reason.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl is {impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        impl = _auto
    if impl == "auto":
        return auto_implementation(x.device.type)
    if impl in DEVICE_OF:
        expected = DEVICE_OF[impl]
        if x.device.type != expected:
            raise RuntimeError(f"{op}: impl is {impl!r} and x is on {x.device.type}; expected x on {expected}: move "
                               "it, or use 'auto'")
        failure = failure_of(expected)
        if failure is not None:
            raise RuntimeError(f"{op}: impl is {impl!r}, which cannot run here: {failure}")
    return impl


def auto_implementation(device_type: str) -> str:
    """Return what "auto" means now on a type of device."""
    return fast_implementation(device_type) if _auto == "auto" else _auto


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
    """Let "auto" mean what it meant when some work was started, so that all of it is consistent; yield what it means.

    before:  as `auto_implementation` returned it then; None if there is nothing to continue
    work:    what is continued, for messages, such as "the work in synthetic.zip.parts"

    Raises UserError where that implementation cannot run.
    """
    if before is not None and before not in IMPLEMENTATIONS:
        raise UserError(f"{work} was started with operators of another version of this program ({before}): remove it "
                        "to start from scratch")
    failure = failure_of(DEVICE_OF[before]) if before in DEVICE_OF else None
    if failure is not None:
        raise UserError(f"{work} was started with the compiled operators ({before}), which cannot run here "
                        f"({failure}): fix that and repeat the command, or remove it to start from scratch")
    now = auto_implementation(device_type)
    if before in (None, now):
        yield now
        return
    if before == "composed":
        _print_once_a_run(f"{work} was started with PyTorch's own operators and continues with them, for consistent "
                          "results")
    with auto_means(before):
        yield before


def fast_implementation(kind: str) -> str:
    """Return the implementation that "auto" takes on a type of device: "cpp", "cuda", else "composed".

    On "meta", which computes only shapes, it is the CPU's. Prints once per run why it is "composed".
    """
    is_meta = kind == "meta"
    if is_meta:
        kind = "cpu"
    if kind not in IMPLEMENTATION_ON:
        return "composed"
    failure = failure_of(kind)
    if failure is None:
        return IMPLEMENTATION_ON[kind]
    if kind not in _told and not is_meta and not _is_estimating:
        _told.add(kind)
        _print_once_a_run(f"warning: using PyTorch's own operators, which are slower: {failure}")
    return "composed"


@contextmanager
def estimating() -> Iterator[None]:
    """Print no warning about operators that cannot run, while a run is only being estimated."""
    global _is_estimating
    before, _is_estimating = _is_estimating, True
    try:
        yield
    finally:
        _is_estimating = before


def describe(kind: str) -> str:
    """Return which operators a run uses, and why not faster ones, for its record."""
    chosen = fast_implementation(kind)
    if chosen == "cpp":
        return f"cpp ({torch.ops.lesion_ops.cpu_level()})"
    failure = _failures.get(kind)
    return chosen if failure is None else f"{chosen} ({failure})"


def _print_once_a_run(line: str) -> None:
    if is_first_process():
        print(line, file=sys.stderr)


# The libraries


def failure_of(kind: str) -> str | None:
    """Load the operators of "cpu" or "cuda", once per process; return why they cannot run, or None if they can.

    Builds nothing: see `make_ready`. LIMIT: torch.compile cannot trace this, so operators must be loaded before: by
    this function, or by running one.
    """
    if kind not in _failures:
        with _LOCK:
            if kind not in _failures:
                _remember(kind, builds=False)
    return _failures[kind]


def make_ready(kind: str) -> str | None:
    """Do what `failure_of` does, and first build missing operators, for long work that follows.

    Of processes that start together, one builds and the others wait. Does nothing if operators are already loaded.
    """
    if kind in IMPLEMENTATION_ON:
        with _LOCK:
            for each in dict.fromkeys(("cpu", kind)):  # CUDA's need the names that the CPU's register
                if _failures.get(each, "not tried") is not None:
                    _remember(each, builds=True)
        return _failures[kind]
    return None


def _remember(kind: str, *, builds: bool) -> None:
    """Load operators, and keep the reason why they cannot run, or None."""
    failure = failure_of("cpu") if kind == "cuda" else None  # the CPU's register the operators' names
    if failure is None:
        errors = (BuildError, OSError)  # OSError: a library that the loader refuses
        try:
            torch.ops.load_library(_locate(kind, builds=builds))
            if kind == "cuda":
                errors = RuntimeError  # for example, the library has no code for this GPU
                failure = first_difference(torch.device(kind))
        except errors as error:
            failure = " ".join(f"{error.__cause__ or error}".split())  # PyTorch names the reason in the cause
            if isinstance(error, OSError):
                failure += "; to build it again with this system's compiler: python -m torch_utils.ops.build --force"
    if kind == "cpu" and failure is None:
        for name, shape in (("upfirdn2d", _upfirdn2d_shape), ("bias_act", _bias_act_shape),
                            ("bias_act_grad", _bias_act_grad_shape), ("bias_act_grad2", _bias_act_grad2_shape)):
            torch.library.register_fake(f"lesion_ops::{name}", shape)
    _failures[kind] = failure


def _locate(kind: str, *, builds: bool) -> Path:
    """Return the library; build it if `builds` and necessary. Raises BuildError."""
    failure = BuildError(f"the compiled {kind.upper()} operators are not built: run python -m torch_utils.ops.build "
                         "once")
    if builds:
        try:
            return library(kind)
        except BuildError as error:
            failure = error
    found = find(kind)
    if found is None:
        raise failure
    return found


# The operators


def upfirdn2d_compiled(x: Tensor, f: Tensor, up: tuple[int, int], down: tuple[int, int],
                       padding: tuple[int, int, int, int], flip_filter: bool, gain: float) -> Tensor:
    """Compute what `upfirdn2d_ref` computes times gain; differentiable to any order in x, constant in f.

    x:  [N, C, H, W];  f: [kh, kw], or [k] for a separable filter;  up, down: (x, y);  padding: (x0, x1, y0, y1)
    """
    return torch.ops.lesion_ops.upfirdn2d.default(x, f, up, down, padding, flip_filter, gain)


def bias_act_compiled(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float,
                      clamp: float | None) -> Tensor:
    """Compute what `bias_act_ref` computes; differentiable to any order in x and b.

    Where the result of linear, relu or lrelu is clamped, no gradient passes. The first and second derivatives are
    compiled too: those of linear, relu and lrelu need only the result, which the next layer keeps anyway, and are
    constant where they exist; the others are computed from x + b. Higher derivatives use PyTorch's own operators.
    """
    return torch.ops.lesion_ops.bias_act.default(x, b, dim % max(x.ndim, 1), _NUMBERS[act], alpha, gain, clamp)


def _upfirdn2d_shape(x, f, up, down, padding, flip_filter, gain):
    height, width = (
        Axis(up=up[i], down=down[i], front=padding[2 * i], back=padding[2 * i + 1]).output_size(x.shape[3 - i], taps)
        for i, taps in ((1, f.shape[0]), (0, f.shape[-1])))
    return _empty_as(x, [x.shape[0], x.shape[1], height, width])


def _bias_act_shape(x, b, dim, act, alpha, gain, clamp):
    return _empty_as(x, x.shape)


def _bias_act_grad_shape(dy, x, b, out, dim, act, alpha, gain, clamp, sum_bias):
    size = 0 if not sum_bias else dy.shape[dim] if dy.ndim else 1
    return _empty_as(dy, dy.shape), dy.new_empty([size])


def _bias_act_grad2_shape(ddx, dy, x, b, dim, act, alpha, gain, clamp):
    return _empty_as(x, x.shape)


def _empty_as(x: Tensor, size) -> Tensor:
    """Return an empty tensor in the layout that the compiled operators choose: channels_last only if x is just that."""
    is_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)


# The comparison with the reference


@torch.inference_mode(False)
@torch.enable_grad()
def first_difference(device: torch.device) -> str | None:
    """Return a line about the first operator compiled for a device that differs from the reference; None if all agree.

    Compares values and two derivatives on small inputs, in both memory layouts, as the networks use the operators. The
    reference runs on the CPU in float64.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 37, generator=random, dtype=torch.float64)
    b = torch.randn(3, generator=random, dtype=torch.float64)
    taps = torch.randn(4, 4, generator=random, dtype=torch.float64)
    for name, reference, call in _cases(b, taps):
        expected = _with_derivatives(reference, x)
        for layout in (torch.contiguous_format, torch.channels_last):
            found = _with_derivatives(call, x.to(device, torch.float32, memory_format=layout))
            for order, (value, wanted) in enumerate(zip(found, expected)):
                error = (value.cpu().double() - wanted).abs().max().item() / max(wanted.abs().max().item(), 1)
                if not error <= _TOLERANCE:
                    return (f"{name} on {device} differs from the reference by {error:.2g} in derivative {order} "
                            f"({layout}); expected at most {_TOLERANCE:g}: please report it")
    return None


def _cases(b: Tensor, taps: Tensor) -> Iterator[tuple[str, Callable, Callable]]:
    """Yield (name, reference, compiled operator), both as functions of x."""
    for filter_name, f in (("4 x 4", taps), ("separable", taps[0])):
        for up, down, padding in ((1, 1, (2, 2, 1, 1)), (2, 1, (2, 2, 1, 1)), (1, 2, (1, 1, 1, 1))):
            given = ((up, up), (down, down), padding, False)
            yield (f"upfirdn2d with a {filter_name} filter, up={up}, down={down}, padding={padding}",
                   lambda x, f=f, given=given: upfirdn2d_ref(x, f, *given),
                   lambda x, f=f, given=given: upfirdn2d_compiled(x, f.to(x), *given, 1))
    for act in ("linear", "lrelu", "swish"):
        given = (1, act, activation_named(act).alpha, activation_named(act).gain, 1)
        yield (f"bias_act with {act}", lambda x, given=given: bias_act_ref(x, b, *given),
               lambda x, given=given: bias_act_compiled(x, b.to(x), *given))


def _with_derivatives(call: Callable, x: Tensor) -> list[Tensor]:
    """Return the result, and the first two derivatives of a scalar that depends on it nonlinearly."""
    x = x.detach().requires_grad_()
    result = call(x)
    first, = torch.autograd.grad(result.sin().sum(), x, create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), x)
    return [result.detach(), first.detach(), second]
