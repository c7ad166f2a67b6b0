"""Change the pixels of images: colors (ADA paper, appendix B.1), frequency bands (B.2), noise and cutouts (B.3)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.augmentations.draws import BANDS, AugmentStrengths, Draws, on_device_of
from training.augmentations.geometry import reflect_pad

# Daubechies' least asymmetric orthonormal filters ("symlets") with 2 and 6 vanishing moments; sum sqrt(2).
# I. Daubechies, Ten Lectures on Wavelets, 1992, section 6.4; sym2 has the closed form (1 +- sqrt(3)) / (4 sqrt(2)), ...
SYM2 = tuple((np.array([1, 3, 3, 1]) + np.sqrt(3) * np.array([-1, -1, 1, 1])) / np.sqrt(32))
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
        0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
        -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148)
# Share of each band in the power of natural images, of spectrum 1/f (ADA paper, appendix B.2), low frequencies first.
_BAND_POWER = np.array([10, 1, 1, 1]) / 13


# Colors. Relative to the gray axis, the line of equal red, green and blue, all five changes are simple: brightness
# moves along the axis, the luma flip mirrors along it, hue rotates about it, saturation scales the distance from it,
# and contrast scales everything. Together they are one affine map of a color, with `mean` its gray part:
#
#     contrast * (flip * (mean + brightness) + saturation * rotate(color - mean))
#
# The map treats all channels alike: red depends on red, green and blue as green does on green, blue and red. So it has
# three factors, for a channel itself and for the two after it, and one shift.


@dataclass(frozen=True)
class ColorMap:
    """The five color changes of N images, each [N]."""

    brightness: np.ndarray
    contrast: np.ndarray  # factor
    flip: np.ndarray  # 1 or -1
    hue: np.ndarray  # radians
    saturation: np.ndarray  # factor


def draw_color_map(strengths: AugmentStrengths, draws: Draws, p: float) -> ColorMap:
    """Turn the draws into one map per image."""
    changes = ColorMap(
        brightness=draws.normal("brightness", strengths.brightness * p) * strengths.brightness_std,
        contrast=np.exp2(draws.normal("contrast", strengths.contrast * p) * strengths.contrast_std),
        flip=1 - 2 * draws.choice("lumaflip", strengths.lumaflip * p, 2),
        hue=draws.symmetric("hue", strengths.hue * p) * (math.pi * strengths.hue_max),
        saturation=np.exp2(draws.normal("saturation", strengths.saturation * p) * strengths.saturation_std))
    return ColorMap(**{name: value[:, 0] for name, value in vars(changes).items()})


def recolor(images: Tensor, changes: ColorMap) -> Tensor:
    """Apply the changes; an image without any is returned bit for bit.

    images: [N, C, H, W] float32 or float64; 3 channels, or 1, where hue and saturation do nothing

    Raises ValueError for another number of channels.
    """
    along = changes.contrast * changes.flip
    shift = along * changes.brightness
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images have {images.shape[1]} channels; expected 1 or 3 for color augmentation: "
                         "set its strengths to 0")
    if images.shape[1] == 1:
        factors = [along]
    else:
        across = changes.contrast * changes.saturation
        kept = across * np.cos(changes.hue)
        gray = (along - kept) / 3  # of the mean, a third of each channel
        # Cross product with the unit vector of the axis (Rodrigues' rotation formula).
        turned = across * np.sin(changes.hue) / math.sqrt(3)
        factors = [kept + gray, gray - turned, gray + turned]
    if np.all(factors[0] == 1) and not np.any([*factors[1:], shift]):
        return images
    *factors, result = on_device_of(images, np.stack([*factors, shift])[:, :, None, None, None]).unbind()
    for distance, factor in enumerate(factors):
        following = images if distance == 0 else images.roll(-distance, dims=1)
        result = torch.addcmul(result, following, factor)
    return result


# Frequency bands.


def draw_band_gains(strengths: AugmentStrengths, draws: Draws, p: float) -> np.ndarray:
    """Draw the gain of each band, normalized to keep the power of a typical image. -> [N, 4]

    Each band in turn is multiplied by its factor, and all bands are divided by the square root of the power that a
    typical image then has. Exactly 1 if no band is changed.
    """
    probability = np.array(strengths.imgfilter_bands) * strengths.imgfilter * p
    factors = np.exp2(draws.normal("imgfilter", probability) * strengths.imgfilter_std)
    power = 1 + _BAND_POWER * (np.square(factors) - 1)
    return factors / np.sqrt(power.prod(axis=1, keepdims=True))


def filter_bands(images: Tensor, gains: np.ndarray, bank: Tensor) -> Tensor:
    """Filter rows and columns of each image with its own combination of the bank's filters.

    images: [N, C, H, W] float32 or float64, H and W at least 2
    gains:  [N, B];  bank: [B, k], k odd, its rows adding up to the identity

    Images whose gains are all 1 are returned bit for bit.
    """
    changed = (gains != 1).any(axis=1)
    if not changed.any():
        return images
    count, channels, height = images.shape[:3]
    taps = (on_device_of(images, gains)[:, :, None] * bank).sum(1)  # [N, k]; not a matmul, which may use TF32
    taps = taps.repeat_interleave(channels, dim=0)[:, None, None]  # [N C, 1, 1, k]
    reach = bank.shape[1] // 2
    rows = reflect_pad(images, reach, reach, reach, reach).reshape(1, count * channels, height + 2 * reach, -1)
    filtered = F.conv2d(F.conv2d(rows, taps, groups=count * channels), taps.mT, groups=count * channels)
    return torch.where(on_device_of(images, changed[:, None, None, None]), filtered.reshape(images.shape), images)


def octave_bank() -> np.ndarray:
    """Split the spectrum into octaves by symmetric filters that add up to the identity.

    The power responses of an orthonormal filter and of its mirrored high-pass add up to 2, so that low = |H|^2 / 2 and
    high = 1 - low are two symmetric filters. Stage k of the cascade uses them stretched 2^k times: its high-pass gives
    a band, and its low-pass the input of the next stage (ADA paper, appendix B.2).

    Returns [BANDS, taps] float64, low frequencies first; 4 bands of 4 taps give 43.
    """
    low = np.correlate(SYM2, SYM2, mode="full") / 2
    left = np.ones(1)
    octaves = []
    for stage in range(BANDS - 1):
        stretched = np.zeros((len(low) - 1) * 2 ** stage + 1)
        stretched[::2 ** stage] = low
        rest = np.convolve(left, stretched)
        taken = -rest
        margin = (len(rest) - len(left)) // 2
        taken[margin:margin + len(left)] += left
        octaves.insert(0, taken)
        left = rest
    octaves.insert(0, left)
    size = len(left)
    return np.stack([np.pad(octave, (size - len(octave)) // 2) for octave in octaves])


# Corruption.


def draw_noise_level(strengths: AugmentStrengths, draws: Draws, p: float) -> np.ndarray:
    """Return the standard deviation of each image's noise. -> [N, 1, 1, 1]"""
    return draws.half_normal("noise", strengths.noise * p)[:, :, None, None] * strengths.noise_std


