"""The geometric augmentations: matrices, margins and resampling."""

import math

import numpy as np
import pytest
import torch

from torch_utils.ops.upfirdn2d import setup_filter
from training.augmentations.draws import AugmentStrengths, draw_random
from training.augmentations.geometry import SourceMap, draw_source_map, reflect_pad, resample
from training.augmentations.pixels import SYM6

ALL = dict(xflip=1, rotate90=1, xint=1, scale=1, rotate=1, aniso=1, xfrac=1)
TAPS = setup_filter(SYM6)


def images_of(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def random_map(images, seed=0, **strengths):
    draws = draw_random(len(images), torch.Generator().manual_seed(seed))
    return draws, draw_source_map(AugmentStrengths(**strengths), draws, 0.7, images)


def rotation(angle):
    return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])


def translation(x, y):
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])


def paper_matrix(draws, n, width, height, p):
    """Compose the transform of image n step by step, source to result (ADA paper, figure 17)."""
    def fired(name, probability=p, k=0):
        return draws.gates[name][n, k].item() < probability

    uniform = {name: value[n].tolist() for name, value in draws.uniforms.items()}
    normal = {name: value[n].tolist() for name, value in draws.normals.items()}
    p_rotate = 1 - math.sqrt(1 - p)
    steps = []
    if fired("xflip"):
        steps.append(np.diag([1 - 2 * math.floor(2 * uniform["xflip"][0]), 1, 1]))
    if fired("rotate90"):
        steps.append(rotation(-math.pi / 2 * math.floor(4 * uniform["rotate90"][0])))
    if fired("xint"):
        x, y = ((2 * u - 1) * 0.125 for u in uniform["xint"])
        steps.append(translation(round(x * width), round(y * height)))
    if fired("scale"):
        steps.append(np.diag([2 ** (0.2 * normal["scale"][0])] * 2 + [1]))
    if fired("rotate", p_rotate):
        steps.append(rotation(-math.pi * (2 * uniform["rotate"][0] - 1)))
    if fired("aniso"):
        s = 2 ** (0.2 * normal["aniso"][0])
        steps.append(np.diag([s, 1 / s, 1]))
    if fired("rotate", p_rotate, 1):
        steps.append(rotation(-math.pi * (2 * uniform["rotate"][1] - 1)))
    if fired("xfrac"):
        steps.append(translation(0.125 * normal["xfrac"][0] * width, 0.125 * normal["xfrac"][1] * height))
    matrix = np.eye(3)
    for step in steps:
        matrix = step @ matrix
    return matrix


def test_source_map_is_the_inverse_of_the_papers_matrices():
    images = images_of(50, 1, 24, 40)
    draws, source = random_map(images, **ALL)
    for n in range(50):
        inverse = np.linalg.inv(paper_matrix(draws, n, 40, 24, 0.7))
        np.testing.assert_allclose(source.linear[n], inverse[:2, :2], atol=1e-13)
        np.testing.assert_allclose(source.shift[n], inverse[:2, 2], atol=1e-12)


def test_rotation_either_kind_happens_with_its_probability():
    images = images_of(20000, 1, 2, 2)
    share = random_map(images, rotate=0.5)[1].differs().mean()
    deviation = math.sqrt(0.35 * 0.65 / 20000)
    assert abs(share - 0.35) < 4 * deviation  # binomial


@pytest.mark.parametrize("shift", [(3, 0), (0, -4), (-2, 5)])
def test_resample_whole_pixels_moves_pixels(shift):
    images = images_of(1, 2, 16, 20)
    source = SourceMap.identity(1).moved(*np.array(shift)[:, None])
    expected = np.pad(images, [(0, 0), (0, 0), (5, 5), (5, 5)], mode="reflect")
    expected = expected[:, :, 5 - shift[1]:, 5 - shift[0]:][:, :, :16, :20]
    # sym6 is orthonormal to about 1e-8 in float32 taps: doubling and halving give the image back.
    np.testing.assert_allclose(resample(images, source, TAPS), expected, atol=1e-6)


def test_resample_smooth_image_follows_the_source_map():
    places = torch.arange(64, dtype=torch.float64) - 31.5
    rows, columns = torch.meshgrid(places, places, indexing="ij")

    def wave(x, y):
        return torch.sin(0.11 * x + 0.5) + torch.cos(0.07 * y - 0.03 * x)

    angle, one = np.array([0.4]), np.ones(1)
    source = SourceMap.identity(1).turned(angle).scaled(1.2 * one, 1.1 * one).moved(2.3 * one, -1.7 * one)
    (a, b), (c, d) = source.linear[0]
    x, y = a * columns + b * rows + source.shift[0, 0], c * columns + d * rows + source.shift[0, 1]
    result = resample(wave(columns, rows)[None, None], source, TAPS)[0, 0]
    inside = (x.abs() < 24) & (y.abs() < 24)  # away from the reflection
    assert inside.sum() > 1500
    # Bilinear sampling at twice the resolution: (1/2)^2 / 8 * second derivatives (0.018) = 0.0006. The filter's delay
    # is 0.4 samples and taken for 0.5: 0.05 pixels * |1 - linear| (0.6) * slope (0.19) = 0.006.
    assert (result - wave(x, y))[inside].abs().max() < 7e-3


def test_resample_image_does_not_depend_on_the_batch():
    images = images_of(6, 2, 24, 32)
    _, source = random_map(images, **ALL, scale_std=1)
    far = SourceMap(source.linear.copy(), source.shift.copy())
    far.linear[1:] *= 3  # the others need the largest margins
    together = resample(images, far, TAPS)
    alone = resample(images[:1], SourceMap(source.linear[:1], source.shift[:1]), TAPS)
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-12)
    for n in range(6):
        alone = resample(images[n:n + 1], SourceMap(far.linear[n:n + 1], far.shift[n:n + 1]), TAPS)
        torch.testing.assert_close(together[n:n + 1], alone, rtol=0, atol=1e-12)


def test_resample_image_in_place_comes_back_bit_for_bit():
    images = images_of(3, 2, 16, 16)
    source = SourceMap.identity(3)
    assert torch.equal(resample(images, source, TAPS), images)
    source = source.moved(np.array([0, 1.5, 0]), np.zeros(3))
    result = resample(images, source, TAPS)
    assert torch.equal(result[[0, 2]], images[[0, 2]])
    assert not torch.equal(result[1], images[1])


@pytest.mark.parametrize(("shape", "margins"), [
    ((5, 7), (2, 3, 1, 4)), ((5, 7), (6, 6, 4, 4)), ((8, 8), (21, 21, 21, 21)), ((16, 16), (21, 21, 21, 21)),
    ((2, 3), (21, 0, 7, 30)), ((4, 2), (0, 9, 0, 0)), ((6, 6), (0, 0, 0, 0))])
def test_reflect_pad_equals_numpy(shape, margins):
    images = images_of(2, 1, *shape)
    left, right, top, bottom = margins
    expected = np.pad(images, [(0, 0), (0, 0), (top, bottom), (left, right)], mode="reflect")
    np.testing.assert_array_equal(reflect_pad(images, *margins), expected)
