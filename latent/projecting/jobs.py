"""Do what projector.py is asked for: project one image, or those of a set."""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib.cli import UserError
from imagesets.reader import ImageSet
from latent.network import OpenNetwork, open_network
from latent.pictures import make_outdir
from latent.pieces import Pieces
from latent.piecework import complete
from latent.projecting.choose_similarity import choose_similarity
from latent.projecting.distances import COLUMNS
from latent.projecting.one_target import PROJECTION, TargetProjection
from latent.projecting.projection import Projector, choose_pass
from latent.projecting.request import ProjectRequest
from latent.projecting.set_results import FAILED, SUMMARY, ZIP, write_results
from latent.projecting.set_targets import AUTO, choose_targets, fingerprint
from latent.projecting.set_work import ProjectionPlan, SetWorker
from latent.projecting.target_image import read_target, spec_for
from latent.sampling import choose_batch
from latent.sharing import memory_advice
from metrics.detectors.similarity import Similarity
from torch_utils.distributed import Place, Processes, join
from training.device import choose_device
from training.input_checks import check_outdir
from training.launch import is_part_of_run, launch


def do_job(request: ProjectRequest) -> int:
    """Do it, and return the exit code. Raises UserError before anything is written where inputs do not fit."""
    return project_target(request) if request.data is None else project_set(request)


def project_target(request: ProjectRequest) -> int:
    """Write the latent of one image, and what is shown there."""
    request.processes(Place.from_environment())
    check_outdir(request.outdir)
    device = choose_device(request.device).name
    network = open_network(request.network, device)
    target = read_target(request.target, network.G, transform=request.transform, resize_filter=request.resize_filter,
                         exact=request.exact)
    candidates = _candidates(network, request.class_)
    size = request.batch or min(len(candidates), choose_pass(network.G.img_resolution, device))
    similarity = choose_similarity(request.detector, request.detector_weights,
                                   Processes(rank=0, count=1, device=torch.device(device)))
    settings = {**_describe(request, network, similarity, size, device), "target": Path(request.target).name,
                "target_sha256": hashlib.sha256(target.numpy()).hexdigest()}
    with memory_advice(size):
        work = TargetProjection(make_outdir(request.outdir), network, Projector(network.G, similarity,
                                request.settings), target, size=size, settings=settings,
                                painter_batch=_painter_batch(network, device))
        nearest = work.find(candidates, keep_path=request.save_video is not False)
        record = work.write(nearest, pti_steps=request.pti_steps or 0)
    click.echo(_describe_target(request, record))
    return 0


def project_set(request: ProjectRequest) -> int:
    """Write the latents of many images, in as many processes as asked for."""
    place = Place.from_environment()
    processes = request.processes(place)
    device = choose_device(request.device, processes if place.count == 1 else place.local_count).name
    check_outdir(request.outdir)
    network = open_network(request.network, "cpu")
    images = ImageSet(request.data)
    spec = spec_for(network.G, request.transform, request.resize_filter, request.exact)
    targets = choose_targets(images, network.classes, chosen=request.class_, count=request.count,
                             group_by_class=bool(request.group_by_class), seed=request.seed)
    plan = ProjectionPlan(targets=targets, size=request.batch or choose_pass(network.G.img_resolution, device))
    if processes > 1 and not is_part_of_run():
        del network  # each of the processes has one
        return launch(processes)
    if request.count is not None and len(targets) < request.count and place.rank == 0:
        print(f"{request.data} has {len(targets)} such images, fewer than --count={request.count}", file=sys.stderr)
    with join(device) as joined, memory_advice(plan.size):
        similarity = choose_similarity(request.detector, request.detector_weights, joined)
        network.G.to(joined.device)
        settings = {**_describe(request, network, similarity, plan.size, device), "data": images.path.name,
                    "data_sha256": fingerprint(images, targets), "count": len(targets),
                    "class": request.class_, "group_by_class": bool(request.group_by_class)}
        _project_set(request, settings, images, network, joined, plan,
                     SetWorker(images, spec, network, Projector(network.G, similarity, request.settings), plan))
    return 0


def _project_set(request: ProjectRequest, settings: dict[str, Any], images: ImageSet, network: OpenNetwork,
                 processes: Processes, plan: ProjectionPlan, worker: SetWorker) -> None:
    outdir = Path(request.outdir)
    is_main = processes.rank == 0
    if _is_done(outdir, settings):  # all processes find the same
        if is_main:
            click.echo(f"{outdir} holds these results already")
        return
    if is_main:
        make_outdir(request.outdir)
    pieces = Pieces(outdir / ZIP, settings)

    def assemble() -> None:
        summary = write_results(outdir, settings, images, network, plan, pieces,
                                by_class=bool(request.group_by_class))
        for line in _describe_set(outdir, summary):
            click.echo(line)

    complete(pieces, [len(plan.lanes_of(number)) for number in range(plan.num_passes)], processes,
             make=lambda numbers: worker.make(pieces, numbers, shown=is_main), assemble=assemble, unit="projections")


def _candidates(network: OpenNetwork, text: str | None) -> Sequence[int | None]:
    """Return the classes that --target is started from."""
    if text == AUTO and network.classes.count > 0:
        return range(network.classes.count)
    found = network.classes.choose(text)
    if len(found) > 1:
        raise UserError(f"--class names {len(found)} classes; expected one, or {AUTO}")
    return found


def _describe(request: ProjectRequest, network: OpenNetwork, similarity: Similarity, size: int,
              device: str) -> dict[str, Any]:
    """Return what projections follow from, beside the images."""
    settings = request.settings
    return {"network": network.name, "network_sha256": network.sha256, "network_kimg": network.info.get("kimg"),
            "space": settings.space, "num_steps": settings.num_steps, "seed": settings.seed,
            "detector": similarity.name, "detector_weights_sha256": similarity.weights_sha256,
            "detector_preprocessing": similarity.preprocessing, "transform": request.transform,
            "resize_filter": request.resize_filter, "exact": request.exact, "batch": size,
            "device": torch.device(device).type}


def _painter_batch(network: OpenNetwork, device: str) -> int:
    return choose_batch(network.G.img_resolution, device)


def _is_done(outdir: Path, settings: dict[str, Any]) -> bool:
    """Tell whether a folder holds these results. Raises UserError where it holds others."""
    path = outdir / SUMMARY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise UserError(f"{path} is not what this program writes; expected an --outdir of its own for these "
                        "results") from error
    different = [name for name, value in settings.items() if not isinstance(found, dict) or found.get(name) != value]
    if different:
        raise UserError(f"--outdir is {outdir}, which holds other results ({different[0]} differs); expected a folder "
                        "of its own for these")
    return True


def _describe_target(request: ProjectRequest, record: dict[str, Any]) -> str:
    """Return "out/proj.png: class melanoma, lpips-vgg16 distance 0.21 (0.5 at the start), ..."."""
    name = "" if record["class"] is None else f"class {record['class']}, "
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
            medians = ", ".join(f"{column} {values[column]['median'] or 0:.4g}" for column in COLUMNS)
            yield f"  {name} ({values['count']}): {medians}"
