"""The command line of generate.py: its options, which of them go together, and what each mode does.

The modes are: images from seeds, images from saved styles, style mixing, and a labeled data set.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import click
from torch import Tensor

from dnnlib.cli import Flag, GroupedCommand, UserError, UserPath, check_outdir
from dnnlib.progress import Progress
from generation.image_generator import (
    CLASS_CENTER,
    GLOBAL_CENTER,
    MEAN_LATENTS,
    TRUNC_CENTERS,
    ImageGenerator,
    SynthesisSettings,
    choose_batch,
    parse_first_seed,
    parse_seeds,
    read_projected_w,
)
from generation.labeled_set import SetContents, check_centers, choose_piece_size, draw_labels, write_labeled_set
from generation.network import NETWORK_HELP, Label, OpenNetwork, open_network, require_same
from generation.pictures import (
    COARSE_LAYERS,
    GRID,
    Sheet,
    check_file,
    choose_layers,
    make_outdir,
    save_picture,
    write_style_mix,
)
from torch_utils.device import (
    DEVICE_HELP,
    TUNE_MALLOC_HELP,
    check_counts,
    count_processes,
    memory_advice,
    settle_device,
)
from torch_utils.distributed import Place, join
from torch_utils.launch import launch
from training.generator import NOISE_MODES

_LARGEST_TRUNC = 1000  # far beyond any useful value; much larger ones overflow float32


def flag(group: str, metavar: str | None, text: str, *, default: Any = None, shown: str | None = None,
         only: Sequence[Any] = (), neutral: Any = None, **attributes) -> Any:
    """Return a dataclass field that also declares a command-line option of its name and type, see `flags_of`.

    group:       heading of the option in the help
    metavar:     placeholder for its value in the help; None for a switch
    text:        help text, without the default
    default:     None = not given
    shown:       the default that the help shows; None shows `default`
    only:        the modes that it works with; empty = all
    neutral:     a value that has no effect and is accepted in every mode
    attributes:  of click.Option
    """
    if shown is None and default is not None and default is not False:
        shown = "true" if default is True else str(default)
    text = text if shown is None else f"{text} [default: {shown}]"
    return field(default=default, metadata={"only": only, "neutral": neutral, "option": {
        "group": group, "metavar": metavar, "help": text, "default": default, **attributes}})


def flag_name(name: str) -> str:
    """Return the option of a field: --class for class_, --num-steps for num_steps."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def flags_of(request: type) -> list[Flag]:
    """Return the options that the fields of a request declare with `flag`."""
    flags = []
    for one in fields(request):
        kind = next(kind for kind in (*get_args(one.type), one.type) if kind is not NoneType)
        option = {"type": kind, "is_flag": one.metadata["option"]["metavar"] is None, **one.metadata["option"]}
        flags.append(Flag([flag_name(one.name), one.name], **option))
    return flags


class Mode(Enum):
    """What generate.py can do; the value is the option that selects it."""

    IMAGES = "--seeds"
    PROJECTED = "--projected-w"
    SET = "--zip"
    MIX = "--style-mix"


_OF_SEEDS, _IN_OUTDIR = (Mode.IMAGES, Mode.MIX), (Mode.IMAGES, Mode.PROJECTED, Mode.MIX)
_TRUNCATED = (Mode.IMAGES, Mode.SET, Mode.MIX)
_HINTS = {"class_": " (--classes sets the number of images of each class)",
          "label": " (--labels-from takes labels from a data set)"}  # with --zip

