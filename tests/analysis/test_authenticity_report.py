"""Test what is reported of the tests of authenticity: the exact sentences, the terminal's lines, and results.json."""

import json
import re

import numpy as np
import pytest

from analysis.authenticity_report import LIMITS, NOT_SHOWN, UNVERIFIED, conclusion, describe, write_results
from tests.helpers.made_authenticity import make_power, make_results

PROJECTION_POWER = "Test 1 (projection gap: perceptual distance): A difference of 0.05 would have been found."
NEAREST_POWER = ("Test 2 (nearest training image: structural similarity) would have found copies from a share of 1 % "
                 "on, in each transformation, in 90 % of 20 draws.")
MEMBERSHIP_POWER = "Test 3 (membership: score of the discriminator): A difference of 0.05 would have been found."
NEAREST_FOUND = (
    "Test 2 (nearest training image: structural similarity) found a leak: synthetic images are closer to training "
    "images than real images that the network has never seen are; share of near copies 0.213 (95 % interval 0.163 to "
    "0.263; without a leak 0.01), p = 0.0003 adjusted for 3 tests. Control: Two halves of the held-out images differ "
    "by 0.002.")


def test_conclusion_without_findings_states_the_tests_and_their_power_and_that_it_shows_no_absence():
    assert conclusion(make_results()) == [
        "No leak found by these tests (1, 2 and 3).", "This does not show that there is none.", PROJECTION_POWER,
        NEAREST_POWER, MEMBERSHIP_POWER]


def test_conclusion_with_one_finding_explains_it_and_lists_the_other_tests():
    found = conclusion(make_results({"projection": 0.3, "nearest": 0.0001, "membership": 0.6}))
    assert found == ["Leak found by test 2.", NEAREST_FOUND,
                     f"No leak found by test 1 and test 3. {NOT_SHOWN}", PROJECTION_POWER, MEMBERSHIP_POWER]


def test_conclusion_with_tests_that_did_not_run_gives_their_reasons():
    found = conclusion(make_results({"projection": None, "nearest": 0.2, "membership": None},
                                    {"projection": "no --network was given.", "membership": "no --network was given"}))
    assert found == [
        "No leak found by this test (2).", NOT_SHOWN, "Test 1 (projection gap) did not run: no --network was given.",
        "Test 3 (membership) did not run: no --network was given.", NEAREST_POWER]


def test_conclusion_without_any_test_claims_nothing():
    found = conclusion(make_results({"projection": None, "nearest": None}))
    assert found == ["No test ran: it is not known whether there is a leak.",
                     "Test 1 (projection gap) did not run: no reason was recorded.",
                     "Test 2 (nearest training image) did not run: no reason was recorded."]


def test_conclusion_with_equal_images_is_a_leak_even_where_no_test_finds_one():
    equal = [(f"{index}.png", f"train/{index}.png") for index in range(7)]
    found = conclusion(make_results({"nearest": 0.2}, equal_images=equal))
    assert found == [
        "Leak found: there are synthetic images that are equal to training images.",
        "7 synthetic images are equal to a training image, pixel by pixel: 0.png = train/0.png, 1.png = train/1.png, "
        "2.png = train/2.png, 3.png = train/3.png, 4.png = train/4.png, and 2 more.",
        f"No leak found by test 2. {NOT_SHOWN}", NEAREST_POWER]


def test_conclusion_with_all_kinds_of_findings_names_them_in_its_first_sentence():
    found = conclusion(make_results({"nearest": 0.0001, "membership": 0.0001}, equal_images=[("a.png", "b.png")]))
    assert found[:2] == ["Leak found by tests 2 and 3, and by synthetic images that are equal to training images.",
                         "1 synthetic image is equal to a training image, pixel by pixel: a.png = b.png."]
    assert [sentence[:7] for sentence in found[2:]] == ["Test 2 ", "Test 3 "]


def test_conclusion_of_an_unverified_set_says_so_before_anything_is_explained():
    found = conclusion(make_results(is_verified=False))
    assert found[:3] == ["No leak found by these tests (1, 2 and 3).", NOT_SHOWN, UNVERIFIED]


@pytest.mark.parametrize(("power", "sentence"), [
    (make_power(plain=(0, 20, 20, 20), mirrored=(0, 0, 0, 20), cropped=(0, 0, 0, 17)),
     "would have found copies from these shares on, in 90 % of 20 draws: 0.5 % plain, 5 % mirrored. Even at a share of "
     "5 % it would have missed these: cropped."),
    (make_power(plain=(0, 0, 0, 0)),
     "would have missed copies even at a share of 5 %: it would not have found them in 90 % of 20 draws."),
])
def test_conclusion_with_copies_that_a_test_misses_names_them(power, sentence):
    assert conclusion(make_results({"nearest": 0.2}, power=[power]))[-1].endswith(sentence)


def test_conclusion_of_a_test_of_unknown_power_says_so():
    assert conclusion(make_results({"nearest": 0.2}, power=()))[-1] == (
        "Test 2 (nearest training image: structural similarity): it is not known what it would have found.")


