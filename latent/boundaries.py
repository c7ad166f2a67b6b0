"""Linear boundaries in W between two kinds of images, and tests that they are real.

InterFaceGAN: Shen et al. 2020, "Interpreting the Latent Space of GANs for Semantic Face Editing". The direction that
changes an attribute is the normal of the hyperplane that separates images with more from images with less of it
(section 2.2); here the hyperplane is that of a logistic regression.

Legend: N samples, n chosen samples, K w_dim.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from dnnlib.cli import UserError
from dnnlib.text import plural
from metrics.intervals import GroupBootstrap, Interval, TooFew, group_numbers

FOLDS = 5
LEAST_SAMPLES = 20  # on each side
LEAST_GROUPS = 10  # on each side, of samples that belong together
SIGNIFICANCE = 0.05

# The C of scikit-learn's logistic regression: the squared coefficients weigh 1 / C against the sum of the losses.
# Measured with 2,000 seeds of a conditional 64x64 network of 64 numbers in w: half of the samples gave an AUC on the
# other half of 0.955 for the share of dark pixels and 0.999 for a class, the best of C from 1e-4 to 10 up to 0.003;
# directions from two halves had a cosine of 0.87 and 0.92, with C = 0.1 of 0.68 and 0.89, with C = 10 of 0.29 and 0.80.
# One value for all keeps the permutation test simple: a C that is chosen from labels would be chosen anew each time.
_C = 0.01
_SEED = 0  # of balanced samples, folds, resamples and permutations


@dataclass(frozen=True, kw_only=True)
class ChosenSamples:
    """As many samples with more as with less of an attribute."""

    rows: np.ndarray  # int64 [n], indices among all samples
    positive: np.ndarray  # bool [n]: whether it has more of the attribute
    groups: np.ndarray | None  # int64 [n]; None = samples are independent
    low: float  # samples up to this value count as less
    high: float  # from this value, as more

    @property
    def num_groups(self) -> int | None:
        return None if self.groups is None else len(np.unique(self.groups))


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A direction that changes an attribute, and how sure that is."""

    normal: np.ndarray  # float64 [K], of length 1, towards more of the attribute
    auc: Interval  # of samples that it was not found from
    p_value: float  # the share of permutations with at least this AUC, counting the one at hand
    null: np.ndarray  # float64 [permutations], the AUC of each

    def is_found(self, adjusted: float) -> bool:
        """Tell whether there is a direction. adjusted: the p-value, corrected for the number of attributes"""
        return adjusted < SIGNIFICANCE and self.auc.low > 0.5

    def as_record(self) -> dict[str, Any]:
        """Return the numbers as plain JSON values, without the direction."""
        return {"auc": self.auc.as_record(), "p_value": self.p_value, "permutations": len(self.null),
                "auc_under_permutation": {"mean": float(self.null.mean()), "largest": float(self.null.max())}
                if len(self.null) else None}


def require_scikit_learn() -> None:
    """Raise UserError if scikit-learn is not installed."""
    if find_spec("sklearn") is None:
        raise UserError("no direction can be found because scikit-learn is not installed; install it (pip install "
                        "scikit-learn)")