# The headings of the help.
IMAGES, FILES, SET, MIX, SPEED = "Images", "Output", "Labeled data set", "Style mixing", "Speed and devices"
BESIDE_FILES = ""  # the value of --grid without a name


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """The options of generate.py.

    Raises UserError if they contradict each other, one is missing, or a number is out of range.
    """

    network: str | None = flag(
        IMAGES, "FILE", f"{NETWORK_HELP} Required.", type=UserPath())
    seeds: str | None = flag(
        IMAGES, "LIST", "Random seeds, one per image, such as 0,1,5-9. With --zip, the first seed [default: 0].",
        only=(Mode.IMAGES, Mode.SET))
    class_: str | None = flag(
        IMAGES, "NAME", "Class of the images, by name or number, if the network is class-conditional. --grid also "
        "takes several, such as melanoma,nevus, or all.", only=_OF_SEEDS)
    label: str | None = flag(
        IMAGES, "LIST", "Label vector of the images, such as 0,1,0.5, if the network was trained with vectors as "
        "labels. A network trained with classes takes a mix of them, such as 0.5,0.5 for two classes, which it never "
        "saw in training.", only=_OF_SEEDS)
    trunc: float | None = flag(
        IMAGES, "PSI", "Truncation: smaller values give more typical, less varied images; 0 gives the mean image.",
        shown=f"{SynthesisSettings.truncation:g}", only=_TRUNCATED)
    trunc_center: str | None = flag(
        IMAGES, "NAME", "Mean style that --trunc pulls towards: global, that of all images, in which frequent "
        f"classes weigh most; class, that of the image's own class or label, from {MEAN_LATENTS} latents, which is "
        "better for classes that are rare in the training set.",
        type=click.Choice(TRUNC_CENTERS), shown=SynthesisSettings.center, only=_TRUNCATED)
    noise_mode: str | None = flag(
        IMAGES, "NAME", "Noise inputs, which add fine detail: const, the network's own; random, drawn from each "
        "image's seed; none.", type=click.Choice(NOISE_MODES), shown=SynthesisSettings.noise_mode)
    projected_w: str | None = flag(
        IMAGES, "FILE", "Make images from the styles (w) in an .npz file, not from seeds.", type=UserPath(),
        only=(Mode.PROJECTED,))

    outdir: str | None = flag(
        FILES, "DIR", "Folder for the images, seedNNNN.png or projNN.png. Existing files are replaced.",
        type=UserPath(), only=_IN_OUTDIR)
    grid: str | None = flag(
        FILES, "[FILE]", "Put all images on one sheet, each class in rows of its own; without FILE, the sheet is "
        f"{GRID} in --outdir.", is_flag=False, flag_value=BESIDE_FILES, type=UserPath(),
        only=(Mode.IMAGES, Mode.PROJECTED))

    zip: str | None = flag(
        SET, "FILE", "Write a labeled data set, in the format of dataset_tool.py. Image i has seed FIRST + i, where "
        "FIRST is --seeds. After an interruption, the same command continues; an existing file is never replaced.",
        type=UserPath(), only=(Mode.SET,))
    count: int | None = flag(
        SET, "INT", "Number of images. Without --classes, each class has the same share as in the training set.",
        only=(Mode.SET,))
    classes: str | None = flag(
        SET, "LIST", "Number of images of each class, such as benign:5000,melanoma:5000. The set has them in the order "
        "of the network's classes.", only=(Mode.SET,))
    labels_from: str | None = flag(
        SET, "PATH", "Data set to take labels from, instead of --classes: shuffled (by the first seed), each used once "
        "before any is repeated. Classes are matched by name. [default of --count: the number of its images]",
        type=UserPath(), only=(Mode.SET,))

    style_mix: bool | None = flag(
        MIX, None, "Write ROW-COLUMN.png for each pair of seeds, the row's image with some layers of the column's "
        f"style, and all of them in {GRID}.", only=(Mode.MIX,))
    rows: str | None = flag(MIX, "LIST", "Seeds of the rows, such as 85,100,75.", only=(Mode.MIX,))
    cols: str | None = flag(MIX, "LIST", "Seeds of the columns.", only=(Mode.MIX,))
    styles: str | None = flag(
        MIX, "LIST", "Layers taken from the column's style; 0 is the coarsest.",
        shown=f"0-{COARSE_LAYERS - 1}, or the first half if the network has at most {COARSE_LAYERS}", only=(Mode.MIX,))

    device: str = flag(SPEED, "NAME", DEVICE_HELP, default="auto")
    gpus: int | None = flag(
        SPEED, "INT", "Number of processes for --zip: one per GPU, or several on a CPU.", shown="1",
        only=(Mode.SET,), neutral=1)
    batch: int | None = flag(
        SPEED, "INT", "Batch size. Larger batches are faster, and change a few pixel values by 1.",
        shown="1 on a CPU, chosen by resolution on a GPU")
    fp32: bool | None = flag(
        SPEED, None, "Compute everything in float32, also the layers that use float16 on a GPU.")
    tune_malloc: bool = flag(SPEED, "BOOL", TUNE_MALLOC_HELP, default=True)

    def __post_init__(self) -> None:
        if not self.network:
            raise UserError("--network is missing; expected a network file, such as "
                            "--network=run/network-snapshot-001000.safetensors, or see --help")
        self._check_together()
        self._check_complete()
        if self.trunc is not None and not abs(self.trunc) <= _LARGEST_TRUNC:  # also refuses nan
            raise UserError(f"--trunc is {self.trunc:g}; expected a number, usually from 0 to 1, at most "
                            f"{_LARGEST_TRUNC}")
        if self.trunc_center == CLASS_CENTER and self.trunc is None:
            raise UserError("--trunc-center is class, but without --trunc nothing is truncated; add one, such as "
                            "--trunc=0.7, or leave --trunc-center out")
        if None not in (self.classes, self.labels_from):
            raise UserError("--classes and --labels-from are both given; expected one of them")
        check_counts(batch=self.batch, gpus=self.gpus)

    @property
    def mode(self) -> Mode:
        if self.style_mix:
            return Mode.MIX
        if self.zip is not None:
            return Mode.SET
        return Mode.IMAGES if self.projected_w is None else Mode.PROJECTED

    @property
    def settings(self) -> SynthesisSettings:
        given = {"truncation": self.trunc, "center": self.trunc_center, "noise_mode": self.noise_mode,
                 "fp32": self.fp32}
        return SynthesisSettings(**{name: value for name, value in given.items() if value is not None})

    def _check_together(self) -> None:
        mode = self.mode
        for one in fields(self):
            value, only = getattr(self, one.name), one.metadata["only"]
            if value in (None, one.metadata["neutral"]) or not only or mode in only:
                continue
            name = flag_name(one.name)
            if len(only) == 1 and name != only[0].value:
                raise UserError(f"{name} is given, but only works with {only[0].value}; add that, or leave {name} out")
            hint = _HINTS.get(one.name, "") if mode is Mode.SET else ""
            raise UserError(f"{name} is given with {mode.value}; expected one of them{hint}")

    def _check_complete(self) -> None:
        mode = self.mode
        if mode is Mode.IMAGES and self.seeds is None:
            raise UserError("--seeds is missing; expected --seeds=0-9, --projected-w=FILE, --zip=FILE or --style-mix: "
                            "see --help")
        if mode is Mode.MIX and None in (self.rows, self.cols):
            missing = "rows" if self.rows is None else "cols"
            raise UserError(f"--{missing} is missing; expected seeds for --style-mix, such as --rows=85,100 "
                            "--cols=55,821")
        if mode is not Mode.SET and not self.outdir and (mode is Mode.MIX or not self.grid):
            other = "" if mode is Mode.MIX else ", or --grid=FILE for only a sheet"
            raise UserError(f"--outdir is missing; expected a folder for the images{other}")


