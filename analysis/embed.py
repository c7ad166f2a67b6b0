"""Write a map of real, synthetic and projected images as one page: `study.py embed`.

In the folder of --out, for --out=map.html:

    map.html       the page, with all that it shows
    map.json       its numbers, and the settings
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from analysis.embedding_columns import make_columns, with_keys
from analysis.embedding_features import embedding_features
from analysis.embedding_inputs import NUMBERS_FORMAT, EmbedRequest, open_points
from analysis.embedding_layouts import MAPS, LayoutSettings, make_layouts
from analysis.embedding_mixture import SetMixture, count_near, count_work, measure_mixture, measure_purity
from analysis.embedding_neighbors import Neighbors, nearest_among_reals, nearest_reals
from analysis.embedding_page import write_embedding_page
from analysis.embedding_pictures import make_thumbnails
from analysis.embedding_points import REAL, Column, Embedding, Layout, Points
from analysis.embedding_report import describe, report_html, results_record
from analysis.embedding_table import write_table
from analysis.tensorboard_projector import check_projector_folder, write_projector_files
from dnnlib.cli import GroupedCommand
from dnnlib.files import atomic_write, sha256_of
from dnnlib.progress import Progress
from dnnlib.workers import usable_cores
from generation.command import flags_of
from metrics.features import on_main_for_long
from torch_utils.device import settle_device
from torch_utils.distributed import Place, Processes, join
from torch_utils.launch import launch

NUM_NEAREST = 5  # training images beside a pinned image

HELP = """Show real, synthetic and projected images on one page: a map on which similar images are near each other.

\b
python study.py embed --sets=train.zip,synthetic.zip,projected/projections.zip --out=map.html
python study.py embed --sets=train.zip,synthetic.zip --features=classifiers/models/real-seed0.safetensors \\
    --attributes=HAM10000_metadata.csv --out=map.html
python study.py embed --sets=site1.zip,synthetic.zip --real=site2.zip,site3.zip --out=map.html --tensorboard=projector

