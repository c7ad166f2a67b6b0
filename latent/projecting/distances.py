"""Measure how near projections are to their targets, on the pixels that are kept."""

import math
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from latent.projecting.similarity_input import to_similarity_input
from metrics.detectors.similarity import Similarity

# perceptual:      what the projection makes small, in units of its similarity
# pixel_l2:        root of the mean squared difference of pixels, in levels of 0 to 255
# psnr:            20 log10(255 / pixel_l2), in dB; inf for equal images
# feature_cosine:  cosine of the angle between the feature vectors of the two images
COLUMNS = ("perceptual", "pixel_l2", "psnr", "feature_cosine")
PERCEPTUAL = COLUMNS.index("perceptual")


@torch.no_grad()
def measure_pairs(targets: Tensor, projections: Tensor, similarity: Similarity) -> Tensor:
    """Return the distances of pairs of images: float32 [N, 4] on the CPU, columns as COLUMNS.

    targets, projections:  uint8 [N, C, R, R], on any device
    similarity:            its device is where they are compared
    """
    device = next(chain(similarity.parameters(), similarity.buffers()), torch.empty(0)).device
    a, b = (to_similarity_input(pixels.to(device).float() / 127.5 - 1, similarity) for pixels in (targets, projections))
    perceptual = similarity(a, b)
    cosine = cosine_similarity(similarity.describe(a), similarity.describe(b))
    squares = (targets.to(device).double() - projections.to(device)).square().mean(dim=(1, 2, 3))
    pixel_l2 = squares.sqrt()
    psnr = 20 * (math.log10(255) - pixel_l2.log10())
    return torch.stack([column.float().cpu() for column in (perceptual, pixel_l2, psnr, cosine)], dim=1)
