"""Decide which images of a source are converted, and with which label and group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.text import listed, plural, shorten
from imagesets.classes import (
    NO_LABEL,
    choose_classes,
    class_counts,
    class_name,
    class_names,
    missing_labels,
    no_labels,
    numbers_of,
)
from imagesets.folders import Source
from imagesets.pixel_hashes import link_groups
from imagesets.sources import file_ending, patterns_of
from imagesets.tables import LabelTable

UNLABELED = ("error", "drop", "keep")
WANTED = ""
NO_CLASS, NOT_CHOSEN, NOT_DRAWN = "no label", "class not chosen", "not drawn for --max-images"
REASONS = (WANTED, NO_CLASS, NOT_CHOSEN, NOT_DRAWN)
_SHOWN = 5


class LabelsUnclear(UserError):
    """Some images have no label, or several match one row of a table, and the user has to decide what to do.

    details: what the report lists
    """

    def __init__(self, message: str, details: Mapping[str, Any]):
        super().__init__(message)
        self.details = dict(details)


@dataclass(frozen=True, kw_only=True)
class Labeling:
    """Labels and groups of the N images, from the source or from a table in its place.

    labels, classes, groups: as in Source
    rows:                row of each image in the table, int64 [N], -1 without one; None without a table
    rows_without_image:  their ids in the table
    table, group_table:  the tables, None if not given
    """
    labels: np.ndarray | None
    classes: list[str] | None
    groups: Sequence[str | None] | None
    rows: np.ndarray | None = None
    rows_without_image: Sequence[str] = ()
    table: LabelTable | None = None
    group_table: LabelTable | None = None

    @classmethod
    def of_source(cls, source: Source, ignore_folders: bool = False) -> "Labeling":
        """ignore_folders: take labels only from dataset.json"""
        if not ignore_folders or source.labels is None:
            return cls(labels=source.labels, classes=source.classes, groups=source.groups)
        is_ready = np.concatenate([np.full(len(part), part.is_ready) for part in source.parts or [source]])
        if not is_ready.any():
            return cls(labels=None, classes=None, groups=source.groups)
        labels = no_labels(len(source), source.labels.shape[1:])
        labels[is_ready] = source.labels[is_ready]
        return cls(labels=labels, classes=source.classes, groups=source.groups)

    @classmethod
    def of_table(cls, source: Source, table: LabelTable, *, all_meant: bool = False) -> "Labeling":
        """Look up each image of the source. Its own groups are kept if the table has none.

        all_meant: several files may share a row

        Raises UserError when no image has a row, or the images are not files; LabelsUnclear when a row matches several
        files, which may be an image and its mask.
        """
        names, rows = _find_rows(source, table, "--labels")
        if not all_meant:
            _refuse_shared_rows(source, table, rows)
        labels = numbers_of([table.class_of(name) for name in names], table.class_names)
        unused = np.ones(len(table), dtype=bool)
        unused[rows[rows >= 0]] = False
        groups = [table.group_of(name) for name in names] if table.group_columns else source.groups
        return cls(labels=labels, classes=table.class_names, groups=groups, rows=rows, table=table,
                   rows_without_image=[table.ids[row] for row in np.flatnonzero(unused)])

    def with_groups(self, source: Source, table: LabelTable) -> "Labeling":
        """Add the groups of another table: images that share a group in either share one in the result.

        Raises UserError when no image has a row there, or the images are not files.
        """
        names, _ = _find_rows(source, table, "--groups")
        found = [table.group_of(name) for name in names]
        known = [] if self.table is None else [name.lower() for name in self.table.group_columns]
        same = known == [name.lower() for name in table.group_columns]
        return replace(self, group_table=table, groups=_unite(self.groups or [None] * len(source), found, same))


def _unite(groups: Sequence[str | None], others: Sequence[str | None], same: bool) -> list[str | None]:
    """Return the groups that result from joining those of two lists; named as in the first, else as in the second.

    same:  a text in both names the same patient or lesion
    """
    # Equal texts of different columns differ: patient 7 is not lesion 7.
    keys = [f"{0 if same else 1} {other}" if other is not None else None for other in others]
    known = [f"0 {group}" if group is not None else key if key is not None else f"2 {index}"
             for index, (group, key) in enumerate(zip(groups, keys))]
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        if key is not None:
            members.setdefault(key, []).append(index)
    units, _ = link_groups(known, [np.array(rows) for rows in members.values()])
    names: dict[int, str] = {}
    for texts in (groups, others):
        for unit, text in zip(units.tolist(), texts):
            if text is not None and unit not in names:
                names[unit] = text
    taken: dict[str, int] = {}
    for unit, name in names.items():
        while name in taken:  # by a unit named from another column
            name = f"{name} (2)"
        names[unit] = name
        taken[name] = unit
    return [names.get(unit) for unit in units.tolist()]


def _find_rows(source: Source, table: LabelTable, option: str) -> tuple[Sequence[str], np.ndarray]:
    """Return the names to look for, and the row of each image in the table: int64 [N], -1 without one."""
    if not source.has_files:
        why = "has its own labels" if option == "--labels" else "has no file names to look for in a table"
        raise UserError(f"{option}: {source.name} ({source.kind}) {why}; leave the option out")
    names = _names_for(table, source)
    rows = np.array([-1 if (row := table.row_of(name)) is None else row for name in names], dtype=np.int64)
    if (rows < 0).all():
        raise UserError(f"{option}: no image of {source.name} has a row; the images are named as {source.names[0]}, "
                        f"the rows as {table.ids[0]}: choose the column with --id-column, or another table")
    return names, rows


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The decision about each of the N images.

    reasons:  int8 [N], index into REASONS; 0 is wanted
    labels:   None, int64 [N] into `classes`, or float32 [N, D]
    classes:  names of the integer labels, or None
    absent:   names in --classes and --merge that are not among the classes of the source
    left_out: classes of the source that have images and are not in --classes
    """
    reasons: np.ndarray
    labels: np.ndarray | None
    classes: list[str] | None
    labeling: Labeling
    absent: Sequence[str] = ()
    left_out: Sequence[str] = ()

    @property
    def wanted(self) -> np.ndarray:
        """bool [N]"""
        return self.reasons == 0

    def label(self, index: int) -> int | list[float] | None:
        if self.labels is None or missing_labels(self.labels[index:index + 1])[0]:
            return None
        return self.labels[index].tolist()

    def label_name(self, index: int) -> str:
        """Return the label of an image as text."""
        label = self.label(index)
        if label is None:
            return "(none)"
        return class_name(label, self.classes) if isinstance(label, int) else str(label)


