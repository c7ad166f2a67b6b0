"""Walk along directions of W, measure the images on the way, and report what changes: sheets, a page, tables.

An effect is a slope: how much a quantity, such as the area of the lesion, changes for each standard deviation of w. It
is fitted to the steps of each image separately, if a lesion is found at half of them or more. The mean over images has
an interval and a p-value over the images, or over groups of projected images of the same lesion. Holm's correction
covers all directions and quantities of a report.

Legend: N images that are moved, S steps, M quantities, L num_ws, K w_dim.
"""

import csv
import json
import math
import re
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
from imagesets.contact_sheet import sheet_name
from latent.directions import Directions
from latent.exploration import Explorer, ImageFunction
from latent.exploration_page import Cell, heading, paragraph, sortable_table, write_page
from latent.measurements import MEASUREMENTS
from metrics.intervals import Interval, Jackknife, TooFew, group_numbers, holm, unit_of
from torch_utils.images import MOST_PIXELS, save_grid

PAGE, TABLE, RECORD = "index.html", "effects.csv", "effects.json"
LESION = "area"  # is measured in all images in which a lesion is found
LEVEL = 0.95  # of the intervals; effects are significant where the corrected p-value is below 1 - LEVEL

_RANGE = re.compile(r"\s*([-+]?[0-9.]+)\s*\.\.\s*([-+]?[0-9.]+)\s*")
_MOST_STEPS = 1000
_PROBABILITY = "probability"  # unit of what a classifier says
_CLASSIFIER = "classifier:"  # before names that measurements have, too
_SUMMARIZED = 3  # effects in a printed line
LONGEST_NAME = 60  # characters in such a line
_STRONGEST = 0.5  # standard deviations per step, at which the color of a cell is the strongest


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a step of one standard deviation of w along a direction does to a quantity; None = not known."""

    quantity: str
    unit: str
    slope: float | None  # in units of the quantity, per standard deviation of w
    low: float | None  # ends of the interval of the slope
    high: float | None
    p_value: float | None  # two-sided, of the slope 0
    p_holm: float | None  # ... corrected for the number of directions and quantities
    spread: float | None  # standard deviation of the quantity among the unmoved images
    num: int  # images in which the quantity was found, ...
    num_images: int  # ... of all N * S
    num_units: int  # images or groups that the interval is over
    means: tuple[float | None, ...]  # at each step, over the images in which the quantity was found

    @property
    def relative(self) -> float:
        """The slope in units of the spread, which can be compared between quantities; nan if not known."""
        return self.slope / self.spread if self.slope is not None and self.spread else math.nan

    @property
    def is_significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < 1 - LEVEL


@dataclass(frozen=True, kw_only=True)
class WalkReport:
    """What a direction does."""

    name: str
    detail: str  # such as "singular value 12.3"
    steps: tuple[float, ...]  # standard deviations of w
    effects: tuple[Effect, ...]
    sheet: str  # file name


def parse_strength(text: str, *, unit: str = "standard deviations", example: str = "-3..3") -> tuple[float, float]:
    """Return the two ends of a --strength such as "-3..3". unit, example: for messages. Raises UserError."""
    match = _RANGE.fullmatch(text)
    try:
        low, high = (float(number) for number in match.groups()) if match else (1.0, 0.0)
    except ValueError:  # such as 1.2.3
        low, high = 1.0, 0.0
    if not -math.inf < low < high < math.inf:
        raise UserError(f"--strength is {text}; expected LOW..HIGH in {unit}, LOW below HIGH, such as {example}")
    return low, high


def place_steps(low: float, high: float, count: int) -> list[float]:
    """Return `count` equally spaced steps from low to high. Raises UserError for a count that --steps may not have."""
    if not 2 <= count <= _MOST_STEPS:
        raise UserError(f"--steps is {count}; expected 2 to {_MOST_STEPS}")
    return [round(float(step), 9) for step in np.linspace(low, high, count)]


def move(ws: Tensor, vector: Tensor, shifts: Sequence[float] | Tensor, layers: Sequence[int]) -> Tensor:
    """Move styles along a direction in some layers: [N, S, L, K].

    ws:      [N, L, K]
    vector:  [K], of length 1
    shifts:  [S] in units of w; 0 leaves the styles as they are
    layers:  indices of ws
    """
    shifts = torch.as_tensor(shifts, dtype=ws.dtype)
    moved = ws[:, None].repeat(1, len(shifts), 1, 1)
    moved[:, :, list(layers)] += (shifts[:, None] * vector)[:, None]
    return moved


def fit_slopes(values: np.ndarray, steps: Sequence[float]) -> np.ndarray:
    """Return the least-squares slope of each row over the steps, without those that are nan: float64 [N].

    values:  [N, S]

    nan for rows in which fewer than half of the steps are known, or only one: few of them make wild slopes.
    """
    x = np.broadcast_to(np.asarray(steps, dtype=np.float64), values.shape)
    known = np.isfinite(values)
    slopes = np.full(len(values), math.nan)
    for row, (at, found) in enumerate(zip(known, values.astype(np.float64))):
        some, y = x[row, at], found[at]
        if len(some) < max(2, len(steps) / 2) or np.ptp(some) == 0:
            continue
        offset = some - some.mean()
        # Rounding would turn the slope of a constant into 1e-18, and that into a significant effect.
        slopes[row] = 0.0 if np.ptp(y) == 0 else (offset @ (y - y.mean())) / (offset @ offset)
    return slopes


def measure_effect(quantity: str, values: np.ndarray, unmoved: np.ndarray, steps: Sequence[float],
                   groups: Sequence[Any] | None = None) -> Effect:
    """Return the effect on one quantity, without Holm's correction.

    values:   [N, S], nan where the quantity was not found
    unmoved:  [N]
    groups:   of the images; None = images are independent

    Interval and p-value are Student's, over the means without each image or group. Percentiles of a bootstrap would
    need millions of resamples for p-values that are small enough to remain significant among a hundred.
    """
    slopes = fit_slopes(values, steps)
    known = np.isfinite(slopes)
    interval, p_value = _test_mean(slopes[known], None if groups is None else np.asarray(groups)[known])
    base = unmoved[np.isfinite(unmoved)].astype(np.float64)
    return Effect(
        quantity=quantity, unit=MEASUREMENTS[quantity].unit if quantity in MEASUREMENTS else _PROBABILITY,
        slope=float(slopes[known].mean()) if known.any() else None,
        low=None if interval is None else interval.low, high=None if interval is None else interval.high,
        p_value=p_value, p_holm=None, spread=float(base.std(ddof=1)) if len(base) > 1 else None,
        num=int(np.isfinite(values).sum()), num_images=values.size,
        num_units=0 if interval is None else sum(interval.num_units.values()),
        means=tuple(float(column[np.isfinite(column)].mean(dtype=np.float64)) if np.isfinite(column).any() else None
                    for column in values.T))


def groups_of_styles(ws: Tensor) -> list[int] | None:
    """Return a number for each different style of [N, L, K]; None if all differ.

    Images of equal styles, as --trunc=0 makes them of all seeds, are one image: they change in the same way, which
    would look like an effect that is certain.
    """
    numbers = torch.unique(ws.flatten(1), dim=0, return_inverse=True)[1].tolist()
    return numbers if len(set(numbers)) < len(ws) else None


def _test_mean(values: np.ndarray, groups: np.ndarray | None) -> tuple[Interval | None, float | None]:
    """Return the interval of a mean, and the p-value of a mean of 0; None for fewer than two groups."""
    numbers = group_numbers(groups, len(values))
    sums, sizes = np.bincount(numbers, weights=values), np.bincount(numbers)
    if len(sums) < 2:
        return None, None
    without = (sums.sum() - sums) / (sizes.sum() - sizes)
    jackknife = Jackknife(estimate=float(values.mean()), without={"moved": without}, unit=unit_of(groups))
    try:
        return jackknife.interval(LEVEL), jackknife.p_value()
    except TooFew:
        return None, None


def correct_for_number(reports: Sequence[WalkReport]) -> list[WalkReport]:
    """Return reports with p-values corrected for all of their effects."""
    p_values = [effect.p_value for report in reports for effect in report.effects if effect.p_value is not None]
    corrected = iter(holm(p_values))
    return [replace(report, effects=tuple(
        effect if effect.p_value is None else replace(effect, p_holm=next(corrected)) for effect in report.effects))
        for report in reports]


def quantities_of(functions: Sequence[ImageFunction]) -> list[str]:
    """Return the names of all quantities, each different."""
    names: list[str] = []
    for function in functions:
        for name in function.names:
            while name in names:
                name = _CLASSIFIER + name
            names.append(name)
    return names


def remove_walks(folder: Path) -> None:
    """Remove what an earlier command wrote, so that a folder never holds parts of two: page, tables and sheets."""
    for path in (*(folder / name for name in (PAGE, TABLE, RECORD)), *folder.glob("direction-[0-9][0-9]*.png")):
        path.unlink(missing_ok=True)


def walk_directions(explorer: Explorer, directions: Directions, ws: Tensor, row_names: Sequence[str], *,
                    steps: Sequence[float], functions: Sequence[ImageFunction], groups: Sequence[Any] | None = None,
                    details: Sequence[str] | None = None, num_shown: int = 8,
                    title: str = "direction") -> list[WalkReport]:
    """Move images along each direction, measure all of them, and write a sheet of the first ones into --outdir.

    All processes call it; each gets the result.

    ws:         [N, L, K], of the images that are moved
    row_names:  of the images
    steps:      standard deviations of w
    groups:     of the images; None = images of different styles are independent
    details:    of the directions, such as "singular value 12.3"
    num_shown:  rows of a sheet, fewer if it would be too large for most image viewers
    title:      what a direction is called where progress is shown
    """
    names, num = quantities_of(functions), len(directions.names)
    groups = groups_of_styles(ws) if groups is None else groups
    unmoved = _measure(explorer, ws, functions, "unmoved images")
    reports = []
    for index, name in enumerate(directions.names):
        shifts = [step * float(directions.deviations[index]) for step in steps]
        what = f"{title} {index + 1} of {num}"
        moved = move(ws, directions.vectors[index], shifts, directions.layers)
        values = np.repeat(unmoved[:, None], len(steps), axis=1)  # [N, S, M]
        away = [place for place, shift in enumerate(shifts) if shift != 0]  # images that do not move are measured
        if away and names:
            values[:, away] = _measure(explorer, moved[:, away].flatten(0, 1), functions, what).reshape(
                len(ws), len(away), len(names))
        effects = tuple(measure_effect(quantity, values[:, :, column], unmoved[:, column], steps, groups)
                        for column, quantity in enumerate(names))
        sheet = _sheet_file(index, num, name)
        _write_sheet(explorer, sheet, moved, row_names, steps, num_shown, f"{what}, sheet")
        reports.append(WalkReport(name=name, detail="" if details is None else details[index], steps=tuple(steps),
                                  effects=effects, sheet=sheet))
    return correct_for_number(reports)


def _measure(explorer: Explorer, ws: Tensor, functions: Sequence[ImageFunction], what: str) -> np.ndarray:
    """Return all quantities of the images of styles: float32 [N, M]."""
    if not functions:
        return np.zeros((len(ws), 0), dtype=np.float32)
    return np.concatenate(explorer.evaluate(ws, functions, what), axis=1)


def _sheet_file(index: int, count: int, name: str) -> str:
    """Return "direction-03.png", or "direction-03-melanoma.png" for a direction with a name."""
    if name == str(index):
        return f"direction-{index:02d}.png"
    return f"direction-{sheet_name(index, max(count, 11), name)}"  # 11: at least two digits


def _write_sheet(explorer: Explorer, file: str, moved: Tensor, row_names: Sequence[str], steps: Sequence[float],
                 num_shown: int, what: str) -> None:
    """Write the first images, a row each, with a column for each step. moved: [N, S, L, K]"""
    most = max(1, MOST_PIXELS // (explorer.G.img_resolution**2 * len(steps)))
    shown = min(num_shown, most, len(moved))
    images = torch.cat(list(explorer.images(moved[:shown].flatten(0, 1), what)))
    if explorer.is_main:
        save_grid(explorer.outdir / file, images, columns=len(steps), rows=shown, labels=row_names[:shown],
                  headings=[f"{step:+.3g}" if step else "0" for step in steps])


# Reports.


def describe_walk(report: WalkReport) -> str:
    """Return a line such as "direction 0 (singular value 12.3): +1 sd of w: area +0.031 [0.024, 0.038]".

    Its effects are the strongest significant ones, in units of the spread.
    """
    start = f"direction {report.name}{f' ({report.detail})' if report.detail else ''}: "
    if not report.effects:
        return f"{start}nothing measured"
    if all(effect.p_value is None for effect in report.effects):
        return f"{start}no effect can be told from chance, which needs two images or more with a lesion"
    found = sorted((effect for effect in report.effects if effect.is_significant),
                   key=lambda effect: -abs(effect.relative) if math.isfinite(effect.relative) else 0.0)
    if not found:
        num = report.effects[0].num_images // len(report.steps)
        return f"{start}no effect that can be told from chance in {plural(num, 'image')}"
    return f"{start}+1 sd of w: " + ", ".join(f"{effect.quantity[:LONGEST_NAME]} {_describe_slope(effect)}"
                                              for effect in found[:_SUMMARIZED])


def _describe_slope(effect: Effect) -> str:
    """Return "+0.031 [0.024, 0.038]"."""
    return f"{effect.slope:+.3g} [{effect.low:.3g}, {effect.high:.3g}]"


def write_walks(explorer: Explorer, reports: Sequence[WalkReport], *, title: str, notes: Sequence[str] = (),
                record: Mapping[str, Any] | None = None, body: str = "") -> None:
    """Write PAGE, TABLE and RECORD into --outdir and print a line for each direction; only the main process does.

    title:   of the page
    notes:   paragraphs above its table
    record:  further entries of RECORD, JSON types, such as seeds
    body:    HTML above the paragraphs, made by the functions of latent/exploration_page.py
    """
    if not explorer.is_main:
        return
    settings = {**explorer.describe(), **(record or {}), "level": LEVEL, "correction": "Holm",
                "num_tests": sum(effect.p_value is not None for report in reports for effect in report.effects)}
    with atomic_write(explorer.outdir / RECORD, text=True) as file:
        file.write(json.dumps({**settings, "directions": [_as_record(report) for report in reports]}, indent=1,
                              allow_nan=False) + "\n")
    with atomic_write(explorer.outdir / TABLE, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["direction", "quantity", "unit", "slope", "low", "high", "p", "p_holm", "spread", "num",
                         "num_units"])
        for report in reports:
            for effect in report.effects:
                numbers = (effect.slope, effect.low, effect.high, effect.p_value, effect.p_holm, effect.spread)
                writer.writerow([report.name, effect.quantity, effect.unit,
                                 *("" if number is None else f"{number:.6g}" for number in numbers), effect.num,
                                 effect.num_units])
    table = _table(reports) + _explain(reports) if reports else ""
    write_page(explorer.outdir / PAGE, title, body + "".join(map(paragraph, notes)) + table)
    for report in reports:
        click.echo(describe_walk(report))
    lesions = [(effect.num, effect.num_images) for report in reports for effect in report.effects
               if effect.quantity == LESION]
    if lesions:
        found, of = map(sum, zip(*lesions))
        click.echo(f"a lesion was found in {found} of {of} images")
    sheets = " and a sheet for each" if reports else ""
    click.echo(f"{explorer.outdir / PAGE}: {plural(len(reports), 'direction')}; also {TABLE}, {RECORD}{sheets}")


def _as_record(report: WalkReport) -> dict[str, Any]:
    return {"name": report.name, "detail": report.detail, "sheet": report.sheet, "steps": list(report.steps),
            "effects": [{**vars(effect), "means": list(effect.means)} for effect in report.effects]}


def _explain(reports: Sequence[WalkReport]) -> str:
    """Return what the numbers of the table are, as HTML."""
    used = {effect.quantity for report in reports for effect in report.effects}
    if not used:
        return paragraph("Nothing was measured. Choose a row to see its sheet.")
    texts = ["A number is the change for a step of +1 standard deviation of w along the direction, the mean over the "
             "moved images. Colored are changes that differ from 0 after Holm's correction for all numbers in the "
             f"table (level {1 - LEVEL:.2g}); the color is the stronger, the larger the change is in units of the "
             f"standard deviation among the unmoved images (full color from {_STRONGEST:g} on), by which columns are "
             f"also sorted. Rest the mouse on a number to see its {LEVEL:.0%} interval, which is not corrected. Choose "
             "a row to see its sheet."]
    texts += [f"{name}: {measurement.text} ({measurement.unit})." for name, measurement in MEASUREMENTS.items()
              if name in used]
    return heading("What the numbers are") + "".join(map(paragraph, texts))


def _table(reports: Sequence[WalkReport]) -> str:
    names = [effect.quantity for effect in reports[0].effects] if reports else []
    has_details = any(report.detail for report in reports)
    rows = []
    for report in reports:
        number = float(report.name) if report.name.isdecimal() and report.name.isascii() else None
        first = [Cell(report.name, sort=number, link=report.sheet), *([Cell(report.detail)] if has_details else [])]
        rows.append([*first, *map(_effect_cell, report.effects)])
    return sortable_table(["direction", *(["found by"] if has_details else []), *names], rows)


def _effect_cell(effect: Effect) -> Cell:
    found = f"{effect.quantity}, in {effect.unit}; found in {effect.num} of {effect.num_images} images"
    if effect.slope is None:
        return Cell("-", sort=math.nan, title=found)
    lines = [found]
    if effect.low is not None:
        lines.append(f"{LEVEL:.0%} interval {effect.low:.3g} to {effect.high:.3g}, p {effect.p_value:.2g}")
    if effect.p_holm is not None:
        lines.append(f"corrected p {effect.p_holm:.2g}")
    if effect.spread is not None:
        lines.append(f"standard deviation among unmoved images {effect.spread:.3g}")
    shown = [mean for mean in effect.means if mean is not None]
    if shown:
        lines.append("means at the steps: " + ", ".join(f"{mean:.3g}" for mean in shown))
    is_shaded = effect.is_significant and math.isfinite(effect.relative)
    shade = max(-1.0, min(1.0, effect.relative / _STRONGEST)) if is_shaded else None
    return Cell(f"{effect.slope:+.3g}", sort=effect.relative, shade=shade, title="; ".join(lines))
