"""Change the colours of images: brightness, contrast, luma flip, hue, saturation.

Seen from the grey axis, the line of equal red, green and blue, all five are simple: brightness moves along the axis,
the luma flip mirrors along it, hue turns about it, saturation scales away from it, and contrast scales everything.
Applied one after the other they are this one affine map of a colour, with `mean` its grey part:

    contrast * (flip * (mean + brightness) + saturation * turn(colour - mean))

The map favours none of the three: red becomes of red, green and blue what green becomes of green, blue and red. So it
takes three factors, of a channel itself and of the two after it, and one shift.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.augmentations.device import on_device_of
from training.augmentations.draws import Draws
from training.augmentations.strengths import AugmentStrengths


@dataclass(frozen=True)
class ColorMap:
    """The five changes of N images, each [N]."""

    brightness: np.ndarray
    contrast: np.ndarray  # factor
    flip: np.ndarray  # 1 or -1
    hue: np.ndarray  # radians
    saturation: np.ndarray  # factor


def draw_color_map(strengths: AugmentStrengths, draws: Draws, p: float) -> ColorMap:
    """Turn the draws into one map an image."""
    changes = ColorMap(
        brightness=draws.normal("brightness", strengths.brightness * p) * strengths.brightness_std,
        contrast=np.exp2(draws.normal("contrast", strengths.contrast * p) * strengths.contrast_std),
        flip=1 - 2 * draws.choice("lumaflip", strengths.lumaflip * p, 2),
        hue=draws.symmetric("hue", strengths.hue * p) * (math.pi * strengths.hue_max),
        saturation=np.exp2(draws.normal("saturation", strengths.saturation * p) * strengths.saturation_std))
    return ColorMap(**{name: value[:, 0] for name, value in vars(changes).items()})


def recolor(images: Tensor, changes: ColorMap) -> Tensor:
    """Apply the changes; an image without any comes back bit for bit.

    images: [N, C, H, W] float32 or float64; 3 channels, or 1, which have no hue and no saturation

    Raises ValueError for another number of channels.
    """
    along = changes.contrast * changes.flip
    shift = along * changes.brightness
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images have {images.shape[1]} channels; colour augmentation expects 1 or 3: "
                         "set its strengths to 0")
    if images.shape[1] == 1:
        factors = [along]
    else:
        across = changes.contrast * changes.saturation
        kept = across * np.cos(changes.hue)
        grey = (along - kept) / 3  # of the mean, a third of each channel
        # Cross product with the unit vector of the axis (Rodrigues' rotation formula).
        turned = across * np.sin(changes.hue) / math.sqrt(3)
        factors = [kept + grey, grey - turned, grey + turned]
    if np.all(factors[0] == 1) and not np.any([*factors[1:], shift]):
        return images
    *factors, result = on_device_of(images, np.stack([*factors, shift])[:, :, None, None, None]).unbind()
    for distance, factor in enumerate(factors):
        following = images if distance == 0 else images.roll(-distance, dims=1)
        result = torch.addcmul(result, following, factor)
    return result
