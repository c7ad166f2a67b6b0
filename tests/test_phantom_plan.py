"""How many phantoms each class has, and which show one lesion."""

import numpy as np
import pytest

from imagesets.phantoms.plan import class_counts, lesion_numbers, make_plan

HAM10000 = {"nv": 0.67, "mel": 0.11, "bkl": 0.11, "bcc": 0.05, "akiec": 0.03, "vasc": 0.02, "df": 0.01}


@pytest.mark.parametrize(("shares", "count", "expected"), [
    ({"benign": 0.87, "melanoma": 0.13}, 2000, [1740, 260]),
    ({"benign": 0.87, "melanoma": 0.13}, 4, [3, 1]),
    ({"a": 0.34, "b": 0.33, "c": 0.33}, 10, [4, 3, 3]),
    ({"a": 0.5, "b": 0.5}, 5, [3, 2]),
    ({"a": 0.333, "b": 0.333, "c": 0.333}, 3, [1, 1, 1]),
    (HAM10000, 1000, [670, 110, 110, 50, 30, 20, 10]),
    ({"a": 1.0}, 7, [7]),
])
def test_class_counts_follow_the_largest_remainder(shares, count, expected):
    assert class_counts(shares, count) == expected


@pytest.mark.parametrize("counts", [[1740, 260], [1, 1, 1], [2, 0, 1], [20, 3, 3, 2, 1, 1], [1], [0, 500]])
@pytest.mark.parametrize("seed", range(4))
def test_plan_meets_the_counts_and_keeps_lesions_in_one_class(counts, seed):
    plan = make_plan(counts, seed)
    assert np.bincount(plan.labels, minlength=len(counts)).tolist() == counts
    assert np.bincount(plan.lesions).max() <= 3
    for lesion in np.unique(plan.lesions):
        assert len(np.unique(plan.labels[plan.lesions == lesion])) == 1


def test_plan_gives_lesions_of_every_size_to_both_classes():
    plan = make_plan([1740, 260], 0)
    for label in range(2):
        sizes = np.bincount(plan.lesions[plan.labels == label])
        shares = np.bincount(sizes[sizes > 0], minlength=4)[1:] / (sizes > 0).sum()
        # 260 images are about 185 lesions: the standard error of a share is below 0.035, the bound three of it.
        assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.105)


def test_lesion_numbers_of_fewer_images_begin_those_of_more():
    assert np.array_equal(lesion_numbers(3, 50), lesion_numbers(3, 500)[:50])
    assert not np.array_equal(lesion_numbers(3, 50), lesion_numbers(4, 50))
