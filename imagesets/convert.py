"""Convert an archive of images into a data set: kept and dropped images add up, and no half-written file is left.

Options are checked before any image is read. Then headers are read, as far as needed to know whether there is color and
what size the images will have; then the images, by several processes.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from dnnlib.progress import Progress
from dnnlib.workers import ordered_map, usable_cores
from imagesets.classes import is_named
from imagesets.conversion_report import (
    Tally,
    build_report,
    describe_conversion,
    link,
    write_report,
)
from imagesets.decode import (
    TOO_SMALL,
    Decoded,
    Header,
    decode,
    decode_array,
    may_need_range,
    probe,
    probe_range,
)
from imagesets.folders import Loader, Source, labels_of_one_folder, refuse_doubtful_folders
from imagesets.metadata import may_be_redistributed
from imagesets.pixel_formats import BEYOND_DEPTH, MAX_DEPTH, BadImage, Depth, widen
from imagesets.resize import RESOLUTIONS, PixelSpec, check_resolution, is_resolution, nearest_resolution
from imagesets.selection import Labeling, LabelsUnclear, Selection, select
from imagesets.sources import open_sources
from imagesets.tables import read_groups, read_table
from imagesets.writer import ImageSetWriter, check_parent

FOLDERS = ("classes", "ignore")
DEFAULT_SEED = 0  # for --max-images
_HEADER_BYTES = 1 << 16  # where most headers end
_HEADERS = 32  # that a worker takes at a time
_CHUNK_BYTES = 1 << 20  # of pixels that a worker takes at a time


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What convert() should do; the fields are named like the options of the command, None means "not given".

    include, exclude: patterns of file names
    folders:       names of subfolders are "classes", or mean nothing ("ignore"); None: classes if they look like it
    unlabeled:     "error", "drop" or "keep"
    seed:          random seed for max_images
    transform:     None stretches, "center-crop" crops to a square, "center-crop-wide" crops and pads to a square
    width, height: of the result (for center-crop-wide, without the padding); both or none
    max_bad:       share of images, 0 to 1, that may be unreadable
    redistribution: whether the images may be passed on to anyone; None keeps what the source records
    exact:         decode JPEG files at full size
    depth:         bits per value of images with more than 8 bits

    Raises UserError for values that do not fit.
    """
    split: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    labels: str | None = None
    groups: str | None = None
    id_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    folders: str | None = None
    classes: str | None = None
    merge: str | None = None
    unlabeled: str = "error"
    max_images: int | None = None
    seed: int | None = None
    transform: str | None = None
    width: int | None = None
    height: int | None = None
    resize_filter: str = "lanczos"
    exact: bool = False
    depth: int | None = None
    max_bad: float = 0.01
    redistribution: bool | None = None

    def __post_init__(self):
        if not 0 <= self.max_bad <= 1:
            raise UserError(f"--max-bad={self.max_bad}; expected a share from 0 to 1, or from 0% to 100%")
        for name in ("include", "exclude"):
            if not all(getattr(self, name)):
                raise UserError(f'--{name} is empty; expected a pattern of file names, such as --{name}="*.png"')
        tables = {"id_column": self.labels or self.groups, "label_column": self.labels,
                  "group_column": self.labels or self.groups}
        for name, table in tables.items():
            if getattr(self, name) is not None and table is None:
                raise UserError(f"--{name.replace('_', '-')} names a column, but there is no table; add --labels=FILE")
        if self.seed is not None and self.max_images is None:
            raise UserError(f"--seed={self.seed} is the random seed of --max-images, which is not given; expected both "
                            "or neither")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError(f"--seed={self.seed}; expected a number from 0 to {2**32 - 1}")
        if self.folders is not None and self.folders not in FOLDERS:
            raise UserError(f"--folders={self.folders}; expected {' or '.join(FOLDERS)}")
        if self.folders is not None and self.labels is not None:
            raise UserError(f"--folders={self.folders} and --labels are both given; expected only one of the two, as "
                            "labels from a table replace those from folders")
        if (self.width is None) != (self.height is None):
            missing = "height" if self.height is None else "width"
            raise UserError(f"--{missing} is missing; expected both, or --resolution=WIDTHxHEIGHT")
        if self.width is not None:
            check_resolution(self.width, self.height, self.transform)
        self.spec(channels=3)  # checks the rest

    @property
    def sample_seed(self) -> int:
        return DEFAULT_SEED if self.seed is None else self.seed

    def spec(self, channels: int) -> PixelSpec:
        """Return the form that each image is converted to."""
        return PixelSpec(width=self.width, height=self.height, transform=self.transform, channels=channels,
                         resize_filter=self.resize_filter, exact=self.exact, depth=Depth(bits=self.depth, ranges={}))

    def record(self) -> dict[str, Any]:
        """Return the options as dataset.json records them: the same on every machine, so without paths."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("labels", "groups"):
            if given[name] is not None:
                given[name] = Path(given[name]).name
        if self.max_images is not None:
            given["seed"] = self.sample_seed
        return {name: value for name, value in given.items() if value not in (None, (), [])}


def parse_share(text: str) -> float:
    """Return 0.01 of "0.01" or "1%"."""
    number = text.strip()
    try:
        return float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        raise UserError(f"--max-bad={text}; expected a share from 0 to 1, or from 0% to 100%") from None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done: the report, as --report writes it, and a summary of it as text lines."""
    report: dict[str, Any]
    lines: list[str]


