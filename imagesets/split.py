"""Choose a part for each image of a data set, so that no patient, lesion or identical image is in two parts.

--parts, --institutions, --sizes and --skew make a request; images that must stay together form units, which are
counted and dealt to the parts (imagesets.deal).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.files import retrying
from dnnlib.text import plural
from imagesets.deal import FIRST_CLASS, REST, SIZE, UNITS, deal, skewed_targets
from imagesets.metadata import origins_of
from imagesets.pixel_hashes import DIGEST_SIZE, identical_sets, link_groups
from imagesets.reader import ImageSet

LEFT_OUT = -1  # instead of the number of a part
_PARTS_SYNTAX = "NAME:SHARE,NAME:SHARE,... such as train:0.8,val:0.1,test:0.1"
_SKEW_SYNTAX = "CLASS=SHARE,SHARE,...;CLASS=... with a share, or *, for each institution, such as melanoma=0.3,0.05,*"
_PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_INSTITUTION = "institution"  # names of the parts of --institutions, followed by a number
_NO_LABEL_COLUMN = "(no label)"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part to make and its share of the images, exact, above 0."""

    name: str
    share: Fraction


@dataclass(frozen=True, kw_only=True)
class SplitRequest:
    """What to divide a data set into.

    parts:         names and shares, which sum to 1; empty to divide the whole set among institutions
    institutions:  names and shares within the first part, or of the whole set; may be empty
    skew:          class name -> share of the images of each institution that are of this class, REST for what is left
    allow_missing: parts may lack a class that has fewer groups than there are parts
    leave_out:     images that do not fit the skew go into no part
    """

    parts: tuple[Part, ...] = ()
    institutions: tuple[Part, ...] = ()
    skew: dict[str, tuple[Fraction | None, ...]] | None = None
    seed: int = 0
    allow_missing: bool = False
    leave_out: bool = False

    def __post_init__(self):
        counts = Counter(part.name for part in self.final_parts)
        for name, count in counts.items():
            if count > 1:
                raise UserError(f"--parts names {name}, which --institutions also makes; choose another name")

    @property
    def final_parts(self) -> tuple[Part, ...]:
        """The parts that become files, with their shares of the whole set."""
        if not self.institutions:
            return self.parts
        whole = self.parts[0].share if self.parts else Fraction(1)
        return (*(Part(name=part.name, share=part.share * whole) for part in self.institutions), *self.parts[1:])


def create_request(*, parts: str | None, institutions: int | None, sizes: str | None, skew: str | None, seed: int,
                   allow_missing: bool, leave_out: bool) -> SplitRequest:
    """Return the request that options make. Raises UserError for a wrong text or options that do not go together."""
    if parts is None and institutions is None:
        raise UserError(f"neither --parts nor --institutions is given; expected --parts={_PARTS_SYNTAX}, "
                        "or --institutions=3")
    for option, value in (("--sizes", sizes), ("--skew", skew)):
        if value is not None and institutions is None:
            raise UserError(f"{option} is given without --institutions; add it, such as --institutions=3")
    if leave_out and skew is None:
        raise UserError("--leave-out is given without --skew; expected both or neither")
    return SplitRequest(
        parts=() if parts is None else parse_parts(parts),
        institutions=() if institutions is None else name_institutions(institutions, sizes),
        skew=None if skew is None else parse_skew(read_skew(skew), institutions),
        seed=seed, allow_missing=allow_missing, leave_out=leave_out)


def parse_parts(text: str) -> tuple[Part, ...]:
    """Return the parts of "train:0.8,val:0.1,test:0.1"; shares may also be fractions, as 1/3."""
    parts: list[Part] = []
    for item in text.split(","):
        name, colon, share = (piece.strip() for piece in item.partition(":"))
        if not colon or not _PART_NAME.fullmatch(name):
            raise UserError(f"--parts={text}: {item.strip()!r} is not NAME:SHARE; expected {_PARTS_SYNTAX}")
        # Names become file names, which some systems compare without regard to case.
        if name.lower() in [part.name.lower() for part in parts]:
            raise UserError(f"--parts={text} names {name} twice; expected each name once")
        parts.append(Part(name=name, share=_parse_share(f"--parts={text}", share)))
    _check_sum(f"--parts={text}", [part.share for part in parts])
    return tuple(parts)


