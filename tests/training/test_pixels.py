"""Colors against the matrices of the paper, the band filters, and the wavelets behind them."""

import math

import numpy as np
import pytest
import torch

from training.augment import AugmentPipe
from training.augmentations.draws import AugmentStrengths, draw_random
from training.augmentations.pixels import (
    SYM2,
    SYM6,
    draw_band_gains,
    draw_color_map,
    filter_bands,
    octave_bank,
    recolor,
)

ALL = dict(brightness=1, contrast=1, lumaflip=1, hue=1, saturation=1)
AXIS = np.ones(3) / math.sqrt(3)
GRAY = np.outer(AXIS, AXIS)
BANK = octave_bank()


def paper_matrix(draws, n, p):
    """Compose the 4x4 color matrix of image n step by step (ADA paper, figure 17)."""
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
    apply("lumaflip", np.eye(3) - 2 * GRAY * math.floor(2 * uniform["lumaflip"][0]))
    angle = math.pi * (2 * uniform["hue"][0] - 1)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    apply("hue", GRAY + math.cos(angle) * (np.eye(3) - GRAY) + math.sin(angle) * cross)
    apply("saturation", GRAY + 2 ** normal["saturation"][0] * (np.eye(3) - GRAY))
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


def test_gray_image_has_no_hue_and_no_saturation():
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(AugmentPipe(hue=1, saturation=1)(images, debug_percentile=0.9), images)


def test_color_other_number_of_channels_raises():
    with pytest.raises(ValueError) as error:
        AugmentPipe(brightness=1)(torch.zeros(1, 4, 8, 8))
    assert str(error.value) == ("images have 4 channels; expected 1 or 3 for color augmentation: set its strengths to "
                                "0")


@pytest.mark.parametrize(("taps", "moments"), [(SYM2, 2), (SYM6, 6)])
def test_wavelet_is_orthonormal_and_has_its_vanishing_moments(taps, moments):
    taps = np.array(taps)
    assert abs(taps.sum() - np.sqrt(2)) < 1e-11
    for shift in range(0, len(taps), 2):
        assert abs(taps[shift:] @ taps[:len(taps) - shift] - (shift == 0)) < 1e-11
    alternating = taps * (-1.0) ** np.arange(len(taps))
    for moment in range(moments):
        # The published coefficients have 16 digits, but come from a root finder of fewer.
        assert abs(alternating @ (np.arange(len(taps)) / len(taps)) ** moment) < 1e-10


def test_octave_bank_is_symmetric_and_adds_up_to_the_identity():
    assert BANK.shape == (4, 43)
    np.testing.assert_allclose(BANK, BANK[:, ::-1], rtol=0, atol=1e-16)
    np.testing.assert_allclose(BANK.sum(0), np.eye(43)[21], atol=1e-15)


def test_octave_bank_bands_pass_their_octaves():
    centers = np.pi * np.array([0.0, 0.1875, 0.375, 0.75])
    response = np.cos(np.outer(centers, np.arange(-21, 22))) @ BANK.T  # [frequency, band]
    np.testing.assert_array_equal(response.argmax(1), [0, 1, 2, 3])
    assert response.diagonal().min() > 0.6
    assert response.min() > -1e-12


def test_band_gains_equal_the_normalization_band_by_band():
    draws = draw_random(30, torch.Generator().manual_seed(0))
    strengths = AugmentStrengths(imgfilter=1, imgfilter_bands=[1, 0.5, 1, 0], imgfilter_std=0.8)
    gains = draw_band_gains(strengths, draws, 0.6)
    power = np.array([10, 1, 1, 1]) / 13
    for n in range(30):
        expected = np.ones(4)
        for band, strength in enumerate([1, 0.5, 1, 0]):
            if draws.gates["imgfilter"][n, band] < 0.6 * strength:
                factors = np.ones(4)
                factors[band] = 2 ** (0.8 * draws.normals["imgfilter"][n, band].item())
                expected = expected * factors / np.sqrt(power @ factors ** 2)
        np.testing.assert_allclose(gains[n], expected, rtol=1e-13)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (16, 16), (8, 8), (2, 5)])
def test_filter_bands_equals_numpy_convolution(height, width):
    random = torch.Generator().manual_seed(4)
    images = torch.randn(3, 2, height, width, dtype=torch.float64, generator=random)
    gains = torch.rand(3, 4, dtype=torch.float64, generator=random).numpy() * 2
    gains[1] = 1
    result = filter_bands(images, gains, torch.tensor(BANK))
    for n in range(3):
        taps = gains[n] @ BANK
        for c in range(2):
            padded = np.pad(images[n, c], 21, mode="reflect")
            rows = np.stack([np.convolve(row, taps, mode="valid") for row in padded])
            expected = np.stack([np.convolve(column, taps, mode="valid") for column in rows.T]).T
            np.testing.assert_allclose(result[n, c], expected, atol=1e-12)
    assert torch.equal(result[1], images[1])


def test_filter_bands_flat_image_is_scaled_by_the_lowest_band():
    gains = np.array([[1.7, 0.3, 2.0, 0.5]])
    result = filter_bands(torch.ones(1, 1, 16, 16, dtype=torch.float64), gains, torch.tensor(BANK))
    # Rows and columns are filtered in turn, each time with the lowest band's gain.
    torch.testing.assert_close(result, torch.full_like(result, 1.7 ** 2), rtol=1e-12, atol=0)
