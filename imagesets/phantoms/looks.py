"""What the classes of phantoms look like: known names have their own looks, any other name gets one from its letters.

Cartoons after the textbook descriptions of dermoscopy, not measured from any data.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from dnnlib.cli import UserError

STRUCTURES = ("none", "cysts", "vessels", "lacunae", "scar", "scales")


@dataclass(frozen=True, kw_only=True)
class Pigment:
    """How a colour changes skin: light goes through a film, then part of it is veiled by scattered light.

    transmittance: red, green, blue parts of the skin's light that pass, in (0, 1]
    veil:          colour of the scattered light on the lightest skin, in [0, 1]
    opacity:       part of the light that the veil replaces
    """

    transmittance: tuple[float, float, float]
    veil: tuple[float, float, float] = (0, 0, 0)
    opacity: float = 0.0


PIGMENTS: Mapping[str, Pigment] = MappingProxyType({
    "light_brown": Pigment(transmittance=(0.80, 0.66, 0.54)),
    "dark_brown": Pigment(transmittance=(0.48, 0.33, 0.27)),
    "black": Pigment(transmittance=(0.19, 0.15, 0.16)),
    "blue_grey": Pigment(transmittance=(0.50, 0.52, 0.62), veil=(0.42, 0.47, 0.58), opacity=0.55),
    "red": Pigment(transmittance=(0.84, 0.42, 0.42)),
    "pink": Pigment(transmittance=(0.98, 0.76, 0.78)),
    "white": Pigment(transmittance=(0.86, 0.74, 0.74), veil=(0.95, 0.88, 0.88), opacity=0.55),
    "yellow": Pigment(transmittance=(0.90, 0.76, 0.46), veil=(0.85, 0.70, 0.42), opacity=0.25),
    "purple": Pigment(transmittance=(0.66, 0.30, 0.46)),
    "violet": Pigment(transmittance=(0.44, 0.32, 0.56), veil=(0.40, 0.28, 0.55), opacity=0.2),
    "orange": Pigment(transmittance=(0.94, 0.62, 0.40)),
    "grey": Pigment(transmittance=(0.62, 0.60, 0.60), veil=(0.55, 0.53, 0.54), opacity=0.4),
})


@dataclass(frozen=True, kw_only=True)
class Look:
    """The law of a class's own attributes; all others follow one law for all classes.

    irregularity, asymmetry: mean and standard deviation, before clipping to [0.02, 0.98]
    num_colors: weights of 1, 2, ... colours
    base:       weights of the colour that the whole lesion has
    patches:    weights of the colours of patches in it
    structure:  one of STRUCTURES, what the class alone has
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
        patches={"dark_brown": 5, "light_brown": 4, "black": 1.5, "pink": 1, "red": 0.5, "blue_grey": 0.5}),
    "melanoma": Look(
        irregularity=(0.47, 0.14), asymmetry=(0.46, 0.15), num_colors=(14, 31, 32, 16, 7),
        base={"light_brown": 4, "dark_brown": 5, "pink": 1, "red": 0.5},
        patches={"black": 4, "dark_brown": 3, "blue_grey": 3, "red": 2, "white": 2, "light_brown": 2}),
    "keratosis": Look(
        irregularity=(0.34, 0.12), asymmetry=(0.36, 0.13), num_colors=(35, 45, 20),
        base={"yellow": 5, "light_brown": 4, "grey": 2}, patches={"dark_brown": 4, "yellow": 3, "grey": 2, "black": 1},
        structure="cysts"),
    "basal_cell": Look(
        irregularity=(0.40, 0.13), asymmetry=(0.44, 0.14), num_colors=(40, 40, 20),
        base={"pink": 6, "red": 1}, patches={"blue_grey": 4, "white": 2, "light_brown": 2, "grey": 1},
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

# Names as the ISIC, HAM10000 and DermaMNIST tables have them.
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
    """Raise UserError when two names mean one look, so that their phantoms could not be told apart."""
    seen: dict[str, str] = {}
    for class_name in class_names:
        first = seen.setdefault(_plain(class_name), class_name)
        if first != class_name:
            raise UserError(f"--classes has {first} and {class_name}, which look the same; keep one of them")


def _plain(class_name: str) -> str:
    name = "_".join(class_name.lower().replace("-", " ").replace("_", " ").split())
    return _ALIASES.get(name, name)


def _look_from_letters(name: str) -> Look:
    """Make up a look; the same name always gives the same one."""
    digest = hashlib.sha256(name.encode()).digest()
    colors = list(PIGMENTS)
    base = colors.pop(digest[0] % len(colors))
    return Look(
        irregularity=(0.2 + 0.4 * digest[1] / 255, 0.12), asymmetry=(0.2 + 0.4 * digest[2] / 255, 0.13),
        num_colors=(40, 40, 20), base={base: 1},
        patches={colors[digest[3] % len(colors)]: 2, colors[digest[4] % len(colors)]: 1},
        structure=STRUCTURES[digest[5] % len(STRUCTURES)])
