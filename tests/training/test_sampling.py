"""training.sampling: the order of images, batches of them, the labels of fakes, and --balance."""

import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from tests.helpers.make_sets import make_set
from training.dataset import ImageDataset
from training.sampling import LabelDistribution, TrainingOrder, image_weights, iterate_batches


def test_order_shows_every_item_once_a_round():
    order = TrainingOrder(50, seed=1)
    first, second = order.items(0, 50), order.items(50, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first.tolist() != second.tolist()


def test_order_starts_anywhere():
    order = TrainingOrder(7, seed=1)
    whole = order.items(0, 40)
    for start, count in ((0, 1), (3, 9), (6, 1), (20, 20), (5, 0)):
        assert TrainingOrder(7, seed=1).items(start, count).tolist() == whole[start:start + count].tolist()


def test_order_depends_on_the_seed_and_survives_pickling():
    order = TrainingOrder(30, seed=1)
    assert order.items(0, 30).tolist() != TrainingOrder(30, seed=2).items(0, 30).tolist()
    assert pickle.loads(pickle.dumps(order)).items(11, 5).tolist() == order.items(11, 5).tolist()


def test_order_weights_are_met_within_one_in_every_round():
    weights = np.array([5.0, 1.0, 0.0, 0.3, 2.2, 1.5])
    order = TrainingOrder(6, seed=4, weights=weights)
    expected = weights / weights.sum() * 6
    for number in range(20):
        counts = np.bincount(order.items(6 * number, 6), minlength=6)
        assert (np.abs(counts - expected) < 1).all()
        assert counts[2] == 0


def test_order_weights_are_met_in_the_long_run():
    # A majority class whose images each come less than once a round: all of them must come up in the end.
    weights = np.concatenate([np.full(90, 0.5 / 90), np.full(10, 0.5 / 10)])
    seen = TrainingOrder(100, seed=0, weights=weights).items(0, 100 * 200)
    share = np.bincount(seen, minlength=100) / len(seen)
    assert abs(share[90:].sum() - 0.5) < 1e-9
    # An image of the majority is drawn with probability 5/9 in each of 200 rounds: 4 standard errors of 111 are 28.
    assert np.abs(share[:90] * len(seen) - 200 * 5 / 9).max() < 4 * (200 * 5 / 9 * 4 / 9) ** 0.5


def test_order_weighted_items_are_shuffled():
    order = TrainingOrder(1000, seed=0, weights=np.ones(1000))
    items = order.items(0, 1000)
    assert sorted(items) == list(range(1000))
    assert abs(np.corrcoef(np.arange(1000), items)[0, 1]) < 4 / 1000**0.5


@pytest.mark.parametrize("weights", [np.ones(3), np.array([1, -1, 0, 0.0]), np.zeros(4), np.array([1, np.nan, 0, 0])])
def test_order_refuses_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="expected 4 finite numbers >= 0, not all 0"):
        TrainingOrder(4, seed=0, weights=weights)


