"""Training of all layers: it learns, stops early, continues bit for bit, and depends on its arguments alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis.backbones import open_backbone
from analysis.fine_tuning import FineTuneSettings, TrainingImages, fine_tune
from analysis.prediction import predict_probabilities
from dnnlib.cli import UserError
from metrics.image_sources import SelectedImages
from tests.helpers.phantom_helpers import auc
from tests.helpers.spot_sets import LABELS, spot_images

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = FineTuneSettings(epochs=3, lr=2e-3, batch=16)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {name: spot_images(folder / f"{name}.zip", count, seed=seed)
            for seed, (name, count) in enumerate({"train": 33, "val": 12}.items())}


@pytest.fixture(scope="module")
def backbone():
    return open_backbone("mobilenet_v3_small", weights="none", size=32)  # with dropout and batch normalization


def train(sets, backbone, settings=QUICK, *, seed=0, parts=("train",), **options):
    """Return the weights and the history, without times."""
    classifier, history = fine_tune(backbone, LABELS, [sets[part] for part in parts], sets["val"], settings, seed=seed,
                                    **options)
    return classifier.state_dict(), [replace(epoch, images_per_second=0) for epoch in history]


def are_equal(first, second):
    return first[1] == second[1] and all(torch.equal(value, second[0][name]) for name, value in first[0].items())


@pytest.fixture(scope="module")
def uninterrupted(sets, backbone):
    return train(sets, backbone)


@pytest.mark.slow
def test_training_learns_to_see_spots(tmp_path):
    train_images, val, test = (spot_images(tmp_path / f"{seed}.zip", count, seed=seed)
                               for seed, count in enumerate((192, 64, 64)))
    backbone = open_backbone("squeezenet1_1", weights="none", size=32)
    classifier, history = fine_tune(backbone, LABELS, [train_images], val,
                                    FineTuneSettings(epochs=8, lr=1e-3, batch=16, weight_decay=0), seed=1)
    probabilities = predict_probabilities(classifier, SelectedImages(test.images, test.rows))
    assert auc(probabilities[:, 1], test.labels) > 0.9
    assert history[-1].loss < 0.6 < history[0].loss
    assert classifier.is_fine_tuned
    assert not classifier.training


def test_training_leaves_the_backbone_and_the_random_state(sets, backbone):
    before, state = {name: value.clone() for name, value in backbone.state_dict().items()}, torch.get_rng_state()
    train(sets, backbone, replace(QUICK, epochs=1))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_training_continues_bit_for_bit_after_a_stop(sets, backbone, uninterrupted, tmp_path, stop):
    def on_epoch(epoch):
        if epoch.number == stop:
            raise Stopped

    options = {"state_path": tmp_path / "state", "identity": {"a": 1}}
    with pytest.raises(Stopped):
        train(sets, backbone, on_epoch=on_epoch, **options)
    seen, lines = [], []
    found = train(sets, backbone, on_epoch=lambda epoch: seen.append(epoch.number), log=lines.append, **options)
    assert seen == list(range(stop + 1, 4))
    assert lines == []
    assert are_equal(found, uninterrupted)


def test_training_depends_on_its_seed(sets, backbone, uninterrupted):
    assert not are_equal(train(sets, backbone, seed=1), uninterrupted)


def test_training_does_not_depend_on_the_number_of_workers(sets, backbone, uninterrupted, monkeypatch):
    monkeypatch.setattr("metrics.image_sources._FEWEST_IMAGES", 1)
    assert are_equal(train(sets, backbone, workers=2), uninterrupted)


def test_a_state_of_another_training_or_a_damaged_one_is_not_used(sets, backbone, uninterrupted, tmp_path):
    path, lines = tmp_path / "state", []
    train(sets, backbone, replace(QUICK, epochs=1), state_path=path, identity={"a": 1})
    found = train(sets, backbone, state_path=path, identity={"a": 1}, log=lines.append)  # other epochs
    assert are_equal(found, uninterrupted)
    assert lines == [f"{path} is the state of another training; this one starts anew"]
    train(sets, backbone, state_path=path, identity={"a": 2}, log=lines.append)
    assert len(lines) == 2
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found = train(sets, backbone, state_path=path, identity={"a": 2}, log=lines.append)
    assert are_equal(found, uninterrupted)
    assert lines[2:] == [f"{path} is damaged: its content does not match its checksum; training starts again"]


def test_training_stops_after_the_patience_and_returns_the_best_epoch(sets, backbone, monkeypatch):
    values = iter([0.6, 0.8, 0.7, 0.8, 0.9])
    monkeypatch.setattr("analysis.fine_tuning.measure_auc", lambda labels, scores: next(values))
    weights, history = train(sets, backbone, replace(QUICK, epochs=9, patience=2))
    assert [(epoch.val_auc, epoch.is_best) for epoch in history] == [(0.6, True), (0.8, True), (0.7, False),
                                                                     (0.8, False)]
    values = iter([0.6, 0.8, 0.7, 0.6])
    again = train(sets, backbone, replace(QUICK, epochs=9, patience=2))
    assert all(torch.equal(value, again[0][name]) for name, value in weights.items())


def test_first_steps_are_those_of_the_equations(sets, backbone, monkeypatch):
    """Warm-up and cosine, each image once an epoch, no batch of one image."""
    rates, sizes = [], []
    step = torch.optim.AdamW.step

    def watched(optimizer, *arguments, **options):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr("analysis.fine_tuning.augment",
                        lambda images, generator: (sizes.append(len(images)), images)[1])
    train(sets, backbone, replace(QUICK, lr=1e-3))
    assert sizes == [16, 17] * 3
    expected = [0.25, 0.75, *(0.5 * (1 + np.cos(np.pi * x)) for x in (0.125, 0.375, 0.625, 0.875))]
    np.testing.assert_allclose(rates, 1e-3 * np.array(expected), rtol=1e-12)


def test_class_weight_is_the_weighted_cross_entropy(sets, backbone, monkeypatch):
    seen = []
    monkeypatch.setattr("analysis.fine_tuning.cross_entropy", lambda logits, target, weight: (
        seen.append(weight), torch.nn.functional.cross_entropy(logits, target, weight=weight))[1])
    rows = np.flatnonzero((sets["train"].labels == 0) | (np.arange(33) < 10))
    some = TrainingImages(images=sets["train"].images, rows=rows, labels=sets["train"].labels[rows])
    for flag in (False, True):
        train({"train": some, "val": sets["val"]}, backbone, replace(QUICK, epochs=1), class_weight=flag)
    assert seen[0] is None
    torch.testing.assert_close(seen[-1], torch.tensor([22 / 34, 22 / 10]))


def test_sets_are_joined_and_gray_images_become_color_ones(sets, backbone, tmp_path):
    gray = spot_images(tmp_path / "gray.zip", 30, seed=5, gray=True)
    _, history = train(sets | {"gray": gray}, backbone, replace(QUICK, epochs=1), parts=("train", "gray"))
    assert np.isfinite(history[0].loss)
    large = spot_images(tmp_path / "large.zip", 4, size=40)
    with pytest.raises(UserError) as error:
        train(sets | {"large": large}, backbone, parts=("train", "large"))
    assert str(error.value) == (f"{tmp_path / 'large.zip'} has images of 40x40 pixels, {sets['train'].images.path} of "
                                "32x32; expected one size: convert one with dataset_tool.py")


@pytest.mark.parametrize(("batch", "what"), [(16, "the loss is nan"), (64, "probabilities are not finite")])
def test_numbers_that_are_not_finite_end_training_with_advice(sets, backbone, batch, what):
    with pytest.raises(UserError) as error:
        train(sets, backbone, replace(QUICK, lr=1e30, batch=batch))
    assert str(error.value) == f"{what} in epoch 1; expected finite numbers: try a smaller --lr, such as --lr=1e+29"


def test_a_label_without_images_is_refused(sets, backbone):
    some = TrainingImages(images=sets["train"].images, rows=np.arange(0, 33, 2), labels=np.zeros(17, dtype=np.int64))
    with pytest.raises(UserError, match="spot has no image among the 17 to train on"):
        train(sets | {"train": some}, backbone)


@pytest.mark.parametrize(("change", "message"), [
    ({"epochs": 0}, "--epochs is 0; expected at least 1"),
    ({"batch": 1}, "--batch is 1; expected at least 2"),
    ({"patience": 0}, "--patience is 0; expected at least 1"),
    ({"lr": 0}, "--lr is 0; expected a number above 0, such as --lr=0.001"),
    ({"lr": float("nan")}, "--lr is nan; expected a number above 0, such as --lr=0.001"),
])
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(UserError) as error:
        FineTuneSettings(**change)
    assert str(error.value) == message
