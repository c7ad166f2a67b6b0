"""The commands of federate.py by which an admin starts, watches and stops runs: their flags, and what they print."""

import copy
import json
import uuid
from collections.abc import Iterator
from dataclasses import fields
from datetime import datetime
from typing import Any

import click
from click.core import ParameterSource

from dnnlib.cli import Flag, UserError, UserPath, join_values
from dnnlib.progress import format_seconds
from dnnlib.text import format_table, listed_with_and
from federated.command import FLAGS as SIMULATE_FLAGS
from federated.command import ROUNDS
from federated.deployment import admin
from federated.deployment.command import make_command
from federated.deployment.job import ON_LOST, StartRequest
from federated.deployment.kits import ADMIN, read_kit
from federated.deployment.plan import BALANCES
from federated.institutions import parse_federation, refuse_kimg
from metrics.names import choose_detector, parse_metrics
from training.config import RESUME_CLASSES, RunSettings
from training.options import DATA, RUN, START, TrainOptions, make_flag, show_value

START_HELP = """Start a run of a federation, or continue it.

The server starts the run when the sites are connected, and this command ends when they train. The run goes on without
it: see federate.py status, logs and stop.

\b
python federate.py start --kit=kits/admin --name=lesions --rounds=100 --cond=1 --mirror=1
python federate.py start --kit=kits/admin --name=first-try --rounds=20 --round-kimg=0.5 --cfg=tiny

The same command again continues a run that was stopped after its last complete round. A finished run is left alone,
unless --rounds is larger than before. What belongs to a machine (data, devices, folders) is given where the server and
the sites are started. BOOL is 1 or 0, true or false, yes or no.
"""
STATUS_HELP = """Show the state of a federation's server, the sites that are connected, and the runs.

\b
python federate.py status --kit=kits/admin
python federate.py status --kit=kits/admin --name=lesions --json
"""
STOP_HELP = """Stop a run of a federation. federate.py start with the same flags continues it later.

\b
python federate.py stop --kit=kits/admin --name=lesions
"""
LOGS_HELP = """Print the log of a run at the server. The logs of the sites stay at the sites, in their output folders.

\b
python federate.py logs --kit=kits/admin --name=lesions --tail=20 --follow
"""

# Flags of federate.py simulate that `start` refuses, each with the reason. They are not in the help.
_AT_SITE, _AT_SERVER = "belongs to federate.py site", "belongs to federate.py server"
_REFUSED = {
    # What belongs to a machine stays there.
    "data": _AT_SITE, "workers": _AT_SITE,
    "holdout": _AT_SERVER, "valid": _AT_SERVER, "detector_weights": _AT_SERVER,
    "outdir": "belongs to federate.py server and federate.py site",
    "device": "belongs to federate.py server and federate.py site",
    "gpus": "has no use here: one process trains each site",
    "tune_malloc": "has no use here: each machine tunes its own",
    "max_hours": "limits one program, and a run has one on each machine; federate.py stop ends it",
    # What belongs to the kit.
    "sites": "belongs to federate.py provision",
    # What does not fit a federation.
    "share_statistics": "would let statistics of images leave the sites; they share networks only",
    "dry_run": "needs the data; use federate.py simulate",
}


def _kit_flag() -> Flag:
    return make_flag("--kit", UserPath(), RUN, "Kit of the admin, a folder made by federate.py provision. Required.",
                     "FOLDER")


def _name_flag(text: str) -> Flag:
    return make_flag("--name", str, RUN, text, "TEXT")


def _start_flags() -> list[Flag]:
    """Return the flags of federate.py simulate that a run of a federation has, and in their places its own."""
    own = {flag.name: flag for flag in [
        _kit_flag(),
        _name_flag("Name of the run, and of its folder at the server. Required."),
        make_flag("--on-lost", click.Choice(ON_LOST), ROUNDS, "When a site is lost in a round: continue with the other "
                  "sites, or wait for it.", standard=StartRequest.__dataclass_fields__["on_lost"].default),
        make_flag("--metrics", str, RUN, "Quality metrics to compute for each network snapshot, separated by commas, "
                  "or none. They need a server that was started with --holdout. Can be repeated.", "LIST",
                  multiple=True, callback=join_values, standard="fid50k_full if the server has such a set and the "
                  "feature detector, else none"),
        make_flag("--balance", click.Choice(BALANCES), DATA, "How often images are seen at each site: each "
                  "equally often, or each class.", standard=show_value(RunSettings.balance)),
        make_flag("--resume", str, START, "Network file at the server whose weights training starts from, as an "
                  "absolute path there. To continue a stopped run, repeat its command instead.", "NETWORK|noresume",
                  standard="noresume: random weights"),
        make_flag("--resume-classes", click.Choice(RESUME_CLASSES), START, "same: the network must have the classes of "
                  "the sites, matched by name, in any order. new: the class embedding starts from random weights and "
                  "all else is taken.", standard=RESUME_CLASSES[0]),
    ]}
    found = [own.pop("kit"), *(own.pop(flag.name, flag) for flag in SIMULATE_FLAGS if flag.name not in _REFUSED)]
    groups = list(dict.fromkeys(flag.group for flag in found))
    return sorted([*found, *own.values()], key=lambda flag: groups.index(flag.group))


