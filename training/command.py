"""The command line of train.py: from flags to a checked run, which is described or started."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import click

from dnnlib.cli import UserError
from imagesets.workers import usable_cores
from torch_utils.allocator import tune_malloc
from torch_utils.distributed import Place
from training.balance import image_weights
from training.config import TrainConfig
from training.dataset import ImageDataset
from training.device import Choice, choose_device, choose_precision
from training.dry_run import describe_run
from training.flags import FLAGS, GroupedCommand
from training.input_checks import (
    check_held_out,
    check_images,
    check_outdir,
    check_resume_weights,
    check_valid,
    choose_resume,
    resume_files,
)
from training.options import TrainOptions
from training.presets import resolve
from training.run_settings import BestValue, RunSettings
from training.transfer import Transferred

HELP = """Train a StyleGAN2 generator with adaptive discriminator augmentation (ADA).

\b
python train.py --outdir=runs --data=isic256.zip --cond=1 --mirror=1
python train.py --outdir=runs --data=phantom.zip --cfg=tiny --kimg=10
python train.py --outdir=runs --data=isic256.zip --cond=1 --dry-run

The same command again continues its run where it was stopped, and leaves it alone once it is finished; with a
larger --kimg it continues a finished one. BOOL is 1 or 0, true or false, yes or no.

\b
Exit codes: 0 finished; 1 a fault of the program or a GPU; 2 a mistake in the command or its data; 3 steps
kept failing; 4 out of memory (the message says which --batch-gpu continues the run); 75 stopped with a
state, the same command continues; 76 another process of the run failed.
"""

# --metrics (None where it was not given), --detector, --detector-weights and --keep-best -> names, a note for the user
# or None, and what --keep-best means: the fields of a BestValue, or None
ChooseMetrics = Callable[[str | None, str | None, Sequence[str], str | None],
                         tuple[tuple[str, ...], str | None, tuple[str, str, bool] | None]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that can start: all that is known to go wrong with its inputs was checked."""

    config: TrainConfig
    settings: RunSettings
    dataset: ImageDataset
    device: Choice
    warnings: tuple[str, ...]  # of what was chosen for the user; among settings.notes too
    alerts: tuple[str, ...] = ()  # those of the warnings that standard error shows in any case
    transferred: Transferred | None = None  # what --resume gives; None without it


def make_command(train: Callable[[TrainConfig, RunSettings, ImageDataset], int],
                 choose_metrics: ChooseMetrics) -> click.Command:
    """Return the command of train.py.

    train:           runs the training, and returns the exit code
    choose_metrics:  checks what is asked for, or chooses where nothing is; raises UserError
    """
    def callback(dry_run: bool, **flags: Any) -> int:
        plan = prepare(flags, choose_metrics, look_only=dry_run)
        if Place.from_environment().launcher is None:  # the process that started this one showed them
            for line in plan.alerts:
                click.echo(line, err=True)
        if dry_run:
            found = describe_run(plan.config, plan.settings, plan.dataset, device=plan.device,
                                 transferred=plan.transferred)
            for line in (*plan.warnings, *found["warnings"]):
                if line not in plan.alerts:
                    click.echo(line, err=True)
            click.echo(json.dumps(found, indent=1, allow_nan=False))
            return 0
        return train(plan.config, plan.settings, plan.dataset)

    return GroupedCommand(None, callback=callback, params=list(FLAGS), help=HELP,
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})


