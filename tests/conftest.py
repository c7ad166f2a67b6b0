"""What holds for all tests."""

import signal
import urllib.error

import pytest
import torch

# A shell that starts tests in the background lets them ignore Ctrl-C, and programs that tests start inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