The page is one file, which any browser opens and which works offline. The map is made from the real images, and the
others are placed on it: adding a set moves no real image. Pictures of real images are shown only if their data set
records that they may be redistributed (dataset_tool.py --redistribution=yes). BOOL is 1 or 0, true or false, yes or
no.
"""


def make_embed_command() -> click.Command:
    """Return the command `study.py embed`."""
    return GroupedCommand("embed", callback=_run, params=flags_of(EmbedRequest), help=HELP,
                          short_help="Show real and synthetic images on one page, by their similarity.",
                          context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})


def _run(**flags: Any) -> int:
    request, place = EmbedRequest(**flags), Place.from_environment()
    count = place.processes(request.gpus)
    device = settle_device(request.device, place, count, tunes_malloc=request.tune_malloc)
    if count > 1 and not place.is_started:
        return launch(count)
    with join(device) as processes:
        run_embed(request, processes)
    return 0


def run_embed(request: EmbedRequest, processes: Processes) -> None:
    """Measure and place all images, and write the page. All processes call this; the main one writes."""
    if request.tensorboard is not None:
        check_projector_folder(request.tensorboard)
    points, notes = open_points(request)
    # First, so that a mistake in a table is told before the long work.
    columns, found = make_columns(points, request, processes)
    features, described = embedding_features(request, points, processes)

    def write(beat: Callable[[], None]) -> None:
        made = Embedder(request, replace(points, columns=columns), features, described, beat)
        made.write([*notes, *found])

    on_main_for_long(write)


class Embedder:
    """Makes maps and numbers from features, and writes them; on the main process only.

    features:   float32 [N, F]
    described:  what they are of, as JSON values
    beat:       called now and then, so that waiting processes do not time out
    """

    def __init__(self, request: EmbedRequest, points: Points, features: np.ndarray, described: dict[str, Any],
                 beat: Callable[[], None]):
        self.request, self.points, self.features, self.beat = request, points, features, beat
        self.described = described

    def write(self, notes: Sequence[str]) -> None:
        """Make everything and write all files; the page last."""
        request, points = self.request, self.points
        with self._showing(len(points), "images: nearest real images") as advance:
            num_near = max(NUM_NEAREST, count_near(points.num_real, request.neighbors))
            among_reals = nearest_among_reals(self.features, points, num_near, on_rows=advance)
            nearest = nearest_reals(self.features, points, NUM_NEAREST, among_reals, on_rows=advance)
        layouts = self._layouts()
        others = [number for number, one in enumerate(points.sets) if one.kind != REAL]
        mixtures = [self._mixture(number, among_reals) for number in others]
        with self._showing(points.num_real, "images: neighbors of the same class") as advance:
            purity = measure_purity(self.features, points, among_reals=among_reals, num_neighbors=request.neighbors,
                                    level=request.ci, on_rows=advance)
        with self._showing(sum(len(one) for one in points.sets if one.shows_pictures), "thumbnails") as advance:
            thumbnails, pictured = make_thumbnails(points, request.thumbnail, request.workers, advance)
        distance = Column(key="distance", title="distance to the nearest real image",
                          values=nearest.distances[:, 0].astype(np.float64))
        embedding = Embedding(
            title=request.shown_title(points), points=replace(points, columns=with_keys([*points.columns, distance])),
            layouts=layouts, nearest=nearest, thumbnails=thumbnails, pictured=pictured, settings=self._settings())
        out = Path(request.out)
        if request.tensorboard is not None:
            write_projector_files(request.tensorboard, embedding, self.features)
        if request.table is not None:
            write_table(request.table, embedding)
        record = {"format": NUMBERS_FORMAT, **results_record(embedding, mixtures, purity, notes)}
        with atomic_write(request.numbers, text=True) as file:
            file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
        write_embedding_page(out, embedding, report_html(embedding, mixtures, purity, notes),
                             workers=request.workers or usable_cores())
        for line in (*notes, *describe(embedding, mixtures, purity)):
            click.echo(line)
        click.echo(f"written to {out}")

    def _layouts(self) -> list[Layout]:
        request = self.request
        settings = LayoutSettings(maps=tuple(request.map_names), perplexity=request.perplexity, seed=request.seed,
                                  num_neighbors=request.neighbors)
        with ExitStack() as shown:
            bars: dict[str, Progress] = {}

            def on_step(name: str, step: int, steps: int) -> None:
                self.beat()
                if request.verbose and name not in bars:
                    shown.close()  # the bar of the map before
                    bars[name] = shown.enter_context(Progress(steps, f"steps of {name}"))
                if request.verbose:
                    bars[name].advance(step - bars[name].done)

            return make_layouts(self.features, self.points.num_real, settings, on_step=on_step)

    def _mixture(self, number: int, among_reals: Neighbors) -> SetMixture:
        name = self.points.sets[number].name
        with self._showing(count_work(self.points, number), f"images: mixing with {name}") as advance:
            return measure_mixture(self.features, self.points, number, among_reals=among_reals,
                                   num_neighbors=self.request.neighbors, level=self.request.ci, seed=self.request.seed,
                                   on_rows=advance)

    @contextmanager
    def _showing(self, count: int, text: str) -> Iterator[Callable[[int], None]]:
        """Show progress; gives the function that advances it."""
        if not self.request.verbose:
            yield lambda number: self.beat()
            return
        with Progress(count, text) as progress:
            def advance(number: int) -> None:
                self.beat()
                progress.advance(number)

            yield advance

    def _settings(self) -> dict[str, Any]:
        """Return what the page depends on besides the images, as JSON values."""
        request = self.request
        names = ("seed", "perplexity", "neighbors", "ci", "max_images", "thumbnail", "no_real_images")
        files = {name: getattr(request, name) for name in ("attributes", "classifier")}
        packages = ["numpy", "scipy", "torch", *(package for _, package in map(MAPS.get, request.map_names))]
        return {"features": self.described, **{name: getattr(request, name) for name in names},
                "maps": request.map_names,
                **{f"{name}_sha256": None if path is None else sha256_of(path) for name, path in files.items()},
                "versions": {name: version(name) for name in packages}}
