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
import numpy as np
import PIL.Image

from dnnlib.cli import GroupedCommand, UserError, check_outdir
from dnnlib.files import retrying
from dnnlib.text import listed, shorten
from dnnlib.workers import usable_cores
from imagesets.classes import CLASS, LABELS, VECTOR, class_name
from imagesets.pixel_hashes import equal_images
from imagesets.reader import describe_shape
from torch_utils.device import DeviceChoice, choose_device, choose_precision, tune_malloc
from torch_utils.distributed import Place
from training.config import BestValue, DatasetFacts, RunSettings, TrainConfig
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
class ParsedFlags:
    """The flags of a command, checked as far as possible without the data."""

    options: TrainOptions  # with the precision to use, and the newest of `resume_files`
    settings: RunSettings
    device: DeviceChoice
    resume: str | None  # --resume as given
    resume_files: list[str]  # that it matches
    notes: tuple[str, ...]  # on the device, for the run's log
    warning: str | None  # on metrics

    def resolve(self, facts: DatasetFacts) -> TrainConfig:
        """Return the configuration; that of a run from --resume still needs `settle_resume`."""
        config = resolve(self.options, facts)
        return config if self.settings.name is None else replace(config, run_name=self.settings.name)

    def settle_resume(self, config: TrainConfig) -> tuple[TrainConfig, str | None]:
        """Return the configuration with the file that training starts from, and a note for the user or None."""
        if not self.resume_files:
            return config, None
        path, note = choose_resume(self.resume, self.resume_files, config, self.settings)
        return replace(config, resume=path), note


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
        show_alerts(run.alerts)
        if dry_run:
            found = describe_run(run.config, run.settings, run.dataset, device=run.device,
                                 transferred=run.transferred)
            print_plan(found, run.warnings, run.alerts)
            return 0
        return train(run.config, run.settings, run.dataset)

    return GroupedCommand(None, callback=callback, params=list(FLAGS), help=HELP,
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})


def show_alerts(alerts: Sequence[str]) -> None:
    """Print the warnings that are always shown, unless the process that started this one has shown them."""
    if Place.from_environment().launcher is None:
        for line in alerts:
            click.echo(line, err=True)


def print_plan(found: dict[str, Any], warnings: Sequence[str], alerts: Sequence[str]) -> None:
    """Print what --dry-run found as JSON, and on standard error all warnings but `alerts`, which are shown already."""
    for line in (*warnings, *found["warnings"]):
        if line not in alerts:
            click.echo(line, err=True)
    click.echo(json.dumps(found, indent=1, allow_nan=False))


def prepare(flags: dict[str, Any], choose_metrics: ChooseMetrics, *, dry_run: bool = False) -> PreparedRun:
    """Check everything that can be checked before a run starts, and tune the CPU allocator for it.

    Prints progress only: a run logs the notes of its settings.

    flags:    values by the names of `training.options.FLAGS`, None if not given
    dry_run:  do not decode images for the hashes of their pixels
    Raises UserError, one line, if the run cannot work; nothing is written then.
    """
    place = Place.from_environment()
    for name in ("outdir", "data"):
        if not flags.get(name):
            raise UserError(f"--{name} is missing; expected both --outdir and --data, such as --outdir=runs "
                            "--data=isic256.zip: see --help")
    started = place.processes(flags["gpus"]) if place.is_started else flags["gpus"]
    parsed = parse_flags({**flags, "gpus": started}, choose_metrics, place, place.processes(started))
    settings, is_main = parsed.settings, place.rank == 0
    config, resume_note = parsed.settle_resume(parsed.resolve(ImageDataset(settings.data).facts()))
    dataset, valid_note = _open_data(config, settings, thorough=is_main)
    alerts, transferred = [], None
    if is_main:
        transferred = check_resume_weights(config, dataset)
        alerts = _check_pixels(config, settings, dataset, compute=not dry_run)

    empty_note = note_on_empty_classes([dataset], f"{dataset.path} has no") if dataset.use_labels else None
    found = (parsed.warning, resume_note, valid_note, empty_note, *alerts)
    warnings = tuple(line for line in found if line is not None)
    settings = replace(settings, notes=(*parsed.notes, *warnings))
    return PreparedRun(config=config, settings=settings, dataset=dataset, device=parsed.device, warnings=warnings,
                       alerts=tuple(alerts), transferred=transferred)


