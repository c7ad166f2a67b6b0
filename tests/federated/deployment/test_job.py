"""What the server takes from a job, whoever wrote it, and what it keeps of a run for later jobs."""

import base64
import json

import pytest

from federated.deployment.job import RunProgress, StartRequest, is_run_name, read_request, write_job

REQUEST = {"name": "lesions", "flags": {"rounds": 3}, "token": "1", "on_lost": "wait"}


def encoded(**changed):
    return base64.b64encode(json.dumps({**REQUEST, **changed}).encode()).decode()


def test_request_comes_back_and_holds_nothing_that_nvflare_replaces(tmp_path):
    request = StartRequest(name="lesions", flags={"resume": "{$HOME}"}, token="1")
    write_job(tmp_path / "job", request)
    text = (tmp_path / "job" / "app" / "config" / "config_fed_server.json").read_text()
    assert "$" not in text
    assert read_request(json.loads(text)["workflows"][0]["args"]["request"]) == request


@pytest.mark.parametrize("text", [
    json.dumps(REQUEST), "{$PATH}", "", encoded(name="../../startup/x"), encoded(name=["lesions"]), encoded(name=""),
    encoded(flags=[]), encoded(token=None), encoded(on_lost="stop"), encoded(more=1)])
def test_what_is_not_a_request_is_refused(text):
    with pytest.raises(ValueError):
        read_request(text)


def test_controller_refuses_flags_that_start_does_not_have():
    pytest.importorskip("nvflare", reason="the extra federated is not installed")
    from federated.deployment.controller import RoundsController

    assert RoundsController(encoded()).request.flags == {"rounds": 3}
    with pytest.raises(ValueError) as error:
        RoundsController(encoded(flags={"rounds": 3, "outdir": "/etc", "max_hours": 1}))
    assert str(error.value) == "federate.py start does not have max_hours, outdir"


@pytest.mark.parametrize("name", ["../lesions", "/lesions", ".lesions", "a/b", "", None, "a\n"])
def test_name_that_leads_out_of_a_folder_is_not_that_of_a_run(name):
    assert not is_run_name(name)


def test_facts_are_kept_for_the_questions_that_were_asked(tmp_path):
    progress = RunProgress(tmp_path, "lesions", "1")
    assert progress.load_facts({"cond": True}) == {}
    progress.save_facts({"a": b"{}"}, {"cond": True})
    later = RunProgress(tmp_path, "lesions", "2")
    assert later.load_facts({"cond": True}) == {"a": b"{}"}
    assert later.load_facts({"cond": False}) == {}


def test_state_of_a_job_that_has_written_none_is_waiting(tmp_path):
    assert RunProgress.read(tmp_path, "lesions", "1") is None
    RunProgress(tmp_path, "lesions", "1").change("finished", "")
    assert RunProgress.read(tmp_path, "lesions", "1")["state"] == "finished"
    assert RunProgress.read(tmp_path, "lesions", "2")["state"] == "waiting"
