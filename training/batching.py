"""How an iteration's batch is shared out to processes and cut into micro-batches.

An iteration takes `batch` images; each of `gpus` processes gets an equal share of them and works through it in
micro-batches. The minibatch standard deviation wants at most one group of images, or whole groups, in a micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from imagesets.resolutions import is_power_of_two
from training.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchSplit:
    """The sizes that a run uses."""

    batch: int  # images of an iteration, over all processes
    batch_gpu: int  # images of a pass as the preset or the user says it
    micro_batch: int  # images of a pass as it will be: never more than a process has


@dataclass(frozen=True, kw_only=True)
class BatchRules:
    """What a preset asks of a batch."""

    cfg: str  # the preset's name
    batch: int
    reference_gpus: int  # the preset's batch_gpu is batch / reference_gpus
    group: int  # of the minibatch standard deviation

    def allows(self, micro_batch: int) -> bool:
        """Tell whether a pass may have this many images."""
        return keeps_groups(micro_batch, self.group)

    def expectation(self) -> str:
        """Say what `allows` checks."""
        return f"at most {self.group} images in a pass, or a multiple of {self.group}"


def keeps_groups(micro_batch: int, group: int) -> bool:
    """Tell whether a pass is at most one group of the minibatch standard deviation, or whole groups."""
    return micro_batch <= group or micro_batch % group == 0


def largest_pass(share: int, group: int, most: int) -> int | None:
    """Return the most images, up to `most`, of passes that a process's share of a batch can be cut into."""
    return next((size for size in range(min(most, share), 0, -1) if share % size == 0 and keeps_groups(size, group)),
                None)


def split_batch(rules: BatchRules, gpus: int, batch: int | None, batch_gpu: int | None) -> BatchSplit:
    """Choose the sizes of a run.

    gpus:      processes; must be a power of two where the preset sets the batch, may be any divisor of a given batch
    batch:     the user's batch, or None: the preset's
    batch_gpu: the user's images of a pass, or None: the preset's, or all that a process has where `batch` is given

    Raises ConfigError, with a size that would do, where the parts do not fit each other.
    """
    total = rules.batch if batch is None else batch
    if batch is None:
        _check_gpus(rules, gpus, batch_gpu)
    elif total % gpus:
        usable = _usable_batch(rules, gpus, batch, batch_gpu)
        raise ConfigError(f"--batch is {batch}; expected a multiple of gpus ({gpus}): try {usable}")
    share = total // gpus
    if batch_gpu is not None:
        _check_batch_gpu(rules, gpus, share, batch, batch_gpu)
        return BatchSplit(batch=total, batch_gpu=batch_gpu, micro_batch=batch_gpu)
    described = share if batch is not None else total // rules.reference_gpus
    micro_batch = min(described, share)
    if not rules.allows(micro_batch):
        raise ConfigError(
            f"--batch is {total}, which gives each of {gpus} gpus {micro_batch}; expected {rules.expectation()}: "
            f"try {_usable_batch(rules, gpus, total, None)}"
        )
    return BatchSplit(batch=total, batch_gpu=described, micro_batch=micro_batch)


def _check_gpus(rules: BatchRules, gpus: int, batch_gpu: int | None) -> None:
    """Refuse numbers of processes that the preset's own batch cannot be shared out to."""
    usable = f"or --batch={_usable_batch(rules, gpus, rules.batch, batch_gpu)}"
    if not is_power_of_two(gpus):
        power = 1 << (min(gpus, rules.batch).bit_length() - 1)
        raise ConfigError(
            f"--gpus is {gpus}; expected a power of two, because --cfg={rules.cfg} sets the batch: "
            f"try {power}, {usable}"
        )
    if gpus > rules.batch:
        raise ConfigError(
            f"--gpus is {gpus}; expected at most the batch of --cfg={rules.cfg}: try {rules.batch}, {usable}"
        )


def _check_batch_gpu(rules: BatchRules, gpus: int, share: int, batch: int | None, batch_gpu: int) -> None:
    """Refuse a size of a pass that breaks groups or does not divide what a process has."""
    fitting = _nearest(batch_gpu, lambda size: rules.allows(size) and share % size == 0, stop=share)
    if not rules.allows(batch_gpu):
        usable = fitting or _nearest(batch_gpu, rules.allows)
        raise ConfigError(f"--batch-gpu is {batch_gpu}; expected {rules.expectation()}: try {usable}")
    if share % batch_gpu == 0:
        return
    if batch is not None:
        raise ConfigError(
            f"--batch is {batch}; expected a multiple of gpus * batch_gpu ({gpus} * {batch_gpu}): "
            f"try {_usable_batch(rules, gpus, batch, batch_gpu)}"
        )
    raise ConfigError(
        f"--batch-gpu is {batch_gpu}; expected a divisor of the {share} images that --cfg={rules.cfg} gives to each of "
        f"{gpus} gpus: try {fitting}"
    )


def _usable_batch(rules: BatchRules, gpus: int, batch: int, batch_gpu: int | None) -> int:
    """Return the batch nearest to `batch` that passes every check with these gpus and this batch_gpu."""
    if batch_gpu is not None and rules.allows(batch_gpu):
        return _nearest(batch, lambda size: size % (gpus * batch_gpu) == 0)
    return _nearest(batch, lambda size: size % gpus == 0 and rules.allows(size // gpus))


def _nearest(wanted: int, is_usable: Callable[[int], bool], stop: int | None = None) -> int | None:
    """Return the usable positive number nearest to `wanted`, the larger of two; None where none is up to `stop`."""
    distance = 0
    while stop is None or distance <= max(stop, wanted):
        for candidate in (wanted + distance, wanted - distance):
            if candidate >= 1 and (stop is None or candidate <= stop) and is_usable(candidate):
                return candidate
        distance += 1
    return None