def parse_flags(flags: dict[str, Any], choose_metrics: ChooseMetrics, place: Place, processes: int) -> ParsedFlags:
    """Sort flags into options and settings, and check all that does not depend on the data.

    flags:      as for `prepare`
    processes:  that work at the same time on this machine, unless they were started elsewhere
    """
    metrics, note, best = choose_metrics(flags["metrics"], flags["detector"], flags["detector_weights"],
                                         flags["keep_best"])
    changed = {"metrics": metrics, "precision": None if flags["precision"] == "auto" else flags["precision"]}
    options = TrainOptions(**{field.name: changed.get(field.name, flags[field.name]) for field in fields(TrainOptions)})
    if best is not None:
        best = BestValue(**dict(zip([field.name for field in fields(BestValue)], best, strict=True)))
    precision = "auto" if options.fp32 is None else "fp32" if options.fp32 else "fp16"  # if --precision is not given
    given = {**flags, "precision": options.precision or precision, "keep_best": best}
    settings = RunSettings(**{field.name: given[field.name] for field in fields(RunSettings) if field.name in given})
    check_outdir(settings.outdir)
    files = resume_files(options.resume)
    device = choose_device(settings.device, place.local_count if place.is_started else processes)
    memory = (tune_malloc(settings.tune_malloc).note,) if device.name == "cpu" else ()
    used = {"precision": choose_precision(settings.precision, device.name).name,
            "resume": files[-1] if files else options.resume}
    return ParsedFlags(options=replace(options, **used), settings=replace(settings, device=device.name), device=device,
                       resume=options.resume, resume_files=files, warning=note,
                       notes=(f"device: {device.name} ({device.reason})", *memory))


def _open_data(config: TrainConfig, settings: RunSettings, *, thorough: bool) -> tuple[ImageDataset, str | None]:
    """Open the training data; with `thorough` check all images, --balance and --valid.

    Also return a note on the labels of --valid, or None.
    """
    choice = config.dataset
    dataset = ImageDataset(settings.data, use_labels=choice.use_labels, xflip=choice.xflip, max_size=choice.max_size,
                           seed=config.seed)
    check_per_class(settings, use_labels=choice.use_labels)
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


def note_on_empty_classes(datasets: Sequence[ImageDataset], start: str) -> str | None:
    """Return a note on classes that no data set has images of; None if there are none, or labels are not classes.

    datasets:  whose labels are used, with the same classes
    start:     of the note, such as "isic256.zip has no"
    """
    if datasets[0].label_kind != CLASS:
        return None
    labels = np.concatenate([dataset.class_indices() for dataset in datasets])
    return describe_empty_classes(np.bincount(labels, minlength=datasets[0].label_dim), datasets[0].classes, start)


def describe_empty_classes(counts: np.ndarray, names: Sequence[str] | None, start: str) -> str | None:
    """Return the note of `note_on_empty_classes`. counts: images of each class; names: of the classes"""
    empty = [class_name(number, names) for number in np.flatnonzero(counts == 0).tolist()]
    return f"{start} images of class {listed(empty)}, which the networks will not learn" if empty else None


def check_per_class(settings: RunSettings, *, use_labels: bool) -> None:
    """Raise UserError if --per-class is given for networks without labels."""
    if settings.per_class and not use_labels:
        raise UserError("--per-class is true without --cond=1; expected networks that know the classes: add --cond=1, "
                        "or leave --per-class out")


def _check_pixels(config: TrainConfig, settings: RunSettings, dataset: ImageDataset, *, compute: bool) -> list[str]:
    """Hash the pixels of the training images, compare them with --valid, and return warnings about overlap."""
    workers = hashing_workers(config)
    if compute:
        dataset.pixel_hashes(workers=workers)
    if settings.valid is None:
        return []
    return check_held_out(ImageDataset(settings.valid), dataset, compute=compute, workers=workers)


def hashing_workers(config: TrainConfig) -> int:
    """Return the number of processes that decode images to hash their pixels."""
    return max(min(config.num_workers, usable_cores()), 1)


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


