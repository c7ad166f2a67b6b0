"""Write what a run leaves behind: log and statistics, grids of pictures, network files, metrics and states.

The main process writes; the others make the same calls, which then do nothing. A grid shows some of the run's images,
or what the generator makes of fixed latents. With classes, a row shows one class, and each class has as many rows as
fit; reals and fakes of a cell share a label.
"""

import math
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.cli import StopRequest
from dnnlib.files import DiskFailure, sha256_of
from dnnlib.typed_config import ConfigError
from imagesets.classes import CLASS, VECTOR, class_name, label_vectors, missing_labels
from imagesets.reader import describe_shape
from torch_utils.checkpoint import CheckpointPair
from torch_utils.device import choose_precision
from torch_utils.distributed import Processes
from torch_utils.images import save_grid, to_pixels
from torch_utils.ops.compiled import auto_implementation
from torch_utils.ops.compiled import describe as describe_operators
from torch_utils.seeding import generator_for, seed_for
from training.config import RunSettings, TrainConfig
from training.dataset import ImageDataset
from training.run_folder import RunFolder, list_snapshots
from training.run_record import read_record
from training.run_report import Reporter, Tick, TickClock, describe, process_memory, take_peak_gpu_memory
from training.snapshot import Networks, save_network
from training.snapshot_metrics import Evaluate, SnapshotMetrics
from training.state import TrainingState
from training.transfer import read_history

_EMPTY = -1  # the item of a cell that no image of the class is left for


