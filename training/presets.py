"""From a user's flags and a data set's facts to the whole configuration of a training run.

`resolve` is pure: equal inputs give equal outputs, and nothing is read or drawn.
"""

from typing import Any

from training.batching import BatchRules, BatchSplit, split_batch
from training.config import (
    AdaConfig,
    AdamConfig,
    AugmentConfig,
    ConfigError,
    DatasetConfig,
    DiscriminatorConfig,
    EmaConfig,
    GeneratorConfig,
    LossConfig,
    StepConfig,
    TrainConfig,
)
from training.options import DatasetFacts, TrainOptions
from training.preset_table import (
    ADA_KIMG,
    ADA_KIMG_RESUMED,
    AUGMENT_GROUPS,
    AUGPIPES,
    CFG_NAMES,
    TRANSFER_NAMES,
    Preset,
    choose_preset,
)

__all__ = [
    "AUGMENT_GROUPS", "AUGPIPES", "CFG_NAMES", "TRANSFER_NAMES", "DatasetFacts", "TrainOptions", "describe",
    "network_configs", "resolve",
]  # fmt: skip


def resolve(options: TrainOptions, facts: DatasetFacts) -> TrainConfig:
    """Return the configuration that the flags mean on this data set.

    Raises ConfigError, one line that names the flag and what would do, where flags, preset and data do not fit.
    """
    cfg, gpus = _given(options.cfg, "auto"), _given(options.gpus, 1)
    dataset = _dataset_config(options, facts)
    preset = choose_preset(cfg, facts.resolution, gpus)
    if facts.resolution > preset.channel_base:
        raise ConfigError(
            f"--cfg is {cfg} for images of {facts.resolution}; expected at most {preset.channel_base}: try --cfg=auto"
        )
    rules = BatchRules(cfg=cfg, batch=preset.batch, reference_gpus=preset.reference_gpus, group=preset.mbstd)
    sizes = split_batch(rules, gpus, options.batch, options.batch_gpu)
    augment = _augment_config(options)
    generator, discriminator = network_configs(options, preset, dataset)
    snapshot_ticks = _given(options.snap, 50)
    return TrainConfig(
        run_name=_run_name(options, facts, cfg, gpus),
        cfg=cfg,
        gpus=gpus,
        batch_gpu=sizes.batch_gpu,
        seed=_given(options.seed, 0),
        kimg=_given(options.kimg, preset.kimg),
        kimg_per_tick=_given(options.tick, 4),
        image_snapshot_ticks=snapshot_ticks,
        network_snapshot_ticks=snapshot_ticks,
        state_minutes=_given(options.state_minutes, 10),
        metrics=_given(options.metrics, ("fid50k_full",)),
        resume=options.resume if options.resumes else None,
        resume_classes=_given(options.resume_classes, "same"),
        resume_partial=bool(options.resume_partial),
        dataset=dataset,
        generator=generator,
        discriminator=discriminator,
        g_adam=AdamConfig(lr=preset.lr),
        d_adam=AdamConfig(lr=preset.lr),
        step=_step_config(options, preset, sizes, augment.ada),
        augment=augment,
        num_workers=_given(options.workers, 3),
        allow_tf32=_given(options.allow_tf32, True),
        cudnn_benchmark=not options.nobench,
    )


