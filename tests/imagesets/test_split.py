"""imagesets.split, split_units, split_targets, split_deal: groups stay whole, and parts are alike."""

from collections import defaultdict

import numpy as np
import pytest

from dnnlib.cli import UserError
from imagesets.deal import deal
from imagesets.reader import NO_LABEL
from imagesets.split import LEFT_OUT, assign
from tests.helpers.split_cases import THREE, Labels, make_request, unique_digests


def random_labels(seed):
    """Return labels and groups of a random structure: pure or mixed groups, of even or very different sizes."""
    random = np.random.RandomState(seed)
    num_classes = random.randint(1, 6)
    frequency = random.dirichlet(np.ones(num_classes))
    labels, groups = [], []
    for group in range(random.randint(40, 200)):
        main, purity = random.choice(num_classes, p=frequency), random.choice([1, 0.7])
        for _ in range(random.geometric([0.9, 0.5, 0.15][seed % 3])):
            labels.append(main if random.rand() < purity else random.randint(num_classes))
            groups.append(f"patient{group}")
    order = random.permutation(len(labels))
    return Labels(np.array(labels)[order], [groups[index] for index in order])


@pytest.mark.parametrize("seed", range(24))
def test_assign_random_structures_keeps_groups_whole_and_parts_alike(seed):
    images = random_labels(seed)
    digests = unique_digests(len(images), seed)
    linked = np.random.RandomState(seed).choice(len(images), 3, replace=False)
    digests[linked] = digests[linked[0]]
    shares = [(0.8, 0.1, 0.1), (0.5, 0.5), (0.6, 0.2, 0.1, 0.1)][seed % 3]
    parts = ",".join(f"p{index}:{share}" for index, share in enumerate(shares))
    asked = make_request(parts, seed=seed, allow_missing=True)
    result = assign(images, digests, asked)

    assert result.part_of.shape == (len(images),)
    assert set(result.part_of) == set(range(len(asked.parts)))
    parts_of_group = defaultdict(set)
    for group, part in zip(images.groups, result.part_of, strict=True):
        parts_of_group[group].add(part)
    assert all(len(parts) == 1 for parts in parts_of_group.values())
    assert len(set(result.part_of[linked])) == 1
    largest = np.bincount(result.unit_of).max()
    for part, share in enumerate(shares):
        inside = result.part_of == part
        assert abs(inside.sum() - share * len(images)) <= largest
        for label in np.unique(images.labels):
            # What whole groups allow: a class is off by less than one of the largest groups.
            of_class = images.labels == label
            assert abs((inside & of_class).sum() - share * of_class.sum()) <= largest
            units = set(result.unit_of[of_class])
            assert (inside & of_class).any() or len(units) < len(shares)


def test_assign_single_images_reaches_shares_to_one_image():
    images = Labels(np.repeat([0, 1, 2], [700, 200, 100]))
    result = assign(images, unique_digests(1000), make_request(THREE))
    assert result.reached[:3].tolist() == [[800, 800, 560, 160, 80], [100, 100, 70, 20, 10], [100, 100, 70, 20, 10]]


def test_assign_deals_each_size_of_group_in_proportion():
    # 40 groups of one image, 40 of three: a test set of single images only would not be like the training set.
    groups = [f"one{index}" for index in range(40)] + [f"three{index}" for index in range(40) for _ in range(3)]
    images = Labels(np.zeros(160, dtype=int), groups)
    result = assign(images, unique_digests(160), make_request("train:0.75,test:0.25"))
    inside = {group for group, part in zip(groups, result.part_of, strict=True) if part == 1}
    assert sorted(group.rstrip("0123456789") for group in inside) == ["one"] * 10 + ["three"] * 10


def test_assign_same_seed_same_result_other_seed_other_result():
    images, digests = random_labels(4), unique_digests(len(random_labels(4)))
    first = assign(images, digests, make_request(THREE, allow_missing=True)).part_of
    assert (first == assign(images, digests, make_request(THREE, allow_missing=True)).part_of).all()
    others = [assign(images, digests, make_request(THREE, seed=seed, allow_missing=True)).part_of for seed in (1, 2, 3)]
    assert all((first != other).mean() > 0.1 for other in others)


def test_assign_order_is_that_of_a_stored_result():
    # A split is cited for years: the same groups and seed must give it on every machine and version.
    images = Labels(np.arange(20) % 2, [f"g{index}" for index in range(20)])
    result = assign(images, unique_digests(20), make_request("train:0.6,test:0.4", seed=7))
    assert "".join(map(str, result.part_of)) == "10010100001000111001"


def test_assign_identical_images_link_groups_in_a_chain():
    images = Labels(np.zeros(8, dtype=int), list("aabbccde"))
    digests = unique_digests(8)
    digests[2], digests[4] = digests[1], digests[3]  # a = b, b = c
    result = assign(images, digests, make_request("x:0.75,y:0.25"))
    assert result.num_linked == 2
    assert result.part_of.tolist() == [0] * 6 + [1, 1]


