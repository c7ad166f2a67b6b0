"""The command of train.py: check a run's inputs, then describe the run (--dry-run) or start it.

The data set, --valid and --resume are checked before anything is written.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

import click
import PIL.Image

from dnnlib.cli import GroupedCommand, UserError, check_outdir
from dnnlib.files import retrying
from dnnlib.workers import usable_cores
from imagesets.classes import LABELS, VECTOR
from imagesets.pixel_hashes import equal_images
from imagesets.reader import describe_shape
from torch_utils.device import DeviceChoice, choose_device, choose_precision, tune_malloc
from torch_utils.distributed import Place
from training.config import BestValue, RunSettings, TrainConfig
from training.dataset import ImageDataset
from training.dry_run import describe_run, meta_state
from training.network_file import find_network, network_files
from training.options import FLAGS, TrainOptions, resolve
from training.presets import TRANSFER_NAMES
from training.run_folder import find_run_started_from
from training.sampling import image_weights
from training.transfer import Transferred, transfer_for

HELP = """Train a StyleGAN2 generator with adaptive discriminator augmentation (ADA).

\b
python train.py --outdir=runs --data=isic256.zip --cond=1 --mirror=1
python train.py --outdir=runs --data=phantom.zip --cfg=tiny --kimg=10
python train.py --outdir=runs --data=isic256.zip --cond=1 --dry-run

The same command again continues its run where it stopped. A finished run is left alone, unless --kimg is larger
than before. BOOL is 1 or 0, true or false, yes or no.

\b
Exit codes: 0 finished; 1 the program or a GPU failed; 2 a mistake in the command or its data; 3 training
steps kept failing; 4 out of memory (the message names a --batch-gpu that continues the run); 75 stopped
early, the same command continues; 76 another process of the run failed.
"""

# --metrics (None if not given), --detector, --detector-weights and --keep-best -> names of the metrics, a note for the
# user or None, and the fields of a BestValue for --keep-best, or None
ChooseMetrics = Callable[[str | None, str | None, Sequence[str], str | None],
                         tuple[tuple[str, ...], str | None, tuple[str, str, bool] | None]]

_CHANNELS = {"L": 1, "RGB": 3}
_PICTURES = {"ffhq": "faces of FFHQ", "celebahq": "faces of CelebA-HQ", "lsundog": "dogs of LSUN"}


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that can start: its inputs were checked."""

    config: TrainConfig
    settings: RunSettings
    dataset: ImageDataset
    device: DeviceChoice
    warnings: tuple[str, ...]  # on choices made for the user; also in settings.notes
    alerts: tuple[str, ...] = ()  # the warnings that are always shown on standard error
    transferred: Transferred | None = None  # what is taken from --resume; None without it


def make_command(train: Callable[[TrainConfig, RunSettings, ImageDataset], int],
                 choose_metrics: ChooseMetrics) -> click.Command:
    """Return the command of train.py.

    train:           runs the training, and returns the exit code
    choose_metrics:  checks the given metrics, or chooses the default ones; raises UserError
    """
    def callback(dry_run: bool, **flags: Any) -> int:
        run = prepare(flags, choose_metrics, dry_run=dry_run)
        if Place.from_environment().launcher is None:  # otherwise the process that started this one has shown them
            for line in run.alerts:
                click.echo(line, err=True)
        if dry_run:
            found = describe_run(run.config, run.settings, run.dataset, device=run.device,
                                 transferred=run.transferred)
            for line in (*run.warnings, *found["warnings"]):
                if line not in run.alerts:
                    click.echo(line, err=True)
            click.echo(json.dumps(found, indent=1, allow_nan=False))
            return 0
        return train(run.config, run.settings, run.dataset)

    return GroupedCommand(None, callback=callback, params=list(FLAGS), help=HELP,
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})


