"""What the tests of authenticity measure of images: features, nearest training images, scores of the discriminator.

All processes of a run share the work. What is measured is kept in tables of a few hundred images each, in
--outdir/work: a command that was stopped, or is repeated with other tests, computes only what is missing.

Legend: N training images, R all real images, Q images that are compared with them, F features.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.aligned_similarity import SmallImages, prepare_images
from analysis.discriminator_scores import label_rows, scores_of
from analysis.near_duplicates import ORIENTATIONS, orient
from analysis.nearest_training import Candidates, NearestTraining, compare, find_candidates, nearest_synthetic
from dnnlib.cache import cache_folder
from dnnlib.progress import Progress
from generation.network import Classes
from metrics.detectors.base import Detector
from metrics.features import (
    FeatureCache,
    FeatureRequest,
    Features,
    cached_features,
    choose_batch,
    compute_rows,
    from_main,
    on_main,
    on_main_for_long,
)
from metrics.image_sources import ImageSource, SelectedImages, decode_batches
from torch_utils.distributed import Processes, broadcast_object
from training.discriminator import Discriminator

CHUNK = 512  # images whose results are kept together: with all orientations of 1,280 features 20 MB in memory
_VERSION = 2  # of what is measured; changing it makes tables of earlier versions useless
_PAIRS = 16  # images that are compared with their candidates at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyImages:
    """Images that play a part, such as all held-out ones; an image source. Sorted by their pixels within each set.

    sets:    the images, of one data set or several
    names:   with the part where there are several sets
    """

    title: str  # such as "held-out images"
    sets: Sequence[SelectedImages]
    names: Sequence[str]
    classes: Sequence[str]  # name of the class of each image
    known_classes: Sequence[str] | None  # all classes of the sets, in order of their numbers; None = without names
    groups: np.ndarray  # int64 [N]; no group is in two sets

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_groups(self) -> int:
        return len(np.unique(self.groups))

    @property
    def content(self) -> str:
        """A sha256 of the images in order."""
        return hashlib.sha256("/".join(images.content_hash() for images in self.sets).encode()).hexdigest()

    def pixels(self, rows: range) -> Tensor:
        return torch.cat([images.pixels(part) for images, part in self._divide(rows)])

    def item(self, row: int) -> np.ndarray:
        """Return an image: uint8 [H, W, C]."""
        (images, part), = self._divide(range(row, row + 1))
        return images.images.item(images.items[part.start])

    def select(self, rows: Sequence[int] | np.ndarray, title: str) -> "StudyImages":
        """Return some of the images, in ascending order of `rows`, which are int64 [n]."""
        rows, sets, start = np.sort(np.asarray(rows)), [], 0
        for images in self.sets:
            inside = rows[(rows >= start) & (rows < start + len(images))] - start
            if len(inside):
                sets.append(SelectedImages(images.images, images.items[inside]))
            start += len(images)
        return StudyImages(title=title, sets=sets, names=[self.names[row] for row in rows],
                           classes=[self.classes[row] for row in rows], known_classes=self.known_classes,
                           groups=self.groups[rows])

    def _divide(self, rows: range) -> list[tuple[SelectedImages, range]]:
        found, start = [], 0
        for images in self.sets:
            first, last = max(rows.start - start, 0), min(rows.stop - start, len(images))
            if first < last:
                found.append((images, range(first, last)))
            start += len(images)
        return found


class Work:
    """Tables that the processes of a run compute together, chunk by chunk, and that are kept in a folder."""

    def __init__(self, folder: Path, processes: Processes, *, verbose: bool):
        self.processes, self.verbose = processes, verbose
        self._kept = FeatureCache(folder, lambda line: print(line, file=sys.stderr))

    @property
    def is_main(self) -> bool:
        return self.processes.rank == 0

    def tables(self, title: str, key: Mapping[str, Any], count: int,
               compute: Callable[[range], Sequence[np.ndarray] | None], num_tables: int,
               num_whole: int = 0) -> list[list[np.ndarray]] | None:
        """Return tables, float32 [rows, columns], of each chunk of images; None except on the main process.

        key:      everything that they depend on, as JSON values
        compute:  called by all processes with the numbers of the images of a chunk; returns `num_tables` tables on the
                  main process; the last `num_whole` of them have one row, which is about the whole chunk
        """
        found, chunks = [], [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        with self.showing(count, f"images: {title}") as advance:
            for rows in chunks:
                keys = [{"version": _VERSION, "title": title, **key, "rows": [rows.start, rows.stop], "table": table,
                         "torch": torch.__version__, "device": self.processes.device.type}
                        for table in range(num_tables)]
                sizes = [len(rows)] * (num_tables - num_whole) + [1] * num_whole
                kept = on_main(lambda keys=keys, sizes=sizes: [
                    self._read(one, size) for one, size in zip(keys, sizes, strict=True)])
                if from_main(lambda kept=kept: any(table is None for table in kept)):
                    kept = compute(rows)
                    on_main(lambda keys=keys, kept=kept: [
                        self._kept.write(one, Features(values=np.asarray(table, np.float32)))
                        for one, table in zip(keys, kept, strict=True)])
                    kept = None if kept is None else [np.asarray(table, np.float32) for table in kept]
                found.append(kept)
                advance(len(rows))
        return found if self.is_main else None

    @contextmanager
    def showing(self, count: int, text: str) -> Iterator[Callable[[int], None]]:
        """Show progress on the main process; gives the function that advances it."""
        is_shown = self.is_main and self.verbose
        with Progress(count, text) if is_shown else nullcontext() as progress:
            yield progress.advance if is_shown else lambda number: None

    def _read(self, key: Mapping[str, Any], count: int) -> np.ndarray | None:
        found = self._kept.read(key, count=count, classes=False)
        return None if found is None else found.values


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What was measured of images that are compared with the training images.

    nearest:   their nearest training images
    features:  float32 [Q, F]
    to_reals:  float32 [R], distance of each real image to the nearest of them, in any orientation; or [Q, R] of each;
               None where that was not asked for
    """

    nearest: NearestTraining
    features: np.ndarray
    to_reals: np.ndarray | None = None


