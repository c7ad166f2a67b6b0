"""Runs of a federation of real processes that lose sites, the server, the network, or the room on a disk."""

import importlib.util
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.deployments import (
    Federation,
    federate,
    running,
    same_networks,
    wait_until,
    with_tiny,
)
from tests.helpers.full_disk import needs_mount
from tests.helpers.full_disk_program import fill
from tests.helpers.simulations import lines, state_of, without_times

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    importlib.util.find_spec("nvflare") is None, reason="needs the extra federated, pip install .[federated]")]

TIMEOUT = 15  # seconds, of the server
ITERATIONS = 10  # of a round and site; each is a tick, and ends with a saved state
IMAGES = 8 * ITERATIONS
FLAGS = (f"--round-kimg={IMAGES / 1000}", "--tick=0.008", "--state-minutes=0.0001")
SIMULATED_ROUNDS = 4


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    with running(tmp_path_factory.mktemp("federation"), site_timeout=TIMEOUT, networks=("a",)) as federation:
        federation.start_all()
        yield federation
        if federation.programs:
            federation.stop()


@pytest.fixture
def federation(programs):
    """The federation, with all its programs running."""
    for name in ("server", *programs.sites):
        if name not in programs.programs or programs.programs[name].process.poll() is not None:
            programs.start_server() if name == "server" else programs.start_site(name)
    return programs


@pytest.fixture(scope="module")
def simulated(programs):
    """Folder of the same run in one process."""
    federate("simulate", "--data=a.zip,b.zip,c.zip", "--outdir=simulated", "--name=run", "--workers=0",
             *with_tiny([*FLAGS, f"--rounds={SIMULATED_ROUNDS}"]), cwd=programs.folder)
    return programs.folder / "simulated" / "00000-run"


def wait_for_iteration(federation: Federation, run: str, site: str, round: int, iteration: int) -> None:
    """Wait until a site is in the midst of a round."""
    tick = ITERATIONS * (round - 1) + iteration - 1
    log = federation.state_folder(site, run) / "log.txt"
    wait_until(lambda: log.exists() and re.search(rf" tick {tick} ", log.read_text()), f"tick {tick} of {site}", 180,
               lambda: log.read_text() if log.exists() else federation.log_of(run))


def saved_images(federation: Federation, run: str, site: str) -> int:
    """Return how many images a site has seen at its newest state."""
    saved = torch.load(federation.state_folder(site, run) / "training-state.pt", weights_only=True)
    return saved["training"]["nimg"]


def log_of(federation: Federation, run: str, site: str) -> str:
    return (federation.state_folder(site, run) / "log.txt").read_text()


def is_same(one, other) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def unlike(federation: Federation, run: str, simulated: Path) -> list[str]:
    """Return what differs between a run and the simulation, at the server and the sites."""
    found = [] if same_networks(federation.run_of(run), simulated) else ["networks"]
    folders = {"server": federation.run_of(run) / "server"}
    folders |= {f"site-{name}": federation.state_folder(name, run) for name in federation.sites}
    for name, folder in folders.items():
        mine, theirs = state_of(folder), state_of(simulated / name)
        found += [f"{name}/{key}" for key in mine.keys() | theirs.keys()
                  if key not in mine or key not in theirs or not is_same(mine[key], theirs[key])]
    if without_times(folders["server"]) != without_times(simulated / "server"):
        found.append("server/stats.jsonl")
    return found


def test_run_with_faults_that_waits_for_lost_sites_ends_as_the_simulation(federation, simulated):
    run = "waits"
    federation.start_run(run, *FLAGS, f"--rounds={SIMULATED_ROUNDS}", "--on-lost=wait")

    # Round 1: the program of a site is killed, without its job; the job of another one stands still for longer than the
    # time-out, but its program gives signs of life.
    wait_for_iteration(federation, run, "b", 1, 4)
    frozen, orphan = federation.programs["a"].job(), federation.programs["b"].job()
    frozen.send_signal(signal.SIGSTOP)
    federation.programs["b"].process.kill()
    killed = time.monotonic()
    psutil.wait_procs([orphan], timeout=60)
    assert not orphan.is_running()
    images = saved_images(federation, run, "b")
    assert 0 < images < IMAGES
    wait_until(lambda: federation.state_of(run)["sites"]["b"]["state"] == "lost", "site b is lost", 90)
    assert TIMEOUT - 6 < time.monotonic() - killed < TIMEOUT + 30
    assert federation.state_of(run)["sites"]["a"]["state"] == "training"
    frozen.send_signal(signal.SIGCONT)
    wait_until(lambda: federation.state_of(run)["sites"]["a"]["state"] == "done", "site a is done", 60)
    assert "round 1  " not in federation.log_of(run)
    assert "waits for the lost site b (--on-lost=wait)" in federate(
        "logs", "--kit=kits/admin", f"--name={run}", cwd=federation.folder).stdout
    federation.start_site("b")
    federation.wait_for_line(run, "round 1  ")
    assert f"continues at image {images}" in log_of(federation, run, "b")

    # Round 2: the program of the server is killed, without its job.
    wait_for_iteration(federation, run, "c", 2, 4)
    orphan = federation.programs["server"].job()
    federation.programs["server"].process.kill()
    psutil.wait_procs([orphan], timeout=60)
    assert not orphan.is_running()
    federation.start_server()
    federation.start_run(run, *FLAGS, f"--rounds={SIMULATED_ROUNDS}", "--on-lost=wait")
    federation.wait_for_line(run, "round 2  ")

    # Round 3: the process that trains is killed, as for a lack of memory.
    wait_for_iteration(federation, run, "c", 3, 4)
    federation.programs["c"].job().kill()
    images = saved_images(federation, run, "c")
    federation.wait_for_line(run, "round 3  ")
    assert f"continues at image {images}" in log_of(federation, run, "c")

    # Round 4: the network is cut.
    wait_for_iteration(federation, run, "a", 4, 4)
    federation.networks["a"].cut()
    time.sleep(TIMEOUT / 2)  # not longer: what is tested is that nothing stalls afterwards
    federation.networks["a"].mend()
    federation.wait_for_state(run, "finished", 240)
    assert unlike(federation, run, simulated) == []


