"""Make data sets of phantoms: drawings of skin lesions with known attributes, for tests and demonstrations.

An image depends on the seed, its index and its class, not on how many others there are. Its class does depend on their
number: the classes have exact counts.
"""

import csv
import io
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import IO

import numpy as np
import PIL.Image

from dnnlib.cli import UserError
from dnnlib.progress import Progress
from imagesets.class_shares import class_counts
from imagesets.labels.compact import CompactTexts
from imagesets.member_pixels import channels_first
from imagesets.phantoms.looks import look_of
from imagesets.phantoms.options import PhantomOptions
from imagesets.phantoms.plan import lesion_numbers, make_plan
from imagesets.phantoms.render import render
from imagesets.phantoms.scene import ARTEFACT_RATES, attributes, draw_scene
from imagesets.pixel_hashes import hash_pixels
from imagesets.workers import ordered_map, usable_cores
from imagesets.writer import ImageSetWriter

TABLE = "phantom.csv"
_VERSION = 1  # of the drawings; raise it when equal seeds give other pixels
_CHUNK = 8  # images a worker takes at a time: about a tenth of a second


def render_phantom(seed: int, index: int, *, class_name: str = "benign", resolution: int = 64,
                   lesion_number: int | None = None,
                   rates: Mapping[str, float] = ARTEFACT_RATES) -> tuple[np.ndarray, dict[str, str | int | float]]:
    """Return pixels, uint8 [resolution, resolution, 3], and the attributes of the image by name.

    lesion_number: images of one seed, class and lesion show the same lesion; None for the one `index` has in a set
    rates:         probability of each artefact
    """
    if lesion_number is None:
        lesion_number = int(lesion_numbers(seed, index + 1)[index])
    scene = draw_scene(seed=seed, lesion_number=lesion_number, index=index, look=look_of(class_name), rates=rates)
    return render(scene, resolution), attributes(scene)


def write_phantoms(dest: str | os.PathLike, *, workers: int | None = None, stream: IO[str] | None = None,
                   **options) -> dict[str, int]:
    """Write a data set of phantoms with a table of their attributes; return the number of images of each class.

    dest:    zip or new folder, as imagesets.writer takes it
    workers: processes, None for one a core; the result does not depend on them
    stream:  where progress is shown, None for standard error
    options: fields of PhantomOptions

    Raises UserError when an option does not fit or dest cannot be written; then nothing is left there.
    """
    settings = PhantomOptions(**options)
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"--workers={workers}; expected at least 1")
    names = list(settings.classes)
    counts = class_counts(list(settings.classes.values()), settings.count)
    plan = make_plan(counts, settings.seed)
    table = CompactTexts()
    jobs = zip(range(settings.count), plan.labels.tolist(), plan.lesions.tolist())
    with (ImageSetWriter(dest, classes=names, source=_source(settings)) as writer,
          Progress(settings.count, "images", stream=stream) as progress,
          closing(ordered_map(_Draw(settings=settings), jobs, workers, chunk=_CHUNK)) as drawn):
        for label, lesion, (png, pixel_hash, row) in zip(plan.labels.tolist(), plan.lesions.tolist(), drawn):
            group = f"patient{lesion:06d}"
            file = writer.add(png, label, group, pixel_hash)
            if not len(table):
                table.append(_csv_line(["file", "class", "group", *row]))
            table.append(_csv_line([file, names[label], group, *row.values()]))
            progress.advance()
        writer.add_file(TABLE, "".join(table).encode())
    return dict(zip(names, counts))


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """Turns (index, label, lesion number) into an encoded image, its hash and its attributes, in any process."""

    settings: PhantomOptions

    def __call__(self, job: tuple[int, int, int]) -> tuple[bytes, str, dict[str, str | int | float]]:
        index, label, lesion_number = job
        pixels, row = render_phantom(
            self.settings.seed, index, class_name=list(self.settings.classes)[label],
            resolution=self.settings.resolution, lesion_number=lesion_number, rates=self.settings.rates(label))
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
