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
from imagesets.metadata import may_be_redistributed
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

_WORKERS_HELP = "Number of worker processes. [default: one per CPU core]"
_PHANTOM_LINE = "PHANTOM: rendered images, not patient data"
_REDISTRIBUTION = {"yes": True, "no": False}
_CURRENT_SPELLING = {"unlabelled": "unlabeled"}  # options that were renamed: old name -> name
_OPTIONS = [
    click.option("--source", type=UserPath(), metavar="PATH", multiple=True,
                 help="Folder or zip of images, MedMNIST .npz, CIFAR-10 python archive, or MNIST images (.gz). Repeat "
                 "the option to join several folders or zips into one data set."),
    click.option("--dest", type=UserPath(), metavar="PATH", help="Data set to write: a .zip file, or a new folder."),
    click.option("--resolution", metavar="WxH", help="Resize all images to this size, such as 256x256. Required unless "
                 "all images already have one suitable size."),
    click.option("--width", type=int, metavar="INT", help="With --height, instead of --resolution."),
    click.option("--height", type=int, metavar="INT", help="With --width, instead of --resolution."),
    click.option("--transform", type=click.Choice(TRANSFORMS), help="Crop a square from the center, or a wide "
                 "rectangle that is padded with black to a square. By default images are stretched."),
    click.option("--resize-filter", type=click.Choice(FILTERS), default=ConvertOptions.resize_filter,
                 show_default=True, help="Filter for resizing."),
    click.option("--max-images", type=int, metavar="N",
                 help="Convert a random subset of at most N images, keeping the proportions of the classes."),
    click.option("--seed", type=int, metavar="INT", help=f"Random seed for --max-images. [default: {DEFAULT_SEED}]"),
    click.option("--include", multiple=True, metavar="PATTERN", help="Convert only files whose names match, such as "
                 "'*.jpg'; may be repeated. '*' accepts all, even several files for one row of --labels."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out files whose names match, such as "
                 "'*_mask.png', or a folder, such as 'masks/*'; may be repeated."),
    click.option("--labels", type=UserPath(), metavar="FILE",
                 help="Table of labels (CSV): ISIC 2017 to 2020 and 2024, metadata.csv of the ISIC archive, HAM10000, "
                 "or any other with the columns named below. By default labels come from dataset.json or subfolders."),
    click.option("--groups", type=UserPath(), metavar="FILE",
                 help="Table with the patient or lesion of each image if --labels has none, such as "
                 "ISIC_2019_Training_Metadata.csv."),
    click.option("--id-column", metavar="NAME", help="Column with the image names."),
    click.option("--label-column", metavar="NAME", help="Column with the classes."),
    click.option("--group-column", metavar="NAME", help="Column with the patient or lesion of each image, in --groups "
                 "if that is given. The split command keeps their images together."),
    click.option("--folders", type=click.Choice(FOLDERS), metavar="|".join(FOLDERS),
                 help="Whether the names of subfolders are classes. By default they are; required if they look like "
                 "parts of a data set, such as images_part_1 or train."),
    click.option("--classes", metavar="A,B,...", help="Classes to keep, in this order."),
    click.option("--merge", metavar='"NEW=A,B;..."', help="Merge classes under a new name."),
    click.option("--unlabeled", type=click.Choice(UNLABELED), default=ConvertOptions.unlabeled, show_default=True,
                 help="What to do if some images have no label."),
    click.option("--split", type=click.Choice(SPLITS), help="Split of a MedMNIST or CIFAR-10 file to convert. "
                 "[default: train]"),
    click.option("--max-bad", default=f"{ConvertOptions.max_bad:.0%}", show_default=True, metavar="SHARE",
                 help="Stop and write no data set if more than this share of the images is unreadable."),
    click.option("--redistribution", type=click.Choice(list(_REDISTRIBUTION)), help="Whether the images may be passed "
                 "on to anyone, recorded in dataset.json: pages with pictures, such as that of study.py embed, show "
                 "only those that may. By default what the sources record."),
    click.option("--report", type=UserPath(), metavar="FILE",
                 help="Write a JSON file that lists dropped, changed and doubtful images."),
    click.option("--exact", is_flag=True, help="Decode JPEG files at full size: slower, slightly different pixels."),
    click.option("--depth", type=int, metavar="BITS", help="Bits per value of images with more than 8 bits, "
                 f"{MIN_DEPTH} to {MAX_DEPTH}: with 12, 4095 becomes white. By default 16, or chosen from the values "
                 "in the images."),
    click.option("--workers", type=int, metavar="INT", help=_WORKERS_HELP),
]


def current_spelling(name: str) -> str:
    """Return the name of an option for an older spelling of it; other names stay."""
    return _CURRENT_SPELLING.get(name, name)


