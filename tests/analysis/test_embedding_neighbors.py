"""analysis.embedding_neighbors: equal to a search through all pairs, with groups of all sizes and with duplicates."""

import numpy as np
import pytest

from analysis.embedding_neighbors import nearest_among_reals, nearest_others, nearest_reals
from analysis.embedding_points import PROJECTED, REAL, SYNTHETIC, Points, PointSet
from metrics import distances


@pytest.fixture(params=[32, 2048], autouse=True)
def block(request, monkeypatch):
    """Search in small and in large blocks: both give the same."""
    monkeypatch.setattr(distances, "_BLOCK", request.param)


def normal(*shape, seed=0):
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def search_all(points, among, count, point_groups, among_groups):
    """Return rows and distances by a search through all pairs in float64."""
    rows, lengths = np.full([len(points), count], -1), np.full([len(points), count], np.nan)
    for place, point in enumerate(points.astype(np.float64)):
        apart = np.linalg.norm(among.astype(np.float64) - point, axis=1)
        order = np.argsort(apart, kind="stable")
        order = order[among_groups[order] != point_groups[place]][:count]
        rows[place, :len(order)], lengths[place, :len(order)] = order, apart[order]
    return rows, lengths


def point_set(kind, count, *, groups=None):
    return PointSet(name=kind, kind=kind, images=None, names=[f"{index}.png" for index in range(count)],
                    classes=[""] * count, groups=groups or [None] * count, shows_pictures=True)


@pytest.mark.parametrize("largest", [1, 4, 60])
def test_nearest_others_equal_a_search_through_all_pairs(largest):
    # Images of a group lie together: with 60 of them, lists of the first length hold no other groups.
    random = np.random.RandomState(0)
    groups = np.repeat(np.arange(150), random.randint(1, largest + 1, size=150))[:150]
    features = normal(150, 5)[groups] + 0.01 * normal(150, 5, seed=1)
    order = random.permutation(150)
    features, groups = features[order], groups[order]
    rows, lengths = search_all(features, features, 6, groups, groups)
    for found in (nearest_others(features, None, 6, point_groups=groups),
                  nearest_others(features, features, 6, point_groups=groups, among_groups=groups)):
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_allclose(found.distances, lengths, rtol=1e-12)


def test_nearest_others_of_equally_near_images_takes_the_first():
    among = np.repeat(normal(4, 3), 30, axis=0)  # 30 equal images each
    points = normal(5, 3, seed=1)
    none = np.full(120, -1)
    rows, lengths = search_all(points, among, 35, np.arange(5), none)
    found = nearest_others(points, among, 35)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.distances, lengths, rtol=1e-12)


@pytest.mark.parametrize("sizes", [[1], [40], [250], [1, 2, 60]], ids=str)
@pytest.mark.parametrize("is_within", [True, False])
def test_nearest_others_of_many_equal_images_with_groups_equal_a_search_through_all_pairs(sizes, is_within):
    """Of equal images the first of other groups are neighbors, however many are of the own group."""
    random = np.random.RandomState(0)
    among = normal(5, 3)[random.randint(5, size=300)]  # 60 equal images each
    groups = np.concatenate([np.repeat(np.arange(10) + 10 * number, size)
                             for number, size in enumerate(sizes)] + [np.arange(300) + 1000])[:300]
    groups = groups[random.permutation(300)] if is_within else groups
    points, own = (among, groups) if is_within else (among[::7], groups[::7])
    rows, lengths = search_all(points, among, 12, own, groups)
    found = nearest_others(points, None if is_within else among, 12, point_groups=own,
                           among_groups=None if is_within else groups)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.distances, lengths, rtol=1e-12)


def test_nearest_others_searches_only_the_first_of_equal_images(monkeypatch):
    longest = []

    def count_pairs(screen, points, count, among=None, on_rows=None):
        longest.append(count)
        return distances.nearest(screen, points, count, among)

    monkeypatch.setattr("analysis.embedding_neighbors.nearest", count_pairs)
    found = nearest_others(np.concatenate([np.zeros([400, 3], np.float32), normal(50, 3)]), None, 5)
    assert found.rows[:7, :].tolist() == [[1, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 2, 4, 5],
                                          [0, 1, 2, 3, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert longest == [13]


def test_nearest_others_of_points_without_groups_leave_out_the_point_itself():
    features = np.repeat(normal(3, 2), 2, axis=0)
    found = nearest_others(features, None, 1)
    assert found.rows[:, 0].tolist() == [1, 0, 3, 2, 5, 4]
    assert found.distances[:, 0].tolist() == [0] * 6


def test_nearest_others_without_enough_of_other_groups_ends_with_missing_ones():
    found = nearest_others(np.array([[0.0], [1], [2], [5]], dtype=np.float32), None, 3,
                           point_groups=np.array([7, 7, 7, 9]))
    assert found.rows.tolist() == [[3, -1, -1], [3, -1, -1], [3, -1, -1], [2, 1, 0]]
    np.testing.assert_array_equal(found.distances, [[5, np.nan, np.nan], [4, np.nan, np.nan], [3, np.nan, np.nan],
                                                    [3, 4, 5]])


def test_nearest_others_of_a_single_point_finds_none():
    assert nearest_others(normal(1, 2), None, 2).rows.tolist() == [[-1, -1]]


def test_nearest_others_counts_each_point_once():
    counts = []
    nearest_others(normal(40, 3), None, 5, point_groups=np.zeros(40, dtype=np.int64), on_rows=counts.append)
    assert sum(counts) == 40


def test_nearest_others_with_another_number_of_groups_is_refused():
    with pytest.raises(ValueError, match=r"^there are 3 groups of 4 images; expected one for each image$"):
        nearest_others(normal(4, 2), normal(5, 2), 2, point_groups=np.arange(3), among_groups=np.arange(5))


def test_nearest_reals_leave_out_own_groups_of_real_points_only():
    # Reals at 0, 1, 2, 10; a synthetic image at 9; a projected one of patient a at 0.4.
    sets = [point_set(REAL, 4, groups=["a", "a", "b", None]), point_set(SYNTHETIC, 1),
            point_set(PROJECTED, 1, groups=["a"])]
    features = np.array([[0], [1], [2], [10], [9], [0.4]], dtype=np.float32)
    points, counts = Points(sets=sets), []
    found = nearest_reals(features, points, 2, nearest_among_reals(features, points, 3), counts.append)
    assert sum(counts) == 2
    assert found.rows.tolist() == [[2, 3], [2, 3], [1, 0], [2, 1], [3, 2], [0, 1]]
    np.testing.assert_allclose(found.distances, [[2, 10], [1, 9], [1, 2], [8, 9], [1, 7], [0.4, 0.6]], rtol=1e-6)


def test_nearest_reals_are_the_same_with_further_sets():
    features = normal(60, 4)
    alone, together = (nearest_reals(features[:len(points)], points, 5, nearest_among_reals(features, points, 5))
                       for points in (Points(sets=[point_set(REAL, 40)]),
                                      Points(sets=[point_set(REAL, 40), point_set(SYNTHETIC, 20)])))
    assert together.rows.shape == (60, 5)
    assert together.rows.max() < 40
    np.testing.assert_array_equal(together.rows[:40], alone.rows)
    np.testing.assert_array_equal(together.distances[:40], alone.distances)
