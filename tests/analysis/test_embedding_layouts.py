"""Maps of features: what decides about them, what they keep, and how that is measured."""

import hashlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from analysis import embedding_layouts
from analysis.embedding_layouts import (
    LayoutSettings,
    fit_principal_axes,
    make_layouts,
    measure_quality,
    neighbor_ranks,
)
from analysis.embedding_neighbors import nearest_others

ROOT = Path(__file__).parents[2]
NUM_REAL, NUM_OTHERS = 150, 60
FAST = ["tsne", "pca"]
SLOW_UMAP = pytest.param("umap", marks=[
    pytest.mark.slow, pytest.mark.skipif(find_spec("umap") is None, reason="umap-learn is not installed")])


def clusters(num_points, num_features=64, seed=0):
    """Return points of three Gaussian clusters in turn, float32, and the cluster of each."""
    random = np.random.default_rng(seed)
    kinds = np.arange(num_points) % 3
    centers = np.random.default_rng(99).normal(size=(3, num_features)) * 3
    return (centers[kinds] + random.normal(size=(num_points, num_features))).astype(np.float32), kinds


def make(features, num_real=NUM_REAL, name="tsne", **settings):
    layout, = make_layouts(features, num_real, settings_of(name, **settings))
    return layout


def settings_of(*maps, **settings):
    return LayoutSettings(maps=maps, **{"perplexity": 30, "num_neighbors": 10, **settings})


@pytest.fixture(scope="module")
def points():
    return clusters(NUM_REAL + NUM_OTHERS)


@pytest.fixture(scope="module")
def tsne(points):
    return make(points[0])


@pytest.mark.parametrize("name", [*FAST, SLOW_UMAP])
def test_clusters_stay_apart_and_others_are_placed_in_their_own(points, name):
    features, kinds = points
    layout = make(features, name=name)
    assert layout.coordinates.shape == (NUM_REAL + NUM_OTHERS, 2)
    assert layout.coordinates.dtype == np.float64
    real = layout.coordinates[:NUM_REAL]
    centers = np.array([real[kinds[:NUM_REAL] == kind].mean(axis=0) for kind in range(3)])
    distances = np.linalg.norm(layout.coordinates[:, None] - centers, axis=2)
    assert (distances.argmin(axis=1) == kinds).all()
    own = distances[np.arange(len(kinds)), kinds]
    assert own.max() < np.sort(distances, axis=1)[:, 1].min()  # no point is as near to another center


@pytest.mark.parametrize("name", [*FAST, SLOW_UMAP])
def test_others_do_not_move_the_real_ones(points, name):
    features, _ = points
    alone, together = make(features[:NUM_REAL], name=name), make(features, name=name)
    assert np.array_equal(alone.coordinates, together.coordinates[:NUM_REAL])
    assert alone.real == together.real
    assert alone.placed is None
    # As many others as real ones: umap-learn once took that for a sign that the real ones may move.
    equal = make(np.concatenate([features[:NUM_REAL], features[:NUM_REAL] + 1]), name=name)
    assert np.array_equal(alone.coordinates, equal.coordinates[:NUM_REAL])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("chosen", [[0], [7], [5, 3, 59], list(range(0, 60, 2)), list(range(59, -1, -1))],
                         ids=["first", "one", "three", "half", "reversed"])
def test_a_place_does_not_depend_on_who_else_is_placed(points, tsne, name, chosen):
    features, _ = points
    all_placed = tsne if name == "tsne" else make(features, name=name)
    rows = NUM_REAL + np.array(chosen)
    some = make(np.concatenate([features[:NUM_REAL], features[rows]]), name=name)
    assert np.array_equal(some.coordinates[NUM_REAL:], all_placed.coordinates[rows])


