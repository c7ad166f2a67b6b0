"""The smallest possible networks, for tests of their files."""

import torch

from training.discriminator import Discriminator
from training.generator import Generator

GENERATOR = {"z_dim": 8, "c_dim": 2, "w_dim": 8, "img_resolution": 8, "img_channels": 3,
             "mapping_kwargs": {"num_layers": 2}, "synthesis_kwargs": {"channel_base": 32, "channel_max": 4}}
DISCRIMINATOR = {"c_dim": 2, "img_resolution": 8, "img_channels": 3, "channel_base": 32, "channel_max": 4,
                 "mapping_kwargs": {"num_layers": 2}}


def generator(seed=0, **changes):
    torch.manual_seed(seed)
    return Generator(**{**GENERATOR, **changes})


def discriminator(seed=0, **changes):
    torch.manual_seed(seed)
    return Discriminator(**{**DISCRIMINATOR, **changes})
