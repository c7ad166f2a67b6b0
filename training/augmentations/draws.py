"""Draw the random numbers of one augmented batch.

Every number that decides about an image is drawn up front, in tables with one row an image, whatever is switched on:
neither a strength nor p ever shifts the other draws.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.augmentations.strengths import BANDS

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
    """The numbers of N images, each [N, k] under the name of its augmentation.

    An augmentation takes place where its gate, in [0, 1), lies below its probability. Each method returns the drawn
    amount there and 0 elsewhere; `probability` is a tensor that broadcasts against [N, k].
    """

    gates: dict[str, Tensor]
    uniforms: dict[str, Tensor]  # in [0, 1)
    normals: dict[str, Tensor]
    half_normals: dict[str, Tensor]  # absolute values of normal ones

    def fires(self, name: str, probability: Tensor) -> Tensor:
        return self.gates[name] < probability

    def choice(self, name: str, probability: Tensor, count: int) -> Tensor:
        """Draw one of 0, 1, ..., count - 1."""
        return self._gated(name, probability, (self.uniforms[name] * count).floor())

    def symmetric(self, name: str, probability: Tensor) -> Tensor:
        """Draw uniformly from [-1, 1)."""
        return self._gated(name, probability, self.uniforms[name] * 2 - 1)

    def normal(self, name: str, probability: Tensor) -> Tensor:
        return self._gated(name, probability, self.normals[name])

    def half_normal(self, name: str, probability: Tensor) -> Tensor:
        return self._gated(name, probability, self.half_normals[name])

    def _gated(self, name: str, probability: Tensor, amount: Tensor) -> Tensor:
        return torch.where(self.fires(name, probability), amount, 0)


def draw_random(count: int, *, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Draws:
    """Draw for `count` images, on the generator's device; the results are `dtype` on `device`.

    The draws themselves are float32 in every precision, so that a batch meets the same augmentations in each.
    """
    source = device if generator is None else generator.device

    def table(sampler, widths):
        drawn = sampler(count, sum(widths.values()), dtype=torch.float32, device=source, generator=generator)
        return _named_columns(drawn.to(device, dtype), widths)

    return Draws(gates=table(torch.rand, _GATES), uniforms=table(torch.rand, _UNIFORM),
                 normals=table(torch.randn, _NORMAL),
                 half_normals={name: value.abs() for name, value in table(torch.randn, _HALF_NORMAL).items()})


def draw_quantile(count: int, quantile: float, *, dtype: torch.dtype, device: torch.device) -> Draws:
    """Replace every draw of `count` images by one quantile of its distribution, and let every gate fire.

    As in the reference vectors, erfinv stands for the normal quantile without its factor sqrt(2), and the rotation
    after the anisotropic scaling is none. Raises ValueError unless 0 < quantile < 1.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"debug_percentile is {quantile!r}; expected a number between 0 and 1, both excluded")

    def table(value, widths):
        return _named_columns(torch.full([count, sum(widths.values())], value, dtype=dtype, device=device), widths)

    def erfinv(x):
        return torch.erfinv(torch.tensor(x, dtype=dtype)).item()

    draws = Draws(gates=table(0.0, _GATES), uniforms=table(quantile, _UNIFORM),
                  normals=table(erfinv(2 * quantile - 1), _NORMAL), half_normals=table(erfinv(quantile), _HALF_NORMAL))
    draws.uniforms["rotate"][:, 1] = 0.5
    return draws


def rotation_probability(strength: float, p: Tensor) -> Tensor:
    """Return the probability of each of the two rotations for which either happens with strength * p."""
    return 1 - (1 - strength * p).clamp(min=0).sqrt()


def _named_columns(table: Tensor, widths: dict[str, int]) -> dict[str, Tensor]:
    return dict(zip(widths, table.split(list(widths.values()), dim=1)))
