"""The real images to compare with, by class, and held-out ones."""

import pytest

from dnnlib.cli import UserError
from metrics.image_sources import SetImages
from metrics.names import parse_metrics
from metrics.reference import Reference
from tests.helpers.make_sets import make_set

CLASSES = ["benign", "melanoma"]


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set") / "a.zip", 6, labels=[0, 1, 0, 0, 1, 0], classes=CLASSES)


def make_reference(data, **settings):
    requests = parse_metrics("kid2_full")
    reference = Reference(requests, data, **{"mirror": False, "chosen": None, "seed": 0, "per_class": True, **settings})
    if reference.holdout is not None:
        reference.check_holdout(requests)
    return reference


def test_classes_of_another_set_are_found_by_name_else_by_number(labeled, tmp_path):
    reference = make_reference(labeled)
    assert reference.class_names == CLASSES
    other = SetImages(make_set(tmp_path / "b.zip", 4, labels=[0, 1, 1, 2], classes=["melanoma", "benign", "nevus"]))
    assert {name: items.tolist() for name, items in reference.class_items(other).items()} == {
        "benign": [1, 2], "melanoma": [0]}
    assert reference.notes_on_classes(other) == [
        f"{other.path} has classes that are not in {labeled} (nevus); --per-class leaves them out"]
    nameless = SetImages(make_set(tmp_path / "c.zip", 4, labels=[0, 1, 1, None]))
    assert {name: items.tolist() for name, items in reference.class_items(nameless).items()} == {
        "benign": [0], "melanoma": [1, 2]}
    assert reference.notes_on_classes(nameless) == [
        f"{nameless.path}: 1 of 4 images have no label; --per-class leaves them out",
        f"classes are matched by number, since {nameless.path} does not name its own"]
    assert reference.class_items(SetImages(labeled), 2, True)["melanoma"].tolist() == (
        SetImages(labeled).select(2, mirror=True, label=1).items.tolist())


def test_labels_by_class_are_the_networks(labeled):
    """Classes that have other numbers in the network keep their names."""
    reference = make_reference(labeled)
    reference.labels_of_fakes(2, {"classes": CLASSES[::-1]})
    found = {name: labels.table.tolist() for name, labels in reference.labels_by_class(2).items()}
    assert found == {"benign": [[0, 1]], "melanoma": [[1, 0]]}


@pytest.mark.parametrize(("labels", "what"), [(None, "no labels"), ([[0.5, 1.0]] * 3, "vectors as labels")])
def test_reference_by_class_without_classes_raises(labels, what, labeled, tmp_path):
    plain = make_set(tmp_path / "plain.zip", images=[11, 12, 13], labels=labels)
    message = f"{plain} has {what}, but --per-class is given; expected classes: leave --per-class out"
    for make in (lambda: make_reference(plain), lambda: make_reference(labeled, holdout=plain),
                 lambda: make_reference(labeled).check_class(SetImages(plain))):
        with pytest.raises(UserError) as caught:
            make()
        assert str(caught.value) == message


@pytest.mark.parametrize(("c_dim", "info", "message"), [
    (0, {}, "--per-class is given, but the network was trained without classes; leave --per-class out, or use a "
            "network that was trained with train.py --cond=1"),
    (2, {"label_kind": "vector"}, "--per-class is given, but the network's labels are vectors, not classes; leave "
                                  "--per-class out")])
def test_labels_of_fakes_by_class_for_a_network_without_classes_raises(labeled, c_dim, info, message):
    with pytest.raises(UserError) as caught:
        make_reference(labeled).labels_of_fakes(c_dim, info)
    assert str(caught.value) == message


@pytest.mark.parametrize(("held", "settings", "message"), [
    ({"images": [20, 3, 5]}, {}, "--holdout={held}: 2 of 3 images are also in --data={data}; expected other images, "
     "since the floor would be too low: hold out part of one data set with dataset_tool.py split"),
    ({"images": [20, 21, 22], "groups": ["p1", "q", "p1"]}, {}, "--holdout={held}: 1 groups (patients or lesions) are "
     "also in --data={data} (p1), with 2 of 3 images; expected other groups, since the floor would be too low: hold "
     "out part of one data set with dataset_tool.py split"),
    ({"images": [20, 21], "size": 16}, {}, "{data} has 8x8 RGB images, but --holdout={held} has 16x16 RGB ones; "
     "expected the same: convert the data set with dataset_tool.py"),
    ({"images": [20]}, {}, "metric kid2_full needs at least 2 held-out images and {held} has 1; expected more"),
    ({"images": [20, 21], "classes": ["x", "y"], "labels": [1, 1]}, {"chosen": "1", "per_class": False},
     "--class is 1, which is melanoma in {data} and y in {held}; expected the same class in both: give its name"),
], ids=["images", "groups", "size", "few", "class"])
def test_reference_holdout_that_gives_no_floor_raises(tmp_path, held, settings, message):
    data = make_set(tmp_path / "a.zip", 6, labels=[0, 1, 0, 0, 1, 0], classes=CLASSES,
                    groups=["p1", "p2", "p3", None, None, None])
    held = make_set(tmp_path / "h{p}.zip", **{"labels": [0] * len(held["images"]), "classes": CLASSES, **held})
    with pytest.raises(UserError) as caught:
        make_reference(data, holdout=held, **settings)
    assert str(caught.value) == message.format(data=data, held=held)


def test_reference_holdout_that_is_the_data_set_raises(labeled):
    with pytest.raises(UserError, match=r"^--holdout=.*a.zip: 6 of 6 images are also in --data=.*a.zip; expected "):
        make_reference(labeled, holdout=labeled)
