"""Derive random generators from the position in training, so that no random state needs to be stored."""

import hashlib

import torch


def seed_for(seed: int, nimg: int, microbatch: int, stream: str) -> int:
    """Return a seed in [0, 2^63) for one stream of random numbers of one micro-batch.

    seed:        the run's random seed;  nimg: images seen before;  microbatch: index over all processes
    stream:      purpose of the numbers; streams with different names are independent
    """
    key = f"{seed}/{nimg}/{microbatch}/{stream}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def generator_for(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new generator on `device`, seeded with `seed`."""
    return torch.Generator(device).manual_seed(seed)
