"""Read delimited text (CSV) as people have it: comma, semicolon or tab, any line ends, UTF-8, UTF-16 or Latin-1."""

import codecs
import csv
import os
from collections.abc import Iterator
from pathlib import Path

from dnnlib.cli import UserError
from dnnlib.disk_failures import iterate_retrying, retrying
from dnnlib.packed_files import unpack_advice

_DELIMITERS = ",;\t"
_CHUNK = 1 << 20


class DelimitedFile:
    """A table in a text file: its header at once, its rows as they are asked for.

    header: the column names, without spaces around them

    Bytes that are not UTF-8 make the whole file Latin-1, which has a character for every byte. Raises UserError when
    the file is missing, empty, no text, or its header has a single column.
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

        Rows without any text are passed over: spreadsheets leave them at the end. Raises UserError, with the line, for
        a row that has more or fewer cells than the header, and for quotes that do not fit.
        """
        rows = iterate_retrying(lambda: self._all_rows(self._delimiter), self.path)
        next(rows)
        for line, cells in rows:
            if len(cells) != len(self.header):
                raise UserError(f"{self.path}, line {line}: the row has {_cells(len(cells))}; expected "
                                f"{len(self.header)}, as the header has")
            yield line, cells

    def _read_header(self) -> tuple[str, list[str]]:
        """Take the delimiter that splits the first row most often; the first of them when several do."""
        best: tuple[str, list[str]] = ("", [])
        failure = None
        for delimiter in _DELIMITERS:
            try:
                _, cells = next(self._all_rows(delimiter), (0, []))
            except UserError as error:  # quotes end where a wrong delimiter does not expect it
                failure = failure or error
                continue
            if len(cells) > len(best[1]):
                best = delimiter, cells
        if not best[1]:
            raise failure or UserError(f"{self.path} is empty; expected a table: a header and a row an image")
        if len(best[1]) == 1:
            raise UserError(f"{self.path} has the single column {best[1][0][:80]!r}; expected at least two, with "
                            "commas, semicolons or tabs between them")
        return best

    def _all_rows(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        """Yield (first line, cells) of every row that holds any text, the header among them."""
        with open(self.path, encoding=self._encoding, newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            while True:
                line = reader.line_num + 1  # a quoted cell may go over several lines: the first is named
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    if "field limit" in str(error):  # Python's own
                        raise UserError(f"{self.path}, line {line}: a cell has more than {csv.field_size_limit():,} "
                                        "characters; expected short ones: is a quote in this row not closed?"
                                        ) from error
                    raise UserError(f"{self.path}, line {line}: the quotes of this row do not fit ({error}); expected "
                                    'cells such as "text", and "" for a quote inside one') from error
                if cells is None:
                    return
                cells = [cell.strip() for cell in cells]
                if any(cells):
                    yield line, cells


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"


def _encoding_of(path: Path) -> str:
    """Look through the whole file, in pieces, for what cannot be UTF-8."""
    with open(path, "rb") as file:
        start = file.read(2)
        if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # "Unicode text" of a spreadsheet
            return _checked_utf16(path)
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        encoding = "utf-8-sig"
        while chunk := file.read(_CHUNK):
            if b"\x00" in chunk:
                what = unpack_advice(path) or "is no text file"
                raise UserError(f"{path} {what}; expected a table as CSV (a workbook: save it as CSV)")
            if encoding == "utf-8-sig" and not _decodes(decoder, chunk):
                encoding = "latin-1"
        return encoding if encoding == "latin-1" or _decodes(decoder, b"", final=True) else "latin-1"


def _decodes(decoder: codecs.IncrementalDecoder, data: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(data, final)
    except UnicodeDecodeError:
        return False
    return True


def _checked_utf16(path: Path) -> str:
    with open(path, encoding="utf-16") as file:
        try:
            while file.read(_CHUNK):
                pass
        except UnicodeDecodeError as error:
            raise UserError(f"{path} begins like UTF-16 but is damaged ({error.reason}); save the table as CSV in "
                            "UTF-8") from error
    return "utf-16"
