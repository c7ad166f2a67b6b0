"""The command line of projector.py: its options, and the projection of one image or of a set."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib.cli import GroupedCommand, UserError, UserPath, check_outdir
from dnnlib.files import DiskFailure, retrying
from dnnlib.process_lock import LockHeld, ProcessLock
from generation.command import flag, flag_name, flags_of
from generation.network import NETWORK_HELP, OpenNetwork, open_network, require_same
from generation.pictures import make_outdir
from imagesets.classes import VECTOR
from imagesets.pixel_formats import Depth
from imagesets.reader import ImageSet
from imagesets.resize import FILTERS
from latent.image_set import (
    FAILED,
    STYLES,
    SUMMARY,
    TABLE,
    ZIP,
    NothingReadable,
    Passes,
    SetWorker,
    write_results,
)
from latent.one_image import LOCK, PROJECTION, STATES, VIDEO, TargetProjection
from latent.pivotal_tuning import USUAL_STEPS
from latent.projection import (
    COLUMNS,
    SPACES,
    USUAL_SIMILARITY,
    ProjectionSettings,
    Projector,
    choose_pass,
    choose_similarity,
)
from latent.targets import (
    AUTO,
    DEFAULT_FILTER,
    DEFAULT_TRANSFORM,
    TARGET_TRANSFORMS,
    choose_targets,
    count_left_out,
    fingerprint,
    parse_start,
    read_ranges,
    read_target,
    spec_for,
    starts_of_target,
)
from metrics.detectors.registry import SIMILARITY_NAMES
from metrics.detectors.similarity import Similarity
from torch_utils.device import (
    DEVICE_HELP,
    TUNE_MALLOC_HELP,
    check_counts,
    count_processes,
    memory_advice,
    settle_device,
)
from torch_utils.distributed import Place, Processes, join
from torch_utils.launch import launch
from torch_utils.piecework import OPERATORS, Pieces, complete

# The headings of the help.
WHAT, HOW, NEAR, IMAGES, SPEED = "Input and output", "Projection", "Distance", "Reading images", "Speed and devices"


@dataclass(frozen=True, kw_only=True)
class ProjectRequest:
    """The options of projector.py.

    Raises UserError if they contradict each other, one is missing, or a number is out of range.
    """

    network: str | None = flag(WHAT, "FILE", f"{NETWORK_HELP} Required.", type=UserPath())
    target: str | None = flag(WHAT, "FILE", "Image to project, of any size and format.", type=UserPath())
    data: str | None = flag(
        WHAT, "PATH", "Images to project, instead of one: a data set, or any zip or folder of images. After an "
        "interruption, the same command continues.", type=UserPath())
    outdir: str | None = flag(WHAT, "DIR", "Folder for the results. Required.", type=UserPath())
    class_: str | None = flag(
        WHAT, "NAME", "Class to start from, by name or number, if the network is class-conditional; "
        f"{AUTO} tries each and keeps the nearest. With --data, also the class of images to project, if the set has "
        "classes. [default with --data: the class of each image]")
    label: str | None = flag(
        WHAT, "LIST", "Label vector to start from, such as 0,1,0.5, if the network was trained with vectors as labels. "
        "[default with --data: the label of each image]")
    count: int | None = flag(
        WHAT, "INT", "Project a random subset of --data of this size (chosen by --seed).", shown="all", only=["--data"])
    group_by_class: bool | None = flag(
        WHAT, None, "Project equally many images of each class of --data; sheet and histogram show each class "
        "separately.", only=["--data"])

    num_steps: int = flag(HOW, "INT", "Optimization steps per projection.", default=ProjectionSettings.num_steps)
    seed: int = flag(HOW, "INT", "Random seed.", default=ProjectionSettings.seed)
    space: str = flag(
        HOW, "|".join(SPACES), "w: one style for all layers; w+: one style per layer, which comes nearer to the "
        "target, but is less typical of the network.", default=ProjectionSettings.space)
    pti_steps: int | None = flag(
        HOW, "INT", "Then fine-tune a copy of the network for this many steps to show --target at the projected style "
        f"(pivotal tuning; {USUAL_STEPS} is usual).", shown="0", only=["--target"], neutral=0)
    save_video: bool | None = flag(
        HOW, "BOOL", f"Write {VIDEO}, with one frame per step.", shown="true with --target", only=["--target"],
        neutral=False)

    detector: str | None = flag(
        NEAR, "NAME", f"Feature detector that compares images: {', '.join(SIMILARITY_NAMES)}. Distances from different "
        "detectors cannot be compared.",
        shown=f"{USUAL_SIMILARITY}, or one that needs no download if its weights are not available")
    detector_weights: str | None = flag(
        NEAR, "PATH", "File with the detector's weights, instead of downloading them; for "
        f"{USUAL_SIMILARITY} a folder with its two files.", type=UserPath())

    transform: str = flag(
        IMAGES, "NAME", "How images are made square, as in dataset_tool.py: center-crop, center-crop-wide, or none, "
        "which stretches them.", type=click.Choice(TARGET_TRANSFORMS), default=DEFAULT_TRANSFORM)
    resize_filter: str = flag(
        IMAGES, "NAME", "Filter for resizing: lanczos or box.", type=click.Choice(FILTERS), default=DEFAULT_FILTER)
    exact: bool = flag(IMAGES, None, "Decode JPEG files at full size before resizing.", default=False)
    depth: int | None = flag(
        IMAGES, "BITS", "Bit depth of images with more than 8 bits, as in dataset_tool.py: with 12, the value 4095 is "
        "white.", shown="16, or chosen by the values")

    device: str = flag(SPEED, "NAME", DEVICE_HELP, default="auto")
    gpus: int | None = flag(
        SPEED, "INT", "Number of processes for --data: one per GPU, or several on a CPU.", shown="1",
        only=["--data"], neutral=1)
    batch: int | None = flag(
        SPEED, "INT", "Batch size. An image's result does not depend on the rest of the batch, but rounding depends on "
        "the batch size.",
        shown="chosen by resolution and device, such as 8; with --target the number of classes that are tried")
    tune_malloc: bool = flag(SPEED, "BOOL", TUNE_MALLOC_HELP, default=True)

    def __post_init__(self) -> None:
        for name, example in (("network", "network-snapshot-001000.safetensors"), ("outdir", "out")):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; expected one, such as --{name}={example}, or see --help")
        if (self.target is None) == (self.data is None):
            both = "are both given" if self.target is not None else "are missing"
            raise UserError(f"--target and --data {both}; expected one of them: an image, or a set of images")
        mode = "--target" if self.data is None else "--data"
        for one in fields(self):
            value, only = getattr(self, one.name), one.metadata["only"]
            if only and mode not in only and value not in (None, one.metadata["neutral"]):
                name = flag_name(one.name)
                raise UserError(f"{name} is given, but only works with {only[0]}; leave {name} out")
        check_counts(batch=self.batch, gpus=self.gpus)
        Depth(bits=self.depth)  # checks
        space = self.settings.space  # checks
        if self.pti_steps and self.pti_steps < 0:
            raise UserError(f"--pti-steps is {self.pti_steps}; expected at least 0, usually about {USUAL_STEPS}")
        if self.pti_steps and space != "w":
            raise UserError(f"--pti-steps is given with --space={space}; expected --space=w: pivotal tuning starts "
                            "from a style that all layers share")

    @property
    def settings(self) -> ProjectionSettings:
        return ProjectionSettings(space=self.space.lower(), num_steps=self.num_steps, seed=self.seed)


HELP = """Project real images into the latent space of a network: find the styles (w) whose images are nearest to them.

