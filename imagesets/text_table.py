"""Print tables of plain text."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Return lines with aligned columns, two spaces apart.

    rows: of equal length
    left: columns that are aligned on the left; the others are numbers
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [text.ljust(width) if column in left else text.rjust(width)
                 for column, (text, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def percent(part: float, whole: float) -> str:
    """Return "12.3%", or "-" of nothing."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def shorten(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names, and "..." where there are more."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def plural(count: int, noun: str, many: str | None = None) -> str:
    """Return "1 image" or "2 images"."""
    return f"{count} {noun if count == 1 else many or noun + 's'}"
