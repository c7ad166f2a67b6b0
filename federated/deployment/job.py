"""What `federate.py start` hands to the server: an NVIDIA FLARE job without code, and the two files of local settings.

A job names the classes that run at server and sites, and carries the name of the run and the flags of `start` as text.
Where data lie and results go stands in a local file of each machine, which no job can see or change.
"""

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dnnlib.files import atomic_write
from training.config import NAME

DECLARE, TRAIN = "declare", "train"  # the tasks of a site
SITE_FILE, SERVER_FILE = "site_settings.json", "server_settings.json"  # in the folder "local" of a kit
CONTROLLER = "federated.deployment.controller.RoundsController"
EXECUTOR = "federated.deployment.executor.SiteExecutor"
FILTER = "federated.deployment.executor.OutgoingFilter"  # named by the site's own policy, never by a job
RELAUNCHER = "federated.deployment.relaunch.Relauncher"  # named by the server's own policy
STATUS_TOPIC = "run_status"  # the command by which an admin asks a running controller for the state of its run
# Loggers of the controller, in the job's log at the server: the lines of the run's own log, and at the end of the job
# the final state of the run, as JSON.
RUN_LOGGER, STATUS_LOGGER = "federated.run", "federated.run_status"
ON_LOST = ("continue", "wait")
SITE_TIMEOUT = 120.0  # seconds without a sign of life, after which a site is lost


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """What `federate.py site` was told; stays in the site's kit."""

    data: str  # absolute path
    outdir: str  # absolute path; holds RUN/site-NAME
    device: str = "auto"
    workers: int | None = None  # data loading workers; None = as the run says
    max_epsilon: float | None = None  # take part only in runs that spend at most this; None = in all


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What `federate.py server` was told; stays in the server's kit."""

    outdir: str  # absolute path; holds NNNNN-RUN/server
    sites: tuple[str, ...]  # names of the federation's sites, in the order of `provision --sites`
    site_timeout: float = SITE_TIMEOUT
    device: str = "auto"
    holdout: str | None = None  # absolute paths
    valid: str | None = None
    detector_weights: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StartRequest:
    """What `federate.py start` asks of the server."""

    name: str  # of the run
    flags: dict[str, Any] = field(default_factory=dict)  # those given, by the names of the command's parameters
    token: str = ""  # a new one for each `start`, kept when the server submits the job again
    on_lost: str = "continue"  # when a site is lost in a round: continue with the others, or wait for it


def save_settings(kit: Path, settings: SiteSettings | ServerSettings) -> None:
    """Write the local settings into a kit."""
    name = SITE_FILE if isinstance(settings, SiteSettings) else SERVER_FILE
    with atomic_write(kit / "local" / name, text=True) as file:
        file.write(json.dumps(asdict(settings), indent=1) + "\n")


def load_settings(kit: Path, kind: type[SiteSettings] | type[ServerSettings]) -> SiteSettings | ServerSettings:
    """Read the local settings of a kit."""
    name = SITE_FILE if kind is SiteSettings else SERVER_FILE
    found = json.loads((kit / "local" / name).read_text())
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})


def write_job(folder: Path, request: StartRequest) -> None:
    """Write a job for NVIDIA FLARE into an empty folder: meta.json and app/config/*.json, no code.

    The request is written in base64: NVIDIA FLARE replaces {$NAME} in arguments by variables of its environment.
    """
    config = folder / "app" / "config"
    text = base64.b64encode(json.dumps(asdict(request)).encode()).decode()
    config.mkdir(parents=True)
    files = {
        folder / "meta.json": {"name": request.name, "deploy_map": {"app": ["@ALL"]}, "min_clients": 1},
        config / "config_fed_server.json": {
            "format_version": 2, "task_data_filters": [], "task_result_filters": [], "components": [],
            "workflows": [{"id": "rounds", "path": CONTROLLER, "args": {"request": text}}]},
        config / "config_fed_client.json": {
            "format_version": 2, "task_data_filters": [], "task_result_filters": [], "components": [],
            "executors": [{"tasks": [DECLARE, TRAIN], "executor": {"path": EXECUTOR, "args": {}}}]}}
    for path, content in files.items():
        path.write_text(json.dumps(content, indent=1) + "\n")


def read_request(text: str) -> StartRequest:
    """Return the request of a job, as `write_job` writes it; raises ValueError unless it is one."""
    found = json.loads(base64.b64decode(text, validate=True))
    if not isinstance(found, dict) or found.keys() != StartRequest.__dataclass_fields__.keys() or not (
            is_run_name(found["name"]) and isinstance(found["flags"], dict) and isinstance(found["token"], str)
            and found["on_lost"] in ON_LOST):
        raise ValueError("it is not a request of federate.py start")
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in found["flags"].items()}
    return StartRequest(**{**found, "flags": flags})  # values of flags that can be repeated are tuples


