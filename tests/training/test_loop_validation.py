"""training.loop: scores on held-out images."""

import pytest
import torch

from dnnlib.cli import UserError
from tests.helpers.make_sets import make_set
from tests.helpers.small_networks import small_discriminator
from torch_utils.images import to_unit_range
from training.dataset import ImageDataset
from training.loop import MOST_IMAGES, Validation


def dataset_of(tmp_path, count):
    labels = [index % 2 for index in range(count)]
    return ImageDataset(make_set(tmp_path / "a.zip", count, size=16, labels=labels), use_labels=True)


def logits_of(D, dataset, rows):
    pixels, labels = (torch.stack([torch.tensor(dataset[row][part]) for row in rows]) for part in (0, 1))
    return D(to_unit_range(pixels), labels).flatten()


def test_validation_scores_all_images_in_groups_of_the_training(tmp_path):
    dataset, D = dataset_of(tmp_path, 10), small_discriminator()
    valid = Validation(dataset, group=4, seed=0)
    scores, rows = valid.score(D, torch.device("cpu")), valid.rows.tolist()
    assert sorted(rows) == list(range(10))
    assert rows != list(range(10))  # sets may come class by class
    full = [logits_of(D, dataset, rows[start:start + 4]) for start in (0, 4)]
    last = logits_of(D, dataset, [*rows[8:], *rows[:2]])[:2]
    torch.testing.assert_close(scores, torch.cat([*full, last]))
    assert not scores.requires_grad


def test_validation_of_fewer_images_than_a_group_repeats_them_and_counts_each_once(tmp_path):
    dataset, D = dataset_of(tmp_path, 3), small_discriminator()
    valid = Validation(dataset, group=8, seed=0)
    rows = valid.rows.tolist()
    torch.testing.assert_close(valid.score(D, "cpu"), logits_of(D, dataset, [*rows, *rows, *rows[:2]])[:3])
    assert sorted(rows) == [0, 1, 2]


def test_validation_labels_are_those_of_the_training_classes_by_name(tmp_path):
    """The discriminator gets the label of "mel" as in training, whatever its number is in this set."""
    train, D = ["nv", "mel", "bcc"], small_discriminator(c_dim=3)
    labels = [0, 1, 2, 0, 1, 2]
    same = make_set(tmp_path / "same.zip", 6, size=16, labels=labels, classes=train)
    other = make_set(tmp_path / "other.zip", 6, size=16, labels=[2, 0, 1, 2, 0, 1], classes=["mel", "bcc", "nv"])
    part = make_set(tmp_path / "part.zip", 2, size=16, labels=[1, 0], classes=["mel", "nv"])
    scores = []
    for path in (same, other, part):
        valid = Validation(ImageDataset(path, use_labels=True, classes=train), group=1, seed=0)
        scores.append(dict(zip(valid.rows.tolist(), valid.score(D, "cpu").tolist(), strict=True)))
    assert scores[0] == scores[1]
    assert scores[2] == {row: scores[0][row] for row in (0, 1)}


def test_validation_vectors_are_in_the_order_of_the_training_ones(tmp_path):
    path = make_set(tmp_path / "v.zip", 2, size=16, labels=[[1, 0.5], [0, 2]], classes=["depth", "age"])
    assert ImageDataset(path, use_labels=True, classes=["age", "depth"]).label_table().tolist() == [[0.5, 1], [2, 0]]
    with pytest.raises(UserError, match=r"v\.zip has labels of depth, age; expected those of age, size: "):
        ImageDataset(path, use_labels=True, classes=["age", "size"])


@pytest.mark.parametrize("group", [4, 12])
def test_validation_takes_a_fixed_choice_of_a_large_set(tmp_path, group):
    dataset = dataset_of(tmp_path, 300)
    rows, again, other = (Validation(dataset, group=size, seed=seed).rows.tolist()
                          for size, seed in ((group, 1), (1, 1), (group, 2)))
    assert rows == again
    assert len(set(rows)) == len(rows) == MOST_IMAGES
    assert set(rows) != set(other)
