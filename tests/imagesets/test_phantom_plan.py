"""How many phantoms each class has, and which show one lesion."""

import numpy as np
import pytest

from imagesets.phantoms.make import lesion_numbers, make_plan


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
