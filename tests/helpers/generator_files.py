"""Make small network files in tests, and look at what was made with them."""

import math

import numpy as np
import PIL.Image
import torch

from tests.helpers.tiny_networks import generator
from training.snapshot import Networks, save_network


def lively_generator(**changes):
    """Return a tiny generator, in eval mode, whose images depend on noise and truncation."""
    G = generator(**changes).eval()
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):  # 0 at first, which would hide the noise from every test
            torch.nn.init.constant_(parameter, 0.5)
    G.mapping.w_avg.copy_(torch.linspace(-1, 1, G.w_dim))
    return G


def save_generator(path, info=None, **changes):
    """Write a network file with a tiny generator; return its path."""
    G = lively_generator(**changes)
    save_network(path, Networks(G=None, D=None, G_ema=G, config={"info": info or {}}))
    return path


def pixels_in(path):
    """Return the pixels of a picture: uint8 [H, W] or [H, W, 3]."""
    with PIL.Image.open(path) as image:
        return np.asarray(image)


def rounded_share(found, expected):
    """Return the share of uint8 values that differ by one level; infinity where one differs by more, or shapes do.

    Pixels are equal bit by bit only where the same machine computes them with the same settings. CPUs with other
    instructions, other numbers of threads and other batches add up in another order, which moves float32 images by
    1e-5 at most, a thousandth of a level: about one value in a thousand lies so near to the border of its level that
    it falls on the other side.
    """
    found, expected = np.asarray(found).astype(int), np.asarray(expected).astype(int)
    if found.shape != expected.shape or np.abs(found - expected).max() > 1:
        return math.inf
    return (found != expected).mean()


def is_alike(found, expected):
    """Tell whether pixels are equal but for rounding: one level in less than 1 % of the values, one of 192 at 8x8."""
    return rounded_share(found, expected) < 0.01


def save_lesion_generator(path, info=None, resolution=16, **changes):
    """Write a network file whose images show a dark spot on light skin, the same one in shades that depend on w.

    What is measured in lesions is found in them, unlike in those of `save_generator`.
    """
    G = lively_generator(img_resolution=resolution, **changes)
    block = getattr(G.synthesis, f"b{resolution}")
    across = torch.arange(resolution) - resolution / 2 + 0.5
    spot = torch.sigmoid(0.25 * resolution - torch.hypot(across, across[:, None]))
    # The last layer's noise is the spot; ToRGB makes it dark.
    block.conv1.noise_const.copy_(spot)
    torch.nn.init.constant_(block.conv1.noise_strength, 4)
    for other in G.synthesis.block_resolutions:
        torch.nn.init.zeros_(getattr(G.synthesis, f"b{other}").torgb.weight)
    with torch.no_grad():
        channels = block.torgb.weight.shape[1]
        block.torgb.weight.copy_(torch.tensor([-0.12, -0.2, -0.22])[:, None, None, None] / channels**0.5)
        block.torgb.bias.copy_(torch.tensor([0.8, 0.5, 0.4]))
    save_network(path, Networks(G=None, D=None, G_ema=G, config={"info": info or {}}))
    return path
