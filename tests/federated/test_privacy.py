"""Differential privacy of updates: clipping, noise from a secret, epsilon, and what sites, server and files tell."""

import json
import math
import os
import re
import shutil
import stat
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import kstest, norm

import federated.site
from dnnlib.cli import StopRequest, UserError
from federated.aggregate import update_norm
from federated.agreement import constants_hash, local_tensors
from federated.exchange import Refused, SiteNumbers, encode_global, encode_update
from federated.privacy import (
    SECRET_NAME,
    SENT_NAME,
    SentUpdate,
    epsilon_spent,
    find_noise,
    protect,
    save_sent_updates,
    secret_normals,
    sent_updates,
    site_secret,
)
from federated.schedule import Schedule
from federated.server import Server
from federated.site import Site
from tests.helpers.federated_states import NUMBERS, Round, forged, refusal
from tests.helpers.make_sets import make_set
from tests.helpers.simulate_commands import isolate, prepare
from tests.helpers.simulations import differing, lines, newest, only_run, run_simulation, unlike
from training.snapshot import read_info

SECRET = bytes(range(32))
PRIVACY = {"clip": 1.5, "noise": 2.0, "delta": 1e-5}
PRIVATE = SiteNumbers(num_images=1008, num_iterations=63, images_of_class=(), augment_p=0.0, seconds=12.5)


def protected(tensors, base, **changes):
    return protect(tensors, base, **{"clip": 1.5, "noise": 2.0, "secret": SECRET, "round": 3, "base_hash": "abc",
                                     **changes})


def drawn(seed, count=3000):
    rng = torch.Generator().manual_seed(seed)
    return {"G.x": torch.randn(count, generator=rng), "D.x": torch.randn(2, 5, generator=rng)}


# The mechanism


@pytest.mark.parametrize("length", [0.3, 1.4999, 1.5001, 40.0])
def test_update_is_clipped_as_one_vector_of_all_tensors(length):
    base, step = drawn(0), drawn(1)
    size = update_norm(step, {name: torch.zeros_like(value) for name, value in step.items()}, step)
    tensors = {name: value + length / size * step[name] for name, value in base.items()}
    found = protected(tensors, base, noise=1e-12)
    expected = min(1.0, 1.5 / length)
    for name, value in base.items():
        torch.testing.assert_close(found[name] - value, expected * length / size * step[name], rtol=0, atol=5e-7)
    assert update_norm(found, base, base) == pytest.approx(min(length, 1.5), rel=1e-4)


def test_noise_is_normal_with_the_standard_deviation_of_noise_times_clip():
    zeros = {"G.x": torch.zeros(200_000), "D.x": torch.zeros(100_000)}
    found = protected(zeros, zeros)
    numbers = torch.cat([*found.values()]).double().numpy()
    assert kstest(numbers, "norm", args=(0, 2.0 * 1.5)).pvalue > 0.01
    assert np.mean(numbers**4) == pytest.approx(3 * 3.0**4, rel=0.02)
    assert np.corrcoef(numbers[1:], numbers[:-1])[0, 1] == pytest.approx(0, abs=0.006)
    assert len(np.unique(numbers)) > 0.97 * len(numbers)  # after rounding to float32
    assert abs(numbers).max() > 4 * 3.0


def test_normals_are_finite_at_the_ends_of_the_uniform_numbers(monkeypatch):
    ends = bytes(8) + b"\xff" * 8
    monkeypatch.setattr("hashlib.shake_256", lambda data: type("Hash", (), {"digest": lambda self, size: ends})())
    low, high = secret_normals(SECRET, "", 2).tolist()
    assert low == -high == pytest.approx(norm.ppf(2.0**-53), rel=1e-12)


