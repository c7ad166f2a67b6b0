"""Turn the shares of a request into numbers of images for each part and class."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from dnnlib.cli import UserError
from imagesets.splitting.request import REST
from imagesets.text_table import shorten

# Shares are given with two or three digits, so their sum meets the number of images of a class only about.
_ROUNDING = 0.01


def even_targets(totals: np.ndarray, shares: Sequence[Fraction]) -> np.ndarray:
    """Return the counts of each part when all are alike: float64 [P, F], for totals [F]."""
    return np.array([float(share) for share in shares])[:, None] * totals


def skewed_targets(totals: Sequence[int], classes: Sequence[str], sizes: Sequence[Fraction],
                   skew: Mapping[str, Sequence[Fraction | None]], *, leave_out: bool) -> np.ndarray:
    """Return the images of each class in each institution, and in the last row those left out: float64 [P + 1, C].

    totals:  images of each class [C]
    classes: their names
    sizes:   shares of the institutions, P of them
    skew:    class -> share within each institution; classes that are not named fill up in proportion to their numbers

    Raises UserError when a class is unknown, and when a class has fewer images than needed. With leave_out the
    institutions get smaller, at their relative sizes, until all have what they need.
    """
    unknown = [name for name in skew if name not in classes]
    if unknown:
        raise UserError(f"--skew names the class {unknown[0]}, which the data set has no images of; expected one of "
                        f"{shorten(list(classes), 20)}")
    available = np.array(totals, dtype=np.float64)
    size = np.array([float(share) for share in sizes])
    shares = np.zeros((len(sizes), len(classes)))
    named = [classes.index(name) for name in skew]
    for name, row in skew.items():
        shares[:, classes.index(name)] = _resolve_rest(name, row, available[classes.index(name)], available.sum(), size)
    _fill_up(shares, named, available)
    needed = available.sum() * size @ shares  # [C]
    scale = _scale(needed, available, classes, named, leave_out)
    targets = scale * available.sum() * size[:, None] * shares
    if not leave_out:
        # What rounding left is spread, so that nothing stays out.
        targets *= np.divide(available, targets.sum(axis=0), out=np.zeros_like(available), where=needed > 0)
    return np.vstack([targets, np.maximum(available - targets.sum(axis=0), 0)])


def _resolve_rest(name: str, row: Sequence[Fraction | None], available: float, whole: float,
                  size: np.ndarray) -> np.ndarray:
    """Return the shares of a class, float64 [P], with what is left of its images in place of REST."""
    if REST not in row:
        return np.array([float(share) for share in row])
    place = list(row).index(REST)
    shares = np.array([0.0 if share is REST else float(share) for share in row])
    taken = whole * float(size @ shares)
    if taken > available:
        raise UserError(f"--skew needs {round(taken)} images of {name} for the institutions beside *; the data set has "
                        f"{round(available)}: lower these shares")
    shares[place] = (available - taken) / (whole * size[place])
    if shares[place] > 1:
        raise UserError(f"--skew leaves {round(available - taken)} images of {name} for institution{place + 1}, which "
                        f"holds {round(whole * size[place])}: raise the other shares")
    return shares


def _fill_up(shares: np.ndarray, named: Sequence[int], available: np.ndarray) -> None:
    """Divide what the named classes leave of each institution among the other classes, in proportion."""
    others = np.setdiff1d(np.arange(len(available)), named)
    for institution, row in enumerate(shares, start=1):
        total = row[named].sum()
        if total > 1 + 1e-9 or (not len(others) and total < 1 - 1e-9):
            hint = "at most 1" if len(others) else "1, as all classes are named"
            raise UserError(f"--skew: the shares of institution{institution} sum to {total:.4g}; expected {hint}")
    if len(others):
        rest = np.maximum(1 - shares[:, named].sum(axis=1), 0)
        shares[:, others] = rest[:, None] * available[others] / available[others].sum()


def _scale(needed: np.ndarray, available: np.ndarray, classes: Sequence[str], named: Sequence[int],
           leave_out: bool) -> float:
    """Return which share of all images the institutions can have together."""
    scarcity = np.divide(needed, available, out=np.zeros_like(needed), where=available > 0)
    if leave_out:
        return min(1, 1 / scarcity.max())
    worst = int(np.argmax(scarcity))
    if needed[worst] - available[worst] > max(1, _ROUNDING * available[worst]):
        usable = int(available.sum() / scarcity.max())
        change = "lower its shares" if worst in named else "raise the shares of the classes it names"
        raise UserError(f"--skew needs {round(needed[worst])} images of {classes[worst]}; there are "
                        f"{round(available[worst])}: {change}, put * for one of them, or use only {usable} of "
                        f"{round(available.sum())} images with --leave-out")
    return 1.0
