"""Every number of the reference vectors in tests/data is met."""

from pathlib import Path

import pytest

from tests.helpers.parity_checks import CHECKS

DATA = Path(__file__).parent.parent / "data"
# tests/training/test_augment.py and tests/training/test_ada.py replay a selection of these in their own form.
ELSEWHERE = {"augment.npz", "augment_statistics.json"}


@pytest.mark.parametrize(("file", "label"), [(file, label) for file, checks in CHECKS.items() for label in checks
                                             if file not in ELSEWHERE])
def test_vectors_are_met(file, label):
    measurements = list(CHECKS[file][label](DATA))
    assert measurements
    failed = [measurement for measurement in measurements if not measurement.error <= measurement.tolerance]
    assert not failed, f"{len(failed)} of {len(measurements)} numbers differ, e.g. {failed[0]}"
