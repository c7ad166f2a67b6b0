"""Move images along a direction: a sheet, a film, styles, and what changes on the way.

Legend: T targets, S steps, L num_ws, K w_dim.
"""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.files import atomic_write
from dnnlib.text import plural
from generation.command import flag
from generation.image_generator import save_projected_w
from generation.network import Label, OpenNetwork
from latent.directions import Directions, choose_style_layers, parse_direction
from latent.exploration import NETWORK, Explorer, OpenClassifier, make_explore_command
from latent.films import FILM, FilmRequest, describe_film, film_frames, originals_of, styles_of_points
from latent.interpolation import Timeline
from latent.measurements import MeasuredRequest
from latent.points import EXAMPLE, Point, labels_of_points, parse_points
from latent.video import Film, parse_formats, tile
from latent.walks import (
    LONGEST_NAME,
    WalkReport,
    correct_for_number,
    describe_walk,
    groups_of_styles,
    measure_effect,
    move,
    parse_strength,
    place_steps,
    quantities_of,
)
from torch_utils.images import MOST_PIXELS, save_grid

EDIT = "Edit"  # heading of the help
STEM, TABLE = "edit", "effects.csv"  # of the files in --outdir

_FRAME_PIXELS = 2**24  # of targets and originals in a frame of the film: 4096x4096
_ORIGINAL = "original"  # heading of a column


