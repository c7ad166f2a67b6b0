"""Choose a part for each image of a data set, so that no patient, lesion or identical image is in two parts."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dnnlib.cli import UserError
from imagesets.duplicates import DIGEST_SIZE, identical_sets, link_groups
from imagesets.reader import ImageSet
from imagesets.splitting.deal import FIRST_CLASS, SIZE
from imagesets.splitting.request import SplitRequest
from imagesets.splitting.targets import skewed_targets
from imagesets.splitting.units import UnitTable

LEFT_OUT = -1


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Where the images of a data set go.

    part_of:    int64 [N], index into request.final_parts, or LEFT_OUT
    unit_of:    int64 [N], what stays together: a group, or several that share identical images
    num_linked: groups that are in another's unit for such an image
    reached:    int64 [P + 1, 2 + C], images, units and images of each of `classes`; the last row is left out
    targets:    float64 [P, 2 + C], what was aimed at
    classes:    those with images, and the images without a label
    """

    part_of: np.ndarray
    unit_of: np.ndarray
    num_linked: int
    reached: np.ndarray
    targets: np.ndarray
    classes: tuple[str, ...]


def read_digests(images: ImageSet, on_image: Callable[[], None] = lambda: None) -> np.ndarray:
    """Return the sha256 of each image: uint8 [N, 32]. Raises UserError when one is damaged or is no PNG."""
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
    pixel_hashes:  of the images; those of equal pixels, mirrored or not, stay together as well

    The same images, groups, labels and request give the same result on every machine. Whether the first part is divided
    among institutions changes nothing about the others. Raises UserError when a class has fewer groups than parts, and
    when the skew cannot be met.
    """
    if request.skew is not None and (images.labels is None or images.labels.ndim == 2):
        found = "there are none" if images.labels is None else "they are lists of numbers"
        raise UserError(f"--skew needs labels, one class an image; in {images.path} {found}")
    equal = identical_sets(digests)
    if pixel_hashes:
        packed = np.frombuffer(bytes.fromhex("".join(pixel_hashes)), dtype=np.uint8)
        equal += identical_sets(packed.reshape(len(pixel_hashes), -1))
    units, num_linked = link_groups(images.groups, equal)
    table = UnitTable.create(images, units)
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


def _divide(table: UnitTable, request: SplitRequest) -> tuple[np.ndarray, np.ndarray]:
    """Divide units among the institutions: int64 [U] with LEFT_OUT, and the counts aimed at, [P, F]."""
    parts = request.institutions
    table.check_groups(parts, allow_missing=request.allow_missing)
    order = table.random_order(request.seed, "institutions")
    if request.skew is None:
        return table.even_split(parts, order)
    part_of_unit, targets = table.split(parts, _skewed_table(table, request), order)
    return np.where(part_of_unit == len(parts), LEFT_OUT, part_of_unit), targets[:-1]


def _skewed_table(table: UnitTable, request: SplitRequest) -> np.ndarray:
    """Return the counts of the institutions, and of what is left out, in the columns of the table: [P + 1, F]."""
    totals = table.totals
    columns = FIRST_CLASS + np.flatnonzero(totals[FIRST_CLASS:])
    by_class = skewed_targets(totals[columns], [table.classes[column - FIRST_CLASS] for column in columns],
                              [part.share for part in request.institutions], request.skew, leave_out=request.leave_out)
    targets = np.zeros((len(by_class), len(totals)))
    targets[:, columns] = by_class
    targets[:, SIZE] = by_class.sum(axis=1)
    targets[:, SIZE + 1] = targets[:, SIZE] * totals[SIZE + 1] / totals[SIZE]
    return targets
