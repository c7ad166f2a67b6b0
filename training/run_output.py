"""Write the output of a run: log and statistics, sample grids, network snapshots, metrics and resumable states.

The main process writes; the others make the same calls, which do nothing. A grid shows some of the training images, or
samples of the generator for fixed latents. With classes, each row shows one class, and every class gets the same number
of rows; the real and the generated image of a cell have the same label.
"""

import math
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
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
from training.run_folder import SERVER_FOLDER, RunFolder, list_snapshots
from training.run_record import read_record
from training.run_report import Reporter, Tick, TickClock, error_text, process_memory, take_peak_gpu_memory
from training.snapshot import Networks, save_network
from training.snapshot_metrics import Evaluate, SnapshotMetrics
from training.state import TrainingState
from training.transfer import read_history

_EMPTY = -1  # marks a cell without an image, where a class has too few


class RunOutput:
    """Writes the files of one run, in the main process; the others take part in computing metrics only."""

    def __init__(self, config: TrainConfig, settings: RunSettings, dataset: ImageDataset, state: TrainingState,
                 processes: Processes, run: RunFolder, evaluate: Evaluate | None, stop: StopRequest, *,
                 title: str = ""):
        self.config, self.settings, self.dataset, self.state = config, settings, dataset, state
        self.run, self.is_main = run, processes.rank == 0
        self.reporter = Reporter(run.path, is_main=self.is_main, title=title)
        self.metrics = SnapshotMetrics(config.metrics, evaluate, run=run, reporter=self.reporter, processes=processes,
                                       stop=stop, continuation=self.continuation)
        self.clock = TickClock(total_nimg=config.kimg * 1000)
        self._grid = None
        self._saved_at = time.monotonic()
        self.saved_nimg: int | None = None  # images seen at the newest state; None if there is none
        # Why the newest network snapshot, or the newest state, could not be written; None if it was.
        self.network_failure: str | None = None
        self.state_failure: str | None = None
        self._training: dict[str, Any] = {}  # what the networks were trained on, including before --resume
        if self.is_main:
            self._training = {"training_data": dataset.training_data(),
                              "training_data_before": read_history(config.resume)}
        self._network_sha256: str | None = None  # of the newest network snapshot; None if it could not be written

    def start(self, lines: list[str]) -> None:
        """Start a new run. lines: on what was taken from --resume"""
        self.reporter.start(ticks=0, nimg=0)
        self._introduce(["starts at image 0", *lines])
        for line in self.run.not_continued:
            self.log(line, to_stderr=True)
        if self.is_main:
            with self.reporter.surviving("write a sample grid"):
                self._save_reals()
                self._save_fakes(self.run.fakes_init)
        self.clock.begin(0)

    def resume(self, ticks: int, seconds: float, lines: list[str], operators: str | None = None) -> None:
        """Continue a run.

        ticks:     reported so far;  seconds: of training, in earlier processes
        lines:     on damaged states that were skipped
        operators: the implementation that the run used before; None if its state does not record it
        """
        lines, now = list(lines), auto_implementation(self.state.device.type)
        if operators not in (None, now):
            lines.append(f"{self.run.path}: operators {operators} then and {now} now; results may differ from those of "
                         "an uninterrupted run")
        lines.append(f"continues at image {self.state.nimg}")
        passes, size = self.run.record.passes if self.is_main else (), self.config.step.micro_batch
        if passes and passes[-1].batch_gpu != size:
            lines.append(f"{size} images per pass from image {self.state.nimg} on, {passes[-1].batch_gpu} before: the "
                         "same batch, but other minibatch standard deviation groups and other images for path lengths")
        self.clock.resume(seconds)
        self.saved_nimg = self.state.nimg
        self.reporter.start(ticks=ticks, nimg=self.state.nimg)
        self._introduce(lines)
        self.clock.begin(self.state.nimg)

    def note_pass(self, nimg: int) -> None:
        """Record the pass size used after `nimg` images, if it changed."""
        if self.is_main:
            with self.reporter.surviving(f"write {self.run.options.name}"):
                self.run.note_pass(nimg, self.config.step.micro_batch)

    def log(self, text: str, *, to_stderr: bool = False) -> None:
        """Print lines, and write them to the log with date and time."""
        self.reporter.log(text, to_stderr=to_stderr)

    def report(self, tick: int, statistics: Mapping[str, Mapping[str, float]]) -> None:
        """Report a tick that just ended."""
        pipe = self.state.augment_pipe
        self.reporter.tick(Tick(
            number=tick, nimg=self.state.nimg, augment_p=0.0 if pipe is None else pipe.p.item(),
            times=self.clock.end(self.state.nimg), cpu_memory=process_memory(),
            gpu_memory=take_peak_gpu_memory(self.state.device)), statistics)

    def begin_tick(self) -> None:
        """Start a tick: the time since the last report counts as maintenance."""
        self.clock.begin(self.state.nimg)

    def save_images(self) -> None:
        """Write a grid of fakes."""
        if self.is_main:
            with self.reporter.surviving("write a sample grid"):
                self._save_fakes(self.run.fakes(self.state.nimg))

    @property
    def run_name(self) -> str:
        """The name of the run, as network snapshots record it."""
        return self.run.path.name

    def networks(self) -> Networks:
        """Return the networks of a network snapshot."""
        return Networks(G=self.state.G, D=self.state.D, G_ema=self.state.G_ema)

    def training_info(self) -> dict[str, Any]:
        """Return what a network snapshot records about the images that the networks were trained on."""
        return self._training

    def save_networks(self) -> None:
        """Write a network snapshot."""
        if not self.is_main:
            return
        classes, counts = self.dataset.class_indices() if self.dataset.use_labels else None, None
        if classes is not None:
            counts = torch.bincount(torch.from_numpy(classes), minlength=self.dataset.label_dim).tolist()
        info = {"kimg": self.state.nimg / 1000, "run": self.run_name, "classes": self.dataset.classes,
                "class_counts": counts, "label_kind": self.dataset.label_kind,
                "phantom": self.dataset.source.get("phantom") is True, "resolution": self.dataset.resolution,
                **self.training_info()}
        path, self._network_sha256, self.network_failure = self.run.snapshot(self.state.nimg), None, None
        with self.reporter.surviving("write a network snapshot"):
            try:
                save_network(path, replace(self.networks(), config={"info": info}))
            except OSError as error:
                self.network_failure = error_text(error)
                raise
            self._network_sha256 = sha256_of(path)

    def complete_networks(self) -> None:
        """Write the last network snapshot again if that failed, or the run was killed before."""
        if self.is_main and (self.network_failure is not None or not self.run.snapshot(self.state.nimg).exists()):
            self.save_networks()

    def evaluate(self) -> None:
        """Compute the metrics of the newest network snapshot, and missing ones of earlier snapshots."""
        self.metrics.compute(self.state.G_ema, self._network_sha256, self.network_failure)

    def remove_networks(self, ends: Collection[int]) -> None:
        """Remove network snapshots by --keep and --keep-best, once a newer one and a state are written.

        ends:  images seen at each end that the run reached: other runs and image sets may depend on these snapshots
        """
        if not self.is_main or self.network_failure is not None or self.state_failure is not None:
            return
        best, removed = self.settings.keep_best, []
        needed = {self.run.snapshot(nimg) for nimg in (*ends, *(each.nimg for each in self.metrics.missing))}
        with self.reporter.surviving("remove network snapshots"):
            values = {} if best is None else self.metrics.values(best)
            for path in snapshots_to_remove(self.run.snapshot(self.state.nimg), self.settings, values, needed):
                self.run.require_held()
                path.unlink(missing_ok=True)
                removed.append(path.name)
        if removed:
            names = removed if len(removed) < 3 else [removed[0], "...", removed[-1]]
            self.log(f"removed {len(removed)} network snapshots ({self.settings.keep_flags}): {', '.join(names)}"
                     if len(removed) > 1 else f"removed {removed[0]} ({self.settings.keep_flags})")

    def state_is_due(self) -> bool:
        """Tell, in the main process, whether it is time to save a state."""
        return self.is_main and time.monotonic() - self._saved_at >= self.config.state_minutes * 60

    def state_is_older(self) -> bool:
        """Tell, in the main process, whether the newest saved state is out of date."""
        return self.is_main and (self.saved_nimg != self.state.nimg or self.metrics.has_given_up)

    def save_state(self, checkpoints: CheckpointPair, state: dict[str, Any]) -> None:
        """Save a resumable state; if the disk is full or fails, log a warning and keep the previous state."""
        if not self.is_main:
            return
        self._saved_at, self.state_failure = time.monotonic(), None
        with self.reporter.surviving("save a resumable state"):
            try:
                self.run.require_held()
                self.reporter.write_waiting()
                checkpoints.save(state)
            except (OSError, DiskFailure) as error:
                self.state_failure = error_text(error)
                raise
            self.saved_nimg = self.state.nimg

    def continuation(self) -> str:
        """Return, for messages, where the same command continues."""
        command = self.settings.same_command
        if self.saved_nimg == self.state.nimg:
            return f"{command} continues"
        failure = "" if self.state_failure is None else f"the state could not be saved ({self.state_failure}): "
        if self.saved_nimg is None:
            return f"{failure}{command} starts again at image 0"
        return f"{failure}{command} continues at image {self.saved_nimg}"

    def _introduce(self, lines: list[str]) -> None:
        """Log what the run trains, on which data and with which settings."""
        precision = choose_precision(self.settings.precision, self.state.device.type, self.config.precision)
        dataset, networks = self.dataset, (self.state.G, self.state.D)
        sizes = " and ".join(f"{sum(value.numel() for value in network.parameters()):,}" for network in networks)
        labels = {CLASS: f"{dataset.label_dim} classes", VECTOR: f"labels of {dataset.label_dim} numbers"}.get(
            dataset.label_kind, "labels not used")
        self.log("\n".join([
            f"run: {self.run.path}", *self.run.notes, *self.settings.notes,
            f"precision: {precision.name} ({precision.reason})",
            *([] if precision.warning is None else [precision.warning]),
            f"data: {dataset.path}, {dataset.num_images} images{' and flipped copies' if dataset.xflip else ''}, "
            f"{describe_shape(dataset.image_shape)}, {labels}",
            f"networks: {sizes} parameters in generator and discriminator; batch size {self.config.batch}, "
            f"{self.config.step.micro_batch} per pass, {self.config.gpus} processes",
            f"operators: {describe_operators(self.state.device.type)}", *lines]))

    def _samples(self) -> "SampleGrid":
        if self._grid is None:
            self._grid = choose_grid(self.dataset, z_dim=self.state.G.z_dim, seed=self.config.seed,
                                     screen=screen_for(self.state.device))
        return self._grid

    def _save_reals(self) -> None:
        save_reals(self.run.reals, self._samples(), self.dataset)

    def _save_fakes(self, path: Path) -> None:
        save_fakes(path, self._samples(), self.state.G_ema, batch=self.config.step.micro_batch)


