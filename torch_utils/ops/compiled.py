"""Load the compiled operators, remember what could not be loaded, and say which implementation runs where."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

import torch

from torch_utils.ops import compiled_bias_act, compiled_upfirdn2d
from torch_utils.ops.build import BuildError, find, library

IMPLEMENTATION_ON = {"cpu": "cpp", "cuda": "cuda"}  # device type -> its compiled implementation
DEVICE_OF = {impl: device for device, impl in IMPLEMENTATION_ON.items()}
_LOCK = RLock()
_failures: dict[str, str | None] = {}  # kind of library -> why it cannot run, None where it can
_told: set[str] = set()  # kinds of library of which was said that they cannot run
_is_estimating = False


def failure_of(kind: str) -> str | None:
    """Load the operators of "cpu" or "cuda", once a process; return why they cannot run, None where they can.

    Builds nothing: see `make_ready`. LIMIT: torch.compile cannot trace this, so that operators have to be loaded
    before: by this function, or by running one.
    """
    if kind not in _failures:
        with _LOCK:
            if kind not in _failures:
                _remember(kind, _find)
    return _failures[kind]


def make_ready(kind: str) -> str | None:
    """Do what `failure_of` does, and build the operators first where they are not there, for long work that follows.

    Processes that start together build once, and the others wait. Does nothing where operators were loaded before.
    """
    if kind in IMPLEMENTATION_ON:
        with _LOCK:
            for each in dict.fromkeys(("cpu", kind)):  # CUDA's need the names that the CPU's register
                if _failures.get(each, "not tried") is not None:
                    _remember(each, _find_or_build)
        return _failures[kind]
    return None


def fast_implementation(kind: str) -> str:
    """Return the implementation that "auto" takes on a type of device: "cpp", "cuda", else "composed".

    On "meta", where shapes are computed alone, it is the CPU's. Says once a run why it is "composed".
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
        tell(f"warning: operators are put together from PyTorch's, which is slower: {failure}")
    return "composed"


@contextmanager
def estimating() -> Iterator[None]:
    """Say nothing of operators that cannot run, while they run only to estimate what a run would take."""
    global _is_estimating
    before, _is_estimating = _is_estimating, True
    try:
        yield
    finally:
        _is_estimating = before


def tell(line: str) -> None:
    """Print a line on standard error; of the processes of a run the first one does, for all."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def describe(kind: str) -> str:
    """Return what a run's record says of its operators: which it uses, and why no faster ones."""
    chosen = fast_implementation(kind)
    if chosen == "cpp":
        return f"cpp ({torch.ops.lesion_ops.cpu_level()})"
    failure = _failures.get(kind)
    return chosen if failure is None else f"{chosen} ({failure})"


def _find(kind: str) -> Path:
    """Return the library that is there. Raises BuildError, which says how to build it."""
    built = find(kind)
    if built is None:
        raise BuildError(f"the compiled {kind.upper()} operators are not built: python -m torch_utils.ops.build does "
                         "it, once")
    return built.library


def _find_or_build(kind: str) -> Path:
    """Return the library, built by the tools that are here, else one that is there. Raises BuildError."""
    try:
        return library(kind)
    except BuildError:
        built = find(kind)
        if built is None:
            raise
        return built.library


def _remember(kind: str, locate: Callable[[str], Path]) -> None:
    """Load operators, and keep what went wrong, or None."""
    failure = _load(kind, locate)
    if kind == "cuda" and failure is None:
        _failures[kind] = None  # for the comparison, which runs them
        failure = _difference_from_reference(kind)
    _failures[kind] = failure


def _load(kind: str, locate: Callable[[str], Path]) -> str | None:
    """Load a library and register what belongs to it; return what went wrong."""
    if kind == "cuda":
        failure = failure_of("cpu")  # which registers the operators' names
        if failure is not None:
            return failure
    try:
        torch.ops.load_library(locate(kind))
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
