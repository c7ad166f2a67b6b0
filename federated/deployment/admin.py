"""What the admin of a federation does: start, watch and stop runs at its server, through NVIDIA FLARE's own session.

A run is a job of NVIDIA FLARE with the name of the run; continued, it is a newer job of the same name. While a job is
running, its controller answers with the state of the run; afterwards the last line of the job's log has it:

    {"run": "00000-lesions", "state": "training", "message": "", "round": 12, "rounds": 100, "seconds_left": 5400.0,
     "epsilon": null, "sites": {"a": {"state": "training", "nimg": 60000, "seconds": 71.2, "since": 1796120271.6}}}

See `federated.deployment.job.RunProgress`. Where no controller has answered, the run is queued or starting. The server
may end a job and start another at any time, when a site returns.
"""

import contextlib
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dnnlib.cli import UserError
from dnnlib.text import listed_with_and, suggestion
from federated.deployment.job import RUN_LOGGER, STATUS_LOGGER, STATUS_TOPIC, StartRequest, write_job
from federated.deployment.kits import Kit
from federated.deployment.processes import probe_server

QUEUED, STARTING, WAITING, TRAINING = "queued", "starting", "waiting", "training"
FINISHED, STOPPED, REFUSED, FAILED = "finished", "stopped", "refused", "failed"
ENDED = (FINISHED, STOPPED, REFUSED, FAILED)
RESTART_SECONDS = 15  # after the end of a job, in which the server may start another one of the run
SILENCE = 300  # seconds without an answer of a job that is running, after which `start` gives up on it
_CONNECT_SECONDS, _COMMAND_SECONDS, _STOP_SECONDS = 10, 20, 120  # time limits
_SETTLE_SECONDS = 3  # after the end of a job that was stopped, in which the server may submit it again
_POLL_SECONDS, _LOG_SECONDS = 1, 3  # between two requests; a log may be long
_ABSENT = ("absent", "lost")  # states of sites that are not connected
# States of a job of NVIDIA FLARE -> of its run, if the job's log does not have it.
_BY_JOB = {"SUBMITTED": QUEUED, "APPROVED": QUEUED, "DISPATCHED": STARTING, "RUNNING": STARTING,
           "FINISHED:COMPLETED": FINISHED, "FINISHED:ABORTED": STOPPED, "FINISHED:ABNORMAL": STOPPED}
