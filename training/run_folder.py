"""Choose the folder of a run: continue one, leave one alone that is finished, or make the next number.

    runs/00007-isic256-cond-auto1/

`RunFolder` and `list_snapshots` are the home of the names of its files, but for those of states: see CheckpointPair.
All choosing in one output folder happens under a lock, and so does each run's training: `ProcessLock` says when the
lock of a process that is gone is taken over.
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
_CHOOSING_LOCK_NAME = ".choosing-a-run.json"
_UNNAMED_RUN = ".new-run"  # a run's folder until it has its number
_SNAPSHOT = re.compile(r"network-snapshot-(\d+)\.(safetensors|pkl)")  # .pkl: in a run's folder of the original
_CHOOSING_SECONDS = 30  # to wait for other programs that choose at the same time, each of which takes milliseconds
_MOST_NOT_CONTINUED = 3  # runs that are named: an output folder may hold hundreds
_NUMBERED = re.compile(r"(\d{5})-")
_NUMBERED_FURTHER = re.compile(r"([1-9]\d{5,})-")  # after 99999; a date looks the same


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What a command asks for."""

    config: TrainConfig
    identity: dict[str, Any]  # of `config`
    new: bool  # whatever is there
    precision_given: bool  # by the user, and so not to be taken from a record
    batch_gpu_given: bool
    classes: tuple[str, ...] | None  # as RunRecord.classes; None = whatever a record says


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Which folder a run would take."""

    path: Path
    config: TrainConfig  # with which it would be trained: a run that goes on keeps some of its own
    record: RunRecord | None = None  # of the run that is continued or left alone; None = a new run
    left_alone: str | None = None  # a line: the run did what is asked for, and nothing is to be done
    notes: tuple[str, ...] = ()  # lines for the user
    not_continued: tuple[str, ...] = ()  # of a new run: lines on unfinished runs that the user may have meant

    @property
    def continues(self) -> bool:
        return self.record is not None and self.left_alone is None


class RunFolder:
    """The files of one run; a context manager that gives the run's lock back.

    Made by `choose_run` in the process that writes; RunFolder(path) alone gives others the names.
    """

    def __init__(self, path: str | os.PathLike, *, record: RunRecord | None = None, lock: ProcessLock | None = None,
                 continues: bool = False, left_alone: str | None = None, notes: tuple[str, ...] = (),
                 not_continued: tuple[str, ...] = ()):
        self.path = Path(path)
        self.options = self.path / RECORD_NAME
        self.log, self.stats = self.path / "log.txt", self.path / "stats.jsonl"
        self.reals, self.fakes_init = self.path / "reals.png", self.path / "fakes_init.png"
        self.record = record
        self.continues = continues  # the run was begun before
        self.left_alone = left_alone  # as in RunPlan; no lock is held then
        self.notes, self.not_continued = notes, not_continued  # lines for the user, as in RunPlan
        self._lock = lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def fakes(self, nimg: int | None) -> Path:
        """Return the grid after `nimg` images; names count thousands, and None stands for any number."""
        return self.path / f"fakes{_thousands(nimg)}.png"

    def snapshot(self, nimg: int | None) -> Path:
        """Return the network file after `nimg` images, as `fakes`."""
        return self.path / f"network-snapshot-{_thousands(nimg)}.safetensors"

    def metric(self, name: str) -> Path:
        """Return the lines of a metric; its curve lies beside them as metric-NAME.png."""
        return self.path / f"metric-{name}.jsonl"

    def measured(self, name: str) -> Path:
        """Return the curve of a metric that calc_metrics.py draws over the run's network files."""
        return self.path / f"measured-{name}.png"

    def metrics(self) -> list[Path]:
        """Return the files of lines of all metrics that are there."""
        return sorted(self.path.glob(self.metric("*").name))

    def newest_snapshot(self) -> Path | None:
        """Return the network file of the most images, None where there is none yet."""
        found = list_snapshots(self.path)
        return Path(found[-1]) if found else None

    def mark_finished(self) -> None:
        """Note that the run reached its end: the same command then leaves it alone, one for longer continues it."""
        self.record = replace(self.record, finished=True)
        write_record(self.path, self.record)

    def note_pass(self, nimg: int, batch_gpu: int) -> None:
        """Record that passes of that size were taken after `nimg` images, where it is not recorded."""
        record = self.record.with_pass(nimg, batch_gpu)
        if record != self.record:
            write_record(self.path, record)
            self.record = record

    def require_held(self) -> None:
        """Raise UserError when another process took the run over: call it before something is overwritten."""
        try:
            self._lock.require_held()
        except LockLost as error:
            raise UserError(f"{error}; expected the lock of this process, which stops here: "
                            f"the run goes on where the lock is") from error

    def release(self) -> None:
        """Let other processes train the run."""
        if self._lock is not None:
            self._lock.release()