def select(source: Source, labeling: Labeling, *, classes: str | None, merge: str | None, unlabeled: str,
           max_images: int | None, seed: int) -> Selection:
    """Apply --classes, --merge, --unlabeled and --max-images (with the random seed `seed`).

    Raises UserError when an option does not fit the labels or nothing is left, LabelsUnclear when some images have
    no label and unlabeled is "error".
    """
    if unlabeled not in UNLABELED:
        raise UserError(f"--unlabeled={unlabeled}; expected one of {', '.join(UNLABELED)}")
    if max_images is not None and max_images < 1:
        raise UserError(f"--max-images={max_images}; expected at least 1")
    reasons = np.zeros(len(source), dtype=np.int8)
    missing = missing_labels(labeling.labels, len(source))
    if labeling.labels is not None and missing.any() and unlabeled != "keep":
        if unlabeled == "error":
            raise _unlabeled_error(source, labeling, missing)
        reasons[missing] = REASONS.index(NO_CLASS)
    chosen = _choose(source, labeling, classes, merge, missing, reasons)
    if max_images is not None and np.count_nonzero(reasons == 0) > max_images:
        reasons[_not_drawn(np.flatnonzero(reasons == 0), chosen.labels, max_images, seed)] = REASONS.index(NOT_DRAWN)
    if reasons.all():
        raise UserError(f"{source.name}: --unlabeled and --classes leave none of its {len(source)} images; "
                        "expected at least one")
    return chosen


def _choose(source: Source, labeling: Labeling, classes: str | None, merge: str | None, missing: np.ndarray,
            reasons: np.ndarray) -> Selection:
    """Return a Selection with these `reasons`, where images of classes that are not chosen are marked."""
    if classes is None and merge is None:
        return Selection(reasons=reasons, labels=labeling.labels, classes=labeling.classes, labeling=labeling)
    option = "--classes" if classes is not None else "--merge"
    if labeling.labels is None:
        raise UserError(f"{option}: the images of {source.name} have no labels; expected subfolders, a dataset.json "
                        "with labels, or --labels=FILE")
    if labeling.labels.ndim == 2:
        raise UserError(f"{option}: the labels of {source.name} are lists of {labeling.labels.shape[1]} numbers, "
                        "from which no class can be chosen; leave the option out")
    found = class_names(labeling.labels, labeling.classes)
    names, label_of, absent = choose_classes(found, classes, merge)
    new_index = np.array([NO_LABEL if label_of[name] is None else label_of[name] for name in found], dtype=np.int64)
    labels = np.where(missing, NO_LABEL, new_index[labeling.labels])
    dropped = (labels == NO_LABEL) & ~missing
    reasons[dropped] = REASONS.index(NOT_CHOSEN)
    return Selection(reasons=reasons, labels=labels, classes=names, labeling=labeling, absent=absent,
                     left_out=[found[number] for number in np.unique(labeling.labels[dropped])])


