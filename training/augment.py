"""Augment the images that the discriminator sees (ADA paper: Karras et al. 2020, section 2 and appendix B).

`training.augmentations` has the parts, in order: `draws` decides what happens to each image, `geometry` transforms
images (appendix B.1), `pixels` changes colors (B.1) and frequency bands (B.2), adds noise and cutouts (B.3).
"""

import torch
from torch import Tensor

from torch_utils.ops.upfirdn2d import setup_filter
from training.augmentations.draws import Draws, draw_quantile, draw_random, parse_strengths
from training.augmentations.geometry import draw_source_map, resample
from training.augmentations.pixels import (
    SYM6,
    add_noise,
    cut_out,
    draw_band_gains,
    draw_color_map,
    draw_noise_level,
    filter_bands,
    octave_bank,
    recolor,
)


class AugmentPipe(torch.nn.Module):
    """Apply random augmentations, each with probability strength * p; differentiable in the images to any order.

    Keyword arguments are the fields of AugmentStrengths; augmentations that are not given are off. `p` is a buffer,
    initially 1, that training adapts; it stays on the host. Raises ValueError for an unknown name or a value out of
    range.
    """

    def __init__(self, **strengths):
        super().__init__()
        self.init_kwargs = dict(strengths)
        self.strengths = parse_strengths(strengths)
        # The names are those of published network files.
        self.register_buffer("p", torch.ones([], device="cpu"))
        self.register_buffer("Hz_geom", setup_filter(SYM6))
        self.register_buffer("Hz_fbank", torch.as_tensor(octave_bank(), dtype=torch.float32))

    def forward(self, images: Tensor, debug_percentile: float | None = None, *,
                generator: torch.Generator | None = None, host_generator: torch.Generator | None = None) -> Tensor:
        """Augment a batch.

        images:           [N, C, H, W] floating point, H and W at least 2; C must be 1 or 3 if colors are changed
        debug_percentile: replaces every draw by this quantile, in (0, 1), and applies every augmentation; only the
                          pixels of the noise stay random
        generator:        source of all randomness, on any device; None takes PyTorch's own
        host_generator:   used instead of `generator` for the decisions per image, which avoids synchronizing with the
                          device

        Returns images of the same shape and dtype. Half precision is computed in float32. An image that no
        augmentation changes is returned bit for bit. Raises ValueError for other images.
        """
        if images.ndim != 4 or not images.is_floating_point() or min(images.shape[2:]) < 2 or not len(images):
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; expected floating point [N, C, H, W] "
                             "with at least one image and 2 pixels a side")
        dtype = images.dtype if images.dtype == torch.float64 else torch.float32
        if debug_percentile is None:
            draws = draw_random(len(images), generator if host_generator is None else host_generator)
        else:
            draws = draw_quantile(len(images), debug_percentile)
        return self._augment(images.to(dtype), draws, generator).to(images.dtype)

    def _apply(self, *args, **kwargs) -> "AugmentPipe":
        """Move or convert the filters, but not p: decisions are made on the host, without synchronizing."""
        p = self.p
        super()._apply(*args, **kwargs)
        self.p = p
        return self

    def _augment(self, images: Tensor, draws: Draws, generator: torch.Generator | None) -> Tensor:
        do, p = self.strengths, self.p.item()
        if do.uses("blit", "geom"):
            images = resample(images, draw_source_map(do, draws, p, images), self.Hz_geom)
        if do.uses("color"):
            images = recolor(images, draw_color_map(do, draws, p))
        if do.uses("filter") and any(do.imgfilter_bands):
            images = filter_bands(images, draw_band_gains(do, draws, p), self.Hz_fbank.to(images.dtype))
        if do.noise:
            images = add_noise(images, draw_noise_level(do, draws, p), generator)
        if do.cutout:
            images = cut_out(images, do, draws, p)
        return images
