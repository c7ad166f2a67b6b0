"""What a record states about two samples: values, intervals, the floor of held-out images, and the same by class."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from metrics.intervals import Jackknife, TooFew
from metrics.names import MetricRequest
from metrics.perceptual_path import EPSILON, path_length, path_length_jackknife
from metrics.samples import Sample, Samples
from metrics.scores import Score, Scoring, interval_record, permutation_record, score_all
from torch_utils.device import find_project_version, find_versions

# Images of a class, on each side, to be called the worst one: with fewer, chance decides which class it is.
FEWEST_TO_JUDGE = 30


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """Fields of a metric's record, and jackknives by key, of the values for which there are some."""

    record: dict[str, Any]
    jackknives: dict[str, Jackknife] = field(default_factory=dict)


def assess(requests: Sequence[MetricRequest], real: Sample | None, fake: Sample, heldout: Sample | None,
           scoring: Scoring, on_rows: Callable[[int], None]) -> dict[str, Assessment]:
    """Return by name the records and jackknives of metrics of equal `share_work`.

    real:     None if the metrics need no reals
    heldout:  held-out images for the floor and C_T; None = neither
    on_rows:  called with the number of finished rows of matrices of all pairs of images

    Raises TooFew if there are too few groups for a value, and ValueError if features are not finite, or all equal.
    """
    scores = score_all(requests, real, fake, heldout, scoring, on_rows)
    records = {name: {"results": score.results, **score.fields} for name, score in scores.items()}
    if scoring.level is not None:
        for name, score in scores.items():
            records[name]["ci"] = score.intervals(scoring)
    if heldout is not None and real is not None:
        for name, floor in _floors(requests, real, fake, heldout, scores, scoring, on_rows).items():
            records[name]["floor"] = floor
    return {name: Assessment(record=records[name], jackknives={
        key: found for key, found in score.jackknives.items() if isinstance(found, Jackknife)})
        for name, score in scores.items()}


