"""Institutions on one machine: what three equal ones, a continued run, a refused update and a late site lead to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import federated.site
from dnnlib.cli import StopRequest
from federated.aggregate import is_running_average
from federated.exchange import encode_update
from federated.site import SiteLoop
from tests.helpers.federated_states import forged
from tests.helpers.make_sets import make_set
from tests.helpers.simulate_commands import isolate
from tests.helpers.simulations import (
    differing,
    lines,
    newest,
    only_run,
    run_simulation,
    state_of,
    unlike,
)
from torch_utils.checkpoint import CheckpointPair
from training.discriminator import Discriminator
from training.generator import Generator
from training.snapshot import load_network, read_info

THREE = "--data=a.zip,b.zip,c.zip"


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Working folder with institutions of 12, 20 and 32 images of 16x16; b has no melanoma."""
    isolate(tmp_path, monkeypatch)
    write_sets(tmp_path)


def write_sets(folder):
    for name, first, count in (("a", 0, 12), ("b", 100, 20), ("c", 200, 32)):
        make_set(folder / f"{name}.zip", images=range(first, first + count), size=16, classes=["nv", "mel"],
                 labels=[0 if name == "b" else index % 3 // 2 for index in range(count)])


def log():
    return (only_run() / "server" / "log.txt").read_text()


def test_three_sites_with_equal_images_and_draws_are_one(monkeypatch, capsys):
    def thrice(prepared):
        one = prepared.institutions[0]
        return replace(prepared, institutions=tuple(
            replace(each, dataset=one.dataset, weights=one.weights) for each in prepared.institutions))

    assert run_simulation("--data=a.zip", "--outdir=one") == 0
    monkeypatch.setattr(federated.site, "site_seed", lambda seed, index: seed)
    assert run_simulation(THREE, "--outdir=three", change=thrice) == 0
    assert differing(newest("one"), newest("three")) == []


def test_sites_draw_differently_and_the_order_of_data_does_not_matter_to_the_mean(capsys):
    assert run_simulation(THREE, "--rounds=1") == 0
    found = [lines(only_run() / f"site-{name}")[0]["Loss/scores/fake"] for name in ("a", "b", "c")]
    assert len(set(found)) == 3


def test_run_that_is_made_longer_ends_as_an_unbroken_one(capsys, whole):
    assert run_simulation(THREE, "--rounds=1") == 0
    assert run_simulation(THREE, "--rounds=2") == 0
    assert unlike(whole, only_run()) == []
    assert "continues at round 2" in log()
    assert run_simulation(THREE, "--rounds=2") == 0  # left alone
    assert f"already finished at 2 rounds: {only_run()}; --new starts another run" in capsys.readouterr().out


@pytest.mark.parametrize("iterations", [3, 8, 15, 16, 23])
def test_run_that_is_stopped_anywhere_ends_as_an_unbroken_one(iterations, monkeypatch, capsys, whole):
    asked = []
    monkeypatch.setattr(StopRequest, "wanted", lambda self: asked.append(None) or len(asked) >= iterations)
    assert run_simulation(THREE, "--rounds=2") == 75
    monkeypatch.setattr(StopRequest, "wanted", lambda self: False)
    assert run_simulation(THREE, "--rounds=2") == 0
    assert unlike(whole, only_run()) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two rounds that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    write_sets(folder)
    data = ",".join(str(folder / f"{name}.zip") for name in "abc")
    assert run_simulation(f"--data={data}", "--rounds=2", f"--outdir={folder / 'runs'}") == 0
    return only_run(folder / "runs")


def spoil(monkeypatch, change, site="b", round_number=2):
    """Change the update that a site sends after a round: change(encode, agreement, tensors, received, **named)."""
    def spoiled(agreement, tensors, received, **named):
        if (named["site"], received.round) == (site, round_number):
            return change(agreement, tensors, received, **named)
        return encode_update(agreement, tensors, received, **named)

    monkeypatch.setattr(federated.site, "encode_update", spoiled)


def hundredfold(agreement, tensors, received, **named):
    far = {name: received.tensors[name] + 100 * (value - received.tensors[name]) for name, value in tensors.items()}
    return encode_update(agreement, far, received, **named)


def hundredfold_averages(agreement, tensors, received, **named):
    far = {name: received.tensors[name] + 100 * (value - received.tensors[name]) if is_running_average(name) else value
           for name, value in tensors.items()}
    return encode_update(agreement, far, received, **named)


def not_finite(agreement, tensors, received, **named):
    return encode_update(agreement, {**tensors, "D.b4.fc.weight": tensors["D.b4.fc.weight"] * torch.nan}, received,
                         **named)


def other_classes(agreement, tensors, received, **named):
    return encode_update(replace(agreement, classes=("mel", "nv")), tensors, received, **named)


def other_architecture(agreement, tensors, received, **named):
    networks = {**agreement.networks, "D": {**agreement.networks["D"], "architecture": "orig"}}
    return encode_update(replace(agreement, networks=networks), tensors, received, **named)


def extra_tensor(agreement, tensors, received, **named):
    return forged(encode_update(agreement, tensors, received, **named), tensors={"images": torch.zeros(3, 16, 16)})


@pytest.mark.parametrize(("change", "reason"), [
    (other_architecture, 'D.architecture is "orig" there and "resnet" here'),
    (extra_tensor, 'the tensor "images" is not among those that were agreed'),
    (hundredfold, "its norm per local step is "),
    (hundredfold_averages, "its norm of the moving averages per local step is "),
    (not_finite, "the tensor D.b4.fc.weight has values that are not finite"),
    (other_classes, 'classes is ["mel", "nv"] there and ["nv", "mel"] here')])
def test_refused_update_is_named_and_the_round_goes_on_with_the_others(change, reason, monkeypatch, capsys):
    spoil(monkeypatch, change)
    assert run_simulation(THREE) == 0
    refused = [line for line in log().splitlines() if "refused" in line]
    assert len(refused) == 1
    assert f"round 2: the update of b is refused: {reason}" in refused[0]
    found = lines(only_run() / "server")
    assert [line["Progress/sites"] for line in found] == [3, 2, 3]
    assert [line["Progress/refused"] for line in found] == [0, 1, 0]
    assert all(value.isfinite().all() for value in newest().values())


def test_site_whose_steps_keep_failing_is_left_out_of_the_round_also_after_a_restart(monkeypatch, capsys):
    train_until, calls = SiteLoop.train_until, []

    def failing(self, nimg):
        if self.run.path.name == "site-b" and self.round.number == 2:
            calls.append(nimg)
            return 3
        return train_until(self, nimg)

    monkeypatch.setattr(SiteLoop, "train_until", failing)
    monkeypatch.setattr(StopRequest, "wanted", lambda self: len(calls) > 0)  # c is stopped in round 2
    assert run_simulation(THREE) == 75
    monkeypatch.setattr(StopRequest, "wanted", lambda self: False)
    assert run_simulation(THREE) == 0
    assert calls == [40]  # the second command did not try again
    assert f"round 2: the update of b is refused: its training failed, see {only_run()}/site-b/log.txt" in log()
    assert [line["Progress/sites"] for line in lines(only_run() / "server")] == [3, 2, 3]


def test_refused_update_stops_the_run_if_asked_to(monkeypatch, capsys):
    spoil(monkeypatch, hundredfold)
    assert run_simulation(THREE, "--on-refused=stop") == 3
    assert "stopped in round 2 (--on-refused=stop); the networks are those of round 1" in log()
    assert len(lines(only_run() / "server")) == 1
    monkeypatch.undo()


def test_mean_without_the_refused_site_is_that_of_the_others(monkeypatch, capsys):
    spoil(monkeypatch, hundredfold, round_number=1)
    assert run_simulation(THREE, "--rounds=1") == 0
    found, sites = newest(), {name: state_of(only_run() / f"site-{name}") for name in ("a", "c")}
    name = "G.synthesis.b4.const"
    mean = sum(sites[site]["training/G/synthesis.b4.const"].double() for site in ("a", "c")) / 2
    assert torch.equal(found[name], mean.float())


def test_column_of_a_class_is_that_of_the_sites_which_saw_it(capsys):
    assert run_simulation("--data=a.zip,b.zip", "--rounds=1") == 0  # b has no melanoma
    found, a = newest(), state_of(only_run() / "site-a")
    for network in ("G", "D"):
        column = found[f"{network}.mapping.embed.weight"][:, 1]
        assert torch.equal(column, a[f"training/{network}/mapping.embed.weight"][:, 1])
    nevi = found["G.mapping.embed.weight"][:, 0]
    assert not torch.equal(nevi, a["training/G/mapping.embed.weight"][:, 0])


def test_site_that_joins_late_and_one_that_leaves(capsys):
    assert run_simulation(THREE, "--join=c:2", "--leave=a:2") == 0
    found = lines(only_run() / "server")
    assert [[site for site in "abc" if f"Update/norm/{site}" in line] for line in found] == [
        ["a", "b"], ["a", "b", "c"], ["b", "c"]]
    assert found[-1]["Progress/kimg"] == pytest.approx(7 * 0.02)
    assert state_of(only_run() / "site-c")["training/nimg"] == 60  # counted as if it had been there from the start
    assert [line["Progress/kimg"] for line in lines(only_run() / "site-c")][:2] == pytest.approx([0.024, 0.036])


def test_site_that_is_added_to_a_run_joins_it(capsys):
    assert run_simulation("--data=a.zip,b.zip", "--rounds=1") == 0
    assert run_simulation(THREE, "--rounds=2", "--join=c:2") == 0
    assert [line["Progress/sites"] for line in lines(only_run() / "server")] == [2, 3]
    before = state_of(only_run() / "server")
    # The past cannot be changed.
    assert run_simulation("--data=a.zip,b.zip", "--rounds=3", "--leave=b:1") == 2
    assert (f"round 2 of {only_run()} was trained by a up to image 40, b up to image 40, c up to image 40, but "
            "--sites, --join, --leave and --local now plan a up to image 40; expected changes in later rounds only, or "
            "--new to start another run") in capsys.readouterr().err
    assert unequal(before, state_of(only_run() / "server")) == []


def unequal(a, b):
    return [name for name in a.keys() | b.keys() if not (
        torch.equal(a[name], b[name]) if isinstance(a.get(name), torch.Tensor) else a.get(name) == b.get(name))]


def test_keep_leaves_the_network_of_an_earlier_end(monkeypatch, capsys):
    def count_only(self, nimg):
        self.state.nimg = nimg

    monkeypatch.setattr(SiteLoop, "train_until", count_only)  # names count thousands, which would take long
    for rounds in (1, 3):
        assert run_simulation("--data=a.zip", "--keep=1", "--round-kimg=1", f"--rounds={rounds}") == 0
    assert sorted(path.name for path in (only_run() / "server").glob("network-snapshot-*")) == [
        "network-snapshot-000001.safetensors", "network-snapshot-000003.safetensors"]


def test_run_keeps_its_pass_size_without_being_told_again(capsys):
    assert run_simulation("--data=a.zip", "--rounds=1", "--batch-gpu=2") == 0
    assert run_simulation("--data=a.zip", "--rounds=2") == 0
    assert f"{only_run()}: 2 images per pass, as the run had before (--batch-gpu changes this)" in log()
    assert "images per pass from image" not in (only_run() / "site-a" / "log.txt").read_text()


def test_run_of_other_settings_or_data_is_another_run(capsys):
    assert run_simulation("--data=a.zip,b.zip", "--rounds=1") == 0
    assert run_simulation("--data=a.zip,c.zip", "--sites=a,b", "--rounds=1") == 0
    assert run_simulation("--data=a.zip,b.zip", "--rounds=1", "--fedprox-mu=0.1") == 0
    assert len([path for path in Path("runs").iterdir() if path.is_dir()]) == 3


def test_site_whose_images_changed_is_refused_when_it_is_no_longer_checked_as_part_of_the_run(capsys):
    # The run's identity holds the data of the sites of the first round; a site that joined later checks its own.
    assert run_simulation(THREE, "--rounds=2", "--join=c:2") == 0
    make_set("c.zip", images=range(300, 332), size=16, classes=["nv", "mel"], labels=[0] * 31 + [1])
    capsys.readouterr()
    assert run_simulation(THREE, "--rounds=3", "--join=c:2") == 2
    assert capsys.readouterr().err.endswith(
        f"error: {only_run()}/site-c was started with other settings (the data differ); expected the same, or another "
        "folder\n")


def test_discriminators_stay_at_the_sites_if_only_the_generator_is_shared(capsys):
    assert run_simulation(THREE, "--rounds=2") == 0
    assert run_simulation(THREE, "--rounds=2", "--share=G", "--outdir=G") == 0
    both, alone = (lines(only_run(outdir) / "server") for outdir in ("runs", "G"))
    sizes = [sum(parameter.numel() for parameter in getattr(load_network(snapshot_of("runs")), role).parameters())
             for role in ("D",)]
    assert both[0]["Exchange/bytes_up/a"] - alone[0]["Exchange/bytes_up/a"] == pytest.approx(4 * sizes[0], abs=20_000)
    assert load_network(snapshot_of("G")).D is None
    weights = [state_of(only_run("G") / f"site-{name}")["training/D/b4.fc.weight"] for name in ("a", "b", "c")]
    assert not torch.equal(weights[0], weights[1])
    # With D shared all sites begin each round with the same one, and their D of the first round are averaged.
    assert set(alone[0]) == {name for name in both[0]}


def test_average_at_the_server_is_a_third_of_the_bytes_less_and_follows_the_mean(capsys):
    assert run_simulation(THREE, "--rounds=2") == 0
    assert run_simulation(THREE, "--rounds=2", "--ema=server", "--outdir=server") == 0
    full, less = (lines(only_run(outdir) / "server")[0]["Exchange/bytes_up/a"] for outdir in ("runs", "server"))
    assert less / full == pytest.approx(2 / 3, abs=0.05)
    a, b = newest("runs"), newest("server")
    assert [name for name in a if not name.startswith("G_ema") and not torch.equal(a[name], b[name])] == []
    name = "G_ema.synthesis.b4.const"
    assert not torch.equal(a[name], b[name])
    # With the ramp-up of the tiny preset the average is close to the newest networks in both cases.
    assert torch.dist(a[name], b[name]) < torch.dist(a[name], initial(name))


def test_bfloat16_sends_half_the_bytes_and_trains_nearly_alike(capsys):
    assert run_simulation(THREE, "--rounds=2", "--aug=noaug") == 0
    assert run_simulation(THREE, "--rounds=2", "--aug=noaug", "--payload=bfloat16", "--outdir=half") == 0
    full, half = (lines(only_run(outdir) / "server")[0]["Exchange/bytes_up/a"] for outdir in ("runs", "half"))
    assert half / full == pytest.approx(0.5, abs=0.02)
    a, b = newest("runs"), newest("half")
    moved = sum((a[name] - initial(name)).square().sum() for name in PARAMETERS).sqrt()
    apart = sum((a[name] - b[name]).square().sum() for name in PARAMETERS).sqrt()
    assert 0 < apart < 0.3 * moved


def test_snapshot_says_what_it_was_trained_on_and_by_whom(capsys):
    assert run_simulation(THREE, "--rounds=1") == 0
    info = read_info(snapshot_of("runs"))
    assert info["run"] == only_run().name
    assert info["kimg"] == 0.06
    assert (info["classes"], info["class_counts"]) == (["nv", "mel"], [50, 14])
    assert info["training_data"]["num_images"] == 64
    assert {name: site["num_images"] for name, site in info["training_data"]["sites"].items()} == {
        "a": 12, "b": 20, "c": 32}


def test_scores_of_held_out_images_are_those_of_the_mean_and_of_each_site(capsys):
    make_set("held.zip", images=range(400, 410), size=16, classes=["nv", "mel"], labels=[0, 1] * 5)
    assert run_simulation(THREE, "--rounds=1", "--valid=held.zip") == 0
    found = lines(only_run() / "server")[0]
    assert len({found[name] for name in ("Loss/scores/valid", *(f"Sites/{each}/Loss/scores/valid" for each in "abc"))}
               ) == 4


def test_state_that_cannot_be_saved_stops_the_run_where_it_can_continue(monkeypatch, capsys, whole):
    saved = []

    def full(self, state):
        if "rounds" in state and (saved.append(state["rounds"]) or state["rounds"] == 2):
            raise OSError(28, "No space left on device")
        return save(self, state)

    save = CheckpointPair.save
    monkeypatch.setattr(CheckpointPair, "save", full)
    assert run_simulation(THREE, "--rounds=2") == 75
    assert ("stopped after round 2 (the server's state could not be saved: No space left on device); the same command "
            "continues") in log()
    monkeypatch.setattr(CheckpointPair, "save", save)
    assert run_simulation(THREE, "--rounds=2") == 0
    assert unlike(whole, only_run()) == []


@pytest.mark.parametrize("share", ["G,D", "G"])
def test_fedprox_holds_the_sites_near_the_server(share, capsys):
    norms = []
    for mu in (0, 10):
        assert run_simulation(THREE, "--rounds=1", f"--share={share}", f"--fedprox-mu={mu}", f"--outdir=mu{mu}") == 0
        norms.append(lines(only_run(f"mu{mu}") / "server")[0]["Update/norm/c"])
    assert norms[1] < 0.95 * norms[0]


def snapshot_of(outdir):
    return sorted(only_run(outdir).glob("server/network-snapshot-*.safetensors"))[-1]


def initial(name):
    """Return a tensor before training, from the seed."""
    networks = load_network(snapshot_of("runs"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = Generator(**networks.G.init_kwargs)
        D = Discriminator(**networks.D.init_kwargs)
    role, _, rest = name.partition(".")
    return (D if role == "D" else G).state_dict()[rest]


PARAMETERS = ("G.synthesis.b4.const", "G.synthesis.b8.conv0.weight", "G.mapping.fc0.weight", "D.b4.fc.weight",
              "D.b8.conv0.weight")
