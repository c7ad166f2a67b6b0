"""Mistakes in a comparison are found before anything is trained, with one line; see tests/helpers/fake_arms.py."""

import pytest

from tests.helpers.fake_arms import CLASSES, calls, enter, error, make_material
from tests.helpers.make_sets import make_set

MISSING = ("expected --outdir, --data, --holdout, --kimg and --rounds, such as --outdir=comparison --data=a.zip,b.zip "
           "--holdout=a-test.zip,b-test.zip --kimg=20 --rounds=10: see --help")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    make_material(folder)
    return folder


@pytest.fixture
def inside(tmp_path, material, monkeypatch):
    """Working folder with the material."""
    return enter(tmp_path / "inside", material, monkeypatch)


@pytest.mark.parametrize(("flags", "message"), [
    ({"holdout": None}, f"--holdout is missing; {MISSING}"),
    ({"kimg": None}, f"--kimg is missing; {MISSING}"),
    ({"kimg": "0"}, "--kimg is 0; expected at least 1"),
    ({"kimg": "1.5"}, "Invalid value for '--kimg': '1.5' is not a valid integer."),
    ({"rounds": "0"}, "--rounds is 0; expected at least 1"),
    ({"points": "0"}, "--points is 0; expected at least 1"),
    ({"max_hours": "0"}, "--max-hours is 0; expected a number > 0"),
    ({"data": "a.zip"}, "--data is a.zip alone; expected the data sets of at least two institutions, separated by "
     "commas"),
    ({"holdout": "a-test.zip,b-test.zip,b-test.zip"}, "--holdout has 3 data sets and --data 2; expected one for each "
     "institution, in the order of --data, or one for all"),
    ({"sites": "x,union"}, "--sites names a site union, which is the name of all images together; expected another "
     "name"),
    ({"sites": "x,../y"}, "--sites=x,../y names a site '../y'; expected letters, digits, '.', '_' and '-', starting "
     "with a letter or digit"),
    ({"tick": "5"}, "--tick is given, but --tick is set by --points: leave it out"),
    ({"round_kimg": "5"}, "--round-kimg is given, but --round-kimg is set by --kimg and --rounds: leave it out"),
    ({"subset": "5"}, "--subset is given, but --subset would let the arms train on different images; make smaller data "
     "sets with dataset_tool.py: leave it out"),
    ({"join": "b:2"}, "--join is given, but --join would give the institutions different numbers of images: leave it "
     "out"),
    ({"bacth": "16"}, None),
    ({"rounds": "40"}, "--rounds is 40, so each institution would see 12.5 images in a round; expected at least one "
     "iteration of --batch=16: try --rounds=31"),
    ({"metrics": "kid_ful"}, None),
    ({"cfg": "huge"}, None),
    ({"ci": "2"}, "--ci is 2; expected a level between 0 and 1, such as 0.95"),
    ({"data": "a.zip,c.zip"}, "c.zip does not exist; expected a data set: a zip or a folder of images"),
])
def test_mistake_is_found_before_anything_is_trained(inside, capsys, flags, message):
    text = error(inside, capsys, **flags)
    assert text == message if message else any(part in text for part in (*flags, *flags.values()))  # another's message
    assert calls(inside) == []


def test_held_out_image_that_is_trained_on_elsewhere_is_refused(inside, capsys):
    make_set(inside / "a-test.zip", images=[8, *range(60, 69)], labels=[0, 1] * 5, classes=CLASSES, mirror=True)
    assert error(inside, capsys) == (
        "--holdout=a-test.zip: 1 of 10 images are also in --data=b.zip, such as 00000/img00000000.png, which is "
        "00000/img00000000.png there (apart from order, labels and mirroring); expected images that are not trained "
        "on: hold out part of one data set with dataset_tool.py split")
    assert not (inside / "out").exists()


def test_held_out_patient_who_is_trained_on_elsewhere_is_refused(inside, capsys):
    make_set(inside / "a-test.zip", images=range(60, 70), labels=[0, 1] * 5, classes=CLASSES,
             groups=["b3", "b3", "b4", *"abcdefg"])
    assert error(inside, capsys) == (
        "--holdout=a-test.zip: 2 groups (patients or lesions) are also in --data=b.zip (b3, b4), with 3 of 10 images; "
        "expected groups that are not trained on: hold out part of one data set with dataset_tool.py split")


def test_held_out_set_of_other_images_is_refused(inside, capsys):
    make_set(inside / "a-test.zip", images=range(60, 70), labels=[0, 1] * 5, classes=CLASSES, size=16)
    assert error(inside, capsys) == "--holdout=a-test.zip is 16x16 RGB; expected 8x8 RGB, as in --data"
    make_set(inside / "a-test.zip", images=range(60, 70), labels=[0, 1] * 5, classes=["benign", "nevus"])
    assert error(inside, capsys) == (
        "a-test.zip has labels of nevus; expected those of benign, melanoma: convert it with dataset_tool.py and the "
        "same --classes")


def test_held_out_set_that_is_too_small_is_refused_before_training(inside, capsys):
    make_set(inside / "a-test.zip", images=range(60, 63), labels=[0, 1, 0], classes=CLASSES)
    assert error(inside, capsys) == ("metric pr_full needs at least 4 real images and a-test.zip has 3; expected more")
    assert calls(inside) == []


def test_arms_of_unequal_numbers_of_images_are_not_compared(inside, capsys):
    assert error(inside, capsys, kimg="2") == (
        "the newest network in out/central/00000-run is of 1000 images, but --kimg is 2; expected all arms at the same "
        "number: use another --outdir")


def test_flag_that_the_federated_arm_refuses_is_found_before_training(inside, capsys):
    assert error(inside, capsys, local="proportional") == "federated: proportional does not suit"
    assert calls(inside) == []