def test_equal_arguments_give_equal_bytes_and_any_other_argument_other_noise():
    base, tensors = drawn(0), drawn(1)
    first = protected(tensors, base)
    assert all(torch.equal(first[name], value) for name, value in protected(tensors, base).items())
    noise = (first["G.x"] - protected(tensors, base, noise=1e-12)["G.x"]).double().numpy()
    others = [{"secret": bytes(32)}, {"round": 4}, {"base_hash": "abd"}]
    for change in others:
        other = protected(tensors, base, **change)["G.x"] - protected(tensors, base, noise=1e-12)["G.x"]
        assert abs(np.corrcoef(noise, other.double().numpy())[0, 1]) < 0.06
    # Two updates of one round that differ in a single last bit share no noise, which their difference would reveal.
    tensors["D.x"][0, 0] = torch.nextafter(tensors["D.x"][0, 0], torch.tensor(9.0))
    other = protected(tensors, base)["G.x"] - protected(tensors, base, noise=1e-12)["G.x"]
    assert abs(np.corrcoef(noise, other.double().numpy())[0, 1]) < 0.06
    same_values = {"G.x": torch.zeros(3000), "G.y": torch.zeros(3000)}
    found = protected(same_values, same_values)
    assert abs(np.corrcoef(found["G.x"].numpy(), found["G.y"].numpy())[0, 1]) < 0.06


# The secret


def test_secret_is_random_and_only_for_its_owner_and_stays(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    first = site_secret(tmp_path / "a", round=0)
    assert len(first) == 32
    assert first == site_secret(tmp_path / "a", round=0) == site_secret(tmp_path / "a", round=7)
    assert first != site_secret(tmp_path / "b", round=0)
    assert os.listdir(tmp_path / "a") == [SECRET_NAME]
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "a" / SECRET_NAME).stat().st_mode) == 0o600


def test_secret_that_is_lost_or_damaged_is_not_replaced(tmp_path):
    path = tmp_path / SECRET_NAME
    with pytest.raises(UserError) as caught:
        site_secret(tmp_path, round=2)
    assert str(caught.value) == (
        f"{path} is missing, but the site has begun round 2 and may have sent its update; expected the secret that its "
        "noise follows from: copy it back, or start another run with --new")
    path.write_bytes(b"short")
    with pytest.raises(UserError) as caught:
        site_secret(tmp_path, round=0)
    assert str(caught.value) == (f"{path} has 5 bytes; expected the 32 that its site wrote: copy it back, or start "
                                 "another run with --new")
    assert path.read_bytes() == b"short"


# What left the site


def test_list_of_sent_updates_survives_its_file_and_is_not_begun_anew(tmp_path):
    assert sent_updates(tmp_path) == []
    with pytest.raises(UserError) as caught:
        sent_updates(tmp_path, round=2)
    path = tmp_path / SENT_NAME
    assert str(caught.value) == (
        f"{path} is missing, but the site has begun round 2 and may have sent its update; expected the list from which "
        "epsilon is counted: copy it back, or start another run with --new")
    written = [SentUpdate(round=1, base_hash="a" * 64, hash="b" * 64), SentUpdate(round=2, base_hash="c", hash="d")]
    save_sent_updates(tmp_path, written)
    assert sent_updates(tmp_path) == sent_updates(tmp_path, round=2) == written
    assert os.listdir(tmp_path) == [SENT_NAME]
    for text in ("[", "{}x", '[{"round": 1}]', "7"):
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            sent_updates(tmp_path, round=2)
        assert str(caught.value) == (f"{path} is damaged; expected the list that its site wrote: copy it back, or "
                                     "start another run with --new")


# Accounting


def closed_form(sigma, delta):
    """Return epsilon of a Gaussian mechanism of sensitivity 1 (Balle & Wang 2018, theorem 8)."""
    def excess(epsilon):
        a, b = 1 / (2 * sigma), epsilon * sigma
        return norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b) - delta

    return brentq(excess, 0, 300, xtol=1e-12)


@pytest.mark.parametrize(("noise", "rounds", "delta"), [
    (2.0, 1, 1e-5), (6.324, 40, 1e-5), (20.0, 100, 1e-6), (1.0, 3, 1e-3), (50.0, 24, 1e-5)])