def _floors(requests: Sequence[MetricRequest], real: Sample, fake: Sample, heldout: Sample,
            scores: Mapping[str, Score], scoring: Scoring, on_rows: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """Return by name the values of held-out images in place of the fakes, or the reason why there are none.

    scores:  those of the fakes
    """
    count = min(len(fake), len(heldout))
    fitting = [request for request in requests if count >= request.fewest]
    found = {request.name: {"reason": f"too few held-out images: {count}; the metric needs at least {request.fewest}"}
             for request in requests if request not in fitting}
    if not fitting:
        return found
    try:
        floors = score_all(fitting, real, heldout.first(count), None, scoring, on_rows)
        equal = scores if count == len(fake) else score_all(
            fitting, real, fake.first(count), heldout, replace(scoring, level=None), on_rows)
    except TooFew as error:  # too few groups
        return found | {request.name: {"reason": str(error)} for request in fitting}
    for request in fitting:
        floor = {"results": floors[request.name].results, "num_fake": count,
                 "at_equal_size": equal[request.name].results}
        if scoring.level is not None:
            floor["ci"] = floors[request.name].intervals(scoring)
            if request.kind == "kid":
                floor["permutation"] = permutation_record(real, heldout.first(count), scoring, on_rows)
        found[request.name] = floor
    return found


def assess_classes(requests: Sequence[MetricRequest], detector: str, counts: Mapping[str, int], *,
                   real: Samples | None, fake: Samples, heldout: Samples | None, scoring: Scoring,
                   on_rows: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """Return by name the fields per_class and worst_class of metrics of equal `share_work`.

    detector:       name of the detector of the features
    counts:         how many fakes of each class are used, by its name
    real, heldout:  None as in `assess`
    """
    classes: dict[str, dict[str, dict[str, Any]]] = {request.name: {} for request in requests}
    for name, num_fake in counts.items():
        on_rows(0)  # metrics that do not report rows take long, too
        of_class, fitting = None if real is None else real.get(detector, name), []
        for request in requests:
            num_real = None if of_class is None else len(of_class)
            if reason := _too_few(request, num_real, num_fake):
                classes[request.name][name] = {"reason": reason}
            else:
                fitting.append(request)
        if not fitting:
            continue
        of_heldout = None if heldout is None else heldout.get(detector, name)
        of_heldout = None if of_heldout is None or len(of_heldout) == 0 else of_heldout
        try:
            found = assess(fitting, of_class, fake.get(detector, name).first(num_fake), of_heldout, scoring, on_rows)
        except ValueError as error:  # few images may be all equal, or of one group
            for request in fitting:
                classes[request.name][name] = {"reason": str(error)}
            continue
        for request in fitting:
            record = {**found[request.name].record, "num_real": num_real or 0, "num_fake": num_fake,
                      "num_groups": 0 if of_class is None else of_class.num_groups}
            if heldout is not None and of_heldout is None:
                record["floor"] = {"reason": "there are no held-out images of this class"}
            if not _is_judged(request, record):
                _add_note(record, f"fewer than {FEWEST_TO_JUDGE} images on a side: not considered as the worst class")
            classes[request.name][name] = record
    for request in requests:
        if request.k is not None:
            _note_unequal_numbers([record for record in classes[request.name].values() if "results" in record])
    return {request.name: {"per_class": classes[request.name],
                           "worst_class": _worst_classes(request, classes[request.name])} for request in requests}


def assess_paths(request: MetricRequest, distances: Tensor, level: float | None,
                 class_names: Sequence[str]) -> Assessment:
    """Return the record and jackknife of a perceptual path length.

    distances:    float32 [N], as `PathSteps.distances` returns them
    level:        of intervals; None computes none
    class_names:  classes that are to be reported; empty without --per-class
    """
    record, jackknives = {"results": {request.name: path_length(distances)}, "epsilon": EPSILON}, {}
    if level is not None:
        jackknives = {request.name: path_length_jackknife(distances)}
        record["ci"] = {request.name: interval_record(jackknives[request.name], level)}
    if class_names:
        reason = {"reason": "path lengths of classes are not measured; measure one with calc_metrics.py --class"}
        record |= {"per_class": dict.fromkeys(class_names, reason), "worst_class": {}}
    return Assessment(record=record, jackknives=jackknives)


def method_fields(network: nn.Module, *, seed: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Return the fields of a record that state how a value was computed.

    network:  the detector, or the distance between images
    """
    return {"detector": network.name, "detector_sha256": network.weights_sha256,
            "preprocessing": network.preprocessing, "seed": seed, "batch": batch, "device": device.type,
            "versions": {**find_versions("torch", "numpy"), "project": find_project_version()}}


def _too_few(request: MetricRequest, num_real: int | None, num_fake: int) -> str | None:
    """Return why a metric cannot be computed for a class; None if it can."""
    if num_real == 0:
        return "there are no real images of this class"
    if num_fake == 0:
        return "there are no generated images of this class"
    if min(num_fake, num_fake if num_real is None else num_real) >= request.fewest:
        return None
    found = f"{num_fake} generated" if num_real is None else f"{num_real} real and {num_fake} generated"
    return f"too few images: {found}; the metric needs at least {request.fewest}"


def _note_unequal_numbers(records: Sequence[dict[str, Any]]) -> None:
    """Add a note to classes with few fakes for each real image: how many reals are near one depends on it."""
    shares = [record["num_fake"] / record["num_real"] for record in records]
    for record, share in zip(records, shares):
        if share < max(shares) / 2:
            _add_note(record, f"{record['num_fake']} generated for {record['num_real']} real images, less than half as "
                              "many for each as in another class, which lowers recall and coverage; compare with the "
                              "floor")


def _add_note(record: dict[str, Any], note: str) -> None:
    record["note"] = "; ".join([*([record["note"]] if "note" in record else []), note])


def _worst_classes(request: MetricRequest, classes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return {key: {"class", "value"}} of the class with the worst value, for values that have a better direction."""
    judged = {name: record for name, record in classes.items() if _is_judged(request, record)}
    found = {}
    for key, lower_is_better in request.lower_is_better.items():
        values = {name: record["results"][key] for name, record in judged.items()
                  if math.isfinite(record["results"][key])}
        if values:
            worst = (max if lower_is_better else min)(values, key=values.get)
            found[key] = {"class": worst, "value": values[worst]}
    return found


def _is_judged(request: MetricRequest, record: Mapping[str, Any]) -> bool:
    """Tell whether a class has values, from enough images to call it the worst one."""
    counts = [record.get("num_fake", 0), *([record.get("num_real", 0)] if request.needs_reals else [])]
    return "results" in record and min(counts) >= FEWEST_TO_JUDGE
