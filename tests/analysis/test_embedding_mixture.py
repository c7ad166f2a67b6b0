"""analysis.embedding_mixture: equal distributions mix as expected; what a GAN leaves out, adds or confuses is found."""

from dataclasses import replace

import numpy as np
import pytest

from analysis.embedding_mixture import count_near, count_work, measure_mixture, measure_purity
from analysis.embedding_neighbors import nearest_among_reals
from analysis.embedding_points import PROJECTED, REAL, SYNTHETIC, Points, PointSet
from metrics import distances

K = 5


def point_set(kind, classes, groups=None):
    count = len(classes)
    return PointSet(name=kind, kind=kind, images=None, names=[f"{index}.png" for index in range(count)],
                    classes=list(classes), groups=[None] * count if groups is None else [f"g{one}" for one in groups],
                    shows_pictures=True)


def make_points(real_classes, other_classes, groups=None, *, kind=SYNTHETIC, other_groups=None):
    """Return points of two sets; a number of images in place of classes = without labels."""
    return Points(sets=[point_set(name, [""] * classes if isinstance(classes, int) else classes, numbers)
                        for name, classes, numbers in ((REAL, real_classes, groups),
                                                       (kind, other_classes, other_groups))])


def in_groups(random, num_groups, largest, spread=0.1):
    """Return Gaussian features float64 [n, 4] of groups of 1 to `largest` images that lie together, and the groups."""
    groups = np.repeat(np.arange(num_groups), random.randint(1, largest + 1, size=num_groups))
    centers = random.randn(num_groups, 4)[groups]
    return np.sqrt(1 - spread**2) * centers + spread * random.randn(len(groups), 4), groups


def measure(parts, points, **settings):
    features = np.concatenate(parts).astype(np.float32)
    settings = {"num_neighbors": K, **settings}
    return measure_mixture(features, points, 1, among_reals=near_reals(features, points, settings["num_neighbors"]),
                           **settings)


def near_reals(features, points, k):
    return nearest_among_reals(features, points, count_near(points.num_real, k))


def purity_of(features, points, k, **settings):
    features = features.astype(np.float32)
    return measure_purity(features, points, among_reals=near_reals(features, points, k), num_neighbors=k, **settings)


def contains(interval, value):
    return interval.low <= value <= interval.high


def in_clusters(random, numbers, distance=10):
    """Return features float64 [n, 6] of clusters far from each other, and their names."""
    parts = [random.randn(count, 6) + distance * np.eye(6)[index] for index, count in enumerate(numbers)]
    return np.concatenate(parts), [f"c{index}" for index, count in enumerate(numbers) for _ in range(count)]


def brute_share(reals, others, groups, k):
    """Return the share of others among neighbors by its definition: fewer than k images of other groups are nearer."""
    pool = np.concatenate([reals, others])
    pool_groups = np.concatenate([groups, groups.max() + 1 + np.arange(len(others))])
    is_other = []
    for point, own in zip(reals, groups, strict=True):
        apart = np.linalg.norm(pool - point, axis=1)
        for index in np.flatnonzero(pool_groups != own):
            nearer = (apart < apart[index]) & (pool_groups != own) & (pool_groups != pool_groups[index])
            if nearer.sum() < k:
                is_other.append(index >= len(reals))
    return np.mean(is_other)


@pytest.mark.parametrize("largest", [1, 3, 80])
def test_share_is_that_of_the_definition(largest):
    random = np.random.RandomState(largest)
    reals, groups = in_groups(random, {1: 90, 3: 45, 80: 5}[largest], largest)
    reals, others = (each.astype(np.float32).astype(np.float64) for each in (reals, random.randn(60, 4)))
    row = measure([reals, others], make_points(len(reals), 60, groups)).rows[0]
    assert row.share.estimate == pytest.approx(brute_share(reals, others, groups, K), abs=1e-12)
    sizes = np.bincount(groups)[groups]
    assert row.expected == pytest.approx(np.mean(60 / (60 + len(reals) - sizes)))
    assert (row.num_real, row.num_groups, row.num_others) == (len(reals), len(np.unique(groups)), 60)


