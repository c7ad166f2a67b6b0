"""Stop a run between two iterations: on a signal, or when its time is over."""

import signal
import time
from types import FrameType

# Windows lacks SIGUSR1, and sends the others for Ctrl-C alone.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """A context manager that turns signals into a wish to stop; a second Ctrl-C stops at once.

    max_hours:  time from now after which the wish arises too; None for none
    """

    def __init__(self, max_hours: float | None = None):
        self.reason: str | None = None
        self._deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
        self._max_hours = max_hours
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wanted(self) -> bool:
        """Tell whether to stop now; `reason` says why."""
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = f"--max-hours={self._max_hours:g} are over"
        return self.reason is not None

    def seconds_left(self) -> float | None:
        """Return the seconds until the time is over, None where there is no limit."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = f"{signal.Signals(number).name} arrived"
