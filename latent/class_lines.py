"""The line in W between the mean styles of two classes, and what changes along it.

Legend: N seeds, S steps, L num_ws, K w_dim, M quantities.
"""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError
from dnnlib.files import atomic_write
from dnnlib.text import plural
from latent.attribute_values import CLASSIFIER
from latent.directions import CLASS_LINE, FILE, Directions, deviations_along, mapping_sha256, save_directions
from latent.exploration import Explorer, ImageFunction
from latent.exploration_page import Cell, heading, image_tag, paragraph, sortable_table, write_page
from latent.walks import PAGE, move
from metrics.intervals import TooFew, bootstrap_mean
from torch_utils.images import draw_grid

RECORD, TABLE, SHEET = "line.json", "line.csv", "line.png"

_SHOWN = 8  # seeds on the sheet


def walk_between_classes(explorer: Explorer, seeds: Sequence[int], steps: Sequence[float], layers: Sequence[int],
                         functions: Mapping[str, ImageFunction]) -> None:
    """Walk from the first class of the explorer to the second, and write what changes; all processes call this.

    steps:      of which 0 is an image of the first class, and 1 is moved by the distance between the mean styles
    functions:  by kind, what is measured

    The mean styles are of 10,000 latents, untruncated. For comparison, the same seeds as images of the second class,
    whose latents are the same, and the mean style of the first class itself, moved.
    """
    start, end = explorer.labels
    names = [explorer.name_of(label) for label in (start, end)]
    means = [explorer.reference_styles([label]).mean(dim=0) for label in (start, end)]
    distance = float((means[1] - means[0]).norm())
    if distance == 0:
        raise UserError(f"{names[0]} and {names[1]} have the same mean style in this network, so that there is no line "
                        "between them; expected other classes")
    vectors = ((means[1] - means[0]) / distance)[None].float()
    ws, own = (explorer.styles(seeds, [label] * len(seeds)) for label in (start, end))
    center = means[0].float().expand(1, explorer.G.num_ws, -1)
    moved = move(torch.cat([center, ws]), vectors[0], [step * distance for step in steps], layers)  # [1 + N, S, L, K]
    tables = explorer.evaluate(torch.cat([moved.flatten(0, 1), own]), list(functions.values()), "images measured")
    shown = min(_SHOWN, len(seeds))
    pictures = torch.cat([moved[:1 + shown].flatten(0, 1), own[:shown]])
    pixels = torch.cat(list(explorer.images(pictures)))
    if not explorer.is_main:
        return
    quantities = []
    for (kind, function), table in zip(functions.items(), tables, strict=True):
        numbers = table.astype(np.float64)
        along = numbers[:moved.shape[0] * len(steps)].reshape(moved.shape[0], len(steps), -1)
        for index, name in enumerate(function.names):
            quantities.append(_summarize(kind, name, along[1:, :, index], along[0, :, index],
                                         numbers[len(numbers) - len(own):, index], steps))
    save_directions(explorer.outdir / FILE, Directions(
        names=(f"{names[0]} to {names[1]}",), vectors=vectors, layers=tuple(layers), method=CLASS_LINE,
        deviations=deviations_along(explorer.reference_styles(), vectors),
        network_sha256=mapping_sha256(explorer.network), extras={"distance": np.array([distance])}))
    record = {**explorer.describe(), "from": names[0], "to": names[1], "distance": distance,
              "seeds": list(seeds), "layers": list(layers), "steps": list(steps), "quantities": quantities}
    with atomic_write(explorer.outdir / RECORD, text=True) as file:
        file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
    _write_table(explorer.outdir / TABLE, quantities)
    sheet = _draw_sheet(pixels, shown, seeds, steps, names)
    with atomic_write(explorer.outdir / SHEET) as file:
        sheet.save(file, "png")
    _write_page(explorer.outdir / PAGE, record, image_tag(sheet, f"images from {names[0]} to {names[1]}"))
    for text in describe(record):
        print(text)


def describe(record: Mapping[str, Any]) -> list[str]:
    """Return a line for each quantity. record: the content of line.json"""
    lines = [f"{record['from']} to {record['to']}: distance {record['distance']:.3g} in w, "
             f"{plural(len(record['seeds']), 'seed')}"]
    for quantity in record["quantities"]:
        steps = {entry["step"]: entry for entry in quantity["along"]}
        ends = [(f"at {step:g}", steps[step]) for step in (0.0, 1.0) if step in steps]
        ends.append((f"in images of {record['to']}", quantity["images_of_end"]))
        lines.append(f"  {quantity['name']}: " + ", ".join(f"{_text(entry)} {where}" for where, entry in ends))
    return lines


