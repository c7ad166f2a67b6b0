"""Smooth noise and anti-aliased shapes that phantoms are drawn with."""

import numpy as np
import pytest

from imagesets.phantoms.fields import (
    Band,
    Canvas,
    blend,
    comb,
    disc,
    noise_field,
    sample_periodic,
    smoothstep,
    stream,
    stroke,
    tint,
)

BAND = Band(low=2, high=12, slope=1.0)


def test_stream_depends_on_each_of_its_names():
    numbers = {stream(*names).random() for names in ((0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2), (0, 1, 2))}
    assert len(numbers) == 4


def test_noise_field_has_mean_zero_and_variance_one():
    fields = np.stack([noise_field(stream(0, 0, number), BAND, 64) for number in range(200)])
    assert fields.dtype == np.float32
    assert np.abs(fields.mean((1, 2))).max() < 1e-6
    # Some 300 coefficients carry the variance: its standard error over 200 fields is below 0.01.
    assert fields.var() == pytest.approx(1, abs=0.03)


def test_noise_field_is_the_same_function_at_every_size():
    small, large = (noise_field(stream(0, 0, 0), BAND, size) for size in (64, 256))
    assert np.allclose(large[::4, ::4], small, atol=1e-5)  # float32


def test_noise_field_leaves_out_what_a_small_grid_cannot_hold():
    small, large = (noise_field(stream(0, 0, 0), Band(low=2, high=100, slope=0.5), size) for size in (32, 512))
    spectrum = np.fft.rfft2(large, norm="forward")
    kept = np.zeros((32, 17), complex)
    kept[:16, :16], kept[-15:, :16] = spectrum[:16, :16], spectrum[-15:, :16]
    assert np.allclose(np.fft.irfft2(kept, norm="forward"), small, atol=1e-4)


def test_noise_field_has_no_frequencies_outside_its_band():
    spectrum = np.abs(np.fft.rfft2(noise_field(stream(0, 0, 0), Band(low=8, high=16, slope=0.0), 128), norm="forward"))
    frequency = np.hypot(np.fft.fftfreq(128, 1 / 128)[:, None], np.arange(65)[None, :])
    power = spectrum ** 2
    assert power[(frequency < 4) | (frequency > 24)].sum() < 0.01 * power.sum()


def test_sample_periodic_on_the_grid_returns_the_grid_and_wraps():
    fields = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    v, u = np.meshgrid(np.arange(8) / 8, np.arange(8) / 8, indexing="ij")
    u, v = u.astype(np.float32), v.astype(np.float32)
    assert np.allclose(sample_periodic(fields, u, v), fields, atol=1e-6)
    assert np.allclose(sample_periodic(fields, u - 3, v + 2), fields, atol=1e-5)


def test_sample_periodic_between_points_is_their_mean():
    fields = np.array([[[0, 4], [2, 10]]], np.float32)
    at = np.full((1, 1), 0.25, np.float32)
    assert sample_periodic(fields, at, at).item() == 4


def test_smoothstep_rises_from_low_to_high():
    values = smoothstep(1, 3, np.array([0, 1, 2, 3, 4], np.float32))
    assert values.tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("width", [0.002, 0.02, 0.1])  # from a fifth of a pixel to ten
@pytest.mark.parametrize("angle", [0.0, 0.5, 1.57])
def test_stroke_covers_length_times_width(width, angle):
    canvas = Canvas(100)
    cover = stroke(canvas, x=0.03, y=-0.02, angle=angle, length=0.5, bend=0.0, width=width)
    assert cover.min() == 0
    # The linear edge is 5 % off along diagonals.
    assert cover.sum() / 100 ** 2 == pytest.approx(0.5 * width, rel=0.06)


def test_stroke_bends_by_its_parabola():
    cover = stroke(Canvas(200), x=0.0, y=0.0, angle=0.0, length=0.8, bend=1.0, width=0.02)
    rows, columns = np.nonzero(cover > 0.5)
    x, y = (columns + 0.5) / 200 - 0.5, (rows + 0.5) / 200 - 0.5
    assert x.min() < -0.38
    assert np.abs(y - x ** 2).max() < 0.02  # half the width, and the slope of up to 0.8


@pytest.mark.parametrize("radius", [0.002, 0.01, 0.2])  # from a fifth of a pixel to twenty
def test_disc_covers_its_area(radius):
    (rows, columns), cover = disc(Canvas(100), 0.013, -0.104, radius)
    assert cover.shape == (rows.stop - rows.start, columns.stop - columns.start)
    # The linear edge, a pixel wide, adds up to a third to a disc that is smaller than that.
    assert cover.sum() / 100 ** 2 == pytest.approx(np.pi * radius ** 2, rel=0.35 if radius < 0.1 else 0.01)


def test_disc_outside_is_empty():
    (rows, columns), _ = disc(Canvas(100), 0.9, 0.0, 0.1)
    assert np.zeros((100, 100))[rows, columns].size == 0


def test_comb_has_a_line_every_period():
    canvas = Canvas(400)
    cover = comb(canvas.x, 0.1, 0.02, float(canvas.pixel))[0]
    starts = np.flatnonzero((cover[1:] > 0.5) & (cover[:-1] <= 0.5))
    assert np.diff(starts).tolist() == [40] * (len(starts) - 1)
    assert cover.mean() == pytest.approx(0.2, abs=0.01)


def test_blend_and_tint_by_half():
    rgb = np.full((3, 1, 2), 0.5, np.float32)
    cover = np.array([[0.0, 0.5]], np.float32)
    blend(rgb, np.array([1.0, 0.5, 0.0]), cover)
    assert rgb.tolist() == [[[0.5, 0.75]], [[0.5, 0.5]], [[0.5, 0.25]]]
    tint(rgb, np.array([0.0, 1.0, 0.5]), cover)
    assert rgb.tolist() == [[[0.5, 0.375]], [[0.5, 0.5]], [[0.5, 0.1875]]]