def _refused_flags() -> list[Flag]:
    flags = [copy.copy(flag) for flag in SIMULATE_FLAGS if flag.name in _REFUSED]
    for flag in flags:
        flag.hidden = True
    return flags


START_FLAGS = _start_flags()


def make_start_command() -> click.Command:
    """Return the command that starts a run."""
    @click.pass_context
    def callback(context: click.Context, **flags: Any) -> int:
        given = {name for name in flags if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
        request = make_request(flags, given)
        with _connect(flags) as server:
            found = admin.start(server, request, click.echo)
        if found.state == admin.FINISHED:
            click.echo(f"{found.name} is finished: {found.message or _progress(found.round, found.rounds)}; a larger "
                       "--rounds continues it")
        else:
            where = "" if found.run is None else f", in {found.run} at the server"
            click.echo(f"{found.name} trains: {_progress(found.round, found.rounds)}{where}")
        return 0

    return make_command("start", callback, [*START_FLAGS, *_refused_flags()], START_HELP,
                    "Start or continue a run of a federation.")


def make_status_command() -> click.Command:
    """Return the command that shows server, sites and runs."""
    def callback(json_: bool, **flags: Any) -> int:
        with _connect(flags, needs_name=False) as server:
            found = admin.status(server, flags["name"])
        if json_:
            click.echo(json.dumps(found, indent=1, allow_nan=False))
        else:
            click.echo("\n".join(status_lines(found, detailed=flags["name"] is not None)))
        return 0

    return make_command("status", callback, [
        _kit_flag(), _name_flag("Show this run only, with its sites."),
        make_flag("--json json_", bool, RUN, "Print JSON.", is_flag=True, default=False),
    ], STATUS_HELP, "Show a federation's server, sites and runs.")


def make_stop_command() -> click.Command:
    """Return the command that stops a run."""
    def callback(**flags: Any) -> int:
        with _connect(flags) as server:
            before = server.find(flags["name"])
            is_over = before.has_ended and not before.may_restart
            found = before if is_over else admin.stop(server, before.name)
        if before.has_ended and found.job == before.job:
            click.echo(f"{found.name} is not running: it is {found.state}")
        elif found.state == admin.STOPPED:
            click.echo(f"{found.name} is stopped. Its last complete round remains at the server; the same federate.py "
                       "start continues it")
        else:
            click.echo(f"{found.name} has ended: it is {found.state}")
        return 0

    return make_command("stop", callback, [_kit_flag(), _name_flag("Name of the run. Required.")], STOP_HELP,
                    "Stop a run of a federation.")


def make_logs_command() -> click.Command:
    """Return the command that prints the log of a run."""
    def callback(**flags: Any) -> int:
        if flags["tail"] is not None and flags["tail"] < 0:
            raise UserError(f"--tail is {flags['tail']}; expected a number of lines >= 0")
        with _connect(flags) as server:
            for line in admin.log_lines(server, flags["name"], tail=flags["tail"], follow=flags["follow"]):
                click.echo(line)
        return 0

    return make_command("logs", callback, [
        _kit_flag(), _name_flag("Name of the run. Required."),
        make_flag("--tail", int, RUN, "Print only the last N lines.", "N", standard="all that the server sends, which "
                  "are the last 5 MB"),
        make_flag("--follow", bool, RUN, "Also print the lines to come, until the run ends.", is_flag=True,
                  default=False),
    ], LOGS_HELP, "Print the log of a run at the server.")


def _connect(flags: dict[str, Any], *, needs_name: bool = True) -> admin.Server:
    """Return the server of --kit, to be entered; raises UserError if a flag is missing."""
    _require(flags, "kit", *["name"] * needs_name)
    return admin.Server(read_kit(flags["kit"], ADMIN))


def _require(flags: dict[str, Any], *names: str) -> None:
    examples = {"kit": "--kit=kits/admin", "name": "--name=lesions", "rounds": "--rounds=100"}
    for name in names:
        if flags[name] in (None, ""):
            wanted = listed_with_and(f"--{each}" for each in names)
            raise UserError(f"--{name} is missing; expected {wanted}, such as "
                            f"{' '.join(examples[each] for each in names)}: see --help")


def make_request(flags: dict[str, Any], given: set[str]) -> StartRequest:
    """Return what `start` asks of the server: the flags that were given, and these only.

    Raises UserError for what is wrong whatever the data are; the server checks the rest.
    """
    for name, reason in _REFUSED.items():
        if name in given:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is given, but it {reason}: leave it out")
    _require(flags, "kit", "name", "rounds")
    refuse_kimg(flags["kimg"])
    parse_federation({**flags, "sites": None}, ("a", "b", "c"))  # the server knows the sites
    names: tuple[str, ...] | None = None
    if flags["metrics"] is not None:
        is_none = flags["metrics"].strip().lower() == "none"
        requests = () if is_none else parse_metrics(flags["metrics"])
        names = tuple(request.name for request in requests)
        for request in requests:
            choose_detector(request, flags["detector"])
    changed = {"metrics": names, "precision": None if flags["precision"] == "auto" else flags["precision"]}
    TrainOptions(**{field.name: changed.get(field.name, flags.get(field.name)) for field in fields(TrainOptions)
                    if field.name not in _REFUSED})
    settings = {name: flags[name] for name in ("name", "keep") if flags[name] is not None}
    RunSettings(outdir="runs", data="data", **settings)
    resume = flags["resume"]
    if resume not in (None, "noresume") and not resume.startswith("/"):
        raise UserError(f"--resume is {resume}; expected the absolute path of a network file at the server, such as "
                        "/data/network.safetensors, or noresume")
    sent = {name: flags[name] for name in flags if name in given and name not in ("kit", "name", "on_lost")}
    return StartRequest(name=flags["name"], flags=sent, token=uuid.uuid4().hex,
                        **{"on_lost": flags["on_lost"]} if flags["on_lost"] is not None else {})


# What `status` prints


def status_lines(found: dict[str, Any], *, detailed: bool) -> Iterator[str]:
    """Yield what `federate.py status` prints of `admin.status`. detailed: the sites of each run as well"""
    server = found["server"]
    version = f"NVIDIA FLARE {server['nvflare']}, " if server["nvflare"] else ""
    yield (f"{server['federation']}: server {server['host']}:{server['port']} ({version}up for "
           f"{format_seconds(server['seconds_up'])})")
    yield ""
    if server["sites"]:
        yield from format_table([["site", "last seen", "NVIDIA FLARE"], *(
            [name, f"{format_seconds(site['last_seen'])} ago", site["nvflare"] or "-"]
            for name, site in server["sites"].items())], left=(0, 1, 2))
    else:
        yield "No site is connected."
    yield ""
    if not found["runs"]:
        yield "No run has been started."
        return
    yield from format_table([["run", "state", "round", "left", "started", ""], *(
        [run["name"], run["state"], f"{run['round']}/{run['rounds']}" if run["rounds"] else "-",
         "-" if run["seconds_left"] is None else format_seconds(run["seconds_left"]),
         _show_time(datetime.fromisoformat(run["submitted"])), run["message"]] for run in found["runs"])],
        left=(0, 1, 4, 5))
    if detailed:
        for run in found["runs"]:
            yield from _run_lines(run)


def _run_lines(run: dict[str, Any]) -> Iterator[str]:
    """Yield folder, privacy and sites of a run."""
    yield ""
    if run["run"] is not None:
        yield f"folder at the server: {run['run']}"
    if run["epsilon"] is not None:
        yield f"differential privacy: epsilon {run['epsilon']:.3g} so far"
    if run["sites"]:
        yield ""
        rows = [["site", "state", "since", "kimg", "last round"]]
        for name, site in run["sites"].items():
            idle = run["state"] in admin.ENDED and site["state"] == admin.TRAINING  # when the run was stopped
            rows.append([name, "-" if idle else site["state"], _show_time(datetime.fromtimestamp(site["since"])),
                         f"{site['nimg'] / 1000:.1f}",
                         "-" if site["seconds"] is None else format_seconds(site["seconds"])])
        yield from format_table(rows, left=(0, 1, 2))


def _show_time(time: datetime) -> str:
    """Return a time as date and time here, to the minute."""
    return f"{time.astimezone():%Y-%m-%d %H:%M}"


def _progress(number: int, rounds: int | None) -> str:
    return f"round {number}" if rounds is None else f"round {number} of {rounds}"
