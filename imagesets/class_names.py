"""Find a class by its name or number."""

import re
from collections.abc import Sequence

from dnnlib.cli import UserError
from imagesets.naming import listed, suggestion

_NUMBER = re.compile(r"[0-9]{1,9}")


def find_class(text: str, names: Sequence[str] | None, count: int, *, flag: str = "--class") -> int:
    """Return the number of a class; a name goes before a number that looks like it.

    names:  of the classes, None where they have none;  count: how many there are
    flag:   the option that names the class, for messages

    Raises UserError where there is no such class.
    """
    for name in (text, text.strip()) if names is not None else ():
        if name in names:
            return list(names).index(name)
    if _NUMBER.fullmatch(text.strip()) and int(text) < count:
        return int(text)
    meant = "" if names is None else suggestion(text, names)
    raise UserError(f"{flag} names the class {text!r}{meant}; expected {known_classes(names, count)}")


def known_classes(names: Sequence[str] | None, count: int) -> str:
    """Return "one of nv, mel, or a number from 0 to 1", for messages."""
    numbers = f"a number from 0 to {count - 1}"
    return numbers if names is None else f"one of {listed(names)}, or {numbers}"
