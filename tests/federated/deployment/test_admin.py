"""What the admin's commands make of the answers of NVIDIA FLARE's session, and of its exceptions."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dnnlib.cli import UserError, run
from federated.deployment import admin, admin_command
from federated.deployment.admin import Server, final_state, last_error, log_entries, readable
from federated.deployment.admin_command import make_logs_command, make_status_command, make_stop_command
from federated.deployment.job import RUN_LOGGER, STATUS_LOGGER, RunProgress, StartRequest

pytest.importorskip("nvflare", reason="the extra federated is not installed")
api_spec = pytest.importorskip("nvflare.fuel.flare_api.api_spec")
ANSWER = {"run": "00000-lesions", "state": "training", "message": "", "round": 12, "rounds": 100,
          "seconds_left": 5400.0, "epsilon": 1.234, "sites": {
              "a": {"state": "training", "nimg": 60_000, "seconds": 71.2, "since": 1796120271.6},
              "b": {"state": "lost", "nimg": 0, "seconds": None, "since": 1796120300.0}}}


def entry(logger, message, level="INFO"):
    return json.dumps({"asctime": "2026-12-01 10:18:17,096", "name": logger.split(".")[-1], "fullName": logger,
                       "levelname": level, "message": message})


def log(*lines, final=None):
    found = [entry("nvflare.private.ServerRunner", "starting workflow"),
             *(entry(RUN_LOGGER, line) for line in lines)]
    return "\n".join([*found, *([] if final is None else [entry(STATUS_LOGGER, json.dumps(final))])]) + "\n"


class FakeSession:
    """NVIDIA FLARE's session with a server that has given jobs, oldest first."""

    def __init__(self, *jobs):
        self.jobs, self.logs, self.answers, self.fails, self.submitted, self.aborted = list(jobs), {}, {}, {}, [], []
        self.sites = {"a": 2.0}

    def close(self):
        print("bye")

    def list_jobs(self, detailed, reverse):
        self._fail("list_jobs")
        print("noise of NVIDIA FLARE")
        return [{"submit_time_iso": "2026-12-01T10:17:51+00:00", **job} for job in reversed(self.jobs)]

    def do_app_command(self, job, topic, data):
        assert topic == "run_status"
        if job not in self.answers:
            raise api_spec.NoReply("no result")
        return self.answers[job]

    def get_job_logs(self, job, target, log_file_name):
        self._fail("get_job_logs")
        assert (target, log_file_name) == ("server", "log.json")
        found = self.logs.get(job)
        return {"logs": {} if found is None else {"server": found}}

    def check_status(self, target):
        now = time.time()
        return {"server_start_time": now - 3725, "clients": [
            {"client_name": name, "client_last_conn_time": now - seconds} for name, seconds in self.sites.items()]}

    def report_version(self, target):
        self._fail("report_version")
        return {"server": {"version": "2.9.0"}, "a": {"version": "2.9.1"}}

    def submit_job(self, folder):
        self._fail("submit_job")
        self.submitted.append((Path(folder).name, sorted(path.name for path in Path(folder).iterdir())))
        return "new"

    def abort_job(self, job):
        self._fail("abort_job")
        self.aborted.append(job)
        self.jobs = [{**each, "status": "FINISHED:ABORTED"} if each["job_id"] == job else each for each in self.jobs]

    def _fail(self, method):
        if method in self.fails:
            raise self.fails[method]


def job(name, identifier, status, **facts):
    return {"name": name, "job_id": identifier, "status": status, **facts}


