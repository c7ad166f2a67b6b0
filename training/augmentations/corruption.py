"""Spoil images: noise on every pixel, a rectangle cut out."""

import torch
from torch import Tensor

from training.augmentations.draws import Draws
from training.augmentations.strengths import AugmentStrengths


def draw_noise_level(strengths: AugmentStrengths, draws: Draws, p: Tensor) -> Tensor:
    """Draw the standard deviation of each image's noise. p: scalar -> [N, 1, 1, 1]"""
    return draws.half_normal("noise", strengths.noise * p)[:, :, None, None] * strengths.noise_std


def add_noise(images: Tensor, level: Tensor, generator: torch.Generator | None) -> Tensor:
    """Add normal noise, fresh for each pixel and channel. images: [N, C, H, W];  level: [N, 1, 1, 1]"""
    source = images.device if generator is None else generator.device
    noise = torch.randn(images.shape, dtype=torch.float32, device=source, generator=generator)
    return images + noise.to(images.device, images.dtype) * level


def cut_out(images: Tensor, strengths: AugmentStrengths, draws: Draws, p: Tensor) -> Tensor:
    """Set a rectangle of cutout_size times width and height to 0, its centre anywhere in the image.

    images: [N, C, H, W];  p: scalar
    """
    happens = draws.fires("cutout", strengths.cutout * p)[:, :, None, None]
    center_x, center_y = draws.uniforms["cutout"][:, :, None].unbind(1)  # [N, 1] each
    columns = _covered(images.shape[3], center_x, strengths.cutout_size)
    rows = _covered(images.shape[2], center_y, strengths.cutout_size)
    hole = rows[:, None, :, None] & columns[:, None, None, :] & happens
    return images.masked_fill(hole, 0)


def _covered(size: int, center: Tensor, extent: float) -> Tensor:
    """Tell which of `size` pixel centres lie within a stretch of the unit interval. center: [N, 1] -> [N, size]"""
    places = (torch.arange(size, dtype=center.dtype, device=center.device) + 0.5) / size
    return (places - center).abs() < extent / 2
