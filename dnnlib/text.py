"""Build text for users: names and counts in a sentence, tables, and printable ASCII."""

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

_LISTED = 40  # a message stays one readable line


def listed(names: Sequence[str]) -> str:
    """Return the names separated by commas; of a long list, the first 40."""
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", ... ({rest} more)" if rest > 0 else "")


def listed_with_and(texts: Iterable[str]) -> str:
    """Return "a", "a and b", or "a, b and c"."""
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def suggestion(name: str, names: Sequence[str]) -> str:
    """Return " (did you mean mel?)", or "" when no name is similar; case is ignored."""
    by_lower = {known.lower(): known for known in reversed(names)}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f" (did you mean {by_lower[near[0]]}?)" if near else ""


def is_same_but_for_spelling(name: str, other: str) -> bool:
    """Return whether two names most likely mean the same: they differ in case, punctuation, abbreviations or typos.

    Compared word by word, and words by their first letter: "melanoma (NOS)" and melanoma, grade1 and grade2, BCC and
    SCC, typical and atypical are different.
    """
    words, others = ([*re.findall(r"[^\W\d_]+|\d+", text.lower())] for text in (name, other))
    return bool(words) and len(words) == len(others) and all(map(_is_same_word, words, others))


def _is_same_word(word: str, other: str) -> bool:
    short, long = sorted((word, other), key=len)
    if word == other or word[0] != other[0] or word.isdigit():
        return word == other
    if len(short) > 1 and len(long) > 4 and long.startswith(short):  # ak, akiec; not i, ii, iii
        return True
    changes = difflib.SequenceMatcher(None, short, long, autojunk=False).get_opcodes()
    return sum(max(a2 - a1, b2 - b1) for kind, a1, a2, b1, b2 in changes if kind != "equal") <= min(2, len(long) - 3)


def shorten(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names, followed by "..." if there are more."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def plural(count: int, noun: str, many: str | None = None) -> str:
    """Return "1 image" or "2 images"."""
    return f"{count} {noun if count == 1 else many or noun + 's'}"


def format_table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Return lines with aligned columns, two spaces apart.

    rows: of equal length
    left: columns aligned on the left; the others (numbers) are aligned on the right
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [text.ljust(width) if column in left else text.rjust(width)
                 for column, (text, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def percent(part: float, whole: float) -> str:
    """Return "12.3%", or "-" when `whole` is 0."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def to_ascii(text: str) -> str:
    """Remove accents, and replace other characters outside printable ASCII by "?": Pillow's own font has no others."""
    letters = [letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter)]
    return "".join(letter if " " <= letter <= "~" else "?" for letter in letters)


def fitted(text: str, width: float, width_of: Callable[[str], float]) -> str:
    """Return a text unchanged if it fits, else its beginning and "..".

    width_of: returns the width of a text, in the units of `width`
    """
    if width_of(text) <= width:
        return text
    low, high = 0, len(text) - 1  # letters that are known to fit; letters that may fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width_of(f"{text[:middle]}..") <= width else (low, middle - 1)
    return f"{text[:low]}.."
