"""Whole simulations: one institution is train.py, killed runs, several processes, and what other programs open."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from imagesets.phantoms.make import write_phantoms
from tests.helpers.simulations import differing, newest, only_run, state_of, unlike
from tests.helpers.training_runs import environment, half_written
from training.snapshot import load_network

ROOT = Path(__file__).parent.parent.parent
CLASSES = {"benign": 0.7, "melanoma": 0.3}
KILLS = 10
SHORT = ("--rounds=3", "--round-kimg=0.028", "--batch=4", "--cfg=tiny", "--cond=1", "--mirror=1", "--precision=fp32",
         "--device=cpu", "--workers=1", "--tick=0.012", "--outdir=runs", "--data=a.zip,b.zip,c.zip")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with institutions of about 40, 24 and 16 phantoms of 16x16, of different patients, and held-out ones."""
    folder = tmp_path_factory.mktemp("federated")
    write_phantoms(folder / "all.zip", workers=1, count=104, resolution=16, classes=CLASSES, seed=0, bias={})
    run(folder, ("dataset_tool.py", "split", "all.zip"), "--parts=a:0.385,b:0.23,c:0.155,held:0.23")
    for name in ("a", "b", "c", "held"):
        (folder / f"all-{name}.zip").rename(folder / f"{name}.zip")
    return folder


def command(program, *flags, usual=()):
    given = {flag.partition("=")[0] for flag in flags}
    return [sys.executable, str(ROOT / program[0]), *program[1:],
            *(flag for flag in usual if flag.partition("=")[0] not in given), *flags]


