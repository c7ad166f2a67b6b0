"""Do what generate.py is asked for: images of seeds or of saved styles, a labelled set, mixed styles."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.progress import Progress
from latent.flags import BESIDE_FILES
from latent.labelled_set import write_labelled_set
from latent.network import OpenNetwork, check_look, open_network, require_same
from latent.pictures import Sheet, check_file, make_outdir, save_picture
from latent.projected import read_projected_w
from latent.request import Job, Request
from latent.sampling import CLASS_CENTER, GLOBAL_CENTER, MEAN_LATENTS, Look, Painter, choose_batch
from latent.seeds import parse_first_seed, parse_seeds
from latent.set_plan import SetPlan, check_centers, draw_labels, piece_size
from latent.sharing import memory_advice, settle_device
from latent.style_mixing import check_mix_size, choose_layers, write_style_mix
from torch_utils.distributed import Place, join
from training.input_checks import check_outdir
from training.launch import launch


def do_job(request: Request) -> int:
    """Do it, and return the exit code. Raises UserError before anything is written where inputs do not fit."""
    return _JOBS[request.job](request)


def make_images(request: Request) -> int:
    """Write an image a seed, and a sheet of them."""
    named = parse_seeds("--seeds", request.seeds)
    seeds = list(dict.fromkeys(named))  # a seed has one file, and one image
    if len(seeds) < len(named):
        print(f"--seeds names {len(named)} seeds, {len(seeds)} of them different; each is made once", file=sys.stderr)
    with _painting(request) as (network, painter):
        classes = network.classes.choose(request.class_, request.label)
        if len(classes) > 1 and request.outdir and request.grid != BESIDE_FILES:
            raise UserError(f"--class names {len(classes)} classes, and files in --outdir are of one; expected one "
                            "class, or --grid=FILE without --outdir for a sheet of several")
        names = None if len(classes) == 1 else [network.classes.name(index) for index in classes]
        sheet = _sheet(request, painter, names, len(seeds))
        files = [] if len(classes) > 1 else [f"seed{seed:04d}.png" for seed in seeds]
        with Progress(len(seeds) * len(classes), "images") as progress:
            batches = (pixels for index in classes for pixels in painter.paint(
                seeds, network.classes.labels([index]).expand(len(seeds), -1), progress.advance))
            _write(request, batches, files, sheet)
    return 0


def make_projected(request: Request) -> int:
    """Write an image for each of the styles in a file, and a sheet of them."""
    with _painting(request) as (_, painter):
        ws = read_projected_w(request.projected_w, painter.G)
        sheet = _sheet(request, painter, None, len(ws))
        files = [f"proj{index:02d}.png" for index in range(len(ws))]
        with Progress(len(ws), "images") as progress:
            _write(request, painter.show(ws, progress.advance), files, sheet)
    return 0


def make_style_mix(request: Request) -> int:
    """Write the images of pairs of seeds, and a sheet of them."""
    rows, columns = parse_seeds("--rows", request.rows), parse_seeds("--cols", request.cols)
    with _painting(request) as (network, painter):
        classes = network.classes.choose(request.class_, request.label)
        if len(classes) > 1:
            raise UserError(f"--class names {len(classes)} classes; with --style-mix expected one")
        check_mix_size(len(rows), len(columns), painter.G.img_resolution)
        layers = choose_layers(request.styles, painter.G.num_ws)
        count = write_style_mix(request.outdir, painter, rows, columns, layers=layers,
                                label=network.classes.labels(classes))
    click.echo(f"{request.outdir}: {count} images and grid.png, layers {', '.join(map(str, layers))} of the columns")
    return 0


def make_set(request: Request) -> int:
    """Write a labelled set, in as many processes as asked for."""
    check_file("--zip", request.zip, ".zip")
    place = Place.from_environment()
    processes = request.processes(place)
    device = settle_device(request.device, place, processes, tunes_malloc=request.tune_malloc)
    network = open_network(request.network, "cpu")
    check_look(request.look, network.G)
    batch = request.batch or choose_batch(network.G.img_resolution, device)
    plan = _plan_set(request, network, batch)
    if processes > 1 and not place.is_started:
        del network  # each of the processes has one
        return launch(processes)
    with join(device) as joined, memory_advice(batch):
        require_same(network, joined)
        if joined.rank == 0:
            if plan.note is not None:
                print(plan.note, file=sys.stderr)
            _say_center(request.look)
        painter = Painter(network.G.to(joined.device), request.look, batch=batch, fp32_flag="--fp32")
        is_new = write_labelled_set(request.zip, network, painter, plan, joined)
        if joined.rank == 0:
            click.echo(_describe_set(request.zip, network, plan) if is_new else
                       f"{request.zip} holds these images already")
    return 0


_JOBS = {Job.IMAGES: make_images, Job.PROJECTED: make_projected, Job.SET: make_set, Job.MIX: make_style_mix}


@contextmanager
def _painting(request: Request) -> Iterator[tuple[OpenNetwork, Painter]]:
    """Open the network and its device for images that are files of their own, once their places were checked."""
    place = Place.from_environment()
    processes = request.processes(place)
    if request.outdir:
        check_outdir(request.outdir)
    if request.grid:
        check_file("--grid", request.grid, ".png")
    device = settle_device(request.device, place, processes, tunes_malloc=request.tune_malloc)
    network = open_network(request.network, device)
    check_look(request.look, network.G)
    painter = Painter(network.G, request.look, batch=request.batch or choose_batch(network.G.img_resolution, device),
                      fp32_flag="--fp32")
    _say_center(request.look)
    with memory_advice(painter.batch):
        yield network, painter


def _say_center(look: Look) -> None:
    if look.center != GLOBAL_CENTER and look.truncation != 1:
        print(f"--trunc={look.truncation:g} towards the mean style of each image's own class or label, over "
              f"{MEAN_LATENTS} latents (--trunc-center={look.center})", file=sys.stderr)


def _plan_set(request: Request, network: OpenNetwork, batch: int) -> SetPlan:
    G, classes = network.G, network.classes
    first_seed = 0 if request.seeds is None else parse_first_seed("--seeds", request.seeds)
    piece = piece_size((G.img_channels, G.img_resolution, G.img_resolution), batch)
    if request.labels_from is not None:
        drawn, note = draw_labels(request.labels_from, classes, request.count, first_seed)
        if request.look.center == CLASS_CENTER:
            check_centers(drawn, request.labels_from)
        counts = None if isinstance(drawn[0], tuple) else [drawn.count(index) for index in range(classes.count)]
        return SetPlan(first_seed=first_seed, count=len(drawn), counts=None if counts is None else tuple(counts),
                       piece=piece, drawn=drawn, labels_from=Path(request.labels_from).name, note=note)
    counts = classes.divide(request.count, request.classes)
    return SetPlan(first_seed=first_seed, count=request.count if counts is None else sum(counts),
                   counts=None if counts is None else tuple(counts), piece=piece)


def _describe_set(path: str, network: OpenNetwork, plan: SetPlan) -> str:
    """Return "synthetic.zip: 10000 images of 64x64 (benign: 8700, melanoma: 1300), seeds 0-9999"."""
    counts = "" if plan.labels_from is None else f" (labels of {plan.labels_from})"
    if plan.counts is not None:
        counts = f" ({', '.join(f'{network.classes.name(i)}: {count}' for i, count in enumerate(plan.counts))})"
    side = network.G.img_resolution
    return (f"{path}: {plan.count} images of {side}x{side}{counts}, seeds {plan.first_seed}-"
            f"{plan.first_seed + plan.count - 1}")


def _sheet(request: Request, painter: Painter, names: Sequence[str] | None, per_class: int) -> Sheet | None:
    """Return the sheet that is asked for. Raises UserError when it would be too large."""
    if request.grid is None:
        return None
    return Sheet(names, per_class, channels=painter.G.img_channels, resolution=painter.G.img_resolution)


def _write(request: Request, batches: Iterable[Tensor], files: Sequence[str], sheet: Sheet | None) -> None:
    """Write images, uint8 [n, C, R, R], into --outdir under their names, then the sheet; say what was written."""
    outdir, names = None, iter(files)
    for pixels in batches:
        if request.outdir and outdir is None:  # not before there is something to put into it
            outdir = make_outdir(request.outdir)
        if sheet is not None:
            sheet.add(pixels)
        for image, name in zip(pixels, names) if outdir is not None else ():  # a sheet alone has no names
            save_picture(outdir / name, image)
    if outdir is not None and files:
        named = sorted(files, key=lambda name: (len(name), name))  # 70000 has a digit more than 0005
        click.echo(f"{request.outdir}: " + (f"{len(named)} images, {named[0]} to {named[-1]}" if len(named) > 1 else
                                            f"1 image, {named[0]}"))
    if sheet is not None:
        path = Path(outdir) / "grid.png" if request.grid == BESIDE_FILES else Path(request.grid)
        sheet.save(path)
        click.echo(f"{path}: {sheet.columns} x {sheet.rows} images")
