"""Projection gap: whether training images are nearer to their projections than held-out images are.

Latents are optimized for the image of the network that is nearest to a given one (latent.projection). A network that
remembers its training images makes them more exactly than other images of the same kind (Webster et al. 2019,
"Detecting Overfitting of Deep Generative Networks via Latent Recovery"). Members are images of the training part,
held-out ones those of the validation and test parts, as many of each class, each of another group.

The projections are those of projector.py --data, in folders that this module makes or a user made.
"""

import csv
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.protocol import TEST, TRAIN, VAL, LabeledImages, Protocol, open_unchanged
from dnnlib.cli import UserError
from dnnlib.files import retrying
from generation.network import Classes, OpenNetwork
from imagesets.classes import VECTOR, class_counts
from imagesets.reader import ImageSet
from latent.command import ProjectRequest, project_images
from latent.image_set import FAILED, SUMMARY, TABLE, Passes
from latent.projection import COLUMNS, PERCEPTUAL, choose_pass, choose_similarity
from latent.targets import AUTO, choose_targets, fingerprint
from torch_utils.device import memory_advice
from torch_utils.distributed import Processes

HELDOUT = (VAL, TEST)
# What distances depend on, as projections.json has it. Batch size, device and operators change only the rounding.
_SETTINGS = ("network_sha256", "detector", "detector_weights_sha256", "detector_preprocessing", "num_steps", "space",
             "seed", "class", "label", "transform", "resize_filter", "exact", "depth")


@dataclass(frozen=True, kw_only=True, eq=False)
class MatchedImages:
    """As many training images as held-out ones, of each class, each of another group.

    rows:    of each part, int64 [n], ascending
    counts:  images of each class, on either side
    wanted:  images on either side that were asked for
    """

    rows: Mapping[str, np.ndarray]
    counts: Mapping[str, int]
    wanted: int

    @property
    def count(self) -> int:
        """Number of images on either side; less than `wanted` if there are not enough groups."""
        return sum(self.counts.values())


def choose_matched(parts: Mapping[str, LabeledImages], count: int, *, seed: int,
                   known: Collection[str] | None = None) -> MatchedImages:
    """Choose random training images and as many held-out images.

    parts:  by name: the training part, and those whose images are held out
    count:  images on either side; classes have the shares of all that could be matched
    known:  classes to choose from, such as those that the network has (discriminator_scores.match_classes); None = all

    One random image of each group can be chosen, so that a side never has two of a group.
    """
    random = np.random.RandomState(seed % 2**32)
    members = _one_of_each_group({TRAIN: parts[TRAIN]}, random, known)
    others = _one_of_each_group({name: images for name, images in parts.items() if name != TRAIN}, random, known)
    classes = sorted(members.keys() & others.keys())
    most = [min(len(members[name]), len(others[name])) for name in classes]
    counts = dict(zip(classes, class_counts(most, count) if count < sum(most) else most, strict=True))
    chosen = [place for side in (members, others) for name, number in counts.items() for place in side[name][:number]]
    rows = {part: np.array(sorted(row for name, row in chosen if name == part), dtype=np.int64) for part in parts}
    return MatchedImages(rows=rows, counts={name: number for name, number in counts.items() if number}, wanted=count)


def _one_of_each_group(parts: Mapping[str, LabeledImages], random: np.random.RandomState,
                       known: Collection[str] | None) -> dict[str, list[tuple[str, int]]]:
    """Return by class, in random order, (part, row) of one random image of each group."""
    places = [(name, row) for name, images in parts.items() for row in range(len(images))
              if known is None or images.classes[row] in known]
    found: dict[str, list[tuple[str, int]]] = {}
    seen = set()
    for index in random.permutation(len(places)):
        name, row = places[index]
        group = name, int(parts[name].groups[row])
        if group not in seen:
            seen.add(group)
            found.setdefault(parts[name].classes[row], []).append((name, row))
    return found


def projection_problem(network: OpenNetwork) -> str | None:
    """Return why images of a protocol cannot be projected, a clause; None if they can."""
    if network.classes.kind == VECTOR:
        return f"the labels of {network.name} are vectors, which the images of a protocol do not have"
    if network.G.img_channels not in (1, 3):
        return f"{network.name} makes images with {network.G.img_channels} channels, not gray or RGB ones"
    return None


