"""Wavelet low-pass filters of the augmentation pipeline, with the filter bank made from one of them."""

import numpy as np

# Daubechies' least asymmetric orthonormal filters ("symlets") with 2 and 6 vanishing moments; sum sqrt(2).
# I. Daubechies, Ten Lectures on Wavelets, 1992, section 6.4; sym2 has the closed form (1 +- sqrt(3)) / (4 sqrt(2)), ...
SYM2 = tuple((np.array([1, 3, 3, 1]) + np.sqrt(3) * np.array([-1, -1, 1, 1])) / np.sqrt(32))
SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
        0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
        -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148)


def octave_bank(lowpass=SYM2, bands: int = 4) -> np.ndarray:
    """Split the spectrum into octaves by symmetric filters that add up to the identity.

    The power response of an orthonormal filter and that of its mirrored high-pass add up to 2, which makes
    low = |H|^2 / 2 and high = 1 - low two symmetric filters. Stage k of the cascade uses them stretched 2^k times:
    what its high-pass takes is a band, what is left goes on (ADA paper, appendix B.2).

    Returns [bands, taps] float64, low frequencies first; 4 bands of 4 taps give 43.
    """
    low = np.correlate(lowpass, lowpass, mode="full") / 2
    left = np.ones(1)
    octaves = []
    for stage in range(bands - 1):
        stretched = np.zeros((len(low) - 1) * 2 ** stage + 1)
        stretched[::2 ** stage] = low
        rest = np.convolve(left, stretched)
        taken = -rest
        margin = (len(rest) - len(left)) // 2
        taken[margin:margin + len(left)] += left
        octaves.insert(0, taken)
        left = rest
    octaves.insert(0, left)
    size = len(left)
    return np.stack([np.pad(octave, (size - len(octave)) // 2) for octave in octaves])
