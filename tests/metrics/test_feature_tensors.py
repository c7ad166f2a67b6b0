"""metrics.feature_tensors: what counts as features, and what is refused."""

import warnings

import numpy as np
import pytest

from metrics.feature_tensors import as_feature_pair, as_features


@pytest.mark.parametrize(("features", "message"), [
    (np.ones(3), r"^real features are \[3\]; expected \[N, F\]$"),
    (np.ones([3, 0]), r"^real features are \[3, 0\]; expected \[N, F\]$"),
    (np.ones([3, 2], dtype=np.int64), r"^real features are torch.int64; expected floating point$"),
    (np.ones([3, 2]), r"^real features are of 3 images; expected at least 4$"),
    (np.array([[1, np.nan]] * 4 + [[np.inf, 1]]),
     r"^real features have 5 values that are not finite, of 10; expected none$"),
])
def test_as_features_of_another_kind_raises(features, message):
    with pytest.raises(ValueError, match=message):
        as_features(features, "real features", at_least=4)


def test_as_features_read_only_array_shares_memory_without_warning():
    features = np.ones([3, 2], dtype=np.float32)
    features.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = as_features(features)
    assert found.data_ptr() == features.ctypes.data


def test_as_features_reversed_view_keeps_values():
    features = np.random.RandomState(0).randn(5, 7)
    np.testing.assert_array_equal(as_features(features[::-1]).numpy(), features[::-1])


def test_as_feature_pair_of_two_detectors_raises():
    with pytest.raises(ValueError, match=r"^real features have 2 dimensions, fake ones 3; expected equal numbers: "
                                         r"compute both with the same detector$"):
        as_feature_pair(np.ones([4, 2]), np.ones([4, 3]), at_least=1)
