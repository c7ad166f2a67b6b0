"""Name every setting of the augmentation pipeline and check its value."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real

BANDS = 4  # of the image filter


@dataclass(frozen=True, kw_only=True)
class AugmentStrengths:
    """What the pipeline may do and how far.

    A strength multiplies the overall probability p: 0 switches the augmentation off, 1 applies it with probability p.
    Spreads and ranges are those of the ADA paper (Karras et al. 2020, appendix B); `_std` of a factor is in octaves.
    """

    # Copies of pixels
    xflip: float = 0
    rotate90: float = 0
    xint: float = 0
    xint_max: float = 0.125  # translation, of width and height
    # General geometry
    scale: float = 0
    rotate: float = 0
    aniso: float = 0
    xfrac: float = 0
    scale_std: float = 0.2
    rotate_max: float = 1  # of half a turn
    aniso_std: float = 0.2
    xfrac_std: float = 0.125  # translation, of width and height
    # Colour
    brightness: float = 0
    contrast: float = 0
    lumaflip: float = 0
    hue: float = 0
    saturation: float = 0
    brightness_std: float = 0.2
    contrast_std: float = 0.5
    hue_max: float = 1  # of half a turn
    saturation_std: float = 1
    # Frequency bands
    imgfilter: float = 0
    imgfilter_bands: Sequence[float] = (1, 1, 1, 1)  # strength of each band, from low to high frequencies
    imgfilter_std: float = 1
    # Corruption
    noise: float = 0
    cutout: float = 0
    noise_std: float = 0.1
    cutout_size: float = 0.5  # of width and height

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "imgfilter_bands":
                _check_not_negative(field.name, value)
                continue
            if not isinstance(value, Sequence) or len(value) != BANDS:
                raise ValueError(f"augmentation setting imgfilter_bands is {value!r}; expected {BANDS} strengths")
            for band in value:
                _check_not_negative("imgfilter_bands", band)

    @property
    def uses_geometry(self) -> bool:
        return any([self.xflip, self.rotate90, self.xint, self.scale, self.rotate, self.aniso, self.xfrac])

    @property
    def uses_color(self) -> bool:
        return any([self.brightness, self.contrast, self.lumaflip, self.hue, self.saturation])

    @property
    def uses_filter(self) -> bool:
        return self.imgfilter > 0 and any(self.imgfilter_bands)


def parse_strengths(given: Mapping[str, float]) -> AugmentStrengths:
    """Build the settings from names and values. Raises ValueError for an unknown name or a value out of range."""
    known = [field.name for field in fields(AugmentStrengths)]
    for name in given:
        if name not in known:
            raise ValueError(f"augmentation setting {name!r} is unknown; expected one of {', '.join(known)}")
    return AugmentStrengths(**given)


def _check_not_negative(name: str, value) -> None:
    if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"augmentation setting {name} is {value!r}; expected a finite number >= 0")
