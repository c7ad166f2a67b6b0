"""Choose the folder of a run: continue a run, leave a finished one alone, or create one with the next number.

    runs/00007-isic256-cond-auto1/

`RunFolder` and `list_snapshots` define the names of its files, except for resumable states: see CheckpointPair. A lock
in the output folder is held while a run is chosen, and a lock in the run's folder while it is trained; `ProcessLock`
decides when a lock left by a dead process is taken over.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from dnnlib.cli import UserError
from dnnlib.files import remove_abandoned
from dnnlib.process_lock import LockHeld, LockLost, ProcessLock
from dnnlib.text import listed
from dnnlib.typed_config import ConfigError
from imagesets.classes import class_order
from torch_utils.checkpoint import CheckpointPair, DamagedCheckpoint
from training.config import TrainConfig
from training.run_record import (
    RECORD_NAME,
    RunRecord,
    comparable_options,
    describe_difference,
    identify,
    read_record,
    software_versions,
    without_precision,
    write_record,
)

LOCK_NAME = "lock.json"
SERVER_FOLDER = "server"  # of a decentralized training, beside those of its sites
_CHOOSING_LOCK_NAME = ".choosing-a-run.json"
_UNNAMED_RUN = ".new-run"  # a run's folder until it has its number
_SNAPSHOT = re.compile(r"network-snapshot-(\d+)\.(safetensors|pkl)")  # .pkl: in a folder of NVIDIA's code
_CHOOSING_SECONDS = 30  # to wait for other programs that are choosing a run, which takes each of them milliseconds
_MOST_NOT_CONTINUED = 3  # runs listed in messages: an output folder may hold hundreds
_NUMBERED = re.compile(r"(\d{5})-")
_NUMBERED_FURTHER = re.compile(r"([1-9]\d{5,})-")  # above 99999; dates match too


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The run that a command asks for."""

    config: TrainConfig
    identity: dict[str, Any]  # of `config`
    new: bool  # start a new run in any case
    precision_given: bool  # by the user; otherwise a continued run keeps its own
    batch_gpu_given: bool
    classes: tuple[str, ...] | None  # as RunRecord.classes; None = not compared
    same_name: bool = False  # a run of another name is another run


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The folder that a run would use."""

    path: Path
    config: TrainConfig  # to train with: a continued run keeps some of its own settings
    record: RunRecord | None = None  # of the run that is continued or left alone; None = a new run
    left_alone: str | None = None  # a message: the run is already finished, and there is nothing to do
    notes: tuple[str, ...] = ()  # lines for the user
    not_continued: tuple[str, ...] = ()  # for a new run: lines on unfinished runs that the user may have meant

    @property
    def continues(self) -> bool:
        return self.record is not None and self.left_alone is None


class RunFolder:
    """The files of one run; a context manager that releases the run's lock.

    Returned by `choose_run` in the process that writes; RunFolder(path) gives other processes the names only.
    """

    def __init__(self, path: str | os.PathLike, *, record: RunRecord | None = None, lock: ProcessLock | None = None,
                 continues: bool = False, left_alone: str | None = None, notes: tuple[str, ...] = (),
                 not_continued: tuple[str, ...] = ()):
        self.path = Path(path)
        self.options = self.path / RECORD_NAME
        self.log, self.stats = self.path / "log.txt", self.path / "stats.jsonl"
        self.reals, self.fakes_init = self.path / "reals.png", self.path / "fakes_init.png"
        self.record = record
        self.continues = continues  # the run was started before
        self.left_alone = left_alone  # as in RunPlan; no lock is held then
        self.notes, self.not_continued = notes, not_continued  # lines for the user, as in RunPlan
        self._lock = lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def fakes(self, nimg: int | None) -> Path:
        """Return the grid of fakes after `nimg` images; names count thousands, None gives a placeholder."""
        return self.path / f"fakes{_thousands(nimg)}.png"

    def snapshot(self, nimg: int | None) -> Path:
        """Return the network snapshot after `nimg` images; None as in `fakes`."""
        return self.path / f"network-snapshot-{_thousands(nimg)}.safetensors"

    def metric(self, name: str) -> Path:
        """Return the file of a metric's lines; its curve lies next to it as metric-NAME.png."""
        return self.path / f"metric-{name}.jsonl"

    def measured(self, name: str) -> Path:
        """Return the curve of a metric that calc_metrics.py draws for the run's network snapshots."""
        return self.path / f"measured-{name}.png"

    def metrics(self) -> list[Path]:
        """Return the existing files of metrics' lines."""
        return sorted(self.path.glob(self.metric("*").name))

    def newest_snapshot(self) -> Path | None:
        """Return the network snapshot after the most images, None if there is none yet."""
        found = list_snapshots(self.path)
        return Path(found[-1]) if found else None

    def inside(self, name: str) -> "RunFolder":
        """Return the names of files in a folder inside the run's, under the same lock, with the record copied there."""
        folder = RunFolder(self.path / name, record=self.record, lock=self._lock, continues=self.continues,
                           notes=self.notes, not_continued=self.not_continued)
        folder.path.mkdir(exist_ok=True)
        remove_abandoned(folder.path)
        write_record(folder.path, self.record)
        return folder

    def mark_finished(self) -> None:
        """Record that the run reached its end: the same command leaves it alone, a larger length continues it."""
        self.record = replace(self.record, finished=True)
        write_record(self.path, self.record)

    def note_pass(self, nimg: int, batch_gpu: int) -> None:
        """Record the pass size that is used after `nimg` images, unless it is recorded already."""
        record = self.record.with_pass(nimg, batch_gpu)
        if record != self.record:
            write_record(self.path, record)
            self.record = record

    def require_held(self) -> None:
        """Raise UserError if another process has taken over the run: call this before overwriting files."""
        try:
            self._lock.require_held()
        except LockLost as error:
            raise UserError(f"{error}; expected the lock of this process, which stops here: "
                            "the process that holds the lock continues the run") from error

    def release(self) -> None:
        """Release the run's lock, so that other processes can train it."""
        if self._lock is not None:
            self._lock.release()


