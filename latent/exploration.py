"""What all commands of explore.py share: their common options, the open network, and work divided among processes.

Legend: N images, L num_ws, K w_dim, C R channels and side of an image.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import GroupedCommand, UserError, UserPath, check_outdir
from dnnlib.progress import Progress
from generation.command import flag, flags_of
from generation.image_generator import (
    GLOBAL_CENTER,
    MEAN_LATENTS,
    TRUNC_CENTERS,
    ImageGenerator,
    SynthesisSettings,
    choose_batch,
    parse_seeds,
)
from generation.network import NETWORK_HELP, Label, OpenNetwork, open_network, require_same
from generation.pictures import make_outdir
from imagesets.classes import VECTOR
from metrics.features import compute_rows, on_main_for_long, together
from metrics.intervals import TooFew, bootstrap_mean
from torch_utils.device import (
    DEVICE_HELP,
    TUNE_MALLOC_HELP,
    check_counts,
    count_processes,
    memory_advice,
    settle_device,
)
from torch_utils.distributed import Place, Processes, gather_rows, join
from torch_utils.launch import launch

T = TypeVar("T")

NETWORK, OUTPUT, SPEED = "Network and images", "Output", "Speed and devices"  # headings of the help
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_LARGEST_TRUNC = 1000
_UNIT = 16  # images that a process takes at a time, or a batch if that is larger
_MOST_REFERENCES = 16  # classes whose reference styles are kept: 41 MB each, for 512 numbers in w
_REFERENCE_SEED = 2_000_000_000  # far from the seeds that users name: reference styles are of other latents


@dataclass(frozen=True, kw_only=True)
class ExploreRequest:
    """The options that all commands have.

    Raises UserError if one is missing or out of range.
    """

    network: str | None = flag(NETWORK, "FILE", f"{NETWORK_HELP} Required.", type=UserPath())
    class_: str | None = flag(
        NETWORK, "LIST", "Classes of the images, by name or number, if the network is class-conditional; with several, "
        "such as melanoma,nevus, or all, the seeds take them in turn.", shown="all")
    label: str | None = flag(
        NETWORK, "LIST", "Label vector of the images, such as 0,1,0.5, if the network was trained with vectors as "
        "labels; for one trained with classes, a mix of them.")
    seeds: str = flag(NETWORK, "LIST", "Random seeds, one per image, such as 0,1,5-9.", default="0-31")
    trunc: float = flag(
        NETWORK, "PSI", "Truncation of the images that are explored: smaller values give more typical, less varied "
        "ones.", default=SynthesisSettings.truncation)
    trunc_center: str = flag(
        NETWORK, "NAME", "Mean style that --trunc pulls towards: global, of all images, or class, of each image's own "
        "class.", type=click.Choice(TRUNC_CENTERS), default=GLOBAL_CENTER)
    outdir: str | None = flag(OUTPUT, "DIR", "Folder for the results. Required.", type=UserPath())
    device: str = flag(SPEED, "NAME", DEVICE_HELP, default="auto")
    gpus: int | None = flag(SPEED, "INT", "Number of processes: one per GPU, or several on a CPU.", shown="1")
    batch: int | None = flag(
        SPEED, "INT", "Images per pass on a GPU. On a CPU images are made one at a time, so that results do not depend "
        "on it.", shown="chosen by resolution")
    tune_malloc: bool = flag(SPEED, "BOOL", TUNE_MALLOC_HELP, default=True)

    def __post_init__(self) -> None:
        for name, example in (("network", "network-snapshot-001000.safetensors"), ("outdir", "out")):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing; expected one, such as --{name}={example}, or see --help")
        if not abs(self.trunc) <= _LARGEST_TRUNC:  # also refuses nan
            raise UserError(f"--trunc is {self.trunc:g}; expected a number, usually from 0 to 1, at most "
                            f"{_LARGEST_TRUNC}")
        check_counts(batch=self.batch, gpus=self.gpus)

    @property
    def settings(self) -> SynthesisSettings:
        return SynthesisSettings(truncation=self.trunc, center=self.trunc_center)

    def choose_labels(self, network: OpenNetwork) -> tuple[Label, ...]:
        """Return the labels that --class and --label name: all classes if neither is given. Raises UserError."""
        classes = network.classes
        if self.class_ is None and self.label is None and classes.count > 0 and classes.kind != VECTOR:
            return tuple(range(classes.count))
        return tuple(classes.choose(self.class_, self.label))

    def check(self, network: OpenNetwork) -> None:
        """Raise UserError if a command's own options do not fit the network. Called before anything is written."""


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """An open network, and the styles and images of it. All processes call its methods together."""

    network: OpenNetwork
    generator: ImageGenerator
    processes: Processes
    outdir: Path
    labels: tuple[Label, ...]  # that --class or --label names; images take them in turn
    _references: dict[tuple[Label, ...], Tensor] = field(default_factory=dict)

    @property
    def G(self) -> torch.nn.Module:
        return self.network.G

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.processes.rank == 0

    def labels_of(self, count: int) -> list[Label]:
        """Return the labels of the first `count` images."""
        return [self.labels[index % len(self.labels)] for index in range(count)]

    def name_of(self, label: Label) -> str:
        """Return the name of a class, or "" for an unconditional network."""
        return "" if label is None else self.network.classes.name(label)

    def styles(self, seeds: Sequence[int], labels: Sequence[Label] | None = None, *, truncated: bool = True) -> Tensor:
        """Return the styles of seeds: float32 [N, L, K] on the CPU.

        labels:     one per seed; None = in turn, see `labels_of`
        truncated:  as --trunc says; False = as the mapping network makes them
        """
        rows = self.network.classes.labels(self.labels_of(len(seeds)) if labels is None else labels)
        generator = self.generator if truncated else ImageGenerator(self.G, SynthesisSettings(), batch=1)
        # One at a time: the style of a seed does not depend on the others.
        return torch.cat([generator.map_seeds([seed], row[None]).cpu() for seed, row in zip(seeds, rows, strict=True)])

    @torch.no_grad()
    def reference_styles(self, labels: Sequence[Label] | None = None) -> Tensor:
        """Return the untruncated styles of 10,000 random latents, the labels in turn: float64 [10000, K] on the CPU.

        What "a standard deviation of w" means. Their latents are of no seed that a user would name.

        labels: None = those of --class
        """
        key = self.labels if labels is None else tuple(labels)
        if key not in self._references:
            z = torch.from_numpy(np.random.RandomState(_REFERENCE_SEED).randn(MEAN_LATENTS, self.G.z_dim))
            rows = self.network.classes.labels([key[index % len(key)] for index in range(MEAN_LATENTS)])
            device = self.generator.device
            self._references[key] = torch.cat([
                self.G.mapping(some.to(device), row.to(device), skip_w_avg_update=True)[:, 0].double().cpu()
                for some, row in zip(z.split(1000), rows.split(1000), strict=True)])
            if len(self._references) > _MOST_REFERENCES:
                del self._references[next(iter(self._references))]
        return self._references[key]

    def render(self, ws: Tensor) -> Tensor:
        """Return the images of styles [N, L, K], made by this process alone: uint8 [N, C, R, R] on the CPU."""
        return torch.cat(list(self.generator.render_all(ws)))

    def images(self, ws: Tensor, what: str = "images") -> Iterator[Tensor]:
        """Yield the images of styles [N, L, K] in order on the main process: uint8 [n, C, R, R] on the CPU.

        All processes make some of them; the others get batches of 0 images. what: for the progress
        """
        return self.images_of(len(ws), lambda rows: self.render(ws[rows.start:rows.stop]), what)

    def images_of(self, total: int, render: Callable[[range], Tensor], what: str = "images") -> Iterator[Tensor]:
        """Yield `total` images in order on the main process: uint8 [n, C, R, R] on the CPU; see `images`.

        render:  returns some of the images, uint8 [n, C, R, R] on the CPU; takes their numbers, and is called by the
                 process that makes them, so that no process has to hold the styles of all
        """
        size = self._unit
        unit = size * self.processes.count
        none = torch.empty(0, self.G.img_channels, self.G.img_resolution, self.G.img_resolution, dtype=torch.uint8)
        with self._progress(total, what) as progress:
            for first in range(0, total, unit):
                start = min(first + size * self.processes.rank, total)
                mine = range(start, min(start + size, total))
                rows = gather_rows(together(lambda mine=mine: render(mine) if len(mine) else none))
                yield none if rows is None else rows
                if progress is not None:
                    progress.advance(min(unit, total - first))

    def evaluate(self, ws: Tensor, functions: Sequence["ImageFunction"], what: str = "images") -> list[np.ndarray]:
        """Return what functions find in the images of styles, on all processes: float32 [N, columns] each.

        ws:    [N, L, K]
        what:  for the progress

        The result depends neither on the number of processes (with equally many threads each) nor, on a CPU, on
        --batch.
        """
        def compute(rows: range) -> list[Tensor]:
            if not len(rows):
                return [torch.zeros(0, one.columns) for one in functions]
            pixels = self.render(ws[rows.start:rows.stop])
            return [torch.from_numpy(np.ascontiguousarray(one.compute(pixels), dtype=np.float32)) for one in functions]

        sizes = [(len(ws), one.columns) for one in functions]
        with self._progress(len(ws), what) as progress:
            tables = compute_rows(len(ws), self._unit, sizes, compute,
                                  (lambda count: None) if progress is None else progress.advance)
        return self.processes.broadcast(None if tables is None else [table.numpy() for table in tables])

    def from_main(self, work: Callable[[Callable[[], None]], T]) -> T:
        """Run `work` on the main process only; return its result on all.

        work:  calls its argument now and then, which keeps the waiting processes from timing out
        """
        return self.processes.broadcast(on_main_for_long(work))

    def describe(self) -> dict[str, Any]:
        """Return what all results depend on, for records: JSON types."""
        settings = self.generator.settings
        names = [self.name_of(label) for label in self.labels if label is not None]
        return {"network": self.network.name, "network_sha256": self.network.sha256, "labels": names,
                "truncation": settings.truncation, "truncation_center": settings.center,
                "device": self.generator.device.type}

    @property
    def _unit(self) -> int:
        """The number of images that a process takes at a time."""
        return max(_UNIT, self.generator.batch)

    @contextmanager
    def showing(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        """Show the progress of other work on the main process; gives a function that takes the number of items done."""
        with self._progress(total, what) as progress:
            yield (lambda count: None) if progress is None else progress.advance

    def _progress(self, total: int, what: str) -> Any:
        return Progress(total, what) if self.is_main else nullcontext()


@dataclass(frozen=True, kw_only=True)
class ImageFunction:
    """Numbers that are computed from images, such as measurements of the lesion or probabilities of a classifier.

    names:    of the numbers, M
    compute:  takes uint8 [n, C, R, R] on the CPU, returns float [n, M]; an image's numbers do not depend on the others
    """

    names: tuple[str, ...]
    compute: Callable[[Tensor], np.ndarray]

    @property
    def columns(self) -> int:
        return len(self.names)


# Opens the classifier in a file of study.py classify: takes the file, what --weights takes, and a device.
OpenClassifier = Callable[[str, str, torch.device], ImageFunction]


def make_explore_command(name: str, kind: type[ExploreRequest], work: Callable[[Explorer, Any], None], text: str,
                         summary: str) -> click.Command:
    """Return a command of explore.py.

    kind:     of its options
    work:     takes an Explorer and the options; all processes run it, the main one writes and prints
    text:     of its help
    summary:  one line for the help of explore.py
    """
    def run(**flags: Any) -> int:
        return explore(kind(**flags), work)

    return GroupedCommand(name, callback=run, params=flags_of(kind), help=text, short_help=summary,
                          context_settings=CONTEXT)


def explore(request: ExploreRequest, work: Callable[[Explorer, Any], None]) -> int:
    """Open the network, in --gpus processes, and do the work; return the exit code. Raises UserError."""
    place = Place.from_environment()
    processes = count_processes(place, request.gpus, shared=None)
    check_outdir(request.outdir)
    device = settle_device(request.device, place, processes, tunes_malloc=request.tune_malloc)
    network = open_network(request.network, "cpu")
    labels = request.choose_labels(network)
    request.settings.require_support(network.G)
    request.check(network)
    if processes > 1 and not place.is_started:
        del network  # each process opens its own
        return launch(processes)
    batch = choose_batch(network.G.img_resolution, device)
    if device != "cpu" and request.batch is not None:
        batch = request.batch
    with join(device) as joined, memory_advice(batch):
        require_same(network, joined)
        generator = ImageGenerator(network.G.to(joined.device), request.settings, batch=batch)
        with _new_folder(request.outdir) if joined.rank == 0 else nullcontext():
            work(Explorer(network=network, generator=generator, processes=joined, outdir=Path(request.outdir),
                          labels=labels), request)
    return 0


@contextmanager
def _new_folder(path: str) -> Iterator[None]:
    """Create a folder; remove it after an error if it is new and still empty, as after a mistake in the options."""
    folder = Path(path)
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    make_outdir(path)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for one in new:
                one.rmdir()
        raise


def seeds_of(text: str, *, least: int = 1) -> list[int]:
    """Return the seeds of --seeds, each once. Raises UserError if there are fewer than `least`."""
    seeds = list(dict.fromkeys(parse_seeds("--seeds", text)))
    if len(seeds) < least:
        raise UserError(f"--seeds is {text}, which is {len(seeds)}; expected at least {least} different seeds")
    return seeds


def parse_numbers(option: str, text: str, fits: Callable[[float], bool], expected: str, *, example: str) -> list[float]:
    """Return the numbers of a list such as 0,0.5,1, each once, from small to large.

    fits:      tells whether a number can be used; false for nan
    expected:  "values of psi, at most 4", for messages;  example: a list

    Raises UserError for others.
    """
    found = set()
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not fits(number):
            raise UserError(f"{option} has {part.strip()!r}; expected {expected}, such as {option}={example}")
        found.add(number)
    return sorted(found)


def pixel_differences(images: Tensor, other: Tensor) -> np.ndarray:
    """Return the mean absolute difference of each image to another one, in levels of 0 to 255: float64 [N].

    images:  uint8 [N, C, H, W];  other: uint8 [C, H, W]
    """
    # One at a time, and whole numbers: sums are exact, and large images take little memory.
    sums = [int((image.short() - other.short()).abs().sum(dtype=torch.int64)) for image in images]
    return np.array(sums, dtype=np.float64) / other.numel()


def mean_with_interval(values: np.ndarray, groups: np.ndarray | None = None) -> dict[str, float | None]:
    """Return a mean and the ends of its 95 % bootstrap interval as JSON values, without ends if there are too few.

    values:  float64 [N];  groups: int64 [N], see `bootstrap_mean`
    """
    try:
        found = bootstrap_mean(values, groups)
    except TooFew:
        return {"mean": float(np.mean(values)), "low": None, "high": None}
    return {"mean": found.estimate, "low": found.low, "high": found.high}
