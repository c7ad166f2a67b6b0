"""Amplify and weaken frequency bands of images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.augmentations.draws import Draws
from training.augmentations.padding import reflect_pad
from training.augmentations.strengths import AugmentStrengths

# Share of each band in the power of natural images, of spectrum 1/f (ADA paper, appendix B.2), low frequencies first.
_BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)


def draw_band_gains(strengths: AugmentStrengths, draws: Draws, p: Tensor) -> Tensor:
    """Draw the amplification of each band and keep the power of a typical image. p: scalar -> [N, 4]

    Band after band is amplified by t and the whole then divided by the root of the power that a typical image would
    have; the divisors are multiplied up. Exactly 1 where no band is changed.
    """
    like = {"dtype": p.dtype, "device": p.device}
    probability = torch.tensor([band * strengths.imgfilter for band in strengths.imgfilter_bands], **like) * p
    factors = (draws.normal("imgfilter", probability) * strengths.imgfilter_std).exp2()
    power = 1 + torch.tensor(_BAND_POWER, dtype=factors.dtype, device=p.device) * (factors.square() - 1)
    return factors / power.prod(1, keepdim=True).sqrt()


def filter_bands(images: Tensor, gains: Tensor, bank: Tensor) -> Tensor:
    """Filter rows and columns of each image with its own combination of the bank's filters.

    images: [N, C, H, W] float32 or float64, H and W at least 2
    gains:  [N, B];  bank: [B, k], k odd, its rows adding up to the identity

    Images whose gains are all 1 come back bit for bit.
    """
    count, channels, height = images.shape[:3]
    taps = (gains[:, :, None] * bank).sum(1)  # [N, k]; no matmul, it may round to TF32
    taps = taps.repeat_interleave(channels, dim=0)[:, None, None]  # [N C, 1, 1, k]
    reach = bank.shape[1] // 2
    rows = reflect_pad(images, reach, reach, reach, reach).reshape(1, count * channels, height + 2 * reach, -1)
    filtered = F.conv2d(F.conv2d(rows, taps, groups=count * channels), taps.mT, groups=count * channels)
    changed = (gains != 1).any(1)[:, None, None, None]
    return torch.where(changed, filtered.reshape(images.shape), images)
