"""Train and test the classifiers of a study: each condition with each seed, once, in one process or several.

In --outdir:

    models/NAME.safetensors       the classifier of a condition and a seed, "real-0.1-seed2" for example
    models/NAME.state             of one that is being trained
    predictions/NAME.PART.npz     its probabilities for the images of a part
    results.json, ...             see analysis.classification_report

A classifier that is there is kept, and only what is missing is computed: the same command continues, and one with more
regimes, doses, fractions, seeds or external sets adds to what is there.
"""

import hashlib
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from analysis.backbones import RANDOM, Backbone, open_backbone
from analysis.classification_report import write_report
from analysis.classification_scores import choose_thresholds
from analysis.classifier import (
    HEAD,
    Classifier,
    Head,
    fit_head,
    open_classifier,
    open_head,
    read_info,
    save_classifier,
)
from analysis.classifier_jobs import ClassifySettings, Job, Study
from analysis.fine_tuning import Epoch, TrainingImages, fine_tune
from analysis.prediction import predict_probabilities
from analysis.protocol import SYNTHETIC, TRAIN, VAL, LabeledImages, attributes_of
from analysis.regimes import Condition
from analysis.study_results import PartPredictions, StudyResults, TrainedCondition
from dnnlib.cache import cache_folder
from dnnlib.cli import UserError
from dnnlib.files import atomic_write, remove_abandoned, sha256_of
from dnnlib.process_lock import LockHeld, ProcessLock
from dnnlib.progress import Progress, format_seconds
from dnnlib.text import plural
from metrics.detectors.base import Detector
from metrics.features import (
    FeatureCache,
    FeatureRequest,
    cached_features,
    choose_batch,
    from_main,
    on_main,
    on_main_for_long,
)
from metrics.image_sources import SelectedImages
from torch_utils.device import find_project_version
from torch_utils.distributed import Processes
from torch_utils.piecework import differences
from training.run_record import software_versions

_POLL_SECONDS = 0.5


class Folder:
    """The files of a study in --outdir."""

    def __init__(self, path: Path):
        self.path, self.models, self.predictions = path, path / "models", path / "predictions"
        self._digests: dict[str, str] = {}  # of classifiers, by name of the job; they never change

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create the folder, and keep other programs out. Raises UserError if one works there."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = ProcessLock(self.path / "lock")
        try:
            lock.acquire()
        except LockHeld as error:
            raise UserError(f"--outdir={self.path} is in use by {error}; wait for it, or choose another "
                            "folder") from error
        try:
            for folder in (self.path, self.models, self.predictions):
                folder.mkdir(exist_ok=True)
                remove_abandoned(folder)
            yield
        finally:
            lock.release()

    def model(self, job: Job) -> Path:
        return self.models / f"{job.name}.safetensors"

    def state(self, job: Job) -> Path:
        return self.models / f"{job.name}.state"

    def is_trained(self, job: Job, identity: Mapping[str, Any]) -> bool:
        """Return whether the classifier is there. Raises UserError if there is another one."""
        path = self.model(job)
        if not path.exists():
            return False
        found = read_info(path).get("identity")
        if found != identity:
            different = differences(found, identity) if isinstance(found, dict) else "it does not record its training"
            raise UserError(f"{path} was trained with other settings ({different}); choose another --outdir, or remove "
                            "it")
        return True

    def save_predictions(self, job: Job, part: str, content: str, probabilities: np.ndarray) -> None:
        """Keep probabilities, float64 [N, L]; content: hash of the part"""
        with atomic_write(self._predictions(job, part)) as file:
            np.savez(file, probabilities=probabilities, key=self._key(job, content))

    def has_predictions(self, job: Job, part: str) -> bool:
        """Return whether there is a file, of whatever classifier and images."""
        return self._predictions(job, part).exists()

    def remove_predictions(self, job: Job, part: str) -> None:
        self._predictions(job, part).unlink(missing_ok=True)

    def load_predictions(self, job: Job, part: str, content: str) -> np.ndarray | None:
        """Return probabilities, float64 [N, L]; None if there are none of this classifier and these images."""
        try:
            with np.load(self._predictions(job, part), allow_pickle=False) as arrays:
                return arrays["probabilities"] if np.array_equal(arrays["key"], self._key(job, content)) else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None  # missing or damaged: they are computed again

    def _predictions(self, job: Job, part: str) -> Path:
        return self.predictions / f"{job.name}.{part}.npz"

    def _key(self, job: Job, content: str) -> np.ndarray:
        if job.name not in self._digests:
            self._digests[job.name] = sha256_of(self.model(job))
        digest = hashlib.sha256(f"{self._digests[job.name]}/{content}".encode()).digest()
        return np.frombuffer(digest, dtype=np.uint8)