def run_projections(outdir: str | os.PathLike, path: str, network: OpenNetwork,
                    parts: Mapping[str, tuple[ImageSet, np.ndarray]], *, processes: Processes,
                    num_steps: int = ProjectRequest.num_steps, seed: int = ProjectRequest.seed,
                    detector: str | None = None, detector_weights: str | None = None,
                    batch: int | None = None) -> dict[str, Path]:
    """Project images of parts, each part into the folder of its name in `outdir`, and return the folders.

    path:    of the network file, as the option has it
    parts:   data set and rows of each part, from `choose_matched`; parts without rows are left out
    others:  as the options of projector.py

    All processes of a run call this. After an interruption, the same call continues; folders that are finished are
    kept. Raises UserError if a folder holds other results.
    """
    if detector is None:  # chosen once, with one note on which it is
        detector = choose_similarity(detector, detector_weights, processes).name
    size = batch or choose_pass(network.G.img_resolution, processes.device)
    folders = {name: Path(outdir, name) for name, (_, rows) in parts.items() if len(rows)}
    for name, folder in folders.items():
        images, rows = parts[name]
        request = ProjectRequest(network=os.fspath(path), data=str(images.path), outdir=str(folder),
                                 num_steps=num_steps, seed=seed, detector=detector, detector_weights=detector_weights,
                                 batch=batch)
        wanted = {images.names[row] for row in rows}
        targets = [target for target in choose_targets(images, network.classes, start=None, count=None,
                                                       group_by_class=False, seed=seed) if target.name in wanted]
        with memory_advice(size):
            project_images(request, network, images, Passes(targets=targets, size=size), processes,
                           left_out=len(wanted) - len(targets))
    return folders


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectedPart:
    """Distances of n images of a part to their projections.

    rows:       of the images in the part, int64 [n]
    names:      of the images
    groups:     texts, as LabeledImages.group_names has them
    classes:    class names
    distances:  float64 [n], perceptual
    settings:   of projections.json
    """

    part: str
    rows: np.ndarray
    names: list[str]
    groups: list[str]
    classes: list[str]
    distances: np.ndarray
    settings: Mapping[str, Any]


def read_projections(folders: Sequence[str | os.PathLike], protocol: Protocol, network: OpenNetwork,
                     option: str = "--projections") -> list[ProjectedPart]:
    """Read folders that projector.py --data wrote, one for each part.

    Raises UserError if a folder is missing, unfinished or damaged, if its images are not those of the training,
    validation or test part, if two are of one part, and if settings differ between folders or the network is another.
    """
    parts = {name: (open_unchanged(protocol, name), set()) for name in (TRAIN, *HELDOUT)
             if any(part.name == name for part in protocol.parts)}
    for images, names in parts.values():
        names.update(images.names)
    found: dict[str, ProjectedPart] = {}
    for folder in map(Path, folders):
        flag = f"{option}={folder}"
        read = _read_folder(folder, flag, parts, network.classes)
        if read.settings.get("network_sha256") != network.sha256:
            raise UserError(f"{flag} has projections of {read.settings.get('network')}, another network than --network "
                            f"({network.name}); expected those of --network: project the images again")
        first = next(iter(found.values()), read)
        different = [name for name in _SETTINGS if read.settings.get(name) != first.settings.get(name)]
        if different:
            name = different[0]
            raise UserError(f"{flag} was made with {name} {_shown(read.settings.get(name))}, but the projections of "
                            f"the {first.part} part with {_shown(first.settings.get(name))}; expected equal settings: "
                            "project one of them again")
        if read.part in found:
            raise UserError(f"{flag} has projections of the {read.part} part, as another folder of {option} has; "
                            "expected one folder for each part")
        found[read.part] = read
    if TRAIN not in found or len(found) < 2:
        missing = "the training part" if TRAIN not in found else "the validation and test parts"
        raise UserError(f"{option} has no projections of {missing}; expected those of the training part, and of the "
                        "validation part, the test part or both")
    return list(found.values())


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _read_folder(folder: Path, flag: str, parts: Mapping[str, tuple[ImageSet, set[str]]],
                 classes: Classes) -> ProjectedPart:
    """Return what a folder has. parts: each with the names of its images"""
    settings, rows, failed = _read_files(folder, flag)
    names = [row["image"] for row in (*rows, *failed)]
    for part, (images, known) in parts.items():
        if not known.issuperset(names):
            continue
        wanted = set(names)
        targets = [target for target in choose_targets(images, classes, start=AUTO, count=None, group_by_class=bool(
            settings.get("group_by_class")), seed=0) if target.name in wanted]
        # LIMIT: of a folder of images, the fingerprint has the times of files, so that those of a copy are refused.
        if len(targets) != len(names) or fingerprint(images, targets) != settings.get("data_sha256"):
            continue
        place = {name: row for row, name in enumerate(images.names)}
        by_name = {target.name: target for target in targets}
        chosen = [by_name[row["image"]] for row in rows]
        return ProjectedPart(
            part=part, rows=np.array([place[one.name] for one in chosen], dtype=np.int64),
            names=[one.name for one in chosen], groups=[one.group for one in chosen],
            classes=[one.class_name for one in chosen], settings=settings,
            distances=np.array([float(row[COLUMNS[PERCEPTUAL]]) for row in rows], dtype=np.float64))
    raise UserError(f"{flag} has projections of {settings.get('data')}, whose images are not those of the training, "
                    "validation or test part of the protocol; expected projector.py --data with the file of a part, "
                    "as it is now: project its images again")