class RunOutput:
    """The files of one run, as far as this process writes them."""

    def __init__(self, config: TrainConfig, settings: RunSettings, dataset: ImageDataset, state: TrainingState,
                 processes: Processes, run: RunFolder, evaluate: Evaluate | None, stop: StopRequest):
        self.config, self.settings, self.dataset, self.state = config, settings, dataset, state
        self.run, self.is_main = run, processes.rank == 0
        self.reporter = Reporter(run.path, is_main=self.is_main)
        self.metrics = SnapshotMetrics(config.metrics, evaluate, run=run, reporter=self.reporter, processes=processes,
                                       stop=stop, continuation=self.continuation)
        self.clock = TickClock(total_nimg=config.kimg * 1000)
        self._grid = None
        self._saved_at = time.monotonic()
        self.saved_nimg: int | None = None  # images seen at the newest state; None where there is none
        # Why the newest network file, or the newest state, could not be written; None where it was.
        self.network_failure: str | None = None
        self.state_failure: str | None = None
        self._training: dict[str, Any] = {}  # what the networks learned from, and what was learned before --resume
        if self.is_main:
            self._training = {"training_data": dataset.training_data(),
                              "training_data_before": read_history(config.resume)}
        self._network_sha256: str | None = None  # of the newest network file; None where it could not be written

    def start(self, lines: list[str]) -> None:
        """Begin a new run. lines: what was taken from --resume"""
        self.reporter.start(ticks=0, nimg=0)
        self._introduce(["starts at image 0", *lines])
        for line in self.run.not_continued:
            self.log(line, to_stderr=True)
        if self.is_main:
            with self.reporter.surviving("a grid"):
                save_reals(self.run.reals, self._samples(), self.dataset)
                self._save_fakes(self.run.fakes_init)
        self.clock.begin(0)

    def resume(self, ticks: int, seconds: float, lines: list[str], operators: str | None = None) -> None:
        """Continue a run.

        ticks:     reported so far;  seconds: of training, in earlier processes
        lines:     on damaged states that were passed over
        operators: the implementation that the run used before; None where its state does not say
        """
        lines, now = list(lines), auto_implementation(self.state.device.type)
        if operators not in (None, now):
            lines.append(f"{self.run.path}: operators {operators} then and {now} now; the end may differ from that of "
                         "an unbroken run")
        lines.append(f"continues at image {self.state.nimg}")
        passes, size = self.run.record.passes if self.is_main else (), self.config.step.micro_batch
        if passes and passes[-1].batch_gpu != size:
            lines.append(f"passes of {size} images from image {self.state.nimg} on, {passes[-1].batch_gpu} before: the "
                         "same batch, in other groups of the minibatch standard deviation and other parts for path "
                         "lengths")
        self.clock.resume(seconds)
        self.saved_nimg = self.state.nimg
        self.reporter.start(ticks=ticks, nimg=self.state.nimg)
        self._introduce(lines)
        self.clock.begin(self.state.nimg)

    def note_pass(self, nimg: int) -> None:
        """Record the size of passes where it is another one after `nimg` images."""
        if self.is_main:
            with self.reporter.surviving(self.run.options.name):
                self.run.note_pass(nimg, self.config.step.micro_batch)

    def log(self, text: str, *, to_stderr: bool = False) -> None:
        """Print lines, and log them with the time."""
        self.reporter.log(text, to_stderr=to_stderr)

    def report(self, tick: int, statistics: Mapping[str, Mapping[str, float]]) -> None:
        """Report a tick that just ended."""
        pipe = self.state.augment_pipe
        self.reporter.tick(Tick(
            number=tick, nimg=self.state.nimg, augment_p=0.0 if pipe is None else pipe.p.item(),
            times=self.clock.end(self.state.nimg), cpu_memory=process_memory(),
            gpu_memory=take_peak_gpu_memory(self.state.device)), statistics)

    def begin_tick(self) -> None:
        """Go on training: what passed since the last report was maintenance."""
        self.clock.begin(self.state.nimg)

    def save_images(self) -> None:
        """Write a grid of fakes."""
        if self.is_main:
            with self.reporter.surviving("a grid"):
                self._save_fakes(self.run.fakes(self.state.nimg))

    def save_networks(self) -> None:
        """Write a network file."""
        if not self.is_main:
            return
        classes, counts = self.dataset.class_indices() if self.dataset.use_labels else None, None
        if classes is not None:
            counts = torch.bincount(torch.from_numpy(classes), minlength=self.dataset.label_dim).tolist()
        info = {"kimg": self.state.nimg / 1000, "run": self.run.path.name, "classes": self.dataset.classes,
                "class_counts": counts, "label_kind": self.dataset.label_kind,
                "phantom": self.dataset.source.get("phantom") is True, "resolution": self.dataset.resolution,
                **self._training}
        path, self._network_sha256, self.network_failure = self.run.snapshot(self.state.nimg), None, None
        with self.reporter.surviving("a network file"):
            try:
                save_network(path, Networks(G=self.state.G, D=self.state.D, G_ema=self.state.G_ema,
                                            config={"info": info}))
            except OSError as error:
                self.network_failure = describe(error)
                raise
            self._network_sha256 = sha256_of(path)

    def complete_networks(self) -> None:
        """Write the last network file once more where it could not be written, or the run was ended before."""
        if self.is_main and (self.network_failure is not None or not self.run.snapshot(self.state.nimg).exists()):
            self.save_networks()

    def evaluate(self) -> None:
        """Compute metrics of the network that was written last, and of others that are missing theirs."""
        self.metrics.compute(self.state.G_ema, self._network_sha256, self.network_failure)

    def remove_networks(self, ends: Collection[int]) -> None:
        """Remove network files that --keep and --keep-best do not let stay, once a newer one and a state are written.

        ends:  images seen at each end that the run reached: other runs and sets of images may have begun from these
        """
        if not self.is_main or self.network_failure is not None or self.state_failure is not None:
            return
        best, removed = self.settings.keep_best, []
        needed = {self.run.snapshot(nimg) for nimg in (*ends, *(each.nimg for each in self.metrics.missing))}
        with self.reporter.surviving("the removal of network files"):
            values = {} if best is None else self.metrics.values(best)
            for path in snapshots_to_remove(self.run.snapshot(self.state.nimg), self.settings, values, needed):
                self.run.require_held()
                path.unlink(missing_ok=True)
                removed.append(path.name)
        if removed:
            names = removed if len(removed) < 3 else [removed[0], "...", removed[-1]]
            self.log(f"removed {len(removed)} network files ({self.settings.keep_flags}): {', '.join(names)}"
                     if len(removed) > 1 else f"removed {removed[0]} ({self.settings.keep_flags})")

    def state_is_due(self) -> bool:
        """Tell the main process whether states were not saved for too long."""
        return self.is_main and time.monotonic() - self._saved_at >= self.config.state_minutes * 60

    def state_is_older(self) -> bool:
        """Tell the main process whether the newest state on the disk does not know all of this moment."""
        return self.is_main and (self.saved_nimg != self.state.nimg or self.metrics.has_given_up)

    def save_state(self, checkpoints: CheckpointPair, state: dict[str, Any]) -> None:
        """Save a state; a disk that is full or fails gives a warning, and the one before stays."""
        if not self.is_main:
            return
        self._saved_at, self.state_failure = time.monotonic(), None
        with self.reporter.surviving("a state"):
            try:
                self.run.require_held()
                self.reporter.write_waiting()
                checkpoints.save(state)
            except (OSError, DiskFailure) as error:
                self.state_failure = describe(error)
                raise
            self.saved_nimg = self.state.nimg

    def continuation(self) -> str:
        """Return from where the same command goes on."""
        command = self.settings.same_command
        if self.saved_nimg == self.state.nimg:
            return f"{command} continues"
        failure = "" if self.state_failure is None else f"the state could not be saved ({self.state_failure}): "
        if self.saved_nimg is None:
            return f"{failure}{command} starts again at image 0"
        return f"{failure}{command} continues at image {self.saved_nimg}"

    def _introduce(self, lines: list[str]) -> None:
        """Log what is trained, and on what."""
        precision = choose_precision(self.settings.precision, self.state.device.type, self.config.precision)
        dataset, networks = self.dataset, (self.state.G, self.state.D)
        sizes = " and ".join(f"{sum(value.numel() for value in network.parameters()):,}" for network in networks)
        labels = {CLASS: f"{dataset.label_dim} classes", VECTOR: f"labels of {dataset.label_dim} numbers"}.get(
            dataset.label_kind, "labels not used")
        self.log("\n".join([
            f"run: {self.run.path}", *self.run.notes, *self.settings.notes,
            f"precision: {precision.name} ({precision.reason})",
            *([] if precision.warning is None else [precision.warning]),
            f"data: {dataset.path}, {dataset.num_images} images{' and their mirror images' if dataset.xflip else ''}, "
            f"{describe_shape(dataset.image_shape)}, {labels}",
            f"networks: {sizes} parameters in generator and discriminator; batch {self.config.batch}, "
            f"{self.config.step.micro_batch} a pass, {self.config.gpus} processes",
            f"operators: {describe_operators(self.state.device.type)}", *lines]))

    def _samples(self) -> "SampleGrid":
        if self._grid is None:
            self._grid = choose_grid(self.dataset, z_dim=self.state.G.z_dim, seed=self.config.seed,
                                     screen=screen_for(self.state.device))
        return self._grid

    def _save_fakes(self, path: Path) -> None:
        save_fakes(path, self._samples(), self.state.G_ema, batch=self.config.step.micro_batch)


