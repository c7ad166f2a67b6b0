import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from dnnlib.cli import UserError
from latent.boundaries import (
    auc,
    auc_interval,
    choose_samples,
    find_boundary,
    orthogonal,
    permute,
    rank_correlations,
)
from tests.helpers.disc_generator import angle_between, axis_of, disc_generator

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 12  # w_dim


def random_styles(count, seed=0):
    return np.random.RandomState(seed).randn(count, SIZE)


def axis(attribute):
    return axis_of(disc_generator(w_dim=SIZE), attribute).double().numpy()


def boundary_of(styles, values, *, groups=None, permutations=19, **options):
    samples = choose_samples("it", values, groups, 0.25)
    return find_boundary(styles, samples, permutations=permutations, **options)


# The choice of samples.


def test_samples_are_those_of_the_lowest_and_highest_values():
    values = np.random.RandomState(0).permutation(200).astype(float)
    chosen = choose_samples("area", values, None, 0.2)
    assert sorted(values[chosen.rows[~chosen.positive]]) == list(range(40))
    assert sorted(values[chosen.rows[chosen.positive]]) == list(range(160, 200))
    assert (chosen.low, chosen.high, chosen.groups) == (39, 160, None)


def test_samples_of_two_values_are_balanced_and_without_those_that_are_unknown():
    values = np.array([1.0] * 30 + [0.0] * 100 + [np.nan] * 50)
    chosen = choose_samples("mel", values, None, 0.25)
    assert sorted(chosen.rows[chosen.positive]) == list(range(30))
    negative = chosen.rows[~chosen.positive]
    assert len(set(negative)) == 30
    assert set(negative) < set(range(30, 130))
    assert negative.max() > 100  # drawn at random, not the first ones


@pytest.mark.parametrize(("values", "groups", "message"), [
    ([2.0] * 100, None,
     "area has the same value for all samples; expected an attribute that differs between them: take more samples, of "
     "other classes, or another attribute"),
    ([np.nan] * 100, None,
     "area is not known for any of the samples; expected an attribute that differs between them: take more samples, of "
     "other classes, or another attribute"),
    ([0.0] * 81 + [1.0] * 19, None,
     "area has 81 samples with less and 19 with more of it; expected at least 20 of each: take more samples"),
    ([0.0] * 90 + list(range(1, 11)), None,
     "area has the same value, 0, for so many samples that its lowest and highest 25% overlap; expected a smaller "
     "--extremes, or another attribute"),
    ([0.0, 1.0] * 40, np.arange(80) // 2 % 9,
     "area has samples of 9 groups with less of it; expected at least 10: images of one group are no independent "
     "samples"),
])
def test_attributes_that_cannot_be_compared_are_refused(values, groups, message):
    with pytest.raises(UserError) as caught:
        choose_samples("area", np.array(values), groups, 0.25)
    assert str(caught.value) == message


# Directions.


def test_boundary_of_an_attribute_is_its_axis():
    styles = random_styles(800)
    values = styles @ axis("radius") + 0.1 * np.random.RandomState(1).randn(800)
    found = boundary_of(styles, values)
    assert found.auc.estimate > 0.95
    assert found.auc.low > 0.9
    assert angle_between(found.normal, axis("radius")) < 10
    assert found.normal @ axis("radius") > 0  # towards more of it
    assert np.linalg.norm(found.normal) == pytest.approx(1)
    assert found.p_value == 1 / 20
    assert found.is_found(0.049)
    assert not found.is_found(0.05)


def test_boundary_does_not_depend_on_the_scale_of_numbers_of_w():
    styles, scales = random_styles(400), np.geomspace(0.01, 100, SIZE)
    values = styles[:, 0] - styles[:, 5]
    plain, scaled = boundary_of(styles, values, permutations=3), boundary_of(styles * scales, values, permutations=3)
    assert scaled.auc.estimate == pytest.approx(plain.auc.estimate, abs=1e-3)
    np.testing.assert_allclose(scaled.null, plain.null, atol=1e-3)
    np.testing.assert_allclose(scaled.normal, plain.normal / scales / np.linalg.norm(plain.normal / scales), atol=1e-3)


def test_orthogonal_direction_leaves_the_other_attribute_as_it_is():
    styles = random_styles(800)
    radius, color = axis("radius"), axis("color")
    values = styles @ (radius + 0.7 * color)  # in these images, larger lesions are lighter
    plain, other = boundary_of(styles, values, permutations=0), boundary_of(styles, styles @ color, permutations=0)
    found = boundary_of(styles, values, permutations=0, others=[other.normal])
    assert plain.normal @ color > 0.4  # a step along it changes the color, too
    assert abs(found.normal @ color) < 0.1
    assert found.normal @ other.normal == pytest.approx(0, abs=1e-12)
    assert found.normal @ radius > 0.95
    np.testing.assert_allclose(found.normal, orthogonal(plain.normal, [other.normal]))
    # Its AUC is that of the direction which is left: sorting by radius alone.
    top = choose_samples("it", values, None, 0.25)
    expected = roc_auc_score(top.positive, styles[top.rows] @ radius)
    assert found.auc.estimate == pytest.approx(expected, abs=0.03)
    assert found.auc.estimate < plain.auc.estimate


def test_orthogonal_removes_the_span_of_all_others():
    random = np.random.RandomState(0)
    normal, others = random.randn(6), [*random.randn(2, 6)]
    found = orthogonal(normal, [*others, others[0] + others[1]])  # which adds nothing
    assert np.linalg.norm(found) == pytest.approx(1)
    np.testing.assert_allclose(others @ found, 0, atol=1e-12)
    rest = normal - np.linalg.lstsq(np.transpose(others), normal, rcond=None)[0] @ others
    np.testing.assert_allclose(found, rest / np.linalg.norm(rest))


