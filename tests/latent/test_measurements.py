"""Measurements of lesions: drawn shapes of known size and color, phantoms of known attributes."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from imagesets.phantoms.paint import render
from imagesets.phantoms.scene import ARTIFACT_RATES, LOOKS, attributes, draw_scene, look_of
from latent.measurements import MEASUREMENTS, lesion_measurements, measure, segment

SKIN, BROWN = (222, 180, 160), (120, 72, 48)


def painted(mask, *, color=BROWN, skin=SKIN, noise=2):
    """Return an image with a lesion of one color on noisy skin: uint8 [3, H, W]."""
    random = np.random.RandomState(0)
    image = np.where(mask[..., None], color, skin) + noise * random.randn(*mask.shape, 3)
    return image.clip(0, 255).round().astype(np.uint8).transpose(2, 0, 1)


def ellipse(side, *, radius, other=None, x=0.0, y=0.0, angle=0.0):
    """Return an ellipse as bool [side, side]; lengths in image widths."""
    u = (np.arange(side) + 0.5) / side - 0.5 - x
    v = u[:, None] + x - y
    along, across = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    return np.hypot(along / radius, across / (other or radius)) <= 1


def numbers_of(image):
    return dict(zip(MEASUREMENTS, measure(image[None])[0], strict=True))


@pytest.mark.parametrize("side", [64, 128, 256])
def test_numbers_of_a_disc_are_those_of_geometry(side):
    found = numbers_of(painted(ellipse(side, radius=0.25)))
    assert found["area"] == pytest.approx(np.pi * 0.25**2, rel=0.06)
    assert found["diameter"] == pytest.approx(0.5, abs=0.03)
    assert found["asymmetry"] < 0.03
    assert found["border_irregularity"] < 0.05
    assert found["color_variety"] < 4


def test_diameter_of_an_ellipse_is_its_long_axis():
    found = numbers_of(painted(ellipse(128, radius=0.35, other=0.12, angle=0.6)))
    assert found["diameter"] == pytest.approx(0.7, abs=0.03)
    assert found["area"] == pytest.approx(np.pi * 0.35 * 0.12, rel=0.1)
    assert found["asymmetry"] < 0.06


def test_mean_color_is_that_of_the_paint():
    from skimage.color import rgb2lab

    for color in (BROWN, (60, 40, 60), (190, 80, 90)):
        found = numbers_of(painted(ellipse(64, radius=0.25), color=color))
        expected = rgb2lab(np.array(color, dtype=np.uint8)[None, None])[0, 0]
        assert [found[f"color_{name}"] for name in "lab"] == pytest.approx(expected, abs=4)


def test_a_half_disc_is_less_symmetric_than_a_disc_and_a_notched_one_more_irregular():
    side = 128
    disc = ellipse(side, radius=0.3)
    lopsided = disc & ~ellipse(side, radius=0.3, x=0.25, y=0.2)
    notched = disc & ~ellipse(side, radius=0.1, y=0.28) & ~ellipse(side, radius=0.1, y=-0.28)
    plain, bitten, symmetric = (numbers_of(painted(mask)) for mask in (disc, lopsided, notched))
    assert bitten["asymmetry"] > plain["asymmetry"] + 0.1
    assert symmetric["asymmetry"] < 0.05
    assert symmetric["border_irregularity"] == pytest.approx(1 - notched.sum() / disc.sum(), abs=0.06)
    assert symmetric["border_irregularity"] > plain["border_irregularity"] + 0.05


def test_two_colors_vary_by_half_their_distance():
    from skimage.color import rgb2lab

    disc = ellipse(128, radius=0.3)
    image = painted(disc)
    left = disc.copy()
    left[:, 64:] = False
    image[:, left] = np.array((60, 40, 60))[:, None]
    colors = rgb2lab(np.array([[BROWN, (60, 40, 60)]], dtype=np.uint8))[0]
    assert numbers_of(image)["color_variety"] == pytest.approx(np.linalg.norm(colors[0] - colors[1]) / 2, rel=0.12)


@pytest.mark.parametrize("turn", [lambda image: np.rot90(image, axes=(1, 2)), lambda image: image[:, :, ::-1]],
                         ids=["rotated", "mirrored"])
def test_numbers_do_not_change_when_the_image_is_turned(turn):
    images = np.stack([phantom(index)[0] for index in range(12)])
    found, turned = measure(images), measure(np.stack([np.ascontiguousarray(turn(image)) for image in images]))
    assert turned == pytest.approx(found, abs=1e-3, nan_ok=True)


def test_numbers_of_two_sizes_agree():
    small, large = (measure(np.stack([phantom(index, side)[0] for index in range(12)])) for side in (64, 256))
    together = ~np.isnan(small[:, 0] + large[:, 0])
    assert together.sum() >= 11
    for name in ("area", "diameter", "color_l", "color_a", "color_b"):
        column = list(MEASUREMENTS).index(name)
        assert np.corrcoef(small[together, column], large[together, column])[0, 1] > 0.95


@pytest.mark.parametrize("image", [
    np.full((3, 64, 64), 180, dtype=np.uint8),
    np.zeros((3, 64, 64), dtype=np.uint8),
    np.full((1, 8, 8), 255, dtype=np.uint8),
    painted(np.zeros((64, 64), dtype=bool)),
], ids=["constant", "black", "tiny", "noise"])
def test_an_image_without_a_lesion_has_no_numbers(image):
    assert not segment(image).any()
    assert np.isnan(measure(image[None])).all()


def test_plain_skin_of_phantoms_has_no_lesion():
    scenes = [scene_of(index) for index in range(20)]
    pale = [replace(scene, view=replace(scene.view, artifacts=frozenset(), vignette_strength=0.0),
                    lesion=replace(scene.lesion, colors=("light_brown",), pigmentation=0.0, num_dots=0, redness=0.0,
                                   structure="none")) for scene in scenes]
    assert sum(segment(channels_first(scene)).any() for scene in pale) <= 1


def weak_disc(radius, *, seed, contrast=8.0, side=64):
    """Return a disc, `contrast` Lab units from textured, shaded skin: uint8 [3, side, side]. radius: pixels"""
    from scipy.ndimage import gaussian_filter
    from skimage.color import lab2rgb

    random = np.random.RandomState(seed)
    at = (np.arange(side) + 0.5) / side - 0.5
    lab = np.broadcast_to((72.0, 16.0, 18.0), (side, side, 3)).copy()
    for channel in range(3):
        texture = gaussian_filter(random.randn(side, side), side / 32, mode="wrap")
        lab[..., channel] += 0.8 * texture / texture.std()
    lab[..., 0] += 6 * at - 10 * (at**2 + at[:, None] ** 2)  # light from one side, and a vignette
    lab[..., 1] += 4 * at[:, None]
    cover = gaussian_filter(ellipse(side, radius=radius / side, x=0.05, y=-0.03).astype(float), 0.7)
    lab += contrast * cover[..., None] * np.array((-0.8, 0.5, 0.33))
    image = 255 * lab2rgb(lab) + random.randn(side, side, 3)
    return image.clip(0, 255).round().astype(np.uint8).transpose(2, 0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_a_small_weak_disc_on_textured_skin_is_found_with_its_area(seed):
    area = np.pi * (4 / 64) ** 2
    assert numbers_of(weak_disc(4, seed=seed))["area"] == pytest.approx(area, rel=0.35)


@pytest.mark.parametrize("contrast", [8, 30])
def test_area_falls_as_a_disc_shrinks(contrast):
    images = np.stack([weak_disc(radius, seed=1, contrast=contrast) for radius in (16, 12, 9, 6.5, 5, 4)])
    areas = measure(images)[:, list(MEASUREMENTS).index("area")]
    assert (np.diff(areas) < 0).all()


def test_a_black_frame_is_no_lesion():
    frame = ~ellipse(128, radius=0.5)
    disc = ellipse(128, radius=0.2)
    image = painted(disc)
    image[:, frame] = 4
    lesion = segment(image)
    assert (lesion & disc).sum() / (lesion | disc).sum() > 0.9


def test_a_gray_image_is_measured_like_its_gray_rgb_image():
    gray = painted(ellipse(64, radius=0.25)).mean(axis=0, keepdims=True).round().astype(np.uint8)
    assert measure(gray[None]) == pytest.approx(measure(gray.repeat(3, axis=0)[None]))
    assert numbers_of(gray)["area"] == pytest.approx(np.pi * 0.25**2, rel=0.06)


def test_numbers_of_an_image_do_not_depend_on_the_others():
    images = np.stack([phantom(index)[0] for index in range(4)])
    assert np.array_equal(measure(images)[2:3], measure(images[2:3]), equal_nan=True)


def test_function_of_images_has_the_names_of_the_measurements():
    function = lesion_measurements()
    pixels = torch.from_numpy(phantom(0)[0])[None]
    assert function.names == tuple(MEASUREMENTS)
    assert np.array_equal(function.compute(pixels), measure(pixels.numpy()))
    assert function.compute(pixels[:0]).shape == (0, len(MEASUREMENTS))


def test_without_scikit_image_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match=r"scikit-image is not installed; .* --measure=0"):
        lesion_measurements()


# Phantoms


def scene_of(index, rates=ARTIFACT_RATES):
    look = look_of(list(LOOKS)[index % len(LOOKS)])
    return draw_scene(seed=5, lesion_number=index, index=index, look=look, rates=rates)


def channels_first(scene, side=64):
    return np.ascontiguousarray(render(scene, side).transpose(2, 0, 1))


def phantom(index, side=64, rates=ARTIFACT_RATES):
    """Return the image, uint8 [3, side, side], the true lesion, bool [side, side], and the attributes."""
    scene = scene_of(index, rates)
    return channels_first(scene, side), true_lesion(scene, side), attributes(scene)


def true_lesion(scene, side):
    """Return where the same outline, painted black without artifacts, has more than half of its optical density."""
    view = replace(scene.view, artifacts=frozenset(), vignette_strength=0.0, brightness=0.85)
    black = replace(scene.lesion, colors=("black",), pigmentation=1.0, network=0.0, num_dots=0, structure="none")
    dark, skin = (channels_first(replace(scene, view=view, lesion=lesion), side).sum(axis=0) + 1.0
                  for lesion in (black, replace(black, pigmentation=0.0)))
    full = 0.72 * 1.78  # thickness of the pigment near the border times the density of black
    return np.log(skin / dark) > full / 2


def accuracy(count, side, rates):
    """Return the median overlap, the share of found lesions, and correlations with the truth."""
    from skimage.color import rgb2lab

    images, masks, rows = zip(*(phantom(index, side, rates) for index in range(count)))
    overlaps = [(found & true).sum() / (found | true).sum()
                for found, true in ((segment(image), mask) for image, mask in zip(images, masks))]
    table = measure(np.stack(images))
    known = ~np.isnan(table[:, 0])
    colors = np.stack([rgb2lab(image.transpose(1, 2, 0))[mask].mean(axis=0) for image, mask in zip(images, masks)])
    diameter = np.array([row["diameter_mm"] / row["field_mm"] for row in rows])
    truth = {"area": diameter**2, "diameter": diameter,
             **{name: np.array([row[other] for row in rows]) for name, other in (
                 ("asymmetry", "asymmetry"), ("border_irregularity", "border_irregularity"),
                 ("color_variety", "num_colors"))},
             **{f"color_{name}": colors[:, index] for index, name in enumerate("lab")}}
    return {"overlap": float(np.median(overlaps)), "found": float(known.mean()),
            **{name: float(np.corrcoef(table[known, index], truth[name][known])[0, 1])
               for index, name in enumerate(MEASUREMENTS)}}


@pytest.mark.parametrize(("count", "side", "rates"), [
    (100, 64, ARTIFACT_RATES),
    pytest.param(300, 64, ARTIFACT_RATES, marks=pytest.mark.slow),
    pytest.param(300, 64, dict.fromkeys(ARTIFACT_RATES, 0.0), marks=pytest.mark.slow),
    pytest.param(100, 256, ARTIFACT_RATES, marks=pytest.mark.slow),
], ids=["few", "artifacts", "clean", "large"])
def test_measurements_of_phantoms_agree_with_their_attributes(count, side, rates):
    found = accuracy(count, side, rates)
    print("  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    assert found["overlap"] > 0.85
    assert found["found"] > 0.97
    for name in ("area", "diameter", "color_l", "color_a", "color_b"):
        assert found[name] > 0.9, name
    for name in ("asymmetry", "border_irregularity", "color_variety"):  # a phantom's are scales of random shapes
        assert found[name] > 0.35, name