@pytest.mark.parametrize("p_value", [None, 0.2, 0.0001])
def test_sentences_never_speak_of_private_images(p_value):
    results = make_results(dict.fromkeys(("projection", "nearest", "membership"), p_value))
    assert not re.search("privat|privacy|safe", " ".join([*describe(results), *LIMITS]), re.IGNORECASE)


def test_lines_for_the_terminal_have_a_row_for_each_test_and_end_with_the_conclusion():
    results = make_results({"projection": None, "nearest": 0.2, "membership": 0.0001}, {"projection": "no --network"},
                           notes=["A note."])
    lines = list(describe(results))
    cells = [re.split(r"  +", line) for line in lines[1:5]]
    assert lines[0] == "A note."
    assert cells == [
        ["test", "statistic", "value", "without a leak", "p", "adjusted p", "leak found"],
        ["1 Projection gap: perceptual distance", "-", "-", "-", "-", "-", "not run"],
        ["2 Nearest training image: structural similarity", "share of near copies", "0.013 (-0.037 to 0.063)", "0.01",
         "0.2", "0.2", "no"],
        ["3 Membership: score of the discriminator", "area under the ROC curve", "0.71 (0.66 to 0.76)", "0.5", "0.0001",
         "0.0002", "yes"]]
    assert lines[5] == "Adjusted by Holm's method for 2 tests; level 0.01."
    assert lines[6].startswith("Control of 2, structural similarity: Two halves")
    assert lines[8:] == ["", *conclusion(results)]


def read_strictly(folder):
    def refuse(text):
        raise AssertionError(f"{text} in results.json")

    return json.loads((folder / "results.json").read_text(encoding="ascii"), parse_constant=refuse)


def test_results_file_has_all_that_was_found(tmp_path):
    results = make_results(equal_images=[("a.png", "b.png")], notes=["A note."], is_verified=False)
    write_results(tmp_path, results)
    found = read_strictly(tmp_path)
    assert (found["format"], found["version"], found["verified"]) == ("authenticity", 1, False)
    assert found["conclusion"] == conclusion(results)
    assert found["protocol"] == results.protocol
    assert found["settings"] == results.settings
    assert found["counts"] == results.counts
    assert found["notes"] == ["A note."]
    assert (found["level"], found["ci"], found["num_tests"]) == (0.01, 0.95, 3)
    nearest = found["tests"][1]
    assert nearest["definition"] == results.tests[1].question
    assert nearest["estimate"] == results.tests[1].estimate.as_record()
    assert (nearest["p_value"], nearest["p_adjusted"], nearest["found"]) == (0.2, pytest.approx(0.6), False)
    assert found["equal_images"] == [{"image": "a.png", "training_image": "b.png"}]
    assert found["pairs"]["synthetic"][0] == {
        "image": "synthetic/img00000.png", "training_image": "train/ISIC_0000000.jpg", "similarity": 0.95, "ratio": 0.4,
        "alignment": "as it is"}
    assert found["secondary"][1]["reason"] == "there are too few held-out images"
    assert found["power"] == [{"test": "nearest", "num_draws": 20, "shares": [0.002, 0.005, 0.01, 0.05],
                               "found": {"plain": [9, 19, 20, 20], "mirrored": [2, 17, 20, 20]}, "found_in": 0.9,
                               "smallest_shares": {"plain": 0.005, "mirrored": 0.01}}]


def test_results_file_has_quantiles_of_distances_and_counts_what_is_not_finite(tmp_path):
    write_results(tmp_path, make_results(distances={"distance": {
        "synthetic": np.array([*range(101), np.nan, np.inf], dtype=np.float32), "held-out": np.array([])}}))
    by_set = read_strictly(tmp_path)["distances"]["distance"]
    assert by_set["synthetic"] == {"count": 101, "omitted": 2, "quantiles": {
        "0": 0, "0.01": 1, "0.05": 5, "0.25": 25, "0.5": 50, "0.75": 75, "0.95": 95, "0.99": 99, "1": 100}}
    assert by_set["held-out"]["count"] == 0
    assert set(by_set["held-out"]["quantiles"].values()) == {None}


def test_results_file_has_null_for_what_is_not_finite_and_takes_numbers_of_numpy(tmp_path):
    write_results(tmp_path, make_results(settings={
        "temperature": float("nan"), "most": np.float32("inf"), "count": np.int64(3), "seeds": np.arange(2)}))
    assert read_strictly(tmp_path)["settings"] == {"temperature": None, "most": None, "count": 3, "seeds": [0, 1]}


def test_results_file_keeps_names_of_any_characters(tmp_path):
    name = "\"<b>\U0001f600\udcff'.png"
    write_results(tmp_path, make_results(equal_images=[(name, name)], pairs=0))
    assert read_strictly(tmp_path)["equal_images"] == [{"image": name, "training_image": name}]
