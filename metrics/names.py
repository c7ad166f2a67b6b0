"""Read the names of metrics: what each asks for, and what it tells."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dnnlib.cli import UserError

DEFAULT_METRIC = "fid50k_full"
# As in Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data".
KNOWN_NAMES = (
    "fid50k_full", "kid50k_full", "pr50k3_full",
    "fid50k", "kid50k", "pr50k3",
    "is50k", "ppl2_wend", "ppl_zfull", "ppl_wfull", "ppl_zend", "ppl_wend",
)  # fmt: skip
FORMS = "fid2k_full, kid500, kid_full, pr2k3_full, is10k, ppl1k2_wend"
IS_SPLITS = 10

DESCRIPTIONS = {
    "fid": "Frechet distance of Inception features: how far the fakes as a whole are from the reals, quality and "
           "variety in one number. Lower is better. Biased by the number of images: compare equal numbers only, and "
           "take thousands.",
    "kid": "Kernel distance of Inception features: as fid, but without its bias. Lower is better, 0 (or slightly "
           "below) is best. Some hundreds of images will do.",
    "pr": "Precision (share of fakes that look like reals: quality) and recall (share of reals that the fakes reach: "
          "variety), from VGG16 features; the digit behind k is the number of neighbours. Higher is better, at most 1. "
          "Some thousands of images on both sides.",
    "is": "Inception score: whether fakes look like one ImageNet class each, and like many together. Higher is better. "
          "Looks at no reals, and says little of images that are of no ImageNet class. 10,000 images and more.",
    "ppl": "Perceptual path length: how evenly images change with the latent, in z or w, all along paths (full) or at "
           "their ends (end). Lower is smoother. Looks at no reals. ppl2 takes whole images, ppl the middle where FFHQ "
           "has its faces. 10,000 pairs of images and more.",
}
LOWER_IS_BETTER = {"fid": True, "kid": True, "pr": False, "is": False, "ppl": True}
_KEY_ENDINGS = {"pr": ("_precision", "_recall"), "is": ("_mean", "_std")}  # of metrics that give several values
_DEFAULT_COUNT = 50_000
_NEIGHBOURS = 3  # Kynkaanniemi et al. 2019
_COUNT = r"([1-9]\d*k|[1-9]\d*)"
_FEATURE = re.compile(rf"(fid|kid)(?:{_COUNT}(_full)?|_full)")
_PR = re.compile(r"pr(?:(?:([1-9]\d*k)([1-9]\d*)?|([1-9]\d*))(_full)?|_full)")
_IS = re.compile(rf"is{_COUNT}")
_PPL = re.compile(r"ppl(?:([1-9]\d*k)?(2)?|([1-9]\d+))_([zw])(full|end)")


@dataclass(frozen=True, kw_only=True)
class MetricRequest:
    """One metric with its numbers of images."""

    name: str
    kind: str  # fid, kid, pr, is or ppl
    num_fakes: int | None  # of ppl: pairs; None = all images of a set, of a network as many as reals
    num_reals: int | None = None  # at most so many; None = all
    full: bool = False  # all reals, as they are; otherwise mirrored ones count as well where the training saw them
    k: int | None = None  # neighbours of pr
    space: str | None = None  # of ppl: "z" or "w"
    sampling: str | None = None  # of ppl: "full" or "end"
    crop: bool = False  # of ppl

    @property
    def needs_reals(self) -> bool:
        return self.kind in ("fid", "kid", "pr")

    def with_fakes(self, count: int) -> "MetricRequest":
        """Return the same with the number of fakes that stands for all, where the name has none."""
        return self if self.num_fakes is not None else replace(self, num_fakes=count)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of its values."""
        return tuple(self.name + ending for ending in _KEY_ENDINGS.get(self.kind, ("",)))

    @property
    def fewest(self) -> int:
        """Number of images on each side below which the metric is not defined."""
        return {"fid": 2, "kid": 2, "pr": (self.k or 0) + 1, "is": IS_SPLITS, "ppl": 2}[self.kind]


def parse_metric(name: str) -> MetricRequest:
    """Return what a name asks for. Raises UserError, with a hint of the form, when it is no metric's."""
    request = _parse(name)
    if request is None:
        raise UserError(f"metric {name!r} is not known; expected names such as {FORMS}, or one of "
                        f"{', '.join(KNOWN_NAMES)}")
    if request.num_fakes is not None and request.num_fakes < request.fewest:
        of_all = f", or {request.kind}_full for all there are" if request.full else ""
        raise UserError(f"metric {name} takes {request.num_fakes} images; expected at least {request.fewest}{of_all}")
    return request


def parse_metrics(text: str | Iterable[str]) -> tuple[MetricRequest, ...]:
    """Return the requests of names, or of one text with commas between them. Raises UserError, also for one twice."""
    names = [name.strip() for name in (text.split(",") if isinstance(text, str) else text) if name.strip()]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--metrics names {name} {names.count(name)} times; expected each metric once")
    if not names:
        raise UserError(f"no metric is named; expected names such as {FORMS}")
    return tuple(parse_metric(name) for name in names)


def _parse(name: str) -> MetricRequest | None:
    if match := _FEATURE.fullmatch(name):
        kind, count, full = match.groups()
        return _with_reals(name, kind, count, full is not None)
    if match := _PR.fullmatch(name):
        thousands, k, count, full = match.groups()
        return _with_reals(name, "pr", thousands or count, full is not None, int(k or _NEIGHBOURS))
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
