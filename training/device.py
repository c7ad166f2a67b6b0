"""Choose the device of a run and the number format of its networks."""

from dataclasses import dataclass

import torch

from training.config import ConfigError

PRECISION_NAMES = ("auto", "fp32", "fp16", "bf16")
# What the names of a CPU's instructions for a format have in common, as torch.cpu.get_capabilities gives them:
# avx512_bf16 and amx_bf16, avx512_fp16 and amx_fp16. f16c converts only.
_CPU_INSTRUCTIONS = {"fp16": ("fp16", "AVX512-FP16 nor AMX-FP16"), "bf16": ("bf16", "AVX512-BF16 nor AMX-BF16")}


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


def choose_precision(asked: str, device: str, recorded: str | None = None) -> Choice:
    """Return "fp32", "fp16" or "bf16" for --precision.

    device:    "cpu", "cuda" or "cuda:N"
    recorded:  what a run that goes on has; "auto" takes it

    "auto" is fp16 on a GPU, as in the original, and fp32 on a CPU: nothing is measured, so that the same command means
    the same run on each machine. What was asked for is taken, with a warning where a CPU has no instructions for it.
    """
    if asked != "auto":
        name, reason = asked, f"--precision={asked}"
    else:
        name, reason = ("fp32", "the standard on a CPU") if device == "cpu" else (
            "fp16", "the highest resolutions in fp16 are the standard on a GPU")
        if recorded not in (None, name):
            name, reason = recorded, "chosen when the run began"
    return Choice(name, reason, _slow_format(name) if device == "cpu" else None)


def _slow_format(name: str) -> str | None:
    """Return a line about a format that this CPU has no instructions for, None where it has."""
    if name == "fp32":
        return None
    part, instructions = _CPU_INSTRUCTIONS[name]
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # early releases of torch 2 cannot tell
    if capabilities is None or any(value is True and part in key for key, value in capabilities().items()):
        return None
    return (f"warning: {name} may be many times slower than fp32 on this CPU, which has neither {instructions}; "
            "a new run is faster with --precision=fp32")
