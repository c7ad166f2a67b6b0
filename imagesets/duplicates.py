"""Find byte-identical images by their digests, and join the groups that they link."""

from collections.abc import Sequence

import numpy as np

DIGEST_SIZE = 32  # bytes of a sha256


def identical_sets(digests: np.ndarray) -> list[np.ndarray]:
    """Return the rows of equal digests, as ascending int64 arrays of two or more, in the order of their first rows.

    digests: uint8 [N, B], B a multiple of 8
    """
    words = np.ascontiguousarray(digests).view(np.uint64)  # [N, B / 8]
    order = np.lexsort(words.T)  # stable, so that equal rows stay ascending
    changes = (words[order][1:] != words[order][:-1]).any(axis=1)
    runs = np.split(order, np.flatnonzero(changes) + 1)
    return sorted((run for run in runs if len(run) > 1), key=lambda run: run[0])


def link_groups(groups: Sequence[str], identical: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """Return the unit of each image, int64 [N], and how many groups vanished into another's unit.

    A unit is a group, or several that share an image, directly or in a chain. Units are numbered by their first image.

    groups:    one text an image
    identical: rows of byte-identical images
    """
    numbers: dict[str, int] = {}
    group_of = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    # Links lead from a group to an earlier one of its unit; a root leads to itself.
    links = list(range(len(numbers)))
    for rows in identical:
        roots = {_root(links, group) for group in group_of[rows].tolist()}
        for root in roots:
            links[root] = min(roots)
    roots = np.array([_root(links, group) for group in range(len(links))], dtype=np.int64)
    # Groups are numbered by their first image, and a root is the first of its unit.
    found, unit_of_group = np.unique(roots, return_inverse=True)
    return unit_of_group.reshape(-1)[group_of], len(numbers) - len(found)


def _root(links: list[int], group: int) -> int:
    """Follow the links to their end, and halve the way for the next time."""
    while links[group] != group:
        links[group] = links[links[group]]
        group = links[group]
    return group