def test_epsilon_is_that_of_one_gaussian_of_sensitivity_two_clips_times_root_rounds(noise, rounds, delta):
    found = epsilon_spent(noise, rounds, delta)
    assert found == pytest.approx(closed_form(noise / (2 * math.sqrt(rounds)), delta), rel=1e-8)


def test_epsilon_agrees_with_the_accountants_of_compositions():
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    event = SelfComposedDpEvent(GaussianDpEvent(5.0 / 2), 30)  # the sensitivity is two clips
    exact = epsilon_spent(5.0, 30, 1e-5)
    assert PLDAccountant(NeighboringRelation.REPLACE_SPECIAL).compose(event).get_epsilon(1e-5) == pytest.approx(
        exact, rel=1e-6)
    assert exact < RdpAccountant().compose(event).get_epsilon(1e-5) < 1.1 * exact


def test_epsilon_grows_with_rounds_and_falls_with_noise():
    spent = [epsilon_spent(8.0, rounds, 1e-5) for rounds in range(6)]
    assert spent[0] == 0
    assert spent == sorted(set(spent))
    assert epsilon_spent(9.0, 5, 1e-5) < spent[5] < epsilon_spent(7.0, 5, 1e-5)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1, 10, 1e4, 1e7])
@pytest.mark.parametrize("rounds", [1, 40, 1000])
def test_noise_is_the_smallest_of_four_digits_that_keeps_epsilon(epsilon, rounds):
    noise = find_noise(epsilon, rounds, 1e-5)
    assert noise == float(f"{noise:.4g}")
    assert epsilon_spent(noise, rounds, 1e-5) <= epsilon < epsilon_spent(noise * (1 - 1.1e-3), rounds, 1e-5)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError) as caught:
        find_noise(10, 3, 1e-5)
    assert str(caught.value) == ('--dp needs the package dp-accounting, which is not installed: pip install -e '
                                 '".[dp]"')


# Messages


def test_private_update_tells_nothing_besides_weights_schedule_and_seconds():
    sent = Round(numbers=PRIVATE, privacy=PRIVACY)
    assert sent.read_update(sent.up).numbers == PRIVATE
    for numbers, reason in (
            (replace(PRIVATE, statistics={"Loss/G/loss": {"num": 1, "mean": 0.5, "std": 0.1}}),
             'the statistic "Loss/G/loss" is not among those that were agreed'),
            (replace(PRIVATE, augment_p=0.125), "augment_p is 0.125; expected a number from 0 to 0"),
            (replace(PRIVATE, images_of_class=(900, 100)),
             "images_of_class is [900, 100]; expected a number for each of 0 classes")):
        assert refusal(Round, numbers=numbers, privacy=PRIVACY) == reason
        declared = json.loads(json.dumps({"images_of_class": numbers.images_of_class, "augment_p": numbers.augment_p,
                                          "statistics": numbers.statistics}))
        data = forged(sent.up, lambda header, declared=declared: header["numbers"].update(declared))
        assert refusal(sent.read_update, data) == reason


def test_other_privacy_is_refused_with_the_difference():
    sent = Round(numbers=PRIVATE, privacy=PRIVACY)
    less = replace(sent.agreement, privacy={**PRIVACY, "noise": 1.0})
    assert refusal(sent.read_global, sent.down, less) == "privacy.noise is 2.0 there and 1.0 here"
    assert refusal(sent.read_update, sent.up, replace(sent.agreement, privacy=None)) == (
        'privacy is {"clip": 1.5, "noise": 2.0, "delta": 1e-05} there and null here')
    plain = Round(numbers=NUMBERS)
    assert refusal(plain.read_update, plain.up, sent.agreement) == (
        'privacy is null there and {"clip": 1.5, "noise": 2.0, "delta": 1e-05} here')


# Simulations


