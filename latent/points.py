"""Read the points of films and edits: seeds, and saved styles such as projections, with the images they came from.

A list such as "0,5-9,projected_w.npz,latents.npz:3" mixes seeds, files with all their rows, and single rows of files.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib.cli import UserError, expand_user
from dnnlib.files import retrying
from dnnlib.text import plural
from generation.image_generator import parse_seeds, read_npz, read_projected_w
from generation.network import Classes, Label
from imagesets.pixel_formats import BadImage, Depth
from imagesets.reader import ImageSet
from imagesets.resize import PixelSpec
from latent.image_set import SUMMARY
from latent.one_image import TARGET
from latent.targets import DEFAULT_FILTER, DEFAULT_TRANSFORM, prepare, spec_for

NO_ORIGINALS = "none"  # value of --originals
EXAMPLE = "0,5-9 or projected_w.npz or latents.npz:3"

_MOST_POINTS = 10_000
_SEEDS = re.compile(r"\s*[0-9]+(\s*-\s*[0-9]+)?\s*")
_FILE = re.compile(r"(.+\.npz)(?::([0-9]{1,9})(?:-([0-9]{1,9}))?)?", re.IGNORECASE)
# How projector.py --data prepared the images, by name in its projections.json.
_PREPARATION = {"transform": DEFAULT_TRANSFORM, "resize_filter": DEFAULT_FILTER, "exact": False, "depth": None}


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A seed, or a style that was saved in a file."""

    name: str  # "seed 5", "projected_w.npz", or "latents.npz:3"
    seed: int | None = None
    style: Tensor | None = None  # [L, K] float32; None for a seed
    file: Path | None = None  # that the style is from
    row: int = 0  # in the file
    is_alone: bool = False  # whether the file has no other style
    image: str = ""  # name of the projected image, if the file records it
    group: str = ""  # of the projected image, such as its patient or lesion


def parse_points(text: str, G: nn.Module, option: str) -> list[Point]:
    """Return the points of a list, in its order.

    Raises UserError for anything else than seeds and npz files, and for files of another network.
    """
    files: dict[str, list[Point]] = {}
    points: list[Point] = []
    for part in (part.strip() for part in text.split(",")):
        if _SEEDS.fullmatch(part):
            points += [Point(name=f"seed {seed}", seed=seed) for seed in parse_seeds(option, part.replace(" ", ""))]
        elif found := _FILE.fullmatch(part):
            path = expand_user(found[1], option)
            if path not in files:
                files[path] = _read_styles(path, G, option)
            points += _some_rows(files[path], found, option)
        else:
            raise UserError(f"{option} has {part!r}; expected seeds and npz files with styles, such as {EXAMPLE}")
        if len(points) > _MOST_POINTS:
            raise UserError(f"{option} names more than {_MOST_POINTS} points; expected fewer")
    return _told_apart(points)


def _told_apart(points: list[Point]) -> list[Point]:
    """Put the folder before the names of styles whose files have the same name, such as projected_w.npz."""
    files = {point.file for point in points if point.file is not None}
    names = [file.name for file in files]
    return [point if point.file is None or names.count(point.file.name) == 1 else
            replace(point, name=f"{point.file.absolute().parent.name}/{point.name}") for point in points]


def _some_rows(points: list[Point], found: re.Match[str], option: str) -> list[Point]:
    """Return the rows of a file that "FILE.npz", "FILE.npz:3" or "FILE.npz:1-3" name. Raises UserError."""
    if found[2] is None:
        return points
    first, last = int(found[2]), int(found[3] or found[2])
    if last < first:
        raise UserError(f"{option} has {found[0]}, which runs backwards; expected {found[1]}:{last}-{first}")
    if last >= len(points):
        rows = "only row 0" if len(points) == 1 else f"rows 0 to {len(points) - 1}"
        raise UserError(f"{option} has {found[0]}, but the file has {rows}; expected one of these")
    return points[first:last + 1]


def _read_styles(path: str, G: nn.Module, option: str) -> list[Point]:
    styles = read_projected_w(path, G, option)
    texts = {"image": [""] * len(styles), "group": [""] * len(styles)}
    with suppress(UserError):  # an array of Python objects, which is not of this program
        for name, found in read_npz(path, [], flag=f"{option}={path}", expected="expected styles",
                                    optional=list(texts)).items():
            if found.shape == (len(styles),) and found.dtype.kind == "U":
                texts[name] = found.tolist()
    rows = [""] if len(styles) == 1 else [f":{row}" for row in range(len(styles))]
    return [Point(name=f"{Path(path).name}{rows[row]}", style=style, file=Path(path), row=row,
                  is_alone=len(styles) == 1, image=texts["image"][row], group=texts["group"][row])
            for row, style in enumerate(styles)]


