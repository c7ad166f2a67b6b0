"""Fit work into the machine: its device, how many processes share it, what to try when memory is too small."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dnnlib.cli import UserError
from torch_utils.allocator import tune_malloc
from torch_utils.distributed import Place
from training.device import choose_device
from training.trouble import OutOfMemory, ran_out_of_memory


def check_counts(**counts: int | None) -> None:
    """Raise UserError unless options, by name, are at least 1 where they are given."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected at least 1")


def count_processes(place: Place, gpus: int | None, *, shared: str | None) -> int:
    """Return how many processes do the work.

    place:   this process's
    gpus:    --gpus, None where not given
    shared:  None where the work can be shared, else the option whose work alone can be

    Raises UserError where other processes were started than are wanted.
    """
    if place.count > 1 and shared is not None:
        raise UserError(f"{place.count} processes were started; expected one: several share the work of {shared} alone")
    return place.processes(gpus)


def settle_device(name: str, place: Place, processes: int, *, tunes_malloc: bool) -> str:
    """Return "cpu", "cuda" or "cuda:N" for --device; on a CPU, tune the allocator of a process that works.

    place:         this process's
    processes:     that do the work
    tunes_malloc:  --tune-malloc; where the environment has settings of its own, the main process says so

    Raises UserError where the machine has no such device, or too few.
    """
    device = choose_device(name, place.local_count if place.is_started else processes).name
    if device == "cpu" and (processes == 1 or place.is_started):
        tuning = tune_malloc(tunes_malloc)
        if tuning.is_foreign and place.rank == 0:
            print(tuning.note, file=sys.stderr)
    return device


@contextmanager
def memory_advice(batch: int) -> Iterator[None]:
    """Say what to try when images do not fit into memory, as OutOfMemory. batch: images of a pass"""
    try:
        yield
    except Exception as error:  # PyTorch has several ways to say it
        if not ran_out_of_memory(error):
            raise
        advice = f"try --batch={batch // 2}" if batch > 1 else "use --device=cpu, or a GPU with more memory"
        raise OutOfMemory(f"out of memory with --batch={batch}; {advice}") from error