def run_private(*flags):
    """Run two rounds of two sites with clipped updates and noise; flags replace or follow the usual ones."""
    rounds = [] if any(flag.startswith("--rounds=") for flag in flags) else ["--rounds=2"]
    return run_simulation("--data=a.zip,b.zip", "--dp=1", "--dp-clip=0.5", *rounds, *flags)


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Working folder with institutions of 12 and 20 images of 16x16."""
    isolate(tmp_path, monkeypatch)
    for name, first, count in (("a", 0, 12), ("b", 100, 20)):
        make_set(f"{name}.zip", images=range(first, first + count), size=16, classes=["nv", "mel"],
                 labels=[index % 2 for index in range(count)])
    return tmp_path


@pytest.fixture
def known_secret(monkeypatch):
    monkeypatch.setattr("federated.privacy.secrets.token_bytes", lambda count: SECRET[:count])


@pytest.fixture
def updates(monkeypatch):
    """Updates in the order in which the sites send them: (site, round, bytes)."""
    found = []

    def record(agreement, tensors, received, **named):
        data = encode_update(agreement, tensors, received, **named)
        found.append((named["site"], received.round, data))
        return data

    monkeypatch.setattr(federated.site, "encode_update", record)
    return found


def test_statistics_log_and_snapshots_tell_epsilon_and_nothing_that_was_not_sent(inside, capsys):
    assert run_private("--rounds=3", "--leave=b:2", "--dp-noise=0.001") == 0
    found, log = lines(only_run() / "server"), (only_run() / "server" / "log.txt").read_text()
    spent = [epsilon_spent(0.001, rounds, 1e-5) for rounds in (0, 1, 2, 3)]
    assert [[line.get(f"Privacy/epsilon/{site}") for site in "ab"] for line in found] == [
        [spent[1], spent[1]], [spent[2], spent[2]], [spent[3], spent[2]]]
    assert not [name for line in found for name in line if name.startswith(("Loss/", "Trouble/"))
                or "augment" in name or re.match("Sites/./(Loss|Trouble)", name)]
    assert f"round 3 begins: epsilon a {spent[2]:.4g} -> {spent[3]:.4g} (delta 1e-05)\n" in log
    assert f"  a: epsilon {spent[3]:.4g} norm " in log
    assert (f"note: --dp-noise=0.001 spends epsilon {spent[3]:.4g} (delta 1e-05) in 3 rounds; more --rounds spend more"
            in log)
    assert (f"round 2: sends its update clipped to the norm 0.5, with noise of standard deviation 0.0005; epsilon "
            f"{spent[2]:.4g} so far (delta 1e-05)\n") in (only_run() / "site-b" / "log.txt").read_text()
    info = read_info(sorted((only_run() / "server").glob("network-snapshot-*"))[-1])["privacy"]
    assert {name: info[name] for name in ("clip", "noise", "delta", "rounds", "epsilon")} == {
        "clip": 0.5, "noise": 0.001, "delta": 1e-5, "rounds": 3, "epsilon": {"a": spent[3], "b": spent[2]}}
    assert info["protected"].startswith("epsilon and delta bound what all updates of one institution in this run tell")
    assert "they are not computed for a single image" in info["protected"]


def test_snapshot_without_privacy_does_not_mention_it(inside, capsys):
    assert run_simulation("--data=a.zip", "--rounds=1") == 0
    assert "privacy" not in read_info(sorted((only_run() / "server").glob("network-snapshot-*"))[-1])
    assert not (only_run() / "site-a" / SECRET_NAME).exists()


def test_sent_update_is_the_trained_one_clipped_with_noise(inside, capsys, known_secret, monkeypatch):
    sent, seen = {}, {}

    def record(agreement, tensors, received, **named):
        sent[named["site"], received.round], seen[received.round] = tensors, received
        return encode_update(agreement, tensors, received, **named)

    monkeypatch.setattr(federated.site, "encode_update", record)
    assert run_private("--rounds=1", "--dp-noise=3") == 0
    count = sum(tensor.numel() for tensor in sent["a", 1].values())
    for site in "ab":
        size = update_norm(sent[site, 1], seen[1].tensors, sent[site, 1])
        assert size == pytest.approx(3 * 0.5 * math.sqrt(count), rel=0.01)
    noises = [torch.cat([(sent[site, 1][name] - base).flatten() for name, base in seen[1].tensors.items()])
              for site in "ab"]
    assert abs(torch.nn.functional.cosine_similarity(*noises, dim=0)) < 0.05  # other updates: other noise
    assert not [name for name in sent["a", 1] if name.startswith("G_ema.")]
    assert "G.mapping.w_avg" in sent["a", 1]


def test_noise_does_not_follow_from_the_seed(inside, capsys):
    for outdir in ("one", "two"):
        assert run_private("--rounds=1", "--dp-noise=0.001", f"--outdir={outdir}") == 0
    assert "G.synthesis.b4.const" in differing(newest("one"), newest("two"))


@pytest.mark.parametrize("iterations", [pytest.param(3, marks=pytest.mark.slow), 15])
def test_run_that_is_stopped_anywhere_ends_as_an_unbroken_one(iterations, inside, capsys, known_secret, monkeypatch):
    assert run_private("--dp-noise=0.001", "--outdir=whole") == 0
    asked = []
    monkeypatch.setattr(StopRequest, "wanted", lambda self: asked.append(None) or len(asked) >= iterations)
    assert run_private("--dp-noise=0.001") == 75
    monkeypatch.setattr(StopRequest, "wanted", lambda self: False)
    assert run_private("--dp-noise=0.001") == 0
    assert unlike(only_run("whole"), only_run()) == []


def test_round_that_is_repeated_sends_the_same_bytes_again(inside, capsys, updates, monkeypatch):
    finish = Server.finish_round

    def die(self, answers):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "finish_round", die)
    assert run_private() != 0
    monkeypatch.setattr(Server, "finish_round", finish)
    assert run_private() == 0
    assert [(site, number) for site, number, _ in updates] == [("a", 1), ("b", 1)] * 2 + [("a", 2), ("b", 2)]
    assert updates[0] == updates[2]
    assert updates[1] == updates[3]


def test_site_that_lost_its_secret_sends_nothing(inside, capsys, updates):
    assert run_private("--rounds=1", "--dp-noise=1") == 0
    (only_run() / "site-b" / SECRET_NAME).unlink()
    assert run_private("--dp-noise=1") == 2
    assert capsys.readouterr().err.endswith(
        f"error: {only_run()}/site-b/{SECRET_NAME} is missing, but the site has begun round 1 and may have sent its "
        "update; expected the secret that its noise follows from: copy it back, or start another run with --new\n")
    assert [(site, number) for site, number, _ in updates] == [("a", 1), ("b", 1), ("a", 2)]


def test_longer_run_of_the_same_epsilon_is_another_run_unless_the_noise_is_given(inside, capsys):
    assert run_private() == 0
    two, three = find_noise(10, 2, 1e-5), find_noise(10, 3, 1e-5)
    run = only_run()
    assert json.loads((run / "training_options.json").read_text())["config"]["federation"]["dp_noise"] == two
    advice = (f"note: --dp-noise={two:g} follows from --dp-epsilon=10 and the rounds of the sites; with other --rounds "
              f"it is another, which starts another run, while --dp-noise={two:g} in place of --dp-epsilon continues "
              "this one and spends more")
    assert advice in (run / "server" / "log.txt").read_text()
    capsys.readouterr()
    assert run_private("--rounds=3", "--dry-run") == 0
    assert (f"{run} is finished and not continued: federation.dp_noise is {two} there and {three} here"
            ) in json.loads(capsys.readouterr().out)["warnings"]
    assert run_private("--rounds=3", f"--dp-noise={two:g}") == 0
    assert only_run() == run
    found = lines(run / "server")
    assert [line["Privacy/epsilon/a"] for line in found] == [epsilon_spent(two, rounds, 1e-5) for rounds in (1, 2, 3)]
    assert found[1]["Privacy/epsilon/a"] <= 10 < found[2]["Privacy/epsilon/a"]


def test_site_that_loses_its_folder_after_a_round_cannot_go_on(inside, capsys):
    assert run_private("--rounds=1", "--dp-noise=1") == 0
    shutil.rmtree(only_run() / "site-b")
    assert run_private("--dp-noise=1") == 2
    assert "site-b has no resumable state, but the site takes part since round 1" in capsys.readouterr().err


# A site by itself, before a server that is not to be trusted


@pytest.fixture
def site(inside, capsys):
    """Make site a of three planned rounds, as often as it is asked for; earlier ones are closed."""
    prepared = prepare(capsys, "--batch=4", "--round-kimg=0.008", "--workers=0", "--dp=1", "--dp-clip=0.5",
                       "--dp-noise=4")
    made = []

    def make(**changes):
        for each in made:
            each.close()
        schedule = changes.pop("schedule", prepared.schedule)
        made.append(Site("a", config=prepared.config, settings=prepared.settings, schedule=schedule,
                         dataset=prepared.institutions[0].dataset, weights=None, folder=inside / "site-a",
                         device=torch.device("cpu"), stop=StopRequest(), **changes))
        return made[-1]

    yield make
    for each in made:
        each.close()


def begin(site, number, step=0.0):
    """Return the message of a round: the networks of the site's seed, and a step away from them."""
    state = site.loop.state
    tensors = {name: tensor + step for name, tensor in local_tensors(state, site.agreement).items()}
    return encode_global(site.agreement, tensors, round=number, constants_hash=constants_hash(state))