def test_orthogonal_to_itself_is_refused():
    normal = np.arange(4.0)
    with pytest.raises(UserError) as caught:
        orthogonal(normal, [np.ones(4), normal - 1])
    assert str(caught.value) == ("--orthogonal-to leaves nothing of the direction; expected directions that differ "
                                 "from it")


# The tests.


def test_permuted_values_give_an_auc_of_one_half_and_no_direction():
    contains, areas = 0, []
    for seed in range(4):
        styles = random_styles(400, seed)
        values = np.random.RandomState(100 + seed).permutation(styles @ axis("radius"))
        found = boundary_of(styles, values, permutations=39)
        areas.append(found.auc.estimate)
        contains += found.auc.low <= 0.5 <= found.auc.high
        assert not found.is_found(found.p_value)
    assert contains >= 3  # about 90 %, see `find_boundary`
    assert np.mean(areas) == pytest.approx(0.5, abs=0.06)


def grouped(seed, groups=40, each=4):
    """Return styles and values of which images of one group are alike, but which have nothing to do with each other."""
    random = np.random.RandomState(seed)
    numbers = np.repeat(np.arange(groups), each)
    styles = random.randn(groups, SIZE)[numbers] + 0.2 * random.randn(len(numbers), SIZE)
    return styles, (random.rand(groups) > 0.5).astype(float)[numbers], numbers


def test_images_of_one_group_that_are_alike_are_no_evidence():
    found, ignorant = 0, 0
    for seed in range(3):
        styles, values, groups = grouped(seed)
        boundary = boundary_of(styles, values, groups=groups, permutations=9)
        assert boundary.auc.unit == "group"
        found += boundary.is_found(boundary.p_value / 3)  # as with a smallest p-value of 0.03
        ignorant += boundary_of(styles, values, permutations=0).is_found(0.01)
    assert (found, ignorant) == (0, 3)


def test_a_direction_is_found_with_groups_too():
    styles, _, groups = grouped(9)
    boundary = boundary_of(styles, styles @ axis("x"), groups=groups)
    assert boundary.p_value == 1 / 20
    assert boundary.auc.low > 0.5
    assert angle_between(boundary.normal, axis("x")) < 45  # of 40 groups


@pytest.mark.slow
@pytest.mark.parametrize("with_groups", [False, True])
def test_p_values_without_a_direction_are_not_too_small(with_groups):
    p_values = []
    for seed in range(50):
        random = np.random.RandomState(seed)
        if with_groups:
            styles, values, groups = grouped(seed, groups=24, each=2)
            styles = styles[:, :3]
            if min(len(np.unique(groups[values == value])) for value in (0, 1)) < 10:
                continue
        else:
            styles, values, groups = random.randn(80, 3), random.randn(80), None
        p_values.append(boundary_of(styles, values, groups=groups, permutations=9).p_value)
    p_values = np.array(p_values)
    assert len(p_values) >= 25
    # Uniform on 0.1, 0.2, ..., 1 if the test is exact: one standard error is 0.042 and 0.071 at 50.
    assert (p_values <= 0.1).mean() < 0.1 + 3 * 0.042
    assert (p_values <= 0.5).mean() < 0.5 + 3 * 0.071
    assert p_values.mean() > 0.4


def test_permuted_labels_stay_with_their_groups():
    groups = np.repeat(np.arange(30), np.tile([1, 2, 3], 10))
    positive = (np.arange(30) % 2 == 0)[groups]
    changed = 0
    for seed in range(20):
        found = permute(positive, groups, np.random.RandomState(seed))
        assert all(len(np.unique(found[groups == group])) == 1 for group in range(30))
        changed += (found != positive).sum()
    assert 0.3 < changed / 20 / len(groups) < 0.7


def test_permuted_labels_without_groups_are_as_many():
    positive = np.arange(50) < 20
    found = permute(positive, None, np.random.RandomState(0))
    assert found.sum() == 20
    assert (found != positive).any()


# Numbers.


def test_auc_counts_pairs_and_half_of_ties():
    random = np.random.RandomState(0)
    scores, positive = random.randint(0, 6, 200).astype(float), random.rand(200) > 0.6
    assert auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert auc(-scores, positive) == pytest.approx(1 - auc(scores, positive))
    assert auc(np.zeros(200), positive) == 0.5


def test_auc_interval_is_as_wide_as_the_formula_of_hanley_and_mcneil_says():
    random = np.random.RandomState(1)
    positive = np.arange(400) < 200
    scores = random.randn(400) + positive
    interval = auc_interval(scores, positive, None)
    area = interval.estimate
    first, second = area / (2 - area), 2 * area**2 / (1 + area)  # Hanley and McNeil 1982, for equally many of both
    variance = (area * (1 - area) + 199 * (first - area**2) + 199 * (second - area**2)) / 200**2
    assert interval.std_error == pytest.approx(variance**0.5, rel=0.15)
    assert interval.low < area < interval.high
    doubled = auc_interval(np.repeat(scores, 2), np.repeat(positive, 2), np.repeat(np.arange(400), 2))
    assert doubled.std_error == pytest.approx(interval.std_error, rel=0.15)  # not smaller by the square root of 2


def test_rank_correlations_are_spearmans_over_the_samples_that_have_both():
    random = np.random.RandomState(0)
    first, second = random.randn(60), random.randn(60)
    second[:10] = np.nan
    found = rank_correlations({"a": first, "b": second, "c": np.exp(first), "d": np.zeros(60)})
    assert found[0, 1] == found[1, 0] == pytest.approx(spearmanr(first[10:], second[10:]).statistic)
    assert found[0, 2] == pytest.approx(1)
    assert np.isnan(found[3]).all()
