"""Settings of a training run, as frozen dataclasses that refuse values which cannot work.

`training.presets.resolve` makes a `TrainConfig` from what a user said; `TrainConfig.to_dict` is what a run writes to
its folder. Section numbers and formulas follow Karras et al. 2020, "Analyzing and Improving the Image Quality of
StyleGAN" (sg2), and "Training Generative Adversarial Networks with Limited Data" (ada).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from training.config_base import Config, ConfigError, FrozenMapping
from training.config_networks import DiscriminatorConfig, GeneratorConfig

RESUME_CLASSES = ("same", "new")

__all__ = [
    "AUGMENTATIONS", "NOISE_MODES",
    "AdaConfig", "AdamConfig", "AugmentConfig", "ConfigError", "DatasetConfig", "DiscriminatorConfig", "EmaConfig",
    "FrozenMapping", "GeneratorConfig", "LossConfig", "StepConfig", "TrainConfig",
]  # fmt: skip

NOISE_MODES = ("random", "const", "none")

# In the order in which the pipeline applies them (ada, appendix B); `imgfilter` is what --augpipe calls filter.
AUGMENTATIONS = (
    "xflip", "rotate90", "xint",
    "scale", "rotate", "aniso", "xfrac",
    "brightness", "contrast", "lumaflip", "hue", "saturation",
    "imgfilter", "noise", "cutout",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LossConfig(Config):
    """Weights and intervals of the losses."""

    r1_gamma: float  # weight of the gradient penalty on reals; larger = smoother discriminator
    pl_weight: float = 2.0  # weight of path length regularisation (sg2, section 3.2); 0 = off
    pl_decay: float = 0.01  # how fast the mean path length follows
    pl_batch_shrink: int = 2  # path lengths are taken on 1/pl_batch_shrink of a micro-batch, at least 1 image
    style_mixing_prob: float = 0.9  # 0 = off
    g_reg_interval: int = 4  # regularise the generator on every n-th iteration
    d_reg_interval: int = 16  # regularise the discriminator on every n-th iteration
    noise_mode: str = "random"

    def check(self) -> None:
        self.require_at_least(0, "r1_gamma", "pl_weight")
        self.require_at_least(1, "pl_batch_shrink", "g_reg_interval", "d_reg_interval")
        self.require(0 < self.pl_decay <= 1, "pl_decay", "a number > 0 and <= 1")
        self.require(0 <= self.style_mixing_prob <= 1, "style_mixing_prob", "a number from 0 to 1")
        self.require(self.noise_mode in NOISE_MODES, "noise_mode", f"one of {', '.join(NOISE_MODES)}")


@dataclass(frozen=True, kw_only=True)
class EmaConfig(Config):
    """Half-life of the generator's moving average."""

    kimg: float  # thousands of images after which a weight counts half
    rampup: float | None  # the half-life is at most this share of the images seen; None = no ramp-up

    def check(self) -> None:
        self.require_at_least(0, "kimg")
        self.require(self.rampup is None or self.rampup > 0, "rampup", "a number > 0, or none")


@dataclass(frozen=True, kw_only=True)
class AdaConfig(Config):
    """How the augmentation probability follows the discriminator's signs (ada, section 3.1)."""

    target: float  # the mean sign on reals that is aimed at
    kimg: float = 500  # thousands of images in which p can move by 1
    interval: int = 4  # iterations between two changes

    def check(self) -> None:
        self.require(-1 <= self.target <= 1, "target", "a number from -1 to 1, as a mean of signs is")
        self.require(self.kimg > 0, "kimg", "a number > 0")
        self.require_at_least(1, "interval")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Config):
    """What the discriminator's images go through; no strengths = nothing."""

    strengths: FrozenMapping  # augmentation -> share of p with which it is applied; any mapping may be given
    p: float  # where p starts, or stays
    ada: AdaConfig | None  # None = p stays

    def __post_init__(self) -> None:
        if isinstance(self.strengths, Mapping):
            object.__setattr__(self, "strengths", FrozenMapping(self.strengths))
        super().__post_init__()

    def check(self) -> None:
        for name, strength in self.strengths.items():
            if name not in AUGMENTATIONS:
                raise ConfigError(
                    f"AugmentConfig.strengths names {name!r}; expected augmentations among {', '.join(AUGMENTATIONS)}"
                )
            if strength < 0:
                raise ConfigError(f"AugmentConfig.strengths[{name!r}] is {strength!r}; expected a number >= 0")
        self.require(0 <= self.p <= 1, "p", "a number from 0 to 1")
        self.require(bool(self.strengths) or self.ada is None, "ada", "none where no augmentation is on")
        self.require(bool(self.strengths) or self.p == 0, "p", "0 where no augmentation is on")


