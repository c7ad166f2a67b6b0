"""latent.projection: what a similarity is shown of a network's images."""

from types import SimpleNamespace

import pytest
import torch

from latent.projection import to_similarity_input

LARGE_ENOUGH = SimpleNamespace(least_size=8)


def images_of(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


@pytest.mark.parametrize("side", [8, 64, 256])
def test_input_of_a_fitting_size_is_the_image_itself(side):
    images = images_of(2, 3, side, side)
    assert torch.equal(to_similarity_input(images, LARGE_ENOUGH), images)


def test_input_of_grey_has_three_equal_channels():
    images = images_of(2, 1, 8, 8)
    found = to_similarity_input(images, LARGE_ENOUGH)
    assert found.shape == (2, 3, 8, 8)
    assert all(torch.equal(found[:, channel], images[:, 0]) for channel in range(3))


@pytest.mark.parametrize(("side", "factor"), [(512, 2), (768, 3), (1024, 4)])
def test_input_of_a_large_image_is_the_mean_of_areas(side, factor):
    images = images_of(1, 1, side, side, dtype=torch.float64)
    expected = images.reshape(1, 1, 256, factor, 256, factor).mean(dim=(3, 5))
    found = to_similarity_input(images, LARGE_ENOUGH)
    assert torch.allclose(found, expected.expand(-1, 3, -1, -1), rtol=0, atol=1e-12)


def test_input_of_a_small_image_is_enlarged_in_straight_lines():
    images = torch.tensor([0.0, 1.0]).expand(1, 3, 2, 2)
    found = to_similarity_input(images, SimpleNamespace(least_size=4))
    # Centres of the 4 lie at -1/4, 1/4, 3/4 and 5/4 of the way between those of the 2; the outer ones stop at the edge.
    assert torch.equal(found, torch.tensor([0, 0.25, 0.75, 1]).expand(1, 3, 4, 4))


@pytest.mark.parametrize("side", [8, 32, 512])
@pytest.mark.parametrize("channels", [1, 3])
def test_input_of_an_image_depends_on_no_other_one(side, channels):
    images = images_of(3, channels, side, side)
    similarity = SimpleNamespace(least_size=32)
    alone = [to_similarity_input(image, similarity) for image in images.split(1)]
    assert torch.equal(to_similarity_input(images, similarity), torch.cat(alone))


@pytest.mark.parametrize(("side", "size"), [(8, 16), (16, 16), (512, 256)])
def test_input_passes_gradients_on(side, size):
    images = images_of(1, 1, side, side).requires_grad_()
    found = to_similarity_input(images, SimpleNamespace(least_size=16))
    assert found.shape == (1, 3, size, size)
    found.sum().backward()
    # Every pixel weighs the same in total; at the edges an enlargement repeats the outermost ones.
    assert images.grad.sum().item() == pytest.approx(3 * size * size, rel=1e-5)
    assert images.grad.min().item() > 0


@pytest.mark.parametrize(("images", "text"), [
    (torch.zeros(1, 2, 8, 8), r"images are torch.float32 \[1, 2, 8, 8\]; expected floating point \[N, 1 or 3, R, R\]"),
    (torch.zeros(1, 3, 8, 16), r"images are torch.float32 \[1, 3, 8, 16\]; expected"),
    (torch.zeros(3, 8, 8), r"images are torch.float32 \[3, 8, 8\]; expected"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"images are torch.uint8 \[1, 3, 8, 8\]; expected floating point"),
    (torch.zeros(1, 3, 300, 300), "images are 300x300; expected sides of at most 256, or of a multiple")])
def test_input_of_other_images_raises(images, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        to_similarity_input(images, LARGE_ENOUGH)
