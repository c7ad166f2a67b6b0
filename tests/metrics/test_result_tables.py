"""metrics.result_tables: what a table shows of records, and the figure of it."""

import PIL.Image
import pytest

from metrics.result_tables import Row, class_rows, result_table, save_figure

KID = {"results": {"kid_full": 0.01234}, "num_real": 7010, "num_fake": 5000, "class": None}
FID = {"results": {"fid_full": 40.25}, "num_real": 7010, "num_fake": 5000, "class": None}


def interval(estimate, low, high, level=0.95):
    return {"estimate": estimate, "low": low, "high": high, "level": level, "std_error": (high - low) / 4,
            "method": "m", "unit": "group", "num_units": {"real": 9}}


def by_class(record, key, values, **more):
    """Add classes to a record, each a tenth as large as the one before."""
    return record | {"per_class": {
        name: {"results": {key: value}, "num_real": 1000 // 10**index, "num_fake": 1000 // 10**index} | more
        for index, (name, value) in enumerate(values.items())}}


def cells(lines):
    return [line.split() for line in lines]


def test_table_of_classes_has_a_row_each_and_marks_the_worst():
    record = by_class(KID, "kid_full", {"nevus": 0.01, "melanoma": 0.05})
    record["worst_class"] = {"kid_full": {"class": "melanoma", "value": 0.05}}
    assert result_table(class_rows({"kid_full": record}), "class") == [
        "class     real  fake  kid_full",
        "all       7010  5000   0.01234",
        "nevus     1000  1000      0.01",
        "melanoma   100   100      0.05*",
        "*: the worst of the classes with at least 30 images on each side",
    ]


def test_interval_has_two_digits_of_its_half_width_and_names_another_estimate():
    kid = KID | {"ci": {"kid_full": interval(0.01231, 0.0101, 0.0146)}}
    fid = FID | {"ci": {"fid_full": interval(5.0, 3.0, 7.0)}}
    lines = result_table(class_rows({"kid_full": kid, "fid_full": fid}), "class")
    assert lines == [
        "                   kid_full                  fid_full",
        "class  real  fake   value  interval          value  interval",
        "all    7010  5000  0.0123  [0.0101, 0.0146]   40.2  [3.0, 7.0] of 5.0",
        "interval: 95%; [...] of E: about an estimate E that leaves out pairs of images within a group (kid), or is "
        "for infinitely many images (fid)",
    ]


def test_value_that_rounds_to_0_has_no_sign():
    kid = KID | {"results": {"kid_full": -0.001}, "ci": {"kid_full": interval(-0.002, -0.31, 0.29)}}
    assert result_table(class_rows({"kid_full": kid}), "class")[2] == "all    7010  5000   0.00  [-0.31, 0.29]"


def test_floor_stands_beside_the_value_at_its_number_of_images():
    record = FID | {"floor": {"results": {"fid_full": 24.8}, "num_fake": 500, "at_equal_size": {"fid_full": 44.5}}}
    assert result_table(class_rows({"fid_full": record}), "class") == [
        "                             fid_full",
        "class  real  fake  held-out  value  at its n  floor",
        "all    7010  5000       500  40.25      44.5   24.8",
        "floor: held-out images against the other real ones; at its n: the value for as many fakes as held-out images",
    ]


@pytest.mark.parametrize(("p_value", "line"), [
    (0.004, "floor of kid_full: held-out and other real images differ more than random parts of them do (mel: p = "
            "0.012); then the floor is too high: were they split at random?"),
    (0.02, "floor of kid_full: held-out and other real images differ no more than random parts of them do "
           "(permutation of groups, smallest p = 0.02)")])
def test_floor_of_real_parts_that_differ_beyond_chance_is_told(p_value, line):
    def record(p_value):
        return {"results": {"kid_full": 0.1}, "num_real": 90, "num_fake": 90, "ci": {"kid_full": interval(0.1, 0, 0.2)},
                "floor": {"results": {"kid_full": 0.01}, "num_fake": 90, "at_equal_size": {"kid_full": 0.1},
                          "permutation": {"p_value": p_value}}}

    found = record(0.5) | {"per_class": {"mel": record(p_value), "nv": record(0.9)}}
    # Holm's correction for three tests
    assert [each for each in result_table(class_rows({"kid_full": found}), "class") if "random parts" in each] == [line]


def test_class_with_too_few_images_says_so_in_its_row():
    record = by_class(KID, "kid_full", {"nevus": 0.01})
    record["per_class"]["vasc"] = {"reason": "too few images: 1 real, 0 generated; expected at least 2"}
    lines = result_table(class_rows({"kid_full": record}), "class")
    assert lines[3] == "vasc  too few images: 1 real, 0 generated; expected at least 2"


def test_missing_intervals_and_floors_are_explained_once_for_all_rows():
    def lacking(count):
        return {"ci": {"fid_full": {"reason": f"{count} images, an interval needs 20480"}},
                "floor": {"reason": "too few held-out images"}}

    record = by_class(FID | lacking(5000), "fid_full", {"nevus": 50.0}, **lacking(900))
    lines = result_table(class_rows({"fid_full": record}), "class")
    assert [line for line in lines if line.startswith("no ")] == [
        "no interval of fid_full (all, nevus); of all: 5000 images, an interval needs 20480",
        "no floor of fid_full (all, nevus): too few held-out images"]


def test_table_of_seven_classes_and_three_values_with_intervals_fits_120_columns():
    classes = {f"class number {index}": 0.0123 for index in range(7)}
    names = ("kid_full", "fid_full", "is5k")
    found = {name: by_class({**KID, "results": {name: 0.0123}, "ci": {name: interval(0.0123, 0.0101, 0.0146)}}, name,
                            classes, ci={name: interval(0.0123, 0.0101, 0.0146)}) for name in names}
    lines = result_table(class_rows(found), "class")
    assert max(map(len, lines)) <= 120
    assert len(lines) == 2 + 8 + 1  # in one table, with a line on the intervals
    assert lines[0].split() == list(names)


def test_values_that_do_not_fit_120_columns_follow_in_further_tables():
    names = [f"metric{index}_full_precision" for index in range(9)]
    lines = result_table(class_rows({name: KID | {"results": {name: 0.5}} for name in names}), "class")
    assert max(map(len, lines)) <= 120
    titles = [line.split()[3:] for line in lines if line.startswith("class")]
    assert [name for line in titles for name in line] == names
    assert len(titles) == 1 + lines.count("") == 3


def test_titles_stand_above_their_values():
    long = "pr5k3_full_precision"
    record = {"results": {long: 0.5, "b": 0.25}, "num_real": 5, "num_fake": 5,
              "floor": {"results": {long: 0.75, "b": 0.125}, "num_fake": 5, "at_equal_size": {long: 0.5, "b": 0.25}}}
    keys, titles, values, _ = result_table([Row("all", {"pr": record})], "class")
    for key, cells in ((long, ["0.5", "0.5", "0.75"]), ("b", ["0.25", "0.25", "0.125"])):
        place = keys.index(key)
        end = len(titles) if key == "b" else keys.index("b")
        assert titles[place:end].split("  ") != [""]
        assert values[place:end].split() == cells


def test_metrics_of_other_numbers_of_images_have_their_own_table():
    other = FID | {"num_fake": 2000}
    lines = result_table(class_rows({"kid_full": KID, "fid_full": other}), "class")
    assert cells(lines) == [["class", "real", "fake", "kid_full"], ["all", "7010", "5000", "0.01234"], [],
                            ["class", "real", "fake", "fid_full"], ["all", "7010", "2000", "40.25"]]


def test_long_names_are_shortened_while_they_stay_different():
    long = ["x" * 60, "y" * 60], ["x" * 60 + "1", "x" * 60 + "2"]
    shown = [[cells(result_table([Row(name, {"kid_full": KID}) for name in names], "item"))[row][0] for row in (1, 2)]
             for names in long]
    assert shown == [["x" * 38 + "..", "y" * 38 + ".."], long[1]]


def test_row_of_a_chosen_class_has_its_name():
    assert class_rows({"kid_full": KID | {"class": "melanoma"}})[0].name == "melanoma"


def test_value_that_is_not_finite_is_a_dash():
    lines = result_table(class_rows({"kid_full": KID | {"results": {"kid_full": None}}}), "class")
    assert cells(lines)[1] == ["all", "7010", "5000", "-"]


@pytest.mark.parametrize("count", [2, 30])
def test_figure_has_a_row_for_each_class(tmp_path, count):
    record = by_class(KID, "kid_full", {f"class {index} " + "x" * index: 0.01 for index in range(count - 1)})
    save_figure(tmp_path / "a.png", class_rows({"kid_full": record}))
    with PIL.Image.open(tmp_path / "a.png") as picture:
        width, height = picture.size
    save_figure(tmp_path / "b.png", [Row("all", {"kid_full": KID})])
    with PIL.Image.open(tmp_path / "b.png") as picture:
        assert (width, height) == (picture.size[0], picture.size[1] + 40 * (count - 1))


def test_figure_gets_values_floor_and_numbers_of_images(monkeypatch):
    drawn = []
    monkeypatch.setattr("metrics.result_tables.save_intervals", lambda *arguments: drawn.append(arguments))
    record = by_class(FID, "fid_full", {"nevus": 50.0}, ci={"fid_full": interval(48, 45, 51, 0.9)},
                      floor={"results": {"fid_full": 30.0}, "num_fake": 9, "at_equal_size": {"fid_full": 60.0}})
    record["per_class"]["vasc"] = {"reason": "too few"}
    record["worst_class"] = {"fid_full": {"class": "nevus", "value": 50.0}}
    save_figure("a.png", class_rows({"fid_full": record, "is5k": KID | {
        "results": {"is5k_mean": 2.0}, "num_real": 0, "num_fake": 100}}))
    path, rows, panels, legend = drawn[0]
    assert path == "a.png"
    assert rows == [("all", "n 7010 real, 100-5000 fake"), ("nevus", "n 1000 real, 1000 fake"),
                    ("vasc", "too few images")]
    (whole, nevus, vasc) = panels["fid_full"]
    assert (whole.value, nevus, vasc) == (40.25, (50.0, 45, 51, 48, 30.0, 60.0, True), None)
    assert (panels["is5k_mean"][0].value, panels["is5k_mean"][1:]) == (2.0, [None, None])
    assert legend["interval"] == "90% interval, and the estimate that it is about"