def spent_in_log(site):
    return re.findall("epsilon (.*) so far", (site.run.path / "log.txt").read_text())


def test_update_is_on_the_list_before_it_leaves_and_once(site):
    spent = [f"{epsilon_spent(4, count, 1e-5):.4g}" for count in (1, 2, 3)]
    first = site()
    message = begin(first, 1)
    update = first.train_round(message)
    [entry] = json.loads((first.run.path / SENT_NAME).read_text())
    assert (entry["round"], len(entry["base_hash"]), len(entry["hash"])) == (1, 64, 64)
    assert first.train_round(message) == update
    assert site().train_round(message) == update  # also after the process was killed
    assert len(sent_updates(first.run.path)) == 1
    assert spent_in_log(first) == [spent[0]] * 3
    again = site()
    again.loop.round.number = 0  # set back to before the round; its server begins it from other networks
    again.train_round(begin(again, 1, step=0.01))
    assert [each.round for each in sent_updates(first.run.path)] == [1, 1]
    again.train_round(begin(again, 2))
    assert [each.round for each in sent_updates(first.run.path)] == [1, 1, 2]
    assert spent_in_log(first) == [spent[0]] * 3 + spent[1:]


def test_update_beyond_the_limit_does_not_leave_and_is_not_counted(site):
    one = site(max_epsilon=epsilon_spent(4, 1, 1e-5))
    message = begin(one, 1)
    update = one.train_round(message)
    with pytest.raises(UserError) as caught:
        one.train_round(begin(one, 2))
    two = epsilon_spent(4, 2, 1e-5)
    assert str(caught.value) == (
        f"the update of round 2 would be number 2 of {one.run.path} and spend epsilon {two:.4g} (delta 1e-05) in all, "
        f"but --max-epsilon is {one.max_epsilon:g}; expected at most that: start the site with another --max-epsilon")
    assert [each.round for each in sent_updates(one.run.path)] == [1]
    assert update


def test_rounds_that_are_not_planned_for_the_site_are_refused(site):
    config = site().loop.config
    for changes, last in (({}, 3), ({"leave": ("a:2",)}, 2), ({"leave": ("a:99",)}, 3)):
        one = site(schedule=Schedule(replace(config.federation, **changes), sizes=[12, 20], batch=config.batch))
        for number in (0, last + 1, 99):
            with pytest.raises(Refused) as caught:
                one.train_round(begin(one, number))
            assert str(caught.value) == f"round {number} is not one of this site; expected one from 1 to {last}"
    assert sent_updates(one.run.path) == []


def test_list_that_is_lost_stops_the_site(site):
    first = site()
    first.train_round(begin(first, 1))
    (first.run.path / SENT_NAME).unlink()
    with pytest.raises(UserError, match=f"{SENT_NAME} is missing, but the site has begun round 1"):
        site()