def _read_files(folder: Path, flag: str) -> tuple[dict[str, Any], list[dict[str, str]], list[dict[str, str]]]:
    """Return the content of projections.json, and the rows of distances.csv and failed.csv. Raises UserError."""
    expected = "expected a folder that projector.py --data has finished"
    try:
        settings = json.loads(retrying(lambda: (folder / SUMMARY).read_text(encoding="utf-8"), folder / SUMMARY))
        rows = _read_table(folder / TABLE)
        failed = _read_table(folder / FAILED) if settings["unreadable"] else []
        is_whole = (len(rows) == settings["projected"] > 0 and all(row["image"] for row in (*rows, *failed))
                    and all(math.isfinite(float(row[COLUMNS[PERCEPTUAL]])) for row in rows))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{flag} has no {Path(error.filename).name}; {expected}") from error
    except OSError as error:
        raise UserError(f"{flag} cannot be read ({error.strerror}); {expected}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{flag} is damaged: {SUMMARY} and {TABLE} do not fit each other; {expected}")
    return settings, rows, failed


def _read_table(path: Path) -> list[dict[str, str]]:
    with retrying(lambda: open(path, newline="", encoding="utf-8"), path) as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True, kw_only=True, eq=False)
class GapValues:
    """What is compared of the n images of one side, in order of parts and rows.

    values:  float64 [n], minus the distance: larger = nearer to its projection, as a remembered image is
    groups:  int64 [n]; no number occurs on both sides
    strata:  int64 [n], numbers of the classes in alphabetical order
    """

    values: np.ndarray
    groups: np.ndarray
    strata: np.ndarray


def combine(parts: Sequence[ProjectedPart]) -> tuple[GapValues, GapValues]:
    """Return training images and held-out ones, only of classes that both have."""
    members = [part for part in parts if part.part == TRAIN]
    others = sorted((part for part in parts if part.part != TRAIN), key=lambda part: HELDOUT.index(part.part))
    names = sorted({name for part in members for name in part.classes} & {name for part in others
                                                                         for name in part.classes})
    # A group of the training part may have the name of another one elsewhere: both may be names of files.
    keys = [(part.part, group) for part in (*members, *others) for group in part.groups]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    sides = []
    for side in (members, others):
        kept = [(part, place) for part in side for place in np.argsort(part.rows) if part.classes[place] in names]
        sides.append(GapValues(
            values=np.array([-part.distances[place] for part, place in kept], dtype=np.float64),
            groups=np.array([numbers[part.part, part.groups[place]] for part, place in kept], dtype=np.int64),
            strata=np.array([names.index(part.classes[place]) for part, place in kept], dtype=np.int64)))
    return sides[0], sides[1]
