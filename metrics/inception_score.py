"""The Inception score: how sure a classifier is of each image, and how evenly it uses its classes."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from metrics.feature_tensors import as_features
from metrics.intervals import Jackknife

_SUM_TOLERANCE = 1e-3  # float16 probabilities pass, logits do not


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits (divided by their number)."""

    mean: float
    std: float


def inception_score(probabilities: np.ndarray | Tensor, splits: int = 10) -> InceptionScore:
    """Return mean and standard deviation of exp(mean KL(p(y|x) || p(y))) over `splits` runs of consecutive images.

    probabilities:  [N, K], floating point, each row adding up to 1; N >= splits

    Salimans et al. 2016, in float64. The score is between 1 and K.

    Raises ValueError if these are not probabilities, or if there are fewer rows than splits.
    """
    scores = _scores(probabilities, splits)
    return InceptionScore(float(scores.mean()), float(scores.std()))


def score_jackknife(probabilities: np.ndarray | Tensor, splits: int = 10) -> Jackknife:
    """Return the mean score over splits, and that without each split; see `inception_score`.

    The splits are of different images, so that their scores are independent, and equally biased.
    """
    scores = _scores(probabilities, splits)
    others = (scores.sum() - scores) / max(splits - 1, 1)  # of one split: no interval
    return Jackknife(estimate=float(scores.mean()), without={"fake": others}, least=1.0, unit="split",
                     method="jackknife over splits")


def _scores(probabilities: np.ndarray | Tensor, splits: int) -> np.ndarray:
    """Return the score of each split: float64 [splits]."""
    if splits < 1:
        raise ValueError(f"there are {splits} splits; expected at least 1")
    p = as_features(probabilities, "probabilities", at_least=splits).double().cpu().numpy()
    if p.min() < 0 or abs(p.sum(axis=1) - 1).max() > _SUM_TOLERANCE:
        raise ValueError("probabilities have values below 0, or rows that do not add up to 1; expected the classes' "
                         "probabilities, not logits")
    return np.array([_score(p[i * len(p) // splits:(i + 1) * len(p) // splits]) for i in range(splits)])


def _score(p: np.ndarray) -> float:
    """p: float64 [N, K]. A probability of 0 adds nothing, the limit of p log p."""
    from scipy.special import rel_entr  # here: importing it takes 0.4 s

    return np.exp(rel_entr(p, p.mean(axis=0)).sum(axis=1).mean())