def brute_empty_share(reals, others, groups, size):
    """Return the share of reals that have `size` reals of other groups nearer than any of the others."""
    is_empty = []
    for point, own in zip(reals, groups, strict=True):
        reach = np.sort(np.linalg.norm(reals[groups != own] - point, axis=1))[size - 1]
        is_empty.append(np.linalg.norm(others - point, axis=1).min() > reach)
    return np.mean(is_empty)


@pytest.mark.parametrize("num_others", [40, 600])
def test_empty_share_is_that_of_all_real_images_and_all_of_the_set(num_others):
    random = np.random.RandomState(0)
    reals, groups = in_groups(random, 70, 3)
    others = random.randn(num_others, 4)
    found = measure([reals, others], make_points(len(reals), num_others, groups))
    assert found.empty_share.estimate == pytest.approx(brute_empty_share(reals, others, groups, 9))
    assert found.empty_share.num_units == {"groups": 70}
    # One image of each of 35 groups, and as many of the set, among half of the groups.
    assert found.num_matched == 35
    assert found.matched_share == pytest.approx(found.control_share, abs=0.05)


def test_a_larger_set_leaves_fewer_real_images_empty_but_not_fewer_than_its_control():
    random = np.random.RandomState(0)
    reals, others = random.randn(200, 4), random.randn(1000, 4)
    small, large = (measure([reals, others[:count]], make_points(200, count)) for count in (50, 1000))
    assert large.empty_share.estimate < 0.01 < 0.05 < small.empty_share.estimate
    assert (small.num_matched, large.num_matched) == (50, 100)
    for found in (small, large):
        assert found.matched_share == pytest.approx(found.control_share, abs=0.05)


def test_groups_that_are_unknown_are_not_counted():
    random = np.random.RandomState(0)
    points = make_points(["a"] * 60 + ["b"] * 40, ["a"] * 60)
    points.sets[0].groups[0] = "g0"
    found = measure([random.randn(100, 4), random.randn(60, 4)], points)
    assert [(row.name, row.num_groups) for row in found.rows] == [("", 100), ("a", 60)]
    assert [(row.name, row.num_groups) for row in found.purity] == [("", None), ("a", None)]
    points.sets[0].groups[0] = None
    assert [row.num_groups for row in measure([random.randn(100, 4), random.randn(60, 4)], points).rows] == [None] * 2


def test_share_without_groups_is_that_of_the_nearest():
    # At 0, 1, ..., 23, alternately real and not: of each image the nearest two are of the other set, but the last's.
    places = np.arange(48, dtype=np.float64)[:, None] ** 1.01  # so that no two distances are equal
    found = measure([places[::2], places[1::2]], make_points(24, 24), num_neighbors=1).rows[0]
    assert found.share.estimate == 1
    assert found.expected == pytest.approx(24 / 47)


def test_one_distribution_has_the_expected_share_and_no_empty_region():
    random = np.random.RandomState(0)
    reals, groups = in_groups(random, 400, 4)
    found = measure([reals, random.randn(900, 4)], make_points(len(reals), 900, groups), num_neighbors=10)
    row = found.rows[0]
    assert contains(row.share, row.expected)
    assert row.share.unit == "group"
    assert row.share.high - row.share.low < 0.1
    assert found.regions == []
    # A control has one image of each of 200 groups, so that a few regions are empty by chance, as many in both.
    assert found.num_matched == 200
    assert found.matched_share == pytest.approx(found.control_share, abs=0.03)
    assert found.empty_share.estimate < found.matched_share < 0.1
    assert found.purity == []


def test_images_that_lie_elsewhere_are_no_neighbors():
    random = np.random.RandomState(0)
    found = measure([random.randn(100, 4), random.randn(100, 4) + 100], make_points(100, 100))
    assert found.rows[0].share.estimate == 0
    assert found.rows[0].share.high < 0.2
    assert (found.empty_share.estimate, found.matched_share) == (1, 1)
    assert found.control_share < 0.1


def test_mode_collapse_leaves_the_missing_clusters_empty():
    random = np.random.RandomState(0)
    reals, names = in_clusters(random, [100, 100, 100])
    others = in_clusters(random, [300])[0]
    found = measure([reals, others], make_points(names, ["c0"] * 300))
    row = found.rows[0]
    assert row.share.high < row.expected
    assert found.region_size == 10
    assert len(found.regions) == 8
    assert {names[member] for region in found.regions for member in region.rows} == {"c1", "c2"}
    assert len({member for region in found.regions for member in region.rows}) == 80  # no common images
    assert contains(found.empty_share, 2 / 3)
    assert found.matched_share == pytest.approx(2 / 3, abs=0.03)
    assert found.control_share < 0.1


