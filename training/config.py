"""Settings of a training run, as frozen dataclasses that refuse values which cannot work.

`training.options.resolve` makes a `TrainConfig` from what a user said; `TrainConfig.to_dict` is what a run writes to
its folder. `RunSettings` are beside the mathematics: where a run reads and writes, on what, and for how long.

Section numbers and formulas follow Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (sg2),
and "Training Generative Adversarial Networks with Limited Data" (ada).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dnnlib.typed_config import Config, ConfigError, FrozenMapping, with_old_names
from imagesets.resize import RESOLUTIONS, is_resolution
from training.augmentations.draws import AUGMENTATIONS
from training.generator import NOISE_MODES, check_image_format
from training.layers import HALF_DTYPES, keeps_groups

RESUME_CLASSES = ("same", "new")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class _NetworkConfig(Config):
    """Sizes and number formats that both networks have."""

    img_resolution: int
    img_channels: int
    c_dim: int  # length of a label vector; 0 = no labels
    architecture: str
    channel_base: int = 32768  # channels at resolution R: min(channel_base // R, channel_max)
    channel_max: int = 512
    num_fp16_res: int = 0  # the highest resolutions that run in half_dtype
    half_dtype: str = "float16"
    conv_clamp: float | None = None  # None = activations are not clamped
    fp16_channels_last: bool = False

    def check(self) -> None:
        try:
            check_image_format(self.label(""), self.img_resolution, self.img_channels, self.architecture,
                               self.channel_base)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.require_at_least(0, "c_dim", "num_fp16_res")
        self.require_at_least(1, "channel_max")
        self.require(self.conv_clamp is None or self.conv_clamp > 0, "conv_clamp", "a number > 0, or none")
        self.require(self.half_dtype in HALF_DTYPES, "half_dtype", f"one of {', '.join(HALF_DTYPES)}")

    def fields_named(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def layout(self) -> dict[str, bool]:
        """Return the argument of a block that is given where it is on alone."""
        return {"fp16_channels_last": True} if self.fp16_channels_last else {}


_BLOCKS = ("architecture", "channel_base", "channel_max", "num_fp16_res", "conv_clamp", "half_dtype")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(_NetworkConfig):
    """Sizes of the generator; `init_kwargs` is what its constructor takes."""

    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 8
    architecture: str = "skip"

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "z_dim", "w_dim", "mapping_layers")

    def init_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of the generator's constructor; plain JSON types."""
        return {**self.fields_named("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels"),
                "mapping_kwargs": {"num_layers": self.mapping_layers},
                "synthesis_kwargs": {**self.fields_named(*_BLOCKS), **self.layout()}}


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(_NetworkConfig):
    """Sizes of the discriminator; `init_kwargs` is what its constructor takes."""

    architecture: str = "resnet"
    mbstd_group_size: int = 4  # images over which the minibatch standard deviation is taken
    freeze_layers: int | None = None  # convolutions next to the image that do not learn; None = all learn

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "mbstd_group_size")
        self.require(self.freeze_layers is None or self.freeze_layers >= 0, "freeze_layers", "a number >= 0, or none")

    def init_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of the discriminator's constructor; plain JSON types."""
        frozen = {} if self.freeze_layers is None else {"freeze_layers": self.freeze_layers}
        return {**self.fields_named("c_dim", "img_resolution", "img_channels", *_BLOCKS),
                "block_kwargs": {**frozen, **self.layout()}, "mapping_kwargs": {},
                "epilogue_kwargs": {"mbstd_group_size": self.mbstd_group_size}}


