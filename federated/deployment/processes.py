"""Run the server or a site in the foreground: NVIDIA FLARE's process, watched, restarted, and stopped with its jobs."""

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dnnlib.cli import StopRequest, UserError, check_outdir
from dnnlib.process_lock import LockHeld, ProcessLock
from dnnlib.text import plural
from federated.deployment.job import ServerSettings, SiteSettings
from federated.deployment.kits import ORG, SITE, Kit
from federated.deployment.policy import HEARTBEAT_SECONDS, write_server_policy, write_site_policy
from training.dataset import ImageDataset

STOP_SECONDS = 60  # for jobs to save their state
_LEAVE_SECONDS = 10  # for NVIDIA FLARE's process to end after its jobs
_RETRY_SECONDS = (2, 5, 10, 20, 30)  # between attempts to reach the server, or to start a process that ended
_STEADY_SECONDS = 300  # a process that ran as long is started again without much delay
_POLL_SECONDS = 0.2
_REFUSALS = 2  # of a site's signs of life, after which it registers again
_STEADY_CONNECTION = 5  # seconds after which a new connection counts
_TIMEOUT = 10  # seconds for a connection
_LOCK = ".lock"
_PROGRAM = "import sys; from federated.deployment.nvflare_process import main; main(sys.argv[1:])"
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_ROOT = Path(__file__).resolve().parents[2]


def run_server(kit: Kit, settings: ServerSettings) -> int:
    """Run the server of a kit until it is told to stop; return the exit code.

    Raises UserError if it cannot be started.
    """
    check_outdir(settings.outdir)
    Path(settings.outdir).mkdir(parents=True, exist_ok=True)
    with _only_one(kit), StopRequest() as stop:
        _check_port(kit.host, kit.port)
        write_server_policy(kit, settings)
        _print(f"{kit.describe()}; results go to {settings.outdir}")
        return _keep_running(_server_process(kit, settings), stop, lambda: None)


def run_site(kit: Kit, settings: SiteSettings) -> int:
    """Run a site of a kit until it is told to stop; return the exit code. Waits for a server that is not there.

    Raises UserError if it cannot be started, or the server refuses it.
    """
    data = ImageDataset(settings.data)
    check_outdir(settings.outdir)
    Path(settings.outdir).mkdir(parents=True, exist_ok=True)
    with _only_one(kit), StopRequest() as stop:
        write_site_policy(kit, settings)
        _print(f"{kit.describe()}; {plural(len(data), 'image')} in {settings.data}, which stay here")
        return _keep_running(_site_process(kit), stop, lambda: _await_server(kit, stop))


# Processes


