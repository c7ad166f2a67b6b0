"""Read a table of labels and groups: delimited text (CSV) in its common forms.

Commas, semicolons or tabs, any line ends, UTF-8, UTF-16 or Latin-1; how a row is read follows from the header, see
imagesets.layouts. Tables of a million rows need little memory.
"""

import codecs
import csv
import os
import posixpath
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dnnlib.cli import UserError
from dnnlib.files import iterate_retrying, retrying, unpack_advice
from dnnlib.text import plural
from imagesets.classes import MAX_CLASSES, NO_LABEL, order_classes
from imagesets.layouts import Layout, groups_layout_of, layout_of
from imagesets.metadata import plain_path
from imagesets.reader import image_suffixes

_DELIMITERS = ",;\t"
_CHUNK = 1 << 20
_WHOLE_NUMBER = re.compile(r"([+-]?\d+)(?:\.0*|,0)?", re.ASCII)


class CompactTexts(Sequence[str]):
    """Texts in one buffer: each takes its UTF-8 bytes and 8 more, where a str takes 50 more."""

    def __init__(self, texts: Iterable[str] = ()):
        self._buffer = bytearray()
        self._ends = array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._buffer += text.encode()
        self._ends.append(len(self._buffer))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        """Return one text; slices are not supported."""
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        return self._buffer[self._ends[index]:self._ends[index + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def find_sorted(self, text: str) -> int | None:
        """Return the index of `text`, or None; the texts must be in ascending order."""
        index = bisect_left(self, text)
        return index if index < len(self) and self[index] == text else None


class DelimitedFile:
    """A table in a text file: the header is read at once, rows when they are iterated over.

    header: the column names, without spaces around them

    A file that is not valid UTF-8 is read as Latin-1, which has a character for every byte. Raises UserError when the
    file is missing, empty or not text, or its header has a single column.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path} does not exist; expected a table, a CSV file")
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder; expected a table, a CSV file")
        self._encoding = retrying(lambda: _encoding_of(self.path), self.path)
        self._delimiter, self.header = retrying(self._read_header, self.path)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield (line number, cells) of every row below the header; cells are without spaces around them.

        Empty rows are skipped: spreadsheets leave them at the end. Raises UserError, with the line, for
        a row that has more or fewer cells than the header, and for wrong quotes.
        """
        rows = iterate_retrying(lambda: self._all_rows(self._delimiter), self.path)
        next(rows)
        for line, cells in rows:
            if len(cells) != len(self.header):
                raise UserError(f"{self.path}, line {line}: the row has {plural(len(cells), 'cell')}; expected "
                                f"{len(self.header)}, like the header")
            yield line, cells

    def _read_header(self) -> tuple[str, list[str]]:
        """Take the delimiter that gives the first row the most cells; of several the first."""
        best: tuple[str, list[str]] = ("", [])
        failure = None
        for delimiter in _DELIMITERS:
            try:
                _, cells = next(self._all_rows(delimiter), (0, []))
            except UserError as error:  # with a wrong delimiter, quotes may end inside a cell
                failure = failure or error
                continue
            if len(cells) > len(best[1]):
                best = delimiter, cells
        if not best[1]:
            raise failure or UserError(f"{self.path} is empty; expected a table: a header and one row per image")
        if len(best[1]) == 1:
            raise UserError(f"{self.path} has the single column {best[1][0][:80]!r}; expected at least two, "
                            "separated by commas, semicolons or tabs")
        return best

    def _all_rows(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Yield (first line, cells) of every row that is not empty, including the header."""
        with open(self.path, encoding=self._encoding, newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            while True:
                line = reader.line_num + 1  # a quoted cell may span several lines: report the first
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    if "field limit" in str(error):  # Python's own
                        raise UserError(f"{self.path}, line {line}: a cell has more than {csv.field_size_limit():,} "
                                        "characters; expected short ones: is a quote in this row not closed?"
                                        ) from error
                    raise UserError(f"{self.path}, line {line}: the quotes in this row are wrong ({error}); expected "
                                    'cells such as "text", and "" for a quote inside one') from error
                if cells is None:
                    return
                cells = [cell.strip() for cell in cells]
                if any(cells):
                    yield line, cells


def _encoding_of(path: Path) -> str:
    """Return the encoding, after reading the whole file in pieces to check for invalid UTF-8."""
    encoding = "utf-8-sig"
    with open(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # "Unicode text" of a spreadsheet
            encoding = "utf-16"
        file.seek(0)
        while encoding != "utf-16" and (chunk := file.read(_CHUNK)):
            if b"\x00" in chunk:
                what = unpack_advice(path) or "is not a text file"
                raise UserError(f"{path} {what}; expected a table as CSV (a workbook: save it as CSV)")
    try:
        with open(path, encoding=encoding) as file:
            while file.read(_CHUNK):
                pass
    except UnicodeDecodeError as error:
        if encoding == "utf-16":
            raise UserError(f"{path} begins like UTF-16 but is damaged ({error.reason}); save the table as CSV in "
                            "UTF-8") from error
        return "latin-1"
    return encoding


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelTable:
    """Labels and groups by image. About 50 bytes per row; may be sent to workers.

    name:           of the file, without its folder
    kind:           of table that was recognized, "named columns" if columns were named, "groups" if only these were
                    read
    label_columns:  columns that gave the labels; other_levels: those with coarser or finer diagnoses of a known kind
    group_columns:  columns that gave the groups, the widest first
    groups_file:    the file with the groups for this kind of table, which has none itself
    class_names:    one-hot columns in the table's order (also those without a row), else the labels by name, or by
                    number if all are numbers
    ids:            the images' names in ascending order, each once (see image_key)
    num_duplicates: rows that only repeat another one

    An image is looked up by its path or name, with or without its extension. If the table's ids have no folders, those
    of the images are ignored; else an id must match the end of an image's path, so that p1/a.jpg and p2/a.jpg differ.
    If all ids begin with the same folder, it may be the one given as the source: then an image whose whole path is the
    rest of an id also has that row.
    """

    name: str
    kind: str
    label_columns: tuple[str, ...]
    other_levels: tuple[str, ...]
    group_columns: tuple[str, ...]
    groups_file: str | None
    class_names: list[str]
    ids: CompactTexts
    num_duplicates: int
    _codes: array  # index into class_names, NO_LABEL where the row has no label
    _groups: CompactTexts | None
    _has_folders: bool
    _common: str  # folder that all ids begin with, or ""

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, name: str) -> bool:
        return self.row_of(name) is not None

    def row_of(self, name: str) -> int | None:
        """Return the index in `ids` of the row of an image, None if it has no row."""
        tail = image_key(name)
        if not self._has_folders:
            return self.ids.find_sorted(tail.rpartition("/")[2])
        whole = tail
        while tail:
            row = self.ids.find_sorted(tail)
            if row is not None:
                return row
            tail = tail.partition("/")[2]
        return self.ids.find_sorted(f"{self._common}/{whole}") if self._common else None

    def class_of(self, name: str) -> str | None:
        """Return the class of an image, None if it has no row or its row has no label."""
        row = self.row_of(name)
        return None if row is None or self._codes[row] == NO_LABEL else self.class_names[self._codes[row]]

    def group_of(self, name: str) -> str | None:
        """Return the patient or lesion of an image, None if the table does not give it."""
        row = self.row_of(name)
        return None if row is None or self._groups is None else self._groups[row] or None


def image_key(name: str) -> str:
    """Return the form of an image's name that is compared: without the extension, with "/" between folders.

    Case matters: ISIC_1 and isic_1 are two images.
    """
    name = plain_path(name.strip())
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in image_suffixes() else name


def read_table(path: str | os.PathLike, *, id_column: str | None = None, label_column: str | None = None,
               group_column: str | None = None) -> LabelTable:
    """Read a table of a known kind (ISIC 2017 to 2020 and 2024, the ISIC archive, HAM10000), or any by named columns.

    Named columns replace those of a known kind. Without group_column the group is patient_id, or lesion_id if neither
    the row nor another row of its lesion has a patient. An empty label means no label. Whole numbers may have a decimal
    point: 1.0 is the class 1, and lesion 12.0 is lesion 12.

    Raises UserError, with the line, for rows without an id, labels that cannot be read, and rows of one image that
    contradict each other; see layout_of and DelimitedFile for headers and text.
    """
    file = DelimitedFile(path)
    return _read(file, layout_of(file.path, file.header, id_column=id_column, label_column=label_column,
                                 group_column=group_column))


def read_groups(path: str | os.PathLike, *, id_column: str | None = None, group_column: str | None = None,
                beside: LabelTable | None = None) -> LabelTable:
    """Read only the groups of a table, as read_table() does; no image gets a label.

    beside:  a table of labels for which id_column may be meant: then this table need not have that column
    """
    file = DelimitedFile(path)
    if beside is not None and id_column not in file.header:
        id_column = None
    return _read(file, groups_layout_of(file.path, file.header, id_column=id_column, group_column=group_column))


def _read(file: DelimitedFile, layout: Layout) -> LabelTable:
    rows = _Rows.read(file, layout)
    if not rows.ids:
        raise UserError(f"{file.path} has a header but no rows; expected one row per image")
    if layout.class_names is None:
        rows.use_whole_numbers()
    groups = _join_groups(file.path, rows)
    order = sorted(range(len(rows.ids)), key=rows.ids.__getitem__)
    kept = list(_without_duplicates(file.path, rows, groups, order))
    ids = CompactTexts(rows.ids[row] for row in kept)
    names = order_classes(rows.labels) if layout.class_names is None else list(layout.class_names)
    position = {name: index for index, name in enumerate(names)}
    code_of = {code: position[name] for name, code in rows.labels.items()} | {NO_LABEL: NO_LABEL}
    # The common start of the first and the last of a sorted list is common to all.
    common = posixpath.commonpath([posixpath.dirname(ids[0]), posixpath.dirname(ids[-1])])
    return LabelTable(name=file.path.name, kind=layout.kind, label_columns=layout.label_columns,
                      other_levels=layout.other_levels, groups_file=layout.groups_file,
                      group_columns=tuple(file.header[index] for index in layout.group_index),
                      class_names=names, ids=ids, num_duplicates=len(rows.ids) - len(kept),
                      _codes=array("h", (code_of[rows.codes[row]] for row in kept)),
                      _groups=None if groups is None else CompactTexts(groups[row] for row in kept),
                      _has_folders=any("/" in name for name in ids), _common=common)


class _Rows:
    """The data of each row, in the order of the file.

    labels: class name -> code, in the order of appearance
    units:  for each group column its texts, "" where empty
    """

    def __init__(self, num_units: int):
        self.ids = CompactTexts()
        self.lines = array("q")
        self.codes = array("h")
        self.labels: dict[str, int] = {}
        self.units = [CompactTexts() for _ in range(num_units)]

    @classmethod
    def read(cls, file: DelimitedFile, layout: Layout) -> "_Rows":
        rows = cls(len(layout.group_index))
        for line, cells in file.rows():
            name = image_key(cells[layout.id_index])
            if not name:
                raise UserError(f"{file.path}, line {line}: {file.header[layout.id_index]} is empty; expected the name "
                                "of an image")
            try:
                label = layout.label_of(cells)
            except ValueError as error:
                raise UserError(f"{file.path}, line {line}: {name} {error}") from error
            rows.ids.append(name)
            rows.lines.append(line)
            rows.codes.append(NO_LABEL if label is None else rows.labels.setdefault(label, len(rows.labels)))
            if len(rows.labels) > MAX_CLASSES:
                raise UserError(f"{file.path}, line {line}: the column of the labels has more than {MAX_CLASSES} "
                                f"different values ({label!r} for example); expected classes: choose another "
                                "--label-column")
            for unit, index in zip(rows.units, layout.group_index):
                unit.append(cells[index])
        rows.units = [_without_points(unit) for unit in rows.units]
        return rows

    def use_whole_numbers(self) -> None:
        """Turn labels such as 0.0 into 0, if all labels are whole numbers."""
        names = list(self.labels)
        plain = _without_points(names)
        self.labels = {}
        new_code = {old: self.labels.setdefault(name, len(self.labels)) for old, name in enumerate(plain)}
        self.codes = array("h", (new_code.get(code, NO_LABEL) for code in self.codes))


def _without_points(texts: Sequence[str]) -> Sequence[str]:
    """Return 1 for 1.0 if all texts are whole numbers or empty; else return them unchanged.

    pandas writes a column of integers in this way if some are missing, and a spreadsheet may use a decimal comma.
    """
    if not all(not text or _WHOLE_NUMBER.fullmatch(text) for text in texts):
        return texts
    return CompactTexts(_WHOLE_NUMBER.sub(r"\1", text) for text in texts)


def _join_groups(path: Path, rows: _Rows) -> Sequence[str] | None:
    """Return the group of each row: the patient, else the patient of the row's lesion, else the lesion.

    Raises UserError when a lesion has two patients, since it would be in two groups.
    """
    if len(rows.units) < 2:
        return rows.units[0] if rows.units else None
    patient_of: dict[str, str] = {}
    for line, patient, lesion in zip(rows.lines, *rows.units):
        if patient and lesion and patient_of.setdefault(lesion, patient) != patient:
            raise UserError(f"{path}, line {line}: lesion {lesion} belongs to patient {patient}, but to "
                            f"{patient_of[lesion]} in an earlier line; expected one patient: correct it, or "
                            "choose a --group-column")
    return CompactTexts(patient or patient_of.get(lesion, lesion) for patient, lesion in zip(*rows.units))


def _without_duplicates(path: Path, rows: _Rows, groups: Sequence[str] | None, order: Sequence[int]) -> Iterator[int]:
    """Yield the first row of each image. Raises UserError, with the first such line, when rows of one image differ.

    order: rows by id, rows of one id in the order of the file
    """
    first = None
    clashes = []  # (later row, earlier row)
    for row in order:
        if first is None or rows.ids[row] != rows.ids[first]:
            first = row
            yield row
        elif rows.codes[row] != rows.codes[first] or (groups is not None and groups[row] != groups[first]):
            clashes.append((row, first))
    if clashes:
        row, first = min(clashes)
        names = {code: name for name, code in rows.labels.items()} | {NO_LABEL: "without a label"}
        what = [names[rows.codes[at]] for at in (row, first)]
        if what[0] == what[1]:
            what = [f"in the group {groups[at] or '(none)'}" for at in (row, first)]
        more = f" ({len(clashes) - 1} more such rows)" if len(clashes) > 1 else ""
        raise UserError(f"{path}, line {rows.lines[row]}: {rows.ids[row]} is {what[0]}, but {what[1]} in line "
                        f"{rows.lines[first]}{more}; expected rows of one image to agree: correct or remove one")