def list_snapshots(folder: str | os.PathLike) -> list[str]:
    """Return the paths of the network snapshots in a run's folder, sorted by number of images."""
    found = []
    for name in os.listdir(folder):
        match = _SNAPSHOT.fullmatch(name)
        if match:
            found.append((int(match[1]), match[2] == "safetensors", os.path.join(folder, name)))
    return [path for *_, path in sorted(found)]


def _thousands(nimg: int | None) -> str:
    return "KKKKKK" if nimg is None else f"{nimg // 1000:06d}"


def plan_run(outdir: str | os.PathLike, config: TrainConfig, content_hash: str, *, new: bool = False,
             precision_given: bool = False, batch_gpu_given: bool = False,
             classes: Sequence[str] | None = None) -> RunPlan:
    """Return which folder `choose_run` would use now, without changing anything.

    Arguments and errors are those of `choose_run`.
    """
    request = RunRequest(config=config, identity=identify(config, content_hash), new=new,
                         precision_given=precision_given, batch_gpu_given=batch_gpu_given,
                         classes=None if classes is None else tuple(classes))
    with _outdir_errors(Path(outdir)):
        return _plan(Path(outdir), request)


def choose_run(outdir: str | os.PathLike, config: TrainConfig, content_hash: str, *, new: bool = False,
               precision_given: bool = False, batch_gpu_given: bool = False,
               classes: Sequence[str] | None = None, same_name: bool = False) -> RunFolder:
    """Return the newest run of equal identity, or a new one, with its lock held.

    outdir:           is created if it does not exist
    content_hash:     of the images and labels in use, see ImageDataset.content_hash
    new:              start a new run in any case
    precision_given:  the user gave --precision; otherwise a continued run keeps its own
    batch_gpu_given:  the user gave --batch-gpu; otherwise a continued run keeps its own
    classes:          names of the classes in the order of their numbers, [] without names; None does not compare them
    same_name:        a run of another name is not continued

    An unfinished run is continued up to the largest config.length that was ever requested. A finished one is continued
    if config.length is larger, and otherwise left alone: see RunFolder.left_alone. Half-written files of killed
    processes are removed.
    Raises UserError if the run is being trained by another process, has a larger config.length than this, has the same
    class names in another order, or is finished without a resumable state, or if outdir cannot be used; nothing is
    changed then.
    """
    outdir, name = Path(outdir), config.run_name
    if Path(name).name != name:
        raise UserError(f"the run's name is {name!r}; expected a name without folders: give one with --name")
    request = RunRequest(config=config, identity=identify(config, content_hash), new=new,
                         precision_given=precision_given, batch_gpu_given=batch_gpu_given,
                         classes=None if classes is None else tuple(classes), same_name=same_name)
    with _outdir_errors(outdir):
        outdir.mkdir(parents=True, exist_ok=True)
        with _choosing(outdir):
            plan = _plan(outdir, request)
            if plan.left_alone is not None:
                return RunFolder(plan.path, record=plan.record, left_alone=plan.left_alone)
            if not plan.continues:
                _make(plan.path, RunRecord(config=config, identity=request.identity, precision_given=precision_given,
                                           classes=request.classes))
            return _take(plan, request)


