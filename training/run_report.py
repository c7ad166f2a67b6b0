"""Report how a run goes: on the screen and in the log, statistics, metric and TensorBoard files of its folder.

A tick is the span between two lines of statistics. Records for TensorBoard are written here, in its own encoding, and
not by torch's SummaryWriter: its thread dies with a traceback on the first full disk, and takes with it everything that
comes later.
"""

import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import torch

from dnnlib.files import DiskFailure, atomic_write, retrying
from dnnlib.lines import AppendFile, cut_lines, insert_line, read_lines, to_line
from dnnlib.progress import format_seconds
from torch_utils.plots import save_curves
from training.run_folder import RunFolder

SKIPPED_PREFIX = "Trouble/skipped/"  # begins a statistic for each phase: 1 for a step that was left out, else 0
_GB = 2**30
_PROGRESS = re.compile(rb"\S+ \S+ +tick (\d+) +kimg ")  # date, time, and how a progress line begins
_PREFIX = "events.out.tfevents."  # TensorBoard finds files by it, and reads them in the order of their names
_NUMBERED = re.compile(re.escape(_PREFIX) + r"(\d{5,})")


@dataclass(frozen=True, kw_only=True)
class TickTimes:
    """Seconds, and what they mean for the rest."""

    total: float  # of the whole run
    tick: float  # spent on training in this tick
    maintenance: float  # between the tick before and this one: start, pictures, snapshots, metrics
    images: int  # of this tick, as far as this process trained them
    left: float | None  # expected until the end of training; None before anything is known

    @property
    def per_kimg(self) -> float:
        return self.tick / self.images * 1000 if self.images else float("nan")