def name_institutions(count: int, sizes: str | None) -> tuple[Part, ...]:
    """Return institution1, institution2, ... of the given sizes, "0.06,0.33,0.61", or of equal ones."""
    if sizes is None:
        shares = [Fraction(1, count)] * count
    else:
        shares = [_parse_share(f"--sizes={sizes}", share.strip()) for share in sizes.split(",")]
        if len(shares) != count:
            raise UserError(f"--sizes={sizes} has {plural(len(shares), 'number')}; expected {count}, one for each "
                            f"of --institutions={count}")
        _check_sum(f"--sizes={sizes}", shares)
    return tuple(Part(name=f"{_INSTITUTION}{index}", share=share) for index, share in enumerate(shares, start=1))


def read_skew(text: str) -> str:
    """Return the skew itself: the text, or the content of the file it names: one class per line, # for comments."""
    if "=" in text:
        return text
    try:
        lines = retrying(lambda: Path(text).read_text(encoding="utf-8"), text).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--skew={text} is neither a readable file nor a skew; expected {_SKEW_SYNTAX}") from error
    lines = [line.split("#")[0].strip() for line in lines]
    return ";".join(line for line in lines if line)


def institution_of(source: Mapping[str, Any]) -> str | None:
    """Return which institution's part a data set is, or was made from, by its `source`; None if it is none."""
    record = source.get("split")
    while isinstance(record, Mapping):  # a part that was split again keeps the earlier record
        if re.fullmatch(rf"{_INSTITUTION}[0-9]+", str(record.get("part"))):
            return record["part"]
        record = record.get("before")
    origins = origins_of(source)
    return institution_of(origins[0]) if len(origins) == 1 else None


def parse_skew(text: str, institutions: int) -> dict[str, tuple[Fraction | None, ...]]:
    """Return the shares by class of "melanoma=0.3,0.05,*;nv=...", REST for *."""
    skew: dict[str, tuple[Fraction | None, ...]] = {}
    for item in text.split(";"):
        name, equals, values = (piece.strip() for piece in item.rpartition("="))
        if not equals or not name or not values:
            raise UserError(f"--skew: {item.strip()!r} is not understood; expected {_SKEW_SYNTAX}")
        if name in skew:
            raise UserError(f"--skew names {name} twice; expected each class once")
        texts = [value.strip() for value in values.split(",")]
        if len(texts) != institutions:
            raise UserError(f"--skew: {name} has {plural(len(texts), 'share')}; expected {institutions}, one for each "
                            f"of --institutions={institutions}")
        if texts.count("*") > 1:
            raise UserError(f"--skew: {name} has * for {texts.count('*')} shares; expected at most one")
        skew[name] = tuple(REST if value == "*" else _parse_share(f"--skew: {name}", value, zero=True)
                           for value in texts)
    return skew


def _parse_share(what: str, text: str, *, zero: bool = False) -> Fraction:
    try:
        # As a fraction, so that sums are exact: in binary, 0.7 + 0.2 + 0.1 is not 1.
        share = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{what}: the share {text!r} is not a number; expected one such as 0.8 or 1/3") from error
    if share < 0 or share > 1 or (share == 0 and not zero):
        lowest = "from 0" if zero else "above 0"
        raise UserError(f"{what}: the share {text} is out of range; expected a number {lowest} and up to 1")
    return share


def _check_sum(what: str, shares: Sequence[Fraction]) -> None:
    if sum(shares) != 1:
        raise UserError(f"{what}: the shares sum to {float(sum(shares)):.6g}; expected 1")


