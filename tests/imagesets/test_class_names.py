"""imagesets.classes: classes by name and number."""

import pytest

from dnnlib.cli import UserError
from imagesets.classes import find_class

NAMES = ["nevus", "melanoma"]
LISTED = "expected one of nevus, melanoma, or a number from 0 to 1"


@pytest.mark.parametrize(("text", "names", "expected"), [
    ("melanoma", NAMES, 1), (" melanoma ", NAMES, 1), ("0", NAMES, 0), (" 01", None, 1),
    ("1", ["1", "0"], 0),  # a name wins over a number
    ("7", ["1", "7"], 1), ("2", ["x", "2"], 1),
    (" a", ["a", " a"], 1),
])
def test_find_class_takes_names_and_numbers(text, names, expected):
    assert find_class(text, names, 2) == expected


@pytest.mark.parametrize(("text", "names", "message"), [
    ("melanomas", NAMES, f"--class names the class 'melanomas' (did you mean melanoma?); {LISTED}"),
    ("", NAMES, f"--class names the class ''; {LISTED}"),
    ("2", NAMES, f"--class names the class '2'; {LISTED}"),
    ("-1", NAMES, f"--class names the class '-1'; {LISTED}"),
    ("+1", None, "--class names the class '+1'; expected a number from 0 to 1"),
    ("\u0661", None, "--class names the class '\u0661'; expected a number from 0 to 1"),  # another script's 1
    ("9" * 5000, None, f"--class names the class '{'9' * 5000}'; expected a number from 0 to 1"),
    ("1", ["0", "2"], "--class names the class '1'; expected one of 0, 2"),  # and is not the class 2, though number 1
    ("0", ["1", "7"], "--class names the class '0'; expected one of 1, 7"),
    ("nevus", None, "--class names the class 'nevus'; expected a number from 0 to 1"),
])
def test_find_class_says_what_is_wrong(text, names, message):
    with pytest.raises(UserError) as caught:
        find_class(text, names, 2)
    assert str(caught.value) == message


def test_find_class_names_the_option():
    with pytest.raises(UserError, match=r"^--classes names the class '7'; "):
        find_class("7", NAMES, 2, flag="--classes")
