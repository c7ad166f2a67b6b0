"""Notice that another process of a run is gone, and end this one rather than let it wait for ever.

A collective operation that waits for a dead process may return an error at once (gloo, when the connection breaks) or
never (NCCL). So each process tells the store that joined them every two seconds that it lives, and looks whether the
others do. The first one that fails leaves its error there for the others.
"""

import threading
import time
from collections.abc import Callable

from torch.distributed import Store

HEARTBEAT_SECONDS = 2.0
# Silent for this long means dead. With GRACE_SECONDS less than a minute, and long enough for a process that loads a
# large library from a network file system and can do nothing else meanwhile.
SILENT_SECONDS = 40.0
# The main thread may come out of its collective operation by itself, with an error to handle; then the process ends.
GRACE_SECONDS = 10.0

_FAILURE_KEY = "failure"


class ProcessWatch:
    """One process's view of whether the others live.

    store:  a connection of its own: the watch must not wait for the main thread's requests
    end:    ends this process, given what became of another; called from the watching thread
    """

    def __init__(self, store: Store, *, rank: int, count: int, end: Callable[[str], None]):
        self._store = store
        self._rank, self._count = rank, count
        self._end = end
        self._beats = 0
        # other process -> (what it last said, when that was heard first)
        self._heard = {other: (b"", time.monotonic()) for other in range(count) if other != rank}
        self._reason: str | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="process watch", daemon=True)
        self._beat()

    def start(self) -> None:
        """Start watching. Every process must have made its watch by now."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching: from now on the others may end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(GRACE_SECONDS)

    def post_failure(self, error: str) -> str | None:
        """Tell the others why this process fails; return the words of another one that failed before, if one did."""
        mine = f"process {self._rank} of {self._count} failed: {error}"
        try:
            first = self._store.compare_set(_FAILURE_KEY, "", mine).decode()
        except RuntimeError:  # the store went with the process that held it: nobody else has said anything
            return None
        return None if first == mine else first

    def find_reason(self) -> str | None:
        """Return what became of another process, given that something did; None when it cannot be told."""
        deadline = time.monotonic() + 4 * HEARTBEAT_SECONDS
        while time.monotonic() < deadline and self._thread.is_alive():
            if self._reason is not None:
                return self._reason
            silent = self._longest_silent()
            if time.monotonic() - self._heard[silent][1] > 2.5 * HEARTBEAT_SECONDS:
                return self._describe_silent(silent)
            time.sleep(0.05)
        return self._reason

    def _run(self) -> None:
        while self._reason is None:
            if self._stopping.wait(HEARTBEAT_SECONDS):
                return
            try:
                self._beat()
                self._reason = self._look()
            except RuntimeError:
                self._reason = "the connection to the process that joins the others broke"
        if not self._stopping.wait(GRACE_SECONDS):
            self._end(self._reason)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"alive/{self._rank}", str(self._beats))

    def _look(self) -> str | None:
        """Return what is wrong with another process, or None."""
        if self._store.check([_FAILURE_KEY]):
            return self._store.get(_FAILURE_KEY).decode()
        said = self._store.multi_get([f"alive/{other}" for other in self._heard])
        now = time.monotonic()
        for other, words in zip(list(self._heard), said, strict=True):
            if words != self._heard[other][0]:
                self._heard[other] = (words, now)
        silent = self._longest_silent()
        if now - self._heard[silent][1] > SILENT_SECONDS:
            return self._describe_silent(silent)
        return None

    def _longest_silent(self) -> int:
        return min(self._heard, key=lambda other: self._heard[other][1])

    def _describe_silent(self, other: int) -> str:
        return (f"process {other} of {self._count} is gone without a word; it may have been killed, for example for "
                "want of memory")
