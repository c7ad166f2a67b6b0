"""The command `inspect`: look at a data set."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from dnnlib.cli import UserPath
from dnnlib.progress import Progress
from imagesets.class_columns import PRESENT
from imagesets.inspecting.measure import measure
from imagesets.inspecting.problems import TRAINING
from imagesets.inspecting.sheet import write_sheets
from imagesets.inspection import Inspection, open_for_inspection, summarize
from imagesets.text_table import format_table, percent, plural, shorten
from imagesets.workers import usable_cores


@click.command("inspect")
@click.argument("path", type=UserPath(path_type=Path))
@click.option("--sheet", metavar="FOLDER", type=UserPath(path_type=Path),
              help="Write a contact sheet for each class there: up to 100 images, of as many groups as possible.")
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
        yield from format_table(list(_class_rows(found)), left=(1,))
    yield ""
    for problem in found.problems:
        yield f"{'PROBLEM' if problem.blocks == TRAINING else 'problem'}: {problem.kind}: {problem.message}"
        yield from (f"    {name}" for name in problem.files[:5])
        if problem.files[5:]:
            yield f"    ... (all with --json; {problem.count} in total)"
    yield f"ready for training: {'yes' if found.ready else 'no'}"
    yield f"ready for training with labels: {'yes' if found.ready_with_labels else 'no'}{_why_no_labels(found)}"


def _why_no_labels(found: Inspection) -> str:
    return " (there are none)" if found.label_kind is None and not found.ready_with_labels else ""


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


def _counts(counts: dict[str, int], limit: int = 8) -> str:
    texts = [name if len(counts) == 1 else f"{name} ({count})" for name, count in counts.items()]
    return shorten(texts, limit) or "none"


def _class_rows(found: Inspection) -> Iterator[list[str]]:
    yield ["class", "name", "images", "share", "groups"]
    for one in found.classes:
        yield [str(one.index), one.name, str(one.num_images), percent(one.num_images, found.num_images),
               str(one.num_groups)]
