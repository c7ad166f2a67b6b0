"""Settings of a training run, as frozen dataclasses that reject values which cannot work.

`training.options.resolve` makes a `TrainConfig` from the flags; a run writes `TrainConfig.to_dict` to its folder.
`RunSettings` do not change the mathematics: where a run reads and writes, on which device, and for how long.

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
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a run or a site, and so of a folder
NAME_FORM = "letters, digits, '.', '_' and '-', starting with a letter or digit"


@dataclass(frozen=True, kw_only=True)
class FlagConfig(Config):
    """A configuration whose fields are flags of train.py."""

    def label(self, name: str) -> str:
        """Return the flag, since that is what the user typed."""
        return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class _NetworkConfig(Config):
    """Sizes and precision shared by both networks."""

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
        """Return the memory format argument of the blocks; left out when off, as older files do."""
        return {"fp16_channels_last": True} if self.fp16_channels_last else {}


_BLOCKS = ("architecture", "channel_base", "channel_max", "num_fp16_res", "conv_clamp", "half_dtype")


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(_NetworkConfig):
    """Sizes of the generator."""

    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 8
    architecture: str = "skip"

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "z_dim", "w_dim", "mapping_layers")

    def init_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of the generator's constructor, as plain JSON types."""
        return {**self.fields_named("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels"),
                "mapping_kwargs": {"num_layers": self.mapping_layers},
                "synthesis_kwargs": {**self.fields_named(*_BLOCKS), **self.layout()}}


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(_NetworkConfig):
    """Sizes of the discriminator."""

    architecture: str = "resnet"
    mbstd_group_size: int = 4  # images of a minibatch standard deviation group
    freeze_layers: int | None = None  # number of frozen convolutions, counted from the image; None = none

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "mbstd_group_size")
        self.require(self.freeze_layers is None or self.freeze_layers >= 0, "freeze_layers", "a number >= 0, or none")

    def init_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of the discriminator's constructor, as plain JSON types."""
        frozen = {} if self.freeze_layers is None else {"freeze_layers": self.freeze_layers}
        return {**self.fields_named("c_dim", "img_resolution", "img_channels", *_BLOCKS),
                "block_kwargs": {**frozen, **self.layout()}, "mapping_kwargs": {},
                "epilogue_kwargs": {"mbstd_group_size": self.mbstd_group_size}}


@with_old_names(r1_gamma="gamma")
@dataclass(frozen=True, kw_only=True)
class LossConfig(Config):
    """Weights and intervals of the losses."""

    gamma: float  # weight of the R1 penalty; larger = smoother discriminator
    pl_weight: float = 2  # weight of path length regularization (sg2, section 3.2); 0 = off
    pl_decay: float = 0.01  # update rate of the running mean of path lengths
    pl_batch_shrink: int = 2  # path lengths use 1/pl_batch_shrink of a micro-batch, at least 1 image
    style_mixing_prob: float = 0.9  # probability of style mixing, per micro-batch; 0 = off
    g_reg_interval: int = 4  # iterations between regularizations of the generator
    d_reg_interval: int = 16  # iterations between regularizations of the discriminator
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

    kimg: float  # half-life, in thousands of images
    rampup: float | None  # the half-life is at most this share of the images seen; None = no ramp-up

    def check(self) -> None:
        self.require_at_least(0, "kimg")
        self.require(self.rampup is None or self.rampup > 0, "rampup", "a number > 0, or none")


@dataclass(frozen=True, kw_only=True)
class AdaConfig(Config):
    """How the augmentation probability follows the discriminator's signs (ada, section 3)."""

    target: float  # mean sign of the discriminator on reals to aim at
    kimg: float = 500  # thousands of images in which p can move by 1
    interval: int = 4  # iterations between two changes of p

    def check(self) -> None:
        self.require(-1 <= self.target <= 1, "target", "a number from -1 to 1, as a mean of signs is")
        self.require(self.kimg > 0, "kimg", "a number > 0")
        self.require_at_least(1, "interval")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Config):
    """Augmentations of the discriminator's images; no strengths = no augmentation."""

    strengths: FrozenMapping  # augmentation -> factor of p with which it is applied; any mapping may be given
    p: float  # initial p; constant without StepConfig.ada

    def __post_init__(self) -> None:
        if isinstance(self.strengths, Mapping):
            object.__setattr__(self, "strengths", FrozenMapping(self.strengths))
        super().__post_init__()

    def check(self) -> None:
        for name, strength in self.strengths.items():
            if name not in AUGMENTATIONS:
                raise ConfigError(f"AugmentConfig.strengths has {name!r}; expected names among "
                                  f"{', '.join(AUGMENTATIONS)}")
            if strength < 0:
                raise ConfigError(f"AugmentConfig.strengths[{name!r}] is {strength!r}; expected a number >= 0")
        self.require(0 <= self.p <= 1, "p", "a number from 0 to 1")
        self.require(bool(self.strengths) or self.p == 0, "p", "0 without augmentations")