@pytest.fixture
def connect(monkeypatch, tmp_path):
    """Return the function that lets the commands reach a session."""
    def call(session):
        kit = SimpleNamespace(name="admin", host="fl.example.org", port=8002, federation="lesions", path=tmp_path)
        monkeypatch.setattr(admin, "check_connection", lambda kit: None)
        monkeypatch.setattr("nvflare.fuel.flare_api.flare_api.new_secure_session", lambda *_, **__: session)
        monkeypatch.setattr(admin_command, "read_kit", lambda path, kind: kit)
        monkeypatch.setattr(admin.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(admin, "_SETTLE_SECONDS", 0)
        return Server(kit)
    return call


@pytest.fixture
def hour_ahead(monkeypatch):
    """Let local time be an hour ahead of UTC."""
    monkeypatch.setenv("TZ", "XYZ-1")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def call(command, capsys, *arguments):
    code = run(command(), list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# States


@pytest.mark.parametrize(("status", "facts", "state", "message"), [
    ("SUBMITTED", {}, "queued", ""),
    ("SUBMITTED", {"schedule_count": 3}, "queued", "waiting for a site: none is connected"),
    ("DISPATCHED", {}, "starting", ""), ("RUNNING", {}, "starting", ""), ("FINISHED:COMPLETED", {}, "finished", ""),
    ("FINISHED:ABORTED", {}, "stopped", ""), ("FINISHED:EXECUTION_EXCEPTION", {}, "failed", "ValueError: boom"),
    ("FINISHED:CAN_NOT_SCHEDULE", {}, "failed", "ValueError: boom")])
def test_state_of_a_job_whose_controller_says_nothing_is_that_of_the_job(connect, status, facts, state, message):
    session = FakeSession(job("r", "1", status, **facts))
    session.logs["1"] = entry("nvflare.x", "ValueError: boom\nmore", "ERROR")
    with connect(session) as server:
        found = server.find("r")
    assert (found.state, found.message, found.run) == (state, message, None)


def test_run_that_waits_for_another_names_it(connect):
    with connect(FakeSession(job("first", "1", "RUNNING"), job("second", "2", "SUBMITTED"))) as server:
        assert server.find("second").message == "waiting for the end of run first"


def test_running_job_is_asked_and_an_ended_one_read_from_its_log(connect):
    session = FakeSession(job("r", "1", "RUNNING"), job("old", "0", "FINISHED:COMPLETED"))
    session.answers["1"] = {**ANSWER, "unknown": 1}
    session.logs["0"] = log("round 1", final={**ANSWER, "state": "refused", "message": "site b: other classes"})
    with connect(session) as server:
        running, ended = server.find("r"), server.find("old")
    assert (running.state, running.round, running.rounds, running.seconds_left) == ("training", 12, 100, 5400.0)
    assert running.absent == ["b"]
    assert (ended.state, ended.message, ended.round) == ("refused", "site b: other classes", 12)


def test_job_that_is_ending_has_the_state_that_its_log_ends_with(connect):
    session = FakeSession(job("r", "1", "RUNNING"))
    session.logs["1"] = log("round 1", final={**ANSWER, "state": "finished"})
    with connect(session) as server:
        assert server.find("r").state == "finished"


@pytest.mark.parametrize("status", ["FINISHED:COMPLETED", "FINISHED:ABORTED"])
def test_job_that_was_ended_from_outside_is_stopped_after_its_round(connect, status):
    session = FakeSession(job("r", "1", status))
    session.logs["1"] = log("round 1", final=ANSWER)
    with connect(session) as server:
        found = server.find("r")
    assert (found.state, found.may_restart, found.round, found.run) == ("stopped", True, 12, "00000-lesions")
    assert found.seconds_left is None


def test_newest_job_of_each_name_counts(connect):
    session = FakeSession(job("r", "1", "FINISHED:ABORTED"), job("s", "2", "FINISHED:ABORTED"),
                          job("r", "3", "RUNNING"))
    with connect(session) as server:
        assert [(each.name, each.job) for each in server.runs()] == [("r", "3"), ("s", "2")]


def test_submitted_job_holds_no_code(connect):
    session = FakeSession()
    with connect(session) as server:
        assert server.submit(StartRequest(name="lesions")) == "new"
    assert session.submitted == [("lesions", ["app", "meta.json"])]


# Commands


def test_status_shows_server_sites_and_runs(connect, capsys):
    session = FakeSession(job("old", "1", "FINISHED:COMPLETED"), job("lesions", "2", "RUNNING"))
    session.answers["2"] = ANSWER
    connect(session)
    code, out, err = call(make_status_command, capsys, "--kit=kit")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "lesions: server fl.example.org:8002 (NVIDIA FLARE 2.9.0, up for 1:02:05)"
    assert lines[2:4] == ["site  last seen  NVIDIA FLARE", "a     0:02 ago   2.9.1"]
    assert [line.split()[:4] for line in lines[6:]] == [["lesions", "training", "12/100", "1:30:00"],
                                                        ["old", "finished", "-", "-"]]
    assert len(lines) == 8


def test_status_of_a_run_shows_its_sites(connect, capsys, hour_ahead):
    session = FakeSession(job("lesions", "2", "RUNNING"))
    session.answers["2"] = ANSWER
    connect(session)
    _, out, _ = call(make_status_command, capsys, "--kit=kit", "--name=lesions")
    assert out.splitlines()[-6:] == [
        "folder at the server: 00000-lesions", "differential privacy: epsilon 1.23 so far", "",
        "site  state     since             kimg  last round", "a     training  2026-12-01 11:17  60.0        1:11",
        "b     lost      2026-12-01 11:18   0.0           -"]


def test_status_as_json_has_everything(connect, capsys):
    session = FakeSession(job("lesions", "2", "RUNNING"))
    session.answers["2"] = {**ANSWER, "state": "waiting"}
    session.fails["report_version"] = api_spec.AuthorizationError("no")
    connect(session)
    found = json.loads(call(make_status_command, capsys, "--kit=kit", "--json")[1])
    assert found["server"] == {**found["server"], "federation": "lesions", "host": "fl.example.org", "port": 8002,
                               "nvflare": None}
    assert found["server"]["sites"]["a"]["last_seen"] == pytest.approx(2, abs=1)
    assert found["runs"] == [{**ANSWER, "name": "lesions", "job": "2", "submitted": "2026-12-01T10:17:51+00:00",
                              "state": "waiting", "message": "waiting for b, which is not connected",
                              "may_restart": False}]


def test_status_without_sites_and_runs(connect, capsys):
    session = FakeSession()
    session.sites = {}
    connect(session)
    assert call(make_status_command, capsys, "--kit=kit")[1].splitlines()[2:] == [
        "No site is connected.", "", "No run has been started."]


def test_stop_ends_the_newest_job_and_says_how_to_continue(connect, capsys):
    session = FakeSession(job("r", "1", "FINISHED:ABORTED"), job("r", "2", "RUNNING"))
    connect(session)
    assert call(make_stop_command, capsys, "--kit=kit", "--name=r") == (
        0, "r is stopped. Its last complete round remains at the server; the same federate.py start continues it\n", "")
    assert session.aborted == ["2"]


def test_stop_also_stops_the_job_by_which_the_server_starts_the_run_anew(connect, monkeypatch, capsys):
    session = FakeSession(job("r", "1", "RUNNING"))
    connect(session)
    looks = []

    def look(seconds):  # the server has ended job 1 by itself, for a site that is back
        looks.append(seconds)
        if len(looks) == 1:
            session.jobs.append(job("r", "2", "SUBMITTED"))

    monkeypatch.setattr(admin.time, "sleep", look)
    code, out, _ = call(make_stop_command, capsys, "--kit=kit", "--name=r")
    assert (code, session.aborted) == (0, ["1", "2"])
    assert out.startswith("r is stopped.")


def test_stop_leaves_an_ended_run_alone(connect, capsys):
    session = FakeSession(job("r", "1", "FINISHED:COMPLETED"))
    connect(session)
    assert call(make_stop_command, capsys, "--kit=kit", "--name=r") == (
        0, "r is not running: it is finished\n", "")
    assert session.aborted == []


@pytest.mark.parametrize(("flags", "lines"), [
    ((), ["round 1", "round 2", "round 3"]), (("--tail=2",), ["round 2", "round 3"]), (("--tail=0",), []),
    (("--tail=9",), ["round 1", "round 2", "round 3"])])
def test_logs_prints_the_lines_of_the_run(connect, capsys, flags, lines):
    session = FakeSession(job("r", "1", "FINISHED:COMPLETED"))
    session.logs["1"] = log("round 1", "round 2", "round 3", final={**ANSWER, "state": "finished"})
    connect(session)
    assert call(make_logs_command, capsys, "--kit=kit", "--name=r", *flags)[1].splitlines() == lines


def test_logs_follows_a_run_to_its_end_and_through_a_newer_job(connect, monkeypatch):
    session = FakeSession(job("r", "1", "RUNNING"))
    session.logs["1"] = log("round 1", "round 1")

    def second():
        session.logs["1"] = log("round 1", "round 1", "round 2")

    def third():
        session.jobs[0]["status"] = "FINISHED:ABORTED"
        session.jobs.append(job("r", "2", "RUNNING"))
        session.logs["2"] = log("continues", "round 3")

    def fourth():
        session.jobs[1]["status"] = "FINISHED:COMPLETED"
        session.logs["2"] = log("continues", "round 3", "finished", final={**ANSWER, "state": "finished"})

    def aborted():
        session.jobs[0]["status"] = "FINISHED:ABORTED"

    changes = iter([second, aborted, third, fourth])
    with connect(session) as server:
        monkeypatch.setattr(admin.time, "sleep", lambda seconds: next(changes)())
        assert list(admin.log_lines(server, "r", tail=1, follow=True)) == [
            "round 1", "round 2", "continues", "round 3", "finished"]


@pytest.mark.parametrize("command", [make_status_command, make_stop_command, make_logs_command])
def test_unknown_run_is_refused_with_the_nearest_name(connect, capsys, command):
    connect(FakeSession(job("lesions", "1", "RUNNING"), job("other", "2", "RUNNING")))
    assert call(command, capsys, "--kit=kit", "--name=lesion") == (
        2, "", "error: --name is lesion, which is not a run of this server (did you mean lesions?); expected one of "
        "other, lesions\n")


@pytest.mark.parametrize("command", [make_stop_command, make_logs_command])
def test_missing_name_is_refused(capsys, command):
    assert call(command, capsys, "--kit=kit") == (
        2, "", "error: --name is missing; expected --kit and --name, such as --kit=kits/admin --name=lesions: see "
        "--help\n")


def test_negative_tail_is_refused(capsys):
    assert call(make_logs_command, capsys, "--kit=kit", "--name=r", "--tail=-1") == (
        2, "", "error: --tail is -1; expected a number of lines >= 0\n")


# Failures of the session


@pytest.mark.parametrize(("error", "message"), [
    (api_spec.NoConnection("x"), "the server fl.example.org:8002 does not answer; expected a running federate.py "
     "server: check that it runs, then see federate.py status"),
    (api_spec.SessionExpired("idle"), "the server fl.example.org:8002 closed the connection: run the same command "
     "again"),
    (api_spec.AuthorizationError("x"), "admin is not allowed to stop a run at fl.example.org:8002; expected the kit of "
     "an admin whom the server's policy allows it"),
    (api_spec.InternalError("server internal error:\nboom"), "the server fl.example.org:8002 could not stop a run: "
     "server internal error: boom")])
def test_failure_of_the_session_is_one_line(connect, capsys, error, message):
    session = FakeSession(job("r", "1", "RUNNING"))
    session.fails["abort_job"] = error
    connect(session)
    assert call(make_stop_command, capsys, "--kit=kit", "--name=r") == (2, "", f"error: {message}\n")


@pytest.mark.parametrize("refusal", ["authentication", "registration"])
def test_refused_certificate_is_one_line(connect, monkeypatch, capsys, tmp_path, refusal):
    from nvflare.apis.fl_exception import FLCommunicationError

    errors = {"authentication": api_spec.AuthenticationError("Incorrect user name or password"),
              "registration": FLCommunicationError("error:client_registration")}

    def refuse(*_, **__):
        raise errors[refusal]

    connect(FakeSession())
    monkeypatch.setattr("nvflare.fuel.flare_api.flare_api.new_secure_session", refuse)
    code, _, err = call(make_status_command, capsys, "--kit=kit")
    assert code == 2
    assert err == (f"error: the server fl.example.org:8002 does not accept the certificate of {tmp_path} "
                   f"({errors[refusal]}); expected a valid kit of this federation: ask whoever provisions it\n")


def test_server_that_is_not_there_is_named(monkeypatch):
    kit = SimpleNamespace(host="fl.example.org", port=8002)
    monkeypatch.setattr(admin, "probe_server", lambda kit: "connection refused")
    with pytest.raises(UserError) as caught:
        admin.check_connection(kit)
    assert str(caught.value) == (
        "the server fl.example.org:8002 cannot be reached (connection refused); expected a running federate.py server: "
        "check that it runs, and that firewalls let port 8002 pass")


# Logs


def test_log_shows_lines_of_the_run_and_errors_and_skips_what_was_cut():
    text = ('time": "x"}\n' + log("round 1\nround 2", "")
            + entry("nvflare.private.Runner", "no such class", "ERROR") + "\n" + entry("nvflare.x", "odd", "WARNING"))
    assert readable(log_entries(text)) == ["round 1", "round 2", "", "NVIDIA FLARE: Runner: no such class"]


def test_log_does_not_show_that_an_admin_asked_before_the_run_could_answer():
    text = log("round 1") + entry("nvflare.private.AppCommandProcessor", "no app command func for topic run_status",
                                  "ERROR")
    assert readable(log_entries(text)) == ["round 1"]
    assert last_error(log_entries(text)) == ""


def test_run_that_has_ended_has_no_time_left(tmp_path):
    progress = RunProgress(tmp_path, "lesions", "job")
    progress.begin_round(3, 3, {"a": 0}, 150.0)
    assert RunProgress.read(tmp_path, "lesions")["seconds_left"] == 150
    progress.change("finished", "finished after 3 rounds")
    assert RunProgress.read(tmp_path, "lesions")["seconds_left"] is None


def test_final_state_is_the_last_one_and_not_what_other_lines_look_like():
    last = {**ANSWER, "state": "stopped"}
    forged = json.dumps({**ANSWER, "state": "refused"})
    text = log(final=ANSWER) + log(final=last) + entry(RUN_LOGGER, forged) + "\n" + entry("nvflare.x", forged)
    assert final_state(log_entries(text)) == last
    assert final_state(log_entries(log("round 1"))) is None


def test_last_error_is_its_first_line():
    text = "\n".join([entry("a", "one", "ERROR"), entry("b", "two\nmore", "CRITICAL"), entry("c", "three")])
    assert last_error(log_entries(text)) == "two"
    assert last_error(log_entries(log("round 1"))) == ""
