"""Count what must stay together, and divide it among parts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dnnlib.cli import UserError
from imagesets.class_columns import class_columns, class_names, is_unlabelled
from imagesets.reader import ImageSet
from imagesets.splitting.deal import FIRST_CLASS, SIZE, deal
from imagesets.splitting.request import Part
from imagesets.splitting.targets import even_targets
from imagesets.text_table import plural

NO_LABEL_COLUMN = "(no label)"


@dataclass(frozen=True, kw_only=True)
class UnitTable:
    """Counts of the units of a data set: int64 [U, F], images, 1, and images of each class, F = 2 + C.

    keys:     a text a unit, which decides its place in the random order
    classes:  names of the C columns, only those with images, and NO_LABEL_COLUMN
    required: bool [C], whether each part needs the class; False for images without a label
    where:    what the units are of, for messages: "the data set"
    """

    counts: np.ndarray
    keys: Sequence[str]
    classes: Sequence[str]
    required: np.ndarray
    where: str

    @classmethod
    def create(cls, images: ImageSet, units: np.ndarray) -> "UnitTable":
        """Count the images of each unit; units: int64 [N], the unit of each image."""
        columns, names = class_columns(images), class_names(images)
        required = np.ones(len(names), dtype=bool)
        if images.labels is not None and images.num_unlabelled:
            columns = np.column_stack([columns, is_unlabelled(images)])
            names, required = [*names, NO_LABEL_COLUMN], np.append(required, False)
        present = np.flatnonzero(columns.any(axis=0))
        counts = np.zeros((int(units.max()) + 1, FIRST_CLASS + len(present)), dtype=np.int64)
        counts[:, SIZE] = np.bincount(units)
        counts[:, SIZE + 1] = 1
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

    def select(self, chosen: np.ndarray, where: str) -> "UnitTable":
        """Return the chosen units, bool [U], with all classes."""
        return UnitTable(counts=self.counts[chosen], keys=[self.keys[row] for row in np.flatnonzero(chosen)],
                         classes=self.classes, required=self.required, where=where)

    def check_groups(self, parts: Sequence[Part], *, allow_missing: bool) -> None:
        """Raise UserError when some part would have to stay without images, or without a class."""
        count = f"expected at least {len(parts)}, one for each part ({', '.join(part.name for part in parts)})"
        if len(self.counts) < len(parts):
            raise UserError(f"{self.where} has {plural(len(self.counts), 'group')}; {count}: ask for fewer parts")
        columns = zip(self.classes, self.required, self.units_with_class, self.totals[FIRST_CLASS:], strict=True)
        for name, required, units, images in columns:
            if required and not allow_missing and 0 < units < len(parts):
                found = f"{plural(units, 'group')} ({plural(images, 'image')}) of class {name}"
                raise UserError(f"{self.where} has {found}; {count}: join classes when converting (--merge), ask for "
                                "fewer parts, or give --allow-missing")

    def even_split(self, parts: Sequence[Part], order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the part of each unit, int64 [U], and the counts aimed at, [P, F]; all parts are to be alike."""
        return self.split(parts, even_targets(self.totals, [part.share for part in parts]), order)

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
                raise UserError(f"no way was found to give part {part.name} a group of {what} from {self.where}: ask "
                                "for fewer parts or larger shares, or try another --seed")
        return part_of_unit, targets

    def random_order(self, seed: int, stage: str) -> np.ndarray:
        """Return a permutation of the units that depends on nothing but seed, stage and groups: int64 [U]."""
        # A library's generator may change from version to version, a hash does not: a split is cited for years.
        hashes = [hashlib.sha256(f"{seed}/{stage}/{key}".encode(errors="surrogatepass")).digest() for key in self.keys]
        return np.array(sorted(range(len(hashes)), key=hashes.__getitem__), dtype=np.int64)
