"""What generate.py is asked for: the values of its options, and which of them go together."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from dnnlib.cli import UserError, UserPath
from dnnlib.progress import Progress
from generation.image_generator import (
    CLASS_CENTER,
    GLOBAL_CENTER,
    MEAN_LATENTS,
    TRUNC_CENTERS,
    Look,
    Painter,
    choose_batch,
    parse_first_seed,
    parse_seeds,
    read_projected_w,
)
from generation.labeled_set import SetPlan, check_centers, draw_labels, piece_size, write_labelled_set
from generation.network import OpenNetwork, check_look, open_network, require_same
from generation.pictures import (
    Sheet,
    check_file,
    check_mix_size,
    choose_layers,
    make_outdir,
    save_picture,
    write_style_mix,
)
from torch_utils.device import check_counts, count_processes, memory_advice, settle_device
from torch_utils.distributed import Place, join
from training.command import check_outdir
from training.config import NOISE_MODES
from training.launch import launch
from training.network_file import OTHER_NAMES
from training.options import TUNE_MALLOC_HELP, Flag, GroupedCommand


class Job(Enum):
    """What generate.py can do; the value is the option that asks for it."""

    IMAGES = "--seeds"
    PROJECTED = "--projected-w"
    SET = "--zip"
    MIX = "--style-mix"


_EVERYWHERE = {"network", "noise_mode", "device", "batch", "fp32", "tune_malloc"}
_FLAGS = {
    Job.IMAGES: {"seeds", "class_", "label", "trunc", "trunc_center", "outdir", "grid"},
    Job.PROJECTED: {"projected_w", "outdir", "grid"},
    Job.SET: {"zip", "count", "classes", "labels_from", "seeds", "trunc", "trunc_center", "gpus"},
    Job.MIX: {"style_mix", "rows", "cols", "styles", "class_", "label", "trunc", "trunc_center", "outdir"},
}
# Options that one job alone has.
_OWNERS = {"count": Job.SET, "classes": Job.SET, "labels_from": Job.SET, "gpus": Job.SET, "rows": Job.MIX,
           "cols": Job.MIX, "styles": Job.MIX}
_HINTS = {"class_": " (--classes says how many images each class has)",
          "label": " (--labels-from draws labels from a data set)"}  # with --zip

_LARGEST_TRUNC = 1000  # far beyond where images are any; much larger ones pass what float32 holds


@dataclass(frozen=True, kw_only=True)
class Request:
    """Values by the names of `generation.command.FLAGS`, None where not given.

    Raises UserError where options contradict each other, one is missing, or a number is out of its range.
    """

    network: str | None
    seeds: str | None
    class_: str | None
    label: str | None
    trunc: float | None
    trunc_center: str | None
    noise_mode: str | None
    projected_w: str | None
    outdir: str | None
    grid: str | None
    zip: str | None
    count: int | None
    classes: str | None
    labels_from: str | None
    style_mix: bool | None
    rows: str | None
    cols: str | None
    styles: str | None
    device: str
    gpus: int | None
    batch: int | None
    fp32: bool | None
    tune_malloc: bool

    def __post_init__(self) -> None:
        if not self.network:
            raise UserError("--network is missing; expected a network file, such as "
                            "--network=run/network-snapshot-001000.safetensors, or see --help")
        self._check_together()
        self._check_complete()
        if self.trunc is not None and not abs(self.trunc) <= _LARGEST_TRUNC:  # so that nan is none
            raise UserError(f"--trunc is {self.trunc:g}; expected a number, usually from 0 to 1, at most "
                            f"{_LARGEST_TRUNC}")
        if self.trunc_center == CLASS_CENTER and self.trunc is None:
            raise UserError("--trunc-center is class, but without --trunc nothing is truncated; add one, such as "
                            "--trunc=0.7, or leave --trunc-center out")
        if None not in (self.classes, self.labels_from):
            raise UserError("--classes and --labels-from are both given; expected one of them")
        check_counts(batch=self.batch, gpus=self.gpus)

    @property
    def job(self) -> Job:
        if self.style_mix:
            return Job.MIX
        if self.zip is not None:
            return Job.SET
        return Job.IMAGES if self.projected_w is None else Job.PROJECTED

    @property
    def look(self) -> Look:
        return Look(truncation=1.0 if self.trunc is None else self.trunc, center=self.trunc_center or GLOBAL_CENTER,
                    noise_mode=self.noise_mode or "const", fp32=bool(self.fp32))

    def processes(self, place: Place) -> int:
        """Return how many processes do the work. place: this process's. Raises UserError."""
        return count_processes(place, self.gpus, shared=None if self.job is Job.SET else Job.SET.value)

    def _check_together(self) -> None:
        job = self.job
        for field in fields(self):
            name = field.name
            if getattr(self, name) is None or name in _EVERYWHERE | _FLAGS[job] or (name, self.gpus) == ("gpus", 1):
                continue
            flag = f"--{name.rstrip('_').replace('_', '-')}"
            if name in _OWNERS:
                raise UserError(f"{flag} is given, which belongs to {_OWNERS[name].value}; add that, or leave {flag} "
                                "out")
            hint = _HINTS.get(name, "") if job is Job.SET else ""
            raise UserError(f"{flag} is given with {job.value}; expected one of them{hint}")

    def _check_complete(self) -> None:
        job = self.job
        if job is Job.IMAGES and self.seeds is None:
            raise UserError("--seeds is missing; expected what to make: --seeds=0-9, --projected-w=FILE, --zip=FILE or "
                            "--style-mix, see --help")
        if job is Job.MIX and None in (self.rows, self.cols):
            missing = "rows" if self.rows is None else "cols"
            raise UserError(f"--{missing} is missing; expected seeds for --style-mix, such as --rows=85,100 "
                            "--cols=55,821")
        if job is not Job.SET and not self.outdir and (job is Job.MIX or not self.grid):
            other = "" if job is Job.MIX else ", or --grid=FILE for a sheet alone"
            raise UserError(f"--outdir is missing; expected a folder for the images{other}")


