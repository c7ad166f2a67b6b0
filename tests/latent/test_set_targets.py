"""latent.targets: which images are projected, and from which classes of the network."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dnnlib.cli import UserError
from generation.network import Classes
from imagesets.reader import ImageSet
from latent.targets import _equal_counts, choose_targets, count_left_out, fingerprint, parse_start, starts_of_target
from tests.helpers.make_sets import enclose, make_set, pixels_of, png

NETWORK = Classes(2, {"classes": ["nv", "mel"]})
PLAIN = Classes(0, {})
NUMBERED = Classes(3, {})
LABELS = [1, 0, 1, 0, 0, 1, 0, 0]


def choose(images, classes=NETWORK, *, chosen=None, count=None, group_by_class=False, seed=303):
    return choose_targets(images, classes, start=parse_start(classes, chosen), count=count,
                          group_by_class=group_by_class, seed=seed)


def refusal(*arguments, **options):
    with pytest.raises(UserError) as caught:
        choose(*arguments, **options)
    return str(caught.value)


def indices(targets):
    """Return which images of `make_set` they are."""
    return [int(target.name[-12:-4]) for target in targets]


def starts(targets):
    return [target.starts for target in targets]


@pytest.fixture
def images(tmp_path):
    """Eight images; the set's numbers of the classes are the other way round."""
    return ImageSet(make_set(tmp_path / "set.zip", 8, labels=LABELS, classes=["mel", "nv"], groups=list("aabbccdd")))


@pytest.fixture
def bare(tmp_path):
    return ImageSet(make_set(tmp_path / "bare.zip", 5))


def with_metadata(folder, metadata, count=4):
    """Return a folder of images with a dataset.json of its own."""
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:08d}.png").write_bytes(png(pixels_of(index)))
    (folder / "dataset.json").write_text(json.dumps(metadata))
    return ImageSet(folder)


def test_targets_are_all_images_in_order_with_their_own_classes(images):
    found = choose(images)
    assert [target.name for target in found] == images.names
    assert [target.group for target in found] == list("aabbccdd")
    assert [target.label for target in found] == LABELS
    assert [target.class_name for target in found] == [["mel", "nv"][label] for label in LABELS]
    assert [target.own for target in found] == [(1, 0)[label] for label in LABELS]  # by name, not by number
    assert starts(found) == [(target.own,) for target in found]
    assert count_left_out(images, NETWORK, None) == 0


def test_class_auto_begins_each_image_from_each_class(images, bare):
    for some in (images, bare):
        found = choose(some, chosen="auto")
        assert len(found) == len(some)
        assert set(starts(found)) == {(0, 1)}
    assert {(target.class_name, target.own) for target in found} == {(None, None)}


@pytest.mark.parametrize("chosen", ["nv", "0", " nv"])
def test_class_named_takes_its_images_alone(images, chosen):
    found = choose(images, chosen=chosen)
    assert indices(found) == [index for index, label in enumerate(LABELS) if label == 1]
    assert set(starts(found)) == {(0,)}


def test_class_named_begins_all_images_of_a_set_without_labels(bare):
    found = choose(bare, chosen="mel")
    assert (indices(found), set(starts(found))) == (list(range(5)), {(1,)})
    assert [target.group for target in found] == bare.names


def test_class_named_leaves_images_without_a_label_out(tmp_path):
    some = ImageSet(make_set(tmp_path / "some.zip", 4, labels=[0, None, 1, 0], classes=["mel", "nv"]))
    assert indices(choose(some, chosen="mel")) == [0, 3]
    found = choose(some, chosen="auto")
    assert [(target.label, target.class_name) for target in found] == [(0, "mel"), (None, None), (1, "nv"), (0, "mel")]


def test_network_without_classes_begins_from_its_mean(images, bare):
    for some in (images, bare):
        found = choose(some, PLAIN)
        assert (len(found), set(starts(found))) == (len(some), {(None,)})
        assert count_left_out(some, PLAIN, None) == 0
    found = choose(images, PLAIN)[0]
    assert (found.class_name, found.label, found.own) == ("nv", 1, None)


def test_classes_without_names_fit_by_number(images, tmp_path):
    assert starts(choose(images, NUMBERED)) == [(label,) for label in LABELS]
    numbers = ImageSet(make_set(tmp_path / "numbers.zip", 3, labels=[1, 0, 1]))
    found = choose(numbers)
    assert [(target.class_name, target.starts) for target in found] == [("1", (1,)), ("0", (0,)), ("1", (1,))]


def test_labels_that_are_one_hot_lists_are_classes(tmp_path):
    rows = [[0, 1], [1.0, 0.0], [0.5, 0.5], None]
    some = with_metadata(tmp_path / "set", {"labels": [[f"{i:08d}.png", row] for i, row in enumerate(rows)]})
    found = choose(some, chosen="auto")
    assert [target.class_name for target in found] == ["1", "0", None, None]
    assert [target.label for target in found] == [(0, 1), (1, 0), (0.5, 0.5), None]  # as in dataset.json
    assert indices(choose(some, chosen="nv")) == [1]
    assert indices(choose(some)) == [0, 1]
    assert count_left_out(some, NETWORK, None) == 2


