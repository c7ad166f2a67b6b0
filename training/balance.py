"""Turn --balance into one weight an image."""

import csv
import math
import os
from pathlib import Path

import numpy as np

from dnnlib.cli import UserError
from dnnlib.disk_failures import retrying
from imagesets.reader import NO_LABEL
from training.dataset import ImageDataset


def image_weights(balance: str | os.PathLike, dataset: ImageDataset) -> np.ndarray | None:
    """Return weights float64 [len(dataset)], or None for equal ones.

    balance:  "none"; "classes": every class that has images is seen equally often; or a CSV file with the columns
              `class,weight` (the share in which a class is to be seen; its images are equal among themselves) or
              `file,weight` (one an image, by its name in the data set). Classes and files that are not named get 0.

    Raises UserError when the file or the data set's labels do not allow it.
    """
    if balance == "none":
        return None
    if balance == "classes":
        weights = _of_classes(dataset, None, "--balance=classes")
    else:
        weights = _from_file(Path(balance), dataset)
    return np.tile(weights, len(dataset) // dataset.num_images)


def _of_classes(dataset: ImageDataset, shares: dict[int, float] | None, flag: str) -> np.ndarray:
    """Divide each class's share equally among its images; None gives every class the same share."""
    classes = dataset.class_indices()
    if classes is None or (classes == NO_LABEL).all():
        raise UserError(f"{flag}: {dataset.path} has no classes; expected integer labels")
    weights = np.zeros(len(classes))
    for label in np.unique(classes[classes != NO_LABEL]):
        members = classes == label
        weights[members] = (1 if shares is None else shares.pop(int(label), 0)) / members.sum()
    absent = {label: share for label, share in (shares or {}).items() if share > 0}
    if absent:
        name = _class_name(dataset, min(absent))
        raise UserError(f"{flag}: class {name} has a weight but no image in {dataset.path}")
    return weights


def _from_file(path: Path, dataset: ImageDataset) -> np.ndarray:
    flag = f"--balance={path}"
    rows = _read_rows(path, flag)
    by_class = rows.pop("class", None)
    if by_class is not None:
        names = {_class_name(dataset, label): label for label in range(dataset.label_dim)}
        _refuse_unknown(flag, "class", by_class, names)
        weights = _of_classes(dataset, {names[name]: weight for name, weight in by_class.items()}, flag)
    else:
        files = dataset.image_names()
        _refuse_unknown(flag, "file", rows["file"], files)
        weights = np.array([rows["file"].get(name, 0.0) for name in files])
    if weights.sum() <= 0:
        raise UserError(f"{flag}: all weights are 0; expected one above 0")
    return weights


def _read_rows(path: Path, flag: str) -> dict[str, dict[str, float]]:
    """Return {"class" or "file": {name: weight}}."""
    def read() -> list[list[str]]:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))

    try:
        table = retrying(read, path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{flag} cannot be read ({error}); expected none, classes, or a CSV file") from error
    header = [name.strip() for name in table[0]] if table else []
    if header not in (["class", "weight"], ["file", "weight"]):
        raise UserError(f"{flag} has the columns {', '.join(header) or 'none'}; expected class,weight or file,weight")
    weights: dict[str, float] = {}
    for number, row in enumerate(table[1:], start=2):
        if not row:
            continue
        weight = _number(row[1]) if len(row) == 2 else None
        if weight is None:
            raise UserError(f"{flag}, line {number} is {','.join(row)}; expected {header[0]},weight with a number >= 0")
        if row[0].strip() in weights:
            raise UserError(f"{flag}, line {number} names {header[0]} {row[0].strip()} a second time")
        weights[row[0].strip()] = weight
    return {header[0]: weights}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _class_name(dataset: ImageDataset, label: int) -> str:
    return dataset.classes[label] if dataset.classes is not None else str(label)


def _refuse_unknown(flag: str, kind: str, named, known) -> None:
    known = dict.fromkeys(known)
    unknown = [name for name in named if name not in known]
    if unknown:
        examples = ", ".join(list(known)[:5]) + (", ..." if len(known) > 5 else "")
        raise UserError(f"{flag} names the {kind} {unknown[0]}, which the data set has not; expected {examples}")
