"""Turn shares into target counts for each part, and deal units, which must stay whole, to parts to meet these.

Units with equal counts are interchangeable and form a kind. Each kind is dealt in proportion, so that all parts get
their share of large and small, pure and mixed units. What is left after rounding down goes to the part that lacks most,
large units first. Then single units move, or two are exchanged, while that lowers the cost. The cost is the chi-square
distance between counts and targets. Two penalties outweigh it, the first more than the second: for a part without a
class that it must have, and for a part that misses its size by more than the largest unit.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from dnnlib.cli import UserError
from dnnlib.text import shorten

SIZE, UNITS = 0, 1  # columns of the counts: number of images, and of units
FIRST_CLASS = 2  # the columns from here on are classes
REST = None  # stands for * in a skew

# Shares are given with two or three digits, so they add up to the images of a class only approximately.
_ROUNDING = 0.01
_MISSING_COST = 1e6  # of a required count that is zero; far above any chi-square that a move can save
_OVERSIZE_COST = 1e3  # of an image beyond the bound on sizes
_SMALLEST_TARGET = 0.5  # images; a smaller divisor would let a class with a target near 0 dominate the others
_UNIT_WEIGHT = 0.1  # of counts of units relative to counts of images, in the chi-square
_LEAST_GAIN = 1e-5  # of a move, so that rounding errors do not keep the search going
_DECIMALS = 6
_MAX_EXCHANGED = 48  # LIMIT: kinds, spread over all sizes, of which pairs are tried; all pairs would be slow
_MAX_MOVES = 5000  # LIMIT: the search stops there; 20,000 units of as many sizes took 230


def deal(counts: np.ndarray, targets: np.ndarray, required: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the part of each unit, int64 [U].

    counts:   int64 [U, F], what a unit holds: images, 1, images of each class
    targets:  float64 [P, F], what the parts should hold; columns sum to those of counts
    required: bool [P, F], counts that must not be 0
    order:    int64 [U], a random permutation of the units
    """
    kinds, kind_of = np.unique(counts, axis=0, return_inverse=True)
    kind_of = kind_of.reshape(-1)  # numpy 2.0 returned [U, 1]
    amounts = np.bincount(kind_of, minlength=len(kinds))
    totals = counts.sum(axis=0)
    dealt = np.floor(amounts[:, None] * _shares(kinds, totals, targets) + 1e-9).astype(np.int64)
    # Each class should also have its share of units: four images of one patient show less than four of four.
    with_class = kinds[:, FIRST_CLASS:] > 0
    unit_targets = targets[:, FIRST_CLASS:] * (amounts @ with_class) / np.maximum(totals[FIRST_CLASS:], 1)
    table = _Table(np.hstack([kinds, with_class]), np.hstack([targets, unit_targets]),
                   np.hstack([required, np.zeros_like(unit_targets, dtype=bool)]), dealt)
    table.weights[:, [UNITS, *range(len(totals), table.weights.shape[1])]] *= _UNIT_WEIGHT
    first_place = np.full(len(kinds), len(order))
    np.minimum.at(first_place, kind_of[order], np.arange(len(order)))
    # By powers of two of their size, at random within one, so that seeds also differ in large units.
    for kind in np.lexsort((first_place, -np.floor(np.log2(kinds[:, SIZE])))):
        for _ in range(amounts[kind] - table.dealt[kind].sum()):
            table.place(kind)
    table.refine()
    return _hand_out(table.dealt, kind_of, order)


