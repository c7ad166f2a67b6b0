"""The band filters and the wavelets they come from."""

import numpy as np
import pytest
import torch

from training.augmentations.draws import AugmentStrengths, draw_random
from training.augmentations.pixels import SYM2, SYM6, draw_band_gains, filter_bands, octave_bank

BANK = octave_bank()


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


def test_band_gains_equal_the_normalisation_band_by_band():
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
