"""Write the parts of a split and its manifest, all of them or none."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from imagesets.deal import FIRST_CLASS, REST
from imagesets.metadata import METADATA, image_name, names_of_files
from imagesets.reader import ImageSet
from imagesets.split import LEFT_OUT, Assignment, SplitRequest
from imagesets.writer import ImageSetWriter, check_folder, fill_folder

MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SplitPaths:
    """The files that a split makes: a zip for each part, and the manifest."""

    parts: tuple[Path, ...]
    manifest: Path

    @classmethod
    def choose(cls, source: Path, request: SplitRequest, dest: str | os.PathLike | None) -> "SplitPaths":
        """Name the files in the folder `dest`, beside the source when None."""
        absolute = source.absolute()
        name = absolute.name.removesuffix(".zip")
        folder = absolute.parent if dest is None else Path(dest)
        return cls(parts=tuple(folder / f"{name}-{part.name}.zip" for part in request.final_parts),
                   manifest=folder / f"{name}-split.json")

    @property
    def folder(self) -> Path:
        return self.manifest.parent

    def check(self, *, force: bool) -> None:
        """Raise UserError when the folder cannot hold the files, or when a file exists and `force` is False."""
        check_folder(self.folder, "--dest", "the parts")
        for path in (*self.parts, self.manifest):
            if path.is_dir():
                raise UserError(f"{path} is a folder; expected to write a file of this name: choose another --dest")
            if path.exists() and not force:
                raise UserError(f"{path} exists; give --force to replace it, or choose another --dest")


def content_hash(images: ImageSet, digests: np.ndarray) -> str:
    """Return a sha256 of images, labels, classes and groups in order, independent of the path of the data set."""
    digest = hashlib.sha256(json.dumps(images.classes).encode())
    for row, group in enumerate(images.groups):
        digest.update(b"\n" + digests[row].tobytes() + json.dumps([images.label(row), group]).encode())
    return digest.hexdigest()


def write_split(images: ImageSet, digests: np.ndarray, assignment: Assignment, request: SplitRequest,
                paths: SplitPaths, pixel_hashes: Sequence[str] | None = None, *,
                on_image: Callable[[], None] = lambda: None) -> list[str]:
    """Write the parts and the manifest; return the names of other members, which went into no part.

    pixel_hashes:  of the images, recorded in the parts

    Images are copied byte for byte. Tables with a column "file" keep the rows of each part, with its new file names.
    Raises UserError when a file cannot be written; then no file is left.
    """
    # An image's position in its part gives its new name.
    places = np.empty(len(images), dtype=np.int64)
    for part in {*assignment.part_of.tolist()}:
        rows = np.flatnonzero(assignment.part_of == part)
        places[rows] = np.arange(len(rows))
    split = {"name": images.path.absolute().name, "content_hash": content_hash(images, digests)}
    tables = {name: table for name in images.other_members if name.lower().endswith(".csv")
              if (table := _read_table(images.read(name))) is not None}
    with fill_folder(paths.folder, paths.manifest.name) as folder:
        with _named_as(paths.folder, folder), ExitStack() as stack:
            writers = [stack.enter_context(ImageSetWriter(folder / path.name, classes=images.classes,
                                                          source=_source_of(images, split, request, part.name)))
                       for path, part in zip(paths.parts, request.final_parts, strict=True)]
            _copy_images(images, assignment, writers, pixel_hashes, on_image)
            for name, table in tables.items():
                for part, writer in enumerate(writers):
                    rows = np.flatnonzero(assignment.part_of == part)
                    renamed = {images.names[row]: image_name(places[row]) for row in rows}
                    writer.add_file(name, _filter_table(table, renamed))
        with open(folder / paths.manifest.name, "x", encoding="utf-8", newline="\n") as file:
            file.writelines(_manifest(images, digests, assignment, request, paths, places, split))
    return [name for name in images.other_members if name != METADATA and name not in tables]


@contextmanager
def _named_as(folder: Path, temporary: Path) -> Iterator[None]:
    """Let errors name the final folder, not the temporary one."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(folder))) from error


