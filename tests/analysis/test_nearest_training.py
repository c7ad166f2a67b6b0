"""analysis.nearest_training: changed copies of training images are recognized; own groups are left out."""

import io
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import PIL.Image
import pytest
import torch

from analysis.aligned_similarity import SmallImages, prepare_images
from analysis.near_duplicates import ORIENTATIONS, orient
from analysis.nearest_training import NearestTraining, compare, find_candidates, nearest_synthetic
from imagesets.phantoms.make import render_phantom
from metrics.detectors.registry import open_detector

NUM_TRAINING, NUM_FRESH = 60, 20
NUM_CANDIDATES = 10


class Images(NamedTuple):
    """What is computed of images."""

    small: SmallImages
    features: torch.Tensor  # [N, 8, F]

    def select(self, rows):
        return Images(self.small.select(rows), self.features[rows])


def prepare(drawings):
    """Return Images of drawings, uint8 [64, 64, 3] each."""
    pixels = torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2)
    detector = open_detector("random-conv", device="cpu")
    features = [detector(orient(pixels, one).contiguous()) for one in ORIENTATIONS]
    return Images(prepare_images(pixels), torch.stack(features, dim=1))


@pytest.fixture(scope="module")
def drawings():
    return [render_phantom(0, index, lesion_number=index)[0] for index in range(NUM_TRAINING + NUM_FRESH)]


@pytest.fixture(scope="module")
def training(drawings):
    return prepare(drawings[:NUM_TRAINING])


@pytest.fixture(scope="module")
def fresh(drawings):
    return prepare(drawings[NUM_TRAINING:])


@pytest.fixture(scope="module")
def of_fresh(fresh, training):
    return search(fresh, training)


def join(candidates, pieces):
    """Return what `compare` gave for successive queries, together with their distances."""
    compared = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    given = {field.name: getattr(candidates, field.name) for field in fields(NearestTraining)
             if field.name not in compared}
    return NearestTraining(**compared, **given)


def search(queries, training, groups=None, own_groups=None, piece=7):
    groups = np.arange(len(training.small)) if groups is None else np.asarray(groups)
    candidates = find_candidates(queries.features, queries.small.color, training.features[:, 0], training.small.color,
                                 groups, own_groups)
    count = len(queries.small)
    return join(candidates, [
        compare(queries.small.gray, training.small.gray, candidates, range(start, min(start + piece, count)), groups)
        for start in range(0, count, piece)])


def jpeg(pixels):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=70)
    return np.asarray(PIL.Image.open(buffer))


def recolored(pixels):
    return np.clip(pixels * np.array([1.1, 1, 0.9]) + np.array([10, 0, -10]), 0, 255).astype(np.uint8)


def cropped(pixels):
    return np.asarray(PIL.Image.fromarray(pixels[3:61, 3:61]).resize((64, 64), PIL.Image.Resampling.BICUBIC))


