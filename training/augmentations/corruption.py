"""Spoil images: noise on every pixel, a rectangle cut out."""

import numpy as np
import torch
from torch import Tensor

from training.augmentations.device import on_device_of
from training.augmentations.draws import Draws
from training.augmentations.strengths import AugmentStrengths


def draw_noise_level(strengths: AugmentStrengths, draws: Draws, p: float) -> np.ndarray:
    """Draw the standard deviation of each image's noise. -> [N, 1, 1, 1]"""
    return draws.half_normal("noise", strengths.noise * p)[:, :, None, None] * strengths.noise_std


def add_noise(images: Tensor, level: np.ndarray, generator: torch.Generator | None) -> Tensor:
    """Add normal noise, fresh for each pixel and channel. images: [N, C, H, W];  level: [N, 1, 1, 1]"""
    source = images.device if generator is None else generator.device
    noise = torch.randn(images.shape, dtype=torch.float32, device=source, generator=generator)
    return torch.addcmul(images, noise.to(images.device, images.dtype), on_device_of(images, level))


def cut_out(images: Tensor, strengths: AugmentStrengths, draws: Draws, p: float) -> Tensor:
    """Set a rectangle of cutout_size times width and height to 0, its centre anywhere in the image.

    images: [N, C, H, W]
    """
    happens = draws.fires("cutout", strengths.cutout * p)  # [N, 1]
    center_x, center_y = np.split(draws.uniforms["cutout"], 2, axis=1)  # [N, 1] each
    columns = _covered(images.shape[3], center_x, strengths.cutout_size) & happens
    rows = _covered(images.shape[2], center_y, strengths.cutout_size)
    hole = on_device_of(images, rows[:, None, :, None]) & on_device_of(images, columns[:, None, None, :])
    return images.masked_fill(hole, 0)


def _covered(size: int, center: np.ndarray, extent: float) -> np.ndarray:
    """Tell which of `size` pixel centres lie within a stretch of the unit interval. center: [N, 1] -> [N, size]"""
    return abs((np.arange(size) + 0.5) / size - center) < extent / 2