def snapshots_to_remove(newest: Path, settings: RunSettings, values: Mapping[str, float | None],
                        needed: Collection[Path]) -> list[Path]:
    """Return the network files of a run that --keep and --keep-best do not let stay, the oldest first.

    newest:  that of the images seen so far; later ones are of a process that was killed, and written anew
    values:  of --keep-best by the name of the file
    needed:  files that stay in any case

    What stays follows from files and values alone, so that a run that was stopped ends with the files of another one.
    """
    if settings.num_newest is None:
        return []
    found = [path for path in map(Path, list_snapshots(newest.parent)) if path.suffix == newest.suffix]
    found = found[:found.index(newest) + 1] if newest in found else []
    stay = {*found[-settings.num_newest:], *needed}
    if settings.keep_best is not None:
        # One that was not measured could be the best.
        stay.update(path for path in found if path.name not in values)
        sign = -1 if settings.keep_best.lower_is_better else 1
        finite = [(sign * values[path.name], index) for index, path in enumerate(found)
                  if values.get(path.name) is not None and math.isfinite(values[path.name])]
        if finite:
            stay.add(found[max(finite)[1]])  # the newer one of equals
    others = [path for path in found if path not in stay]
    begun_from = _hashes_of_resume(newest.parent.parent) if others else set()
    return [path for path in others if not begun_from or sha256_of(path) not in begun_from]


def _hashes_of_resume(outdir: Path) -> set[str]:
    """Return the SHA-256 of the network files that runs in a folder began from: their commands name them.

    Not their paths, which may be relative to another working directory.
    """
    found = set()
    for path in outdir.iterdir():
        try:
            record = read_record(path)
        except ConfigError:
            continue
        if record is not None and record.identity["resume"] is not None:
            found.add(record.identity["resume"])
    return found


# Grids of pictures


