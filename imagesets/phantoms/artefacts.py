"""Paint what lies between skin and camera: ink, hair, bubbles, a ruler, uneven light, a black frame."""

import math

import numpy as np

from imagesets.phantoms.fields import Canvas, blend, comb, disc, smoothstep, step_cover, stream, stroke, tint
from imagesets.phantoms.scene import Scene, View

_INK, _HAIR, _BUBBLES, _RULER, _FRAME = range(20, 25)  # purposes of random streams
_INKS = np.array([[0.42, 0.36, 0.78], [0.30, 0.50, 0.72], [0.50, 0.30, 0.62]])
_HAIR_COLORS = np.array([[0.07, 0.05, 0.04], [0.16, 0.09, 0.06], [0.28, 0.17, 0.10], [0.74, 0.70, 0.66]])
_RULER_COLOR, _FRAME_COLOR = np.array([0.10, 0.10, 0.13]), np.array([0.025, 0.02, 0.022])
_GLINT, _RIM = np.array([1.0, 1.0, 1.0]), np.array([0.72, 0.66, 0.66])
_BUBBLE = ((1.0, tint, _RIM, 0.8), (0.78, blend, _GLINT, 0.35), (0.55, tint, _RIM, 0.35))  # from the rim inwards


def paint_artefacts(rgb: np.ndarray, canvas: Canvas, scene: Scene) -> None:
    """Paint in place on rgb [3, H, W] float32, from the skin up to the camera; values may leave [0, 1]."""
    view = scene.view
    for name, purpose, paint in _LAYERS:
        if name in view.artefacts:
            paint(rgb, canvas, view, stream(scene.seed, purpose, scene.index))
    _light(rgb, canvas, view)
    if "frame" in view.artefacts:
        _paint_frame(rgb, canvas, view, stream(scene.seed, _FRAME, scene.index))


def _paint_ink(rgb: np.ndarray, canvas: Canvas, view: View, rng: np.random.Generator) -> None:
    """Paint surgical marker strokes around the lesion."""
    turn, reach, shade, count = rng.random(4).tolist()
    ink = _INKS[int(shade * len(_INKS))]
    for number in range(1 + int(2.5 * count)):
        direction = math.tau * turn + 2.1 * number
        far = 0.33 + 0.1 * reach
        tint(rgb, ink, np.float32(0.85) * stroke(
            canvas, x=far * math.cos(direction), y=far * math.sin(direction), angle=direction + math.pi / 2,
            length=0.35, bend=-1.1, width=0.9 / view.field_mm))


def _paint_hair(rgb: np.ndarray, canvas: Canvas, view: View, rng: np.random.Generator) -> None:
    """Paint hairs that run roughly one way."""
    grain, spread, shade = rng.random(3).tolist()
    cover = np.zeros((canvas.size, canvas.size), np.float32)
    for x, y, turn, length, bend, width in rng.random((view.num_hairs, 6)).tolist():
        cover = np.maximum(cover, stroke(
            canvas, x=1.1 * (x - 0.5), y=1.1 * (y - 0.5), angle=math.tau * grain + (0.4 + 1.6 * spread) * (turn - 0.5),
            length=0.3 + 0.8 * length, bend=1.6 * (bend - 0.5), width=(0.09 + 0.11 * width) / view.field_mm))
    color = _HAIR_COLORS[min(int(shade * 4.3), len(_HAIR_COLORS) - 1)]
    blend(rgb, color, cover * np.float32(0.92))


def _paint_bubbles(rgb: np.ndarray, canvas: Canvas, view: View, rng: np.random.Generator) -> None:
    """Paint bubbles in the gel: a dark rim, a bright ring in it, and a glint."""
    for x, y, size in rng.random((3 + int(7 * rng.random()), 3)).tolist():
        x, y, radius = x - 0.5, y - 0.5, (0.15 + 0.55 * size ** 2) / view.field_mm
        for part, paint, color, opacity in _BUBBLE:
            window, cover = disc(canvas, x, y, part * radius, 0.3)
            paint(rgb[:, *window], color, cover * np.float32(opacity))
        window, cover = disc(canvas, x - 0.3 * radius, y - 0.3 * radius, 0.3 * radius, 0.5)
        blend(rgb[:, *window], _GLINT, cover * np.float32(0.95))


def _paint_ruler(rgb: np.ndarray, canvas: Canvas, view: View, rng: np.random.Generator) -> None:
    """Paint a scale along one side: a mark every millimetre, a longer one every five."""
    side, tilt, shift, inset = rng.random(4).tolist()
    angle = math.pi / 2 * int(4 * side) + 0.24 * (tilt - 0.5)
    along, depth = _turned(canvas, angle)
    along, depth = along + np.float32(shift), depth - np.float32(0.36 + 0.06 * inset)
    mm, pixel = 1 / view.field_mm, float(canvas.pixel)
    short = comb(along, mm, 0.18 * mm, pixel) * step_cover(0.55 * mm - np.abs(depth), pixel)
    long = comb(along, 5 * mm, 0.24 * mm, pixel) * step_cover(1.1 * mm - np.abs(depth - 0.55 * mm), pixel)
    blend(rgb, _RULER_COLOR, np.maximum(short, long) * np.float32(0.9))


def _turned(canvas: Canvas, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates [size, size] along a direction and across it."""
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return canvas.x * cos + canvas.y * sin, canvas.y * cos - canvas.x * sin


def _light(rgb: np.ndarray, canvas: Canvas, view: View) -> None:
    """Apply brightness, white balance, a gradient, and the fall of light to the corners."""
    toward_lamp, _ = _turned(canvas, view.light_angle)
    light = np.float32(view.brightness) * (1 + np.float32(0.09) * toward_lamp)
    if view.vignette_strength:
        light = light * (1 - np.float32(view.vignette_strength) * smoothstep(0.25, 0.8, np.hypot(canvas.x, canvas.y)))
    balance = np.array([1 + view.warmth, 1 - view.pinkness, 1 - view.warmth + view.pinkness], np.float32)
    rgb *= balance.reshape(3, 1, 1) * light


def _paint_frame(rgb: np.ndarray, canvas: Canvas, view: View, rng: np.random.Generator) -> None:
    """Paint the black edge of a round field of view; the corners are always dark."""
    size, x, y, soft = rng.random(4).tolist()
    distance = np.hypot(canvas.x - np.float32(0.04 * (x - 0.5)), canvas.y - np.float32(0.04 * (y - 0.5)))
    edge = max(0.008 + 0.02 * soft, float(canvas.pixel))
    radius = 0.47 + 0.13 * size
    blend(rgb, _FRAME_COLOR, smoothstep(radius - edge, radius + edge, distance))


_LAYERS = (("ink", _INK, _paint_ink), ("hair", _HAIR, _paint_hair), ("bubbles", _BUBBLES, _paint_bubbles),
           ("ruler", _RULER, _paint_ruler))