def test_label_distribution_is_that_of_the_images():
    labels = torch.eye(3)[[0, 0, 0, 1]]
    distribution = LabelDistribution(labels)
    assert {tuple(value.tolist()): p.item() for value, p in zip(distribution.values, distribution.probabilities)} == {
        (1, 0, 0): 0.75, (0, 1, 0): 0.25}
    drawn = distribution.draw(4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 3)
    assert abs(drawn[:, 0].mean().item() - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5


def test_label_distribution_follows_weights():
    distribution = LabelDistribution(torch.eye(2)[[0, 0, 0, 1]], np.array([1.0, 1.0, 1.0, 3.0]))
    torch.testing.assert_close(distribution.probabilities, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert len(LabelDistribution(torch.eye(2)[[0, 1]], np.array([1.0, 0.0])).values) == 1


def test_label_distribution_without_labels_gives_empty_ones():
    assert LabelDistribution(torch.zeros(5, 0)).draw(3, torch.Generator()).shape == (3, 0)


def test_iterate_batches_is_one_order_for_any_number_of_processes_and_workers(tmp_path):
    dataset = ImageDataset(make_set(tmp_path / "a.zip", 10, labels=list(range(10))), use_labels=True)
    order = TrainingOrder(10, seed=3)

    def seen(nimg, rows, workers=0, iterations=3):
        batches = iterate_batches(dataset, order, nimg=nimg, batch=4, rows=rows, num_workers=workers)
        return [next(batches)[1].argmax(1).tolist() for _ in range(iterations)]

    whole = seen(0, range(4))
    assert whole == [order.items(start, 4).tolist() for start in (0, 4, 8)]
    assert seen(0, range(4), workers=2) == whole
    halves = [seen(0, range(2)), seen(0, range(2, 4))]
    assert [a + b for a, b in zip(*halves)] == whole
    assert seen(4, range(4), iterations=2) == whole[1:]


def test_workers_ignore_signals_to_all_processes_and_obey_their_parent(tmp_path):
    dataset = ImageDataset(make_set(tmp_path / "a.zip", 4))
    before = {worker.pid for worker in multiprocessing.active_children()}
    batches = iterate_batches(dataset, TrainingOrder(4, seed=0), nimg=0, batch=2, rows=range(2), num_workers=1)
    next(batches)
    worker, = (worker for worker in multiprocessing.active_children() if worker.pid not in before)
    sender = f"import os; [os.kill({worker.pid}, number) for number in (2, 10, 15)]"
    subprocess.run([sys.executable, "-c", sender], check=True)
    assert len([next(batches) for _ in range(20)]) == 20
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=20)
    assert worker.exitcode == 0


@pytest.fixture
def dataset(tmp_path):
    path = make_set(tmp_path / "a.zip", 6, labels=[0, 0, 0, 0, 1, 1], classes=["benign", "melanoma", "other"])
    return ImageDataset(path, use_labels=True)


def test_balance_none_is_no_weights(dataset):
    assert image_weights("none", dataset) is None


def test_balance_classes_gives_every_class_with_images_the_same_share(dataset):
    assert image_weights("classes", dataset).tolist() == [0.25] * 4 + [0.5] * 2


def test_balance_works_without_labels_in_use_and_with_mirroring(dataset):
    mirrored = ImageDataset(dataset.path, xflip=True)
    assert image_weights("classes", mirrored).tolist() == ([0.25] * 4 + [0.5] * 2) * 2


def test_balance_file_of_classes_divides_shares_among_images(dataset, tmp_path):
    (tmp_path / "w.csv").write_text("class,weight\nmelanoma,0.8\nbenign,0.2\n")
    np.testing.assert_allclose(image_weights(tmp_path / "w.csv", dataset), [0.05] * 4 + [0.4] * 2)


def test_balance_file_may_give_a_class_without_images_a_weight(dataset, tmp_path):
    (tmp_path / "w.csv").write_text("class,weight\nother,5\nmelanoma,0.8\nbenign,0.2\n")  # one for all institutions
    np.testing.assert_allclose(image_weights(tmp_path / "w.csv", dataset), [0.05] * 4 + [0.4] * 2)


def test_balance_file_of_images_is_taken_as_it_is(dataset, tmp_path):
    (tmp_path / "w.csv").write_text("file,weight\n00000/img00000001.png,3\n00000/img00000005.png,0.5\n")
    assert image_weights(tmp_path / "w.csv", dataset).tolist() == [0, 3, 0, 0, 0, 0.5]


@pytest.mark.parametrize(("text", "message"), [
    ("name,weight\n", "has the columns name, weight; expected class,weight or file,weight"),
    ("", "has the columns none; expected class,weight or file,weight"),
    ("class,weight\nnevus,1\n",
     "lists the class nevus, which is not in the data set; expected benign, melanoma, other"),
    ("file,weight\nx.png,1\n", "lists the file x.png, which is not in the data set; expected 00000/img00000000.png, "
     "00000/img00000001.png, 00000/img00000002.png, 00000/img00000003.png, 00000/img00000004.png, ..."),
    ("class,weight\nbenign,-1\n", ", line 2 is benign,-1; expected class,weight with a number >= 0"),
    ("class,weight\nbenign,many\n", ", line 2 is benign,many; expected class,weight with a number >= 0"),
    ("class,weight\nbenign,1,2\n", ", line 2 is benign,1,2; expected class,weight with a number >= 0"),
    ("class,weight\nbenign,1\nbenign,2\n", ", line 3 lists class benign a second time"),
    ("class,weight\nbenign,0\n", ": all weights are 0; expected at least one above 0"),
])
def test_balance_file_that_does_not_fit_is_refused(dataset, tmp_path, text, message):
    path = tmp_path / "w.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        image_weights(path, dataset)
    assert str(caught.value) == f"--balance={path}{'' if message.startswith((',', ':')) else ' '}{message}"


def test_balance_errors_name_what_is_missing(dataset, tmp_path):
    (tmp_path / "w.csv").write_text("class,weight\nother,1\n")
    with pytest.raises(UserError) as caught:
        image_weights(tmp_path / "w.csv", dataset)
    expected = f"class other has a weight, but no images in {dataset.path}"
    assert str(caught.value) == f"--balance={tmp_path / 'w.csv'}: {expected}"
    with pytest.raises(UserError, match=r"expected none, classes, or a CSV file$"):
        image_weights(tmp_path / "absent.csv", dataset)
    plain = ImageDataset(make_set(tmp_path / "plain.zip", 2))
    with pytest.raises(UserError, match=r"has no classes; expected integer labels$"):
        image_weights("classes", plain)
