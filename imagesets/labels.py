"""See the labels of a data set as columns, one a class, whether they are integers or lists."""

import numpy as np

from imagesets.classes import names_of_numbers
from imagesets.reader import NO_LABEL, ImageSet

PRESENT = 0.5  # a list's number above this says that the image is of that class


def class_names(images: ImageSet) -> list[str]:
    """Return a name for each class that labels may have; the number where dataset.json names none."""
    if images.labels is None:
        return []
    if images.classes is not None:
        return list(images.classes)
    if images.labels.ndim == 1:
        return names_of_numbers(images.labels)
    return [str(index) for index in range(images.labels.shape[1])]


def class_columns(images: ImageSet) -> np.ndarray:
    """Return whether an image is of a class: bool [N, C], C = len(class_names(images)); False for measures."""
    if images.labels is None:
        return np.zeros((len(images), 0), dtype=bool)
    if images.labels.ndim == 2:
        columns = np.zeros((len(images), len(class_names(images))), dtype=bool)
        columns[:, :images.labels.shape[1]] = images.labels > PRESENT
        return columns & are_findings(images)
    return images.labels[:, None] == np.arange(len(class_names(images)))


def are_findings(images: ImageSet) -> np.ndarray:
    """Return which columns tell whether something is there: bool [C]; of lists those with numbers from 0 to 1 alone.

    Others are measures, such as an age, of which no number means that an image is of a class.
    """
    found = np.ones(len(class_names(images)), dtype=bool)
    if images.labels is not None and images.labels.ndim == 2:
        values = np.nan_to_num(images.labels)
        found[:values.shape[1]] = ((values >= 0) & (values <= 1)).all(axis=0)
    return found


def is_unlabelled(images: ImageSet) -> np.ndarray:
    """Return which images have no label: bool [N]."""
    if images.labels is None:
        return np.ones(len(images), dtype=bool)
    return images.labels == NO_LABEL if images.labels.ndim == 1 else np.isnan(images.labels).any(axis=1)


def label_of(images: ImageSet, row: int) -> int | list[float] | None:
    """Return the label of an image as dataset.json holds it."""
    if images.labels is None:
        return None
    label = images.labels[row]
    if images.labels.ndim == 1:
        return None if label == NO_LABEL else int(label)
    # The shortest text that gives the same float32: 0.1, not 0.10000000149.
    return None if np.isnan(label).any() else [float(str(x)) for x in label]


def label_text(images: ImageSet, row: int) -> str:
    """Return the label of an image for people: the name of its class, or the numbers of its list."""
    label = label_of(images, row)
    if label is None:
        return "no label"
    return class_names(images)[label] if isinstance(label, int) else str(label)