@pytest.mark.parametrize("skew", [None, "1=0.3,0.1,*"])
def test_assign_institutions_divide_the_first_part_and_leave_the_others(skew):
    images = Labels(np.repeat([0, 1], [500, 100]))
    digests = unique_digests(600)
    plain = assign(images, digests, make_request("train:0.9,test:0.1", seed=3)).part_of
    divided = assign(images, digests, make_request("train:0.9,test:0.1", institutions=3, sizes="0.1,0.3,0.6", skew=skew,
                                              seed=3))
    assert ((divided.part_of == 3) == (plain == 1)).all()
    assert divided.reached[:, 0].tolist() == [54, 162, 324, 60, 0]


def test_assign_skew_gives_the_shares_and_the_rest():
    images = Labels(np.repeat([0, 1, 2], [600, 100, 300]))
    result = assign(images, unique_digests(1000), make_request(institutions=3, sizes="0.1,0.3,0.6", skew="1=0.3,0.1,*"))
    # 30 and 30 of class 1, 40 are left; classes 0 and 2 fill up as 600 : 300.
    assert result.reached[:3, 2:].tolist() == [[47, 30, 23], [180, 30, 90], [373, 40, 187]]
    assert (result.part_of != LEFT_OUT).all()


def test_assign_skew_leave_out_keeps_the_shares_of_fewer_images():
    images = Labels(np.repeat([0, 1], [900, 100]))
    result = assign(images, unique_digests(1000), make_request(institutions=2, skew="1=0.6,0.2", leave_out=True))
    assert result.reached[:, 2:].tolist() == [[50, 75], [100, 25], [750, 0]]
    assert (result.part_of == LEFT_OUT).sum() == 750


def test_assign_lists_stratifies_each_number():
    random = np.random.RandomState(0)
    labels = (random.rand(400, 3) < [0.5, 0.1, 0.03]).astype(np.float32)
    result = assign(Labels(labels), unique_digests(400), make_request("train:0.75,test:0.25"))
    assert np.abs(result.reached[1] - 0.25 * result.reached.sum(axis=0)).max() <= 1


def test_assign_lists_does_not_take_a_measure_for_a_class():
    random = np.random.RandomState(0)
    ages = random.randint(20, 90, 100)
    ages[:99] = 0  # one group alone has an age above 0.5: no class that each part must hold
    labels = np.column_stack([random.rand(100) < 0.5, ages]).astype(np.float32)
    result = assign(Labels(labels), unique_digests(100), make_request("train:0.75,test:0.25"))
    assert list(result.classes) == ["0"]
    assert result.reached[:, 0].tolist() == [75, 25, 0]


def test_assign_without_labels_splits_by_size():
    images = Labels(None, [f"g{index // 2}" for index in range(100)])
    result = assign(images, unique_digests(100), make_request(THREE))
    assert result.reached.tolist() == [[80, 40], [10, 5], [10, 5], [0, 0]]


def test_assign_some_without_label_deals_them_like_a_class():
    images = Labels(np.repeat([0, NO_LABEL], [80, 20]))
    result = assign(images, unique_digests(100), make_request("a:0.5,b:0.5"))
    assert result.classes == ("0", "(no label)")
    assert result.reached.tolist() == [[50, 50, 40, 10], [50, 50, 40, 10], [0, 0, 0, 0]]


def test_assign_allow_missing_lets_a_rare_class_be_in_some_parts():
    images = Labels(np.repeat([0, 1], [98, 2]))
    result = assign(images, unique_digests(100), make_request(THREE, allow_missing=True))
    assert result.reached[:3, 0].tolist() == [80, 10, 10]
    assert result.reached[:3, 3].sum() == 2


def test_assign_gives_every_part_a_class_that_has_just_enough_groups():
    images = Labels(np.repeat([0, 1], [997, 3]))
    result = assign(images, unique_digests(1000), make_request(THREE))
    assert result.reached[:3, 3].tolist() == [1, 1, 1]


def test_assign_without_a_way_for_each_class_raises():
    # Three classes, each in two of three groups: in two parts, one class is always missing somewhere.
    images = Labels([0, 1, 1, 2, 2, 0], list("uuvvww"))
    with pytest.raises(UserError, match=r"no way was found to give part [ab] a group of [012] from the data set: ask "
                                        "for fewer parts or larger shares, or try another --seed"):
        assign(images, unique_digests(6), make_request("a:0.5,b:0.5"))


def test_deal_prefers_a_required_class_to_equal_sizes():
    counts = np.array([[9, 1, 9, 0], [1, 1, 0, 1], [1, 1, 0, 1]])
    targets = np.array([0.5, 0.5])[:, None] * counts.sum(axis=0)
    required = np.array([[False, False, False, True]] * 2)
    assert sorted(deal(counts, targets, required, np.arange(3))[1:]) == [0, 1]
