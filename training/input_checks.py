"""Find out before a run starts whether its folder, images and starting network can be used; nothing is written."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import PIL.Image

from dnnlib.cli import UserError
from dnnlib.disk_failures import retrying
from imagesets.class_names import LABELS
from imagesets.member_pixels import describe_shape
from imagesets.pixel_hashes import equal_images
from training.config import TrainConfig
from training.dataset import ImageDataset
from training.estimate import meta_state
from training.file_kind import find_network, network_files
from training.preset_table import TRANSFER_NAMES
from training.run_folder import began_from
from training.run_settings import RunSettings
from training.transfer import Transferred, transfer_for

_CHANNELS = {"L": 1, "RGB": 3}
_PICTURES = {"ffhq": "faces of FFHQ", "celebahq": "faces of CelebA-HQ", "lsundog": "dogs of LSUN"}


def check_outdir(outdir: str) -> None:
    """Raise UserError unless folders can be made in `outdir`, which need not exist yet."""
    place = Path(outdir).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(f"--outdir is {outdir}, but {place} is no folder; expected a folder, new or not")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--outdir is {outdir}, but {place} cannot be written to; expected a folder that can")


def check_images(dataset: ImageDataset) -> None:
    """Raise UserError, naming the first, unless all images are of one size and kind, by what their headers say."""
    channels, height, width = dataset.image_shape
    for index, header in enumerate(_headers(dataset)):
        if header != (width, height, channels):
            dataset[index]  # says what is wrong with it


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

    Frozen layers have to come from a network; the original freezes random ones too, and so does `presets.resolve`.
    """
    frozen = config.discriminator.freeze_layers
    if config.resume is None and frozen:
        raise UserError(f"--freezed is {frozen} without --resume; expected a network to start from: add it, or leave "
                        "--freezed out")
    return None if config.resume is None else transfer_for(meta_state(config), config, dataset)


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
