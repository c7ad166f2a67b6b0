"""The Frechet distance between two Gaussians (FID), and the mean and covariance of features that it compares."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from metrics.feature_tensors import as_feature_pair, as_features
from metrics.intervals import Jackknife, TooFew, group_numbers

BLOCKS = 12  # of groups, at most: each costs a distance, which at F = 2048 takes seconds
IMAGES_PER_FEATURE = 10  # for an interval

_ASYMMETRY = 1e-6  # relative to the largest entry: covariances computed in float32 pass, mistakes do not
_NEGATIVE = 1e-6  # relative to the largest eigenvalue, likewise
_BLOCK = 4096  # rows at a time: bounds the memory of their float64 copy


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """Return ||mu1 - mu2||^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), in float64 (Heusel et al. 2017, eq. 6).

    mu:   [F], floating point
    cov:  [F, F], symmetric and positive semidefinite; may be rank-deficient (fewer images than features)

    With cov1 = A A^T and cov2 = B B^T, the trace of the root is the sum of the singular values of A^T B. Unlike the
    eigenvalues of cov1 cov2, these are never negative or complex, and the error of small ones is of the order of eps,
    not of its root. Rounding can make the result negative, by about F * 1e-16 * (tr cov1 + tr cov2); then it is 0.

    Raises ValueError if a shape does not fit, a value is not finite, or cov is not a covariance.
    """
    mu1, cov1 = _checked(mu1, cov1, "mu1", "cov1")
    mu2, cov2 = _checked(mu2, cov2, "mu2", "cov2")
    if len(mu1) != len(mu2):
        raise ValueError(f"mu1 has {len(mu1)} dimensions, mu2 {len(mu2)}; expected equal numbers: use one detector")
    root_trace = torch.linalg.svdvals(_factor(cov1, "cov1").T @ _factor(cov2, "cov2")).sum()
    means = (mu1 - mu2).square().sum()
    spreads = cov1.trace() + cov2.trace() - 2 * root_trace
    return (means + spreads).clamp(min=0).item()


def _checked(mean: np.ndarray, cov: np.ndarray, mean_name: str, cov_name: str) -> tuple[Tensor, Tensor]:
    """Return copies as float64. Raises ValueError unless they are [F] and [F, F], finite, and cov is symmetric."""
    mean, cov = (torch.from_numpy(np.array(x, dtype=np.float64)) for x in (mean, cov))
    if mean.ndim != 1 or len(mean) == 0:
        raise ValueError(f"{mean_name} is {list(mean.shape)}; expected [F]")
    if cov.shape != (len(mean), len(mean)):
        raise ValueError(f"{cov_name} is {list(cov.shape)}; expected {[len(mean)] * 2} like {mean_name}")
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise ValueError(f"{mean_name} or {cov_name} has values that are not finite; expected none")
    if (cov - cov.T).abs().max() > _ASYMMETRY * cov.abs().max():
        raise ValueError(f"{cov_name} is not symmetric; expected a covariance")
    return mean, cov


def _factor(cov: Tensor, name: str) -> Tensor:
    """Return A, [F, rank], with A A^T = cov."""
    from scipy.linalg.lapack import dpocon  # here: importing it takes 0.3 s

    noise = len(cov) * torch.finfo(cov.dtype).eps
    lower, failed = torch.linalg.cholesky_ex(cov)
    # The pivots do not show how small the smallest eigenvalue is; LAPACK's estimate of 1 / condition number does.
    if not failed and dpocon(lower.numpy(), torch.linalg.matrix_norm(cov, 1).item(), uplo="L")[0] > noise:
        return lower
    # Singular or nearly so. Eigenvalues below the noise are rounding errors of 0, but their roots would exceed it.
    values, vectors = torch.linalg.eigh(cov)
    largest = values.abs().max()
    if values.min() < -_NEGATIVE * largest:
        raise ValueError(f"{name} has the eigenvalue {values.min():.3g} beside {largest:.3g}; expected none below 0")
    kept = values > noise * largest
    return vectors[:, kept] * values[kept].sqrt()


def frechet_jackknife(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, real_groups: np.ndarray | None = None,
                      fake_groups: np.ndarray | None = None, *, stats: "Sequence[FeatureStats] | None" = None,
                      seed: int = 0,
                      on_step: Callable[[int], None] = lambda count: None) -> Jackknife:
    """Return the Frechet distance extrapolated to infinitely many images, with a jackknife over blocks of groups.

    real:     [N, F], floating point, with groups int64 [N]; None = each image is its own group
    fake:     [M, F], likewise with groups int64 [M]
    stats:    those of real and fake features, if they are known already
    seed:     deals the groups of each side to BLOCKS blocks, or as many as the side with fewer groups has groups
    on_step:  called with 1 after each distance; there is one more than blocks

    The distance between t N and t M images exceeds that of infinitely many by c / t, up to terms in 1 / t^2 (Chong and
    Forsyth 2020). Here t is 1 and 1 - 1 / blocks, the latter as the mean over leaving out each block on
    both sides. This is the jackknife's own correction of bias (Quenouille 1956), so that the same distances give the
    standard error. Whole groups are left out, so that c is that of correlated images. In simulations with Gaussian
    features its error is smaller than that of halves, quarters, or the paper's regression over 15 numbers of images
    (F = 32, 2,000 images in groups of 5: root mean square 0.078, 0.099, 0.084 and 0.120; not extrapolated 0.60).

    Raises TooFew if a side has fewer than 10 F images, where the terms in 1 / t^2 count, or if it has one group.
    """
    real, fake = as_feature_pair(real, fake, at_least=1)
    count, num_features = min(len(real), len(fake)), real.shape[1]
    if count < IMAGES_PER_FEATURE * num_features:
        raise TooFew(f"there are {count:,} images; an interval needs at least {IMAGES_PER_FEATURE} for each of the "
                     f"{num_features:,} dimensions of the features ({IMAGES_PER_FEATURE * num_features:,})")
    numbers = group_numbers(real_groups, len(real)), group_numbers(fake_groups, len(fake))
    num_groups = [int(side.max()) + 1 for side in numbers]
    num_blocks = min(BLOCKS, *num_groups)
    if num_blocks < 2:
        raise TooFew(f"there are {num_groups[0]:,} groups of real and {num_groups[1]:,} of fake images; an interval "
                     "needs at least 2 of each")
    random = np.random.RandomState(seed)
    blocks = [(random.permutation(total) % num_blocks)[side] for total, side in zip(num_groups, numbers)]
    whole = [FeatureStats.of(side) for side in (real, fake)] if stats is None else stats
    distance = _distance(*whole)
    on_step(1)
    without = np.empty(num_blocks)
    for block in range(num_blocks):
        parts = [FeatureStats.of(side[torch.from_numpy(np.flatnonzero(dealt == block))])
                 for side, dealt in zip((real, fake), blocks)]
        without[block] = _distance(*(stats.without(part) for stats, part in zip(whole, parts)))
        on_step(1)
    bias = num_blocks * (without.mean() - distance)  # c / t for t = 1 - 1 / num_blocks
    return Jackknife(estimate=float(without.mean() - bias), without={"blocks": without - bias}, least=0.0, unit="block",
                     method="extrapolation to infinitely many images, jackknife over blocks of groups",
                     dealt={"real": num_groups[0], "fake": num_groups[1]})


def _distance(one: "FeatureStats", two: "FeatureStats") -> float:
    return frechet_distance(one.mean, one.covariance(), two.mean, two.covariance())


class FeatureStats:
    """Number, mean and covariance of features [N, F], accumulated block by block in float64, or merged from parts.

    Deviations are pooled as in Chan, Golub and LeVeque (1979). All sums are of differences from one of the features
    (`_origin`), so that a mean far from 0 does not cost digits. Memory: two float64 [F, F].
    """

    def __init__(self, num_features: int):
        self.count = 0
        self._origin = torch.zeros(num_features, dtype=torch.float64)
        self._shift = torch.zeros(num_features, dtype=torch.float64)  # mean - origin
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features: np.ndarray | Tensor) -> "FeatureStats":
        """Return the statistics of features [N, F], floating point.

        Raises ValueError if they have another shape or type, are not finite, or N is 0.
        """
        features = as_features(features, at_least=1)
        stats = cls(features.shape[1])
        stats.add(features)
        return stats

    @classmethod
    def of_moments(cls, count: int, mean: np.ndarray, covariance: np.ndarray) -> "FeatureStats":
        """Return the statistics of `count` features of which only these are known.

        mean:        [F], floating point
        covariance:  [F, F], divided by the count

        Raises ValueError if the count is not positive, a shape does not fit, a value is not finite, or the covariance
        is not symmetric and positive semidefinite.
        """
        if count < 1:
            raise ValueError(f"the count is {count}; expected at least 1")
        mean, covariance = _checked(mean, covariance, "the mean", "the covariance")
        slack = _NEGATIVE * covariance.abs().max()  # at most that of `_factor`: no entry exceeds the largest eigenvalue
        shifted = covariance + slack * torch.eye(len(mean), dtype=torch.float64)
        if slack > 0 and torch.linalg.cholesky_ex(shifted).info:
            raise ValueError("the covariance has eigenvalues below 0; expected none")
        stats = cls(len(mean))
        stats.count, stats._origin, stats._scatter = count, mean, covariance * count
        return stats

    @property
    def num_features(self) -> int:
        return len(self._origin)

    @property
    def mean(self) -> np.ndarray:
        """Float64 [F]. Raises ValueError before the first feature."""
        self._need(1)
        return (self._origin + self._shift).numpy()

    def covariance(self) -> np.ndarray:
        """Float64 [F, F], divided by the count as in StyleGAN2-ADA. Raises ValueError before the first feature."""
        self._need(1)
        return (self._scatter / self.count).numpy()

    def add(self, features: np.ndarray | Tensor) -> None:
        """Add features [N, F], floating point, on any device; N may be 0.

        Raises ValueError if they have another shape or type, or are not finite.
        """
        features = as_features(features)
        self._fit(features.shape[1])
        for block in features.split(_BLOCK):
            if len(block) > 0:
                block = block.double()
                origin = block[0]
                block = block - origin  # exact for values within a factor of 2 (Sterbenz)
                shift = block.mean(dim=0)
                block -= shift
                self._pool(len(block), origin.cpu(), shift.cpu(), (block.T @ block).cpu())

    def merge(self, part: "FeatureStats") -> None:
        """Add the features of other statistics, which do not change. Raises ValueError if F differs."""
        self._fit(part.num_features)
        if part.count > 0:
            self._pool(part.count, part._origin, part._shift, part._scatter)

    def without(self, part: "FeatureStats") -> "FeatureStats":
        """Return the statistics of the features that are not in a part of these; neither object changes.

        Raises ValueError if F differs, or if the part has as many features or more.
        """
        self._fit(part.num_features)
        if part.count >= self.count:
            raise ValueError(f"the part has {part.count} of {self.count} features; expected fewer")
        rest = FeatureStats(self.num_features)
        rest.count = self.count - part.count
        apart = (part._origin - self._origin) + (part._shift - self._shift)  # of the means of the part and of all
        rest._origin = self._origin.clone()
        rest._shift = self._shift - apart * (part.count / rest.count)
        rest._scatter = self._scatter - part._scatter
        rest._scatter.addr_(apart, apart, alpha=-part.count * self.count / rest.count)
        return rest

    def _pool(self, count: int, origin: Tensor, shift: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self.count, self._origin, self._shift = count, origin.clone(), shift.clone()
            self._scatter.copy_(scatter)
            return
        apart = (origin - self._origin) + (shift - self._shift)  # of the means
        total = self.count + count
        self._scatter += scatter
        self._scatter.addr_(apart, apart, alpha=self.count * count / total)
        self._shift = self._shift + apart * (count / total)
        self.count = total

    def _fit(self, num_features: int) -> None:
        if num_features != self.num_features:
            raise ValueError(f"features have {num_features} dimensions; expected {self.num_features} like those before")

    def _need(self, count: int) -> None:
        if self.count < count:
            raise ValueError(f"there are {self.count} features; expected at least {count}")
