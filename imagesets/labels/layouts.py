"""Recognise a table of labels by its header, and say how a row of it is read.

Sources of the known headers: the ground truth files of the ISIC challenges 2017, 2018 (task 3), 2019 and 2020 (SIIM) at
challenge.isic-archive.com, and the metadata of HAM10000 (Tschandl et al. 2018).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dnnlib.cli import UserError
from imagesets.naming import listed, suggestion

ISIC_2020_CLASSES = ("benign", "malignant")
_ONE_HOT_CLASSES = frozenset({"mel", "nv", "bcc", "ak", "akiec", "bkl", "df", "vasc", "scc", "unk"})
_GROUP_COLUMNS = ("patient_id", "lesion_id")  # the first is the wider group


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a row of a table is read.

    kind:        what the table was recognised as
    id_index:    the cell of the image's name
    label_of:    cells -> class name, None for a row without a label; raises ValueError, saying what was expected
    class_names: the classes in order, None when only the rows tell
    group_index: cells that name what must not be split, the widest first
    """

    kind: str
    id_index: int
    label_of: Callable[[Sequence[str]], str | None]
    class_names: tuple[str, ...] | None
    group_index: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A known header; names in lower case, as headers are compared without regard to case."""

    kind: str
    id_column: str
    label_columns: frozenset[str]
    build: Callable[[Sequence[str]], "tuple[Callable, tuple[str, ...] | None]"]

    def fits(self, lower: Sequence[str]) -> bool:
        return {self.id_column, *self.label_columns} <= set(lower)


def layout_of(path: object, header: Sequence[str], *, id_column: str | None, label_column: str | None,
              group_column: str | None) -> Layout:
    """Combine the columns that are named with what the header tells of the others.

    path: names the table in messages

    Raises UserError when a named column does not exist, and when the header is unknown and a column is not named.
    """
    lower = [name.lower() for name in header]
    known = next((known for known in _KNOWN if known.fits(lower)), None)
    if known is None and (id_column is None or label_column is None):
        raise _unknown_header(path, header, id_column, label_column)
    if id_column is not None:
        id_index = _named(path, header, "--id-column", id_column)
    else:
        id_index = _unique(path, lower, known.id_column)
    if label_column is not None:
        label_index = _named(path, header, "--label-column", label_column)
        if label_index == id_index:
            raise UserError(f"--label-column={label_column} is the column of the ids as well; expected the one of the "
                            f"classes among {listed(header)}")
        label_of, class_names = _read_column(label_index), None
    else:
        for column in sorted(known.label_columns):
            _unique(path, lower, column)
        label_of, class_names = known.build(header)
    if group_column is not None:
        group_index = (_named(path, header, "--group-column", group_column),)
    else:
        group_index = tuple(_unique(path, lower, name) for name in _GROUP_COLUMNS if name in lower)
    as_known = id_column is None and label_column is None
    return Layout(kind=known.kind if as_known else "named columns", id_index=id_index, label_of=label_of,
                  class_names=class_names, group_index=group_index)


def _unknown_header(path: object, header: Sequence[str], id_column: str | None, label_column: str | None) -> UserError:
    missing = [f"{option}=NAME" for option, value in (("--id-column", id_column), ("--label-column", label_column))
               if value is None]
    return UserError(f"{path} is no table of a known kind; its columns are {listed(header)}: say "
                     f"{' and '.join(missing)}")


def _named(path: object, header: Sequence[str], option: str, name: str) -> int:
    if name not in header:
        raise UserError(f"{option}={name} is no column of {path}; expected one of {listed(header)}"
                        f"{suggestion(name, header)}")
    return _unique(path, header, name)


def _unique(path: object, header: Sequence[str], name: str) -> int:
    if header.count(name) > 1:
        raise UserError(f"{path} has {header.count(name)} columns {name}; expected one: rename or remove the others")
    return header.index(name)


def _read_column(index: int) -> Callable[[Sequence[str]], str | None]:
    return lambda cells: cells[index] or None


def _build_dx(header: Sequence[str]) -> tuple[Callable, None]:
    return _read_column([name.lower() for name in header].index("dx")), None


def _build_one_hot(header: Sequence[str]) -> tuple[Callable, tuple[str, ...]]:
    columns = [(index, name) for index, name in enumerate(header) if name.lower() in _ONE_HOT_CLASSES]
    return _read_one_hot(columns, implied=None)


def _build_isic_2017(header: Sequence[str]) -> tuple[Callable, tuple[str, ...]]:
    columns = [(index, name) for index, name in enumerate(header) if name.lower() in _ISIC_2017_CLASSES]
    return _read_one_hot(columns, implied="nevus")


def _read_one_hot(columns: Sequence[tuple[int, str]], implied: str | None) -> tuple[Callable, tuple[str, ...]]:
    """implied: the class of a row of zeros; None makes such a row an error."""
    names = [name for _, name in columns]
    amount = "at most one" if implied else "one"

    def label_of(cells: Sequence[str]) -> str | None:
        if not any(cells[index] for index, _ in columns):
            return None
        hot = [name for index, name in columns if _flag(name, cells[index])]
        if len(hot) > 1 or not (hot or implied):
            found = f"1 in {' and '.join(hot)}" if hot else "no 1"
            raise ValueError(f"has {found}; expected 1 in {amount} of {listed(names)} and 0 in the others")
        return hot[0] if hot else implied

    return label_of, tuple(names + ([implied] if implied else []))


def _build_isic_2020(header: Sequence[str]) -> tuple[Callable, tuple[str, ...]]:
    lower = [name.lower() for name in header]
    target = lower.index("target")
    word = lower.index("benign_malignant") if "benign_malignant" in lower else None

    def label_of(cells: Sequence[str]) -> str | None:
        by_target = ISIC_2020_CLASSES[_flag("target", cells[target])] if cells[target] else None
        by_word = (cells[word].lower() or None) if word is not None else None
        if by_word is not None and by_word not in ISIC_2020_CLASSES:
            raise ValueError(f"has {cells[word]!r} in benign_malignant; expected benign or malignant")
        if by_target and by_word and by_target != by_word:
            raise ValueError(f"has {cells[target]} in target but {cells[word]} in benign_malignant; expected 0 and "
                             "benign, or 1 and malignant")
        return by_target or by_word

    return label_of, ISIC_2020_CLASSES


def _flag(column: str, text: str) -> bool:
    """Read 0 or 1, also as 1.0 or 1,0 (a spreadsheet with decimal commas)."""
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        number = None
    if number not in (0, 1):
        raise ValueError(f"has {text!r} in {column}; expected 0 or 1")
    return number == 1


_ISIC_2017_CLASSES = frozenset({"melanoma", "seborrheic_keratosis"})
_KNOWN = (
    _Known(kind="ISIC 2020 / SIIM", id_column="image_name", build=_build_isic_2020,
           label_columns=frozenset({"target"})),
    _Known(kind="HAM10000", id_column="image_id", label_columns=frozenset({"dx"}), build=_build_dx),
    _Known(kind="ISIC 2017", id_column="image_id", label_columns=_ISIC_2017_CLASSES, build=_build_isic_2017),
    _Known(kind="ISIC 2019", id_column="image", build=_build_one_hot,
           label_columns=_ONE_HOT_CLASSES - {"akiec", "unk"}),
    _Known(kind="ISIC 2018 task 3", id_column="image", build=_build_one_hot,
           label_columns=_ONE_HOT_CLASSES - {"ak", "scc", "unk"}),
)
