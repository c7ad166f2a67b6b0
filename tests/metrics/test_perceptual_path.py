"""Perceptual path length, against generators whose lengths have a closed form."""

import math

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from metrics.image_sources import FakeLabels, draw_latents
from metrics.intervals import TooFew
from metrics.names import parse_metrics
from metrics.perceptual_path import (
    EPSILON,
    PathSteps,
    along_circle,
    check_path_requests,
    path_length,
    path_length_jackknife,
    prepare,
)
from tests.helpers.metric_networks import LinearGenerator, SquareDistance
from tests.helpers.small_networks import small_generator

UNLABELED = FakeLabels(torch.zeros(1, 0))
SEED = 5


def distances(rows, labels=UNLABELED, space="w", sampling="end", crop=False, G=None):
    steps = PathSteps(G or LinearGenerator(c_dim=labels.table.shape[1]), labels, space=space, sampling=sampling,
                      crop=crop, seed=SEED, device="cpu")
    return steps.distances(rows, SquareDistance())


def ends(rows):
    return (draw_latents(rows, 4, SEED, f"metrics/path/{end}").double() for end in (0, 1))


@pytest.mark.parametrize("sampling", ["full", "end"])
def test_w_distances_are_squared_lengths_of_the_paths(sampling):
    z0, z1 = ends(range(6))
    expected = (z1 - z0).square().sum(dim=1)  # the same all along a straight line
    assert torch.allclose(distances(range(6), sampling=sampling).double(), expected, rtol=1e-5)


@pytest.mark.parametrize("sampling", ["full", "end"])
def test_z_distances_are_squared_angles(sampling):
    z0, z1 = ends(range(6))
    angles = torch.nn.functional.cosine_similarity(z0, z1).acos()
    assert torch.allclose(distances(range(6), space="z", sampling=sampling).double(), angles.square(), rtol=1e-5)


def test_distances_use_labels():
    doubled = distances(range(3), FakeLabels.of_class(1, 2))
    assert torch.allclose(doubled, 4 * distances(range(3), FakeLabels.of_class(0, 2)), rtol=1e-5)


def test_distances_crop_to_the_middle():
    # LinearGenerator draws in the first row, which the crop leaves out.
    assert distances(range(3), crop=True).tolist() == [0, 0, 0]


def test_distances_of_a_pair_depend_on_its_number_alone():
    whole = distances(range(8), space="z", sampling="full")
    assert torch.allclose(distances(range(5, 7), space="z", sampling="full"), whole[5:7], rtol=1e-5)
    assert len(set(whole.tolist())) == 8


def test_distances_have_the_same_noise_at_both_ends():
    G = small_generator(c_dim=0).eval()
    found = distances(range(4), G=G)  # other noise would make them 1e8 and more
    assert 0 < found.max() < 1e4


def test_along_circle_moves_evenly_between_directions():
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    for place in (0, 0.25, 1):
        angle = place * math.pi / 2
        found = along_circle(a, b, torch.tensor([[place]]))
        assert torch.allclose(found, torch.tensor([[math.cos(angle), math.sin(angle)]]), atol=1e-6)
    moved = along_circle(a.double(), b.double(), torch.tensor([[EPSILON]], dtype=torch.float64))
    assert moved[0, 1].item() == pytest.approx(EPSILON * math.pi / 2, rel=1e-6)


def test_prepare_crops_averages_and_repeats_gray():
    images = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert torch.equal(prepare(images, 8, crop=True), images[:, :, 3:7, 2:6].expand(-1, 3, -1, -1))
    large = torch.rand(1, 3, 512, 512)
    assert torch.allclose(prepare(large, 512, crop=False), large.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)))
    assert prepare(large, 512, crop=True).shape == (1, 3, 128, 128)
    assert prepare(large[:, :, :256, :256], 256, crop=False).shape == (1, 3, 256, 256)


def test_path_length_leaves_out_both_ends():
    values = torch.cat([torch.tensor([1e9, -1e9]), torch.arange(1.0, 200.0)])
    values = values[torch.randperm(201, generator=torch.Generator().manual_seed(0))]
    # Of 201 ordered values the percentiles are those at 2 and 198, themselves included: 2 to 198 here.
    assert path_length(values) == pytest.approx(torch.arange(2.0, 199.0).mean().item())


def test_path_length_percentiles_are_values_themselves():
    assert path_length(torch.tensor([1.0, 2.0])) == 1.5


def lognormal(count, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).lognormal(size=count))


@pytest.mark.parametrize("count", [2, 3, 10, 99, 100, 101, 102, 103, 200, 201, 202, 203, 350])
@pytest.mark.parametrize("ties", [False, True])
def test_path_length_jackknife_equals_leaving_out_each_pair(count, ties):
    values = (4 * lognormal(count)).round() if ties else lognormal(count)
    expected = [path_length(torch.cat([values[:i], values[i + 1:]])) for i in range(count)]
    found = path_length_jackknife(values)
    assert found.estimate == path_length(values)
    assert sorted(found.without["fake"]) == pytest.approx(sorted(expected), rel=1e-12)


def test_path_length_jackknife_leaves_outliers_out():
    values = lognormal(500)
    values[7] = 1e12
    expected = path_length_jackknife(values.clamp(max=1e6)).interval()
    found = path_length_jackknife(values).interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert (found.unit, found.num_units, found.method) == ("pair", {"fake": 500}, "jackknife")


def test_path_length_jackknife_does_not_depend_on_the_order():
    values = lognormal(500)
    found = path_length_jackknife(values[torch.randperm(500, generator=torch.Generator().manual_seed(1))]).interval()
    expected = path_length_jackknife(values).interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)  # sums in another order


def test_path_length_jackknife_of_one_pair_has_no_interval():
    with pytest.raises(TooFew, match=r"^there is 1 pair of fake images; an interval needs at least 2$"):
        path_length_jackknife(torch.ones(1)).interval()


def test_path_length_intervals_cover_the_mean_over_fresh_draws():
    intervals = [path_length_jackknife(lognormal(500, seed)).interval() for seed in range(200)]
    # Its own error is a fiftieth of that of one draw.
    truth = sum(path_length(values) for values in lognormal(500 * 2500, seed=1000).split(500)) / 2500
    covered = sum(interval.low <= truth <= interval.high for interval in intervals)
    # Of 200 trials at 95 %, fewer than 180 or more than 196 have a chance of 0.4 %.
    assert 180 <= covered <= 196
    # The mean of all, not trimmed, is not what they are about.
    assert sum(interval.low <= math.exp(0.5) <= interval.high for interval in intervals) < 180


@pytest.mark.parametrize(("name", "resolution", "text"), [
    ("ppl2_wend", 8, "16x16, but the network makes 8x8"),
    ("ppl_zfull", 16, "16x16 after cropping, but the network makes 16x16")])
def test_check_path_requests_refuses_small_images(name, resolution, text):
    with pytest.raises(UserError, match=f"^metric {name} needs images of at least {text}; expected larger ones"):
        check_path_requests(parse_metrics(name), resolution)
    check_path_requests(parse_metrics(name), 2 * resolution)