HELP = """Make images with a trained network: image files, a sheet, a labeled data set, or style mixing.

\b
python generate.py --network=network-snapshot-001000.safetensors --seeds=0-63 --class=melanoma --outdir=out
python generate.py --network=N.safetensors --seeds=0-9 --class=all --trunc=0.7 --grid=sheet.png
python generate.py --network=N.safetensors --zip=synthetic.zip --count=10000
python generate.py --network=N.safetensors --zip=balanced.zip --classes=benign:5000,melanoma:5000
python generate.py --network=N.safetensors --zip=drawn.zip --labels-from=set.zip
python generate.py --network=N.safetensors --projected-w=projected_w.npz --outdir=out
python generate.py --network=N.safetensors --style-mix --rows=85,100 --cols=55,821 --outdir=out

A seed always gives the same image. With a network of the original StyleGAN2-ADA it is the image that the original's
generate.py makes.
"""


def make_command() -> click.Command:
    """Return the command of generate.py."""
    return GroupedCommand(None, callback=_generate, params=flags_of(GenerateRequest), help=HELP,
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})


def _generate(**flags: Any) -> int:
    """Run the mode that the options select; return the exit code. If the inputs do not fit, nothing is written."""
    request = GenerateRequest(**flags)
    work = {Mode.IMAGES: make_images, Mode.PROJECTED: make_projected, Mode.SET: make_set, Mode.MIX: make_style_mix}
    return work[request.mode](request)


