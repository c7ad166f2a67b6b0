"""Watch for steps that keep failing, and say what to do when memory runs out."""

from collections import defaultdict

from training.config import TrainConfig
from training.step import StepResult

MOST_SKIPPED_IN_A_ROW = 10


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
                        f"({describe_tensors(names)}); try a larger --gamma, --precision=fp32, or look at the data")
        return None

    def state_dict(self) -> dict[str, int]:
        return dict(self.in_a_row)

    def load_state_dict(self, saved: dict[str, int]) -> None:
        self.in_a_row = defaultdict(int, saved)


def describe_tensors(names: list[str]) -> str:
    """Return the first names of a list."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def smaller_batch_gpu(config: TrainConfig) -> int | None:
    """Return the largest smaller --batch-gpu that this run could take, or None when there is none."""
    share = config.batch // config.gpus
    group = config.discriminator.mbstd_group_size
    for size in range(config.step.micro_batch // 2, 0, -1):
        if share % size == 0 and (size <= group or size % group == 0):
            return size
    return None


def describe_out_of_memory(config: TrainConfig) -> str:
    """Say what to try when a step did not fit into the device's memory."""
    smaller = smaller_batch_gpu(config)
    size = config.step.micro_batch
    if smaller is None:
        return f"out of memory with one image a pass (--batch-gpu={size}); try a smaller --cfg or resolution"
    return f"out of memory with --batch-gpu={size}; try --batch-gpu={smaller}: the same batch in smaller passes"
