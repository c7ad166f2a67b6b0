"""The Frechet distance of two Gaussians, from symmetric factors of their covariances."""

import numpy as np
import torch
from torch import Tensor

_ASYMMETRY = 1e-6  # of the largest entry: covariances computed in float32 pass, mistakes do not
_NEGATIVE = 1e-6  # of the largest eigenvalue, likewise


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """Return ||mu1 - mu2||^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), in float64 (Heusel et al. 2017, eq. 6).

    mu:   [F], floating point
    cov:  [F, F], symmetric and positive semidefinite; of any rank, as from fewer images than features

    With cov1 = A A^T and cov2 = B B^T the trace of the root is the sum of the singular values of A^T B. Unlike the
    eigenvalues of cov1 cov2 these are never negative or complex, and small ones keep an absolute error of rounding,
    not of its root. Rounding can bring the sum below 0 by about F * 1e-16 * (tr cov1 + tr cov2): 0 is returned then.

    Raises ValueError when a shape does not fit, a value is not finite, or cov is no covariance.
    """
    mu1, cov1 = _checked(mu1, cov1, "1")
    mu2, cov2 = _checked(mu2, cov2, "2")
    if len(mu1) != len(mu2):
        raise ValueError(f"mu1 has {len(mu1)} dimensions, mu2 {len(mu2)}; expected as many: use one detector")
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
    noise = len(cov) * torch.finfo(cov.dtype).eps
    lower, failed = torch.linalg.cholesky_ex(cov)
    if not failed:
        # Its smallest pivot can be far above the smallest eigenvalue; 1 / tr(cov^-1) is not.
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(cov), dtype=cov.dtype), upper=False)
        if inverse.square().sum() * noise * torch.linalg.matrix_norm(cov) < 1:
            return lower
    # Singular or nearly so. Eigenvalues below the noise are rounding of 0; their roots would be far above it.
    values, vectors = torch.linalg.eigh(cov)
    largest = values.abs().max()
    if values.min() < -_NEGATIVE * largest:
        raise ValueError(f"{name} has the eigenvalue {values.min():.3g} beside {largest:.3g}; expected none below 0")
    kept = values > noise * largest
    return vectors[:, kept] * values[kept].sqrt()
