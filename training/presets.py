"""The presets of --cfg and --augpipe, and how a batch is split into processes and micro-batches.

The presets are those of Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data" (ada), and
`tiny` for machines without a GPU.

An iteration takes `batch` images; each of `gpus` processes gets an equal share and processes it in micro-batches. A
micro-batch must be at most one minibatch standard deviation group, or consist of whole groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from dnnlib.typed_config import ConfigError
from imagesets.resize import is_power_of_two
from training.augmentations.draws import AUGMENT_GROUPS
from training.config import AdaConfig, DiscriminatorConfig, GeneratorConfig, LossConfig
from training.layers import keeps_groups


def _first_groups(count: int) -> tuple[str, tuple[str, ...]]:
    """Return the initials of the first `count` groups of augmentations, and the names in these groups."""
    groups = [*AUGMENT_GROUPS][:count]
    return "".join(group[0] for group in groups), tuple(name for group in groups for name in AUGMENT_GROUPS[group])


# --augpipe -> names of the augmentations, each at full strength: one group, or the first groups by their initials (bgc)
AUGPIPES = {**AUGMENT_GROUPS, **dict(_first_groups(count) for count in range(2, len(AUGMENT_GROUPS) + 1))}

# Names of NVIDIA's published networks; a run that starts from any other network is named "resumecustom".
TRANSFER_NAMES = ("ffhq256", "ffhq512", "ffhq1024", "celebahq256", "lsundog256")

ADA_KIMG = AdaConfig.kimg
# A discriminator that is already trained overfits sooner, so that p has to move faster (ada, section 4).
ADA_KIMG_RESUMED = 100


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of a value of --cfg; the fields are those of `training.config`."""

    batch: int
    reference_gpus: int  # the preset's batch_gpu is batch / reference_gpus
    mbstd: int  # images of a minibatch standard deviation group
    channel_base: int
    lr: float
    gamma: float
    ema_kimg: float
    ema_rampup: float | None = None
    mapping_layers: int = GeneratorConfig.mapping_layers
    channel_max: int = GeneratorConfig.channel_max
    latent_dim: int = GeneratorConfig.z_dim  # length of z and w
    pl_weight: float = LossConfig.pl_weight
    style_mixing_prob: float = LossConfig.style_mixing_prob
    d_architecture: str = DiscriminatorConfig.architecture
    kimg: int = 25000


FIXED_PRESETS = {
    "stylegan2": Preset(
        batch=32, reference_gpus=8, mbstd=4, channel_base=32768, lr=0.002, gamma=10, ema_kimg=10,
    ),
    "paper256": Preset(
        batch=64, reference_gpus=8, mbstd=8, channel_base=16384, lr=0.0025, gamma=1, ema_kimg=20,
    ),
    "paper512": Preset(
        batch=64, reference_gpus=8, mbstd=8, channel_base=32768, lr=0.0025, gamma=0.5, ema_kimg=20,
    ),
    "paper1024": Preset(
        batch=32, reference_gpus=8, mbstd=4, channel_base=32768, lr=0.002, gamma=2, ema_kimg=10,
    ),
    "cifar": Preset(
        batch=64, reference_gpus=2, mbstd=32, channel_base=32768, lr=0.0025, gamma=0.01, ema_kimg=500, ema_rampup=0.05,
        mapping_layers=2, pl_weight=0, style_mixing_prob=0, d_architecture="orig", kimg=100000,
    ),
}  # fmt: skip

CFG_NAMES = ("auto", *FIXED_PRESETS, "tiny")


