"""LPIPS is the distance that torch-fidelity computes, and behaves as one."""

import hashlib

import pytest
import torch
import torchvision

from dnnlib.cli import UserError
from dnnlib.files import sha256_of
from metrics.detectors.base import LPIPS_VGG16, VGG16
from metrics.detectors.registry import open_similarity
from tests.helpers.weights_files import write_weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]  # half a GiB of weights
CHANNELS = (64, 128, 256, 512, 512)


def linear_weights():
    generator = torch.Generator().manual_seed(3)
    return {f"lin{level}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
            for level, channels in enumerate(CHANNELS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of both layouts with random values."""
    path = tmp_path_factory.mktemp("weights")
    with torch.device("meta"):
        network = torchvision.models.vgg16(weights=None)
    write_weights(path / VGG16.name, network)
    torch.save(linear_weights(), path / LPIPS_VGG16.name)
    return path


@pytest.fixture(scope="module")
def similarity(folder):
    return open_similarity(device="cpu", weights=folder)


def images(seed, size=32):
    """Return float32 [3, 3, size, size] in [-1, 1]."""
    return 2 * torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def test_lpips_is_that_of_torch_fidelity(similarity, folder, monkeypatch):
    from torch_fidelity import sample_similarity_lpips

    def load_vgg16():
        with torch.device("meta"):
            network = torchvision.models.vgg16(weights=None)
        network.load_state_dict(torch.load(folder / VGG16.name, weights_only=True), assign=True)
        return network

    monkeypatch.setattr(sample_similarity_lpips, "load_state_dict_from_url", lambda *_, **__: linear_weights())
    monkeypatch.setattr(sample_similarity_lpips, "torchvision_load_pretrained_vgg16", load_vgg16)
    theirs = sample_similarity_lpips.SampleSimilarityLPIPS("theirs")
    a, b = images(1), images(2)
    # theirs takes images in [0, 255], ours in [-1, 1]
    expected = theirs((a + 1) * 127.5, (b + 1) * 127.5).flatten()
    distance = similarity(a, b)
    assert distance.shape == (3,)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=0)


def test_lpips_is_zero_for_equal_images_and_grows_with_the_change(similarity):
    a = images(1)
    assert similarity(a, a).tolist() == [0, 0, 0]
    near, far = (similarity(a, a.lerp(images(2), share)) for share in (0.1, 0.5))
    assert (near > 0).all()
    assert (far > near).all()


def test_lpips_is_symmetric_and_does_not_depend_on_the_batch(similarity):
    a, b = images(1), images(2)
    distance = similarity(a, b)
    torch.testing.assert_close(similarity(b, a), distance, rtol=1e-5, atol=0)
    alone = torch.cat([similarity(a[index:index + 1], b[index:index + 1]) for index in range(3)])
    torch.testing.assert_close(alone, distance, rtol=1e-5, atol=0)


def test_lpips_gradients_flow_to_images_and_are_finite(similarity):
    a = images(1, size=16)[:1].requires_grad_()
    similarity(a, images(2, size=16)[:1]).sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in similarity.parameters())


def test_lpips_maps_add_up_to_the_distance_and_end_in_a_description(similarity):
    a, b = images(1), images(2)
    maps = similarity.embed(a)
    assert [list(x.shape) for x in maps] == [[3, channels, 32 >> level, 32 >> level]
                                             for level, channels in enumerate(CHANNELS)]
    assert torch.equal(similarity.compare(maps, similarity.embed(b)), similarity(a, b))
    described = similarity.describe(a)
    assert described.shape == (3, 512)
    assert torch.equal(described, maps[-1].mean(dim=(2, 3)))


def test_lpips_order_and_company_of_images_change_no_bit(similarity):
    """In batches of 8, as the projection of many images has them."""
    def measured(a, target):
        a = a.clone().requires_grad_()
        distance = similarity.compare(similarity.embed(a), target)
        return distance.detach(), torch.autograd.grad(distance.sum(), a)[0]

    a, b = (torch.cat([images(seed), images(seed + 2), images(seed + 4)])[:8] for seed in (1, 2))
    order, target = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4]), similarity.embed(b)
    others, their_target = images(9).repeat(3, 1, 1, 1)[:8], [x.flip(0) for x in target]
    others[7] = a[0]
    expected = measured(a, target)
    shuffled = measured(a[order], [x[order] for x in target])
    strange = measured(others, their_target)
    for index in range(2):
        assert torch.equal(shuffled[index], expected[index][order])
        assert torch.equal(strange[index][7], expected[index][0])


def test_lpips_embedding_of_small_images_raises(similarity):
    with pytest.raises(ValueError) as caught:
        similarity.embed(torch.zeros(1, 3, 16, 15))
    assert similarity.least_size == 16
    assert str(caught.value) == ("images are torch.float32 [1, 3, 16, 15]; expected floating point [N, 3, H, W], "
                                 "H and W at least 16")


@pytest.mark.parametrize(("a", "b"), [((1, 3, 32, 32), (2, 3, 32, 32)), ((1, 1, 32, 32), (1, 1, 32, 32)),
                                      ((1, 3, 8, 32), (1, 3, 8, 32))])
def test_lpips_of_other_shapes_raises(similarity, a, b):
    with pytest.raises(ValueError) as caught:
        similarity(torch.zeros(a), torch.zeros(b))
    assert str(caught.value) == (f"images are {list(a)} and {list(b)}; expected two of one shape [N, 3, H, W], "
                                 "H and W at least 16")


def test_lpips_says_which_weights_it_used(similarity, folder):
    parts = similarity.weights_sha256.split("+")
    assert parts == [sha256_of(folder / name) for name in (VGG16.name, LPIPS_VGG16.name)]
    assert all(len(part) == hashlib.sha256().digest_size * 2 for part in parts)


def test_lpips_weights_of_another_network_are_refused(tmp_path, folder):
    (tmp_path / VGG16.name).symlink_to(folder / VGG16.name)
    torch.save(linear_weights() | {"lin2.model.1.weight": torch.ones(1, 192, 1, 1)}, tmp_path / LPIPS_VGG16.name)
    message = r": lin2\.model\.1\.weight is \[1, 192, 1, 1\]; expected \[1, 256, 1, 1\], as in weights-vgg16-lpips\.pth"
    with pytest.raises(UserError, match=message):
        open_similarity(device="cpu", weights=tmp_path)


def test_lpips_weights_below_zero_are_refused(tmp_path, folder):
    (tmp_path / VGG16.name).symlink_to(folder / VGG16.name)
    negative = torch.ones(1, 256, 1, 1)
    negative[0, 7] = -0.01
    torch.save(linear_weights() | {"lin2.model.1.weight": negative}, tmp_path / LPIPS_VGG16.name)
    with pytest.raises(UserError) as caught:
        open_similarity(device="cpu", weights=tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / LPIPS_VGG16.name}: lin2.model.1.weight has values below 0; expected none, as in "
        f"{LPIPS_VGG16.name}: does the file belong to another network?")
