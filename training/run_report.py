"""Report the progress of a run: on the screen, and in its log, statistics, metric and TensorBoard files.

A tick is the interval between two lines of statistics. TensorBoard records are encoded and written here rather than by
torch's SummaryWriter, whose thread dies with a traceback on the first full disk and loses everything that follows.
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

SKIPPED_PREFIX = "Trouble/skipped/"  # prefix of a statistic for each phase: 1 for a skipped step, else 0
_GB = 2**30
_PROGRESS = re.compile(rb"\S+ \S+ +(?:tick|round) (\d+) +kimg ")  # date, time, and the start of a progress line
_PREFIX = "events.out.tfevents."  # TensorBoard finds files by this prefix, and reads them in the order of their names
_NUMBERED = re.compile(re.escape(_PREFIX) + r"(\d{5,})")


@dataclass(frozen=True, kw_only=True)
class TickTimes:
    """Times of a tick, in seconds."""

    total: float  # of the whole run
    tick: float  # of training in this tick
    maintenance: float  # between the previous tick and this one: start-up, sample grids, snapshots, metrics
    images: int  # of this tick, since this process started
    left: float | None  # estimate until the end of training; None without data

    @property
    def per_kimg(self) -> float:
        return self.tick / self.images * 1000 if self.images else float("nan")


class TickClock:
    """Measures ticks; created when the program starts.

    total_nimg:  images to train for
    now:         a clock in seconds
    """

    def __init__(self, *, total_nimg: int, now: Callable[[], float] = time.monotonic):
        self._now, self.total_nimg = now, total_nimg
        self._zero = self._ended = self._begun = now()
        self._nimg = 0  # at the start of the tick
        self._first: tuple[float, int] | None = None  # time and images seen when training began in this process

    def resume(self, seconds_before: float) -> None:
        """Add the time that `total` returned when the run stopped."""
        self._zero -= seconds_before

    def total(self) -> float:
        """Return the seconds of the whole run, without the pauses between two processes."""
        return self._now() - self._zero

    def begin(self, nimg: int) -> None:
        """Start training at `nimg` images: the time since the previous tick counts as maintenance."""
        self._begun, self._nimg = self._now(), nimg
        if self._first is None:
            self._first = (self._begun, nimg)

    def end(self, nimg: int) -> TickTimes:
        """End a tick at `nimg` images."""
        now = self._now()
        began, first_nimg = self._first or (self._begun, self._nimg)
        trained = nimg - first_nimg
        # The estimate includes maintenance after the first tick, since there will be more, but not the start-up.
        left = (now - began) / trained * max(self.total_nimg - nimg, 0) if trained > 0 else None
        times = TickTimes(total=now - self._zero, tick=now - self._begun, maintenance=self._begun - self._ended,
                          images=nimg - self._nimg, left=left)
        self._ended = now
        return times


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One tick of a run."""

    number: int
    nimg: int
    augment_p: float  # 0 without augmentation
    times: TickTimes
    cpu_memory: float  # bytes this process uses
    gpu_memory: float  # peak bytes of tensors on its GPU; 0 without one

    def scalars(self) -> dict[str, float]:
        """Return the numbers under their names in statistics and TensorBoard."""
        times = self.times
        return {
            "Progress/tick": self.number, "Progress/kimg": self.nimg / 1000, "Progress/augment": self.augment_p,
            "Timing/total_sec": times.total, "Timing/total_hours": times.total / 3600,
            "Timing/total_days": times.total / 86400, "Timing/sec_per_tick": times.tick,
            "Timing/sec_per_kimg": times.per_kimg, "Timing/maintenance_sec": times.maintenance,
            "Resources/cpu_mem_gb": self.cpu_memory / _GB, "Resources/peak_gpu_mem_gb": self.gpu_memory / _GB,
        }  # fmt: skip

    def line(self, stats: Mapping[str, Mapping[str, float]]) -> str:
        """Return the progress line; `stats` has the losses and the skipped steps."""
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
    """Return the bytes that this process uses; its peak so far or 0 on systems that do not report them."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        try:
            import resource  # POSIX only
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def take_peak_gpu_memory(device: torch.device) -> float:
    """Return the peak bytes of tensors on `device` since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


