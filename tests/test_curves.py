"""training.curves: round marks, and points at their places."""

import math

import numpy as np
import PIL.Image
import pytest

from training.curves import draw_curves, marks, save_curves

BLUE, ORANGE = (31, 78, 160), (196, 78, 30)


def area(picture):
    """Return the pixels between the axes: uint8 [H, W, 3]."""
    return np.asarray(picture)[37:352, 73:700]


def places(picture, color):
    """Return rows and columns of a colour between the axes."""
    return np.nonzero((area(picture) == color).all(axis=2))


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 10, [0, 2, 4, 6, 8, 10]), (0, 25000, [0, 5000, 10000, 15000, 20000, 25000]), (0.13, 0.19, [0.14, 0.16, 0.18]),
    (-3, 4, [-2, 0, 2, 4]), (5, 5, [5]),
])
def test_marks_are_round_and_few(low, high, expected):
    assert marks(low, high) == pytest.approx(expected)


def test_draw_curves_falling_values_fall():
    rows, columns = places(draw_curves({"fid": [(0, 400.0), (100, 100.0), (200, 50.0)]}), BLUE)
    left, middle, right = (rows[(columns >= start) & (columns < start + 3)].mean() for start in (0, 312, 624))
    assert left < middle < right
    height = 352 - 36
    # Room of 6% on both sides of a range of 350.
    assert left == pytest.approx(height * 0.06 / 1.12, abs=3)
    assert middle == pytest.approx(height * (300 + 21) / 392, abs=3)


def test_draw_curves_two_have_two_colors_and_titles():
    picture = draw_curves({"precision": [(0, 0.1), (10, 0.2)], "recall": [(0, 0.6), (10, 0.7)]})
    assert places(picture, BLUE)[0].min() > places(picture, ORANGE)[0].max()
    title = np.asarray(picture)[:30]
    assert (title == BLUE).all(axis=2).any()
    assert (title == ORANGE).all(axis=2).any()


@pytest.mark.parametrize("values", [[], [math.nan], [3.0], [3.0, 3.0], [math.inf, 0.0], [1e30, 1e-30]])
def test_draw_curves_odd_values_draw_what_is_finite(values):
    picture = draw_curves({"fid": list(enumerate(values))})
    assert (len(places(picture, BLUE)[0]) > 0) == any(map(math.isfinite, values))


def test_save_curves_replaces_at_once(tmp_path):
    path = tmp_path / "metric-fid.png"
    path.write_bytes(b"old")
    save_curves(path, {"fid": [(0, 1.0)]})
    assert PIL.Image.open(path).size == (720, 400)
    assert list(tmp_path.iterdir()) == [path]