def make_images(request: GenerateRequest) -> int:
    """Write an image for each seed, and a sheet of them."""
    named = parse_seeds("--seeds", request.seeds)
    seeds = list(dict.fromkeys(named))  # each seed has one file
    if len(seeds) < len(named):
        print(f"--seeds names {len(named)} seeds, {len(seeds)} of them different; each is made once", file=sys.stderr)
    with _open(request) as (network, generator):
        classes = network.classes.choose(request.class_, request.label)
        _print_untrained(network, classes)
        if len(classes) > 1 and request.outdir and request.grid != BESIDE_FILES:
            raise UserError(f"--class names {len(classes)} classes, but the files in --outdir are of one class; "
                            "expected one, or --grid=FILE without --outdir for a sheet of several")
        names = None if len(classes) == 1 else [network.classes.name(index) for index in classes]
        sheet = None if request.grid is None else Sheet(names, len(seeds), resolution=generator.G.img_resolution)
        files = [] if len(classes) > 1 else [f"seed{seed:04d}.png" for seed in seeds]
        with Progress(len(seeds) * len(classes), "images") as progress:
            batches = (pixels for index in classes for pixels in generator.generate(
                seeds, network.classes.labels([index]).expand(len(seeds), -1), progress.advance))
            _write_images(request, batches, files, sheet)
    return 0


def make_projected(request: GenerateRequest) -> int:
    """Write an image for each of the styles in a file, and a sheet of them."""
    with _open(request) as (_, generator):
        ws = read_projected_w(request.projected_w, generator.G)
        sheet = None if request.grid is None else Sheet(None, len(ws), resolution=generator.G.img_resolution)
        files = [f"proj{index:02d}.png" for index in range(len(ws))]
        with Progress(len(ws), "images") as progress:
            _write_images(request, generator.render_all(ws, progress.advance), files, sheet)
    return 0


def make_style_mix(request: GenerateRequest) -> int:
    """Write the images of pairs of seeds, and a sheet of them."""
    rows, columns = parse_seeds("--rows", request.rows), parse_seeds("--cols", request.cols)
    with _open(request) as (network, generator):
        classes = network.classes.choose(request.class_, request.label)
        if len(classes) > 1:
            raise UserError(f"--class names {len(classes)} classes; expected one with --style-mix")
        _print_untrained(network, classes)
        layers = choose_layers(request.styles, generator.G.num_ws)
        count = write_style_mix(request.outdir, generator, rows, columns, layers=layers,
                                label=network.classes.labels(classes))
    click.echo(f"{request.outdir}: {count} images and {GRID}, layers {', '.join(map(str, layers))} of the columns")
    return 0


def make_set(request: GenerateRequest) -> int:
    """Write a labeled data set, in --gpus processes."""
    check_file("--zip", request.zip, ".zip")
    place = Place.from_environment()
    processes = count_processes(place, request.gpus, shared=None)
    device = settle_device(request.device, place, processes, tunes_malloc=request.tune_malloc)
    network = open_network(request.network, "cpu")
    request.settings.require_support(network.G)
    batch = request.batch or choose_batch(network.G.img_resolution, device)
    contents = _choose_contents(request, network, batch)
    if processes > 1 and not place.is_started:
        del network  # each process opens its own
        return launch(processes)
    with join(device) as joined, memory_advice(batch):
        require_same(network, joined)
        if joined.rank == 0:
            if contents.note is not None:
                print(contents.note, file=sys.stderr)
            _print_untrained(network, [label for label, count in enumerate(contents.counts or ()) if count])
            _print_center(request.settings)
        generator = ImageGenerator(network.G.to(joined.device), request.settings, batch=batch, fp32_flag="--fp32")
        is_new = write_labeled_set(request.zip, network, generator, contents, joined)
        if joined.rank == 0:
            click.echo(_describe_set(request.zip, network, contents) if is_new else
                       f"{request.zip} already holds these images")
    return 0


