"""Whole studies: what results mean on sets of known worth, several processes, and commands that are killed."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from analysis.classifier import open_classifier
from imagesets.phantoms.make import write_phantoms
from imagesets.reader import ImageSet
from imagesets.writer import ImageSetWriter
from tests.helpers.small_studies import HEAD, TUNED, classify, classify_arguments, make_protocol, make_sets
from tests.helpers.training_runs import environment

ROOT = Path(__file__).parent.parent.parent
# Images of each part, and of a set that takes the place of a generator's: other lesions of the same distribution.
PHANTOMS = {"train": 240, "val": 120, "test": 160, "fresh": 240}
LEARNED = ("--model=efficientnet-lite0", "--size=64", "--num-seeds=1", "--workers=1", "--device=cpu",
           "--tune-malloc=0")
SHARED = ("--unverified-synthetic", "--regimes=real,real+synthetic", "--num-seeds=2", "--no-cache")
LONG = ("--num-seeds=1", "--epochs=4", "--patience=4")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory, one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNNLIB_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


# Meaning


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A folder with phantoms and their protocol."""
    folder = tmp_path_factory.mktemp("phantoms")
    for seed, (name, count) in enumerate(PHANTOMS.items()):
        write_phantoms(folder / f"{name}.zip", workers=1, count=count, resolution=32,
                       classes={"benign": 0.6, "melanoma": 0.4}, seed=seed, bias={})
    make_protocol(folder, positive="melanoma")
    return folder


def relabel(source, dest, change):
    """Write a set with other labels. change: from the labels, int64 [N], and the groups of all images"""
    images = ImageSet(source)
    groups = [f"{source.stem} {group}" for group in images.groups]  # phantoms of each seed are numbered from 0
    labels = change(np.asarray(images.labels), groups).tolist()
    with ImageSetWriter(dest, classes=images.classes) as writer:
        for name, label, group in zip(images.names, labels, groups, strict=True):
            writer.add(images.read(name), label, group)


def permuted(labels, groups, random):
    """Return the labels of whole lesions in another order."""
    _, first, lesion = np.unique(groups, return_index=True, return_inverse=True)
    return random.permutation(labels[first])[lesion]


def study_of(folder, *flags, outdir="out"):
    """Return the AUC on the test part of each condition, and the differences in AUC, as results.json has them."""
    assert classify(folder, *flags, usual=LEARNED, outdir=outdir) == 0
    results = json.loads((folder / outdir / "results.json").read_text(encoding="utf-8"))
    scores, differences = ({entry["condition"]: entry for entry in results[name] if entry["metric"] == "auc"}
                           for name in ("results", "differences"))
    print({name: (round(entry["value"], 3), round(entry["low"], 3), round(entry["high"], 3))
           for name, entry in scores.items()})
    return scores, differences


def test_classifiers_of_labels_at_random_have_an_auc_of_one_half(phantoms, tmp_path):
    random = np.random.default_rng(0)
    found = []
    for trial in range(4):
        folder = tmp_path / str(trial)
        folder.mkdir()
        for name in ("train", "val", "test"):
            relabel(phantoms / f"{name}.zip", folder / f"{name}.zip", partial(permuted, random=random))
        make_protocol(folder, positive="melanoma")
        scores, _ = study_of(folder)
        found.append(scores["real"]["low"] < 0.5 < scores["real"]["high"])
    assert sum(found) >= 3  # of 24 trials, 23 did


def test_fresh_images_of_the_same_distribution_are_worth_as_much_as_real_ones(phantoms):
    flags = (f"--synthetic={phantoms / 'fresh.zip'}", "--unverified-synthetic", "--regimes=real,synthetic")
    scores, differences = study_of(phantoms, *flags, outdir="fresh")
    assert scores["real"]["low"] > 0.5
    assert scores["real"]["low"] <= scores["synthetic"]["value"] <= scores["real"]["high"]
    assert differences["synthetic"]["low"] < 0 < differences["synthetic"]["high"]


def test_synthetic_images_with_exchanged_classes_give_an_auc_below_one_half(phantoms):
    relabel(phantoms / "fresh.zip", phantoms / "exchanged.zip", lambda labels, groups: 1 - labels)
    flags = (f"--synthetic={phantoms / 'exchanged.zip'}", "--unverified-synthetic", "--regimes=real,synthetic")
    scores, differences = study_of(phantoms, *flags, outdir="exchanged")
    assert scores["synthetic"]["high"] < 0.5
    assert differences["synthetic"]["high"] < 0


# Processes


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = make_sets(tmp_path_factory.mktemp("sets"))
    make_protocol(folder)
    return folder


def start(folder, *flags, **options):
    """Start study.py classify in a process of its own."""
    command = [sys.executable, str(ROOT / "study.py"), *classify_arguments(folder, *flags, **options)]
    return subprocess.Popen(command, env=environment(), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            start_new_session=True)


def finish(folder, *flags, **options):
    process = start(folder, *flags, **options)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def trained(folder):
    """Return the tensors of the classifiers by name, and what their files record except speeds."""
    found = {}
    for path in sorted((folder / "models").iterdir()):
        classifier = open_classifier(path)
        info = dict(classifier.info)
        info["epochs"] = [{key: value for key, value in epoch.items() if key != "images_per_second"}
                          for epoch in info.get("epochs", [])]
        found[path.name] = info, {name: value.numpy().tobytes() for name, value in classifier.state_dict().items()}
    return found


def predicted(folder):
    """Return the probabilities of all classifiers, by the names of files."""
    return {path.name: np.load(path)["probabilities"].tobytes() for path in (folder / "predictions").iterdir()}


@pytest.mark.parametrize("usual", [HEAD, TUNED], ids=["head", "all"])
def test_one_and_two_processes_write_the_same(sets, tmp_path, usual):
    flags = (f"--synthetic={sets / 'synthetic.zip'}", *SHARED)
    assert classify(sets, *flags, usual=usual, outdir=tmp_path / "one") == 0
    finish(sets, *flags, "--gpus=2", usual=usual, outdir=tmp_path / "two")
    assert trained(tmp_path / "one") == trained(tmp_path / "two")
    assert len(trained(tmp_path / "one")) == (3 if usual == HEAD else 4)
    assert predicted(tmp_path / "one") == predicted(tmp_path / "two")
    for name in ("results.json", "predictions.csv", "table.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_killed_training_of_all_layers_ends_as_an_unbroken_one(sets, tmp_path):
    assert classify(sets, *LONG, usual=TUNED, outdir=tmp_path / "unbroken") == 0
    for number, how in enumerate((signal.SIGKILL, signal.SIGTERM), 1):
        process = start(sets, *LONG, usual=TUNED, outdir=tmp_path / "killed")
        assert any(f": epoch {number}, " in line for line in process.stderr)
        process.send_signal(how)
        process.communicate()
        assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 143)
        assert [path.name for path in (tmp_path / "killed" / "models").glob("real*")] == ["real-seed0.state"]
    process = start(sets, *LONG, usual=TUNED, outdir=tmp_path / "killed")
    lines = process.communicate()[1].splitlines()
    assert process.returncode == 0
    assert not any(": epoch 1, " in line or ": epoch 2, " in line for line in lines)
    assert trained(tmp_path / "killed") == trained(tmp_path / "unbroken")
    assert predicted(tmp_path / "killed") == predicted(tmp_path / "unbroken")
    results = [(tmp_path / name / "results.json").read_bytes() for name in ("killed", "unbroken")]
    assert results[0] == results[1]