class Reporter:
    """Writes the reports of a run. On a full disk or a missing folder it logs a warning, and training continues.

    folder:       of the run; must exist
    is_main:      False creates a reporter that does nothing, for all processes but one
    tensorboard:  also write event files
    title:        starts each line on the screen, where several runs report; "" for none
    """

    def __init__(self, folder: str | os.PathLike, *, is_main: bool, tensorboard: bool = True, title: str = ""):
        self.run = RunFolder(folder)
        self._title = title
        self._is_main = is_main
        self._log = AppendFile(self.run.log, durable=False)
        self._stats = AppendFile(self.run.stats, durable=True)
        self._metrics: dict[str, AppendFile] = {}
        self._events = EventFile(self.run.path) if is_main and tensorboard else None
        self._failures = 0  # failed writes
        self._warned: set[str] = set()  # keys of the warnings since the last tick that was written completely

    def start(self, *, ticks: int, nimg: int) -> None:
        """Start, or continue from a resumable state, with `ticks` ticks reported so far and `nimg` images seen.

        Lines of later ticks are removed, so that the files end up as those of an uninterrupted run. From the log only
        progress lines are removed: warnings and errors explain why a run was interrupted.
        Raises OSError if the files cannot be read or replaced.
        """
        if not self._is_main:
            return
        _cut_log(self.run.log, ticks)
        cut_lines(self.run.stats, lambda record: _tick_of_statistics(record) < ticks)
        for path in self.run.metrics():
            # Lines without a tick are not the run's: they were written by calc_metrics.py.
            cut_lines(path, lambda record: record.get("tick", -1) < ticks)
        if self._events is not None:
            self._events = EventFile(self.run.path, purge_step=nimg + 1)

    def log(self, text: str, *, to_stderr: bool = False) -> None:
        """Print lines, and write them to the log with date and time."""
        if not self._is_main:
            return
        shown = "\n".join(f"{self._title}{line}" for line in text.splitlines())
        _print(shown, sys.stderr if to_stderr else sys.stdout)
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
        """Report a metric: log its results, add a line to metric-NAME.jsonl, and redraw metric-NAME.png.

        The line is inserted before those of later ticks, as if the metric had been computed in time.

        found, num_gpus, snapshot:  as in `metric_record`
        tick:                       number of the tick that it belongs to
        """
        if not self._is_main:
            return
        record = metric_record(name, {"tick": tick, "nimg": nimg, **found}, num_gpus=num_gpus, snapshot=snapshot)
        results, now = record["results"], record["timestamp"]
        counts = f"  of {found['num_fake']} fakes and {found['num_real']} reals" if found.get("num_real") else ""
        worst = record.get("worst_class", {})  # there with --per-class
        classes = f"  worst class: {', '.join('{class} ({value:.5g})'.format(**each) for each in worst.values())}"
        self.log("  ".join(f"{key} {value:.5g}" for key, value in results.items())
                 + f"{counts}{classes if worst else ''}  at kimg {nimg / 1000:.1f}, in {record['total_time_str']}")
        path = self.run.metric(name)
        with self._surviving_lines(path):
            file = self._metrics.setdefault(name, AppendFile(path, durable=True, shared=True))  # with calc_metrics.py
            is_there = False
            with suppress(OSError, DiskFailure):  # then the line is appended below, and waits for space
                is_there = insert_line(path, to_line(record), lambda other: other.get("tick", -1) > tick)
            if not is_there:
                file.append(to_line(record))
            save_curves(path.with_suffix(".png"), _curves(read_lines(path)))
        self._show({**{f"Metrics/{key}": value for key, value in results.items()},
                    **{f"Metrics/{key}/worst_class": each["value"] for key, each in worst.items()}}, nimg, now)

    def write_waiting(self) -> None:
        """Write lines that a full disk held back: a state that counts their ticks must not be saved before them."""
        with self._surviving_lines(self.run.stats):
            for file in (self._log, self._stats, *self._metrics.values()):
                file.retry()

    @contextmanager
    def surviving(self, action: str) -> Iterator[None]:
        """Run a block; if it fails, warn (once until a tick is written completely) and continue.

        action:  what the block does, such as "write the sample grid"
        """
        with self._warning_of(action, action, "training continues"):
            yield

    def _surviving_lines(self, path: Path) -> AbstractContextManager[None]:
        """As `surviving`; one warning for all files of lines, since they fail together."""
        return self._warning_of("", f"write {path.name}",
                                "training continues; missing lines are written once there is space again")

    @contextmanager
    def _warning_of(self, key: str, action: str, consequence: str) -> Iterator[None]:
        try:
            yield
        except (OSError, DiskFailure) as error:
            self._failures += 1
            if self._is_main and key not in self._warned:
                self._warned.add(key)
                text = f"warning: failed to {action} ({error_text(error)}); {consequence}"
                _print(f"{self._title}{text}", sys.stdout)
                with suppress(OSError):  # It is on the screen, and in the log once that can be written.
                    self._log.append(_dated(text))

    def _show(self, scalars: Mapping[str, float], nimg: int, now: float) -> None:
        """Send values to TensorBoard, with images seen as steps: short ticks stay apart, and kimg 200 is "200k"."""
        if self._events is not None:
            with self._surviving_lines(self._events.path):
                self._events.add_scalars(scalars, step=nimg, time=now)


