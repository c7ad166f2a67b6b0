"""Backbones: which network, which weights, which preprocessing; and messages for those that do not fit."""

import hashlib
import re

import pytest
import torch

from analysis.backbones import Preprocessing, hash_tensors, open_backbone
from dnnlib.cli import UserError
from metrics.detectors.registry import open_detector
from metrics.features import FeatureRequest, compute_features
from metrics.image_sources import SetImages
from tests.helpers.make_sets import make_set

SMALL = "mobilenet_v3_small"


def pixels_of(count=3, size=40, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def torchvision_models():
    return pytest.importorskip("torchvision").models


def whole_network(models, name, seed=5):
    """Return torchvision's network with its classification layer, and statistics as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = models.get_model(name, weights=None).eval()
        for value in network.state_dict().values():
            if value.ndim == 1 and value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape))
    return network


def saved(network, path, change=lambda tensors: tensors):
    torch.save(change(dict(network.state_dict())), path)
    return str(path)


# Every network of torchvision.


FAMILIES = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
            "mnasnet0_5", "regnet_x_400mf", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "vgg11", "vit_b_16"]


@pytest.mark.parametrize("families", [FAMILIES[:7], FAMILIES[7:], pytest.param(None, marks=pytest.mark.slow)])
def test_networks_give_features_that_their_last_layer_would_take(torchvision_models, monkeypatch, families):
    """On the meta device, which computes shapes only: without memory or time for the large ones."""
    build, wrong = torchvision_models.get_model, []

    def build_without_memory(name, **arguments):
        # The widths of RegNets are computed by tensors, which need values.
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            return build(name, **arguments).to("meta")

    monkeypatch.setattr(torchvision_models, "get_model", build_without_memory)
    large = ("regnet_y_128gf", "regnet_y_32gf", "regnet_x_32gf", "regnet_y_16gf", "regnet_x_16gf")  # gigabytes
    for name in families or set(torchvision_models.list_models(module=torchvision_models)) - set(large):
        backbone = open_backbone(name, weights="none")
        side = backbone.preprocessing.crop
        shape = backbone.features(torch.zeros(2, 3, side, side, device="meta")).shape
        if shape != (2, backbone.num_features) or backbone.num_features in (2, 1000):
            wrong.append((name, shape))
    assert wrong == []


@pytest.mark.parametrize("name", [SMALL, "squeezenet1_1"])
def test_features_are_what_the_last_layer_of_torchvisions_network_takes(torchvision_models, tmp_path, name):
    network, found = whole_network(torchvision_models, name), []
    last = [layer for layer in network.modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))][-1]
    last.register_forward_hook(lambda layer, inputs, output: found.append(inputs[0]))
    usual = torchvision_models.get_model_weights(name).DEFAULT.transforms()
    pixels = pixels_of(size=300)
    with torch.no_grad():
        network(usual(pixels))
        features = open_backbone(name, weights=saved(network, tmp_path / "w.pth"))(pixels)
    taken = found[0] if found[0].ndim == 2 else found[0].relu().mean((2, 3))  # SqueezeNet's pooling comes after it
    # torchvision rounds the pixels of resized images to integers.
    assert (features - taken).abs().max() < 0.02 * taken.std()


# Preprocessing.


@pytest.mark.parametrize(("height", "width"), [(40, 40), (300, 260), (60, 90)])
def test_preprocessing_is_that_of_torchvisions_weights_up_to_rounding(torchvision_models, height, width):
    for name in ("efficientnet_b0", "efficientnet_b2"):  # bicubic; with and without a crop
        usual = torchvision_models.get_model_weights(name).DEFAULT.transforms()
        pixels = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
        preprocessing = open_backbone(name, weights="none").preprocessing
        found = preprocessing.normalize(preprocessing.resize_and_crop(pixels))
        torch.testing.assert_close(found, usual(pixels), rtol=0, atol=0.51 / 255 / min(usual.std))


def test_size_replaces_resizing_and_crop():
    preprocessing = open_backbone(SMALL, weights="none", size=32).preprocessing
    assert preprocessing.resize_and_crop(pixels_of(2, 50)).shape == (2, 3, 32, 32)
    assert preprocessing.describe() == ("resized to 32x32 (bilinear, antialiased), x / 255, "
                                        "(x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]")
    pixels = pixels_of(2, 32)
    assert torch.equal(preprocessing.resize_and_crop(pixels), pixels.float())


def test_preprocessing_survives_its_record():
    for name in (SMALL, "efficientnet-lite0"):
        preprocessing = open_backbone(name, weights="none").preprocessing
        assert Preprocessing.from_record(preprocessing.as_record()) == preprocessing


@pytest.mark.parametrize("change", [{"resize": []}, {"std": [1, 1]}, {"std": [1, 1, 0]}, {"interpolation": "nearest"},
                                    {"crop": "x"}, {"resize": [0]}, {"mean": None}])
def test_a_record_of_another_kind_is_refused(change):
    record = open_backbone("efficientnet-lite0", weights="none").preprocessing.as_record()
    with pytest.raises((ValueError, TypeError)):
        Preprocessing.from_record(record | change)


def test_place_puts_a_map_where_the_crop_was():
    preprocessing = Preprocessing(resize=(40,), crop=20, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    placed = preprocessing.place(torch.ones(1, 5, 5), 80, 160)[0]  # resized to 40x80: rows 10-29, columns 30-49
    assert placed.shape == (80, 160)
    assert placed[22:58, 62:98].min() > 0.99
    placed[18:62, 58:102] = 0
    assert placed.max() == 0


# Weights.


def test_random_weights_follow_from_the_seed_and_leave_the_random_state():
    state = torch.get_rng_state()
    first, second, other = (open_backbone(SMALL, weights="none", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    hashes = [hash_tensors(backbone.network.state_dict()) for backbone in (first, second, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert first.weights_sha256 is None


def test_a_classification_layer_of_another_size_is_ignored_and_may_be_missing(torchvision_models, tmp_path):
    network = whole_network(torchvision_models, SMALL)

    def with_classes(count):
        def change(tensors):
            head = {"classifier.3.weight": torch.zeros(count, 1024), "classifier.3.bias": torch.zeros(count)}
            rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.3.")}
            return rest | (head if count else {})
        return change

    pixels = pixels_of()
    found = [open_backbone(SMALL, weights=saved(network, tmp_path / f"{count}.pth", with_classes(count)))(pixels)
             for count in (0, 2)]
    expected = open_backbone(SMALL, weights=saved(network, tmp_path / "w.pth"))(pixels)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize("name", ["densenet121", "mnasnet0_5", pytest.param("vit_b_32", marks=pytest.mark.slow)])
def test_names_of_old_files_are_understood(torchvision_models, tmp_path, name):
    """Published files of these networks have them; MNASNet's refuses tensors that come without a version."""
    network = whole_network(torchvision_models, name)

    def rename(tensors):
        tensors = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): value
                   for key, value in tensors.items()}
        return {key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value
                for key, value in tensors.items()}

    backbone = open_backbone(name, weights=saved(network, tmp_path / "old.pth", rename))
    own = network.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in backbone.network.state_dict().items())


