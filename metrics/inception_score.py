"""The Inception score: how sure a classifier is of each image, and how evenly it uses its classes."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metrics.feature_tensors import as_features

_SUM_TOLERANCE = 1e-3  # float16 probabilities pass, logits do not


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits (divided by their number)."""

    mean: float
    std: float


def inception_score(probabilities: np.ndarray | Tensor, splits: int = 10) -> InceptionScore:
    """Return mean and spread of exp(mean KL(p(y|x) || p(y))) over `splits` runs of consecutive images.

    probabilities:  [N, K], floating point, each row adding up to 1; N >= splits

    1 is the least, K the most. Salimans et al. 2016, as computed in float64.

    Raises ValueError when these are no probabilities, or fewer than splits.
    """
    if splits < 1:
        raise ValueError(f"there are {splits} splits; expected at least 1")
    p = as_features(probabilities, "probabilities", at_least=splits).double()
    if p.min() < 0 or (p.sum(dim=1) - 1).abs().max() > _SUM_TOLERANCE:
        raise ValueError("probabilities have values below 0, or rows that do not add up to 1; expected the classes' "
                         "probabilities, not logits")
    scores = torch.stack([_score(p[i * len(p) // splits:(i + 1) * len(p) // splits]) for i in range(splits)])
    return InceptionScore(scores.mean().item(), scores.std(correction=0).item())


def _score(p: Tensor) -> Tensor:
    """p: float64 [N, K]. A probability of 0 adds nothing, as the limit of p log p says."""
    marginal = p.mean(dim=0)
    divergence = (torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(dim=1)
    return divergence.mean().exp()
