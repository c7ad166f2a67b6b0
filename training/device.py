"""Choose the device of a run and the number format of its networks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from training.config import ConfigError

PRECISION_NAMES = ("auto", "fp32", "fp16", "bf16")
# Below this a run would risk the smaller range of half precision for little.
WORTHWHILE_RATIO = 1.5

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Images, channels and pixels a side of convolutions. The slowest formats seen take a quarter of a second for the small
# one; where they are below this ratio the other, which is as in training, would take seconds and tell nothing new.
_SMALL, _LARGE = (2, 64, 32), (4, 256, 16)
_HOPELESS_RATIO = 0.5
_PROBE_SECONDS, _TURN_SECONDS = 0.3, 0.03  # of each of them; of a format, unless a run takes longer


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


def choose_precision(name: str, device: str, processes: int = 1, *, nhwc: bool = False, is_main: bool = True) -> Choice:
    """Return "fp32", "fp16" or "bf16" for --precision.

    nhwc:     half precision keeps the channels of a pixel together
    is_main:  of several processes this is the one whose warnings are said

    "auto" is fp16 on a GPU, as in the original. On a CPU it is fp32, unless a measurement of about a second shows bf16
    to be 1.5 times as fast. Several processes would disturb each other's measurement and might choose differently: they
    take fp32. What was asked for is taken, with a warning where it is slower than fp32.
    """
    if name == "auto":
        return _choose_for_user(device, processes, nhwc)
    reason = f"--precision={name}"
    # On a GPU the process that starts the others would take memory that they need.
    if name == "fp32" or not is_main or (processes > 1 and device != "cpu"):
        return Choice(name, reason)
    ratio = half_speed(device, name, nhwc=nhwc)
    if ratio >= 1:
        return Choice(name, f"{reason}; its convolutions are {ratio:.3g} times as fast as fp32 here")
    slower = f"convolutions in {name} take {1 / ratio:.3g} times as long as in fp32 on this {_describe(device)}"
    return Choice(name, f"{reason}; {slower}", f"{slower} (measured); try --precision=fp32")


def half_speed(device: str, name: str, *, nhwc: bool = False) -> float:
    """Measure, in about a second, how many times as fast as in fp32 convolutions are in a half format.

    Where a small one does not rule the format out, forward and backward pass of one as in training decide.
    """
    works = {fmt: _Convolution(device, _DTYPES[fmt], _SMALL, nhwc=nhwc and fmt != "fp32") for fmt in ("fp32", name)}
    ratio = _compare(works["fp32"].forward, works[name].forward)
    if ratio < _HOPELESS_RATIO:
        return ratio
    works = {fmt: _Convolution(device, _DTYPES[fmt], _LARGE, nhwc=nhwc and fmt != "fp32") for fmt in ("fp32", name)}
    return _compare(works["fp32"].forward_and_backward, works[name].forward_and_backward)


def _choose_for_user(device: str, processes: int, nhwc: bool) -> Choice:
    if device != "cpu":
        return Choice("fp16", "the highest resolutions in fp16 are the standard on a GPU")
    if processes > 1:
        return Choice("fp32", "the standard on a CPU for several processes")
    ratio = half_speed(device, "bf16", nhwc=nhwc)
    found = f"bf16 convolutions are {ratio:.3g} times as fast as fp32 on this CPU"
    if ratio >= WORTHWHILE_RATIO:
        return Choice("bf16", f"{found}, and {WORTHWHILE_RATIO:g} times is worth it")
    return Choice("fp32", f"{found}; {WORTHWHILE_RATIO:g} times would be worth bf16")


class _Convolution:
    """A 3x3 convolution of a layer of the networks.

    size:  images, channels, pixels a side;  nhwc: keep the channels of a pixel together
    """

    def __init__(self, device: str, dtype: torch.dtype, size: tuple[int, int, int], *, nhwc: bool):
        images, channels, side = size
        layout = torch.channels_last if nhwc else torch.contiguous_format
        self._x, self._w = (
            torch.ones(shape, dtype=dtype, device=device).to(memory_format=layout).requires_grad_()
            for shape in ((images, channels, side, side), (channels, channels, 3, 3)))

    def forward(self) -> None:
        with torch.no_grad():
            F.conv2d(self._x, self._w, padding=1)
        self._wait()

    def forward_and_backward(self) -> None:
        y = F.conv2d(self._x, self._w, padding=1)
        torch.autograd.grad(y, (self._x, self._w), torch.ones_like(y))
        self._wait()

    def _wait(self) -> None:
        if self._x.is_cuda:
            torch.cuda.synchronize(self._x.device)


def _compare(work: Callable[[], None], other: Callable[[], None]) -> float:
    """Return the seconds of the fastest of several runs of `work` by those of `other`.

    They take turns, so that what else the machine does hits both; at least two, since the first one sets things up.
    """
    best, turns, started = [math.inf, math.inf], 0, time.perf_counter()
    while turns < 2 or time.perf_counter() - started < _PROBE_SECONDS:
        best = [min(known, _fastest(run)) for known, run in zip(best, (work, other), strict=True)]
        turns += 1
    return best[0] / best[1]


def _fastest(run: Callable[[], None]) -> float:
    """Return the seconds of the fastest run within a turn."""
    best, started, now = math.inf, time.perf_counter(), 0.0
    while now < _TURN_SECONDS:
        run()
        before, now = now, time.perf_counter() - started
        best = min(best, now - before)
    return best


def _describe(device: str) -> str:
    return "CPU" if device == "cpu" else "GPU"
