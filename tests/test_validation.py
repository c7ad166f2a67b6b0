"""Scores of images that are never learned from."""

import pytest
import torch

from dnnlib.cli import UserError
from tests.make_sets import make_set
from tests.small_networks import small_discriminator
from training.dataset import ImageDataset
from training.loading import to_unit_range
from training.validation import MOST_IMAGES, Validation


def dataset_of(tmp_path, count):
    labels = [index % 2 for index in range(count)]
    return ImageDataset(make_set(tmp_path / "a.zip", count, size=16, labels=labels), use_labels=True)


def test_validation_scores_are_those_of_training_passes(tmp_path):
    dataset, D = dataset_of(tmp_path, 10), small_discriminator()
    scores = Validation(dataset, batch=4, seed=0).score(D, torch.device("cpu"))
    pixels, labels = (torch.stack([torch.tensor(dataset[row][part]) for row in range(8)]) for part in (0, 1))
    expected = torch.cat([D(to_unit_range(pixels[start:start + 4]), labels[start:start + 4]).flatten()
                          for start in (0, 4)])
    torch.testing.assert_close(scores, expected)
    assert not scores.requires_grad


def test_validation_of_fewer_images_than_a_pass_takes_each_alone(tmp_path):
    assert len(Validation(dataset_of(tmp_path, 3), batch=4, seed=0).score(small_discriminator(), "cpu")) == 3


def test_validation_labels_are_those_of_the_training_classes_by_name(tmp_path):
    """"mel" is told the discriminator as the training tells it, whatever its number is in the set."""
    train, D = ["nv", "mel", "bcc"], small_discriminator(c_dim=3)
    labels = [0, 1, 2, 0, 1, 2]
    same = make_set(tmp_path / "same.zip", 6, size=16, labels=labels, classes=train)
    other = make_set(tmp_path / "other.zip", 6, size=16, labels=[2, 0, 1, 2, 0, 1], classes=["mel", "bcc", "nv"])
    part = make_set(tmp_path / "part.zip", 2, size=16, labels=[1, 0], classes=["mel", "nv"])
    scores = [Validation(ImageDataset(path, use_labels=True, classes=train), batch=2, seed=0).score(D, "cpu")
              for path in (same, other, part)]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0][:2], scores[2])


def test_validation_vectors_are_in_the_order_of_the_training_ones(tmp_path):
    path = make_set(tmp_path / "v.zip", 2, size=16, labels=[[1, 0.5], [0, 2]], classes=["depth", "age"])
    assert ImageDataset(path, use_labels=True, classes=["age", "depth"]).label_table().tolist() == [[0.5, 1], [2, 0]]
    with pytest.raises(UserError, match=r"v\.zip has labels of depth, age; expected those of age, size: "):
        ImageDataset(path, use_labels=True, classes=["age", "size"])


@pytest.mark.parametrize(("count", "batch", "scored"), [(300, 16, MOST_IMAGES), (300, 48, 240), (20, 8, 16)])
def test_validation_takes_whole_passes_of_a_limited_choice(tmp_path, count, batch, scored):
    passes = Validation(dataset_of(tmp_path, count), batch=batch, seed=1).passes
    assert sum(len(rows) for rows in passes) == scored
    assert len({row for rows in passes for row in rows.tolist()}) == scored