def test_images_of_classes_that_the_network_does_not_know_are_left_out(tmp_path):
    some = ImageSet(make_set(tmp_path / "set.zip", 4, labels=[0, 1, None, 0], classes=["mel", "bcc"]))
    assert indices(choose(some)) == indices(choose(some, chosen="mel")) == [0, 3]
    assert count_left_out(some, NETWORK, None) == 2
    assert count_left_out(some, NETWORK, "auto") == count_left_out(some, NETWORK, 1) == 0
    found = choose(some, chosen="auto")
    assert starts(found) == [(0, 1)] * 4
    assert [target.own for target in found] == [1, None, None, 1]
    assert refusal(some, chosen="nv") == (f"{some.path} holds no images of class nv; expected one of mel, bcc, or "
                                          "leave --class out")


def test_images_whose_classes_are_all_unknown_begin_where_they_are_told(tmp_path):
    some = ImageSet(make_set(tmp_path / "set.zip", 3, labels=[0, 1, None], classes=["scc", "bcc"]))
    found = choose(some, chosen="mel")
    assert (indices(found), starts(found)) == ([0, 1, 2], [(1,)] * 3)
    assert refusal(some) == (f"{some.path} has images of scc, bcc, which the network does not know; expected one of "
                             "nv, mel, or a number from 0 to 1: give --class=NAME to start from, or --class=auto to "
                             "try each")


def test_numbers_that_the_network_does_not_know_are_named(tmp_path):
    some = ImageSet(make_set(tmp_path / "set.zip", 2, labels=[4, 3]))
    assert refusal(some, NUMBERED) == (f"{some.path} has images of 3, 4, which the network does not know; expected "
                                       "a number from 0 to 2: give --class=NAME to start from, or --class=auto to try "
                                       "each")


def test_set_without_classes_needs_one_to_begin_from(bare):
    assert refusal(bare) == (f"{bare.path} has no classes, and the network starts from one; expected one of nv, mel, "
                             "or a number from 0 to 1: give --class=NAME to start from, or --class=auto to try each")
    assert count_left_out(bare, NETWORK, None) == 5


@pytest.mark.parametrize(("names", "text", "expected"), [
    (["nv", "mel"], None, None), (["nv", "mel"], "auto", "auto"), (["nv", "mel"], " Auto ", "auto"),
    (["nv", "auto"], "auto", 1), (["all", "mel"], "all", 0), (["nv", "mel"], "mel", 1), (["nv", "mel"], "0", 0),
    (None, "1", 1), (None, "auto", "auto")])
def test_start_is_a_class_or_auto(names, text, expected):
    classes = Classes(2, {"classes": names})
    assert parse_start(classes, text) == expected
    if expected is not None:
        assert starts_of_target(classes, text) == ([0, 1] if expected == "auto" else [expected])


def test_start_of_a_network_without_classes_is_none():
    assert parse_start(PLAIN, None) is None
    assert starts_of_target(PLAIN, None) == [None]


def test_start_of_one_image_must_be_given():
    with pytest.raises(UserError) as caught:
        starts_of_target(NETWORK, None)
    assert str(caught.value) == ("--class is missing, and this network makes images of a class; expected one of nv, "
                                 "mel, or a number from 0 to 1, or auto to try each")


@pytest.mark.parametrize(("options", "message"), [
    ({"chosen": "all"}, "--class is all; expected one class, or auto to try each"),
    ({"chosen": "nv,mel"}, "--class names 2 classes; expected one, or auto to try each"),
    ({"chosen": "bcc"}, "--class names the class 'bcc'; expected one of nv, mel, or a number from 0 to 1"),
    ({"count": 0}, "--count is 0; expected at least 1"),
    ({"classes": PLAIN, "chosen": "auto"}, "--class is auto, but this network was trained without classes; leave "
                                           "--class out")])
def test_class_or_count_that_cannot_be_is_refused(images, options, message):
    assert refusal(images, **options) == message


def test_group_by_class_needs_a_class_of_each_image(bare, tmp_path):
    assert refusal(bare, chosen="nv", group_by_class=True) == (
        f"{bare.path} has 5 images without a class; expected one each for --group-by-class")
    some = ImageSet(make_set(tmp_path / "some.zip", 3, labels=[0, None, None], classes=["mel"]))
    assert refusal(some, chosen="auto", group_by_class=True) == (
        f"{some.path} has 2 images without a class; expected one each for --group-by-class")


def test_count_draws_by_the_seed_and_keeps_the_order(images):
    drawn = {seed: indices(choose(images, count=5, seed=seed)) for seed in range(20)}
    assert all(len(set(some)) == 5 and some == sorted(some) for some in drawn.values())
    assert indices(choose(images, count=5, seed=3)) == drawn[3]
    assert len({tuple(some) for some in drawn.values()}) > 10
    times = np.bincount(np.concatenate(list(drawn.values())), minlength=8)
    assert times.min() >= 5  # 12.5 on average: none is preferred or left out
    assert indices(choose(images, count=5, seed=2**32 + 3)) == drawn[3]


