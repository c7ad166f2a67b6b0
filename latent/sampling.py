"""Turn seeds and labels into styles, and styles into pixels: the same image for a seed whoever asks for it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.cli import UserError
from torch_utils.images import to_pixels
from torch_utils.seeding import generator_for, seed_for

LARGEST_SEED = 2**32 - 1  # numpy's RandomState takes no larger one

_GPU_PIXELS, _GPU_BATCH = 1 << 21, 64  # of a batch: 32 images of 256x256, and 64 of the smallest


def z_of_seed(seed: int, z_dim: int) -> np.ndarray:
    """Return the latent of a seed, as the original draws it: float64 [1, Z]."""
    return np.random.RandomState(seed).randn(1, z_dim)


def latents_of(seeds: Sequence[int], z_dim: int) -> Tensor:
    """Return the latents of several seeds: float64 [N, Z]."""
    return torch.from_numpy(np.concatenate([z_of_seed(seed, z_dim) for seed in seeds]))


def choose_batch(resolution: int, device: torch.device | str) -> int:
    """Return how many images a pass takes: on a GPU what fits into a few GB for usual networks, on a CPU one.

    On a CPU larger batches gain nothing but for tiny networks, and with one image a pass it is the same one, bit for
    bit, in a file, on a sheet and in a set.
    """
    return 1 if torch.device(device).type == "cpu" else min(max(_GPU_PIXELS // resolution**2, 1), _GPU_BATCH)


@dataclass(frozen=True, kw_only=True)
class Look:
    """How images are made, beside latent and class."""

    truncation: float = 1.0  # psi: 1 keeps the variety, 0 gives the mean image
    noise_mode: str = "const"
    fp32: bool = False  # compute half precision blocks in float32


class Painter:
    """Makes images with a generator. Nothing random is left: equal arguments give equal images.

    G:      the averaged generator, in eval mode, on the device that is to compute
    batch:  images of a pass

    An image is the same in batches of any size, and with any number of threads, up to the order of sums: in float32
    one value in some 10,000 moves by one level.
    """

    def __init__(self, G: nn.Module, look: Look, *, batch: int):
        self.G, self.look, self.batch = G, look, batch
        self.device = next(G.parameters()).device
        # Half precision is what makes a GPU fast; most CPUs are slower with it.
        self.fp32 = look.fp32 or self.device.type == "cpu"

    @torch.no_grad()
    def styles(self, seeds: Sequence[int], labels: Tensor) -> Tensor:
        """Return truncated styles: float32 [N, L, W] on the device. labels: float32 [N, c_dim]"""
        z = latents_of(seeds, self.G.z_dim)
        return self.G.mapping(z.to(self.device), labels.to(self.device), truncation_psi=self.look.truncation)

    @torch.no_grad()
    def pixels(self, ws: Tensor, noise_seeds: Sequence[int]) -> Tensor:
        """Return uint8 [N, C, R, R] on the CPU.

        ws:           [N, L, W]
        noise_seeds:  what the noise of each image follows from with the noise mode "random"

        Raises UserError where the network makes something else than finite numbers.
        """
        if self.look.noise_mode != "random":
            return to_pixels(self._synthesize(ws)).cpu()
        # LIMIT: one image a pass, since a batch draws the noise of all its images from one stream.
        streams = (generator_for(seed_for(seed, 0, 0, "generate/noise"), self.device) for seed in noise_seeds)
        return torch.cat([to_pixels(self._synthesize(w, generator=stream)).cpu()
                          for w, stream in zip(ws.split(1), streams, strict=True)])

    def paint(self, seeds: Sequence[int], labels: Tensor,
              on_images: Callable[[int], None] = lambda count: None) -> Iterator[Tensor]:
        """Yield the images of seeds in batches, uint8 [n, C, R, R] on the CPU.

        labels:     float32 [N, c_dim], one row a seed
        on_images:  is told how many images were made, after each batch
        """
        for start in range(0, len(seeds), self.batch):
            some = seeds[start:start + self.batch]
            pixels = self.pixels(self.styles(some, labels[start:start + self.batch]), some)
            on_images(len(pixels))
            yield pixels

    def show(self, ws: Tensor, on_images: Callable[[int], None] = lambda count: None) -> Iterator[Tensor]:
        """Yield the images of styles [N, L, W] in batches, uint8 [n, C, R, R] on the CPU. on_images: as in `paint`"""
        for start in range(0, len(ws), self.batch):
            some = ws[start:start + self.batch]
            yield self.pixels(some, range(start, start + len(some)))
            on_images(len(some))

    def _synthesize(self, ws: Tensor, generator: torch.Generator | None = None) -> Tensor:
        images = self.G.synthesis(ws.to(self.device), noise_mode=self.look.noise_mode, force_fp32=self.fp32,
                                  generator=generator)
        if not images.isfinite().all():  # they would become pixels all the same
            other = "" if self.fp32 else ", or --fp32"
            raise UserError("the network of --network makes images that are no finite numbers, perhaps since its "
                            f"training diverged; expected a sound one: try an earlier snapshot{other}")
        return images
