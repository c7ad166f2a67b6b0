"""Labels of images: classes or vectors, which are missing; and classes found, ordered and merged by name.

The labels of N images are None, or int64 [N] class numbers with NO_LABEL for an image without one, or float32 [N, D]
vectors with NaN there. In dataset.json a label is an integer, a list of numbers, or null.

A class name may contain commas, like "Melanoma, NOS" of the ISIC archive: the longest name that exists is taken. Names
may also be of classes that a source has no images of, as an institution need not have images of every class of a study.

LIMIT: names that contain a semicolon or an equals sign cannot be written in --merge.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.text import is_same_but_for_spelling, listed, suggestion

NO_LABEL = -1
MAX_CLASSES = 1000  # more would be names, ages or dates, and their one-hot labels would fill the memory
# Kinds of labels. In dataset.json an integer is a class, and a list of numbers a vector: several findings, or values.
CLASS, VECTOR = "class", "vector"
LABELS = {CLASS: "numbers of classes as labels", VECTOR: "lists of numbers as labels", None: "no labels"}  # in messages

_NUMBER = re.compile(r"[0-9]{1,9}")
_MERGE_FORM = 'expected "new=a,b;other=c"'
_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)", re.ASCII)


def missing_labels(labels: np.ndarray | None, count: int | None = None) -> np.ndarray:
    """Return which images have no label: bool [N]; if labels are None, all `count` images."""
    if labels is None:
        return np.ones(count, dtype=bool)
    return labels == NO_LABEL if labels.ndim == 1 else np.isnan(labels).any(axis=1)


def no_labels(count: int, shape: Sequence[int] = ()) -> np.ndarray:
    """Return the labels of `count` images that have none: int64 [count], or float32 [count, *shape] of vectors."""
    return np.full((count, *shape), np.nan if shape else NO_LABEL, dtype=np.float32 if shape else np.int64)


def label_vectors(labels: np.ndarray, length: int) -> np.ndarray:
    """Return labels as networks take them: float32 [N, length]; classes become one-hot, NO_LABEL zeros.

    labels:  int64 [N] below `length`, or float32 [N, length], which are returned as they are
    """
    return labels if labels.ndim == 2 else (labels[:, None] == np.arange(length)).astype(np.float32)


def class_name(number: int, names: Sequence[str] | None, unnamed: str = "{}") -> str:
    """Return the name of a class; if classes have no names, its number, formatted by `unnamed`."""
    return unnamed.format(number) if names is None else names[number]


def class_names(labels: np.ndarray | None, names: Sequence[str] | None) -> list[str]:
    """Return a name for each class, or for each number of a vector; its number if there are no names.

    Class numbers are kept, even with gaps; then there are classes without images.
    """
    if labels is None:
        return []
    count = int(labels.max(initial=NO_LABEL)) + 1 if labels.ndim == 1 else labels.shape[1]
    return [class_name(number, None) for number in range(count)] if names is None else list(names)


def numbers_of(found: Sequence[str | None], classes: Sequence[str]) -> np.ndarray:
    """Return the numbers of classes that are given by name: int64 [N], NO_LABEL for None."""
    index = {name: number for number, name in enumerate(classes)} | {None: NO_LABEL}
    return np.array([index[name] for name in found], dtype=np.int64)


def find_class(text: str, names: Sequence[str] | None, count: int, *, flag: str = "--class") -> int:
    """Return the number of a class, given by its name or number.

    If a name is itself a number, as for the classes 1 to 7, only names are accepted: 1 could be two classes.

    names:  of the classes, None if they have none;  count: the number of classes
    flag:   the option that names the class, for messages

    Raises UserError if there is no such class.
    """
    for name in (text, text.strip()) if names is not None else ():
        if name in names:
            return list(names).index(name)
    if _NUMBER.fullmatch(text.strip()) and int(text) < count and not _are_numbers(names):
        return int(text)
    meant = "" if names is None else suggestion(text, names)
    raise UserError(f"{flag} names the class {text!r}{meant}; expected {known_classes(names, count)}")


def known_classes(names: Sequence[str] | None, count: int) -> str:
    """Return "one of nv, mel, or a number from 0 to 1", for messages."""
    numbers = f"a number from 0 to {count - 1}"
    if names is None:
        return numbers
    return f"one of {listed(names)}" + ("" if _are_numbers(names) else f", or {numbers}")


def _are_numbers(names: Sequence[str] | None) -> bool:
    return names is not None and any(_NUMBER.fullmatch(name) for name in names)


def split_names(text: str, known: Sequence[str]) -> list[str]:
    """Split a text at commas, but not inside those names of `known` that contain commas."""
    pieces, names = text.split(","), []
    longest = 1 + max((name.count(",") for name in known), default=0)
    while pieces:
        count = next((count for count in range(longest, 1, -1) if ",".join(pieces[:count]).strip() in known), 1)
        names.append(",".join(pieces[:count]).strip())
        del pieces[:count]
    return names


def label_kind_of(info: Mapping[str, Any], c_dim: int) -> str | None:
    """Return the kind of label that a network learned: CLASS, VECTOR, or None if its file does not record it.

    info:   of the network file: "label_kind"; older files have class_counts instead, which is null for vectors
    c_dim:  of the network

    LIMIT: NVIDIA's files do not record it; their labels are taken for classes.
    """
    if c_dim == 0:
        return None
    if info.get("label_kind") in (CLASS, VECTOR):
        return info["label_kind"]
    if "class_counts" not in info:
        return None
    return VECTOR if info["class_counts"] is None else CLASS


def named_classes(info: Mapping[str, Any], c_dim: int) -> list[str] | None:
    """Return the names of classes, or of a vector's numbers, in a network file; None if they are missing or wrong.

    info, c_dim:  as in `label_kind_of`
    """
    names = info.get("classes")
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) == c_dim > 0
    return list(names) if fits and len(set(names)) == c_dim else None


def class_order(names: Sequence[str] | None, wanted: Sequence[str] | None) -> list[int] | None:
    """Return the index in `names` of each of `wanted`; None if the two do not have the same names."""
    if names is None or wanted is None or sorted(names) != sorted(wanted):
        return None
    return [list(names).index(name) for name in wanted]


def order_classes(names: Iterable[str]) -> list[str]:
    """Return class names, all different, in the order in which they are numbered.

    By value if all are numbers (0, 1, 2, 10; -1, 9.5, 010, 10: equal values by text), else by text. The number of a
    class is its index: the classes 1 to 7 become 0 to 6.
    """
    names = sorted(names)
    numeric = all(_DECIMAL.fullmatch(name) for name in names)
    return sorted(names, key=Decimal) if numeric else names


def choose_classes(found: Sequence[str], classes: str | None = None, merge: str | None = None,
                   ) -> tuple[list[str], dict[str, int | None], list[str]]:
    """Apply --merge, then --classes.

    found:   the names that exist, in the default order
    merge:   "melanoma=mel;benign=nv,bkl": classes named here get a new name, the others keep theirs; a merged class
             takes the place of its first member. None merges nothing.
    classes: "melanoma,benign": names after merging that are wanted, in this order. None takes all.

    Returns the class names; the new number of each found one, None if left out; and the names in --merge or --classes
    that do not exist. Raises UserError for names that do not exist and are most likely mistakes, for repeated ones, and
    for texts of another form.
    """
    found = list(found)
    if twice := _first_repeated(found):
        raise UserError(f"the class {twice} exists twice among {listed(found)}; expected different names")
    merged = {} if merge is None else _parse_merge(merge, found)
    new_name = {name: merged.get(name, name) for name in found}
    members = list(dict.fromkeys(new_name.values()))
    names = members if classes is None else _parse_classes(classes, members, merged)
    for name, target in merged.items():
        if classes is None and target not in members:
            raise _unknown(f"--merge={merge} takes {name} into {target}", name, found)
    absent = [name for name in merged if name not in found]
    absent += [name for name in names if name not in members and name not in merged.values()]
    return names, {name: names.index(new_name[name]) if new_name[name] in names else None for name in found}, absent


def is_named(name: str, classes: str | None, merge: str | None) -> bool:
    """Return whether --classes, or --merge among the members of a group, names this class."""
    groups = [] if merge is None else [group.partition("=")[2] for group in merge.split(";")]
    return any(name in split_names(text, [name]) for text in (*groups, *([] if classes is None else [classes])))


def _parse_merge(merge: str, found: Sequence[str]) -> dict[str, str]:
    """Return {name: new name} of the classes in --merge, also of those that do not exist."""
    new_name: dict[str, str] = {}
    groups = [_parse_group(merge, text, found) for text in merge.removesuffix(";").split(";")]
    if twice := _first_repeated([name for name, _ in groups]):
        raise UserError(f"--merge={merge} makes {twice} twice; expected one group of this name, with all its classes")
    others = [name for name in found if not any(name in members for _, members in groups)]
    for target, members in groups:
        for name in members:
            if name not in found:
                _refuse_misspelled(f"--merge={merge} takes {name} into {target}", name, found, others)
            if name in new_name:
                where = f"twice in {target}" if new_name[name] == target else f"in both {new_name[name]} and {target}"
                raise UserError(f"--merge={merge} puts {name} {where}; expected each class once")
            new_name[name] = target
    for target, _ in groups:
        if target in others:
            raise UserError(f"--merge={merge} makes {target}, but a class {target} exists outside of this group; add "
                            "it to the group, or choose another name")
    return new_name


def _parse_group(merge: str, text: str, found: Sequence[str]) -> tuple[str, list[str]]:
    target, equals, members = (part.strip() for part in text.partition("="))
    if not equals or "=" in members or "," in target:
        raise UserError(f"--merge={merge} has the part {text.strip()!r}; {_MERGE_FORM}")
    if not target:
        raise UserError(f"--merge={merge} has a group without a name ({text.strip()!r}); {_MERGE_FORM}")
    if not members:
        raise UserError(f"--merge={merge} has the empty group {target}; {_MERGE_FORM}")
    names = split_names(members, found)
    if "" in names:
        raise UserError(f"--merge={merge} has an empty name in the group {target}; {_MERGE_FORM}")
    # A name with a comma that does not exist becomes two that do not exist either, which changes nothing.
    _refuse_unclear_comma(f"--merge={merge}", members, names, found, num_absent=(1,))
    return target, names


def _parse_classes(classes: str, members: Sequence[str], merged: Mapping[str, str]) -> list[str]:
    """Return the names in the order wanted. members: that exist after merging; merged: {name: new name}"""
    known = [*members, *merged.values()]
    names = split_names(classes, known)
    if "" in names:
        raise UserError(f"--classes={classes} has an empty name; expected names separated by commas, such as nv,mel")
    if twice := _first_repeated(names):
        raise UserError(f"--classes={classes} names {twice} twice; expected each class once")
    left_out = [name for name in members if name not in names]
    for name in names:
        if name not in known and name in merged:
            raise UserError(f"--classes={classes} names {name}, which --merge put into {merged[name]}; expected some "
                            f"of {listed(members)}")
        if name not in known:
            _refuse_misspelled(f"--classes={classes} names {name}", name, members, left_out)
    if not any(name in members for name in names):
        raise _unknown(f"--classes={classes} names {names[0]}", names[0], members)
    _refuse_unclear_comma(f"--classes={classes}", classes, names, known, num_absent=(1, 2))
    return names


def _unknown(start: str, name: str, names: Sequence[str]) -> UserError:
    return UserError(f"{start}, but there is no class {name}; expected some of {listed(names)}"
                     f"{suggestion(name, names)}")


def _refuse_misspelled(start: str, name: str, names: Sequence[str], unused: Sequence[str]) -> None:
    """Raise UserError if a name that does not exist is most likely one of `unused`, those of `names` not named."""
    meant = next((other for other in unused if is_same_but_for_spelling(name, other)), None)
    if meant is not None:
        raise UserError(f"{start}, but there is no class {name}; expected some of {listed(names)} (did you mean "
                        f"{meant}? If not, give {meant} another name with --merge)")


def _refuse_unclear_comma(start: str, text: str, names: Sequence[str], known: Sequence[str],
                          num_absent: Collection[int]) -> None:
    """Raise UserError if two names, of which so many do not exist, may be one that contains a comma and a space."""
    for pair in pairwise(names):
        one = ", ".join(pair)
        if one in text and sum(name not in known for name in pair) in num_absent:
            raise UserError(f'{start} has "{one}", which is no class here; if these are two classes, leave out the '
                            f"space ({','.join(pair)}); if it is one that only other data sets have, give it a name "
                            "without a comma in all, with --merge")


def _first_repeated(names: Sequence[str]) -> str | None:
    return next((name for index, name in enumerate(names) if name in names[:index]), None)


def class_counts(shares: Sequence[float], count: int) -> list[int]:
    """Return image counts that sum to `count`, by the largest remainder method; of equal remainders the first wins.

    shares: of the classes, >= 0, with any sum above 0
    """
    total = sum(shares)
    wanted = [share / total * count for share in shares]
    counts = [int(number + 1e-9) for number in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda label: round(counts[label] - wanted[label], 9))
    for label in by_remainder[:count - sum(counts)]:
        counts[label] += 1
    return counts
