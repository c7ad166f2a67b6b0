"""Choose the folder of a run: continue an unfinished one, or make the next number.

    runs/00007-isic256-cond-auto1/

All choosing in one output folder happens under a lock, and so does each run's training: `ProcessLock` says when the
lock of a process that is gone is taken over.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dnnlib.cli import UserError
from dnnlib.process_lock import LockHeld, LockLost, ProcessLock
from dnnlib.temporary_files import remove_abandoned
from training.config import ConfigError, TrainConfig
from training.run_record import (
    RECORD_NAME,
    RunRecord,
    comparable_options,
    describe_difference,
    identity,
    read_record,
    software_versions,
    write_record,
)

__all__ = ["RunFolder", "RunPlan", "began_from", "choose_run", "identity", "plan_run"]

LOCK_NAME = "lock.json"
_CHOOSING_LOCK_NAME = ".choosing-a-run.json"
_UNNAMED_RUN = ".new-run"  # a run's folder until it has its number
_CHOOSING_SECONDS = 30  # to wait for other programs that choose at the same time, each of which takes milliseconds
_NUMBERED = re.compile(r"(\d{5})-")
_NUMBERED_FURTHER = re.compile(r"([1-9]\d{5,})-")  # after 99999; a date looks the same


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Which folder a run would take."""

    path: Path
    record: RunRecord | None  # of the run that is continued; None = a new run
    notes: tuple[str, ...]  # lines for the user: what was looked at and not taken

    @property
    def continues(self) -> bool:
        return self.record is not None


class RunFolder:
    """The files of one run; a context manager that gives the run's lock back.

    Made by `choose_run` in the process that writes; RunFolder(path) alone gives others the names.
    """

    def __init__(self, path: str | os.PathLike, *, record: RunRecord | None = None, lock: ProcessLock | None = None,
                 continues: bool = False, notes: tuple[str, ...] = ()):
        self.path = Path(path)
        self.record = record
        self.continues = continues  # the run was begun before
        self.notes = notes  # lines for the user
        self._lock = lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    @property
    def options(self) -> Path:
        return self.path / RECORD_NAME

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def stats(self) -> Path:
        return self.path / "stats.jsonl"

    @property
    def reals(self) -> Path:
        return self.path / "reals.png"

    def fakes(self, nimg: int) -> Path:
        """Return the name of the grid after `nimg` images; names count thousands."""
        return self.path / f"fakes{nimg // 1000:06d}.png"

    def snapshot(self, nimg: int) -> Path:
        """Return the name of the network file after `nimg` images."""
        return self.path / f"network-snapshot-{nimg // 1000:06d}.safetensors"

    def metric(self, name: str) -> Path:
        return self.path / f"metric-{name}.jsonl"

    def mark_finished(self) -> None:
        """Note that the run reached its end: the same command then begins another one."""
        self.record = self.record.as_finished()
        write_record(self.path, self.record)

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


def plan_run(outdir: str | os.PathLike, config: TrainConfig, content_hash: str, *, new: bool = False) -> RunPlan:
    """Tell which folder `choose_run` would take now, and change nothing.

    Raises UserError when outdir is not a folder, or the network of config.resume cannot be read.
    """
    with _outdir_errors(Path(outdir)):
        return _plan(Path(outdir), config, identity(config, content_hash), new)


def choose_run(outdir: str | os.PathLike, config: TrainConfig, content_hash: str, *, new: bool = False) -> RunFolder:
    """Take the newest unfinished run of equal identity, or make the folder of a new one, and hold its lock.

    outdir:       is made when it does not exist
    content_hash: of the images and labels in use, see ImageDataset.content_hash
    new:          make a new one in any case

    A finished run is left alone. Files that a killed process left half written are removed.
    Raises UserError when the run is being trained by another process, or outdir cannot be used.
    """
    outdir, name = Path(outdir), config.run_name
    if Path(name).name != name:
        raise UserError(f"the run's name is {name!r}; expected a name without folders: give one with --name")
    wanted = identity(config, content_hash)
    with _outdir_errors(outdir):
        outdir.mkdir(parents=True, exist_ok=True)
        with _choosing(outdir):
            plan = _plan(outdir, config, wanted, new)
            record = RunRecord.of(config, wanted)
            if not plan.continues:
                _make(plan.path, record)
            return _take(plan, record)


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """A run in the output folder, and the network of --resume that it started from."""

    run: Path
    network: str


