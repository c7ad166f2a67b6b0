"""dnnlib.cache: files are downloaded once, checked, and never left half done."""

import hashlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest

from dnnlib import cache, cli
from dnnlib.cache import FetchError, cache_folder, downloaded, fetch
from dnnlib.cli import UserError
from dnnlib.process_lock import ProcessLock

ROOT = Path(__file__).parent.parent.parent
CONTENT = bytes(range(256)) * 5000  # more than one chunk
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at /file, half of it at /half, and counts requests."""

    requests = 0
    hold: threading.Event | None = None  # answers wait for it

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # clients that went away


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        if self.server.hold is not None:
            assert self.server.hold.wait(20)
        if self.path not in ("/file", "/half"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path == "/file" else CONTENT[:len(CONTENT) // 2])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def files_of_cache() -> list[str]:
    folder = cache_folder() / "downloads"
    return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.mark.parametrize(("own", "common", "expected"), [
    ("/a/own", "/b", "/a/own"),
    ("~/own", "/b", "/home/someone/own"),
    ("", "/b", "/b/lesion-stylegan2-ada"),
    ("", "", "/home/someone/.cache/lesion-stylegan2-ada"),
])
def test_cache_folder_follows_the_environment(monkeypatch, own, common, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", own)
    monkeypatch.setenv("XDG_CACHE_HOME", common)
    assert cache_folder() == Path(expected)


def test_cache_folder_is_not_made_by_asking(monkeypatch, tmp_path):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    cache_folder()
    downloaded("weights.pth")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("sha256", [DIGEST, DIGEST[:8], None])
def test_fetch_downloads_once(server, sha256, capsys):
    path = fetch(f"{server.address}/file", name="weights.pth", sha256=sha256)
    assert path == downloaded("weights.pth")
    assert path.read_bytes() == CONTENT
    assert fetch(f"{server.address}/file", name="weights.pth", sha256=sha256) == path
    assert server.requests == 1
    assert files_of_cache() == ["weights.pth"]
    assert capsys.readouterr().err.startswith(f"downloading {server.address}/file into {path.parent}\n")


def test_fetch_file_put_there_by_hand_needs_no_network(server):
    downloaded("weights.pth").parent.mkdir(parents=True)
    downloaded("weights.pth").write_bytes(CONTENT)
    assert fetch(f"{server.address}/file", name="weights.pth", sha256=DIGEST).read_bytes() == CONTENT
    assert server.requests == 0


def test_fetch_other_content_than_expected_keeps_nothing(server):
    message = f"(the download has the sha256 {DIGEST}; expected one that starts with 0123abcd)"
    with pytest.raises(FetchError, match=re.escape(message)):
        fetch(f"{server.address}/file", name="weights.pth", sha256="0123abcd")
    assert files_of_cache() == []


def test_fetch_other_file_in_the_cache_says_so_and_keeps_it(server):
    path = downloaded("weights.pth")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    digest = hashlib.sha256(b"mine").hexdigest()
    for sha256, expected in ((DIGEST, DIGEST), (DIGEST[:8], f"one that starts with {DIGEST[:8]}")):
        with pytest.raises(UserError) as caught:
            fetch(f"{server.address}/file", name="weights.pth", sha256=sha256)
        assert str(caught.value) == (f"{path} has the sha256 {digest}; expected {expected}: remove it to "
                                     "download it again")
    assert path.read_bytes() == b"mine"
    assert server.requests == 0


def test_fetch_missing_page_names_address_and_place(server):
    with pytest.raises(FetchError) as caught:
        fetch(f"{server.address}/nothing", name="weights.pth", sha256=None)
    assert str(caught.value) == (
        f"weights.pth is not in the cache, and downloading {server.address}/nothing failed (the server answered 404 "
        f"Not Found): download it on a machine with network access, and copy it to {downloaded('weights.pth')}")
    assert files_of_cache() == []


def test_fetch_half_a_file_keeps_nothing(server):
    half = len(CONTENT) // 2
    with pytest.raises(FetchError, match=rf"\(the connection ended after {half} of {len(CONTENT)} bytes\)"):
        fetch(f"{server.address}/half", name="weights.pth", sha256=None)
    assert files_of_cache() == []


def test_fetch_without_a_server_is_the_users_to_put_right_and_not_a_failing_disk(server, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

    @click.command()
    def command():
        fetch(f"http://127.0.0.1:{port}/file", name="weights.pth", sha256=None)

    assert cli.run(command, []) == 2
    assert f"copy it to {downloaded('weights.pth')}\n" in capsys.readouterr().err


def test_fetch_without_a_server_says_why(server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(FetchError, match="refused"):
        fetch(f"http://127.0.0.1:{port}/file", name="weights.pth", sha256=None)
    assert files_of_cache() == []


def test_fetch_silent_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(cache, "_SILENT_SECONDS", 0.2)
    server.hold = threading.Event()
    try:
        with pytest.raises(FetchError, match="timed out"):
            fetch(f"{server.address}/file", name="weights.pth", sha256=None)
    finally:
        server.hold.set()
    assert files_of_cache() == []


def test_fetch_by_two_processes_downloads_once(server):
    server.hold = threading.Event()
    code = f"from dnnlib.cache import fetch; print(fetch('{server.address}/file', name='w', sha256='{DIGEST}'))"
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True) for _ in range(2)]
    # The process that waits prints so: then both are running, and neither has the file.
    says = []
    readers = [threading.Thread(target=lambda run=run: says.extend(iter(run.stderr.readline, ""))) for run in runs]
    for reader in readers:
        reader.start()
    while not any(line.startswith("waiting for w, which process ") for line in says):
        assert all(reader.is_alive() for reader in readers), says
    server.hold.set()
    outputs = [run.stdout.read() for run in runs]
    for reader, run in zip(readers, runs):
        reader.join()
        run.communicate()
    assert outputs == [f"{downloaded('w')}\n"] * 2
    assert downloaded("w").read_bytes() == CONTENT
    assert server.requests == 1
    assert files_of_cache() == ["w"]


def test_fetch_goes_on_after_a_process_that_was_killed(server):
    path = downloaded("w")
    path.parent.mkdir(parents=True)
    code = f"""
import os
from dnnlib.process_lock import ProcessLock
lock = ProcessLock({str(path.with_name(".w.lock"))!r})
lock.acquire()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert files_of_cache() == [".w.lock"]
    assert fetch(f"{server.address}/file", name="w", sha256=DIGEST).read_bytes() == CONTENT
    assert files_of_cache() == ["w"]


def test_fetch_failure_gives_the_lock_back(server):
    with pytest.raises(FetchError):
        fetch(f"{server.address}/nothing", name="w", sha256=None)
    with ProcessLock(downloaded(".w.lock")):
        pass
    assert fetch(f"{server.address}/file", name="w", sha256=None).read_bytes() == CONTENT
