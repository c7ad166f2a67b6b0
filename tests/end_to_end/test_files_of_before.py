"""Files that earlier programs wrote (tests/data/before, where README.md tells how) open, and work goes on with them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import calc_metrics
import dataset_tool
import generate
import projector
import train
from dnnlib.cli import run
from imagesets.reader import ImageSet
from tests.helpers.generator_files import pixels_in
from tests.helpers.image_files import read_png
from tests.helpers.narrow_train import NAME, narrow_preset
from tests.helpers.training_runs import METRIC_TIMING, environment, state, statistics
from training.presets import FIXED_PRESETS
from training.snapshot import load_network

ROOT = Path(__file__).parent.parent.parent
BEFORE = ROOT / "tests" / "data" / "before"
RUN = Path("runs") / "00000-kept"
NETWORK = RUN / "network-snapshot-000001.safetensors"
TRAIN = ("--outdir=runs", "--name=kept", "--data=data.zip", "--cfg=stylegan2", "--cond=1", "--mirror=1", "--batch=40",
         "--tick=0.24", "--snap=2", "--metrics=kid16_full", "--detector=random-conv", "--workers=1", "--device=cpu")
PROJECT_SET = ("--data=data.zip", "--count=3", "--detector=pixels")
# CPUs with other instructions add up in another order. An image then differs by a level here and there, and a distance
# by less than 2%. Adam takes steps of up to the learning rate, 0.0025, whatever the size of a gradient, and so
# magnifies the noise of tiny ones: weights may come to differ by two steps of 50. Without AVX they differed by 0.0002.
LEVELS, MOST_APART = 2, 0.005


@pytest.fixture
def before(tmp_path, monkeypatch, one_thread):
    """Work in a copy of all kept files."""
    copy_kept(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", "cache")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def copy_kept(folder):
    for path in BEFORE.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)


def start(folder):
    """Start the command of the kept run in a folder, for 2 kimg."""
    builds = os.path.abspath(os.environ["TORCH_EXTENSIONS_DIR"])
    return subprocess.Popen([sys.executable, "-m", "tests.helpers.narrow_train", *TRAIN, "--kimg=2"], cwd=folder,
                            text=True,
                            env={**environment(), "PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": builds},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folders of the kept run, continued to 2 kimg, and of a new one of the same length."""
    continued, unbroken = tmp_path_factory.mktemp("continued"), tmp_path_factory.mktemp("unbroken")
    copy_kept(continued)
    shutil.copyfile(BEFORE / "data.zip", unbroken / "data.zip")
    processes = [start(folder) for folder in (continued, unbroken)]
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    assert [code for _, code in ends] == [0, 0], ends
    return continued / RUN, unbroken / RUN


