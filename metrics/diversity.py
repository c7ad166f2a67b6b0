"""Diversity: how far apart images of one set are on average, against the real ones."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metrics.feature_tensors import as_feature_pair
from metrics.intervals import Jackknife, TooFew
from metrics.pair_sums import mean_within

_BLOCK = 4096  # rows converted to float64 at a time: bounds the memory


class Diversity(NamedTuple):
    """Mean distance between two generated images, between two real ones, and the first divided by the second."""

    fake: Jackknife
    real: Jackknife
    ratio: Jackknife  # 1: as diverse as the real images; lower: more alike


def diversity(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, real_groups: np.ndarray | None = None,
              fake_groups: np.ndarray | None = None, on_rows: Callable[[int], None] = lambda count: None) -> Diversity:
    """Return the mean Euclidean distance of the features of two images of different groups, in both sets.

    real, fake:   [N, F] and [M, F], floating point
    real_groups:  int64 [N]; None = images are independent; fake_groups likewise
    on_rows:      called with the number of finished rows of distances; there are N + M

    Distances are sqrt(|x|^2 + |y|^2 - 2 x.y) in float64 of features minus their mean: those of equal images come out
    as up to 3e-8 of their distance to the mean instead of 0, larger ones are exact to more digits.

    Raises ValueError if features have another shape or type; TooFew, which is one, if a set has fewer than three groups
    or all real images have equal features.
    """
    real, fake = as_feature_pair(real, fake, at_least=1)
    of_fake = mean_within(_distances_around(fake), fake, fake_groups, "fake", on_rows)
    of_real = mean_within(_distances_around(real), real, real_groups, "real", on_rows)
    without = {"real": of_real.without[0], "fake": of_fake.without[0]}
    if min(of_real.mean, without["real"].min()) <= 0:
        raise TooFew("the real images, or all but one group of them, have equal features; expected different ones, "
                     "for a diversity to compare with")
    ratio = Jackknife(estimate=of_fake.mean / of_real.mean, least=0.0,
                      without={"real": of_fake.mean / without["real"], "fake": without["fake"] / of_real.mean})
    return Diversity(fake=Jackknife(estimate=of_fake.mean, without={"fake": without["fake"]}, least=0.0),
                     real=Jackknife(estimate=of_real.mean, without={"real": without["real"]}, least=0.0), ratio=ratio)


def _distances_around(features: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of the distances of features, which are first centered so that less cancels."""
    center = sum(block.double().sum(dim=0) for block in features.split(_BLOCK)) / len(features)

    def distances(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x.double() - center, y.double() - center, compute_mode="use_mm_for_euclid_dist")

    return distances