def _not_drawn(rows: np.ndarray, labels: np.ndarray | None, count: int, seed: int) -> np.ndarray:
    """Return those of `rows` that are not in a random subset of `count` images, which keeps the shares of classes.

    Images without a label form a class here; so do all images if labels are lists. Groups play no role: some images
    of a lesion may be chosen and others not.
    """
    kinds = np.zeros(len(rows)) if labels is None or labels.ndim == 2 else labels[rows]
    members = [rows[kinds == kind] for kind in np.unique(kinds)]
    counts = class_counts([len(some) for some in members], count)
    random = np.random.RandomState(seed)
    return np.concatenate([random.permutation(some)[number:] for some, number in zip(members, counts, strict=True)])


def _names_for(table: LabelTable, source: Source) -> Sequence[str]:
    """Return the names to look up: with the name of their part if the table has it so."""
    if not source.parts:
        return source.names
    inside = [name for part in source.parts for name in part.names]
    return [name if name in table else inner for name, inner in zip(source.names, inside)]


def _refuse_shared_rows(source: Source, table: LabelTable, rows: np.ndarray) -> None:
    """Raise LabelsUnclear when a row matches several files of one source, or files of different endings.

    The same name in two sources is allowed: these may overlap.
    """
    part_of = np.repeat(np.arange(len(source.parts)), [len(part) for part in source.parts]) if source.parts else None
    shared = {}
    for row, files in images_of_rows(rows).items():
        endings = {file_ending(source.names[index]) for index in files}
        if len(endings) > 1 or part_of is None or len(set(part_of[files])) < len(files):
            shared[table.ids[row]] = [source.names[index] for index in files]
    if not shared:
        return
    examples = "; ".join(" and ".join(files[:_SHOWN]) for files in list(shared.values())[:2])
    of_rows, more = f"of the table's {len(table)} rows", "; ..." if len(shared) > 2 else ""
    raise LabelsUnclear(f"--labels: {plural(len(shared), f'{of_rows} matches', f'{of_rows} match')} several files "
                        f"({examples}{more}); expected one image per row: choose the files, for example by "
                        f'{_choice_advice(source, list(shared.values()))}, or take all with --include="*"',
                        {"rows_of_several_files": shared})


def _choice_advice(source: Source, shared: Sequence[Sequence[str]]) -> str:
    """Return how to choose among files of one row. shared: the file names of each such row"""
    # A JPEG file is taken to be the image: masks are not saved as JPEG, which would blur their edges.
    first, second = sorted(max(shared, key=lambda files: len(set(map(file_ending, files)))),
                           key=lambda name: file_ending(name) not in (".jpg", ".jpeg"))[:2]
    if (ending := file_ending(second)) != file_ending(first):
        emptied = [part.name for part in source.parts if all(file_ending(name) == ending for name in part.names)]
        if emptied:
            return f"leaving out the --source of {listed(emptied)}"
        return f'--include="*{file_ending(first)}" or --exclude="*{ending}"'
    ways = [dict.fromkeys(_own_folder(name, files[kept]) for files in shared for name in files
                          if name != files[kept]) for kept in (-1, 0)]
    return " or ".join(" ".join(f'--exclude="{folder}/*"' for folder in list(way)[:_SHOWN])
                       for way in ways if None not in way) or f'--exclude="{second}"'


def _own_folder(name: str, other: str) -> str | None:
    """Return the outermost folder that one file lies in and the other does not."""
    around = other.split("/")[:-1]
    return next((folder for folder in name.split("/")[:-1] if folder not in around), None)


def images_of_rows(rows: np.ndarray) -> dict[int, np.ndarray]:
    """Return the images, in order, of each row that has several. rows: int64 [N], -1 without one"""
    order = np.argsort(rows, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(rows[order])) + 1)
    return {int(rows[run[0]]): run for run in runs if len(run) > 1 and rows[run[0]] >= 0}


def _unlabeled_error(source: Source, labeling: Labeling, missing: np.ndarray) -> LabelsUnclear:
    names = [source.names[index] for index in np.flatnonzero(missing)]
    in_table = "" if labeling.rows is None else f", {int((labeling.rows < 0).sum())} of them without a row in the table"
    others = patterns_of(names, [source.names[index] for index in np.flatnonzero(~missing)]) if source.has_files else []
    patterns = " ".join(f'--exclude="{pattern}"' for pattern in others)
    leave_out = f", leave them out ({patterns})" if others else ""
    return LabelsUnclear(f"no label for {len(names)} of {len(source)} images{in_table} ({shorten(names, _SHOWN)}); "
                         f"expected a label for each: add them{leave_out}, or give --unlabeled=drop or "
                         "--unlabeled=keep", {"unlabeled": names})
