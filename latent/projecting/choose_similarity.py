"""Choose what "near" means for a projection: a network with weights, or something that needs none."""

import sys

from dnnlib.cache import FetchError
from dnnlib.cli import UserError
from metrics.detectors.opening import SIMILARITY_NAMES, open_similarity, similarity_at_hand
from metrics.detectors.similarity import Similarity
from torch_utils.distributed import Processes, broadcast_object

USUAL, OFFLINE, LAST = "lpips-vgg16", "efficientnet-lite0", "pixels"


def choose_similarity(name: str | None, weights: str | None, processes: Processes) -> Similarity:
    """Return the similarity on the device of this process; all processes of a run call it together.

    name:     --detector; None for LPIPS where its weights are given, at hand or can be fetched, else for what needs
              no network, which is said on standard error
    weights:  --detector-weights

    Raises UserError when it is not known, or what it needs is missing.
    """
    if name is not None and name not in SIMILARITY_NAMES:
        raise UserError(f"--detector is {name}; expected one of {', '.join(SIMILARITY_NAMES)}")
    similarity = None
    if processes.rank == 0:  # it fetches what the others then find
        similarity = _open(name, weights, processes)
    chosen = broadcast_object(None if similarity is None else similarity.name)
    return similarity or open_similarity(chosen, device=processes.device, weights=weights)


def _open(name: str | None, weights: str | None, processes: Processes) -> Similarity:
    if name is not None or weights is not None:
        return open_similarity(name or USUAL, device=processes.device, weights=weights)
    try:
        return open_similarity(USUAL, device=processes.device)
    except FetchError as error:
        other = OFFLINE if similarity_at_hand(OFFLINE) else LAST
        print(f"{error}. Going on with {other}, whose distances do not compare with those of {USUAL}; --detector=NAME "
              f"chooses: {', '.join(SIMILARITY_NAMES)}", file=sys.stderr)
        return open_similarity(other, device=processes.device)