def check_valid(valid: ImageDataset, dataset: ImageDataset, *, name: str = "--valid") -> str | None:
    """Raise UserError unless `valid` is another data set that a discriminator for `dataset` can score.

    name:  of the flag that gives `valid`

    Return a note if the labels of the two cannot be matched by name.
    """
    if valid.path.resolve() == dataset.path.resolve():
        raise UserError(f"{name}={valid.path} is the data set of --data itself; expected images that are not trained "
                        "on")
    return check_comparable(valid, dataset, name, "--data", f"--data={dataset.path}")


def check_comparable(valid: ImageDataset, dataset: Any, name: str, data: str, label: str) -> str | None:
    """Do as `check_valid` with a data set that may be elsewhere.

    dataset:      its image_shape, use_labels, label_dim, label_kind and label_names
    data, label:  the two ways in which messages name it
    """
    flag = f"{name}={valid.path}"
    if valid.image_shape != dataset.image_shape:
        raise UserError(f"{flag} is {describe_shape(valid.image_shape)}; expected "
                        f"{describe_shape(dataset.image_shape)}, as in {data}")
    if dataset.use_labels and valid.label_dim != dataset.label_dim:
        raise UserError(f"{flag} has labels of length {valid.label_dim}; expected {dataset.label_dim}, as in {data}: "
                        "convert both with dataset_tool.py and the same --classes")
    if dataset.use_labels and valid.label_kind != dataset.label_kind:
        raise UserError(f"{flag} has {LABELS[valid.label_kind]}; expected {LABELS[dataset.label_kind]}, as in {data}")
    check_images(valid)
    if dataset.use_labels and (valid.label_names is None) != (dataset.label_names is None):
        nameless = flag if valid.label_names is None else label
        return f"{nameless} does not name its classes; those of {name} are matched by number"
    return None


def check_held_out(valid: ImageDataset, dataset: ImageDataset, *, compute: bool, workers: int = 1,
                   name: str = "--valid") -> list[str]:
    """Raise UserError if an image of `valid` is also trained on; return warnings on other causes of hidden overfitting.

    compute, workers:  as for `find_equal_images`
    name:              of the flag that gives `valid`
    """
    flag = f"{name}={valid.path}"
    equal, by_files = find_equal_images(valid, dataset, compute=compute, workers=workers)
    advice = "hold out part of one data set with dataset_tool.py split"
    if equal:
        mine, theirs = equal[0]
        raise UserError(f"{flag}: {len(equal)} of {valid.num_images} images are also in --data={dataset.path}, such as "
                        f"{valid.image_names()[mine]}, which is {dataset.image_names()[theirs]} there (apart from "
                        f"order, labels and mirroring); expected images that are not trained on: {advice}")
    lines = []
    if by_files:
        lines.append(f"{flag} is compared with --data file by file only, since pixel hashes are not recorded; training "
                     "decodes all images, and rejects equal images in different files")
    shared = find_shared_groups(valid, dataset)
    if not shared:
        return lines
    groups = list(dict.fromkeys(shared))
    return [*lines, f"warning: {len(groups)} groups (patients or lesions) of {flag} are also in --data={dataset.path} "
            f"({shorten(groups)}), with {len(shared)} of {valid.num_images} images; their scores hide overfitting: "
            f"{advice}"]


def find_equal_images(mine: ImageDataset, theirs: ImageDataset, *, compute: bool,
                      workers: int = 1) -> tuple[list[tuple[int, int]], bool]:
    """Return (index, index of its copy) of each image of `mine` that is also in `theirs`; whether files were compared.

    compute:  decode images whose pixel hashes are not recorded, in `workers` processes; False compares files instead
    """
    if compute:
        hashes = mine.pixel_hashes(workers=workers), theirs.pixel_hashes(workers=workers)
    else:
        hashes = mine.known_pixel_hashes(), theirs.known_pixel_hashes()
    return (mine.equal_files(theirs), True) if None in hashes else (equal_images(*hashes), False)


def find_shared_groups(mine: ImageDataset, theirs: ImageDataset) -> list[str]:
    """Return the group of each image of `mine` that is in a patient or lesion of `theirs`."""
    known = set(theirs.named_groups()) - {None}
    return [group for group in mine.named_groups() if group in known]


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
