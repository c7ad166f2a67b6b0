"""Show how images change with the distance of their latents, and the training images near them: `explore.py neighbors`.

Legend: S centers, A radii, M neighbors at each radius, K w_dim, L num_ws.
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from dnnlib.cli import UserError, UserPath
from dnnlib.files import atomic_write
from dnnlib.text import plural
from generation.command import flag
from generation.image_generator import parse_seeds, save_projected_w
from generation.network import OpenNetwork
from imagesets.reader import describe_shape
from latent.exploration import (
    SPEED,
    Explorer,
    ExploreRequest,
    make_explore_command,
    mean_with_interval,
    parse_numbers,
    seeds_of,
)
from latent.exploration_page import (
    Cell,
    captioned,
    describe_mean,
    heading,
    paragraph,
    picture_table,
    sortable_table,
    thumbnail,
    write_page,
)
from latent.neighborhoods import (
    NUM_UNRELATED,
    Neighborhood,
    W,
    Z,
    features_of,
    find_training_images,
    styles_around,
    unrelated_styles,
)
from metrics.detectors.base import Detector
from metrics.detectors.registry import DETECTOR_FORMS, open_detector
from metrics.image_sources import SetImages
from torch_utils.device import check_counts
from torch_utils.images import MOST_PIXELS, save_grid

DEFAULT_RADII = {Z: "10,20,40,90", W: "0.5,1,2,4"}
DEFAULT_DETECTOR = "efficientnet-lite0"  # needs no download
PAGE, TABLE, RECORD, STYLES = "neighbors.html", "neighbors.csv", "neighbors.json", "neighbors.npz"

_NEIGHBORS, _TRAINING = "Neighbors", "Training images"  # headings of the help
_MOST_CENTERS, _MOST_RADIUS = 32, 1000

HELP = f"""Show how images change with the distance of their latents, and the training images nearest to each.

\b
python explore.py neighbors --network=N.safetensors --seed=7 --radius=5,10,20,40 --outdir=neighbors
python explore.py neighbors --network=N.safetensors --seeds=0-7 --space=w --data=train.zip --outdir=neighbors