class _Process:
    """NVIDIA FLARE's server or client, with its jobs.

    watch:  told each line of its log; may raise UserError or _Anew, which end it
    """

    def __init__(self, kit: Kit, arguments: list[str], environment: dict[str, str], watch: Callable[[str], None]):
        self._kit, self._watch = kit, watch
        self._command = [sys.executable, "-u", "-c", _PROGRAM, str(os.getpid()), kit.kind, "-m", str(kit.path),
                         *arguments]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        # Nothing is imported from the kit, which is the current folder of the process and its jobs.
        self._environment = {**os.environ, **environment, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        self._process: subprocess.Popen | None = None
        self._jobs: list[Any] = []  # and their children, psutil.Process; they have process groups of their own
        self.error: UserError | _Anew | None = None

    def start(self) -> None:
        self.error = None
        # In its own process group: Ctrl-C at the terminal reaches only this program, which stops the jobs first.
        self._process = subprocess.Popen(self._command, env=self._environment, cwd=self._kit.path, process_group=0,
                                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                         text=True, errors="replace")
        threading.Thread(target=self._read, args=(self._process,), name="log", daemon=True).start()

    def poll(self) -> int | None:
        """Return the exit code, None while it runs; note its jobs, which it may leave behind."""
        import psutil  # of an extra

        with suppress(psutil.NoSuchProcess):
            self._jobs = psutil.Process(self._process.pid).children(recursive=True) or self._jobs
        return self._process.poll()

    def stop(self) -> None:
        """End the jobs, a site's after they have saved their state, and then the process."""
        self.poll()
        if self._kit.kind == SITE:  # a server tells its jobs itself
            self._end_jobs()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_SECONDS)
        for each in self._jobs:
            _send(each, signal.SIGKILL)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _end_jobs(self) -> None:
        # Only those that lead a group: what they started is theirs to end.
        leaders = [each for each in self._jobs if _is_alive(each) and os.getpgid(each.pid) == each.pid]
        if leaders:
            _print(f"the run has {STOP_SECONDS} s to save its state")
        for each in leaders:
            _send(each, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS  # not psutil.wait_procs: their parent is another process
        while time.monotonic() < deadline and any([_is_alive(each) for each in leaders]):
            time.sleep(_POLL_SECONDS)
        if leaders:
            time.sleep(1)  # the server is told of their end

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            try:
                self._watch(_ESCAPES.sub("", line))
            except (UserError, _Anew) as error:
                self.error = error


def _keep_running(process: _Process, stop: StopRequest, prepare: Callable[[], None]) -> int:
    """Start a process, again when it ends by itself, until a signal arrives; return the exit code.

    prepare:  called before each start
    """
    failures = 0
    while True:
        prepare()
        if stop.wanted():
            break
        started = time.monotonic()
        process.start()
        try:
            while process.poll() is None and not stop.wanted() and process.error is None:
                time.sleep(_POLL_SECONDS)
        finally:
            code = process.poll()
            process.stop()
        if isinstance(process.error, UserError):
            raise process.error
        if stop.wanted():
            break
        if process.error is not None:
            _print("the server no longer accepts the session of this site; registering again")
            continue
        failures = 0 if time.monotonic() - started > _STEADY_SECONDS else failures + 1
        delay = _delay(failures - 1)
        _print(f"NVIDIA FLARE's process ended with exit code {code}, see log.txt in the kit; starting it again in "
               f"{delay} s")
        _sleep(delay, stop)
    _print(f"stopped ({stop.reason})")
    return 0


def _server_process(kit: Kit, settings: ServerSettings) -> _Process:
    names, seen = settings.sites, set()

    def watch(line: str) -> None:
        if "Server started" in line:
            _print(f"listens on port {kit.port} for {', '.join(names)}")
        elif found := re.search(r"Client: New client (\S+?)@\S* joined", line):
            seen.add(found[1])
            _print(f"site {found[1]} is connected ({len(seen)} of {len(names)})")
        elif found := re.search(r"Re-activate the client: (\S+)", line):
            seen.add(found[1])
            _print(f"site {found[1]} is connected again ({len(seen)} of {len(names)})")
        elif found := re.search(r"Remove the dead Client\. Name: (\S+?)\.\s", line):
            _print(f"there was no sign of life of site {found[1]} for {settings.site_timeout:g} s")
        elif found := re.search(r"Client Name:(\S+) left", line):
            seen.discard(found[1])
            _print(f"site {found[1]} is gone ({len(seen)} of {len(names)} are connected)")
        elif found := re.search(r"Client (\S+) disabled\.", line):
            seen.discard(found[1])
            _print(f"site {found[1]} is revoked ({len(seen)} of {len(names)} are connected)")
        elif found := re.search(r"Reject disabled client registration: (\S+)", line):
            _print(f"site {found[1]} is refused: it was revoked")

    # A lost site is noticed after site_timeout, not only after NVIDIA FLARE's further 60 s.
    environment = {"NVFLARE_DEAD_CLIENT_GRACE_PERIOD": "0", "NVFLARE_DEAD_CLIENT_CHECK_LEAD_TIME": "5"}
    return _Process(kit, ["-s", "fed_server.json", "--set", "secure_train=true", f"org={ORG}", "config_folder=config"],
                    environment, watch)


class _SiteLog:
    """Prints what happens to the connection of a site, from NVIDIA FLARE's log."""

    def __init__(self, kit: Kit):
        self._kit, self._where = kit, f"{kit.host}:{kit.port}"
        self._is_lost, self._refusals = False, 0
        self._steady = threading.Timer(0, lambda: None)

    def __call__(self, line: str) -> None:
        """Raise UserError if the server refuses the site, and _Anew if it has to register again."""
        if "Successfully registered client" in line:
            self._is_lost, self._refusals = False, 0
            _print(f"connected to the server {self._where}; waiting for a run")
        elif "registration rejected" in line:
            why = ("it was revoked" if "is disabled" in line else "its list of sites is older than this kit"
                   if "Maximum number of clients" in line else line.rsplit("rejected:", 1)[-1].strip())
            raise UserError(f"the server {self._where} refuses site {self._kit.name}: {why}; ask whoever runs the "
                            "server")
        elif "Failed to send heartbeat" in line:  # without a connection there is no such line
            self._refusals += 1
            if self._refusals == _REFUSALS:
                raise _Anew
        elif "no connection to server" in line and not self._is_lost:
            self._is_lost = True
            _print(f"the connection to the server {self._where} is lost; trying again until it is back")
        elif self._is_lost and re.search(r"Connection \[.* => .*\] is created", line):
            self._steady = threading.Timer(_STEADY_CONNECTION, self._back)  # it may be closed at once
            self._steady.daemon = True
            self._steady.start()
        elif re.search(r"Connection \[.*\] is closed", line):
            self._steady.cancel()

    def _back(self) -> None:
        self._is_lost = False
        _print("connected to the server again")


class _Anew(Exception):
    """A site has to register again, as the server does not accept its session."""


def _site_process(kit: Kit) -> _Process:
    return _Process(kit, ["-s", "fed_client.json", "--set", "secure_train=true", f"uid={kit.name}", f"org={ORG}",
                          "config_folder=config", f"heart_beat_interval={HEARTBEAT_SECONDS}"], {}, _SiteLog(kit))


def _send(process: Any, number: int) -> None:
    import psutil

    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _is_alive(process: Any) -> bool:
    import psutil

    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


# What can be checked before


@contextmanager
def _only_one(kit: Kit):
    lock = ProcessLock(kit.path / _LOCK)
    try:
        lock.acquire()
    except LockHeld as holder:
        raise UserError(f"--kit={kit.path} is in use by {holder}; one process runs with a kit at a time: stop it "
                        "first") from holder
    try:
        yield
    finally:
        lock.release()


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:  # NVIDIA FLARE listens on all addresses of the machine, unless the host is its own loopback
            probe.bind(("127.0.0.1" if host == "localhost" or host.startswith("127.") else "", port))
        except OSError as error:
            raise UserError(f"port {port} of this machine is not free ({error.strerror}); stop the program that uses "
                            "it, or provision the federation with another --port") from error


def _await_server(kit: Kit, stop: StopRequest) -> None:
    """Wait until the server can be reached; raises UserError if it is not the server of this kit, or refuses it."""
    attempt, last = 0, None
    while not stop.wanted():
        problem = probe_server(kit)
        if problem is None:
            return
        if problem != last:
            _print(f"waiting for the server {kit.host}:{kit.port}: {problem}")
        last, attempt = problem, attempt + 1
        _sleep(_delay(attempt - 1), stop)


def probe_server(kit: Kit) -> str | None:
    """Return why the server cannot be reached; None if it can, and accepts the certificate of the kit.

    Raises UserError if it is certain that the two do not belong together.
    """
    base = kit.path / "startup"
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=base / "rootCA.pem")
    context.load_cert_chain(base / "client.crt", base / "client.key")
    context.set_alpn_protocols(["h2"])
    where = f"the server {kit.host}:{kit.port}"
    try:
        with (socket.create_connection((kit.host, kit.port), timeout=_TIMEOUT) as plain,
              context.wrap_socket(plain, server_hostname=kit.host) as secure):
            # In TLS 1.3 a refusal of our certificate arrives after the handshake, and otherwise HTTP/2's settings.
            return None if secure.recv(1) else "it closes the connection, as if it did not accept this kit"
    except ssl.SSLCertVerificationError as error:
        raise UserError(f"{where} is not that of this kit: its certificate is not valid here ({error.verify_message}); "
                        "use the kit of its federation") from error
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or "") and "HANDSHAKE" not in error.reason:
            raise UserError(f"{where} refuses the certificate of {kit.kind} {kit.name} ({error.reason.lower()}); "
                            "get a kit of its federation") from error
        return f"it does not answer as a server of NVIDIA FLARE ({(error.reason or str(error)).lower()})"
    except TimeoutError:
        return "no answer; a firewall may block the port"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def _delay(attempt: int) -> int:
    return _RETRY_SECONDS[min(max(attempt, 0), len(_RETRY_SECONDS) - 1)]


def _sleep(seconds: float, stop: StopRequest) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop.wanted():
        time.sleep(_POLL_SECONDS)


def _print(message: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}", flush=True)