def test_an_outlier_does_not_change_places_and_stays_near_the_map(points, tsne):
    features, _ = points
    outliers = np.stack([features[0] * 1000, np.full(64, -1e6), np.full(64, 1e15)]).astype(np.float32)
    layout = make(np.concatenate([features, outliers]))
    assert np.array_equal(layout.coordinates[:-3], tsne.coordinates)
    real = layout.coordinates[:NUM_REAL]
    width = np.ptp(real, axis=0).max()
    assert (layout.coordinates >= real.min(axis=0) - 0.5 * width).all()
    assert (layout.coordinates <= real.max(axis=0) + 0.5 * width).all()


def test_an_image_equal_to_a_real_one_lies_by_it():
    """Without clusters; from the median of its nearest, openTSNE's start, a quarter of the copies went elsewhere."""
    features = np.random.default_rng(5).normal(size=(NUM_REAL, 64)).astype(np.float32)
    settings = settings_of("tsne", "pca", perplexity=5)
    for layout in make_layouts(np.concatenate([features, features]), NUM_REAL, settings):
        real, copies = np.split(layout.coordinates, 2)
        assert np.linalg.norm(copies - real, axis=1).max() < 0.02 * np.ptp(real, axis=0).max()


def test_pca_equals_that_of_scikit_learn_up_to_the_sign(points):
    from sklearn.decomposition import PCA

    features, _ = points
    expected = PCA(2, svd_solver="full").fit(features[:NUM_REAL].astype(np.float64))
    layout = make(features, name="pca")
    places = expected.transform(features.astype(np.float64))
    signs = np.sign((places * layout.coordinates).sum(axis=0))
    assert layout.coordinates == pytest.approx(places * signs, abs=1e-9)
    first, second = expected.explained_variance_ratio_
    assert layout.note.endswith(f"the horizontal one holds {first:.1%} of their variance, the vertical one "
                                f"{second:.1%}.")


@pytest.mark.parametrize("num_features", [3, 50, 64, 300], ids=lambda number: f"{number}features")
def test_principal_axes_are_orthonormal_ordered_and_of_fixed_sign(num_features):
    features, _ = clusters(100, num_features)
    axes = fit_principal_axes(features)
    assert axes.axes.shape == (min(num_features, 50), num_features)
    assert axes.axes @ axes.axes.T == pytest.approx(np.eye(len(axes.axes)), abs=1e-9)
    assert (np.diff(axes.variances) <= 0).all()
    assert axes.project(features).var(axis=0, ddof=1) == pytest.approx(axes.variances, rel=1e-6)
    assert axes.total == pytest.approx(features.var(axis=0, ddof=1, dtype=np.float64).sum(), rel=1e-6)
    largest = np.abs(axes.axes).argmax(axis=1)
    assert (axes.axes[np.arange(len(largest)), largest] > 0).all()


@pytest.mark.parametrize("features", [
    np.zeros([70, 5]), np.full([70, 200], 3.3), np.arange(70)[:, None], np.arange(70)[:, None] * np.ones(80),
    np.arange(70)[:, None] % 4 * np.eye(4)[0], np.arange(70)[:, None] * 1e-20, np.arange(70)[:, None] * 1e15,
    np.repeat(np.random.default_rng(0).normal(size=(7, 100)), 10, axis=0),
], ids=["zero", "constant", "one-feature", "rank-1", "four-places", "tiny", "huge", "duplicates"])
def test_degenerate_features_give_finite_maps(features):
    for layout in make_layouts(features.astype(np.float32), 50, settings_of("pca", "tsne")):
        assert np.isfinite(layout.coordinates).all()
        assert 0 <= layout.real.trustworthiness <= 1
        assert 0 <= layout.placed.preservation <= 1


def test_perplexity_is_limited_by_the_number_of_real_images(points, tsne):
    features, _ = points
    assert tsne.note == ("t-SNE by openTSNE on the first 50 principal components, with perplexity 30 and seed 0. The "
                         "other images are placed among the real ones, which they do not move.")
    assert make(features[:50], 50, seed=3).note == (
        "t-SNE by openTSNE on the first 49 principal components, with perplexity 16.33 (30 needs more real images) and "
        "seed 3.")