# MERGED from latent.flags
# The options of generate.py: names, types, help texts, and the groups they are shown in.


IMAGES, FILES, SET, MIX, SPEED = ("Which images", "Where they go", "A labelled data set", "Mixed styles",
                                  "Speed and devices")
BESIDE_FILES = ""  # the value of --grid without a name

FLAGS = [
    Flag(["--network"], group=IMAGES, type=UserPath(), metavar="FILE", help="Network file: a .safetensors of a run, or "
         f"a .pkl of the original; also {OTHER_NAMES}. Must be given."),
    Flag(["--seeds"], group=IMAGES, metavar="LIST", help="Numbers that images follow from, such as 0,1,5-9. With --zip "
         "the first one [default: 0]."),
    Flag(["--class", "class_"], group=IMAGES, metavar="NAME", help="Class of the images, by name or number, where the "
         "network knows classes. For --grid several, such as melanoma,nevus, or all."),
    Flag(["--label"], group=IMAGES, metavar="LIST", help="Label of the images as the numbers that the network is told, "
         "such as 0,1,0.5: where it learned labels that are no classes. Of classes it is a mix, such as 0.5,0.5 of "
         "two, which the network never learned from."),
    Flag(["--trunc"], group=IMAGES, type=float, metavar="PSI", help="Truncation: smaller values give more usual and "
         "less varied images; 0 gives the mean image. [default: 1]"),
    Flag(["--trunc-center"], group=IMAGES, type=click.Choice(TRUNC_CENTERS), metavar="NAME", help="What --trunc pulls "
         "towards: global, the mean style of all images, in which frequent classes weigh most; class, that of the "
         f"image's own class, or of its label, over {MEAN_LATENTS} latents: right for a class that is rare in the "
         "training set. [default: global]"),
    Flag(["--noise-mode"], group=IMAGES, type=click.Choice(NOISE_MODES), metavar="NAME", help="Noise that fine detail "
         "follows from: const, the network's own; random, drawn by the seed of each image; none. [default: const]"),
    Flag(["--projected-w"], group=IMAGES, type=UserPath(), metavar="FILE",
         help="Make images of the styles in an .npz file, instead of "
         "seeds."),

    Flag(["--outdir"], group=FILES, type=UserPath(), metavar="DIR",
         help="Folder for seedNNNN.png (or projNN.png). Files of these names "
         "are replaced."),
    Flag(["--grid"], group=FILES, is_flag=False, flag_value=BESIDE_FILES, type=UserPath(), metavar="[FILE]",
         help="Show all images on "
         "one sheet, a row for each of several classes; without a name it is grid.png in --outdir."),

    Flag(["--zip"], group=SET, type=UserPath(), metavar="FILE",
         help="Write a data set with labels, as dataset_tool.py does. Image i is "
         "that of seed FIRST + i. The same command continues where it was stopped; a file that is there is never "
         "replaced."),
    Flag(["--count"], group=SET, type=int, metavar="INT", help="Number of images; of classes in the shares that the "
         "network was trained with, or those of --classes."),
    Flag(["--classes"], group=SET, metavar="LIST", help="Number of images of each class, such as "
         "benign:5000,melanoma:5000, in the order of the network's classes."),
    Flag(["--labels-from"], group=SET, type=UserPath(), metavar="PATH",
         help="Data set to draw labels from, in place of numbers of each "
         "class: in random order, by the first seed, each once before one comes again. Classes are matched by name. "
         "[default of --count: the number of its images]"),

    Flag(["--style-mix"], group=MIX, is_flag=True, default=None, help="Write ROW-COLUMN.png for all pairs of seeds: "
         "the row's image with layers of the column's style; and grid.png."),
    Flag(["--rows"], group=MIX, metavar="LIST", help="Seeds of the rows, such as 85,100,75."),
    Flag(["--cols"], group=MIX, metavar="LIST", help="Seeds of the columns."),
    Flag(["--styles"], group=MIX, metavar="LIST", help="Layers taken from the column; from 0, the coarsest. [default: "
         "0-6; the first half where there are no more]"),

    Flag(["--device"], group=SPEED, metavar="NAME", default="auto", help="auto (a CUDA device where there is one), "
         "cpu, cuda, or one GPU as cuda:1. [default: auto]"),
    Flag(["--gpus"], group=SPEED, type=int, metavar="INT", help="Processes that share the work of --zip: one a GPU, or "
         "several on a CPU. [default: 1]"),
    Flag(["--batch"], group=SPEED, type=int, metavar="INT", help="Images of one pass. Larger batches are faster; "
         "they move some pixels by one level. [default: 1 on a CPU, by resolution on a GPU]"),
    Flag(["--fp32"], group=SPEED, is_flag=True, default=None, help="Compute all in float32, also what the network "
         "computes in half precision on a GPU."),
    Flag(["--tune-malloc"], group=SPEED, type=bool, metavar="BOOL", default=True, help=f"{TUNE_MALLOC_HELP} "
         "[default: true]"),
]


