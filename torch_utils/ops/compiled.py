"""Load the compiled operators, remember what could not be loaded, and say which implementation runs where."""

import sys
from threading import RLock

import torch

from torch_utils.ops import compiled_bias_act, compiled_upfirdn2d
from torch_utils.ops.build import BuildError, library

IMPLEMENTATION_ON = {"cpu": "cpp", "cuda": "cuda"}  # device type -> its compiled implementation
DEVICE_OF = {impl: device for device, impl in IMPLEMENTATION_ON.items()}
_LOCK = RLock()
_failures: dict[str, str | None] = {}  # kind of library -> why it cannot run, None where it can


def failure_of(kind: str) -> str | None:
    """Load the operators of "cpu" or "cuda", once a process; return why they cannot run, None where they can.

    Builds the library when it is not there, which takes a minute or two. LIMIT: torch.compile cannot trace that, so
    that operators have to be loaded before: by this function, or by running one.
    """
    if kind not in _failures:
        with _LOCK:
            if kind not in _failures:
                _failures[kind] = _load(kind)
                if kind == "cuda" and _failures[kind] is None:
                    _failures[kind] = _difference_from_reference(kind)
    return _failures[kind]


def fast_implementation(kind: str) -> str:
    """Return the implementation that "auto" takes on a type of device: "cpp", "cuda", else "composed".

    On "meta", where shapes are computed alone, it is the CPU's. Says once a process why it is "composed".
    """
    if kind == "meta":
        kind = "cpu"
    if kind not in IMPLEMENTATION_ON:
        return "composed"
    is_news = kind not in _failures
    failure = failure_of(kind)
    if failure is None:
        return IMPLEMENTATION_ON[kind]
    if is_news:
        print(f"warning: operators are put together from PyTorch's, which is slower: {failure}", file=sys.stderr)
    return "composed"


def describe(kind: str) -> str:
    """Return what a run's record says of its operators: which it uses, and why no faster ones."""
    chosen = fast_implementation(kind)
    if chosen == "cpp":
        return f"cpp ({torch.ops.lesion_ops.cpu_level()})"
    failure = _failures.get(kind)
    return chosen if failure is None else f"{chosen} ({failure})"


def _load(kind: str) -> str | None:
    """Load a library and register what belongs to it; return what went wrong."""
    if kind == "cuda":
        failure = failure_of("cpu")  # which registers the operators' names
        if failure is not None:
            return failure
    try:
        torch.ops.load_library(library(kind))
    except (BuildError, OSError) as error:  # OSError: a library that the loader refuses
        return " ".join(f"{error}".split())
    if kind == "cpu":
        compiled_upfirdn2d.register()
        compiled_bias_act.register()
    return None


def _difference_from_reference(kind: str) -> str | None:
    """Compare operators that no test machine could run with the reference, on small inputs; return what differs."""
    from torch_utils.ops.self_check import first_difference  # which uses the ops, and they this module

    try:
        return first_difference(torch.device(kind), IMPLEMENTATION_ON[kind])
    except RuntimeError as error:  # such as of a GPU that the library holds no code for
        return " ".join(f"{error}".split())
