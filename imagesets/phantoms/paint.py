"""Render a scene to pixels: skin, the lesion, artifacts between skin and camera, then scaling to the final size.

A lesion has an outline, colors, a network, dots, and a structure that is specific to its class. Artifacts are ink,
hair, bubbles, a ruler, uneven light and a black frame.
"""

import math

import numpy as np

from imagesets.phantoms.fields import (
    Band,
    Canvas,
    blend,
    comb,
    disc,
    noise_field,
    sample_periodic,
    smoothstep,
    step_cover,
    stream,
    stroke,
    tint,
)
from imagesets.phantoms.scene import NUM_SKIN_TONES, PIGMENTS, Lesion, Scene, View

_SKIN = 30  # purpose of a random stream
_TONES = np.array([  # red, green, blue of the skin tones
    [0.93, 0.79, 0.73], [0.89, 0.71, 0.63], [0.83, 0.63, 0.53],
    [0.70, 0.49, 0.39], [0.58, 0.40, 0.31], [0.45, 0.31, 0.25]])
_SCENE_FIELDS = (
    Band(low=1, high=3, slope=1.0),  # shading
    Band(low=2, high=9, slope=1.0),  # blotches of red
    Band(low=4, high=14, slope=0.5),  # thin vessels, where the noise is near 0
    Band(low=12, high=50, slope=0.5),  # skin lines and pores
)
_TEXTURE, _OUTLINE, _PATCHES, _DOTS, _STRUCTURE = range(10, 15)  # purposes of random streams
_PERIOD = 4.0  # of the noise, in lesion radii: more than any lesion is across
_FIELDS = (
    Band(low=4, high=26, slope=0.7),  # feathered border
    Band(low=2, high=9, slope=1.0),  # bent network, across
    Band(low=2, high=9, slope=1.0),  # idem, down
    Band(low=2, high=10, slope=1.2),  # outlines of the color patches: each uses a different mixture of the two
    Band(low=2, high=10, slope=1.2),
    Band(low=5, high=34, slope=0.8),  # mottled pigment
)
_OUTLINE_POINTS = 4096
_DOT_PIGMENT = np.array([0.40, 0.32, 0.32])
_CYST, _COMEDO = np.array([0.96, 0.90, 0.74]), np.array([0.30, 0.20, 0.15])
_VESSEL, _LACUNA = np.array([0.78, 0.22, 0.28]), np.array([0.50, 0.12, 0.26])
_SCAR, _SCALE = np.array([0.96, 0.88, 0.86]), np.array([0.97, 0.93, 0.82])
_INK, _HAIR, _BUBBLES, _RULER, _FRAME = range(20, 25)  # purposes of random streams
_INKS = np.array([[0.42, 0.36, 0.78], [0.30, 0.50, 0.72], [0.50, 0.30, 0.62]])
_HAIR_COLORS = np.array([[0.07, 0.05, 0.04], [0.16, 0.09, 0.06], [0.28, 0.17, 0.10], [0.74, 0.70, 0.66]])
_RULER_COLOR, _FRAME_COLOR = np.array([0.10, 0.10, 0.13]), np.array([0.025, 0.02, 0.022])
_GLINT, _RIM = np.array([1.0, 1.0, 1.0]), np.array([0.72, 0.66, 0.66])
_BUBBLE = ((1.0, tint, _RIM, 0.8), (0.78, blend, _GLINT, 0.35), (0.55, tint, _RIM, 0.35))  # from the rim inwards


