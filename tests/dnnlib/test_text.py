"""dnnlib.text: printable ASCII, and texts that fit."""

import pytest

from dnnlib.text import fitted, is_same_but_for_spelling, listed_with_and, to_ascii


@pytest.mark.parametrize(("text", "expected"), [
    ("melanoma ~!", "melanoma ~!"), ("m\u00e9lanome", "melanome"), ("\u75e3 in situ", "? in situ"),
    ("a\nb\tc\x00\x7f", "a?b?c??"), ("\ud800", "?"), ("\ufb01n", "fin"), ("", ""),
])
def test_to_ascii_takes_accents_off_and_replaces_the_rest(text, expected):
    assert to_ascii(text) == expected


@pytest.mark.parametrize(("text", "width", "expected"), [
    ("melanoma", 8, "melanoma"), ("melanoma", 7, "melan.."), ("melanoma", 3, "m.."), ("melanoma", 1, ".."), ("", 0, ""),
])
def test_fitted_shows_as_many_letters_as_fit(text, width, expected):
    assert fitted(text, width, len) == expected


def test_listed_with_and_joins_names_as_in_a_sentence():
    assert [listed_with_and("abc"[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


@pytest.mark.parametrize(("name", "other", "expected"), [
    ("nv", "NV", True), ("basal cell", "Basal_Cell", True), ("Melanoma NOS", "melanoma, nos", True),
    ("mell", "mel", True), ("akeic", "akiec", True), ("benign", "bening", True), ("nevus", "naevus", True),
    ("mel", "melanoma", True), ("ak", "akiec", True),
    ("BCC", "SCC", False), ("nv", "df", False), ("benign", "malignant", False), ("typical", "atypical", False),
    ("grade1", "grade2", False), ("grade 1", "grade 10", False), ("1", "01", False), ("stage ii", "stage iii", False),
    ("melanoma", "melanoma in situ", False), ("-", "_", False), ("", "", False),
])
def test_names_are_the_same_but_for_spelling(name, other, expected):
    assert is_same_but_for_spelling(name, other) is is_same_but_for_spelling(other, name) is expected
