"""generation.network: classes by name and number, and how many images each gets."""

import pytest
import torch

from dnnlib.cli import UserError
from generation.network import Classes

NAMED = Classes(3, {"classes": ["nevus", "melanoma", "bcc"], "class_counts": [700, 200, 101]})
NUMBERED = Classes(3, {"classes": None})
NONE = Classes(0, {"classes": ["nevus", "melanoma", "bcc"], "class_counts": [1, 2, 3]})
LISTED = "expected one of nevus, melanoma, bcc, or a number from 0 to 2"
SYNTAX = "expected NAME:COUNT,NAME:COUNT,..., such as benign:5000,melanoma:5000"


def message(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(("classes", "text", "expected"), [
    (NAMED, "melanoma", [1]), (NAMED, " bcc", [2]), (NAMED, "0", [0]), (NAMED, "bcc,0", [2, 0]),
    (NAMED, "all", [0, 1, 2]),
    (NUMBERED, "2", [2]), (NUMBERED, "all", [0, 1, 2]), (NONE, None, [None]),
    (Classes(2, {"classes": ["1", "0"]}), "1", [0]),  # a name wins over a number
    (Classes(2, {"classes": ["all", "a,b"]}), "all", [0]), (Classes(2, {"classes": ["all", "a,b"]}), "a,b", [1]),
    (Classes(3, {"classes": ["nevus", "melanoma, NOS", "melanoma"]}), "melanoma,melanoma, NOS, 0", [2, 1, 0]),
])
def test_choose_finds_classes(classes, text, expected):
    assert classes.choose(text) == expected


def test_note_names_classes_that_had_no_training_images():
    two = Classes(3, {"classes": ["nevus", "melanoma", "bcc"], "class_counts": [7, 0, 0]})
    note = "the training set of this network has no images of class {}: images made for it may not show it"
    assert two.note_on_untrained([0, 2]) == note.format("bcc")
    assert two.note_on_untrained([2, 1, 2]) == note.format("bcc, melanoma")
    assert two.note_on_untrained([0, (0.5, 0.5, 0.0)]) is None
    assert NUMBERED.note_on_untrained([0, 1, 2]) is None  # no record
    assert NONE.note_on_untrained([None]) is None


def test_choose_repeated_classes_are_kept_where_they_are_allowed():
    assert NAMED.choose("bcc,0,2", repeated=True) == [2, 0, 2]


@pytest.mark.parametrize(("classes", "text", "expected"), [
    (NAMED, "melanom", f"--class names the class 'melanom' (did you mean melanoma?); {LISTED}"),
    (NAMED, "", f"--class names the class ''; {LISTED}"),
    (NAMED, "3", f"--class names the class '3'; {LISTED}"),
    (NAMED, "-1", f"--class names the class '-1'; {LISTED}"),
    (NAMED, None, f"--class is missing, but this network is class-conditional; {LISTED}"),
    (NAMED, "bcc,2", "--class=bcc,2 names a class twice; expected each once"),
    (NUMBERED, "3", "--class names the class '3'; expected a number from 0 to 2"),
    (NUMBERED, "melanoma", "--class names the class 'melanoma'; expected a number from 0 to 2"),
    (NUMBERED, None, "--class is missing, but this network is class-conditional; expected a number from 0 to 2, or "
                     "--label with 3 numbers, such as --label=0,1,0.5 if its labels are vectors"),
    (NONE, "0", "--class is 0, but this network was trained without classes; leave --class out"),
])
def test_choose_says_what_is_wrong(classes, text, expected):
    assert message(classes.choose, text) == expected


@pytest.mark.parametrize(("classes", "count", "text", "expected"), [
    (NAMED, 1001, None, [700, 200, 101]), (NAMED, 10, None, [7, 2, 1]), (NAMED, 1, None, [1, 0, 0]),
    (NAMED, None, "melanoma:5,0:7", [7, 5, 0]), (NAMED, 12, "melanoma:5, nevus: 7", [7, 5, 0]),
    (Classes(2, {"classes": ["nevus", "melanoma, NOS"]}), None, "melanoma, NOS:5,nevus:7", [7, 5]),
    (NUMBERED, None, "2:4", [0, 0, 4]), (NONE, 5, None, None),
])
def test_divide_gives_each_class_its_images(classes, count, text, expected):
    assert classes.divide(count, text) == expected


@pytest.mark.parametrize(("classes", "count", "text", "expected"), [
    (NAMED, 0, None, "--count is 0; expected at least 1"),
    (NONE, -5, None, "--count is -5; expected at least 1"),
    (NONE, None, None, "--count is missing; expected the number of images for --zip, such as --count=10000"),
    (NAMED, None, None, "--count is missing; expected the number of images for --zip, such as --count=10000, or "
                        "--classes with the number of each class"),
    (NONE, 5, "a:5", "--classes is a:5, but this network was trained without classes; leave it out"),
    (NUMBERED, 5, None, "--classes is missing, and the network file does not record how many training images each "
                        f"class had; {SYNTAX}"),
    (NAMED, 13, "nevus:5,bcc:7", "--count is 13, but --classes adds up to 12; expected the same number: leave --count "
                                 "out"),
    (NAMED, None, "nevus:5,0:7", "--classes names nevus twice; expected each class once"),
    (NAMED, None, "nevus:-5", f"--classes has 'nevus:-5'; {SYNTAX}"),
    (NAMED, None, "nevus", f"--classes has 'nevus'; {SYNTAX}"),
    (NAMED, None, "nevus:0.5,bcc:0.5", f"--classes has 'nevus:0.5'; {SYNTAX}"),
    (NAMED, None, "bkl:5", f"--classes names the class 'bkl'; {LISTED}"),
    (NAMED, None, "bcc:0", f"--classes is bcc:0, which asks for no images; {SYNTAX}"),
])
def test_divide_says_what_is_wrong(classes, count, text, expected):
    assert message(classes.divide, count, text) == expected


@pytest.mark.parametrize("info", [
    {}, {"classes": ["a"], "class_counts": [1, 2, 3]}, {"classes": ["a", "a"], "class_counts": [0, 0]},
    {"classes": [1, 2], "class_counts": [1.0, 2.0]}, {"classes": "ab", "class_counts": [-1, 2]}])
def test_classes_that_do_not_fit_the_network_count_as_not_said(info):
    found = Classes(2, info)
    assert (found.names, found.training_counts, found.name(1)) == (None, None, "1")


def test_labels_are_one_hot():
    assert torch.equal(NAMED.labels([2, 0]), torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    assert NONE.labels([None] * 4).shape == (4, 0)
