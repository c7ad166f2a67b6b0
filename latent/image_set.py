"""Project the images of a set, batch by batch, and write the results: images, styles, distances, sheet, histogram.

A batch is called a pass here. An interrupted pass continues from its last saved state.
"""

import csv
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.files import atomic_write
from dnnlib.progress import Progress
from generation.image_generator import ImageGenerator, SynthesisSettings, choose_batch, save_projected_w
from generation.network import Classes, Label, OpenNetwork
from generation.pictures import as_png
from imagesets.classes import VECTOR
from imagesets.metadata import may_be_redistributed
from imagesets.pixel_formats import BadImage
from imagesets.pixel_hashes import hash_pixels
from imagesets.reader import ImageSet
from imagesets.resize import PixelSpec
from imagesets.writer import ImageSetWriter
from latent.projection import (
    COLUMNS,
    PERCEPTUAL,
    Projection,
    Projector,
    StyleStatistics,
    finish,
    measure_pairs,
    measure_styles,
)
from latent.targets import TargetImage, prepare
from torch_utils.images import Pair, PairRow, save_pair_sheet
from torch_utils.piecework import Pieces
from torch_utils.plots import save_histogram

# The files in --outdir.
ZIP, STYLES, TABLE, FAILED = "projections.zip", "latents.npz", "distances.csv", "failed.csv"
SHEET, HISTOGRAM, SUMMARY = "pairs.png", "distances.png", "projections.json"

_TABLE_COLUMNS = ("image", "projection", "class", "group", "network_class", "detector", *COLUMNS)
_FAILED_COLUMNS = ("image", "reason")
_EXAMPLES, _EXAMPLES_OF_CLASS = 8, 2  # pairs of each kind on the sheet
_MOST_CLASSES = 12  # with a row on the sheet


class Start(NamedTuple):
    """Where a projection starts."""

    target: int  # index of the image among the targets
    label: Label  # starts from its mean style