@dataclass(frozen=True, kw_only=True)
class AdamConfig(Config):
    """Settings of Adam, before the correction for lazy regularization (sg2, appendix B)."""

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
    """Settings of a training iteration."""

    batch: int  # total batch size, over all processes
    micro_batch: int  # images of one forward pass in one process
    loss: LossConfig
    ema: EmaConfig
    ada: AdaConfig | None = None  # None = p is constant

    def check(self) -> None:
        self.require_at_least(1, "batch", "micro_batch")
        self.require(self.batch % self.micro_batch == 0, "batch", f"a multiple of micro_batch ({self.micro_batch})")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Config):
    """The images to train on."""

    name: str
    resolution: int
    channels: int
    c_dim: int  # length of the networks' label vectors; 0 = labels are not used
    use_labels: bool
    max_size: int  # images, before mirroring
    xflip: bool  # add a horizontally flipped copy of each image

    def check(self) -> None:
        self.require_at_least(1, "resolution", "channels", "max_size")
        self.require(self.c_dim >= 1 if self.use_labels else self.c_dim == 0, "c_dim", (
            "a number >= 1 where labels are used" if self.use_labels else "0 where labels are not used"
        ))


@dataclass(frozen=True, kw_only=True)
class DatasetFacts(Config):
    """What `resolve` needs to know about a data set."""

    name: str  # first part of the run's name
    resolution: int
    channels: int
    num_images: int  # before mirroring
    c_dim: int  # length of a label vector; 0 = the data set has no labels

    @property
    def has_labels(self) -> bool:
        return self.c_dim > 0

    def check(self) -> None:
        """Raise ConfigError if the networks cannot process the images."""
        if not self.name or "/" in self.name or "\\" in self.name:
            raise ConfigError(f"the data set's name is {self.name!r}; expected a name without path separators")
        if not is_resolution(self.resolution):
            raise ConfigError(f"data set {self.name} has resolution {self.resolution}; expected {RESOLUTIONS}: convert "
                              "it with dataset_tool.py")
        if self.channels not in (1, 3):
            raise ConfigError(f"data set {self.name} has {self.channels} channels; expected 1 (gray) or 3 (RGB): "
                              "convert it with dataset_tool.py")
        if self.num_images < 1:
            raise ConfigError(f"data set {self.name} has {self.num_images} images; expected at least 1")
        if self.c_dim < 0:
            raise ConfigError(f"data set {self.name} has labels of length {self.c_dim}; expected a length >= 0")


LOCAL_LENGTHS, SHARED_NETWORKS, EMA_PLACES = ("equal", "proportional"), ("G,D", "G"), ("sites", "server")
SITE_WEIGHTS, PAYLOADS = ("images", "equal"), ("float32", "bfloat16")
AGGREGATIONS = ("mean", "median", "trimmed-mean")
ON_REFUSED = ("continue", "stop")
# Server optimizers -> their learning rates, with which Adam moves each weight in a round by about as much; None = none.
SERVER_LR = {"fedavg": None, "fedavgm": 1, "fedadam": 0.01}
SERVER_OPTIMIZERS = tuple(SERVER_LR)