\b
python projector.py --network=network-snapshot-001000.safetensors --target=lesion.jpg --class=melanoma --outdir=out
python projector.py --network=N.safetensors --target=lesion.jpg --class=auto --space=w+ --outdir=out
python projector.py --network=N.safetensors --target=lesion.jpg --class=nevus --pti-steps=350 --outdir=out
python projector.py --network=N.safetensors --data=heldout.zip --count=64 --group-by-class --outdir=heldout
torchrun --nproc-per-node=8 projector.py --network=N.safetensors --data=heldout.zip --outdir=heldout

generate.py --projected-w makes images from the styles that were found.
"""


def make_command() -> click.Command:
    """Return the command of projector.py."""
    return GroupedCommand(None, callback=_project, params=flags_of(ProjectRequest), help=HELP,
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})


def _project(**flags: Any) -> int:
    """Project what the options select; return the exit code. If the inputs do not fit, nothing is written."""
    request = ProjectRequest(**flags)
    return project_target(request) if request.data is None else project_set(request)


def project_target(request: ProjectRequest) -> int:
    """Project one image; write its style, its projection and their distances."""
    place = Place.from_environment()
    processes = count_processes(place, request.gpus, shared="--data")
    check_outdir(request.outdir)
    device = settle_device(request.device, place, processes, tunes_malloc=request.tune_malloc)
    network = open_network(request.network, device)
    target = read_target(request.target, network.G, transform=request.transform, resize_filter=request.resize_filter,
                         exact=request.exact, depth=Depth(bits=request.depth))
    candidates = starts_of_target(network.classes, request.class_, request.label)
    size = request.batch or min(len(candidates), choose_pass(network.G.img_resolution, device))
    similarity = choose_similarity(request.detector, request.detector_weights,
                                   Processes(rank=0, count=1, device=torch.device(device)))
    settings = {**_describe(request, network, similarity, size, device), "target": Path(request.target).name,
                "target_sha256": hashlib.sha256(target.numpy()).hexdigest()}
    with memory_advice(size), _held(request.outdir) as outdir:
        work = TargetProjection(outdir, network, Projector(network.G, similarity, request.settings), target, size=size,
                                settings=settings)
        record = work.project(candidates, keep_path=request.save_video is not False, pti_steps=request.pti_steps or 0)
    click.echo(_describe_target(request, record))
    return 0


def project_set(request: ProjectRequest) -> int:
    """Project a set of images, in --gpus processes."""
    place = Place.from_environment()
    processes = count_processes(place, request.gpus, shared=None)
    device = settle_device(request.device, place, processes, tunes_malloc=request.tune_malloc)
    check_outdir(request.outdir)
    network = open_network(request.network, "cpu")
    images = ImageSet(request.data)
    spec_for(network.G, request.transform, request.resize_filter, request.exact)  # checks
    if images.label_kind == network.classes.kind == VECTOR and network.classes.names is not None:
        images.use_classes(network.classes.names)
    start = parse_start(network.classes, request.class_, request.label)
    targets = choose_targets(images, network.classes, start=start, count=request.count,
                             group_by_class=bool(request.group_by_class), seed=request.seed)
    passes = Passes(targets=targets, size=request.batch or choose_pass(network.G.img_resolution, device))
    if processes > 1 and not place.is_started:
        del network  # each process opens its own
        return launch(processes)
    left_out = count_left_out(images, network.classes, start)
    if place.rank == 0:
        if left_out:
            print(f"{left_out} images of {request.data} are left out, because the network does not know their label",
                  file=sys.stderr)
        if request.count is not None and len(targets) < request.count:
            print(f"{request.data} has only {len(targets)} such images, fewer than --count={request.count}",
                  file=sys.stderr)
        if network.classes.count > 0 and images.labels is not None \
                and (network.classes.names is None) != (images.classes is None):
            nameless = "the network" if network.classes.names is None else request.data
            print(f"{nameless} does not name its classes; they are matched by number", file=sys.stderr)
    with join(device) as joined, memory_advice(passes.size):
        require_same(network, joined)
        project_images(request, network, images, passes, joined, left_out=left_out)
    return 0


def project_images(request: ProjectRequest, network: OpenNetwork, images: ImageSet, passes: Passes,
                   processes: Processes, *, left_out: int = 0) -> None:
    """Project chosen images of a set; all processes of a run call this.

    request:   of --data; how the images were chosen is only recorded
    network:   whose generator is moved to the device of this process
    images:    the set of --data
    passes:    of the images that are projected
    left_out:  number of images that were not chosen, because the network does not know their label

    After an interruption, the same call continues; if --outdir already holds these results, it returns at once. Raises
    UserError if --outdir holds others.
    """
    outdir, is_main = Path(request.outdir), processes.rank == 0
    similarity = choose_similarity(request.detector, request.detector_weights, processes)
    network.G.to(processes.device)
    settings = {**_describe(request, network, similarity, passes.size, processes.device), "data": images.path.name,
                "data_sha256": fingerprint(images, passes.targets), "count": len(passes.targets),
                "left_out_by_class": left_out, "class": request.class_,
                **({} if request.label is None else {"label": request.label}),
                "group_by_class": bool(request.group_by_class)}
    depth = Depth(bits=request.depth, ranges=read_ranges(images, shown=is_main))
    spec = spec_for(network.G, request.transform, request.resize_filter, request.exact, depth)
    worker = SetWorker(images, spec, network, Projector(network.G, similarity, request.settings), passes)
    if _is_done(outdir, settings):  # all processes find the same
        if is_main:
            click.echo(f"{outdir} already holds these results")
        return
    pieces = Pieces(outdir / ZIP, settings)

    def assemble() -> None:
        try:
            summary = write_results(outdir, {**settings, OPERATORS: pieces.operators}, images, network, passes,
                                    pieces, by_class=bool(request.group_by_class))
        except NothingReadable:
            pieces.remove()  # so that the same command reads the images again
            raise
        for line in _describe_set(outdir, summary):
            click.echo(line)

    with _made(request.outdir) if is_main else nullcontext():
        complete(pieces, [len(passes.starts_of(number)) for number in range(passes.count)], processes,
                 make=lambda numbers: worker.make(pieces, numbers, shown=is_main), assemble=assemble,
                 unit="projections")


@contextmanager
def _held(outdir: str) -> Iterator[Path]:
    """Create --outdir and lock it; if this program is stopped, print that its work so far is saved there."""
    with _made(outdir) as folder:
        try:
            with ProcessLock(folder / LOCK):
                yield folder
        except LockHeld as error:
            raise UserError(f"--outdir is {outdir}, where {error} is working; wait for it, or choose another "
                            "folder") from error
        except (KeyboardInterrupt, DiskFailure):
            if any(folder.glob(STATES)):
                print(f"the work so far is saved in {folder}; the same command continues", file=sys.stderr)
            raise


@contextmanager
def _made(outdir: str) -> Iterator[Path]:
    """Create --outdir; afterwards, remove it if it is new and still empty."""
    is_new = not os.path.lexists(outdir)
    folder = make_outdir(outdir)
    try:
        yield folder
    finally:
        if is_new:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def _describe(request: ProjectRequest, network: OpenNetwork, similarity: Similarity, size: int,
              device: str | torch.device) -> dict[str, Any]:
    """Return everything that projections depend on, except the images."""
    settings = request.settings
    phantom = {"phantom": True} if network.info.get("phantom") is True else {}
    return {"network": network.name, "network_sha256": network.sha256, "network_kimg": network.info.get("kimg"),
            "space": settings.space, "num_steps": settings.num_steps, "seed": settings.seed,
            "detector": similarity.name, "detector_weights_sha256": similarity.weights_sha256,
            "detector_preprocessing": similarity.preprocessing, "transform": request.transform,
            "resize_filter": request.resize_filter, "exact": request.exact, "batch": size,
            **({} if request.depth is None else {"depth": request.depth}),
            "device": torch.device(device).type, **phantom, **network.training}


def _is_done(outdir: Path, settings: dict[str, Any]) -> bool:
    """Tell whether a folder holds these results. Raises UserError if it holds others."""
    path = outdir / SUMMARY
    try:
        found = json.loads(retrying(lambda: path.read_text(encoding="utf-8"), path))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise UserError(f"{path} was not written by this program; choose another --outdir for these "
                        "results") from error
    different = [name for name, value in settings.items() if not isinstance(found, dict) or found.get(name) != value]
    if different:
        raise UserError(f"--outdir is {outdir}, which holds other results ({different[0]} differs); choose another "
                        "folder for these")
    return all((outdir / name).exists() for name in (ZIP, STYLES, TABLE))


def _describe_target(request: ProjectRequest, record: dict[str, Any]) -> str:
    """Return "out/proj.png: class melanoma, lpips-vgg16 distance 0.21 (0.5 at the start), ..."."""
    name = "" if record["class"] is None else f"class {record['class']}, "
    if "label" in record:
        name = f"label {','.join(f'{number:.9g}' for number in record['label'])}, "
    distances, start = record["distances"], record["distances_of_start"]
    text = (f"{Path(request.outdir) / PROJECTION}: {name}{record['detector']} distance {distances['perceptual']:.4g} "
            f"({start['perceptual']:.4g} at the start), {_describe_rest(distances)}")
    if "pivotal_tuning" in record:
        tuned = record["pivotal_tuning"]
        text += f"; tuned: {tuned['perceptual']:.4g}, {_describe_rest(tuned)}"
    return text


def _describe_rest(distances: dict[str, float | None]) -> str:
    psnr = "equal pixels" if distances["psnr"] is None else f"PSNR {distances['psnr']:.1f} dB"
    return f"pixel L2 {distances['pixel_l2']:.3g} of 255, {psnr}, feature cosine {distances['feature_cosine']:.3f}"


def _describe_set(outdir: Path, summary: dict[str, Any]) -> Iterator[str]:
    failed = f", {summary['unreadable']} left out (see {FAILED})" if summary["unreadable"] else ""
    yield f"{outdir}: {summary['projected']} images projected{failed}; medians with {summary['detector']}:"
    for name, values in summary["distances"].items():
        if values["count"]:
            medians = ((column, values[column]["median"]) for column in COLUMNS)
            numbers = (f"{column} {'undefined' if median is None else f'{median:.4g}'}" for column, median in medians)
            yield f"  {name} ({values['count']}): {', '.join(numbers)}"
