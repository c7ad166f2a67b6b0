"""latent.projection: the four distances of pairs of images."""

import math

import pytest
import torch
from torch import nn

from latent.projection import COLUMNS, PERCEPTUAL, measure_pairs
from metrics.detectors.registry import open_similarity


def images(count, seed, side=16, channels=3):
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def test_columns_are_those_of_the_table():
    assert (COLUMNS, PERCEPTUAL) == (("perceptual", "pixel_l2", "psnr", "feature_cosine"), 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_distances_are_those_of_their_definitions(channels):
    pixels = open_similarity("pixels", device="cpu")
    a, b = images(3, 1, channels=channels), images(3, 2, channels=channels)
    found = measure_pairs(a, b, pixels)
    assert (found.dtype, found.shape) == (torch.float32, (3, 4))
    for row, x, y in zip(found.tolist(), a.double(), b.double(), strict=True):
        halves = [nn.functional.avg_pool2d(image / 127.5, 2) for image in (x, y)]
        perceptual = ((x - y) / 127.5).square().mean() + (halves[0] - halves[1]).square().mean()
        l2 = (x - y).square().mean().sqrt()
        less_mean = [half - half.mean(dim=(1, 2), keepdim=True) for half in halves]
        cosine = (less_mean[0] * less_mean[1]).sum() / (less_mean[0].norm() * less_mean[1].norm())
        assert row == pytest.approx([float(perceptual), float(l2), 20 * math.log10(255 / l2), float(cosine)], abs=1e-4)


def test_equal_images_have_an_infinite_psnr():
    a = images(2, 1)
    found = measure_pairs(a, a, open_similarity("pixels", device="cpu"))
    assert found[:, 1:3].tolist() == [[0, math.inf]] * 2
    assert found[:, 0].tolist() == [0, 0]
    assert found[:, 3].tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_images_are_compared_where_the_weights_of_the_similarity_are(kind):
    class Elsewhere(nn.Module):
        least_size = 8

        def __init__(self):
            super().__init__()
            weight = torch.empty(1, device="meta")
            if kind == "parameter":
                self.weight = nn.Parameter(weight)
            else:
                self.register_buffer("weight", weight)

        def forward(self, a, b):
            raise LookupError(a.device.type, b.device.type)

    with pytest.raises(LookupError) as caught:
        measure_pairs(images(1, 1), images(1, 2), Elsewhere())
    assert caught.value.args == ("meta", "meta")
