"""Names of metrics: how they are parsed, what each measures, and which feature detector it needs.

A name such as pr50k3_full gives the kind, the number of generated images (50k), the number of neighbors (3), and that
all real images are used (full). `choose_metrics` chooses the metrics of a training run.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dnnlib.cli import UserError
from metrics.detectors.inception_v3 import InceptionV3
from metrics.detectors.lpips import PerceptualDistance
from metrics.detectors.registry import (
    DETECTOR_FORMS,
    is_detector,
    open_detector,
    open_similarity,
    similarity_at_hand,
    weights_at_hand,
)
from metrics.detectors.timm_encoder import check_has_weights
from metrics.detectors.vgg16 import VGG16Features

DEFAULT_METRIC = "fid50k_full"
# First those of Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data".
KNOWN_NAMES = (
    "fid50k_full", "kid50k_full", "pr50k3_full",
    "fid50k", "kid50k", "pr50k3",
    "is50k", "ppl2_wend", "ppl_zfull", "ppl_wfull", "ppl_zend", "ppl_wend",
    "dc5k5_full", "auth5k_full", "div5k_full",
)  # fmt: skip
FORMS = "fid2k_full, kid500, kid_full, pr2k3_full, dc600_full, auth_full, div_full, is10k, ppl1k2_wend"
IS_SPLITS = 10
DESCRIPTIONS = {
    "fid": "Frechet distance of Inception features: how far generated images as a whole are from real ones, quality "
           "and variety in one number. Lower is better. Biased by the number of images: use thousands, and compare "
           "only values for equal numbers.",
    "kid": "Kernel distance of Inception features: like fid, but unbiased. Lower is better; 0 (or slightly below) is "
           "best. A few hundred images are enough.",
    "pr": "Precision (share of generated images that look real: quality) and recall (share of real images that the "
          "generated ones cover: variety), from VGG16 features; the digit after k is the number of neighbors. Higher "
          "is better, at most 1. Needs thousands of images on both sides.",
    "dc": "Density (how many real neighborhoods a generated image lies in: quality; real images have about 1) and "
          "coverage (share of real images with a generated one in their neighborhood: variety), from VGG16 features; "
          "like pr, but an outlier counts less. Higher is better. Coverage falls when a class is missing; give it as "
          "many generated images as real ones.",
    "auth": "AuthPct: percentage of generated images that are farther from the nearest real one than that one is from "
            "its own nearest neighbor; copies of training images lower it. Higher is better; compare it with that of "
            "held-out images (--holdout), which also gives C_T: far below 0 means copies, far above 0 images unlike "
            "the real ones. --data must be the training set.",
    "div": "Diversity: mean distance of Inception features between two generated images, between two real ones, and "
           "the ratio of the two. A ratio far below 1 means that generated images resemble each other; higher is "
           "better, up to 1.",
    "is": "Inception score: whether each generated image resembles one ImageNet class, and all together many. Higher "
          "is better. Does not use real images, and means little for images of other things than ImageNet's. Needs "
          "10,000 images or more.",
    "ppl": "Perceptual path length: how smoothly images change with the latent, in z or w, anywhere on a path (full) "
           "or at its start (end). Lower is smoother. Does not use real images. ppl2 compares whole images, ppl their "
           "middle, where FFHQ has its faces. Needs 10,000 pairs of images or more.",
}
LPIPS = PerceptualDistance.name  # not a feature detector but a distance between images
# auth: Meehan et al. 2020 measure C_T of ImageNet's pictures on Inception features.
USUAL_DETECTORS = {"fid": InceptionV3.name, "kid": InceptionV3.name, "pr": VGG16Features.name, "dc": VGG16Features.name,
                   "auth": InceptionV3.name, "div": InceptionV3.name, "is": InceptionV3.name, "ppl": LPIPS}
# By kind, the endings of the keys of its values, and whether a lower value is better; None if neither is, as for C_T,
# which is best near 0, and for values that do not measure quality.
_VALUES: dict[str, dict[str, bool | None]] = {
    "fid": {"": True}, "kid": {"": True}, "ppl": {"": True}, "is": {"_mean": False, "_std": None},
    "pr": {"_precision": False, "_recall": False}, "dc": {"_density": False, "_coverage": False},
    "auth": {"_authpct": False, "_ct": None}, "div": {"_fake": None, "_real": None, "_ratio": False},
}  # fmt: skip
_DEFAULT_COUNT = 50_000
_NEIGHBORS = {"pr": 3, "dc": 5}  # Kynkaanniemi et al. 2019, Naeem et al. 2020
_COUNT = r"([1-9]\d*k|[1-9]\d*)"
_FEATURE = re.compile(rf"(fid|kid)(?:{_COUNT}(_full)?|_full)")
_NEIGHBORHOODS = re.compile(r"(pr|dc)(?:(?:([1-9]\d*k)([1-9]\d*)?|([1-9]\d*))(_full)?|_full)")
_OF_ALL_REALS = re.compile(rf"(auth|div){_COUNT}?_full")  # a part of the reals would hide copies of the others
_IS = re.compile(rf"is{_COUNT}")
_PPL = re.compile(r"ppl(?:([1-9]\d*k)?(2)?|([1-9]\d+))_([zw])(full|end)")


@dataclass(frozen=True, kw_only=True)
class MetricRequest:
    """One metric, parsed from its name."""

    name: str
    kind: str  # fid, kid, pr, dc, auth, div, is or ppl
    num_fakes: int | None  # for ppl, pairs; None = all images of a set, or as many from a network as there are reals
    num_reals: int | None = None  # at most; None = all
    full: bool = False  # all reals, unflipped; otherwise flipped ones are included if training used them
    k: int | None = None  # neighbors of pr and dc
    space: str | None = None  # of ppl: "z" or "w"
    sampling: str | None = None  # of ppl: "full" or "end"
    crop: bool = False  # of ppl

    @property
    def needs_reals(self) -> bool:
        return self.kind not in ("is", "ppl")

    def with_fakes(self, count: int) -> "MetricRequest":
        """Return a copy with `count` fakes if the name gives no number."""
        return self if self.num_fakes is not None else replace(self, num_fakes=count)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its results; that of C_T is there with held-out images only."""
        return tuple(self.name + ending for ending in _VALUES[self.kind])

    @property
    def lower_is_better(self) -> dict[str, bool]:
        """Whether lower values are better, by the keys of results that measure quality."""
        return {self.name + ending: lower for ending, lower in _VALUES[self.kind].items() if lower is not None}

    @property
    def fewest(self) -> int:
        """The smallest number of images, on each side, for which the metric is defined."""
        if self.k is not None:
            return self.k + 1
        return {"auth": 4, "div": 3, "is": IS_SPLITS}.get(self.kind, 2)


