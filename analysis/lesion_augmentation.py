"""Change images of skin lesions at random, as another photograph of the same lesion might differ.

A dermatoscope has no preferred direction, so lesions are mirrored and turned by any angle; it is held nearer or
farther, so they are scaled a little; lamps and cameras differ, so brightness, contrast and colors change a little. What
would change a diagnosis is left out: colors far from those of skin (blue-gray areas and red ones mean different
things), elastic deformation (the border and its symmetry are signs), and erased patches (so are small structures).

Parameters are drawn on the CPU, so that they are equal on all devices; images are changed where they are.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

_GRAY_AXIS = torch.full((3, 3), 1 / 3)  # projects a color on the gray of its mean
# Turns colors about the gray axis by a right angle: the cross product with its unit vector (Rodrigues' formula).
_ACROSS = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)


@dataclass(frozen=True, kw_only=True)
class AugmentationStrengths:
    """How much images are changed; 0, 1 for `scale`, and False change nothing."""

    flip: bool = True  # left and right exchanged in half of the images, up and down in half
    rotation: float = 180  # largest angle in degrees, both ways
    scale: float = 1.25  # largest factor, and 1 / scale the smallest; its logarithm is uniform
    brightness: float = 0.2  # largest change of the factor 1
    contrast: float = 0.2  # of the distances to the image's mean gray
    saturation: float = 0.2  # of the distances to each pixel's own gray
    hue: float = 0.02  # largest turn of colors about the gray axis, as a share of the whole circle


def augment(images: Tensor, generator: torch.Generator,
            strengths: AugmentationStrengths = AugmentationStrengths()) -> Tensor:
    """Return changed images, each in its own way: float32 [N, 3, H, W] in [0, 255].

    images:     float32 [N, 3, H, W] in [0, 255], on any device
    generator:  of the CPU

    What lies beyond the border is a reflection at it. LIMIT: bilinear interpolation blurs a little, except at multiples
    of 90 degrees without scaling.
    """
    count = len(images)
    draws = 2 * torch.rand(9, count, generator=generator, dtype=torch.float64) - 1  # in [-1, 1)
    flips, (angle, scale, brightness, contrast, saturation, hue) = draws[:2].sign(), draws[3:]
    if not strengths.flip:
        flips = torch.ones_like(flips)
    changed = _resample(images, flips, angle * math.radians(strengths.rotation), strengths.scale ** scale)
    return _recolor(changed, 1 + brightness * strengths.brightness, 1 + contrast * strengths.contrast,
                    1 + saturation * strengths.saturation, 2 * math.pi * hue * strengths.hue)


def _resample(images: Tensor, flips: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
    """Mirror, turn and enlarge each image about its center.

    flips: [2, N], -1 mirrors x or y;  angle: [N] in radians;  scale: [N]
    """
    height, width = images.shape[2:]
    cos, sin, zero = torch.cos(angle) / scale, torch.sin(angle) / scale, torch.zeros_like(angle)
    x, y = flips
    # From the coordinates of the result, -1 to 1 along each side, to those of the source.
    rows = [torch.stack([x * cos, x * sin * (height / width), zero], dim=1),
            torch.stack([-y * sin * (width / height), y * cos, zero], dim=1)]
    source = torch.stack(rows, dim=1).to(images)
    grid = affine_grid(source, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _recolor(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Change the colors of each image by one affine map: brightness, then contrast, saturation and hue. All are [N].

    With P the projection on the gray axis, the map is x -> b c (P + s R(h) (1 - P)) x + (1 - c) b mean(x): gray stays
    gray, and neither contrast nor saturation nor hue changes the mean of an image.
    """
    mean = images.mean(dim=(1, 2, 3))
    kept, turned = saturation * torch.cos(hue), saturation * torch.sin(hue)
    matrix = (_GRAY_AXIS.double() + kept[:, None, None] * (torch.eye(3) - _GRAY_AXIS)
              + turned[:, None, None] * _ACROSS) * (brightness * contrast)[:, None, None]
    shift = ((1 - contrast) * brightness).to(images) * mean
    colors = torch.einsum("nij,njhw->nihw", matrix.to(images), images)
    return (colors + shift[:, None, None, None]).clamp(0, 255)
