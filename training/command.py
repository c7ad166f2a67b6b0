"""The command of train.py: from flags to a run that is checked, then described (--dry-run) or started.

Data set, --valid and --resume are looked through before anything is written.
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
from imagesets.classes import LABELS
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
from training.run_folder import began_from
from training.sampling import image_weights
from training.transfer import Transferred, transfer_for

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

_CHANNELS = {"L": 1, "RGB": 3}
_PICTURES = {"ffhq": "faces of FFHQ", "celebahq": "faces of CelebA-HQ", "lsundog": "dogs of LSUN"}


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that can start: all that is known to go wrong with its inputs was checked."""

    config: TrainConfig
    settings: RunSettings
    dataset: ImageDataset
    device: DeviceChoice
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
        run = prepare(flags, choose_metrics, look_only=dry_run)
        if Place.from_environment().launcher is None:  # the process that started this one showed them
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


def prepare(flags: dict[str, Any], choose_metrics: ChooseMetrics, *, look_only: bool = False) -> PreparedRun:
    """Check everything that can be checked before a run starts, and tune the allocator of a CPU for it.

    Prints nothing but progress: a run logs the notes of its settings.

    flags:      values by the names of `training.options.FLAGS`, None where not given
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
    return PreparedRun(config=config, settings=settings, dataset=dataset, device=device, warnings=warnings,
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
    options = TrainOptions(**{field.name: changed.get(field.name, flags[field.name]) for field in fields(TrainOptions)})
    if best is not None:
        best = BestValue(**dict(zip([field.name for field in fields(BestValue)], best, strict=True)))
    precision = "auto" if options.fp32 is None else "fp32" if options.fp32 else "fp16"  # where --precision is not given
    given = {**flags, "precision": options.precision or precision, "keep_best": best}
    settings = RunSettings(**{field.name: given[field.name] for field in fields(RunSettings) if field.name in given})
    return options, settings, note


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


def check_images(dataset: ImageDataset) -> None:
    """Raise UserError, naming the first, unless all images are of one size and kind, by what their headers say."""
    channels, height, width = dataset.image_shape
    for index, header in enumerate(_headers(dataset)):
        if header != (width, height, channels):
            dataset[index]  # says what is wrong with it


def _headers(dataset: ImageDataset) -> Iterator[tuple[int, int, int] | None]:
    """Yield width, height and channels of each image, None where they cannot be told; pixels are not decoded."""
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
    """Raise UserError unless a discriminator for `dataset` can judge the images of --valid, others than its own.

    Return a line where the labels of the two cannot be matched by name.
    """
    flag = f"--valid={valid.path}"
    if valid.path.resolve() == dataset.path.resolve():
        raise UserError(f"{flag} is the data set of --data itself; expected images that are not learned from")
    if valid.image_shape != dataset.image_shape:
        raise UserError(f"{flag} is {describe_shape(valid.image_shape)}; expected "
                        f"{describe_shape(dataset.image_shape)}, as --data")
    if dataset.use_labels and valid.label_dim != dataset.label_dim:
        raise UserError(f"{flag} has labels of length {valid.label_dim}; expected {dataset.label_dim}, as --data: "
                        "convert both with dataset_tool.py and the same --classes")
    if dataset.use_labels and valid.label_kind != dataset.label_kind:
        raise UserError(f"{flag} has {LABELS[valid.label_kind]}; expected {LABELS[dataset.label_kind]}, as --data")
    check_images(valid)
    if dataset.use_labels and (valid.label_names is None) != (dataset.label_names is None):
        nameless = flag if valid.label_names is None else f"--data={dataset.path}"
        return f"{nameless} does not name its classes; those of --valid are taken by number"
    return None


def check_held_out(valid: ImageDataset, dataset: ImageDataset, *, compute: bool, workers: int = 1) -> list[str]:
    """Raise UserError where an image of --valid is learned from; return lines on what else may hide overfitting.

    compute:  decode images whose pixels are not known yet, in `workers` processes; otherwise equal files are found
    """
    flag = f"--valid={valid.path}"
    if compute:
        hashes = valid.pixel_hashes(workers=workers), dataset.pixel_hashes(workers=workers)
    else:
        hashes = valid.known_pixel_hashes(), dataset.known_pixel_hashes()
    equal = equal_images(*((valid.checksums(), dataset.checksums()) if None in hashes else hashes))
    advice = "keep a part of one data set out of the training with dataset_tool.py split"
    if equal:
        mine, theirs = equal[0]
        raise UserError(f"{flag}: {len(equal)} of {valid.num_images} images are in --data={dataset.path} too, such as "
                        f"{valid.image_names()[mine]}, which is {dataset.image_names()[theirs]} there (order, labels "
                        f"and mirroring aside); expected images that are not learned from: {advice}")
    known = set(dataset.named_groups()) - {None}
    shared = [group for group in valid.named_groups() if group in known]
    lines = []
    if None in hashes:
        lines.append(f"{flag} is compared with --data by its files only, for their pixels are not recorded; training "
                     "decodes all, and refuses equal images in files that differ")
    if not shared:
        return lines
    groups = list(dict.fromkeys(shared))
    return [*lines, f"warning: {len(groups)} groups (patients or lesions) of {flag} are in --data={dataset.path} too "
            f"({', '.join(groups[:3])}{', ...' if len(groups) > 3 else ''}), with {len(shared)} of "
            f"{valid.num_images} images; their scores hide overfitting: {advice}"]


def resume_files(resume: str | None) -> list[str]:
    """Return the files that --resume can stand for, a run's newest last; none where it is not given.

    Raises UserError where there are none, saying what a published network's name stands for.
    """
    if resume in (None, "noresume"):
        return []
    if resume in TRANSFER_NAMES:
        kind = resume.rstrip("0123456789")
        size = resume.removeprefix(kind)
        raise UserError(
            f"--resume is {resume}, a network for {_PICTURES[kind]} at {size}x{size} that NVIDIA published under the "
            "NVIDIA Source Code License-NC (for non-commercial use only); expected a file: fetch it from NVIDIA under "
            f"that licence, and give its path, such as --resume={resume}.pkl")
    if "://" in resume:
        raise UserError(f"--resume is {resume}; expected a file: download it first, and give its path")
    files = network_files(resume)
    if not files or files == [resume]:
        find_network(resume, "--resume")  # says what is there, or not
    return files


def choose_resume(resume: str, files: list[str], config: TrainConfig, settings: RunSettings) -> tuple[str, str | None]:
    """Return the one of `resume_files` that training starts from, and a line for the user where that is no plain path.

    A run's folder has a newer network a day later, and a pattern can match what this very run wrote: a run that could
    be continued, of these settings, keeps the file that it began from. Raises UserError where several files match.
    """
    if files == [resume]:
        return resume, None
    asked = settings.asked()
    begun = None if asked.pop("new") else began_from(settings.outdir, config, files, **asked)
    if begun is None:
        path = find_network(resume, "--resume")
        return path, f"--resume: {path}"
    return begun.network, f"--resume: {begun.network}, which {begun.run} began from"


def check_resume_weights(config: TrainConfig, dataset: ImageDataset) -> Transferred | None:
    """Raise UserError unless the file of --resume can be read and suits this run; return what it gives.

    Frozen layers have to come from a network; the original freezes random ones too, and so does `options.resolve`.
    """
    frozen = config.discriminator.freeze_layers
    if config.resume is None and frozen:
        raise UserError(f"--freezed is {frozen} without --resume; expected a network to start from: add it, or leave "
                        "--freezed out")
    return None if config.resume is None else transfer_for(meta_state(config), config, dataset)
