"""Features of the points of a map: those of detectors and classifiers, and styles; predictions of a classifier."""

import numpy as np
import pytest
import torch

from analysis.backbones import open_backbone
from analysis.classifier import Classifier, Head, save_classifier
from analysis.embedding_features import classifier_predictions, embedding_features
from analysis.embedding_inputs import EmbedRequest, open_points
from analysis.embedding_points import PROJECTED, Points, PointSet
from analysis.prediction import predict_probabilities
from analysis.protocol import Task
from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from generation.image_generator import ImageGenerator, SynthesisSettings, save_projected_w
from generation.labeled_set import SetContents, write_labeled_set
from generation.network import open_network
from imagesets.reader import ImageSet
from metrics.detectors.registry import open_detector
from metrics.image_sources import SetImages
from tests.helpers.embed_commands import ALONE, write_generated, write_projections
from tests.helpers.generator_files import is_alike, save_generator
from tests.helpers.make_sets import make_set
from tests.helpers.projector_commands import INFO, pictures_in, project, styles_in, working_in
from tests.helpers.spot_sets import LABELS, spot_images

SMALL = "mobilenet_v3_small"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Files are named as they are in the folder, and the cache is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def request(*paths, **options):
    return EmbedRequest(**{"sets": paths, "out": "map.html", "features": "random-conv", "workers": 1, "verbose": False,
                           **options})


def compute(asked):
    """Return the features of all images that a request names, and what they are."""
    return embedding_features(asked, open_points(asked)[0], ALONE)


def refuse(asked):
    """Return the message of a mistake, one line."""
    points, _ = open_points(asked)
    with pytest.raises(UserError) as caught:
        embedding_features(asked, points, ALONE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels_of_set(path):
    images = SetImages(path).select()
    return images.pixels(range(len(images)))


# Detectors


@pytest.fixture
def two_sets(here):
    make_set("real.zip", 52)
    make_set("gray.zip", images=range(100, 103), size=16, channels=1, source={"generated": True})


def test_features_are_those_of_the_detector_in_the_order_of_the_points(two_sets):
    found, described = compute(request("real.zip", "gray.zip"))
    detector = open_detector("random-conv", device="cpu")
    expected = [detector(pixels_of_set(path)).numpy() for path in ("real.zip", "gray.zip")]
    assert (found.shape, found.dtype) == ((55, detector.num_features), np.float32)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    assert described == {"name": "random-conv", "weights_sha256": detector.weights_sha256,
                         "preprocessing": detector.preprocessing, "num_features": detector.num_features}


def test_features_of_a_subset_are_those_of_its_images(two_sets):
    whole, _ = compute(request("real.zip"))
    asked = request("real.zip", max_images=50, seed=3)
    points, _ = open_points(asked)
    found, _ = embedding_features(asked, points, ALONE)
    rows = [int(name[-8:-4]) for name in points.names]
    np.testing.assert_allclose(found, whole[rows], rtol=1e-4, atol=1e-5)


def test_features_are_kept_in_the_cache_unless_it_is_not_wanted(two_sets, here, monkeypatch):
    first, _ = compute(request("real.zip", "gray.zip", no_cache=True))
    assert not (here / "cache" / "features").exists()
    compute(request("real.zip", "gray.zip"))
    assert len(list((here / "cache" / "features").iterdir())) == 2
    monkeypatch.setattr("metrics.features.compute_features", None)  # would raise
    assert np.array_equal(compute(request("real.zip", "gray.zip"))[0], first)


def test_unknown_weights_are_refused(two_sets):
    assert refuse(request("real.zip", weights="x.pth")).startswith("the file of weights is x.pth; expected none, ")


# Classifiers


@pytest.fixture(scope="module")
def spots(tmp_path_factory):
    """Images with and without a spot, and a classifier of them whose backbone has random weights."""
    folder = tmp_path_factory.mktemp("spots")
    images = spot_images(folder / "spots.zip", 50)
    backbone = open_backbone(SMALL, weights="none", size=32, seed=2)
    with torch.no_grad():
        features = backbone(images.images.select().pixels(range(50))).numpy()
    weight = np.stack([np.zeros(features.shape[1]), np.random.default_rng(0).normal(size=features.shape[1])]) / 30
    head = Head(mean=features.mean(axis=0), std=features.std(axis=0), weight=weight, bias=np.array([0, -0.5]), C=1.0,
                val_auc=1.0, has_converged=True)
    save_classifier(folder / "spots.safetensors", Classifier(backbone, head, LABELS),
                    {"thresholds": {"balanced": 0.3}, "positive": ["spot"]})
    return folder, images.images.select(), Classifier(backbone, head, LABELS), features


def test_features_of_a_classifier_are_what_its_head_takes(spots):
    folder, _, _, expected = spots
    path = str(folder / "spots.safetensors")
    found, described = compute(request(str(folder / "spots.zip"), features=path))
    scale = np.abs(expected).max()  # random weights give tiny features
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)
    assert (described["name"], described["sha256"], described["model"], described["labels"]) == (
        "spots.safetensors", sha256_of(path), SMALL, list(LABELS))
    assert described["num_features"] == expected.shape[1]


