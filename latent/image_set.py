"""Project the images of a set, pass by pass; a pass that is stopped goes on where its last state was saved."""

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.files import atomic_write
from dnnlib.progress import Progress
from generation.image_generator import Look, Painter, choose_batch
from generation.network import Classes, Label, OpenNetwork
from generation.pictures import as_png
from imagesets.classes import VECTOR
from imagesets.decode import BadImage
from imagesets.pixel_hashes import hash_pixels
from imagesets.reader import ImageSet
from imagesets.resize import PixelSpec
from imagesets.writer import ImageSetWriter
from latent.pair_sheet import Pair, Row, choose_examples, save_pair_sheet
from latent.projection import COLUMNS, PERCEPTUAL, Projector, Start, find_start, finish, measure_pairs
from latent.targets import TargetImage, prepare
from torch_utils.piecework import Pieces
from torch_utils.plots import save_histogram


class Lane(NamedTuple):
    """A projection among those of a pass: an image, and the label that it starts from."""

    target: int  # index among the targets
    start: Label


@dataclass(frozen=True, kw_only=True)
class ProjectionPlan:
    """What is projected, in which passes.

    targets:  the images
    size:     projections of a pass; the last pass is filled up, so that all are computed alike
    """

    targets: Sequence[TargetImage]
    size: int

    @cached_property
    def lanes(self) -> list[Lane]:
        return [Lane(index, start) for index, target in enumerate(self.targets) for start in target.starts]

    @property
    def num_passes(self) -> int:
        return -(-len(self.lanes) // self.size)

    def lanes_of(self, number: int) -> list[Lane]:
        return self.lanes[number * self.size:(number + 1) * self.size]


class SetWorker:
    """Computes passes of a plan, and keeps them as pieces:

        w          [n, S, K] float32, the styles          targets      [n, C, R, R] uint8
        reasons    [n] texts, why there is nothing, or "" projections  [n, C, R, R] uint8
        distances  [n, 4] float32, as distances.COLUMNS
    """

    def __init__(self, images: ImageSet, spec: PixelSpec, network: OpenNetwork, projector: Projector,
                 plan: ProjectionPlan):
        self._images, self._spec, self._network, self._projector, self._plan = images, spec, network, projector, plan
        G = network.G
        # As generate.py --projected-w does it, so that its images are the same.
        self._painter = Painter(G, Look(), batch=choose_batch(G.img_resolution, projector.device))
        self._starts: dict[Label, Start] = {}

    def make(self, pieces: Pieces, numbers: Sequence[int], *, shown: bool) -> None:
        """Compute passes and keep them. shown: whether to show progress"""
        steps = len(numbers) * self._projector.settings.num_steps
        with Progress(steps, f"steps of {self._plan.size} images") if shown else nullcontext() as progress:
            for number in numbers:
                pieces.save(number, self._make_piece(pieces, number, progress.advance if shown else _ignore))

    def _make_piece(self, pieces: Pieces, number: int, on_steps: Callable[[int], None]) -> dict[str, np.ndarray]:
        lanes = self._plan.lanes_of(number)
        targets = self._read_all(lanes)
        good = [slot for slot, target in enumerate(targets) if isinstance(target, Tensor)]
        G, styles = self._network.G, 1 if self._projector.settings.space == "w" else self._network.G.num_ws
        shape = (len(lanes), G.img_channels, G.img_resolution, G.img_resolution)
        reasons = ["" if isinstance(target, Tensor) else target for target in targets]
        piece = {"w": np.zeros((len(lanes), styles, G.w_dim), np.float32), "reasons": np.array(reasons),
                 "targets": np.zeros(shape, np.uint8), "projections": np.zeros(shape, np.uint8),
                 "distances": np.full((len(lanes), len(COLUMNS)), np.nan, np.float32)}
        if not good:
            on_steps(self._projector.settings.num_steps)
            return piece
        filled = good + good[:1] * (self._plan.size - len(good))  # all passes are of one size
        pixels = torch.stack([targets[slot] for slot in filled])
        projection = self._projector.begin(pixels, [self._start(lanes[slot].start) for slot in filled])
        with pieces.writing():
            finish(projection, pieces.state_path(number), hashlib.sha256(pixels.numpy()).hexdigest(), on_steps)
        ws = projection.styles().clone()
        lost = ~ws.isfinite().all(dim=(1, 2))
        ws[lost] = 0
        projected = torch.cat(list(self._painter.show(ws)))
        distances = measure_pairs(pixels, projected, self._projector.similarity)
        distances[lost] = torch.inf  # farther than that of another class
        for name, values in (("w", ws[:, :styles]), ("targets", pixels), ("projections", projected),
                             ("distances", distances)):
            piece[name][good] = values[:len(good)].numpy()
        for slot, is_lost in zip(good, lost.tolist()):
            reasons[slot] = "its distance became no finite number" if is_lost else ""
        return {**piece, "reasons": np.array(reasons)}

    def _read_all(self, lanes: Sequence[Lane]) -> list[Tensor | str]:
        """Return what `_read` does for each lane; say which images are left out."""
        read = {index: self._read(self._plan.targets[index]) for index in dict.fromkeys(lane.target for lane in lanes)}
        for index, found in read.items():
            target = self._plan.targets[index]
            if isinstance(found, str) and Lane(index, target.starts[0]) in lanes:  # told once
                print(f"{target.name} is left out: {found}", file=sys.stderr)
        return [read[lane.target] for lane in lanes]

    def _read(self, target: TargetImage) -> Tensor | str:
        """Return the pixels, uint8 [C, R, R], or in a few words why there are none."""
        try:
            return prepare(self._images.read(target.name), self._spec)
        except BadImage as error:
            return f"{error.reason}: it {error.detail}" if error.detail else error.reason
        except UserError as error:  # a damaged member of a zip, a file without permission
            return str(error)

    def _start(self, label: Label) -> Start:
        if label not in self._starts:
            self._starts[label] = find_start(self._network.G, self._network.classes.labels([label])[0])
        return self._starts[label]


def _ignore(count: int) -> None:
    pass


# MERGED from latent.projecting.set_results
# Write what came of a set: pictures, styles, distances, a sheet of pairs and a histogram.


ZIP, STYLES, TABLE, FAILED = "projections.zip", "latents.npz", "distances.csv", "failed.csv"
SHEET, HISTOGRAM, SUMMARY = "pairs.png", "distances.png", "projections.json"

_EXAMPLES, _EXAMPLES_OF_CLASS = 8, 2  # pairs of each kind on the sheet
_MOST_CLASSES = 12  # with rows of their own


@dataclass(frozen=True, kw_only=True)
class Found:
    """The nearest projection of an image, and where it lies among the pieces."""

    target: TargetImage
    start: Label  # that it started from
    piece: int
    slot: int
    distances: tuple[float, ...]  # as COLUMNS
    file: str  # of projections.zip

    @property
    def perceptual(self) -> float:
        return self.distances[PERCEPTUAL]


class NothingReadable(UserError):
    """None of the images could be projected; failed.csv says why."""

    def __init__(self, path: Path, failed: list[tuple[str, str]]):
        super().__init__(f"none of the {len(failed)} images of {path} could be read; see {FAILED} in --outdir")
        self.failed = failed


def write_results(outdir: Path, settings: Mapping[str, Any], images: ImageSet, network: OpenNetwork,
                  plan: ProjectionPlan, pieces: Pieces, *, by_class: bool) -> dict[str, Any]:
    """Write all files of a set whose pieces are there; return what projections.json says, the last one of them.

    settings:  what the projections follow from
    by_class:  sheet and histogram show classes on their own

    Raises NothingReadable, once failed.csv is written, and OSError and UserError when a file cannot be.
    """
    for name in (SHEET, HISTOGRAM, FAILED, SUMMARY):  # of an earlier command
        (outdir / name).unlink(missing_ok=True)
    try:
        found, failed = _write_zip(outdir / ZIP, settings, images, network, plan, pieces)
    except NothingReadable as error:
        _write_table(outdir / FAILED, _FAILED_COLUMNS, error.failed)
        raise
    _write_table(outdir / TABLE, [*_COLUMNS], [_row(item, network, settings["detector"]) for item in found])
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


def _write_zip(path: Path, settings: Mapping[str, Any], images: ImageSet, network: OpenNetwork, plan: ProjectionPlan,
               pieces: Pieces) -> tuple[list[Found], list[tuple[str, str]]]:
    """Write images and styles; return what was found, and images with the reason why nothing was."""
    found, failed, styles = [], [], []
    conditional = network.classes.count > 0
    source = {"generated": True, "projected": True, **settings}
    if network.info.get("phantom") is True or images.source.get("phantom"):
        source["phantom"] = True
    with (Progress(len(plan.targets), "images put together") as progress,
          ImageSetWriter(path, classes=network.classes.names if conditional else images.classes, source=source,
                         option="--outdir") as writer):
        for target, (piece, slot, start, arrays) in _nearest(plan, pieces):
            progress.advance()
            if arrays["reasons"][slot]:
                failed.append((target.name, str(arrays["reasons"][slot])))
                continue
            label, pixels = _kept_label(network.classes, target, start), arrays["projections"][slot]
            file = writer.add(as_png(torch.from_numpy(pixels)), label, target.group, hash_pixels(pixels))
            styles.append(arrays["w"][slot].copy())  # a view would keep those of all classes
            found.append(Found(target=target, start=start, piece=piece, slot=slot, file=file,
                               distances=tuple(float(value) for value in arrays["distances"][slot])))
        if not found:
            raise NothingReadable(images.path, failed)
        # Before the zip takes its place, so that a full disk leaves all or nothing of what takes long.
        _write_styles(path.with_name(STYLES), network, found, styles)
    return found, failed


def _kept_label(classes: Classes, target: TargetImage, start: Label) -> Label:
    """Return the label of a projection: its target's, or else the one that it started from."""
    if classes.count == 0:
        return target.label
    if target.own is not None:
        return target.own
    # A mix of classes, which --label gives, would be a vector among the classes of others.
    return None if isinstance(start, tuple) and classes.kind != VECTOR else start


def _nearest(plan: ProjectionPlan, pieces: Pieces) -> Iterator[tuple[TargetImage, tuple[int, int, Label, dict]]]:
    """Yield for each image the projection with the smallest distance, among the classes that it started from."""
    lanes = ((lane.target, (number, slot, lane.start, arrays)) for number in range(plan.num_passes)
             for arrays in [pieces.load(number)] for slot, lane in enumerate(plan.lanes_of(number)))
    current, best = None, None
    for index, place in lanes:
        if index != current:
            if best is not None:
                yield plan.targets[current], best
            current, best = index, place
        elif _distance(place) < _distance(best):
            best = place
    if best is not None:
        yield plan.targets[current], best


def _distance(place: tuple[int, int, Label, dict]) -> float:
    _, slot, _, arrays = place
    return arrays["distances"][slot, PERCEPTUAL]


def _write_styles(path: Path, network: OpenNetwork, found: Sequence[Found], styles: Sequence[np.ndarray]) -> None:
    """Write w [M, L, K], as generate.py --projected-w reads it, and beside it what each row is of."""
    G = network.G
    w = np.stack(styles)
    names = {"image": [item.target.name for item in found], "group": [item.target.group for item in found],
             "class": [item.target.class_name or "" for item in found],
             "network_class": [_class_name(network, item.start) for item in found]}
    with atomic_write(path) as file:
        np.savez(file, w=np.broadcast_to(w, (len(w), G.num_ws, G.w_dim)),
                 **{name: np.array(texts, dtype=str) for name, texts in names.items()})


_FAILED_COLUMNS = ("image", "reason")
_COLUMNS = ("image", "projection", "class", "group", "network_class", "detector", *COLUMNS)


def _row(item: Found, network: OpenNetwork, detector: str) -> list[Any]:
    return [item.target.name, item.file, item.target.class_name or "", item.target.group,
            _class_name(network, item.start), detector, *(f"{value:.7g}" for value in item.distances)]


def _class_name(network: OpenNetwork, start: Label) -> str:
    return "" if start is None else network.classes.name(start)


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with atomic_write(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_as_text(value) for value in row] for row in rows)


