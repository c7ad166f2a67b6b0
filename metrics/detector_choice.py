"""Choose the network that each metric looks through, and its file of weights."""

from collections.abc import Iterable, Sequence

from dnnlib.cli import UserError
from metrics.detectors.opening import DETECTOR_NAMES
from metrics.names import MetricRequest

INCEPTION, VGG16 = "inception-v3", "vgg16"
SIMILARITY = "lpips-vgg16"  # of ppl

_USUAL = {"fid": INCEPTION, "kid": INCEPTION, "is": INCEPTION, "pr": VGG16}


def choose_detector(request: MetricRequest, detector: str | None) -> str:
    """Return the name of the network for a metric.

    detector:  to use in place of the usual one; None for that

    Raises UserError when it is not known, or cannot serve.
    """
    if detector is not None and detector not in DETECTOR_NAMES:
        raise UserError(f"detector {detector!r} is not known; expected one of {', '.join(DETECTOR_NAMES)}")
    if request.kind == "ppl":
        return SIMILARITY
    if request.kind == "is" and detector not in (None, INCEPTION):
        raise UserError(f"metric {request.name} needs probabilities of classes, which {detector} does not give; "
                        f"expected --detector={INCEPTION}, or another metric")
    return detector or _USUAL[request.kind]


def parse_weights(texts: Iterable[str], needed: Sequence[str]) -> dict[str, str]:
    """Return the files of weights by network, from texts FILE or NAME=FILE.

    needed:  names of the networks that are used; FILE alone serves where there is one

    Raises UserError when a file is of no network that is needed.
    """
    needed = list(dict.fromkeys(needed))
    found: dict[str, str] = {}
    for text in texts:
        name, separator, file = text.partition("=")
        if not separator or name not in (*DETECTOR_NAMES, SIMILARITY):
            if len(needed) > 1:
                raise UserError(f"--detector-weights is {text}, and {' and '.join(needed)} are needed; expected "
                                f"NAME=FILE, such as {needed[0]}={text}")
            name, file = needed[0], text
        if name not in needed:
            raise UserError(f"--detector-weights is {text}, but {name} is not used; expected weights of "
                            f"{' or '.join(needed)}")
        if name in found:
            raise UserError(f"--detector-weights names {name} twice; expected one file for each")
        found[name] = file
    return found