def classify(settings: ClassifySettings, processes: Processes, *, dry_run: bool = False) -> None:
    """Train and test what is missing, and write the results; all processes of a run call this together."""
    is_main = processes.rank == 0
    # First on the main process, which computes hashes that are not recorded, and downloads weights.
    study = on_main(lambda: Study(settings)) or Study(settings)
    if is_main:
        for line in (*study.notes, *study.describe()):
            click.echo(line)
    open_own = partial(open_backbone, settings.model, weights=settings.weights, size=settings.size)
    backbone = on_main(open_own) or open_own()
    if is_main and backbone.note is not None:
        click.echo(backbone.note)
    if dry_run:
        return
    folder = Folder(settings.outdir)
    with folder.held() if is_main else nullcontext():
        work = (HeadWork if settings.finetune == HEAD else TuningWork)(study, backbone, folder, processes)
        with _advice() if is_main else nullcontext():
            work.run()
        if is_main and settings.verbose:
            click.echo(f"scoring {plural(len(work.jobs), 'classifier')}", err=True)
        for line in on_main_for_long(lambda beat: write_report(settings.outdir, work.results(), beat)) or ():
            click.echo(line)


@contextmanager
def _advice() -> Iterator[None]:
    """Print, when the program is stopped, that finished work is kept."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("finished classifiers and epochs are kept; the same command continues", err=True)
        raise


class Work:
    """Trains the missing classifiers of a study, and computes their missing predictions."""

    def __init__(self, study: Study, backbone: Backbone, folder: Folder, processes: Processes):
        self.study, self.backbone, self.folder, self.processes = study, backbone, folder, processes
        self.settings = study.settings
        self.jobs = [job for jobs in study.jobs.values() for job in jobs]
        self.identities = {job.name: study.identify(job, backbone) for job in self.jobs}

    def content(self, part: str) -> str:
        """Return the hash of the images of a part."""
        if part == SYNTHETIC:
            return self.study.synthetic.content_sha256
        return self.study.protocol.part(part).content_sha256

    def predictions(self, job: Job, part: str) -> np.ndarray | None:
        """Return probabilities, float64 [N, L]; None if they are missing."""
        return self.folder.load_predictions(job, part, self.content(part))

    def missing(self) -> list[tuple[Job, list[str]]]:
        """Return the jobs that are not done, with the parts whose predictions are missing; remove damaged ones."""
        found = []
        for job in self.jobs:
            parts = self.study.tested_by(job.condition)
            if self.folder.is_trained(job, self.identities[job.name]):
                parts = [part for part in parts if self.predictions(job, part) is None]
            if parts:
                found.append((job, parts))
        for job, parts in found:
            for part in parts:
                self.folder.remove_predictions(job, part)
        return found

    def results(self) -> StudyResults:
        """Return what the report is written from; all predictions are there."""
        study, settings, protocol = self.study, self.settings, self.study.protocol
        thresholds = {name: [choose_thresholds(study.parts[VAL].labels, self.predictions(job, VAL)) for job in jobs]
                      for name, jobs in study.jobs.items()}
        roles = {part.name: part.role for part in protocol.parts} | {SYNTHETIC: SYNTHETIC}
        validation, *parts = (self._part(name, roles[name]) for name in study.parts if name != TRAIN)
        return StudyResults(
            protocol=self._describe_protocol(), settings=self._describe_settings(), labels=study.task_labels,
            seeds=settings.seeds, conditions=tuple(map(self._describe_condition, study.conditions)),
            thresholds=thresholds, validation=validation, parts=tuple(parts), notes=study.notes,
            is_verified=study.synthetic is None or study.synthetic.is_verified, level=settings.ci,
            resamples=settings.resamples)

    def _part(self, name: str, role: str) -> PartPredictions:
        images = self.study.parts[name]
        return PartPredictions(
            name=name, role=role, images=images.names, groups=images.group_names, labels=images.labels,
            probabilities={condition.name: np.stack([self.predictions(job, name)
                                                     for job in self.study.jobs[condition.name]])
                           for condition in self.study.conditions if name in self.study.tested_by(condition)},
            attributes={} if name in (VAL, SYNTHETIC) else {
                column: values for column, values in attributes_of(self.study.protocol, name).items() if any(values)})

    def _describe_condition(self, condition: Condition) -> TrainedCondition:
        counts = [self.study.count_labels(job) for job in self.study.jobs[condition.name]]
        real, synthetic = ([dict(zip(self.study.task_labels, numbers, strict=True)) for numbers in side]
                           for side in zip(*counts, strict=True))
        return TrainedCondition(condition=condition, num_real=real, num_synthetic=synthetic)

    def _describe_protocol(self) -> dict[str, Any]:
        protocol = self.study.protocol
        return {"file": str(self.settings.protocol), "sha256": protocol.sha256, "task": protocol.task.to_dict(),
                "parts": [part.to_dict() for part in protocol.parts],
                "num_near_duplicates": protocol.num_near_duplicates}

    def _describe_settings(self) -> dict[str, Any]:
        settings, synthetic = self.settings, self.study.synthetic
        found = {"model": settings.model, "weights": settings.weights, "weights_sha256": self.backbone.weights_sha256,
                 "preprocessing": self.backbone.preprocessing.as_record(), "finetune": settings.finetune,
                 "class_weights": settings.class_weights, "regimes": list(settings.regimes),
                 "device": self.processes.device.type, "version": find_project_version(),
                 "software": software_versions()}
        if synthetic is not None:
            found["synthetic"] = {"path": str(settings.synthetic), "content_sha256": synthetic.content_sha256,
                                  "num_images": len(synthetic.images), "verified": synthetic.is_verified,
                                  "reason": synthetic.reason}
        return found | ({} if settings.finetune == HEAD else {"tuning": asdict(settings.tuning)})

    def info(self, job: Job, validation: np.ndarray) -> dict[str, Any]:
        """Return what the file of a classifier records. validation: probabilities, float64 [N, L]"""
        labels, synthetic = self.study.parts[VAL].labels, self.study.synthetic
        info = {
            "identity": self.identities[job.name], "protocol_sha256": self.study.protocol.sha256,
            "condition": job.condition.name, "seed": job.seed, "positive": list(self.study.protocol.task.positive),
            "thresholds": asdict(choose_thresholds(labels, validation)),
            "resolution": list(self.study.parts[TRAIN].images.shape[1:]),
        }
        if job.condition.uses_synthetic:
            info["synthetic_verified"] = synthetic.is_verified
            info["synthetic_reason"] = synthetic.reason
        return info


class HeadWork(Work):
    """Classifiers on features of a fixed backbone, which are computed once; all are fitted by the main process."""

    def run(self) -> None:
        """Compute what is missing; all processes call this together."""
        todo = from_main(self.missing)
        if not todo:
            return
        images = {part: self.study.parts[part] for _, parts in todo for part in parts}
        if any(job.condition.uses_real for job, _ in todo):
            images[TRAIN] = self.study.parts[TRAIN]
        if any(job.condition.uses_synthetic for job, _ in todo):
            images[SYNTHETIC] = self.study.synthetic.images
        detector = self.backbone.to(self.processes.device).detector()
        features = {name: self._features(name, some, detector) for name, some in images.items()}
        on_main_for_long(lambda beat: self._fit(todo, features, beat))

    def _features(self, name: str, images: LabeledImages, detector: Detector) -> np.ndarray | None:
        """Return the features of a part, float32 [N, F]; None except on the main process."""
        found = cached_features(
            SelectedImages(images.images, np.arange(len(images))),
            [FeatureRequest(detector=detector, count=len(images))],
            batch=choose_batch(max(images.images.shape[1:])), device=self.processes.device,
            cache=FeatureCache(cache_folder() / "features" if self.settings.use_cache else None,
                               lambda line: click.echo(line, err=True)),
            workers=self.settings.workers, showing=lambda count: self._showing(count, f"images of {name}"))
        return None if found is None else found[0].values

    @contextmanager
    def _showing(self, count: int, unit: str) -> Iterator[Callable[[int], None]]:
        is_shown = self.settings.verbose and self.processes.rank == 0
        with Progress(count, unit) if is_shown else nullcontext() as progress:
            yield progress.advance if is_shown else (lambda count: None)

    def _fit(self, todo: Sequence[tuple[Job, list[str]]], features: Mapping[str, np.ndarray],
             beat: Callable[[], None]) -> None:
        for number, (job, parts) in enumerate(todo, 1):
            if self.folder.model(job).exists():
                head = open_head(self.folder.model(job))
            else:
                head = self._fit_one(job, features)
                if self.settings.verbose:
                    click.echo(f"{job.name} ({number} of {len(todo)}): validation AUC {head.val_auc:.4f}, C {head.C:g}",
                               err=True)
            for part in parts:
                self.folder.save_predictions(job, part, self.content(part), head.probabilities(features[part]))
            beat()

    def _fit_one(self, job: Job, features: Mapping[str, np.ndarray]) -> Head:
        rows, parts = job.rows, self.study.parts
        tables, labels = [], []
        if len(rows.real):
            tables.append(features[TRAIN][rows.real])
            labels.append(parts[TRAIN].labels[rows.real])
        if len(rows.synthetic):
            tables.append(features[SYNTHETIC][rows.synthetic])
            labels.append(self.study.synthetic.images.labels[rows.synthetic])
        head = fit_head(np.concatenate(tables), np.concatenate(labels), features[VAL], parts[VAL].labels,
                        class_weight=self.settings.class_weights, seed=job.seed)
        classifier = Classifier(self.backbone, head, self.study.task_labels)
        save_classifier(self.folder.model(job), classifier, self.info(job, head.probabilities(features[VAL])))
        return head


class TuningWork(Work):
    """Classifiers of which all layers are trained; each process trains some of them."""

    def run(self) -> None:
        """Compute what is missing; all processes call this together."""
        todo = from_main(self.missing)
        mine = todo[self.processes.rank::self.processes.count]
        for number, (job, parts) in enumerate(mine, 1):
            where = f"{job.name} ({number} of {len(mine)})"
            if self.folder.model(job).exists():
                classifier = open_classifier(self.folder.model(job), weights=self.settings.weights,
                                             device=self.processes.device)
            else:
                classifier = self._train(job, where)
            for part in parts:
                if not self.folder.has_predictions(job, part):  # a new classifier has those of the validation part
                    self.folder.save_predictions(job, part, self.content(part), self._predict(classifier, part))
        # Other processes may need hours; one that ends is noticed, see torch_utils.launch.
        while not all(self.folder.has_predictions(job, part) for job, parts in todo for part in parts):
            time.sleep(_POLL_SECONDS)

    def _train(self, job: Job, where: str) -> Classifier:
        rows, train, val, synthetic = job.rows, self.study.parts[TRAIN], self.study.parts[VAL], self.study.synthetic
        sets = [(train, rows.real), *([] if synthetic is None else [(synthetic.images, rows.synthetic)])]
        started = time.monotonic()
        first: int | None = None  # epoch of this call; those before were trained by an earlier one

        def show(epoch: Epoch) -> None:
            nonlocal first
            first = first or epoch.number
            rate = (time.monotonic() - started) / (epoch.number - first + 1)
            left = format_seconds(rate * (self.settings.tuning.epochs - epoch.number))
            if self.settings.verbose:
                click.echo(f"{where}: epoch {epoch.number}, {epoch.images_per_second:.3g} images/s, loss "
                           f"{epoch.loss:.4f}, validation AUC {epoch.val_auc:.4f}{' (best)' if epoch.is_best else ''}, "
                           f"at most {left} left", err=True)

        backbone = self.backbone
        if backbone.weights_sha256 is None:  # random weights, which are to differ between seeds
            backbone = open_backbone(self.settings.model, weights=RANDOM, size=self.settings.size, seed=job.seed)
        classifier, history = fine_tune(
            backbone, self.study.task_labels,
            [TrainingImages(images=each.images, rows=some, labels=each.labels[some])
             for each, some in sets if len(some)],
            TrainingImages(images=val.images, rows=np.arange(len(val)), labels=val.labels), self.settings.tuning,
            seed=job.seed, class_weight=self.settings.class_weights, state_path=self.folder.state(job),
            identity=self.identities[job.name], device=self.processes.device, workers=self.settings.workers,
            on_epoch=show, log=lambda line: click.echo(line, err=True))
        validation = self._predict(classifier, VAL)
        info = self.info(job, validation)
        # Without speeds, so that equal trainings give equal files.
        info["epochs"] = [{"number": epoch.number, "loss": epoch.loss, "val_auc": epoch.val_auc} for epoch in history]
        save_classifier(self.folder.model(job), classifier, info)
        self.folder.save_predictions(job, VAL, self.content(VAL), validation)
        self.folder.state(job).unlink(missing_ok=True)
        return classifier

    def _predict(self, classifier: Classifier, part: str) -> np.ndarray:
        images = self.study.parts[part].images
        return predict_probabilities(classifier, SelectedImages(images, np.arange(len(images))),
                                     workers=self.settings.workers)
