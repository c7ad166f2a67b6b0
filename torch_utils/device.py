"""Adapt work to the machine: device, precision, number of processes and memory.

Implements --device, --precision, --gpus and --tune-malloc, reports versions of software, and recognizes errors that
mean that memory ran out or that the GPU was lost.
"""

import ctypes
import errno
import os
import platform
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from dnnlib.cli import UserError
from dnnlib.text import plural
from dnnlib.typed_config import ConfigError
from dnnlib.workers import usable_cores
from torch_utils.distributed import Place

PRECISION_NAMES = ("auto", "fp32", "fp16", "bf16")
DEVICE_HELP = "auto (CUDA if available), cpu, cuda, or a single GPU such as cuda:1."
TUNE_MALLOC_HELP = (
    "On a CPU with Linux and glibc, keep freed memory for reuse: faster, but the program's memory never shrinks. No "
    "effect if the environment already configures the allocator: MALLOC_*, GLIBC_TUNABLES, or one in LD_PRELOAD.")
# Common part of the names of a CPU's instructions for a format, as torch.cpu.get_capabilities gives them:
# avx512_bf16 and amx_bf16, avx512_fp16 and amx_fp16. f16c only converts.
_CPU_INSTRUCTIONS = {"fp16": ("fp16", "AVX512-FP16 nor AMX-FP16"), "bf16": ("bf16", "AVX512-BF16 nor AMX-BF16")}

# Messages of PyTorch and its libraries for running out of memory that have no exception type of their own.
_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory",
          "CUDA error: out of memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
          "Cannot allocate memory")
# CUDA errors after which a process cannot use the GPU any more.
_SIGNS_OF_LOSS = ("an illegal memory access was encountered", "device-side assert triggered",
                  "unspecified launch failure", "misaligned address", "an illegal instruction was encountered",
                  "uncorrectable ECC error", "the launch timed out and was terminated")
SIGNS_OF_READERS = ("is killed by signal: Killed", "is killed by signal: Bus error")  # a DataLoader worker

# Processes on a CPU: each takes half a gigabyte or more, and gains nothing where there is no core for it.
_MOST_PER_CORE, _ALWAYS_ALLOWED = 2, 16

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


class DeviceChoice(NamedTuple):
    """A device and the reason for it."""

    name: str
    reason: str


class PrecisionChoice(NamedTuple):
    """A precision and the reason for it."""

    name: str
    reason: str
    warning: str | None  # one line for the user


# Device and precision


def choose_device(name: str, processes: int = 1) -> DeviceChoice:
    """Return "cpu", "cuda" or "cuda:N" for --device.

    processes:  of the run on this machine; with several, each uses the GPU of its local rank
    Raises ConfigError when the machine does not have that device, or not enough GPUs.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
        reason = "a CUDA device is available" if available else "no CUDA device is available"
    else:
        reason = f"--device={name}"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (index.isdecimal() and kind == "cuda")) or name.endswith(":"):
        raise ConfigError(f"--device is {name}; expected auto, cpu, cuda, or a single GPU such as cuda:1")
    if kind == "cuda":
        _check_cuda(name, index, processes, available)
    return DeviceChoice(name, reason)


def _check_cuda(name: str, index: str, processes: int, available: bool) -> None:
    if not available:
        why = "PyTorch finds no CUDA device" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise ConfigError(f"--device is {name}, but {why}; expected a working GPU and driver, or --device=cpu")
    count = torch.cuda.device_count()
    if index and processes > 1:
        raise ConfigError(f"--device is {name} with --gpus={processes}; expected --device=cuda: each process uses a "
                          "GPU of its own")
    if index and int(index) >= count:
        raise ConfigError(f"--device is {name}; expected at most cuda:{count - 1}: this machine has "
                          f"{plural(count, 'GPU')}")
    if processes > count:
        raise ConfigError(f"--gpus is {processes}; expected at most {count}, the number of GPUs of this machine")


def check_counts(**counts: int | None) -> None:
    """Raise UserError if an option, passed by name, is given and less than 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected at least 1")


def count_processes(place: Place, gpus: int | None, *, shared: str | None) -> int:
    """Return how many processes do the work.

    place:   this process's
    gpus:    --gpus, None when not given
    shared:  None if several processes can share this work, else the option whose work they can share

    Raises UserError when more processes were started than can be used, or --gpus differs from their number.
    """
    if place.count > 1 and shared is not None:
        raise UserError(f"{place.count} processes were started; expected one: only {shared} uses several")
    return place.processes(gpus)


def settle_device(name: str, place: Place, processes: int, *, tunes_malloc: bool) -> str:
    """Return "cpu", "cuda" or "cuda:N" for --device; on a CPU, tune the memory allocator of each working process.

    place:         this process's
    processes:     number of processes that do the work
    tunes_malloc:  --tune-malloc; if the environment already configures the allocator, the main process prints so

    Raises UserError when the machine does not have that device, not enough GPUs, or far too few cores.
    """
    device = choose_device(name, place.local_count if place.is_started else processes).name
    most = max(_MOST_PER_CORE * usable_cores(), _ALWAYS_ALLOWED)
    if device == "cpu" and not place.is_started and processes > most:
        raise UserError(f"--gpus is {processes}, on a CPU with {plural(usable_cores(), 'core')}; expected at most "
                        f"{most} processes: more only fill the memory")
    if device == "cpu" and (processes == 1 or place.is_started):
        tuning = tune_malloc(tunes_malloc)
        if tuning.is_foreign and place.rank == 0:
            print(tuning.note, file=sys.stderr)
    return device


