"""imagesets.classes: images divided among classes."""

import pytest

from imagesets.classes import class_counts


@pytest.mark.parametrize(("shares", "count", "expected"), [
    ([0.87, 0.13], 2000, [1740, 260]), ([0.87, 0.13], 4, [3, 1]), ([0.34, 0.33, 0.33], 10, [4, 3, 3]),
    ([0.5, 0.5], 5, [3, 2]), ([0.333, 0.333, 0.333], 3, [1, 1, 1]),
    ([0.67, 0.11, 0.11, 0.05, 0.03, 0.02, 0.01], 1000, [670, 110, 110, 50, 30, 20, 10]),
    ([700, 200, 101], 1001, [700, 200, 101]), ([5, 0, 1], 3, [3, 0, 0]), ([1.0], 7, [7]),
])
def test_class_counts_follow_the_largest_remainder(shares, count, expected):
    assert class_counts(shares, count) == expected