@with_old_names(r1_gamma="gamma")
@dataclass(frozen=True, kw_only=True)
class LossConfig(Config):
    """Weights and intervals of the losses."""

    gamma: float  # weight of the gradient penalty on reals; larger = smoother discriminator
    pl_weight: float = 2  # weight of path length regularization (sg2, section 3.2); 0 = off
    pl_decay: float = 0.01  # how fast the mean path length follows
    pl_batch_shrink: int = 2  # path lengths are taken on 1/pl_batch_shrink of a micro-batch, at least 1 image
    style_mixing_prob: float = 0.9  # share of micro-batches whose styles are mixed; 0 = off
    g_reg_interval: int = 4  # regularize the generator on every n-th iteration
    d_reg_interval: int = 16  # regularize the discriminator on every n-th iteration
    noise_mode: str = "random"

    def check(self) -> None:
        self.require_at_least(0, "gamma", "pl_weight")
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
    """How the augmentation probability follows the discriminator's signs (ada, section 3)."""

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
    p: float  # where p starts; without StepConfig.ada it stays there

    def __post_init__(self) -> None:
        if isinstance(self.strengths, Mapping):
            object.__setattr__(self, "strengths", FrozenMapping(self.strengths))
        super().__post_init__()

    def check(self) -> None:
        for name, strength in self.strengths.items():
            if name not in AUGMENTATIONS:
                raise ConfigError(f"AugmentConfig.strengths names {name!r}; expected augmentations among "
                                  f"{', '.join(AUGMENTATIONS)}")
            if strength < 0:
                raise ConfigError(f"AugmentConfig.strengths[{name!r}] is {strength!r}; expected a number >= 0")
        self.require(0 <= self.p <= 1, "p", "a number from 0 to 1")
        self.require(bool(self.strengths) or self.p == 0, "p", "0 where no augmentation is on")


@dataclass(frozen=True, kw_only=True)
class AdamConfig(Config):
    """Adam as a user states it: before the correction for lazy regularization (sg2, appendix B)."""

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
class DatasetFacts(Config):
    """What `resolve` needs to know of a data set."""

    name: str  # begins the run's name
    resolution: int
    channels: int
    num_images: int  # before mirroring
    c_dim: int  # length of a label vector; 0 = the data set has no labels

    @property
    def has_labels(self) -> bool:
        return self.c_dim > 0

    def check(self) -> None:
        """Raise ConfigError where the networks cannot take the images."""
        if not self.name or "/" in self.name or "\\" in self.name:
            raise ConfigError(f"the data set's name is {self.name!r}; expected a name without path separators")
        if not is_resolution(self.resolution):
            raise ConfigError(f"data set {self.name} has resolution {self.resolution}; expected {RESOLUTIONS}: convert "
                              "it with dataset_tool.py")
        if self.channels not in (1, 3):
            raise ConfigError(f"data set {self.name} has {self.channels} channels; expected 1 (grey) or 3 (RGB): "
                              "convert it with dataset_tool.py")
        if self.num_images < 1:
            raise ConfigError(f"data set {self.name} has {self.num_images} images; expected at least 1")
        if self.c_dim < 0:
            raise ConfigError(f"data set {self.name} has labels of length {self.c_dim}; expected a length >= 0")


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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "") -> Self:
        """Build the configuration that `to_dict` described; earlier programs wrote step.ada as augment.ada, too."""
        augment, step = (data.get(name) if isinstance(data, Mapping) else None for name in ("augment", "step"))
        if isinstance(augment, Mapping) and "ada" in augment:
            if isinstance(step, Mapping) and augment["ada"] != step.get("ada"):
                name = f"{where}.augment.ada" if where else "augment.ada"
                raise ConfigError(f"{name} is {augment['ada']!r}; expected the same as step.ada")
            data = {**data, "augment": {key: value for key, value in augment.items() if key != "ada"}}
        return super().from_dict(data, where=where)

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
        self.require_at_least(1, "gpus", "batch_gpu", "kimg", "image_snapshot_ticks", "network_snapshot_ticks")
        self.require_at_least(0, "seed", "num_workers")
        self.require(self.kimg_per_tick > 0, "kimg_per_tick", "a number > 0")
        self.require(self.state_minutes > 0, "state_minutes", "a number > 0")
        self.require(self.resume_classes in RESUME_CLASSES, "resume_classes", f"one of {', '.join(RESUME_CLASSES)}")
        self.require(len(set(self.metrics)) == len(self.metrics), "metrics", "each metric once")
        # Parts that contradict each other, as an edited file could have them:
        images = (self.dataset.resolution, self.dataset.channels, self.dataset.c_dim)
        for name in ("generator", "discriminator"):
            network = getattr(self, name)
            found = (network.img_resolution, network.img_channels, network.c_dim)
            if found != images:
                raise ConfigError(f"TrainConfig.{name} takes resolution, channels, c_dim {found}; expected those of "
                                  f"the data set, {images}")
        self.step.require(bool(self.augment.strengths) or self.step.ada is None, "ada",
                          "none where no augmentation is on")
        share = self.gpus * self.step.micro_batch
        self.require(self.batch % share == 0, "gpus", f"gpus * micro_batch to divide the batch of {self.batch}")
        group = self.discriminator.mbstd_group_size
        if not keeps_groups(self.step.micro_batch, group):
            raise ConfigError(f"StepConfig.micro_batch is {self.step.micro_batch}; expected at most mbstd_group_size "
                              f"({group}) or a multiple of it")


