"""generation.image_generator: lists of seeds, and what is wrong with others."""

import pytest

from dnnlib.cli import UserError
from generation.image_generator import parse_first_seed, parse_ranges, parse_seeds


@pytest.mark.parametrize(("text", "expected"), [
    ("0,1,5-9", [0, 1, 5, 6, 7, 8, 9]), ("7", [7]), ("3-3", [3]), (" 4 , 2 ", [4, 2]), ("2,2", [2, 2]),
    ("4294967295", [2**32 - 1])])
def test_parse_seeds_keeps_the_order(text, expected):
    assert parse_seeds("--seeds", text) == expected


@pytest.mark.parametrize(("text", "message"), [
    ("3-", "--seeds has '3-'; expected numbers and ranges, such as 0,1,5-9"),
    ("a", "--seeds has 'a'; expected numbers and ranges, such as 0,1,5-9"),
    ("-1", "--seeds has '-1'; expected numbers and ranges, such as 0,1,5-9"),
    ("", "--seeds has ''; expected numbers and ranges, such as 0,1,5-9"),
    ("1,,2", "--seeds has ''; expected numbers and ranges, such as 0,1,5-9"),
    ("\u0663", "--seeds has '\u0663'; expected numbers and ranges, such as 0,1,5-9"),
    ("9" * 5000, f"--seeds has '{'9' * 5000}'; expected numbers and ranges, such as 0,1,5-9"),
    ("1.5", "--seeds has '1.5'; expected numbers and ranges, such as 0,1,5-9"),
    ("9-3", "--seeds has the range 9-3, which runs backwards; expected 3-9"),
    ("4294967296", "--seeds has 4294967296; the largest seed is 4294967295"),
    ("0-4000000000", "--seeds names 4000000001 seeds; expected at most 1000000: for many images use --zip and --count"),
])
def test_parse_seeds_says_what_is_wrong(text, message):
    with pytest.raises(UserError) as caught:
        parse_seeds("--seeds", text)
    assert str(caught.value) == message


def test_parse_ranges_names_what_is_numbered():
    with pytest.raises(UserError, match=r"^--styles has 9; the largest layer is 3$"):
        parse_ranges("--styles", "0-9", largest=3, what="layer")


def test_parse_first_seed_takes_one_number():
    assert parse_first_seed("--seeds", "12") == 12
    for text in ("0,1", "0-9"):
        with pytest.raises(UserError) as caught:
            parse_first_seed("--seeds", text)
        assert str(caught.value) == (f"--seeds is {text}; with --zip expected the first seed alone, such as --seeds=0: "
                                     "--count says how many follow")
