"""Judge phantoms in tests."""

import numpy as np


def auc(scores, positive):
    """Return the probability that a positive one scores higher; ties count half."""
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    above = scores[positive][:, None] - scores[~positive][None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())
