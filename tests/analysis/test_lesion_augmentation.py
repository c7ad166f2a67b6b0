"""Random changes of lesion images: exact cases, ranges, and what they keep."""

import math
from dataclasses import replace

import pytest
import torch

from analysis.lesion_augmentation import AugmentationStrengths, augment

NONE = AugmentationStrengths(flip=False, rotation=0, scale=1, brightness=0, contrast=0, saturation=0, hue=0)
NEAR = 0.01  # of 255 levels: float32 coordinates and sums of three products


def images_of(count=8, height=12, width=12, seed=0):
    return 255 * torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def changed(images, seed=0, **strengths):
    return augment(images, torch.Generator().manual_seed(seed), replace(NONE, **strengths))


def disc(side):
    """Return a smooth red and green blob in the center: its sums show scaling, its colors the color map."""
    x = torch.arange(side) - (side - 1) / 2
    blob = torch.exp(-(x[:, None] ** 2 + x**2) / (side / 6) ** 2)
    return torch.stack([200 * blob, 100 * blob, 40 * blob])[None]


def test_augment_without_strength_returns_the_images():
    images = images_of(height=9, width=14)
    assert (changed(images) - images).abs().max() < NEAR


def test_augment_is_a_function_of_the_generator_alone():
    images = images_of()
    state = torch.get_rng_state()
    first, second, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_augment_changes_each_image_in_its_own_way():
    images = images_of(1).expand(6, -1, -1, -1)
    assert len(torch.unique(augment(images, torch.Generator().manual_seed(0)), dim=0)) == 6


@pytest.mark.parametrize(("height", "width"), [(12, 12), (8, 13)])
def test_flips_are_exact_and_all_four_occur(height, width):
    images = images_of(1, height, width).expand(64, -1, -1, -1)
    found = changed(images, flip=True)
    cases = [images[0].flip(dims) for dims in ((), (1,), (2,), (1, 2))]
    counts = [sum(bool((image - case).abs().max() < NEAR) for image in found) for case in cases]
    assert sum(counts) == 64
    assert min(counts) > 6  # 16 expected; fewer than 7 in any has a probability of 0.5 %


def test_rotation_by_90_degrees_is_exact(monkeypatch):
    images = images_of(2)
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.ones(*size, dtype=torch.float64))  # the largest
    found = changed(images, rotation=90)
    assert min((found - torch.rot90(images, turns, (2, 3))).abs().max() for turns in (1, -1)) < NEAR


def test_rotation_keeps_circles_of_oblong_images():
    image = torch.zeros(1, 3, 31, 61)
    image[..., 15 - 10:15 + 11, 30 - 10:30 + 11] = disc(21)
    found = changed(image.expand(16, -1, -1, -1), rotation=180)
    assert (found - image)[..., 20:41].abs().max() < 8  # of 200: interpolation. Beside it are reflections of the disc


def test_scale_stays_in_its_range_and_is_as_often_above_as_below_1():
    image = disc(48)
    factors = (changed(image.expand(200, -1, -1, -1), scale=1.25)[:, 0].sum((1, 2)) / image[:, 0].sum()).sqrt()
    assert factors.min() > 1 / 1.25 - 0.01
    assert factors.max() < 1.25 + 0.01
    assert factors.log().mean().abs() < 0.05
    assert factors.log().std() == pytest.approx(2 * math.log(1.25) / math.sqrt(12), rel=0.15)  # of a uniform one


@pytest.mark.parametrize("name", ["contrast", "saturation", "hue"])
def test_contrast_saturation_and_hue_keep_the_mean_of_an_image(name):
    images = 60 + images_of() / 2  # far from 0 and 255, where values are cut off
    found = changed(images, **{name: getattr(AugmentationStrengths(), name)})
    assert (found - images).abs().mean() > 0.5
    torch.testing.assert_close(found.mean((1, 2, 3)), images.mean((1, 2, 3)))


def test_brightness_multiplies_all_pixels_by_at_most_a_fifth_more_or_less():
    images = 20 + images_of(100) / 2
    factors = changed(images, brightness=0.2) / images
    torch.testing.assert_close(factors, factors[:, :1, :1, :1].expand_as(factors), rtol=0, atol=NEAR / 20)
    assert 0.8 <= factors.min() < 0.82
    assert 1.18 < factors.max() <= 1.2001


def test_hue_turns_colors_by_at_most_its_share_of_the_circle():
    color = torch.tensor([180.0, 110.0, 90.0])[:, None, None].expand(100, 3, 4, 4)
    found = changed(color, hue=0.02)
    before, after = color - color.mean(1, keepdim=True), found - found.mean(1, keepdim=True)
    cosines = torch.cosine_similarity(before, after, dim=1)
    assert cosines.min() > math.cos(2 * math.pi * 0.02) - 1e-5
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))


def test_gray_stays_gray():
    images = images_of()[:, :1].expand(-1, 3, -1, -1)
    found = augment(images, torch.Generator().manual_seed(1))
    assert (found.amax(1) - found.amin(1)).max() < NEAR


def test_values_stay_within_pixel_levels_and_mean_colors_near_their_own():
    images = images_of(64)
    found = augment(images, torch.Generator().manual_seed(2))
    assert 0 <= found.min() < found.max() <= 255
    moved = (found.mean((2, 3)) / images.mean((2, 3)) - 1).abs()
    assert moved.max() < 0.35  # brightness 0.2, and what turning and scaling bring in of other pixels
