"""The presets that --cfg and --augpipe name, as tables.

They are those of Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data" (ada), and `tiny`
for machines without a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from imagesets.resize import is_power_of_two
from training.config import ConfigError

AUGMENT_GROUPS = {
    "blit": ("xflip", "rotate90", "xint"),
    "geom": ("scale", "rotate", "aniso", "xfrac"),
    "color": ("brightness", "contrast", "lumaflip", "hue", "saturation"),
    "filter": ("imgfilter",),
    "noise": ("noise",),
    "cutout": ("cutout",),
}

_CUMULATIVE = {
    "bg": ("blit", "geom"),
    "bgc": ("blit", "geom", "color"),
    "bgcf": ("blit", "geom", "color", "filter"),
    "bgcfn": ("blit", "geom", "color", "filter", "noise"),
    "bgcfnc": ("blit", "geom", "color", "filter", "noise", "cutout"),
}

# --augpipe: names of the augmentations, each at full strength
AUGPIPES = {**AUGMENT_GROUPS} | {
    pipe: tuple(name for group in groups for name in AUGMENT_GROUPS[group]) for pipe, groups in _CUMULATIVE.items()
}

# Published networks that --resume knows by name; any other value is a path or URL and is called custom.
TRANSFER_NAMES = ("ffhq256", "ffhq512", "ffhq1024", "celebahq256", "lsundog256")

ADA_KIMG = 500
# A discriminator that is trained already overfits sooner, so that p has to move faster (ada, section 4).
ADA_KIMG_RESUMED = 100


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a value of --cfg stands for."""

    batch: int
    reference_gpus: int  # the number that batch_gpu = batch / reference_gpus was chosen for
    mbstd: int
    channel_base: int
    lr: float
    gamma: float
    ema_kimg: float
    ema_rampup: float | None = None
    mapping_layers: int = 8
    channel_max: int = 512
    latent_dim: int = 512  # of z and w
    pl_weight: float = 2
    style_mixing_prob: float = 0.9
    d_architecture: str = "resnet"
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
    """Return the preset of that name; auto and tiny depend on the resolution and the number of processes.

    Raises ConfigError where no preset has the name.
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
    """Return the settings that grow with resolution and batch."""
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


# MERGED from training.batching
# How an iteration's batch is shared out to processes and cut into micro-batches.
#
# An iteration takes `batch` images; each of `gpus` processes gets an equal share of them and works through it in
# micro-batches. The minibatch standard deviation wants at most one group of images, or whole groups, in a micro-batch.


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