def convert_options(command: Callable) -> Callable:
    """Add the options of the conversion to a click command or group."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run_convert(*, source: Sequence[str], dest: str | None, resolution: str | None, width: int | None,
                height: int | None, max_bad: str, redistribution: str | None, **options: Any) -> None:
    """Convert and print the summary. Raises UserError as convert() does, and when --source or --dest is missing."""
    for name, is_given in (("source", source and all(source)), ("dest", dest)):
        if not is_given:
            raise UserError(f"--{name} is missing; give both, such as --source=images/ --dest=isic256.zip, or see "
                            "--help")
    if resolution is not None:
        if width is not None or height is not None:
            raise UserError("--resolution and --width or --height are both given; expected only one of the two")
        width, height = parse_resolution(resolution)
    done = convert(source, dest, width=width, height=height, max_bad=parse_share(max_bad),
                   redistribution=_REDISTRIBUTION.get(redistribution), **options)
    for line in done.lines:
        # Names of files can hold what a terminal's encoding cannot.
        click.echo(line.encode("ascii", "backslashreplace").decode())


@click.command("inspect", short_help="Check a data set: classes, groups, sizes, duplicates, problems.")
@click.argument("path", type=UserPath(path_type=Path))
@click.option("--sheet", metavar="FOLDER", type=UserPath(path_type=Path),
              help=f"Write a contact sheet of each class to this folder: up to {MAX_IMAGES} images, from as many "
              "groups as possible.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--workers", type=click.IntRange(min=1), metavar="COUNT", help=_WORKERS_HELP)
def inspect_command(path: Path, sheet: Path | None, as_json: bool, workers: int | None) -> None:
    """Decode every image of the data set PATH, a zip or a folder; print a summary and all problems.

    The exit code is 0 if the data set could be read, even with problems, and 2 if it could not. Scripts should use
    --json: "ready" and "ready_with_labels" tell whether train.py accepts the data set, without and with --cond;
    "problems" is a list of objects with kind, blocks ("training", "labels" or null), count, message and files. The
    other keys: path, kind, phantom, num_images, num_bytes, num_groups, num_unlabeled (also under its old name
    num_unlabelled), label_kind, classes (index, name, num_images, share, num_groups), folders, num_mixed_groups,
    mixed_groups (groups with different labels), sizes, modes, num_duplicates, duplicates, other_files, source.
    """
    images, metadata_fault = open_for_inspection(path)
    with Progress(len(images), "images") as progress:
        measures = measure(images, workers=workers or usable_cores(), on_image=progress.advance)
    inspection = summarize(images, measures, metadata_fault)
    sheets = [] if sheet is None else write_sheets(images, measures.usable, sheet)
    if as_json:
        found = asdict(inspection)
        click.echo(json.dumps({**found, "num_unlabelled": found["num_unlabeled"]}, indent=1))
        return
    for line in describe(inspection):
        click.echo(line)
    if sheet is not None:
        click.echo(f"\n{plural(len(sheets), 'sheet')} in {sheet}: {shorten([path.name for path in sheets], 20)}")


def describe(found: Inspection) -> Iterator[str]:
    """Yield an inspection as text lines."""
    yield f"{found.path}: {found.kind}, {plural(found.num_images, 'image')}, {found.num_bytes / 1e6:.1f} MB"
    if found.phantom:
        yield _PHANTOM_LINE
    yield ""
    yield from format_table(list(_facts(found)), left=(0, 1))
    if found.classes:
        yield ""
        if found.label_kind == "lists":
            yield f"labels are lists of numbers; an image is of a class if its number is above {PRESENT}:"
        yield from format_table([["class", "name", "images", "share", "groups"], *(
            [str(one.index), one.name, str(one.num_images), percent(one.num_images, found.num_images),
             str(one.num_groups)] for one in found.classes)], left=(1,))
    yield ""
    for problem in found.problems:
        yield f"{'PROBLEM' if problem.blocks == TRAINING else 'problem'}: {problem.kind}: {problem.message}"
        yield from (f"    {name}" for name in problem.files[:5])
        if problem.files[5:]:
            yield f"    ... ({problem.count} in total; --json lists more)"
    yield f"ready for training: {'yes' if found.ready else 'no'}"
    why = " (there are none)" if found.label_kind is None and not found.ready_with_labels else ""
    yield f"ready for training with labels: {'yes' if found.ready_with_labels else 'no'}{why}"


def _facts(found: Inspection) -> Iterator[list[str]]:
    yield ["sizes", _counts(found.sizes)]
    yield ["modes", _counts(found.modes)]
    mixed = f"; {found.num_mixed_groups} with different labels ({shorten(found.mixed_groups)})"
    yield ["groups", f"{found.num_groups}{mixed if found.num_mixed_groups else ''}"]
    yield ["without a label", str(found.num_unlabeled)]
    permission = may_be_redistributed(found.source)
    if permission is not None:
        yield ["redistribution", next(text for text, value in _REDISTRIBUTION.items() if value is permission)]
    yield ["duplicates", f"{plural(found.num_duplicates, 'image')} identical to an earlier one"]
    if found.folders:
        yield ["folders", _counts({name or ".": count for name, count in found.folders.items()})]
    if found.other_files:
        yield ["other files", shorten(found.other_files)]


def _counts(counts: dict[str, int]) -> str:
    texts = [name if len(counts) == 1 else f"{name} ({count})" for name, count in counts.items()]
    return shorten(texts, 8) or "none"


@click.command("split", short_help="Split a data set by patients or lesions.")
@click.argument("path", type=UserPath(path_type=Path))
@click.option("--parts", metavar="NAME:SHARE,...",
              help="Parts and their shares of the images, which must sum to 1: train:0.8,val:0.1,test:0.1. Fractions "
              "such as 1/3 are also accepted.")
@click.option("--institutions", type=click.IntRange(min=1), metavar="COUNT",
              help="Divide the first of the --parts, or the whole data set without --parts, among COUNT institutions.")
@click.option("--sizes", metavar="SHARE,...",
              help="Shares of the institutions, such as 0.06,0.33,0.61. [default: equal shares]")
@click.option("--skew", type=UserPath(), metavar="CLASS=SHARE,...|FILE",
              help="Share of a class among the images of each institution, instead of the same share in all: "
              "'melanoma=0.3,0.05,*'. * takes the rest of the class; semicolons separate classes. Classes not named "
              "here fill up the institutions in proportion. May also be a file with one class per line.")
@click.option("--seed", type=click.IntRange(min=0), default=SplitRequest.seed, show_default=True, metavar="INT",
              help="Random seed.")
@click.option("--dest", metavar="FOLDER", type=UserPath(path_type=Path),
              help="Folder for the parts. [default: the folder of the data set]")
@click.option("--allow-missing", is_flag=True,
              help="Allow a part to lack a class that has fewer groups than there are parts.")
@click.option("--leave-out", is_flag=True,
              help="With --skew: use fewer images if the shares need more images of a class than there are.")
@click.option("--force", is_flag=True, help="Replace existing files.")
def split_command(path: Path, dest: Path | None, force: bool, **options) -> None:
    """Divide the data set PATH into parts so that no group (patient or lesion) is in more than one part.

    Groups that share an identical or horizontally flipped image also stay together. All parts have the same proportions
    of classes, as closely as whole groups allow; in labels that are lists, each number above 0.5 counts as a class.
    Writes NAME-PART.zip for each part, with the images copied byte for byte, and NAME-split.json, which lists the
    groups and files of each part with their sha256. After an error no file is left.

    The same seed gives the same parts even if --institutions divides the first one: adding --institutions=3 to
    --parts=train:0.9,test:0.1 divides the same train part and leaves the test part as it was.
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
    """Yield the sizes of the parts, as text lines."""
    if is_phantom:
        yield _PHANTOM_LINE
    if assignment.num_linked:
        yield f"{plural(assignment.num_linked, 'group')} joined with others because they share identical images"
    yield from format_table(list(_reached_rows(assignment, request)))
    if request.skew is not None:
        yield ""
        yield "share of the class within the institution: actual (requested)"
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
    yield ["target", "", *aimed_texts, *[""] * (2 * len(names) - len(aimed_texts))]
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