def choose_precision(asked: str, device: str, recorded: str | None = None) -> PrecisionChoice:
    """Return "fp32", "fp16" or "bf16" for --precision.

    device:    "cpu", "cuda" or "cuda:N"
    recorded:  that of a run that is continued, which "auto" keeps

    "auto" is fp16 on a GPU, as in the original, and fp32 on a CPU: nothing is measured, so that the same command means
    the same run on each machine. An explicit choice is kept, with a warning if the CPU has no instructions for it.
    """
    if asked != "auto":
        name, reason = asked, f"--precision={asked}"
    else:
        name, reason = ("fp32", "the default on a CPU") if device == "cpu" else (
            "fp16", "fp16 at the highest resolutions is the default on a GPU")
        if recorded not in (None, name):
            name, reason = recorded, "chosen when the run was started"
    return PrecisionChoice(name, reason, _slow_format(name) if device == "cpu" else None)


def _slow_format(name: str) -> str | None:
    """Return a warning if this CPU has no instructions for a format, else None."""
    if name == "fp32":
        return None
    part, instructions = _CPU_INSTRUCTIONS[name]
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # missing in early releases of torch 2
    if capabilities is None or any(value is True and part in key for key, value in capabilities().items()):
        return None
    return (f"warning: {name} may be many times slower than fp32 on this CPU, which has neither {instructions}; "
            "a new run is faster with --precision=fp32")


def find_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of packages, by name; "unknown" for one that is not installed."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def find_project_version() -> str:
    """Return the version of this project; "unknown" if its pyproject.toml cannot be read."""
    try:  # not from installed metadata: the project also runs without being installed
        text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        return tomllib.loads(text)["project"]["version"]
    except (OSError, ValueError, KeyError):
        return "unknown"


# Memory


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Whether the memory allocator was tuned."""

    is_done: bool
    reason: str  # how it was tuned, or why not
    is_foreign: bool = False  # not tuned because of settings outside this program

    @property
    def note(self) -> str:
        """Return a line for the log."""
        what = "freed memory is kept for reuse" if self.is_done else "the allocator is not tuned"
        return f"memory: {what} ({self.reason})"


def tune_malloc(wanted: bool) -> Tuning:
    """Let glibc's malloc keep freed memory, in this process and its forks; call it before allocating large tensors.

    By default malloc maps large blocks one by one and unmaps them when they are freed, and returns the free end of its
    heap to the system. Training needs the same amount again at once, so that each large tensor would start with a page
    fault every 4 KiB.

    Results do not change. The process never shrinks: its memory stays at its peak.
    """
    if not wanted:
        return Tuning(is_done=False, reason="--tune-malloc=false")
    found = _foreign_settings()
    if found is not None:
        return Tuning(is_done=False, reason=found, is_foreign=True)
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "gnu_get_libc_version"):
        return Tuning(is_done=False, reason="only glibc on Linux is supported")
    if not (library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, _NEVER)):
        return Tuning(is_done=False, reason="mallopt failed", is_foreign=True)
    return Tuning(is_done=True, reason="mallopt; disable with --tune-malloc=false")


def _foreign_settings() -> str | None:
    """Return which environment variable already configures the allocator; None when none does."""
    for name in sorted(os.environ):
        if name.startswith("MALLOC_") and os.environ[name]:
            return f"{name} is set"
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return "GLIBC_TUNABLES sets glibc.malloc"
    # Blocks that torch aligns to huge pages leave gaps in the heap: with both settings, clones of 64 MiB took twice the
    # memory of either one, and more time.
    if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":
        return "THP_MEM_ALLOC_ENABLE is set"
    for path in os.environ.get("LD_PRELOAD", "").replace(":", " ").split():
        if "malloc" in Path(path).name:  # jemalloc, tcmalloc, mimalloc
            return f"LD_PRELOAD names {Path(path).name}"
    return None


@contextmanager
def memory_advice(batch: int) -> Iterator[None]:
    """Raise OutOfMemory with advice when images do not fit into memory. batch: images per pass"""
    try:
        yield
    except Exception as error:  # PyTorch raises several types
        if not ran_out_of_memory(error):
            raise
        advice = f"try --batch={batch // 2}" if batch > 1 else "use --device=cpu, or a GPU with more memory"
        raise OutOfMemory(f"out of memory with --batch={batch}; {advice}") from error


class OutOfMemory(UserError):
    """Out of memory; the message says how to continue."""

    exit_code = 4  # neither a mistake in the command nor a reason to run it again unchanged


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a GPU or the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in (*_SIGNS, *SIGNS_OF_READERS))


def lost_device(error: BaseException, device: torch.device) -> bool:
    """Return whether after an error all later calls on the device fail, as after an illegal access in a kernel."""
    # Errors of other types may be about another process's GPU.
    if type(error) in (RuntimeError, torch.AcceleratorError) and any(sign in str(error) for sign in _SIGNS_OF_LOSS):
        return True
    if device.type != "cuda":
        return False
    try:  # Libraries have other messages for it, or none.
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError as found:
        return not ran_out_of_memory(found)
    return False