def parse_metrics(text: str | Iterable[str]) -> tuple[MetricRequest, ...]:
    """Parse names, in a list or separated by commas. Raises UserError, also for a name given twice."""
    names = [name.strip() for name in (text.split(",") if isinstance(text, str) else text) if name.strip()]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--metrics names {name} {names.count(name)} times; expected each metric once")
    if not names:
        raise UserError(f"no metric is named; expected names such as {FORMS}")
    return tuple(parse_metric(name) for name in names)


def parse_metric(name: str) -> MetricRequest:
    """Parse a name. Raises UserError, with examples, if it is not the name of a metric."""
    request = _parse(name)
    if request is None:
        raise UserError(f"metric {name!r} is not known; expected names such as {FORMS}, or one of "
                        f"{', '.join(KNOWN_NAMES)}")
    if request.num_fakes is not None and request.num_fakes < request.fewest:
        of_all = f", or {request.kind}_full for all images" if request.full else ""
        raise UserError(f"metric {name} takes {request.num_fakes} images; expected at least {request.fewest}{of_all}")
    return request


def _parse(name: str) -> MetricRequest | None:
    if match := _FEATURE.fullmatch(name):
        kind, count, full = match.groups()
        return _with_reals(name, kind, count, full is not None)
    if match := _NEIGHBORHOODS.fullmatch(name):
        kind, thousands, k, count, full = match.groups()
        return _with_reals(name, kind, thousands or count, full is not None, int(k or _NEIGHBORS[kind]))
    if match := _OF_ALL_REALS.fullmatch(name):
        return _with_reals(name, match[1], match[2], full=True)
    if match := _IS.fullmatch(name):
        return MetricRequest(name=name, kind="is", num_fakes=_count(match[1]))
    if match := _PPL.fullmatch(name):
        thousands, version, count, space, sampling = match.groups()
        size = thousands or count
        return MetricRequest(name=name, kind="ppl", num_fakes=_count(size) if size else _DEFAULT_COUNT, space=space,
                             sampling=sampling, crop=version is None)
    return None


def _with_reals(name: str, kind: str, count: str | None, full: bool, k: int | None = None) -> MetricRequest:
    if count is None:  # fid_full
        return MetricRequest(name=name, kind=kind, num_fakes=None, full=True, k=k)
    size = _count(count)
    return MetricRequest(name=name, kind=kind, num_fakes=size, num_reals=None if full else size, full=full, k=k)


def _count(text: str) -> int:
    return int(text[:-1]) * 1000 if text.endswith("k") else int(text)


