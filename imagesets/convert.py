"""Convert an archive of images into a data set: kept and dropped images add up, and nothing is left half done."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from dnnlib.progress import Progress
from imagesets.conversion.linking import link
from imagesets.conversion.options import ConvertOptions
from imagesets.conversion.report import ConvertSummary, build_report, check_report, summarise, write_report
from imagesets.conversion.selection import Labelling, LabelsUnclear, Selection, select
from imagesets.conversion.survey import read_ranges, survey
from imagesets.conversion.tally import TOO_SMALL, Tally
from imagesets.labels.tables import read_groups, read_table
from imagesets.pixels.decode import BEYOND_DEPTH, BadImage, PixelSpec, decode, decode_array
from imagesets.pixels.depth import MAX_DEPTH, Values
from imagesets.resolutions import RESOLUTIONS, is_resolution
from imagesets.sources.files import refuse_doubtful_folders
from imagesets.sources.opening import open_sources
from imagesets.sources.source import Loader, Source
from imagesets.workers import ordered_map, usable_cores
from imagesets.writer import ImageSetWriter

_CHUNK_BYTES = 1 << 20  # of pixels that travel together


@dataclass(frozen=True, kw_only=True)
class Converted:
    """digest: sha256 of the source's bytes; reason: why there is no png; detail: see BadImage"""
    digest: bytes = b""
    png: bytes = b""
    pixel_hash: str | None = None
    size: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    values: Values | None = None
    reason: str | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class ConvertImage:
    """What is done to each image, in any process."""
    load: Loader
    spec: PixelSpec

    def __call__(self, item: Any) -> Converted:
        try:
            image = self.load(item)
            result = decode(image, self.spec) if isinstance(image, bytes) else decode_array(image, self.spec)
        except BadImage as error:
            return Converted(reason=error.reason, detail=error.detail)
        return Converted(digest=hashlib.sha256(image).digest(), png=result.png, size=(result.width, result.height),
                         pixel_hash=result.pixel_hash, notes=tuple(result.notes), values=result.values)


def convert(source: str | os.PathLike | Sequence[str | os.PathLike], dest: str | os.PathLike, *,
            report: str | os.PathLike | None = None, workers: int | None = None, stream: IO[str] | None = None,
            **options) -> ConvertSummary:
    """Write the images of `source`, in the order of their names, to the data set `dest`.

    source:   a path, or several folders and zips of one set, which are read one after the other
    report:   JSON file that lists by name what became of the images, written also when the conversion is refused
              for unreadable or unlabelled ones
    workers:  processes, None for one a core; the result does not depend on them
    stream:   where progress is shown, None for standard error
    options:  fields of ConvertOptions

    Raises UserError, and leaves nothing at dest, for sources, labels and options that do not fit, when more than
    options.max_bad of the images are unreadable, and when dest cannot be written.
    """
    options = ConvertOptions(**options)
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"--workers={workers}; expected at least 1")
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not sources:
        raise UserError("no source is given; expected a folder, a zip, or another archive of images")
    for path in sources:
        _check_paths(Path(path), Path(dest), report)
    writer = ImageSetWriter(dest)
    opened = open_sources(sources, split=options.split, include=options.include, exclude=options.exclude)
    selection = _select(opened, options, report)
    num_wanted = int(selection.wanted.sum())
    tally = Tally(len(opened))
    with writer:
        with Progress(num_wanted, "headers", stream=stream) as progress:
            spec, deep = survey(opened, selection.wanted, options, workers, progress)
        if deep.any():
            with Progress(int(deep.sum()), "values of 32-bit and float images", stream=stream) as progress:
                ranges = read_ranges(opened, deep, workers, progress)
            spec = replace(spec, depth=replace(spec.depth, ranges=ranges))
        with Progress(num_wanted, "images", stream=stream) as progress:
            _convert_all(opened, selection, spec, writer, tally, workers, progress)
        linked = link(selection, tally)
        details = build_report(opened, selection, tally, linked, spec)
        _refuse_bad(tally, num_wanted, options, report, details)
        writer.classes = selection.classes
        writer.set_groups(linked.groups)
        writer.source.update(_describe_origin(opened, options, tally, details))
        write_report(report, details)
    return summarise(Path(dest), opened, selection, details)


def _label(opened: Source, options: ConvertOptions) -> Labelling:
    if options.folders is not None and not (opened.has_files and not all(
            part.is_ready for part in opened.parts or [opened])):
        raise UserError(f"--folders: {opened.name} ({opened.kind}) brings its own labels; leave the option out")
    if options.labels is None:
        refuse_doubtful_folders(opened, are_classes=options.folders is not None)
        labelling = Labelling.of_source(opened, ignore_folders=options.folders == "ignore")
    else:
        table = read_table(options.labels, id_column=options.id_column, label_column=options.label_column,
                           group_column=options.group_column if options.groups is None else None)
        labelling = Labelling.of_table(opened, table, all_meant="*" in options.include)
    if options.groups is None:
        return labelling
    table = read_groups(options.groups, id_column=options.id_column, group_column=options.group_column,
                        beside=labelling.table)
    return labelling.with_groups(opened, table)


