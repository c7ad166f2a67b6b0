"""The colour augmentations against the matrices of the paper."""

import math

import numpy as np
import pytest
import torch

from training.augment import AugmentPipe
from training.augmentations.draws import AugmentStrengths, draw_random
from training.augmentations.pixels import draw_color_map, recolor

ALL = dict(brightness=1, contrast=1, lumaflip=1, hue=1, saturation=1)
AXIS = np.ones(3) / math.sqrt(3)
GREY = np.outer(AXIS, AXIS)


def paper_matrix(draws, n, p):
    """Compose the 4x4 colour matrix of image n step by step (ADA paper, figure 17)."""
    uniform = {name: value[n].tolist() for name, value in draws.uniforms.items()}
    normal = {name: value[n].tolist() for name, value in draws.normals.items()}
    matrix = np.eye(4)

    def apply(name, linear, shift=0.0):
        nonlocal matrix
        if draws.gates[name][n].item() < p:
            step = np.eye(4)
            step[:3, :3] = linear
            step[:3, 3] = shift
            matrix = step @ matrix

    apply("brightness", np.eye(3), 0.2 * normal["brightness"][0])
    apply("contrast", np.eye(3) * 2 ** (0.5 * normal["contrast"][0]))
    apply("lumaflip", np.eye(3) - 2 * GREY * math.floor(2 * uniform["lumaflip"][0]))
    angle = math.pi * (2 * uniform["hue"][0] - 1)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    apply("hue", GREY + math.cos(angle) * (np.eye(3) - GREY) + math.sin(angle) * cross)
    apply("saturation", GREY + 2 ** normal["saturation"][0] * (np.eye(3) - GREY))
    return matrix


@pytest.mark.parametrize("channels", [1, 3])
def test_recolor_equals_the_papers_matrices(channels):
    random = torch.Generator().manual_seed(0)
    images = torch.randn(40, channels, 4, 5, dtype=torch.float64, generator=random)
    draws = draw_random(40, random)
    result = recolor(images, draw_color_map(AugmentStrengths(**ALL), draws, 0.7))
    for n in range(40):
        matrix = paper_matrix(draws, n, 0.7)
        if channels == 1:
            mean = matrix[:3].mean(0)
            expected = images[n].numpy() * mean[:3].sum() + mean[3]
        else:
            expected = np.einsum("ij,jhw->ihw", matrix[:3, :3], images[n]) + matrix[:3, 3, None, None]
        np.testing.assert_allclose(result[n], expected, atol=1e-12)


def test_grey_image_has_no_hue_and_no_saturation():
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(AugmentPipe(hue=1, saturation=1)(images, debug_percentile=0.9), images)


def test_color_other_number_of_channels_raises():
    with pytest.raises(ValueError) as error:
        AugmentPipe(brightness=1)(torch.zeros(1, 4, 8, 8))
    assert str(error.value) == ("images have 4 channels; colour augmentation expects 1 or 3: "
                                "set its strengths to 0")