def open_run(path: str | os.PathLike, config: TrainConfig, content_hash: str, *,
             classes: Sequence[str] | None = None) -> RunFolder:
    """Return the run in this very folder, which is created if it does not exist, with its lock held.

    Raises UserError if another process trains the run, or it has another identity.
    """
    path = Path(path)
    request = RunRequest(config=config, identity=identify(config, content_hash), new=False, precision_given=True,
                         batch_gpu_given=True, classes=None if classes is None else tuple(classes))
    with _outdir_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _choosing(path.parent):
            record = read_record(path)
            if record is None:
                _make(path, RunRecord(config=config, identity=request.identity, precision_given=True,
                                      classes=request.classes))
                return _take(RunPlan(path=path, config=config), request)
            config = _settle(record, request)
            there = {**record.identity, "options": comparable_options(record.config)}
            here = {**request.identity, "options": comparable_options(config)}
            if there != here or _has_other_classes(record, request):
                found = describe_difference(there, here) or "the classes differ"
                raise UserError(f"{path} was started with other settings ({found}); expected the same, or another "
                                "folder")
            return _take(RunPlan(path=path, config=config, record=record), request)


@dataclass(frozen=True, kw_only=True)
class StartedRun:
    """A run in the output folder, and the network file of --resume that it started from."""

    run: Path
    network: str


def find_run_started_from(outdir: str | os.PathLike, config: TrainConfig, networks: Sequence[str], *,
                          precision_given: bool = False, batch_gpu_given: bool = False) -> StartedRun | None:
    """Return the newest run with these settings that started from one of these network files, or None.

    config.resume is ignored; precision_given and batch_gpu_given are as in `choose_run`.
    """
    paths = {os.path.abspath(network): network for network in networks}
    with _outdir_errors(Path(outdir)):
        for _, path in sorted(_numbered(Path(outdir)), reverse=True):
            try:
                record = read_record(path)
            except ConfigError:  # `choose_run` reports it
                continue
            if record is None or record.config.resume is None or record.config.dataset.name != config.dataset.name:
                continue
            network = paths.get(os.path.abspath(record.config.resume))
            settled = record.settle(config, precision_given=precision_given, batch_gpu_given=batch_gpu_given)
            if network is not None and comparable_options(record.config) == comparable_options(settled):
                return StartedRun(run=path, network=network)
    return None