def snapshots_to_remove(newest: Path, settings: RunSettings, values: Mapping[str, float | None],
                        needed: Collection[Path]) -> list[Path]:
    """Return the network snapshots of a run to remove by --keep and --keep-best, the oldest first.

    newest:  snapshot at the images seen so far; later ones are from a killed process, and will be overwritten
    values:  of --keep-best by the name of the file
    needed:  files to keep in any case

    The result depends on files and values only, so that an interrupted run ends with the same files.
    """
    if settings.num_newest is None:
        return []
    found = [path for path in map(Path, list_snapshots(newest.parent)) if path.suffix == newest.suffix]
    found = found[:found.index(newest) + 1] if newest in found else []
    stay = {*found[-settings.num_newest:], *needed}
    if settings.keep_best is not None:
        # A snapshot without a value could be the best.
        stay.update(path for path in found if path.name not in values)
        sign = -1 if settings.keep_best.lower_is_better else 1
        finite = [(sign * values[path.name], index) for index, path in enumerate(found)
                  if values.get(path.name) is not None and math.isfinite(values[path.name])]
        if finite:
            stay.add(found[max(finite)[1]])  # the newer of two equal ones
    others = [path for path in found if path not in stay]
    run = newest.parent.parent if newest.parent.name == SERVER_FOLDER else newest.parent
    begun_from = _hashes_of_resume(run.parent) if others else set()
    return [path for path in others if not begun_from or sha256_of(path) not in begun_from]