def _select(opened: Source, options: ConvertOptions, report: str | os.PathLike | None) -> Selection:
    try:
        return select(opened, _label(opened, options), classes=options.classes, merge=options.merge,
                      unlabelled=options.unlabelled, max_images=options.max_images, seed=options.seed or 0)
    except LabelsUnclear as error:
        write_report(report, {"error": str(error), "found": len(opened)} | error.details)
        raise


def _convert_all(opened: Source, selection: Selection, spec: PixelSpec, writer: ImageSetWriter, tally: Tally,
                 workers: int, progress: Progress) -> None:
    indices = np.flatnonzero(selection.wanted).tolist()
    for index, result in zip(indices, _results(opened, selection, spec, workers), strict=True):
        progress.advance()
        if result.reason is not None:
            tally.add_bad(index, result.reason, result.detail)
            continue
        width, height = result.size
        if width != height or not is_resolution(width) or width != (tally.side or width):
            raise UserError(f"{opened.names[index]} became {width}x{height}; expected squares of one size with a side "
                            f"of {RESOLUTIONS}: give --resolution, for example --resolution=256x256")
        writer.add(result.png, selection.label(index), pixel_hash=result.pixel_hash)
        tally.add_kept(index, width, result.digest, result.notes, result.values)


def _results(opened: Source, selection: Selection, spec: PixelSpec, workers: int) -> Iterator[Converted]:
    side = spec.width or (opened.shape[0] if opened.shape else 1024)
    chunk = max(1, min(32, _CHUNK_BYTES // (side * side * 3)))
    function = ConvertImage(load=opened.load, spec=spec)
    with closing(ordered_map(function, opened.items(selection.wanted), workers, chunk=chunk)) as results:
        yield from results


def _refuse_bad(tally: Tally, num_wanted: int, options: ConvertOptions, report: str | os.PathLike | None,
                details: dict[str, Any]) -> None:
    """Raise UserError, after writing the report, when too many images are unreadable."""
    unreadable = tally.unreadable()
    count = sum(unreadable.values())
    if count <= options.max_bad * num_wanted and tally.kept:
        return
    advice = f"see {report}" if report is not None else "list them by --report=FILE"
    if count:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in unreadable.items())
        limit = f"more than --max-bad={options.max_bad:.3g} allows" if tally.kept else "none is left"
        if BEYOND_DEPTH in unreadable:
            larger = "choose a larger one or leave it out" if options.depth < MAX_DEPTH else "leave it out"
            advice = f"--depth={options.depth} takes 0 to {(1 << options.depth) - 1}: {larger}, or {advice}"
        example = next(iter(_details(details["dropped"])), "")
        message = f"{count} of {num_wanted} images are unreadable ({reasons}), {limit}{example}; {advice}"
    else:
        message = (f"all {num_wanted} images are {TOO_SMALL} to {options.width}x{options.height}; choose a smaller "
                   "--resolution")
    write_report(report, {"error": message} | details)
    raise UserError(message)


def _details(dropped: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is to be said of single images, such as how large they are."""
    for entry in dropped.values():
        yield from (f"; {name} {detail}" for name, detail in entry.get("details", {}).items())


def _describe_origin(opened: Source, options: ConvertOptions, tally: Tally, details: dict[str, Any]) -> dict[str, Any]:
    """Return what the data set says of itself; the same on every machine and for any number of workers."""
    origin = {"tool": "dataset_tool.py", "kind": opened.kind, "name": opened.name, "options": options.record(),
              "found": details["found"], "kept": details["kept"],
              "dropped": {reason: entry["count"] for reason, entry in details["dropped"].items()},
              "converted": {note: entry["count"] for note, entry in details["converted"].items()},
              "decoder_downscaling": any(note == "decoder downscaling" for note, _ in tally.notes()),
              "images_sha256": tally.content_hash}
    if details["values"]:
        origin["values"] = details["values"]
    if "sources" in details:
        origin["sources"] = details["sources"]
    if options.labels is not None:
        origin["labels_sha256"] = sha256_of(options.labels)
    if options.groups is not None:
        origin["groups_sha256"] = sha256_of(options.groups)
    if opened.origin:
        origin["origin"] = dict(opened.origin)
    if opened.origin.get("phantom"):
        origin["phantom"] = opened.origin["phantom"]  # converted phantoms are never taken for data
    return origin


def _check_paths(source: Path, dest: Path, report: str | os.PathLike | None) -> None:
    if source.exists() and dest.exists() and source.samefile(dest):
        raise UserError(f"--dest={dest} is the source itself; choose another name")
    if report is not None:
        check_report(Path(report))
        if Path(report).absolute() == dest.absolute():
            raise UserError(f"--report={report} is --dest; choose another name")
