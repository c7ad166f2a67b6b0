"""The Frechet distance between two Gaussians (FID), and the mean and covariance of features that it compares."""

import numpy as np
import torch
from torch import Tensor

from metrics.feature_tensors import as_features

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
    mu1, cov1 = _checked(mu1, cov1, "1")
    mu2, cov2 = _checked(mu2, cov2, "2")
    if len(mu1) != len(mu2):
        raise ValueError(f"mu1 has {len(mu1)} dimensions, mu2 {len(mu2)}; expected equal numbers: use one detector")
    root_trace = torch.linalg.svdvals(_factor(cov1, "cov1").T @ _factor(cov2, "cov2")).sum()
    means = (mu1 - mu2).square().sum()
    spreads = cov1.trace() + cov2.trace() - 2 * root_trace
    return (means + spreads).clamp(min=0).item()


def _checked(mu: np.ndarray, cov: np.ndarray, number: str) -> tuple[Tensor, Tensor]:
    mu, cov = (torch.from_numpy(np.array(x, dtype=np.float64)) for x in (mu, cov))
    if mu.ndim != 1 or len(mu) == 0:
        raise ValueError(f"mu{number} is {list(mu.shape)}; expected [F]")
    if cov.shape != (len(mu), len(mu)):
        raise ValueError(f"cov{number} is {list(cov.shape)}; expected {[len(mu)] * 2} like mu{number}")
    if not (mu.isfinite().all() and cov.isfinite().all()):
        raise ValueError(f"mu{number} or cov{number} has values that are not finite; expected none")
    if (cov - cov.T).abs().max() > _ASYMMETRY * cov.abs().max():
        raise ValueError(f"cov{number} is not symmetric; expected a covariance")
    return mu, cov


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


class FeatureStats:
    """Number, mean and covariance of features [N, F], accumulated block by block in float64.

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

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        """Return the statistics of both sets of features together; neither object changes.

        Raises ValueError if F differs.
        """
        self._fit(other.num_features)
        both = FeatureStats(self.num_features)
        for part in (self, other):
            both._pool(part.count, part._origin, part._shift, part._scatter)
        return both

    def _pool(self, count: int, origin: Tensor, shift: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
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
