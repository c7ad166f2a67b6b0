"""Make small network files in tests, and look at what was made with them."""

import numpy as np
import PIL.Image
import torch

from tests.tiny_networks import generator
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


def is_alike(found, expected):
    """Tell whether pixels are equal but for rounding: a level in a few of them."""
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int))
    return found.shape == expected.shape and difference.max() <= 1 and (difference > 0).mean() < 0.01
