"""Images with and without a dark spot on skin: a task that a small network learns in seconds."""

import numpy as np

from analysis.fine_tuning import TrainingImages
from imagesets.writer import ImageSetWriter
from metrics.image_sources import SetImages
from tests.helpers.make_sets import png

LABELS = ("rest", "spot")


def make_spot_set(path, count, *, seed=0, size=32, gray=False, only=None):
    """Write a data set whose even images have no spot, and whose odd ones have one anywhere; return its path.

    only:  label of all images; None = both in turn
    """
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    with ImageSetWriter(path, classes=list(LABELS)) as writer:
        for index in range(count):
            label = index % 2 if only is None else only
            pixels = np.array([200.0, 160, 140]) + random.normal(0, 12, (size, size, 3)) + random.normal(0, 10, 3)
            if label:
                top, left = random.uniform(0.3, 0.7, 2)
                spot = np.exp(-((y - top) ** 2 + (x - left) ** 2) / 0.02)[..., None]
                pixels -= spot * np.array([90, 90, 70])
            pixels = np.clip(pixels, 0, 255).astype(np.uint8)
            writer.add(png(pixels[..., 0] if gray else pixels), label)
    return path


def spot_images(path, count, **options):
    """Return the images of such a set."""
    make_spot_set(path, count, **options)
    return TrainingImages(images=SetImages(path), rows=np.arange(count), labels=np.arange(count) % 2)