def began_from(outdir: str | os.PathLike, config: TrainConfig, networks: Sequence[str]) -> Beginning | None:
    """Return the newest run of these settings that began from one of some network files; None where there is none.

    What config.resume names does not matter.
    """
    paths = {os.path.abspath(network): network for network in networks}
    wanted = comparable_options(config)
    with _outdir_errors(Path(outdir)):
        for _, path in sorted(_numbered(Path(outdir)), reverse=True):
            record = _read_noting(path, [])
            if record is None or record.config.resume is None or record.config.dataset.name != config.dataset.name:
                continue
            network = paths.get(os.path.abspath(record.config.resume))
            if network is not None and record.identity["options"] == wanted:
                return Beginning(run=path, network=network)
    return None


def _plan(outdir: Path, config: TrainConfig, wanted: dict[str, Any], new: bool) -> RunPlan:
    runs = sorted(_numbered(outdir), reverse=True)
    notes: list[str] = []
    if not new:
        for _, path in runs:
            record = _read_noting(path, notes)
            if record is None or record.finished:
                continue
            if record.identity == wanted:
                return RunPlan(path=path, record=record, notes=tuple(notes))
            if record.config.run_name == config.run_name:
                notes.append(f"{path} is unfinished and not continued: {describe_difference(record.identity, wanted)}")
    return RunPlan(path=_next_path(outdir, runs, config.run_name), record=None, notes=tuple(notes))


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


def _next_path(outdir: Path, runs: list[tuple[int, Path]], name: str) -> Path:
    """Return the folder of the next number. runs: those that are there, the last one first"""
    number = runs[0][0] + 1 if runs else 0
    while os.path.lexists(path := outdir / f"{number:05d}-{name}"):  # a file has the name
        number += 1
    return path


def _read_noting(path: Path, notes: list[str]) -> RunRecord | None:
    """Read a run's options; what cannot be read is noted and not continued."""
    try:
        return read_record(path)
    except ConfigError as error:
        notes.append(f"{error}; this run is not continued")
        return None


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


def _take(plan: RunPlan, record: RunRecord) -> RunFolder:
    """Lock a run's folder and bring it up to date."""
    lock = ProcessLock(plan.path / LOCK_NAME)
    notes = list(plan.notes)
    try:
        taken_over = lock.acquire()
    except LockHeld as error:
        raise UserError(f"{plan.path} is being trained by {error}; expected no other process: wait for it, stop it, "
                        "or begin another run with --new") from error
    try:
        if taken_over is not None:
            notes.append(f"{plan.path}: {taken_over}")
        if plan.continues:
            notes.extend(_version_notes(plan.path, plan.record))
            remove_abandoned(plan.path)  # not those of a calc_metrics.py that is at work there
            write_record(plan.path, record)  # what may differ, for example kimg, is now as the user says
    except BaseException:
        lock.release()
        raise
    return RunFolder(plan.path, record=record, lock=lock, continues=plan.continues, notes=tuple(notes))


def _version_notes(path: Path, record: RunRecord) -> list[str]:
    """Name the software that changed since the run was last trained."""
    now = software_versions()
    changed = [f"{name} {record.versions.get(name, 'unknown')} then and {version} now"
               for name, version in now.items() if record.versions.get(name) != version]
    return [f"{path}: {', '.join(changed)}; the end may differ from that of an unbroken run"] if changed else []


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
