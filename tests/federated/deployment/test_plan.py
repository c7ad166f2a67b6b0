"""What sites declare, what the server plans from it as the simulation does, and what each side refuses."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from dnnlib.cli import UserError
from dnnlib.text import plural
from federated.deployment.job import ServerSettings, StartRequest
from federated.deployment.plan import DeclaredFacts, SitePlan, Unsuitable, answer_questions, plan_run, questions
from federated.privacy import SentUpdate, epsilon_spent
from metrics.names import choose_metrics
from tests.helpers.simulate_commands import enter_folder, prepare, site
from torch_utils.device import Tuning

ROOT = Path(__file__).parents[3]
GIVEN = {"cfg": "tiny", "rounds": 3, "precision": "fp32", "metrics": "none"}  # besides flags of a test


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Working folder with the sets of two institutions; there is no GPU."""
    return enter_folder(tmp_path, monkeypatch)


def declare(name, **flags):
    request = StartRequest(name="r", flags=flags)
    return answer_questions(json.dumps(questions(request)), f"{name}.zip", device="cpu")


def plan(server=None, **flags):
    """Plan a run of the sites a and b at the server, whose settings may be others."""
    request = StartRequest(name="r", flags=flags)
    settings = ServerSettings(outdir="runs", sites=("a", "b"), device="cpu", **(server or {}))
    return plan_run(request, settings, {name: declare(name, **flags) for name in "ab"}, choose_metrics)


@pytest.fixture
def facts(inside):
    return declare("a", cond=True)


def changed(facts, **changes):
    """Return the bytes of facts with other values, written as a site would."""
    found = {**json.loads(facts.to_bytes()), **changes}
    return json.dumps(found, separators=(",", ":"), sort_keys=True).encode()


# Facts


def test_facts_survive_their_way(facts):
    assert DeclaredFacts.from_bytes(facts.to_bytes()) == facts
    assert (facts.num_images, facts.resolution, facts.classes, facts.class_counts, facts.label_dim) == (
        20, 16, ("nv", "mel"), (10, 10), 2)
    assert b"zip" not in facts.to_bytes()
    assert b"img" not in facts.to_bytes()


THIS_VERSION = "the declared facts are not those of this version; use the same version of this project everywhere"
CLASSES = "the declared classes are not 2 names of at most 200 printable characters"
TRAINING_DATA = "the declared training_data are not hash and numbers of images and groups"


@pytest.mark.parametrize(("changes", "reason"), [
    ({"file": "lesion-of-Ann.png"}, THIS_VERSION),
    ({"protocol": 99}, "the protocol version is 99 there and 1 here; use the same version of this project everywhere"),
    ({"num_images": 0}, "the declared num_images is not a whole number from 1 to 100000000"),
    ({"num_images": 20.0}, "the declared num_images is not a whole number from 1 to 100000000"),
    ({"channels": True}, "the declared channels is not a whole number from 1 to 4"),
    ({"resolution": "16"}, "the declared resolution is not a whole number from 1 to 65536"),
    ({"device": "cpu of ward 7"}, "the declared device is not one of cpu, cuda"),
    ({"label_kind": "name"}, "the declared label_kind is not one of None, class, vector"),
    ({"is_phantom": 1}, "the declared is_phantom is not one of True, False"),
    ({"classes": ["nv"]}, CLASSES),
    ({"classes": ["nv", "m" * 201]}, CLASSES),
    ({"classes": ["nv", "mel\n"]}, CLASSES),
    ({"classes": ["nv", "\x1b[2Jmel"]}, CLASSES),
    ({"class_counts": [1]}, "the declared class_counts are not 2 numbers"),
    ({"class_counts": []}, "the declared class_counts are not 2 numbers"),
    ({"class_counts": [10, 11]}, "the declared class_counts are of 21 images; expected num_images, 20"),
    ({"num_images": 2**53}, "the declared num_images is not a whole number from 1 to 100000000"),
    ({"num_images": 21, "class_counts": [10, 11]},
     "the declared num_images is not that of the declared training_data"),
    ({"label_kind": None}, "the declared label_kind does not fit the declared label_dim"),
    ({"class_counts": [1, 21]}, "the declared class_counts is not a whole number from 0 to 20"),
    ({"content_hash": "a.zip"}, "the declared content_hash is not a SHA-256"),
    ({"training_data": {"file": "a.zip"}}, TRAINING_DATA),
    ({"training_data": ["a.zip"]}, TRAINING_DATA),
])
def test_other_facts_are_refused_by_name(facts, changes, reason):
    with pytest.raises(Unsuitable) as refused:
        DeclaredFacts.from_bytes(changed(facts, **changes))
    assert str(refused.value) == reason


