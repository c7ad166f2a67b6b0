"""Apply a function to many items in several processes: results in order, memory bounded, no process left behind.

Not concurrent.futures.ProcessPoolExecutor: its workers share one pipe for results, whose writing end the parent keeps
open as well. A worker that is killed while it sends a large result, by the system or because the caller stops early,
leaves the parent waiting for the rest forever. It also needs twice the time per item, and threads in the parent.
"""

import ctypes
import gc
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from dnnlib.cli import UserError
from dnnlib.files import DiskFailure, describe_failure, find_failure

Item = TypeVar("Item")
Result = TypeVar("Result")

_DEPTH = 2  # chunks a worker holds: one that it works on, and the next
_WINDOW = 4  # chunks per worker between the oldest unfinished one and the newest; bounds what waits for its turn
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_CAN_BLOCK = hasattr(signal, "pthread_sigmask")


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent(pid: int) -> None:
    """Let the system kill this process when its parent, of this process id, ends. Does nothing except on Linux."""
    if not sys.platform.startswith("linux") or not hasattr(signal, "SIGKILL"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != pid:  # it ended before
        os._exit(1)


def watch_parent(ended: Callable[[], None]) -> None:
    """Call a function, in a thread, once the parent process of this process has ended.

    Unlike `end_with_parent`, it does not take the end of the parent's thread that started this process for that.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        ended()

    threading.Thread(target=watch, name="parent", daemon=True).start()


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int, *,
                chunk: int = 1) -> Iterator[Result]:
    """Yield function(item) for each item, in the order of the items.

    function: picklable, and so are its items and results
    items:    read in this process, at most 4 * workers * chunk ahead of the results
    workers:  number of processes; 1 works in this process
    chunk:    items sent together; use more than 1 where the function takes less than a millisecond

    An exception of the function, or of the iteration over items, is raised after the results before it.
    The processes end with the iterator: at its end, on an exception (also Ctrl-C) in it, or when it is closed. A caller
    that may be interrupted between two results wraps it in contextlib.closing. Raises UserError when a process was
    killed.
    """
    if workers < 1 or chunk < 1:
        raise ValueError(f"workers is {workers} and chunk {chunk}; expected at least 1")
    if workers == 1:
        return (function(item) for item in items)
    return _parallel(function, iter(items), workers, chunk)


def _parallel(function: Callable, items: Iterator, workers: int, chunk: int) -> Iterator:
    finished: dict[int, tuple[list, Exception | None]] = {}  # chunk -> its results, and the exception after them
    sent = turn = 0
    exhausted = False
    pool: list[_Worker] = []
    try:
        while True:
            while not exhausted and sent - turn < _WINDOW * workers and (
                    len(pool) < workers or min(worker.held for worker in pool) < _DEPTH):
                batch: list = []
                try:
                    batch.extend(islice(items, chunk))
                except Exception as error:  # raised below, after the results before it
                    finished[sent + bool(batch)] = ([], error)
                exhausted = len(batch) < chunk
                if batch:
                    _choose_worker(pool, workers, function).send(sent, batch)
                    sent += 1
            if turn == sent and turn not in finished:
                return
            by_connection = {worker.connection: worker for worker in pool}
            for connection in wait(list(by_connection), timeout=0 if turn in finished else None):
                index, *outcome = by_connection[connection].receive()
                finished[index] = outcome
            if turn in finished:
                results, error = finished.pop(turn)
                turn += 1
                yield from results
                if error is not None:
                    raise error
    finally:
        # Nothing that a worker holds is worth keeping, and a killed one prints nothing to the terminal.
        for worker in pool:
            worker.process.kill()
        for worker in pool:
            worker.process.join()
            worker.process.close()
            worker.connection.close()


class _Worker:
    """A process, our end of the pipe to it, and the number of chunks it holds."""

    def __init__(self, function: Callable):
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_serve, args=(function, theirs, self.connection), daemon=True)
        with _undisturbed():
            self.process.start()
        theirs.close()  # so that the pipe ends when the process ends
        self.held = 0

    def send(self, index: int, batch: list) -> None:
        try:
            self.connection.send((index, batch))
        except BrokenPipeError:
            raise self._describe_death() from None
        self.held += 1

    def receive(self) -> tuple[int, list, Exception | None]:
        try:
            message = self.connection.recv_bytes()
        except (EOFError, OSError):  # an OSError where part of a message came before the end
            raise self._describe_death() from None
        self.held -= 1
        return pickle.loads(message)

    def _describe_death(self) -> UserError:
        self.process.join()
        code = self.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return UserError(f"a worker process {how}, often because memory ran out; try a smaller --workers, or "
                         "--workers=1")


def _choose_worker(pool: list[_Worker], size: int, function: Callable) -> _Worker:
    """Return the worker that holds the least; start another one, up to `size`, where all have work."""
    worker = min(pool, key=lambda worker: worker.held, default=None)
    if worker is None or (worker.held and len(pool) < size):
        worker = _Worker(function)
        pool.append(worker)
    return worker


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM, and disable the garbage collector; a process started meanwhile inherits both."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS) if _CAN_BLOCK else None
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        if _CAN_BLOCK:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(function: Callable, connection: Connection, parents_end: Connection) -> None:
    """Work in the new process until the pipe ends, as it also does when the parent is killed."""
    # Never free the parent's garbage: a video encoder's finalizer would wait for threads that do not exist here.
    gc.freeze()
    gc.enable()
    parents_end.close()  # our copy of it would keep the pipe open
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A thread reads, so that the parent and this process never wait for each other, both sending.
    threading.Thread(target=_read_into, args=(connection, inbox), daemon=True).start()
    for index, batch in iter(inbox.get, None):
        try:
            connection.send((index, *_apply(function, batch)))
        except BrokenPipeError:
            return


def _read_into(connection: Connection, inbox: queue.SimpleQueue) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        inbox.put(None)


def _apply(function: Callable, batch: list) -> tuple[list, Exception | None]:
    results = []
    try:
        for item in batch:
            results.append(function(item))
    except Exception as error:  # sent to the parent, which raises it
        return results, _portable(error)
    return results, None


def _portable(error: Exception) -> Exception:
    """Return the exception with the worker's traceback as a note, or a RuntimeError where it cannot be pickled."""
    text = "".join(traceback.format_exception(error)).rstrip()
    failure = find_failure(error)
    if failure is not None:  # pickling would lose what the error was raised from
        error = DiskFailure(describe_failure(failure))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign exception's own pickling raises
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker process:\n{text}")
    return error