@dataclass(frozen=True, kw_only=True)
class EditRequest(FilmRequest, MeasuredRequest):
    """The options of explore.py edit.

    Raises UserError if one is missing or out of range.
    """

    target: str | None = flag(
        NETWORK, "LIST", f"What is edited: seeds, and npz files with styles, such as {EXAMPLE}. --trunc does not "
        "change the styles of files. Required.")
    seeds: str | None = flag(NETWORK, "LIST", "The same as --target, for seeds.")
    class_: str | None = flag(
        NETWORK, "LIST", "Class of the seeds, by name or number, if the network is class-conditional: one for all, or "
        "one for each target.")
    direction: str | None = flag(
        EDIT, "FILE:NAME", "Direction in a file of explore.py sefa or explore.py boundary, by its name or number, such "
        "as directions.npz:0. Required.")
    strength: str = flag(
        EDIT, "LOW..HIGH", "How far images move, in standard deviations of w along the direction.", default="-3..3")
    layers: str | None = flag(
        EDIT, "LIST", "Layers that move, such as 0,1,5-9, or coarse, middle, fine or all.",
        shown="those of the direction's file")
    steps: int = flag(EDIT, "INT", "Columns of the sheet.", default=7)
    frames: int = flag(FILM, "INT", "Frames from the lowest to the highest strength.", default=60)
    loop: bool | None = flag(FILM, None, "Lead back to the lowest strength, for a film that repeats without a jump.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and self.seeds is not None:
            raise UserError("--target and --seeds are both given; expected one of them")
        if self.target is None and self.seeds is None:
            raise UserError(f"--target is missing; expected seeds or npz files with styles, such as {EXAMPLE}")
        if self.direction is None:
            raise UserError("--direction is missing; expected one, such as --direction=directions.npz:0")
        place_steps(*parse_strength(self.strength), self.steps)

    def targets(self, network: OpenNetwork) -> list[Point]:
        """Return what is edited. Raises UserError."""
        return parse_points(self.target or self.seeds, network.G, "--seeds" if self.target is None else "--target")

    def move(self, network: OpenNetwork) -> Directions:
        """Return the direction, with the layers that move. Raises UserError."""
        direction = parse_direction(self.direction, network)
        if self.layers is None:
            return direction
        return replace(direction, layers=tuple(choose_style_layers(self.layers, network.G)))

    def choose_labels(self, network: OpenNetwork) -> tuple[Label, ...]:
        """Return the label of all seeds, or one for each target. Raises UserError."""
        return tuple(labels_of_points([self.targets(network)], network.classes, self.class_, self.label, "targets"))

    def check(self, network: OpenNetwork) -> None:
        super().check(network)
        self.move(network)
        targets = self.targets(network)
        self.check_frame(network, self.num_filmed(network, len(targets)), targets, sides=1)

    def num_filmed(self, network: OpenNetwork, count: int) -> int:
        """Return how many of `count` targets the film shows: the first ones that fit, each beside its original."""
        return min(count, max(_FRAME_PIXELS // (2 * network.G.img_resolution**2), 1))


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Targets, and the direction that they move along."""

    targets: Sequence[Point]
    names: Sequence[str]  # of the targets
    styles: Tensor  # [T, L, K]
    direction: Directions  # only one
    low: float  # in standard deviations
    high: float

    @property
    def groups(self) -> Sequence[Any] | None:
        """Return the groups of the targets, of which those without one are independent; None if all are."""
        if any(target.group for target in self.targets):
            return [target.group or f"target {index}" for index, target in enumerate(self.targets)]
        return groups_of_styles(self.styles)

    def move(self, strengths: Sequence[float], targets: slice = slice(None)) -> Tensor:
        """Return the styles of some targets at strengths: [T, S, L, K]."""
        shifts = [strength * float(self.direction.deviations[0]) for strength in strengths]
        return move(self.styles[targets], self.direction.vectors[0], shifts, self.direction.layers)


def run_edit(explorer: Explorer, request: EditRequest, open_classifier: OpenClassifier) -> None:
    """Edit the targets, and write sheet, film, styles and what was measured."""
    edit = _edit_of(explorer, request)
    strengths, count = place_steps(edit.low, edit.high, request.steps), len(edit.targets)
    functions = request.functions(open_classifier, explorer.generator.device)
    names = quantities_of(functions)
    # The targets themselves are measured, too, since 0 need not be among the strengths.
    measured = torch.cat([edit.styles[:, None], edit.move(strengths)], dim=1).flatten(0, 1)
    tables = explorer.evaluate(measured, functions, "images measured") if functions else [np.zeros((len(measured), 0))]
    values = np.concatenate(tables, axis=1).reshape(count, 1 + len(strengths), len(names))
    originals = originals_of(explorer.network, request, [edit.targets]) if explorer.is_main else None
    _write_sheet(explorer, request, edit, None if originals is None else originals[0])
    paths = _write_film(explorer, request, edit, None if originals is None else originals[0])
    if not explorer.is_main:
        return
    rows = {"target": np.repeat(np.array(edit.names), len(strengths)), "step": np.tile(strengths, count)}
    save_projected_w(explorer.outdir / f"{STEM}.npz", edit.move(strengths).flatten(0, 1).numpy(), **rows)
    if names:
        _write_table(explorer.outdir / TABLE, names, rows, values[:, 1:].reshape(-1, len(names)))
    else:
        (explorer.outdir / TABLE).unlink(missing_ok=True)  # from an earlier command
    direction = edit.direction
    effects = tuple(measure_effect(name, values[:, 1:, column], values[:, 0, column], strengths, edit.groups)
                    for column, name in enumerate(names))
    report, = correct_for_number([WalkReport(name=direction.names[0], detail="", steps=tuple(strengths),
                                             effects=effects, sheet=f"{STEM}.png")])
    record = {**explorer.describe(), "targets": list(edit.names), "direction": direction.names[0],
              "method": direction.method, "layers": list(direction.layers), "strengths": strengths,
              "standard_deviation": float(direction.deviations[0]), "frames_per_second": request.fps,
              "num_frames": len(_timeline(request)), "originals": originals is not None,
              "effects": [{**vars(effect), "means": list(effect.means)} for effect in report.effects]}
    with atomic_write(explorer.outdir / f"{STEM}.json", text=True) as file:
        file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
    click.echo(f"{explorer.outdir / STEM}.png: {plural(count, 'target')} at {len(strengths)} strengths from "
               f"{edit.low:g} to {edit.high:g} standard deviations along {direction.names[0]}")
    filmed = request.num_filmed(explorer.network, count)
    for path in paths:
        click.echo(f"{path}: {describe_film(len(_timeline(request)), request.fps, filmed)}")
    if names:
        click.echo(describe_walk(report) if count > 1 else _describe_one(report))
        ends = {0.0: values[:, 0], strengths[0]: values[:, 1], strengths[-1]: values[:, -1]}
        for line in _describe_means(names, {strength: ends[strength] for strength in sorted(ends)}):
            click.echo(line)


def _write_table(path: Path, names: Sequence[str], rows: Mapping[str, np.ndarray], values: np.ndarray) -> None:
    """Write what was measured in each image; cells of what was not found are empty. values: [T * S, names]"""
    with atomic_write(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*rows, *names])
        for first, numbers in zip(zip(*rows.values(), strict=True), values, strict=True):
            writer.writerow([*first, *("" if np.isnan(number) else f"{number:.7g}" for number in numbers)])


def _describe_one(report: WalkReport) -> str:
    """Return what a step of one standard deviation changes in a single target, which has no interval."""
    texts = [f"{effect.quantity} {effect.slope:+.3g}" for effect in report.effects if effect.slope is not None]
    return f"direction {report.name}: +1 sd of w: {', '.join(texts) or 'nothing was found to measure'}"


def _describe_means(names: Sequence[str], tables: Mapping[float, np.ndarray]) -> list[str]:
    """Return a line for each quantity, such as "area: 0.12 at -3, 0.18 at 0, 0.31 at 3 (mean of 3 targets)".

    tables: what was measured at each strength, [T, names], nan where it was not found
    """
    lines, count = [], max(len(table) for table in tables.values())
    for column, name in enumerate(names):
        found = {strength: table[np.isfinite(table[:, column]), column] for strength, table in tables.items()}
        texts = [f"{some.mean(dtype=np.float64):.3g} at {strength:g}" if len(some) else f"not found at {strength:g}"
                 for strength, some in found.items()]
        sizes = [len(some) for some in found.values()]
        if count == 1 or not any(sizes):
            over = ""
        elif min(sizes) == count:
            over = f" (mean of {count} targets)"
        else:  # a lesion was not found in some
            over = f" (means of {', '.join(map(str, sizes))} of {count} targets)"
        lines.append(f"{name[:LONGEST_NAME]}: {', '.join(texts)}{over}")
    return lines


def _edit_of(explorer: Explorer, request: EditRequest) -> Edit:
    targets = request.targets(explorer.network)
    each = explorer.labels_of(len(targets))
    names = [target.name if target.seed is None else f"{target.name} {explorer.name_of(label)}".strip()
             for target, label in zip(targets, each, strict=True)]
    low, high = parse_strength(request.strength)
    return Edit(targets=targets, names=names, styles=styles_of_points(explorer, targets, each),
                direction=request.move(explorer.network), low=low, high=high)


def _timeline(request: EditRequest) -> Timeline:
    return Timeline(points=2, frames=request.frames, loop=bool(request.loop))


def _write_sheet(explorer: Explorer, request: EditRequest, edit: Edit, originals: Sequence[Tensor] | None) -> None:
    """Write a row per target, with a column per strength and its original at the left."""
    strengths = place_steps(edit.low, edit.high, request.steps)
    most = max(MOST_PIXELS // (explorer.G.img_resolution**2 * (request.steps + 1)), 1)
    shown = min(len(edit.targets), most)
    images = [image for some in explorer.images(edit.move(strengths, slice(shown)).flatten(0, 1)) for image in some]
    if not explorer.is_main:
        return
    if shown < len(edit.targets):
        print(f"{STEM}.png shows the first {shown} of {len(edit.targets)} targets", file=sys.stderr)
    rows = [images[first:first + request.steps] for first in range(0, len(images), request.steps)]
    headings = [f"{strength:+.3g}" if strength else "0" for strength in strengths]
    if originals is not None:
        rows = [[original, *row] for original, row in zip(originals[:shown], rows, strict=True)]
        headings = [_ORIGINAL, *headings]
    save_grid(explorer.outdir / f"{STEM}.png", [image for row in rows for image in row], columns=len(headings),
              rows=shown, labels=edit.names[:shown], headings=headings)


def _write_film(explorer: Explorer, request: EditRequest, edit: Edit, originals: Sequence[Tensor] | None) -> list[Path]:
    """Write the film; return the paths of its files."""
    timeline, low, span = _timeline(request), edit.low, edit.high - edit.low
    count = request.num_filmed(explorer.network, len(edit.targets))

    def style(frame: int, target: int) -> Tensor:
        moment = timeline.at(frame)
        strength = low + span * (moment.t if moment.start == 0 else 1 - moment.t)
        return edit.move([strength], slice(target, target + 1))[0, 0]

    frames = film_frames(explorer, len(timeline), count, style)
    if not explorer.is_main:
        for _ in frames:  # take part in making them
            pass
        return []
    if count < len(edit.targets):
        print(f"the film shows the first {count} of {len(edit.targets)} targets", file=sys.stderr)
    with Film(explorer.outdir / STEM, parse_formats(request.formats), frames_per_second=request.fps) as film:
        for images in frames:
            film.add(tile(images if originals is None else [
                torch.cat(pair, dim=2) for pair in zip(originals[:count], images, strict=True)]))
    return film.paths


HELP = """Move images along a direction: seeds, or real images that projector.py projected.

\b
python explore.py edit --network=N.safetensors --target=projected_w.npz --direction=directions.npz:0 --outdir=edit
python explore.py edit --network=N.safetensors --target=0-7 --class=nv --direction=boundary.npz:melanoma --outdir=edit
python explore.py edit --network=N.safetensors --target=latents.npz:3 --direction=directions.npz:2 --layers=fine \\
    --outdir=edit

Writes edit.png (a row per target, a column per strength), edit.mp4, edit.npz with the styles (for generate.py
--projected-w), effects.csv with what is measured in each image, and edit.json. At strength 0 a target is unchanged.
"""


def make_edit_command(open_classifier: OpenClassifier) -> click.Command:
    """Return the command explore.py edit. open_classifier: opens a file of --classifier"""
    def work(explorer: Explorer, request: EditRequest) -> None:
        run_edit(explorer, request, open_classifier)

    return make_explore_command("edit", EditRequest, work, HELP, "Move seeds or projected images along a direction.")
