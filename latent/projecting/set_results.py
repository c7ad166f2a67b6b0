"""Write what came of a set: pictures, styles, distances, a sheet of pairs and a histogram."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.cli import UserError
from dnnlib.files import atomic_write
from dnnlib.progress import Progress
from imagesets.class_names import VECTOR
from imagesets.pixel_hashes import hash_pixels
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from latent.classes import Classes, Label
from latent.network import OpenNetwork
from latent.pictures import as_png
from latent.pieces import Pieces
from latent.projecting.distances import COLUMNS, PERCEPTUAL
from latent.projecting.pair_sheet import Pair, Row, choose_examples, save_pair_sheet
from latent.projecting.set_targets import TargetImage
from latent.projecting.set_work import ProjectionPlan
from torch_utils.plots import save_histogram

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
