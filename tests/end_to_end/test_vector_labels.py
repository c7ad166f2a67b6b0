"""Labels that are lists of numbers: trained on, distinguished from classes, and accepted by programs that generate."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import calc_metrics
import generate
from dnnlib.cli import UserError, run
from generation.image_generator import ImageGenerator, SynthesisSettings
from imagesets.classes import label_kind_of
from imagesets.reader import ImageSet
from latent.projection import measure_styles
from metrics.names import parse_metrics
from metrics.reference import Reference
from tests.helpers.generator_files import pixels_in, save_generator
from tests.helpers.make_sets import make_set, pixels_of, png
from tests.helpers.projector_commands import attempt, names_in, project, record_in, rows_in, working_in
from torch_utils.distributed import Processes
from training import loop
from training.command import check_valid
from training.config import RunSettings
from training.dataset import ImageDataset
from training.options import TrainOptions, resolve
from training.snapshot import load_network

# Three findings of which several may be there, and none; the last one is not sure.
VECTORS = [[0, 1, 0.5], [0, 0, 0], [1, 1, 0.25], [0, 1, 0.5], [1, 0, 0.1], [0, 0, 0]]
FINDINGS = ["nodule", "mass", "fibrosis"]
INFO = {"classes": FINDINGS, "class_counts": None, "label_kind": "vector"}
EXPECTED = "--label with 3 numbers (nodule, mass, fibrosis), such as --label=0,1,0.5"
VECTORS_HERE = "but this network's labels are vectors, not classes; expected"


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A folder with a network for vectors, two for classes, and data sets for them."""
    with working_in(tmp_path, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        save_generator("vectors.safetensors", INFO, c_dim=3)
        make_set("vectors.zip", 6, labels=VECTORS, classes=FINDINGS)
        make_set("classes.zip", 6, labels=[0, 1, 2, 0, 0, 0], classes=["bcc", "mel", "nv"])
        save_generator("three.safetensors", {"classes": ["nv", "mel", "bcc"], "class_counts": [4, 1, 1]}, c_dim=3)
        yield tmp_path


def make(capsys, *arguments, network="vectors.safetensors", err=""):
    code = run(generate.main, [f"--network={network}", "--device=cpu", *arguments])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, err)
    return captured.out