def run(folder, program, *flags, usual=()):
    """Run a program to its end; return its output."""
    done = subprocess.run(command(program, *flags, usual=usual), cwd=folder, env=environment(), capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def simulate(folder, *flags):
    return run(folder, ("federate.py", "simulate"), *flags, usual=SHORT)


@pytest.fixture(scope="module")
def unbroken(workplace):
    simulate(workplace, "--outdir=unbroken")
    return workplace / only_run(workplace / "unbroken")


@pytest.mark.slow
def test_one_institution_is_train_py_bit_for_bit(workplace):
    same = ["--data=a.zip", "--batch=16", "--cfg=tiny", "--cond=1", "--mirror=1", "--precision=fp32", "--device=cpu",
            "--workers=1", "--metrics=none"]
    run(workplace, ("federate.py", "simulate"), "--outdir=one", "--rounds=3", "--round-kimg=0.336", *same)
    run(workplace, ("train.py",), "--outdir=central", "--kimg=1", *same)
    one, central = only_run(workplace / "one"), only_run(workplace / "central")
    networks = [load_network(path) for path in (one / "server" / "network-snapshot-000001.safetensors",
                                                central / "network-snapshot-000001.safetensors")]
    for role in ("G", "D", "G_ema"):
        assert differing(*(getattr(each, role).state_dict() for each in networks)) == []
    site, state = state_of(one / "site-a"), state_of(central)
    parts = ("training/g_adam/", "training/d_adam/", "training/pl_mean", "training/augment", "training/ada_signs",
             "training/nimg", "training/iteration")
    assert [name for name in state if name.startswith(parts) and not same_value(state[name], site[name])] == []


def same_value(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.slow
def test_simulation_killed_at_random_moments_ends_as_an_unbroken_one(unbroken, workplace, tmp_path):
    moments, halves, kills = random.Random(0), 0, 0
    here = ["--outdir=" + str(tmp_path / "runs"), "--state-minutes=0.005"]
    while kills < KILLS:
        process = subprocess.Popen(command(("federate.py", "simulate"), *here, usual=SHORT), cwd=workplace,
                                   env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   start_new_session=True)
        for line in process.stdout:
            if line.startswith("run: "):
                break
        end, in_a_write, folder = time.monotonic() + moments.uniform(0, 1.5), kills % 3 == 2, tmp_path / "runs"
        while process.poll() is None and (time.monotonic() < end or (in_a_write and not writing(folder))):
            time.sleep(0.001)
        process.kill()
        _, errors = process.communicate()
        if process.returncode == 0:
            break  # it finished before
        assert process.returncode == -signal.SIGKILL, errors
        kills, halves = kills + 1, halves + bool(writing(folder))
    assert kills >= 3
    simulate(workplace, *here)
    assert unlike(unbroken, only_run(tmp_path / "runs")) == []
    assert not writing(tmp_path / "runs")
    if kills == KILLS:
        assert halves >= 1


def writing(folder):
    """Return the half-written files of the server and the sites."""
    return [path for inner in folder.glob("*/*") if inner.is_dir() for path in half_written(inner)]


@pytest.mark.slow
def test_sites_at_the_same_time_are_sites_in_turn(unbroken, workplace, tmp_path):
    simulate(workplace, f"--outdir={tmp_path}", "--gpus=2")  # each process has one thread, as the only one has
    assert unlike(unbroken, only_run(tmp_path)) == []


@pytest.mark.slow
def test_stopped_processes_continue_with_another_number_of_them(unbroken, workplace, tmp_path):
    process = subprocess.Popen(command(("federate.py", "simulate"), f"--outdir={tmp_path}", "--gpus=3", usual=SHORT),
                               cwd=workplace, env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    for line in process.stdout:
        if line.startswith("round 1 "):
            break
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, 75), errors  # 0 if it was too late
    simulate(workplace, f"--outdir={tmp_path}")
    assert unlike(unbroken, only_run(tmp_path)) == []


@pytest.mark.slow
def test_networks_of_the_server_are_opened_by_the_other_programs(unbroken, workplace, tmp_path):
    server = unbroken / "server"
    run(workplace, ("generate.py",), f"--network={server}", "--seeds=0-3", "--class=melanoma", f"--outdir={tmp_path}")
    assert len([*tmp_path.glob("*.png")]) == 4
    found = run(workplace, ("calc_metrics.py",), f"--network={server}", "--data=held.zip", "--metrics=kid20_full",
                "--detector=random-conv", "--device=cpu")
    record = json.loads(found)
    assert (record["metric"], record["num_fake"]) == ("kid20_full", 20)
    lines = (server / "metric-kid20_full.jsonl").read_text().splitlines()
    assert [json.loads(line)["snapshot_pkl"] for line in lines] == ["network-snapshot-000000.safetensors"]
    run(workplace, ("projector.py",), f"--network={server}", "--data=held.zip", "--count=1", "--num-steps=3",
        "--detector=pixels", "--save-video=0", f"--outdir={tmp_path / 'projected'}", "--device=cpu")


@pytest.mark.slow
def test_metrics_of_held_out_images_and_of_shared_statistics(workplace, tmp_path):
    short = ["--rounds=1", "--detector=random-conv", "--data=a.zip,b.zip"]
    simulate(workplace, *short, f"--outdir={tmp_path / 'held'}", "--holdout=held.zip", "--metrics=kid20_full")
    (line,) = (only_run(tmp_path / "held") / "server" / "metric-kid20_full.jsonl").read_text().splitlines()
    assert json.loads(line)["num_fake"] == 20
    write_phantoms(tmp_path / "many.zip", workers=1, count=240, resolution=16, classes=CLASSES, seed=9, bias={})
    run(tmp_path, ("dataset_tool.py", "split", "many.zip"), "--institutions=2")
    big, more = (str(tmp_path / f"many-institution{number}.zip") for number in (1, 2))
    data = f"--data={big},{more}"
    simulate(workplace, *short[:2], data, "--sites=big,more", f"--outdir={tmp_path / 'shared'}", "--share-statistics",
             "--metrics=fid20_full")
    server = only_run(tmp_path / "shared") / "server"
    (line,) = (server / "metric-fid20_full.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["num_real"] == 240
    assert set(record["sites"]) == {"big", "more"}
    # calc_metrics.py on the union gives the same value, though the images are in another place.
    run(workplace, ("dataset_tool.py",), f"--source={big}", f"--source={more}", f"--dest={tmp_path / 'union.zip'}")
    found = json.loads(run(workplace, ("calc_metrics.py",), f"--network={server}", f"--data={tmp_path / 'union.zip'}",
                           "--metrics=fid20_full", "--detector=random-conv", "--device=cpu"))
    assert newest(tmp_path / "shared")
    assert found["results"]["fid20_full"] == pytest.approx(record["results"]["fid20_full"], rel=0.2)