@pytest.mark.parametrize("data", [b"", b"Ann", b"\xff", b"[" * 100_000, b"1" * 10_000, 7, None, "{}", ["Ann"]])
def test_what_is_not_json_is_refused(data):
    with pytest.raises(Unsuitable, match=r"^the declared facts cannot be read$"):
        DeclaredFacts.from_bytes(data)


def test_facts_of_more_than_a_mebibyte_are_refused():
    with pytest.raises(Unsuitable, match=r"^the declared facts have 1048577 bytes; expected at most 1048576$"):
        DeclaredFacts.from_bytes(b" " * (2**20 + 1))


def test_facts_in_another_spelling_are_refused_since_it_could_hide_something(facts):
    data = facts.to_bytes()
    for other in (data.replace(b":", b": ", 1), data.replace(b'"channels":3', b'"channels":9,"channels":3'),
                  data.replace(b'"nv"', b'"\\u006ev"')):
        assert other != data
        with pytest.raises(Unsuitable, match=r"^the declared facts are written in another way$"):
            DeclaredFacts.from_bytes(other)


def test_questions_of_another_version_are_refused(inside):
    asked = json.dumps({**questions(StartRequest(name="r")), "protocol": 99})
    with pytest.raises(UserError) as refused:
        answer_questions(asked, "a.zip", device="cpu")
    assert str(refused.value) == ("the server's protocol version is 99 and this site's 1; expected the same: use the "
                                  "same version of this project everywhere")


def test_questions_of_another_version_of_the_project_are_refused(inside):
    asked = json.dumps({**questions(StartRequest(name="r")), "version": "0.0.1"})
    with pytest.raises(UserError) as refused:
        answer_questions(asked, "a.zip", device="cpu")
    here = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert str(refused.value) == (f"the server runs version '0.0.1' of this project and this site {here!r}; expected "
                                  "the same version everywhere: install it")


@pytest.mark.parametrize("name", ["mel\nAnn", "\x1b[2Jmel", "m" * 201])
def test_class_name_that_is_no_text_of_one_line_is_refused_at_the_site(inside, name):
    site("a", range(20), classes=["nv", name])
    assert declare("a").classes is None
    with pytest.raises(UserError) as refused:
        declare("a", cond=True)
    assert str(refused.value) == (
        f"a.zip has a class {name!r}; expected names of at most 200 printable characters, since they are sent to the "
        "server: convert the data set with dataset_tool.py and other --classes")


def test_weights_of_a_file_are_refused_at_the_site(inside):
    asked = json.dumps({**questions(StartRequest(name="r")), "balance": "/etc/passwd"})
    with pytest.raises(UserError, match=re.escape("--balance is '/etc/passwd'; expected one of")):
        answer_questions(asked, "a.zip", device="cpu")


# The plan


@pytest.mark.parametrize("flags", [{}, {"cond": True, "mirror": True, "balance": "classes"},
                                   {"cond": True, "share": "G", "round_kimg": 0.032, "batch": 8}])
def test_plan_is_that_of_the_simulation(flags, inside, capsys):
    arguments = [f"--{name.replace('_', '-')}={1 if value is True else value}" for name, value in flags.items()]
    simulated = prepare(capsys, "--metrics=none", "--name=r", *arguments)
    planned = plan(**GIVEN, **flags)
    assert planned.config == simulated.config
    assert planned.content_hash == simulated.content_hash
    for name in "ab":
        assert [planned.schedule.end_nimg(name, number) for number in (1, 2, 3)] == \
            [simulated.schedule.end_nimg(name, number) for number in (1, 2, 3)]