def test_a_small_cluster_that_is_missing_is_found_among_many_regions():
    random = np.random.RandomState(0)
    reals, names = in_clusters(random, [560, 40])
    found = measure([reals, in_clusters(random, [600])[0]], make_points(names, 600))
    assert found.regions
    assert {names[member] for region in found.regions for member in region.rows} == {"c1"}
    region = found.regions[0]
    center = reals[region.rows[0]].astype(np.float32)
    assert region.found == 0
    assert region.expected == pytest.approx(9 * 600 / 600)
    assert region.classes == [("c1", 10)]
    assert region.radius == pytest.approx(np.linalg.norm(reals[region.rows] - center, axis=1).max(), rel=1e-5)


def test_a_region_names_its_nearest_image_of_the_set():
    random = np.random.RandomState(0)
    reals, names = in_clusters(random, [100, 100])
    others = np.concatenate([in_clusters(random, [100])[0], reals[150:151] + 5])
    found = measure([reals, others], make_points(names, 101))
    for region in found.regions:
        apart = np.linalg.norm(others - reals[region.rows[0]], axis=1)
        assert region.nearest == 200 + apart.argmin()
        assert region.nearest_distance == pytest.approx(apart.min(), rel=1e-5)
        assert region.found == (apart <= region.radius).sum()


def test_regions_have_no_image_of_the_group_of_their_center():
    random = np.random.RandomState(0)
    reals, names = in_clusters(random, [100, 60])
    groups = np.arange(160) // 4
    found = measure([reals, in_clusters(random, [160])[0]], make_points(names, 160, groups))
    assert found.regions
    for region in found.regions:
        assert (groups[region.rows[1:]] != groups[region.rows[0]]).all()


def test_swapped_classes_have_no_purity():
    random = np.random.RandomState(0)
    reals, names = in_clusters(random, [60, 60])
    others, other_names = in_clusters(random, [50, 70])
    swapped = [{"c0": "c1", "c1": "c0"}[name] for name in other_names]
    right = measure([reals, others], make_points(names, other_names))
    wrong = measure([reals, others], make_points(names, swapped))
    assert [row.name for row in right.purity] == ["", "c0", "c1"]
    assert [row.num_images for row in right.purity] == [120, 50, 70]
    assert [row.share.estimate for row in right.purity] == [1, 1, 1]
    assert [row.share.estimate for row in wrong.purity] == [0, 0, 0]
    assert [row.expected for row in wrong.purity] == pytest.approx([0.5] * 3)
    assert wrong.rows[0].share == right.rows[0].share
    assert [row.share.estimate for row in wrong.rows[1:]] == [0, 0]


def test_classes_mix_as_expected_where_only_their_shares_differ():
    random = np.random.RandomState(1)
    reals, names = in_clusters(random, [300, 100])
    others, other_names = in_clusters(random, [100, 300])
    found = measure([reals, others], make_points(names, other_names), num_neighbors=10)
    whole, *rows = found.rows
    assert [(row.name, row.num_real, row.num_others) for row in rows] == [("c0", 300, 100), ("c1", 100, 300)]
    assert not contains(whole.share, whole.expected)
    for row in rows:
        assert contains(row.share, row.expected)