@dataclass(frozen=True, kw_only=True)
class _UnitTable:
    """Counts of the units of a data set: int64 [U, F], images, 1, and images of each class, F = 2 + C.

    keys:     one text per unit, which decides its place in the random order
    classes:  names of the C columns, only those with images, and _NO_LABEL_COLUMN
    required: bool [C], whether each part needs the class; False for images without a label
    where:    where the units come from, for messages: "the data set"
    """

    counts: np.ndarray
    keys: Sequence[str]
    classes: Sequence[str]
    required: np.ndarray
    where: str

    @classmethod
    def create(cls, images: ImageSet, units: np.ndarray) -> "_UnitTable":
        """Count the images of each unit; units: int64 [N], the unit of each image."""
        columns, names = images.class_columns(), images.class_names()
        required = np.ones(len(names), dtype=bool)
        if images.labels is not None and (missing := images.missing_labels()).any():
            columns = np.column_stack([columns, missing])
            names, required = [*names, _NO_LABEL_COLUMN], np.append(required, False)
        present = np.flatnonzero(columns.any(axis=0))
        counts = np.zeros((int(units.max()) + 1, FIRST_CLASS + len(present)), dtype=np.int64)
        counts[:, SIZE] = np.bincount(units)
        counts[:, UNITS] = 1
        for place, column in enumerate(present, start=FIRST_CLASS):
            counts[:, place] = np.bincount(units[columns[:, column]], minlength=len(counts))
        _, first = np.unique(units, return_index=True)
        return cls(counts=counts, keys=[images.groups[row] for row in first], classes=[names[row] for row in present],
                   required=required[present], where="the data set")

    @property
    def totals(self) -> np.ndarray:
        """Sums over the units: int64 [F]."""
        return self.counts.sum(axis=0)

    @property
    def units_with_class(self) -> np.ndarray:
        """Number of units that hold a class: int64 [C]."""
        return (self.counts[:, FIRST_CLASS:] > 0).sum(axis=0)

    def select(self, chosen: np.ndarray, where: str) -> "_UnitTable":
        """Return the chosen units, bool [U], with all classes."""
        return replace(self, counts=self.counts[chosen], keys=[self.keys[row] for row in np.flatnonzero(chosen)],
                       where=where)

    def check_groups(self, parts: Sequence[Part], *, allow_missing: bool) -> None:
        """Raise UserError when there are too few groups for each part to get one, or one of each class."""
        count = f"expected at least {len(parts)}, one for each part ({', '.join(part.name for part in parts)})"
        if len(self.counts) < len(parts):
            raise UserError(f"{self.where} has {plural(len(self.counts), 'group')}; {count}: request fewer parts")
        columns = zip(self.classes, self.required, self.units_with_class, self.totals[FIRST_CLASS:], strict=True)
        for name, required, units, images in columns:
            if required and not allow_missing and 0 < units < len(parts):
                found = f"{plural(units, 'group')} ({plural(images, 'image')}) of class {name}"
                raise UserError(f"{self.where} has {found}; {count}: merge classes when converting (--merge), request "
                                "fewer parts, or give --allow-missing")

    def even_split(self, parts: Sequence[Part], order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the part of each unit, int64 [U], and the targets, [P, F]; all parts get the same shares."""
        return self.split(parts, np.array([float(part.share) for part in parts])[:, None] * self.totals, order)

    def split(self, parts: Sequence[Part], targets: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the part of each unit, int64 [U], and the targets.

        targets: float64 [P, F], or [P + 1, F] with what goes into no part
        order:   int64 [U], a random permutation
        """
        required = np.zeros(targets.shape, dtype=bool)
        required[:len(parts), SIZE] = True
        enough = self.required & (self.units_with_class >= len(parts))
        required[:len(parts), FIRST_CLASS:] = enough & (targets[:len(parts), FIRST_CLASS:] > 0)
        part_of_unit = deal(self.counts, targets, required, order)
        for index, part in enumerate(parts):
            lacking = required[index] & ~(self.counts[part_of_unit == index] > 0).any(axis=0)
            if lacking.any():
                what = ["images", "images", *self.classes][int(np.argmax(lacking))]
                raise UserError(f"no way was found to give part {part.name} a group of {what} from {self.where}; "
                                "request fewer parts or larger shares, or try another --seed")
        return part_of_unit, targets

    def random_order(self, seed: int, stage: str) -> np.ndarray:
        """Return a permutation of the units that depends on nothing but seed, stage and groups: int64 [U]."""
        # A library's generator may change between versions, a hash does not; and splits are cited for years.
        hashes = [hashlib.sha256(f"{seed}/{stage}/{key}".encode(errors="surrogatepass")).digest() for key in self.keys]
        return np.array(sorted(range(len(hashes)), key=hashes.__getitem__), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Where the images of a data set go.

    part_of:    int64 [N], index into request.final_parts, or LEFT_OUT
    unit_of:    int64 [N], what stays together: a group, or several that share identical images
    num_linked: groups that joined the unit of another because of such an image
    reached:    int64 [P + 1, 2 + C], images, units and images of each of `classes`; the last row is left out
    targets:    float64 [P, 2 + C], what `reached` should be
    classes:    those with images, and the images without a label
    """

    part_of: np.ndarray
    unit_of: np.ndarray
    num_linked: int
    reached: np.ndarray
    targets: np.ndarray
    classes: tuple[str, ...]


def read_digests(images: ImageSet, on_image: Callable[[], None] = lambda: None) -> np.ndarray:
    """Return the sha256 of each image: uint8 [N, 32]. Raises UserError when one is damaged or not a PNG."""
    digests = np.empty((len(images), DIGEST_SIZE), dtype=np.uint8)
    for row, name in enumerate(images.names):
        data = images.read(name)
        if not data.startswith(b"\x89PNG"):
            raise UserError(f"{images.path}: {name} is not a PNG file; expected a data set for training: make it with "
                            f"dataset_tool.py --source={images.path} --dest=NAME.zip")
        digests[row] = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint8)
        on_image()
    return digests


def assign(images: ImageSet, digests: np.ndarray, request: SplitRequest,
           pixel_hashes: Sequence[str] = ()) -> Assignment:
    """Choose a part for each image.

    digests:       uint8 [N, 32], sha256 of the images
    pixel_hashes:  of the images; those with equal pixels, flipped horizontally or not, also stay together

    The same images, groups, labels and request give the same result on every machine. Whether the first part is divided
    among institutions changes nothing about the others. Raises UserError when a class has fewer groups than parts, and
    when the skew cannot be met.
    """
    if request.skew is not None and (images.labels is None or images.labels.ndim == 2):
        found = "there are none" if images.labels is None else "they are lists of numbers"
        raise UserError(f"--skew needs labels, one class per image; in {images.path} {found}")
    equal = identical_sets(digests)
    if pixel_hashes:
        packed = np.frombuffer(bytes.fromhex("".join(pixel_hashes)), dtype=np.uint8)
        equal += identical_sets(packed.reshape(len(pixel_hashes), -1))
    units, num_linked = link_groups(images.groups, equal)
    table = _UnitTable.create(images, units)
    table.check_groups(request.final_parts, allow_missing=request.allow_missing)
    part_of_unit = np.zeros(len(table.counts), dtype=np.int64)
    targets = table.totals[None].astype(np.float64)
    if request.parts:
        part_of_unit, targets = table.even_split(request.parts, table.random_order(request.seed, "parts"))
    if request.institutions:
        inside = part_of_unit == 0
        within = table.select(inside, f"part {request.parts[0].name}" if request.parts else "the data set")
        part_of_unit += len(request.institutions) - 1
        part_of_unit[inside], targets_inside = _divide(within, request)
        targets = np.vstack([targets_inside, targets[1:]])
    rows = [*range(len(request.final_parts)), LEFT_OUT]
    reached = np.array([table.counts[part_of_unit == part].sum(axis=0) for part in rows])
    return Assignment(part_of=part_of_unit[units], unit_of=units, num_linked=num_linked, reached=reached,
                      targets=targets, classes=tuple(table.classes))


def _divide(table: _UnitTable, request: SplitRequest) -> tuple[np.ndarray, np.ndarray]:
    """Divide units among the institutions: int64 [U] with LEFT_OUT, and the targets, [P, F]."""
    parts = request.institutions
    table.check_groups(parts, allow_missing=request.allow_missing)
    order = table.random_order(request.seed, "institutions")
    if request.skew is None:
        return table.even_split(parts, order)
    part_of_unit, targets = table.split(parts, _skewed_table(table, request), order)
    return np.where(part_of_unit == len(parts), LEFT_OUT, part_of_unit), targets[:-1]


def _skewed_table(table: _UnitTable, request: SplitRequest) -> np.ndarray:
    """Return the counts of the institutions, and of what is left out, in the columns of the table: [P + 1, F]."""
    totals = table.totals
    columns = FIRST_CLASS + np.flatnonzero(totals[FIRST_CLASS:])
    by_class = skewed_targets(totals[columns], [table.classes[column - FIRST_CLASS] for column in columns],
                              [part.share for part in request.institutions], request.skew, leave_out=request.leave_out)
    targets = np.zeros((len(by_class), len(totals)))
    targets[:, columns] = by_class
    targets[:, SIZE] = by_class.sum(axis=1)
    targets[:, UNITS] = targets[:, SIZE] * totals[UNITS] / totals[SIZE]
    return targets