def list_snapshots(folder: str | os.PathLike) -> list[str]:
    """Return the paths of the network files in a run's folder, by their number of images."""
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
    """Return which folder `choose_run` would take now, and change nothing.

    Arguments and errors are those of `choose_run`.
    """
    request = RunRequest(config=config, identity=identify(config, content_hash), new=new,
                         precision_given=precision_given, batch_gpu_given=batch_gpu_given,
                         classes=None if classes is None else tuple(classes))
    with _outdir_errors(Path(outdir)):
        return _plan(Path(outdir), request)


def choose_run(outdir: str | os.PathLike, config: TrainConfig, content_hash: str, *, new: bool = False,
               precision_given: bool = False, batch_gpu_given: bool = False,
               classes: Sequence[str] | None = None) -> RunFolder:
    """Take the newest run of equal identity, or make the folder of a new one, and hold its lock.

    outdir:           is made when it does not exist
    content_hash:     of the images and labels in use, see ImageDataset.content_hash
    new:              make a new one in any case
    precision_given:  the user said which; else a run that goes on keeps its own, and so with
    batch_gpu_given:  the images of a pass
    classes:          names of the labels' numbers, [] without; None does not compare them

    An unfinished run is continued, to the largest config.kimg that was ever asked for. A finished one is continued by a
    larger config.kimg, and else left alone: see RunFolder.left_alone. Files that a killed process left half written are
    removed.
    Raises UserError when the run is being trained by another process, was asked to become longer than this, gave the
    numbers of its classes to the same names in another order, or is finished without a state to continue from, or when
    outdir cannot be used; nothing was changed then.
    """
    outdir, name = Path(outdir), config.run_name
    if Path(name).name != name:
        raise UserError(f"the run's name is {name!r}; expected a name without folders: give one with --name")
    request = RunRequest(config=config, identity=identify(config, content_hash), new=new,
                         precision_given=precision_given, batch_gpu_given=batch_gpu_given,
                         classes=None if classes is None else tuple(classes))
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


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """A run in the output folder, and the network of --resume that it started from."""

    run: Path
    network: str


def began_from(outdir: str | os.PathLike, config: TrainConfig, networks: Sequence[str], *,
               precision_given: bool = False, batch_gpu_given: bool = False) -> Beginning | None:
    """Return the newest run of these settings that began from one of some network files; None where there is none.

    What config.resume names does not matter; precision_given and batch_gpu_given as in `choose_run`.
    """
    paths = {os.path.abspath(network): network for network in networks}
    with _outdir_errors(Path(outdir)):
        for _, path in sorted(_numbered(Path(outdir)), reverse=True):
            try:
                record = read_record(path)
            except ConfigError:  # `choose_run` says what is wrong with it
                continue
            if record is None or record.config.resume is None or record.config.dataset.name != config.dataset.name:
                continue
            network = paths.get(os.path.abspath(record.config.resume))
            settled = record.settle(config, precision_given=precision_given, batch_gpu_given=batch_gpu_given)
            if network is not None and comparable_options(record.config) == comparable_options(settled):
                return Beginning(run=path, network=network)
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
        if record is None:
            continue
        config = _settle(record, request)
        there = {**record.identity, "options": comparable_options(record.config)}
        here = {**request.identity, "options": comparable_options(config)}
        if there == here and _has_other_classes(record, request):
            names = f"{_named(record.classes)} there and {_named(request.classes)} here"
            others.append(f"{path} is not continued: its classes are {names}")
            if exchanged is None and class_order(record.classes, request.classes) is not None:
                exchanged = (f"{path} learned the classes {_named(record.classes)}, and --data gives the same numbers "
                             f"to {_named(request.classes)}; expected the same names: put the classes in its "
                             "dataset.json right, or begin another run with --new")
            continue
        if there == here:
            return _plan_known(path, record, request, unreadable)
        if not record.finished and (there["data"] == here["data"] or record.config.run_name == config.run_name):
            others.append(f"{path} is unfinished and not continued: "
                          f"{_explain(record.config, config, there, here)}")
    if exchanged is not None:
        raise UserError(exchanged)
    if len(others) > _MOST_NOT_CONTINUED:
        others[_MOST_NOT_CONTINUED:] = [f"{len(others) - _MOST_NOT_CONTINUED} older ones are not continued either"]
    number = runs[0][0] + 1 if runs else 0
    while os.path.lexists(path := outdir / f"{number:05d}-{request.config.run_name}"):  # a file has the name
        number += 1
    return RunPlan(path=path, config=request.config, not_continued=tuple(others))


