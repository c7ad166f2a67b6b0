"""Which names of classes mean which look."""

import pytest

from dnnlib.cli import UserError
from imagesets.phantoms.scene import LOOKS, STRUCTURES, check_looks_differ, look_of


@pytest.mark.parametrize(("name", "look"), [
    ("benign", "nevus"), ("NV", "nevus"), ("Melanoma", "melanoma"), ("mel", "melanoma"), ("bkl", "keratosis"),
    ("Seborrheic Keratosis", "keratosis"), ("seborrheic-keratosis", "keratosis"), ("bcc", "basal_cell"),
    ("akiec", "actinic"), ("vasc", "vascular"), ("df", "dermatofibroma")])
def test_look_of_known_names(name, look):
    assert look_of(name) is LOOKS[look]


def test_look_of_unknown_name_is_its_own():
    first, again, other = look_of("lentigo"), look_of("lentigo"), look_of("wart")
    assert first == again
    assert first != other
    assert first.structure in STRUCTURES
    assert all(first != look for look in LOOKS.values())


def test_two_names_of_one_look_are_refused():
    with pytest.raises(UserError) as error:
        check_looks_differ(["nv", "mel", "benign"])
    assert str(error.value) == "--classes has nv and benign, which look the same; keep one of them"