def _plan(outdir: Path, request: RunRequest) -> RunPlan:
    runs = sorted(_numbered(outdir), reverse=True)
    unreadable: list[str] = []
    others: list[str] = []
    exchanged = None
    for _, path in [] if request.new else runs:
        try:
            record = read_record(path)
        except ConfigError as error:
            unreadable.append(f"{error}; this run is not continued")
            others.append(unreadable[-1])
            continue
        if record is None or (request.same_name and record.config.run_name != request.config.run_name):
            continue
        config = _settle(record, request)
        there = {**record.identity, "options": comparable_options(record.config)}
        here = {**request.identity, "options": comparable_options(config)}
        if there == here and _has_other_classes(record, request):
            names = f"{_named(record.classes)} there and {_named(request.classes)} here"
            others.append(f"{path} is not continued: its classes are {names}")
            if exchanged is None and class_order(record.classes, request.classes) is not None:
                exchanged = (f"{path} was trained on the classes {_named(record.classes)}, but --data has the classes "
                             f"{_named(request.classes)}; expected the same order: correct the classes in its "
                             "dataset.json, or start another run with --new")
            continue
        if there == here:
            return _plan_known(path, record, request, unreadable)
        # A longer run with noise for the same epsilon has other noise, and cannot continue a finished one.
        has_other_noise = {"federation.dp_noise"} == {
            name for name, value in here["options"].items() if there["options"].get(name) != value}
        is_same_data = there["data"] == here["data"]
        if (is_same_data and has_other_noise) or (
                not record.finished and (is_same_data or record.config.run_name == config.run_name)):
            others.append(f"{path} is {'finished' if record.finished else 'unfinished'} and not continued: "
                          f"{_explain(record.config, config, there, here)}")
    if exchanged is not None:
        raise UserError(exchanged)
    if len(others) > _MOST_NOT_CONTINUED:
        others[_MOST_NOT_CONTINUED:] = [f"{len(others) - _MOST_NOT_CONTINUED} older ones are not continued either"]
    number = runs[0][0] + 1 if runs else 0
    while os.path.lexists(path := outdir / f"{number:05d}-{request.config.run_name}"):  # a file with this name
        number += 1
    return RunPlan(path=path, config=request.config, not_continued=tuple(others))


def _has_other_classes(record: RunRecord, request: RunRequest) -> bool:
    """Tell whether a run on equal data has other class names, so that it is not the requested one.

    Adding or removing names matters only with --resume, which matches classes by name.
    """
    if None in (record.classes, request.classes) or record.classes == request.classes:
        return False
    by_name = request.config.resume is not None and request.config.resume_classes == "same"
    return by_name or class_order(record.classes, request.classes) is not None


def _named(classes: tuple[str, ...]) -> str:
    return listed(classes) if classes else "without names"


def _settle(record: RunRecord, request: RunRequest) -> TrainConfig:
    return record.settle(request.config, precision_given=request.precision_given,
                         batch_gpu_given=request.batch_gpu_given)


def _plan_known(path: Path, record: RunRecord, request: RunRequest, notes: list[str]) -> RunPlan:
    """Decide whether a run of equal identity is continued or left alone. Raises UserError if neither is possible."""
    (asked, unit), (longest, _), config = request.config.length, record.config.length, _settle(record, request)
    left_alone, states = None, path if config.federation is None else path / SERVER_FOLDER
    if record.finished and asked <= longest:
        left_alone = f"already finished at {longest} {unit}: {path}; --new starts another run"
    elif record.finished and _progress(states, unit) is None:
        raise UserError(f"{path} is finished at {longest} {unit}, but its resumable state is missing; expected "
                        f"{CheckpointPair(states).newest.relative_to(path)}, to continue to {asked} {unit}: copy it "
                        "back, or start another run with --new")
    elif asked < longest:
        reached = _progress(states, unit) or 0
        if reached < asked:
            raise UserError(f"--{unit} is {asked}, but {path}, now at {reached:g} {unit}, was started with {longest}; "
                            f"expected --{unit}={longest} or more to continue it, or --new to start another run")
        left_alone = (f"already finished at {reached:g} {unit} (of {longest} requested before): {path}; --new "
                      "starts another run")
    elif config.step.micro_batch != request.config.step.micro_batch:
        notes = [*notes, f"{path}: {config.step.micro_batch} images per pass, as the run had before "
                         "(--batch-gpu changes this)"]
    return RunPlan(path=path, config=config, record=record, left_alone=left_alone, notes=tuple(notes))


def _progress(folder: Path, unit: str) -> float | None:
    """Return how far the newest state in a folder is, in a unit of TrainConfig.length; None if there is none."""
    try:
        found = CheckpointPair(folder).load()
    except DamagedCheckpoint as error:
        raise UserError(f"{error} (--new does so)") from error
    if found is None:
        return None
    return found[0]["rounds"] if unit == "rounds" else found[0]["training"]["nimg"] / 1000


