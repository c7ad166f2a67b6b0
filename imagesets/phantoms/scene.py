"""Draw what a phantom shows: the attributes of a lesion, as its class looks, and of one view of it.

Known class names have typical looks, caricatures of textbook descriptions of dermoscopy, not measured on any data; any
other name gets a look derived from its letters. Each attribute comes from its own uniform number of a stream of (seed,
lesion) or (seed, image), so that it depends on nothing else: not on the class, unless the class's look or a bias
defines it so, not on the resolution, not on other images.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType

import numpy as np

from dnnlib.cli import UserError
from imagesets.phantoms.fields import stream

STRUCTURES = ("none", "cysts", "vessels", "lacunae", "scar", "scales")
NUM_SKIN_TONES = 6
# artifact -> how often it is seen
ARTIFACT_RATES: Mapping[str, float] = MappingProxyType({
    "hair": 0.35, "ruler": 0.15, "vignette": 0.45, "frame": 0.12, "ink": 0.06, "bubbles": 0.20})
_LESION, _COLORS, _VIEW, _ARTIFACTS = range(4)  # purposes of random streams; paint.py numbers its own from 10
_NORMAL = NormalDist()
_NUM_DRAWS = 16  # uniform numbers drawn from a stream; more than are used, so that a new attribute changes no other


@dataclass(frozen=True, kw_only=True)
class Pigment:
    """How a color changes skin: light passes a film, then part of it is replaced by scattered light.

    transmittance: red, green, blue parts of the skin's light that pass, in (0, 1]
    veil:          color of the scattered light on the lightest skin, in [0, 1]
    opacity:       part of the light that the veil replaces
    """

    transmittance: tuple[float, float, float]
    veil: tuple[float, float, float] = (0, 0, 0)
    opacity: float = 0.0


PIGMENTS: Mapping[str, Pigment] = MappingProxyType({
    "light_brown": Pigment(transmittance=(0.80, 0.66, 0.54)),
    "dark_brown": Pigment(transmittance=(0.48, 0.33, 0.27)),
    "black": Pigment(transmittance=(0.19, 0.15, 0.16)),
    "blue_gray": Pigment(transmittance=(0.50, 0.52, 0.62), veil=(0.42, 0.47, 0.58), opacity=0.55),
    "red": Pigment(transmittance=(0.84, 0.42, 0.42)),
    "pink": Pigment(transmittance=(0.98, 0.76, 0.78)),
    "white": Pigment(transmittance=(0.86, 0.74, 0.74), veil=(0.95, 0.88, 0.88), opacity=0.55),
    "yellow": Pigment(transmittance=(0.90, 0.76, 0.46), veil=(0.85, 0.70, 0.42), opacity=0.25),
    "purple": Pigment(transmittance=(0.66, 0.30, 0.46)),
    "violet": Pigment(transmittance=(0.44, 0.32, 0.56), veil=(0.40, 0.28, 0.55), opacity=0.2),
    "orange": Pigment(transmittance=(0.94, 0.62, 0.40)),
    "gray": Pigment(transmittance=(0.62, 0.60, 0.60), veil=(0.55, 0.53, 0.54), opacity=0.4),
})


@dataclass(frozen=True, kw_only=True)
class Look:
    """The distributions of the attributes that depend on the class; all others have one distribution.

    irregularity, asymmetry: mean and standard deviation, before clipping to [0.02, 0.98]
    num_colors: weights of 1, 2, ... colors
    base:       weights of the colors of the whole lesion
    patches:    weights of the colors of patches in it
    structure:  one of STRUCTURES, which only this class has
    """

    irregularity: tuple[float, float]
    asymmetry: tuple[float, float]
    num_colors: tuple[float, ...]
    base: Mapping[str, float]
    patches: Mapping[str, float]
    structure: str = "none"


LOOKS: Mapping[str, Look] = MappingProxyType({
    "nevus": Look(
        irregularity=(0.30, 0.14), asymmetry=(0.30, 0.15), num_colors=(46, 35, 15, 4),
        base={"light_brown": 5, "dark_brown": 4, "pink": 1},
        patches={"dark_brown": 5, "light_brown": 4, "black": 1.5, "pink": 1, "red": 0.5, "blue_gray": 0.5}),
    "melanoma": Look(
        irregularity=(0.47, 0.14), asymmetry=(0.46, 0.15), num_colors=(14, 31, 32, 16, 7),
        base={"light_brown": 4, "dark_brown": 5, "pink": 1, "red": 0.5},
        patches={"black": 4, "dark_brown": 3, "blue_gray": 3, "red": 2, "white": 2, "light_brown": 2}),
    "keratosis": Look(
        irregularity=(0.34, 0.12), asymmetry=(0.36, 0.13), num_colors=(35, 45, 20),
        base={"yellow": 5, "light_brown": 4, "gray": 2}, patches={"dark_brown": 4, "yellow": 3, "gray": 2, "black": 1},
        structure="cysts"),
    "basal_cell": Look(
        irregularity=(0.40, 0.13), asymmetry=(0.44, 0.14), num_colors=(40, 40, 20),
        base={"pink": 6, "red": 1}, patches={"blue_gray": 4, "white": 2, "light_brown": 2, "gray": 1},
        structure="vessels"),
    "actinic": Look(
        irregularity=(0.48, 0.13), asymmetry=(0.42, 0.14), num_colors=(45, 40, 15),
        base={"red": 4, "pink": 3, "orange": 3}, patches={"light_brown": 3, "yellow": 3, "pink": 2, "white": 1},
        structure="scales"),
    "vascular": Look(
        irregularity=(0.30, 0.12), asymmetry=(0.28, 0.12), num_colors=(60, 30, 10),
        base={"purple": 5, "red": 4, "violet": 3}, patches={"violet": 3, "black": 1, "purple": 2, "red": 2},
        structure="lacunae"),
    "dermatofibroma": Look(
        irregularity=(0.26, 0.11), asymmetry=(0.24, 0.11), num_colors=(60, 32, 8),
        base={"light_brown": 4, "pink": 3, "orange": 2}, patches={"dark_brown": 2, "pink": 3, "light_brown": 3},
        structure="scar"),
})

# Names from the ISIC, HAM10000 and DermaMNIST tables.
_ALIASES = MappingProxyType({
    "benign": "nevus", "nv": "nevus", "nevi": "nevus", "naevus": "nevus",
    "malignant": "melanoma", "mel": "melanoma",
    "bkl": "keratosis", "sk": "keratosis", "seborrheic_keratosis": "keratosis", "seborrhoeic_keratosis": "keratosis",
    "benign_keratosis": "keratosis",
    "bcc": "basal_cell", "basal_cell_carcinoma": "basal_cell",
    "ak": "actinic", "akiec": "actinic", "actinic_keratosis": "actinic",
    "vasc": "vascular", "vascular_lesion": "vascular",
    "df": "dermatofibroma",
})


def look_of(class_name: str) -> Look:
    """Return the look of a class; upper case, spaces and hyphens do not matter."""
    name = _plain(class_name)
    return LOOKS[name] if name in LOOKS else _look_from_letters(name)


def check_looks_differ(class_names: Sequence[str]) -> None:
    """Raise UserError when two class names have the same look."""
    seen: dict[str, str] = {}
    for class_name in class_names:
        first = seen.setdefault(_plain(class_name), class_name)
        if first != class_name:
            raise UserError(f"--classes has {first} and {class_name}, which look the same; keep one of them")


def _plain(class_name: str) -> str:
    name = "_".join(class_name.lower().replace("-", " ").replace("_", " ").split())
    return _ALIASES.get(name, name)


def _look_from_letters(name: str) -> Look:
    """Derive a look from a name; the same name always gives the same look."""
    digest = hashlib.sha256(name.encode()).digest()
    colors = list(PIGMENTS)
    base = colors.pop(digest[0] % len(colors))
    return Look(
        irregularity=(0.2 + 0.4 * digest[1] / 255, 0.12), asymmetry=(0.2 + 0.4 * digest[2] / 255, 0.13),
        num_colors=(40, 40, 20), base={base: 1},
        patches={colors[digest[3] % len(colors)]: 2, colors[digest[4] % len(colors)]: 1},
        structure=STRUCTURES[digest[5] % len(STRUCTURES)])


# Scenes


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """A lesion and the skin around it, which all images of a group share."""

    skin_tone: int  # 1 (palest) to NUM_SKIN_TONES
    redness: float  # 0 to 1
    diameter_mm: float
    elongation: float  # length by width, 1 for a circle
    border_irregularity: float  # 0 to 1
    asymmetry: float  # 0 to 1
    edge_mm: float  # width of the fall from lesion to skin
    pigmentation: float  # 1 for the colors of PIGMENTS, less for paler ones
    colors: tuple[str, ...]
    network: float  # contrast of the pigment network, 0 without one
    num_dots: int
    structure: str


@dataclass(frozen=True, kw_only=True)
class View:
    """One photograph: camera, light and artifacts."""

    field_mm: float  # width of the image
    center: tuple[float, float]  # of the lesion, in image widths from the middle
    rotation: float  # radians
    brightness: float
    warmth: float  # white balance, 0 is neutral
    pinkness: float  # idem, green against red and blue
    light_angle: float
    vignette_strength: float
    num_hairs: int
    artifacts: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A phantom before it is rendered; `seed`, `lesion_number` and `index` seed the random streams of the details."""

    seed: int
    lesion_number: int
    index: int
    lesion: Lesion
    view: View


def draw_scene(*, seed: int, lesion_number: int, index: int, look: Look, rates: Mapping[str, float]) -> Scene:
    """Draw a scene.

    rates: probability of each artifact
    """
    return Scene(seed=seed, lesion_number=lesion_number, index=index, lesion=_draw_lesion(seed, lesion_number, look),
                 view=_draw_view(seed, index, rates))


def attributes(scene: Scene) -> dict[str, str | int | float]:
    """Return the values of a scene in phantom.csv, rounded, in the order of its columns."""
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
        **{name: int(name in view.artifacts) for name in ARTIFACT_RATES},
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
    # Exponential waiting times with the weights as rates: their order is a draw without replacement.
    waits = {color: -math.log(1 - next(draws)) / weight for color, weight in look.patches.items()}
    return (base, *[color for color in sorted(waits, key=waits.get) if color != base][:wanted - 1])


def _draw_view(seed: int, index: int, rates: Mapping[str, float]) -> View:
    draws = _draws(seed, _ARTIFACTS, index)
    shown = frozenset(name for name in ARTIFACT_RATES if next(draws) < rates[name])
    draws = _draws(seed, _VIEW, index)
    # Always drawn, so that an artifact changes nothing but itself.
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
        artifacts=shown,
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
