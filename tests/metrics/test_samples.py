"""Samples: features of some images of a set, gathered from where they were computed."""

import numpy as np
import pytest

from metrics.features import Features
from metrics.samples import Sample, Samples, gather, missing_items

ITEMS = np.array([7, 2, 9, 4, 0])


def features_of(items, with_classes=False):
    """Return features whose values are the numbers of the images."""
    values = np.repeat(items[:, None], 3, axis=1).astype(np.float32)
    return Features(values=values, probabilities=values[:, :1] / 10 if with_classes else None)


@pytest.mark.parametrize("wanted", [[9], [0, 7], [5, 2, 8, 9], [7, 2, 9, 4, 0, 8, 5], []])
def test_gather_returns_features_in_the_order_wanted(wanted):
    extra = np.array([8, 5])
    wanted = np.array(wanted, dtype=np.int64)
    found = gather(wanted, [(part, features_of(part, with_classes=True)) for part in (ITEMS, extra)])
    assert found.values.dtype == np.float32
    assert np.array_equal(found.values, features_of(wanted).values)
    assert np.array_equal(found.probabilities, features_of(wanted, with_classes=True).probabilities)


def test_gather_copies_the_wanted_rows_alone(tmp_path):
    table = np.memmap(tmp_path / "features", dtype=np.float32, mode="w+", shape=(5, 3))
    table[:] = features_of(ITEMS).values
    found = gather(np.array([4, 2]), [(ITEMS, Features(values=table))])
    assert type(found.values) is np.ndarray
    assert found.values[:, 0].tolist() == [4, 2]
    assert found.probabilities is None


def test_missing_items_are_those_of_classes_that_are_not_known():
    classes = {"nv": np.array([9, 3, 2]), "mel": np.array([1, 0]), "bcc": np.empty(0, dtype=np.int64)}
    assert missing_items(classes, ITEMS).tolist() == [1, 3]
    assert missing_items({}, ITEMS).tolist() == []


def test_sample_counts_its_groups():
    sample = Sample(features=features_of(ITEMS), groups=np.array([0, 0, 1, 2, 2]))
    assert (len(sample), sample.num_groups) == (5, 3)
    assert (len(sample.first(3)), sample.first(3).num_groups) == (3, 2)
    assert sample.first(9) is sample
    independent = Sample(features=features_of(ITEMS)).first(4)
    assert (len(independent), independent.num_groups, independent.groups) == (4, 4, None)


def test_samples_give_all_images_and_each_class_with_groups():
    samples = Samples()
    samples.add("vgg16", Sample(features=features_of(ITEMS)))
    samples.add_classes("vgg16", [(ITEMS, features_of(ITEMS))], {"nv": np.array([9, 0]), "mel": np.array([2])},
                        lambda items: items // 5)
    assert len(samples.get("vgg16")) == 5
    assert samples.get("vgg16", "nv").features.values[:, 0].tolist() == [9, 0]
    assert samples.get("vgg16", "nv").groups.tolist() == [1, 0]
    assert samples.get("vgg16", "mel").features.values[:, 0].tolist() == [2]
    assert (samples.get("vgg16", "bcc"), samples.get("inception-v3")) == (None, None)
