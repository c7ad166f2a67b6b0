"""Compute the metrics of network snapshots within a run's time limit, and catch up on those that were postponed."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dnnlib.cli import StopRequest
from dnnlib.files import DiskFailure, sha256_of
from dnnlib.lines import read_lines
from dnnlib.progress import format_seconds
from torch_utils.device import lost_device
from torch_utils.distributed import Processes, ProcessLost
from training.config import BestValue
from training.run_folder import RunFolder
from training.run_report import Reporter
from training.snapshot import load_network, read_info

# Fields of a line that record how a network was measured: values are comparable if these are equal.
_HOW = ("num_real", "num_fake", "mirrored_reals", "detector", "detector_sha256", "preprocessing", "seed", "batch",
        "class", "data_sha256")


class Evaluate(Protocol):
    """Computes metrics of a generator; called by all processes of a run."""

    def __call__(self, G: torch.nn.Module, *, stop: Callable[[], bool]) -> Mapping[str, Mapping[str, Any]]:
        """Return {metric: {"results": {key: value}, **further fields of its line}}.

        stop:  once it returns True in any process, the computation is aborted with an error in all
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A network snapshot with metrics still to be computed."""

    tick: int  # at which it was written
    nimg: int  # images seen then


class SnapshotMetrics:
    """The metrics of a run's network snapshots.

    metrics:       their names
    evaluate:      None computes none
    stop:          asks the run to stop
    continuation:  returns, for messages, where the run continues after a stop; called in the main process

    All processes make the same calls; the main one decides whether there is time, and writes.
    """

    def __init__(self, metrics: tuple[str, ...], evaluate: Evaluate | None, *, run: RunFolder, reporter: Reporter,
                 processes: Processes, stop: StopRequest, continuation: Callable[[], str]):
        self._metrics, self._evaluate, self._continuation = metrics, evaluate, continuation
        self._run, self._reporter, self._processes, self._stop = run, reporter, processes, stop
        self._is_main = processes.rank == 0
        self.missing: list[Missing] = []  # the oldest first; the same in all processes
        self.left_out: str | None = None  # why the last ones were postponed, None if they were not
        self.has_computed = False  # whether any were computed in this process
        self.has_given_up = False  # whether a computation was aborted in this process
        self._given_up_after: float | None = None  # seconds after which one was aborted; None once one completed
        self._seconds: float | None = None  # duration of the last computation; known in the main process

    @property
    def wanted(self) -> bool:
        """Whether metrics are computed."""
        return self._evaluate is not None

    def state_dict(self) -> dict[str, Any]:
        return {"networks": [[missing.tick, missing.nimg] for missing in self.missing],
                "given_up_after": self._given_up_after}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what was still to be computed when a state was saved, unless it has been computed since."""
        networks = saved.get("networks", []) if self._evaluate is not None else []
        missing = [Missing(tick=tick, nimg=nimg) for tick, nimg in networks]
        missing = [each for each in missing if self._list_missing(each)] if self._is_main else None
        self.missing = self._processes.broadcast(missing)
        self._given_up_after = saved.get("given_up_after")
        found = [self._given_up_after, self._recorded_seconds() if self._is_main else None]
        self._seconds = max((seconds for seconds in found if seconds is not None), default=None)

    def expect(self, tick: int, nimg: int) -> None:
        """Register a network whose metrics are to be computed; states saved from now on record it."""
        if self._evaluate is not None:
            self.missing.append(Missing(tick=tick, nimg=nimg))

    def compute(self, G: torch.nn.Module, sha256: str | None, failure: str | None) -> None:
        """Compute the metrics of the newest network, then missing ones of others while there is time.

        G:        its generator
        sha256:   of its file;  failure: why it could not be written; both known in the main process
        """
        if not self.missing:
            return
        failure = self._processes.broadcast(failure)  # so that all processes drop what the main process drops
        newest, snapshot, more = self.missing[-1], self._run.snapshot(self.missing[-1].nimg).name, {}
        if failure is not None:
            snapshot, more = None, {"snapshot_note": f"{snapshot} could not be written ({failure})"}
        if self._measure(newest, G, snapshot=snapshot, network_sha256=sha256, **more):
            self.make_up()
        elif newest in self.missing and failure is not None:
            self._give_up(newest, "its network snapshot could not be written")
        elif newest in self.missing:
            self._log_left_out(newest)

    def make_up(self) -> None:
        """Compute the missing metrics of networks on disk, the newest first, until there is no more time."""
        for missing in self.missing[::-1]:
            if not self._measure_file(missing):
                if missing in self.missing:
                    self._log_left_out(missing)
                return

    def make_up_replaced(self, nimg: int) -> None:
        """Compute, or drop, the missing metrics of networks whose file will be overwritten at `nimg` images."""
        for missing in [each for each in self.missing if self._run.snapshot(each.nimg) == self._run.snapshot(nimg)]:
            if not self._measure_file(missing) and missing in self.missing:
                self._give_up(missing, f"another network overwrites {self._run.snapshot(nimg).name}")

    def values(self, best: BestValue) -> dict[str, float | None]:
        """Return {name of a snapshot: its value, None for NaN}, of all that were measured as this run does."""
        path = self._run.metric(best.metric)
        return {line["snapshot_pkl"]: line["results"].get(best.key) for line in _measured_alike(read_lines(path))
                if best.key in line.get("results", {})}

    def _measure_file(self, missing: Missing) -> bool:
        """Compute the metrics of a network on disk that no line has yet; return as `_measure` does."""
        path = self._run.snapshot(missing.nimg)
        found = (self._is_file_of(path, missing), bool(self._list_missing(missing))) if self._is_main else None
        is_there, are_missing = self._processes.broadcast(found)
        if are_missing and not is_there:
            self._reporter.log(f"warning: metrics at kimg {missing.nimg / 1000:.1f} were not computed: {path.name} is "
                               "missing, damaged, or another network")
        if not (are_missing and is_there):  # or calc_metrics.py has measured it
            self.missing.remove(missing)
            return True
        if self._is_left_out():  # checked before it takes memory
            return False
        G, digest, error = None, None, None
        try:
            G = load_network(path, self._processes.device).G_ema
            digest = sha256_of(path) if self._is_main else None
        except Exception as found:  # as below
            error = found
        if self._processes.any(error is not None):
            reason = self._reason_unless_lost(error)
            self.missing.remove(missing)
            self._reporter.log(f"warning: failed to compute metrics at kimg {missing.nimg / 1000:.1f} ({reason}); "
                               "training continues")
            return True
        return self._measure(missing, G, snapshot=path.name, network_sha256=digest)

    def _measure(self, missing: Missing, G: torch.nn.Module, *, snapshot: str | None, **more: Any) -> bool:
        """Compute metrics and write their lines; return whether to continue with other networks.

        If there is no time they stay missing, and `left_out` holds the reason. Failures are logged, and not retried.
        """
        if self._is_left_out():
            return False
        started = time.monotonic()
        try:
            found = self._evaluate(G, stop=self._stop.wanted)
        except Exception as error:  # a failing metric must not end a training run
            self._note_failure(missing, error, time.monotonic() - started)
            return False
        self.missing.remove(missing)
        self.has_computed, self._given_up_after = True, None
        if self._is_main:
            seconds = {name: record.get("total_time", time.monotonic() - started) for name, record in found.items()}
            self._seconds = max(seconds.values(), default=None)
            for name in self._list_missing(missing):
                self._reporter.metric(name, {**found[name], "total_time": seconds[name], **more}, tick=missing.tick,
                                      nimg=missing.nimg, num_gpus=self._processes.count, snapshot=snapshot)
        return True

    def _is_left_out(self) -> bool:
        """Tell whether there is no time for metrics."""
        self.left_out = "another process was asked to stop" if self._processes.any(self._stop.wanted()) else None
        if self._is_main:
            left = self._stop.seconds_left()
            if self._stop.wanted():
                self.left_out = self._stop.reason
            elif self.left_out is None and None not in (left, self._seconds) and self._seconds > left:
                self.left_out = (f"metrics took at least {format_seconds(self._seconds)} the last time, and "
                                 f"{format_seconds(left)} of --max-hours is left")
        self.left_out = self._processes.broadcast(self.left_out)
        return self.left_out is not None

    def _note_failure(self, missing: Missing, error: Exception, seconds: float) -> None:
        """Handle an error: computation aborted by a stop, GPU lost, or metric failed."""
        reason = self._reason_unless_lost(error)
        if self._processes.any(self._stop.wanted()):
            self.left_out = self._processes.broadcast(self._stop.reason or "another process was asked to stop")
            self.has_given_up, self._given_up_after = True, max(seconds, self._given_up_after or 0)
            return
        self.missing.remove(missing)
        self._reporter.log(f"warning: metrics failed ({reason}); training continues")

    def _reason_unless_lost(self, error: Exception | None) -> str:
        """Return what failed, in this process or another one; raise if a GPU no longer works."""
        is_lost = error is not None and lost_device(error, self._processes.device)
        reason = self._processes.first_text("" if error is None else f"{type(error).__name__}: {error}")
        if self._processes.any(is_lost):
            self._reporter.log(f"stopped: the GPU failed while computing metrics ({reason}); {self._continuation()}")
            if is_lost:
                raise error
            raise ProcessLost(f"the GPU of another process failed ({reason})") from error
        return reason

    def _log_left_out(self, missing: Missing) -> None:
        self._reporter.log(f"metrics at kimg {missing.nimg / 1000:.1f} are postponed ({self.left_out}): they are "
                           "computed with the next network snapshot, or by calc_metrics.py "
                           f"--run={self._run.path}")

    def _give_up(self, missing: Missing, reason: str) -> None:
        self.missing.remove(missing)
        self._reporter.log(f"metrics at kimg {missing.nimg / 1000:.3f} were not computed ({self.left_out}): {reason}")

    def _list_missing(self, missing: Missing) -> list[str]:
        """Return the metrics of a network that no line has yet."""
        snapshot = self._run.snapshot(missing.nimg).name
        return [name for name in self._metrics if not any(
            (line.get("tick"), line.get("nimg")) == (missing.tick, missing.nimg)
            or (line.get("snapshot_pkl") == snapshot and line.get("kimg") == missing.nimg / 1000)
            for line in _measured_alike(read_lines(self._run.metric(name)), any_snapshot=True, complete=True))]

    def _is_file_of(self, path: Path, missing: Missing) -> bool:
        """Tell whether a network's file exists and was not overwritten by another network of the same name."""
        try:
            return read_info(path).get("kimg") == missing.nimg / 1000
        except (OSError, ValueError, DiskFailure):
            return False

    def _recorded_seconds(self) -> float | None:
        """Return the seconds that the run's metrics took last, with the same number of processes and kind of device."""
        found = []
        for name in self._metrics:
            lines = [line for line in read_lines(self._run.metric(name)) if "tick" in line
                     and line.get("num_gpus") == self._processes.count
                     and line.get("device", self._processes.device.type) == self._processes.device.type]
            found += [line["total_time"] for line in lines[-1:] if isinstance(line.get("total_time"), (int, float))]
        return max(found, default=None)


def _measured_alike(lines: list[dict[str, Any]], *, any_snapshot: bool = False,
                    complete: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the lines written by training, and those of calc_metrics.py that were measured in the same way.

    any_snapshot:  also lines of networks without a file
    complete:      only those with values of each class if training computes these
    """
    own = [line for line in lines if "tick" in line]
    for line in lines:
        if (line.get("snapshot_pkl") is not None or any_snapshot) and ("tick" in line or (
                own and all(line.get(name) == own[-1].get(name) for name in _HOW)
                and not (complete and "per_class" in own[-1] and "per_class" not in line))):
            yield line
