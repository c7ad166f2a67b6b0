"""Whole training runs through train.py: stopped, killed, damaged, continued."""

import json
import random
import shutil
import signal
import subprocess
import sys

import pytest

from dnnlib.files import sha256_of
from tests.helpers.full_disk import needs_mount
from tests.helpers.training_runs import (
    METRIC,
    METRIC_FLAGS,
    OFTEN,
    ROOT,
    RUN_NAME,
    command,
    differences,
    environment,
    kill_run,
    make_phantoms,
    metrics,
    run,
    seconds,
    start,
    state,
    statistics,
    wait_for_line,
)
from training.snapshot import load_network

KILLS = 10


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """An uninterrupted run: (its working folder, its run folder)."""
    folder = tmp_path_factory.mktemp("unbroken")
    make_phantoms(folder / "phantom.zip")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder, folder / "runs" / RUN_NAME


@pytest.fixture
def workplace(unbroken, tmp_path):
    """A folder with the same data set, and the run folder that the same command makes in it."""
    shutil.copy(unbroken[0] / "phantom.zip", tmp_path)
    return tmp_path, tmp_path / "runs" / unbroken[1].name


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


def test_run_reports_its_metric_with_all_it_was_computed_from(unbroken):
    _, folder = unbroken
    lines = metrics(folder)
    assert [line["nimg"] for line in lines] == [8, 208, 408, 608, 808, 1000]
    last, snapshot = lines[-1], folder / "network-snapshot-000001.safetensors"
    assert (last["metric"], last["snapshot_pkl"], last["network_sha256"]) == ("kid80_full", snapshot.name,
                                                                             sha256_of(snapshot))
    assert (last["num_real"], last["num_fake"], last["detector"], last["num_gpus"]) == (24, 80, "random-conv", 1)
    assert last["results"].keys() == {"kid80_full"}
    assert (folder / "metric-kid80_full.png").exists()