def test_sites_that_do_not_fit_together_are_refused(inside):
    site("b", range(20, 50), classes=["mel", "nv"])
    with pytest.raises(UserError, match=r"^the data set of site a has the classes nv, mel, but the data set of site b"):
        plan(**GIVEN, cond=True)
    site("b", range(20, 50), size=32)
    with pytest.raises(UserError, match=r"^the data set of site a is 16x16.*, but the data set of site b 32x32"):
        plan(**GIVEN)
    site("b", range(20))
    with pytest.raises(UserError) as refused:
        plan(**GIVEN)
    assert str(refused.value) == ("the data set of site b has the same images as the data set of site a; expected each "
                                  "image at one institution")


def test_data_sets_of_the_server_are_checked_as_in_the_simulation(inside):
    site("small", range(100, 120), size=32)
    for name in ("holdout", "valid"):
        with pytest.raises(UserError) as refused:
            plan(**{**GIVEN, "metrics": None}, server={name: "small.zip"})
        assert str(refused.value) == (f"--{name}=small.zip is 32x32 RGB; expected 16x16 RGB, as in the data set of "
                                      "site a")


def test_metrics_without_images_to_compare_with_name_the_server(inside):
    with pytest.raises(UserError) as refused:
        plan(**{**GIVEN, "metrics": "fid50k_full"})
    assert str(refused.value) == ("--metrics is given without images to compare with; expected a server that was "
                                  "started with --holdout, or leave --metrics out")


def test_run_without_metrics_leaves_the_holdout_of_the_server_alone(inside):
    site("held", range(100, 120))
    assert plan(**GIVEN, server={"holdout": "held.zip", "detector_weights": ("w.pt",)}).config.metrics == ()


def test_file_to_resume_that_is_no_network_is_refused_before_the_run_has_a_folder(inside):
    (inside / "other.safetensors").write_bytes(b"Ann")
    with pytest.raises(UserError, match=r"^--resume=.*other\.safetensors: "):
        plan(**GIVEN, resume=str(inside / "other.safetensors"))
    assert not (inside / "runs").exists()


def test_notes_tell_empty_classes_and_no_flag_that_start_refuses(inside, monkeypatch):
    tuning = Tuning(is_done=True, reason="mallopt; disable with --tune-malloc=false")
    monkeypatch.setattr("training.command.tune_malloc", lambda wanted: tuning)
    assert "--tune-malloc" in tuning.note
    for name, images in (("a", range(20)), ("b", range(20, 50))):
        site(name, images, classes=["nv", "mel", "df"])
    notes = plan(**GIVEN, cond=True).settings.notes
    assert "no site has images of class df, which the networks will not learn" in notes
    assert "--tune-malloc" not in "".join(notes)


@pytest.mark.parametrize(("flags", "is_given"), [
    ({}, False), ({"precision": "auto"}, False), ({"precision": "bf16"}, True), ({"fp32": True}, True),
    ({"fp32": False}, True)])
def test_precision_that_was_asked_for_is_that_of_a_continued_run_too(inside, flags, is_given):
    given = {name: value for name, value in GIVEN.items() if name != "precision"}
    assert plan(**given, **flags).settings.asked()["precision_given"] == is_given


def site_plan(planned):
    return SitePlan(run="00000-r", balance="none", config=planned.config, sizes=(20, 30))


def test_plan_survives_its_way(inside):
    planned = plan(**GIVEN, cond=True)
    sent = site_plan(planned)
    found = SitePlan.from_text(sent.to_text(), site="a", facts=planned.facts["a"])
    assert found == sent
    assert found.schedule().end_nimg("b", 3) == planned.schedule.end_nimg("b", 3)


def test_plan_keeps_the_path_of_the_network_to_resume_at_the_server(inside):
    planned = plan(**GIVEN)
    sent = site_plan(replace(planned, config=replace(planned.config, resume="/home/ann/net.safetensors")))
    assert "/home" not in sent.to_text()
    assert SitePlan.from_text(sent.to_text(), site="a", facts=planned.facts["a"]).config == planned.config


# Differential privacy


PRIVATE = {**GIVEN, "dp": True, "dp_clip": 1.0, "dp_noise": 4.0}


