"""Apply a function to many items in several processes: results in order, memory bounded, no process left behind."""

import gc
import multiprocessing
import os
import pickle
import queue
import signal
import threading
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

_DEPTH = 2  # chunks a worker holds: it works on one while the next is on its way
_WINDOW = 4  # chunks a worker on average may be ahead of the oldest unfinished one; bounds what waits for its turn
_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_CAN_BLOCK = hasattr(signal, "pthread_sigmask")


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int, *,
                chunk: int = 1) -> Iterator[Result]:
    """Yield function(item) for each item, in the order of the items.

    function: picklable, as its items and results must be
    items:    taken one after the other in this process, at most 4 * workers * chunk ahead of the results
    workers:  processes; 1 works in this process
    chunk:    items that travel together; more pays where the function takes less than a millisecond

    An exception of the function, or of the iteration over items, is raised in its turn, after the results before it.
    The processes end with the iterator: at its end, at an exception (also Ctrl-C) in it, or when it is closed. Who may
    be interrupted between two results wraps it into contextlib.closing. Raises UserError when a process was killed.
    """
    if workers < 1 or chunk < 1:
        raise ValueError(f"workers is {workers} and chunk {chunk}; expected at least 1")
    if workers == 1:
        return (function(item) for item in items)
    return _parallel(function, iter(items), workers, chunk)


def _parallel(function: Callable, items: Iterator, workers: int, chunk: int) -> Iterator:
    finished: dict[int, tuple[list, Exception | None]] = {}
    sent = turn = 0
    exhausted = False
    with _Pool(function, workers) as pool:
        while True:
            while not exhausted and pool.has_room() and sent - turn < _WINDOW * workers:
                batch, error = _take(items, chunk)
                exhausted = len(batch) < chunk
                if error is not None:
                    finished[sent + bool(batch)] = ([], error)
                if batch:
                    pool.send(sent, batch)
                    sent += 1
            if turn == sent and turn not in finished:
                return
            finished.update(pool.receive(block=turn not in finished))
            if turn in finished:
                results, error = finished.pop(turn)
                turn += 1
                yield from results
                if error is not None:
                    raise error


def _take(items: Iterator, count: int) -> tuple[list, Exception | None]:
    """Return the next items, fewer at the end, and the exception that ended them."""
    batch: list = []
    try:
        batch.extend(islice(items, count))
    except Exception as error:  # raised by _parallel when the results before it are out
        return batch, error
    return batch, None


class _Worker:
    """A process, our end of the pipe to it, and the number of chunks it holds."""

    def __init__(self, function: Callable):
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_serve, args=(function, theirs, self.connection), daemon=True)
        with _undisturbed():
            self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.held = 0


class _Pool:
    """Up to `workers` processes, each started when the others have work already; all killed at the end."""

    def __init__(self, function: Callable, workers: int):
        self.function = function
        self.size = workers
        self.workers: list[_Worker] = []

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_) -> None:
        # Nothing that a worker holds is worth keeping, and a killed one writes nothing to the terminal.
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.process.close()
            worker.connection.close()

    def has_room(self) -> bool:
        return len(self.workers) < self.size or any(worker.held < _DEPTH for worker in self.workers)

    def send(self, index: int, batch: list) -> None:
        worker = min(self.workers, key=lambda worker: worker.held, default=None)
        if worker is None or (worker.held and len(self.workers) < self.size):
            worker = _Worker(self.function)
            self.workers.append(worker)
        try:
            worker.connection.send((index, batch))
        except BrokenPipeError:
            raise _describe_death(worker) from None
        worker.held += 1

    def receive(self, *, block: bool) -> dict[int, tuple[list, Exception | None]]:
        """Return the chunks that are done, {index: (results, exception after them)}; wait for one if `block`."""
        by_connection = {worker.connection: worker for worker in self.workers}
        done = {}
        for connection in wait(list(by_connection), timeout=None if block else 0):
            worker = by_connection[connection]
            try:
                index, results, error = connection.recv()
            except (EOFError, ConnectionResetError):
                raise _describe_death(worker) from None
            worker.held -= 1
            done[index] = (results, error)
        return done


def _describe_death(worker: _Worker) -> UserError:
    worker.process.join()
    code = worker.process.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return UserError(f"a worker process {how}, often for lack of memory; try fewer --workers, or --workers=1")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM, and collect no garbage; a process started meanwhile inherits both, until it has its
    own handlers and has set our garbage aside."""
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
    # What the parent left behind is not for us to free: a video encoder's end would wait for threads that are not here.
    gc.freeze()
    gc.enable()
    parents_end.close()  # else our own copy of it would keep the pipe open
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A thread reads, so that the parent is never blocked in sending while we are in sending, too.
    threading.Thread(target=_read_into, args=(connection, inbox), daemon=True).start()
    while (message := inbox.get()) is not None:
        index, batch = message
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
    except Exception as error:  # travels to the parent and is raised there
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