def test_steps_are_told_and_an_exception_in_them_stops(points):
    features, _ = points
    told = []
    make_layouts(features, NUM_REAL, settings_of("tsne", "pca"), on_step=lambda *step: told.append(step))
    assert told[0] == ("tsne", 0, 850)
    assert told[-2:] == [("tsne", 850, 850), ("pca", 1, 1)]
    assert [step for _, step, _ in told[:-1]] == list(range(0, 851, 10))

    def stop(name, step, steps):
        if step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_layouts(features, NUM_REAL, settings_of("tsne"), on_step=stop)


def test_nothing_is_printed_or_logged(points, capfd, caplog):
    make(points[0][:120], 50, perplexity=1)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


_PROGRAM = """
import hashlib, sys
from analysis.embedding_layouts import make_layouts
from tests.analysis.test_embedding_layouts import NUM_REAL, clusters, settings_of
features, _ = clusters(NUM_REAL + 60)
for layout in make_layouts(features, NUM_REAL, settings_of(*sys.argv[1:], seed=5)):
    print(layout.key, hashlib.sha256(layout.coordinates.tobytes()).hexdigest(), layout.real, layout.placed)
"""


@pytest.mark.slow
def test_another_process_with_other_threads_gives_the_same_bits(points):
    expected = [f"{layout.key} {hashlib.sha256(layout.coordinates.tobytes()).hexdigest()} {layout.real} {layout.placed}"
                for layout in make_layouts(points[0], NUM_REAL, settings_of(*FAST, seed=5))]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    printed = subprocess.run([sys.executable, "-c", _PROGRAM, *FAST], cwd=ROOT, env=environment, check=True,
                             capture_output=True, text=True)
    assert printed.stdout.splitlines() == expected
    assert printed.stderr == ""


_LARGE_PROGRAM = """
import hashlib
import numpy as np
from analysis.embedding_layouts import LayoutSettings, make_layouts

features = np.random.default_rng(0).normal(size=(900, 700)).astype(np.float32)
layout, = make_layouts(features, 800, LayoutSettings(maps=("pca",), perplexity=30, num_neighbors=10))
print(hashlib.sha256(layout.coordinates.tobytes()).hexdigest())
"""


