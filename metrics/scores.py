"""From features to values: the values of each metric between two samples, with jackknives, intervals and notes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics.authenticity import authenticity
from metrics.diversity import diversity
from metrics.frechet import FeatureStats, frechet_distance, frechet_jackknife
from metrics.inception_score import inception_score, score_jackknife
from metrics.intervals import Jackknife, TooFew, bootstrap_mean, unit_of
from metrics.kernel import MAX_PERMUTED, kernel_distances, kernel_jackknife, permuted_distances
from metrics.names import IS_SPLITS, MetricRequest
from metrics.precision_recall import neighborhoods
from metrics.samples import Sample

# Binkowski et al. 2018; the same numbers as in Karras et al. 2020.
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
_MEMORY_FACTOR = 4  # GPU memory to that of features: theirs in float32, a float64 copy, and blocks of pairs
_FAKE_SIDE = ("precision", "density")  # values per generated image; those of recall and coverage are per real one


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How values are computed."""

    seed: int  # random seed of subsets
    level: float | None  # of intervals; None computes none
    device: torch.device  # where matrices of all pairs are computed


@dataclass(frozen=True, kw_only=True)
class Score:
    """The values of a metric between two samples."""

    results: dict[str, float]  # by key
    fields: dict[str, Any] = field(default_factory=dict)  # further fields of the record
    jackknives: dict[str, Jackknife | str] = field(default_factory=dict)  # by key; or why there is none
    # For precision, recall, density and coverage, by key: a value per image, whose mean is the metric, the groups of
    # these images, and their side
    indicators: dict[str, tuple[np.ndarray, np.ndarray | None, str]] = field(default_factory=dict)

    def intervals(self, scoring: Scoring) -> dict[str, dict[str, Any]]:
        """Return the record of the interval by key, or {"reason": why there is none}."""
        found = {}
        for key, jackknife in self.jackknives.items():
            found[key] = interval_record(jackknife, scoring.level)
            if key in self.indicators and "reason" not in found[key]:
                values, groups, side = self.indicators[key]
                given = bootstrap_mean(values, groups, is_share=self.jackknives[key].is_share, level=scoring.level,
                                       seed=scoring.seed)
                found[key]["given_neighborhoods"] = {
                    "low": given.low, "high": given.high, "std_error": given.std_error, "method": given.method,
                    "unit": given.unit, "num_units": {side: sum(given.num_units.values())}}
        return found


def interval_record(jackknife: Jackknife | str, level: float) -> dict[str, Any]:
    """Return the record of an interval; {"reason": ...} for a reason, or if there are too few groups."""
    if isinstance(jackknife, str):
        return {"reason": jackknife}
    try:
        return jackknife.interval(level).as_record()
    except TooFew as error:
        return {"reason": str(error)}


def share_work(request: MetricRequest) -> str:
    """Return a key that is equal for metrics of the same samples that are computed together, as pr and dc are."""
    return request.name if request.k is None else "neighborhoods"


def score_all(requests: Sequence[MetricRequest], real: Sample | None, fake: Sample, heldout: Sample | None,
              scoring: Scoring, on_rows: Callable[[int], None]) -> dict[str, Score]:
    """Return by name the scores of metrics of equal `share_work`, with jackknives if intervals are wanted.

    real:     None if the metrics need no reals
    heldout:  held-out images for C_T, or None
    on_rows:  called with the number of finished rows of matrices of all pairs of images

    Raises ValueError if there are too few images.
    """
    request = requests[0]
    if request.k is not None:
        scores = _neighborhood_scores(requests, real, fake, scoring, on_rows)
    elif request.kind == "is":
        scores = {request.name: _inception_score(request, fake, scoring)}
    else:
        compute = {"fid": _frechet_score, "kid": _kernel_score, "auth": _authenticity_score, "div": _diversity_score}
        more = (heldout,) if request.kind == "auth" else ()
        scores = {request.name: compute[request.kind](request, real, fake, *more, scoring, on_rows)}
    if scoring.level is None:
        return {name: replace(score, jackknives={}) for name, score in scores.items()}
    sides = (real, fake, heldout if request.kind == "auth" else None)
    unit = unit_of(*(None if side is None else side.groups for side in sides))
    return {name: replace(score, jackknives={
        key: replace(found, unit=unit) if isinstance(found, Jackknife) and found.unit == "group" else found
        for key, found in score.jackknives.items()}) for name, score in scores.items()}


def _frechet_score(request: MetricRequest, real: Sample, fake: Sample, scoring: Scoring,
                   on_rows: Callable[[int], None]) -> Score:
    stats = [side.features.stats for side in (real, fake)]
    score = score_statistics(request, *stats)
    found = _or_reason(scoring, lambda: frechet_jackknife(
        real.features.values, fake.features.values, real.groups, fake.groups, stats=stats, seed=scoring.seed,
        on_step=on_rows))
    return replace(score, jackknives={request.name: found})


def score_statistics(request: MetricRequest, real: FeatureStats, fake: FeatureStats) -> Score:
    """Return the score of a fid metric, which needs no more of the two sides than these."""
    distance = frechet_distance(real.mean, real.covariance(), fake.mean, fake.covariance())
    fewest = min(real.count, fake.count)
    note = {} if fewest > real.num_features else {
        "note": f"{fewest} images span less than the {real.num_features} dimensions of the features: the value is too "
                "high by an amount that depends on the numbers of images; compare only values for equal numbers, "
                "or use kid"}
    return Score(results={request.name: distance}, fields=note)