def labels_of_points(lists: Sequence[Sequence[Point]], classes: Classes, text: str | None, label: str | None,
                     what: str = "points") -> list[Label]:
    """Return one label for all points, or one for each place in lists of points, all of the same length.

    Only seeds use theirs: [None] if there are none.

    text, label:  --class and --label
    what:         the points are called in messages

    Raises UserError if a label is missing, not known to the network, or not needed, or if there are too many or few.
    """
    if all(point.seed is None for points in lists for point in points):
        for name, value in (("--class", text), ("--label", label)):
            if value is not None:
                raise UserError(f"{name} is {value}, but all {what} are saved styles, which need none; leave {name} "
                                "out")
        return [None]
    count, labels = len(lists[0]), classes.choose(text, label, repeated=True)
    if len(labels) not in (1, count):
        raise UserError(f"--class={text} names {plural(len(labels), 'class', 'classes')} for "
                        f"{plural(count, what.rstrip('s'))}; expected one class, or one for each")
    return labels


def find_originals(points: Sequence[Point], option: str | None, G: nn.Module) -> tuple[list[Tensor | None], list[str]]:
    """Return the image that each point is a projection of, uint8 [C, R, R] or None, and notes on those not found.

    option:  --originals: a data set that holds the images; NO_ORIGINALS; or None, for the image that projector.py
             --target saves beside a style

    Raises UserError if an image that was asked for is missing or not usable.
    """
    if option == NO_ORIGINALS:
        return [None] * len(points), []
    images = None if option is None else ImageSet(option)
    found: dict[tuple[Path, int], Tensor | None] = {}  # films may visit a point several times
    missing = []
    for point in points:
        if point.file is not None and (key := (point.file, point.row)) not in found:
            found[key] = _read_original(point, images, G)
            if found[key] is None:
                missing.append(point.name)
    notes = [f"the original of {name} is not shown, since there is no {TARGET} of it beside the file; --originals=PATH "
             "names the images that were projected" for name in missing[:1]]
    if len(missing) > 1:
        notes = [f"the originals of {len(missing)} saved styles are not shown, since there is no {TARGET} of them "
                 "beside their files; --originals=PATH names the images that were projected"]
    return [None if point.file is None else found[point.file, point.row] for point in points], notes


def _read_original(point: Point, images: ImageSet | None, G: nn.Module) -> Tensor | None:
    """Return the original of a saved style; None if there is none and `images` is None. Raises UserError."""
    if images is not None and point.image:
        if point.image not in images.names:
            raise UserError(f"--originals is {images.path}, which does not hold {point.image}, the original of "
                            f"{point.name}; expected the data set that was projected")
        return _prepared(images.read(point.image), f"--originals: {point.image}", _spec_beside(point.file, G))
    beside = point.file.with_name(TARGET)
    if point.is_alone and beside.is_file():
        return _prepared(retrying(beside.read_bytes, beside), str(beside), spec_for(G))
    if images is not None:
        raise UserError(f"--originals is {images.path}, but {point.file} does not name the images that its styles are "
                        "of; expected a file of projector.py --data, or leave --originals out")
    return None


def _prepared(data: bytes, name: str, spec: PixelSpec) -> Tensor:
    try:
        return prepare(data, spec)
    except BadImage as error:
        raise UserError(f"{name} is not a usable image ({error.reason}); expected the image that was projected, or "
                        f"--originals={NO_ORIGINALS}") from error


def _spec_beside(file: Path, G: nn.Module) -> PixelSpec:
    """Return how the images of a file of styles were prepared, as the record beside it tells. Raises UserError."""
    record: Mapping[str, Any] = {}
    path = file.with_name(SUMMARY)
    with suppress(FileNotFoundError, ValueError):  # such as for styles that were moved: usual settings
        read = json.loads(retrying(lambda: path.read_text(encoding="utf-8"), path))
        record = read if isinstance(read, dict) else {}
    transform, resize_filter, exact, depth = (record.get(name, usual) for name, usual in _PREPARATION.items())
    return spec_for(G, transform, resize_filter, bool(exact), Depth(bits=depth))


def blank_like(images: Sequence[Tensor | None]) -> list[Tensor]:
    """Replace None by a white image of the size of the others, of which there is at least one."""
    white = torch.full_like(next(image for image in images if image is not None), 255)
    return [white if image is None else image for image in images]
