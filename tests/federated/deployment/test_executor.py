"""The filter of what leaves a site, with NVIDIA FLARE's classes: what was not agreed on is replaced by a word."""

import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.federated_states import Round, forged

pytest.importorskip("nvflare", reason="the executor is one of NVIDIA FLARE's, of the extra federated")

from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from federated.deployment.executor import FACTS, FAILURE, FAILURES, UPDATE, OutgoingFilter, SiteExecutor
from federated.deployment.job import DECLARE, TRAIN, ServerSettings, SiteSettings, StartRequest, save_settings
from federated.deployment.plan import DeclaredFacts, SitePlan, plan_run, questions
from federated.privacy import SentUpdate, epsilon_spent, save_sent_updates
from metrics.names import choose_metrics
from tests.helpers.make_sets import make_set
from tests.helpers.simulate_commands import isolate

REFUSED = {FAILURE: "refused"}


@pytest.fixture(scope="module")
def wire():
    return Round()


@pytest.fixture
def context():
    context = FLContext()
    context.put(ReservedKey.IDENTITY_NAME, "b", private=False, sticky=False)
    return context


@pytest.fixture
def outgoing(wire, context, monkeypatch, caplog):
    """The filter of site b as a function: answer -> what leaves the site, and its log."""
    monkeypatch.setattr(SiteExecutor, "current", SimpleNamespace(agreement=wire.agreement))
    caplog.set_level(logging.ERROR)

    def leaves(content, headers=None):
        caplog.clear()
        answer = content if isinstance(content, Shareable) else Shareable()
        if not isinstance(content, Shareable):
            answer.update(content)
        for name, value in (headers or {}).items():
            answer.set_header(name, value)
        found = OutgoingFilter().process(answer, context)
        assert found is not answer
        return {key: value for key, value in found.items() if key != "__headers__"}, found.get("__headers__")

    return leaves


def test_update_leaves_unchanged(outgoing, wire, caplog):
    assert outgoing({UPDATE: wire.up}) == ({UPDATE: wire.up}, {})
    assert caplog.text == ""


def test_word_of_a_failure_leaves(outgoing):
    for word in FAILURES:
        assert outgoing({FAILURE: word}) == ({FAILURE: word}, {})


@pytest.mark.parametrize(("tensors", "reason"), [
    ({"G.extra": torch.zeros(1)}, 'the tensor "G.extra" is not among those that were agreed'),
    ({"G.mapping.w_avg": torch.zeros(8, dtype=torch.float64)}, 'the tensor G.mapping.w_avg is "F64"; expected float32'),
    ({"G.synthesis.b4.const": torch.zeros(4, 4)}, "the tensor G.synthesis.b4.const has the shape [4, 4]; expected"),
    ({"G.synthesis.b4.const": torch.full([4, 4, 4], torch.nan)},
     "the tensor G.synthesis.b4.const has values that are not finite"),
])
def test_other_tensors_stay_and_the_reason_is_in_the_log_of_the_site(outgoing, wire, caplog, tensors, reason):
    assert outgoing({UPDATE: forged(wire.up, tensors=tensors)}) == (REFUSED, {})
    assert f"an answer that was not agreed on does not leave this site: {reason}" in caplog.text


@pytest.mark.parametrize("content", [
    {"note": "Ann"}, {FAILURE: "/home/ann/lesions.zip"}, {FACTS: b"lesion-of-Ann.png"}, {FACTS: "Ann"},
    {UPDATE: b"Ann"}, {}])
def test_anything_else_stays(outgoing, content):
    assert outgoing(content) == (REFUSED, {})


def test_further_keys_stay(outgoing, wire):
    assert outgoing({UPDATE: wire.up, "note": "Ann"}) == (REFUSED, {})
    assert outgoing({UPDATE: wire.up, FAILURE: "failed"}) == (REFUSED, {})


def test_headers_stay(outgoing, wire):
    assert outgoing({UPDATE: wire.up}, {"note": "Ann", "error": "/home/ann"}) == ({UPDATE: wire.up}, {})


def test_update_of_another_site_stays(outgoing, wire, caplog):
    assert outgoing({UPDATE: forged(wire.up, lambda header: header.update(site="c"))}) == (REFUSED, {})
    assert 'site is "c"; expected "b"' in caplog.text


def test_update_before_the_first_round_stays(outgoing, wire, monkeypatch):
    for current in (None, SimpleNamespace(agreement=None)):
        monkeypatch.setattr(SiteExecutor, "current", current)
        assert outgoing({UPDATE: wire.up}) == (REFUSED, {})


def test_failure_of_nvidia_flare_becomes_a_word(outgoing):
    assert outgoing(make_reply(ReturnCode.EXECUTION_EXCEPTION, {"error": "/home/ann"})) == ({FAILURE: "failed"}, {})