class Measurer:
    """Compares images with the training images; all processes call its methods together.

    training:  the training images
    features:  float32 [N, F], of these; None except on the main process
    """

    def __init__(self, work: Work, detector: Detector, training: StudyImages, features: np.ndarray | None, *,
                 workers: int | None = None):
        self._work, self._detector, self._training, self._features = work, detector, training, features
        self._workers = workers
        self._batch = choose_batch(training.sets[0].images.shape[1])
        self._small: SmallImages | None = None
        self._key = {"detector": detector.name, "weights": detector.weights_sha256,
                     "preprocessing": detector.preprocessing, "training": training.content,
                     "groups": _digest(training.groups)}

    def measure(self, title: str, queries: ImageSource, key: Mapping[str, Any], *, own_groups: np.ndarray | None = None,
                reals: np.ndarray | None = None, reals_key: str = "", of_each: bool = False) -> Measured | None:
        """Compare images with the training images; return None except on the main process.

        key:         what the images depend on, as JSON values
        own_groups:  int64 [Q], groups of training images that are not compared with each image
        reals:       float32 [R, F], features of real images whose distances to the images are wanted; only needed on
                     the main process, but `reals_key` on all: what they depend on; "" = none are wanted
        of_each:     give these distances for each image, not those to the nearest one
        """
        key = {**self._key, **key, "own": None if own_groups is None else _digest(own_groups), "reals": reals_key,
               "of_each": of_each}
        chunks = self._work.tables(title, key, len(queries), lambda rows: self._measure_chunk(
            queries, rows, None if own_groups is None else own_groups[rows.start:rows.stop],
            reals if reals_key else None, of_each), num_tables=3 if reals_key else 2,
            num_whole=1 if reals_key and not of_each else 0)
        if chunks is None:
            return None
        tables = [np.concatenate(parts) for parts in list(zip(*chunks, strict=True))[:2]]
        to_reals = None
        if reals_key:
            parts = [tables[2] for tables in chunks]
            to_reals = np.concatenate(parts) if of_each else np.min(parts, axis=(0, 1))
        return Measured(nearest=_from_table(tables[0]), features=tables[1], to_reals=to_reals)

    def distances(self, title: str, queries: ImageSource, key: Mapping[str, Any], reals: np.ndarray | None,
                  reals_key: str) -> np.ndarray | None:
        """Return the distance of each real image to the nearest of some images, float32 [R], see `measure`."""
        def compute(rows: range) -> list[np.ndarray] | None:
            features = self._oriented_features(queries, rows)
            return on_main(lambda: [nearest_synthetic(reals, features)[None]])

        chunks = self._work.tables(title, {**self._key, **key, "reals": reals_key}, len(queries), compute, num_tables=1,
                                    num_whole=1)
        return None if chunks is None else np.min([table for table, in chunks], axis=(0, 1))

    def _oriented_features(self, queries: ImageSource, rows: range) -> np.ndarray | None:
        """Return the features of images in all orientations, float32 [n, 8, F]; None except on the main process."""
        device, width = self._work.processes.device, self._detector.num_features

        def oriented(some: range) -> list[Tensor]:
            pixels = queries.pixels(range(rows.start + some.start, rows.start + some.stop)).to(device)
            return [torch.cat([self._detector(orient(pixels, one).contiguous()) for one in ORIENTATIONS], dim=1)]

        found = compute_rows(len(rows), self._batch, [(len(rows), len(ORIENTATIONS) * width)], oriented)
        return None if found is None else found[0].numpy().reshape(len(rows), len(ORIENTATIONS), width)

    def _measure_chunk(self, queries: ImageSource, rows: range, own_groups: np.ndarray | None,
                       reals: np.ndarray | None, of_each: bool) -> list[np.ndarray] | None:
        """Return a row of numbers for each image, its features, and distances to real images."""
        training = self._small_images()
        features = self._oriented_features(queries, rows)
        parts = (range(start, min(start + self._batch, rows.stop)) for start in rows[::self._batch])
        small = SmallImages.concatenate([prepare_images(queries.pixels(part)) for part in parts])
        candidates = broadcast_object(on_main_for_long(lambda beat: find_candidates(
            features, small.color, self._features, training.color, self._training.groups, own_groups,
            on_rows=lambda count: beat())))

        def compared(some: range) -> list[Tensor]:
            numbers = compare(small.gray, training.gray, candidates, some, self._training.groups)
            return [_to_table(numbers, candidates, some)]

        table = compute_rows(len(rows), _PAIRS, [(len(rows), len(_COLUMNS))], compared)
        if table is None:
            return None
        results = [table[0].numpy(), features[:, 0]]
        if reals is not None:
            results.append(_distances_of_each(features, reals) if of_each else nearest_synthetic(reals, features)[None])
        return results

    def _small_images(self) -> SmallImages:
        """Return the small training images, which are read when they are needed for the first time."""
        if self._small is None:
            images = self._training
            ranges = [range(start, min(start + CHUNK, len(images))) for start in range(0, len(images), CHUNK)]
            size = int(np.prod(images.sets[0].images.shape))
            with (closing(decode_batches(images.item, ranges, size, self._workers)) as batches,
                  self._work.showing(len(images), "training images read") as advance):
                parts = []
                for pixels in batches:
                    parts.append(prepare_images(pixels))
                    advance(len(pixels))
            self._small = SmallImages.concatenate(parts)
        return self._small


