"""Recognize a table of labels or groups by its header, and define how its rows are read.

Sources of the known headers: the ground truth files of the ISIC challenges 2017, 2018 (task 3), 2019, 2020 (SIIM) and
2024 at challenge.isic-archive.com, the lesion files beside those of 2018 and 2019, Kaggle's train-metadata.csv of
2024, the metadata.csv of the ISIC archive (isic-archive.com: diagnosis_1 to diagnosis_5 since 2024, before that
benign_malignant), and the metadata of HAM10000 (Tschandl et al. 2018).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from dnnlib.cli import UserError
from dnnlib.text import listed, suggestion

TARGET_CLASSES = ("benign", "malignant")  # meaning of 0 and 1 in the columns target and malignant
_ONE_HOT_CLASSES = frozenset({"mel", "nv", "bcc", "ak", "akiec", "bkl", "df", "vasc", "scc", "unk"})
_ID_COLUMNS = ("isic_id", "image_name", "image_id", "image")
_GROUP_COLUMNS = ("patient_id", "lesion_id")  # the first is the wider group


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a row of a table is read.

    kind:          of table that was recognized
    id_index:      the cell with the image's name
    label_of:      cells -> class name, None for a row without a label; raises ValueError with what was expected
    class_names:   the classes in order, None if they come from the rows
    group_index:   cells with the groups, which must not be split, the widest first
    label_columns: names of the columns that give the label, in the table's order
    other_levels:  names of columns with coarser or finer diagnoses, which --label-column may name
    groups_file:   the file with the groups for this kind of table, if the table has none
    """

    kind: str
    id_index: int
    label_of: Callable[[Sequence[str]], str | None]
    class_names: tuple[str, ...] | None
    group_index: tuple[int, ...]
    label_columns: tuple[str, ...] = ()
    other_levels: tuple[str, ...] = ()
    groups_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A known header; names in lower case, as headers are compared without regard to case.

    label_columns: columns that the table must have
    build:         (header, label_columns) -> the cells that give the label, label_of and class_names of Layout
    levels:        all columns of the same diagnosis, from coarse to fine
    """

    kind: str
    id_column: str
    label_columns: frozenset[str]
    build: "Callable[[Sequence[str], frozenset[str]], tuple[Sequence[int], Callable, tuple[str, ...] | None]]"
    levels: tuple[str, ...] = ()
    groups_file: str | None = None

    def fits(self, lower: Sequence[str]) -> bool:
        return {self.id_column, *self.label_columns} <= set(lower)


def layout_of(path: object, header: Sequence[str], *, id_column: str | None, label_column: str | None,
              group_column: str | None) -> Layout:
    """Combine the named columns with those recognized by the header.

    path: of the table, for messages

    Raises UserError when a named column does not exist, and when the header is unknown and a column is not named.
    """
    lower = [name.lower() for name in header]
    fitting = [known for known in _KNOWN if known.fits(lower)]
    known = next((known for known in fitting if label_column is None
                  # Naming a known column does not change how it is read: 1 in target is malignant.
                  or (label_column in header and known.label_columns == {label_column.lower()})), None)
    id_index = _id_index(path, header, id_column, known or next(iter(fitting), None))
    if id_index is None or (known is None and label_column is None):
        raise _unknown_header(path, header, id_index, label_column)
    if label_column is not None and _named(path, header, "--label-column", label_column) == id_index:
        raise UserError(f"--label-column={label_column} is also the id column; expected the column of the classes "
                        f"among {listed(header)}")
    group_index = _group_index(path, header, group_column)
    if known is None:
        return Layout(kind="named columns", id_index=id_index, label_of=_read_column(header.index(label_column)),
                      class_names=None, group_index=group_index, label_columns=(label_column,))
    for column in sorted(known.label_columns):
        _unique(path, lower, column)
    label_index, label_of, class_names = known.build(header, known.label_columns)
    others = set(known.levels) - known.label_columns
    return Layout(kind=known.kind if id_column is None else "named columns", id_index=id_index, label_of=label_of,
                  class_names=class_names, group_index=group_index,
                  label_columns=tuple(header[index] for index in label_index),
                  other_levels=tuple(name for name in header if name.lower() in others),
                  groups_file=known.groups_file)


def groups_layout_of(path: object, header: Sequence[str], *, id_column: str | None,
                     group_column: str | None) -> Layout:
    """Return how a table is read for its groups only.

    Raises UserError when a named column does not exist, and when a column is neither named nor recognized.
    """
    id_index = _id_index(path, header, id_column, None)
    group_index = _group_index(path, header, group_column)
    missing = [name for name, is_missing in (("--id-column", id_index is None), ("--group-column", not group_index))
               if is_missing]
    if missing:
        raise UserError(f"--groups={path} has the columns {listed(header)}; expected the name of the image in one of "
                        f"{listed(_ID_COLUMNS)}, and {' or '.join(_GROUP_COLUMNS)}: give "
                        f"{' and '.join(f'{name}=NAME' for name in missing)}")
    return Layout(kind="groups", id_index=id_index, label_of=lambda cells: None, class_names=(),
                  group_index=group_index)


def _id_index(path: object, header: Sequence[str], id_column: str | None, known: "_Known | None") -> int | None:
    """Return the column with the image names: the one named, that of the known header, or the only usual one."""
    if id_column is not None:
        return _named(path, header, "--id-column", id_column)
    lower = [name.lower() for name in header]
    if known is not None:
        return _unique(path, lower, known.id_column)
    usual = [name for name in _ID_COLUMNS if name in lower]
    return _unique(path, lower, usual[0]) if len(usual) == 1 else None


def _group_index(path: object, header: Sequence[str], group_column: str | None) -> tuple[int, ...]:
    if group_column is not None:
        return (_named(path, header, "--group-column", group_column),)
    lower = [name.lower() for name in header]
    return tuple(_unique(path, lower, name) for name in _GROUP_COLUMNS if name in lower)


def _unknown_header(path: object, header: Sequence[str], id_index: int | None, label_column: str | None) -> UserError:
    missing = [f"{option}=NAME" for option, is_missing in (("--id-column", id_index is None),
                                                           ("--label-column", label_column is None)) if is_missing]
    return UserError(f"{path} is not a table of a known kind; its columns are {listed(header)}: give "
                     f"{' and '.join(missing)}")


def _named(path: object, header: Sequence[str], option: str, name: str) -> int:
    if name not in header:
        raise UserError(f"{option}={name} is not a column of {path}; expected one of {listed(header)}"
                        f"{suggestion(name, header)}")
    return _unique(path, header, name)


def _unique(path: object, header: Sequence[str], name: str) -> int:
    if header.count(name) > 1:
        raise UserError(f"{path} has {header.count(name)} columns {name}; expected one: rename or remove the others")
    return header.index(name)


def _read_column(index: int) -> Callable[[Sequence[str]], str | None]:
    return lambda cells: cells[index] or None


def _build_column(header: Sequence[str], columns: frozenset[str]) -> tuple[Sequence[int], Callable, None]:
    """Read one column of names."""
    (column,) = columns
    index = [name.lower() for name in header].index(column)
    return [index], _read_column(index), None


def _build_one_hot(header: Sequence[str], columns: frozenset[str], *,
                   implied: str | None = None) -> tuple[Sequence[int], Callable, tuple[str, ...]]:
    """Read 1 in one of several columns. implied: the class of a row of zeros; None makes such a row an error"""
    taken = _ONE_HOT_CLASSES if implied is None else columns
    indices = [index for index, name in enumerate(header) if name.lower() in taken]
    names = [header[index] for index in indices]

    def label_of(cells: Sequence[str]) -> str | None:
        if not any(cells[index] for index in indices):
            return None
        hot = [name for index, name in zip(indices, names) if _flag(name, cells[index])]
        if len(hot) > 1 or not (hot or implied):
            found = f"1 in {' and '.join(hot)}" if hot else "no 1"
            amount = "at most one" if implied else "one"
            raise ValueError(f"has {found}; expected 1 in {amount} of {listed(names)} and 0 in the others")
        return hot[0] if hot else implied

    return indices, label_of, (*names, implied) if implied else tuple(names)


def _build_target(header: Sequence[str], columns: frozenset[str]) -> tuple[Sequence[int], Callable, tuple[str, ...]]:
    """Read 0 as benign and 1 as malignant, and check them against benign_malignant if that column exists."""
    (column,) = columns
    lower = [name.lower() for name in header]
    target = lower.index(column)
    word = lower.index("benign_malignant") if "benign_malignant" in lower else None

    def label_of(cells: Sequence[str]) -> str | None:
        by_target = TARGET_CLASSES[_flag(column, cells[target])] if cells[target] else None
        by_word = (cells[word].lower() or None) if word is not None else None
        if by_word is not None and by_word not in TARGET_CLASSES:
            raise ValueError(f"has {cells[word]!r} in benign_malignant; expected benign or malignant")
        if by_target and by_word and by_target != by_word:
            raise ValueError(f"has {cells[target]} in {column} but {cells[word]} in benign_malignant; expected 0 and "
                             "benign, or 1 and malignant")
        return by_target or by_word

    return [target], label_of, TARGET_CLASSES


def _flag(column: str, text: str) -> bool:
    """Read 0 or 1, also written as 1.0 or 1,0 (decimal comma)."""
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        number = None
    if number not in (0, 1):
        raise ValueError(f"has {text!r} in {column}; expected 0 or 1")
    return number == 1


_DIAGNOSES = tuple(f"diagnosis_{level}" for level in range(1, 6))
_ISIC_2024_DIAGNOSES = tuple(f"iddx_{level}" for level in range(1, 6))
# The first that fits is used: for a table with a target and diagnoses, the target.
_KNOWN = (
    _Known(kind="ISIC 2020 / SIIM", id_column="image_name", build=_build_target,
           label_columns=frozenset({"target"})),
    _Known(kind="HAM10000", id_column="image_id", label_columns=frozenset({"dx"}), build=_build_column),
    _Known(kind="ISIC 2017", id_column="image_id", build=partial(_build_one_hot, implied="nevus"),
           label_columns=frozenset({"melanoma", "seborrheic_keratosis"})),
    _Known(kind="ISIC 2019", id_column="image", build=_build_one_hot,
           label_columns=_ONE_HOT_CLASSES - {"akiec", "unk"}, groups_file="ISIC_2019_Training_Metadata.csv"),
    _Known(kind="ISIC 2018 task 3", id_column="image", build=_build_one_hot,
           label_columns=_ONE_HOT_CLASSES - {"ak", "scc", "unk"},
           groups_file="ISIC2018_Task3_Training_LesionGroupings.csv"),
    *(_Known(kind="ISIC 2024", id_column="isic_id", build=build, label_columns=frozenset({column}),
             levels=_ISIC_2024_DIAGNOSES, groups_file="train-metadata.csv from Kaggle")
      for column, build in (("target", _build_target), ("malignant", _build_target), ("iddx_1", _build_column))),
    *(_Known(kind="ISIC archive", id_column=id_column, build=_build_column, label_columns=frozenset({column}),
             levels=_DIAGNOSES)
      for id_column, column in (("isic_id", "diagnosis_1"), ("isic_id", "benign_malignant"),
                                ("name", "meta.clinical.benign_malignant"))),
)