def choose_detector(request: MetricRequest, detector: str | None) -> str:
    """Return the name of the detector for a metric.

    detector:  to use instead of the usual one; None = the usual one

    Raises UserError if it is not known, or does not suit the metric.
    """
    if detector is not None and not is_detector(detector):
        raise UserError(f"detector {detector!r} is not known; expected one of {DETECTOR_FORMS}")
    if request.kind == "ppl":
        return LPIPS
    if request.kind == "is" and detector not in (None, USUAL_DETECTORS["is"]):
        raise UserError(f"metric {request.name} needs probabilities of classes, which {detector} does not give; "
                        f"expected --detector={USUAL_DETECTORS['is']}, or another metric")
    return detector or USUAL_DETECTORS[request.kind]


def needed_detectors(metrics: str | Iterable[str], detector: str | None,
                     weights: Sequence[str]) -> dict[str, str | None]:
    """Return the detectors that metrics need, each with its file of weights; None = the usual file.

    metrics:   names, in a list or separated by commas
    detector:  to use instead of each metric's usual one; None = the usual one
    weights:   files of weights, as FILE or NAME=FILE; FILE alone is enough if one detector is needed

    Raises UserError if a metric or the detector is not known, they do not fit together, or a file is for a detector
    that is not needed.
    """
    files = dict.fromkeys(choose_detector(request, detector) for request in parse_metrics(metrics))
    needed = list(files)
    for text in weights:
        name, separator, file = text.partition("=")
        if not separator or not (is_detector(name) or name == LPIPS):
            if len(needed) > 1:
                raise UserError(f"--detector-weights is {text}, and {' and '.join(needed)} are needed; expected "
                                f"NAME=FILE, such as {needed[0]}={text}")
            name, file = needed[0], text
        if name not in needed:
            raise UserError(f"--detector-weights is {text}, but {name} is not used; expected weights of "
                            f"{' or '.join(needed)}")
        if files[name] is not None:
            raise UserError(f"--detector-weights names {name} twice; expected one file for each")
        files[name] = file
    for name in files:
        check_has_weights(name, files[name])
    return files


def require_detectors(detectors: Mapping[str, str | None]) -> None:
    """Open detectors once, downloading missing weights, so that a long run does not fail on them later.

    Raises UserError if weights cannot be obtained.
    """
    for name, file in detectors.items():
        if name == LPIPS:
            open_similarity(device="cpu", weights=file)
        else:
            open_detector(name, device="cpu", weights=file)


class BestMetric(NamedTuple):
    """The value of a metric by which snapshots are compared."""

    metric: str
    key: str  # of the value in the metric's results
    lower_is_better: bool


def choose_metrics(text: str | None, detector: str | None, weights: Sequence[str],
                   best: str | None = None) -> tuple[tuple[str, ...], str | None, BestMetric | None]:
    """Return the names of a training run's metrics, a line for the user if the default was dropped, and `best` parsed.

    text:      names separated by commas, or "none"; None = not given
    detector:  to use instead of each metric's usual one; None = the usual one
    weights:   files of weights, as FILE or NAME=FILE
    best:      a metric, or one of its values if it has two of equal rank, such as pr50k3_full_recall

    Raises UserError for metrics and detectors that are not known or do not fit together.
    """
    names, note = _choose_names(text, detector, weights)
    return names, note, _choose_best(best, names)


def _choose_names(text: str | None, detector: str | None,
                  weights: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    if text is not None and text.strip().lower() == "none":
        if detector is not None or weights:
            raise UserError("--metrics is none, but --detector or --detector-weights is given; expected metrics that "
                            "use them, such as --metrics=kid5k_full")
        return (), None
    names = (DEFAULT_METRIC,) if text is None else tuple(request.name for request in parse_metrics(text))
    detectors = needed_detectors(names, detector, weights)
    if text is None and not all(similarity_at_hand(name, file) if name == LPIPS else weights_at_hand(name, file)
                                for name, file in detectors.items()):
        return (), (f"metrics: none, since the weights of {', '.join(detectors)} that {DEFAULT_METRIC} needs are not "
                    f"on this machine (--metrics={DEFAULT_METRIC} downloads them, --metrics=kid5k_full "
                    "--detector=efficientnet-lite0 needs no download, --metrics=none omits this line)")
    return names, None


def _choose_best(text: str | None, names: Sequence[str]) -> BestMetric | None:
    """Return the value that --keep-best names. Raises UserError if the run does not compute it."""
    if text is None:
        return None
    known = []
    for request in map(parse_metric, names):
        keys = tuple(request.lower_is_better)
        if text in keys or (text == request.name and len(keys) == 1):
            key = text if text in keys else keys[0]
            return BestMetric(request.name, key, request.lower_is_better[key])
        if text == request.name:
            raise UserError(f"--keep-best is {text}, which has {len(keys)} values; expected one of them: "
                            f"{' or '.join(keys)}")
        known.extend(keys)
    expected = f"one of {', '.join(known)}" if known else "a metric that is computed for each snapshot"
    raise UserError(f"--keep-best is {text}, which is not among --metrics ({', '.join(names) or 'none'}); expected "
                    f"{expected}: add its metric to --metrics")
