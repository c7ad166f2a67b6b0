"""Features: kept on the disk by what they depend on, and computed by several processes as by one."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics import evaluation
from metrics.feature_tensors import as_features
from metrics.features import FeatureCache, FeatureRequest, Features, choose_batch, compute_features
from metrics.image_sources import SetImages
from tests.helpers import metric_programs
from tests.helpers.full_disk import needs_mount
from tests.helpers.make_sets import make_set
from tests.helpers.metric_networks import MeanDetector
from torch_utils.distributed import Processes
from torch_utils.launch import launch

KEY = {"content": "abc", "count": 3, "detector": "d"}
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(("resolution", "expected"), [(8, 32), (128, 32), (256, 16), (512, 4), (1024, 4)])
def test_choose_batch_shrinks_with_resolution(resolution, expected):
    assert choose_batch(resolution) == expected


@pytest.fixture
def lines():
    return []


@pytest.fixture(params=["in memory", "mapped"])
def cache(tmp_path, lines, request):
    more = {"in_memory": 0} if request.param == "mapped" else {}
    return FeatureCache(tmp_path / "deep" / "features", lines.append, **more)


def features(classes=False):
    rows = np.random.RandomState(0).rand(3, 5).astype(np.float32)
    return Features(values=rows, probabilities=rows[:, :2] if classes else None)


def test_cache_returns_what_was_written(cache, lines):
    assert cache.read(KEY, count=3, classes=False) is None
    cache.write(KEY, features())
    found = cache.read(KEY, count=3, classes=False)
    assert np.array_equal(found.values, features().values)
    assert found.probabilities is None
    assert cache.read({**KEY, "detector": "e"}, count=3, classes=False) is None
    assert cache.path(KEY) == cache.path(dict(reversed(KEY.items())))
    assert lines == []
    assert len(list(cache.path(KEY).parent.iterdir())) == 1


def test_cache_keeps_probabilities(cache):
    cache.write(KEY, features(classes=True))
    assert np.array_equal(cache.read(KEY, count=3, classes=True).probabilities, features(True).probabilities)


def test_cache_maps_large_tables_read_only_and_metrics_take_them_without_a_copy(tmp_path, lines):
    cache = FeatureCache(tmp_path, lines.append, in_memory=59)  # the values have 60 bytes, the probabilities fewer
    cache.write(KEY, features(classes=True))
    found = cache.read(KEY, count=3, classes=True)
    assert [isinstance(table, np.memmap) for table in (found.values, found.probabilities)] == [True, False]
    assert not found.values.flags.writeable
    assert found.values.flags.aligned
    assert as_features(found.values).data_ptr() == found.values.ctypes.data
    cache.write(KEY, Features(values=np.zeros((3, 5), np.float32)))  # another process replaces the file
    assert np.array_equal(found.values, features().values)
    assert lines == []


@pytest.mark.parametrize("length", range(4))
def test_cache_reads_files_in_any_order_of_members(cache, lines, length):
    key = {**KEY, "more": "x" * length}
    cache.write(key, features(classes=True))
    with np.load(cache.path(key)) as file:
        arrays = dict(file)
    np.savez(cache.path(key), **{name: arrays[name] for name in ("key", "values", "probabilities")})  # as before 2027
    found = cache.read(key, count=3, classes=True)
    for table, expected in ((found.values, features().values), (found.probabilities, features(True).probabilities)):
        assert table.flags.aligned
        assert np.array_equal(table, expected)
    assert lines == []
    assert len(list(cache.path(key).parent.iterdir())) == 1


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: data[:len(data) // 2], lambda data: b"",
                                    lambda data: data.replace(features().values.tobytes(), bytes(60))])
def test_cache_damaged_file_is_said_and_missing(cache, lines, damage):
    cache.write(KEY, features())
    path = cache.path(KEY)
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    assert cache.read(KEY, count=3, classes=False) is None
    assert len(lines) == 1
    assert lines[0].startswith(f"{path} is damaged (")
    assert lines[0].endswith("); its features are computed again")
    cache.write(KEY, features())
    assert cache.read(KEY, count=3, classes=False) is not None


def test_cache_file_of_another_key_or_size_is_missing(cache, lines):
    other = {**KEY, "content": "xyz"}
    cache.write(other, features())
    cache.path(other).rename(cache.path(KEY))
    assert cache.read(KEY, count=3, classes=False) is None
    cache.write(KEY, features())
    assert cache.read(KEY, count=4, classes=False) is None
    assert lines == [f"{cache.path(KEY)} has other contents; its features are computed again"] * 2


def test_table_in_a_file_has_the_bits_of_one_in_memory_and_leaves_nothing(tmp_path, lines):
    rows = np.random.RandomState(0).rand(7, 5).astype(np.float32)
    found = []
    for in_memory in (1000, 0):
        table = FeatureCache(tmp_path / "new", lines.append, in_memory).table(7, 5)
        for part in (rows[:2], rows[2:2], rows[2:]):
            table.append(part)
        found.append(table.finish())
        assert np.array_equal(found[-1], rows)
    assert [isinstance(table, np.memmap) for table in found] == [False, True]
    assert (list((tmp_path / "new").iterdir()), lines) == ([], [])


def test_table_whose_file_cannot_be_made_is_kept_in_memory(tmp_path, lines):
    (tmp_path / "file").touch()
    table = FeatureCache(tmp_path / "file" / "features", lines.append, in_memory=0).table(3, 5)
    table.append(features().values)
    assert np.array_equal(table.finish(), features().values)
    assert lines == [f"features cannot be stored in {tmp_path / 'file' / 'features'} (Not a directory); they are kept "
                     "in memory"]


FULL_DISK = """
import numpy as np, sys
from pathlib import Path
from metrics.features import FeatureCache

