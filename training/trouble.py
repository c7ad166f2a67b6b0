"""Watch for steps that keep failing, and say what to do when memory runs out."""

import errno
from collections import defaultdict

import torch

from dnnlib.cli import UserError
from training.batching import largest_pass
from training.config import TrainConfig
from training.step import StepResult

MOST_SKIPPED_IN_A_ROW = 10

# How PyTorch and what it calls say that memory ran out, where they have no type of error for it.
_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory",
          "CUDA error: out of memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
          "Cannot allocate memory")
# What CUDA calls failures after which a process can compute nothing more on the GPU.
_SIGNS_OF_LOSS = ("an illegal memory access was encountered", "device-side assert triggered",
                  "unspecified launch failure", "misaligned address", "an illegal instruction was encountered",
                  "uncorrectable ECC error", "the launch timed out and was terminated")
_SIGNS_OF_READERS = ("is killed by signal: Killed", "is killed by signal: Bus error")  # of a DataLoader's worker


class SkippedSteps:
    """Counts, phase by phase, how often in a row a step was left out."""

    def __init__(self):
        self.in_a_row: dict[str, int] = defaultdict(int)

    def add(self, result: StepResult) -> str | None:
        """Take an iteration into account; return a message once a phase failed too often in a row."""
        for phase in result.stats:
            self.in_a_row[phase] = self.in_a_row[phase] + 1 if phase in result.skipped else 0
        for phase, names in result.skipped.items():
            if self.in_a_row[phase] >= MOST_SKIPPED_IN_A_ROW:
                return (f"{phase} had a loss or gradient that is not finite {self.in_a_row[phase]} times in a row "
                        f"({describe_tensors(names)}); look at the data")
        return None

    def state_dict(self) -> dict[str, int]:
        return dict(self.in_a_row)

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.in_a_row = defaultdict(int, saved)


def describe_tensors(names: list[str]) -> str:
    """Return the first names of a list."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class OutOfMemory(UserError):
    """Memory does not suffice; the message says how the run goes on."""

    exit_code = 4  # neither a mistake in the command nor a reason to start it again as it is


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out, on a GPU or the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in (*_SIGNS, *_SIGNS_OF_READERS))


def lost_device(error: BaseException, device: torch.device) -> bool:
    """Tell whether every later call on the device fails after an error, as after an illegal access in a kernel."""
    # Errors of other kinds may tell of another process's GPU.
    if type(error) in (RuntimeError, torch.AcceleratorError) and any(sign in str(error) for sign in _SIGNS_OF_LOSS):
        return True
    if device.type != "cuda":
        return False
    try:  # Libraries have other words for it, or none.
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError as found:
        return not ran_out_of_memory(found)
    return False


def smaller_batch_gpu(config: TrainConfig) -> int | None:
    """Return the largest --batch-gpu up to half of this run's that it could take, or None when there is none."""
    return largest_pass(config.batch // config.gpus, config.discriminator.mbstd_group_size,
                        config.step.micro_batch // 2)


def describe_out_of_memory(config: TrainConfig, error: BaseException, same_command: str, *, has_begun: bool) -> str:
    """Say what to do when memory ran out; it continues the run.

    same_command:  see RunSettings.same_command
    has_begun:     networks and optimizers are in memory, so that smaller passes help
    """
    larger = (f"free memory on the device or take one that has more, and {same_command} continues the run (a smaller "
              "--cfg or resolution begins another one)")
    if any(sign in str(error) for sign in _SIGNS_OF_READERS):
        return (f"a process that reads images was killed, as the system does when memory runs out; {same_command} "
                "with --workers=1 continues the run")
    if not has_begun:
        return f"out of memory before the first image, where networks and optimizers have to fit; {larger}"
    smaller, size = smaller_batch_gpu(config), config.step.micro_batch
    if smaller is None:
        return f"out of memory with one image a pass (--batch-gpu={size}); {larger}"
    return (f"out of memory with --batch-gpu={size}; {same_command} with --batch-gpu={smaller} continues the run from "
            "its last state: the same batch in smaller passes")
