"""Number, mean and covariance of features, in float64 and mergeable without loss."""

import warnings

import numpy as np
import torch
from torch import Tensor

_BLOCK = 4096  # features taken at a time: bounds the memory of their float64 copy


class FeatureStats:
    """Moments of features [N, F] that arrive in any number of pieces.

    Deviations are pooled as in Chan, Golub and LeVeque (1979). All sums are of differences from one of the features
    (`_origin`): means far above the spread then cost no digits. Memory: two float64 [F, F].
    """

    def __init__(self, num_features: int):
        self.count = 0
        self._origin = torch.zeros(num_features, dtype=torch.float64)
        self._shift = torch.zeros(num_features, dtype=torch.float64)  # mean - origin
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features: np.ndarray | Tensor) -> "FeatureStats":
        """Return the moments of features [N, F], floating point.

        Raises ValueError when they are something else, not finite, or none.
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

    def covariance(self, ddof: int = 0) -> np.ndarray:
        """Return float64 [F, F], divided by count - ddof: 0 as in StyleGAN2-ADA, 1 as in torch-fidelity.

        Raises ValueError when there are no more than ddof features.
        """
        self._need(ddof + 1)
        return (self._scatter / (self.count - ddof)).numpy()

    def add(self, features: np.ndarray | Tensor) -> None:
        """Take features [N, F] into account, floating point, of any device; N may be 0.

        Raises ValueError when they are something else, not finite, or of another F.
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
        """Return the moments of both sets of features together; these two stay as they are.

        Raises ValueError when the other has another F.
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


def as_features(features: np.ndarray | Tensor, name: str = "features", *, at_least: int = 0) -> Tensor:
    """Return features as a tensor [N, F], floating point, where they are and without copying.

    name:      what they are, for the message
    at_least:  the least N

    Raises ValueError when they have another shape or type, are not finite, or are too few.
    """
    if isinstance(features, np.ndarray):
        with warnings.catch_warnings():
            # Arrays mapped from a file are read-only, and nothing here writes into features.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            features = torch.from_numpy(np.ascontiguousarray(features))
    features = features.detach()
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} are {list(features.shape)}; expected [N, F]")
    if not features.is_floating_point():
        raise ValueError(f"{name} are {features.dtype}; expected floating point")
    if len(features) < at_least:
        raise ValueError(f"{name} are of {len(features)} images; expected at least {at_least}")
    finite = sum(int(block.isfinite().sum()) for block in features.split(_BLOCK))
    if finite < features.numel():
        raise ValueError(f"{name} have {features.numel() - finite} values that are not finite, "
                         f"of {features.numel()}; expected none")
    return features


def as_feature_pair(real: np.ndarray | Tensor, fake: np.ndarray | Tensor, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Return real [N, F] and fake [M, F] as `as_features` does, on the device of the real ones.

    Raises ValueError as `as_features` does, and when F differs.
    """
    real = as_features(real, "real features", at_least=at_least)
    fake = as_features(fake, "fake features", at_least=at_least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, fake ones {fake.shape[1]}; expected as many: "
                         "take both from one detector")
    return real, fake.to(real.device)