def describe(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that a user compares between runs, under short names; plain JSON types."""
    generator, discriminator, loss, ada = config.generator, config.discriminator, config.step.loss, config.augment.ada
    idle_ada_kimg = ADA_KIMG if config.resume is None else ADA_KIMG_RESUMED
    is_fixed = bool(config.augment.strengths) and ada is None
    return {
        "run_name": config.run_name,
        "batch": config.batch,
        "batch_gpu": config.batch_gpu,
        "mbstd_group": discriminator.mbstd_group_size,
        "channel_base": generator.channel_base,
        "channel_max": generator.channel_max,
        "num_fp16_res": generator.num_fp16_res,
        "conv_clamp": generator.conv_clamp,
        "lr": config.g_adam.lr,
        "r1_gamma": loss.r1_gamma,
        "ema_kimg": config.step.ema.kimg,
        "ema_rampup": config.step.ema.rampup,
        "map_layers": generator.mapping_layers,
        "kimg": config.kimg,
        "pl_weight": loss.pl_weight,
        "style_mixing_prob": loss.style_mixing_prob,
        "d_architecture": discriminator.architecture,
        "ada_target": ada.target if ada else None,
        "ada_kimg": ada.kimg if ada else idle_ada_kimg,
        "image_snapshot_ticks": config.image_snapshot_ticks,
        "network_snapshot_ticks": config.network_snapshot_ticks,
        "kimg_per_tick": config.kimg_per_tick,
        "augment": dict(config.augment.strengths),
        "augment_p": config.augment.p if is_fixed else None,
        "metrics": list(config.metrics),
        "dataset": {
            "use_labels": config.dataset.use_labels,
            "max_size": config.dataset.max_size,
            "xflip": config.dataset.xflip,
            "resolution": config.dataset.resolution,
        },
        "freeze_layers": discriminator.freeze_layers,
    }


def _given(value: Any, default: Any) -> Any:
    """Return what the user said, or the default where the flag was not given."""
    return default if value is None else value


def _dataset_config(options: TrainOptions, facts: DatasetFacts) -> DatasetConfig:
    """Choose images and labels; raise ConfigError where the data set does not have them."""
    if options.cond and not facts.has_labels:
        raise ConfigError(
            f"--cond is true; expected a data set with labels, and {facts.name} has none: "
            "add labels to its dataset.json, or leave --cond out"
        )
    if options.subset is not None and options.subset > facts.num_images:
        raise ConfigError(
            f"--subset is {options.subset}; expected at most {facts.num_images}, the images of {facts.name}"
        )
    return DatasetConfig(
        name=facts.name,
        resolution=facts.resolution,
        channels=facts.channels,
        c_dim=facts.c_dim if options.cond else 0,
        use_labels=bool(options.cond),
        max_size=_given(options.subset, facts.num_images),
        xflip=bool(options.mirror),
    )


def network_configs(
    options: TrainOptions, preset: Preset, dataset: DatasetConfig
) -> tuple[GeneratorConfig, DiscriminatorConfig]:
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
        "fp16_channels_last": bool(options.nhwc),
    }
    generator = GeneratorConfig(
        z_dim=preset.latent_dim, w_dim=preset.latent_dim, mapping_layers=preset.mapping_layers, **shared
    )
    discriminator = DiscriminatorConfig(
        architecture=preset.d_architecture, mbstd_group_size=preset.mbstd, freeze_layers=options.freezed, **shared
    )
    return generator, discriminator


def _step_config(options: TrainOptions, preset: Preset, sizes: BatchSplit, ada: AdaConfig | None) -> StepConfig:
    """Join what an iteration needs."""
    return StepConfig(
        batch=sizes.batch,
        micro_batch=sizes.micro_batch,
        loss=LossConfig(
            r1_gamma=_given(options.gamma, preset.gamma),
            pl_weight=preset.pl_weight,
            style_mixing_prob=preset.style_mixing_prob,
        ),
        # A generator that is trained already needs no short averages at the start.
        ema=EmaConfig(kimg=preset.ema_kimg, rampup=None if options.resumes else preset.ema_rampup),
        ada=ada,
    )


def _augment_config(options: TrainOptions) -> AugmentConfig:
    """Choose the augmentations and what drives their probability."""
    if options.aug == "noaug":
        return AugmentConfig(strengths={}, p=0, ada=None)
    pipe = _given(options.augpipe, "bgc")
    if pipe not in AUGPIPES:
        raise ConfigError(f"--augpipe is {pipe!r}; expected one of {', '.join(AUGPIPES)}")
    strengths = {name: 1 for name in AUGPIPES[pipe]}
    if options.aug == "fixed":
        return AugmentConfig(strengths=strengths, p=options.p, ada=None)
    kimg = ADA_KIMG_RESUMED if options.resumes else ADA_KIMG
    return AugmentConfig(strengths=strengths, p=0, ada=AdaConfig(target=_given(options.target, 0.6), kimg=kimg))


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
    for name in ("gamma", "kimg", "batch"):
        value = getattr(options, name)
        if value is not None:
            parts.append(f"{name}{_number(value)}")
    if options.aug is not None:
        parts.append(options.aug)
    for name in ("p", "target"):
        value = getattr(options, name)
        if value is not None:
            parts.append(f"{name}{_number(value)}")
    if options.augpipe is not None:
        parts.append(options.augpipe)
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
