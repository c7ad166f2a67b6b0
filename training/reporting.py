"""Tell how a run goes: on the screen and in the log, statistics, metric and TensorBoard files of its folder."""

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from dnnlib.appending import AppendFile
from dnnlib.disk_failures import DiskFailure, retrying
from dnnlib.files import atomic_write
from dnnlib.progress import format_seconds
from torch_utils.plots import save_curves
from training.event_file import EventFile
from training.json_lines import cut_lines, insert_line, read_lines, to_line
from training.tick import Tick

LOG, STATS = "log.txt", "stats.jsonl"
# Of a line on a metric; what else is known of a result follows them.
METRIC_FIELDS = ("results", "metric", "total_time", "total_time_str", "num_gpus", "snapshot_pkl", "timestamp", "tick",
                 "nimg")
_PROGRESS = re.compile(rb"\S+ \S+ +tick (\d+) +kimg ")  # date, time, and how a progress line begins


class Reporter:
    """Writes what a run has to say. A full disk or a missing folder gives a warning, and training goes on.

    folder:       the run's, which exists
    is_main:      False makes a reporter that does nothing, for all processes but one
    tensorboard:  write event files as well
    """

    def __init__(self, folder: str | os.PathLike, *, is_main: bool, tensorboard: bool = True):
        self.folder = Path(folder)
        self._is_main = is_main
        self._log = AppendFile(self.folder / LOG, durable=False)
        self._stats = AppendFile(self.folder / STATS, durable=True)
        self._metrics: dict[str, AppendFile] = {}
        self._events = EventFile(self.folder) if is_main and tensorboard else None
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
        _cut_log(self.folder / LOG, ticks)
        cut_lines(self.folder / STATS, lambda record: _tick_of_statistics(record) < ticks)
        for path in self.folder.glob("metric-*.jsonl"):
            # Lines without a tick are none of the run's: somebody measured a snapshot.
            cut_lines(path, lambda record: record.get("tick", -1) < ticks)
        if self._events is not None:
            self._events = EventFile(self.folder, purge_step=nimg + 1)

    def say(self, text: str) -> None:
        """Print lines, and log them with the time."""
        self._say(text, sys.stdout)

    def warn(self, text: str) -> None:
        """As `say`, on standard error."""
        self._say(text, sys.stderr)

    def _say(self, text: str, stream: TextIO) -> None:
        if not self._is_main:
            return
        _print(text, stream)
        with self._surviving_lines(LOG):
            self._log.append(_dated(text))

    def tick(self, tick: Tick, stats: Mapping[str, Mapping[str, float]]) -> None:
        """Report a tick with the statistics that `Collector.flush` returned."""
        if not self._is_main:
            return
        now, scalars, failures = time.time(), tick.scalars(), self._failures
        self.say(tick.line(stats))
        with self._surviving_lines(STATS):
            self._stats.append(to_line({
                **stats, **{name: {"num": 1, "mean": value, "std": 0.0} for name, value in scalars.items()},
                "timestamp": now}))
        self._show({**{name: entry["mean"] for name, entry in stats.items()}, **scalars}, tick.nimg, now)
        if self._failures == failures:
            self._warned.clear()

    def metric(self, name: str, results: Mapping[str, float], *, tick: int, nimg: int, seconds: float, num_gpus: int,
               snapshot: str | None, **more: Any) -> None:
        """Report the results of a metric: say them, add a line to metric-NAME.jsonl, and draw metric-NAME.png anew.

        The line stands in front of those of later ticks, so that the file is that of a run that computed it in time.

        results:   by key, such as pr50k3_full_precision
        tick:      number of the tick that it belongs to
        seconds:   that it took;  num_gpus: processes that computed it
        snapshot:  name of the network file in the run's folder; None when there is none
        more:      further fields of the line
        """
        if not self._is_main:
            return
        now = time.time()
        record = {"results": results, "metric": name, "total_time": seconds, "total_time_str": format_seconds(seconds),
                  "num_gpus": num_gpus, "snapshot_pkl": snapshot, "timestamp": now, "tick": tick, "nimg": nimg, **more}
        counts = f"  of {more['num_fake']} fakes and {more['num_real']} reals" if more.get("num_real") else ""
        self.say("  ".join(f"{key} {value:.5g}" for key, value in results.items())
                 + f"{counts}  at kimg {nimg / 1000:.1f}, in {format_seconds(seconds)}")
        path = self.folder / f"metric-{name}.jsonl"
        with self._surviving_lines(path.name):
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
        with self._surviving_lines(STATS):
            for file in (self._log, self._stats, *self._metrics.values()):
                file.retry()

    @contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """Run a block that writes `what`; when it cannot, warn (once until a tick is written whole) and go on."""
        with self._warning_of(what, f"{what} cannot be written", "training goes on without it"):
            yield

    def _surviving_lines(self, name: str) -> AbstractContextManager[None]:
        """As `surviving`; one warning for all files of lines, since they fail together."""
        return self._warning_of("", f"{name} cannot be written",
                                "training goes on; missing lines follow once there is room again")

    @contextmanager
    def _warning_of(self, key: str, trouble: str, consequence: str) -> Iterator[None]:
        try:
            yield
        except (OSError, DiskFailure) as error:
            self._failures += 1
            if self._is_main and key not in self._warned:
                self._warned.add(key)
                self._warn(f"warning: {trouble} ({describe(error)}); {consequence}")

    def _warn(self, text: str) -> None:
        _print(text, sys.stdout)
        with suppress(OSError):  # The screen has it, and the log will, once it can be written.
            self._log.append(_dated(text))

    def _show(self, scalars: Mapping[str, float], nimg: int, now: float) -> None:
        """Hand values to TensorBoard, with images as steps: short ticks stay apart, and kimg 200 reads "200k"."""
        if self._events is not None:
            with self._surviving_lines(self._events.path.name):
                self._events.add_scalars(scalars, step=nimg, time=now)


def describe(error: OSError | DiskFailure) -> str:
    """Return the system's words for what went wrong with a file."""
    return getattr(error, "strerror", None) or str(error)


def _print(text: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    try:  # letters that the terminal has not, as in the name of a class, must not end the run
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
