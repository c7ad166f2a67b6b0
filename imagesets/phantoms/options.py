"""What a set of phantoms is asked to be, checked before anything is rendered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from dnnlib.cli import UserError
from imagesets.naming import listed, suggestion
from imagesets.phantoms.looks import check_looks_differ
from imagesets.phantoms.scene import ARTEFACT_RATES
from imagesets.resolutions import MIN_RESOLUTION, is_power_of_two, nearest_resolution

MAX_SIDE = 1024  # pixels; the details of a phantom are drawn for no more
DEFAULT_CLASSES: Mapping[str, float] = MappingProxyType({"benign": 0.87, "melanoma": 0.13})
_ROUNDING = 0.02  # by which shares may miss 1: seven of two decimals do so easily
_CLASSES_SYNTAX = "expected NAME:SHARE,NAME:SHARE,..., such as benign:0.87,melanoma:0.13"
_BIAS_SYNTAX = "expected NAME=P:P:... with a probability for each class, such as frame=0.4:0.02"


@dataclass(frozen=True, kw_only=True)
class PhantomOptions:
    """Fields are named as the options of the command.

    classes: {name: share of the images}, which add up to 1; the order numbers the labels
    bias:    {artefact: its probability in each class, in their order}; one not named is as frequent in all classes

    Raises UserError for values that do not fit.
    """

    count: int = 2000
    resolution: int = 64
    classes: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_CLASSES))
    seed: int = 0
    bias: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"--count={self.count}; expected at least 1")
        if self.seed < 0:
            raise UserError(f"--seed={self.seed}; expected at least 0")
        _check_side(self.resolution)
        _check_classes(self.classes)
        for name, probabilities in self.bias.items():
            _check_bias(name, probabilities, len(self.classes))

    def rates(self, label: int) -> dict[str, float]:
        """Return the probability of each artefact in a class."""
        return {name: self.bias[name][label] if name in self.bias else rate for name, rate in ARTEFACT_RATES.items()}


def check_square(width: int, height: int) -> None:
    """Raise UserError when --resolution is not square."""
    if width != height:
        side = nearest_resolution(max(width, height), MAX_SIDE)
        raise UserError(f"--resolution={width}x{height} is not square; expected for example {side}x{side}")


def parse_classes(text: str) -> dict[str, float]:
    """Return {"benign": 0.87, "melanoma": 0.13} of "benign:0.87,melanoma:0.13"."""
    classes: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.rpartition(":")
        name = name.strip()
        if not name or (number := _number(share)) is None:
            raise UserError(f"--classes has {part!r}; {_CLASSES_SYNTAX}")
        if name in classes:
            raise UserError(f"--classes has {name} twice; expected each name once")
        classes[name] = number
    return classes


def parse_bias(texts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return {"frame": (0.4, 0.02)} of ["frame=0.4:0.02"]."""
    bias: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        name = name.strip()
        probabilities = tuple(_number(number) for number in numbers.split(":"))
        if not name or None in probabilities:
            raise UserError(f"--bias={text}; {_BIAS_SYNTAX}")
        if name in bias:
            raise UserError(f"--bias names {name} twice; expected each name once")
        bias[name] = probabilities
    return bias


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_side(side: int) -> None:
    if not (is_power_of_two(side) and MIN_RESOLUTION <= side <= MAX_SIDE):
        near = nearest_resolution(side, MAX_SIDE)
        raise UserError(f"--resolution={side}x{side} is not a power of two from {MIN_RESOLUTION} to {MAX_SIDE}; "
                        f"expected for example {near}x{near}")


def _check_classes(classes: Mapping[str, float]) -> None:
    if not classes:
        raise UserError(f"--classes is empty; {_CLASSES_SYNTAX}")
    for name, share in classes.items():
        if not 0 < share <= 1:  # also false for a NaN
            raise UserError(f"--classes gives {name} the share {share:g}; expected above 0, up to 1")
    total = sum(classes.values())
    if abs(total - 1) > _ROUNDING:
        raise UserError(f"--classes has shares that add up to {total:.4g}; expected 1")
    check_looks_differ(list(classes))


def _check_bias(name: str, probabilities: Sequence[float], num_classes: int) -> None:
    if name not in ARTEFACT_RATES:
        known = list(ARTEFACT_RATES)
        raise UserError(f"--bias names {name}{suggestion(name, known)}; expected one of {listed(known)}")
    if len(probabilities) != num_classes:
        raise UserError(f"--bias gives {name} {len(probabilities)} probabilities; expected {num_classes}, one for each "
                        "class of --classes")
    for probability in probabilities:
        if not 0 <= probability <= 1:
            raise UserError(f"--bias gives {name} the probability {probability:g}; expected 0 to 1")
