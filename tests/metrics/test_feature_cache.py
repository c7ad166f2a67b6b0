"""Features on the disk: found again by what they depend on, computed again where the file is damaged."""

import numpy as np
import pytest

from metrics.features import FeatureCache, Features

KEY = {"content": "abc", "count": 3, "detector": "d"}


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
    assert lines == [f"{cache.path(KEY)} holds something else; its features are computed again"] * 2


def test_cache_without_a_folder_keeps_nothing(lines):
    cache = FeatureCache(None, lines.append)
    cache.write(KEY, features())
    assert cache.read(KEY, count=3, classes=False) is None
    assert lines == []


def test_cache_that_cannot_be_written_is_said(tmp_path, lines):
    (tmp_path / "file").touch()
    cache = FeatureCache(tmp_path / "file" / "features", lines.append)
    cache.write(KEY, features())
    assert lines == [f"features cannot be kept in {tmp_path / 'file' / 'features'} (Not a directory); they will be "
                     "computed again the next time"]