def metric_record(name: str, found: Mapping[str, Any], *, num_gpus: int, snapshot: str | None) -> dict[str, Any]:
    """Return a line on a metric: the fields that NVIDIA's code writes, followed by ours.

    found:     results by key, such as pr50k3_full_precision, total_time in seconds, and further fields
    num_gpus:  processes that computed it
    snapshot:  name of the network snapshot in the run's folder; None if images were measured, or the file is missing
    """
    usual = {"results": found["results"], "metric": name, "total_time": found["total_time"],
             "total_time_str": format_seconds(found["total_time"]), "num_gpus": num_gpus, "snapshot_pkl": snapshot,
             "timestamp": time.time()}
    return {**usual, **{key: value for key, value in found.items() if key not in usual}}


def error_text(error: OSError | DiskFailure) -> str:
    """Return the system's message for an error on a file."""
    return getattr(error, "strerror", None) or str(error)


def _print(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    try:  # characters that the terminal cannot show, as in a class name, must not end the run
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        # The terminal, or the program that read our output, is gone. Write nothing more there, and keep training.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _dated(text: str) -> bytes:
    """Return lines of the log, each starting with date and time."""
    stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return "".join(f"{stamp} {line}\n" for line in text.splitlines()).encode(errors="backslashreplace")


def _cut_log(path: Path, ticks: int) -> None:
    """Remove the progress lines of ticks from `ticks` on, and end a truncated last line."""
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
    """Return the tick of a line; infinity for a line without one, which is not ours."""
    try:
        return record["Progress/tick"]["mean"]
    except (KeyError, TypeError):
        return float("inf")


def _curves(records: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return {key: [(kimg, value), ...]} of the lines that record the number of images seen."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if "nimg" in record:
            for key, value in record.get("results", {}).items():
                curves.setdefault(key, []).append((record["nimg"] / 1000, float("nan") if value is None else value))
    return curves


class EventFile:
    """The TensorBoard events of one process; a continued run has several such files.

    purge_step: TensorBoard ignores steps from here on in earlier files; None keeps all
    """

    def __init__(self, folder: str | os.PathLike, *, purge_step: int | None = None):
        # One more than the highest number: the number of files could be that of an existing one, if some were removed.
        found = (_NUMBERED.fullmatch(path.name) for path in Path(folder).glob(f"{_PREFIX}*"))
        number = max((int(match[1]) for match in found if match), default=-1) + 1
        self.path = Path(folder) / f"{_PREFIX}{number:05d}"
        self._file = AppendFile(self.path, durable=False)
        self._purge_step = purge_step
        self._started = False

    def add_scalars(self, scalars: Mapping[str, float], *, step: int, time: float) -> None:
        """Append values at `step`. Raises OSError if that fails; they are then written later.

        time: seconds since 1970
        """
        # Imported here: it takes a moment, and only the main process writes.
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
