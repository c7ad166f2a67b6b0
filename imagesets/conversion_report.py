"""Record what becomes of each image of a conversion, join groups, and report all as JSON and as text lines.

Records take a few bytes per image. Images of one patient or lesion, of one table row, or of equal bytes form a group.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.files import atomic_write
from dnnlib.text import listed, shorten
from imagesets.classes import class_names, missing_labels
from imagesets.decode import TOO_SMALL
from imagesets.folders import Source
from imagesets.metadata import image_name
from imagesets.pixel_formats import BEYOND_DEPTH, Values, depth_remark
from imagesets.pixel_hashes import DIGEST_SIZE, identical_sets, link_groups
from imagesets.resize import PixelSpec
from imagesets.selection import NOT_DRAWN, REASONS, Labeling, Selection, images_of_rows
from imagesets.sources import masks_among, repeated_names

_SHOWN = 3
_UNLISTED = {"decoder downscaling"}  # usually all images; their names are of no interest
_UNSEEN = -1


class Tally:
    """What became of the images of a source that were converted, by their index there."""

    def __init__(self, num_images: int):
        self._codes = np.full(num_images, _UNSEEN, dtype=np.int16)
        self._outcomes: dict[tuple[str | None, tuple[str, ...]], int] = {}  # (reason it is bad, notes) -> code
        self._digests = bytearray()
        self._hash = hashlib.sha256()
        self.kept = array("q")
        self.values: dict[str, Values] = {}  # kind -> values of the kept images with more than 8 bits
        self.details: dict[int, str] = {}  # of bad images whose reason is not the full story, see BadImage
        self.side: int | None = None  # pixels of the kept images, which are squares of one size

    def add_kept(self, index: int, side: int, digest: bytes, notes: tuple[str, ...],
                 values: Values | None = None) -> None:
        """digest: sha256 of the source's bytes"""
        self.side = side
        self._codes[index] = self._code(None, notes)
        self._digests += digest
        self._hash.update(digest)
        self.kept.append(index)
        if values is not None:
            so_far = self.values.get(values.kind, replace(values, count=0))
            self.values[values.kind] = replace(so_far, largest=max(so_far.largest, values.largest),
                                               count=so_far.count + 1)

    def add_bad(self, index: int, reason: str, detail: str = "") -> None:
        self._codes[index] = self._code(reason, ())
        if detail:
            self.details[index] = detail

    @property
    def digests(self) -> np.ndarray:
        """uint8 [kept, 32]"""
        return np.frombuffer(bytes(self._digests), dtype=np.uint8).reshape(-1, DIGEST_SIZE)

    @property
    def content_hash(self) -> str:
        """sha256 of the kept images' digests in order."""
        return self._hash.hexdigest()

    def unreadable(self) -> dict[str, int]:
        """Return reasons, sorted, with the number of their images."""
        return {reason: len(indices) for reason, indices in self.bad() if reason != TOO_SMALL}

    def bad(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield reasons, sorted, with the ascending indices of their images."""
        for reason in sorted({reason for reason, _ in self._outcomes if reason is not None}):
            yield reason, self._where(lambda outcome, reason=reason: outcome[0] == reason)

    def notes(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield notes, sorted, with the ascending indices of their images."""
        for note in sorted({note for _, notes in self._outcomes for note in notes}):
            yield note, self._where(lambda outcome, note=note: note in outcome[1])

    def _code(self, reason: str | None, notes: tuple[str, ...]) -> int:
        return self._outcomes.setdefault((reason, notes), len(self._outcomes))

    def _where(self, matches: Callable[[tuple[str | None, tuple[str, ...]]], bool]) -> np.ndarray:
        codes = [code for outcome, code in self._outcomes.items() if matches(outcome)]
        return np.flatnonzero(np.isin(self._codes, codes))


@dataclass(frozen=True, kw_only=True)
class Linked:
    """Groups and duplicates among the K images kept, in order.

    groups:      K groups, None for an image in no group
    num_groups:  number of different groups; an image in no group counts as one
    duplicates:  sets of byte-identical images, as positions
    """
    groups: list[str | None]
    num_groups: int
    duplicates: list[np.ndarray]


def link(selection: Selection, tally: Tally) -> Linked:
    """Join groups that share an image, or have images of the same row of the table."""
    kept = np.array(tally.kept, dtype=np.int64)
    known = selection.labeling.groups
    texts = [image_name(position) if known is None or known[index] is None else known[index]
             for position, index in enumerate(kept)]
    duplicates = identical_sets(tally.digests)
    rows = selection.labeling.rows
    of_one_row = [] if rows is None else list(images_of_rows(rows[kept]).values())
    units, _ = link_groups(texts, duplicates + of_one_row)
    sizes = np.bincount(units)
    # A unit is named by the first patient or lesion in it, else by its first image.
    name_of: dict[int, str] = {}
    for named_by_table in (True, False):
        for position, index in enumerate(kept):
            if not named_by_table or (known is not None and known[index] is not None):
                name_of.setdefault(int(units[position]), texts[position])
    groups = [None if sizes[unit] == 1 and name_of[unit] == image_name(position) else name_of[unit]
              for position, unit in enumerate(units.tolist())]
    return Linked(groups=groups, num_groups=len(sizes), duplicates=duplicates)


def write_report(path: str | os.PathLike | None, report: Mapping[str, Any]) -> None:
    """Write the report as JSON, whole or not at all; does nothing when path is None."""
    if path is None:
        return
    with atomic_write(path, text=True) as file:
        json.dump(report, file, indent=1, allow_nan=False)
        file.write("\n")


def build_report(source: Source, selection: Selection, tally: Tally, linked: Linked,
                 spec: PixelSpec) -> dict[str, Any]:
    """Return the report, in which found = kept + the counts under dropped.

    spec: of the images written
    """
    def named(indices: Iterable[int], by_name: bool = True) -> dict[str, Any]:
        indices = list(indices)
        details = {source.names[index]: tally.details[index] for index in indices if index in tally.details}
        return ({"count": len(indices)} | ({"names": [source.names[index] for index in indices]} if by_name else {})
                | ({"details": details} if details else {}))

    dropped = {reason: named(np.flatnonzero(selection.reasons == code))
               for code, reason in enumerate(REASONS) if code and (selection.reasons == code).any()}
    dropped |= {reason if reason == TOO_SMALL else f"unreadable: {reason}": named(indices)
                for reason, indices in tally.bad()}
    rows = selection.labeling.rows
    identical = [[tally.kept[position] for position in positions] for positions in linked.duplicates]
    report = {"source": source.name, "kind": source.kind, "found": len(source), "kept": len(tally.kept),
              "resolution": tally.side, "channels": spec.channels, "depth": spec.depth.bits, "dropped": dropped,
              "converted": {note: named(indices, note not in _UNLISTED) for note, indices in tally.notes()},
              "values": {kind: {"images": found.count, "black": found.black, "white": found.white,
                                "largest": found.largest} for kind, found in sorted(tally.values.items())},
              "classes": _count_classes(selection, tally.kept),
              "num_groups": linked.num_groups,
              "duplicates": [[source.names[index] for index in indices] for indices in identical],
              "contradictions": [{source.names[index]: selection.label_name(index) for index in indices}
                                 for indices in identical if _num_labels(selection, indices) > 1],
              "ignored_files": {"count": len(source.ignored), "names": list(source.ignored)},
              "left_out_splits": dict(source.left_out)}
    if source.not_chosen:
        report["files_not_chosen"] = {"count": len(source.not_chosen), "names": list(source.not_chosen)}
    undrawn = selection.reasons == REASONS.index(NOT_DRAWN)
    if undrawn.any():
        report["sample"] = {"drawn": int(selection.wanted.sum()), "of": int((selection.wanted | undrawn).sum()),
                            "classes": _count_sample(selection, undrawn)}
    if source.parts:
        ends = np.cumsum([len(part) for part in source.parts])
        kept = np.diff(np.searchsorted(tally.kept, ends), prepend=0)
        report["sources"] = [{"name": part.name, "kind": part.kind, "found": len(part), "kept": int(count)}
                             for part, count in zip(source.parts, kept)]
        doubled = repeated_names(source)
        report["names_in_several_sources"] = {"count": len(doubled), "names": doubled}
    for key, table in (("labels_table", selection.labeling.table), ("groups_table", selection.labeling.group_table)):
        if table is not None:
            report[key] = {"name": table.name, "kind": table.kind, "label_columns": list(table.label_columns),
                           "group_columns": list(table.group_columns)}
    if selection.labeling.groups is not None and any(group is not None for group in selection.labeling.groups):
        report["images_without_a_group"] = named(index for index in tally.kept
                                                 if selection.labeling.groups[index] is None)
    if rows is not None:
        absent = selection.labeling.rows_without_image
        report["images_without_a_row"] = named(np.flatnonzero(rows < 0))
        found, counts = np.unique(rows[rows >= 0], return_counts=True)
        report["images_that_share_a_row"] = named(np.flatnonzero(np.isin(rows, found[counts > 1])))
        report["rows_without_an_image"] = {"count": len(absent), "names": list(absent)}
    return report


def _num_labels(selection: Selection, indices: Sequence[int]) -> int:
    """Return the number of different labels; images without a label do not count."""
    return len({selection.label_name(index) for index in indices if selection.label(index) is not None})


def _count_classes(selection: Selection, kept: Sequence[int]) -> dict[str, int] | None:
    """Return the number of images of each class, and without one; None when there are no classes."""
    labels = selection.labels
    if labels is None or labels.ndim == 2:
        return None
    chosen = labels[np.asarray(kept, dtype=np.int64)]
    names = class_names(labels, selection.classes)
    counts = {name: int((chosen == number).sum()) for number, name in enumerate(names)}
    without = int(missing_labels(chosen).sum())
    return counts | ({"(none)": without} if without else {})


def _count_sample(selection: Selection, undrawn: np.ndarray) -> dict[str, list[int]] | None:
    """Return [images drawn, images there are] of each class, as `_count_classes` does. undrawn: bool [N]"""
    drawn = _count_classes(selection, np.flatnonzero(selection.wanted))
    if drawn is None:
        return None
    there = _count_classes(selection, np.flatnonzero(selection.wanted | undrawn))
    return {name: [drawn.get(name, 0), count] for name, count in there.items()}


def describe_conversion(dest: Path, source: Source, selection: Selection,
                        report: Mapping[str, Any]) -> Iterable[str]:
    """Yield a summary of a report, as text lines."""
    kept, found = report["kept"], report["found"]
    side, color = report["resolution"], "gray" if report["channels"] == 1 else "RGB"
    yield f"{dest}: {kept} images, {side}x{side} {color}, {report['num_groups']} groups"
    yield f"  found {found} in {source.name} ({source.kind}), kept {kept}, dropped {found - kept}"
    for part in report.get("sources", []):
        yield f"  from {part['name']} ({part['kind']}): found {part['found']}, kept {part['kept']}"
    for reason, entry in report["dropped"].items():
        yield f"  dropped: {reason}: {_count_and_names(entry)}"
    if "sample" in report:
        yield "  " + _describe_sample(report["sample"])
    for note, entry in report["converted"].items():
        yield f"  converted: {note}: {_count_and_names(entry)}"
    for kind, found in report["values"].items():
        if found["black"] == found["white"]:
            yield f"  note: all {kind} images have only the value {found['white']:g} and became black"
            continue
        yield (f"  values of {kind} images: {found['black']:g} became black, {found['white']:g} white; the largest is "
               f"{found['largest']:g}")
        remark = depth_remark(f"all {kind} images", found["white"], found["largest"])
        if remark is not None:
            yield f"  note: {remark}"
    if report["depth"] is not None and not report["values"] and f"unreadable: {BEYOND_DEPTH}" not in report["dropped"]:
        yield f"  note: --depth={report['depth']} changed nothing: no image has more than 8 bits per channel"
    if report["classes"] is not None:
        yield "  classes: " + ", ".join(f"{name} {count}" for name, count in report["classes"].items())
        empty = [name for name, count in report["classes"].items() if not count]
        if empty:
            yield (f"  note: no images of class {listed(empty)}; numbers of classes are kept, which is right if "
                   "another data set of the study has such images: convert all with the same --classes; if none has, "
                   "leave the class out with --classes")
    elif selection.labels is None:
        yield "  labels: none"
    else:
        names = f" ({listed(selection.classes)})" if selection.classes else ""
        yield f"  labels: lists of {selection.labels.shape[1]} numbers{names}"
    # Names of --classes that nothing else takes the place of are in the note above.
    unknown = [name for name in selection.absent if selection.left_out or name not in selection.classes]
    if unknown:
        instead = f", and --classes leaves out {listed(selection.left_out)}" if selection.left_out else ""
        yield f"  note: the source has no class named {listed(unknown)}{instead}; check that no name is misspelled"
    yield from _tables(selection.labeling)
    yield from _remarks(source, report)


def _tables(labeling: Labeling) -> Iterable[str]:
    """Yield what was read from tables, and what else they offer."""
    table, groups = labeling.table, labeling.group_table
    if table is not None:
        by_groups = f", groups by {' and '.join(table.group_columns)}" if table.group_columns else ", no groups"
        yield (f"  {table.name} ({table.kind}): labels from {listed(table.label_columns)}{by_groups}")
        if table.other_levels:
            yield f"  note: for other levels of the diagnosis give --label-column={'|'.join(table.other_levels)}"
    if groups is not None:
        yield f"  {groups.name}: groups by {' and '.join(groups.group_columns)}"
    if table is not None and groups is None and table.groups_file is not None and not table.group_columns:
        yield (f"  note: without groups, split may put images of one lesion into several parts; give "
               f"--groups=FILE with {table.groups_file}")


def _describe_sample(sample: Mapping[str, Any]) -> str:
    of_each = ", ".join(f"{name} {drawn} of {count}" for name, (drawn, count) in (sample["classes"] or {}).items())
    return (f"subset: {sample['drawn']} of {sample['of']} images, chosen at random (--max-images, --seed)"
            + (f": {of_each}" if of_each else ""))


def _remarks(source: Source, report: Mapping[str, Any]) -> Iterable[str]:
    for key, what in (("images_without_a_row", "images without a row"),
                      ("rows_without_an_image", "rows without an image"),
                      ("images_without_a_group", "images without a patient or lesion, each in a group of its own")):
        if report.get(key, {"count": 0})["count"]:
            yield f"  {what}: {_count_and_names(report[key])}"
    if report["duplicates"]:
        examples = " = ".join(report["duplicates"][0][:_SHOWN])
        count = sum(map(len, report["duplicates"]))
        twice = "; is every image there twice? Give each folder only once" if count == report["kept"] else ""
        yield (f"  duplicates: {count} images in {len(report['duplicates'])} sets of identical files, each set in one "
               f"group ({examples}){twice}")
    for entry in report["contradictions"][:_SHOWN]:
        first_of = {label: name for name, label in reversed(entry.items())}
        shown = [name for name in entry if name in first_of.values()][:_SHOWN]
        more = f", and {len(entry) - len(shown)} more" if len(entry) > len(shown) else ""
        yield ("  contradiction among duplicates: "
               + ", ".join(f"{name} is {entry[name]}" for name in shown) + more)
    if len(report["contradictions"]) > _SHOWN:
        yield f"  ... {len(report['contradictions']) - _SHOWN} more contradictions; list them with --report=FILE"
    if report.get("images_that_share_a_row", {}).get("count"):
        yield ("  images that share a row of the table, because their names are equal: "
               f"{_count_and_names(report['images_that_share_a_row'])}; are they the same image?")
    if report.get("names_in_several_sources", {}).get("count"):
        yield (f"  names in several sources: {_count_and_names(report['names_in_several_sources'])}; all these images "
               "were kept")
    if report["ignored_files"]["count"]:
        yield f"  files that are not images by their names: {_count_and_names(report['ignored_files'])}"
    if "files_not_chosen" in report:
        yield f"  left out by --include and --exclude: {_count_and_names(report['files_not_chosen'])}"
    if report["left_out_splits"]:
        yield "  other splits, left out: " + ", ".join(f"{k} {v}" for k, v in report["left_out_splits"].items())
    if "images_without_a_row" not in report:  # no table was given
        for hint in (*source.hints, *filter(None, [masks_among(source.names)])):
            yield f"  note: {hint}"


def _count_and_names(entry: Mapping[str, Any]) -> str:
    names = entry.get("names", [])
    if not names:
        return str(entry["count"])
    details = entry.get("details", {})
    described = [f"{name} {details[name]}" if name in details else name for name in names]
    return f"{entry['count']} ({shorten(described, _SHOWN)})"