def test_purity_of_the_reals_is_of_other_groups():
    # In eight places far apart lie two images of a patient with label a, and beside them two of one with label b.
    features = (100 * np.arange(8)[:, None] + [0, 0.1, 1, 1.1]).reshape(-1, 1).astype(np.float32)
    points = make_points(["a", "a", "b", "b"] * 8, 1, np.arange(32) // 2)
    found = purity_of(np.append(features, [[0]], axis=0), points, 1)
    assert [(row.name, row.num_images, row.num_groups) for row in found] == [("", 32, 16), ("a", 16, 8), ("b", 16, 8)]
    assert [row.share.estimate for row in found] == [0, 0, 0]
    assert [row.expected for row in found] == pytest.approx([14 / 30] * 3)
    assert found[0].share.num_units == {"splits": 64, "real": 16}


def test_purity_of_a_class_of_one_group_has_no_interval():
    random = np.random.RandomState(0)
    points = make_points(["a"] * 38 + ["b"] * 2 + [""] * 5, 1, np.arange(45) // 2)
    row = purity_of(random.randn(46, 4), points, 2)[2]
    assert (row.name, row.num_images, row.num_groups, row.share) == ("b", 2, 1, None)
    assert row.why_not == "there are images of too few patients or lesions (1); an interval needs at least 2"
    assert row.expected == 0  # no other group has this class


def test_purity_of_labels_without_meaning_is_as_expected():
    random = np.random.RandomState(0)
    features = random.randn(300, 4)
    names = random.choice(["a", "b"], p=[0.7, 0.3], size=300).tolist()
    for row in purity_of(features, make_points(names[:299], [names[299]]), 10):
        assert contains(row.share, row.expected)
    assert purity_of(features, make_points(299, 1), 10) == []


def test_purity_is_that_among_labeled_images_of_classes_that_real_images_have():
    random = np.random.RandomState(0)
    reals, names = in_clusters(random, [60, 60, 40])
    others, other_names = in_clusters(random, [50, 70, 20])
    features, kept = np.concatenate([reals, others]), np.arange(160) % 2 == 0
    half = [name if keep else "" for name, keep in zip(names, kept)]
    labels = [{"c0": "c0", "c1": "c1", "c2": "other"}[name] for name in other_names]
    counts = []
    found = measure([features], make_points(half, labels), on_rows=counts.append)
    alone = measure([reals[kept], others[:120]], make_points([name for name in half if name], labels[:120]))
    assert found.purity == alone.purity
    assert [(row.name, row.num_images, row.share.estimate) for row in found.purity] == [
        ("", 120, 1), ("c0", 50, 1), ("c1", 70, 1)]
    assert found.purity[1].expected == pytest.approx(30 / 80)
    assert (found.unknown_classes, alone.unknown_classes) == (["other"], [])
    assert sum(counts) == count_work(make_points(half, labels), 1)
    assert purity_of(features, make_points(half, labels), 5) == purity_of(
        features[:160][kept], make_points([name for name in half if name], 0), 5)


def test_labels_that_no_real_image_has_have_no_purity():
    random = np.random.RandomState(0)
    found = measure([random.randn(60, 4), random.randn(60, 4)], make_points(60, ["b", "a"] * 30))
    assert (found.purity, found.unknown_classes) == ([], ["a", "b"])


def test_reasons_are_about_images_where_groups_are_unknown():
    random = np.random.RandomState(0)
    row = purity_of(random.randn(61, 4), make_points(["a"] * 59 + ["b"], 1), 2)[2]
    assert (row.name, row.share, row.why_not) == ("b", None, "there is 1 image; an interval needs at least 2")


@pytest.mark.parametrize(("num_real", "num_others", "groups", "why_not"), [
    (60, 11, None, "there are 11 synthetic images; an interval needs at least 12"),
    (60, 60, np.arange(60) // 30, "there are real images of too few patients or lesions (2); an interval needs at "
                                  "least 4")])
def test_too_few_images_or_groups_have_no_share_and_a_reason(num_real, num_others, groups, why_not):
    random = np.random.RandomState(0)
    row = measure([random.randn(num_real, 4), random.randn(num_others, 4)],
                  make_points(num_real, num_others, groups)).rows[0]
    assert (row.share, row.why_not) == (None, why_not)
    assert 0 < row.expected < 1


def test_a_class_with_few_images_has_a_row_without_a_share():
    random = np.random.RandomState(0)
    names = ["a"] * 50 + ["b"] * 10
    found = measure([random.randn(60, 4), random.randn(60, 4)], make_points(names, names))
    assert [(row.name, row.share is None) for row in found.rows] == [("", False), ("a", False), ("b", True)]


def test_projections_of_the_own_image_do_not_count():
    # Each projected image equals its target: without those of the own group, the target's neighbors are pairs.
    random = np.random.RandomState(0)
    reals, groups = in_groups(random, 80, 2)
    points = make_points(len(reals), len(reals), groups, kind=PROJECTED, other_groups=groups)
    row = measure([reals, reals + 1e-4 * random.randn(*reals.shape)], points).rows[0]
    assert row.expected == pytest.approx(0.5)
    assert row.share.estimate == pytest.approx(0.5, abs=0.02)
    assert contains(row.share, 0.5)


@pytest.fixture(scope="module")
def mixed():
    """Return features and points of three clusters, one with few synthetic images, with groups and labels."""
    random = np.random.RandomState(0)
    reals, names = in_clusters(random, [90, 60, 50])
    others, other_names = in_clusters(random, [150, 12, 100])
    return np.concatenate([reals, others]).astype(np.float32), names, np.arange(200) // 2, other_names


def test_mixture_does_not_depend_on_the_size_of_blocks(mixed, monkeypatch):
    features, names, groups, other_names = mixed
    points = make_points(names, other_names, groups)
    found = measure([features], points)
    monkeypatch.setattr(distances, "_BLOCK", 33)
    assert measure([features], points) == found
    assert found.regions


def test_mixture_does_not_depend_on_the_order_of_images(mixed):
    features, names, groups, other_names = mixed
    found = measure([features], make_points(names, other_names, groups))
    random = np.random.RandomState(1)
    first, second = random.permutation(200), random.permutation(262)
    order = np.concatenate([first, 200 + second])
    again = measure([features[order]], make_points(
        [names[row] for row in first], [other_names[row] for row in second], groups[first]))
    for one, other in ((found.rows, again.rows), (found.purity, again.purity)):
        for row, other_row in zip(one, other, strict=True):
            assert replace(row, share=None, expected=0) == replace(other_row, share=None, expected=0)
            np.testing.assert_allclose([row.expected, row.share.estimate, row.share.low, row.share.high],
                                       [other_row.expected, other_row.share.estimate, other_row.share.low,
                                        other_row.share.high], rtol=1e-9, atol=1e-12)
    assert (again.matched_share, again.control_share, again.num_matched) == (
        found.matched_share, found.control_share, found.num_matched)
    assert again.empty_share == found.empty_share
    assert [order[region.rows].tolist() for region in again.regions] == [region.rows for region in found.regions]


def test_mixture_is_repeated_by_its_seed_and_reports_all_rows(mixed):
    features, names, groups, other_names = mixed
    points = make_points(names, other_names, groups)
    counts = []
    assert measure([features], points, on_rows=counts.append) == measure([features], points)
    assert sum(counts) == count_work(points, 1) == (2 + 2 * 8) * 200 + 262
    counts = []
    points = make_points(200, 262, groups)
    measure([features], points, on_rows=counts.append)
    assert sum(counts) == count_work(points, 1)


def test_a_real_set_is_refused(mixed):
    with pytest.raises(ValueError, match=r"^set 0 is real; expected a set that is compared with the real images$"):
        measure_mixture(mixed[0], make_points(200, 262), 0, among_reals=None, num_neighbors=K)


@pytest.mark.slow
def test_intervals_cover_what_one_distribution_gives():
    # 100 draws: with a coverage of 95 % fewer than 88 cover in 1 of 600 times.
    covered, covered_purity, found_shift, apart, errors = 0, 0, 0, [], []
    for draw in range(100):
        random = np.random.RandomState(draw)
        reals, groups = in_groups(random, 60, 4)
        others = random.randn(150, 4)
        names = random.choice(["a", "b"], size=len(reals) + 150).tolist()
        found = measure([reals, others], make_points(names[150:], names[:150], groups))
        row, purity = found.rows[0], found.purity[0]
        covered += contains(row.share, row.expected)
        covered_purity += contains(purity.share, purity.expected)
        apart.append(row.share.estimate - row.expected)
        errors.append(row.share.std_error)
        if draw < 20:
            row = measure([reals, others + 1], make_points(len(reals), 150, groups)).rows[0]
            found_shift += row.share.high < row.expected
    assert covered >= 88
    assert covered_purity >= 88
    assert 0.8 < np.mean(errors) / np.std(apart) < 1.3  # the deviation of 100 draws is known within 7 %
    assert abs(np.mean(apart)) < 3 * np.std(apart) / 10  # among the k nearest by number it is 0.6 deviations
    assert found_shift >= 19