def add_noise(images: Tensor, level: np.ndarray, generator: torch.Generator | None) -> Tensor:
    """Add normal noise, independent for each pixel and channel. images: [N, C, H, W];  level: [N, 1, 1, 1]"""
    source = images.device if generator is None else generator.device
    noise = torch.randn(images.shape, dtype=torch.float32, device=source, generator=generator)
    return torch.addcmul(images, noise.to(images.device, images.dtype), on_device_of(images, level))


def cut_out(images: Tensor, strengths: AugmentStrengths, draws: Draws, p: float) -> Tensor:
    """Set a rectangle of cutout_size times width and height to 0, with a random center.

    images: [N, C, H, W]
    """
    happens = draws.fires("cutout", strengths.cutout * p)  # [N, 1]
    center_x, center_y = np.split(draws.uniforms["cutout"], 2, axis=1)  # [N, 1] each
    columns = _covered(images.shape[3], center_x, strengths.cutout_size) & happens
    rows = _covered(images.shape[2], center_y, strengths.cutout_size)
    hole = on_device_of(images, rows[:, None, :, None]) & on_device_of(images, columns[:, None, None, :])
    return images.masked_fill(hole, 0)


def _covered(size: int, center: np.ndarray, extent: float) -> np.ndarray:
    """Tell which of `size` pixel centers lie in a part of the unit interval. center: [N, 1] -> [N, size]"""
    return abs((np.arange(size) + 0.5) / size - center) < extent / 2