@contextmanager
def _open(request: GenerateRequest) -> Iterator[tuple[OpenNetwork, ImageGenerator]]:
    """Check the output paths, then open the network on its device; for the modes that write image files."""
    place = Place.from_environment()
    processes = count_processes(place, request.gpus, shared=Mode.SET.value)
    if request.outdir:
        check_outdir(request.outdir)
    if request.grid:
        check_file("--grid", request.grid, ".png")
    device = settle_device(request.device, place, processes, tunes_malloc=request.tune_malloc)
    network = open_network(request.network, device)
    request.settings.require_support(network.G)
    batch = request.batch or choose_batch(network.G.img_resolution, device)
    generator = ImageGenerator(network.G, request.settings, batch=batch, fp32_flag="--fp32")
    _print_center(request.settings)
    with memory_advice(batch):
        yield network, generator


def _print_center(settings: SynthesisSettings) -> None:
    if settings.center != GLOBAL_CENTER and settings.truncation != 1:
        print(f"--trunc={settings.truncation:g} pulls towards the mean style of each image's own class or label, from "
              f"{MEAN_LATENTS} latents (--trunc-center={settings.center})", file=sys.stderr)


def _print_untrained(network: OpenNetwork, labels: Sequence[Label]) -> None:
    if (note := network.classes.note_on_untrained(labels)) is not None:
        print(note, file=sys.stderr)


def _choose_contents(request: GenerateRequest, network: OpenNetwork, batch: int) -> SetContents:
    G, classes = network.G, network.classes
    first_seed = 0 if request.seeds is None else parse_first_seed("--seeds", request.seeds)
    piece = choose_piece_size((G.img_channels, G.img_resolution, G.img_resolution), batch)
    if request.labels_from is not None:
        drawn, note = draw_labels(request.labels_from, classes, request.count, first_seed)
        if request.settings.center == CLASS_CENTER:
            check_centers(drawn, request.labels_from)
        counts = None if isinstance(drawn[0], tuple) else [drawn.count(index) for index in range(classes.count)]
        return SetContents(first_seed=first_seed, count=len(drawn), counts=None if counts is None else tuple(counts),
                           piece=piece, drawn=drawn, labels_from=Path(request.labels_from).name, note=note)
    counts = classes.divide(request.count, request.classes)
    return SetContents(first_seed=first_seed, count=request.count if counts is None else sum(counts),
                       counts=None if counts is None else tuple(counts), piece=piece)


def _describe_set(path: str, network: OpenNetwork, contents: SetContents) -> str:
    """Return "synthetic.zip: 10000 images of 64x64 (benign: 8700, melanoma: 1300), seeds 0-9999"."""
    counts = "" if contents.labels_from is None else f" (labels of {contents.labels_from})"
    if contents.counts is not None:
        counts = f" ({', '.join(f'{network.classes.name(i)}: {count}' for i, count in enumerate(contents.counts))})"
    side = network.G.img_resolution
    return (f"{path}: {contents.count} images of {side}x{side}{counts}, seeds {contents.first_seed}-"
            f"{contents.first_seed + contents.count - 1}")


def _write_images(request: GenerateRequest, batches: Iterable[Tensor], files: Sequence[str],
                  sheet: Sheet | None) -> None:
    """Write images, uint8 [n, C, R, R], into --outdir under their names, then the sheet; print what was written."""
    outdir, names = None, iter(files)
    for pixels in batches:
        if request.outdir and outdir is None:  # only once there is an image to write
            outdir = make_outdir(request.outdir)
        if sheet is not None:
            sheet.add(pixels)
        for image, name in zip(pixels, names) if outdir is not None else ():  # no names without --outdir
            save_picture(outdir / name, image)
    if outdir is not None and files:
        named = sorted(files, key=lambda name: (len(name), name))  # 70000 has more digits than 0005
        click.echo(f"{request.outdir}: " + (f"{len(named)} images, {named[0]} to {named[-1]}" if len(named) > 1 else
                                            f"1 image, {named[0]}"))
    if sheet is not None:
        path = Path(outdir) / GRID if request.grid == BESIDE_FILES else Path(request.grid)
        sheet.save(path)
        click.echo(f"{path}: {sheet.columns} x {sheet.rows} images")