folder = Path(sys.argv[1])
table = FeatureCache(folder, print, in_memory=0).table(30, 10_000)
rows = np.random.RandomState(0).rand(30, 10_000).astype(np.float32)  # 1.2 MB
for row in rows:
    table.append(row[None])
print(np.array_equal(table.finish(), rows), list(folder.iterdir()))
"""


@needs_mount
def test_table_that_fills_the_disk_goes_on_in_memory(tmp_path):
    mount = 'mount -t tmpfs -o size=700k tmpfs "$1"; exec "$2" -c "$3" "$1"'
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(tmp_path),
                           sys.executable, FULL_DISK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"features cannot be stored in {tmp_path} (No space left on device); they are "
                                        "kept in memory", "True []"]


# A table of 256 MB is computed, written to the cache and read, while the process may take 96 MB more memory.
LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch
from metrics.feature_tensors import as_features
from metrics.features import FeatureCache, FeatureRequest, compute_features

count, key, cache = 131072, {"a": 1}, FeatureCache(Path(sys.argv[1]), print)
source = SimpleNamespace(pixels=lambda rows: (torch.tensor(rows) % 256).byte()[:, None, None, None])
request = FeatureRequest(detector=lambda pixels: pixels[:, 0, 0, :1] + torch.arange(512.0), count=count)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = (int(status["VmData"].split()[0]) << 10) + (96 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
found, = compute_features(source, [request], batch=512, device="cpu", cache=cache)
cache.write(key, found)
for features in (found, cache.read(key, count=count, classes=False)):
    blocks = as_features(features.values).split(512)
    print(len(blocks), all(torch.equal(block, request.compute(source.pixels(range(512 * index, 512 * index + 512)))[0])
                           for index, block in enumerate(blocks)))
try:
    np.empty((count, 512), np.float32)
except MemoryError:
    print("more than the memory")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits private memory alone, and reads /proc")
def test_features_of_many_images_take_little_memory(tmp_path):
    # With a fixed threshold, malloc gives large blocks back, and none is lost between others.
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True,
                          text=True, check=False, env={**os.environ, **settings})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["256 True", "256 True", "more than the memory"]
    assert len(list(tmp_path.iterdir())) == 1  # what the cache keeps


@pytest.mark.parametrize("workers", [1, 2])
def test_features_of_a_set_are_those_of_its_images_however_they_are_decoded_and_stored(tmp_path, one_thread, workers):
    images = SetImages(make_set(tmp_path / "set.zip", 300, size=8, hashes=False)).select(mirror=True, shuffle=True)
    requests = [FeatureRequest(detector=MeanDetector(), count=600, classes=True),
                FeatureRequest(detector=MeanDetector(), count=70)]
    counts = []
    first, second = compute_features(images, requests, batch=32, device="cpu", on_images=counts.append,
                                     cache=FeatureCache(tmp_path / "cache", in_memory=600 * 6), workers=workers)
    expected = [MeanDetector().classify(images.pixels(range(start, min(start + 32, 600))))
                for start in range(0, 600, 32)]
    values, probabilities = (torch.cat(parts).numpy() for parts in zip(*expected, strict=True))
    assert np.array_equal(first.values, values)
    assert np.array_equal(first.probabilities, probabilities)
    assert np.array_equal(second.values, values[:70])
    assert second.probabilities is None
    assert [isinstance(table, np.memmap) for table in (first.values, first.probabilities, second.values)] == [
        True, True, False]
    assert counts == [32] * 18 + [24]
    assert multiprocessing.active_children() == []


INTERRUPTED = """
import multiprocessing, sys
import click, torch
from dnnlib.cli import run
from metrics.features import FeatureRequest, compute_features
from metrics.image_sources import SetImages

