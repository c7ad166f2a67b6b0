"""The presets that --cfg and --augpipe name, as tables.

They are those of Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data" (ada), and `tiny`
for machines without a GPU.
"""

from dataclasses import dataclass, replace

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