@pytest.mark.nightly
def test_run_that_continues_without_lost_sites_takes_them_back(federation):
    run = "continues"
    federation.start_run(run, *FLAGS, "--rounds=5", "--leave=c:2")

    # Round 1: a site loses power; the round ends without it after the time-out.
    wait_for_iteration(federation, run, "b", 1, 4)
    federation.programs["b"].kill()
    killed = time.monotonic()
    federation.wait_for_line(run, r"round 1: site b is lost \(it ended, or gave no sign of life for 15 seconds\); "
                             "the round goes on without it")
    assert TIMEOUT - 6 < time.monotonic() - killed < TIMEOUT + 30
    images = saved_images(federation, run, "b")

    # Round 3: it is back, which takes a moment: the other one stands still meanwhile. The third, which left for good,
    # has been stopped.
    wait_for_iteration(federation, run, "a", 3, 4)
    frozen = federation.programs["a"].job()
    frozen.send_signal(signal.SIGSTOP)
    assert federation.programs["c"].stop() == 0
    federation.start_site("b")
    log = federation.folder / "kits" / "server" / "log.txt"
    wait_until(lambda: "b can take part again" in log.read_text(), "the job begins anew", 60)
    frozen.send_signal(signal.SIGCONT)
    federation.wait_for_line(run, "round 3  ")
    log = log_of(federation, run, "b")
    assert f"continues at image {images}" in log
    assert ("warning: the site's newest state is of round 1, and round 3 begins: what the rounds between changed in "
            "its optimizers and augmentation is lost") in log

    # Round 4: one is told to stop, and does not come back.
    wait_for_iteration(federation, run, "a", 4, 4)
    assert federation.programs["a"].stop() == 0
    images = saved_images(federation, run, "a")
    assert 3 * IMAGES < images < 4 * IMAGES
    federation.wait_for_state(run, "finished")
    found = lines(federation.run_of(run) / "server")
    assert [line["Progress/sites"] for line in found] == [2, 2, 2, 1, 1]
    assert [line["Progress/kimg"] for line in found] == [IMAGES * sites / 1000 for sites in (2, 4, 6, 7, 8)]
    assert found[2]["Sites/b/Progress/kimg"] == 3 * IMAGES / 1000


@pytest.mark.nightly
@needs_mount
def test_run_on_a_full_disk_stops_and_goes_on_once_there_is_room(federation, simulated):
    run, flags = "full", (*FLAGS, f"--rounds={SIMULATED_ROUNDS}")
    federation.programs["server"].stop()
    server = federation.start_server(within=(
        "unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
        'mount -t tmpfs -o size=64m tmpfs "$0" && exec "$@"', str(federation.folder / "runs")))
    federation.runs = Path(f"/proc/{server.process.pid}/root{federation.folder}/runs")
    federation.start_run(run, *flags)
    federation.wait_for_line(run, "round 1  ")
    fill(federation.runs / "filler")
    state = federation.wait_for_state(run, "stopped")
    assert re.fullmatch(r"stopped after round \d .*", state["message"]), state["message"]
    (federation.runs / "filler").unlink()
    federation.start_run(run, *flags)
    federation.wait_for_state(run, "finished")
    assert unlike(federation, run, simulated) == []


@pytest.mark.nightly
def test_programs_that_are_stopped_save_states_and_leave_no_process(federation):
    run = "stopped"
    federation.start_run(run, "--round-kimg=10", "--tick=0.008", "--rounds=1")
    wait_for_iteration(federation, run, "b", 1, 10)
    federation.stop()
    ticks = [int(tick) for tick in re.findall(r" tick (\d+) ", log_of(federation, run, "b"))]
    assert saved_images(federation, run, "b") == 8 * (ticks[-1] + 1)
    left = [each.cmdline() for each in psutil.process_iter() if each.pid != psutil.Process().pid
            and str(federation.folder) in " ".join(each.cmdline())]
    assert left == []