_COLUMNS = ("ssim", "ratio", "row", "orientation", "down", "right", "scale", "feature_distance", "feature_ratio",
            "pixel_distance", "pixel_ratio")


def _to_table(numbers: Mapping[str, np.ndarray], candidates: Candidates, rows: range) -> Tensor:
    """Return what is known of some queries as float32 [n, columns]. Row numbers below 2^24 are exact."""
    known = {**numbers, "down": numbers["shift"][:, 0], "right": numbers["shift"][:, 1],
             **{name: getattr(candidates, name)[rows.start:rows.stop] for name in _COLUMNS[7:]}}
    return torch.from_numpy(np.stack([known[name] for name in _COLUMNS], axis=1).astype(np.float32))


def _from_table(table: np.ndarray) -> NearestTraining:
    found = {name: column.astype(np.float64) for name, column in zip(_COLUMNS, table.T, strict=True)}
    whole = {name: found[name].astype(np.int64) for name in ("row", "orientation")}
    shift = np.stack([found.pop("down"), found.pop("right")], axis=1).astype(np.int64)
    return NearestTraining(**{**found, **whole, "shift": shift})


def _distances_of_each(features: np.ndarray, reals: np.ndarray) -> np.ndarray:
    """Return the distance of each image, in the nearest orientation, to each real image: float32 [Q, R].

    features: float32 [Q, 8, F];  reals: float32 [R, F]
    """
    real = torch.from_numpy(reals).double()
    squares = real.square().sum(dim=1)
    found = []
    for image in torch.from_numpy(features).double():
        products = image @ real.T
        found.append((image.square().sum(dim=1)[:, None] + squares - 2 * products).amin(dim=0).clamp(min=0).sqrt())
    return torch.stack(found).float().numpy()


def discriminator_scores(work: Work, D: Discriminator, classes: Classes, images: StudyImages, title: str,
                         key: Mapping[str, Any]) -> np.ndarray | None:
    """Return the score of each image, float32 [N]; nan for classes that the network does not have.

    key:  what the discriminator depends on, as JSON values

    Returns None except on the main process.
    """
    labels = label_rows(classes, images.classes, images.known_classes)
    batch = choose_batch(images.sets[0].images.shape[1])

    def compute(rows: range) -> list[np.ndarray] | None:
        table = compute_rows(len(rows), batch, [(len(rows), 1)], lambda some: [torch.from_numpy(scores_of(
            D, images.pixels(range(rows.start + some.start, rows.start + some.stop)),
            labels[rows.start + some.start:rows.start + some.stop]))[:, None]])
        return None if table is None else [table[0].numpy()]

    chunks = work.tables(title, {**key, "images": images.content, "classes": _digest(labels.numpy())}, len(images),
                         compute, num_tables=1)
    return None if chunks is None else np.concatenate([table[:, 0] for table, in chunks])


def real_features(work: Work, detector: Detector, images: StudyImages, *, use_cache: bool,
                  workers: int | None) -> np.ndarray | None:
    """Return the features of real images, float32 [N, F]; None except on the main process."""
    found = []
    cache = FeatureCache(cache_folder() / "features" if use_cache else None, lambda line: print(line, file=sys.stderr))
    for part in images.sets:
        features = cached_features(
            part, [FeatureRequest(detector=detector, count=len(part))], batch=choose_batch(part.images.shape[1]),
            device=work.processes.device, cache=cache, workers=workers,
            showing=lambda count: work.showing(count, f"features of {images.title}"))
        found.append(None if features is None else features[0].values)
    return np.concatenate(found) if work.is_main else None


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
