"""Make data sets of phantoms: drawings of skin lesions with known attributes, for tests and demonstrations.

Options are checked before anything is rendered. An image depends on the seed, its index and its class, not on the
number of images; but its class depends on that number, because the classes have exact counts.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import IO

import numpy as np
import PIL.Image

from dnnlib.cli import UserError
from dnnlib.progress import Progress
from dnnlib.text import listed, suggestion
from dnnlib.workers import ordered_map, usable_cores
from imagesets.classes import class_counts
from imagesets.phantoms.fields import stream
from imagesets.phantoms.paint import render
from imagesets.phantoms.scene import ARTIFACT_RATES, attributes, check_looks_differ, draw_scene, look_of
from imagesets.pixel_hashes import hash_pixels
from imagesets.reader import channels_first
from imagesets.resize import MIN_RESOLUTION, is_power_of_two, nearest_resolution
from imagesets.tables import CompactTexts
from imagesets.writer import ImageSetWriter

TABLE = "phantom.csv"
_VERSION = 1  # of the drawings; raise it when equal seeds give other pixels
_CHUNK = 8  # images a worker takes at a time: about a tenth of a second
MAX_SIDE = 1024  # pixels; the details of a phantom are drawn for no more
DEFAULT_CLASSES: Mapping[str, float] = MappingProxyType({"benign": 0.87, "melanoma": 0.13})
_ROUNDING = 0.02  # by which the sum of shares may differ from 1, as seven shares with two decimals easily do
_CLASSES_SYNTAX = "expected NAME:SHARE,NAME:SHARE,..., such as benign:0.87,melanoma:0.13"
_BIAS_SYNTAX = "expected NAME=P:P:... with a probability for each class, such as frame=0.4:0.02"
_SIZES, _CLASSES = 40, 41  # purposes of random streams
_SINGLE, _PAIR = 0.70, 0.20  # parts of the lesions with one image and with two; the others have three


@dataclass(frozen=True, kw_only=True)
class PhantomOptions:
    """Fields are named like the options of the command.

    classes: {name: share of the images}, which sum to 1; their order numbers the labels
    bias:    {artifact: its probability in each class, in order}; an artifact not named is independent of the class

    Raises UserError for values that do not fit.
    """

    count: int = 2000
    resolution: int = 64
    classes: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_CLASSES))
    seed: int = 0
    bias: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"--count={self.count}; expected at least 1")
        if self.seed < 0:
            raise UserError(f"--seed={self.seed}; expected at least 0")
        check_sides(self.resolution, self.resolution)
        _check_classes(self.classes)
        for name, probabilities in self.bias.items():
            _check_bias(name, probabilities, len(self.classes))

    def rates(self, label: int) -> dict[str, float]:
        """Return the probability of each artifact in a class."""
        return {name: self.bias[name][label] if name in self.bias else rate for name, rate in ARTIFACT_RATES.items()}


def render_phantom(seed: int, index: int, *, class_name: str = "benign", resolution: int = 64,
                   lesion_number: int | None = None,
                   rates: Mapping[str, float] = ARTIFACT_RATES) -> tuple[np.ndarray, dict[str, str | int | float]]:
    """Return pixels, uint8 [resolution, resolution, 3], and the attributes of the image by name.

    lesion_number: images of one seed, class and lesion show the same lesion; None for that of `index` in a data set
    rates:         probability of each artifact
    """
    if lesion_number is None:
        lesion_number = int(lesion_numbers(seed, index + 1)[index])
    scene = draw_scene(seed=seed, lesion_number=lesion_number, index=index, look=look_of(class_name), rates=rates)
    return render(scene, resolution), attributes(scene)


def write_phantoms(dest: str | os.PathLike, *, workers: int | None = None, stream: IO[str] | None = None,
                   **options) -> dict[str, int]:
    """Write a data set of phantoms with a table of their attributes; return the number of images of each class.

    dest:    zip or new folder, as imagesets.writer takes it
    workers: processes, None for one per CPU core; the result does not depend on them
    stream:  where progress is shown, None for standard error
    options: fields of PhantomOptions

    Raises UserError when an option is invalid or dest cannot be written; then nothing is left there.
    """
    settings = PhantomOptions(**options)
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"--workers={workers}; expected at least 1")
    names = list(settings.classes)
    counts = class_counts(list(settings.classes.values()), settings.count)
    labels, lesions = (numbers.tolist() for numbers in deal_lesions(counts, settings.seed))
    table = CompactTexts()
    jobs = zip(range(settings.count), labels, lesions)
    with (ImageSetWriter(dest, classes=names, source=_source(settings)) as writer,
          Progress(settings.count, "images", stream=stream) as progress,
          closing(ordered_map(partial(_draw, settings), jobs, workers, chunk=_CHUNK)) as drawn):
        for label, lesion, (png, pixel_hash, row) in zip(labels, lesions, drawn):
            group = f"patient{lesion:06d}"
            file = writer.add(png, label, group, pixel_hash)
            if not len(table):
                table.append(_csv_line(["file", "class", "group", *row]))
            table.append(_csv_line([file, names[label], group, *row.values()]))
            progress.advance()
        writer.add_file(TABLE, "".join(table).encode())
    return dict(zip(names, counts))


def _draw(settings: PhantomOptions, job: tuple[int, int, int]) -> tuple[bytes, str, dict[str, str | int | float]]:
    """Turn (index, label, lesion number) into an encoded image, its hash and its attributes, in any process."""
    index, label, lesion_number = job
    pixels, row = render_phantom(settings.seed, index, class_name=list(settings.classes)[label],
                                 resolution=settings.resolution, lesion_number=lesion_number,
                                 rates=settings.rates(label))
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue(), hash_pixels(channels_first(pixels)), row


def _csv_line(cells: list) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _source(settings: PhantomOptions) -> dict:
    return {
        "phantom": True,
        "redistribution": True,
        "note": "computer drawings with made-up attributes; no photographs, no patients, not to be taken for data",
        "generator": "dataset_tool.py phantom",
        "version": _VERSION,
        "seed": settings.seed,
        "count": settings.count,
        "resolution": settings.resolution,
        "classes": dict(settings.classes),
        "bias": {name: list(probabilities) for name, probabilities in settings.bias.items()},
        "table": TABLE,
    }


# Which images show one lesion, and which class each has


def lesion_numbers(seed: int, count: int) -> np.ndarray:
    """Return the number of the lesion that each image shows, [count] int64.

    A longer list starts with the shorter one.
    """
    draws = stream(seed, _SIZES, 0).random(count)
    sizes = 1 + (draws > _SINGLE) + (draws > _SINGLE + _PAIR)
    return np.repeat(np.arange(count), sizes)[:count]


def deal_lesions(counts: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign whole lesions to classes at random; lesions with one image are assigned last, to meet the counts.

    counts:  images of each class

    Return the class of each image, int64 [N], and the number of its lesion, int64 [N]. A lesion of several images that
    no longer fits into any class is divided: its images become separate lesions.
    """
    lesions = lesion_numbers(seed, sum(counts))
    sizes = np.bincount(lesions)
    draws = stream(seed, _CLASSES, 0).random(2 * len(lesions))
    order = np.argsort(draws[:len(sizes)] - sizes, kind="stable")  # large ones first, at random among equals
    class_of, remaining = _deal_whole(order[sizes[order] > 1].tolist(), sizes.tolist(), draws[len(sizes):].tolist(),
                                      counts)
    labels = np.array([class_of.get(lesion, -1) for lesion in lesions.tolist()], np.int64)
    alone = np.flatnonzero(labels < 0)
    labels[alone] = np.repeat(np.arange(len(counts)), remaining)[np.argsort(draws[-len(alone):] if len(alone) else [])]
    divided = alone[sizes[lesions[alone]] > 1]
    lesions[divided] = len(lesions) + np.arange(len(divided))  # beyond the number of any other
    return labels, lesions