def render(scene: Scene, resolution: int) -> np.ndarray:
    """Return uint8 [resolution, resolution, 3] pixels.

    resolution: a power of two
    """
    # Fine shapes are drawn on at least 64 pixels, and below 256 pixels at twice the final size.
    factor = max(64 // resolution, 2 if resolution < 256 else 1)
    canvas = Canvas(factor * resolution)
    rgb = _skin(canvas, scene)
    _paint_lesion(rgb, canvas, scene)
    _paint_artifacts(rgb, canvas, scene)
    pixels = _shrink(np.clip(rgb, 0, 1), factor) * np.float32(255)
    return np.ascontiguousarray(np.rint(pixels).astype(np.uint8).transpose(1, 2, 0))


def _skin(canvas: Canvas, scene: Scene) -> np.ndarray:
    """Return skin alone, [3, H, W] float32."""
    rng = stream(scene.seed, _SKIN, scene.index)
    shading, blotches, vessels, fine = (noise_field(rng, band, canvas.size) for band in _SCENE_FIELDS)
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


# Lesion


class _Frame:
    """Pixel coordinates relative to the lesion, in radii, rotated with it; and the noise at these points.

    u, v, rho: [H, W] float32; noise: [len(_FIELDS), H, W] float32
    """

    def __init__(self, canvas: Canvas, scene: Scene):
        self.canvas, self.center = canvas, scene.view.center
        self.radius = 0.5 * scene.lesion.diameter_mm / scene.view.field_mm  # in image widths
        self.cos, self.sin = math.cos(scene.view.rotation), math.sin(scene.view.rotation)
        dx = (canvas.x - np.float32(self.center[0])) * np.float32(1 / self.radius)
        dy = (canvas.y - np.float32(self.center[1])) * np.float32(1 / self.radius)
        self.u = dx * np.float32(self.cos) + dy * np.float32(self.sin)
        self.v = dy * np.float32(self.cos) - dx * np.float32(self.sin)
        self.rho = np.hypot(self.u, self.v)
        size = min(max(canvas.size // 2, 64), 512)
        rng = stream(scene.seed, _TEXTURE, scene.lesion_number)
        fields = np.stack([noise_field(rng, band, size) for band in _FIELDS])
        self.noise = sample_periodic(fields, self.u * np.float32(1 / _PERIOD), self.v * np.float32(1 / _PERIOD))

    def on_image(self, u: float, v: float) -> tuple[float, float]:
        """Return the position of a point of the lesion in the image, in image widths from the center."""
        return (self.center[0] + self.radius * (u * self.cos - v * self.sin),
                self.center[1] + self.radius * (u * self.sin + v * self.cos))


def _paint_lesion(rgb: np.ndarray, canvas: Canvas, scene: Scene) -> None:
    """Paint in place on rgb [3, H, W] float32 in [0, 1]."""
    lesion = scene.lesion
    frame = _Frame(canvas, scene)
    depth = _depth(frame, lesion, stream(scene.seed, _OUTLINE, scene.lesion_number))
    edge = max(lesion.edge_mm / (0.5 * lesion.diameter_mm), float(canvas.pixel) / frame.radius)
    inside = smoothstep(-0.5 * edge, 0.5 * edge, depth)
    _paint_pigments(rgb, frame, lesion, inside, depth, stream(scene.seed, _PATCHES, scene.lesion_number))
    _paint_dots(rgb, frame, lesion, stream(scene.seed, _DOTS, scene.lesion_number))
    paint_structure = _PAINT_STRUCTURE.get(lesion.structure)
    if paint_structure is not None:
        paint_structure(rgb, frame, inside, stream(scene.seed, _STRUCTURE, scene.lesion_number))


def _depth(frame: _Frame, lesion: Lesion, rng: np.random.Generator) -> np.ndarray:
    """Return the distance of each pixel from the border, [H, W] in radii, positive inside."""
    stretch = np.float32(math.sqrt(lesion.elongation))
    u, v = frame.u / stretch, frame.v * stretch
    turn = np.arctan2(v, u) * np.float32(_OUTLINE_POINTS / math.tau)
    outline = np.take(_outline(lesion, rng), np.rint(turn).astype(np.int64) % _OUTLINE_POINTS)
    feather = frame.noise[0] * np.float32(0.015 + 0.16 * lesion.border_irregularity ** 1.5)
    return outline + feather - np.hypot(u, v)


def _outline(lesion: Lesion, rng: np.random.Generator) -> np.ndarray:
    """Return the radius of the border in _OUTLINE_POINTS directions, float32 around 1."""
    # Odd waves make the halves differ; the fast waves are the notches of an irregular border.
    lopsided = _waves(np.array([1, 3, 5]), np.array([0.6, 1.0, 0.4]), rng)
    notched = _waves(np.arange(4, 15), np.arange(4, 15) ** -0.6, rng)
    radius = 1 + 0.24 * lesion.asymmetry * lopsided + (0.005 + 0.21 * lesion.border_irregularity ** 1.5) * notched
    return np.clip(radius, 0.35, 1.6).astype(np.float32)


def _waves(orders: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a sum of waves around the circle with random amplitudes and phases, of mean square 1."""
    heights = weights * (0.4 + rng.random(len(orders)))
    phases = math.tau * rng.random(len(orders))
    spectrum = np.zeros(orders.max() + 1, np.complex128)
    spectrum[orders] = heights * np.exp(1j * phases) / np.sqrt(2 * (heights ** 2).sum())
    return np.fft.irfft(spectrum, n=_OUTLINE_POINTS, norm="forward")


def _paint_pigments(rgb: np.ndarray, frame: _Frame, lesion: Lesion, inside: np.ndarray, depth: np.ndarray,
                    rng: np.random.Generator) -> None:
    """Darken by the optical density of the pigments (Beer-Lambert law), then add the veils."""
    masks = _patch_masks(frame, lesion, rng)
    density = np.broadcast_to(_density(lesion.colors[0]), rgb.shape).copy()
    for color, mask in zip(lesion.colors[1:], masks):
        density += mask * (_density(color) - density)
    thickness = 0.72 + 0.28 * smoothstep(0.0, 0.6, depth) + np.float32(0.13) * frame.noise[5]
    if lesion.network:
        thickness += np.float32(lesion.network) * _network(frame, lesion) * smoothstep(-0.1, 0.25, depth)
    thickness = np.clip(thickness, 0.15, 2.2) * np.float32(lesion.pigmentation) * inside
    rgb *= np.exp(-density * thickness)
    for color, mask in zip(lesion.colors, (np.ones_like(inside), *masks)):
        pigment = PIGMENTS[color]
        if pigment.opacity:
            # Scattered light has passed the skin's own melanin.
            scattered = np.array(pigment.veil) * (1 - 0.5 * (lesion.skin_tone - 1) / (NUM_SKIN_TONES - 1))
            mottled = np.clip(1 + np.float32(0.25) * frame.noise[5], 0, 1.5)
            blend(rgb, scattered, mask * inside * mottled * np.float32(pigment.opacity))


def _density(color: str) -> np.ndarray:
    return -np.log(np.array(PIGMENTS[color].transmittance, np.float32)).reshape(3, 1, 1)


def _patch_masks(frame: _Frame, lesion: Lesion, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the mask of each color after the first, [H, W] from 0 to 1; concentric without asymmetry."""
    masks = []
    first_turn = math.tau * rng.random()
    for number in range(len(lesion.colors) - 1):
        turn = first_turn + number * 2.4 + 0.8 * rng.random()  # 2.4: the golden angle, so that patches lie apart
        offset = lesion.asymmetry * (0.7 + 0.5 * rng.random())
        size = 0.62 - 0.11 * number + 0.12 * rng.random()
        mix = math.tau * rng.random()
        u, v = frame.u - np.float32(offset * math.cos(turn)), frame.v - np.float32(offset * math.sin(turn))
        ragged = frame.noise[3] * np.float32(math.cos(mix)) + frame.noise[4] * np.float32(math.sin(mix))
        masks.append(smoothstep(-0.14, 0.14, np.float32(size) - np.hypot(u, v) + np.float32(0.17) * ragged))
    return masks


def _network(frame: _Frame, lesion: Lesion) -> np.ndarray:
    """Return a net of dark lines around pale holes, [H, W] from -1 to 1: three plane waves at 120 degrees, bent."""
    # A hole every 0.7 mm: coarser than in reality, to be visible at 64 pixels.
    holes_per_radius = 0.5 * lesion.diameter_mm / 0.7
    scale = np.float32(math.tau * holes_per_radius)
    u, v = (frame.u + np.float32(0.05) * frame.noise[1]) * scale, (frame.v + np.float32(0.05) * frame.noise[2]) * scale
    side = v * np.float32(math.sqrt(0.75))
    holes = np.cos(u) + np.cos(side - u * np.float32(0.5)) + np.cos(side + u * np.float32(0.5))  # from -1.5 to 3
    return 0.55 - smoothstep(-1.2, 1.6, holes)


def _spots(rng: np.random.Generator, count: int, reach: float):
    """Yield points (u, v), uniform on a disc, and a random number for each."""
    for turn, distance, extra in rng.random((count, 3)).tolist():
        far = reach * math.sqrt(distance)
        yield far * math.cos(math.tau * turn), far * math.sin(math.tau * turn), extra


def _paint_dots(rgb: np.ndarray, frame: _Frame, lesion: Lesion, rng: np.random.Generator) -> None:
    for u, v, extra in _spots(rng, lesion.num_dots, 0.85):
        _paint_disc(rgb, frame, u, v, 0.035 + 0.035 * extra, tint, _DOT_PIGMENT, 1.0)


def _paint_disc(rgb: np.ndarray, frame: _Frame, u: float, v: float, radius: float, paint, color: np.ndarray,
                opacity: float, softness: float = 0.5) -> None:
    window, cover = disc(frame.canvas, *frame.on_image(u, v), radius * frame.radius, softness)
    paint(rgb[:, *window], color, cover * np.float32(opacity))


def _paint_cysts(rgb: np.ndarray, frame: _Frame, inside: np.ndarray, rng: np.random.Generator) -> None:
    """Paint milia-like cysts, and the plugs of comedo-like openings."""
    for u, v, extra in _spots(rng, 12, 0.75):
        _paint_disc(rgb, frame, u, v, 0.05 + 0.06 * extra, blend, _CYST, 0.75)
    for u, v, extra in _spots(rng, 5, 0.75):
        _paint_disc(rgb, frame, u, v, 0.05 + 0.07 * extra, tint, _COMEDO, 0.8)


def _paint_vessels(rgb: np.ndarray, frame: _Frame, inside: np.ndarray, rng: np.random.Generator) -> None:
    """Paint arborizing vessels: thick red trunks with thinner branches."""
    cover = np.zeros_like(inside)
    scale = frame.radius
    for u, v, extra in _spots(rng, 4, 0.55):
        trunk = math.tau * extra + math.atan2(frame.sin, frame.cos)
        for step in range(4):
            turn, width = (0.0, 0.045) if step == 0 else ((-1) ** step * (0.6 + 0.2 * step), 0.03)
            along = 0.0 if step == 0 else 0.28 * (step - 2)
            x, y = frame.on_image(u, v)
            x, y = x + along * scale * math.cos(trunk), y + along * scale * math.sin(trunk)
            if step:
                x, y = x + 0.2 * scale * math.cos(trunk + turn), y + 0.2 * scale * math.sin(trunk + turn)
            cover = np.maximum(cover, stroke(
                frame.canvas, x=x, y=y, angle=trunk + turn, length=scale * (1.1 if step == 0 else 0.45),
                bend=(0.5 - extra) * 2.4 / scale, width=width * scale))
    tint(rgb, _VESSEL, cover * np.float32(0.9))


def _paint_lacunae(rgb: np.ndarray, frame: _Frame, inside: np.ndarray, rng: np.random.Generator) -> None:
    """Paint the round blood-filled spaces of a hemangioma."""
    for u, v, extra in _spots(rng, 12, 0.75):
        _paint_disc(rgb, frame, u, v, 0.14 + 0.16 * extra, tint, _LACUNA, 0.65, softness=0.25)


def _paint_scar(rgb: np.ndarray, frame: _Frame, inside: np.ndarray, rng: np.random.Generator) -> None:
    """Paint the white patch in the middle of a dermatofibroma."""
    size = 0.38 + 0.2 * rng.random()
    blend(rgb, _SCAR, smoothstep(-0.3, 0.3, size - frame.rho + 0.1 * frame.noise[3]) * inside * np.float32(0.6))


def _paint_scales(rgb: np.ndarray, frame: _Frame, inside: np.ndarray, rng: np.random.Generator) -> None:
    """Paint yellow-white scales where mottled noise is high."""
    blend(rgb, _SCALE, smoothstep(0.7, 1.5, frame.noise[5] + 0.5 * frame.noise[0]) * inside * np.float32(0.7))


_PAINT_STRUCTURE = {"cysts": _paint_cysts, "vessels": _paint_vessels, "lacunae": _paint_lacunae, "scar": _paint_scar,
                    "scales": _paint_scales}


# Between skin and camera


def _paint_artifacts(rgb: np.ndarray, canvas: Canvas, scene: Scene) -> None:
    """Paint in place on rgb [3, H, W] float32, from the skin up to the camera; values may leave [0, 1]."""
    view = scene.view
    for name, purpose, paint in _LAYERS:
        if name in view.artifacts:
            paint(rgb, canvas, view, stream(scene.seed, purpose, scene.index))
    _light(rgb, canvas, view)
    if "frame" in view.artifacts:
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
    """Paint hairs that run roughly in one direction."""
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
    """Paint a ruler along one side: a mark every millimeter, a longer one every five."""
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
    """Apply brightness, white balance, a gradient, and vignetting."""
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
