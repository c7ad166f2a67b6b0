"""What holds for all tests."""

import os
import signal
import urllib.error

import pytest
import torch

from torch_utils.ops.build import builds_folder
from torch_utils.ops.compiled import make_ready

# A shell that starts tests in the background lets them ignore Ctrl-C, and programs that tests start inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiled operators are built once, also for programs that tests start with a cache folder of their own.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(builds_folder()))


@pytest.fixture(scope="session", autouse=True)
def operators():
    """Build the operators before any test looks at what a program prints."""
    make_ready("cpu")


def pytest_make_parametrize_id(val):
    """Name bytes by their length: files hold the time when they were made, and all test processes need equal names."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="module")
def one_thread():
    """Compute with one thread: as programs do that tests start several of, and for small tensors the fastest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """The folder of downloads, empty, without a network."""
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads"