def _shares(kinds: np.ndarray, totals: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return which share of each kind goes to each part: float64 [K, P], rows sum to 1."""
    fractions = targets / np.maximum(totals, 1)  # [P, F]
    weights = kinds.astype(np.float64)
    weights[:, :FIRST_CLASS] = 0
    weights[weights.sum(axis=1) == 0, SIZE] = 1  # without classes the images count
    shares = weights @ fractions.T
    return shares / shares.sum(axis=1, keepdims=True)


def _hand_out(dealt: np.ndarray, kind_of: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Give the units of each kind, in random order, to the parts."""
    part_of = np.empty(len(kind_of), dtype=np.int64)
    by_kind = order[np.argsort(kind_of[order], kind="stable")]
    part_of[by_kind] = np.concatenate([np.repeat(np.arange(dealt.shape[1]), row) for row in dealt])
    return part_of


class _Table:
    """The units of each kind in each part, `dealt` int64 [K, P], and the counts of the parts, `held` int64 [P, F]."""

    def __init__(self, kinds: np.ndarray, targets: np.ndarray, required: np.ndarray, dealt: np.ndarray):
        self.kinds, self.targets, self.required = kinds, targets, required
        self.dealt = dealt
        self.held = dealt.T @ kinds
        self.weights = 1 / np.maximum(targets, _SMALLEST_TARGET)  # [P, F]
        self.largest = kinds[:, SIZE].max()

    def place(self, kind: int) -> None:
        """Give one more unit of a kind to a part that lacks images."""
        # Required classes are left to the moves: here they would draw the largest units into the smallest part.
        costs = self._changes(self.kinds[[kind]], missing_cost=0)[0]
        costs[self.held[:, SIZE] >= self.targets[:, SIZE]] = np.inf
        part = int(np.argmin(costs)) if np.isfinite(costs).any() else int(np.argmax(self.targets[:, SIZE]))
        self._give(kind, part, 1)

    def refine(self) -> None:
        """Move single units, or exchange two if no move helps, the best change first."""
        for _ in range(_MAX_MOVES):
            if not self._move() and not self._exchange():
                return

    def _move(self) -> bool:
        """Make the best move of a unit to another part; return whether there was one that lowers the cost."""
        change = self._changes(-self.kinds)[:, :, None] + self._changes(self.kinds)[:, None, :]  # [K, from, to]
        change[self.dealt == 0] = np.inf
        change[:, range(len(self.targets)), range(len(self.targets))] = np.inf
        kind, source, target = _lowest(change)
        if change[kind, source, target] >= -_LEAST_GAIN:
            return False
        self._give(kind, source, -1)
        self._give(kind, target, 1)
        return True

    def _exchange(self) -> bool:
        """Make the best exchange of two units between parts; return whether there was one that lowers the cost."""
        by_size = np.argsort(self.kinds[:, SIZE], kind="stable")
        tried = by_size[np.linspace(0, len(by_size) - 1, min(len(by_size), _MAX_EXCHANGED)).astype(np.int64)]
        kinds = self.kinds[tried]
        gained = self._changes(kinds[:, None] - kinds)  # [K, K, P], a part gets the first and gives the second
        # [K, K, P, P]: the first goes from part p to q, the second from q to p.
        change = gained[:, :, None, :] + gained.transpose(1, 0, 2)[:, :, :, None]
        has = self.dealt[tried] > 0  # [K, P]
        change[~(has[:, None, :, None] & has[None, :, None, :])] = np.inf
        first, second, source, target = _lowest(change)
        if change[first, second, source, target] >= -_LEAST_GAIN:
            return False
        for kind, part, amount in ((first, source, -1), (first, target, 1), (second, target, -1), (second, source, 1)):
            self._give(tried[kind], part, amount)
        return True

    def _give(self, kind: int, part: int, amount: int) -> None:
        self.dealt[kind, part] += amount
        self.held[part] += amount * self.kinds[kind]

    def _changes(self, gains: np.ndarray, missing_cost: float = _MISSING_COST) -> np.ndarray:
        """Return how the cost of each part changes with a gain, [..., F], which may be negative: [..., P]."""
        parts = [self._cost(part, self.held[part] + gains, missing_cost) - self._cost(part, held, missing_cost)
                 for part, held in enumerate(self.held)]
        return np.stack(parts, axis=-1)

    def _cost(self, part: int, held: np.ndarray, missing_cost: float) -> np.ndarray:
        """Return the cost of a part that holds `held`, [..., F]: [...]."""
        excess = held - self.targets[part]
        beyond = np.maximum(np.abs(excess[..., SIZE]) - self.largest, 0)
        missing = (self.required[part] & (held <= 0)).sum(axis=-1)
        return excess**2 @ self.weights[part] + _OVERSIZE_COST * beyond + missing_cost * missing


def _lowest(change: np.ndarray) -> tuple[int, ...]:
    """Return the index of the first lowest value."""
    # Sums differ in the last digits from machine to machine; ties must not.
    return np.unravel_index(np.argmin(np.round(change, _DECIMALS)), change.shape)


# The targets of a skew


def skewed_targets(totals: Sequence[int], classes: Sequence[str], sizes: Sequence[Fraction],
                   skew: Mapping[str, Sequence[Fraction | None]], *, leave_out: bool) -> np.ndarray:
    """Return the images of each class in each institution, and in the last row those left out: float64 [P + 1, C].

    totals:  images of each class [C]
    classes: their names
    sizes:   shares of the institutions, P of them
    skew:    class -> share within each institution; classes that are not named fill up in proportion to their numbers

    Raises UserError when a class is unknown, and when a class has fewer images than needed. With leave_out the
    institutions shrink, keeping their relative sizes, until all get what they need.
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
    scale = _common_scale(needed, available, classes, named, leave_out)
    targets = scale * available.sum() * size[:, None] * shares
    if not leave_out:
        # What rounding left over is spread, so that no image is left out.
        targets *= np.divide(available, targets.sum(axis=0), out=np.zeros_like(available), where=needed > 0)
    return np.vstack([targets, np.maximum(available - targets.sum(axis=0), 0)])


def _resolve_rest(name: str, row: Sequence[Fraction | None], available: float, whole: float,
                  size: np.ndarray) -> np.ndarray:
    """Return the shares of a class, float64 [P], with the rest of its images in place of REST."""
    if REST not in row:
        return np.array([float(share) for share in row])
    place = list(row).index(REST)
    shares = np.array([0.0 if share is REST else float(share) for share in row])
    taken = whole * float(size @ shares)
    if taken > available:
        raise UserError(f"--skew needs {round(taken)} images of {name} for the institutions besides *; the data set "
                        f"has {round(available)}: lower these shares")
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


def _common_scale(needed: np.ndarray, available: np.ndarray, classes: Sequence[str], named: Sequence[int],
                  leave_out: bool) -> float:
    """Return the share of all images that the institutions can have together."""
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