def prepare(flags: dict[str, Any], choose_metrics: ChooseMetrics, *, dry_run: bool = False) -> PreparedRun:
    """Check everything that can be checked before a run starts, and tune the CPU allocator for it.

    Prints progress only: a run logs the notes of its settings.

    flags:    values by the names of `training.options.FLAGS`, None if not given
    dry_run:  do not decode images for the hashes of their pixels
    Raises UserError, one line, if the run cannot work; nothing is written then.
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
        alerts = _check_pixels(config, settings, dataset, compute=not dry_run)

    warnings = tuple(line for line in (metrics_note, resume_note, valid_note, *alerts) if line is not None)
    notes = (f"device: {device.name} ({device.reason})", *memory, *warnings)
    settings = replace(settings, device=device.name, notes=notes)
    return PreparedRun(config=config, settings=settings, dataset=dataset, device=device, warnings=warnings,
                       alerts=tuple(alerts), transferred=transferred)


def _parse(flags: dict[str, Any], choose_metrics: ChooseMetrics,
           place: Place) -> tuple[TrainOptions, RunSettings, str | None]:
    """Sort flags into options and settings; also return a note on metrics, or None."""
    for name in ("outdir", "data"):
        if not flags.get(name):
            raise UserError(f"--{name} is missing; expected both --outdir and --data, such as --outdir=runs "
                            "--data=isic256.zip: see --help")
    metrics, note, best = choose_metrics(flags["metrics"], flags["detector"], flags["detector_weights"],
                                         flags["keep_best"])
    started = place.processes(flags["gpus"]) if place.is_started else flags["gpus"]
    changed = {"metrics": metrics, "gpus": started,
               "precision": None if flags["precision"] == "auto" else flags["precision"]}
    options = TrainOptions(**{field.name: changed.get(field.name, flags[field.name]) for field in fields(TrainOptions)})
    if best is not None:
        best = BestValue(**dict(zip([field.name for field in fields(BestValue)], best, strict=True)))
    precision = "auto" if options.fp32 is None else "fp32" if options.fp32 else "fp16"  # if --precision is not given
    given = {**flags, "precision": options.precision or precision, "keep_best": best}
    settings = RunSettings(**{field.name: given[field.name] for field in fields(RunSettings) if field.name in given})
    return options, settings, note


def _open_data(config: TrainConfig, settings: RunSettings, *, thorough: bool) -> tuple[ImageDataset, str | None]:
    """Open the training data; with `thorough` check all images, --balance and --valid.

    Also return a note on the labels of --valid, or None.
    """
    choice = config.dataset
    dataset = ImageDataset(settings.data, use_labels=choice.use_labels, xflip=choice.xflip, max_size=choice.max_size,
                           seed=config.seed)
    if settings.per_class and not choice.use_labels:
        raise UserError("--per-class is true without --cond=1; expected networks that know the classes: add --cond=1, "
                        "or leave --per-class out")
    if settings.per_class and dataset.label_kind == VECTOR:
        raise UserError(f"--per-class is true, but {dataset.path} has {LABELS[VECTOR]}; expected classes: leave "
                        "--per-class out")
    if thorough:
        check_images(dataset)
        image_weights(settings.balance, dataset)
        if settings.valid is not None:
            valid = ImageDataset(settings.valid, use_labels=choice.use_labels, classes=dataset.classes)
            return dataset, check_valid(valid, dataset)
    return dataset, None


def _check_pixels(config: TrainConfig, settings: RunSettings, dataset: ImageDataset, *, compute: bool) -> list[str]:
    """Hash the pixels of the training images, compare them with --valid, and return warnings about overlap."""
    workers = max(min(config.num_workers, usable_cores()), 1)
    if compute:
        dataset.pixel_hashes(workers=workers)
    if settings.valid is None:
        return []
    return check_held_out(ImageDataset(settings.valid), dataset, compute=compute, workers=workers)


def check_images(dataset: ImageDataset) -> None:
    """Raise UserError for the first image that differs from the others in size or channels, judged by its header."""
    channels, height, width = dataset.image_shape
    for index, header in enumerate(_headers(dataset)):
        if header != (width, height, channels):
            dataset[index]  # raises the error


def _headers(dataset: ImageDataset) -> Iterator[tuple[int, int, int] | None]:
    """Yield width, height and channels of each image, None for an unreadable one; pixels are not decoded."""
    with ExitStack() as stack:
        if dataset.path.is_file():
            opened = stack.enter_context(retrying(lambda: zipfile.ZipFile(dataset.path), dataset.path)).open
        else:
            def opened(name: str):
                return open(dataset.path / name, "rb")
        for name in dataset.image_names():
            try:
                with opened(dataset.locate(name)) as file, PIL.Image.open(file) as image:
                    yield *image.size, _CHANNELS.get(image.mode, 0)
            except (OSError, SyntaxError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError,
                    PIL.Image.DecompressionBombError):
                yield None


def check_valid(valid: ImageDataset, dataset: ImageDataset) -> str | None:
    """Raise UserError unless --valid is another data set that a discriminator for `dataset` can score.

    Return a note if the labels of the two cannot be matched by name.
    """
    flag = f"--valid={valid.path}"
    if valid.path.resolve() == dataset.path.resolve():
        raise UserError(f"{flag} is the data set of --data itself; expected images that are not trained on")
    if valid.image_shape != dataset.image_shape:
        raise UserError(f"{flag} is {describe_shape(valid.image_shape)}; expected "
                        f"{describe_shape(dataset.image_shape)}, as in --data")
    if dataset.use_labels and valid.label_dim != dataset.label_dim:
        raise UserError(f"{flag} has labels of length {valid.label_dim}; expected {dataset.label_dim}, as in --data: "
                        "convert both with dataset_tool.py and the same --classes")
    if dataset.use_labels and valid.label_kind != dataset.label_kind:
        raise UserError(f"{flag} has {LABELS[valid.label_kind]}; expected {LABELS[dataset.label_kind]}, as in --data")
    check_images(valid)
    if dataset.use_labels and (valid.label_names is None) != (dataset.label_names is None):
        nameless = flag if valid.label_names is None else f"--data={dataset.path}"
        return f"{nameless} does not name its classes; those of --valid are matched by number"
    return None


def check_held_out(valid: ImageDataset, dataset: ImageDataset, *, compute: bool, workers: int = 1) -> list[str]:
    """Raise UserError if an image of --valid is also trained on; return warnings on other causes of hidden overfitting.

    compute:  decode images whose pixel hashes are not recorded, in `workers` processes; False compares files instead
    """
    flag = f"--valid={valid.path}"
    if compute:
        hashes = valid.pixel_hashes(workers=workers), dataset.pixel_hashes(workers=workers)
    else:
        hashes = valid.known_pixel_hashes(), dataset.known_pixel_hashes()
    equal = valid.equal_files(dataset) if None in hashes else equal_images(*hashes)
    advice = "hold out part of one data set with dataset_tool.py split"
    if equal:
        mine, theirs = equal[0]
        raise UserError(f"{flag}: {len(equal)} of {valid.num_images} images are also in --data={dataset.path}, such as "
                        f"{valid.image_names()[mine]}, which is {dataset.image_names()[theirs]} there (apart from "
                        f"order, labels and mirroring); expected images that are not trained on: {advice}")
    known = set(dataset.named_groups()) - {None}
    shared = [group for group in valid.named_groups() if group in known]
    lines = []
    if None in hashes:
        lines.append(f"{flag} is compared with --data file by file only, since pixel hashes are not recorded; training "
                     "decodes all images, and rejects equal images in different files")
    if not shared:
        return lines
    groups = list(dict.fromkeys(shared))
    return [*lines, f"warning: {len(groups)} groups (patients or lesions) of {flag} are also in --data={dataset.path} "
            f"({', '.join(groups[:3])}{', ...' if len(groups) > 3 else ''}), with {len(shared)} of "
            f"{valid.num_images} images; their scores hide overfitting: {advice}"]


def resume_files(resume: str | None) -> list[str]:
    """Return the network files that --resume matches, a run's newest last; an empty list if it is not given.

    Raises UserError if nothing matches; for the name of a published network, the message explains how to get it.
    """
    if resume in (None, "noresume"):
        return []
    if resume in TRANSFER_NAMES:
        kind = resume.rstrip("0123456789")
        size = resume.removeprefix(kind)
        raise UserError(
            f"--resume is {resume}, a network for {_PICTURES[kind]} at {size}x{size} that NVIDIA published under the "
            "NVIDIA Source Code License-NC (for non-commercial use only); expected a file: download it from NVIDIA "
            f"under that license, and give its path, such as --resume={resume}.pkl")
    if "://" in resume:
        raise UserError(f"--resume is {resume}; expected a file: download it first, and give its path")
    files = network_files(resume)
    if not files or files == [resume]:
        find_network(resume, "--resume")  # raises the error, if there is one
    return files


def choose_resume(resume: str, files: list[str], config: TrainConfig, settings: RunSettings) -> tuple[str, str | None]:
    """Return the one of `resume_files` that training starts from, and a note for the user unless --resume is its path.

    A run's folder may have a newer snapshot a day later, and a pattern can match files that this very run wrote. So a
    run that could be continued with these settings keeps the file that it started from. Raises UserError if several
    files match.
    """
    if files == [resume]:
        return resume, None
    asked = settings.asked()
    started = None if asked.pop("new") else find_run_started_from(settings.outdir, config, files, **asked)
    if started is None:
        path = find_network(resume, "--resume")
        return path, f"--resume: {path}"
    return started.network, f"--resume: {started.network}, which {started.run} started from"


def check_resume_weights(config: TrainConfig, dataset: ImageDataset) -> Transferred | None:
    """Raise UserError unless the file of --resume can be read and suits this run; return what is taken from it.

    Frozen layers have to come from a network; NVIDIA's code freezes random ones too, and so does `options.resolve`.
    """
    frozen = config.discriminator.freeze_layers
    if config.resume is None and frozen:
        raise UserError(f"--freezed is {frozen} without --resume; expected a network to start from: add --resume, or "
                        "leave --freezed out")
    return None if config.resume is None else transfer_for(meta_state(config), config, dataset)
