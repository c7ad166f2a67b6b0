"""The choices of a conversion, checked before any image is read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dnnlib.cli import UserError
from imagesets.pixels.depth import Depth
from imagesets.resolutions import RESOLUTIONS, is_resolution, nearest_resolution

TRANSFORMS = ("center-crop", "center-crop-wide")
FILTERS = ("box", "lanczos")
FOLDERS = ("classes", "ignore")
_RECORDED = ("split", "include", "exclude", "labels", "groups", "id_column", "label_column", "group_column", "folders",
             "classes", "merge", "unlabelled", "max_images", "seed", "transform", "width", "height", "resize_filter",
             "exact", "depth", "max_bad")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What convert() is asked to do; the fields are named as the options of the command, with None for "not given".

    include, exclude: patterns of file names
    folders:       what names of sub-folders are: "classes", or nothing ("ignore"); None for classes where they look so
    unlabelled:    "error", "drop" or "keep"
    seed:          of the sample of max_images, 0 where not given
    transform:     None scales, "center-crop" cuts a square, "center-crop-wide" cuts and pads to a square
    width, height: of the result (of its content for center-crop-wide); both or none
    max_bad:       share of images, 0 to 1, that may be unreadable
    exact:         decode JPEG files at full size
    depth:         bits of the numbers in images of more than 8 bits

    Raises UserError for values that do not fit.
    """
    split: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    labels: str | None = None
    groups: str | None = None
    id_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    folders: str | None = None
    classes: str | None = None
    merge: str | None = None
    unlabelled: str = "error"
    max_images: int | None = None
    seed: int | None = None
    transform: str | None = None
    width: int | None = None
    height: int | None = None
    resize_filter: str = "lanczos"
    exact: bool = False
    depth: int | None = None
    max_bad: float = 0.01

    def __post_init__(self):
        if self.transform is not None and self.transform not in TRANSFORMS:
            raise UserError(f"--transform={self.transform}; expected {' or '.join(TRANSFORMS)}")
        if self.resize_filter not in FILTERS:
            raise UserError(f"--resize-filter={self.resize_filter}; expected {' or '.join(FILTERS)}")
        if not 0 <= self.max_bad <= 1:
            raise UserError(f"--max-bad={self.max_bad}; expected a share from 0 to 1, or from 0% to 100%")
        for name in ("include", "exclude"):
            if not all(getattr(self, name)):
                raise UserError(f'--{name} is empty; expected a pattern of file names, such as --{name}="*.png"')
        Depth(bits=self.depth)  # checks
        tables = {"id_column": self.labels or self.groups, "label_column": self.labels,
                  "group_column": self.labels or self.groups}
        for name, table in tables.items():
            if getattr(self, name) is not None and table is None:
                raise UserError(f"--{name.replace('_', '-')} names a column, but there is no table; add --labels=FILE")
        if self.seed is not None and self.max_images is None:
            raise UserError(f"--seed={self.seed} draws the images of --max-images, which is not given; add it, or "
                            "leave --seed out")
        if not 0 <= (self.seed or 0) < 2**32:
            raise UserError(f"--seed={self.seed}; expected a number from 0 to {2**32 - 1}")
        if self.folders is not None and self.folders not in FOLDERS:
            raise UserError(f"--folders={self.folders}; expected {' or '.join(FOLDERS)}")
        if self.folders is not None and self.labels is not None:
            raise UserError(f"--folders={self.folders} and --labels are both given, and a table takes the place of "
                            "folders; expected one of the two")
        if (self.width is None) != (self.height is None):
            missing = "height" if self.height is None else "width"
            raise UserError(f"--{missing} is missing; expected both, or --resolution=WIDTHxHEIGHT")
        if self.width is not None:
            check_resolution(self.width, self.height, self.transform)
        elif self.transform == "center-crop-wide":
            raise UserError("--transform=center-crop-wide needs a size; add for example --resolution=256x192")

    def record(self) -> dict[str, Any]:
        """Return what a data set says of its making: the same on every machine, so no paths."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("labels", "groups"):
            if given[name] is not None:
                given[name] = Path(given[name]).name
        if self.max_images is not None:
            given["seed"] = self.seed or 0
        return {name: given[name] for name in _RECORDED if given[name] not in (None, (), [])}


def parse_resolution(text: str) -> tuple[int, int]:
    """Return (width, height) of "256x256"."""
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip())
    if match is None:
        raise UserError(f"--resolution={text}; expected WIDTHxHEIGHT, such as 256x256")
    return int(match[1]), int(match[2])


def parse_share(text: str) -> float:
    """Return 0.01 of "0.01" or "1%"."""
    number = text.strip()
    try:
        return float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        raise UserError(f"--max-bad={text}; expected a share from 0 to 1, or from 0% to 100%") from None


def check_resolution(width: int, height: int, transform: str | None) -> None:
    """Raise UserError when images of this size would not become squares with a power of two a side."""
    given = f"--resolution={width}x{height}"
    near = nearest_resolution(width)
    if transform == "center-crop-wide":
        if height > width:
            raise UserError(f"{given} is higher than wide; center-crop-wide expects the width first, such as "
                            f"{near}x{near * 3 // 4}")
        if height < 1:
            raise UserError(f"{given} has no height; expected for example {near}x{near * 3 // 4}")
    elif width != height:
        near = nearest_resolution(min(width, height))
        raise UserError(f"{given} is not square; expected equal sides, such as {near}x{near}, or "
                        "--transform=center-crop-wide, which pads with black to a square")
    if not is_resolution(width):
        other = near if transform != "center-crop-wide" else max(1, near * height // max(width, 1))
        raise UserError(f"{given}: {width} is not {RESOLUTIONS}, as networks take; expected for example "
                        f"{near}x{other}")