def test_matrices_that_lapack_shares_among_threads_give_the_same_bits():
    printed = []
    for count in "12":
        environment = {**os.environ, "OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
        printed.append(subprocess.run([sys.executable, "-c", _LARGE_PROGRAM], cwd=ROOT, env=environment, check=True,
                                      capture_output=True, text=True).stdout)
    assert printed[0] == printed[1] != ""


@pytest.mark.parametrize("name", ["tsne", SLOW_UMAP])
def test_the_seed_changes_a_map_and_a_repetition_does_not(points, name):
    features, _ = points
    first = make(features, name=name).coordinates
    assert np.array_equal(make(features, name=name).coordinates, first)
    assert not np.array_equal(make(features, name=name, seed=1).coordinates, first)


# Quality

@pytest.mark.parametrize("k", [1, 5, 20])
def test_trustworthiness_equals_that_of_scikit_learn(k):
    from sklearn.manifold import trustworthiness

    random = np.random.default_rng(1)
    features = random.normal(size=(200, 30)).astype(np.float32)
    coordinates = features[:, :2] + random.normal(size=(200, 2))
    found = measure_quality(features, coordinates, 200, num_neighbors=k)
    assert found.trustworthiness == pytest.approx(trustworthiness(features.astype(np.float64), coordinates,
                                                                  n_neighbors=k), abs=1e-12)
    by_features, on_map = (nearest_others(each, None, k).rows for each in (features, coordinates))
    shared = np.mean([len(set(a) & set(b)) / k for a, b in zip(by_features.tolist(), on_map.tolist())])
    assert found.preservation == pytest.approx(shared, abs=1e-12)
    assert (found.num_neighbors, found.num_points) == (k, 200)


def test_quality_is_1_for_the_features_themselves_and_chance_for_random_places():
    random = np.random.default_rng(2)
    features = random.normal(size=(1500, 2)).astype(np.float32)
    for placed in (False, True):
        same = measure_quality(features, features.astype(np.float64), 1000, placed=placed, num_neighbors=10)
        assert (same.trustworthiness, same.preservation) == (1, 1)
        by_chance = measure_quality(features, random.normal(size=(1500, 2)), 1000, placed=placed, num_neighbors=10)
        assert by_chance.trustworthiness == pytest.approx(0.5, abs=0.03)
        assert by_chance.preservation == pytest.approx(10 / 1000, abs=0.01)


@pytest.mark.parametrize("placed", [False, True])
def test_trustworthiness_is_0_where_the_nearest_on_the_map_are_the_farthest_by_features(placed):
    """Features on a line, 0 to 19 and the queries at 0: on the map the order of the others is reversed."""
    line = np.arange(20.0)
    features = np.concatenate([line, np.zeros(3)])[:, None].astype(np.float32)
    coordinates = np.stack([np.concatenate([20 - line, np.zeros(3)]), np.zeros(23)], axis=1)
    if placed:
        assert measure_quality(features, coordinates, 20, placed=True, num_neighbors=4).trustworthiness == 0
    else:
        ranks = neighbor_ranks(features[:1], features[:20], np.array([[19, 18, 17, 16]]), np.array([0]))
        assert ranks.tolist() == [[19, 18, 17, 16]]


def test_more_neighbors_than_half_of_the_images_are_too_many():
    features, _ = clusters(50)
    assert measure_quality(features, features[:, :2].astype(np.float64), 50, num_neighbors=100).num_neighbors == 24


def test_of_many_images_a_random_part_is_measured(monkeypatch):
    random = np.random.default_rng(3)
    features = random.normal(size=(900, 5)).astype(np.float32)
    coordinates = features[:, :2].astype(np.float64)
    whole = measure_quality(features, coordinates, 900, num_neighbors=10)
    monkeypatch.setattr(embedding_layouts, "ALL_MEASURED", 899)
    monkeypatch.setattr(embedding_layouts, "MEASURED", 400)
    part = measure_quality(features, coordinates, 900, num_neighbors=10)
    assert part.num_points == 400
    assert part == measure_quality(features, coordinates, 900, num_neighbors=10)
    assert part != measure_quality(features, coordinates, 900, num_neighbors=10, seed=1)
    assert part.trustworthiness == pytest.approx(whole.trustworthiness, abs=0.02)
    assert part.preservation == pytest.approx(whole.preservation, abs=0.03)


def test_ranks_equal_those_of_a_full_sort_with_ties_by_index(monkeypatch):
    """Small integers: many distances are equal, and differences are exact."""
    random = np.random.default_rng(4)
    points, among = (random.integers(0, 3, size=(count, 4)).astype(np.float32) for count in (90, 130))
    squares = ((points[:, None].astype(np.float64) - among) ** 2).sum(axis=2)
    order = np.argsort(squares, axis=1, kind="stable")
    monkeypatch.setattr(embedding_layouts, "_PAIRS", 1000)  # several parts
    chosen = random.integers(0, 130, size=(90, 7))
    assert np.array_equal(neighbor_ranks(points, among, chosen), np.argsort(order, axis=1)[np.arange(90)[:, None],
                                                                                           chosen] + 1)


def test_ranks_do_not_count_an_image_itself_but_its_duplicate():
    points = np.array([[0.0], [0.0], [1.0], [5.0]], dtype=np.float32)
    indices = np.array([[1, 2], [0, 2], [0, 1], [2, 0]])
    assert neighbor_ranks(points, points, indices, np.arange(4)).tolist() == [[1, 2]] * 4
