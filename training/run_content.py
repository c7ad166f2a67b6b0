"""Tell by one hash which images a run sees, and how often each."""

import hashlib

import numpy as np

from training.dataset import ImageDataset


def content_of(dataset: ImageDataset, weights: np.ndarray | None) -> str:
    """Return a sha256 of images and labels in use, and of weights from `training.balance.image_weights`."""
    content = dataset.content_hash()
    if weights is None:
        return content
    return hashlib.sha256(content.encode() + weights.tobytes()).hexdigest()
