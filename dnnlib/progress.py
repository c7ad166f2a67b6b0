"""Show the progress of long work: items done, speed, and time left."""

import sys
import time
from typing import IO


class Progress:
    """Print counts of finished items; a context manager that ends its line.

    On a terminal one line is rewritten a few times per second; elsewhere a line is printed every `log_seconds`.
    """

    def __init__(self, total: int | None, unit: str, *, stream: IO[str] | None = None, log_seconds: float = 15):
        self.total = total
        self.unit = unit
        self.stream = sys.stderr if stream is None else stream
        self.interval = 0.2 if self.stream.isatty() else log_seconds
        self.done = 0
        self.started = self.shown = time.monotonic()
        self.wrote = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.wrote:
            self._show(time.monotonic())
            if self.stream.isatty():
                self.stream.write("\n")

    def advance(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.shown >= self.interval:
            self._show(now)

    def describe(self, now: float) -> str:
        """Return the progress, such as "1200/10013 images, 240/s, 0:37 left"."""
        rate = self.done / max(now - self.started, 1e-9)
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        text = f"{count} {self.unit}, {rate:.3g}/s" if rate < 100 else f"{count} {self.unit}, {rate:.0f}/s"
        if self.total is None or not self.done:
            return text
        return f"{text}, {format_seconds((self.total - self.done) / rate)} left"

    def _show(self, now: float) -> None:
        self.shown = now
        self.wrote = True
        text = self.describe(now)
        self.stream.write(f"\r{text}\x1b[K" if self.stream.isatty() else f"{text}\n")
        self.stream.flush()


def format_seconds(seconds: float) -> str:
    """Return a duration as "0:07", "12:30" or "3:05:00"."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
