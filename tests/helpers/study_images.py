"""Images of a study of authenticity in tests."""

import numpy as np

from analysis.authenticity_measures import StudyImages
from imagesets.reader import ImageSet
from metrics.image_sources import SelectedImages, SetImages


def study_images(path, title, groups=None):
    """Return all images of a data set. groups: int64 [N]; None = each image is its own"""
    data = ImageSet(path)
    count = len(data.names)
    return StudyImages(title=title, sets=[SelectedImages(SetImages(data), np.arange(count))], names=list(data.names),
                       classes=[""] * count, known_classes=None,
                       groups=np.arange(count) if groups is None else groups)
