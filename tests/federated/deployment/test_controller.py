"""How the server's controller judges what sites answer, with a stand-in for NVIDIA FLARE's engine."""

import json
from types import SimpleNamespace

import pytest

from dnnlib.cli import UserError
from tests.helpers.make_sets import make_set

pytest.importorskip("nvflare", reason="the controller is one of NVIDIA FLARE's, of the extra federated")

from nvflare.apis.signal import Signal

from federated.deployment import controller
from federated.deployment.executor import FACTS, FAILURE, UPDATE
from federated.deployment.job import RunProgress, ServerSettings, StartRequest, save_settings
from federated.deployment.plan import answer_questions, questions


@pytest.fixture
def rounds(tmp_path, monkeypatch):
    """The rounds of a run of the sites a and b, whose answers are set as `answers`."""
    (tmp_path / "local").mkdir()
    save_settings(tmp_path, ServerSettings(outdir="runs", sites=("a", "b")))
    clients = [SimpleNamespace(name=name) for name in "ab"]
    context = SimpleNamespace(get_engine=lambda: SimpleNamespace(get_clients=lambda: clients))
    made = SimpleNamespace(request=StartRequest(name="lesions", flags={"rounds": 1}, token="1"),
                           state=RunProgress(tmp_path, "lesions", "1"), get_client_disconnect_time=lambda name: None)
    found = controller._Rounds(made, tmp_path, Signal(), context)
    monkeypatch.setattr(found, "_ask", lambda data, task, note=None: {name: found.answers.get(name) for name in data})
    return found


@pytest.fixture
def facts(tmp_path):
    """The declared facts of three data sets."""
    return {name: declare(make_set(tmp_path / f"{name}.zip", size=16, images=range(first, first + 6)))
            for name, first in (("a", 0), ("b", 10), ("c", 20))}


def declare(path, **flags):
    text = json.dumps(questions(StartRequest(name="lesions", flags=flags)))
    return answer_questions(text, str(path), device="cpu").to_bytes()


def collect(rounds, a, b):
    rounds.answers = {"a": a, "b": b}
    return rounds._collect_facts()


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        collect(*arguments)
    return str(error.value)


def test_facts_of_a_site_that_is_missing_later_are_those_it_declared(rounds, facts):
    assert sorted(collect(rounds, {FACTS: facts["a"]}, {FACTS: facts["b"]})) == ["a", "b"]
    assert collect(rounds, {FACTS: facts["a"]}, None)["b"].to_bytes() == facts["b"]
    assert refusal(rounds, {FACTS: facts["a"]}, {FAILURE: "unsuitable"}) == (
        "site b cannot take part: its data or files do not suit the run; see its log")


def test_facts_that_were_declared_for_other_flags_do_not_count(rounds, facts):
    collect(rounds, {FACTS: facts["a"]}, {FACTS: facts["b"]})
    rounds.request.flags["mirror"] = True
    assert refusal(rounds, {FACTS: facts["a"]}, None) == "site b cannot take part: it is not connected; see its log"


def test_other_images_than_before_are_refused_with_what_to_do(rounds, facts):
    collect(rounds, {FACTS: facts["a"]}, {FACTS: facts["b"]})
    assert refusal(rounds, {FACTS: facts["a"]}, {FACTS: facts["c"]}) == (
        "the images of site b are not those that run lesions began with; expected the same: add --new, or choose "
        "another --name, to start another run")


@pytest.mark.parametrize("data", [b" " * (2**20 + 1), "text", None, 3])
def test_facts_are_bytes_and_not_many(rounds, facts, data):
    assert refusal(rounds, {FACTS: facts["a"]}, {FACTS: data}) == (
        "the facts that site b declares are refused: expected at most 1048576 bytes")


def test_update_that_is_too_large_is_refused_for_its_size(rounds, monkeypatch):
    monkeypatch.setattr(controller, "max_bytes", lambda agreement: 10)
    server = SimpleNamespace(messages=lambda number, new: {"a": b"", "b": b""}, schedule=None, agreement=None)
    rounds.answers = {"a": {UPDATE: b"x" * 10}, "b": {UPDATE: b"x" * 11}}
    assert rounds._ask_sites(server, 1, "plan", ()) == {
        "a": b"x" * 10, "b": "its update has 11 bytes; expected at most 10"}
    assert rounds.state.to_dict()["sites"]["b"]["state"] == "refused"
