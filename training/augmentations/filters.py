"""Amplify and weaken frequency bands of images."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.augmentations.device import on_device_of
from training.augmentations.draws import Draws
from training.augmentations.padding import reflect_pad
from training.augmentations.strengths import AugmentStrengths

# Share of each band in the power of natural images, of spectrum 1/f (ADA paper, appendix B.2), low frequencies first.
_BAND_POWER = np.array([10, 1, 1, 1]) / 13


def draw_band_gains(strengths: AugmentStrengths, draws: Draws, p: float) -> np.ndarray:
    """Draw the amplification of each band and keep the power of a typical image. -> [N, 4]

    Band after band is amplified by t and the whole then divided by the root of the power that a typical image would
    have; the divisors are multiplied up. Exactly 1 where no band is changed.
    """
    probability = np.array(strengths.imgfilter_bands) * strengths.imgfilter * p
    factors = np.exp2(draws.normal("imgfilter", probability) * strengths.imgfilter_std)
    power = 1 + _BAND_POWER * (np.square(factors) - 1)
    return factors / np.sqrt(power.prod(axis=1, keepdims=True))


def filter_bands(images: Tensor, gains: np.ndarray, bank: Tensor) -> Tensor:
    """Filter rows and columns of each image with its own combination of the bank's filters.

    images: [N, C, H, W] float32 or float64, H and W at least 2
    gains:  [N, B];  bank: [B, k], k odd, its rows adding up to the identity

    Images whose gains are all 1 come back bit for bit.
    """
    changed = (gains != 1).any(axis=1)
    if not changed.any():
        return images
    count, channels, height = images.shape[:3]
    taps = (on_device_of(images, gains)[:, :, None] * bank).sum(1)  # [N, k]; no matmul, it may round to TF32
    taps = taps.repeat_interleave(channels, dim=0)[:, None, None]  # [N C, 1, 1, k]
    reach = bank.shape[1] // 2
    rows = reflect_pad(images, reach, reach, reach, reach).reshape(1, count * channels, height + 2 * reach, -1)
    filtered = F.conv2d(F.conv2d(rows, taps, groups=count * channels), taps.mT, groups=count * channels)
    return torch.where(on_device_of(images, changed[:, None, None, None]), filtered.reshape(images.shape), images)