def _explain(old: TrainConfig, new: TrainConfig, there: dict[str, Any], here: dict[str, Any]) -> str:
    """Return how two identities differ, naming first the flags that decide several settings."""
    causes = []
    if old.precision != new.precision:
        causes.append(f"--precision is {old.precision} there and {new.precision} here")
        there, here = ({**part, "options": without_precision(part["options"])} for part in (there, here))
    if old.gpus != new.gpus and old.batch != new.batch:
        causes.append(f"--gpus is {old.gpus} there and {new.gpus} here, which --cfg={new.cfg} depends on")
    rest = describe_difference(there, here)
    return "; ".join([*causes, rest] if rest else causes)


def _numbered(outdir: Path) -> Iterator[tuple[int, Path]]:
    """Yield folders whose names start with five digits and a hyphen; with more digits, only runs."""
    try:
        names = os.listdir(outdir)
    except FileNotFoundError:
        return
    for name in names:
        path, short, long = outdir / name, _NUMBERED.match(name), _NUMBERED_FURTHER.match(name)
        if (short and path.is_dir()) or (long and (path / RECORD_NAME).exists()):
            yield int((short or long)[1]), path


@contextmanager
def _choosing(outdir: Path) -> Iterator[None]:
    """Hold the output folder's lock."""
    lock = ProcessLock(outdir / _CHOOSING_LOCK_NAME)
    try:
        lock.acquire(patience=_CHOOSING_SECONDS)
    except LockHeld as error:
        raise UserError(f"a run in {outdir} is being chosen by {error}; expected that to take a moment: try again, "
                        f"or remove {lock.path} if that process is gone") from error
    try:
        yield
    finally:
        lock.release()


def _make(path: Path, record: RunRecord) -> None:
    """Create a run's folder with its options in it, atomically."""
    unnamed = path.with_name(_UNNAMED_RUN)
    shutil.rmtree(unnamed, ignore_errors=True)  # left by a process that was killed here
    try:
        unnamed.mkdir()
        write_record(unnamed, record)
        unnamed.rename(path)
    except BaseException:
        shutil.rmtree(unnamed, ignore_errors=True)
        raise


def _take(plan: RunPlan, request: RunRequest) -> RunFolder:
    """Lock a run's folder and update its record."""
    lock = ProcessLock(plan.path / LOCK_NAME)
    try:
        taken_over = lock.acquire()
    except LockHeld as error:
        raise UserError(f"{plan.path} is being trained by {error}; expected no other process: wait for it, stop it, "
                        "or start another run with --new") from error
    try:
        record = read_record(plan.path)
        if plan.continues and record != plan.record:  # another process trained it in between
            plan = _plan_known(plan.path, record, request, list(plan.notes))
        notes = list(plan.notes)
        if taken_over is not None:
            notes.append(f"{plan.path}: {taken_over}")
        if plan.left_alone is not None:
            lock.release()
            return RunFolder(plan.path, record=plan.record, left_alone=plan.left_alone)
        if plan.continues:
            changed = [f"{name} {record.versions.get(name, 'unknown')} then and {version} now"
                       for name, version in software_versions().items() if record.versions.get(name) != version]
            if changed:
                notes.append(f"{plan.path}: {', '.join(changed)}; results may differ from those of an uninterrupted "
                             "run")
            remove_abandoned(plan.path)  # temporary files, except those of a calc_metrics.py running there
            # Options that may differ, such as kimg, take the new values.
            record = replace(record, config=plan.config, versions=software_versions(), finished=False,
                             classes=record.classes if request.classes is None else request.classes,
                             identity={**request.identity, "options": comparable_options(plan.config)})
            write_record(plan.path, record)
    except BaseException:
        lock.release()
        raise
    return RunFolder(plan.path, record=record, lock=lock, continues=plan.continues, notes=tuple(notes),
                     not_continued=plan.not_continued)


@contextmanager
def _outdir_errors(outdir: Path) -> Iterator[None]:
    """Turn the system's errors on an output folder into a UserError."""
    try:
        if outdir.exists() and not outdir.is_dir():
            raise UserError(f"--outdir={outdir} is a file; expected a folder: choose another name")
        yield
    except OSError as error:
        raise UserError(f"--outdir={outdir} cannot be used ({error.strerror or error}: {error.filename or outdir}); "
                        "expected a writable folder: choose another, or change its permissions") from error