def _hashes_of_resume(outdir: Path) -> set[str]:
    """Return the SHA-256 of the network files that the runs in a folder started from with --resume.

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


# Sample grids.


@dataclass(frozen=True, kw_only=True)
class Screen:
    """The size limits of a grid."""

    width: int  # pixels
    height: int
    fewest: tuple[int, int]  # columns and rows, for images of any size
    most: tuple[int, int]

    def cells(self, resolution: int) -> tuple[int, int]:
        """Return the columns and rows that fit."""
        columns, rows = (min(max(pixels // resolution, fewest), most) for pixels, fewest, most in
                         zip((self.width, self.height), self.fewest, self.most))
        return columns, rows


# An 8K screen: 30 x 16 images of 256 pixels.
LARGE_SCREEN = Screen(width=7680, height=4320, fewest=(7, 4), most=(32, 32))
# Without a GPU a grid should take seconds: 12 x 8 up to 64 pixels, 6 x 4 at 128, 4 x 2 from 256 on.
SMALL_SCREEN = Screen(width=768, height=512, fewest=(4, 2), most=(12, 8))


def screen_for(device: torch.device | str) -> Screen:
    """Return the limits of a grid that the device can make in seconds."""
    return SMALL_SCREEN if torch.device(device).type == "cpu" else LARGE_SCREEN


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """The contents of a run's grids, row by row; the same each time the run continues."""

    columns: int
    rows: int
    items: np.ndarray  # int64 [cells], of the data set; _EMPTY leaves a cell of the reals white
    labels: Tensor  # float32 [cells, c_dim], of reals and fakes
    z: Tensor  # float32 [cells, Z]
    row_names: tuple[str, ...] | None  # the class of each row, or None