def is_run_name(name: Any) -> bool:
    """Return whether a name can be that of a run, which files are named after; a job may bring any."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None


class RunProgress:
    """How a run stands: kept in a file of the server's kit, which outlives jobs, and told to admins.

    `to_dict` has the fields that federated.deployment.admin describes, and for federated.deployment.relaunch the job
    and the sites that are members of its round or of later ones. States of a run: "waiting" for sites,
    "training", "finished", "stopped" (the same start continues it), "refused" (it cannot work as it is) or "failed" (an
    error of the program).
    """

    def __init__(self, kit: Path, name: str, job: str):
        self._folder, self.name, self.job = kit / "states", name, job  # identifier of the job
        self._folder.mkdir(exist_ok=True)
        self._lock = threading.Lock()
        before = self.read(kit, name) or {}
        self.run: str | None = before.get("run")  # name of its folder
        self.token: str = before.get("token", "")  # of the start that chose the folder
        self.state, self.message = "waiting", ""
        self.round = self.rounds = 0
        self.seconds_left: float | None = None
        self.epsilon: float | None = None
        self.members: list[str] | None = None  # of this round or later ones; None = not known yet
        self.sites: dict[str, dict[str, Any]] = {}

    @staticmethod
    def read(kit: Path, name: str, job: str | None = None) -> dict[str, Any] | None:
        """Return what the newest job of a run wrote, as `to_dict` does; None without.

        job:  whose state is asked for: before it has written one, it is waiting
        """
        path = kit / "states" / f"{name}.json"
        if not is_run_name(name) or not path.exists():
            return None
        found = json.loads(path.read_text())
        if job is not None and found.get("job") != job:
            return {"job": job, "state": "waiting", "round": 0, "sites": {}, "members": None}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON types."""
        with self._lock:
            return {"name": self.name, "job": self.job, "run": self.run, "token": self.token, "state": self.state,
                    "message": self.message, "round": self.round, "rounds": self.rounds,
                    "seconds_left": self.seconds_left, "epsilon": self.epsilon,
                    "members": self.members, "sites": {name: dict(entry) for name, entry in sorted(self.sites.items())}}

    def change(self, state: str, message: str) -> None:
        """Note the state of the run, with one line about it."""
        with self._lock:
            changed = (state, message) != (self.state, self.message)
            self.state, self.message, self.seconds_left = state, message, None
        if changed:
            self._save()

    def begin_round(self, number: int, rounds: int, images: Mapping[str, int], seconds_left: float | None,
                    members: Iterable[str] | None = None) -> None:
        """Note a round and its sites.

        images:   number of images that each site has seen at its start
        members:  names of the sites of this round or later ones; None = all
        """
        with self._lock:
            self.members = None if members is None else sorted(members)
            self.state, self.message, self.seconds_left = "training", "", seconds_left
            self.round, self.rounds = number, rounds
            before = self.sites
            self.sites = {name: {"state": "training", "nimg": nimg, "seconds": before.get(name, {}).get("seconds"),
                                 "since": time.time()} for name, nimg in images.items()}
        self._save()

    def sites_are(self, names: Iterable[str], state: str) -> None:
        """Note the state of sites: training, done, lost, refused or absent."""
        with self._lock:
            changed = False
            for name in names:
                entry = self.sites.setdefault(name, {"nimg": 0, "seconds": None})
                changed |= entry.get("state") != state
                if entry.get("state") != state:
                    entry.update(state=state, since=time.time())
        if changed:
            self._save()

    def site_took(self, name: str, nimg: int, seconds: float) -> None:
        """Note that a site has finished a round, with all images that it has seen and the seconds of the round."""
        with self._lock:
            self.sites.setdefault(name, {}).update(nimg=nimg, seconds=seconds)
        self.sites_are([name], "done")

    def load_facts(self, questions: Mapping[str, Any]) -> dict[str, bytes]:
        """Return the facts that the sites declared in earlier jobs, by site; {} if they were asked other questions."""
        path = self._folder / f"{self.name}.facts.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        return {name: text.encode() for name, text in found["facts"].items()
                } if found.get("questions") == questions else {}

    def save_facts(self, facts: Mapping[str, bytes], questions: Mapping[str, Any]) -> None:
        """Keep the facts of all sites for later jobs, in which a site may be missing."""
        self._write(f"{self.name}.facts.json",
                    {"questions": questions, "facts": {name: data.decode() for name, data in facts.items()}})

    def _save(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: training does not depend on this file
            self._write(f"{self.name}.json", self.to_dict())

    def _write(self, name: str, content: Any) -> None:
        with atomic_write(self._folder / name, text=True) as file:
            file.write(json.dumps(content, indent=1) + "\n")
