"""When a run's job is started anew: for sites that are back, not without end, nor by what an earlier job wrote."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

pytest.importorskip("nvflare", reason="the extra federated is not installed")

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, RunProcessKey

from federated.deployment import relaunch
from federated.deployment.job import RunProgress, ServerSettings, save_settings


class FakeServer:
    """NVIDIA FLARE's server with one job of the run "lesions" at a time; each registered site can be connected."""

    def __init__(self, kit):
        self.kit, self.now, self.jobs, self.cloned, self.stopped = kit, 1000.0, {}, [], []
        self.job_runner, self.job_def_manager, self.run_processes = self, self, {}
        self.client_manager = SimpleNamespace(clients={})

    def new_context(self):
        return nullcontext(SimpleNamespace(get_prop=self.get_prop, get_engine=lambda: self))

    def get_prop(self, key):
        if key == FLContextKey.EVENT_DATA:
            return {"job_id": self.ended}
        return SimpleNamespace(get_root_dir=lambda: str(self.kit))

    def connect(self, *names):
        self.client_manager.clients = {f"token of {name}": SimpleNamespace(name=name) for name in names}

    def begin(self, job, *sites):
        self.jobs[job] = {"name": "lesions", "job_id": job, "status": "RUNNING"}
        self.run_processes = {job: {RunProcessKey.PARTICIPANTS: [f"token of {name}" for name in sites]}}

    def get_job(self, job, fl_ctx):
        return SimpleNamespace(meta=self.jobs[job])

    def stop_run(self, job, fl_ctx):
        self.stopped.append(job)
        self.jobs[job]["status"] = "FINISHED:ABORTED"
        self.run_processes = {}

    def clone(self, job, meta, fl_ctx):
        self.cloned.append(job)
        return {**meta, "job_id": f"{job}+"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "local").mkdir()
    save_settings(tmp_path, ServerSettings(outdir="runs", sites=("a", "b")))
    server = FakeServer(tmp_path)
    monkeypatch.setattr(relaunch, "time", SimpleNamespace(monotonic=lambda: server.now, time=lambda: server.now))
    relauncher = relaunch.Relauncher()
    monkeypatch.setattr(relauncher, "_later", lambda work, *arguments, delay=0.0: work(*arguments))

    def send(event, job=None):
        server.ended = job
        with server.new_context() as fl_ctx:
            relauncher.handle_event(event, fl_ctx)

    server.send = send
    return server


def look(server):
    """Let a site register, whereupon the server looks for those that can take part again; return the stopped jobs."""
    before = len(server.stopped)
    server.send(EventType.CLIENT_REGISTER_PROCESSED)
    return server.stopped[before:]


def progress(server, job, number=1, members=None):
    found = RunProgress(server.kit, "lesions", job)
    found.begin_round(number, 9, {"a": 0, "b": 0}, None, members=members)
    return found


def test_job_is_started_anew_for_a_site_that_is_back(server):
    server.connect("a", "b")
    server.begin("1", "a")
    progress(server, "1")
    assert look(server) == ["1"]
    server.send(EventType.JOB_COMPLETED, "1")
    assert server.cloned == ["1"]


def test_site_that_fails_in_each_job_restarts_it_after_growing_delays(server):
    server.connect("a", "b")
    times, job = [], "1"
    server.begin(job, "a")
    progress(server, job)
    while server.now < 1000 + 700:
        if look(server):
            times.append(server.now - 1000)
            server.send(EventType.JOB_COMPLETED, job)
            job += "+"
            server.begin(job, "a")  # b's machine has refused it
            progress(server, job)
        server.now += 10
    assert times == [0, 30, 90, 210, 450]


def test_site_that_took_part_in_a_round_is_waited_for_no_longer_than_at_first(server):
    server.connect("a", "b")
    server.begin("1", "a")
    progress(server, "1", 1)
    assert look(server) == ["1"]
    server.send(EventType.JOB_COMPLETED, "1")
    server.begin("1+", "a", "b")
    progress(server, "1+", 2)
    assert look(server) == []
    server.begin("1+", "a")
    assert look(server) == ["1+"]


def test_job_is_not_started_anew_for_a_site_that_has_left_the_run(server):
    server.connect("a", "b")
    server.begin("1", "a")
    found = progress(server, "1", 1, members=["a"])
    assert look(server) == []
    found.begin_round(2, 9, {"a": 0}, None, members=["a", "b"])
    assert look(server) == ["1"]


def test_what_an_earlier_job_wrote_neither_stops_nor_drops_a_new_one(server):
    server.connect("a", "b")
    earlier = progress(server, "1")
    earlier.sites_are(["b"], "lost")
    earlier.change("finished", "")
    path = server.kit / "states" / "lesions.json"
    found = json.loads(path.read_text())
    found["sites"]["b"]["since"] = server.now - 100
    path.write_text(json.dumps(found))
    server.begin("2", "a", "b")
    assert look(server) == []
    server.begin("2", "a")
    assert look(server) == ["2"]
    server.send(EventType.JOB_COMPLETED, "2")
    assert server.cloned == ["2"]


def test_faults_are_counted_for_each_start(server):
    for start in ("1", "2"):
        job = start
        for _ in range(5):
            server.begin(job, "a", "b")
            progress(server, job)
            server.jobs[job]["status"] = "FINISHED:EXECUTION_EXCEPTION"
            before = len(server.cloned)
            server.send(EventType.JOB_COMPLETED, job)
            if len(server.cloned) == before:
                break
            job += "+"
        assert job == f"{start}+++"


def test_job_with_the_path_of_a_file_as_name_is_left_alone(server):
    (server.kit / "other.json").write_text("{}")
    server.connect("a", "b")
    server.begin("1", "a")
    server.jobs["1"]["name"] = "../other"
    assert look(server) == []