def convert(source: str | os.PathLike | Sequence[str | os.PathLike], dest: str | os.PathLike, *,
            report: str | os.PathLike | None = None, workers: int | None = None, stream: IO[str] | None = None,
            **options) -> Conversion:
    """Write the images of `source`, in the order of their names, to the data set `dest`.

    source:   a path, or several folders and zips of one set, which are read one after the other
    report:   JSON file that lists what became of the images, also written when the conversion is refused because
              of unreadable or unlabeled ones
    workers:  processes, None for one per CPU core; the result does not depend on them
    stream:   where progress is shown, None for standard error
    options:  fields of ConvertOptions

    Raises UserError, and writes nothing to dest, for sources, labels and options that do not fit, when more than
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
    return Conversion(report=details, lines=list(describe_conversion(Path(dest), opened, selection, details)))


def _label(opened: Source, options: ConvertOptions) -> Labeling:
    if options.folders is not None and not (opened.has_files and not all(
            part.is_ready for part in opened.parts or [opened])):
        raise UserError(f"--folders: {opened.name} ({opened.kind}) has its own labels; leave the option out")
    if options.labels is None:
        refuse_doubtful_folders(opened, are_classes=options.folders is not None)
        labeling = Labeling.of_source(opened, ignore_folders=options.folders == "ignore")
        if labeling.labels is None and options.folders != "ignore":
            labels, classes = labels_of_one_folder(opened, lambda name: is_named(name, options.classes, options.merge))
            labeling = replace(labeling, labels=labels, classes=classes)
    else:
        table = read_table(options.labels, id_column=options.id_column, label_column=options.label_column,
                           group_column=options.group_column if options.groups is None else None)
        labeling = Labeling.of_table(opened, table, all_meant="*" in options.include)
    if options.groups is None:
        return labeling
    table = read_groups(options.groups, id_column=options.id_column, group_column=options.group_column,
                        beside=labeling.table)
    return labeling.with_groups(opened, table)


def _select(opened: Source, options: ConvertOptions, report: str | os.PathLike | None) -> Selection:
    try:
        return select(opened, _label(opened, options), classes=options.classes, merge=options.merge,
                      unlabeled=options.unlabeled, max_images=options.max_images, seed=options.sample_seed)
    except LabelsUnclear as error:
        write_report(report, {"error": str(error), "found": len(opened)} | error.details)
        raise


def _convert_all(opened: Source, selection: Selection, spec: PixelSpec, writer: ImageSetWriter, tally: Tally,
                 workers: int, progress: Progress) -> None:
    side = spec.width or (opened.shape[0] if opened.shape else 1024)
    chunk = max(1, min(32, _CHUNK_BYTES // (side * side * 3)))
    function = partial(_convert_one, opened.load, spec)
    with closing(ordered_map(function, opened.items(selection.wanted), workers, chunk=chunk)) as results:
        for index, (digest, result) in zip(np.flatnonzero(selection.wanted).tolist(), results, strict=True):
            progress.advance()
            if isinstance(result, BadImage):
                tally.add_bad(index, result.reason, result.detail)
                continue
            width, height = result.width, result.height
            if width != height or not is_resolution(width) or width != (tally.side or width):
                raise UserError(f"{opened.names[index]} became {width}x{height}; expected squares of one size with a "
                                f"side of {RESOLUTIONS}: give --resolution, for example --resolution=256x256")
            writer.add(result.png, selection.label(index), pixel_hash=result.pixel_hash)
            tally.add_kept(index, width, digest, result.notes, result.values)


def _convert_one(load: Loader, spec: PixelSpec, item: Any) -> tuple[bytes, Decoded | BadImage]:
    """Return the sha256 of the source's bytes, and the converted image or why there is none; in any process."""
    try:
        image = load(item)
        result = decode(image, spec) if isinstance(image, bytes) else decode_array(image, spec)
    except BadImage as error:
        return b"", error.with_traceback(None)
    return hashlib.sha256(image).digest(), result


def _refuse_bad(tally: Tally, num_wanted: int, options: ConvertOptions, report: str | os.PathLike | None,
                details: dict[str, Any]) -> None:
    """Raise UserError, after writing the report, when too many images are unreadable."""
    unreadable = tally.unreadable()
    count = sum(unreadable.values())
    if count <= options.max_bad * num_wanted and tally.kept:
        return
    advice = f"see {report}" if report is not None else "list them with --report=FILE"
    if count:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in unreadable.items())
        limit = f"more than --max-bad={options.max_bad:.3g} allows" if tally.kept else "none is left"
        if BEYOND_DEPTH in unreadable:
            larger = "choose a larger one or leave it out" if options.depth < MAX_DEPTH else "leave it out"
            advice = f"--depth={options.depth} takes 0 to {(1 << options.depth) - 1}: {larger}, or {advice}"
        example = next((f"; {name} {detail}" for entry in details["dropped"].values()
                        for name, detail in entry.get("details", {}).items()), "")
        message = f"{count} of {num_wanted} images cannot be read ({reasons}), {limit}{example}; {advice}"
    else:
        message = (f"all {num_wanted} images are {TOO_SMALL} to {options.width}x{options.height}; choose a smaller "
                   "--resolution")
    write_report(report, {"error": message} | details)
    raise UserError(message)


