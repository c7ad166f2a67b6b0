"""Turn features into the numbers of a metric."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from metrics.feature_stats import FeatureStats
from metrics.features import Features
from metrics.frechet import frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel import kernel_distances
from metrics.names import IS_SPLITS, MetricRequest
from metrics.precision_recall import precision_recall

# Binkowski et al. 2018; the same numbers as in Karras et al. 2020.
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


class Side:
    """The features of one side, real or generated."""

    def __init__(self, features: Features):
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    @property
    def values(self):
        return self.features.values

    @cached_property
    def stats(self) -> FeatureStats:
        return FeatureStats.of(self.values)

    def first(self, count: int) -> "Side":
        """Return a side of the first images."""
        if count >= len(self):
            return self
        probabilities = self.features.probabilities
        return Side(Features(values=self.values[:count],
                             probabilities=None if probabilities is None else probabilities[:count]))


def num_rows(request: MetricRequest, real: Side | None, fake: Side) -> int | None:
    """Return of how many rows `compute_results` tells; None where that is not known."""
    return 2 * (len(real) + len(fake)) if request.kind == "pr" else None


def compute_results(request: MetricRequest, real: Side | None, fake: Side, seed: int,
                    on_rows: Callable[[int], None] = lambda count: None) -> Mapping[str, Any]:
    """Return {"results": {key: value}, further fields} of a metric other than ppl.

    real:     None where the metric looks at no reals
    seed:     of random subsets
    on_rows:  is told how many rows of a table of all pairs of images were done, for kid and pr

    Raises ValueError when there are too few images.
    """
    name = request.name
    if request.kind == "fid":
        distance = frechet_distance(real.stats.mean, real.stats.covariance(), fake.stats.mean, fake.stats.covariance())
        return {"results": {name: distance}, **_rank_note(len(real), len(fake), real.values.shape[1])}
    if request.kind == "kid":
        size = min(len(real), len(fake), KID_SUBSET_SIZE)
        differ = size < max(len(real), len(fake))  # otherwise each subset would be everything
        distances = kernel_distances(real.values, fake.values, KID_SUBSETS if differ else 1, size, seed, on_rows)
        spread = {"subset_std": float(distances.std())} if differ else {}
        return {"results": {name: float(distances.mean())}, "subsets": len(distances), "subset_size": size, **spread}
    if request.kind == "pr":
        found = precision_recall(real.values, fake.values, request.k, on_rows)
        return {"results": dict(zip(request.keys, (float(found.precision), float(found.recall)), strict=True))}
    score = inception_score(fake.features.probabilities, IS_SPLITS)
    return {"results": dict(zip(request.keys, (float(score.mean), float(score.std)), strict=True))}


def _rank_note(num_real: int, num_fake: int, num_features: int) -> dict[str, str]:
    fewest = min(num_real, num_fake)
    if fewest > num_features:
        return {}
    return {"note": f"{fewest} images span less than the {num_features} dimensions of the features: the value is too "
                    "high by an amount that depends on the numbers of images; compare it at equal numbers only, or "
                    "take kid"}