@click.command("phantom", short_help="Render drawings of skin lesions, for tests.")
@click.option("--dest", required=True, type=UserPath(), metavar="PATH",
              help="Data set to write: a .zip file, or a new folder.")
@click.option("--count", type=int, default=PhantomOptions.count, show_default=True, metavar="INT",
              help="Number of images.")
@click.option("--resolution", default=f"{PhantomOptions.resolution}x{PhantomOptions.resolution}", show_default=True,
              metavar="WxH",
              help=f"Size of the images: square, a power of two from {MIN_RESOLUTION} to {MAX_SIDE}.")
@click.option("--classes", default=",".join(f"{name}:{share:g}" for name, share in DEFAULT_CLASSES.items()),
              show_default=True, metavar="NAME:SHARE,...",
              help="Classes and their shares of the images, which must sum to 1; counts are exact to one image.")
@click.option("--seed", type=int, default=PhantomOptions.seed, show_default=True, metavar="INT",
              help="Random seed; equal seeds give equal images.")
@click.option("--bias", multiple=True, metavar="NAME=P:P:...", help="Probability of an artifact in each class, in the "
              f"order of --classes; may be repeated. Names: {', '.join(ARTIFACT_RATES)}.")
@click.option("--workers", type=int, metavar="INT", help=_WORKERS_HELP)
def phantom_command(dest: str, count: int, resolution: str, classes: str, seed: int, bias: tuple[str, ...],
                    workers: int | None) -> None:
    """Render drawings of skin lesions with known attributes, for tests and demonstrations.

    Phantoms are not patient data, and dataset.json marks them as phantoms. The class shows in the border, the symmetry
    and the colors of a lesion; benign, melanoma, bkl, bcc, akiec, vasc, df and their synonyms have a typical look, and
    any other name gets a look of its own. All other attributes are independent of the class unless --bias is given.
    phantom.csv in the data set lists them for each image. Some patients have two or three images of one lesion.

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
