"""What a tick, the span between two lines of statistics, measures and how its progress line reads."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dnnlib.progress import format_seconds

SKIPPED_PREFIX = "Trouble/skipped/"  # begins a statistic for each phase: 1 for a step that was left out, else 0
_GB = 2**30


@dataclass(frozen=True, kw_only=True)
class TickTimes:
    """Seconds, and what they mean for the rest."""

    total: float  # of the whole run
    tick: float  # spent on training in this tick
    maintenance: float  # between the tick before and this one: start, pictures, snapshots, metrics
    images: int  # of this tick, as far as this process trained them
    left: float | None  # expected until the end of training; None before anything is known


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
            "Timing/sec_per_kimg": _pace(times), "Timing/maintenance_sec": times.maintenance,
            "Resources/cpu_mem_gb": self.cpu_memory / _GB, "Resources/peak_gpu_mem_gb": self.gpu_memory / _GB,
        }  # fmt: skip

    def line(self, stats: Mapping[str, Mapping[str, float]]) -> str:
        """Return the progress line; `stats` gives the losses and the skipped steps."""
        times = self.times
        fields = [
            (f"tick {self.number}", 10), (f"kimg {self.nimg / 1000:.1f}", 13),
            (f"time {format_seconds(times.total)}", 14),
            (f"left {'-' if times.left is None else format_seconds(times.left)}", 14),
            (f"sec/tick {times.tick:.1f}", 16), (f"sec/kimg {_pace(times):.2f}", 17),
            (f"maintenance {times.maintenance:.1f}", 18),
        ]
        if self.cpu_memory:
            fields.append((f"cpumem {self.cpu_memory / _GB:.2f}", 13))
        if self.gpu_memory:
            fields.append((f"gpumem {self.gpu_memory / _GB:.2f}", 13))
        fields += [(f"augment {self.augment_p:.3f}", 14), (f"G {_mean(stats, 'Loss/G/loss')}", 8),
                   (f"D {_mean(stats, 'Loss/D/loss')}", 8)]
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


def _pace(times: TickTimes) -> float:
    """Return seconds per thousand images."""
    return times.tick / times.images * 1000 if times.images else float("nan")


def _mean(stats: Mapping[str, Mapping[str, float]], name: str) -> str:
    return f"{stats[name]['mean']:.3f}" if name in stats else "-"
