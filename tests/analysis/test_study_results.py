"""analysis.study_results: subgroups by value, and which parts, conditions and pairs are scored."""

from dataclasses import replace

import pytest

from analysis.study_results import score_study, split_by_value
from tests.helpers.made_studies import make_study


def rows_of(values):
    found, rest = split_by_value(values)
    return {value: rows.tolist() for value, rows in found.items()}, rest


def test_split_by_value_most_images_first_and_unknown_last():
    assert rows_of(["b", "", "a", "b", "unknown", "c"]) == (
        {"b": [0, 3], "a": [2], "c": [5], "unknown": [1, 4]}, [])
    assert rows_of(["", ""]) == ({"unknown": [0, 1]}, [])


def test_split_by_value_of_few_numbers_keeps_them():
    assert list(rows_of([str(number % 10) for number in range(100)])[0]) == [str(number) for number in range(10)]


def test_split_by_value_of_many_numbers_cuts_at_quartiles():
    found, rest = rows_of([*(str(number) for number in range(1, 13)), "", "3.0"])
    assert {name: len(rows) for name, rows in found.items()} == {
        "1 to 3": 4, "4 to 6": 3, "7 to 9": 3, "10 to 12": 3, "unknown": 1}
    assert found["1 to 3"] == [0, 1, 2, 13]
    assert rest == []


def test_split_by_value_of_numbers_mostly_equal_gives_fewer_parts():
    found, _ = rows_of(["0"] * 80 + [str(number) for number in range(1, 21)])
    assert {name: len(rows) for name, rows in found.items()} == {"0": 80, "1 to 20": 20}


def test_split_by_value_of_many_texts_names_the_rest():
    found, rest = rows_of([f"v{number:02}" for number in range(15)] + ["v14"])
    assert list(found) == ["v14", *(f"v{number:02}" for number in range(11))]
    assert rest == ["v11", "v12", "v13"]


def test_score_study_compares_each_condition_with_its_baseline():
    parts = score_study(make_study())
    assert [part.part.name for part in parts] == ["test", "external"]
    for part in parts:
        assert list(part.scores.scores) == ["real", "synthetic", "real+synthetic-0.5"]
        assert {(each.first, each.second) for each in part.scores.differences} == {
            ("synthetic", "real"), ("real+synthetic-0.5", "real")}
        assert {each.num_tests for each in part.scores.differences} == {2}
        assert len(part.scores.scores["real+synthetic-0.5"]["auc"].values) == 1
        assert sum(part.images_by_label.values()) == 60
        assert part.num_groups == 30


def test_score_study_of_synthetic_images_has_scores_and_no_differences():
    results = make_study(parts=("synthetic",))
    (part,) = score_study(results)
    assert list(part.scores.scores) == ["real"]
    assert part.scores.differences == ()


def test_score_study_counts_confusion_by_seed():
    (part, _) = score_study(make_study())
    assert part.confusion["real"].shape == (2, 2, 2)
    assert part.confusion["real+synthetic-0.5"].shape == (1, 2, 2)
    assert part.confusion["real"].sum(axis=2).tolist() == [list(part.images_by_label.values())] * 2


def test_score_study_names_subgroups_with_too_few_groups():
    sites = ["a"] * 30 + ["b"] * 28 + ["c"] * 2
    (part, _) = score_study(make_study(site=sites))
    by_value = {each.value: each for each in part.subgroups}
    assert list(by_value) == ["a", "b", "c"]
    assert list(by_value["a"].scores.scores["real"]) == ["auc", "average_precision"]
    assert by_value["a"].scores.num_images == sum(by_value["a"].images_by_label.values()) == 30
    assert by_value["c"].scores is None
    assert by_value["c"].reason == "there is 1 group of 2 images; an interval needs at least 2"


def test_score_study_of_a_part_without_a_label_says_why():
    results = make_study(parts=("test",))
    part = results.parts[0]
    part.labels[:] = 0
    (found,) = score_study(results)
    assert found.scores is None
    assert found.reason == "there are 0 groups with images of mel; an interval needs at least 2"
    assert found.images_by_label == {"rest": 60, "mel": 0}


@pytest.mark.parametrize("labels", [("rest", "mel"), ("nv", "mel", "bcc")])
def test_seeds_of_a_condition_with_one_classifier_is_the_first(labels):
    results = make_study(labels=labels, seeds=(7, 8))
    assert results.seeds_of("real") == (7, 8)
    assert results.seeds_of("real+synthetic-0.5") == (7,)


def test_classifiers_of_some_seeds_only_raise():
    with pytest.raises(ValueError, match=r"^real has thresholds of 2 classifiers; expected 1 or 3$"):
        replace(make_study(), seeds=(0, 1, 2))
