"""The commands of dataset_tool.py: the flags of convert, inspect, split and phantom, and what they print."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import UserError, UserPath
from dnnlib.progress import Progress
from dnnlib.text import format_table, percent, plural, shorten
from dnnlib.workers import usable_cores
from imagesets.contact_sheet import MAX_IMAGES, write_sheets
from imagesets.convert import DEFAULT_SEED, FOLDERS, ConvertOptions, convert, parse_share
from imagesets.deal import FIRST_CLASS, SIZE
from imagesets.inspect import TRAINING, Inspection, measure, open_for_inspection, summarize
from imagesets.phantoms.make import (
    DEFAULT_CLASSES,
    MAX_SIDE,
    TABLE,
    PhantomOptions,
    check_sides,
    parse_bias,
    parse_classes,
    write_phantoms,
)
from imagesets.phantoms.scene import ARTIFACT_RATES
from imagesets.pixel_formats import MAX_DEPTH, MIN_DEPTH
from imagesets.pixel_hashes import read_pixel_hashes
from imagesets.reader import PRESENT, ImageSet
from imagesets.resize import FILTERS, MIN_RESOLUTION, TRANSFORMS, parse_resolution
from imagesets.selection import UNLABELED
from imagesets.sources import SPLITS
from imagesets.split import Assignment, SplitRequest, assign, create_request, read_digests
from imagesets.split_files import SplitPaths, write_split

_OPTIONS = [
    click.option("--source", type=UserPath(), metavar="PATH", multiple=True,
                 help="Folder or zip of images, MedMNIST npz, CIFAR-10 python archive, or MNIST images (gz). Several "
                 "folders or zips of one set: give it once for each."),
    click.option("--dest", type=UserPath(), metavar="PATH",
                 help="The data set to write: a name ending in .zip, or a new folder."),
    click.option("--resolution", metavar="WxH", help="Size of the images, such as 256x256; without it they must fit."),
    click.option("--width", type=int, metavar="INT", help="As the first number of --resolution."),
    click.option("--height", type=int, metavar="INT", help="As the second number of --resolution."),
    click.option("--transform", type=click.Choice(TRANSFORMS), help="Cut a square from the centre, or a wide rectangle "
                 "that is padded to a square; without it images are stretched."),
    click.option("--resize-filter", type=click.Choice(FILTERS), default=ConvertOptions.resize_filter,
                 show_default=True),
    click.option("--max-images", type=int, metavar="INT",
                 help="Convert a random sample of at most that many images: of each class its share."),
    click.option("--seed", type=int, metavar="INT", help=f"Random seed of --max-images. [default: {DEFAULT_SEED}]"),
    click.option("--include", multiple=True, metavar="PATTERN", help="Take only files whose names fit, such as "
                 "'*.jpg'; may be repeated. '*' takes all, even several files of one row of --labels."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out files whose names fit, such as "
                 "'*_mask.png', or a folder, such as 'masks/*'; may be repeated."),
    click.option("--labels", type=UserPath(), metavar="FILE",
                 help="Table of labels: ISIC 2017 to 2020 and 2024, metadata.csv of the ISIC archive, HAM10000, or any "
                 "with the columns named below. Without it labels come from dataset.json or sub-folders."),
    click.option("--groups", type=UserPath(), metavar="FILE",
                 help="Table of the patient or lesion of each image where --labels has none, such as "
                 "ISIC_2019_Training_Metadata.csv."),
    click.option("--id-column", metavar="NAME", help="Column with the names of the images."),
    click.option("--label-column", metavar="NAME", help="Column with their classes."),
    click.option("--group-column", metavar="NAME", help="Column with patient or lesion: what split keeps together; of "
                 "--groups where that is given."),
    click.option("--folders", type=click.Choice(FOLDERS), metavar="|".join(FOLDERS),
                 help="Whether names of sub-folders are classes. Without it they are, unless they look like parts of a "
                 "set, such as images_part_1 or train: then say so."),
    click.option("--classes", metavar="A,B,...", help="Classes wanted, in this order."),
    click.option("--merge", metavar='"NEW=A,B;..."', help="Join classes under a new name."),
    click.option("--unlabelled", type=click.Choice(UNLABELED), default=ConvertOptions.unlabelled, show_default=True,
                 help="What to do when some images have no label."),
    click.option("--split", type=click.Choice(SPLITS), help="Part of a MedMNIST or CIFAR-10 file; train if not given."),
    click.option("--max-bad", default=f"{ConvertOptions.max_bad:.0%}", show_default=True, metavar="SHARE",
                 help="Share of unreadable images above which nothing is written."),
    click.option("--report", type=UserPath(), metavar="FILE",
                 help="JSON file that names the images dropped, changed, or doubtful."),
    click.option("--exact", is_flag=True, help="Decode JPEG files at full size: slower, slightly different pixels."),
    click.option("--depth", type=int, metavar="BITS", help="Bits of the numbers in images of more than 8 "
                 f"bits, {MIN_DEPTH} to {MAX_DEPTH}: 12 makes 4095 white. Otherwise 16, or by the values of the set."),
    click.option("--workers", type=int, metavar="INT", help="Processes; one a core if not given."),
]


def convert_options(command: Callable) -> Callable:
    """Add the options to a click command or group."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run_convert(*, source: Sequence[str], dest: str | None, resolution: str | None, width: int | None,
                height: int | None, max_bad: str, **options: Any) -> None:
    """Convert and print the summary. Raises UserError as convert() does, and when --source or --dest is missing."""
    for name, is_given in (("source", source and all(source)), ("dest", dest)):
        if not is_given:
            raise UserError(f"--{name} is missing; give both, such as --source=images/ --dest=isic256.zip, or see "
                            "--help")
    if resolution is not None:
        if width is not None or height is not None:
            raise UserError("--resolution and --width or --height are both given; expected one of the two ways")
        width, height = parse_resolution(resolution)
    done = convert(source, dest, width=width, height=height, max_bad=parse_share(max_bad), **options)
    for line in done.lines:
        # Names of files can hold what a terminal's encoding cannot.
        click.echo(line.encode("ascii", "backslashreplace").decode())


