"""The options of a conversion on the command line."""

from collections.abc import Callable, Sequence
from typing import Any

import click

from dnnlib.cli import UserError, UserPath
from imagesets.conversion.options import FILTERS, FOLDERS, TRANSFORMS, parse_resolution, parse_share
from imagesets.conversion.selection import UNLABELLED
from imagesets.convert import convert
from imagesets.pixels.depth import MAX_DEPTH, MIN_DEPTH
from imagesets.sources.opening import SPLITS

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
    click.option("--resize-filter", type=click.Choice(FILTERS), default="lanczos", show_default=True),
    click.option("--max-images", type=int, metavar="INT",
                 help="Convert a random sample of at most that many images: of each class its share."),
    click.option("--seed", type=int, metavar="INT", help="Random seed of --max-images. [default: 0]"),
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
    click.option("--unlabelled", type=click.Choice(UNLABELLED), default="error", show_default=True,
                 help="What to do when some images have no label."),
    click.option("--split", type=click.Choice(SPLITS), help="Part of a MedMNIST or CIFAR-10 file; train if not given."),
    click.option("--max-bad", default="1%", show_default=True, metavar="SHARE",
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
    summary = convert(source, dest, width=width, height=height, max_bad=parse_share(max_bad), **options)
    for line in summary.lines:
        # Names of files can hold what a terminal's encoding cannot.
        click.echo(line.encode("ascii", "backslashreplace").decode())