def prepare(flags: dict[str, Any], choose_metrics: ChooseMetrics, *, look_only: bool = False) -> Plan:
    """Check everything that can be checked before a run starts, and tune the allocator of a CPU for it.

    Prints nothing but progress: a run says the notes of its settings.

    flags:      values by the names of `training.flags.FLAGS`, None where not given
    look_only:  decode no images for what a network file says of them
    Raises UserError, one line, where the run could not work; nothing was written then.
    """
    place = Place.from_environment()
    options, settings, metrics_note = _parse(flags, choose_metrics, place)
    check_outdir(settings.outdir)
    files = resume_files(options.resume)
    resume, options = options.resume, replace(options, resume=files[-1] if files else options.resume)
    processes, is_main = place.processes(options.gpus), place.rank == 0
    device = choose_device(settings.device, place.local_count if place.is_started else processes)

    memory = (tune_malloc(settings.tune_malloc).note,) if device.name == "cpu" else ()

    precision = choose_precision(settings.precision, device.name).name
    config = resolve(replace(options, precision=precision), ImageDataset(settings.data).facts())
    if settings.name is not None:
        config = replace(config, run_name=settings.name)
    resume_note = None
    if files:
        path, resume_note = choose_resume(resume, files, config, settings)
        config = replace(config, resume=path)
    dataset, valid_note = _open_data(config, settings, thorough=is_main)
    alerts, transferred = [], None
    if is_main:
        transferred = check_resume_weights(config, dataset)
        alerts = _look_at_pixels(config, settings, dataset, compute=not look_only)

    warnings = tuple(line for line in (metrics_note, resume_note, valid_note, *alerts) if line is not None)
    notes = (f"device: {device.name} ({device.reason})", *memory, *warnings)
    settings = replace(settings, device=device.name, notes=notes)
    return Plan(config=config, settings=settings, dataset=dataset, device=device, warnings=warnings,
                alerts=tuple(alerts), transferred=transferred)


def _parse(flags: dict[str, Any], choose_metrics: ChooseMetrics,
           place: Place) -> tuple[TrainOptions, RunSettings, str | None]:
    """Sort flags into options and settings; return also a note on metrics."""
    for name in ("outdir", "data"):
        if not flags.get(name):
            raise UserError(f"--{name} is missing; give both, such as --outdir=runs --data=isic256.zip, or see --help")
    metrics, note, best = choose_metrics(flags["metrics"], flags["detector"], flags["detector_weights"],
                                         flags["keep_best"])
    started = place.processes(flags["gpus"]) if place.is_started else flags["gpus"]
    changed = {"metrics": metrics, "gpus": started,
               "precision": None if flags["precision"] == "auto" else flags["precision"]}
    options = TrainOptions(**{name: changed.get(name, flags[name]) for name in _names(TrainOptions)})
    best = None if best is None else BestValue(**dict(zip(_names(BestValue), best, strict=True)))
    given = {**flags, "precision": _asked_precision(options), "keep_best": best}
    settings = RunSettings(**{name: given[name] for name in _names(RunSettings) if name in given})
    return options, settings, note


def _names(config: type) -> list[str]:
    return [field.name for field in fields(config)]


def _asked_precision(options: TrainOptions) -> str:
    if options.precision is not None:
        return options.precision
    if options.fp32 is not None:
        return "fp32" if options.fp32 else "fp16"
    return "auto"


def _open_data(config: TrainConfig, settings: RunSettings, *, thorough: bool) -> tuple[ImageDataset, str | None]:
    """Open what is trained on; with `thorough` look at all images, at --balance and at --valid.

    Return also a note on the labels of --valid, or None.
    """
    choice = config.dataset
    dataset = ImageDataset(settings.data, use_labels=choice.use_labels, xflip=choice.xflip, max_size=choice.max_size,
                           seed=config.seed)
    if thorough:
        check_images(dataset)
        image_weights(settings.balance, dataset)
        if settings.valid is not None:
            valid = ImageDataset(settings.valid, use_labels=choice.use_labels, classes=dataset.classes)
            return dataset, check_valid(valid, dataset)
    return dataset, None


def _look_at_pixels(config: TrainConfig, settings: RunSettings, dataset: ImageDataset, *,
                    compute: bool) -> list[str]:
    """Find out which images are trained on; compare them with --valid, and return warnings about that."""
    workers = max(min(config.num_workers, usable_cores()), 1)
    if compute:
        dataset.pixel_hashes(workers=workers)
    if settings.valid is None:
        return []
    return check_held_out(ImageDataset(settings.valid), dataset, compute=compute, workers=workers)
