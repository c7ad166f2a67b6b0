"""Split groups of images in two many times, and compute in each split how well scores tell the sides apart.

One side is called the training images, the other one the held-out images. N images, n of them in a stratum (class), G
groups, S strata, P ways to split.
"""

from dataclasses import dataclass

import numpy as np

from dnnlib.text import plural

MIN_FOR_MEDIAN = 5  # held-out images of a class; with fewer, its scores are centered at the median of all classes
ROUNDING = 1e-12  # statistics that differ by less are equal


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Scores of the images of one side, training or held-out."""

    values: np.ndarray  # float64 [N]
    groups: np.ndarray  # int64 [N]; a group is of one side, even if the other one has the same number
    strata: np.ndarray  # int64 [N], the class: only images of one class are compared

    def __post_init__(self):
        for name in ("groups", "strata"):
            if len(getattr(self, name)) != len(self.values):
                raise ValueError(f"there are {len(getattr(self, name))} {name} of {plural(len(self.values), 'score')}; "
                                 "expected one for each score")
        checked(self.values, "scores")

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, rows: np.ndarray) -> "Scores":
        """Return some of the images. rows: int64 or bool [N]"""
        return Scores(values=self.values[rows], groups=self.groups[rows], strata=self.strata[rows])


def class_of_groups(groups: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Return the place, among the strata in order, of that of most images of each group: int64 [G].

    groups, strata:  int64 [N], groups numbered from 0
    """
    present, places = np.unique(strata, return_inverse=True)
    counts = np.bincount(groups * len(present) + places, minlength=(int(groups.max()) + 1) * len(present))
    return counts.reshape(-1, len(present)).argmax(axis=1)


def deal_groups(classes: np.ndarray, counts: np.ndarray, num_ways: int, random: np.random.Generator) -> np.ndarray:
    """Draw groups without replacement, `counts` [C] of each class: int64 [num_ways, sum of counts].

    classes:  int64 [G], from 0 to C - 1
    """
    chosen = [np.zeros([num_ways, 0], dtype=np.int64)]
    for index, count in enumerate(counts.tolist()):
        groups = np.flatnonzero(classes == index)
        if count:
            keys = random.random([num_ways, len(groups)], dtype=np.float32)
            chosen.append(groups[np.argpartition(keys, count - 1, axis=1)[:, :count]])
    return np.concatenate(chosen, axis=1)


def draw_groups(pooled: Scores, numbers: np.ndarray, counts: np.ndarray, classes: np.ndarray,
                random: np.random.Generator) -> Scores:
    """Draw groups with replacement, `counts` [C] of each class; a group that is drawn twice counts as two.

    numbers:  int64 [N], groups of the pooled images, from 0
    classes:  int64 [G]
    """
    drawn = np.concatenate([random.choice(np.flatnonzero(classes == index), count)
                            for index, count in enumerate(counts.tolist()) if count])
    order, sizes = np.argsort(numbers, kind="stable"), np.bincount(numbers)
    starts, taken = (np.cumsum(sizes) - sizes)[drawn], sizes[drawn]
    rows = order[np.repeat(starts - (np.cumsum(taken) - taken), taken) + np.arange(taken.sum())]
    groups = np.repeat(np.arange(len(drawn)), taken)
    return Scores(values=pooled.values[rows], groups=groups, strata=pooled.strata[rows])