def _summarize(kind: str, name: str, along: np.ndarray, center: np.ndarray, own: np.ndarray,
               steps: Sequence[float]) -> dict[str, Any]:
    """Return the numbers of one quantity. along: [N, S]; center: [S]; own: [N]; nan where there is none"""
    is_share = kind == CLASSIFIER
    return {"kind": kind, "name": name,
            "along": [{"step": step, **_mean(along[:, index], is_share)} for index, step in enumerate(steps)],
            "mean_style": [None if math.isnan(value) else value for value in center.tolist()],
            "images_of_end": _mean(own, is_share)}


def _mean(values: np.ndarray, is_share: bool) -> dict[str, Any]:
    """Return mean and interval over seeds, None where there are too few."""
    known = values[np.isfinite(values)]
    try:
        found = bootstrap_mean(known, is_share=is_share)
        low, high = found.low, found.high
    except TooFew:
        low = high = None
    return {"mean": float(known.mean()) if len(known) else None, "low": low, "high": high, "seeds": len(known)}


def _text(entry: Mapping[str, Any]) -> str:
    if entry["mean"] is None:
        return "-"
    interval = "" if entry["low"] is None else f" [{entry['low']:.3g}, {entry['high']:.3g}]"
    return f"{entry['mean']:.3g}{interval}"


def _write_table(path: os.PathLike, quantities: Sequence[Mapping[str, Any]]) -> None:
    """Write a row for each step of each quantity, and one for the images of the second class."""
    with atomic_write(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["quantity", "step", "mean", "low", "high", "seeds", "mean_style"])
        for quantity in quantities:
            rows = [*quantity["along"], {"step": "images of end", **quantity["images_of_end"]}]
            for entry, center in zip(rows, [*quantity["mean_style"], None], strict=True):
                writer.writerow([quantity["name"], *("" if value is None else value for value in (
                    entry["step"], entry["mean"], entry["low"], entry["high"], entry["seeds"], center))])


def _draw_sheet(pixels: Tensor, shown: int, seeds: Sequence[int], steps: Sequence[float],
                names: Sequence[str]) -> Any:
    """Return the sheet: the mean style and some seeds in rows, steps in columns, and the second class at the end."""
    count = len(steps)
    along, own = pixels[:(1 + shown) * count].split(count), pixels[(1 + shown) * count:]
    cells: list[Tensor | None] = []
    for row, last in zip(along, [None, *own], strict=True):
        cells += [*row, last]
    return draw_grid(cells, columns=count + 1, rows=1 + shown,
                     labels=[f"mean of {names[0]}", *(f"seed {seed}" for seed in seeds[:shown])],
                     headings=[*(f"{step:g}" for step in steps), names[1]])


def _write_page(path: os.PathLike, record: Mapping[str, Any], sheet: str) -> None:
    start, end = record["from"], record["to"]
    columns = ["quantity", *(f"{step:g}" for step in record["steps"]), f"images of {end}"]
    rows = [[Cell(quantity["name"]), *(_cell(entry) for entry in (*quantity["along"], quantity["images_of_end"]))]
            for quantity in record["quantities"]]
    centers = [[Cell(quantity["name"]), *(Cell("-" if value is None else f"{value:.3g}",
                                               sort=math.nan if value is None else value)
                                          for value in quantity["mean_style"])] for quantity in record["quantities"]]
    write_page(path, f"{start} to {end}: {record['network']}", "\n".join([
        paragraph(f"Images of {start}, moved along the line between the mean styles of the two classes: 0 is unmoved, "
                  f"1 is moved by the distance of the means, {record['distance']:.3g} in w. The last column has the "
                  f"same seeds as images of {end}, which the line does not reach exactly: classes differ in more than "
                  "their mean style."),
        sheet, heading(f"Means over {plural(len(record['seeds']), 'seed')}, with 95 % intervals"),
        sortable_table(columns, rows), heading(f"The mean style of {start}"), sortable_table(columns[:-1], centers)]))


def _cell(entry: Mapping[str, Any]) -> Cell:
    return Cell(_text(entry), sort=math.nan if entry["mean"] is None else entry["mean"],
                title=plural(entry["seeds"], "seed"))