@dataclass(frozen=True, kw_only=True)
class FederationConfig(FlagConfig):
    """Decentralized training: rounds of training at several sites, each on its own images, with a mean after each."""

    sites: tuple[str, ...]  # names; the number of a site decides its random seed
    rounds: int
    round_kimg: float  # thousands of images of a site in a round; if local is "proportional", the mean over sites
    local: str = "equal"  # all sites train on equally many images, or proportionally to the images they have
    share: str = "G,D"  # networks that are averaged; with "G" each site keeps its own discriminator
    ema: str = "sites"  # where the moving average of the generator is updated: after each iteration, or each round
    weights: str = "images"  # weight of a site in the mean: images seen in the round, or equal
    aggregation: str = "mean"  # mean of the sites' tensors, or median or trimmed mean of each coordinate
    trim: float = 0.2  # share of the sites that a trimmed mean leaves out at each end, rounded up
    payload: str = "float32"  # type of the numbers sent
    server_optimizer: str = "fedavg"  # how the mean changes the networks
    server_lr: float | None = None  # of fedavgm and fedadam; None = SERVER_LR
    server_momentum: float = 0.9  # of fedavgm; beta1 of fedadam
    server_beta2: float = 0.99  # of fedadam
    server_tau: float = 1e-3  # of fedadam
    fedprox_mu: float = 0  # weight of FedProx's term, which holds a site's networks near those of the server
    max_update_norm: float = 10  # an update is refused if its norm is larger than this multiple of the median
    on_refused: str = "continue"  # with the other sites, or stop
    join: tuple[str, ...] = ()  # NAME:ROUND, the first round of a site
    leave: tuple[str, ...] = ()  # NAME:ROUND, the last round of a site
    dp: bool = False  # differential privacy of the updates; see federated.privacy for this and the next four
    dp_clip: float | None = None  # largest 2-norm of an update; must be given with dp
    dp_noise: float | None = None  # standard deviation of the noise on each weight, in units of dp_clip
    dp_epsilon: float | None = 10  # that dp_noise was found for; None = dp_noise was given
    dp_delta: float = 1e-5

    def privacy(self) -> dict[str, float] | None:
        """Return what the sites and the server agree on about differential privacy; None without it."""
        return {"clip": self.dp_clip, "noise": self.dp_noise, "delta": self.dp_delta} if self.dp else None

    def check(self) -> None:
        self.require(bool(self.sites), "sites", "at least one name")
        self.require_at_least(1, "rounds")
        for name in ("round_kimg", "server_lr", "server_tau"):
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "a number > 0")
        self.require(self.max_update_norm > 1, "max_update_norm", "a number > 1")
        self.require(self.fedprox_mu >= 0, "fedprox_mu", "a number >= 0")
        for name in ("server_momentum", "server_beta2"):
            self.require(0 <= getattr(self, name) < 1, name, "a number >= 0 and < 1")
        for name, choices in (("local", LOCAL_LENGTHS), ("share", SHARED_NETWORKS), ("ema", EMA_PLACES),
                              ("weights", SITE_WEIGHTS), ("aggregation", AGGREGATIONS), ("payload", PAYLOADS),
                              ("server_optimizer", SERVER_OPTIMIZERS), ("on_refused", ON_REFUSED)):
            self.require(getattr(self, name) in choices, name, f"one of {', '.join(choices)}")
        self.require(0 < self.trim < 0.5, "trim", "a number > 0 and < 0.5")
        self.require(self.aggregation == "mean" or self.weights == "equal", "weights",
                     f"equal with {self.label('aggregation')}={self.aggregation}, which has no weights")
        for name in ("dp_clip", "dp_noise", "dp_epsilon"):
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "a number > 0")
        self.require(0 < self.dp_delta < 1, "dp_delta", "a number > 0 and < 1")
        if self.dp:
            flag = self.label("dp")
            self.require(self.dp_clip is not None, "dp_clip", f"a number with {flag}")
            self.require(self.ema == "server", "ema", f"server with {flag}, so that less is sent that needs noise")
            self.require(self.weights == "equal", "weights", f"equal with {flag}, since the others depend on the data")
            self.require(self.local == "equal", "local", f"equal with {flag}, since the other tells numbers of images")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """All settings that decide what a training run computes."""

    run_name: str  # name of the run's folder, after its number
    cfg: str  # the preset
    gpus: int  # processes, also on a CPU
    batch_gpu: int  # images of a pass by preset or user; step.micro_batch is what is used
    seed: int
    kimg: int  # thousands of images to train for
    kimg_per_tick: float  # thousands of images of a tick, the interval between two lines of statistics
    image_snapshot_ticks: int  # ticks between two sample grids
    network_snapshot_ticks: int  # ticks between two network snapshots
    state_minutes: float  # a resumable state is saved at least this often
    metrics: tuple[str, ...]
    resume: str | None  # network file whose weights training starts from; None = random weights
    dataset: DatasetConfig
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig
    g_adam: AdamConfig
    d_adam: AdamConfig
    step: StepConfig
    augment: AugmentConfig
    resume_classes: str = "same"  # "same": matched with those of the network; "new": the embedding starts at random
    resume_partial: bool = False  # layers that do not match the network start at random; False rejects such a network
    num_workers: int = 3  # data loading workers, per training process
    allow_tf32: bool = True
    cudnn_benchmark: bool = True
    federation: FederationConfig | None = None  # None = one data set

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "") -> Self:
        """Build the configuration from `to_dict`'s result; earlier versions also wrote step.ada as augment.ada."""
        augment, step = (data.get(name) if isinstance(data, Mapping) else None for name in ("augment", "step"))
        if isinstance(augment, Mapping) and "ada" in augment:
            if isinstance(step, Mapping) and augment["ada"] != step.get("ada"):
                name = f"{where}.augment.ada" if where else "augment.ada"
                raise ConfigError(f"{name} is {augment['ada']!r}; expected the same as step.ada")
            data = {**data, "augment": {key: value for key, value in augment.items() if key != "ada"}}
        return super().from_dict(data, where=where)

    @property
    def batch(self) -> int:
        """Total batch size, over all processes."""
        return self.step.batch

    @property
    def length(self) -> tuple[float, str]:
        """How long to train, and the unit, which is also the name of the flag."""
        return (self.kimg, "kimg") if self.federation is None else (self.federation.rounds, "rounds")

    @property
    def precision(self) -> str:
        """Precision of the layers at the highest resolutions: fp32, fp16 or bf16."""
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
        # Contradictions between parts, which an edited file may contain:
        images = (self.dataset.resolution, self.dataset.channels, self.dataset.c_dim)
        for name in ("generator", "discriminator"):
            network = getattr(self, name)
            found = (network.img_resolution, network.img_channels, network.c_dim)
            if found != images:
                raise ConfigError(f"TrainConfig.{name} has resolution, channels, c_dim {found}; expected those of "
                                  f"the data set, {images}")
        self.step.require(bool(self.augment.strengths) or self.step.ada is None, "ada",
                          "none without augmentations")
        share = self.gpus * self.step.micro_batch
        self.require(self.batch % share == 0, "gpus", f"gpus * micro_batch to divide the batch of {self.batch}")
        group = self.discriminator.mbstd_group_size
        if not keeps_groups(self.step.micro_batch, group):
            raise ConfigError(f"StepConfig.micro_batch is {self.step.micro_batch}; expected at most mbstd_group_size "
                              f"({group}) or a multiple of it")