@dataclass(frozen=True, kw_only=True)
class BestValue(Config):
    """The value of a metric that the best network file is found by."""

    metric: str
    key: str  # of the value among the metric's results
    lower_is_better: bool


@dataclass(frozen=True, kw_only=True)
class RunSettings(Config):
    """What the training loop needs to know beside its TrainConfig."""

    outdir: str  # the folder that holds the folders of runs
    data: str  # path of the data set
    device: str = "cpu"  # cpu, cuda, or one GPU as cuda:1
    precision: str = "auto"  # as asked for; auto leaves it to a run that goes on
    batch_gpu: int | None = None  # as asked for; None leaves it to a run that goes on
    balance: str = "none"  # how often images are seen: see training.sampling.image_weights
    valid: str | None = None  # path of a data set that is only looked at, never learned from
    detector: str | None = None  # that metrics look through, in place of the usual ones
    detector_weights: tuple[str, ...] = ()  # files of weights, as FILE or NAME=FILE
    max_hours: float | None = None  # save and stop after that long; None = when kimg is reached
    keep: int | None = None  # of the newest network files; None = all, or one where keep_best is given
    keep_best: BestValue | None = None  # the best network file by it stays too
    name: str | None = None  # of the run, in place of one made from the flags
    tune_malloc: bool = True  # let the allocator of a CPU keep freed memory
    new: bool = False  # start a new run even where one could be continued
    notes: tuple[str, ...] = ()  # choices that were made for the user, one line each, for the run's log

    def asked(self) -> dict[str, bool]:
        """Return what `training.run_folder.choose_run` needs to know of what the user said and left open."""
        return {"new": self.new, "precision_given": self.precision != "auto",
                "batch_gpu_given": self.batch_gpu is not None}

    @property
    def num_newest(self) -> int | None:
        """How many of the newest network files stay; None = all do."""
        return 1 if self.keep is None and self.keep_best is not None else self.keep

    @property
    def keep_flags(self) -> str:
        """What messages call the flags that network files are removed by."""
        best = [] if self.keep_best is None else [f"--keep-best={self.keep_best.key}"]
        return " ".join([*([] if self.keep is None else [f"--keep={self.keep}"]), *best])

    @property
    def same_command(self) -> str:
        """What messages call the command that goes on with the run."""
        return "the same command (without --new)" if self.new else "the same command"

    def label(self, name: str) -> str:
        """Return the flag, since that is what the user wrote."""
        return "--" + name.replace("_", "-")

    def check(self) -> None:
        self.require(bool(self.outdir), "outdir", "a folder")
        self.require(bool(self.data), "data", "a data set")
        self.require(self.max_hours is None or self.max_hours > 0, "max_hours", "a number > 0")
        self.require(self.keep is None or self.keep >= 1, "keep", "a number >= 1")
        self.require(self.name is None or _NAME.fullmatch(self.name) is not None, "name",
                     "letters, digits, '.', '_' and '-', a letter or digit first")