@pytest.mark.parametrize("count", [8, 9])
def test_count_of_all_or_more_takes_all(images, count):
    assert choose(images, count=count) == choose(images)


def test_count_of_one_class_counts_its_images(images):
    found = choose(images, chosen="mel", count=2)
    assert len(found) == 2
    assert {target.label for target in found} == {0}
    assert len(choose(images, chosen="mel", count=6)) == 5


def test_group_by_class_takes_equally_many_class_by_class(images):
    found = choose(images, group_by_class=True, count=5)
    assert [target.label for target in found] == [0, 0, 0, 1, 1]
    assert indices(found[:3]) == sorted(indices(found[:3]))
    assert [target.label for target in choose(images, group_by_class=True, count=7)] == [0] * 4 + [1] * 3
    everything = choose(images, group_by_class=True)
    assert indices(everything) == [1, 3, 4, 6, 7, 0, 2, 5]
    drawn = {tuple(indices(choose(images, group_by_class=True, count=4, seed=seed))) for seed in range(10)}
    assert len(drawn) > 5


@pytest.mark.parametrize(("available", "count", "expected"), [
    ([5, 5, 5], 6, [2, 2, 2]), ([5, 5, 5], 7, [3, 2, 2]), ([5, 5, 5], 8, [3, 3, 2]), ([1, 5, 2], 7, [1, 4, 2]),
    ([1, 9, 9], 10, [1, 5, 4]), ([3, 4], None, [3, 4]), ([3, 4], 99, [3, 4]), ([4, 4], 1, [1, 0]), ([], 3, [])])
def test_equal_counts_go_as_far_as_there_are(available, count, expected):
    assert _equal_counts(available, count) == expected


def test_fingerprint_tells_sets_apart(images, tmp_path):
    everything = choose(images)
    first = fingerprint(images, everything)
    assert len(first) == 64
    assert fingerprint(ImageSet(shutil.copy(images.path, tmp_path / "copy.zip")), everything) == first
    others = {first, fingerprint(images, everything[:-1]), fingerprint(images, everything[::-1])}
    for changes in ({"labels": [0] * 8}, {"groups": list("aabbccde")}, {"classes": ["mel", "other"]}, {"size": 9}):
        options = {"labels": LABELS, "classes": ["mel", "nv"], "groups": list("aabbccdd"), **changes}
        other = ImageSet(make_set(tmp_path / "other.zip", 8, **options))
        others.add(fingerprint(other, choose(other, chosen="auto")))
    assert len(others) == 7


def test_fingerprint_of_a_zip_follows_its_pixels(images, tmp_path):
    with zipfile.ZipFile(images.path) as old, zipfile.ZipFile(tmp_path / "other.zip", "w") as new:
        for name in old.namelist():
            data = bytearray(old.read(name))
            if name == images.names[4]:
                data[-20] ^= 1
            new.writestr(name, bytes(data))
    other = ImageSet(tmp_path / "other.zip")
    assert fingerprint(other, choose(other)) != fingerprint(images, choose(images))


def test_fingerprint_of_a_folder_follows_names_sizes_and_times_without_reading(tmp_path, monkeypatch):
    some = with_metadata(tmp_path / "set", {"labels": None})
    monkeypatch.setattr(ImageSet, "read", lambda *_: pytest.fail("it reads a file"))
    first = fingerprint(some, choose(some, chosen="nv"))
    assert fingerprint(some, choose(some, chosen="nv")) == first
    with open(Path(some.path, some.names[2]), "ab") as file:
        file.write(b"more")
    second = fingerprint(some, choose(some, chosen="nv"))
    os.utime(some.path / some.names[1], ns=(0, 0))
    third = fingerprint(some, choose(some, chosen="nv"))
    assert len({first, second, third}) == 3


def test_fingerprint_takes_files_that_went_away(tmp_path):
    some = with_metadata(tmp_path / "set", {"labels": None})
    (some.path / some.names[0]).unlink()  # reading it will say so
    assert len(fingerprint(some, choose(some, chosen="nv"))) == 64


def test_fingerprint_takes_names_that_are_no_text(tmp_path):
    (tmp_path / "set").mkdir()
    name = b"\xff.png".decode(errors="surrogateescape")
    try:
        (tmp_path / "set" / name).write_bytes(png(pixels_of(0)))
    except OSError:
        pytest.skip("this file system takes no such name")
    some = ImageSet(tmp_path / "set")
    assert len(fingerprint(some, choose(some, chosen="nv"))) == 64


@pytest.mark.parametrize("name", ["inside.zip", "inside"])
def test_targets_of_a_set_in_a_folder_inside_have_its_classes_and_groups(images, tmp_path, name):
    inside = ImageSet(enclose(images.path, tmp_path / name))
    targets = choose(inside, group_by_class=True, count=4)
    assert targets == choose(images, group_by_class=True, count=4)
    first = fingerprint(inside, targets)
    if inside.is_zip:
        assert first == fingerprint(images, targets)
    else:
        os.utime(tmp_path / name / "set" / targets[0].name, (1, 1))
        assert first != fingerprint(inside, targets)
