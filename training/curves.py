"""Draw how metrics change over a run, as a PNG; with Pillow, since nothing else here needs a plotting library."""

import math
import os
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from dnnlib.files import atomic_write

Curve = Sequence[tuple[float, float]]  # (kimg, value)

_SIZE = (720, 400)
_LEFT, _TOP, _RIGHT, _BOTTOM = 72, 36, 700, 352  # of the area between the axes
_COLORS = ((31, 78, 160), (196, 78, 30), (40, 130, 70), (120, 60, 150))
_INK, _GRID, _PAPER = (0, 0, 0), (222, 222, 222), (255, 255, 255)
_MOST_MARKS = 6


def save_curves(path: str | os.PathLike, curves: dict[str, Curve]) -> None:
    """Draw named curves over kimg. Values that are not finite are left out; raises OSError."""
    picture = draw_curves(curves)
    with atomic_write(path) as file:
        picture.save(file, "png")


def draw_curves(curves: dict[str, Curve]) -> PIL.Image.Image:
    """Return the picture that `save_curves` writes: 720 x 400, the last value of each curve in its title."""
    curves = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    points = [point for curve in curves.values() for point in curve]
    axes = _Axes([0.0, *(x for x, _ in points)], [y for _, y in points] or [0.0])
    picture = PIL.Image.new("RGB", _SIZE, _PAPER)
    draw = PIL.ImageDraw.Draw(picture)
    font = PIL.ImageFont.load_default(14)
    _draw_axes(draw, font, axes)
    left = _LEFT
    for index, (name, curve) in enumerate(curves.items()):
        color = _COLORS[index % len(_COLORS)]
        _draw_curve(draw, [axes.place(x, y) for x, y in curve], color)
        title = f"{name} {curve[-1][1]:.4g}" if curve else f"{name}: no value"
        draw.text((left, 8), title, fill=color, font=font)
        left += math.ceil(font.getlength(title)) + 24
    return picture


def marks(low: float, high: float) -> list[float]:
    """Return round numbers, at most six, that lie evenly from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / (_MOST_MARKS - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


class _Axes:
    """Where values lie in the picture."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]):
        self.x_range = _widened(min(xs), max(xs), 0)
        self.y_range = _widened(min(ys), max(ys), 0.06)

    def place(self, x: float, y: float) -> tuple[float, float]:
        (x_low, x_high), (y_low, y_high) = self.x_range, self.y_range
        return (_LEFT + (x - x_low) / (x_high - x_low) * (_RIGHT - _LEFT),
                _BOTTOM - (y - y_low) / (y_high - y_low) * (_BOTTOM - _TOP))


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """Add room on both sides, and make room where there is none."""
    room = (high - low) * share if high > low else max(abs(high), 1.0) * 0.5
    return low - room, high + room


def _draw_axes(draw: PIL.ImageDraw.ImageDraw, font: PIL.ImageFont.FreeTypeFont, axes: _Axes) -> None:
    for value in marks(*axes.y_range):
        _, y = axes.place(axes.x_range[0], value)
        draw.line([(_LEFT, y), (_RIGHT, y)], fill=_GRID)
        draw.text((_LEFT - 8, y), f"{value:.6g}", fill=_INK, font=font, anchor="rm")
    for value in marks(*axes.x_range):
        x, _ = axes.place(value, axes.y_range[0])
        draw.line([(x, _BOTTOM), (x, _BOTTOM + 5)], fill=_INK)
        draw.text((x, _BOTTOM + 8), f"{value:.6g}", fill=_INK, font=font, anchor="ma")
    draw.line([(_LEFT, _TOP), (_LEFT, _BOTTOM), (_RIGHT, _BOTTOM)], fill=_INK)
    draw.text((_RIGHT, _BOTTOM + 26), "kimg", fill=_INK, font=font, anchor="ra")


def _draw_curve(draw: PIL.ImageDraw.ImageDraw, places: Sequence[tuple[float, float]], color: tuple) -> None:
    if len(places) > 1:
        draw.line(places, fill=color, width=2)
    for x, y in places:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
