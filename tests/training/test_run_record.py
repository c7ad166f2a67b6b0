"""training.run_record: which options make another run, and training_options.json."""

import json
import re
from dataclasses import replace

import pytest

from dnnlib.cli import UserError
from dnnlib.typed_config import Config, ConfigError
from tests.training.test_run_folder import CONTENT, config_of, edit
from training.config import FederationConfig, TrainConfig
from training.run_record import (
    FREE_OPTIONS,
    RunRecord,
    describe_difference,
    flatten,
    identify,
    read_record,
    write_record,
)

# ---- identity


def with_leaf(data, name, value):
    """Return nested dicts with another value at a dotted name."""
    first, _, rest = name.partition(".")
    return {**data, first: with_leaf(data[first], rest, value) if rest else value}


def another(value):
    """Return another value of the same type, or one in place of None."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x" if isinstance(value, str) else ["other"] if isinstance(value, list) else 1


def every_option():
    """Return a configuration in which all parts are there."""
    return replace(config_of(cond=True), federation=FederationConfig(sites=("a", "b"), rounds=2, round_kimg=1))


def leaves():
    return [name for name, _ in flatten(every_option().to_dict())]


@pytest.mark.parametrize("name", leaves())
def test_identity_every_option_is_free_or_changes_it(name, monkeypatch, tmp_path):
    base = every_option()
    for part in (*Config.__subclasses__(), FederationConfig):  # one value alone is changed, sensible or not
        monkeypatch.setattr(part, "check", lambda self: None)
    value = dict(flatten(base.to_dict()))[name]
    text = tmp_path / "network"
    text.write_text("x")
    changed = None
    for new_value in (str(text), another(value)) if value is None else (another(value),):
        try:
            changed = TrainConfig.from_dict(with_leaf(base.to_dict(), name, new_value))
            break
        except ConfigError:  # None stood for a value of another type
            continue
    assert changed is not None
    assert changed != base
    is_equal = identify(changed, CONTENT) == identify(base, CONTENT)
    free = {*FREE_OPTIONS, "dataset.max_size"} - {"resume"}  # resume stands for the network's content, tested below
    assert is_equal == (name in free)


def test_identity_holds_the_number_of_images_except_of_sites_which_may_join():
    base = config_of(cond=True)
    smaller = replace(base, dataset=replace(base.dataset, max_size=base.dataset.max_size - 1))
    assert identify(smaller, CONTENT) != identify(base, CONTENT)


def test_identity_free_options_all_exist():
    assert set(leaves()) >= FREE_OPTIONS


def test_identity_whole_parts_that_come_and_go_change_it():
    base = identify(config_of(), CONTENT)
    assert identify(config_of(aug="noaug"), CONTENT) != base
    assert identify(config_of(aug="fixed", p=0.0), CONTENT) != base


def test_identity_survives_a_file():
    made = identify(config_of(cond=True, gamma=0.1), CONTENT)
    assert json.loads(json.dumps(made)) == made


def test_identity_data_and_network_count_by_content(tmp_path):
    assert identify(config_of(), "1" * 64) != identify(config_of(), CONTENT)
    for name, content in (("a.pkl", b"one"), ("b.pkl", b"one"), ("c.pkl", b"two")):
        (tmp_path / name).write_bytes(content)
    first, moved, other = (identify(config_of(resume=str(tmp_path / name)), CONTENT)
                           for name in ("a.pkl", "b.pkl", "c.pkl"))
    assert first == moved
    assert first != other
    assert first["resume"] == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"  # sha256 of "one"


def test_identity_missing_network_is_a_line(tmp_path):
    with pytest.raises(UserError) as error:
        identify(config_of(resume=str(tmp_path / "a.pkl")), CONTENT)
    assert str(error.value) == (f"--resume={tmp_path / 'a.pkl'} cannot be read (No such file or directory); "
                                "expected a network file: check the path")


def test_describe_difference_names_what_changed():
    base = identify(config_of(), CONTENT)
    assert describe_difference(base, identify(config_of(gamma=3), CONTENT)) == \
        f"step.loss.gamma is {base['options']['step.loss.gamma']} there and 3 here"
    assert describe_difference(base, identify(config_of(), "1" * 64)) == "the data differ"
    assert describe_difference(base, {**base, "resume": "ab"}) == "the network of --resume differs"
    assert describe_difference({**base, "version": 0}, base) == "it was started by another version of this program"
    many = describe_difference(base, identify(config_of(aug="noaug", seed=1), CONTENT))
    assert many.startswith("augment.strengths is not set there and {} here; "
                           "augment.strengths.aniso is 1 there and not set here; ")
    assert re.search(r"; and \d+ more$", many)


# ---- training_options.json


@pytest.fixture
def folder(tmp_path):
    config = config_of()
    write_record(tmp_path, RunRecord(config=config, identity=identify(config, CONTENT)))
    return tmp_path


def test_read_record_gives_back_what_was_written(folder):
    config = config_of()
    record = RunRecord(config=config, identity=identify(config, CONTENT))
    assert read_record(folder) == record
    write_record(folder, replace(record, finished=True))
    assert read_record(folder).finished


@pytest.mark.parametrize(("change", "message"), [
    (lambda content: content.update(extra=1),
     ": extra is not a field of a run's options; expected one of format, version, finished, config, identity, "
     "versions, precision_given, passes, classes"),
    (lambda content: content.pop("identity"),
     ": identity is missing; expected the fields format, version, finished, config, identity, versions, "
     "precision_given, passes, classes"),
    (lambda content: content.update(version=2), " has version 2; expected 1: use the program that wrote it"),
    (lambda content: content.update(finished=1), ": finished is 1; expected true or false"),
    (lambda content: content.update(precision_given="no"), ": precision_given is 'no'; expected true or false"),
    (lambda content: content.update(passes=[{"from_nimg": 0}]),
     ": passes is [{'from_nimg': 0}]; expected a list of from_nimg and batch_gpu"),
    (lambda content: content.update(identity=[]), ": identity is []; expected version, data, resume and options"),
    (lambda content: content.update(versions={"torch": 2}), ": versions is {'torch': 2}; expected names with strings"),
    (lambda content: content["config"].pop("seed"), ": config.seed is missing; expected a whole number"),
    (lambda content: content["config"]["step"].update(batch="16"),
     ": config.step.batch is '16'; expected a whole number"),
    (lambda content: content["config"]["step"]["ema"].update(beta=1),
     ": config.step.ema.beta is not a setting of EmaConfig; expected one of kimg, rampup"),
])
def test_read_record_anything_else_names_the_file(folder, change, message):
    path = edit(folder, change)
    with pytest.raises(ConfigError) as error:
        read_record(folder)
    assert str(error.value) == f"{path}{message}"


def test_read_record_cut_file_is_a_line(folder):
    path = folder / "training_options.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))} is not JSON \(.*\); expected a run's options$"):
        read_record(folder)