Writes {PAGE} with all images and numbers, a sheet for each seed, {TABLE}, {RECORD}, and {STYLES}, which generate.py
opens with --projected-w. With --data, the page holds training images.
"""


@dataclass(frozen=True, kw_only=True)
class NeighborsRequest(ExploreRequest):
    """The options of `explore.py neighbors`. Raises UserError if one is missing or out of range."""

    seeds: str | None = flag(_NEIGHBORS, "LIST", "Seeds of the images in the centers, one or several, such as 0,1,5-9.",
                             shown="0")
    seed: int | None = flag(_NEIGHBORS, "INT", "Seed of a single image; the same as --seeds with one.")
    space: str = flag(_NEIGHBORS, f"{Z}|{W}", "Where distances are measured: z, angles between latents in degrees; w, "
                      "Mahalanobis distances of styles in the covariance of the image's class.",
                      type=click.Choice((Z, W)), default=Z)
    radius: str | None = flag(_NEIGHBORS, "LIST", "Distances of the neighbors.",
                              shown=f"{DEFAULT_RADII[Z]} in z, {DEFAULT_RADII[W]} in w")
    num: int = flag(_NEIGHBORS, "INT", "Neighbors at each distance, in as many random directions, which are the "
                    "same at all distances.", default=6)
    data: str | None = flag(_TRAINING, "PATH", "Training set of the network: show the nearest of its images beside "
                            "each image.", type=UserPath())
    nearest: int = flag(_TRAINING, "INT", "Number of training images beside each image.", default=2)
    mirror: bool = flag(_TRAINING, None, "Also look among the flipped training images; right for networks that were "
                        "trained with --mirror.", default=False)
    detector: str = flag(_TRAINING, "NAME", f"Feature detector that compares images: {DETECTOR_FORMS}. Distances from "
                         "different detectors cannot be compared.", default=DEFAULT_DETECTOR)
    detector_weights: str | None = flag(_TRAINING, "FILE", "File with the detector's weights, instead of downloading "
                                        "them.", type=UserPath())
    no_cache: bool = flag(SPEED, None, "Compute the features of the training set anew, and do not save them.",
                          default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(num=self.num, nearest=self.nearest)
        if None not in (self.seed, self.seeds):
            raise UserError("--seed and --seeds are both given; expected one of them")
        if len(self.centers) > _MOST_CENTERS:
            raise UserError(f"--seeds names {len(self.centers)} seeds; expected at most {_MOST_CENTERS}")
        if self.data is None:
            for name, is_given in (("--nearest", self.nearest != 2), ("--mirror", self.mirror)):
                if is_given:
                    raise UserError(f"{name} is given, but only works with --data; add that, or leave {name} out")
        _ = self.radii  # checks

    @property
    def centers(self) -> list[int]:
        """The seeds of the images in the centers, each once."""
        if self.seed is not None:
            return parse_seeds("--seed", str(self.seed))
        return seeds_of("0" if self.seeds is None else self.seeds)

    @property
    def radii(self) -> list[float]:
        """The distances, in degrees or standard deviations, from small to large. Raises UserError."""
        largest, unit = (180, "degrees above 0, at most 180") if self.space == Z else (
            _MOST_RADIUS, f"numbers above 0, at most {_MOST_RADIUS}")
        default = DEFAULT_RADII[self.space]
        return parse_numbers("--radius", self.radius or default, lambda radius: 0 < radius <= largest, unit,
                             example=default)

    def check(self, network: OpenNetwork) -> None:
        """Raise UserError if the sheets would be too large, or the training set or the detector cannot be used."""
        G = network.G
        cells = (self.num + 1) * len(self.radii)
        if cells * G.img_resolution**2 > MOST_PIXELS:
            raise UserError(f"each sheet would show {cells} images of {G.img_resolution}x{G.img_resolution}; expected "
                            f"at most {MOST_PIXELS // G.img_resolution**2}: use a smaller --num, or fewer --radius")
        if self.space == Z and G.z_dim < 2:
            raise UserError(f"--space is z, but the network's latents have {plural(G.z_dim, 'number')}, which cannot "
                            "be rotated; use --space=w")
        if self.data is not None:
            shape = (G.img_channels, G.img_resolution, G.img_resolution)
            found = SetImages(self.data).shape
            if found != shape:
                raise UserError(f"--data is {self.data}, which has {describe_shape(found)} images, but the network "
                                f"makes {describe_shape(shape)} ones; expected the data set that it was trained on")
        open_detector(self.detector, device="cpu", weights=self.detector_weights)  # downloads it before processes start


def explore_neighbors(explorer: Explorer, request: NeighborsRequest) -> None:
    """Do the work of `explore.py neighbors`."""
    seeds, radii = request.centers, request.radii
    labels = explorer.labels_of(len(seeds))
    detector = open_detector(request.detector, device=explorer.generator.device, weights=request.detector_weights)
    ws = torch.stack([styles_around(explorer, seed, label, space=request.space, radii=radii, num=request.num)
                      for seed, label in zip(seeds, labels, strict=True)])  # [S, 1 + A * M, L, K]
    kinds = list(dict.fromkeys(labels))
    others = torch.cat([unrelated_styles(explorer, label) for label in kinds])
    features = explorer.evaluate(torch.cat([ws.flatten(0, 1), others]), [features_of(detector, explorer)])[0]
    own, unrelated = features[:-len(others)], features[-len(others):].reshape(len(kinds), NUM_UNRELATED, -1)
    training = [] if request.data is None else find_training_images(
        explorer, detector, own, data=request.data, count=request.nearest, mirror=request.mirror,
        use_cache=not request.no_cache)
    found = []
    for index, (seed, label) in enumerate(zip(seeds, labels, strict=True)):
        pixels = torch.cat(list(explorer.images(ws[index], f"images around seed {seed}")))
        if explorer.is_main:
            rows = slice(index * ws.shape[1], (index + 1) * ws.shape[1])
            found.append(Neighborhood.of(seed, explorer.name_of(label), pixels, own[rows],
                                         unrelated[kinds.index(label)], training[rows], len(radii)))
    if explorer.is_main:
        _write(explorer, request, detector, ws, found)


def _write(explorer: Explorer, request: NeighborsRequest, detector: Detector, ws: Tensor,
           found: Sequence[Neighborhood]) -> None:
    """Write all files, and print what the page says about all seeds."""
    radii, outdir = request.radii, explorer.outdir
    for one in found:
        center = one.pixels[:1].expand(len(radii), -1, -1, -1)[:, None]
        cells = torch.cat([center, one.pixels[1:].unflatten(0, (len(radii), -1))], dim=1).flatten(0, 1)
        save_grid(outdir / sheet_name(one.seed), cells, columns=request.num + 1, rows=len(radii),
                  labels=[_radius_text(request, radius) for radius in radii])
    places = [0.0, *np.repeat(radii, request.num).tolist()]
    directions = [-1, *np.tile(np.arange(request.num), len(radii)).tolist()]
    save_projected_w(outdir / STYLES, ws.flatten(0, 1).numpy(),
                     seed=np.repeat([one.seed for one in found], len(places)),
                     radius=np.tile(places, len(found)), direction=np.tile(directions, len(found)))
    record = _record(explorer, request, detector, found)
    with atomic_write(outdir / RECORD, text=True) as file:
        file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
    _write_table(outdir / TABLE, request, found)
    write_page(outdir / PAGE, f"Neighbors of {plural(len(found), 'image')} of {explorer.network.name}",
               _page_body(request, detector, record, found))
    for entry in record["radii"]:
        click.echo(f"{_radius_text(request, entry['radius'])}: feature distance {describe_mean(entry['features'])}, "
                   f"pixels {describe_mean(entry['levels'])} levels")
    click.echo(f"images of other seeds: feature distance {describe_mean(record['unrelated'])}")
    click.echo(f"{outdir / PAGE}")


def sheet_name(seed: int) -> str:
    """Return the name of the sheet of a seed."""
    return f"neighbors-seed{seed:04d}.png"


def _record(explorer: Explorer, request: NeighborsRequest, detector: Detector,
            found: Sequence[Neighborhood]) -> dict[str, Any]:
    groups = None if len(found) == 1 else np.repeat(np.arange(len(found)), request.num)

    def at(index: int, some: Sequence[Neighborhood], groups: np.ndarray | None = None) -> dict[str, Any]:
        return {"radius": request.radii[index],
                "features": mean_with_interval(np.concatenate([one.features[index] for one in some]), groups),
                "levels": mean_with_interval(np.concatenate([one.levels[index] for one in some]), groups)}

    centers = [{"seed": one.seed, "class": one.class_name, "unrelated": mean_with_interval(one.unrelated),
                "radii": [at(index, [one]) for index in range(len(request.radii))],
                **({"training_images": [near.as_record() for near in one.training[0]]} if one.training else {})}
               for one in found]
    together = None if len(found) == 1 else np.repeat(np.arange(len(found)), NUM_UNRELATED)
    return {**explorer.describe(), "w_dim": explorer.G.w_dim, "space": request.space, "num": request.num,
            "detector": detector.name, "detector_weights_sha256": detector.weights_sha256,
            **({} if request.data is None else {"data": Path(request.data).name, "mirror": request.mirror}),
            "radii": [at(index, found, groups) for index in range(len(request.radii))],
            "unrelated": mean_with_interval(np.concatenate([one.unrelated for one in found]), together),
            "centers": centers}


def _write_table(path: Path, request: NeighborsRequest, found: Sequence[Neighborhood]) -> None:
    """Write a row for each image, the center of radius 0 first."""
    near = [f"training_{index}{what}" for index in range(1, 1 + request.nearest) for what in
            ("", "_class", "_mirrored", "_distance")] if request.data is not None else []
    with atomic_write(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        header = ["seed", "class", "radius", "direction", "feature_distance", "pixel_distance", *near]
        writer.writerow(header)
        for one in found:
            distances = [(0, "", 0.0, 0.0)] + [
                (radius, direction, one.features[row, direction], one.levels[row, direction])
                for row, radius in enumerate(request.radii) for direction in range(request.num)]
            for index, (radius, direction, feature, level) in enumerate(distances):
                images = one.training[index] if one.training else []
                values = [one.seed, one.class_name, f"{radius:g}", direction, f"{feature:.6g}", f"{level:.6g}"]
                for image in images:
                    values += [image.name, image.class_name, int(image.is_mirrored), f"{image.distance:.6g}"]
                writer.writerow(values + [""] * (len(header) - len(values)))


def _page_body(request: NeighborsRequest, detector: Detector, record: dict[str, Any],
               found: Sequence[Neighborhood]) -> str:
    where = ("Neighbors are latents z rotated by a given angle in random directions, which keeps their length; 90 "
             "degrees are those of an unrelated latent." if request.space == Z else
             "Neighbors are styles w at a given Mahalanobis distance in random directions, in the covariance of the "
             f"styles of the image's class; unrelated styles of {record['w_dim']} numbers are about "
             f"{math.sqrt(2 * record['w_dim']):.3g} apart.")
    over = "directions" if len(found) == 1 else "seeds, or directions of one seed"
    body = paragraph(f"{where} A direction is the same at all distances. Distances between images are those of "
                     f"features of {detector.name}, and mean differences of pixels in levels of 0 to 255. Intervals "
                     f"are of 95 %, over {over}. For "
                     f"comparison: {NUM_UNRELATED} images of other seeds of the same class.")
    if request.data is not None:
        body += paragraph("Below each image are the training images nearest to it by features. That one is near is "
                          "no test of copying, which needs controls, such as how near other real images are: see "
                          "authenticity in calc_metrics.py. This page holds training images; treat it as you treat "
                          "those.")
    if len(found) > 1:
        body += heading("All seeds") + _summary(request, record)
    for one, center in zip(found, record["centers"], strict=True):
        body += heading(one.title) + _summary(request, center) + _pictures(request, one)
    return body


def _summary(request: NeighborsRequest, entry: dict[str, Any]) -> str:
    """Return the table of mean distances by radius."""
    scale = entry["unrelated"]["mean"]
    rows = [[Cell(_radius_text(request, at["radius"]), at["radius"]),
             Cell(describe_mean(at["features"]), at["features"]["mean"]),
             *([Cell(f"{at['features']['mean'] / scale:.2f}", at["features"]["mean"] / scale)] if scale > 0 else [""]),
             Cell(describe_mean(at["levels"]), at["levels"]["mean"])] for at in entry["radii"]]
    text = f"Images of other seeds have a feature distance of {describe_mean(entry['unrelated'])}."
    if entry.get("training_images"):
        text += f" The training image nearest to the center has {entry['training_images'][0]['distance']:.3g}."
    columns = ["distance of latents", "feature distance", "relative to other seeds", "pixels, levels"]
    return sortable_table(columns, rows, text)


def _pictures(request: NeighborsRequest, one: Neighborhood) -> str:
    def cell(index: int, text: str) -> str:
        image = thumbnail(one.pixels[index], f"{one.title}, image {index}")
        if one.training:
            image += "".join(thumbnail(near.pixels, f"training image {near.name}", 64) for near in one.training[index])
            text = f"{text} / training {', '.join(f'{near.distance:.3g}' for near in one.training[index])}".lstrip(" /")
        return captioned(image, text)

    rows = [(_radius_text(request, radius),
             [cell(0, ""), *(cell(1 + row * request.num + column, f"{one.features[row, column]:.3g}")
                             for column in range(request.num))]) for row, radius in enumerate(request.radii)]
    return picture_table(["center", *(f"direction {index}" for index in range(request.num))], rows,
                         "Below each image: its feature distance to the center"
                         + (", and the distances of the training images." if one.training else "."))


def _radius_text(request: NeighborsRequest, radius: float) -> str:
    return f"{radius:g} deg" if request.space == Z else f"{radius:g} sd"


def make_neighbors_command() -> click.Command:
    """Return the command `explore.py neighbors`."""
    return make_explore_command("neighbors", NeighborsRequest, explore_neighbors, HELP,
                                "Show images near an image, and the nearest training images.")