# MERGED from latent.jobs
# Do what generate.py is asked for: images of seeds or of saved styles, a labelled set, mixed styles.


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


# MERGED from latent.command
# The command line of generate.py.


HELP = """Make images with a trained network: files, a sheet, a labelled data set, or mixed styles.

\b
python generate.py --network=network-snapshot-001000.safetensors --seeds=0-63 --class=melanoma --outdir=out
python generate.py --network=N.safetensors --seeds=0-9 --class=all --trunc=0.7 --grid=sheet.png
python generate.py --network=N.safetensors --zip=synthetic.zip --count=10000
python generate.py --network=N.safetensors --zip=balanced.zip --classes=benign:5000,melanoma:5000
python generate.py --network=N.safetensors --zip=drawn.zip --labels-from=set.zip
python generate.py --network=N.safetensors --projected-w=projected_w.npz --outdir=out
python generate.py --network=N.safetensors --style-mix --rows=85,100 --cols=55,821 --outdir=out

A seed gives the same image each time: that of the original's generate.py, for its networks.
"""


def _generate(**flags: Any) -> int:
    return do_job(Request(**flags))


def make_command() -> click.Command:
    """Return the command of generate.py."""
    return GroupedCommand(None, callback=_generate, params=list(FLAGS), help=HELP,
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