def test_predictions_are_those_of_study_predict(spots):
    folder, images, classifier, _ = spots
    asked = request(str(folder / "spots.zip"), classifier=str(folder / "spots.safetensors"))
    found = classifier_predictions(asked, open_points(asked)[0], ALONE)
    expected = predict_probabilities(classifier, images, workers=1)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)
    assert found.probabilities.dtype == np.float64
    assert found.predicted.tolist() == (found.probabilities[:, 1] >= 0.3).tolist()
    assert found.task == Task(labels=LABELS, positive=("spot",))


def test_fine_tuned_backbones_of_the_same_weights_file_are_told_apart_in_the_cache(spots):
    folder, _, _, _ = spots
    features = []
    for seed in (0, 1):
        backbone = open_backbone(SMALL, weights="none", size=32, seed=seed)
        backbone.weights_sha256 = "ab" * 32  # from which both were trained
        classifier = Classifier(backbone, None, LABELS)
        classifier.is_fine_tuned = True
        save_classifier(f"{seed}.safetensors", classifier, {})
        features.append(compute(request(str(folder / "spots.zip"), features=f"{seed}.safetensors")))
    assert np.abs(features[0][0] - features[1][0]).max() > 0.1 * np.abs(features[0][0]).max()
    assert features[0][1]["weights_sha256"] != features[1][1]["weights_sha256"]


def test_other_files_than_classifiers_are_refused(two_sets):
    save_generator("net.safetensors", INFO)
    assert refuse(request("real.zip", features="net.safetensors")) == (
        "net.safetensors holds tensors, but is not a classifier; expected a .safetensors file of a classifier, as "
        "study.py classify writes it")


# Styles


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """A folder with a network, images of it, and projections of 52 images with made-up styles, all layers alike."""
    folder = tmp_path_factory.mktemp("styles")
    network = open_network(save_generator(folder / "net.safetensors", INFO), "cpu")
    write_generated(folder / "synthetic.zip", network, truncation=0.5)
    random = np.random.default_rng(0)
    w = np.repeat(random.normal(size=(52, 1, 8)).astype(np.float32), network.G.num_ws, axis=1)
    write_projections(folder / "projections.zip", w, network)
    return folder, network, w


def of_styles(folder, *names, **options):
    """Return a request for sets of a folder, or for those whose whole path is given."""
    return request(*(str(folder / name) for name in names),
                   **{"features": "w", "network": str(folder / "net.safetensors"), **options})


def rendered(network, styles_of_images):
    """Return the images of styles, float32 [n, K], as uint8 [n, C, R, R]."""
    ws = torch.from_numpy(styles_of_images)[:, None].expand(-1, network.G.num_ws, -1)
    return torch.cat(list(ImageGenerator(network.G, SynthesisSettings(), batch=1).render_all(ws)))


@pytest.mark.parametrize("settings", [{}, {"truncation": 0.5}, {"truncation": 0.7, "center": "class"}])
def test_styles_of_generated_images_give_these_images(styles, here, settings):
    folder, network, w = styles
    write_generated(here / "made.zip", network, **settings)
    asked = of_styles(folder, "projections.zip", here / "made.zip")
    found, described = compute(asked)
    assert (found.shape, found.dtype) == ((52 + 7, 8), np.float32)
    assert np.array_equal(found[:52], w[:, 0])
    assert is_alike(rendered(network, found[52:]), torch.stack(pictures_in("made.zip")))
    assert described == {"name": "w", "network": "net.safetensors", "network_sha256": network.sha256}


def test_styles_of_unconditional_networks_need_no_labels(here):
    network = open_network(save_generator(here / "net.safetensors", {}, c_dim=0), "cpu")
    write_labeled_set("made.zip", network, ImageGenerator(network.G, SynthesisSettings(), batch=1), SetContents(
        first_seed=0, count=3, counts=None, piece=3), ALONE)
    write_projections(here / "projections.zip", np.zeros((50, network.G.num_ws, 8), np.float32), network)
    found, _ = compute(of_styles(here, "projections.zip", "made.zip"))
    assert is_alike(rendered(network, found[50:]), torch.stack(pictures_in("made.zip")))


