"""Write the parts of a split and its manifest, all of them or none."""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.files import temporary_beside
from imagesets.deal import FIRST_CLASS
from imagesets.labels import label_of
from imagesets.reader import METADATA, ImageSet, names_of_files
from imagesets.split import LEFT_OUT, Assignment, SplitRequest
from imagesets.writer import ImageSetWriter, image_name

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
        """Raise UserError when the folder cannot hold the files, or when one exists and is not to be replaced."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--dest={self.folder} is a file; expected a folder for the parts")
        if not self.folder.absolute().parent.is_dir():
            raise UserError(f"--dest={self.folder}: there is no folder {self.folder.parent}; make it first")
        for path in (*self.parts, self.manifest):
            if path.is_dir():
                raise UserError(f"{path} is a folder; expected to write a file of this name: choose another --dest")
            if path.exists() and not force:
                raise UserError(f"{path} exists; give --force to replace it, or choose another --dest")


def content_hash(images: ImageSet, digests: np.ndarray) -> str:
    """Return a sha256 of images, labels, classes and groups in order; where the set lies does not matter."""
    digest = hashlib.sha256(json.dumps(images.classes).encode())
    for row, group in enumerate(images.groups):
        digest.update(b"\n" + digests[row].tobytes() + json.dumps([label_of(images, row), group]).encode())
    return digest.hexdigest()


def write_split(images: ImageSet, digests: np.ndarray, assignment: Assignment, request: SplitRequest,
                paths: SplitPaths, pixel_hashes: Sequence[str] | None = None, *,
                on_image: Callable[[], None] = lambda: None) -> list[str]:
    """Write the parts and the manifest; return the names of other members, which no part could take.

    pixel_hashes:  of the images, to be recorded with them

    Images are copied byte for byte. Tables with a column "file" keep the rows of each part, with its new file names.
    Raises UserError when a file cannot be written; then none is there.
    """
    # The place of an image among those of its part gives it its new name.
    places = np.empty(len(images), dtype=np.int64)
    for part in {*assignment.part_of.tolist()}:
        rows = np.flatnonzero(assignment.part_of == part)
        places[rows] = np.arange(len(rows))
    split = {"name": images.path.absolute().name, "content_hash": content_hash(images, digests)}
    tables = {name: table for name in images.other_members if name.lower().endswith(".csv")
              if (table := _read_table(images.read(name))) is not None}
    with _all_or_none(paths) as folder:
        with ExitStack() as stack:
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
            _write_manifest(file, _Manifest(images, digests, assignment, request, paths, places, split))
    return [name for name in images.other_members if name != METADATA and name not in tables]


def _source_of(images: ImageSet, split: dict[str, str], request: SplitRequest, part: str) -> dict[str, Any]:
    """Return what a part says of its origin: all that the whole set said, and which part it is."""
    record: dict[str, Any] = {"part": part, "seed": request.seed, "of": split}
    if "split" in images.source:
        record["before"] = images.source["split"]
    return {**images.source, "split": record}


def _copy_images(images: ImageSet, assignment: Assignment, writers: Sequence[ImageSetWriter],
                 pixel_hashes: Sequence[str] | None, on_image: Callable[[], None]) -> None:
    for row, name in enumerate(images.names):
        if assignment.part_of[row] != LEFT_OUT:
            # The reader gives an image without a group its own name, which it has only in the whole set.
            group = None if images.groups[row] == name else images.groups[row]
            writers[assignment.part_of[row]].add(images.read(name), label_of(images, row), group,
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
    """Return the table's rows of the given files under their new names, in the order of these."""
    column = table[0].index("file")
    whole = [row for row in table[1:] if len(row) > column]
    files = names_of_files([row[column] for row in whole], renamed)
    rows = [[*row[:column], renamed[file], *row[column + 1:]] for row, file in zip(whole, files) if file in renamed]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table[0], *sorted(rows, key=lambda row: row[column])])
    return text.getvalue().encode()


@contextmanager
def _all_or_none(paths: SplitPaths) -> Iterator[Path]:
    """Give a temporary folder whose files move to their places at the end, the manifest last."""
    is_new = not paths.folder.exists()
    temporary = temporary_beside(paths.manifest)
    try:
        temporary.mkdir(parents=is_new)
        yield temporary
        for path in (*paths.parts, paths.manifest):
            os.replace(temporary / path.name, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and paths.folder.is_dir():
            paths.folder.rmdir()
        if isinstance(error, UserError):  # it names the temporary folder
            raise UserError(str(error).replace(str(temporary), str(paths.folder))) from error
        raise
    temporary.rmdir()


@dataclass(frozen=True)
class _Manifest:
    """What the manifest is made of."""

    images: ImageSet
    digests: np.ndarray
    assignment: Assignment
    request: SplitRequest
    paths: SplitPaths
    places: np.ndarray
    split: dict[str, str]


def _write_manifest(file: IO[str], made: _Manifest) -> None:
    """Write JSON in pieces, a line an image, so that a million of them need little memory."""
    request = made.request
    head = {
        "version": MANIFEST_VERSION,
        "tool": "dataset_tool.py split",
        "source": {**made.split, "num_images": len(made.images)},
        "seed": request.seed,
        "parts_asked": {part.name: float(part.share) for part in request.parts},
        "institutions_asked": {part.name: float(part.share) for part in request.institutions},
        "skew_asked": request.skew and {name: ["*" if share is None else float(share) for share in row]
                                        for name, row in request.skew.items()},
        "allow_missing": request.allow_missing,
        "leave_out": request.leave_out,
        "linked_groups": made.assignment.num_linked,
    }
    file.write(json.dumps(head, indent=1)[:-2] + ',\n "parts": [')
    for part, path in enumerate(made.paths.parts):
        file.write("," if part else "")
        _write_part(file, made, part, {"name": request.final_parts[part].name, "zip": path.name})
    file.write("\n ],\n \"left_out\": ")
    _write_part(file, made, LEFT_OUT, {})
    file.write("\n}\n")


def _write_part(file: IO[str], made: _Manifest, part: int, names: dict[str, str]) -> None:
    rows = np.flatnonzero(made.assignment.part_of == part)
    counts = made.assignment.reached[part, FIRST_CLASS:].tolist()
    groups = dict.fromkeys(made.images.groups[row] for row in rows)
    file.write("\n  " + json.dumps({**names, "num_images": len(rows), "num_groups": len(groups)})[:-1])
    file.write(f',\n   "classes": {json.dumps(dict(zip(made.assignment.classes, counts, strict=True)))}')
    file.write(',\n   "groups": [')
    for index, group in enumerate(groups):
        file.write(("," if index else "") + "\n    " + json.dumps(group))
    file.write('],\n   "files": [')
    for index, row in enumerate(rows):
        new_name = {} if part == LEFT_OUT else {"file": image_name(made.places[row])}
        record = {**new_name, "from": made.images.names[row], "sha256": made.digests[row].tobytes().hex(),
                  "group": made.images.groups[row]}
        file.write(("," if index else "") + "\n    " + json.dumps(record))
    file.write("]}")