def _describe_origin(opened: Source, options: ConvertOptions, tally: Tally, details: dict[str, Any]) -> dict[str, Any]:
    """Return the `source` of dataset.json; the same on every machine and for any number of workers."""
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
        origin["phantom"] = opened.origin["phantom"]  # converted phantoms remain phantoms
    permission = may_be_redistributed(origin) if options.redistribution is None else options.redistribution
    if permission is not None:
        origin["redistribution"] = permission
    return origin


def _check_paths(source: Path, dest: Path, report: str | os.PathLike | None) -> None:
    if source.exists() and dest.exists() and source.samefile(dest):
        raise UserError(f"--dest={dest} is the source itself; choose another name")
    if report is not None:
        if Path(report).is_dir():
            raise UserError(f"--report={report} is a folder; expected a file name such as report.json")
        check_parent("--report", Path(report))
        if Path(report).absolute() == dest.absolute():
            raise UserError(f"--report={report} is --dest; choose another name")


def survey(source: Source, wanted: np.ndarray, options: ConvertOptions, workers: int,
           progress: Progress) -> tuple[PixelSpec, np.ndarray]:
    """Return how to convert the wanted images, and which of them need the range of values of the whole data set.

    wanted: bool [N]

    The images become RGB if any header has color, else gray. The second result is bool [N]: images for read_ranges.
    Stops at the first image with color if the size of the result is given; of the files after it, reads only those
    whose names allow such values.
    Raises UserError when no size is given and the images differ, or are not square with a power of two a side.
    """
    needs_size = options.width is None
    channels, first = 1, None
    deep = np.zeros(len(source), dtype=bool)
    with closing(_headers(source, wanted, workers, progress)) as headers:
        for index, header in headers:
            channels = 3 if header.channels > 1 else channels
            deep[index] = header.needs_range
            if needs_size:
                size = header.width, header.height
                if options.transform is not None:
                    size = (min(size),) * 2
                name = source.names[index]
                first = first or (name, size)
                if size != first[1]:
                    sizes = " but ".join(f"{name} is {size[0]}x{size[1]}" for name, size in (first, (name, size)))
                    near = nearest_resolution(min(*first[1], *size))
                    raise UserError(f"images differ in size: {sizes}; expected one size: give --resolution={near}x"
                                    f"{near}, with --transform=center-crop if they should not be stretched")
            elif channels == 3:
                rest = wanted & (np.arange(len(source)) > index)
                break
        else:
            rest = np.zeros(len(source), dtype=bool)
    if first is not None:
        name, (width, height) = first
        if width != height or not is_resolution(width):
            near = nearest_resolution(min(width, height))
            raise UserError(f"images are {width}x{height} ({name} for example); expected squares with a side of "
                            f"{RESOLUTIONS}: give --transform=center-crop --resolution={near}x{near}")
    if rest.any() and source.shape is None:
        rest &= np.array([may_need_range(name) for name in source.names])
        with closing(_headers(source, rest, workers, progress)) as headers:
            for index, header in headers:
                deep[index] = header.needs_range
    return options.spec(channels), deep


def read_ranges(source: Source, deep: np.ndarray, workers: int, progress: Progress) -> dict[str, tuple[float, float]]:
    """Return the smallest and the largest value of all readable images of each kind.

    deep: bool [N], from survey
    """
    ranges: dict[str, tuple[float, float]] = {}
    with closing(ordered_map(partial(_read_range, source.load), source.items(deep), workers)) as results:
        for found in results:
            progress.advance()
            if found is not None:
                widen(ranges, *found)
    return ranges


def _headers(source: Source, wanted: np.ndarray, workers: int, progress: Progress) -> Iterator[tuple[int, Header]]:
    """Yield the index and header of each image that can be read."""
    indices = np.flatnonzero(wanted)
    if source.shape is not None:
        yield indices[0], Header(*source.shape)
        return
    read = ordered_map(partial(_read_header, source.load), source.items(wanted), workers, chunk=_HEADERS)
    with closing(read):
        for index, header in zip(indices, read):
            progress.advance()
            if header is not None:
                yield index, header


def _read_header(load: Loader, item: Any) -> Header | None:
    """Return the header of an image, None if it cannot be read."""
    for limit in (_HEADER_BYTES, None):
        try:
            return probe(load(item, limit))
        except BadImage:
            pass  # If the whole file is bad too, the conversion reports it.
    return None


def _read_range(load: Loader, item: Any) -> tuple[str, float, float] | None:
    """Return the kind and the range of the values of an image (see probe_range), None if it cannot be read."""
    try:
        return probe_range(load(item))
    except BadImage:
        return None