def test_weights_of_another_network_are_refused_in_one_line(torchvision_models, tmp_path):
    path = saved(whole_network(torchvision_models, "squeezenet1_1"), tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        open_backbone(SMALL, weights=path)
    assert str(error.value) == (
        f"{path} has no tensor features.0.0.weight; expected one of shape [16, 3, 3, 3], as in "
        "mobilenet_v3_small-047dcff4.pth: does the file belong to another network?")


def test_auto_takes_the_file_in_torchvisions_cache_and_checks_its_digits(torchvision_models, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "mobilenet_v3_small-047dcff4.pth"
    path.parent.mkdir(parents=True)
    saved(whole_network(torchvision_models, SMALL), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError) as error:
        open_backbone(SMALL)
    assert str(error.value) == (f"{path} has the sha256 {digest}; expected one that starts with 047dcff4: remove it to "
                                "download it again, or name it with --weights to use it anyway")
    given = open_backbone(SMALL, weights=str(path))
    assert given.weights_sha256 == digest
    assert given.note == (f"--weights={path}: its sha256 {digest} is not that of {path.name}; other weights of this "
                          "network are used, and results record them")
    assert open_backbone(SMALL, weights="none").note is None
    assert open_backbone("efficientnet-lite0").note is None


def test_without_a_network_the_ways_out_are_named(downloads, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        open_backbone("resnet18")
    url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert str(error.value) == (
        f"resnet18-f37072fd.pth is not in the cache, and downloading {url} failed (no network): download it on a "
        f"machine with network access, and copy it to {downloads / 'resnet18-f37072fd.pth'}, or name it with "
        "--weights=FILE; study.py classify --weights=none and "
        "--model=efficientnet-lite0 need no download")


@pytest.mark.parametrize(("arguments", "message"), [
    (("efficientnet_b22",), "--model is 'efficientnet_b22'; expected efficientnet-lite0, or a classification network "
     "of torchvision, such as efficientnet_b2 (did you mean efficientnet_b2?)"),
    (("vit_b_16", "none", 64), "--size is 64, but vit_b_16 takes images of 224 pixels only; leave --size out, or "
     "choose another --model"),
    (("vgg11", "none", 8), "--size is 8; expected at least 32 for vgg11"),
    ((SMALL, "none", 0), "--size is 0; expected at least 1 for mobilenet_v3_small"),
    (("efficientnet-lite0", "none", -1), "--size is -1; expected at least 1"),
    (("resnet18", "missing.pth"), "--weights is missing.pth, which does not exist; expected auto, none, or a file such "
     "as resnet18-f37072fd.pth, from https://download.pytorch.org/models/resnet18-f37072fd.pth"),
])
def test_what_does_not_exist_or_fit_is_refused_in_one_line(arguments, message):
    name, weights, size = (*arguments, "auto", None)[:3] if len(arguments) < 3 else arguments
    with pytest.raises(UserError) as error:
        open_backbone(name, weights=weights, size=None if len(arguments) < 3 else size)
    assert str(error.value) == message


# EfficientNet-lite0, and features.


def test_lite0_gives_the_features_of_the_metrics_detector():
    backbone, pixels = open_backbone("efficientnet-lite0"), pixels_of(5, 64)
    with torch.no_grad():
        # Batch normalization is folded into convolutions there: other rounding.
        torch.testing.assert_close(backbone(pixels), open_detector("efficientnet-lite0", device="cpu")(pixels),
                                   rtol=0, atol=1e-4)
    assert backbone.weights_sha256 == open_detector("efficientnet-lite0", device="cpu").weights_sha256


def test_gradients_reach_all_layers_of_a_backbone_in_training():
    for name in ("efficientnet-lite0", SMALL):
        backbone = open_backbone(name, weights="none", size=32).train()
        backbone(pixels_of(4, 32)).sum().backward()
        assert [key for key, value in backbone.named_parameters() if value.grad is None] == []


def test_detector_gives_compute_features_the_same_features(tmp_path):
    backbone = open_backbone(SMALL, weights="none", size=32, seed=3)
    images = SetImages(make_set(tmp_path / "set.zip", 7, size=16)).select()
    detector = backbone.detector()
    features = compute_features(images, [FeatureRequest(detector=detector, count=7)], batch=3, device="cpu")[0].values
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(features), backbone(images.pixels(range(7))))
    assert (detector.name, detector.num_features) == (SMALL, features.shape[1])
    assert detector.weights_sha256 == hash_tensors(backbone.network.state_dict())
    assert detector.weights_sha256 != open_backbone(SMALL, weights="none", seed=4).detector().weights_sha256