def scores(folder):
    """Return the lines of the run's own metric without what may differ."""
    lines = [json.loads(line) for line in (folder / "metric-kid16_full.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in METRIC_TIMING} for line in lines]


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_finished_run_is_left_alone_by_its_command(before, capsys, monkeypatch):
    monkeypatch.setitem(FIXED_PRESETS, NAME, narrow_preset())
    files = contents("runs")
    assert "already finished" in "".join(call(capsys, train, *TRAIN, "--kimg=1", "--tune-malloc=0"))
    assert contents("runs") == files


def test_run_is_continued_and_not_begun_anew(trained):
    continued, _ = trained
    assert os.listdir(continued.parent) == [RUN.name]
    for name in ("stats.jsonl", "log.txt", "metric-kid16_full.jsonl"):
        kept = (BEFORE / RUN / name).read_bytes()
        assert (continued / name).read_bytes().startswith(kept)
        assert len((continued / name).read_bytes()) > len(kept)
    for name in ("network-snapshot-000000.safetensors", "network-snapshot-000001.safetensors"):  # where a run ended
        assert (continued / name).read_bytes() == (BEFORE / RUN / name).read_bytes()


def test_continued_run_leaves_what_an_unbroken_one_does(trained):
    continued, unbroken = trained
    of_calc_metrics = {"metric-fid24_full.jsonl", "measured-fid24_full.png"}
    events = [name for name in os.listdir(continued) if name.startswith("events.")]  # one for each start
    assert len(events) == 2
    names = {name for name in os.listdir(continued) if name not in events} - of_calc_metrics
    assert names == {name for name in os.listdir(unbroken) if not name.startswith("events.")}
    records = [json.loads((folder / "training_options.json").read_text()) for folder in trained]
    assert records[0]["finished"]
    assert [{**record, "versions": None} for record in records] == [{**records[0], "versions": None}] * 2
    states = [state(folder) for folder in trained]
    assert [found.pop("ends") for found in states] == [[1000, 2000], [2000]]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        found = states[0][name]
        if isinstance(value, torch.Tensor):
            assert (found.shape, found.dtype) == (value.shape, value.dtype), name
        elif not isinstance(value, float):
            assert found == value, name
    kinds = [[(line.keys(), line["Progress/kimg"]["mean"]) for line in statistics(folder)] for folder in trained]
    assert kinds[0] == kinds[1]


def test_continued_run_ends_with_the_numbers_of_an_unbroken_one(trained):
    """Bit for bit where this machine computes the kept part so, which the statistics of its 25 iterations show."""
    continued, unbroken = trained
    kept = statistics(BEFORE / RUN)
    if kept == statistics(unbroken)[:len(kept)]:
        assert statistics(continued) == statistics(unbroken)
        # The other one overwrites its network of 1000 images twice: its run did not end there.
        found, expected = scores(continued), [*scores(unbroken)[:3], scores(unbroken)[-1]]
        assert found[-1] == expected[-1]
        # Those before were kept: the convolutions of a detector may round otherwise on another CPU than those of
        # training, by 6e-7 where this was seen.
        for kept_score, score in zip(found, expected, strict=True):
            assert kept_score.pop("results") == pytest.approx(score.pop("results"), rel=1e-5)
            assert kept_score.pop("subset_std") == pytest.approx(score.pop("subset_std"), rel=1e-5)
            assert kept_score == score
        first, second = (state(folder) for folder in trained)
        assert [name for name, value in first.items() if name != "ends" and not (
            torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name])] == []
        names = ["network-snapshot-000000.safetensors", "network-snapshot-000002.safetensors", "fakes000000.png",
                 "fakes000002.png", "reals.png"]
        assert [name for name in names if (continued / name).read_bytes() != (unbroken / name).read_bytes()] == []
    for kimg in (0, 2):
        networks = [load_network(folder / f"network-snapshot-{kimg:06d}.safetensors") for folder in trained]
        for role in ("G", "D", "G_ema"):
            first, second = (getattr(found, role).state_dict() for found in networks)
            assert first.keys() == second.keys()
            for name, value in second.items():
                torch.testing.assert_close(first[name], value, rtol=1e-5, atol=MOST_APART, msg=f"{kimg} {role} {name}")


@pytest.mark.parametrize("name", ["network-snapshot-000000.safetensors", "network-snapshot-000001.safetensors"])
def test_network_opens_with_all_it_holds(name):
    networks = load_network(BEFORE / RUN / name)
    info = networks.config["info"]
    assert info["classes"] == ["benign", "melanoma"]
    assert info["kimg"] == {"0": 0.52, "1": 1}[name.split(".")[0][-1]]
    for G in (networks.G, networks.G_ema):
        assert (G.z_dim, G.c_dim, G.w_dim, G.img_resolution, G.img_channels) == (8, 2, 8, 8, 3)
    assert networks.D(torch.zeros(2, 3, 8, 8), torch.eye(2)).shape == (2, 1)


def call(capsys, program, *arguments):
    """Run a program to its end; return standard output and error."""
    code = run(program.main, list(arguments))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured


def compute(capsys, program, *arguments, network=NETWORK):
    return call(capsys, program, f"--network={network}", "--device=cpu", "--tune-malloc=0", *arguments)


def assert_alike(found, expected):
    """Compare pictures: uint8 [H, W, 3]."""
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= LEVELS


@pytest.mark.parametrize(("network", "flags", "made", "kept"), [
    (NETWORK, ("--seeds=1", "--class=melanoma"), "seed0001.png", "images/seed0001.png"),
    (NETWORK, ("--projected-w=projected/projected_w.npz",), "proj00.png", "projected/proj.png"),
    ("projected/network-pti.safetensors", ("--projected-w=projected/projected_w.npz",), "proj00.png",
     "projected/proj-pti.png"),
])
def test_network_and_styles_still_give_their_image(network, flags, made, kept, before, capsys):
    compute(capsys, generate, *flags, "--outdir=made", network=network)
    assert_alike(pixels_in(Path("made") / made), pixels_in(kept))


def test_generated_set_is_known_to_be_complete(before, capsys):
    kept = Path("generated.zip").read_bytes()
    out, _ = compute(capsys, generate, "--zip=generated.zip", "--classes=benign:3,melanoma:3")
    assert "already" in out
    assert Path("generated.zip").read_bytes() == kept
    images = ImageSet("generated.zip")
    assert (list(images.classes), len(images)) == (["benign", "melanoma"], 6)


def test_stopped_set_is_continued_with_its_pieces(before, capsys):
    path = Path("stopped.zip.parts") / "piece-000000.npz"
    with np.load(path) as arrays:
        pixels = arrays["pixels"]
    pixels[0] = 255 - pixels[0]  # no image that the network makes: it is there if the piece was taken
    np.savez(path, pixels=pixels)
    compute(capsys, generate, "--zip=stopped.zip", "--classes=benign:300,melanoma:300")
    images = ImageSet("stopped.zip")
    assert len(images) == 600
    for index in range(256):
        assert np.array_equal(read_png(images.read(images.names[index])), pixels[index].transpose(1, 2, 0))
    assert not path.parent.exists()


def test_projected_set_is_known_to_be_complete(before, capsys):
    kept = {path.name: path.read_bytes() for path in Path("projections").iterdir()}
    out, _ = compute(capsys, projector, *PROJECT_SET, "--num-steps=6", "--batch=2", "--outdir=projections")
    assert "already" in out
    assert {path.name: path.read_bytes() for path in Path("projections").iterdir()} == kept


def count_steps(monkeypatch):
    """Return a list that grows with each step of an Adam."""
    done, step = [], torch.optim.Adam.step

    def counted(self, *args, **kwargs):
        done.append(self)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    return done


def test_stopped_projection_is_continued_from_its_step(before, capsys, monkeypatch):
    flags = ("--target=images/seed0001.png", "--class=melanoma", "--num-steps=100", "--save-video=0",
             "--detector=pixels")
    steps = count_steps(monkeypatch)
    compute(capsys, projector, *flags, "--outdir=stopped_projection")
    assert len(steps) == 100 - 61
    compute(capsys, projector, *flags, "--outdir=anew")
    assert len(steps) == 100 - 61 + 100
    assert sorted(os.listdir("stopped_projection")) == sorted(os.listdir("anew"))
    records = [json.loads(Path(folder, "projection.json").read_text()) for folder in ("stopped_projection", "anew")]
    assert records[0].keys() == records[1].keys()
    assert records[0]["distances"] == pytest.approx(records[1]["distances"], rel=0.02)


def test_stopped_projections_are_continued_with_what_is_done(before, capsys, monkeypatch):
    steps = count_steps(monkeypatch)
    compute(capsys, projector, *PROJECT_SET, "--num-steps=100", "--batch=1", "--outdir=stopped_projections")
    assert len(steps) == 300 - 100 - 8
    assert sorted(os.listdir("stopped_projections")) == sorted(os.listdir("projections"))


def test_metrics_of_a_run_are_added_to_with_the_features_that_are_cached(before, capsys):
    path, features = RUN / "metric-fid24_full.jsonl", list(Path("cache").rglob("*"))
    kept = path.read_bytes()
    out = call(capsys, calc_metrics, f"--run={RUN}", "--data=data.zip", "--metrics=fid24_full",
               "--detector=random-conv", "--device=cpu", "--tune-malloc=0", "--verbose=0").out
    assert list(Path("cache").rglob("*")) == features
    assert path.read_bytes().startswith(kept)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[2:] == [json.loads(line) for line in out.splitlines()]
    for old, new in zip(lines[:2], lines[2:], strict=True):
        assert old.keys() == new.keys()
        for name in ("metric", "snapshot_pkl", "num_real", "num_fake", "detector_sha256", "data_sha256",
                     "network_sha256"):
            assert old[name] == new[name]
        assert new["results"] == pytest.approx(old["results"], rel=0.02)


def test_hashes_of_pixels_are_found_in_the_cache(before, capsys):
    kept = sorted(Path("cache").rglob("*"))
    call(capsys, dataset_tool, "split", "plain.zip", "--parts=one:0.5,two:0.5", "--dest=parts")
    assert sorted(Path("cache").rglob("*")) == kept


def test_data_set_opens_with_its_classes(before, capsys):
    images = ImageSet("data.zip")
    assert (list(images.classes), np.bincount(images.labels).tolist()) == (["benign", "melanoma"], [8, 4])
    call(capsys, dataset_tool, "inspect", "data.zip")
