"""Name every setting of the augmentation pipeline and check its value."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real

import numpy as np
import torch
from torch import Tensor

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


# MERGED from training.augmentations.device
# Bring what was decided on the host to the images.


def on_device_of(images: Tensor, values: np.ndarray) -> Tensor:
    """Return `values`, floating point ones in the dtype of the images, on their device, without waiting for it."""
    dtype = images.dtype if values.dtype.kind == "f" else None
    return torch.from_numpy(values).to(images.device, dtype, non_blocking=True)


# MERGED from training.augmentations.draws
# Draw the random numbers of one augmented batch.
#
# Every number that decides about an image is drawn up front, in tables with one row an image, whatever is switched on:
# neither a strength nor p ever shifts the other draws. The tables are on the host, where what is decided about a few
# images costs less than a device takes to start, and where it can be looked at without waiting for the device.


_TWO_ROTATIONS = 2  # before and after the anisotropic scaling
# Numbers an image needs of each kind.
_GATES = {"xflip": 1, "rotate90": 1, "xint": 1, "scale": 1, "rotate": _TWO_ROTATIONS, "aniso": 1, "xfrac": 1,
          "brightness": 1, "contrast": 1, "lumaflip": 1, "hue": 1, "saturation": 1, "imgfilter": BANDS, "noise": 1,
          "cutout": 1}
_UNIFORM = {"xflip": 1, "rotate90": 1, "xint": 2, "rotate": _TWO_ROTATIONS, "lumaflip": 1, "hue": 1, "cutout": 2}
_NORMAL = {"scale": 1, "aniso": 1, "xfrac": 2, "brightness": 1, "contrast": 1, "saturation": 1, "imgfilter": BANDS}
_HALF_NORMAL = {"noise": 1}


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The numbers of N images, each [N, k] float64 under the name of its augmentation.

    An augmentation takes place where its gate, in [0, 1), lies below its probability. Each method returns the drawn
    amount there and 0 elsewhere; `probability` is a number, or an array that broadcasts against [N, k].
    """

    gates: dict[str, np.ndarray]
    uniforms: dict[str, np.ndarray]  # in [0, 1)
    normals: dict[str, np.ndarray]
    half_normals: dict[str, np.ndarray]  # absolute values of normal ones

    def fires(self, name: str, probability: float | np.ndarray) -> np.ndarray:
        return self.gates[name] < probability

    def choice(self, name: str, probability: float, count: int) -> np.ndarray:
        """Draw one of 0, 1, ..., count - 1."""
        return self._gated(name, probability, np.floor(self.uniforms[name] * count))

    def symmetric(self, name: str, probability: float) -> np.ndarray:
        """Draw uniformly from [-1, 1)."""
        return self._gated(name, probability, self.uniforms[name] * 2 - 1)

    def normal(self, name: str, probability: float | np.ndarray) -> np.ndarray:
        return self._gated(name, probability, self.normals[name])

    def half_normal(self, name: str, probability: float) -> np.ndarray:
        return self._gated(name, probability, self.half_normals[name])

    def _gated(self, name: str, probability: float | np.ndarray, amount: np.ndarray) -> np.ndarray:
        return np.where(self.fires(name, probability), amount, 0)


def draw_random(count: int, generator: torch.Generator | None) -> Draws:
    """Draw for `count` images. generator: None takes PyTorch's own, of the host; one of another device is waited for

    The draws themselves are float32, as those of an image are.
    """
    source = "cpu" if generator is None else generator.device

    def table(sampler, widths):
        drawn = sampler(count, sum(widths.values()), dtype=torch.float32, device=source, generator=generator)
        return _named_columns(drawn.cpu().numpy().astype(np.float64), widths)

    return Draws(gates=table(torch.rand, _GATES), uniforms=table(torch.rand, _UNIFORM),
                 normals=table(torch.randn, _NORMAL),
                 half_normals={name: abs(value) for name, value in table(torch.randn, _HALF_NORMAL).items()})


def draw_quantile(count: int, quantile: float) -> Draws:
    """Replace every draw of `count` images by one quantile of its distribution, and let every gate fire.

    As in the reference vectors, erfinv stands for the normal quantile without its factor sqrt(2), and the rotation
    after the anisotropic scaling is none. Raises ValueError unless 0 < quantile < 1.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"debug_percentile is {quantile!r}; expected a number between 0 and 1, both excluded")

    def table(value, widths):
        return _named_columns(np.full([count, sum(widths.values())], value), widths)

    def erfinv(x):
        return torch.erfinv(torch.tensor(x, dtype=torch.float64)).item()

    draws = Draws(gates=table(0.0, _GATES), uniforms=table(quantile, _UNIFORM),
                  normals=table(erfinv(2 * quantile - 1), _NORMAL), half_normals=table(erfinv(quantile), _HALF_NORMAL))
    draws.uniforms["rotate"][:, 1] = 0.5
    return draws


def rotation_probability(strength: float, p: float) -> float:
    """Return the probability of each of the two rotations for which either happens with strength * p."""
    return 1 - math.sqrt(max(1 - strength * p, 0))


def _named_columns(table: np.ndarray, widths: dict[str, int]) -> dict[str, np.ndarray]:
    ends = np.cumsum(list(widths.values()))
    return dict(zip(widths, np.split(table, ends[:-1], axis=1)))
