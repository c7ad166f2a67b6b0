"""analysis.aligned_similarity: SSIM against its definition, and alignments that are known."""

import numpy as np
import pytest
import torch

from analysis.aligned_similarity import (
    COLOR_SIDE,
    MOST_SHIFT,
    SIDE,
    WINDOW,
    SmallImages,
    aligned_ssim,
    prepare_images,
)
from analysis.near_duplicates import ORIENTATIONS, orient
from imagesets.phantoms.make import render_phantom


@pytest.fixture(scope="module")
def lesions():
    """Return drawings of 12 different lesions: uint8 [12, 3, 64, 64]."""
    drawn = [render_phantom(0, index, lesion_number=index)[0] for index in range(12)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def upright(count):
    return torch.zeros(count, dtype=torch.int64)


def smooth(seed, side=SIDE, count=1):
    """Return images of a few waves, which correlate with themselves at one place only: float64 [count, side, side]."""
    random = np.random.RandomState(seed)
    places = np.linspace(0, 1, side)
    waves = np.stack([np.sin(2 * np.pi * (frequency * places + phase))
                      for frequency, phase in zip(random.uniform(0.5, 6, 40), random.rand(40), strict=True)])
    mixed = np.einsum("nab,ay,bx->nyx", random.randn(count, 40, 40), waves, waves)
    return 128 + 100 * mixed / np.abs(mixed).max(axis=(1, 2), keepdims=True)


def ssim_by_definition(x, y):
    """Return the mean over windows of Wang et al. 2004, eq. 13, written as loops."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(len(x) - WINDOW + 1):
        for left in range(len(x) - WINDOW + 1):
            a, b = (each[top:top + WINDOW, left:left + WINDOW].astype(np.float64) for each in (x, y))
            covariance = ((a - a.mean()) * (b - b.mean())).mean()
            values.append((2 * a.mean() * b.mean() + c1) * (2 * covariance + c2)
                          / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (a.var() + b.var() + c2)))
    return np.mean(values)


def noisy_pair():
    """Return an image and itself with noise of the same mean gray level: uint8 [1, 64, 64] each."""
    image = smooth(0)[0].round()
    noise = np.random.RandomState(1).randint(-9, 10, [SIDE, SIDE // 2])
    noise = np.concatenate([noise, -noise], axis=1)  # sums to 0
    return [torch.from_numpy(each.astype(np.uint8))[None] for each in (image, image + noise)]


def test_ssim_of_aligned_images_is_that_of_the_paper():
    image, noisy = noisy_pair()
    found = aligned_ssim(image, noisy, upright(1))
    assert (found.scale.item(), found.shift.tolist()) == (1, [[0, 0]])
    assert found.ssim.item() == pytest.approx(ssim_by_definition(image[0].numpy(), noisy[0].numpy()), abs=1e-6)


def test_ssim_equals_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is in the extra dev")
    image, noisy = noisy_pair()
    expected = metrics.structural_similarity(image[0].numpy(), noisy[0].numpy(), win_size=WINDOW, data_range=255,
                                             use_sample_covariance=False)
    assert aligned_ssim(image, noisy, upright(1)).ssim.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("orientation", range(len(ORIENTATIONS)))
def test_orientation_turns_the_first_image_into_the_second(orientation):
    images = torch.from_numpy(smooth(2, count=3).round().astype(np.uint8))
    turned = orient(images, ORIENTATIONS[orientation])
    found = aligned_ssim(images, turned, torch.full([3], orientation))
    assert found.ssim.tolist() == [1] * 3
    assert (aligned_ssim(images, turned, torch.full([3], (orientation + 1) % 8)).ssim < 0.5).all()


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (-3, 2), (5, -6), (MOST_SHIFT, MOST_SHIFT)])
def test_shifted_image_is_found_at_its_shift(down, right):
    large = smooth(3, side=SIDE + 2 * MOST_SHIFT).round().astype(np.uint8)
    image = torch.from_numpy(large[:, MOST_SHIFT:-MOST_SHIFT, MOST_SHIFT:-MOST_SHIFT].copy())
    top, left = MOST_SHIFT - down, MOST_SHIFT - right
    shifted = torch.from_numpy(large[:, top:top + SIDE, left:left + SIDE].copy())
    found = aligned_ssim(image, shifted, upright(1))
    assert (found.shift.tolist(), found.scale.item(), found.ssim.item()) == ([[down, right]], 1, 1)


@pytest.mark.parametrize("share", [0.8, 0.9, 0.95])
def test_cropped_image_is_found_at_the_scale_that_undoes_it(share):
    # A smooth image that is drawn twice: whole, and the part of it about the center.
    places = np.arange(SIDE) - (SIDE - 1) / 2

    def draw(scale):
        y, x = np.meshgrid(places * scale, places * scale, indexing="ij")
        return torch.from_numpy((128 + 60 * np.sin(x / 5 + y / 9) + 60 * np.cos(y / 6 - x / 11)).astype(np.uint8))[None]

    found = aligned_ssim(draw(share), draw(1), upright(1))
    assert (found.scale.item(), found.shift.tolist()) == (pytest.approx(share), [[0, 0]])
    assert found.ssim.item() > 0.98
    back = aligned_ssim(draw(1), draw(share), upright(1))
    assert back.scale.item() == pytest.approx(1 / share, abs=0.01)
    assert back.ssim.item() > 0.98


def test_brightness_does_not_count():
    image = torch.from_numpy((smooth(4) * 0.5 + 40).round().astype(np.uint8))
    assert aligned_ssim(image, image + 60, upright(1)).ssim.item() == 1


def test_contrast_counts_by_the_second_factor_of_ssim():
    image = smooth(5).round()
    halved = 128 + (image - 128) / 4
    found = aligned_ssim(*(torch.from_numpy(each.round().astype(np.uint8)) for each in (image, halved)), upright(1))
    assert 0.4 < found.ssim.item() < 0.7  # 2 s t / (s^2 + t^2) = 0.47 where t = s / 4, and 1 where both are flat


def test_flat_images_are_equal_and_not_moved():
    flat = torch.full([2, SIDE, SIDE], 90, dtype=torch.uint8)
    found = aligned_ssim(flat, flat + 30, upright(2))
    assert (found.ssim.tolist(), found.shift.tolist(), found.scale.tolist()) == ([1, 1], [[0, 0]] * 2, [1, 1])


def test_similarity_does_not_depend_on_the_batch(lesions):
    gray = prepare_images(lesions).gray.repeat(8, 1, 1)
    others, turns = gray.roll(1, 0), torch.arange(len(gray)) % 8
    together = aligned_ssim(gray, others, turns)
    for count in (1, 5, 96):
        parts = [aligned_ssim(*(each[start:start + count] for each in (gray, others, turns)))
                 for start in range(0, len(gray), count)]
        for whole, values in zip(together, zip(*parts, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(values))
    order = torch.randperm(len(gray), generator=torch.Generator().manual_seed(0))
    shuffled = aligned_ssim(gray[order], others[order], turns[order])
    assert all(torch.equal(whole[order], some) for whole, some in zip(together, shuffled, strict=True))


def test_no_pairs_give_empty_results():
    none = torch.empty([0, SIDE, SIDE], dtype=torch.uint8)
    assert [list(each.shape) for each in aligned_ssim(none, none, upright(0))] == [[0], [0, 2], [0]]


def test_prepared_images_are_luma_and_means_of_areas(lesions):
    prepared = prepare_images(lesions)
    luma = (lesions.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1)
    assert (prepared.gray.double() - luma).abs().max() < 0.501
    areas = lesions.double().view(12, 3, COLOR_SIDE, 4, COLOR_SIDE, 4).mean(dim=(3, 5))
    assert torch.equal(prepared.color.double(), areas)


@pytest.mark.parametrize("side", [32, 48, 100, 256])
def test_prepared_images_of_other_sizes_show_the_same(side):
    # A slope, which looks the same at any size.
    places = (torch.arange(side) + 0.5) / side
    slope = (places[:, None] * 200 + places * 50).round().to(torch.uint8).expand(1, 3, side, side)
    prepared = prepare_images(slope)
    expected = (torch.arange(SIDE) + 0.5) / SIDE
    inner = slice(2, -2)
    difference = prepared.gray[0].float() - (expected[:, None] * 200 + expected * 50)
    assert difference[inner, inner].abs().max() < 1.6
    assert prepared.color.shape == (1, 3, COLOR_SIDE, COLOR_SIDE)


def test_prepared_images_do_not_depend_on_the_batch(lesions):
    for pixels in (lesions, torch.nn.functional.pad(lesions, [3, 4, 5, 2])):
        whole = prepare_images(pixels)
        parts = SmallImages.concatenate([prepare_images(pixels[:5]), prepare_images(pixels[5:])])
        chosen = whole.select([7, 2])
        for name in ("gray", "color"):
            assert torch.equal(getattr(whole, name), getattr(parts, name))
            assert torch.equal(getattr(chosen, name), getattr(whole, name)[[7, 2]])
        assert (len(whole), len(chosen)) == (12, 2)
