"""Find classes by their names or numbers, and tell labels that are classes from labels that are vectors."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.text import listed, suggestion

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


# MERGED from imagesets.labels.classes
# Choose, order and merge classes by name, wherever the names come from: a table, sub-folders or a data set.
#
# A name may hold commas, as "Melanoma, NOS" of the ISIC archive does: the longest name that exists is taken.
#
# LIMIT: names that contain a semicolon or an equals sign cannot be written in --merge.


_MERGE_FORM = 'expected "new=a,b;other=c"'
_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)", re.ASCII)


def order_classes(names: Iterable[str]) -> list[str]:
    """Return different names of classes in the order that numbers them, wherever they come from.

    By value when all are numbers (0, 1, 2, 10; -1, 9.5, 010, 10: equal values by text), else by text. A class's number
    is its place: the classes 1 to 7 become 0 to 6.
    """
    names = sorted(names)
    numeric = all(_DECIMAL.fullmatch(name) for name in names)
    return sorted(names, key=Decimal) if numeric else names


def names_of_numbers(labels: np.ndarray) -> list[str]:
    """Return the names of classes that are known by bare numbers only, as in arrays: these numbers, from 0.

    labels: int64 [N], negative for none

    Such numbers stay as they are, also with gaps; then there are classes without images.
    """
    return [str(number) for number in range(int(labels.max(initial=-1)) + 1)]


@dataclass(frozen=True, kw_only=True)
class ClassChoice:
    """Which output class, if any, each class that was found becomes.

    names:   the output classes in order; the index is the label
    members: for each output class the found classes in it, in the order they were found
    dropped: found classes that are not chosen
    """

    names: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    dropped: tuple[str, ...]

    @classmethod
    def create(cls, found: Sequence[str], classes: str | None = None, merge: str | None = None) -> "ClassChoice":
        """Apply --merge, then --classes.

        found:   the names that exist, in the order that counts where nothing else is said
        merge:   "melanoma=mel;benign=nv,bkl": classes named here get a new name, the others keep theirs; a merged
                 class stands where the first of its members stood. None merges nothing.
        classes: "melanoma,benign": names after merging that are wanted, in this order. None takes all.

        Raises UserError for names that do not exist, that come twice, and for texts of another form.
        """
        found = list(found)
        if twice := _first_repeated(found):
            raise UserError(f"the class {twice} exists twice among {listed(found)}; expected different names")
        new_name = {name: name for name in found} | ({} if merge is None else _parse_merge(merge, found))
        members: dict[str, list[str]] = {}
        for name in found:
            members.setdefault(new_name[name], []).append(name)
        names = list(members) if classes is None else _parse_classes(classes, members)
        dropped = [name for name in found if new_name[name] not in names]
        return cls(names=tuple(names), members=tuple(tuple(members[name]) for name in names), dropped=tuple(dropped))

    def index_of(self, name: str) -> int | None:
        """Return the label of a found class, None when it is not chosen. Raises KeyError for any other name."""
        for index, members in enumerate(self.members):
            if name in members:
                return index
        if name in self.dropped:
            return None
        raise KeyError(name)


def _parse_merge(merge: str, found: Sequence[str]) -> dict[str, str]:
    """Return found name -> new name for the classes that are named."""
    new_name: dict[str, str] = {}
    groups = [_parse_group(merge, text, found) for text in merge.removesuffix(";").split(";")]
    if twice := _first_repeated([name for name, _ in groups]):
        raise UserError(f"--merge={merge} makes {twice} twice; expected one group of this name, with all its classes")
    for target, members in groups:
        for name in members:
            if name not in found:
                raise _unknown(f"--merge={merge} takes {name} into {target}, but there is no class {name}", name, found)
            if name in new_name:
                where = f"twice in {target}" if new_name[name] == target else f"in both {new_name[name]} and {target}"
                raise UserError(f"--merge={merge} puts {name} {where}; expected each class once")
            new_name[name] = target
    for target, _ in groups:
        if target in found and target not in new_name:
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
    return target, names


def _parse_classes(classes: str, members: dict[str, list[str]]) -> list[str]:
    """Return the names in the order wanted."""
    names = split_names(classes, list(members))
    if "" in names:
        raise UserError(f"--classes={classes} has an empty name; expected names with commas between them, as nv,mel")
    if twice := _first_repeated(names):
        raise UserError(f"--classes={classes} names {twice} twice; expected each class once")
    for name in names:
        if name not in members:
            merged = next((target for target, inside in members.items() if name in inside), None)
            if merged is not None:
                raise UserError(f"--classes={classes} names {name}, which --merge has put into {merged}; expected some "
                                f"of {listed(list(members))}")
            raise _unknown(f"--classes={classes} names {name}, but there is no class {name}", name, list(members))
    return names


def _unknown(start: str, name: str, names: Sequence[str]) -> UserError:
    return UserError(f"{start}; expected some of {listed(names)}{suggestion(name, names)}")


def _first_repeated(names: Sequence[str]) -> str | None:
    return next((name for index, name in enumerate(names) if name in names[:index]), None)


# MERGED from imagesets.class_shares
# Divide a number of images among classes.


def class_counts(shares: Sequence[float], count: int) -> list[int]:
    """Return numbers of images that add up to `count`, by largest remainder; of equal remainders the first wins.

    shares: of the classes, >= 0, of any sum above 0
    """
    total = sum(shares)
    wanted = [share / total * count for share in shares]
    counts = [int(number + 1e-9) for number in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda label: round(counts[label] - wanted[label], 9))
    for label in by_remainder[:count - sum(counts)]:
        counts[label] += 1
    return counts