@dataclass(frozen=True, kw_only=True)
class Passes:
    """The projections of a set, divided into passes.

    targets:  the images
    size:     projections per pass; the last pass is padded, so that all passes round alike
    """

    targets: Sequence[TargetImage]
    size: int

    @cached_property
    def starts(self) -> list[Start]:
        return [Start(index, label) for index, target in enumerate(self.targets) for label in target.starts]

    @property
    def count(self) -> int:
        return -(-len(self.starts) // self.size)

    def starts_of(self, number: int) -> list[Start]:
        return self.starts[number * self.size:(number + 1) * self.size]


class SetWorker:
    """Computes passes, and saves them as pieces:

        w          [n, S, K] float32, the styles          targets      [n, C, R, R] uint8
        reasons    [n] texts, why it failed, or ""        projections  [n, C, R, R] uint8
        distances  [n, 4] float32, as COLUMNS
    """

    def __init__(self, images: ImageSet, spec: PixelSpec, network: OpenNetwork, projector: Projector,
                 passes: Passes):
        self._images, self._spec, self._network = images, spec, network
        self._projector, self._passes = projector, passes
        G = network.G
        # The settings of generate.py --projected-w, so that its images are the same.
        self._generator = ImageGenerator(G, SynthesisSettings(), batch=choose_batch(G.img_resolution, projector.device))
        self._statistics: dict[Label, StyleStatistics] = {}

    def make(self, pieces: Pieces, numbers: Sequence[int], *, shown: bool) -> None:
        """Compute passes and save them. shown: whether to show progress"""
        steps = len(numbers) * self._projector.settings.num_steps
        with Progress(steps, f"steps of {self._passes.size} images") if shown else nullcontext() as progress:
            for number in numbers:
                pieces.save(number, self._make_piece(pieces, number, progress.advance if shown else lambda count: None))

    def _make_piece(self, pieces: Pieces, number: int, on_steps: Callable[[int], None]) -> dict[str, np.ndarray]:
        starts = self._passes.starts_of(number)
        targets = self._read_all(starts)
        good = [slot for slot, target in enumerate(targets) if isinstance(target, Tensor)]
        G, styles = self._network.G, 1 if self._projector.settings.space == "w" else self._network.G.num_ws
        shape = (len(starts), G.img_channels, G.img_resolution, G.img_resolution)
        reasons = ["" if isinstance(target, Tensor) else target for target in targets]
        piece = {"w": np.zeros((len(starts), styles, G.w_dim), np.float32), "reasons": np.array(reasons),
                 "targets": np.zeros(shape, np.uint8), "projections": np.zeros(shape, np.uint8),
                 "distances": np.full((len(starts), len(COLUMNS)), np.nan, np.float32)}
        if not good:
            on_steps(self._projector.settings.num_steps)
            return piece
        filled = good + good[:1] * (self._passes.size - len(good))  # all passes have the same size
        pixels = torch.stack([targets[slot] for slot in filled])
        projection = Projection(self._projector, pixels, [self._statistics_of(starts[slot].label) for slot in filled])
        with pieces.writing():
            finish(projection, pieces.state_path(number), hashlib.sha256(pixels.numpy()).hexdigest(), on_steps)
        ws = projection.styles().clone()
        lost = ~ws.isfinite().all(dim=(1, 2))
        ws[lost] = 0
        projected = torch.cat(list(self._generator.render_all(ws)))
        distances = measure_pairs(pixels, projected, self._projector.similarity)
        distances[lost] = torch.inf  # so that any other class is nearer
        for name, values in (("w", ws[:, :styles]), ("targets", pixels), ("projections", projected),
                             ("distances", distances)):
            piece[name][good] = values[:len(good)].numpy()
        for slot, is_lost in zip(good, lost.tolist()):
            reasons[slot] = "its distance became infinite or nan" if is_lost else ""
        return {**piece, "reasons": np.array(reasons)}

    def _read_all(self, starts: Sequence[Start]) -> list[Tensor | str]:
        """Return the result of `_read` for each start; print which images are left out."""
        indices = dict.fromkeys(start.target for start in starts)
        read = {index: self._read(self._passes.targets[index]) for index in indices}
        for index, found in read.items():
            target = self._passes.targets[index]
            if isinstance(found, str) and Start(index, target.starts[0]) in starts:  # printed once
                print(f"{target.name} is left out: {found}", file=sys.stderr)
        return [read[start.target] for start in starts]

    def _read(self, target: TargetImage) -> Tensor | str:
        """Return the pixels, uint8 [C, R, R], or a short text on why they cannot be read."""
        try:
            return prepare(self._images.read(target.name), self._spec)
        except BadImage as error:
            return f"{error.reason}: it {error.detail}" if error.detail else error.reason
        except UserError as error:  # a damaged member of a zip, a file without permission
            return str(error)

    def _statistics_of(self, label: Label) -> StyleStatistics:
        if label not in self._statistics:
            self._statistics[label] = measure_styles(self._network.G, self._network.classes.labels([label])[0])
        return self._statistics[label]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The nearest projection of an image, and its place in the pieces."""

    target: TargetImage
    start: Label  # that it started from
    piece: int
    slot: int
    distances: tuple[float, ...]  # as COLUMNS
    file: str  # in projections.zip

    @property
    def perceptual(self) -> float:
        return self.distances[PERCEPTUAL]


class NothingReadable(UserError):
    """None of the images could be projected; failed.csv gives the reasons."""

    def __init__(self, path: Path, failed: list[tuple[str, str]]):
        super().__init__(f"none of the {len(failed)} images of {path} could be read; see {FAILED} in --outdir")
        self.failed = failed


def write_results(outdir: Path, settings: Mapping[str, Any], images: ImageSet, network: OpenNetwork,
                  passes: Passes, pieces: Pieces, *, by_class: bool) -> dict[str, Any]:
    """Write all files of a set whose pieces are complete; return the content of projections.json, the last one.

    settings:  everything that the projections depend on
    by_class:  sheet and histogram show each class separately

    Raises NothingReadable, after writing failed.csv, and OSError or UserError if a file cannot be written.
    """
    for name in (SHEET, HISTOGRAM, FAILED, SUMMARY):  # from an earlier command
        (outdir / name).unlink(missing_ok=True)
    try:
        found, failed = _write_zip(outdir / ZIP, settings, images, network, passes, pieces)
    except NothingReadable as error:
        _write_table(outdir / FAILED, _FAILED_COLUMNS, error.failed)
        raise
    _write_table(outdir / TABLE, _TABLE_COLUMNS, [
        [item.target.name, item.file, item.target.class_name or "", item.target.group,
         _class_name(network, item.start), settings["detector"], *(f"{value:.7g}" for value in item.distances)]
        for item in found])
    if failed:
        _write_table(outdir / FAILED, _FAILED_COLUMNS, failed)
    groups = _by_class(found) if by_class else {"": found}
    quantity = f"perceptual distance ({settings['detector']}), {settings['space']}, {network.name}"
    save_histogram(outdir / HISTOGRAM, {name or "all": [item.perceptual for item in items]
                                        for name, items in groups.items()}, quantity=quantity)
    _write_sheet(outdir / SHEET, groups, pieces, title=f"target and projection: {quantity}")
    summary = {**settings, "projected": len(found), "unreadable": len(failed),
               "distances": {name: _statistics(items) for name, items in {"all": found, **_by_class(found)}.items()}}
    with atomic_write(outdir / SUMMARY, text=True) as file:
        file.write(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary


def _write_zip(path: Path, settings: Mapping[str, Any], images: ImageSet, network: OpenNetwork, passes: Passes,
               pieces: Pieces) -> tuple[list[Found], list[tuple[str, str]]]:
    """Write images and styles; return the projections, and the failed images with reasons."""
    found, failed, styles = [], [], []
    conditional = network.classes.count > 0
    source = {"generated": True, "projected": True, **settings}
    if network.info.get("phantom") is True or images.source.get("phantom"):
        source["phantom"] = True
    permission = may_be_redistributed(images.source)
    if permission is not None:  # projections show what their originals do
        source["redistribution"] = permission
    with (Progress(len(passes.targets), "images put together") as progress,
          ImageSetWriter(path, classes=network.classes.names if conditional else images.classes, source=source,
                         option="--outdir") as writer):
        for target, (piece, slot, start, arrays) in _nearest(passes, pieces):
            progress.advance()
            if arrays["reasons"][slot]:
                failed.append((target.name, str(arrays["reasons"][slot])))
                continue
            label, pixels = _kept_label(network.classes, target, start), arrays["projections"][slot]
            file = writer.add(as_png(torch.from_numpy(pixels)), label, target.group, hash_pixels(pixels))
            styles.append(arrays["w"][slot].copy())  # a view would keep the whole piece in memory
            found.append(Found(target=target, start=start, piece=piece, slot=slot, file=file,
                               distances=tuple(float(value) for value in arrays["distances"][slot])))
        if not found:
            raise NothingReadable(images.path, failed)
        # Before the zip is renamed, so that on a full disk either both files appear or neither.
        _write_styles(path.with_name(STYLES), network, found, styles)
    return found, failed


def _kept_label(classes: Classes, target: TargetImage, start: Label) -> Label:
    """Return the label of a projection: its target's, or else that of its start."""
    if classes.count == 0:
        return target.label
    if target.own is not None:
        return target.own
    # A mix of classes (--label) would be a vector among class numbers.
    return None if isinstance(start, tuple) and classes.kind != VECTOR else start


def _nearest(passes: Passes, pieces: Pieces) -> Iterator[tuple[TargetImage, tuple[int, int, Label, dict]]]:
    """Yield for each image its nearest projection, among the classes that it started from."""
    projections = ((start, number, slot, arrays) for number in range(passes.count)
                   for arrays in [pieces.load(number)] for slot, start in enumerate(passes.starts_of(number)))
    for index, tried in groupby(projections, key=lambda projection: projection[0].target):
        start, number, slot, arrays = min(tried, key=lambda projection: projection[3]["distances"][projection[2],
                                                                                                   PERCEPTUAL])
        yield passes.targets[index], (number, slot, start.label, arrays)


def _write_styles(path: Path, network: OpenNetwork, found: Sequence[Found], styles: Sequence[np.ndarray]) -> None:
    """Write w [M, L, K] for generate.py --projected-w, with the image, group and classes of each row."""
    w = np.stack(styles)
    names = {"image": [item.target.name for item in found], "group": [item.target.group for item in found],
             "class": [item.target.class_name or "" for item in found],
             "network_class": [_class_name(network, item.start) for item in found]}
    save_projected_w(path, np.broadcast_to(w, (len(w), network.G.num_ws, network.G.w_dim)),
                     **{name: np.array(texts, dtype=str) for name, texts in names.items()})


def _class_name(network: OpenNetwork, start: Label) -> str:
    return "" if start is None else network.classes.name(start)


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with atomic_write(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        # Bytes of a file name that are not UTF-8 become escapes, such as \\udcff.
        writer.writerows([str(value).encode(errors="backslashreplace").decode() for value in row] for row in rows)


def _by_class(found: Sequence[Found]) -> dict[str, list[Found]]:
    """Return the projections by class of the set; {} if it has no classes."""
    groups: dict[str, list[Found]] = {}
    for item in found:
        if item.target.class_name is not None:
            groups.setdefault(item.target.class_name, []).append(item)
    return groups


def _statistics(found: Sequence[Found]) -> dict[str, Any]:
    """Return the number of images, and mean and quartiles of each distance; None if that is not finite."""
    result: dict[str, Any] = {"count": len(found)}
    for index, name in enumerate(COLUMNS):
        values = np.array([item.distances[index] for item in found], dtype=np.float64)
        numbers = [values.mean(), *np.quantile(values, (0.25, 0.5, 0.75))] if len(values) else [np.nan] * 4
        result[name] = {key: float(number) if np.isfinite(number) else None
                        for key, number in zip(("mean", "quartile", "median", "third_quartile"), numbers, strict=True)}
    return result


def _write_sheet(path: Path, groups: Mapping[str, Sequence[Found]], pieces: Pieces, *, title: str) -> None:
    shown = dict(list(groups.items())[:_MOST_CLASSES])
    if len(shown) < len(groups):
        title += f" (the first {len(shown)} of {len(groups)} classes)"
    rows = []
    for name, items in shown.items():
        most = _EXAMPLES if len(groups) == 1 else _EXAMPLES_OF_CLASS
        examples = choose_examples([item.perceptual for item in items], min(most, max(len(items) // 3, 1)))
        if len(groups) == 1:
            rows += [PairRow(title=f"{name} {kind}".strip(), pairs=[_pair(items[index], pieces) for index in indices])
                     for kind, indices in examples.items() if indices]
        else:
            rows.append(PairRow(title=name, pairs=[_pair(items[index], pieces, f"{kind} ")
                                               for kind, indices in examples.items() for index in indices]))
    save_pair_sheet(path, rows, title=title)


def choose_examples(distances: Sequence[float], count: int) -> dict[str, list[int]]:
    """Return the indices of the nearest, the median and the farthest distances: "best", "median", "worst".

    count: of each; if there are too few, "best" is filled first and "median" last, so that none is in two lists

    Each list is sorted from near to far, "worst" from far to near. Ties are sorted by index; distances that are not
    finite count as the farthest.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected 1 or more")
    finite_first = [(distance if math.isfinite(distance) else math.inf, index)
                    for index, distance in enumerate(map(float, distances))]
    order = [index for _, index in sorted(finite_first)]
    best, rest = order[:count], order[count:]
    middle, worst = rest[:-count], rest[-count:]
    start = max(0, len(middle) - count) // 2
    return {"best": best, "median": middle[start:start + count], "worst": worst[::-1]}


def _pair(item: Found, pieces: Pieces, kind: str = "") -> Pair:
    arrays = pieces.load(item.piece)
    return Pair(target=torch.from_numpy(arrays["targets"][item.slot]),
                projection=torch.from_numpy(arrays["projections"][item.slot]),
                caption=f"{kind}{item.perceptual:.3g} {Path(item.target.name).name}")
