"""Probabilities and saliency maps of images, and the command `study.py predict`."""

import csv

import click
import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from analysis.backbones import Backbone, Preprocessing, open_backbone
from analysis.classifier import Classifier, fit_head, save_classifier
from analysis.prediction import choose_labels, grad_cam, make_predict_command, overlay, predict_probabilities
from dnnlib.cli import UserError, run
from tests.helpers.generator_files import save_generator
from tests.helpers.make_archives import make_folder
from tests.helpers.make_sets import make_set, png
from tests.helpers.spot_sets import LABELS, spot_images

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "mobilenet_v3_small"


@pytest.fixture(scope="module")
def spots(tmp_path_factory):
    return spot_images(tmp_path_factory.mktemp("spots") / "spots.zip", 30)


@pytest.fixture(scope="module")
def classifier(spots):
    backbone = open_backbone(SMALL, weights="none", size=32, seed=2)
    with torch.no_grad():
        features = backbone(spots.images.select().pixels(range(30))).numpy()
    return Classifier(backbone, fit_head(features, spots.labels, features, spots.labels, class_weight=False), LABELS)


@pytest.fixture
def saved(classifier, tmp_path):
    path = tmp_path / "classifier.safetensors"
    save_classifier(path, classifier, {"thresholds": {"balanced": 0.4}, "resolution": [32, 32]})
    return path


def predict(*arguments):
    """Run the command; return its exit code."""
    group = click.Group("study", commands=[make_predict_command()])
    return run(group, ["predict", *map(str, arguments)])


def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


# Probabilities.


@pytest.mark.parametrize("batch", [4, 64])
def test_probabilities_are_those_of_the_head_on_the_same_features(classifier, spots, batch):
    with torch.no_grad():
        features = classifier.backbone(spots.images.select().pixels(range(30))).numpy()
    seen = []
    found = predict_probabilities(classifier, spots.images.select(), batch=batch, on_images=seen.append)
    # The classifier computes logits in float32, the head in float64; other batches add up in another order.
    np.testing.assert_allclose(found, classifier.head.probabilities(features), atol=1e-4)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    assert sum(seen) == 30


def test_labels_are_chosen_by_threshold_or_as_the_most_probable():
    probabilities = np.array([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9]])
    assert choose_labels(probabilities, 0.4).tolist() == [0, 1, 1]
    assert choose_labels(np.array([[0.2, 0.5, 0.3], [0.6, 0.2, 0.2]]), None).tolist() == [1, 0]


# Saliency.


