"""Features: kept on the disk by what they depend on, and computed by several processes as by one."""

import sys

import numpy as np
import pytest
import torch

from metrics import evaluation
from metrics.features import FeatureCache, Features, choose_batch
from tests.helpers import metric_programs
from tests.helpers.make_sets import make_set
from torch_utils.distributed import Processes
from torch_utils.launch import launch

KEY = {"content": "abc", "count": 3, "detector": "d"}


@pytest.mark.parametrize(("resolution", "expected"), [(8, 32), (128, 32), (256, 16), (512, 4), (1024, 4)])
def test_choose_batch_shrinks_with_resolution(resolution, expected):
    assert choose_batch(resolution) == expected


@pytest.fixture
def lines():
    return []


@pytest.fixture
def cache(tmp_path, lines):
    return FeatureCache(tmp_path / "deep" / "features", lines.append)


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
    make_set(folder / "data.zip", 21, size=32, labels=[index % 2 for index in range(21)])
    programs = "evaluate+give_up+leave_out+exchange"
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


def test_evaluate_is_given_up_by_all_processes_when_one_wishes_so(folder):
    main, other = results(folder, "give_up")
    assert main == {"failures": [("Stopped", 2), ("Stopped", 8)], "after": True}
    # All compute features, and are asked; the main process compares them alone.
    assert other == {"failures": [("Stopped", 2), ("OtherProcessFailed", 7)], "after": False}


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