class GroupSplits:
    """P ways to split groups into training and held-out ones, and the statistics of scores in each of them.

    groups:   int64 [N], numbers from 0
    strata:   int64 [N]
    heldout:  int64 [P, E], the groups of the held-out side; the others are training groups
    """

    def __init__(self, groups: np.ndarray, strata: np.ndarray, heldout: np.ndarray):
        is_heldout = np.zeros([len(heldout), int(groups.max()) + 1], dtype=bool)
        np.put_along_axis(is_heldout, heldout, True, axis=1)
        self._rows = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]  # S times int64 [n]
        self._heldout = []  # S times int32 [P, W]: places among these rows of held-out images, filled up by n
        self._counts = np.zeros([len(heldout), len(self._rows)], dtype=np.int64)  # of held-out images
        for index, rows in enumerate(self._rows):
            chosen = is_heldout[:, groups[rows]]
            count = chosen.sum(axis=1)
            table = np.full([len(heldout), max(count.max(), 1)], len(rows), dtype=np.int32)
            table[np.arange(table.shape[1]) < count[:, None]] = np.flatnonzero(chosen) % len(rows)  # way by way
            self._heldout.append(table)
            self._counts[:, index] = count
        self._others = np.array([len(rows) for rows in self._rows]) - self._counts  # training images, int64 [P, S]

    def aucs(self, values: np.ndarray) -> np.ndarray:
        """Return the area under the ROC curve within strata: float64 [P]; 0.5 where no pair is left.

        values:  float64 [N]

        Of n images of a stratum, H of them held-out with a sum of ranks r, the held-out image has the larger score in
        r - H (H + 1) / 2 of all pairs (Mann and Whitney 1947).
        """
        wins = np.zeros(len(self._counts))
        for index, (rows, heldout) in enumerate(zip(self._rows, self._heldout, strict=True)):
            ordered = np.sort(values[rows])
            ranks = (ordered.searchsorted(values[rows]) + ordered.searchsorted(values[rows], side="right") + 1) / 2
            count = self._counts[:, index]
            lost = np.append(ranks, 0)[heldout].sum(axis=1) - count * (count + 1) / 2
            wins += count * self._others[:, index] - lost
        pairs = (self._counts * self._others).sum(axis=1)
        return np.where(pairs > 0, wins / np.maximum(pairs, 1), 0.5)

    def true_positive_rates(self, values: np.ndarray, fpr: float) -> np.ndarray:
        """Return the share of training images above the threshold of `fpr` false positives: float64 [P]

        values:  float64 [N]
        """
        total = self._counts.sum(axis=1)
        allowed = np.floor(fpr * total + ROUNDING).astype(np.int64)  # false positives
        scores = [np.sort(np.append(values[rows], -np.inf)[heldout], axis=1)  # -inf first
                  for rows, heldout in zip(self._rows, self._heldout, strict=True)]
        centers = np.stack([_median_of_last(each, self._counts[:, index]) for index, each in enumerate(scores)], axis=1)
        if (self._counts < MIN_FOR_MEDIAN).any():
            overall = _median_of_last(np.sort(np.concatenate(scores, axis=1), axis=1), total)
            centers = np.where(self._counts < MIN_FOR_MEDIAN, overall[:, None], centers)
        largest = [each[:, -(int(allowed.max()) + 1):] - centers[:, index, None] for index, each in enumerate(scores)]
        together = np.sort(np.concatenate(largest, axis=1), axis=1)
        threshold = np.take_along_axis(together, together.shape[1] - 1 - allowed[:, None], axis=1)[:, 0]
        rates, weights = np.zeros(len(total)), np.where(self._others > 0, self._counts, 0)
        for index, rows in enumerate(self._rows):
            above = _num_above(values[rows], centers[:, index], threshold)
            false = (largest[index] > threshold[:, None]).sum(axis=1)
            rates += weights[:, index] * (above - false) / np.maximum(self._others[:, index], 1)
        return rates / np.maximum(weights.sum(axis=1), 1)


def _num_above(values: np.ndarray, centers: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return how many of the values have value - center > threshold, as computed: int64 [P].

    values:               float64 [n]
    centers, thresholds:  float64 [P]

    `center + threshold` is rounded otherwise than `value - center` is. So values next to that sum are compared as the
    held-out scores were, or a training image would be above a threshold that has the same score.
    """
    levels, counts = np.unique(values, return_counts=True)
    places = levels.searchsorted(centers + thresholds, side="right")
    padded = np.append(levels, np.inf)
    while (behind := (places > 0) & (padded[places - 1] - centers > thresholds)).any():
        places -= behind
    while (ahead := padded[places] - centers <= thresholds).any():
        places += ahead
    return np.append(np.cumsum(counts[::-1])[::-1], 0)[places]


def _median_of_last(ordered: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the median of the last `count` values of each row, 0 for none: float64 [P].

    ordered:  float64 [P, W], ascending
    count:    int64 [P]
    """
    first = ordered.shape[1] - count
    places = np.stack([first + (count - 1) // 2, first + count // 2], axis=1).clip(0, ordered.shape[1] - 1)
    low, high = np.take_along_axis(ordered, places, axis=1).T
    return np.where(count > 0, (low + high) / 2, 0.0)


def checked(values: np.ndarray, name: str) -> np.ndarray:
    """Return values as float64 [N]; raise ValueError unless they are finite, and at least one."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"the {name} have the shape {list(values.shape)}, and {int((~np.isfinite(values)).sum())} are "
                         "not finite; expected a list of finite numbers")
    return values