@dataclass(frozen=True, kw_only=True)
class AdamConfig(Config):
    """Adam as a user states it: before the correction for lazy regularisation (sg2, appendix B)."""

    lr: float
    beta1: float = 0.0
    beta2: float = 0.99
    eps: float = 1e-8

    def check(self) -> None:
        self.require(self.lr > 0, "lr", "a number > 0")
        self.require(0 <= self.beta1 < 1, "beta1", "a number >= 0 and < 1")
        self.require(0 <= self.beta2 < 1, "beta2", "a number >= 0 and < 1")
        self.require(self.eps > 0, "eps", "a number > 0")


@dataclass(frozen=True, kw_only=True)
class StepConfig(Config):
    """What one training iteration needs to know."""

    batch: int  # images of an iteration, over all processes
    micro_batch: int  # images of one forward pass in one process
    loss: LossConfig
    ema: EmaConfig
    ada: AdaConfig | None = None  # None = p stays

    def check(self) -> None:
        self.require_at_least(1, "batch", "micro_batch")
        self.require(self.batch % self.micro_batch == 0, "batch", f"a multiple of micro_batch ({self.micro_batch})")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Config):
    """Which images are trained on."""

    name: str
    resolution: int
    channels: int
    c_dim: int  # length of the label vectors handed to the networks; 0 = labels are not used
    use_labels: bool
    max_size: int  # images, before mirroring
    xflip: bool  # every image a second time, mirrored

    def check(self) -> None:
        self.require_at_least(1, "resolution", "channels", "max_size")
        self.require(self.c_dim >= 1 if self.use_labels else self.c_dim == 0, "c_dim", (
            "a number >= 1 where labels are used" if self.use_labels else "0 where labels are not used"
        ))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """A whole training run."""

    run_name: str  # what the run's folder is called after its number
    cfg: str  # the preset it came from
    gpus: int  # processes, on whatever device
    batch_gpu: int  # what one device is expected to hold; step.micro_batch is what it gets
    seed: int
    kimg: int  # thousands of images to train for
    kimg_per_tick: float  # thousands of images between two lines of statistics
    image_snapshot_ticks: int
    network_snapshot_ticks: int
    state_minutes: float  # at most this long between two states to continue from
    metrics: tuple[str, ...]
    resume: str | None  # network to start from: a name, path or URL; None = random weights
    dataset: DatasetConfig
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig
    g_adam: AdamConfig
    d_adam: AdamConfig
    step: StepConfig
    augment: AugmentConfig
    resume_classes: str = "same"  # "same": those of the network are taken; "new": their embedding starts anew
    resume_partial: bool = False  # layers that do not fit the network of resume begin anew; else it is refused
    num_workers: int = 3  # processes that read images, per training process
    allow_tf32: bool = True
    cudnn_benchmark: bool = True

    @property
    def batch(self) -> int:
        """Images of an iteration, over all processes."""
        return self.step.batch

    @property
    def precision(self) -> str:
        """Number format of the highest resolutions: fp32, fp16 or bf16."""
        if self.generator.num_fp16_res == 0:
            return "fp32"
        return "bf16" if self.generator.half_dtype == "bfloat16" else "fp16"

    def check(self) -> None:
        self.require(bool(self.run_name), "run_name", "a name")
        self.require_at_least(
            1, "gpus", "batch_gpu", "kimg", "image_snapshot_ticks", "network_snapshot_ticks"
        )
        self.require_at_least(0, "seed", "num_workers")
        self.require(self.kimg_per_tick > 0, "kimg_per_tick", "a number > 0")
        self.require(self.state_minutes > 0, "state_minutes", "a number > 0")
        self.require(self.resume_classes in RESUME_CLASSES, "resume_classes", f"one of {', '.join(RESUME_CLASSES)}")
        self.require(len(set(self.metrics)) == len(self.metrics), "metrics", "each metric once")
        self._check_parts_agree()

    def _check_parts_agree(self) -> None:
        """Refuse parts that contradict each other, as an edited file could have them."""
        images = (self.dataset.resolution, self.dataset.channels, self.dataset.c_dim)
        for name in ("generator", "discriminator"):
            network = getattr(self, name)
            found = (network.img_resolution, network.img_channels, network.c_dim)
            if found != images:
                raise ConfigError(
                    f"TrainConfig.{name} takes resolution, channels, c_dim {found}; "
                    f"expected those of the data set, {images}"
                )
        self.require(self.step.ada == self.augment.ada, "augment", "the same ada as step")
        share = self.gpus * self.step.micro_batch
        self.require(self.batch % share == 0, "gpus", f"gpus * micro_batch to divide the batch of {self.batch}")
        group = self.discriminator.mbstd_group_size
        if self.step.micro_batch > group and self.step.micro_batch % group:
            raise ConfigError(
                f"StepConfig.micro_batch is {self.step.micro_batch}; expected at most mbstd_group_size ({group}) "
                "or a multiple of it"
            )