def mistake(capsys, program, *arguments):
    """Return the error message of a command; it must not leave files."""
    before = sorted(os.listdir())
    code = run(program, [*arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert sorted(os.listdir()) == before
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def refuse(capsys, *arguments, network="vectors.safetensors"):
    return mistake(capsys, generate.main, f"--network={network}", "--device=cpu", *arguments)


def images_of(seeds, label, network="vectors.safetensors", **settings):
    """Return the pixels of seeds, all of one label: uint8 [N, H, W, C]."""
    labels = torch.tensor([label], dtype=torch.float32).expand(len(seeds), -1)
    images = ImageGenerator(load_network(network).G_ema, SynthesisSettings(**settings), batch=1)
    pixels = torch.cat(list(images.generate(seeds, labels)))
    return pixels.permute(0, 2, 3, 1).numpy()


def train_once(folder, monkeypatch, **data):
    """Train one iteration, with warnings as errors; return the info of the network snapshot, and the log."""
    make_set(folder / "set.zip", 8, size=16, **data)
    dataset = ImageDataset(folder / "set.zip", use_labels=True)
    config = resolve(TrainOptions(cfg="tiny", cond=True, batch=4, kimg=1, tick=0.004, snap=1, workers=0,
                                  precision="fp32", metrics=()), dataset.facts())
    settings = RunSettings(outdir=str(folder / "runs"), data=str(dataset.path))
    monkeypatch.setattr(Processes, "any_each", lambda self, flags: [True, False, False])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loop.train(config, settings, dataset) == loop.EXIT_STOPPED
    run_folder, = (folder / "runs").glob("0*")
    snapshot = sorted(run_folder.glob("*.safetensors"))[-1]
    return load_network(snapshot), (run_folder / "log.txt").read_text()


@pytest.mark.parametrize("channels", [1, 3])
def test_training_on_vectors_gives_no_warning_and_its_network_says_the_kind(tmp_path, monkeypatch, channels):
    networks, log = train_once(tmp_path, monkeypatch, channels=channels, labels=(VECTORS + VECTORS)[:8])
    info = networks.config["info"]
    assert (networks.G_ema.c_dim, info["label_kind"], info["class_counts"]) == (3, "vector", None)
    assert "labels of 3 numbers" in log
    assert "classes" not in log


def test_training_on_classes_gives_no_warning_and_its_network_says_the_kind(tmp_path, monkeypatch):
    networks, log = train_once(tmp_path, monkeypatch, channels=1, labels=[0, 1] * 4)
    assert (networks.config["info"]["label_kind"], networks.config["info"]["class_counts"]) == ("class", [4, 4])
    assert "2 classes" in log


def test_gray_images_are_arrays_that_may_be_written(tmp_path):
    dataset = ImageDataset(make_set(tmp_path / "set.zip", channels=1))
    assert dataset[0][0].flags.writeable
    assert np.array_equal(dataset[0][0][0], pixels_of(0, channels=1))


@pytest.mark.parametrize(("info", "c_dim", "kind"), [
    ({"label_kind": "vector"}, 3, "vector"), ({"label_kind": "class"}, 3, "class"), ({"label_kind": None}, 0, None),
    ({"label_kind": "vector"}, 0, None), ({}, 3, None), ({"label_kind": "other"}, 3, None),
    # Files from before label_kind said the images of each class, and null where labels were lists.
    ({"class_counts": [1, 2, 3]}, 3, "class"), ({"class_counts": None}, 3, "vector"),
    ({"class_counts": None}, 0, None)])
def test_kind_of_labels_is_what_the_file_says(info, c_dim, kind):
    assert label_kind_of(info, c_dim) == kind


def test_label_gives_images_sheets_and_mixed_styles(inside, capsys):
    label = [0, 1, 0.5]
    make(capsys, "--seeds=3,4", "--label=0, 1,0.5", "--trunc=0.7", "--outdir=out", "--grid=sheet.png")
    expected = images_of([3, 4], label, truncation=0.7)
    assert np.array_equal(pixels_in("out/seed0004.png"), expected[1])
    assert np.array_equal(pixels_in("sheet.png"), np.concatenate(list(expected), axis=1))
    assert not np.array_equal(expected, images_of([3, 4], [0, 1, 0], truncation=0.7))
    make(capsys, "--style-mix", "--rows=3", "--cols=4", "--label=0,1,0.5", "--outdir=mixed")
    assert np.array_equal(pixels_in("mixed/4-4.png"), images_of([4], label)[0])


def test_label_mixes_classes_of_a_network_that_learned_them(inside, capsys):
    make(capsys, "--seeds=3", "--label=0.5,0.5,0", "--outdir=out", network="three.safetensors")
    assert np.array_equal(pixels_in("out/seed0003.png"), images_of([3], [0.5, 0.5, 0], "three.safetensors")[0])


@pytest.mark.parametrize(("flags", "message"), [
    (["--seeds=0", "--outdir=o"], f"--label is missing, {VECTORS_HERE} {EXPECTED}"),
    (["--seeds=0", "--outdir=o", "--class=mass"], f"--class is mass, {VECTORS_HERE} {EXPECTED}"),
    (["--seeds=0", "--grid=s.png", "--class=all"], f"--class is all, {VECTORS_HERE} {EXPECTED}"),
    (["--style-mix", "--rows=0", "--cols=1", "--outdir=o", "--class=0"], f"--class is 0, {VECTORS_HERE} {EXPECTED}"),
    (["--seeds=0", "--outdir=o", "--class=0", "--label=0,1,0"], "--class=0 and --label=0,1,0 are both given; expected "
                                                                 "one of them"),
    (["--seeds=0", "--outdir=o", "--label=0,1"], f"--label is 0,1, 2 numbers; expected {EXPECTED}"),
    (["--seeds=0", "--outdir=o", "--label=0,1,nan"], "--label has 'nan', which is not a finite number; expected "
                                                     f"{EXPECTED}"),
    (["--seeds=0", "--outdir=o", "--label=0,1,1e39"], "--label has '1e39', which is not a finite number; expected "
                                                      f"{EXPECTED}"),
    (["--seeds=0", "--outdir=o", "--label=0,mass,0"], "--label has 'mass', which is not a finite number; expected "
                                                      f"{EXPECTED}"),
    (["--zip=s.zip", "--count=4"], f"--labels-from is missing, {VECTORS_HERE} a data set with labels of 3 numbers, "
                                   "such as --labels-from=set.zip"),
    (["--zip=s.zip", "--classes=mass:4"], f"--classes is mass:4, {VECTORS_HERE} a data set with labels of 3 numbers, "
                                          "such as --labels-from=set.zip"),
    (["--zip=s.zip", "--count=4", "--label=0,1,0"], "--label is given with --zip; expected one of them (--labels-from "
                                                    "takes labels from a data set)"),
    (["--zip=s.zip", "--labels-from=classes.zip"], "--labels-from=classes.zip has numbers of classes as labels; "
     "expected lists of 3 numbers, as in the network's training set"),
    (["--seeds=0", "--outdir=o", "--label=0,1,0", "--labels-from=vectors.zip"], "--labels-from is given, but "
     "only works with --zip; add that, or leave --labels-from out"),
])
def test_network_of_vectors_takes_no_class_and_says_what_to_use(inside, capsys, flags, message):
    assert refuse(capsys, *flags) == message


def test_label_on_a_network_without_labels_gives_one_line(inside, capsys):
    assert refuse(capsys, "--seeds=0", "--outdir=o", "--label=0,1", network="plain.safetensors") == (
        "--label is 0,1, but this network was trained without labels; leave --label out")


def test_set_takes_its_labels_from_a_data_set(inside, capsys):
    out = make(capsys, "--zip=set.zip", "--labels-from=vectors.zip", "--seeds=100")
    assert out == "set.zip: 6 images of 8x8 (labels of vectors.zip), seeds 100-105\n"
    found = ImageSet("set.zip")
    # As many as the data set has: each of its labels once, in another order.
    assert sorted(found.labels.tolist()) == sorted(np.float32(VECTORS).tolist())
    assert (found.classes, found.source["classes"]) == (FINDINGS, None)
    assert found.source["labels_from"]["data"] == "vectors.zip"
    assert json.loads(found.read("dataset.json"))["labels"][0][1] in VECTORS  # 0.1, not 0.10000000149
    for index in (0, 5):
        numbers = ",".join(map(str, found.labels[index].tolist()))
        make(capsys, f"--seeds={100 + index}", f"--label={numbers}", "--outdir=out")
        assert Path(f"out/seed{100 + index:04d}.png").read_bytes() == found.read(found.names[index])


def test_set_of_drawn_labels_keeps_what_belongs_together_and_follows_the_seed(inside, capsys):
    drawn = {}
    for seed, count in ((0, 15), (0, 8), (1, 15)):
        make(capsys, f"--zip={seed}-{count}.zip", "--labels-from=vectors.zip", f"--count={count}", f"--seeds={seed}")
        drawn[seed, count] = ImageSet(f"{seed}-{count}.zip").labels.tolist()
    assert drawn[0, 8] == drawn[0, 15][:8]
    assert drawn[0, 15] != drawn[1, 15]
    for labels in drawn.values():
        assert {tuple(label) for label in labels} <= {tuple(label) for label in np.float32(VECTORS).tolist()}
        assert sorted(labels[:6]) == sorted(np.float32(VECTORS).tolist())  # a round shows each once


def test_set_of_classes_takes_its_labels_by_name(inside, capsys):
    out = make(capsys, "--zip=set.zip", "--labels-from=classes.zip", "--count=6", network="three.safetensors")
    assert out == "set.zip: 6 images of 8x8 (nv: 1, mel: 1, bcc: 4), seeds 0-5\n"
    found = ImageSet("set.zip")
    assert (found.classes, sorted(found.labels.tolist())) == (["nv", "mel", "bcc"], [0, 1, 2, 2, 2, 2])
    assert found.source["classes"] == {"nv": 1, "mel": 1, "bcc": 4}


def test_set_of_classes_without_names_takes_its_labels_by_number_and_says_so(inside, capsys):
    make_set("numbers.zip", 3, labels=[0, 2, 2])
    make(capsys, "--zip=set.zip", "--labels-from=numbers.zip", network="three.safetensors",
         err="--labels-from=numbers.zip: the data set does not name its classes; they are matched by number\n")
    assert sorted(ImageSet("set.zip").labels.tolist()) == [0, 2, 2]


def test_set_of_vectors_without_names_takes_its_labels_by_position_and_says_so(inside, capsys):
    make_set("numbers.zip", 3, labels=VECTORS[:3])
    make(capsys, "--zip=set.zip", "--labels-from=numbers.zip",
         err="--labels-from=numbers.zip: the data set does not name the entries of its label vectors; they are matched "
             "by position\n")
    assert sorted(ImageSet("set.zip").labels.tolist()) == sorted(VECTORS[:3])


@pytest.mark.parametrize(("data", "message"), [
    ({"labels": [0, 1], "classes": ["nv", "wart"]}, "--labels-from=other.zip has images of wart, which the network "
     "does not know; expected one of nv, mel, bcc, or a number from 0 to 2: convert it with "
     "dataset_tool.py --classes"),
    ({"labels": [[0, 1, 0.5], [0, 0, 0]]}, "--labels-from=other.zip has lists of numbers as labels (3 each); expected "
                                           "numbers of classes, as in the network's training set"),
    ({"labels": [0, None], "classes": ["nv", "mel"]}, "--labels-from=other.zip: 1 of 2 images have no label; expected "
                                                      "one each: convert it with dataset_tool.py "
                                                      "--unlabeled=drop"),
    ({}, "--labels-from=other.zip has no labels; expected numbers of classes, as in the network's training set"),
])
def test_labels_that_are_none_of_the_network_give_one_line(inside, capsys, data, message):
    make_set("other.zip", 2, **data)
    assert refuse(capsys, "--zip=set.zip", "--labels-from=other.zip", network="three.safetensors") == message


def test_labels_from_goes_with_neither_classes_nor_a_network_without_labels(inside, capsys):
    both = ("--labels-from=classes.zip", "--classes=nv:1")
    assert refuse(capsys, "--zip=s.zip", *both, network="three.safetensors") == (
        "--classes and --labels-from are both given; expected one of them")
    assert refuse(capsys, "--zip=s.zip", "--labels-from=classes.zip", network="plain.safetensors") == (
        "--labels-from=classes.zip is given, but this network was trained without labels; leave it out")


@pytest.mark.parametrize(("flags", "message"), [
    (["--class=auto"], f"--class is auto, {VECTORS_HERE} {EXPECTED}"),
    (["--class=1"], f"--class is 1, {VECTORS_HERE} {EXPECTED}"),
    ([], f"--label is missing, {VECTORS_HERE} {EXPECTED}")])
def test_projector_takes_no_class_of_a_network_of_vectors(inside, capsys, flags, message):
    Path("target.png").write_bytes(png(pixels_of(3)))
    assert attempt("--target=target.png", "--outdir=out", *flags, network="vectors.safetensors") == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not Path("out").exists()


def test_projector_starts_from_the_mean_style_of_a_label(inside, capsys):
    Path("target.png").write_bytes(png(pixels_of(3)))
    out = project(capsys, "--target=target.png", "--label=0,1,0.5", "--outdir=out", "--save-video=0", "--num-steps=1",
                  network="vectors.safetensors")
    assert "label 0,1,0.5, " in out
    record = record_in("out")
    assert (record["class"], record["label"]) == (None, [0, 1, 0.5])
    with np.load("out/projected_w.npz") as arrays:  # the learning rate of the first step is 0
        start = measure_styles(load_network("vectors.safetensors").G_ema, torch.tensor([0, 1, 0.5])).mean.numpy()
        assert np.allclose(arrays["w"][0, 0], start, atol=1e-6)


def test_projector_starts_images_of_a_set_from_their_own_labels(inside, capsys):
    project(capsys, "--data=vectors.zip", "--outdir=out", "--batch=6", "--num-steps=1", network="vectors.safetensors")
    G = load_network("vectors.safetensors").G_ema
    with np.load("out/latents.npz") as arrays:
        for w, vector in zip(arrays["w"], VECTORS, strict=True):
            mean = measure_styles(G, torch.tensor(vector, dtype=torch.float32)).mean
            assert np.allclose(w[0], mean.numpy(), atol=1e-6)
    found = ImageSet("out/projections.zip")
    assert np.array_equal(found.labels, np.float32(VECTORS))
    assert [row["network_class"] for row in rows_in("out/distances.csv")][:2] == ["0,1,0.5", "0,0,0"]
    assert names_in("out") == ["distances.csv", "distances.png", "latents.npz", "pairs.png", "projections.json",
                               "projections.zip"]


def test_projections_of_a_network_without_labels_keep_the_vectors_of_their_targets(inside, capsys):
    project(capsys, "--data=vectors.zip", "--outdir=out", "--batch=6", "--num-steps=1", network="plain.safetensors")
    assert np.array_equal(ImageSet("out/projections.zip").labels, np.float32(VECTORS))


def test_projector_starts_a_set_of_classes_from_a_mix_and_keeps_their_classes(inside, capsys):
    project(capsys, "--data=classes.zip", "--outdir=out", "--batch=6", "--num-steps=1", "--label=0.5,0.5,0",
            network="three.safetensors")
    found = ImageSet("out/projections.zip")
    assert [found.classes[label] for label in found.labels] == ["bcc", "mel", "nv", "bcc", "bcc", "bcc"]
    mean = measure_styles(load_network("three.safetensors").G_ema, torch.tensor([0.5, 0.5, 0])).mean.numpy()
    with np.load("out/latents.npz") as arrays:
        assert np.allclose(arrays["w"][:, 0], mean, atol=1e-6)
    assert record_in("out", "projections.json")["label"] == "0.5,0.5,0"


def test_projector_of_a_set_of_classes_asks_for_a_label(inside, capsys):
    assert attempt("--data=classes.zip", "--outdir=out", network="vectors.safetensors") == 2
    assert capsys.readouterr().err == (
        "error: classes.zip has no labels of 3 numbers, as the network was trained with; expected such labels, or "
        f"{EXPECTED} to start all images from\n")


@pytest.mark.parametrize(("network", "flags", "message"), [
    ("vectors", ["--metrics=kid5", "--data=classes.zip"], "classes.zip has numbers of classes as labels, but the "
     "network was trained with lists of numbers as labels; expected the data set that it was trained on, or a part of "
     "it"),
    ("three", ["--metrics=kid5", "--data=vectors.zip"], "vectors.zip has lists of numbers as labels, but the "
     "network was trained with numbers of classes as labels; expected the data set that it was trained on, or a part "
     "of it"),
])
def test_metrics_keep_vectors_and_classes_apart(inside, capsys, network, flags, message):
    assert mistake(capsys, calc_metrics.main, f"--network={network}.safetensors", "--detector=random-conv",
                   "--device=cpu", "--no-cache", "--verbose=0", *flags) == message


@pytest.mark.parametrize(("chosen", "message"), [
    ("1", "--class is 1, but the network's labels are vectors, not classes; leave --class out"),
    (None, "--data is missing, and the network's labels are vectors; expected a data set to draw them from")])
def test_metrics_without_a_data_set_take_no_class_for_a_vector(chosen, message):
    reference = Reference(parse_metrics("is20"), None, mirror=False, chosen=chosen, seed=0)
    with pytest.raises(UserError) as caught:
        reference.labels_of_fakes(3, INFO)
    assert str(caught.value) == message


def test_validation_set_of_classes_is_refused_beside_vectors(inside):
    make_set("more.zip", 6, labels=[0, 1, 2, 0, 0, 1], classes=["a", "b", "c"])
    sets = [ImageDataset(name, use_labels=True) for name in ("more.zip", "vectors.zip")]
    with pytest.raises(UserError, match=r"^--valid=more\.zip has numbers of classes as labels; expected lists of "
                                        r"numbers as labels, as in --data$"):
        check_valid(*sets)
