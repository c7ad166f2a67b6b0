"""dnnlib.workers: order, bounded memory, and every way to end."""
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from dnnlib.cli import UserError
from dnnlib.workers import ordered_map, usable_cores

ROOT = Path(__file__).parent.parent.parent
KILLED = "a worker process was killed by SIGKILL, often because memory ran out; try a smaller --workers, or --workers=1"


def square(number):
    return number * number


def slow_first(number):
    if number % 7 == 0:
        time.sleep(0.02)
    return number


def twice(data):
    return data + data


def fail_at_50(number):
    if number == 50:
        raise KeyError("item 50")
    return number


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def raise_unpicklable(number):
    raise Unpicklable(number, "more")


def kill_at_5(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_while_sending_5(number):
    if number == 5:
        send = Connection._send

        def send_half(connection, data):
            if len(data) < 10_000:
                return send(connection, data)
            os.write(connection.fileno(), data[:5_000])
            os.kill(os.getpid(), signal.SIGKILL)

        Connection._send = send_half  # in the worker alone
        return bytes(1_000_000)
    return number


def process_id(number):
    time.sleep(0.005)
    return os.getpid()


def is_alive(pid):
    """Return whether a process runs; a zombie counts as ended."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


def all_end(pids):
    """Return whether all processes end within five seconds."""
    deadline = time.monotonic() + 5
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 41])
def test_ordered_map_any_workers_gives_the_same(workers, chunk, count):
    found = list(ordered_map(square, range(count), workers, chunk=chunk))
    assert found == [number * number for number in range(count)]
    assert not multiprocessing.active_children()


def test_ordered_map_uneven_durations_keep_the_order():
    assert list(ordered_map(slow_first, range(40), 3)) == list(range(40))


def test_ordered_map_works_in_as_many_other_processes():
    pids = set(ordered_map(process_id, range(30), 3))
    assert len(pids) == 3
    assert os.getpid() not in pids
    assert set(ordered_map(process_id, range(3), 1)) == {os.getpid()}


@pytest.mark.parametrize(("workers", "chunk"), [(2, 1), (3, 5)])
def test_ordered_map_slow_reader_bounds_what_is_taken(workers, chunk):
    taken = 0

    def items():
        nonlocal taken
        for number in range(300):
            taken += 1
            yield number

    for position, _ in enumerate(ordered_map(square, items(), workers, chunk=chunk)):
        if position % 20 == 0:
            time.sleep(0.01)
        assert taken - position <= 4 * workers * chunk + chunk
    assert taken == 300


def test_ordered_map_large_items_and_results_do_not_block():
    # More than a pipe holds, in both directions at once.
    sizes = [len(data) for data in ordered_map(twice, (bytes(400_000) for _ in range(40)), 2)]
    assert sizes == [800_000] * 40


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("chunk", [1, 8])
def test_ordered_map_exception_comes_in_its_turn(workers, chunk):
    results = ordered_map(fail_at_50, range(100), workers, chunk=chunk)
    found = [next(results) for _ in range(50)]
    with pytest.raises(KeyError, match="item 50"):
        next(results)
    assert found == list(range(50))
    assert not multiprocessing.active_children()


def test_ordered_map_exception_carries_the_workers_traceback():
    with pytest.raises(KeyError) as caught:
        list(ordered_map(fail_at_50, range(100), 2))
    assert "in fail_at_50" in caught.value.__notes__[0]


def test_ordered_map_exception_that_cannot_travel_keeps_its_text():
    with pytest.raises(RuntimeError, match="Unpicklable: 0 and more"):
        list(ordered_map(raise_unpicklable, range(3), 2))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("chunk", [1, 4])
def test_ordered_map_exception_of_the_items_comes_after_their_results(workers, chunk):
    def items():
        yield from range(10)
        raise OSError("no more")

    results = ordered_map(square, items(), workers, chunk=chunk)
    assert [next(results) for _ in range(10)] == [number * number for number in range(10)]
    with pytest.raises(OSError, match="no more"):
        next(results)


def test_ordered_map_killed_worker_is_reported():
    with pytest.raises(UserError) as caught:
        list(ordered_map(kill_at_5, range(50), 2))
    assert str(caught.value) == KILLED
    assert not multiprocessing.active_children()


def test_ordered_map_worker_killed_while_it_sends_a_result_is_reported():
    with pytest.raises(UserError) as caught:
        list(ordered_map(die_while_sending_5, range(50), 3))
    assert str(caught.value) == KILLED
    assert not multiprocessing.active_children()


def test_ordered_map_closed_early_leaves_no_process():
    with closing(ordered_map(process_id, range(10_000), 3)) as results:
        pids = {next(results) for _ in range(20)}
        assert all(is_alive(pid) for pid in pids)
    assert not any(is_alive(pid) for pid in pids)
    assert next(results, None) is None


def test_ordered_map_closed_while_large_results_are_on_their_way_ends_at_once():
    with closing(ordered_map(twice, (bytes(2_000_000) for _ in range(1000)), 3)) as results:
        for _ in range(5):
            next(results)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert not multiprocessing.active_children()


def test_ordered_map_never_started_starts_no_process():
    results = ordered_map(process_id, range(10), 3)
    assert not multiprocessing.active_children()
    results.close()


@pytest.mark.parametrize(("workers", "chunk"), [(0, 1), (1, 0), (-2, 1)])
def test_ordered_map_impossible_numbers_raise_at_once(workers, chunk):
    with pytest.raises(ValueError, match="expected at least 1"):
        ordered_map(square, [], workers, chunk=chunk)


def test_ordered_map_function_that_cannot_be_pickled_still_works_here():
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(lambda number: number)
    assert list(ordered_map(lambda number: -number, range(3), 1)) == [0, -1, -2]


def test_usable_cores_is_what_the_system_allows():
    assert usable_cores() == len(os.sched_getaffinity(0))


PROGRAM = """
import os, sys, time, click
from dnnlib.cli import run
from dnnlib.workers import ordered_map

def work(number):
    time.sleep(0.01)
    return os.getpid()

@click.command()
def main():
    for pid in ordered_map(work, range(100000), 3):
        print(pid, flush=True)

if __name__ == "__main__":
    sys.exit(run(main))
"""


@pytest.mark.parametrize(("number", "to_all", "code", "lines"), [
    (signal.SIGINT, True, 130, ["error: interrupted"]),  # as a terminal does on Ctrl-C
    (signal.SIGINT, False, 130, ["error: interrupted"]), (signal.SIGTERM, False, 143, ["error: terminated"]),
    (signal.SIGKILL, False, -9, [])])
def test_ordered_map_stopped_program_ends_quietly_and_whole(tmp_path, number, to_all, code, lines):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True) as program:
        pids = {int(program.stdout.readline()) for _ in range(30)}
        if to_all:
            os.killpg(program.pid, number)
        else:
            program.send_signal(number)
        # communicate ends when the last process has closed the pipes
        _, errors = program.communicate(timeout=20)
    assert (program.returncode, errors.splitlines()) == (code, lines)
    assert len(pids) == 3
    assert all_end(pids)


class Garbage:
    """An object in a reference cycle that writes the process id that frees it to a file."""

    def __init__(self, path):
        self.path, self.itself = path, self

    def __del__(self):
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")


def collect_garbage(number):
    circle = []
    circle.append(circle)
    del circle
    return gc.collect() > 0  # the worker's own garbage is collected


def test_ordered_map_workers_leave_garbage_of_the_parent_alone(tmp_path):
    gc.collect()
    gc.disable()
    try:
        Garbage(tmp_path / "freed")
        assert all(ordered_map(collect_garbage, range(8), 2))
        assert not (tmp_path / "freed").exists()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "freed").read_text() == f"{os.getpid()}\n"


def test_ordered_map_leaves_collection_as_it_was():
    assert gc.isenabled()
    list(ordered_map(square, range(8), 2))
    assert gc.isenabled()