def hand_made(weight, crop=None, resize=(16, 16)):
    """Return a classifier whose maps of features are brightness and its negative, at a quarter of the resolution."""
    conv = nn.Conv2d(3, 2, 4, stride=4, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, -1.0])[:, None, None, None].expand(2, 3, 4, 4) / 48)
    network = nn.Sequential(conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    preprocessing = Preprocessing(resize=resize, crop=crop, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    backbone = Backbone("hand-made", network, num_features=2, preprocessing=preprocessing, weights_sha256=None)
    classifier = Classifier(backbone, None, [f"label{row}" for row in range(len(weight))])
    with torch.no_grad():
        classifier.linear.weight.copy_(torch.tensor(weight))
    return classifier


def quadrants(*values, size=16):
    """Return an image of four gray quadrants: uint8 [1, 3, size, size]."""
    levels = torch.tensor(values, dtype=torch.uint8).reshape(1, 1, 2, 2)
    return levels.repeat_interleave(size // 2, 2).repeat_interleave(size // 2, 3).expand(-1, 3, -1, -1)


def test_saliency_shows_the_quadrant_that_speaks_for_a_label():
    pixels = quadrants(255, 0, 128, 128)
    classifier = hand_made([[0.0, 0.0], [2.0, 1.0]])
    bright = grad_cam(classifier, pixels, [1])[0]
    assert bright.shape == (16, 16)
    assert bright[:6, :6].min() > 0.99
    assert bright[:6, 10:].mean() < 0.6  # the dark quadrant, by its own map, at half the weight
    dark = grad_cam(hand_made([[0.0, 0.0], [0.0, 1.0]]), pixels, [1])[0]
    assert dark[:6, 10:].min() > 0.99
    assert dark[10:].max() < 0.01
    assert dark[:, :6].max() < 0.01


def test_saliency_is_grad_cam_in_closed_form():
    """dy / dA is w / (h w) everywhere, so that the map is relu(sum of w A), up to its largest value."""
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([[0.5, -1.0], [2.0, 1.0], [-1.0, 3.0]])
    classifier = hand_made(weight.tolist())
    with torch.no_grad():
        images = classifier.backbone.preprocessing
        maps = classifier.backbone.network[:2](images.normalize(images.resize_and_crop(pixels)))
    chosen = [2, 0, 1]
    expected = nn.functional.interpolate((weight[chosen][:, :, None, None] * maps).sum(1, keepdim=True).relu(),
                                         size=(16, 16), mode="bilinear")[:, 0]
    expected /= expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(grad_cam(classifier, pixels, chosen), expected)


def test_saliency_of_two_labels_is_about_their_difference():
    pixels = quadrants(255, 0, 128, 128)
    first, second = ([[1.0, 0.0], [3.0, 1.0]], [[0.0, 0.0], [2.0, 1.0]])
    torch.testing.assert_close(grad_cam(hand_made(first), pixels, [1]), grad_cam(hand_made(second), pixels, [1]))
    assert grad_cam(hand_made(second), pixels, [0]).max() == 0  # all speaks for the other one


def test_saliency_lies_where_the_crop_was():
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    pixels[:, :, 24:32, 40:48] = 255
    found = grad_cam(hand_made([[0.0, 0.0], [1.0, 0.0]], crop=32, resize=(64,)), pixels, [1])[0]
    row, column = divmod(int(found.argmax()), 64)
    assert 24 <= row < 32
    assert 40 <= column < 48


@pytest.mark.parametrize("name", [SMALL, "densenet121", "squeezenet1_1", "vgg11", "efficientnet-lite0", "resnet18"])
def test_saliency_finds_maps_in_networks_of_all_families_and_leaves_no_traces(name):
    classifier = Classifier(open_backbone(name, weights="none", size=64), None, LABELS).requires_grad_(False)
    pixels = torch.randint(0, 256, (2, 3, 50, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = classifier.probabilities(pixels)
    for column in (0, 1):
        maps = grad_cam(classifier, pixels, [column, column])
        assert maps.shape == (2, 50, 60)
        assert maps.min() >= 0
        assert all(largest == pytest.approx(1) or largest == 0 for largest in maps.amax((1, 2)).tolist())
    assert torch.equal(classifier.probabilities(pixels), before)
    assert not any(layer._forward_hooks for layer in classifier.modules())


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t"])
def test_saliency_of_transformers_is_refused(name):
    classifier = hand_made([[0.0, 0.0], [1.0, 0.0]])
    classifier.backbone.name = name
    with pytest.raises(UserError) as error:
        grad_cam(classifier, quadrants(0, 0, 0, 0), [1])
    assert str(error.value) == (f"--saliency is given, but {name} is a transformer, which has no maps of convolutional "
                                "features to show; leave --saliency out")


def test_overlay_changes_pixels_only_where_the_map_is_above_0():
    pixels = quadrants(100, 100, 100, 100)
    maps = torch.zeros(1, 16, 16)
    maps[:, :8] = 1
    found = overlay(pixels, maps)
    assert torch.equal(found[:, :, 8:], pixels[:, :, 8:])
    assert (found[:, :, :8] != pixels[:, :, :8]).any(dim=1).all()


# The command.


def test_predict_writes_a_table(saved, classifier, spots, tmp_path, capsys):
    out = tmp_path / "table.csv"
    assert predict(f"--model={saved}", f"--data={spots.images.path}", f"--out={out}", "--device=cpu") == 0
    header, *rows = read_table(out)
    assert header == ["image", "class", "probability", "predicted"]
    assert [row[1] for row in rows] == [LABELS[label] for label in spots.labels]
    expected = predict_probabilities(classifier, spots.images.select())[:, 1]
    np.testing.assert_allclose([float(row[2]) for row in rows], expected, rtol=1e-4)
    assert [row[3] for row in rows] == [LABELS[int(value >= 0.4)] for value in expected]
    printed = capsys.readouterr()
    assert printed.out == f"{out}: 30 images; predicted is spot from 0.4 on\n"
    assert "note:" not in printed.err


def test_predict_takes_a_folder_without_labels_of_another_size_and_many_labels(tmp_path, capsys):
    folder = make_folder(tmp_path / "images", {f"{name}.png": png(np.full((20, 24), level))
                                               for name, level in (('a, "b"', 10), ("c", 200))})
    classifier = Classifier(open_backbone(SMALL, weights="none", size=32), None, ("a", "b", "c,d"))
    save_classifier(tmp_path / "c.safetensors", classifier, {"resolution": [32, 32]})
    out = tmp_path / "table.csv"
    out.write_text("old")
    assert predict(f"--model={tmp_path / 'c.safetensors'}", f"--data={folder}", f"--out={out}") == 0
    header, *rows = read_table(out)
    assert header == ["image", "probability_a", "probability_b", "probability_c,d", "predicted"]
    assert [row[0] for row in rows] == ['a, "b".png', "c.png"]
    assert [sum(map(float, row[1:4])) for row in rows] == pytest.approx([1, 1], abs=1e-5)
    assert [row[4] for row in rows] == [("a", "b", "c,d")[np.argmax(list(map(float, row[1:4])))] for row in rows]
    printed = capsys.readouterr()
    assert printed.err.count("note: the images are of 24x20 pixels, those that the classifier was trained on of 32x32; "
                             "they are resized") == 1
    assert printed.out == f"{out}: 2 images; predicted is the most probable label\n"


def test_predict_draws_a_picture_for_each_image_in_the_folder(saved, spots, tmp_path):
    pictures = tmp_path / "some" / "pictures"
    assert predict(f"--model={saved}", f"--data={spots.images.path}", f"--out={tmp_path / 'table.csv'}",
                   f"--saliency={pictures}", "--batch=16") == 0
    names = sorted(path.name for path in pictures.iterdir())
    assert len(names) == 30
    assert names[3] == "03-00000-img00000003-png.png"
    with PIL.Image.open(pictures / names[3]) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[0] == 32
    original = spots.images.select().pixels(range(3, 4))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(pixels[:, -64:-32], original)
    assert not np.array_equal(pixels[:, -32:], original)


def test_predict_writes_no_file_outside_the_folder_of_pictures(saved, tmp_path):
    long = "x" * 150
    data = make_folder(tmp_path / "images", {f"{name}.png": png(np.full((32, 32, 3), 99))
                                             for name in ("a/b", "a-b", long, "\u00fc:*?")})
    pictures = tmp_path / "pictures"
    assert predict(f"--model={saved}", f"--data={data}", f"--out={tmp_path / 'table.csv'}",
                   f"--saliency={pictures}") == 0
    names = [path.name for path in pictures.iterdir()]
    assert len(names) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") and len(name) < 80 for name in names)


@pytest.mark.parametrize(("change", "message"), [
    ({"--model": None}, "--model is missing; expected a path, such as --model=classifier.safetensors, or see --help"),
    ({"--out": None}, "--out is missing; expected a path, such as --out=table.csv, or see --help"),
    ({"--out": "table.txt"}, "--out is table.txt; expected a name ending in .csv"),
    ({"--batch": "0"}, "--batch is 0; expected at least 1"),
    ({"--model": "NETWORK"}, "NETWORK holds tensors, but is not a classifier; expected a .safetensors file of a "
     "classifier, as study.py classify writes it"),
    ({"--data": "missing.zip"}, "missing.zip does not exist; expected a data set: a zip or a folder of images"),
    ({"--saliency": "MODEL"}, "--saliency is MODEL, which is a file; expected a folder"),
])
def test_predict_refuses_mistakes_in_one_line(saved, tmp_path, capsys, change, message):
    network = save_generator(tmp_path / "network.safetensors")
    data = make_set(tmp_path / "set.zip", 3)
    known = {"NETWORK": str(network), "MODEL": str(saved)}
    flags = {"--model": str(saved), "--data": str(data), "--out": str(tmp_path / "t.csv")} | {
        name: known.get(value, value) for name, value in change.items()}
    for name, path in known.items():
        message = message.replace(name, path)
    assert predict(*(f"{name}={value}" for name, value in flags.items() if value is not None)) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "t.csv").exists()
