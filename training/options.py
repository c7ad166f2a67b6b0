"""The flags of train.py: each with its name, type, help text, default and check, and what a run makes of them.

`TrainOptions` are the flags that decide what is computed; it finds those that contradict each other. `resolve` makes
the whole configuration of a run of them and the data set's facts, and finds what does not suit data or preset. It is
pure: equal inputs give equal outputs, and nothing is read or drawn. `FLAGS` is the command line.
"""

from dataclasses import dataclass
from typing import Any

import click

from dnnlib.cli import Flag, UserPath, join_values
from dnnlib.typed_config import Config, ConfigError
from torch_utils.device import DEVICE_HELP, PRECISION_NAMES, TUNE_MALLOC_HELP
from training.augmentations.draws import AUGMENT_GROUPS
from training.config import (
    RESUME_CLASSES,
    AdaConfig,
    AdamConfig,
    AugmentConfig,
    DatasetConfig,
    DatasetFacts,
    DiscriminatorConfig,
    EmaConfig,
    GeneratorConfig,
    LossConfig,
    RunSettings,
    StepConfig,
    TrainConfig,
)
from training.network_file import OTHER_NAMES
from training.presets import (
    ADA_KIMG,
    ADA_KIMG_RESUMED,
    AUGPIPES,
    CFG_NAMES,
    FIXED_PRESETS,
    TRANSFER_NAMES,
    BatchSplit,
    Preset,
    choose_preset,
    split_batch,
)

AUGMENT_MODES = ("noaug", "ada", "fixed")
PRECISIONS = tuple(name for name in PRECISION_NAMES if name != "auto")  # auto is one of them by the time of a run