def choose_grid(dataset: ImageDataset, *, z_dim: int, seed: int, screen: Screen) -> SampleGrid:
    """Choose images, labels and latents by the run's seed. Mirrored images are not shown.

    With classes each row shows one class, and every class gets the same number of rows; if there are more classes than
    rows, the largest classes are shown. Otherwise images are drawn from the whole set.
    """
    columns, rows = screen.cells(dataset.resolution)
    rng = np.random.Generator(np.random.PCG64(seed_for(seed, 0, 0, "grid/images")))
    order = rng.permutation(dataset.num_images)
    classes = dataset.class_indices() if dataset.use_labels else None
    if classes is None:
        names = None
        rows = min(rows, max(-(-len(order) // columns), 1))
        items = _fill(order, columns * rows)
        sources = np.resize(order, columns * rows)  # labels repeat if there are too few images
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
    """Write a grid of real images. Raises OSError, and UserError if an image cannot be read."""
    pixels = [None if item == _EMPTY else torch.from_numpy(dataset[item][0]) for item in grid.items]
    save_grid(path, pixels, columns=grid.columns, rows=grid.rows, labels=grid.row_names)


@torch.no_grad()
def save_fakes(path: str | os.PathLike, grid: SampleGrid, G: nn.Module, *, batch: int) -> None:
    """Write the images that `G` generates for a grid's latents and labels, with constant noise. Raises OSError.

    G:      the averaged generator, in eval mode
    batch:  images of a pass; those of a training pass fit into memory
    """
    device = next(G.parameters()).device
    parts = [to_pixels(G(z.to(device), c.to(device), noise_mode="const")).cpu()
             for z, c in zip(grid.z.split(batch), grid.labels.split(batch))]
    save_grid(path, torch.cat(parts), columns=grid.columns, rows=grid.rows, labels=grid.row_names)


def _fill(items: np.ndarray, cells: int) -> np.ndarray:
    """Return the first `cells` items, followed by empty cells if there are fewer."""
    filled = np.full(cells, _EMPTY, dtype=np.int64)
    filled[:min(len(items), cells)] = items[:cells]
    return filled


def _largest(classes: np.ndarray, limit: int) -> np.ndarray:
    """Return up to `limit` classes, those with the most images, in the order of their numbers."""
    labels, counts = np.unique(classes[~missing_labels(classes)], return_counts=True)
    return np.sort(labels[np.argsort(-counts, kind="stable")[:limit]])