def _has_other_classes(record: RunRecord, request: RunRequest) -> bool:
    """Tell whether a run of equal data gave its classes other names, so that it is not what is asked for.

    Names that are added or lost change nothing that is computed, but which columns --resume takes.
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
    """Decide what becomes of a run that the command means. Raises UserError when the command can mean no good."""
    asked, longest, config = request.config.kimg, record.config.kimg, _settle(record, request)
    left_alone = None
    if record.finished and asked <= longest:
        left_alone = f"already finished at {longest} kimg: {path}; --new starts another"
    elif record.finished and _images_of_state(path) is None:
        raise UserError(f"{path} is finished at {longest} kimg, but its state is gone; expected "
                        f"{CheckpointPair(path).newest.name}, to go on to {asked} kimg: copy it back, or begin another "
                        "run with --new")
    elif asked < longest:
        nimg = _images_of_state(path) or 0
        if nimg < asked * 1000:
            raise UserError(f"--kimg is {asked}, and {path}, at {nimg / 1000:g} kimg, was asked to reach {longest}; "
                            f"expected --kimg={longest} or more to continue it, or --new to begin another run")
        left_alone = (f"already finished at {nimg / 1000:g} kimg (of {longest} asked for before): {path}; --new "
                      "starts another")
    elif config.step.micro_batch != request.config.step.micro_batch:
        notes = [*notes, f"{path}: passes of {config.step.micro_batch} images, as the run last had them "
                         "(--batch-gpu changes them)"]
    return RunPlan(path=path, config=config, record=record, left_alone=left_alone, notes=tuple(notes))


def _images_of_state(path: Path) -> int | None:
    """Return how many images the newest state of a run has seen, None where it has no state."""
    try:
        found = CheckpointPair(path).load()
    except DamagedCheckpoint as error:
        raise UserError(f"{error} (--new does so)") from error
    return None if found is None else found[0]["training"]["nimg"]


def _explain(old: TrainConfig, new: TrainConfig, there: dict[str, Any], here: dict[str, Any]) -> str:
    """Return how two identities differ, first by the flags that several settings follow from."""
    causes = []
    if old.precision != new.precision:
        causes.append(f"--precision is {old.precision} there and {new.precision} here")
        there, here = ({**part, "options": without_precision(part["options"])} for part in (there, here))
    if old.gpus != new.gpus and old.batch != new.batch:
        causes.append(f"--gpus is {old.gpus} there and {new.gpus} here, from which --cfg={new.cfg} chooses")
    rest = describe_difference(there, here)
    return "; ".join([*causes, rest] if rest else causes)


def _numbered(outdir: Path) -> Iterator[tuple[int, Path]]:
    """Yield the folders that are named with a number of five digits and a hyphen; with more digits only runs."""
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
        raise UserError(f"a run in {outdir} is being chosen by {error}; expected it to take no time: try again, "
                        f"or remove {lock.path} if that process is gone") from error
    try:
        yield
    finally:
        lock.release()


def _make(path: Path, record: RunRecord) -> None:
    """Make a run's folder with its options in it, at once or not at all."""
    unnamed = path.with_name(_UNNAMED_RUN)
    shutil.rmtree(unnamed, ignore_errors=True)  # of a process that was killed here
    try:
        unnamed.mkdir()
        write_record(unnamed, record)
        unnamed.rename(path)
    except BaseException:
        shutil.rmtree(unnamed, ignore_errors=True)
        raise


def _take(plan: RunPlan, request: RunRequest) -> RunFolder:
    """Lock a run's folder and bring it up to date."""
    lock = ProcessLock(plan.path / LOCK_NAME)
    try:
        taken_over = lock.acquire()
    except LockHeld as error:
        raise UserError(f"{plan.path} is being trained by {error}; expected no other process: wait for it, stop it, "
                        "or begin another run with --new") from error
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
                notes.append(f"{plan.path}: {', '.join(changed)}; the end may differ from that of an unbroken run")
            remove_abandoned(plan.path)  # not those of a calc_metrics.py that is at work there
            # What may differ, for example kimg, is now as the user says.
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
    """Turn what the system says about an output folder into a line for the user."""
    try:
        if outdir.exists() and not outdir.is_dir():
            raise UserError(f"--outdir={outdir} is a file; expected a folder: choose another name")
        yield
    except OSError as error:
        raise UserError(f"--outdir={outdir} cannot be used ({error.strerror or error}: {error.filename or outdir}); "
                        "expected a folder that can be written: choose another, or change its permissions") from error
