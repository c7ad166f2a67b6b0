"""Change the colours of images: brightness, contrast, luma flip, hue, saturation.

Seen from the grey axis, the line of equal red, green and blue, all five are simple: brightness moves along the axis,
the luma flip mirrors along it, hue turns about it, saturation scales away from it, and contrast scales everything.
Applied one after the other they are this one affine map of a colour, with `mean` its grey part:

    contrast * (flip * (mean + brightness) + saturation * turn(colour - mean))
"""

import math
from dataclasses import dataclass

from torch import Tensor

from training.augmentations.draws import Draws
from training.augmentations.strengths import AugmentStrengths


@dataclass(frozen=True)
class ColorMap:
    """The five changes of N images, each [N, 1, 1, 1]."""

    brightness: Tensor
    contrast: Tensor  # factor
    flip: Tensor  # 1 or -1
    hue: Tensor  # radians
    saturation: Tensor  # factor


def draw_color_map(strengths: AugmentStrengths, draws: Draws, p: Tensor) -> ColorMap:
    """Turn the draws into one map an image. p: scalar"""
    changes = ColorMap(
        brightness=draws.normal("brightness", strengths.brightness * p) * strengths.brightness_std,
        contrast=(draws.normal("contrast", strengths.contrast * p) * strengths.contrast_std).exp2(),
        flip=1 - 2 * draws.choice("lumaflip", strengths.lumaflip * p, 2),
        hue=draws.symmetric("hue", strengths.hue * p) * (math.pi * strengths.hue_max),
        saturation=(draws.normal("saturation", strengths.saturation * p) * strengths.saturation_std).exp2())
    return ColorMap(**{name: value[:, :, None, None] for name, value in vars(changes).items()})


def recolor(images: Tensor, changes: ColorMap) -> Tensor:
    """Apply the changes; an image without any comes back bit for bit.

    images: [N, C, H, W] float32 or float64; 3 channels, or 1, which have no hue and no saturation

    Raises ValueError for another number of channels.
    """
    along = changes.contrast * changes.flip
    shift = along * changes.brightness
    if images.shape[1] == 1:
        return images * along + shift
    if images.shape[1] != 3:
        raise ValueError(f"images have {images.shape[1]} channels; colour augmentation expects 1 or 3: "
                         "set its strengths to 0")
    across = changes.contrast * changes.saturation
    kept, turned = across * changes.hue.cos(), across * changes.hue.sin()
    mean = images.mean(1, keepdim=True)
    # Cross product with the unit vector of the axis (Rodrigues' rotation formula).
    quarter_turn = (images.roll(1, dims=1) - images.roll(-1, dims=1)) / math.sqrt(3)
    return images * kept + mean * (along - kept) + quarter_turn * turned + shift
