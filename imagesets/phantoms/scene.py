"""Draw what a phantom shows: the attributes of a lesion, and of one view of it.

Each attribute comes from its own uniform number of a stream of (seed, lesion) or (seed, image), so that it depends on
nothing else: not on the class, unless the class's look or a bias says so, not on the resolution, not on other images.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType

import numpy as np

from imagesets.phantoms.fields import stream
from imagesets.phantoms.looks import Look

NUM_SKIN_TONES = 6

# artefact -> how often it is seen
ARTEFACT_RATES: Mapping[str, float] = MappingProxyType({
    "hair": 0.35, "ruler": 0.15, "vignette": 0.45, "frame": 0.12, "ink": 0.06, "bubbles": 0.20})

_LESION, _COLORS, _VIEW, _ARTEFACTS = range(4)  # purposes of random streams; phantom_render numbers its own from 10
_NORMAL = NormalDist()
_NUM_DRAWS = 16  # uniform numbers a stream gives out; more than are used, so that a new attribute moves no other


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """A lesion and the skin around it: what all images of a group share."""

    skin_tone: int  # 1 (palest) to NUM_SKIN_TONES
    redness: float  # 0 to 1
    diameter_mm: float
    elongation: float  # length by width, 1 for a circle
    border_irregularity: float  # 0 to 1
    asymmetry: float  # 0 to 1
    edge_mm: float  # width of the fall from lesion to skin
    pigmentation: float  # 1 for the colours as phantom_looks.PIGMENTS has them, less for paler
    colors: tuple[str, ...]
    network: float  # contrast of the pigment network, 0 where there is none
    num_dots: int
    structure: str


@dataclass(frozen=True, kw_only=True)
class View:
    """One photograph: camera, light and artefacts."""

    field_mm: float  # width of the image
    center: tuple[float, float]  # of the lesion, in image widths from the middle
    rotation: float  # radians
    brightness: float
    warmth: float  # white balance, 0 is neutral
    pinkness: float  # idem, green against red and blue
    light_angle: float
    vignette_strength: float
    num_hairs: int
    artefacts: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A phantom before it is rendered; `seed`, `lesion_number` and `index` name the streams of the details."""

    seed: int
    lesion_number: int
    index: int
    lesion: Lesion
    view: View


def draw_scene(*, seed: int, lesion_number: int, index: int, look: Look, rates: Mapping[str, float]) -> Scene:
    """Draw a scene.

    rates: probability of each artefact
    """
    return Scene(seed=seed, lesion_number=lesion_number, index=index, lesion=_draw_lesion(seed, lesion_number, look),
                 view=_draw_view(seed, index, rates))


def attributes(scene: Scene) -> dict[str, str | int | float]:
    """Return what phantom.csv says of a scene, rounded, in the order of its columns."""
    lesion, view = scene.lesion, scene.view
    return {
        "skin_tone": lesion.skin_tone,
        "redness": round(lesion.redness, 3),
        "diameter_mm": round(lesion.diameter_mm, 2),
        "elongation": round(lesion.elongation, 3),
        "border_irregularity": round(lesion.border_irregularity, 3),
        "asymmetry": round(lesion.asymmetry, 3),
        "num_colors": len(lesion.colors),
        "colors": "+".join(lesion.colors),
        "structure": lesion.structure,
        "edge_mm": round(lesion.edge_mm, 2),
        "pigmentation": round(lesion.pigmentation, 3),
        "network": round(lesion.network, 3),
        "num_dots": lesion.num_dots,
        "field_mm": round(view.field_mm, 2),
        "rotation_deg": round(math.degrees(view.rotation), 1),
        "brightness": round(view.brightness, 3),
        "num_hairs": view.num_hairs,
        **{name: int(name in view.artefacts) for name in ARTEFACT_RATES},
    }


def _draw_lesion(seed: int, number: int, look: Look) -> Lesion:
    draws = _draws(seed, _LESION, number)
    return Lesion(
        skin_tone=1 + _choose(next(draws), (24, 28, 22, 13, 8, 5)),
        redness=next(draws) ** 1.5,
        diameter_mm=_clip(6.2 * math.exp(0.34 * _normal(next(draws))), 3.0, 12.0),
        elongation=1 + 0.6 * next(draws) ** 1.5,
        border_irregularity=_clip(look.irregularity[0] + look.irregularity[1] * _normal(next(draws)), 0.02, 0.98),
        asymmetry=_clip(look.asymmetry[0] + look.asymmetry[1] * _normal(next(draws)), 0.02, 0.98),
        edge_mm=0.2 * math.exp(2.1 * next(draws)),
        pigmentation=0.7 + 0.5 * next(draws),
        network=_sometimes(next(draws), 0.5, 0.25, 0.75),
        num_dots=round(_sometimes(next(draws), 0.35, 5, 28)),
        structure=look.structure,
        colors=_draw_colors(seed, number, look),
    )


def _draw_colors(seed: int, number: int, look: Look) -> tuple[str, ...]:
    draws = _draws(seed, _COLORS, number)
    wanted = 1 + _choose(next(draws), look.num_colors)
    bases = list(look.base)
    base = bases[_choose(next(draws), tuple(look.base.values()))]
    # Waiting times of rates equal to the weights: their order is a draw without replacement.
    waits = {color: -math.log(1 - next(draws)) / weight for color, weight in look.patches.items()}
    return (base, *[color for color in sorted(waits, key=waits.get) if color != base][:wanted - 1])


def _draw_view(seed: int, index: int, rates: Mapping[str, float]) -> View:
    draws = _draws(seed, _ARTEFACTS, index)
    shown = frozenset(name for name in ARTEFACT_RATES if next(draws) < rates[name])
    draws = _draws(seed, _VIEW, index)
    # Drawn also where nothing shows of them: an artefact then changes nothing but itself.
    hairs, shade = next(draws), next(draws)
    return View(
        field_mm=10.5 + 5.5 * next(draws),
        center=(0.08 * _clip(_normal(next(draws)), -1.6, 1.6), 0.08 * _clip(_normal(next(draws)), -1.6, 1.6)),
        rotation=math.tau * next(draws),
        brightness=_clip(1 + 0.09 * _normal(next(draws)), 0.78, 1.15),
        warmth=_clip(0.05 * _normal(next(draws)), -0.1, 0.1),
        pinkness=_clip(0.03 * _normal(next(draws)) + 0.02, -0.05, 0.1),
        light_angle=math.tau * next(draws),
        num_hairs=round(2 + 20 * hairs ** 2) if "hair" in shown else 0,
        vignette_strength=0.25 + 0.3 * shade if "vignette" in shown else 0.0,
        artefacts=shown,
    )


def _draws(seed: int, purpose: int, number: int):
    return iter(stream(seed, purpose, number).random(_NUM_DRAWS).tolist())


def _choose(uniform: float, weights: tuple[float, ...]) -> int:
    """Return an index with probability proportional to its weight."""
    return min(int(np.searchsorted(np.cumsum(weights), uniform * sum(weights), side="right")), len(weights) - 1)


def _normal(uniform: float) -> float:
    return _NORMAL.inv_cdf(_clip(uniform, 1e-9, 1 - 1e-9))


def _sometimes(uniform: float, probability: float, low: float, high: float) -> float:
    """Return 0, or with the given probability a number between low and high."""
    return low + (high - low) * uniform / probability if uniform < probability else 0


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