@dataclass(frozen=True, kw_only=True)
class Screen:
    """How large a grid may be."""

    width: int  # pixels
    height: int
    fewest: tuple[int, int]  # columns and rows, whatever the size of an image
    most: tuple[int, int]

    def cells(self, resolution: int) -> tuple[int, int]:
        """Return the columns and rows that fit."""
        columns, rows = (min(max(pixels // resolution, fewest), most) for pixels, fewest, most in
                         zip((self.width, self.height), self.fewest, self.most))
        return columns, rows


# An 8K screen: 30 x 16 images of 256 pixels.
LARGE_SCREEN = Screen(width=7680, height=4320, fewest=(7, 4), most=(32, 32))
# Without a GPU a grid is to take seconds: 12 x 8 up to 64 pixels, 6 x 4 at 128, 4 x 2 from 256 on.
SMALL_SCREEN = Screen(width=768, height=512, fewest=(4, 2), most=(12, 8))


def screen_for(device: torch.device | str) -> Screen:
    """Return the size of grid that a device makes in seconds."""
    return SMALL_SCREEN if torch.device(device).type == "cpu" else LARGE_SCREEN


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """What the cells of a run's grids show, row by row; the same whenever the run continues."""

    columns: int
    rows: int
    items: np.ndarray  # int64 [cells], of the data set; _EMPTY leaves the cell white among the reals
    labels: Tensor  # float32 [cells, c_dim], of reals and fakes
    z: Tensor  # float32 [cells, Z]
    row_names: tuple[str, ...] | None  # the class of each row, or None


def choose_grid(dataset: ImageDataset, *, z_dim: int, seed: int, screen: Screen) -> SampleGrid:
    """Choose images, labels and latents by the run's seed. Mirrored images are not shown.

    With classes in use a row shows one class: classes get equally many rows, and where the screen has fewer rows than
    there are classes, the largest classes are shown. Otherwise images are drawn from the whole set.
    """
    columns, rows = screen.cells(dataset.resolution)
    rng = np.random.Generator(np.random.PCG64(seed_for(seed, 0, 0, "grid/images")))
    order = rng.permutation(dataset.num_images)
    classes = dataset.class_indices() if dataset.use_labels else None
    if classes is None:
        names = None
        rows = min(rows, max(-(-len(order) // columns), 1))
        items = _fill(order, columns * rows)
        sources = np.resize(order, columns * rows)  # labels go round where images do not suffice
        labels = dataset.label_table()[sources]
    else:
        shown = _largest(classes, rows)
        each = rows // len(shown)
        items = np.concatenate([_fill(order[classes[order] == label], columns * each) for label in shown])
        row_labels = np.repeat(shown, each)
        rows = len(row_labels)
        names = tuple(class_name(label, dataset.classes, unnamed="class {}") for label in row_labels)
        labels = torch.from_numpy(label_vectors(row_labels, dataset.label_dim)).repeat_interleave(columns, dim=0)
    latents = generator_for(seed_for(seed, 0, 0, "grid/latents"))
    return SampleGrid(columns=columns, rows=rows, items=items, labels=labels, row_names=names,
                      z=torch.randn(columns * rows, z_dim, generator=latents))


def save_reals(path: str | os.PathLike, grid: SampleGrid, dataset: ImageDataset) -> None:
    """Write the images of a grid. Raises OSError, and UserError when an image cannot be read."""
    pixels = [None if item == _EMPTY else torch.from_numpy(dataset[item][0]) for item in grid.items]
    save_grid(path, pixels, columns=grid.columns, rows=grid.rows, labels=grid.row_names)


@torch.no_grad()
def save_fakes(path: str | os.PathLike, grid: SampleGrid, G: nn.Module, *, batch: int) -> None:
    """Write what `G` makes of a grid's latents and labels, with its own noise maps. Raises OSError.

    G:      the averaged generator, in eval mode
    batch:  images of a pass: as many as a training pass takes are sure to fit
    """
    device = next(G.parameters()).device
    parts = [to_pixels(G(z.to(device), c.to(device), noise_mode="const")).cpu()
             for z, c in zip(grid.z.split(batch), grid.labels.split(batch))]
    save_grid(path, torch.cat(parts), columns=grid.columns, rows=grid.rows, labels=grid.row_names)


def _fill(items: np.ndarray, cells: int) -> np.ndarray:
    """Return the first `cells` items, with empty cells after them where there are fewer."""
    filled = np.full(cells, _EMPTY, dtype=np.int64)
    filled[:min(len(items), cells)] = items[:cells]
    return filled


def _largest(classes: np.ndarray, limit: int) -> np.ndarray:
    """Return up to `limit` classes that have images, those with most images, in the order of their numbers."""
    labels, counts = np.unique(classes[~missing_labels(classes)], return_counts=True)
    return np.sort(labels[np.argsort(-counts, kind="stable")[:limit]])
