"""Choose the device of a run and the number format of its networks."""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.config import ConfigError

PRECISION_NAMES = ("auto", "fp32", "fp16", "bf16")
# Below this a run would risk the smaller range of half precision for little.
WORTHWHILE_RATIO = 1.5

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PROBE_SECONDS = 0.15  # of each format; a run of the slowest formats seen takes as long
_PROBE_RUNS = 50


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    name: str
    reason: str
    warning: str | None = None  # one line for the user


def choose_device(name: str, processes: int = 1) -> Choice:
    """Return "cpu", "cuda" or "cuda:N" for --device.

    processes:  of the run on this machine; with several, each takes the GPU of its number
    Raises ConfigError where the machine has no such device, or too few.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
        reason = "a CUDA device is available" if available else "no CUDA device is available"
    else:
        reason = f"--device={name}"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (index.isdecimal() and kind == "cuda")) or name.endswith(":"):
        raise ConfigError(f"--device is {name}; expected auto, cpu, cuda, or one GPU as cuda:1")
    if kind == "cuda":
        _check_cuda(name, index, processes, available)
    return Choice(name, reason)


def _check_cuda(name: str, index: str, processes: int, available: bool) -> None:
    if not available:
        why = "PyTorch finds no CUDA device" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise ConfigError(f"--device is {name}, but {why}; expected a working GPU and driver, or --device=cpu")
    count = torch.cuda.device_count()
    if index and processes > 1:
        raise ConfigError(f"--device is {name} with --gpus={processes}; expected --device=cuda: each process takes the "
                          "GPU of its number")
    if index and int(index) >= count:
        raise ConfigError(f"--device is {name}; expected at most cuda:{count - 1}: this machine has {count}")
    if processes > count:
        raise ConfigError(f"--gpus is {processes}; expected at most {count}, the GPUs of this machine")


def choose_precision(name: str, device: str, processes: int = 1) -> Choice:
    """Return "fp32", "fp16" or "bf16" for --precision.

    "auto" is fp16 on a GPU, as in the original. On a CPU it is fp32, unless a measurement of less than a second shows
    bf16 to be 1.5 times as fast. Several processes would disturb each other's measurement and might choose differently:
    they take fp32. What was asked for is taken, with a warning where it is slower than fp32.
    """
    if name == "auto":
        return _choose_for_user(device, processes)
    reason = f"--precision={name}"
    if name == "fp32" or processes > 1:
        return Choice(name, reason)
    ratio = half_speed(device, name)
    if ratio >= 1:
        return Choice(name, f"{reason}; its convolutions are {ratio:.3g} times as fast as fp32 here")
    slower = f"convolutions in {name} take {1 / ratio:.3g} times as long as in fp32 on this {_describe(device)}"
    return Choice(name, f"{reason}; {slower}", f"{slower} (measured); try --precision=fp32")


def half_speed(device: str, name: str) -> float:
    """Measure, in less than a second, how many times as fast as in fp32 a convolution is in a half format."""
    seconds = {fmt: _fastest_convolution(torch.device(device), _DTYPES[fmt]) for fmt in ("fp32", name)}
    return seconds["fp32"] / seconds[name]


def _choose_for_user(device: str, processes: int) -> Choice:
    if device != "cpu":
        return Choice("fp16", "the highest resolutions in fp16 are the standard on a GPU")
    if processes > 1:
        return Choice("fp32", "the standard on a CPU for several processes")
    ratio = half_speed(device, "bf16")
    found = f"bf16 convolutions are {ratio:.3g} times as fast as fp32 on this CPU"
    if ratio >= WORTHWHILE_RATIO:
        return Choice("bf16", f"{found}, and {WORTHWHILE_RATIO:g} times is worth it")
    return Choice("fp32", f"{found}; {WORTHWHILE_RATIO:g} times would be worth bf16")


def _fastest_convolution(device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of the fastest of several convolutions; at least two are run, the first one sets things up."""
    x = torch.ones(2, 64, 32, 32, dtype=dtype, device=device)
    w = torch.ones(64, 64, 3, 3, dtype=dtype, device=device)
    best, started = float("inf"), time.perf_counter()
    for run in range(_PROBE_RUNS):
        before = time.perf_counter()
        if run >= 2 and before - started > _PROBE_SECONDS:
            break
        F.conv2d(x, w, padding=1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return best


def _describe(device: str) -> str:
    return "CPU" if device == "cpu" else "GPU"
