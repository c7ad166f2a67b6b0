"""Whole training runs through train.py: stopped, killed, damaged, continued."""

import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.training_runs import command, differences, environment, make_phantoms, run, state, statistics

KILLS = 10


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing happened to: (its working folder, its run folder)."""
    folder = tmp_path_factory.mktemp("unbroken")
    make_phantoms(folder / "phantom.zip")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder, folder / "runs" / "00000-phantom-cond-tiny-kimg1-batch8"


@pytest.fixture
def workplace(unbroken, tmp_path):
    """A folder with the same data set, and the run folder that the same command makes in it."""
    shutil.copy(unbroken[0] / "phantom.zip", tmp_path)
    return tmp_path, tmp_path / "runs" / unbroken[1].name


def start(folder, *flags):
    return subprocess.Popen(command(folder, *flags), cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def wait_for_line(process, beginning):
    for line in process.stdout:
        if line.startswith(beginning):
            return line
    raise AssertionError(process.stderr.read())


def test_run_leaves_what_users_expect(unbroken):
    _, folder = unbroken
    names = {path.name for path in folder.iterdir()}
    assert names >= {"training_options.json", "log.txt", "stats.jsonl", "reals.png", "fakes_init.png",
                     "fakes000000.png", "fakes000001.png", "network-snapshot-000000.safetensors",
                     "network-snapshot-000001.safetensors", "training-state.pt", "training-state.prev.pt"}
    assert [line["Progress/kimg"]["mean"] for line in statistics(folder)] == [0.008, 0.208, 0.408, 0.608, 0.808, 1.0]
    last = statistics(folder)[-1]
    assert last["Loss/G/loss"]["num"] == 192
    assert last["Trouble/skipped/Gmain"] == {"num": 24, "mean": 0.0, "std": 0.0}
    assert state(folder)["training/nimg"] == 1000
    assert not any(name.startswith((".tmp", "lock")) for name in names)


def test_finished_run_is_left_alone_and_a_new_one_begins(unbroken, workplace):
    _, folder = unbroken
    here, same = workplace
    shutil.copytree(folder, same)
    before = {path.name: path.read_bytes() for path in same.iterdir()}
    process = start(here)
    assert wait_for_line(process, "run: ").strip().endswith("00001-phantom-cond-tiny-kimg1-batch8")
    process.kill()
    process.communicate()
    assert {path.name: path.read_bytes() for path in same.iterdir()} == before


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_as_an_unbroken_one(unbroken, workplace):
    here, folder = workplace
    random_moments, restarts = random.Random(1), 0
    for _ in range(KILLS):
        process = start(here, "--state-minutes=0.005")
        try:
            wait_for_line(process, "run: ")
            time.sleep(random_moments.uniform(0, 2.5))
            restarts += process.poll() is None
            process.kill()
        finally:
            process.communicate()
        if process.returncode == 0:
            break
    done = run(here, "--state-minutes=0.005")
    assert restarts > KILLS // 2
    assert done.returncode == 0, done.stderr
    assert differences(unbroken[1], folder) == []
    assert not list(folder.glob(".tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_signal_finishes_the_iteration_and_the_same_command_continues(unbroken, workplace, number):
    here, folder = workplace
    process = start(here)
    wait_for_line(process, "tick 1 ")
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"({number.name} arrived); the same command continues" in output
    assert run(here).returncode == 0
    assert differences(unbroken[1], folder) == []


@pytest.mark.slow
def test_damaged_newest_state_is_skipped_for_the_one_before(unbroken, workplace):
    here, folder = workplace
    process = start(here)
    wait_for_line(process, "tick 2 ")
    process.kill()
    process.communicate()
    newest = folder / "training-state.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0x55
    newest.write_bytes(data)
    done = run(here)
    assert done.returncode == 0, done.stderr
    assert "training-state.prev.pt is taken instead" in done.stdout
    assert differences(unbroken[1], folder) == []


@pytest.mark.slow
def test_max_hours_stops_with_a_state(workplace):
    here, folder = workplace
    done = run(here, "--max-hours=0.0000001")
    assert done.returncode == 75
    assert "--max-hours=1e-07 are over" in done.stdout
    assert state(folder)["training/nimg"] == 8


@pytest.mark.slow
def test_live_run_refuses_a_second_process(workplace):
    here, _ = workplace
    first = start(here)
    try:
        wait_for_line(first, "tick 0 ")
        second = run(here)
        assert second.returncode == 2
        assert second.stderr.startswith("error: runs/00000-phantom-cond-tiny-kimg1-batch8 is being trained by ")
        assert second.stderr.count("\n") == 1
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_passes(workplace, tmp_path):
    here, folder = workplace
    alone = run(here, "--batch-gpu=4")
    assert alone.returncode == 0, alone.stderr
    shutil.move(folder, tmp_path / "alone")
    together = run(here, "--batch-gpu=4", "--gpus=2")
    assert together.returncode == 0, together.stderr
    folders = tmp_path / "alone", next((here / "runs").iterdir())
    first, second = map(state, folders)
    assert first.keys() == second.keys()
    assert first["training/nimg"] == second["training/nimg"] == 1000
    # The first tick is one iteration from equal states. float32 adds up in another order; later that grows.
    ticks = [statistics(folder)[0] for folder in folders]
    assert ticks[0].keys() == ticks[1].keys()
    for name, entry in ticks[0].items():
        assert ticks[1][name]["num"] == entry["num"], name
        assert ticks[1][name]["mean"] == pytest.approx(entry["mean"], rel=1e-3, abs=1e-5), name
