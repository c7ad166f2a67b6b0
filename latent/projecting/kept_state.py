"""Carry a projection to its end, keeping states on the way, so that it goes on where it was stopped."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from dnnlib.cli import Terminated
from latent.projecting.projection import Projection
from torch_utils.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint
from training.stopping import StopRequest

STATE_SECONDS = 120.0  # between two states: what a sudden end costs at most


def finish(projection: Projection, path: str | os.PathLike, identity: str,
           on_steps: Callable[[int], None] = lambda count: None, operators: str | None = None) -> None:
    """Do all steps that are left; a state of the same identity at `path` is gone on with.

    path:      where states are kept; the last one stays, for what follows the projection may be stopped too
    identity:  tells what the projection follows from beside its settings: another one's state is not used
    on_steps:  is told how many steps were done
    operators: their implementation, for `read_operators`

    A signal lets the step at hand come to its end, and is raised once its state is kept; a second Ctrl-C is raised at
    once. Raises OSError when a state cannot be written, UserError as Projection.advance does.
    """
    if (state := _read(path)) is not None and state.get("identity") == identity:
        projection.load_state_dict(state["projection"])
        on_steps(projection.step)
    saved = time.monotonic()
    with StopRequest() as stop:
        while not (projection.is_done or stop.wanted()):
            projection.advance()
            on_steps(1)
            if projection.is_done or stop.wanted() or time.monotonic() - saved >= STATE_SECONDS:
                write_checkpoint(path, {"identity": identity, "operators": operators,
                                        "projection": projection.state_dict()})
                saved = time.monotonic()
    if stop.wanted():
        raise KeyboardInterrupt if stop.reason.startswith("SIGINT") else Terminated


def read_operators(path: str | os.PathLike, identity: str) -> str | None:
    """Return the implementation of operators that a state was computed with; None where none is to be continued."""
    with suppress(FileNotFoundError, DamagedCheckpoint):
        state = read_checkpoint(path)
        if state.get("identity") == identity:
            return state.get("operators")
    return None


def _read(path: str | os.PathLike) -> dict | None:
    try:
        return read_checkpoint(path)
    except FileNotFoundError:
        return None
    except DamagedCheckpoint as error:
        print(f"{error}; beginning anew", file=sys.stderr)
        return None