@click.command("inspect")
@click.argument("path", type=UserPath(path_type=Path))
@click.option("--sheet", metavar="FOLDER", type=UserPath(path_type=Path),
              help=f"Write a contact sheet for each class there: up to {MAX_IMAGES} images, of as many groups as "
              "possible.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--workers", type=click.IntRange(min=1), metavar="COUNT",
              help="Processes; the result does not depend on it. All cores without it.")
def inspect_command(path: Path, sheet: Path | None, as_json: bool, workers: int | None) -> None:
    """Decode all images of the data set PATH, a zip or a folder, and print what there is and what is wrong.

    Ends with 0 when the set could be looked at, whatever was found; with 2 when it cannot be read at all. Scripts ask
    --json, whose "ready" and "ready_with_labels" say whether training would take the set, and whether with --cond;
    "problems" is a list of objects with kind, blocks ("training", "labels" or null), count, message and files. The
    other keys: path, kind, phantom, num_images, num_bytes, num_groups, num_unlabelled, label_kind, classes (index,
    name, num_images, share, num_groups), folders, num_mixed_groups, mixed_groups (groups with different labels),
    sizes, modes, num_duplicates, duplicates, other_files, source.
    """
    images, metadata_fault = open_for_inspection(path)
    with Progress(len(images), "images") as progress:
        measures = measure(images, workers=workers or usable_cores(), on_image=progress.advance)
    inspection = summarize(images, measures, metadata_fault)
    sheets = [] if sheet is None else write_sheets(images, measures.usable, sheet)
    if as_json:
        click.echo(json.dumps(asdict(inspection), indent=1))
        return
    for line in describe(inspection):
        click.echo(line)
    if sheet is not None:
        click.echo(f"\n{plural(len(sheets), 'sheet')} in {sheet}: {shorten([path.name for path in sheets], 20)}")


def describe(found: Inspection) -> Iterator[str]:
    """Yield an inspection as lines for people."""
    yield f"{found.path}: {found.kind}, {plural(found.num_images, 'image')}, {found.num_bytes / 1e6:.1f} MB"
    if found.phantom:
        yield "PHANTOM: rendered images, no data of patients"
    yield ""
    yield from format_table(list(_facts(found)), left=(0, 1))
    if found.classes:
        yield ""
        if found.label_kind == "lists":
            yield f"labels are lists of numbers; an image counts where its number is above {PRESENT}:"
        yield from format_table([["class", "name", "images", "share", "groups"], *(
            [str(one.index), one.name, str(one.num_images), percent(one.num_images, found.num_images),
             str(one.num_groups)] for one in found.classes)], left=(1,))
    yield ""
    for problem in found.problems:
        yield f"{'PROBLEM' if problem.blocks == TRAINING else 'problem'}: {problem.kind}: {problem.message}"
        yield from (f"    {name}" for name in problem.files[:5])
        if problem.files[5:]:
            yield f"    ... (all with --json; {problem.count} in total)"
    yield f"ready for training: {'yes' if found.ready else 'no'}"
    why = " (there are none)" if found.label_kind is None and not found.ready_with_labels else ""
    yield f"ready for training with labels: {'yes' if found.ready_with_labels else 'no'}{why}"


