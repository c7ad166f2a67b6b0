"""Render a scene to pixels: skin, the lesion on it, what lies above, then down to the size asked for."""

import numpy as np

from imagesets.phantoms.artefacts import paint_artefacts
from imagesets.phantoms.fields import Band, Canvas, noise_field, stream
from imagesets.phantoms.lesion import paint_lesion
from imagesets.phantoms.scene import Scene

_SKIN = 30  # purpose of a random stream
_TONES = np.array([  # red, green, blue of the skin tones
    [0.93, 0.79, 0.73], [0.89, 0.71, 0.63], [0.83, 0.63, 0.53],
    [0.70, 0.49, 0.39], [0.58, 0.40, 0.31], [0.45, 0.31, 0.25]])
_FIELDS = (
    Band(low=1, high=3, slope=1.0),  # shading
    Band(low=2, high=9, slope=1.0),  # blotches of red
    Band(low=4, high=14, slope=0.5),  # thin vessels, where it is near 0
    Band(low=12, high=50, slope=0.5),  # skin lines and pores
)


def render(scene: Scene, resolution: int) -> np.ndarray:
    """Return uint8 [resolution, resolution, 3] pixels.

    resolution: a power of two
    """
    # Fine shapes are drawn on 64 pixels at least, and twice as large as asked for where a pixel is coarse.
    factor = max(64 // resolution, 2 if resolution < 256 else 1)
    canvas = Canvas(factor * resolution)
    rgb = _skin(canvas, scene)
    paint_lesion(rgb, canvas, scene)
    paint_artefacts(rgb, canvas, scene)
    pixels = _shrink(np.clip(rgb, 0, 1), factor) * np.float32(255)
    return np.ascontiguousarray(np.rint(pixels).astype(np.uint8).transpose(1, 2, 0))


def _skin(canvas: Canvas, scene: Scene) -> np.ndarray:
    """Return skin alone, [3, H, W] float32."""
    rng = stream(scene.seed, _SKIN, scene.index)
    shading, blotches, vessels, fine = (noise_field(rng, band, canvas.size) for band in _FIELDS)
    redness = scene.lesion.redness
    light = 1 + np.float32(0.022) * shading + np.float32(0.016) * fine
    red = np.float32(0.10 * redness) + np.float32(0.014 + 0.03 * redness) * blotches
    red += np.float32(0.10 * redness) * np.exp(-np.square(vessels * np.float32(9)))
    rgb = _TONES[scene.lesion.skin_tone - 1].astype(np.float32).reshape(3, 1, 1) * light
    rgb[1:] *= 1 - red
    return rgb


def _shrink(rgb: np.ndarray, factor: int) -> np.ndarray:
    """Average squares of factor by factor pixels; [3, H, W] -> [3, H / factor, W / factor]."""
    if factor == 1:
        return rgb
    rows = sum(rgb[:, offset::factor] for offset in range(factor))
    return sum(rows[:, :, offset::factor] for offset in range(factor)) * np.float32(factor ** -2)