def _source_of(images: ImageSet, split: dict[str, str], request: SplitRequest, part: str) -> dict[str, Any]:
    """Return the origin that a part records: that of the whole data set, and which part it is."""
    record: dict[str, Any] = {"part": part, "seed": request.seed, "of": split}
    if "split" in images.source:
        record["before"] = images.source["split"]
    return {**images.source, "split": record}


def _copy_images(images: ImageSet, assignment: Assignment, writers: Sequence[ImageSetWriter],
                 pixel_hashes: Sequence[str] | None, on_image: Callable[[], None]) -> None:
    for row, name in enumerate(images.names):
        if assignment.part_of[row] != LEFT_OUT:
            # The reader puts an image without a group into one of its own name, which changes in the part.
            group = None if images.groups[row] == name else images.groups[row]
            writers[assignment.part_of[row]].add(images.read(name), images.label(row), group,
                                                 None if pixel_hashes is None else pixel_hashes[row])
        on_image()


def _read_table(data: bytes) -> list[list[str]] | None:
    """Return the rows of a table with a column "file", else None."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode())))
    except (UnicodeDecodeError, csv.Error):
        return None
    return rows if rows and "file" in rows[0] else None


def _filter_table(table: list[list[str]], renamed: dict[str, str]) -> bytes:
    """Return the table's rows of the given files, with and sorted by their new names."""
    column = table[0].index("file")
    whole = [row for row in table[1:] if len(row) > column]
    files = names_of_files([row[column] for row in whole], renamed)
    rows = [[*row[:column], renamed[file], *row[column + 1:]] for row, file in zip(whole, files) if file in renamed]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table[0], *sorted(rows, key=lambda row: row[column])])
    return text.getvalue().encode()


def _manifest(images: ImageSet, digests: np.ndarray, assignment: Assignment, request: SplitRequest, paths: SplitPaths,
              places: np.ndarray, split: dict[str, str]) -> Iterator[str]:
    """Yield JSON in pieces, one line per image, so that a million of them need little memory."""
    def describe(part: int, names: dict[str, str]) -> Iterator[str]:
        rows = np.flatnonzero(assignment.part_of == part)
        counts = dict(zip(assignment.classes, assignment.reached[part, FIRST_CLASS:].tolist(), strict=True))
        groups = dict.fromkeys(images.groups[row] for row in rows)
        yield "\n  " + json.dumps({**names, "num_images": len(rows), "num_groups": len(groups)})[:-1]
        yield f',\n   "classes": {json.dumps(counts)},\n   "groups": ['
        for index, group in enumerate(groups):
            yield ("," if index else "") + "\n    " + json.dumps(group)
        yield '],\n   "files": ['
        for index, row in enumerate(rows):
            new_name = {} if part == LEFT_OUT else {"file": image_name(places[row])}
            record = {**new_name, "from": images.names[row], "sha256": digests[row].tobytes().hex(),
                      "group": images.groups[row]}
            yield ("," if index else "") + "\n    " + json.dumps(record)
        yield "]}"

    head = {
        "version": MANIFEST_VERSION,
        "tool": "dataset_tool.py split",
        "source": {**split, "num_images": len(images)},
        "seed": request.seed,
        "parts_asked": {part.name: float(part.share) for part in request.parts},
        "institutions_asked": {part.name: float(part.share) for part in request.institutions},
        "skew_asked": request.skew and {name: ["*" if share is REST else float(share) for share in row]
                                        for name, row in request.skew.items()},
        "allow_missing": request.allow_missing,
        "leave_out": request.leave_out,
        "linked_groups": assignment.num_linked,
    }
    yield json.dumps(head, indent=1)[:-2] + ',\n "parts": ['
    for part, path in enumerate(paths.parts):
        yield "," if part else ""
        yield from describe(part, {"name": request.final_parts[part].name, "zip": path.name})
    yield "\n ],\n \"left_out\": "
    yield from describe(LEFT_OUT, {})
    yield "\n}\n"
