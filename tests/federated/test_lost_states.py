"""Simulations whose states are lost or cannot be saved, and what is pending when they stop or end."""

import os
import shutil
import signal
from functools import partial

import pytest

from federated.site import Site
from tests.helpers.make_sets import make_set
from tests.helpers.simulate_commands import isolate
from tests.helpers.simulations import lines, only_run, run_simulation, state_of, unlike
from torch_utils.checkpoint import CheckpointPair
from training.config import RunSettings
from training.run_output import snapshots_to_remove

TWO = "--data=a.zip,b.zip"


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Working folder with two institutions, and held-out images."""
    isolate(tmp_path, monkeypatch)
    for name, first, count in (("a", 0, 12), ("b", 100, 16), ("held", 200, 10)):
        make_set(f"{name}.zip", images=range(first, first + count), size=16, classes=["nv", "mel"],
                 labels=[index % 2 for index in range(count)])


def test_site_without_its_state_is_not_begun_anew_in_a_later_round(capsys):
    assert run_simulation(TWO, "--rounds=1") == 0
    site = only_run() / "site-b"
    shutil.rmtree(site)
    assert run_simulation(TWO, "--rounds=2") == 2
    assert capsys.readouterr().err.endswith(
        f"error: {site} has no resumable state, but the site takes part since round 1, and round 2 begins; expected "
        "training-state.pt: copy it back, let the site leave with --leave=b:1, or start another run with --new\n")
    assert run_simulation(TWO, "--rounds=2", "--leave=b:1") == 0


def test_site_that_no_round_has_an_update_of_begins_without_a_state(monkeypatch):
    assert run_simulation(TWO, "--rounds=1") == 0
    site = only_run() / "site-b"
    shutil.rmtree(site)
    monkeypatch.setattr("federated.simulation.Site", partial(Site, is_new=True))
    assert run_simulation(TWO, "--rounds=2") == 0
    assert lines(only_run() / "server")[1]["Sites/b/Progress/kimg"] == 0.04
    assert state_of(site)["round/number"] == 2


def test_site_whose_state_is_older_than_the_server_says_what_is_lost(tmp_path, capsys):
    assert run_simulation(TWO, "--rounds=1") == 0
    site = only_run() / "site-b"
    shutil.copytree(site, tmp_path / "old")
    assert run_simulation(TWO, "--rounds=2") == 0
    shutil.rmtree(site)
    shutil.copytree(tmp_path / "old", site)
    assert run_simulation(TWO, "--rounds=3") == 0
    assert ("warning: the site's newest state is of round 1, and round 3 begins: what the rounds between changed in "
            "its optimizers and augmentation is lost") in (site / "log.txt").read_text()


def test_server_without_its_state_is_not_begun_anew(capsys):
    assert run_simulation(TWO, "--rounds=2") == 0
    server = only_run() / "server"
    options = only_run() / "training_options.json"
    options.write_text(options.read_text().replace('"finished": true', '"finished": false'))
    for path in server.glob("training-state*"):
        path.unlink()
    before = (server / "stats.jsonl").read_bytes()
    assert run_simulation(TWO, "--rounds=2") == 2
    assert capsys.readouterr().err.endswith(
        f"error: {server} has trained 2 rounds, but its resumable state is missing; expected training-state.pt or "
        "training-state.prev.pt: copy one back, or start another run with --new\n")
    assert (server / "stats.jsonl").read_bytes() == before


def test_site_that_cannot_save_its_state_stops_the_run_where_it_can_continue(monkeypatch, capsys):
    def full(self, state):
        if state.get("round", {}).get("is_done") and state["round"]["number"] == 2 and "site-a" in str(self.newest):
            raise OSError(28, "No space left on device")
        return save(self, state)

    assert run_simulation(TWO, "--rounds=3", "--outdir=whole") == 0
    save = CheckpointPair.save
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointPair, "save", full)
        assert run_simulation(TWO, "--rounds=3") == 75
    assert ("stopped after round 2: the state could not be saved (No space left on device): the same command continues "
            "at image 20") in (only_run() / "site-a" / "log.txt").read_text()
    assert state_of(only_run() / "server")["rounds"] == 1
    assert run_simulation(TWO, "--rounds=3") == 0
    assert unlike(only_run("whole"), only_run()) == []


def test_metrics_that_are_aborted_by_a_stop_are_remembered_and_made_up(capsys):
    def aborted(G, *, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("measuring was canceled")

    def one(G, *, stop):
        return {"kid8_full": {"results": {"kid8_full": 1.0}}}

    flags = (TWO, "--rounds=2", "--holdout=held.zip", "--metrics=kid8_full", "--detector=random-conv")
    assert run_simulation(*flags, evaluate=aborted) == 75
    saved = state_of(only_run() / "server")
    assert saved["rounds"] == 1
    assert saved["missing_metrics/given_up_after"] is not None
    assert run_simulation(*flags, evaluate=one) == 0
    found = (only_run() / "server" / "metric-kid8_full.jsonl").read_text().splitlines()
    assert [f'"tick":{tick}' in line.replace(" ", "") for tick, line in zip((1, 2), found, strict=True)] == [True, True]


def test_snapshot_of_a_server_that_another_run_started_from_is_kept(capsys):
    assert run_simulation(TWO, "--rounds=1") == 0
    network, = only_run().glob("server/network-snapshot-*.safetensors")
    assert run_simulation("--data=b.zip", "--rounds=1", f"--resume={network}") == 0
    paths = [network.with_name(f"network-snapshot-00000{number}.safetensors") for number in (1, 2, 3)]
    shutil.copy(network, paths[0])
    for path in paths[1:]:
        path.write_bytes(b"another network")
    network.unlink()
    settings = RunSettings(outdir="runs", data=TWO, keep=1)
    assert snapshots_to_remove(paths[-1], settings, {}, ()) == [paths[1]]


@pytest.mark.parametrize("flags", [(), ("--share=G",)])
def test_fedprox_holds_the_networks_that_are_shared(flags, capsys):
    norms = []
    for mu in (0, 10):
        assert run_simulation(TWO, "--rounds=1", f"--fedprox-mu={mu}", f"--outdir=mu{mu}", *flags) == 0
        norms.append(lines(only_run(f"mu{mu}") / "server")[0]["Update/norm/b"])
    assert norms[1] < 0.95 * norms[0]