def test_styles_of_a_subset_are_those_of_its_images(styles):
    folder, _, w = styles
    asked = of_styles(folder, "projections.zip", "synthetic.zip", max_images=50, seed=5)
    points, _ = open_points(asked)
    found, _ = embedding_features(asked, points, ALONE)
    rows = [int(name[-8:-4]) for name in points.sets[0].names]
    assert len(rows) == 50 < len(w)
    assert np.array_equal(found[:50], w[rows, 0])


def test_styles_that_differ_between_layers_are_all_used(styles, here):
    folder, network, _ = styles
    w = np.random.default_rng(1).normal(size=(50, network.G.num_ws, 8)).astype(np.float32)
    write_projections(here / "projections.zip", w, network)
    found, _ = compute(of_styles(folder, here / "projections.zip", "synthetic.zip"))
    assert np.array_equal(found[:50], w.reshape(50, -1))
    layers = found[50:].reshape(7, network.G.num_ws, 8)
    assert (layers == layers[:, :1]).all()


def test_styles_of_projections_are_those_that_projector_found(here, monkeypatch, capsys):
    with working_in(here, monkeypatch):
        make_set("set.zip", 3, labels=[0, 1, 1], classes=INFO["classes"])
        project(capsys, "--data=set.zip", "--outdir=out", "--batch=3")
        data = ImageSet("out/projections.zip")
        points = Points(sets=[PointSet(
            name="projections", kind=PROJECTED, images=SetImages(data).select(), names=data.names, classes=[""] * 3,
            groups=data.named_groups(), shows_pictures=False)])
        found, _ = embedding_features(request("out/projections.zip", features="w"), points, ALONE)
        assert np.array_equal(found, styles_in("out")[:, 0])
        network = open_network("net.safetensors", "cpu")
        assert is_alike(rendered(network, found), torch.stack(pictures_in("out/projections.zip")))


ADVICE = ("; expected latents.npz as projector.py --data writes it beside projections.zip: keep both in one folder")


def test_styles_that_do_not_belong_to_the_images_are_refused(styles, here):
    folder, network, w = styles
    path = here / "projections.zip"
    write_projections(path, w, network)
    asked = of_styles(folder, path, network=None)
    assert np.array_equal(compute(asked)[0], w[:, 0])
    save_projected_w("latents.npz", w[:51], group=np.array([f"lesion{index}" for index in range(51)]))
    assert refuse(asked) == f"{here}/latents.npz has styles of 51 images, {path} has 52 images{ADVICE}"
    save_projected_w("latents.npz", w, group=np.array([f"lesion{index}" for index in range(51, -1, -1)]))
    assert refuse(asked) == f"{here}/latents.npz has styles of other images than {path}{ADVICE}"
    save_projected_w("latents.npz", w[:, 0], group=np.array(["x"] * 52))
    assert refuse(asked) == f"{here}/latents.npz has w of shape [52, 8] and type float32{ADVICE}"
    (here / "latents.npz").unlink()
    assert refuse(asked) == f"{here}/latents.npz does not exist{ADVICE}"


def test_styles_of_another_network_are_refused(styles, here):
    folder, _, w = styles
    other = open_network(save_generator(here / "other.safetensors", INFO, seed=1), "cpu")
    write_projections(here / "projections.zip", w, other)
    expected = "expected sets of one network, whose styles alone can be compared"
    paths = (str(folder / "projections.zip"), str(here / "projections.zip"))
    assert refuse(request(*paths, features="w")) == (
        f"{paths[1]} is of other.safetensors, another network than net.safetensors, the network of the first set; "
        f"{expected}")
    assert refuse(request(*paths, features="w", network=str(here / "other.safetensors"))) == (
        f"{paths[0]} is of net.safetensors, another network than --network, other.safetensors; {expected}")


def test_generated_sets_whose_images_are_not_all_there_are_refused(styles, here):
    folder, _, _ = styles
    make_set("part.zip", 5, labels=[0] * 5, source=ImageSet(folder / "synthetic.zip").source)
    asked = of_styles(folder, "projections.zip", here / "part.zip")
    assert refuse(asked) == (f"{here}/part.zip has 5 images, but records the seeds [7, 13]; expected one seed for each "
                             "image, in a file as generate.py --zip wrote it")
