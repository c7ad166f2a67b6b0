"""Choose the metrics of a training run: those asked for, or the usual one where it can be computed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dnnlib.cli import UserError
from metrics.detector_choice import SIMILARITY, choose_detector, parse_weights
from metrics.detectors.opening import open_detector, open_similarity, similarity_at_hand, weights_at_hand
from metrics.names import DEFAULT_METRIC, LOWER_IS_BETTER, parse_metric, parse_metrics


class Best(NamedTuple):
    """By which value of a metric networks are compared."""

    metric: str
    key: str  # of the value among the metric's results
    lower_is_better: bool


def choose_metrics(text: str | None, detector: str | None, weights: Sequence[str],
                   best: str | None = None) -> tuple[tuple[str, ...], str | None, Best | None]:
    """Return names of metrics, a line for the user where they are not what is usual, and what `best` means.

    text:      names with commas between them, or "none"; None where nothing was asked for
    detector:  to use in place of each metric's usual one; None for that
    weights:   files of weights, as FILE or NAME=FILE
    best:      one of the metrics, or one of its values where it has two of equal rank, such as pr50k3_full_recall

    Raises UserError for metrics and detectors that are not known or do not go together.
    """
    names, note = _choose_names(text, detector, weights)
    return names, note, _choose_best(best, names)


def _choose_names(text: str | None, detector: str | None,
                  weights: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    if text is not None and text.strip().lower() == "none":
        if detector is not None or weights:
            raise UserError("--metrics is none with --detector or --detector-weights; expected metrics for them: name "
                            "some, such as --metrics=kid5k_full")
        return (), None
    names = (DEFAULT_METRIC,) if text is None else tuple(request.name for request in parse_metrics(text))
    detectors = needed_detectors(names, detector, weights)
    if text is None and not all(_is_at_hand(name, file) for name, file in detectors.items()):
        return (), (f"metrics: none, since {DEFAULT_METRIC} needs weights of {', '.join(detectors)} that are not at "
                    f"hand (--metrics={DEFAULT_METRIC} fetches them, --metrics=kid5k_full "
                    "--detector=efficientnet-lite0 needs no network, --metrics=none omits this line)")
    return names, None


def _choose_best(text: str | None, names: Sequence[str]) -> Best | None:
    """Return the value that --keep-best means. Raises UserError when it is none of the run's."""
    if text is None:
        return None
    known = []
    for request in map(parse_metric, names):
        keys = request.keys[:1] if request.kind == "is" else request.keys  # the spread of IS is no quality
        if text in keys or (text == request.name and len(keys) == 1):
            return Best(request.name, text if text in keys else keys[0], LOWER_IS_BETTER[request.kind])
        if text == request.name:
            raise UserError(f"--keep-best is {text}, which gives {len(keys)} values; expected one of them: "
                            f"{' or '.join(keys)}")
        known.extend(keys)
    expected = f"one of {', '.join(known)}, or another one" if known else "a metric"
    raise UserError(f"--keep-best is {text}, which is not among --metrics ({', '.join(names) or 'none'}); expected "
                    f"{expected} that is computed with each network file: name it in --metrics too")


def needed_detectors(names: Iterable[str], detector: str | None, weights: Sequence[str]) -> dict[str, str | None]:
    """Return the networks that metrics look through, each with its file of weights, None for the usual one.

    Arguments and errors are those of `choose_metrics`.
    """
    needed = list(dict.fromkeys(choose_detector(parse_metric(name), detector) for name in names))
    files = parse_weights(weights, needed)
    return {name: files.get(name) for name in needed}


def require_detectors(detectors: Mapping[str, str | None]) -> None:
    """Open networks and fetch what is missing, so that a long run cannot fail of it later; they are not kept.

    Raises UserError, one line, when weights cannot be had.
    """
    for name, file in detectors.items():
        if name == SIMILARITY:
            open_similarity(device="cpu", weights=file)
        else:
            open_detector(name, device="cpu", weights=file)


def _is_at_hand(name: str, weights: str | None) -> bool:
    return similarity_at_hand(name, weights) if name == SIMILARITY else weights_at_hand(name, weights)