_PAST_RUNS = 20  # whose final states `status` reads, which takes a request for each


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The newest job of a run, and what is known of the run. See the top of this file."""

    name: str
    job: str  # identifier
    state: str
    submitted: str  # time, as ISO 8601
    message: str = ""  # one line
    run: str | None = None  # folder at the server
    round: int = 0  # the current or last one; 0 = none
    rounds: int | None = None
    seconds_left: float | None = None
    epsilon: float | None = None  # of differential privacy, spent so far
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)  # facts by name; see RunProgress
    may_restart: bool = False  # the job was ended from outside: by an admin, or by the server to start another one

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    @property
    def absent(self) -> list[str]:
        """Names of the sites that are not connected."""
        return [name for name, site in self.sites.items() if site.get("state") in _ABSENT]

    def describe_wait(self) -> str:
        """Return what a run that does not train yet is waiting for."""
        if self.state == WAITING and self.absent:
            verb = "is" if len(self.absent) == 1 else "are"
            return f"waiting for {listed_with_and(self.absent)}, which {verb} not connected"
        return self.message or {QUEUED: "waiting for the server to start the run", STARTING: "the run is starting",
                                WAITING: "waiting for the sites"}[self.state]


class Server:
    """The server of a federation, as an admin sees it; a context manager that holds the connection.

    kit:  of the admin

    Each method raises UserError, one line, if the server cannot be reached, or refuses what is asked.
    """

    def __init__(self, kit: Kit):
        self.kit = kit
        self.address = f"{kit.host}:{kit.port}"
        self._session: Any = None  # nvflare.fuel.flare_api.flare_api.Session

    def __enter__(self) -> "Server":
        check_connection(self.kit)
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        logging.getLogger("nvflare").addHandler(logging.NullHandler())  # otherwise warnings go to standard error
        with self._translated("log in"):
            from nvflare.fuel.flare_api.flare_api import new_secure_session  # of an extra, and slow to import

            self._session = new_secure_session(
                self.kit.name, str(self.kit.path), timeout=_CONNECT_SECONDS, command_timeout=_COMMAND_SECONDS,
                auto_login_max_tries=3)
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(Exception), _quiet():  # the server may be gone
            self._session.close()

    def runs(self) -> list[RunState]:
        """Return the newest job of each run, newest first."""
        newest: dict[str, dict[str, Any]] = {}
        for job in self._call("list runs", "list_jobs", detailed=True, reverse=True):
            newest.setdefault(job["name"], job)
        busy = [name for name, job in newest.items() if job["status"] == "RUNNING"]
        return [self._describe(job, busy, read_log=number < _PAST_RUNS) for number, job in enumerate(newest.values())]

    def find(self, name: str) -> RunState:
        """Return the newest job of a run; raises UserError, with the nearest name, if there is none."""
        found, names = self.look_for(name)
        if found is not None:
            return found
        known = f"one of {', '.join(names[:20])}" if names else "a run that federate.py start has started"
        raise UserError(f"--name is {name}, which is not a run of this server{suggestion(name, names)}; expected "
                        f"{known}")

    def look_for(self, name: str) -> tuple[RunState | None, list[str]]:
        """Return the newest job of a run, None if there is none, and the names of all runs, newest first."""
        jobs = self._call("list runs", "list_jobs", detailed=True, reverse=True)
        busy = [job["name"] for job in jobs if job["status"] == "RUNNING"]
        newest = next((job for job in jobs if job["name"] == name), None)
        return (None if newest is None else self._describe(newest, busy),
                list(dict.fromkeys(job["name"] for job in jobs)))

    def submit(self, request: StartRequest) -> str:
        """Hand a run to the server, and return the identifier of its job."""
        with tempfile.TemporaryDirectory() as folder:
            job = Path(folder) / request.name
            job.mkdir()
            write_job(job, request)
            return self._call("start a run", "submit_job", str(job))

    def stop(self, job: str) -> None:
        """Ask the server to stop a job."""
        self._call("stop a run", "abort_job", job)

    def log(self, job: str) -> list[dict[str, str]]:
        """Return the entries of a job's log, as far as the server sends them (the last 5 MB); see `log_entries`."""
        found = self._call("read the log of a run", "get_job_logs", job, target="server", log_file_name="log.json")
        return log_entries(found.get("logs", {}).get("server") or "")

    def describe(self) -> dict[str, Any]:
        """Return the address, versions and start of the server, and the sites that are connected."""
        from nvflare.fuel.flare_api import api_spec

        found = self._call("read the state of the server", "check_status", "server")
        try:
            versions = self._session_call("report_version", "all")
        except (api_spec.InternalError, api_spec.NoReply, api_spec.AuthorizationError, api_spec.InvalidTarget,
                RuntimeError):  # a site that does not answer is shown without its version
            versions = {}

        def version(name: str) -> str | None:
            entry = versions.get(name)
            return entry.get("version") if isinstance(entry, dict) else None

        # LIMIT: the clocks of server and admin are compared, which are as exact as each machine keeps its own.
        now = time.time()
        sites = {each["client_name"]: {"last_seen": max(now - each["client_last_conn_time"], 0),
                                       "nvflare": version(each["client_name"])} for each in found.get("clients") or []}
        return {"federation": self.kit.federation, "host": self.kit.host, "port": self.kit.port,
                "nvflare": version("server"), "seconds_up": max(now - found["server_start_time"], 0),
                "sites": dict(sorted(sites.items()))}

    def _describe(self, job: dict[str, Any], busy: list[str], *, read_log: bool = True) -> RunState:
        """Return the state of a run by the description of its job. busy: names of runs that are running"""
        facts = {"name": job["name"], "job": job["job_id"], "submitted": job["submit_time_iso"]}
        status, entries, last = job["status"], [], {}
        has_ended = status.startswith("FINISHED")
        if status == "RUNNING":
            found = self._ask(job["job_id"])
            if found is not None:
                return RunState(**facts, **found)
        if read_log and (has_ended or status == "RUNNING"):  # which may be about to end
            entries = self.log(job["job_id"])
            last = final_state(entries) or {}
            if last.get("state") in ENDED:
                return RunState(**facts, **last)
        state, message = _BY_JOB.get(status, FAILED), ""
        if state == FINISHED and last:  # and its controller does not say so
            state = STOPPED
        elif state == QUEUED:
            others = [name for name in busy if name != job["name"]]
            if others:
                message = f"waiting for the end of run {others[0]}"
            elif job.get("schedule_count"):  # tried without success
                message = "waiting for a site: none is connected"
        elif state == FAILED:
            message = last_error(entries) or {
                "FINISHED:CAN_NOT_SCHEDULE": "no site was connected for too long"}.get(status, status)
        return RunState(**facts, **{**last, "state": state, "message": message, "seconds_left": None},
                        may_restart=has_ended)

    def _ask(self, job: str) -> dict[str, Any] | None:
        """Return what the controller of a job answers; None if it does not answer, as while it starts or ends."""
        from nvflare.fuel.flare_api import api_spec

        try:
            return known_fields(self._session_call("do_app_command", job, STATUS_TOPIC, {}))
        except (api_spec.NoReply, api_spec.JobNotRunning, api_spec.InternalError):
            return None

    def _call(self, purpose: str, method: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the session; purpose: what for, for messages."""
        with self._translated(purpose):
            return self._session_call(method, *arguments, **named)

    def _session_call(self, method: str, *arguments: Any, **named: Any) -> Any:
        with _quiet():
            return getattr(self._session, method)(*arguments, **named)

    @contextlib.contextmanager
    def _translated(self, purpose: str) -> Iterator[None]:
        """Turn the exceptions of NVIDIA FLARE's session into UserError."""
        with _quiet():
            from nvflare.apis.fl_exception import FLCommunicationError
            from nvflare.fuel.flare_api import api_spec
        try:
            with _quiet():
                yield
        except api_spec.NoConnection as error:
            raise UserError(f"the server {self.address} does not answer; expected a running federate.py server: "
                            "check that it runs, then see federate.py status") from error
        except api_spec.SessionClosed as error:
            raise UserError(f"the server {self.address} closed the connection: run the same command again") from error
        except api_spec.AuthorizationError as error:
            raise UserError(f"{self.kit.name} is not allowed to {purpose} at {self.address}; expected the kit of an "
                            "admin whom the server's policy allows it") from error
        except (api_spec.AuthenticationError, FLCommunicationError) as error:
            raise UserError(f"the server {self.address} does not accept the certificate of {self.kit.path} "
                            f"({_cause(error)}); expected a valid kit of this federation: ask whoever provisions "
                            "it") from error
        except (api_spec.InvalidJobDefinition, api_spec.InternalError, api_spec.JobNotFound, api_spec.NoReply,
                RuntimeError) as error:
            raise UserError(f"the server {self.address} could not {purpose}: {_cause(error)}") from error


def check_connection(kit: Kit) -> None:
    """Raise UserError unless a server of the kit's federation can be reached, and accepts the kit's certificate.

    NVIDIA FLARE itself reports all of these alike, after retrying for as long as it may.
    """
    problem = probe_server(kit)
    if problem is not None:
        raise UserError(f"the server {kit.host}:{kit.port} cannot be reached ({problem}); expected a running "
                        f"federate.py server: check that it runs, and that firewalls let port {kit.port} pass")


def start(server: Server, request: StartRequest, show: Callable[[str], None]) -> RunState:
    """Hand a run to the server, and wait until it trains, or has nothing left to do.

    show:  prints a line about what the run is waiting for

    Raises UserError if the run is running already, or is refused, stopped or fails before it trains.
    """
    before, _ = server.look_for(request.name)
    if before is not None and not before.has_ended:
        raise UserError(f"--name is {request.name}, a run that is {before.state} already; expected one that is not "
                        "running: wait for its end, stop it with federate.py stop, or choose another name")
    job = server.submit(request)
    try:
        return _await_training(server, request.name, job, show)
    except KeyboardInterrupt:
        show(f"{request.name}: stays at the server; federate.py stop ends it")
        raise


def _await_training(server: Server, name: str, job: str, show: Callable[[str], None]) -> RunState:
    """Wait until a run trains or is finished; see `start`."""
    shown, answered, ended = None, time.monotonic(), None
    while True:
        try:
            found = server.find(name)
        except UserError as error:
            raise UserError(f"run {name} was handed to the server, but {error}") from error
        now = time.monotonic()
        if found.job != job:  # a newer job than ours
            answered, ended, job = now, None, found.job
        if found.state in (TRAINING, FINISHED):
            return found
        if found.has_ended:
            ended = now if ended is None else ended
            if not found.may_restart or now - ended > RESTART_SECONDS:
                raise UserError(f"run {name} was {found.state}: {found.message or 'see federate.py logs'}"
                                if found.state in (STOPPED, REFUSED) else
                                f"run {name} failed: {found.message}; see federate.py logs")
        elif found.describe_wait() != shown:
            shown = found.describe_wait()
            show(f"{name}: {shown}")
        if found.state != STARTING:
            answered = now
        if now - answered > SILENCE:
            raise UserError(f"run {name} has been starting for {SILENCE} seconds without an answer of the "
                            "server's job; see federate.py logs, and stop it with federate.py stop")
        time.sleep(_POLL_SECONDS)


def status(server: Server, name: str | None = None) -> dict[str, Any]:
    """Return the state of the server, and of its runs or the run `name`; what `--json` prints."""
    runs = server.runs() if name is None else [server.find(name)]
    return {"server": server.describe(), "runs": [
        {**asdict(each), "message": each.describe_wait() if each.state == WAITING else each.message} for each in runs]}


def stop(server: Server, name: str) -> RunState:
    """Stop a run and wait for its end; one that has ended is left alone. Returns its last state.

    The server may be about to start the run anew, for a site that is back: that job is stopped as well.
    """
    deadline, asked, ended = time.monotonic() + _STOP_SECONDS, set(), None
    while time.monotonic() < deadline:
        found = server.find(name)
        if found.has_ended:
            ended = time.monotonic() if ended is None else ended
            if not found.may_restart or time.monotonic() - ended >= _SETTLE_SECONDS:
                return found
        else:
            ended = None
            if found.job not in asked:
                asked.add(found.job)
                try:
                    server.stop(found.job)
                except UserError:
                    now = server.find(name)
                    if now.job == found.job and not now.has_ended:  # else it ended in between
                        raise
        time.sleep(_POLL_SECONDS)
    raise UserError(f"run {name} has not stopped within {_STOP_SECONDS} seconds, although the server was asked to; see "
                    "federate.py status")


def log_lines(server: Server, name: str, *, tail: int | None = None, follow: bool = False) -> Iterator[str]:
    """Yield the lines of a run's log at the server.

    tail:    only the last so many of those that are there
    follow:  also yield the lines to come, until the run ends
    """
    job, last, ended = None, None, None
    while True:
        run = server.find(name)
        entries = server.log(run.job)
        if run.job != job:
            job, ended, lines = run.job, None, readable(entries)
            yield from lines if tail is None or last is not None else lines[max(len(lines) - tail, 0):]
        else:
            known = entries[::-1].index(last) if last in entries else len(entries)  # entries after the last known one
            yield from readable(entries[len(entries) - known:])
        last = entries[-1] if entries else {}
        if run.has_ended:
            ended = time.monotonic() if ended is None else ended
            if not run.may_restart or time.monotonic() - ended > RESTART_SECONDS:
                return
        if not follow:
            return
        time.sleep(_LOG_SECONDS)


# Logs of jobs


def log_entries(text: str) -> list[dict[str, str]]:
    """Return the entries of a log that NVIDIA FLARE wrote as JSON, one a line; what is not JSON is left out."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # the first line of a log that was cut
            entry = json.loads(line)
            if isinstance(entry, dict):
                found.append(entry)
    return found


def readable(entries: list[dict[str, str]]) -> list[str]:
    """Return the lines of a run among the entries of its job's log, and the errors of NVIDIA FLARE."""
    lines = []
    for entry in entries:
        if entry.get("fullName") == RUN_LOGGER:
            lines += entry.get("message", "").splitlines() or [""]
        elif _is_error(entry):
            lines.append(f"NVIDIA FLARE: {entry.get('name')}: {entry.get('message')}")
    return lines


def final_state(entries: list[dict[str, str]]) -> dict[str, Any] | None:
    """Return the fields of RunState that the controller wrote at the end of its job; None if it did not get there."""
    for entry in reversed(entries):
        if entry.get("fullName") == STATUS_LOGGER:
            with contextlib.suppress(ValueError):
                return known_fields(json.loads(entry.get("message", "")))
    return None


def last_error(entries: list[dict[str, str]]) -> str:
    """Return the first line of the last error in a log; "" if there is none."""
    messages = [entry.get("message", "") for entry in entries if _is_error(entry)]
    return (messages[-1].splitlines() or [""])[0] if messages else ""


def known_fields(found: Any) -> dict[str, Any] | None:
    """Return those entries of a controller's answer that are fields of RunState; None unless it is an answer."""
    if not isinstance(found, dict) or not isinstance(found.get("state"), str):
        return None
    names = {"state", "message", "run", "round", "rounds", "seconds_left", "epsilon", "sites"}
    return {name: value for name, value in found.items() if name in names}


def _is_error(entry: dict[str, str]) -> bool:
    # NVIDIA FLARE logs an error when the state of a job is asked for while its controller is being built.
    return entry.get("levelname") in ("ERROR", "CRITICAL") and not (
        entry.get("message", "").startswith("no app command func") and STATUS_TOPIC in entry["message"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what NVIDIA FLARE's session prints; its exceptions tell what happened."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _cause(error: Exception) -> str:
    """Return the message of an exception in one line, or its kind."""
    return " ".join(str(error).split()) or type(error).__name__
