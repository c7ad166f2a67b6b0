"""Do what projector.py is asked for: project one image, or those of a set."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib.cli import UserError
from dnnlib.disk_failures import DiskFailure, retrying
from dnnlib.process_lock import LockHeld, ProcessLock
from imagesets.class_names import VECTOR
from imagesets.pixels.depth import Depth
from imagesets.reader import ImageSet
from latent.network import OpenNetwork, open_network, require_same
from latent.pictures import make_outdir
from latent.pieces import Pieces
from latent.piecework import complete
from latent.projecting.choose_similarity import choose_similarity
from latent.projecting.distances import COLUMNS
from latent.projecting.one_target import LOCK, PROJECTION, STATES, TargetProjection
from latent.projecting.projection import Projector, choose_pass
from latent.projecting.request import ProjectRequest
from latent.projecting.set_results import FAILED, STYLES, SUMMARY, TABLE, ZIP, NothingReadable, write_results
from latent.projecting.set_targets import choose_targets, count_left_out, fingerprint
from latent.projecting.set_work import ProjectionPlan, SetWorker
from latent.projecting.start_class import parse_start, starts_of_target
from latent.projecting.target_image import read_ranges, read_target, spec_for
from latent.sampling import choose_batch
from latent.sharing import memory_advice, settle_device
from metrics.detectors.similarity import Similarity
from torch_utils.distributed import Place, Processes, join
from training.input_checks import check_outdir
from training.launch import launch


def do_job(request: ProjectRequest) -> int:
    """Do it, and return the exit code. Raises UserError before anything is written where inputs do not fit."""
    return project_target(request) if request.data is None else project_set(request)


def project_target(request: ProjectRequest) -> int:
    """Write the latent of one image, and what is shown there."""
    place = Place.from_environment()
    processes = request.processes(place)
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
                                settings=settings, painter_batch=choose_batch(network.G.img_resolution, device))
        record = work.project(candidates, keep_path=request.save_video is not False, pti_steps=request.pti_steps or 0)
    click.echo(_describe_target(request, record))
    return 0


def project_set(request: ProjectRequest) -> int:
    """Write the latents of many images, in as many processes as asked for."""
    place = Place.from_environment()
    processes = request.processes(place)
    device = settle_device(request.device, place, processes, tunes_malloc=request.tune_malloc)
    check_outdir(request.outdir)
    network = open_network(request.network, "cpu")
    images = ImageSet(request.data)
    spec = spec_for(network.G, request.transform, request.resize_filter, request.exact)
    if images.label_kind == network.classes.kind == VECTOR and network.classes.names is not None:
        images.use_classes(network.classes.names)
    start = parse_start(network.classes, request.class_, request.label)
    targets = choose_targets(images, network.classes, start=start, count=request.count,
                             group_by_class=bool(request.group_by_class), seed=request.seed)
    plan = ProjectionPlan(targets=targets, size=request.batch or choose_pass(network.G.img_resolution, device))
    if processes > 1 and not place.is_started:
        del network  # each of the processes has one
        return launch(processes)
    left_out = count_left_out(images, network.classes, start)
    if place.rank == 0:
        _say_what_is_missing(request, len(targets), left_out)
        if network.classes.count > 0 and images.labels is not None \
                and (network.classes.names is None) != (images.classes is None):
            nameless = "the network" if network.classes.names is None else request.data
            print(f"{nameless} does not name its classes; they are matched by number", file=sys.stderr)
    with join(device) as joined, memory_advice(plan.size):
        require_same(network, joined)
        similarity = choose_similarity(request.detector, request.detector_weights, joined)
        network.G.to(joined.device)
        settings = {**_describe(request, network, similarity, plan.size, device), "data": images.path.name,
                    "data_sha256": fingerprint(images, targets), "count": len(targets),
                    "left_out_by_class": left_out, "class": request.class_,
                    **({} if request.label is None else {"label": request.label}),
                    "group_by_class": bool(request.group_by_class)}
        depth = Depth(bits=request.depth, ranges=read_ranges(images, shown=place.rank == 0))
        _project_set(request, settings, images, network, joined, plan,
                     SetWorker(images, replace(spec, depth=depth), network,
                               Projector(network.G, similarity, request.settings), plan))
    return 0


def _project_set(request: ProjectRequest, settings: dict[str, Any], images: ImageSet, network: OpenNetwork,
                 processes: Processes, plan: ProjectionPlan, worker: SetWorker) -> None:
    outdir = Path(request.outdir)
    is_main = processes.rank == 0
    if _is_done(outdir, settings):  # all processes find the same
        if is_main:
            click.echo(f"{outdir} holds these results already")
        return
    pieces = Pieces(outdir / ZIP, settings)

    def assemble() -> None:
        try:
            summary = write_results(outdir, {**settings, "operators": pieces.operators}, images, network, plan, pieces,
                                    by_class=bool(request.group_by_class))
        except NothingReadable:
            pieces.remove()  # so that the same command reads the images again
            raise
        for line in _describe_set(outdir, summary):
            click.echo(line)

    with _made(request.outdir) if is_main else nullcontext():
        complete(pieces, [len(plan.lanes_of(number)) for number in range(plan.num_passes)], processes,
                 make=lambda numbers: worker.make(pieces, numbers, shown=is_main), assemble=assemble,
                 unit="projections")


@contextmanager
def _held(outdir: str) -> Iterator[Path]:
    """Make --outdir and keep other programs out of it; say what is kept there when this one is stopped."""
    with _made(outdir) as folder:
        try:
            with ProcessLock(folder / LOCK):
                yield folder
        except LockHeld as error:
            raise UserError(f"--outdir is {outdir}, where {error} is at work; wait for it, or choose another "
                            "folder") from error
        except (KeyboardInterrupt, DiskFailure):
            if any(folder.glob(STATES)):
                print(f"the work so far is kept in {folder}; the same command continues", file=sys.stderr)
            raise


@contextmanager
def _made(outdir: str) -> Iterator[Path]:
    """Make --outdir; one that was not there before and stays empty is removed."""
    is_new = not os.path.lexists(outdir)
    folder = make_outdir(outdir)
    try:
        yield folder
    finally:
        if is_new:
            with suppress(OSError):  # something is in it
                folder.rmdir()


def _say_what_is_missing(request: ProjectRequest, found: int, left_out: int) -> None:
    if left_out:
        print(f"{left_out} images of {request.data} are left out, which have no label that the network knows",
              file=sys.stderr)
    if request.count is not None and found < request.count:
        print(f"{request.data} has {found} such images, fewer than --count={request.count}", file=sys.stderr)


def _describe(request: ProjectRequest, network: OpenNetwork, similarity: Similarity, size: int,
              device: str) -> dict[str, Any]:
    """Return what projections follow from, beside the images."""
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
    """Tell whether a folder holds these results. Raises UserError where it holds others."""
    path = outdir / SUMMARY
    try:
        found = json.loads(retrying(lambda: path.read_text(encoding="utf-8"), path))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise UserError(f"{path} is not what this program writes; expected an --outdir of its own for these "
                        "results") from error
    different = [name for name, value in settings.items() if not isinstance(found, dict) or found.get(name) != value]
    if different:
        raise UserError(f"--outdir is {outdir}, which holds other results ({different[0]} differs); expected a folder "
                        "of its own for these")
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
            medians = ", ".join(f"{column} {_number(values[column]['median'])}" for column in COLUMNS)
            yield f"  {name} ({values['count']}): {medians}"


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4g}"
