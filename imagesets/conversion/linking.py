"""Groups of the images of a new data set: what one patient or lesion, one table row or equal bytes hold together."""

from dataclasses import dataclass

import numpy as np

from imagesets.conversion.selection import Selection, images_of_rows
from imagesets.conversion.tally import Tally
from imagesets.duplicates import identical_sets, link_groups
from imagesets.writer import image_name


@dataclass(frozen=True, kw_only=True)
class Linked:
    """Of the K images kept, in order.

    groups:      K groups, None for an image alone
    num_groups:  different ones, each image alone being one
    num_merged:  groups that vanished into another
    duplicates:  sets of byte-identical images, as positions
    """
    groups: list[str | None]
    num_groups: int
    num_merged: int
    duplicates: list[np.ndarray]


def link(selection: Selection, tally: Tally) -> Linked:
    """Join groups that share an image, or of which two images are of one row of the table."""
    kept = np.array(tally.kept, dtype=np.int64)
    known = selection.labelling.groups
    texts = [image_name(position) if known is None or known[index] is None else known[index]
             for position, index in enumerate(kept)]
    duplicates = identical_sets(tally.digests)
    rows = selection.labelling.rows
    of_one_row = [] if rows is None else list(images_of_rows(rows[kept]).values())
    units, merged = link_groups(texts, duplicates + of_one_row)
    sizes = np.bincount(units)
    # A unit is named by the first patient or lesion in it, else by its first image.
    name_of: dict[int, str] = {}
    for named_by_table in (True, False):
        for position, index in enumerate(kept):
            if not named_by_table or (known is not None and known[index] is not None):
                name_of.setdefault(int(units[position]), texts[position])
    groups = [None if sizes[unit] == 1 and name_of[unit] == image_name(position) else name_of[unit]
              for position, unit in enumerate(units.tolist())]
    return Linked(groups=groups, num_groups=len(sizes), num_merged=merged, duplicates=duplicates)


def contradictions(selection: Selection, tally: Tally, linked: Linked) -> list[list[int]]:
    """Return the sets of byte-identical images with different labels, as indices in the source.

    An image without a label contradicts none.
    """
    sets = [[tally.kept[position] for position in positions] for positions in linked.duplicates]
    return [indices for indices in sets
            if len({selection.label_name(index) for index in indices if selection.label(index) is not None}) > 1]
