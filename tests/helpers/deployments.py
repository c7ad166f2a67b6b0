"""A federation of real processes on loopback: its kits, server, sites and admin, as `federate.py` starts them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SITES = ("a", "b", "c")
_JOB = re.compile(r"runner_process|nvflare_process import main; main\(sys.argv\[1:\]\) \d+ job ")  # of server or site
# Flags of a run that takes a second or two per round and site.
TINY = ("--cfg=tiny", "--batch=8", "--round-kimg=0.016", "--cond=1", "--mirror=1", "--metrics=none")


def with_tiny(flags: Sequence[str]) -> list[str]:
    """Return flags after those of TINY that they do not replace."""
    given = {flag.partition("=")[0] for flag in flags}
    return [*(flag for flag in TINY if flag.partition("=")[0] not in given), *flags]


def free_port() -> int:
    """Return a TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def federate(*arguments: str | Path, cwd: Path, check: bool = True,
             environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run a command of federate.py in one thread, and wait for its end."""
    done = subprocess.run([sys.executable, str(ROOT / "federate.py"), *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, env=_environment(environment))
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def make_sites(folder: Path, sites: Sequence[str] = SITES, *, count: int = 90, resolution: int = 32) -> None:
    """Make a data set of phantoms for each site, a.zip and so on, that share no patient."""
    tool = [sys.executable, str(ROOT / "dataset_tool.py")]
    for command in (["phantom", "--dest=all.zip", f"--count={count}", f"--resolution={resolution}x{resolution}",
                     "--seed=1"], ["split", "all.zip", f"--institutions={len(sites)}"]):
        subprocess.run([*tool, *command], cwd=folder, check=True, capture_output=True, env=_environment())
    for index, name in enumerate(sites, start=1):
        (folder / f"all-institution{index}.zip").rename(folder / f"{name}.zip")


def networks_of(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the newest network snapshot of a run."""
    return load_file(sorted((run / "server").glob("network-snapshot-*.safetensors"))[-1])


def same_networks(one: Path, other: Path) -> bool:
    """Return whether the newest networks of two runs are equal, bit for bit."""
    mine, theirs = networks_of(one), networks_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


class Program:
    """A server or a site, running in a process group of its own.

    within:  a command that becomes the program after it has changed its surroundings, as `unshare` does
    """

    def __init__(self, arguments: Sequence[str], cwd: Path, log: Path, environment: dict[str, str] | None,
                 within: Sequence[str] = ()):
        self.log = log
        with open(log, "ab") as file:
            self.process = subprocess.Popen([*within, sys.executable, str(ROOT / "federate.py"), *arguments], cwd=cwd,
                                            stdout=file, stderr=file, env=_environment(environment))

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float = 180, *, times: int = 1) -> str:
        """Wait until a line of the log matches a regular expression `times` times; return the last of them."""
        return wait_until(lambda: (found := re.findall(pattern, self.text()))[times - 1:] and found[-1],
                          f"{pattern} in {self.log}", seconds, self.text)

    def stop(self) -> int:
        """Ask the program to stop, wait, and return its exit code."""
        self.process.terminate()
        return self.process.wait(timeout=90)

    def kill(self) -> None:
        """Kill the program and all processes below it, with -9 and at once, as a machine that loses power does."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
            for each in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)

    def job(self):
        """Return the process of the job that runs now, a psutil.Process."""
        import psutil

        def find():
            found = []
            for each in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it ends just now
                    if _JOB.search(" ".join(each.cmdline())):
                        found.append(each)
            return found

        return wait_until(find, f"a job of {self.log}", 60)[0]


class Network:
    """The network between a site and the server: a TCP proxy that can be cut."""

    def __init__(self, port: int):
        self._target = port
        self._works = threading.Event()
        self._works.set()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Let nothing pass in either direction; both sides keep their connections, and wait."""
        self._works.clear()

    def mend(self) -> None:
        """Let new connections pass; the old ones are reset, as by a router that has forgotten them."""
        old, self._sockets = self._sockets, []
        for each in old:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._works.set()

    def close(self) -> None:
        """End the proxy and all connections."""
        self._listener.close()
        self.mend()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        self._works.wait()
        try:
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:  # the server is not there
            near.close()
            return
        self._sockets += [near, far]
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._works.wait()
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class Federation:
    """Kits, data and programs of a federation below one folder.

    networks:  sites that connect through a Network of their own
    """

    def __init__(self, folder: Path, sites: Sequence[str] = SITES, *, host: str = "localhost",
                 site_timeout: float = 60, networks: Sequence[str] = ()):
        self.folder, self.sites, self.site_timeout, self.port = folder, tuple(sites), site_timeout, free_port()
        self.runs = folder / "runs"  # of the server, as this process sees it
        self.programs: dict[str, Program] = {}
        self.networks = {name: Network(self.port) for name in networks}
        federate("provision", f"--sites={','.join(sites)}", f"--server={host}", f"--port={self.port}",
                 "--outdir=kits", cwd=folder)
        for name, network in self.networks.items():
            file = folder / "kits" / name / "startup" / "federation.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "port": network.port}))

    def run_of(self, name: str) -> Path:
        """Return the newest folder of a run."""
        return sorted(self.runs.glob(f"*-{name}"))[-1]

    def log_of(self, name: str) -> str:
        """Return the server's log of a run, "" before it begins."""
        return "".join(path.read_text() for path in sorted(self.runs.glob(f"*-{name}"))[-1:]
                       for path in path.glob("server/log.txt"))

    def state_folder(self, site: str, run: str) -> Path:
        """Return the folder of a site's own state and log of a run."""
        return self.folder / "kits" / site / "runs" / self.run_of(run).name / f"site-{site}"

    def start_server(self, *flags: str, environment: dict[str, str] | None = None,
                     within: Sequence[str] = ()) -> Program:
        """Start the server and wait until it listens. within: as of Program"""
        return self._start("server", ["server", "--kit=kits/server", "--outdir=runs",
                                      f"--site-timeout={self.site_timeout}", *flags], "listens on port", environment,
                           within)

    def start_site(self, name: str, *flags: str, environment: dict[str, str] | None = None,
                   until: str = "connected to the server", within: Sequence[str] = ()) -> Program:
        """Start a site and wait until it is connected, or until another line. within: as of Program"""
        return self._start(name, ["site", f"--kit=kits/{name}", f"--data={name}.zip", "--workers=0", *flags], until,
                           environment, within)

    def start_all(self) -> None:
        """Start the server and all sites."""
        self.start_server()
        for name in self.sites:
            self.start_site(name, until="")
        for name in self.sites:
            self.programs[name].wait_for("connected to the server")

    def start_run(self, name: str, *flags: str, check: bool = True) -> subprocess.CompletedProcess:
        """Start a run as its admin; returns when it trains."""
        return federate("start", "--kit=kits/admin", f"--name={name}", *with_tiny(flags), cwd=self.folder, check=check)

    def state_of(self, name: str) -> dict:
        """Return how a run stands by the file in the server's kit; {} before it began."""
        path = self.folder / "kits" / "server" / "states" / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def wait_for_state(self, name: str, state: str, seconds: float = 180) -> dict:
        """Wait until a run is in a state such as "finished"."""
        return wait_until(lambda: (found := self.state_of(name)).get("state") == state and found,
                          f"run {name} in state {state}", seconds, lambda: json.dumps(self.state_of(name)))

    def wait_for_line(self, name: str, pattern: str, seconds: float = 180) -> str:
        """Wait for a line in the server's log of a run."""
        return wait_until(lambda: (found := re.findall(pattern, self.log_of(name))) and found[-1],
                          f"{pattern} in the log of {name}", seconds, lambda: self.log_of(name))

    def stop(self) -> None:
        """Stop whatever runs, sites first."""
        for name in sorted(self.programs, key=lambda name: name == "server"):
            program = self.programs.pop(name)
            if program.process.poll() is None:
                program.stop()

    def _start(self, name: str, arguments: Sequence[str], until: str, environment: dict[str, str] | None,
               within: Sequence[str] = ()) -> Program:
        log = self.folder / f"{name}.log"
        log.unlink(missing_ok=True)
        program = self.programs[name] = Program(arguments, self.folder, log, environment, within)
        if until:
            program.wait_for(until)
        return program


@contextlib.contextmanager
def running(folder: Path, **settings) -> Iterator[Federation]:
    """Provide a federation with data, whose programs are ended in any case."""
    make_sites(folder)
    federation = Federation(folder, **settings)
    try:
        yield federation
        federation.stop()
    finally:
        for program in federation.programs.values():
            program.kill()
        for network in federation.networks.values():
            network.close()


def wait_until(check: Callable[[], object], what: str, seconds: float, context: Callable[[], str] = str):
    """Wait until `check` returns something true, and return that; AssertionError with `context` when time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not seen within {seconds} s: {what}\n{context()[-4000:]}")


def _environment(more: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        filter(None, [(more or {}).get("PYTHONPATH"), str(ROOT), os.environ.get("PYTHONPATH")])),
        **{key: value for key, value in (more or {}).items() if key != "PYTHONPATH"}}
