"""Find a class by its name or number."""

from collections.abc import Sequence

from dnnlib.cli import UserError
from imagesets.naming import listed, suggestion


def find_class(text: str, names: Sequence[str] | None, count: int) -> int:
    """Return the number of a class; a name goes before a number that looks like it.

    names:  of the classes, None where they have none;  count: how many there are
    Raises UserError where there is no such class.
    """
    if names is not None and text in names:
        return list(names).index(text)
    if text.isascii() and text.isdecimal() and int(text) < count:
        return int(text)
    expected, meant = f"a number from 0 to {count - 1}", ""
    if names is not None:
        expected, meant = f"one of {listed(names)}, or {expected}", suggestion(text, names)
    raise UserError(f"--class is {text}{meant}; expected {expected}")