# The executor


@pytest.fixture
def ask(tmp_path, context, monkeypatch):
    """An executor of site b as a function: name and content of a task -> its answer."""
    monkeypatch.setattr(SiteExecutor, "current", None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("multiprocessing.set_start_method", lambda *_, **__: None)
    (tmp_path / "local").mkdir()
    make_set(tmp_path / "lesions-of-Ann.zip", size=16)
    settings = SiteSettings(data=str(tmp_path / "lesions-of-Ann.zip"), outdir=str(tmp_path / "states"), device="cpu")
    save_settings(tmp_path, settings)
    context.put(FLContextKey.WORKSPACE_OBJECT, SimpleNamespace(get_root_dir=lambda: str(tmp_path)), private=True,
                sticky=False)
    executor = SiteExecutor()

    def answer(task, content):
        request = Shareable()
        request.update(content)
        return executor.execute(task, request, context, Signal())

    return answer


QUESTIONS = questions(StartRequest(name="r"))


def content_of(answer):
    return {key: value for key, value in answer.items() if key != "__headers__"}


def test_facts_are_declared_and_pass_the_filter(ask, outgoing):
    answer = ask(DECLARE, {"questions": json.dumps(QUESTIONS)})
    assert list(content_of(answer)) == [FACTS]
    assert outgoing(answer)[0] == content_of(answer)


def test_run_that_spends_too_much_with_what_the_site_has_sent_is_refused_before_it_trains(ask, tmp_path, monkeypatch,
                                                                                          caplog):
    isolate(tmp_path, monkeypatch)
    facts = DeclaredFacts.from_bytes(ask(DECLARE, {"questions": json.dumps(QUESTIONS)})[FACTS])
    other = replace(facts, training_data={**facts.training_data, "pixels_sha256": "0" * 64})
    flags = {"cfg": "tiny", "rounds": 1, "batch": 4, "round_kimg": 0.004, "dp": True, "dp_clip": 1.0, "dp_noise": 4.0}
    planned = plan_run(StartRequest(name="r", flags=flags), ServerSettings(outdir="runs", sites=("a", "b")),
                       {"a": other, "b": facts}, choose_metrics)
    plan = SitePlan(run="00000-r", balance="none", config=planned.config, sizes=(facts.num_images,) * 2)
    folder = tmp_path / "states" / "00000-r" / "site-b"
    folder.mkdir(parents=True)
    sent = [SentUpdate(round=1, base_hash="", hash=text) for text in "ab"]
    spent = [epsilon_spent(4.0, count, 1e-5) for count in (1, 2)]
    save_settings(tmp_path, SiteSettings(data=str(tmp_path / "lesions-of-Ann.zip"), outdir=str(tmp_path / "states"),
                                         device="cpu", max_epsilon=spent[0]))
    save_sent_updates(folder, sent)
    assert content_of(ask(TRAIN, {"plan": plan.to_text(), "global": b""})) == {FAILURE: "unsuitable"}
    assert (f"the run spends epsilon {spent[1]:.4g} (delta 1e-05), with 2 updates that left the site already, but "
            f"--max-epsilon is {spent[0]:g}; expected at most that") in caplog.text
    shutil.rmtree(folder)
    assert content_of(ask(TRAIN, {"plan": plan.to_text(), "global": b""})) == {FAILURE: "refused"}  # of the message


def test_missing_data_are_told_by_a_word(ask, tmp_path, caplog):
    (tmp_path / "lesions-of-Ann.zip").unlink()
    assert content_of(ask(DECLARE, {"questions": json.dumps(QUESTIONS)})) == {FAILURE: "unsuitable"}
    assert "lesions-of-Ann.zip" in caplog.text


@pytest.mark.parametrize(("task", "content", "word"), [
    (DECLARE, {"questions": json.dumps({**QUESTIONS, "protocol": 99})}, "unsuitable"),
    (DECLARE, {"questions": json.dumps({**QUESTIONS, "balance": "/etc/passwd"})}, "unsuitable"),
    (DECLARE, {"questions": "Ann"}, "failed"), (DECLARE, {}, "failed"), (TRAIN, {}, "failed"),
    (TRAIN, {"plan": "{}", "global": b""}, "refused")])
def test_other_tasks_are_refused_by_a_word(ask, task, content, word):
    assert content_of(ask(task, content)) == {FAILURE: word}


def test_unknown_tasks_are_refused(ask):
    answer = ask("read_file", {"path": "/etc/passwd"})
    assert (content_of(answer), answer.get_return_code()) == ({}, ReturnCode.TASK_UNKNOWN)