# What holds where a flag is not given; help texts print it. The other flags' defaults depend on --cfg or the data.
DEFAULTS = {
    "cfg": "auto", "gpus": 1, "cond": False, "mirror": False, "seed": 0, "aug": "ada", "target": 0.6, "augpipe": "bgc",
    "resume_classes": TrainConfig.resume_classes, "resume_partial": TrainConfig.resume_partial, "nhwc": False,
    "tick": 4, "snap": 50, "state_minutes": 10, "metrics": ("fid50k_full",), "workers": TrainConfig.num_workers,
    "nobench": not TrainConfig.cudnn_benchmark, "allow_tf32": TrainConfig.allow_tf32,
    "device": "auto", "precision": "auto", "balance": RunSettings.balance, "tune_malloc": RunSettings.tune_malloc,
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Config):
    """The flags of train.py by their names; None = not given.

    A program that offers more ways of saying a thing (--precision=auto, --metrics=none) translates them first.
    """

    cfg: str | None = None
    gpus: int | None = None  # processes; on a machine without a GPU: 1
    cond: bool | None = None
    subset: int | None = None
    mirror: bool | None = None
    gamma: float | None = None
    kimg: int | None = None
    batch: int | None = None
    batch_gpu: int | None = None
    aug: str | None = None
    p: float | None = None
    target: float | None = None
    augpipe: str | None = None
    resume: str | None = None
    resume_classes: str | None = None
    resume_partial: bool | None = None
    freezed: int | None = None
    fp32: bool | None = None
    precision: str | None = None
    nhwc: bool | None = None
    snap: int | None = None
    tick: float | None = None  # thousands of images
    state_minutes: float | None = None
    metrics: tuple[str, ...] | None = None
    seed: int | None = None
    workers: int | None = None
    nobench: bool | None = None
    allow_tf32: bool | None = None

    def label(self, name: str) -> str:
        """Return the flag, since that is what the user wrote."""
        return "--" + name.replace("_", "-")

    def check(self) -> None:
        """Raise ConfigError on a value out of range and on flags that contradict each other."""
        self._check_ranges()
        self._check_resume_and_metrics()
        self._check_augmentation()
        self._check_precision()

    def get(self, name: str) -> Any:
        """Return what the user said, or the default where the flag was not given."""
        value = getattr(self, name)
        return DEFAULTS[name] if value is None else value

    @property
    def resumes(self) -> bool:
        """Tell whether training starts from an existing network."""
        return self.resume not in (None, "noresume")

    def _check_ranges(self) -> None:
        minima = {
            "gpus": 1, "subset": 1, "gamma": 0, "kimg": 1, "batch": 1, "batch_gpu": 1, "freezed": 0, "snap": 1,
            "seed": 0, "workers": 0,
        }  # fmt: skip
        for name, minimum in minima.items():
            if getattr(self, name) is not None:
                self.require_at_least(minimum, name)
        for name in ("tick", "state_minutes"):
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "a number > 0")
        for name in ("p", "target"):
            value = getattr(self, name)
            self.require(value is None or 0 <= value <= 1, name, "a number from 0 to 1")
        for name, choices in (("aug", AUGMENT_MODES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            self.require(value is None or value in choices, name, f"one of {', '.join(choices)}")

    def _check_resume_and_metrics(self) -> None:
        self.require(self.resume != "", "resume", "a network's name, path or URL, or noresume")
        self.require(self.resume_classes in (None, *RESUME_CLASSES), "resume_classes",
                     f"one of {', '.join(RESUME_CLASSES)}")
        for name in ("resume_classes", "resume_partial"):
            value = getattr(self, name)
            if value not in (None, "same", False) and not self.resumes:
                flag = self.label(name)
                raise ConfigError(f"{flag} is {_shown(value)} without --resume; expected a network to start from: "
                                  f"add it, or leave {flag} out")
        for metric in self.metrics or ():
            times = self.metrics.count(metric)
            if times > 1:
                raise ConfigError(f"--metrics names {metric} {times} times; expected each metric once")

    def _check_augmentation(self) -> None:
        mode = self.get("aug")
        if mode == "fixed" and self.p is None:
            raise ConfigError("--aug is fixed without --p; expected a probability: add --p=0.2, for example")
        if mode != "fixed" and self.p is not None:
            raise ConfigError(f"--p is {self.p:g} with --aug={mode}; expected --aug=fixed: add it, or leave --p out")
        if mode != "ada" and self.target is not None:
            raise ConfigError(f"--target is {self.target:g} with --aug={mode}; expected --aug=ada: change it, or leave "
                              "--target out")
        if mode == "noaug" and self.augpipe is not None:
            raise ConfigError(f"--augpipe is {self.augpipe} with --aug=noaug; expected --aug=ada or fixed: change it, "
                              "or leave --augpipe out")

    def _check_precision(self) -> None:
        if self.fp32 is not None and self.precision is not None and self.fp32 != (self.precision == "fp32"):
            raise ConfigError(f"--precision is {self.precision} with --fp32={_shown(self.fp32)}; expected the two to "
                              "agree: leave --fp32 out")
        if self.nhwc and (self.fp32 or self.precision == "fp32"):
            raise ConfigError("--nhwc is true in float32; expected fp16 or bf16, whose layers it arranges: give "
                              "--precision=fp16, the standard on a GPU, or leave --nhwc out")


def resolve(options: TrainOptions, facts: DatasetFacts) -> TrainConfig:
    """Return the configuration that the flags mean on this data set.

    Raises ConfigError, one line that names the flag and what would do, where flags, preset and data do not fit.
    """
    cfg, gpus = options.get("cfg"), options.get("gpus")
    dataset = _dataset_config(options, facts)
    preset = choose_preset(cfg, facts.resolution, gpus)
    if facts.resolution > preset.channel_base:
        raise ConfigError(f"--cfg is {cfg} for images of {facts.resolution}; expected at most {preset.channel_base}: "
                          "try --cfg=auto")
    sizes = split_batch(cfg, preset, gpus, options.batch, options.batch_gpu)
    augment = _augment_config(options)
    generator, discriminator = network_configs(options, preset, dataset)
    return TrainConfig(
        run_name=_run_name(options, facts, cfg, gpus),
        cfg=cfg,
        gpus=gpus,
        batch_gpu=sizes.batch_gpu,
        seed=options.get("seed"),
        kimg=preset.kimg if options.kimg is None else options.kimg,
        kimg_per_tick=options.get("tick"),
        image_snapshot_ticks=options.get("snap"),
        network_snapshot_ticks=options.get("snap"),
        state_minutes=options.get("state_minutes"),
        metrics=options.get("metrics"),
        resume=options.resume if options.resumes else None,
        resume_classes=options.get("resume_classes"),
        resume_partial=options.get("resume_partial"),
        dataset=dataset,
        generator=generator,
        discriminator=discriminator,
        g_adam=AdamConfig(lr=preset.lr),
        d_adam=AdamConfig(lr=preset.lr),
        step=_step_config(options, preset, sizes),
        augment=augment,
        num_workers=options.get("workers"),
        allow_tf32=options.get("allow_tf32"),
        cudnn_benchmark=not options.get("nobench"),
    )


def _dataset_config(options: TrainOptions, facts: DatasetFacts) -> DatasetConfig:
    """Choose images and labels; raise ConfigError where the data set does not have them."""
    if options.cond and not facts.has_labels:
        raise ConfigError(f"--cond is true; expected a data set with labels, and {facts.name} has none: add labels to "
                          "its dataset.json, or leave --cond out")
    if options.subset is not None and options.subset > facts.num_images:
        raise ConfigError(f"--subset is {options.subset}; expected at most {facts.num_images}, the images of "
                          f"{facts.name}")
    return DatasetConfig(
        name=facts.name, resolution=facts.resolution, channels=facts.channels,
        c_dim=facts.c_dim if options.cond else 0, use_labels=options.get("cond"),
        max_size=facts.num_images if options.subset is None else options.subset, xflip=options.get("mirror"))


def network_configs(options: TrainOptions, preset: Preset,
                    dataset: DatasetConfig) -> tuple[GeneratorConfig, DiscriminatorConfig]:
    """Size both networks for the data set, in the precision asked for."""
    is_mixed = not options.fp32 and options.precision != "fp32"
    shared: dict[str, Any] = {
        "img_resolution": dataset.resolution,
        "img_channels": dataset.channels,
        "c_dim": dataset.c_dim,
        "channel_base": preset.channel_base,
        "channel_max": preset.channel_max,
        "num_fp16_res": 4 if is_mixed else 0,
        "conv_clamp": 256 if is_mixed else None,
        "half_dtype": "bfloat16" if options.precision == "bf16" else "float16",
        "fp16_channels_last": options.get("nhwc"),
    }
    return (GeneratorConfig(z_dim=preset.latent_dim, w_dim=preset.latent_dim, mapping_layers=preset.mapping_layers,
                            **shared),
            DiscriminatorConfig(architecture=preset.d_architecture, mbstd_group_size=preset.mbstd,
                                freeze_layers=options.freezed, **shared))


def _step_config(options: TrainOptions, preset: Preset, sizes: BatchSplit) -> StepConfig:
    """Join what an iteration needs."""
    ada_kimg = ADA_KIMG_RESUMED if options.resumes else ADA_KIMG
    adapts = options.get("aug") == "ada"
    return StepConfig(
        batch=sizes.batch, micro_batch=sizes.micro_batch,
        loss=LossConfig(gamma=preset.gamma if options.gamma is None else options.gamma, pl_weight=preset.pl_weight,
                        style_mixing_prob=preset.style_mixing_prob),
        # A generator that is trained already needs no short averages at the start.
        ema=EmaConfig(kimg=preset.ema_kimg, rampup=None if options.resumes else preset.ema_rampup),
        ada=AdaConfig(target=options.get("target"), kimg=ada_kimg) if adapts else None)


def _augment_config(options: TrainOptions) -> AugmentConfig:
    """Choose the augmentations and the probability that they begin with."""
    if options.aug == "noaug":
        return AugmentConfig(strengths={}, p=0)
    pipe = options.get("augpipe")
    if pipe not in AUGPIPES:
        raise ConfigError(f"--augpipe is {pipe!r}; expected one of {', '.join(AUGPIPES)}")
    return AugmentConfig(strengths=dict.fromkeys(AUGPIPES[pipe], 1), p=options.p if options.aug == "fixed" else 0)


def _run_name(options: TrainOptions, facts: DatasetFacts, cfg: str, gpus: int) -> str:
    """Name the run by its data set and by the flags that were given, in a fixed order."""
    parts = [facts.name]
    if options.cond:
        parts.append("cond")
    if options.subset is not None and options.subset < facts.num_images:
        parts.append(f"subset{options.subset}")
    if options.mirror:
        parts.append("mirror")
    parts.append(f"{cfg}{gpus}" if cfg == "auto" else cfg)
    for name in ("gamma", "kimg", "batch", "aug", "p", "target", "augpipe"):
        value = getattr(options, name)
        if value is not None:
            parts.append(value if isinstance(value, str) else f"{name}{_number(value)}")
    if options.resumes:
        parts.append("resume" + (options.resume if options.resume in TRANSFER_NAMES else "custom"))
    elif options.resume is not None:
        parts.append(options.resume)
    if options.freezed is not None:
        parts.append(f"freezed{options.freezed}")
    return "-".join(parts)


def _number(value: float) -> str:
    """Write a flag's number without needless zeros."""
    return str(value) if isinstance(value, int) else f"{value:g}"


# The command line.

RUN, DATA, MODEL, AUGMENT, START, SPEED = (
    "What and where", "Data", "Networks and training", "Augmentation", "Starting from a trained network",
    "Speed and devices")


def _flag(names: str, kind: object, group: str, text: str, metavar: str | None = None, *, standard: str | None = None,
          **attributes) -> Flag:
    """Declare an option; `standard` says in words what holds where it is not given and DEFAULTS does not tell."""
    name = names.split()[-1].removeprefix("--").replace("-", "_")
    if isinstance(kind, click.Choice):
        metavar = "NAME"
        text = f"{text} One of: {', '.join(kind.choices)}."
    if standard is None and name in DEFAULTS:
        standard = _shown(DEFAULTS[name])
    shown = text if standard is None else f"{text} [default: {standard}]"
    if name not in TrainOptions.__dataclass_fields__:  # those know by None what was not given
        attributes.setdefault("default", DEFAULTS.get(name))
    return Flag(names.split(), group=group, type=kind, help=shown, metavar=metavar, **attributes)


def _shown(value: Any) -> str:
    """Write a default as a user would."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


_KIMG = "; ".join([str(Preset.kimg), *(f"{preset.kimg} with --cfg={cfg}" for cfg, preset in FIXED_PRESETS.items()
                                       if preset.kimg != Preset.kimg)])

FLAGS = [
    _flag("--outdir", UserPath(), RUN, "Folder for the folders of runs; each run gets a numbered one. The same "
          "command again continues its newest run there. Must be given.", metavar="DIR"),
    _flag("--new", bool, RUN, "Start a new run, even where one could be continued: not for commands that are repeated "
          "to continue their run.", is_flag=True, default=False),
    _flag("--name", str, RUN, "Name of the run's folder after its number.", "TEXT",
          standard="made from data and flags"),
    _flag("--kimg", int, RUN, "Length of the training, in thousands of real images. A larger one continues a finished "
          "run.", "INT", standard=_KIMG),
    _flag("--tick", float, RUN, "Thousands of images from one line of statistics (a tick) to the next.", "KIMG"),
    _flag("--snap", int, RUN, "Ticks from one network file and sheet of examples to the next.", "TICKS"),
    _flag("--keep", int, RUN, "Keep the N newest network files, and remove older ones once a newer one is written. "
          "Those of the end of a run, those that another run in --outdir began from, and those whose metrics are still "
          "to be computed stay.", "N", standard="all stay"),
    _flag("--keep-best", str, RUN, "Keep the best network file by one of --metrics too; of pr name the value, such as "
          "pr50k3_full_recall. Without --keep, the best and the newest stay.", "METRIC",
          standard="none"),
    _flag("--state-minutes", float, RUN, "At most so long between two saved states to continue from.",
          "MINUTES"),
    _flag("--max-hours", float, RUN, "After that long, save the state and stop; the same command continues later. "
          "Metrics that would take longer are left out, and computed with a later network file.", "HOURS",
          standard="no limit"),
    _flag("--metrics", str, RUN, "Quality metrics to compute with each network file, separated by commas, or none. May "
          "be given several times.", "LIST", multiple=True, callback=join_values,
          standard=f"{_shown(DEFAULTS['metrics'])} where its detector is at hand, else none"),
    _flag("--detector", str, RUN, "Network that metrics look through, in place of the usual ones; see calc_metrics.py "
          "--help.", "NAME", standard="inception-v3; vgg16 for pr"),
    _flag("--detector-weights", UserPath(named=True), RUN,
          "File of its weights; NAME=FILE where several networks are needed, and "
          "lpips-vgg16=FOLDER with the two files that ppl needs. May be given several times.", "FILE",
          multiple=True, standard="downloaded ones"),
    _flag("--seed", int, RUN, "Number that all random choices follow from.", "INT"),
    _flag("-n --dry-run", bool, RUN, "Write nothing: print settings, sizes, memory and files as JSON, then stop.",
          is_flag=True, default=False),

    _flag("--data", UserPath(), DATA, "Data set to learn from: a zip or folder from dataset_tool.py. Must be given.",
          metavar="PATH"),
    _flag("--cond", bool, DATA, "Learn classes: the networks are told the label of each image, a class or a list of "
          "numbers.", "BOOL"),
    _flag("--subset", int, DATA, "Use so many images, drawn by --seed.", "INT", standard="all"),
    _flag("--mirror", bool, DATA, "Use each image a second time, left and right exchanged.", "BOOL"),
    _flag("--balance", UserPath(), DATA,
          "How often images are seen: none (each equally often), classes (each class equally "
          "often), or a CSV file with the columns class,weight or file,weight.", "none|classes|FILE"),
    _flag("--valid", UserPath(), DATA,
          "Data set that is never learned from: the discriminator's scores on it are reported "
          "beside those on --data, which shows overfitting.", "PATH", standard="none"),

    _flag("--cfg", click.Choice(CFG_NAMES), MODEL, "Preset that sizes and settings come from: auto fits resolution and "
          "number of processes; tiny is for CPUs and first tries; the others are those of the papers."),
    _flag("--gamma", float, MODEL, "Weight of the R1 penalty, which keeps the discriminator smooth.", "FLOAT",
          standard="from --cfg"),
    _flag("--batch", int, MODEL, "Images of one iteration, over all processes.", "INT", standard="from --cfg"),
    _flag("--batch-gpu", int, MODEL, "Images that a process takes in one pass; smaller values need less memory, and "
          "continue a run that ran out of it.", "INT", standard="that of the run that is continued, else its share of "
          "the batch, or from --cfg"),

    _flag("--aug", click.Choice(AUGMENT_MODES), AUGMENT, "What sets the probability of augmentations. ada: it follows "
          "the overfitting; fixed: it is --p; noaug: there are none."),
    _flag("--p", float, AUGMENT, "Probability of each augmentation with --aug=fixed, from 0 to 1; must be given there.",
          metavar="FLOAT"),
    _flag("--target", float, AUGMENT, "Overfitting that --aug=ada allows: mean sign of the discriminator on reals.",
          "FLOAT"),
    _flag("--augpipe", click.Choice(AUGPIPES), AUGMENT, "Kinds of augmentation: "
          + ", ".join(f"{name[0]}({name[1:]})" for name in AUGMENT_GROUPS) + "."),

    _flag("--resume", UserPath(), START, "Network file whose weights training starts from: a .safetensors of a run, or "
          f"a .pkl of the original; also {OTHER_NAMES}. To continue a stopped run, repeat its command instead.",
          "FILE|noresume", standard="noresume: random weights"),
    _flag("--resume-classes", click.Choice(RESUME_CLASSES), START, "same: the network's classes are those of --data, "
          "by name, in any order. new: the class embedding starts anew and all else is taken, for other classes, for "
          "an unconditional network with --cond=1, or a conditional one without."),
    _flag("--resume-partial", bool, START, "Where resolutions, mapping layers or numbers of channels differ, take the "
          "layers that are the same, and let the others begin anew; without it such a network is refused.",
          "BOOL"),
    _flag("--freezed", int, START, "Number of the discriminator's layers, counted from the image, that do not learn; "
          "for --resume.", "INT", standard="0"),

    _flag("--device", str, SPEED, DEVICE_HELP, "NAME"),
    _flag("--gpus", int, SPEED, "Number of processes that share the work: one a GPU, or several on a CPU.", "INT"),
    _flag("--precision", click.Choice(PRECISION_NAMES), SPEED, "Number format of the highest resolutions. auto: fp16 "
          "on a GPU, fp32 on a CPU; a run that is continued keeps what it began with."),
    _flag("--fp32", bool, SPEED, "As --precision=fp32; false as --precision=fp16.", "BOOL", standard="not given"),
    _flag("--nhwc", bool, SPEED, "Keep the channels of a pixel together in half precision.", "BOOL"),
    _flag("--allow-tf32", bool, SPEED, "Let a GPU round the factors of float32 products to TF32.", "BOOL"),
    _flag("--nobench", bool, SPEED, "Do not let cuDNN try which of its convolutions is fastest.", "BOOL"),
    _flag("--workers", int, SPEED, "Processes that read images, for each process of the run.", "INT"),
    _flag("--tune-malloc", bool, SPEED, TUNE_MALLOC_HELP, "BOOL"),
]