def choose_samples(name: str, values: np.ndarray, groups: np.ndarray | None, share: float) -> ChosenSamples:
    """Return the samples from both ends of an attribute, equally many of each.

    name:    of the attribute, for messages
    values:  float64 [N]; nan where the value is unknown
    groups:  int64 [N], samples that belong together; None = all are independent
    share:   of the samples with a value that is taken from each end; of two-valued attributes all are taken

    Samples of the more frequent end are left out at random. Raises UserError if all values are equal, or if there are
    too few samples.
    """
    known = np.flatnonzero(np.isfinite(values))
    found = values[known]
    different = np.unique(found)
    if len(different) < 2:
        what = "has the same value for all samples" if len(different) else "is not known for any of the samples"
        raise UserError(f"{name} {what}; expected an attribute that differs between them: take more samples, of other "
                        "classes, or another attribute")
    if len(different) == 2:
        low, high = different
    else:
        count = max(1, int(share * len(found)))
        ordered = np.sort(found)
        low, high = ordered[count - 1], ordered[-count]
        if low == high:  # as for a number that is 0 in most images
            raise UserError(f"{name} has the same value, {low:g}, for so many samples that its lowest and highest "
                            f"{share:.0%} overlap; expected a smaller --extremes, or another attribute")
    random = np.random.RandomState(_SEED)
    sides = [known[found <= low], known[found >= high]]
    fewest = min(map(len, sides))
    if fewest < LEAST_SAMPLES:
        raise UserError(f"{name} has {len(sides[0])} samples with less and {len(sides[1])} with more of it; expected "
                        f"at least {LEAST_SAMPLES} of each: take more samples")
    kept = [np.sort(random.permutation(side)[:fewest]) for side in sides]
    rows = np.concatenate(kept)
    for side, word in zip(kept, ("less", "more"), strict=True):
        if groups is not None and len(np.unique(groups[side])) < LEAST_GROUPS:
            raise UserError(f"{name} has samples of {plural(len(np.unique(groups[side])), 'group')} with {word} of it; "
                            f"expected at least {LEAST_GROUPS}: images of one group are no independent samples")
    return ChosenSamples(rows=rows, positive=np.arange(2 * fewest) >= fewest, low=float(low), high=float(high),
                         groups=None if groups is None else group_numbers(groups[rows], len(rows)))


def find_boundary(styles: np.ndarray, samples: ChosenSamples, *, permutations: int,
                  others: Sequence[np.ndarray] = (), on_fit: Callable[[], None] = lambda: None) -> Boundary:
    """Return the direction towards more of an attribute, with the AUC by 5-fold cross-validation and its p-value.

    styles:  float64 [N, K];  samples: of them
    others:  directions [K] that it shall not move along, see `orthogonal`
    on_fit:  called after each permutation

    The interval is from a bootstrap of the samples' out-of-fold scores, whole groups at a time. In the test, labels are
    permuted and everything is repeated, see `permute`.

    LIMIT: the interval is about these five directions, and does not hold how they vary between draws of samples: where
    there is no direction, 85 to 93 % of 60 simulated intervals of 95 % contained 0.5. The p-value has no such limit: of
    240 simulated ones without a direction, with and without groups, 2 % were at most 0.05. Where all samples are ranked
    right, the interval has the width 0.

    Raises UserError if no direction is left orthogonal to the others.
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn, which takes long to import

    chosen, basis = styles[samples.rows], basis_of(others, styles.shape[1])
    random = np.random.RandomState(_SEED)
    # One thread: the result does not depend on the number of cores, and matrices of this size gain nothing from more.
    with threadpool_limits(1):
        scores = cross_validate(chosen, samples.positive, samples.groups, basis)
        interval = auc_interval(scores, samples.positive, samples.groups)
        null = np.empty(permutations)
        for index in range(permutations):
            labels = permute(samples.positive, samples.groups, random)
            null[index] = auc(cross_validate(chosen, labels, samples.groups, basis), labels)
            on_fit()
        normal = orthogonal(_unit(fit(chosen, samples.positive)[0]), others)
    ahead = int((null >= interval.estimate).sum())
    return Boundary(normal=normal, auc=interval, p_value=(1 + ahead) / (1 + permutations), null=null)


def cross_validate(styles: np.ndarray, positive: np.ndarray, groups: np.ndarray | None,
                   basis: np.ndarray) -> np.ndarray:
    """Return the score of each sample along the direction found from the other folds: float64 [n].

    styles:    float64 [n, K];  positive: bool [n]
    groups:    int64 [n], each within one fold; None = samples are independent
    basis:     float64 [K, others], orthonormal, taken out of each direction
    """
    scores = np.zeros(len(styles))
    for train, test in _folds(positive, groups):
        if len(np.unique(positive[train])) < 2:  # of permuted labels of few groups: these samples stay at 0
            continue
        normal, intercept = fit(styles[train], positive[train])
        along = normal - basis @ (basis.T @ normal)
        scores[test] = styles[test] @ along + intercept + styles[train].mean(axis=0) @ (normal - along)
    return scores


def fit(styles: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, float]:
    """Return normal [K], of any length, and intercept of a logistic regression of standardized styles.

    styles:  float64 [n, K];  positive: bool [n], of both kinds
    """
    from sklearn.linear_model import LogisticRegression  # takes long to import, and belongs to the extra "study"

    mean, scale = styles.mean(axis=0), styles.std(axis=0)
    scale[scale == 0] = 1  # a number of w that is constant gets the coefficient 0
    # 1,000 samples of 512 numbers take lbfgs 15 ms, and newton-cholesky 120 ms.
    model = LogisticRegression(C=_C, solver="lbfgs", max_iter=1000).fit((styles - mean) / scale, positive)
    normal = model.coef_[0] / scale
    return normal, float(model.intercept_[0] - mean @ normal)


def permute(positive: np.ndarray, groups: np.ndarray | None, random: np.random.RandomState) -> np.ndarray:
    """Return labels in random order: bool [n].

    Within groups both labels and styles resemble each other without any direction in W. So labels move with their
    groups: each group takes those of another one, in random order, repeated where that one is smaller. Labels are then
    at least as alike within groups as they were, so that the test, if anything, finds too little.
    """
    if groups is None:
        return random.permutation(positive)
    rows = _rows_of(groups)
    result = np.empty_like(positive)
    for mine, theirs in zip(rows, random.permutation(len(rows)), strict=True):
        result[mine] = np.resize(random.permutation(positive[rows[theirs]]), len(mine))
    return result


def orthogonal(normal: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Return a direction minus its projection on the span of others, with length 1 (InterFaceGAN, section 2.2).

    normal, others:  float64 [K]

    Raises UserError if nothing is left.
    """
    basis = basis_of(others, len(normal))
    rest = normal - basis @ (basis.T @ normal)
    if np.linalg.norm(rest) < 1e-3 * np.linalg.norm(normal):
        raise UserError("--orthogonal-to leaves nothing of the direction; expected directions that differ from it")
    return _unit(rest)