class TickClock:
    """Measures ticks; made when the program starts.

    total_nimg:  images to train for
    now:         a clock in seconds
    """

    def __init__(self, *, total_nimg: int, now: Callable[[], float] = time.monotonic):
        self._now, self._total_nimg = now, total_nimg
        self._zero = self._ended = self._begun = now()
        self._nimg = 0  # when the tick began
        self._first: tuple[float, int] | None = None  # when training began in this process, and at which image

    def resume(self, seconds_before: float) -> None:
        """Count on from what `total` returned where the run was left."""
        self._zero -= seconds_before

    def total(self) -> float:
        """Return the seconds of the whole run, pauses between two processes left out."""
        return self._now() - self._zero

    def begin(self, nimg: int) -> None:
        """Start to train at `nimg` images: what passed since the tick before was maintenance."""
        self._begun, self._nimg = self._now(), nimg
        if self._first is None:
            self._first = (self._begun, nimg)

    def end(self, nimg: int) -> TickTimes:
        """End a tick at `nimg` images."""
        now = self._now()
        began, first_nimg = self._first or (self._begun, self._nimg)
        trained = nimg - first_nimg
        # Maintenance after the first tick counts, as there will be more of it; the start of the program does not.
        left = (now - began) / trained * max(self._total_nimg - nimg, 0) if trained > 0 else None
        times = TickTimes(total=now - self._zero, tick=now - self._begun, maintenance=self._begun - self._ended,
                          images=nimg - self._nimg, left=left)
        self._ended = now
        return times


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One tick of a run."""

    number: int
    nimg: int
    augment_p: float  # 0 where nothing is augmented
    times: TickTimes
    cpu_memory: float  # bytes this process holds
    gpu_memory: float  # bytes that tensors took at most on its GPU; 0 without one

    def scalars(self) -> dict[str, float]:
        """Return the numbers under the names that statistics and TensorBoard have for them."""
        times = self.times
        return {
            "Progress/tick": self.number, "Progress/kimg": self.nimg / 1000, "Progress/augment": self.augment_p,
            "Timing/total_sec": times.total, "Timing/total_hours": times.total / 3600,
            "Timing/total_days": times.total / 86400, "Timing/sec_per_tick": times.tick,
            "Timing/sec_per_kimg": times.per_kimg, "Timing/maintenance_sec": times.maintenance,
            "Resources/cpu_mem_gb": self.cpu_memory / _GB, "Resources/peak_gpu_mem_gb": self.gpu_memory / _GB,
        }  # fmt: skip

    def line(self, stats: Mapping[str, Mapping[str, float]]) -> str:
        """Return the progress line; `stats` gives the losses and the skipped steps."""
        def mean(name: str) -> str:
            return f"{stats[name]['mean']:.3f}" if name in stats else "-"

        times = self.times
        fields = [
            (f"tick {self.number}", 10), (f"kimg {self.nimg / 1000:.1f}", 13),
            (f"time {format_seconds(times.total)}", 14),
            (f"left {'-' if times.left is None else format_seconds(times.left)}", 14),
            (f"sec/tick {times.tick:.1f}", 16), (f"sec/kimg {times.per_kimg:.2f}", 17),
            (f"maintenance {times.maintenance:.1f}", 18),
        ]
        if self.cpu_memory:
            fields.append((f"cpumem {self.cpu_memory / _GB:.2f}", 13))
        if self.gpu_memory:
            fields.append((f"gpumem {self.gpu_memory / _GB:.2f}", 13))
        fields += [(f"augment {self.augment_p:.3f}", 14), (f"G {mean('Loss/G/loss')}", 8),
                   (f"D {mean('Loss/D/loss')}", 8)]
        skipped = sum(round(entry["num"] * entry["mean"]) for name, entry in stats.items()
                      if name.startswith(SKIPPED_PREFIX))
        if skipped:
            fields.append((f"skipped {skipped}", 0))
        return " ".join(text.ljust(width) for text, width in fields).rstrip()


def process_memory() -> float:
    """Return the bytes that this process holds; else the most it held so far, or 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        try:
            import resource  # POSIX has it, and no other system
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def take_peak_gpu_memory(device: torch.device) -> float:
    """Return the most bytes that tensors took on `device` since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class Reporter:
    """Writes what a run reports. A full disk or a missing folder gives a warning, and training goes on.

    folder:       the run's, which exists
    is_main:      False makes a reporter that does nothing, for all processes but one
    tensorboard:  write event files as well
    """

    def __init__(self, folder: str | os.PathLike, *, is_main: bool, tensorboard: bool = True):
        self.run = RunFolder(folder)
        self._is_main = is_main
        self._log = AppendFile(self.run.log, durable=False)
        self._stats = AppendFile(self.run.stats, durable=True)
        self._metrics: dict[str, AppendFile] = {}
        self._events = EventFile(self.run.path) if is_main and tensorboard else None
        self._failures = 0  # writes that did not work
        self._warned: set[str] = set()  # of what, since a tick could be written

    def start(self, *, ticks: int, nimg: int) -> None:
        """Begin, or continue from a state, with `ticks` ticks reported so far and `nimg` images seen.

        What the files say of later ticks goes, so that they end as those of an unbroken run. The log keeps all but the
        progress lines of these ticks: warnings and errors tell why a run broke off.
        Raises OSError when the files cannot be read or replaced.
        """
        if not self._is_main:
            return
        _cut_log(self.run.log, ticks)
        cut_lines(self.run.stats, lambda record: _tick_of_statistics(record) < ticks)
        for path in self.run.metrics():
            # Lines without a tick are none of the run's: somebody measured a snapshot.
            cut_lines(path, lambda record: record.get("tick", -1) < ticks)
        if self._events is not None:
            self._events = EventFile(self.run.path, purge_step=nimg + 1)

    def log(self, text: str, *, to_stderr: bool = False) -> None:
        """Print lines, and log them with the time."""
        if not self._is_main:
            return
        _print(text, sys.stderr if to_stderr else sys.stdout)
        with self._surviving_lines(self.run.log):
            self._log.append(_dated(text))

    def tick(self, tick: Tick, stats: Mapping[str, Mapping[str, float]]) -> None:
        """Report a tick with the statistics that `Collector.flush` returned."""
        if not self._is_main:
            return
        now, scalars, failures = time.time(), tick.scalars(), self._failures
        self.log(tick.line(stats))
        with self._surviving_lines(self.run.stats):
            self._stats.append(to_line({
                **stats, **{name: {"num": 1, "mean": value, "std": 0.0} for name, value in scalars.items()},
                "timestamp": now}))
        self._show({**{name: entry["mean"] for name, entry in stats.items()}, **scalars}, tick.nimg, now)
        if self._failures == failures:
            self._warned.clear()

    def metric(self, name: str, found: Mapping[str, Any], *, tick: int, nimg: int, num_gpus: int,
               snapshot: str | None) -> None:
        """Report a metric: log its results, add a line to metric-NAME.jsonl, and draw metric-NAME.png anew.

        The line stands in front of those of later ticks, so that the file is that of a run that computed it in time.

        found, num_gpus, snapshot:  as in `metric_record`
        tick:                       number of the tick that it belongs to
        """
        if not self._is_main:
            return
        record = metric_record(name, {"tick": tick, "nimg": nimg, **found}, num_gpus=num_gpus, snapshot=snapshot)
        results, now = record["results"], record["timestamp"]
        counts = f"  of {found['num_fake']} fakes and {found['num_real']} reals" if found.get("num_real") else ""
        self.log("  ".join(f"{key} {value:.5g}" for key, value in results.items())
                 + f"{counts}  at kimg {nimg / 1000:.1f}, in {record['total_time_str']}")
        path = self.run.metric(name)
        with self._surviving_lines(path):
            file = self._metrics.setdefault(name, AppendFile(path, durable=True, shared=True))  # with calc_metrics.py
            is_there = False
            with suppress(OSError, DiskFailure):  # behind the others then, where it waits for room
                is_there = insert_line(path, to_line(record), lambda other: other.get("tick", -1) > tick)
            if not is_there:
                file.append(to_line(record))
            save_curves(path.with_suffix(".png"), _curves(read_lines(path)))
        self._show({f"Metrics/{key}": value for key, value in results.items()}, nimg, now)

    def write_waiting(self) -> None:
        """Write lines that a full disk kept back: a state that counts their ticks must not be saved before them."""
        with self._surviving_lines(self.run.stats):
            for file in (self._log, self._stats, *self._metrics.values()):
                file.retry()

    @contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """Run a block that writes `what`; when it cannot, warn (once until a tick is written whole) and go on."""
        with self._warning_of(what, what, "training goes on without it"):
            yield

    def _surviving_lines(self, path: Path) -> AbstractContextManager[None]:
        """As `surviving`; one warning for all files of lines, since they fail together."""
        return self._warning_of("", path.name, "training goes on; missing lines follow once there is room again")

    @contextmanager
    def _warning_of(self, key: str, what: str, consequence: str) -> Iterator[None]:
        try:
            yield
        except (OSError, DiskFailure) as error:
            self._failures += 1
            if self._is_main and key not in self._warned:
                self._warned.add(key)
                text = f"warning: {what} cannot be written ({describe(error)}); {consequence}"
                _print(text, sys.stdout)
                with suppress(OSError):  # The screen has it, and the log will, once it can be written.
                    self._log.append(_dated(text))

    def _show(self, scalars: Mapping[str, float], nimg: int, now: float) -> None:
        """Hand values to TensorBoard, with images as steps: short ticks stay apart, and kimg 200 reads "200k"."""
        if self._events is not None:
            with self._surviving_lines(self._events.path):
                self._events.add_scalars(scalars, step=nimg, time=now)


def metric_record(name: str, found: Mapping[str, Any], *, num_gpus: int, snapshot: str | None) -> dict[str, Any]:
    """Return a line on a metric: the fields of the original's lines, and ours behind them.

    found:     what was computed: results, by key such as pr50k3_full_precision, total_time in seconds, further fields
    num_gpus:  processes that computed it
    snapshot:  name of the network file in the run's folder; None where images were measured, or there is none
    """
    usual = {"results": found["results"], "metric": name, "total_time": found["total_time"],
             "total_time_str": format_seconds(found["total_time"]), "num_gpus": num_gpus, "snapshot_pkl": snapshot,
             "timestamp": time.time()}
    return {**usual, **{key: value for key, value in found.items() if key not in usual}}


def describe(error: OSError | DiskFailure) -> str:
    """Return the system's words for what went wrong with a file."""
    return getattr(error, "strerror", None) or str(error)