def _kernel_score(request: MetricRequest, real: Sample, fake: Sample, scoring: Scoring,
                  on_rows: Callable[[int], None]) -> Score:
    size = min(len(real), len(fake), KID_SUBSET_SIZE)
    differ = size < max(len(real), len(fake))  # otherwise each subset would be the whole set
    tensors = _tensors(real, fake, device=scoring.device)
    distances = kernel_distances(*tensors, KID_SUBSETS if differ else 1, size, scoring.seed, on_rows)
    spread = {"subset_std": float(distances.std())} if differ else {}
    found = _or_reason(scoring, lambda: kernel_jackknife(*tensors, real.groups, fake.groups, on_rows=on_rows))
    return Score(results={request.name: float(distances.mean())}, jackknives={request.name: found},
                 fields={"subsets": len(distances), "subset_size": size, **spread})


def permutation_record(real: Sample, held: Sample, scoring: Scoring,
                       on_rows: Callable[[int], None]) -> dict[str, Any]:
    """Return how the kernel distance of two real parts compares with that of random parts of their groups.

    {"reason": ...} if there are too many images or too few groups.
    """
    if len(real) + len(held) > MAX_PERMUTED:
        return {"reason": f"too many images for a permutation test: {len(real) + len(held)}, at most {MAX_PERMUTED}"}
    try:
        found = permuted_distances(*_tensors(real, held, device=scoring.device), real.groups, held.groups,
                                   seed=scoring.seed, on_rows=on_rows)
    except TooFew as error:
        return {"reason": str(error)}
    return {"estimate": float(found.estimate), "p_value": float(found.p_value), "permutations": len(found.null),
            "null_high": float(np.quantile(found.null, scoring.level)), "unit": unit_of(real.groups, held.groups),
            "num_units": {"real": real.num_groups, "fake": held.num_groups}}


def _neighborhood_scores(requests: Sequence[MetricRequest], real: Sample, fake: Sample, scoring: Scoring,
                         on_rows: Callable[[int], None]) -> dict[str, Score]:
    tensors, ks, reason = _tensors(real, fake, device=scoring.device), [request.k for request in requests], None
    try:
        found = neighborhoods(*tensors, ks, real_groups=real.groups, fake_groups=fake.groups,
                              jackknife=scoring.level is not None, on_rows=on_rows)
    except TooFew as error:  # for the jackknife alone
        found, reason = neighborhoods(*tensors, ks, on_rows=on_rows), str(error)
    scores = {}
    for request in requests:
        values, names = found[request.k], {"pr": ("precision", "recall"), "dc": ("density", "coverage")}[request.kind]
        keys = dict(zip(names, request.keys, strict=True))
        sides = {name: (fake.groups, "fake") if name in _FAKE_SIDE else (real.groups, "real") for name in names}
        scores[request.name] = Score(
            results={key: float(getattr(values, name)) for name, key in keys.items()},
            jackknives={key: reason or values.jackknives.get(name, "") for name, key in keys.items()},
            indicators={key: (values.indicators[name], *sides[name]) for name, key in keys.items()})
    return scores


def _inception_score(request: MetricRequest, fake: Sample, scoring: Scoring) -> Score:
    score = inception_score(fake.features.probabilities, IS_SPLITS)
    mean, std = request.keys
    found = _or_reason(scoring, lambda: score_jackknife(fake.features.probabilities, IS_SPLITS))
    return Score(results={mean: float(score.mean), std: float(score.std)},
                 jackknives={mean: found, std: "the standard deviation over splits has no interval"})


def _authenticity_score(request: MetricRequest, real: Sample, fake: Sample, heldout: Sample | None, scoring: Scoring,
                        on_rows: Callable[[int], None]) -> Score:
    train, generated, *other = _tensors(real, fake, *(() if heldout is None else (heldout,)), device=scoring.device)
    found = authenticity(train, generated, real.groups, *(other or (None,)),
                         None if heldout is None else heldout.groups, fake_groups=fake.groups,
                         jackknife=scoring.level is not None, seed=scoring.seed, on_rows=on_rows)
    jackknives = dict(zip(request.keys, (found.authpct, found.ct), strict=True))
    jackknives = {key: jackknife for key, jackknife in jackknives.items() if jackknife is not None}
    return Score(results=_estimates(jackknives), jackknives=jackknives,
                 fields={"note": f"no C_T: {found.note}"} if found.note else {})


def _diversity_score(request: MetricRequest, real: Sample, fake: Sample, scoring: Scoring,
                     on_rows: Callable[[int], None]) -> Score:
    found = diversity(*_tensors(real, fake, device=scoring.device), real.groups, fake.groups, on_rows=on_rows)
    jackknives = dict(zip(request.keys, (found.fake, found.real, found.ratio), strict=True))
    return Score(results=_estimates(jackknives), jackknives=jackknives)


def _estimates(jackknives: Mapping[str, Jackknife]) -> dict[str, float]:
    return {key: float(jackknife.estimate) for key, jackknife in jackknives.items()}


def _or_reason(scoring: Scoring, compute: Callable[[], Jackknife]) -> Jackknife | str:
    """Return a jackknife, or why there is none."""
    try:
        return "" if scoring.level is None else compute()
    except TooFew as error:
        return str(error)


def _tensors(*samples: Sample, device: torch.device) -> list[np.ndarray | Tensor]:
    """Return features [N, F] of each sample, on a GPU if they fit into its memory beside their float64 copies."""
    tables = [sample.features.values for sample in samples]
    size = _MEMORY_FACTOR * sum(table.nbytes for table in tables)
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0]:
        return tables
    return [torch.from_numpy(np.ascontiguousarray(table)).to(device) for table in tables]
