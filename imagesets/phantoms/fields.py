"""Random numbers, smooth noise and anti-aliased shapes on a square canvas, the same at every resolution.

Only uniform numbers of a PCG64 stream are used: they are the same on every machine, bit for bit.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Band(NamedTuple):
    """Frequencies in a noise field, in cycles per period; the larger `slope`, the more low frequencies dominate."""

    low: float
    high: float
    slope: float = 1.0


def stream(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Return the random generator of one purpose for one image or lesion."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, purpose, number))))


class Canvas:
    """Pixel coordinates of a square image in units of its width, the center at 0.

    x: [1, size], y: [size, 1] float32 in (-0.5, 0.5)
    pixel: width of one pixel
    """

    def __init__(self, size: int):
        self.size = size
        self.pixel = np.float32(1 / size)
        self.x = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) - np.float32(0.5))[None, :]
        self.y = self.x.reshape(size, 1)


def noise_field(rng: np.random.Generator, band: Band, size: int) -> np.ndarray:
    """Return periodic Gaussian noise [size, size] float32 of mean 0 and variance 1.

    It is the same function at every size, without the frequencies that a smaller grid cannot hold.
    """
    gain = _gain(band)
    rows, columns = gain.shape
    spectrum = rng.random((rows, columns, 2), dtype=np.float32) - np.float32(0.5)
    spectrum = spectrum.view(np.complex64)[:, :, 0] * gain
    # Rows are the frequencies 1 - columns ... columns - 1; a grid of `size` points can hold those below size / 2.
    reach = min(columns, size // 2)
    padded = np.zeros((size, reach), np.complex64)
    padded[:reach] = spectrum[columns - 1:columns - 1 + reach, :reach]
    padded[1 - reach:] = spectrum[columns - reach:columns - 1, :reach]
    # Column 0 is not symmetric like that of a real field; irfft takes its symmetric part.
    field = np.fft.irfft(np.fft.ifft(padded, axis=0, norm="forward"), n=size, axis=1, norm="forward")
    return field.astype(np.float32, copy=False)


@lru_cache(maxsize=32)
def _gain(band: Band) -> np.ndarray:
    """Return the gain [2 * n - 1, n] for frequencies from 1 - n to n - 1 and from 0 to n - 1."""
    num = math.ceil(1.5 * band.high) + 1  # higher ones are negligible: the gain is exp(-1.5 ** 4) = 0.006 there
    rows, columns = np.arange(1 - num, num)[:, None], np.arange(num)[None, :]
    frequency = np.maximum(np.hypot(rows, columns), 1e-6)
    gain = np.exp(-(frequency / band.high) ** 4) * -np.expm1(-(frequency / band.low) ** 4) * frequency ** -band.slope
    # A coefficient has variance 2/12; columns above 0 count twice, and the symmetric part of column 0 half.
    power = (gain[:, :1] ** 2).sum() / 12 + 4 * (gain[:, 1:] ** 2).sum() / 12
    return (gain / np.sqrt(power)).astype(np.float32)


def sample_periodic(fields: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Interpolate fields [n, G, G] of period 1 at columns u and rows v, both [H, W] float32; returns [n, H, W]."""
    num, size, _ = fields.shape
    values = fields.reshape(num, -1)
    column, right = _split_cell(u, size)
    row, down = _split_cell(v, size)
    next_column, next_row = (column + 1) % size, (row + 1) % size * size
    row = row * size
    result = np.take(values, row + column, axis=1) * ((1 - right) * (1 - down))
    result += np.take(values, row + next_column, axis=1) * (right * (1 - down))
    result += np.take(values, next_row + column, axis=1) * ((1 - right) * down)
    result += np.take(values, next_row + next_column, axis=1) * (right * down)
    return result


def _split_cell(position: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells of positions, int64, and the offsets within them, float32 from 0 to 1."""
    scaled = position * np.float32(size)
    cell = np.floor(scaled)
    return cell.astype(np.int64) % size, scaled - cell


def smoothstep(low: float, high: float, values: np.ndarray) -> np.ndarray:
    """Return 0 below `low`, 1 above `high`, and a smooth rise between."""
    t = np.clip((values - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def stroke(canvas: Canvas, *, x: float, y: float, angle: float, length: float, bend: float, width: float) -> np.ndarray:
    """Return how much of each pixel a bent line covers, [size, size] float32 from 0 to 1.

    x, y, angle: its middle and its direction there
    bend: half the curvature, in 1 / image widths
    """
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    dx, dy = canvas.x - np.float32(x), canvas.y - np.float32(y)
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    slope = along * np.float32(2 * bend)
    distance = np.abs(across - slope * along * np.float32(0.5)) / np.sqrt(1 + slope * slope)
    ends = step_cover(np.float32(length / 2) - np.abs(along), canvas.pixel)
    return _line_cover(distance, width, canvas.pixel) * ends


def _line_cover(distance: np.ndarray, width: float, pixel: float) -> np.ndarray:
    """Return the cover by a line; one thinner than a pixel becomes a pixel wide and paler."""
    drawn = max(width, float(pixel))
    return step_cover(np.float32(drawn / 2) - distance, pixel) * np.float32(width / drawn)


def step_cover(inside: np.ndarray, pixel: float) -> np.ndarray:
    """Return the part of a pixel inside an edge, given the signed distance of its center, positive inside."""
    return np.clip(inside * np.float32(1 / pixel) + np.float32(0.5), 0, 1)


def comb(position: np.ndarray, period: float, width: float, pixel: float) -> np.ndarray:
    """Return the cover by parallel lines, one at every multiple of `period`."""
    offset = position * np.float32(1 / period)
    return _line_cover(np.abs(offset - np.rint(offset)) * np.float32(period), width, pixel)


def disc(canvas: Canvas, x: float, y: float, radius: float,
         softness: float = 0.0) -> tuple[tuple[slice, slice], np.ndarray]:
    """Return the square of pixels around a disc, and how much of each it covers, float32 from 0 to 1.

    softness: part of the radius over which the cover falls to 0
    """
    drawn = max(radius, 0.5 * float(canvas.pixel))
    fall = max(softness * drawn, float(canvas.pixel))
    window = _span(x, drawn + fall, canvas.size), _span(y, drawn + fall, canvas.size)
    columns, rows = window
    distance = np.hypot(canvas.x[:, columns] - np.float32(x), canvas.y[rows] - np.float32(y))
    cover = np.clip((np.float32(drawn) - distance) * np.float32(1 / fall) + np.float32(0.5), 0, 1)
    return (rows, columns), cover * np.float32((radius / drawn) ** 2)


def _span(center: float, reach: float, size: int) -> slice:
    first, last = (center - reach + 0.5) * size, (center + reach + 0.5) * size
    return slice(max(int(first), 0), max(int(last) + 1, 0))


def blend(rgb: np.ndarray, color: np.ndarray, cover: np.ndarray) -> None:
    """Paint over [3, H, W] in place; color: [3], cover: [H, W] from 0 to 1."""
    rgb += cover * (color.reshape(3, 1, 1).astype(np.float32) - rgb)


def tint(rgb: np.ndarray, transmittance: np.ndarray, cover: np.ndarray) -> None:
    """Lay a colored film over [3, H, W] in place; transmittance: [3], cover: [H, W] from 0 to 1."""
    rgb *= 1 - cover * (1 - transmittance.reshape(3, 1, 1).astype(np.float32))
