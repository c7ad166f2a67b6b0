"""analysis.classification_report: files that hold everything, names that survive, and tables for people."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from analysis.classification_report import results_record, write_predictions, write_report
from analysis.classification_scores import METRICS, Thresholds, score
from analysis.classification_tables import escaped, markdown
from analysis.regimes import Condition
from analysis.study_results import PartPredictions, StudyResults, TrainedCondition, score_study
from metrics.intervals import holm
from tests.helpers.made_studies import make_study

NOTE = "UNVERIFIED synthetic images: the network has no record of its training images"
NAMES = ['a,b.png', 'say "cheese".png', "two\nlines", "carriage\rreturn", "d\u00e9j\u00e0|vu", "", "-1", " space ",
         "semi;colon", "tab\tbed"]


def small():
    """Return results of a perfect classifier and of one that always says 0.5, on eight lesions of two images."""
    labels = np.repeat([0, 1, 0, 0, 1, 0, 1, 1], 2)

    def part(name, role, **attributes):
        perfect = np.eye(2)[labels]
        return PartPredictions(name=name, role=role, images=[f"{index}.png" for index in range(16)],
                               groups=[f"g{index // 2}" for index in range(16)], labels=labels, attributes=attributes,
                               probabilities={"real": perfect[None], "syn|<b>": np.full((1, 16, 2), 0.5)})

    return StudyResults(
        protocol={}, settings={}, labels=("rest", "mel_x"), seeds=(0,), validation=part("val", "val"),
        conditions=(TrainedCondition(condition=Condition(name="real", regime="real"),
                                     num_real=[{"rest": 8, "mel_x": 4}], num_synthetic=[{"rest": 0, "mel_x": 0}]),
                    TrainedCondition(condition=Condition(name="syn|<b>", regime="synthetic", baseline="real"),
                                     num_real=[{"rest": 0, "mel_x": 0}], num_synthetic=[{"rest": 5, "mel_x": 6}])),
        thresholds={"real": [Thresholds(balanced=1.0, at_90=(1.0,), at_95=(1.0,))],
                    "syn|<b>": [Thresholds(balanced=0.5, at_90=(0.6,), at_95=(0.6,))]},
        parts=(part("test", "test", site=["arm"] * 14 + ["leg"] * 2),), notes=(NOTE,), is_verified=False, resamples=200)


def write(tmp_path, results):
    """Return the lines of a report, and the content of results.json."""
    lines = write_report(tmp_path, results)
    text = (tmp_path / "results.json").read_text()
    return lines, json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def find(records, **values):
    return [record for record in records if all(record[key] == value for key, value in values.items())]


def test_table_of_a_small_study_is_as_expected(tmp_path):
    write_report(tmp_path, small())
    text = (tmp_path / "table.md").read_text()
    before, table = text.split("## test\n")
    assert before.startswith(f"# Classifiers of real and synthetic images\n\n**{NOTE}**\n\nAn interval is of the mean "
                             "over seeds, from 200 resamples of the part's groups")
    whole, half, zero = "1.000 [1.000, 1.000]", "0.500 [0.500, 0.500]", "0.000 [0.000, 0.000]"
    worse = "-1.000 [-1.000, -1.000], p 0.11"
    assert table.splitlines() == [
        "", r"16 images of 8 groups: rest 8 (4 groups), mel\_x 8 (4 groups).", "",
        f"*Scores on test.* **{NOTE}**", "",
        "| condition | AUC | AP | balanced accuracy | F1 | sens@90 | sens@95 | Brier | ECE | real | synthetic |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        rf"| real | {whole} | {whole} | {whole} | {whole} | {whole} at 1.000 | {whole} at 1.000 | {zero} | {zero} "
        r"| 12 (rest 8, mel\_x 4) | 0 |",
        rf"| syn\|&lt;b&gt; | {half} | 0.500 [0.125, 0.875] | {half} | 0.667 [0.222, 0.933] | {zero} at 1.000 "
        rf"| {zero} at 1.000 | 0.250 [0.250, 0.250] | 0.000 [0.000, 0.241] | 0 | 11 (rest 5, mel\_x 6) |", "",
        f"*Paired differences on test; bold: p below 0.05.* **{NOTE}**", "",
        "| difference | AUC | AP | balanced accuracy | F1 | sens@90 | sens@95 | Brier | ECE |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        r"| syn\|&lt;b&gt; - real | -0.500 [-0.500, -0.500], p 0.11 | -0.500 [-0.875, -0.125], p 0.11 "
        "| -0.500 [-0.500, -0.500], p 0.11 | -0.333 [-0.778, -0.067], p 0.11 "
        f"| {worse} | {worse} | +0.250 [+0.250, +0.250], p 0.11 | +0.000 [-0.134, +0.241], p 0.61 |", "",
        f"*AUC on test by site.* **{NOTE}**", "",
        r"| site | images of rest | images of mel\_x | real | syn\|&lt;b&gt; | without scores |",
        "|---|---:|---:|---:|---:|---:|",
        f"| arm | 8 | 6 | {whole} | {half} |  |",
        "| leg | 0 | 2 | - | - | too few: there is 1 group of 2 images; an interval needs at least 2 |"]


@pytest.mark.parametrize(("labels", "present", "absent"), [
    (("rest", "mel"), "the one that maximizes balanced accuracy there", "most probable label"),
    (("nv", "mel", "bcc"), "balanced accuracy, F1 and ECE are of the most probable label", "that maximizes"),
])
def test_table_says_how_labels_are_predicted(tmp_path, labels, present, absent):
    write_report(tmp_path, make_study(labels=labels))
    text = (tmp_path / "table.md").read_text()
    assert present in text
    assert absent not in text


def test_lines_for_the_terminal_are_as_expected(tmp_path):
    lines = write_report(tmp_path, small())
    assert lines == [
        NOTE,
        "test: 16 images of 8 groups: rest 8 (4 groups), mel_x 8 (4 groups); [...]: 95 % intervals over groups",
        "condition  real  synthetic                   AUC     AP  balanced accuracy     F1           AUC - baseline  "
        "p (Holm)",
        "real         12          0  1.000 [1.000, 1.000]  1.000              1.000  1.000",
        "syn|<b>       0         11  0.500 [0.500, 0.500]  0.500              0.500  0.667  -0.500 [-0.500, -0.500]  "
        "    0.11",
        "",
        f"{tmp_path}: results.json, predictions.csv, table.md, roc-test.png, pr-test.png, calibration-test.png, "
        "confusion-test.png"]


@pytest.mark.parametrize("labels", [("rest", "mel"), ("nv", "mel", "bcc")])
def test_results_hold_every_value_with_numbers_and_definition(labels):
    results = make_study(labels=labels, sex=["male", "female", ""] * 20)
    found = json.loads(json.dumps(results_record(results, score_study(results)), allow_nan=False))
    assert (found["protocol"], found["settings"]) == ({"sha256": "ab"}, {"model": "efficientnet-lite0"})
    assert (found["labels"], found["seeds"], found["resamples"]) == (list(labels), [0, 1], 20)
    assert found["definitions"].keys() == METRICS.keys()
    assert all(each["definition"].endswith(".") for each in found["definitions"].values())
    assert len(found["results"]) == 2 * 3 * len(METRICS)
    assert len(found["differences"]) == 2 * 2 * len(METRICS)
    assert len(found["subgroups"]) == 2 * 3 * 3 * 2  # parts, values, conditions, metrics
    for record in [*found["results"], *found["differences"], *found["subgroups"], *found["confusion"]]:
        assert (record["verified"], record["notes"]) == (True, [])
        assert record["num_images"] == sum(record["images_by_label"].values()) > 0
        assert 0 < record["num_groups"] <= record["num_images"]
        assert record["groups_by_label"].keys() == set(labels)
    for record in found["results"]:
        assert record["value"] == pytest.approx(np.mean(record["values"]))
        assert record["low"] <= record["value"] <= record["high"]
        assert record["level"] == 0.95
        assert len(record["values"]) == len(record["seeds"])
        assert (record["sd_over_seeds"] is None) == (len(record["seeds"]) == 1)
    part = results.parts[0]
    (record,) = find(found["results"], part="test", condition="synthetic", metric="f1")
    expected = [score(part.labels, each, thresholds)["f1"][0] for each, thresholds in zip(
        part.probabilities["synthetic"], results.thresholds["synthetic"], strict=True)]
    assert record["values"] == pytest.approx(expected)
    tests = find(found["differences"], part="external", metric="brier")
    assert [each["p_holm"] for each in tests] == pytest.approx(holm([each["p_value"] for each in tests]))
    for each in found["differences"]:
        (first,), (second,) = (find(found["results"], part=each["part"], condition=each[side], metric=each["metric"])
                               for side in ("condition", "baseline"))
        # One value stands for all seeds.
        assert each["values"] == pytest.approx(np.subtract(first["values"], second["values"]).tolist())
        assert each["sd_over_seeds"] == pytest.approx(np.std(each["values"], ddof=1))
    matrices = find(found["confusion"], part="test", condition="real+synthetic-0.5")
    assert [each["seed"] for each in matrices] == [0]
    assert np.sum(matrices[0]["labels_by_predicted"], axis=1).tolist() == list(matrices[0]["images_by_label"].values())
    (condition,) = find(found["conditions"], name="real+synthetic-0.5")
    assert (condition["dose"], condition["baseline"], condition["seeds"]) == (0.5, "real", [0])
    assert condition["num_synthetic"] == [dict.fromkeys(labels, 25), dict.fromkeys(labels, 26)]
    assert condition["thresholds"][0]["at_90"].keys() == ({"mel"} if len(labels) == 2 else set(labels))


def test_notes_are_stamped_on_each_result_and_each_table(tmp_path):
    lines, found = write(tmp_path, make_study(notes=(NOTE,), is_verified=False, sex=["m", "f"] * 30))
    assert lines[0] == NOTE
    records = [*found["results"], *found["differences"], *found["subgroups"], *found["confusion"]]
    assert len(records) > 100
    assert all(record["verified"] is False and record["notes"] == [NOTE] for record in records)
    text = (tmp_path / "table.md").read_text()
    captions = [line for line in text.splitlines() if line.startswith("*") and not line.startswith("**")]
    assert len(captions) == 8  # of each part: scores, spread, differences, a column
    assert all(NOTE in caption for caption in captions)


@pytest.mark.parametrize("labels", [("rest", "mel"), ("nv", "mel, \"x\"\r\n|", "\ud800")])
def test_predictions_come_back_from_the_file(tmp_path, labels):
    names = [*NAMES, *(f"{index}.png" for index in range(50))]
    results = make_study(labels=labels, names=names)
    write_predictions(tmp_path / "predictions.csv", results)
    rows = read_csv(tmp_path / "predictions.csv")
    shown = [label.replace("\ud800", "\\ud800") for label in labels]
    columns = ["probability"] if len(labels) == 2 else [f"probability_{name}" for name in shown]
    assert list(rows[0]) == ["image", "group", "label", *columns, "regime", "seed", "part"]
    assert len(rows) == 3 * 60 * (2 + 2 + 1)
    for part in (results.validation, *results.parts):
        for condition, by_seed in part.probabilities.items():
            for seed, probabilities in zip(results.seeds_of(condition), by_seed, strict=True):
                found = find(rows, part=part.name, regime=condition, seed=str(seed))
                assert [row["image"] for row in found] == names
                assert [row["group"] for row in found] == list(part.groups)
                assert [row["label"] for row in found] == [shown[label] for label in part.labels]
                # All digits come back.
                values = [[float(row[column]) for column in columns] for row in found]
                assert values == probabilities[:, -len(columns):].tolist()


def test_synthetic_part_has_its_own_table_and_no_differences(tmp_path):
    _, found = write(tmp_path, make_study(parts=("test", "synthetic")))
    assert {record["condition"] for record in find(found["results"], part="synthetic")} == {"real"}
    assert find(found["differences"], part="synthetic") == []
    section = (tmp_path / "table.md").read_text().split("## synthetic\n")[1]
    assert "*Classifiers of real images, tested on the synthetic ones (TRTS).*" in section
    assert "Paired differences" not in section


def test_part_without_scores_says_why_and_has_no_plots(tmp_path):
    results = make_study(parts=("test", "external"))
    results.parts[1].labels[:] = 0
    lines, found = write(tmp_path, results)
    reason = "there are 0 groups with images of mel; an interval needs at least 2"
    assert [part.get("reason") for part in found["parts"]] == [None, reason]
    assert find(found["results"], part="external") == []
    assert f"No scores: {reason}." in (tmp_path / "table.md").read_text()
    assert not (tmp_path / "roc-external.png").exists()
    assert "external" not in lines[-1]


def test_plots_of_parts_have_file_names_that_differ(tmp_path):
    results = make_study(parts=("a/../b", "a .. b"))
    lines = write_report(tmp_path, results)
    files = lines[-1].split(": ", 1)[1].split(", ")
    assert files[3:] == ["roc-a_.._b.png", "pr-a_.._b.png", "calibration-a_.._b.png", "confusion-a_.._b.png",
                         "roc-a_.._b-2.png", "pr-a_.._b-2.png", "calibration-a_.._b-2.png", "confusion-a_.._b-2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    for path in tmp_path.glob("*.png"):
        with PIL.Image.open(path) as picture:
            assert picture.mode == "RGB"


def test_many_values_of_an_attribute_are_named():
    sites = [f"site {index}" for index in (*range(14), *[0, 1] * 23)]
    results = make_study(parts=("test",), site=sites)
    parts = score_study(results)
    found = results_record(results, parts)
    (rest,) = found["subgroups_left_out"]
    assert (rest["part"], rest["column"], len(rest["values"])) == ("test", "site", 2)
    text = markdown(results, parts)
    assert f"2 further values of site with fewer images: {', '.join(rest['values'])}." in text
    assert len(find(found["subgroups"], column="site", subgroup="site 2")) == 1  # with its reason


def test_spread_over_seeds_is_told_for_conditions_and_differences(tmp_path):
    results = make_study(parts=("test",))
    write_report(tmp_path, results)
    lines = (tmp_path / "table.md").read_text().split("*Standard deviation over seeds, on test.*")[1].splitlines()[2:]
    (part,) = score_study(results)
    found = {(each.first, each.metric): each for each in part.scores.differences}
    names = ["real", "synthetic", "real+synthetic-0.5", "synthetic - real", "real+synthetic-0.5 - real"]
    assert [line.split(" | ")[:2] for line in lines[2:7]] == [
        [f"| {name}", "1" if name == "real+synthetic-0.5" else "2"] for name in names]
    assert lines[5].split(" | ")[2] == f"{found['synthetic', 'auc'].sd:.3f}"
    assert lines[4].split(" | ")[2] == "-"


def test_attribute_that_tells_the_label_has_no_table(tmp_path):
    results = make_study(parts=("test",))
    names = [results.labels[label] for label in results.parts[0].labels]
    part = replace(results.parts[0], attributes={"dx": names, "sex": ["male", "female"] * 30})
    write_report(tmp_path, replace(results, parts=(part,)))
    text = (tmp_path / "table.md").read_text()
    assert "\nNo scores by dx: no value has two groups of each label.\n" in text
    assert "by dx" not in text.replace("No scores by dx", "")
    assert "*AUC on test by sex.*" in text


def test_writing_a_report_beats_for_each_condition_of_each_part(tmp_path):
    beats = []
    write_report(tmp_path, make_study(), lambda: beats.append(1))
    assert len(beats) == 2 * 3


def test_same_results_give_the_same_files(tmp_path):
    for folder in ("a", "b"):
        write_report(tmp_path / folder, small())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_probabilities_that_are_not_finite_raise(tmp_path):
    results = make_study()
    results.parts[0].probabilities["real"][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^probabilities of real are not finite$"):
        write_report(tmp_path, results)


@pytest.mark.parametrize(("text", "expected"), [
    ("a|b", r"a\|b"), ("<script>&amp;", "&lt;script&gt;&amp;amp;"), ("*a_b*`c`", r"\*a\_b\*\`c\`"),
    ("a\nb\r\n c", "a b c"),
    ("[x](y)", r"\[x\](y)"), ("a\\", r"a\\")])
def test_escaped_texts_are_shown_as_they_are(text, expected):
    assert escaped(text) == expected
