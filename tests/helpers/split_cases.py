"""Make requests and sets without files for the tests of splits."""

import numpy as np

from imagesets.reader import ImageSet
from imagesets.split import create_request

THREE = "train:0.8,val:0.1,test:0.1"


def make_request(parts=None, *, institutions=None, sizes=None, skew=None, seed=0, allow_missing=False, leave_out=False):
    return create_request(parts=parts, institutions=institutions, sizes=sizes, skew=skew, seed=seed,
                          allow_missing=allow_missing, leave_out=leave_out)


def unique_digests(count, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, 32), dtype=np.uint8)


class Labels(ImageSet):
    """In place of an ImageSet if no file is read: labels and groups without images."""

    path = "set.zip"

    def __init__(self, labels, groups=None, classes=None):
        self.labels = None if labels is None else np.asarray(labels)
        count = len(self.labels) if groups is None else len(groups)
        self.groups = [f"image{index}" for index in range(count)] if groups is None else groups
        self.classes = classes
        self.names = [f"{index}.png" for index in range(count)]

