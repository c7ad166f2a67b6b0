"""Divide a number of images among classes."""

from collections.abc import Sequence


def class_counts(shares: Sequence[float], count: int) -> list[int]:
    """Return numbers of images that add up to `count`, by largest remainder; of equal remainders the first wins.

    shares: of the classes, >= 0, of any sum above 0
    """
    total = sum(shares)
    wanted = [share / total * count for share in shares]
    counts = [int(number + 1e-9) for number in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda label: round(counts[label] - wanted[label], 9))
    for label in by_remainder[:count - sum(counts)]:
        counts[label] += 1
    return counts