def basis_of(others: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Return orthonormal columns that span directions [K]: float64 [K, rank]. size: K"""
    if not len(others):
        return np.zeros((size, 0))
    vectors, values, _ = np.linalg.svd(np.stack(others).astype(np.float64).T, full_matrices=False)
    return vectors[:, values > 1e-6 * values.max()]


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the share of pairs in which the positive sample has the higher score; ties count half."""
    return float(_weighted_auc(scores, positive, np.ones((1, len(scores))))[0])


def auc_interval(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray | None) -> Interval:
    """Return the AUC of scores with its bootstrap interval. Raises UserError if there are too few groups.

    scores:  float64 [n];  positive: bool [n];  groups: int64 [n] or None
    """
    try:
        bootstrap = GroupBootstrap(groups, len(scores), keys=[scores, positive.astype(np.float64)], seed=_SEED,
                                   required={"more of the attribute": positive, "less of the attribute": ~positive})
    except TooFew as error:
        raise UserError(f"an AUC has no interval: {error}") from error
    resampled = np.concatenate([_weighted_auc(scores, positive, weights) for weights in bootstrap.weights()])
    return bootstrap.interval(auc(scores, positive), resampled)


def rank_correlations(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return Spearman's rank correlation of each pair of attributes: float64 [A, A]; nan where one is constant.

    columns:  float64 [N] each; samples without a value of one attribute are left out for its pairs
    """
    from scipy.stats import spearmanr  # here: importing it takes 0.4 s

    values = list(columns.values())
    result = np.full((len(values), len(values)), np.nan)
    for i, first in enumerate(values):
        for j, second in enumerate(values[:i + 1]):
            both = np.isfinite(first) & np.isfinite(second)
            if both.sum() > 1 and np.ptp(first[both]) > 0 and np.ptp(second[both]) > 0:
                result[i, j] = result[j, i] = 1.0 if i == j else spearmanr(first[both], second[both]).statistic
    return result


def _weighted_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the AUC for each row of weights of the samples: float64 [R]. weights: float64 [R, n]"""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)  # of samples with equal scores
    more = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    less = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    below = np.cumsum(less, axis=1) - less / 2
    return (more * below).sum(axis=1) / (more.sum(axis=1) * less.sum(axis=1))


def _folds(positive: np.ndarray, groups: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # as in `fit`

    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    return kind(n_splits=FOLDS, shuffle=True, random_state=_SEED).split(positive, positive, groups)


def _rows_of(groups: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
