"""Find classes by their names or numbers, and tell labels that are classes from labels that are vectors."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dnnlib.cli import UserError
from imagesets.naming import listed, suggestion

# Kinds of labels. In dataset.json an integer is a class, and a list of numbers a vector: several findings, or values.
CLASS, VECTOR = "class", "vector"
LABELS = {CLASS: "numbers of classes as labels", VECTOR: "lists of numbers as labels", None: "no labels"}  # in messages

_NUMBER = re.compile(r"[0-9]{1,9}")


def find_class(text: str, names: Sequence[str] | None, count: int, *, flag: str = "--class") -> int:
    """Return the number of a class, given by its name or number.

    Where a name is a number itself, as of the classes 1 to 7, only names are taken: 1 would be another class.

    names:  of the classes, None where they have none;  count: how many there are
    flag:   the option that names the class, for messages

    Raises UserError where there is no such class.
    """
    for name in (text, text.strip()) if names is not None else ():
        if name in names:
            return list(names).index(name)
    if _NUMBER.fullmatch(text.strip()) and int(text) < count and not _are_numbers(names):
        return int(text)
    meant = "" if names is None else suggestion(text, names)
    raise UserError(f"{flag} names the class {text!r}{meant}; expected {known_classes(names, count)}")


def split_names(text: str, known: Sequence[str]) -> list[str]:
    """Return the names between the commas of a text; those of `known` that hold commas themselves stay whole."""
    pieces, names = text.split(","), []
    longest = 1 + max((name.count(",") for name in known), default=0)
    while pieces:
        count = next((count for count in range(longest, 1, -1) if ",".join(pieces[:count]).strip() in known), 1)
        names.append(",".join(pieces[:count]).strip())
        del pieces[:count]
    return names


def label_kind_of(info: Mapping[str, Any], c_dim: int) -> str | None:
    """Return the kind of label that a network learned: CLASS, VECTOR, or None where its file does not tell.

    info:   what the file says: "label_kind"; files that are older than it still say class_counts, null for vectors
    c_dim:  of the network

    LIMIT: NVIDIA's files tell nothing; their labels are taken for classes.
    """
    if c_dim == 0:
        return None
    if info.get("label_kind") in (CLASS, VECTOR):
        return info["label_kind"]
    if "class_counts" not in info:
        return None
    return VECTOR if info["class_counts"] is None else CLASS


def named_classes(info: Mapping[str, Any], c_dim: int) -> list[str] | None:
    """Return the names that a network file gives its classes, or the numbers of its vectors; None without fitting ones.

    info, c_dim:  as in `label_kind_of`
    """
    names = info.get("classes")
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) == c_dim > 0
    return list(names) if fits and len(set(names)) == c_dim else None


def class_order(names: Sequence[str] | None, wanted: Sequence[str] | None) -> list[int] | None:
    """Return the place in `names` of each of `wanted`; None where these are not the same names."""
    if names is None or wanted is None or sorted(names) != sorted(wanted):
        return None
    return [list(names).index(name) for name in wanted]


def known_classes(names: Sequence[str] | None, count: int) -> str:
    """Return "one of nv, mel, or a number from 0 to 1", for messages."""
    numbers = f"a number from 0 to {count - 1}"
    if names is None:
        return numbers
    return f"one of {listed(names)}" + ("" if _are_numbers(names) else f", or {numbers}")


def _are_numbers(names: Sequence[str] | None) -> bool:
    return names is not None and any(_NUMBER.fullmatch(name) for name in names)
