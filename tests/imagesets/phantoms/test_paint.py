"""The pixels of phantoms match their attributes."""

import numpy as np
import pytest

from imagesets.phantoms.make import render_phantom
from imagesets.phantoms.scene import ARTIFACT_RATES, LOOKS
from tests.helpers.phantom_helpers import auc

NO_ARTIFACTS = dict.fromkeys(ARTIFACT_RATES, 0.0)


def test_classes_can_be_told_apart_by_colors_and_border():
    spread, border = [], []
    is_melanoma = np.arange(240) % 2 == 1
    for index, melanoma in enumerate(is_melanoma):
        pixels, _ = render_phantom(5, index, class_name="melanoma" if melanoma else "benign", lesion_number=index,
                                   rates=NO_ARTIFACTS)
        density = -np.log(np.maximum(pixels, 12) / 255)
        change = density - np.median(density.reshape(-1, 3), axis=0)
        depth = smooth(np.abs(change).mean(2))
        inside = depth > 0.45 * np.quantile(depth, 0.97)
        chroma = change - change.mean(2, keepdims=True)
        spread.append(chroma[inside].std(0).sum())
        steps = (inside[1:] != inside[:-1]).sum() + (inside[:, 1:] != inside[:, :-1]).sum()
        border.append(steps / np.sqrt(inside.sum()))
    # Measured 0.79 and 0.64; chance is 0.5 with a standard error of 0.037.
    assert auc(spread, is_melanoma) > 0.68
    assert auc(border, is_melanoma) > 0.60


def smooth(values):
    for axis in (0, 1):
        values = (np.roll(values, -1, axis) + 2 * values + np.roll(values, 1, axis)) / 4
    return values


def render_with(name, index):
    """Return the same phantom without artifacts, and with one of them, as float."""
    return [render_phantom(2, index, rates={**NO_ARTIFACTS, name: rate})[0].astype(np.float64) for rate in (0.0, 1.0)]


@pytest.mark.parametrize(("name", "least", "most"), [
    ("hair", 0.01, 0.6), ("ruler", 0.02, 0.2), ("ink", 0.01, 0.2), ("bubbles", 0.001, 0.2)])
def test_artifact_covers_part_of_the_image(name, least, most):
    for index in range(12):
        without, shown = render_with(name, index)
        changed = np.abs(shown - without).max(2) > 12
        assert least < changed.mean() < most


def test_frame_is_black_in_all_corners_and_leaves_the_middle():
    for index in range(12):
        without, shown = render_with("frame", index)
        corners = shown[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.max() < 12
        assert np.array_equal(shown[24:40, 24:40], without[24:40, 24:40])


def test_vignette_darkens_outwards():
    for index in range(12):
        without, shown = render_with("vignette", index)
        ratio = (shown.mean(2) + 1) / (without.mean(2) + 1)
        assert ratio[32, 32] == pytest.approx(1, abs=0.02)
        assert ratio[0, 0] < 0.85
        assert ratio.max() < 1.02


def test_every_class_has_lesions_unlike_the_skin():
    for name in (*LOOKS, "lentigo", "wart"):
        contrasts = []
        for index in range(10):
            pixels, _ = render_phantom(1, index, class_name=name, lesion_number=index, rates=NO_ARTIFACTS)
            skin = np.median(pixels.reshape(-1, 3), axis=0)
            contrasts.append(np.quantile(np.abs(pixels - skin).max(2), 0.97))
        assert min(contrasts) > 20, name


@pytest.mark.parametrize("resolution", [8, 16, 32, 64, 128, 256])
def test_resolution_changes_the_detail_and_not_the_scene(resolution):
    pixels, row = render_phantom(0, 3, resolution=resolution)
    assert (pixels.shape, pixels.dtype) == ((resolution, resolution, 3), np.uint8)
    largest, same_row = render_phantom(0, 3, resolution=512)
    assert row == same_row
    block = 512 // resolution
    average = largest.reshape(resolution, block, resolution, block, 3).mean((1, 3))
    # Thin shapes differ in sharpness: 0.2 to 1.2 levels of 255 on average, measured.
    assert np.abs(average - pixels).mean() < 2