def _deal_whole(lesions: list[int], sizes: list[int], draws: list[float],
                counts: Sequence[int]) -> tuple[dict[int, int], list[int]]:
    """Return {lesion: class} and the images that each class still needs; these are the weights of the choice."""
    class_of, remaining = {}, list(counts)
    for lesion, draw in zip(lesions, draws):
        room = [number if number >= sizes[lesion] else 0 for number in remaining]
        mark = draw * sum(room)
        if not mark:
            continue
        label = 0
        while mark > room[label]:
            mark -= room[label]
            label += 1
        class_of[lesion] = label
        remaining[label] -= sizes[lesion]
    return class_of, remaining


# Options


def check_sides(width: int, height: int) -> None:
    """Raise UserError when --resolution is not square or not a valid size for phantoms."""
    near = nearest_resolution(max(width, height), MAX_SIDE)
    if width != height:
        raise UserError(f"--resolution={width}x{height} is not square; expected for example {near}x{near}")
    if not (is_power_of_two(width) and MIN_RESOLUTION <= width <= MAX_SIDE):
        raise UserError(f"--resolution={width}x{width} is not a power of two from {MIN_RESOLUTION} to {MAX_SIDE}; "
                        f"expected for example {near}x{near}")


def parse_classes(text: str) -> dict[str, float]:
    """Return {"benign": 0.87, "melanoma": 0.13} of "benign:0.87,melanoma:0.13"."""
    classes: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.rpartition(":")
        name = name.strip()
        if not name or (number := _number(share)) is None:
            raise UserError(f"--classes has {part!r}; {_CLASSES_SYNTAX}")
        if name in classes:
            raise UserError(f"--classes has {name} twice; expected each name once")
        classes[name] = number
    return classes


def parse_bias(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return {"frame": (0.4, 0.02)} of ["frame=0.4:0.02"]."""
    bias: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        name = name.strip()
        probabilities = tuple(_number(number) for number in numbers.split(":"))
        if not name or None in probabilities:
            raise UserError(f"--bias={text}; {_BIAS_SYNTAX}")
        if name in bias:
            raise UserError(f"--bias names {name} twice; expected each name once")
        bias[name] = probabilities
    return bias


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_classes(classes: Mapping[str, float]) -> None:
    if not classes:
        raise UserError(f"--classes is empty; {_CLASSES_SYNTAX}")
    for name, share in classes.items():
        if not 0 < share <= 1:  # also false for a NaN
            raise UserError(f"--classes gives {name} the share {share:g}; expected above 0, up to 1")
    total = sum(classes.values())
    if abs(total - 1) > _ROUNDING:
        raise UserError(f"--classes has shares that sum to {total:.4g}; expected 1")
    check_looks_differ(list(classes))


def _check_bias(name: str, probabilities: Sequence[float], num_classes: int) -> None:
    if name not in ARTIFACT_RATES:
        known = list(ARTIFACT_RATES)
        raise UserError(f"--bias names {name}{suggestion(name, known)}; expected one of {listed(known)}")
    if len(probabilities) != num_classes:
        raise UserError(f"--bias gives {name} {len(probabilities)} probabilities; expected {num_classes}, one for each "
                        "class of --classes")
    for probability in probabilities:
        if not 0 <= probability <= 1:
            raise UserError(f"--bias gives {name} the probability {probability:g}; expected 0 to 1")