def choose_preset(cfg: str, resolution: int, gpus: int) -> Preset:
    """Return the preset named `cfg`; auto and tiny depend on the resolution and the number of processes.

    Raises ConfigError for an unknown name.
    """
    if cfg in FIXED_PRESETS:
        return FIXED_PRESETS[cfg]
    if cfg == "tiny":
        preset = _scaled_preset(resolution, gpus, batch=16)
        return replace(preset, channel_base=1024, channel_max=64, latent_dim=64)
    if cfg == "auto":
        images_each = min(4096 // resolution, 32)
        return _scaled_preset(resolution, gpus, batch=max(gpus, min(64, images_each * gpus)))
    raise ConfigError(f"--cfg is {cfg!r}; expected one of {', '.join(CFG_NAMES)}")


def _scaled_preset(resolution: int, gpus: int, *, batch: int) -> Preset:
    """Return the settings that depend on resolution and batch."""
    return Preset(
        batch=batch,
        reference_gpus=gpus,
        mbstd=max(1, min(4, batch // gpus)),
        channel_base=32768 if resolution >= 512 else 16384,
        lr=0.002 if resolution >= 1024 else 0.0025,
        gamma=2e-4 * resolution**2 / batch,
        ema_kimg=batch * 10 / 32,
        ema_rampup=0.05,
        mapping_layers=2,
    )


@dataclass(frozen=True, kw_only=True)
class BatchSplit:
    """The batch sizes of a run."""

    batch: int  # total batch size, over all processes
    batch_gpu: int  # images of a pass, by preset or user
    micro_batch: int  # images of a pass that are used: never more than a process's share of the batch


def largest_pass(share: int, group: int, most: int) -> int | None:
    """Return the largest pass size, up to `most`, that divides a process's share and keeps groups whole."""
    return next((size for size in range(min(most, share), 0, -1) if share % size == 0 and keeps_groups(size, group)),
                None)


def split_batch(cfg: str, preset: Preset, gpus: int, batch: int | None, batch_gpu: int | None) -> BatchSplit:
    """Choose the batch sizes of a run.

    cfg:       the preset's name, for messages
    gpus:      processes; a power of two if the preset sets the batch, any divisor of a given batch
    batch:     given by the user; None takes the preset's
    batch_gpu: given by the user; None takes the preset's, or a process's whole share if `batch` is given

    Raises ConfigError, with a value that works, if the sizes do not fit each other.
    """
    total = preset.batch if batch is None else batch
    if batch is None:
        _check_gpus(cfg, preset, gpus, batch_gpu)
    elif total % gpus:
        usable = _usable_batch(preset, gpus, batch, batch_gpu)
        raise ConfigError(f"--batch is {batch}; expected a multiple of gpus ({gpus}): try {usable}")
    share = total // gpus
    if batch_gpu is not None:
        _check_batch_gpu(cfg, preset, gpus, share, batch, batch_gpu)
        return BatchSplit(batch=total, batch_gpu=batch_gpu, micro_batch=batch_gpu)
    described = share if batch is not None else total // preset.reference_gpus
    micro_batch = min(described, share)
    if not keeps_groups(micro_batch, preset.mbstd):
        raise ConfigError(
            f"--batch is {total}, or {micro_batch} on each of {gpus} gpus; expected {_expected_pass(preset)}: "
            f"try {_usable_batch(preset, gpus, total, None)}"
        )
    return BatchSplit(batch=total, batch_gpu=described, micro_batch=micro_batch)


def _check_gpus(cfg: str, preset: Preset, gpus: int, batch_gpu: int | None) -> None:
    """Raise ConfigError for a number of processes that the preset's own batch cannot be divided among."""
    usable = f"or --batch={_usable_batch(preset, gpus, preset.batch, batch_gpu)}"
    if not is_power_of_two(gpus):
        power = 1 << (min(gpus, preset.batch).bit_length() - 1)
        raise ConfigError(
            f"--gpus is {gpus}; expected a power of two, because --cfg={cfg} sets the batch: "
            f"try {power}, {usable}"
        )
    if gpus > preset.batch:
        raise ConfigError(
            f"--gpus is {gpus}; expected at most the batch of --cfg={cfg}: try {preset.batch}, {usable}"
        )


def _check_batch_gpu(cfg: str, preset: Preset, gpus: int, share: int, batch: int | None, batch_gpu: int) -> None:
    """Raise ConfigError for a pass size that splits a group or does not divide a process's share."""
    fitting = _nearest(batch_gpu, lambda size: keeps_groups(size, preset.mbstd) and share % size == 0, stop=share)
    if not keeps_groups(batch_gpu, preset.mbstd):
        usable = fitting or _nearest(batch_gpu, lambda size: keeps_groups(size, preset.mbstd))
        raise ConfigError(f"--batch-gpu is {batch_gpu}; expected {_expected_pass(preset)}: try {usable}")
    if share % batch_gpu == 0:
        return
    if batch is not None:
        raise ConfigError(
            f"--batch is {batch}; expected a multiple of gpus * batch_gpu ({gpus} * {batch_gpu}): "
            f"try {_usable_batch(preset, gpus, batch, batch_gpu)}"
        )
    raise ConfigError(
        f"--batch-gpu is {batch_gpu}; expected a divisor of the {share} images that --cfg={cfg} gives to each of "
        f"{gpus} gpus: try {fitting}"
    )


def _expected_pass(preset: Preset) -> str:
    return f"at most {preset.mbstd} images in a pass, or a multiple of {preset.mbstd}"


def _usable_batch(preset: Preset, gpus: int, batch: int, batch_gpu: int | None) -> int:
    """Return the batch nearest to `batch` that passes every check with these gpus and this batch_gpu."""
    if batch_gpu is not None and keeps_groups(batch_gpu, preset.mbstd):
        return _nearest(batch, lambda size: size % (gpus * batch_gpu) == 0)
    return _nearest(batch, lambda size: size % gpus == 0 and keeps_groups(size // gpus, preset.mbstd))


def _nearest(wanted: int, is_usable: Callable[[int], bool], stop: int | None = None) -> int | None:
    """Return the usable positive number nearest to `wanted`, the larger of two; None if there is none up to `stop`."""
    distance = 0
    while stop is None or distance <= max(stop, wanted):
        for candidate in (wanted + distance, wanted - distance):
            if candidate >= 1 and (stop is None or candidate <= stop) and is_usable(candidate):
                return candidate
        distance += 1
    return None
