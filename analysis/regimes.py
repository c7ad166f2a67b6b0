"""What a classifier is trained on: real images, synthetic ones, or both, and which of them."""

from dataclasses import dataclass

REAL, SYNTHETIC, BOTH, REAL_ON_SYNTHETIC = "real", "synthetic", "real+synthetic", "real-on-synthetic"
REGIMES = (REAL, SYNTHETIC, BOTH, REAL_ON_SYNTHETIC)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The training images of a classifier.

    name:      unique in a study, also in names of files: "real", "real-0.1", "real+synthetic-0.5", ...
    regime:    one of REGIMES but REAL_ON_SYNTHETIC, which tests the classifiers of REAL and trains none
    fraction:  share of the real images in use, chosen by group
    dose:      number of synthetic images as a share of the real ones in use; None = all, or as `fill` needs
    fill:      "balance" = so many that all labels have equally many images; None
    baseline:  name of the condition to compare with; None for a baseline
    """

    name: str
    regime: str
    fraction: float = 1.0
    dose: float | None = None
    fill: str | None = None
    baseline: str | None = None