def _print(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    try:  # letters that the terminal does not have, as in the name of a class, must not end the run
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        # The terminal, or the program that read our output, is gone. Nothing more goes there, training goes on.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _dated(text: str) -> bytes:
    """Return lines of the log: each with date and time in front."""
    stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return "".join(f"{stamp} {line}\n" for line in text.splitlines()).encode(errors="backslashreplace")


def _cut_log(path: Path, ticks: int) -> None:
    """Leave out the progress lines of ticks from `ticks` on, and end a line that was cut short."""
    try:
        lines = retrying(path.read_bytes, path).splitlines()
    except FileNotFoundError:
        return
    kept = []
    for line in lines:
        found = _PROGRESS.match(line)
        if found is None or int(found[1]) < ticks:
            kept.append(line + b"\n")
    with atomic_write(path) as file:
        file.write(b"".join(kept))


def _tick_of_statistics(record: Mapping[str, Any]) -> float:
    """Return the number of a line's tick; infinity for a line that has none, which is not ours."""
    try:
        return record["Progress/tick"]["mean"]
    except (KeyError, TypeError):
        return float("inf")


def _curves(records: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return {key: [(kimg, value), ...]} of the lines that tell when they were measured."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if "nimg" in record:
            for key, value in record.get("results", {}).items():
                curves.setdefault(key, []).append((record["nimg"] / 1000, float("nan") if value is None else value))
    return curves


class EventFile:
    """The events of one process; those of a continued run are in several files, whichever of them were removed.

    purge_step: steps from here on in files before this one no longer count; None keeps all
    """

    def __init__(self, folder: str | os.PathLike, *, purge_step: int | None = None):
        # One more than the last: a count would name a file that is there where an earlier one was removed.
        found = (_NUMBERED.fullmatch(path.name) for path in Path(folder).glob(f"{_PREFIX}*"))
        number = max((int(match[1]) for match in found if match), default=-1) + 1
        self.path = Path(folder) / f"{_PREFIX}{number:05d}"
        self._file = AppendFile(self.path, durable=False)
        self._purge_step = purge_step
        self._started = False

    def add_scalars(self, scalars: Mapping[str, float], *, step: int, time: float) -> None:
        """Append values at `step`. Raises OSError when that is not possible; they are then written later.

        time: seconds since 1970
        """
        # Takes a moment, and only the main process writes.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
        events = [] if self._started else self._first_events(time)
        self._started = True
        buffer = io.BytesIO()
        writer = RecordWriter(buffer)  # records with checksums
        for event in [*events, Event(wall_time=time, step=step, summary=summary)]:
            writer.write(event.SerializeToString())
        self._file.append(buffer.getvalue())

    def _first_events(self, time: float) -> list:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        events = [Event(wall_time=time, file_version="brain.Event:2")]
        if self._purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            events.append(Event(wall_time=time, step=self._purge_step, session_log=start))
        return events