def test_metric_of_a_run_is_what_calc_metrics_finds(unbroken):
    here, folder = unbroken
    snapshot = shutil.copy(folder / "network-snapshot-000001.safetensors", here)  # away from the run: nothing is added
    done = subprocess.run([sys.executable, ROOT / "calc_metrics.py", f"--network={snapshot}", "--device=cpu",
                           f"--data={here / 'phantom.zip'}", *METRIC_FLAGS, "--verbose=0"], env=environment(),
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["results"] == metrics(folder)[-1]["results"]


def test_network_file_says_how_many_images_each_class_had(unbroken):
    networks = load_network(unbroken[1] / "network-snapshot-000001.safetensors")
    assert (networks.config["info"]["classes"], networks.config["info"]["class_counts"]) == (["benign", "melanoma"],
                                                                                            [17, 7])


@pytest.mark.parametrize("flags", [(), ("--gpus=2",)])
def test_finished_run_is_left_alone_by_its_command_in_one_line(unbroken, workplace, flags):
    _, folder = unbroken
    here, same = workplace
    shutil.copytree(folder, same)
    before = {path.name: path.read_bytes() for path in same.iterdir()}
    done = run(here, *flags)
    assert (done.returncode, done.stdout, done.stderr) == (
        0, f"already finished at 1 kimg: runs/{RUN_NAME}; --new starts another run\n", "")
    assert {path.name: path.read_bytes() for path in same.iterdir()} == before
    assert [path.name for path in same.parent.iterdir()] == [RUN_NAME]


@pytest.mark.slow
def test_finished_run_is_continued_by_two_processes_and_by_one(unbroken, workplace):
    """With a share of the batch each, in equal passes: metrics, snapshots and ticks continue, and all processes end."""
    here, same = workplace
    assert run(here, "--batch-gpu=4").returncode == 0
    done = run(here, "--kimg=2", "--gpus=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "continues at image 1000\n" in done.stdout
    assert state(same)["training/nimg"] == 2000
    done = run(here, "--kimg=3")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"runs/{RUN_NAME}: 4 images per pass, as the run had before" in done.stdout
    assert state(same)["training/nimg"] == 3000
    assert [path.name for path in same.parent.iterdir()] == [RUN_NAME]
    options = json.loads((same / "training_options.json").read_text())
    assert (options["passes"], options["finished"]) == ([{"from_nimg": 0, "batch_gpu": 4}], True)


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_as_an_unbroken_one(unbroken, workplace):
    here, folder = workplace
    moments = random.Random(1)
    longest = min(2.5, seconds(unbroken[1]) / KILLS)  # so that the run does not end before
    kills = [kill_run(here, moments.uniform(0, longest), in_a_write=index % 3 == 2) for index in range(KILLS)]
    done = run(here, OFTEN)
    assert None not in kills  # it never came to its end before
    assert sum(kills) >= KILLS // 5  # that many left a half-written file
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
    assert f"({number.name} received); the same command continues" in output
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
    assert "training-state.prev.pt is used instead" in done.stdout
    assert differences(unbroken[1], folder) == []


@needs_mount
@pytest.mark.slow
def test_full_disk_leaves_the_state_before_and_the_run_goes_on(unbroken, workplace):
    here, _ = workplace
    (here / "runs").mkdir()
    mount = 'mount -t tmpfs -o size=48m tmpfs "$1/runs"; exec "$2" -m tests.helpers.full_disk_program "$1"'
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(here),
                           sys.executable], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["warning"] == ("warning: failed to save a resumable state (No space left on device); training "
                                "continues\n")
    assert found["full"] == found["still full"]
    assert found["full"]["nimg"] in (8, 208, 408)  # that of a tick before
    assert found["freed"]["nimg"] in (608, 808)
    assert {found[name]["message"] for name in ("full", "freed")} == {None}  # no state was damaged
    assert (found["code"], found["errors"]) == (0, "")
    assert f"continues at image {found['freed']['nimg']}\n" in found["output"]
    assert differences(unbroken[1], here / "ended") == [f"metric-{METRIC}.jsonl"]
    pairs = list(zip(metrics(unbroken[1]), metrics(here / "ended"), strict=True))
    assert any(ended["network_sha256"] is None for _, ended in pairs)  # of a network that found no room
    for whole, ended in pairs:
        note = f"{whole['snapshot_pkl']} could not be written (No space left on device)"
        missing = {"network_sha256": None, "snapshot_pkl": None, "snapshot_note": note}
        assert ended == whole | (missing if ended["network_sha256"] is None else {})


@pytest.mark.slow
def test_max_hours_stops_with_a_state(workplace):
    here, folder = workplace
    done = run(here, "--max-hours=0.0000001")
    assert done.returncode == 75
    assert "the --max-hours=1e-07 limit was reached" in done.stdout
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
def test_two_processes_say_each_note_once(workplace):
    here, _ = workplace
    arguments = command(here, "--gpus=2", "--max-hours=0.0000001")
    arguments = [argument for argument in arguments if argument not in METRIC_FLAGS]
    nothing_cached = environment() | {"DNNLIB_CACHE_DIR": str(here / "cache")}  # so that there is a note
    done = subprocess.run(arguments, cwd=here, env=nothing_cached, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False)
    assert done.returncode == 75, done.stdout
    beginnings = [line.partition(" ")[0] for line in done.stdout.splitlines()]
    for note in ("device:", "precision:", "metrics:", "data:"):
        assert beginnings.count(note) == 1, done.stdout


@pytest.mark.slow
def test_disk_that_fails_for_one_of_two_processes_stops_both_for_a_requeue(workplace):
    here, _ = workplace
    broken = here / "broken"
    program = [sys.executable, "-m", "tests.helpers.failing_disk", str(ROOT / "train.py"), str(here / "phantom.zip"),
               str(broken), "1"]
    arguments = [f"--outdir={here / 'runs'}", *command(here, "--batch-gpu=4", "--gpus=2")[3:]]
    with subprocess.Popen([*program, *arguments], cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        wait_for_line(process, "tick 0 ")
        broken.touch()
        out, err = process.communicate()
    assert (process.returncode, err) == (75, "")
    last = out.splitlines()[-1]
    assert last.startswith("stopped after ")
    assert last.endswith(" cannot be read (Input/output error, tried 3 times in 0.02 s): a disk or network failure; "
                         "the same command continues")
    nimg = int(last.split()[2])
    assert state(next((here / "runs").iterdir()))["training/nimg"] == nimg >= 8


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_passes(workplace, tmp_path):
    here, folder = workplace
    valid = f"--valid={make_phantoms(here / 'valid.zip', count=13, seed=1)}"
    alone = run(here, "--batch-gpu=4", valid)
    assert alone.returncode == 0, alone.stderr
    shutil.move(folder, tmp_path / "alone")
    together = run(here, "--batch-gpu=4", "--gpus=2", valid)
    assert together.returncode == 0, together.stderr
    folders = tmp_path / "alone", next((here / "runs").iterdir())
    first, second = map(state, folders)
    assert first.keys() == second.keys()
    assert first["training/nimg"] == second["training/nimg"] == 1000
    # The first tick is one iteration from equal states. float32 adds up in another order; later that grows.
    ticks = [statistics(folder)[0] for folder in folders]
    assert ticks[0].keys() == ticks[1].keys()
    assert ticks[0]["Loss/scores/valid"]["num"] == 13  # all of them, which are no multiple of anything
    for name, entry in ticks[0].items():
        assert ticks[1][name]["num"] == entry["num"], name
        assert ticks[1][name]["mean"] == pytest.approx(entry["mean"], rel=1e-3, abs=1e-5), name
    measured = [metrics(folder)[0] for folder in folders]  # by both processes
    assert [line.pop("num_gpus") for line in measured] == [1, 2]
    values = [line.pop("results")["kid80_full"] for line in measured]
    assert values[1] == pytest.approx(values[0], rel=1e-3)
    digests = {line.pop("network_sha256") for line in measured}
    assert len(digests) == 2  # as the weights, which float32 rounds in another order
    assert measured[0] == measured[1]
