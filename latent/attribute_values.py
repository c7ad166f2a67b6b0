"""The samples that explore.py looks at, and their attributes: classes, measurements, probabilities, columns of a table.

Legend: N samples, L num_ws, K w_dim.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from dnnlib.cli import UserError
from dnnlib.text import listed, plural, suggestion
from generation.image_generator import read_npz, read_projected_w
from imagesets.classes import split_names
from imagesets.tables import DelimitedFile, image_key
from latent.exploration import Explorer, ImageFunction
from metrics.intervals import group_numbers

CLASS, MEASURE, CLASSIFIER, VALUES = "class", "measure", "classifier", "values"
# What each kind of attribute is, for messages.
KINDS = {CLASS: "a class", MEASURE: "a measurement", CLASSIFIER: "a label of the classifier",
         VALUES: "a column of --values"}
SEED, IMAGE = "seed", "image"  # columns of --values that name the sample

_LEAST_PROBABILITY = 1e-6  # log odds of float32 probabilities that round to 0 or 1 stay finite


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Styles, and what is known about them without looking at their images."""

    ws: Tensor  # float32 [N, L, K]
    names: tuple[str, ...]  # for the rows of sheets
    seeds: tuple[int, ...] | None  # None for projections
    images: tuple[str, ...] | None  # names of the projected images, if the file has them
    classes: tuple[str, ...] | None  # "" = unknown; None without classes
    groups: np.ndarray | None  # int64 [N], projections of images that belong together; None = all are independent

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """A quantity of the samples."""

    kind: str  # a key of KINDS
    name: str
    values: np.ndarray  # float64 [N]; nan where it is unknown
    words: tuple[str, str] | None = None  # that 0 and 1 stand for
    refusal: str = ""  # why it cannot be used, for a message; "" = it can

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.name}"


def samples_of_seeds(explorer: Explorer, seeds: Sequence[int]) -> Samples:
    """Return the samples of seeds; the labels of --class or --label take turns."""
    labels = explorer.labels_of(len(seeds))
    of_classes = all(isinstance(label, int) for label in labels)
    classes = tuple(explorer.name_of(label) for label in labels) if of_classes else None
    names = tuple(f"seed {seed}" + (f" {classes[index]}" if classes else "") for index, seed in enumerate(seeds))
    return Samples(ws=explorer.styles(seeds, labels), names=names, seeds=tuple(seeds), images=None, classes=classes,
                   groups=None)


def read_samples(path: str, G: nn.Module) -> Samples:
    """Return the projections in a file of projector.py, with the images, groups and classes that it records.

    Raises UserError as `read_projected_w` does, or if these have another length.
    """
    ws = read_projected_w(path, G)
    columns = read_npz(path, ["w"], flag=f"--projected-w={path}", expected="expected an .npz file of projector.py",
                       optional=["image", "group", "class"])
    columns.pop("w")
    for name, column in columns.items():
        if column.shape != (len(ws),):
            raise UserError(f"--projected-w={path} has an array {name} of shape {list(column.shape)}; expected "
                            f"[{len(ws)}], one for each style")
    texts = {name: tuple(map(str, column.tolist())) for name, column in columns.items()}
    images, groups, classes = texts.get("image"), texts.get("group"), texts.get("class")
    if groups is not None:  # an image without a group is its own
        groups = [group or f"image {index}" for index, group in enumerate(groups)]
    return Samples(ws=ws, names=images or tuple(f"style {index}" for index in range(len(ws))), seeds=None,
                   images=images, classes=classes if classes and any(classes) else None,
                   groups=None if groups is None or len(set(groups)) == len(groups) else group_numbers(groups, len(ws)))


def styles_in(samples: Samples, layers: Sequence[int]) -> np.ndarray:
    """Return one style per sample, of W: float64 [N, K].

    layers:  indices of ws. Projections into W+ have another style in each; theirs is the mean over these layers
    """
    return samples.ws[:, list(layers)].double().mean(dim=1).numpy()


def class_attributes(samples: Samples) -> list[Attribute]:
    """Return an attribute for each class that some of the samples are of: 1 for its samples, 0 for those of others."""
    if samples.classes is None:
        return []
    found = np.array(samples.classes)
    return [Attribute(kind=CLASS, name=name, words=("other classes", name),
                      values=np.where(found == "", np.nan, (found == name).astype(np.float64)))
            for name in dict.fromkeys(samples.classes) if name]