@dataclass(frozen=True, kw_only=True)
class BestValue(Config):
    """The value of a metric that selects the best network snapshot."""

    metric: str
    key: str  # name of the value in the metric's results
    lower_is_better: bool


@dataclass(frozen=True, kw_only=True)
class RunSettings(FlagConfig):
    """What the training loop needs beside its TrainConfig."""

    outdir: str  # folder of all runs
    data: str  # path of the data set
    device: str = "cpu"  # cpu, cuda, or one GPU as cuda:1
    precision: str = "auto"  # as given; with auto a continued run keeps its own
    batch_gpu: int | None = None  # as given; with None a continued run keeps its own
    balance: str = "none"  # how often images are seen: see training.sampling.image_weights
    valid: str | None = None  # path of a held-out data set
    per_class: bool = False  # also compute the metrics for each class
    detector: str | None = None  # feature detector of the metrics, in place of the usual ones
    detector_weights: tuple[str, ...] = ()  # files of weights, as FILE or NAME=FILE
    max_hours: float | None = None  # save a resumable state and stop after this time; None = no limit
    keep: int | None = None  # number of newest network snapshots to keep; None = all, or one if keep_best is given
    keep_best: BestValue | None = None  # also keep the best network snapshot by this value
    name: str | None = None  # of the run, in place of one made from the flags
    tune_malloc: bool = True  # let the CPU allocator keep freed memory
    new: bool = False  # start a new run even if one could be continued
    notes: tuple[str, ...] = ()  # choices made for the user, one line each, for the run's log

    def asked(self) -> dict[str, bool]:
        """Return which of the settings were given by the user, as arguments of `training.run_folder.choose_run`."""
        return {"new": self.new, "precision_given": self.precision != "auto",
                "batch_gpu_given": self.batch_gpu is not None}

    @property
    def num_newest(self) -> int | None:
        """Number of newest network snapshots to keep; None = all."""
        return 1 if self.keep is None and self.keep_best is not None else self.keep

    @property
    def keep_flags(self) -> str:
        """The flags by which network snapshots are removed, for messages."""
        best = [] if self.keep_best is None else [f"--keep-best={self.keep_best.key}"]
        return " ".join([*([] if self.keep is None else [f"--keep={self.keep}"]), *best])

    @property
    def same_command(self) -> str:
        """The command that continues the run, for messages."""
        return "the same command (without --new)" if self.new else "the same command"

    def check(self) -> None:
        self.require(bool(self.outdir), "outdir", "a folder")
        self.require(bool(self.data), "data", "a data set")
        self.require(self.max_hours is None or self.max_hours > 0, "max_hours", "a number > 0")
        self.require(self.keep is None or self.keep >= 1, "keep", "a number >= 1")
        self.require(self.name is None or NAME.fullmatch(self.name) is not None, "name", NAME_FORM)