def _facts(found: Inspection) -> Iterator[list[str]]:
    yield ["sizes", _counts(found.sizes)]
    yield ["modes", _counts(found.modes)]
    mixed = f"; {found.num_mixed_groups} with different labels ({shorten(found.mixed_groups)})"
    yield ["groups", f"{found.num_groups}{mixed if found.num_mixed_groups else ''}"]
    yield ["without a label", str(found.num_unlabelled)]
    yield ["duplicates", f"{plural(found.num_duplicates, 'image')} identical to an earlier one"]
    if found.folders:
        yield ["folders", _counts({name or ".": count for name, count in found.folders.items()})]
    if found.other_files:
        yield ["other files", shorten(found.other_files)]


def _counts(counts: dict[str, int]) -> str:
    texts = [name if len(counts) == 1 else f"{name} ({count})" for name, count in counts.items()]
    return shorten(texts, 8) or "none"


@click.command("split")
@click.argument("path", type=UserPath(path_type=Path))
@click.option("--parts", metavar="NAME:SHARE,...",
              help="Parts and their shares of the images, which sum to 1: train:0.8,val:0.1,test:0.1. Fractions (1/3) "
              "are understood, too.")
@click.option("--institutions", type=click.IntRange(min=1), metavar="COUNT",
              help="Divide the first of the --parts, or the whole set without --parts, among so many institutions.")
@click.option("--sizes", metavar="SHARE,...",
              help="Shares of the institutions: 0.06,0.33,0.61. Without it they are equal.")
@click.option("--skew", type=UserPath(), metavar="CLASS=SHARE,...|FILE",
              help="Share of a class within each institution's images, instead of alike in all: 'melanoma=0.3,0.05,*', "
              "more classes after a semicolon; * takes what is left of the class. Other classes fill up in proportion. "
              "Also a file with a class a line.")
@click.option("--seed", type=click.IntRange(min=0), default=SplitRequest.seed, show_default=True,
              help="Another seed gives another split.")
@click.option("--dest", metavar="FOLDER", type=UserPath(path_type=Path),
              help="Folder for the parts; beside the data set without it.")
@click.option("--allow-missing", is_flag=True,
              help="Let parts lack a class that has fewer groups than there are parts.")
@click.option("--leave-out", is_flag=True,
              help="With --skew: use fewer images, where the shares need more of a class than there are.")
@click.option("--force", is_flag=True, help="Replace parts that exist.")
def split_command(path: Path, dest: Path | None, force: bool, **options) -> None:
    """Divide the data set PATH into parts so that no group (patient or lesion) is in two of them.

    Groups that share an identical image, mirrored or not, stay together, too. Classes are as alike in all parts as
    whole groups allow; with labels that are lists, each number above 0.5 counts as a class. Writes NAME-PART.zip for
    each part, with images copied byte for byte, and NAME-split.json, which lists the groups and files of each part
    with their sha256; all of them or none.

    The same seed gives the same parts, whatever becomes of the first: --parts=train:0.9,test:0.1 alone makes the
    train that is divided when --institutions=3 is added, and the same test.
    """
    request = create_request(**options)
    images = ImageSet(path)
    paths = SplitPaths.choose(images.path, request, dest)
    paths.check(force=force)
    with Progress(len(images), "images read") as progress:
        digests = read_digests(images, progress.advance)
    hashes = read_pixel_hashes(images, workers=usable_cores())
    assignment = assign(images, digests, request, hashes)
    with Progress(len(images), "images written") as progress:
        lost = write_split(images, digests, assignment, request, paths, hashes, on_image=progress.advance)
    for line in describe_split(assignment, request, is_phantom=images.source.get("phantom") is True):
        click.echo(line)
    if lost:
        click.echo(f"not in any part: {shorten(lost)} (no table with a column \"file\")")
    click.echo(f"written to {paths.folder}: {', '.join(path.name for path in (*paths.parts, paths.manifest))}")