def _as_text(value: Any) -> str:
    """Return a cell of a table; bytes of a file name that are no UTF-8 become escapes, such as \\udcff."""
    return str(value).encode(errors="backslashreplace").decode()


def _by_class(found: Sequence[Found]) -> dict[str, list[Found]]:
    """Return what was found for each class of the set; nothing where it has none."""
    groups: dict[str, list[Found]] = {}
    for item in found:
        if item.target.class_name is not None:
            groups.setdefault(item.target.class_name, []).append(item)
    return groups


def _statistics(found: Sequence[Found]) -> dict[str, Any]:
    """Return the number of images, and mean and quartiles of each distance; None where that is no finite number."""
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
            rows += [Row(title=f"{name} {kind}".strip(), pairs=[_pair(items[index], pieces) for index in indices])
                     for kind, indices in examples.items() if indices]
        else:
            rows.append(Row(title=name, pairs=[_pair(items[index], pieces, f"{kind} ")
                                               for kind, indices in examples.items() for index in indices]))
    save_pair_sheet(path, rows, title=title)


def _pair(item: Found, pieces: Pieces, kind: str = "") -> Pair:
    arrays = pieces.load(item.piece)
    return Pair(target=torch.from_numpy(arrays["targets"][item.slot]),
                projection=torch.from_numpy(arrays["projections"][item.slot]),
                caption=f"{kind}{item.perceptual:.3g} {Path(item.target.name).name}")