def image_attributes(explorer: Explorer, samples: Samples, functions: Mapping[str, ImageFunction]) -> list[Attribute]:
    """Return what functions find in the images of samples; all processes call this together.

    functions:  by kind; probabilities of a classifier become log odds, on which a step means the same near 0 and 0.5
    """
    tables = explorer.evaluate(samples.ws, list(functions.values()), "images measured")
    attributes = []
    for (kind, function), table in zip(functions.items(), tables, strict=True):
        values = table.astype(np.float64)
        if kind == CLASSIFIER:
            values = log_odds(values)
        attributes += [Attribute(kind=kind, name=name, values=values[:, index])
                       for index, name in enumerate(function.names)]
    return attributes


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)), finite also for 0 and 1."""
    clipped = np.clip(probabilities, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    return np.log(clipped / (1 - clipped))


def read_values(path: str, samples: Samples, *, quiet: bool = False) -> list[Attribute]:
    """Return the columns of a table with a row for each sample, found by its column seed or image.

    Cells are numbers, or one of two words, of which the second in alphabetical order counts as 1; an empty one is
    unknown. Rows without a sample and samples without a row are counted and, unless quiet, printed to stderr.

    Raises UserError for a table without such a column, with a sample named twice, or with other cells.
    """
    table = DelimitedFile(path)
    key, wanted = (SEED, samples.seeds) if samples.seeds is not None else (IMAGE, samples.images)
    if wanted is None:
        raise UserError("--values is given, but the file of --projected-w does not name its images; expected one of "
                        "projector.py --data, or leave --values out")
    if key not in table.header:
        raise UserError(f"--values={path} does not have a column {key} (it has {listed(table.header)}); expected one "
                        "that names the samples")
    if len(set(table.header)) < len(table.header):
        raise UserError(f"--values={path} has two columns of one name; expected each name once")
    places = {str(name) if key == SEED else image_key(name): index for index, name in enumerate(wanted)}
    names = [name for name in table.header if name != key]
    cells, unused, seen = {name: [""] * len(samples) for name in names}, 0, set()
    for line, row in table.rows():
        found = dict(zip(table.header, row, strict=True))
        name = found[key].removesuffix(".0") if key == SEED else image_key(found[key])
        if name in seen:
            raise UserError(f"--values={path}, line {line}: {key} {found[key]} is named twice; expected each once")
        seen.add(name)
        if name not in places:
            unused += 1
            continue
        for column in names:
            cells[column][places[name]] = found[column]
    missing = len(places.keys() - seen)
    if len(seen) == unused:
        raise UserError(f"--values={path} names none of the {plural(len(samples), 'sample')}; its column {key} should "
                        f"have entries such as {wanted[0]}")
    for count, what, text in ((unused, "row of --values", "of no sample"),
                              (missing, "sample", "not in --values")):
        if count and not quiet:
            many = what.replace("row", "rows").replace("sample", "samples")
            print(f"{plural(count, what, many)} {'is' if count == 1 else 'are'} {text}", file=sys.stderr)
    return [_column(path, name, texts) for name, texts in cells.items()]


def _column(path: str, name: str, texts: Sequence[str]) -> Attribute:
    different = sorted({text for text in texts if text})
    numbers = [_number(text) for text in texts]
    if all(math.isfinite(number) for number, text in zip(numbers, texts, strict=True) if text):
        return Attribute(kind=VALUES, name=name, values=np.array(numbers, dtype=np.float64))
    if len(different) > 2:  # refused only if it is asked for: other columns of a table may hold anything
        return Attribute(kind=VALUES, name=name, values=np.full(len(texts), math.nan),
                         refusal=f"has the texts {listed(different[:4])}; expected numbers, or two different words")
    values = [float(different.index(text)) if text else math.nan for text in texts]
    return Attribute(kind=VALUES, name=name, values=np.array(values), words=(different[0], different[-1]))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def is_usable(attribute: Attribute) -> bool:
    """Tell whether an attribute has two different values."""
    known = attribute.values[np.isfinite(attribute.values)]
    return len(known) > 0 and known.min() < known.max()


def find_attribute(text: str, attributes: Sequence[Attribute], option: str = "--attribute") -> Attribute:
    """Return the attribute that a name, or KIND:NAME, stands for. Raises UserError.

    text:  such as mel, class:mel or measure:area
    """
    by_key = {attribute.key: attribute for attribute in attributes}
    if text in by_key:
        return by_key[text]
    found = [attribute for attribute in attributes if attribute.name == text]
    if len(found) > 1:
        raise UserError(f"{option} has {text}, which is {' and '.join(KINDS[one.kind] for one in found)}; expected "
                        f"{' or '.join(one.key for one in found)}")
    if not found:
        names = [attribute.name for attribute in attributes]
        known = f"one of {listed(list(by_key))}" if by_key else "--measure=1, or another source of attributes"
        raise UserError(f"{option} has {text}{suggestion(text, names)}; expected {known}")
    return found[0]


def find_attributes(text: str, attributes: Sequence[Attribute], option: str = "--attribute") -> list[Attribute]:
    """Return the attributes of a list separated by commas, each once. Raises UserError."""
    known = [name for attribute in attributes for name in (attribute.key, attribute.name)]
    found = [find_attribute(part.strip(), attributes, option) for part in split_names(text, known)]
    if len({one.key for one in found}) < len(found):
        raise UserError(f"{option}={text} names an attribute twice; expected each once")
    for one in found:
        if one.refusal:
            raise UserError(f"{option} has {one.name}, a column of --values that {one.refusal}")
    return found