def describe_split(assignment: Assignment, request: SplitRequest, *, is_phantom: bool = False) -> Iterator[str]:
    """Yield what was reached, as lines for people."""
    if is_phantom:
        yield "PHANTOM: rendered images, no data of patients"
    if assignment.num_linked:
        yield f"{plural(assignment.num_linked, 'group')} joined with others, for they share identical images"
    yield from format_table(list(_reached_rows(assignment, request)))
    if request.skew is not None:
        yield ""
        yield "share of the class within the institution: reached (asked)"
        yield from format_table(list(_skew_rows(assignment, request)))


def _reached_rows(assignment: Assignment, request: SplitRequest) -> Iterator[list[str]]:
    """Yield a row for images, groups and each class: number, and its share, in each part."""
    reached = assignment.reached
    names = [part.name for part in request.final_parts]
    if reached[-1, SIZE]:
        names.append("(left out)")
    else:
        reached = reached[:-1]
    yield ["", "all", *[text for name in names for text in (name, "")]]
    aimed = [100 * target / reached[:, SIZE].sum() for target in assignment.targets[:, SIZE]]
    aimed_texts = [text for share in aimed for text in ("", f"{share:.1f}%")]
    yield ["aimed at", "", *aimed_texts, *[""] * (2 * len(names) - len(aimed_texts))]
    for column, title in enumerate(["images", "groups", *assignment.classes]):
        whole = reached[:, column].sum()
        cells = [text for count in reached[:, column] for text in (str(count), percent(count, whole))]
        yield [title, str(whole), *cells]


def _skew_rows(assignment: Assignment, request: SplitRequest) -> Iterator[list[str]]:
    yield ["", *[part.name for part in request.institutions]]
    for column, name in enumerate(assignment.classes, start=FIRST_CLASS):
        yield [name, *[f"{percent(assignment.reached[part, column], assignment.reached[part, SIZE])} "
                       f"({percent(assignment.targets[part, column], assignment.targets[part, SIZE])})"
                       for part in range(len(request.institutions))]]


@click.command()
@click.option("--dest", required=True, type=UserPath(), metavar="PATH",
              help="The data set to write: a name ending in .zip, or a new folder.")
@click.option("--count", type=int, default=PhantomOptions.count, show_default=True, metavar="INT",
              help="Number of images.")
@click.option("--resolution", default=f"{PhantomOptions.resolution}x{PhantomOptions.resolution}", show_default=True,
              metavar="WxH",
              help=f"Square, a power of two from {MIN_RESOLUTION} to {MAX_SIDE}.")
@click.option("--classes", default=",".join(f"{name}:{share:g}" for name, share in DEFAULT_CLASSES.items()),
              show_default=True, metavar="NAME:SHARE,...",
              help="Classes and their shares of the images, which add up to 1; exact to one image.")
@click.option("--seed", type=int, default=PhantomOptions.seed, show_default=True, metavar="INT",
              help="Equal seeds give equal images.")
@click.option("--bias", multiple=True, metavar="NAME=P:P:...", help="Probability of an artefact in each class, in the "
              f"order of --classes; may be repeated. Names: {', '.join(ARTIFACT_RATES)}.")
@click.option("--workers", type=int, metavar="INT", help="Processes; one a core if not given.")
def phantom_command(dest: str, count: int, resolution: str, classes: str, seed: int, bias: tuple[str, ...],
                    workers: int | None) -> None:
    """Render drawings of skin lesions with known attributes, for tests and demonstrations.

    They are no data: dataset.json says so. The class shows in the border, the symmetry and the colours of a lesion;
    looks are known for benign, melanoma, bkl, bcc, akiec, vasc, df and their other names, any other name gets one of
    its own. All other attributes are independent of the class unless --bias says otherwise. phantom.csv in the zip
    lists them for each image. Some patients have two or three images of one lesion.

    \b
    python dataset_tool.py phantom --dest=phantom.zip --count=2000 --resolution=64x64 --seed=0
    python dataset_tool.py phantom --dest=biased.zip --classes=benign:0.5,melanoma:0.5 --bias=frame=0.02:0.4
    """
    width, height = parse_resolution(resolution)
    check_sides(width, height)
    counts = write_phantoms(dest, count=count, resolution=width, classes=parse_classes(classes), seed=seed,
                            bias=parse_bias(bias), workers=workers)
    shares = ", ".join(f"{name} {number}" for name, number in counts.items())
    click.echo(f"{dest}: {count} phantoms of {width}x{width} pixels ({shares}); their attributes are in {TABLE}")
