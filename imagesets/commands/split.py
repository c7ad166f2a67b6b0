"""The command `split`: divide a data set by patient or lesion."""

from collections.abc import Iterator
from pathlib import Path

import click

from dnnlib.cli import UserPath
from dnnlib.progress import Progress
from imagesets.pixel_hashes import read_pixel_hashes
from imagesets.reader import ImageSet
from imagesets.split import Assignment, assign, read_digests
from imagesets.splitting.deal import FIRST_CLASS, SIZE
from imagesets.splitting.files import SplitPaths, write_split
from imagesets.splitting.request import SplitRequest, create_request
from imagesets.text_table import format_table, percent, plural, shorten
from imagesets.workers import usable_cores

_HELP = {
    "parts": "Parts and their shares of the images, which sum to 1: train:0.8,val:0.1,test:0.1. Fractions (1/3) are "
             "understood, too.",
    "institutions": "Divide the first of the --parts, or the whole set without --parts, among so many institutions.",
    "sizes": "Shares of the institutions: 0.06,0.33,0.61. Without it they are equal.",
    "skew": "Share of a class within each institution's images, instead of alike in all: 'melanoma=0.3,0.05,*', more "
            "classes after a semicolon; * takes what is left of the class. Other classes fill up in proportion. Also a "
            "file with a class a line.",
    "seed": "Another seed gives another split.",
    "dest": "Folder for the parts; beside the data set without it.",
    "allow_missing": "Let parts lack a class that has fewer groups than there are parts.",
    "leave_out": "With --skew: use fewer images, where the shares need more of a class than there are.",
    "force": "Replace parts that exist.",
}


@click.command("split")
@click.argument("path", type=UserPath(path_type=Path))
@click.option("--parts", metavar="NAME:SHARE,...", help=_HELP["parts"])
@click.option("--institutions", type=click.IntRange(min=1), metavar="COUNT", help=_HELP["institutions"])
@click.option("--sizes", metavar="SHARE,...", help=_HELP["sizes"])
@click.option("--skew", type=UserPath(), metavar="CLASS=SHARE,...|FILE", help=_HELP["skew"])
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help=_HELP["seed"])
@click.option("--dest", metavar="FOLDER", type=UserPath(path_type=Path), help=_HELP["dest"])
@click.option("--allow-missing", is_flag=True, help=_HELP["allow_missing"])
@click.option("--leave-out", is_flag=True, help=_HELP["leave_out"])
@click.option("--force", is_flag=True, help=_HELP["force"])
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
