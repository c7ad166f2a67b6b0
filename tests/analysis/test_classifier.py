"""Heads fitted to features, and files of classifiers."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.backbones import open_backbone
from analysis.classifier import (
    Classifier,
    fit_head,
    measure_auc,
    open_classifier,
    open_head,
    read_info,
    save_classifier,
    softmax,
)
from dnnlib.cli import UserError
from tests.helpers.generator_files import save_generator
from tests.helpers.phantom_helpers import auc

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL, LABELS = "mobilenet_v3_small", ("rest", "mel")


def drawn(count, labels=2, features=12, seed=0):
    """Return features whose first columns are shifted by the label, and labels."""
    random = np.random.default_rng(seed)
    y = np.arange(count) % labels
    x = 3 + 2 * random.normal(size=(count, features))
    x[np.arange(count), y] += 2
    x[:, -1] = 0.1  # never varies, but for the rounding of its mean
    return x.astype(np.float32), y


# Heads.


@pytest.mark.parametrize("class_weight", [False, True])
@pytest.mark.parametrize("labels", [2, 3])
def test_head_is_scikit_learns_logistic_regression_on_standardized_features(labels, class_weight):
    x, y = drawn(300, labels)
    keep = (y != 1) | (np.arange(300) < 100)  # fewer of label 1
    x, y = x[keep], y[keep]
    val_x, val_y = drawn(150, labels, seed=1)
    head = fit_head(x, y, val_x, val_y, class_weight=class_weight)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(
        C=head.C, class_weight="balanced" if class_weight else None, max_iter=5000, tol=1e-8))
    expected = pipeline.fit(x.astype(np.float64), y).predict_proba(val_x.astype(np.float64))
    found = head.probabilities(val_x)
    np.testing.assert_allclose(found, expected, atol=2e-3)  # ours stops at a tolerance of 1e-4
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    assert found.dtype == np.float64
    assert head.has_converged
    if labels == 2:
        assert not head.weight[0].any()
        assert head.val_auc == pytest.approx(auc(found[:, 1], val_y), abs=1e-12)


def test_penalty_is_the_one_of_the_best_validation_auc_and_the_strongest_of_equal_ones():
    x, y = drawn(60, features=40)
    val_x, val_y = drawn(400, features=40, seed=1)
    head = fit_head(x, y, val_x, val_y, class_weight=False)
    one = [LogisticRegression(C=C, max_iter=5000, tol=1e-8).fit((x - head.mean) / head.std, y)
           for C in 10.0 ** (np.arange(-10, 3) / 2)]
    aucs = [auc(model.decision_function((val_x - head.mean) / head.std), val_y) for model in one]
    assert head.val_auc == pytest.approx(max(aucs), abs=2e-3)
    separable = np.array([[-1.0], [1.0]] * 20)  # each penalty ranks perfectly
    labels = np.arange(40) % 2
    assert fit_head(separable, labels, separable, labels, class_weight=False).C == 1e-5


def test_a_feature_that_never_varied_in_training_changes_nothing():
    x, y = drawn(100)
    head = fit_head(x, y, x, y, class_weight=False)
    moved = x.copy()
    moved[:, -1] += 0.01
    np.testing.assert_allclose(head.probabilities(moved), head.probabilities(x), atol=1e-6)


def test_class_weight_moves_probabilities_towards_the_rare_label():
    x, y = drawn(400)
    keep = (y == 0) | (np.arange(400) < 60)
    plain, weighted = (fit_head(x[keep], y[keep], x, y, class_weight=flag).probabilities(x)[:, 1].mean()
                       for flag in (False, True))
    assert plain < 0.3 < 0.4 < weighted


def test_fit_is_a_function_of_its_arguments():
    x, y = drawn(100)
    first, second = (fit_head(x, y, x, y, class_weight=False, seed=seed) for seed in (0, 1))
    assert np.array_equal(first.weight, second.weight)


def test_labels_without_images_are_refused():
    x, y = drawn(90, 3)
    with pytest.raises(UserError, match=r"^label number 1 has no image among the 60 to train on; expected images of "
                                        r"each label$"):
        fit_head(x[y != 1], y[y != 1], x, y, class_weight=False)
    with pytest.raises(UserError, match=r"^label number 0 has no image among the 60 to validate with; expected images "
                                        r"of each label$"):
        fit_head(x, y, x[y != 0], y[y != 0], class_weight=False)


def test_auc_counts_pairs_and_averages_labels_against_the_rest():
    random = np.random.default_rng(0)
    labels, scores = random.integers(0, 3, 50), random.integers(0, 4, (50, 3)) / 4  # with ties
    expected = [auc(scores[:, column], labels == column) for column in range(3)]
    assert measure_auc(labels, scores) == pytest.approx(np.mean(expected), abs=1e-12)
    two = scores[:, :2]
    assert measure_auc(labels % 2, two) == pytest.approx(auc(two[:, 1] - two[:, 0], labels % 2), abs=1e-12)


# Classifiers and their files.


@pytest.fixture(scope="module")
def backbone():
    return open_backbone(SMALL, weights="none", size=32, seed=3)


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (20, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def classifier(backbone, pixels):
    with torch.no_grad():
        features = backbone(pixels).numpy()
    labels = np.arange(20) % 2
    return Classifier(backbone, fit_head(features, labels, features, labels, class_weight=False), LABELS)


def test_classifier_gives_the_probabilities_of_its_head(classifier, backbone, pixels):
    with torch.no_grad():
        features = backbone(pixels).numpy()
    # The classifier computes in float32, the head in float64.
    np.testing.assert_allclose(classifier.probabilities(pixels).numpy(), classifier.head.probabilities(features),
                               atol=1e-4)


def test_file_gives_back_the_classifier_its_head_and_info(classifier, pixels, tmp_path):
    info = {"thresholds": {"balanced": 0.25}, "note": "\u00e9"}
    save_classifier(tmp_path / "a.safetensors", classifier, info)
    save_classifier(tmp_path / "b.safetensors", classifier, info)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    opened = open_classifier(tmp_path / "a.safetensors")
    assert torch.equal(opened.probabilities(pixels), classifier.probabilities(pixels))
    assert (opened.labels, opened.info, opened.is_fine_tuned) == (LABELS, info, False)
    assert opened.backbone.preprocessing == classifier.backbone.preprocessing
    head = open_head(tmp_path / "a.safetensors")
    assert all(np.array_equal(value, getattr(classifier.head, name)) for name, value in vars(head).items())
    assert read_info(tmp_path / "a.safetensors") == info


def test_head_on_known_weights_is_a_small_file_that_needs_these_weights(pixels, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(open_backbone(SMALL, weights="none", seed=1).network.state_dict(), weights)
    other = tmp_path / "other.pth"
    torch.save(open_backbone(SMALL, weights="none", seed=2).network.state_dict(), other)
    backbone = open_backbone(SMALL, weights=str(weights), size=32)
    classifier = Classifier(backbone, None, ("a", "b", "c"))
    path = tmp_path / "c.safetensors"
    save_classifier(path, classifier, {})
    assert path.stat().st_size < 30_000
    opened = open_classifier(path, weights=str(weights))
    assert torch.equal(opened.probabilities(pixels), classifier.probabilities(pixels))
    found = open_backbone(SMALL, weights=str(other)).weights_sha256
    with pytest.raises(UserError) as error:
        open_classifier(path, weights=str(other))
    assert str(error.value) == (
        f"{path} belongs to weights of {SMALL} with the sha256 {backbone.weights_sha256}; those given have {found}: "
        "name the file that it was trained with by --weights")
    with pytest.raises(UserError, match="is a classifier of which all layers were trained; expected one of a head"):
        open_head(path)


def test_fine_tuned_classifier_stores_its_backbone(pixels, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(open_backbone(SMALL, weights="none", seed=1).network.state_dict(), weights)
    classifier = Classifier(open_backbone(SMALL, weights=str(weights), size=32), None, LABELS)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.mul_(1.01)
    classifier.is_fine_tuned = True
    save_classifier(tmp_path / "c.safetensors", classifier, {})
    weights.unlink()
    opened = open_classifier(tmp_path / "c.safetensors")
    assert torch.equal(opened.probabilities(pixels), classifier.probabilities(pixels))
    assert opened.is_fine_tuned


def test_new_linear_layer_follows_from_the_seed(backbone):
    weights = [Classifier(backbone, None, LABELS, seed=seed).linear.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


EXPECTED = "expected a .safetensors file of a classifier, as study.py classify writes it"


def test_other_files_are_refused_in_one_line(tmp_path):
    network, archive, text = tmp_path / "network.safetensors", tmp_path / "set.zip", tmp_path / "notes.txt"
    save_generator(network)
    archive.write_bytes(b"PK\3\4" + bytes(100))
    text.write_text("notes")
    with pytest.raises(UserError) as error:
        open_classifier(network)
    assert str(error.value) == f"{network} holds tensors, but is not a classifier; {EXPECTED}"
    for path in (archive, text):
        with pytest.raises(UserError) as error:
            open_classifier(path)
        assert str(error.value).startswith(f"{path} is damaged or of another kind (")
        assert str(error.value).endswith(f"); {EXPECTED}")
    with pytest.raises(UserError, match=f"^.* is a folder; {EXPECTED}$"):
        open_classifier(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_classifier(tmp_path / "missing")


def test_damage_is_noticed(classifier, tmp_path):
    path = tmp_path / "c.safetensors"
    save_classifier(path, classifier, {})
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_classifier(path)
    assert str(error.value) == f"{path} is damaged: its tensors do not match their checksum; copy it again"
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"^.* is damaged or of another kind \("):
        open_classifier(path)


@pytest.mark.parametrize("change", [{"version": 2}, {"labels": ["a"]}, {"labels": [1, 2]}, {"info": []}, {"model": 3},
                                    {"preprocessing": {}}, {"fit": {"C": 1}}, {"format": "x"}])
def test_headers_of_another_kind_are_refused(classifier, tmp_path, change):
    path = tmp_path / "c.safetensors"
    save_classifier(path, classifier, {})
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["classifier"])
    data = safetensors.torch.save({"a": torch.zeros(1)}, metadata={"classifier": json.dumps(header | change)})
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"^.* has a header that cannot be read \(.*\); it is damaged or of another "
                                        r"version: expected a \.safetensors file"):
        read_info(path)


def test_tensors_that_do_not_fit_the_labels_are_refused(classifier, tmp_path):
    path = tmp_path / "c.safetensors"
    changed = Classifier(classifier.backbone, None, LABELS)
    changed.labels = ("a", "b", "c")
    save_classifier(path, changed, {})
    with pytest.raises(UserError) as error:
        open_classifier(path)
    assert str(error.value) == (f"{path}: head.weight is [2, 1024]; expected [3, 1024], as in a classifier of this "
                                "model: does the file belong to another network?")


def test_softmax_of_large_logits_is_finite():
    np.testing.assert_array_equal(softmax(np.array([[1e4, -1e4]])), [[1, 0]])
