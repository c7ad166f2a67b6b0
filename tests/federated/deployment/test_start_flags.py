"""federate.py start: its flags, what is refused before the server is asked, what travels, and what it waits for."""

import json

import pytest

from dnnlib.cli import UserError, run
from federated.command import FLAGS as SIMULATE_FLAGS
from federated.deployment import admin, admin_command
from federated.deployment.admin import RunState
from federated.deployment.admin_command import START_FLAGS, make_start_command
from federated.deployment.job import read_request, write_job

BASE = ("--kit=kit", "--name=lesions", "--rounds=3")


class FakeServer:
    """A server whose run passes through given states, one at each look."""

    def __init__(self, states=(), before=None):
        self.states, self.before, self.requests = list(states), before, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def look_for(self, name):
        return self.before, []

    def submit(self, request):
        self.requests.append(request)
        return "job"

    def find(self, name):
        found = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(found, BaseException):
            raise found
        return found


def state(name, **facts):
    return RunState(name="lesions", job=facts.pop("job", "job"), state=name, submitted="", **facts)


TRAINS = (state("training", round=1, rounds=3, run="00000-lesions"),)


@pytest.fixture
def start(monkeypatch, capsys):
    """Run the command at a server with given states; returns exit code, standard output, error, and the server."""
    def call(*arguments, states=TRAINS, before=None):
        server = FakeServer(states, before)
        monkeypatch.setattr(admin, "Server", lambda kit: server)
        monkeypatch.setattr(admin_command, "read_kit", lambda path, kind: path)
        monkeypatch.setattr(admin.time, "sleep", lambda seconds: None)
        code = run(make_start_command(), list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err, server
    return call


# Flags


def test_flags_are_those_of_the_simulation_without_what_belongs_to_machine_and_kit():
    mine, simulate = ({flag.name for flag in flags} for flags in (START_FLAGS, SIMULATE_FLAGS))
    assert mine - simulate == {"kit", "name", "on_lost"} - simulate
    assert simulate - mine == {
        "data", "outdir", "sites", "gpus", "device", "workers", "tune_malloc", "holdout", "valid", "detector_weights",
        "share_statistics", "dry_run", "max_hours"}
    assert len(mine) == len(START_FLAGS)
    hidden = {flag.name for flag in make_start_command().params if flag.hidden}
    assert hidden == (simulate - mine) | {"kimg"}


def test_only_given_flags_travel_as_json(start, tmp_path):
    flags = ["--cond=1", "--cfg=tiny", "--join=b:2,c:3", "--metrics=kid5k_full", "--metrics=fid5k_full",
             "--on-lost=wait", "--precision=auto", "--resume=/net.safetensors"]
    code, _, _, server = start(*BASE, *flags)
    assert code == 0
    write_job(tmp_path / "job", server.requests[0])
    config = json.loads((tmp_path / "job" / "app" / "config" / "config_fed_server.json").read_text())
    request = read_request(config["workflows"][0]["args"]["request"])
    assert (request.name, request.on_lost) == ("lesions", "wait")
    assert request.flags == {"rounds": 3, "cond": True, "cfg": "tiny", "join": ("b:2", "c:3"), "precision": "auto",
                             "metrics": "kid5k_full,fid5k_full", "resume": "/net.safetensors"}


def test_default_travels_only_if_it_is_typed(start):
    assert start(*BASE)[3].requests[0].flags == {"rounds": 3}
    assert start(*BASE, "--balance=none")[3].requests[0].flags == {"rounds": 3, "balance": "none"}


MISSING = "expected --kit, --name and --rounds, such as --kit=kits/admin --name=lesions --rounds=100: see --help"


@pytest.mark.parametrize(("arguments", "message"), [
    (("--name=r", "--rounds=3"), f"--kit is missing; {MISSING}"),
    (("--kit=k", "--rounds=3"), f"--name is missing; {MISSING}"),
    (("--kit=k", "--name=r"), f"--rounds is missing; {MISSING}"),
    (("--kit=k", "--rounds=3", "--name=../r"), "--name is '../r'; expected letters, digits, '.', '_' and '-', starting "
     "with a letter or digit"),
    (("--kit=k", "--name=r", "--rounds=0"), "--rounds is 0; expected a number >= 1"),
    ((*BASE, "--kimg=5"), "--kimg is 5; expected --rounds and --round-kimg, which set the length of the training: "
     "leave --kimg out"),
    (("--data=a.zip",), "--data is given, but it belongs to federate.py site: leave it out"),
    ((*BASE, "--detector-weights=a.pt"), "--detector-weights is given, but it belongs to federate.py server: leave it "
     "out"),
    ((*BASE, "--sites=a,b"), "--sites is given, but it belongs to federate.py provision: leave it out"),
    ((*BASE, "--share-statistics"), "--share-statistics is given, but it would let statistics of images "
     "leave the sites; they share networks only: leave it out"),
    ((*BASE, "--share=D"), "--share is 'D'; expected one of G,D, G"),
    ((*BASE, "--round-kimg=0"), "--round-kimg is 0.0; expected a number > 0"),
    ((*BASE, "--server-lr=0.5"), "--server-lr is 0.5 with --server-optimizer=fedavg; expected fedavgm or fedadam: set "
     "it, or leave --server-lr out"),
    ((*BASE, "--batch=0"), "--batch is 0; expected a number >= 1"),
    ((*BASE, "--aug=fixed"), "--aug is fixed without --p; expected a probability: add --p=0.2, for example"),
    ((*BASE, "--resume-classes=new"), "--resume-classes is new without --resume; expected a network to start from: "
     "add --resume, or leave --resume-classes out"),
    ((*BASE, "--fp32=1", "--precision=fp16"), "--precision is fp16 with --fp32=true; expected the two to agree: leave "
     "--fp32 out"),
    ((*BASE, "--keep=0"), "--keep is 0; expected a number >= 1"),
    ((*BASE, "--max-hours=1"), "--max-hours is given, but it limits one program, and a run has one on each machine; "
     "federate.py stop ends it: leave it out"),
    ((*BASE, "--metrics=kid5,kid5"), "--metrics names kid5 2 times; expected each metric once"),
    ((*BASE, "--resume=net.safetensors"), "--resume is net.safetensors; expected the absolute path of a network file "
     "at the server, such as /data/network.safetensors, or noresume"),
    ((*BASE, "--balance=weights.csv"), "Invalid value for '--balance': 'weights.csv' is not one of 'none', 'classes'."),
    ((*BASE, "--on-lost=stop"), "Invalid value for '--on-lost': 'stop' is not one of 'continue', 'wait'."),
])
def test_mistake_is_found_before_the_server_is_asked(start, arguments, message):
    code, out, err, server = start(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert server.requests == []


@pytest.mark.parametrize("metric", ["fid_ful", "kid"])
def test_unknown_metric_is_refused_with_examples(start, metric):
    code, _, err, _ = start(*BASE, f"--metrics={metric}")
    assert code == 2
    assert err.startswith(f"error: metric '{metric}' is not known; expected names such as fid2k_full, ")


def test_unknown_detector_is_refused(start):
    code, _, err, _ = start(*BASE, "--metrics=kid5k_full", "--detector=resnet")
    assert code == 2
    assert err.startswith("error: detector 'resnet' is not known; expected one of ")


# Waiting


ABSENT = {"a": {"state": "training"}, "b": {"state": "absent"}, "c": {"state": "absent"}}


def test_start_prints_each_thing_it_waits_for_once_and_then_that_the_run_trains(start):
    code, out, err, _ = start(*BASE, states=[
        state("queued", message="waiting for the end of run other"),
        state("queued", message="waiting for the end of run other"), state("starting"),
        state("waiting", sites=ABSENT, rounds=3), state("waiting", sites=ABSENT, rounds=3),
        state("waiting", sites={**ABSENT, "b": {"state": "done"}}, rounds=3),
        state("training", round=1, rounds=3, run="00000-lesions")])
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "lesions: waiting for the end of run other", "lesions: the run is starting",
        "lesions: waiting for b and c, which are not connected", "lesions: waiting for c, which is not connected",
        "lesions trains: round 1 of 3, in 00000-lesions at the server"]


@pytest.mark.parametrize(("last", "message"), [
    (state("refused", message="site b: its classes are nevus, melanoma; expected melanoma, nevus"),
     "run lesions was refused: site b: its classes are nevus, melanoma; expected melanoma, nevus"),
    (state("stopped", message="stopped by an admin"), "run lesions was stopped: stopped by an admin"),
    (state("failed", message="boom"), "run lesions failed: boom; see federate.py logs")])
def test_run_that_ends_before_it_trains_gives_one_line(start, last, message):
    code, out, err, _ = start(*BASE, states=[state("starting"), last])
    assert (code, out, err) == (2, "lesions: the run is starting\n", f"error: {message}\n")


def test_job_that_the_server_replaces_is_waited_for(start):
    ended = state("stopped", may_restart=True)
    code, out, err, _ = start(*BASE, states=[state("waiting", message="waits for b"), ended, ended,
                                             state("queued", job="second"), TRAINS[0]])
    assert (code, err) == (0, "")
    assert out.splitlines() == ["lesions: waits for b", "lesions: waiting for the server to start the run",
                                "lesions trains: round 1 of 3, in 00000-lesions at the server"]


def test_run_that_is_stopped_while_it_waits_ends_start(start, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(admin.time, "monotonic", lambda: next(clock))
    code, _, err, _ = start(*BASE, states=[state("starting"), state("stopped", may_restart=True)])
    assert (code, err) == (2, "error: run lesions was stopped: see federate.py logs\n")


def test_server_that_is_lost_while_a_run_waits_gives_one_line(start):
    code, out, err, _ = start(*BASE, states=[state("starting"), UserError("the server h:1 does not answer")])
    assert (code, out) == (2, "lesions: the run is starting\n")
    assert err == "error: run lesions was handed to the server, but the server h:1 does not answer\n"


def test_interrupted_start_says_that_the_run_stays(start):
    code, out, err, _ = start(*BASE, states=[state("starting"), KeyboardInterrupt()])
    assert (code, err) == (130, "error: interrupted\n")
    assert out.splitlines()[-1] == "lesions: stays at the server; federate.py stop ends it"


def test_finished_run_is_left_alone(start):
    code, out, _, _ = start(*BASE, states=[state("finished", round=3, rounds=3)])
    assert (code, out) == (0, "lesions is finished: round 3 of 3; a larger --rounds continues it\n")


def test_run_that_is_running_is_refused_and_not_started_again(start):
    code, _, err, server = start(*BASE, before=state("training", round=2, rounds=3))
    assert code == 2
    assert err == ("error: --name is lesions, a run that is training already; expected one that is not running: wait "
                   "for its end, stop it with federate.py stop, or choose another name\n")
    assert server.requests == []


def test_run_that_has_ended_is_started_again(start):
    code, _, _, server = start(*BASE, before=state("stopped"))
    assert (code, len(server.requests)) == (0, 1)


def test_start_gives_up_on_a_job_that_never_answers(start, monkeypatch):
    clock = iter(range(0, 100_000, 50))
    monkeypatch.setattr(admin.time, "monotonic", lambda: next(clock))
    with pytest.raises(UserError, match="has been starting for 300 seconds without an answer"):
        admin.start(FakeServer([state("starting")]), type("Request", (), {"name": "lesions"})(), lambda line: None)