def sent(*numbers):
    return [SentUpdate(round=number, base_hash="", hash=str(place)) for place, number in enumerate(numbers)]


def test_epsilon_of_a_run_counts_what_the_site_has_sent_and_what_is_to_come(inside):
    spent = [epsilon_spent(4.0, count, 1e-5) for count in range(8)]
    for numbers, flags, count in (
            ((), {}, 3), ((1,), {}, 3), ((1, 2, 3), {}, 3), ((1, 1, 2), {}, 4), ((7, 8, 9), {}, 6),
            ((), {"leave": ("a:1",)}, 1), ((1, 2), {"join": ("a:3",)}, 3), ((), {"leave": ("a:99",)}, 3)):
        mine = site_plan(plan(**PRIVATE, **flags))
        mine.check_privacy("a", spent[count], sent(*numbers))
        with pytest.raises(UserError) as refused:
            mine.check_privacy("a", spent[count] - 1e-6, sent(*numbers))
        before = f", with {plural(len(numbers), 'update')} that left the site already" if numbers else ""
        assert str(refused.value) == (
            f"the run spends epsilon {spent[count]:.4g} (delta 1e-05){before}, but --max-epsilon is "
            f"{spent[count] - 1e-6:g}; expected at most that: ask for a run with more noise, or start the site with "
            "another --max-epsilon")


def test_runs_without_privacy_or_with_a_large_delta_are_refused_with_a_limit(inside):
    with pytest.raises(UserError, match=r"^the run has no differential privacy, but --max-epsilon is 9; expected"):
        site_plan(plan(**GIVEN)).check_privacy("a", 9)
    with pytest.raises(UserError) as refused:
        site_plan(plan(**PRIVATE, dp_delta=0.5)).check_privacy("a", 9)
    assert str(refused.value) == ("the run has --dp-delta=0.5, but --max-epsilon is 9; expected a delta of at most "
                                  "1e-05, with which that is meant: ask for such a run")
    site_plan(plan(**GIVEN)).check_privacy("a", None)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"run": "../../etc"}, "the plan names the run '../../etc'; expected a name without folders"),
    ({"run": "/etc"}, "the plan names the run '/etc'; expected a name without folders"),
    ({"run": ""}, "the plan names the run ''; expected a name without folders"),
    ({"run": ".."}, "the plan names the run '..'; expected a name without folders"),
    ({"run": 7}, "the plan names the run 7; expected a name without folders"),
    ({"balance": "weights.csv"}, "the plan is not one for site a"),
    ({"sizes": [20]}, "the plan does not have a number of images for each site"),
    ({"sizes": [20, -1]}, "the plan does not have a number of images for each site"),
    ({"sizes": [21, 30]}, "the plan is for images, resolution, channels and classes (21, 16, 3, 0); expected those of "
                          "the site, (20, 16, 3, 0)"),
    ({"sizes": 7}, "the server's plan cannot be read"),
])
def test_other_plans_are_refused_at_the_site(inside, changes, reason):
    planned = plan(**GIVEN)
    text = json.dumps({**json.loads(site_plan(planned).to_text()), **changes})
    with pytest.raises(Unsuitable) as refused:
        SitePlan.from_text(text, site="a", facts=planned.facts["a"])
    assert str(refused.value) == reason


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, "1" * 10_000])
def test_what_is_not_a_plan_is_refused(inside, text):
    with pytest.raises(Unsuitable, match=r"^the server's plan cannot be read$"):
        SitePlan.from_text(text, site="a", facts=declare("a"))


def test_plan_for_others_or_another_resolution_is_refused(inside):
    planned = plan(**GIVEN)
    with pytest.raises(Unsuitable, match=r"^the plan is not one for site c$"):
        SitePlan.from_text(site_plan(planned).to_text(), site="c", facts=planned.facts["a"])
    for changes in ({"resolution": 32}, {"channels": 1}, {"label_dim": 2}):
        with pytest.raises(Unsuitable, match=r"^the plan is for images, resolution, channels and classes"):
            SitePlan.from_text(site_plan(planned).to_text(), site="a", facts=replace(planned.facts["a"], **changes))