# What is done to a copy, and what describes its alignment
CHANGES = {
    "plain": (lambda pixels: pixels, "as it is"),
    "mirrored": (lambda pixels: pixels[:, ::-1], "mirrored left to right"),
    "turned": (lambda pixels: np.rot90(pixels, 3), "turned by 90 degrees"),
    "turned twice": (lambda pixels: np.rot90(pixels, 2), "turned by 180 degrees"),
    "JPEG": (jpeg, "as it is"),
    "recolored": (recolored, "as it is"),
    "cropped": (cropped, "scaled by 0.90"),
    "mirrored, cropped and JPEG": (lambda pixels: jpeg(cropped(pixels[:, ::-1])),
                                   "mirrored left to right, scaled by 0.90"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_more_similar_to_their_originals_than_fresh_images_to_any(drawings, training, of_fresh, change):
    rows = np.arange(0, NUM_TRAINING, 3)
    alter, alignment = CHANGES[change]
    found = search(prepare([alter(drawings[row]) for row in rows]), training)
    assert found.row.tolist() == rows.tolist()
    assert found.ssim.min() > of_fresh.ssim.max() + 0.03
    assert found.copy_scores()["ssim-ratio"].min() > of_fresh.copy_scores()["ssim-ratio"].max() + 0.1
    described = [found.describe_alignment(index) for index in range(len(rows))]
    assert described.count(alignment) >= 0.8 * len(rows)  # some lesions are nearly symmetric, or fit a pixel beside


def test_plain_copies_have_distance_and_ratio_zero(training):
    found = search(training.select([4, 9]), training)
    assert found.row.tolist() == [4, 9]
    for name, values in found.copy_scores().items():
        assert values.tolist() == [1, 1], name
    assert (found.feature_distance.tolist(), found.pixel_distance.tolist()) == ([0, 0], [0, 0])


def test_scores_of_fresh_images_lie_below_those_of_copies(of_fresh):
    for name, values in of_fresh.copy_scores().items():
        assert values.max() < 0.9, name
        assert values.min() >= 0, name


def test_own_group_is_left_out_and_the_ratio_is_to_another_group(training):
    rows = np.arange(20)
    groups = np.arange(NUM_TRAINING) // 2  # in pairs
    found = search(training.select(rows), training, groups, groups[rows])
    assert (groups[found.row] != groups[rows]).all()
    assert found.ssim.max() < 0.9
    # An image twice in a group: its copy has a small ratio nevertheless.
    twice = Images(SmallImages.concatenate([training.small, training.small.select([0])]),
                   torch.cat([training.features, training.features[:1]]))
    one = np.array([*range(NUM_TRAINING), 0])
    assert search(training.select([0]), twice, one).ratio.tolist() == [0]
    # In two groups, it is no nearer to one than to the other: 0 / 0 counts as 1.
    two = search(training.select([0]), twice)
    assert (two.ratio.tolist(), two.feature_ratio.tolist(), two.pixel_ratio.tolist()) == ([1], [1], [1])


def test_candidates_are_the_nearest_images_of_the_nearest_groups(fresh, training):
    groups = np.random.RandomState(0).randint(0, 15, NUM_TRAINING)
    own = np.random.RandomState(1).randint(0, 15, NUM_FRESH)
    found = find_candidates(fresh.features, fresh.small.color, training.features[:, 0], training.small.color, groups,
                            own)
    for query in range(NUM_FRESH):
        distances = (fresh.features[query, :, None].double() - training.features[None, :, 0].double()).norm(dim=2)
        of_images = distances.amin(dim=0).numpy()
        of_groups = {group: of_images[groups == group].min() for group in set(groups) - {own[query]}}
        expected = sorted(of_groups, key=of_groups.get)
        rows, turns = found.rows[query, :5], found.orientations[query, :5]
        assert groups[rows].tolist() == expected[:5]
        nearest = [of_groups[group] for group in expected]
        assert distances[turns, rows].tolist() == pytest.approx(nearest[:5])
        assert found.feature_distance[query] == pytest.approx(nearest[0])
        assert found.feature_ratio[query] == pytest.approx(nearest[0] / nearest[1])


def test_pixel_distance_is_the_rms_difference_without_the_mean_color():
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)  # at 16x16
    training_color = torch.full([2, 3, 16, 16], 100.0)
    training_color[1] += 50 * torch.eye(16)
    query = training_color[:1] + 4 * board + torch.tensor([30.0, -20, 0]).view(3, 1, 1)
    found = find_candidates(torch.zeros(1, 8, 1), query, torch.ones(2, 1), training_color, np.arange(2))
    assert found.pixel_distance.tolist() == pytest.approx([4])


@pytest.mark.parametrize("num_groups", [1, 3])
def test_few_groups_leave_candidates_out(fresh, training, num_groups):
    groups = np.arange(NUM_TRAINING) % num_groups
    queries = fresh.select([0, 1])
    candidates = find_candidates(queries.features, queries.small.color, training.features[:, 0], training.small.color,
                                 groups)
    assert candidates.rows.shape == (2, NUM_CANDIDATES)
    assert ((candidates.rows[:, :5] >= 0).sum(axis=1) == num_groups).all()
    found = search(queries, training, groups)
    assert (found.row >= 0).all()
    if num_groups == 1:
        assert (found.ratio.tolist(), found.feature_ratio.tolist()) == ([1, 1], [1, 1])
        alone = search(queries, training, groups, groups[:2])  # no group but its own
        assert (alone.row.tolist(), alone.ssim.tolist(), alone.ratio.tolist()) == ([-1, -1], [-1, -1], [1, 1])
        assert alone.feature_distance.tolist() == [np.inf, np.inf]
        assert alone.describe_alignment(0) == "not compared"


def test_results_do_not_depend_on_order_or_pieces(fresh, training, of_fresh):
    order = np.random.RandomState(0).permutation(NUM_FRESH)
    theirs = np.random.RandomState(1).permutation(NUM_TRAINING)
    shuffled = search(fresh.select(order), training.select(theirs), groups=theirs, piece=3)
    for field in fields(NearestTraining):
        values = getattr(shuffled, field.name)
        values = theirs[values] if field.name == "row" else values
        assert values.tolist() == getattr(of_fresh, field.name)[order].tolist(), field.name


def test_progress_counts_each_query_for_features_and_for_pixels(fresh, training):
    counts = []
    find_candidates(fresh.features, fresh.small.color, training.features[:, 0], training.small.color,
                    np.arange(NUM_TRAINING), on_rows=counts.append)
    assert counts == [NUM_FRESH, NUM_FRESH]


def test_alignment_is_described_by_all_that_was_done():
    nothing = np.zeros(1)
    found = NearestTraining(ssim=nothing, ratio=nothing, row=np.array([3]), orientation=np.array([5]),
                            shift=np.array([[-2, 4]]), scale=np.array([1.11]), feature_distance=nothing,
                            feature_ratio=nothing, pixel_distance=nothing, pixel_ratio=nothing)
    assert found.describe_alignment(0) == "turned by 90 degrees, scaled by 1.11, shifted by 4, -2 pixels of 64"


def test_nearest_synthetic_image_is_found_in_any_orientation(fresh, training):
    real = training.features[:, 0]
    found = nearest_synthetic(real, fresh.features)
    expected = (real[:, None].double() - fresh.features.flatten(0, 1)[None].double()).norm(dim=2).amin(dim=1)
    assert found == pytest.approx(expected.numpy())
    turned = training.features[:, [3, 2, 1, 0, 7, 6, 5, 4]]
    assert nearest_synthetic(real, turned).tolist() == [0] * NUM_TRAINING