def detect(pixels):
    if len(pixels) > 1:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    return torch.ones(len(pixels), 1)

@click.command()
def main():
    images = SetImages(sys.argv[1]).select()
    images.items = images.items.repeat(1000)
    compute_features(images, [FeatureRequest(detector=detect, count=len(images))], batch=32, device="cpu", workers=2)

sys.exit(run(main, []))
"""


def test_features_stopped_while_images_are_decoded_leave_no_process(tmp_path):
    path = make_set(tmp_path / "set.zip", 300, size=8, hashes=False)
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(path)], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, start_new_session=True) as program:
        pids = [program.stdout.readline().split() for _ in range(20)][-1]
        os.killpg(program.pid, signal.SIGTERM)  # as batch systems do
        # communicate ends when the last process has closed the pipes
        _, errors = program.communicate(timeout=20)
    assert (program.returncode, errors.splitlines()) == (143, ["error: terminated"])
    assert len(pids) == 2


def test_cache_without_a_folder_keeps_nothing(lines):
    cache = FeatureCache(None, lines.append)
    cache.write(KEY, features())
    assert cache.read(KEY, count=3, classes=False) is None
    assert lines == []


def test_cache_that_cannot_be_written_is_said(tmp_path, lines):
    (tmp_path / "file").touch()
    cache = FeatureCache(tmp_path / "file" / "features", lines.append)
    cache.write(KEY, features())
    assert lines == [f"features cannot be saved in {tmp_path / 'file' / 'features'} (Not a directory); they will be "
                     f"computed again next time"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    for name, count, first in (("data", 21, 0), ("held", 15, 100), ("fake", 29, 200)):
        make_set(folder / f"{name}.zip", images=range(first, first + count), size=32,
                 labels=[index % 2 for index in range(count)], groups=[f"{name}{index // 4}" for index in range(count)])
    programs = "evaluate+assess+give_up+leave_out+exchange"
    assert launch(2, [sys.executable, "-m", "tests.helpers.metric_programs", programs, str(folder)]) == 0
    return folder


def results(folder, name):
    """Return what each of two processes found."""
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)]


def test_evaluate_two_processes_give_the_bits_of_one(folder, one_thread, monkeypatch):
    for name in ("open_detector", "open_similarity"):  # the program replaces them; this puts them back
        monkeypatch.setattr(evaluation, name, None)
    alone = metric_programs.evaluate(Processes(rank=0, count=1, device=torch.device("cpu")), folder)
    main, other = results(folder, "evaluate")
    assert main == alone
    assert [len(found) for found in main.values()] == [6, 6]
    assert other == {70: {}, 12: {}}


def test_classes_intervals_and_floors_of_two_processes_are_the_bits_of_one(folder, one_thread, monkeypatch):
    monkeypatch.setattr(evaluation, "open_detector", None)  # the program replaces it; this puts it back
    alone = metric_programs.assess(Processes(rank=0, count=1, device=torch.device("cpu")), folder)
    main, other = results(folder, "assess")
    assert main == alone
    assert list(main["set"]["pr12_full"]["per_class"]) == ["0", "1"]
    assert other == {"network": {}, "set": {}}


def test_evaluate_is_given_up_by_all_processes_when_one_wishes_so(folder):
    main, other = results(folder, "give_up")
    assert main == {"failures": [("Stopped", 2), ("Stopped", 8), ("Stopped", 6)], "after": True}
    # All compute features, and are asked; the main process compares them alone.
    assert other == {"failures": [("Stopped", 2), ("OtherProcessFailed", 7), ("Stopped", 6)], "after": False}


def test_metrics_of_a_file_that_one_process_could_not_write_are_left_out_by_all(folder):
    assert [found["missing"] for found in results(folder, "leave_out")] == [[[], [[3, 800]]]] * 2


def test_exchange_gathers_rows_and_shares_failures(folder):
    main, other = results(folder, "exchange")
    assert main["rows"].tolist() == [[100, 101], [102, 103]]
    assert main["none"].shape == (0, 3)
    assert main["none"].dtype == torch.uint8
    assert [found["main"] for found in (main, other)] == ["here", None]
    assert [found["long"] for found in (main, other)] == [[None] * 3, None]
    assert [found["from_main"] for found in (main, other)] == [["rank", 0]] * 2
    assert [part.tolist() for part in main["blocks"]] == [[[0], [1], [2], [3], [4]], [[0, 0], [1, 1], [2, 2]]]
    assert (other["rows"], other["none"], other["blocks"]) == (None, None, None)
    zero = "ZeroDivisionError: integer division or modulo by zero"
    elsewhere = f"OtherProcessFailed: {zero}"
    assert main["failures"] == [elsewhere, zero, zero, elsewhere]
    assert other["failures"] == [zero, elsewhere, elsewhere, zero]
