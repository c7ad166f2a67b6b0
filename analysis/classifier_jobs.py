"""The classifiers that a study asks for: its data, opened and checked, and what each classifier is trained on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis import regimes
from analysis.backbones import Backbone
from analysis.classifier import ALL, HEAD
from analysis.fine_tuning import FineTuneSettings
from analysis.protocol import SYNTHETIC, TRAIN, VAL, Protocol, open_part
from analysis.regimes import REAL, REAL_ON_SYNTHETIC, Condition, TrainingRows, choose_rows, plan_conditions
from analysis.synthetic_sets import SyntheticSet, open_synthetic
from dnnlib.cli import UserError
from dnnlib.text import format_table
from dnnlib.workers import usable_cores

_IDENTITY_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ClassifySettings:
    """The flags of `study.py classify`."""

    protocol: str
    outdir: Path
    synthetic: str | None
    allow_unverified: bool
    regimes: tuple[str, ...]
    fractions: tuple[float, ...]
    doses: tuple[float, ...]  # empty if not given
    fill: str | None
    seeds: tuple[int, ...]
    model: str
    weights: str
    finetune: str  # HEAD or ALL
    size: int | None
    class_weights: bool
    tuning: FineTuneSettings  # of ALL
    ci: float
    resamples: int
    workers: int | None
    use_cache: bool
    verbose: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """A classifier to train: a condition with a seed."""

    condition: Condition
    seed: int
    rows: TrainingRows

    @property
    def name(self) -> str:
        return f"{self.condition.name}-seed{self.seed}"


class Study:
    """The data of a study, opened and checked, and its jobs.

    parts:       by name, the training and the validation part, those to evaluate, and the synthetic set if it is tested
    synthetic:   None without one
    conditions:  in the order of tables

    Raises UserError if the data do not fit each other, or the images do not suffice for a condition.
    """

    def __init__(self, settings: ClassifySettings):
        self.settings = settings
        self.protocol = Protocol.read(settings.protocol)
        self.synthetic: SyntheticSet | None = None
        if settings.synthetic is not None:
            self.synthetic = open_synthetic(settings.synthetic, self.protocol,
                                            allow_unverified=settings.allow_unverified,
                                            workers=settings.workers or usable_cores())
            self._check_labels()
        names = [TRAIN, VAL, *(part.name for part in self.protocol.evaluated)]
        self.parts = {name: open_part(self.protocol, name) for name in names}
        self.tests_synthetic = REAL_ON_SYNTHETIC in settings.regimes
        if self.tests_synthetic:
            self.parts[SYNTHETIC] = self.synthetic.images
        self.conditions = plan_conditions(settings.regimes, fractions=settings.fractions, doses=settings.doses,
                                          fill=settings.fill)
        self.jobs = {condition.name: self._plan(condition) for condition in self.conditions}

    def _check_labels(self) -> None:
        """Raise UserError if the synthetic set lacks a label that a regime needs."""
        for regime in (regimes.SYNTHETIC, REAL_ON_SYNTHETIC):
            if regime in self.settings.regimes:
                counts = np.bincount(self.synthetic.images.labels, minlength=len(self.task_labels))
                if 0 in counts:
                    raise UserError(
                        f"--synthetic={self.settings.synthetic} has no image of {self.task_labels[counts.argmin()]}, "
                        f"which the regime {regime} needs; expected images of each label: make them with generate.py "
                        "--classes, or leave the regime out")

    @property
    def task_labels(self) -> tuple[str, ...]:
        return self.protocol.task.labels

    def _plan(self, condition: Condition) -> list[Job]:
        """Return the jobs of a condition: one for each seed, or the first where all give the same classifier."""
        jobs = [self._job(condition, seed) for seed in self.settings.seeds]
        is_fixed = self.settings.finetune == HEAD and all(job.rows.is_equal(jobs[0].rows) for job in jobs)
        return jobs[:1] if is_fixed else jobs

    def _job(self, condition: Condition, seed: int) -> Job:
        train, synthetic = self.parts[TRAIN], self.synthetic
        rows = choose_rows(condition, train.labels, train.groups,
                           None if synthetic is None else synthetic.images.labels, self.task_labels, seed)
        return Job(condition=condition, seed=seed, rows=rows)

    def tested_by(self, condition: Condition) -> list[str]:
        """Return the parts that the classifiers of a condition are tested on, the validation part first."""
        return [VAL, *(part.name for part in self.protocol.evaluated),
                *([SYNTHETIC] if self.tests_synthetic and condition.regime == REAL else [])]

    def count_labels(self, job: Job) -> tuple[list[int], list[int]]:
        """Return the numbers of real and of synthetic training images of each label."""
        return job.rows.count_labels(self.parts[TRAIN].labels,
                                     None if self.synthetic is None else self.synthetic.images.labels,
                                     len(self.task_labels))

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that belong to all results."""
        if self.synthetic is None or self.synthetic.is_verified:
            return ()
        return (f"UNVERIFIED synthetic images ({self.settings.synthetic}): {self.synthetic.reason}",)

    def describe(self) -> list[str]:
        """Return a table of the conditions: what they are trained on."""
        rows = [["condition", "seeds", *(f"{kind} {label}" for kind in ("real", "synthetic")
                                         for label in self.task_labels)]]
        for name, jobs in self.jobs.items():
            real, synthetic = self.count_labels(jobs[0])
            rows.append([name, str(len(jobs)), *map(str, [*real, *synthetic])])
        return format_table(rows)

    def identify(self, job: Job, backbone: Backbone) -> dict[str, Any]:
        """Return everything that a classifier depends on, as JSON types."""
        settings, condition = self.settings, job.condition
        part = self.protocol.part
        found = {
            "version": _IDENTITY_VERSION, "labels": list(self.task_labels),
            "positive": list(self.protocol.task.positive),
            "train": part(TRAIN).content_sha256, "val": part(VAL).content_sha256,
            "synthetic": self.synthetic.content_sha256 if condition.uses_synthetic else None,
            "condition": {name: value for name, value in asdict(condition).items() if name != "baseline"},
            "seed": job.seed, "model": settings.model, "weights_sha256": backbone.weights_sha256,
            "preprocessing": backbone.preprocessing.as_record(), "finetune": settings.finetune,
            "class_weights": settings.class_weights,
        }
        return json.loads(json.dumps(found | (asdict(settings.tuning) if settings.finetune == ALL else {})))
