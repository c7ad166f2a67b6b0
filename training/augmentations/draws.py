"""The augmentations by name and strength, and the random numbers that decide how each image is augmented.

The names of the augmentations, their groups and ranges are defined only here: presets, --augpipe and the settings of a
run derive from them. They are those of the ADA paper: Karras et al. 2020, "Training Generative Adversarial Networks
with Limited Data", appendix B.

All random numbers are drawn in advance, in tables with one row per image, including those of augmentations that are
off: changing a strength or p does not shift the other draws. The tables are on the host, where computing with a few
numbers is faster than launching kernels, and where they can be read without synchronizing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real

import numpy as np
import torch
from torch import Tensor

BANDS = 4  # of the image filter


def _strength_in(group: str) -> float:
    return field(default=0, metadata={"group": group})


@dataclass(frozen=True, kw_only=True)
class AugmentStrengths:
    """Strengths and ranges of the augmentations, in the order in which they are applied.

    A strength multiplies the overall probability p: 0 switches the augmentation off, 1 applies it with probability p.
    The `_std` of a factor is in octaves.
    """

    # Pixel blitting
    xflip: float = _strength_in("blit")
    rotate90: float = _strength_in("blit")
    xint: float = _strength_in("blit")
    xint_max: float = 0.125  # translation, of width and height
    # General geometry
    scale: float = _strength_in("geom")
    rotate: float = _strength_in("geom")
    aniso: float = _strength_in("geom")
    xfrac: float = _strength_in("geom")
    scale_std: float = 0.2
    rotate_max: float = 1  # of half a turn
    aniso_std: float = 0.2
    xfrac_std: float = 0.125  # translation, of width and height
    # Color
    brightness: float = _strength_in("color")
    contrast: float = _strength_in("color")
    lumaflip: float = _strength_in("color")
    hue: float = _strength_in("color")
    saturation: float = _strength_in("color")
    brightness_std: float = 0.2
    contrast_std: float = 0.5
    hue_max: float = 1  # of half a turn
    saturation_std: float = 1
    # Frequency bands
    imgfilter: float = _strength_in("filter")
    imgfilter_bands: Sequence[float] = (1, 1, 1, 1)  # strength of each band, from low to high frequencies
    imgfilter_std: float = 1
    # Corruption
    noise: float = _strength_in("noise")
    cutout: float = _strength_in("cutout")
    noise_std: float = 0.1
    cutout_size: float = 0.5  # of width and height

    def __post_init__(self):
        for each in fields(self):
            values = [getattr(self, each.name)]
            if each.name == "imgfilter_bands":
                values = self.imgfilter_bands
                if not isinstance(values, Sequence) or len(values) != BANDS:
                    raise ValueError(f"augmentation setting imgfilter_bands is {values!r}; expected {BANDS} strengths")
            for value in values:
                if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
                    raise ValueError(f"augmentation setting {each.name} is {value!r}; expected a finite number >= 0")

    def uses(self, *groups: str) -> bool:
        """Tell whether an augmentation of these groups is on."""
        return any(getattr(self, name) for group in groups for name in AUGMENT_GROUPS[group])


def _by_group() -> dict[str, tuple[str, ...]]:
    groups: dict[str, tuple[str, ...]] = {}
    for each in fields(AugmentStrengths):
        if "group" in each.metadata:
            groups[each.metadata["group"]] = (*groups.get(each.metadata["group"], ()), each.name)
    return groups


# Group -> names of its augmentations. Groups and names are in the order in which the pipeline applies them.
AUGMENT_GROUPS = _by_group()
AUGMENTATIONS = tuple(name for names in AUGMENT_GROUPS.values() for name in names)


def parse_strengths(given: Mapping[str, float]) -> AugmentStrengths:
    """Build the settings from names and values. Raises ValueError for an unknown name or a value out of range."""
    known = [each.name for each in fields(AugmentStrengths)]
    for name in given:
        if name not in known:
            raise ValueError(f"augmentation setting {name!r} is unknown; expected one of {', '.join(known)}")
    return AugmentStrengths(**given)


_TWO_ROTATIONS = 2  # before and after the anisotropic scaling
# Numbers of each kind per image; they are drawn in this order of columns, so changing it changes what a seed gives.
_GATES = {**dict.fromkeys(AUGMENTATIONS, 1), "rotate": _TWO_ROTATIONS, "imgfilter": BANDS}
_UNIFORM = {"xflip": 1, "rotate90": 1, "xint": 2, "rotate": _TWO_ROTATIONS, "lumaflip": 1, "hue": 1, "cutout": 2}
_NORMAL = {"scale": 1, "aniso": 1, "xfrac": 2, "brightness": 1, "contrast": 1, "saturation": 1, "imgfilter": BANDS}
_HALF_NORMAL = {"noise": 1}


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The numbers of N images, each [N, k] float64 under the name of its augmentation.

    An augmentation is applied if its gate, in [0, 1), is below its probability. Each method returns the drawn amount if
    so and 0 otherwise; `probability` is a number, or an array that broadcasts against [N, k].
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
    """Draw the numbers of `count` images, in float32.

    generator:  None takes PyTorch's own on the host; one on another device has to be synchronized with
    """
    source = "cpu" if generator is None else generator.device

    def table(sampler, widths):
        drawn = sampler(count, sum(widths.values()), dtype=torch.float32, device=source, generator=generator)
        return _named_columns(drawn.cpu().numpy().astype(np.float64), widths)

    return Draws(gates=table(torch.rand, _GATES), uniforms=table(torch.rand, _UNIFORM),
                 normals=table(torch.randn, _NORMAL),
                 half_normals={name: abs(value) for name, value in table(torch.randn, _HALF_NORMAL).items()})


def draw_quantile(count: int, quantile: float) -> Draws:
    """Replace every draw of `count` images by a quantile of its distribution, and apply every augmentation.

    As in the reference vectors, erfinv replaces the normal quantile, without its factor sqrt(2), and there is no
    rotation after the anisotropic scaling. Raises ValueError unless 0 < quantile < 1.
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
    """Return 1 - sqrt(1 - strength * p): at least one of two rotations then has probability strength * p (B.1)."""
    return 1 - math.sqrt(max(1 - strength * p, 0))


def _named_columns(table: np.ndarray, widths: dict[str, int]) -> dict[str, np.ndarray]:
    ends = np.cumsum(list(widths.values()))
    return dict(zip(widths, np.split(table, ends[:-1], axis=1)))


def on_device_of(images: Tensor, values: np.ndarray) -> Tensor:
    """Return `values` on the images' device, floating point ones in their dtype, without synchronizing."""
    dtype = images.dtype if values.dtype.kind == "f" else None
    return torch.from_numpy(values).to(images.device, dtype, non_blocking=True)
