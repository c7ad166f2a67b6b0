"""The flags of train.py: name, type, help text, default and check of each, and the configuration that follows.

`TrainOptions` holds the flags that decide what is computed, and rejects contradictions among them. `resolve` combines
them with the facts of the data set into the full configuration of a run, and rejects what does not suit the data or
the preset. It is pure: it reads nothing and draws no random numbers. `FLAGS` is the command line.
"""

from dataclasses import dataclass
from typing import Any

import click

from dnnlib.cli import Flag, UserPath, join_values
from dnnlib.typed_config import ConfigError
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
    FlagConfig,
    GeneratorConfig,
    LossConfig,
    RunSettings,
    StepConfig,
    TrainConfig,
)
from training.network_file import NETWORK_KINDS, OTHER_NAMES
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
PRECISIONS = tuple(name for name in PRECISION_NAMES if name != "auto")  # auto is replaced by one of them before a run

# Defaults of the flags, as help texts show them. The defaults of the other flags depend on --cfg or the data.
DEFAULTS = {
    "cfg": "auto", "gpus": 1, "cond": False, "mirror": False, "seed": 0, "aug": "ada", "target": 0.6, "augpipe": "bgc",
    "resume_classes": TrainConfig.resume_classes, "resume_partial": TrainConfig.resume_partial, "nhwc": False,
    "tick": 4, "snap": 50, "state_minutes": 10, "metrics": ("fid50k_full",), "workers": TrainConfig.num_workers,
    "nobench": not TrainConfig.cudnn_benchmark, "allow_tf32": TrainConfig.allow_tf32,
    "device": "auto", "precision": "auto", "balance": RunSettings.balance, "tune_malloc": RunSettings.tune_malloc,
    "per_class": RunSettings.per_class,
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(FlagConfig):
    """The flags of train.py that decide what is computed, by name; None = not given.

    --precision=auto and --metrics=none are resolved before they get here.
    """

    cfg: str | None = None
    gpus: int | None = None  # processes
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

    def check(self) -> None:
        """Raise ConfigError for values out of range and for contradictory flags."""
        self._check_ranges()
        self._check_resume_and_metrics()
        self._check_augmentation()
        self._check_precision()

    def get(self, name: str) -> Any:
        """Return the value given by the user, or the default."""
        value = getattr(self, name)
        return DEFAULTS[name] if value is None else value

    @property
    def resumes(self) -> bool:
        """Whether training starts from an existing network."""
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
        self.require(self.resume != "", "resume", "a network file, or noresume")
        self.require(self.resume_classes in (None, *RESUME_CLASSES), "resume_classes",
                     f"one of {', '.join(RESUME_CLASSES)}")
        for name in ("resume_classes", "resume_partial"):
            value = getattr(self, name)
            if value not in (None, "same", False) and not self.resumes:
                flag = self.label(name)
                raise ConfigError(f"{flag} is {show_value(value)} without --resume; expected a network to start "
                                  f"from: add --resume, or leave {flag} out")
        for metric in self.metrics or ():
            times = self.metrics.count(metric)
            if times > 1:
                raise ConfigError(f"--metrics lists {metric} {times} times; expected each metric once")

    def _check_augmentation(self) -> None:
        mode = self.get("aug")
        if mode == "fixed" and self.p is None:
            raise ConfigError("--aug is fixed without --p; expected a probability: add --p=0.2, for example")
        if mode != "fixed" and self.p is not None:
            raise ConfigError(f"--p is {self.p:g} with --aug={mode}; expected --aug=fixed: set it, or leave --p out")
        if mode != "ada" and self.target is not None:
            raise ConfigError(f"--target is {self.target:g} with --aug={mode}; expected --aug=ada: set it, or leave "
                              "--target out")
        if mode == "noaug" and self.augpipe is not None:
            raise ConfigError(f"--augpipe is {self.augpipe} with --aug=noaug; expected --aug=ada or fixed: set it, "
                              "or leave --augpipe out")

    def _check_precision(self) -> None:
        if self.fp32 is not None and self.precision is not None and self.fp32 != (self.precision == "fp32"):
            raise ConfigError(f"--precision is {self.precision} with --fp32={show_value(self.fp32)}; expected the two "
                              "to agree: leave --fp32 out")
        if self.nhwc and (self.fp32 or self.precision == "fp32"):
            raise ConfigError("--nhwc is true in full precision; expected fp16 or bf16, as it affects half-precision "
                              "layers only: use --precision=fp16, the default on a GPU, or leave --nhwc out")


def resolve(options: TrainOptions, facts: DatasetFacts) -> TrainConfig:
    """Return the configuration of a run with these flags on this data set.

    Raises ConfigError, one line that names the flag and a value that works, where flags, preset and data do not fit.
    """
    cfg, gpus = options.get("cfg"), options.get("gpus")
    dataset = _dataset_config(options, facts)
    preset = choose_preset(cfg, facts.resolution, gpus)
    if facts.resolution > preset.channel_base:
        raise ConfigError(f"--cfg is {cfg} for images of resolution {facts.resolution}; expected at most "
                          f"{preset.channel_base}: try --cfg=auto")
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
        raise ConfigError(f"--cond is true; expected a data set with labels, but {facts.name} has none: add labels to "
                          "its dataset.json, or leave --cond out")
    if options.subset is not None and options.subset > facts.num_images:
        raise ConfigError(f"--subset is {options.subset}; expected at most {facts.num_images}, the number of images in "
                          f"{facts.name}")
    return DatasetConfig(
        name=facts.name, resolution=facts.resolution, channels=facts.channels,
        c_dim=facts.c_dim if options.cond else 0, use_labels=options.get("cond"),
        max_size=facts.num_images if options.subset is None else options.subset, xflip=options.get("mirror"))


def network_configs(options: TrainOptions, preset: Preset,
                    dataset: DatasetConfig) -> tuple[GeneratorConfig, DiscriminatorConfig]:
    """Return the configuration of both networks for this data set and the requested precision."""
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
    """Return the settings of a training iteration."""
    ada_kimg = ADA_KIMG_RESUMED if options.resumes else ADA_KIMG
    adapts = options.get("aug") == "ada"
    return StepConfig(
        batch=sizes.batch, micro_batch=sizes.micro_batch,
        loss=LossConfig(gamma=preset.gamma if options.gamma is None else options.gamma, pl_weight=preset.pl_weight,
                        style_mixing_prob=preset.style_mixing_prob),
        # A generator that is already trained needs no ramp-up of the average.
        ema=EmaConfig(kimg=preset.ema_kimg, rampup=None if options.resumes else preset.ema_rampup),
        ada=AdaConfig(target=options.get("target"), kimg=ada_kimg) if adapts else None)


def _augment_config(options: TrainOptions) -> AugmentConfig:
    """Choose the augmentations and their initial probability."""
    if options.aug == "noaug":
        return AugmentConfig(strengths={}, p=0)
    pipe = options.get("augpipe")
    if pipe not in AUGPIPES:
        raise ConfigError(f"--augpipe is {pipe!r}; expected one of {', '.join(AUGPIPES)}")
    return AugmentConfig(strengths=dict.fromkeys(AUGPIPES[pipe], 1), p=options.p if options.aug == "fixed" else 0)


def _run_name(options: TrainOptions, facts: DatasetFacts, cfg: str, gpus: int) -> str:
    """Name the run after its data set and the given flags, in a fixed order."""
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
    """Format a flag's number without trailing zeros."""
    return str(value) if isinstance(value, int) else f"{value:g}"


# The command line.

RUN, DATA, MODEL, AUGMENT, START, SPEED = (
    "What and where", "Data", "Networks and training", "Augmentation", "Starting from a trained network",
    "Speed and devices")


def make_flag(names: str, kind: object, group: str, text: str, metavar: str | None = None, *,
              standard: str | None = None, **attributes) -> Flag:
    """Declare an option; `standard` describes its default, None leaves it out."""
    if isinstance(kind, click.Choice):
        metavar = "NAME"
        text = f"{text} One of: {', '.join(kind.choices)}."
    shown = text if standard is None else f"{text} [default: {standard}]"
    return Flag(names.split(), group=group, type=kind, help=shown, metavar=metavar, **attributes)


def _flag(names: str, kind: object, group: str, text: str, metavar: str | None = None, *, standard: str | None = None,
          **attributes) -> Flag:
    """Declare an option of train.py; `standard` describes a default that is not in DEFAULTS."""
    name = names.split()[-1].removeprefix("--").replace("-", "_")
    if standard is None and name in DEFAULTS:
        standard = show_value(DEFAULTS[name])
    if name not in TrainOptions.__dataclass_fields__:  # there, None marks a flag that was not given
        attributes.setdefault("default", DEFAULTS.get(name))
    return make_flag(names, kind, group, text, metavar, standard=standard, **attributes)


def show_value(value: Any) -> str:
    """Format a value as on the command line."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


_KIMG = "; ".join([str(Preset.kimg), *(f"{preset.kimg} with --cfg={cfg}" for cfg, preset in FIXED_PRESETS.items()
                                       if preset.kimg != Preset.kimg)])

FLAGS = [
    _flag("--outdir", UserPath(), RUN, "Folder for all runs; each run gets a numbered subfolder. The same command "
          "again continues its newest run there. Required.", metavar="DIR"),
    _flag("--new", bool, RUN, "Start a new run, even if one could be continued. Leave this out of a command that you "
          "repeat to continue its run.", is_flag=True, default=False),
    _flag("--name", str, RUN, "Name of the run's folder, after its number.", "TEXT",
          standard="made from data and flags"),
    _flag("--kimg", int, RUN, "Length of the training, in thousands of real images. A larger value continues a "
          "finished run.", "INT", standard=_KIMG),
    _flag("--tick", float, RUN, "Report statistics every N thousand images (a tick).", "N"),
    _flag("--snap", int, RUN, "Save a network snapshot and a grid of sample images every N ticks.", "N"),
    _flag("--keep", int, RUN, "Keep only the N newest network snapshots. Older ones are removed once a newer one is "
          "written, except those from the end of a run, those that another run in --outdir started from, and those "
          "whose metrics are still to be computed.", "N", standard="all"),
    _flag("--keep-best", str, RUN, "Also keep the best network snapshot by one of --metrics; for pr, name the value, "
          "such as pr50k3_full_recall. Without --keep, only the best and the newest are kept.", "METRIC",
          standard="none"),
    _flag("--state-minutes", float, RUN, "Save a resumable state at least every N minutes.", "N"),
    _flag("--max-hours", float, RUN, "Save a resumable state and stop after N hours; the same command continues later. "
          "Metrics that would take longer are postponed, and computed with a later network snapshot.", "N",
          standard="no limit"),
    _flag("--metrics", str, RUN, "Quality metrics to compute for each network snapshot, separated by commas, or none. "
          "Can be repeated.", "LIST", multiple=True, callback=join_values,
          standard=f"{show_value(DEFAULTS['metrics'])} if its feature detector is available, else none"),
    _flag("--per-class", bool, RUN, "Also compute --metrics for each class; the worst class goes to TensorBoard. Needs "
          "--cond=1.", "BOOL"),
    _flag("--detector", str, RUN, "Feature detector of the metrics, in place of the usual ones; see calc_metrics.py "
          "--help.", "NAME", standard="inception-v3; vgg16 for pr and dc"),
    _flag("--detector-weights", UserPath(named=True), RUN,
          "File with the weights of the feature detector; NAME=FILE if several are needed, and "
          "lpips-vgg16=FOLDER with the two files that ppl needs. Can be repeated.", "FILE",
          multiple=True, standard="downloaded"),
    _flag("--seed", int, RUN, "Random seed.", "INT"),
    _flag("-n --dry-run", bool, RUN, "Print settings, sizes, memory and files as JSON and exit, without writing "
          "anything.", is_flag=True, default=False),

    _flag("--data", UserPath(), DATA, "Training data: a zip or folder made by dataset_tool.py. Required.",
          metavar="PATH"),
    _flag("--cond", bool, DATA, "Train conditional networks, on the data set's labels: one class or a list of numbers "
          "for each image.", "BOOL"),
    _flag("--subset", int, DATA, "Train on a random subset of N images (chosen by --seed).", "N", standard="all"),
    _flag("--mirror", bool, DATA, "Add a horizontally flipped copy of each image.", "BOOL"),
    _flag("--balance", UserPath(), DATA,
          "How often images are seen: none (each equally often), classes (each class equally "
          "often), or a CSV file with the columns class,weight or file,weight.", "none|classes|FILE"),
    _flag("--valid", UserPath(), DATA,
          "Held-out data set: the discriminator's scores on it are reported beside those on --data, which shows "
          "overfitting.", "PATH", standard="none"),

    _flag("--cfg", click.Choice(CFG_NAMES), MODEL, "Preset of network sizes and hyperparameters: auto depends on the "
          "resolution and the number of processes; tiny is for CPUs and first tries; the others are from the papers."),
    _flag("--gamma", float, MODEL, "Weight of the R1 penalty, which keeps the discriminator smooth.", "FLOAT",
          standard="from --cfg"),
    _flag("--batch", int, MODEL, "Total batch size, over all processes.", "INT", standard="from --cfg"),
    _flag("--batch-gpu", int, MODEL, "Images per forward pass of a process; smaller values need less memory, and let a "
          "run that ran out of memory continue.", "INT", standard="that of the continued run, else the process's share "
          "of the batch, or from --cfg"),

    _flag("--aug", click.Choice(AUGMENT_MODES), AUGMENT, "How the augmentation probability is set. ada: adapted to "
          "the overfitting; fixed: set by --p; noaug: no augmentation."),
    _flag("--p", float, AUGMENT, "Probability of each augmentation, from 0 to 1; required with --aug=fixed.",
          metavar="FLOAT"),
    _flag("--target", float, AUGMENT, "Overfitting that --aug=ada aims at: mean sign of the discriminator's output on "
          "real images.", "FLOAT"),
    _flag("--augpipe", click.Choice(AUGPIPES), AUGMENT, "Kinds of augmentation: "
          + ", ".join(f"{name[0]}({name[1:]})" for name in AUGMENT_GROUPS) + "."),

    _flag("--resume", UserPath(), START, f"Network file whose weights training starts from: {NETWORK_KINDS}; also "
          f"{OTHER_NAMES}. To continue a stopped run, repeat its command instead.",
          "FILE|noresume", standard="noresume: random weights"),
    _flag("--resume-classes", click.Choice(RESUME_CLASSES), START, "same: the network must have the classes of --data, "
          "matched by name, in any order. new: the class embedding starts from random weights and all else is taken; "
          "for different classes, or if only one of the network and this run is conditional."),
    _flag("--resume-partial", bool, START, "If resolutions, mapping layers or numbers of channels differ, take the "
          "layers that match and start the others from random weights; without this flag such a network is rejected.",
          "BOOL"),
    _flag("--freezed", int, START, "Freeze the first N layers of the discriminator, counted from the image; needs "
          "--resume.", "N", standard="0"),

    _flag("--device", str, SPEED, DEVICE_HELP, "NAME"),
    _flag("--gpus", int, SPEED, "Number of processes: one per GPU, or several on a CPU.", "INT"),
    _flag("--precision", click.Choice(PRECISION_NAMES), SPEED, "Precision of the layers at the highest resolutions. "
          "auto: fp16 on a GPU, fp32 on a CPU; a continued run keeps its precision."),
    _flag("--fp32", bool, SPEED, "Same as --precision=fp32; false is the same as --precision=fp16.", "BOOL",
          standard="not given"),
    _flag("--nhwc", bool, SPEED, "Use the channels-last memory format in half-precision layers.", "BOOL"),
    _flag("--allow-tf32", bool, SPEED, "Allow TF32 in matrix products and convolutions on a GPU.", "BOOL"),
    _flag("--nobench", bool, SPEED, "Disable cuDNN autotuning.", "BOOL"),
    _flag("--workers", int, SPEED, "Data loading workers per training process.", "INT"),
    _flag("--tune-malloc", bool, SPEED, TUNE_MALLOC_HELP, "BOOL"),
]
