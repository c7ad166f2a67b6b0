"""Test the report on an embedding: sections of the page, lines for the terminal, a record, and the table of points."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from analysis.embedding_points import PROJECTED, REAL, SYNTHETIC, Column, Points
from analysis.embedding_report import MEANINGLESS, describe, report_html, results_record
from analysis.embedding_table import write_table
from tests.helpers.html_pages import Tags
from tests.helpers.made_embedding import NASTY, WHY_NOT, make_embedding, make_mixtures, make_purity

SHOWN = NASTY.replace("\udcff", "\\udcff")


def report(embedding, mixtures=None, purity=None, notes=()):
    text = report_html(embedding, make_mixtures(embedding) if mixtures is None else mixtures,
                       make_purity() if purity is None else purity, notes)
    return Tags(text)


def text_of(tags):
    return " ".join(" ".join(tags.texts).split())


def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_report_has_its_sections_in_order():
    text = text_of(report(make_embedding(60, 30, 20), notes=["3 images have no label."]))
    marks = ["How to read this page", "the network efficientnet-lite0", MEANINGLESS, "3 images have no label.",
             "How far the map can be trusted", "Do synthetic.zip and the real images mix?",
             "Do projected.zip and the real images mix?", "Are the neighbors of the same class?",
             "Where synthetic.zip has nothing"]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert "Where projected.zip has nothing" not in text  # some projections are not meant to cover all real images


def test_report_tells_who_decides_about_the_map_and_whose_pictures_are_missing():
    text = text_of(report(make_embedding(60, 30, 20)))
    assert ("The 60 real images alone decide about the map. Those of synthetic.zip and projected.zip are placed among "
            "them, and do not move them." in text)
    assert f"I{WHY_NOT[1:]}" in text
    text = text_of(report(make_embedding(60, 0, 0, hidden=())))
    assert "placed among" not in text
    assert "dataset.json" not in text


def test_report_tells_each_reason_and_note_once_as_a_sentence():
    hidden = make_embedding(60, 30, 20, hidden=(REAL, PROJECTED))
    reasons = [f"pictures of {one.name} are not shown: --no-real-images is given" if one.kind != SYNTHETIC else ""
               for one in hidden.points.sets]
    sets = [replace(one, why_not=reason) for one, reason in zip(hidden.points.sets, reasons)]
    hidden = replace(hidden, points=replace(hidden.points, sets=sets))
    text = text_of(report(hidden, notes=[reasons[0], "3 images have no label", reasons[2], "real.zip is small."]))
    assert ("Pictures of real.zip are not shown: --no-real-images is given. Pictures of projected.zip are not shown: "
            "--no-real-images is given. 3 images have no label. real.zip is small. How far" in text)
    assert text.count("are not shown") == 2
    sets = [replace(one, why_not="") for one in sets]
    text = text_of(report(replace(hidden, points=replace(hidden.points, sets=sets))))
    assert "Images of real.zip are dots, because they have no pictures." in text


@pytest.mark.parametrize(("features", "sentence"), [
    ({"name": "w", "network": "net"}, "have similar styles in the generator, which may weigh other things than"),
    ({"name": "a.safetensors", "labels": ["b", "m"]}, "look similar to the classifier a.safetensors, which may weigh"),
    ({"name": "inception"}, "look similar to the network inception, which may weigh other things than a"),
    ({}, "look similar to a network, which may weigh other things than a dermatologist does, such as hairs")])
def test_report_says_what_similar_means(features, sentence):
    embedding = replace(make_embedding(), settings={"features": features})
    assert f"Each dot is an image. Images that are near each other {sentence}" in text_of(report(embedding))


def test_distances_mean_nothing_on_maps_other_than_pca():
    assert MEANINGLESS.startswith("On t-SNE and UMAP maps, distances between clusters and the sizes of clusters mean ")
    embedding = make_embedding(60, 30, 0)
    assert text_of(report(embedding)).count(MEANINGLESS) == 1
    embedding = replace(embedding, layouts=embedding.layouts[1:])
    assert MEANINGLESS not in text_of(report(embedding))
    assert MEANINGLESS not in list(describe(embedding, make_mixtures(embedding), make_purity()))


def test_report_has_the_quality_of_each_map_for_real_and_placed_points():
    embedding = make_embedding()
    assert "t-SNE real 0.95 0.4 10 60 t-SNE placed 0.95 0.4 10 60 PCA real 0.95 0.4 10 60" in text_of(report(embedding))
    assert "placed 0.95" not in text_of(report(make_embedding(60, 0, 0)))


def test_report_compares_shares_with_what_equality_gives():
    embedding = make_embedding(60, 30, 0)
    text = text_of(report(embedding, make_mixtures(embedding, share=0.25)))
    assert "all 60 30 30 0.25 0.2 to 0.3 0.333 0.75" in text
    assert "df 2 1 1 - there are too few images - -" in text
    assert "Share of the set among the 10 nearest images of real ones; intervals hold what is compatible" in text


def test_report_explains_what_is_left_out_and_ratios_above_1():
    text = text_of(report(make_embedding()))
    assert "own patient or lesion are left out: a projection does not count for its own original." in text
    assert "A larger share (a ratio above 1) means that its images crowd around common real images, or are" in text


def test_report_without_shares_does_not_claim_any():
    embedding = make_embedding(60, 30, 0)
    mixtures = make_mixtures(embedding)
    mixtures = [replace(mixture, num_neighbors=100, rows=mixture.rows[1:]) for mixture in mixtures]
    text = text_of(report(embedding, mixtures))
    assert "There are too few images to tell the share of the set among the 100 nearest images of real ones." in text
    assert "Share of the set among" not in text


def test_report_has_no_number_of_patients_where_they_are_unknown():
    embedding = make_embedding(60, 30, 0)
    mixtures = make_mixtures(embedding, share=0.25)
    mixtures = [replace(mixture, rows=[replace(row, num_groups=None) for row in mixture.rows]) for mixture in mixtures]
    purity = [replace(row, num_groups=None) for row in make_purity()]
    text = text_of(report(embedding, mixtures, purity))
    assert "all 60 - 30 0.25 0.2 to 0.3 0.333 0.75" in text
    assert "the real images all 60 - 0.7" in text
    record = results_record(embedding, mixtures, purity, [])
    assert record["mixtures"][0]["rows"][0]["real_groups"] is None
    assert record["real_purity"][0]["groups"] is None


def test_long_tables_say_that_they_are_cut():
    embedding = make_embedding(60, 30, 0)
    purity = make_purity()[:1] * 1203
    text = text_of(report(embedding, purity=purity))
    assert text.count("These are the first 200 of 1,206 rows; the JSON file beside the page has all.") == 1
    assert text.count("rows; the JSON file") == 1
    mixtures = [replace(mixture, rows=mixture.rows * 101) for mixture in make_mixtures(embedding)]
    assert "These are the first 200 of 202 rows; the JSON" in text_of(report(embedding, mixtures))


def test_classes_that_no_real_image_has_are_named():
    embedding = make_embedding(60, 30, 0)
    mixtures = [replace(mixture, unknown_classes=["a", "b"]) for mixture in make_mixtures(embedding)]
    sentence = "Classes of synthetic.zip that no real image has are not compared: a, b."
    assert text_of(report(embedding, mixtures)).count(sentence) == 1
    assert sentence in list(describe(embedding, mixtures, make_purity()))
    assert results_record(embedding, mixtures, [], [])["mixtures"][0]["unknown_classes"] == ["a", "b"]
    mixtures = [replace(mixture, purity=()) for mixture in mixtures]
    text = text_of(report(embedding, mixtures, []))
    assert ("Are the neighbors of the same class? The classes of synthetic.zip are not compared, because the real "
            "images have none." in text)


@pytest.mark.parametrize(("share", "color"), [(0.1, "45 111 193"), (0.6, "224 130 20")])
def test_report_colors_small_and_large_ratios(share, color):
    embedding = make_embedding(60, 30, 0)
    styles = [cell["style"] for cell in report(embedding, make_mixtures(embedding, share)).all("td") if "style" in cell]
    assert len(styles) == 1
    assert color in styles[0]


def test_report_has_the_purity_of_real_and_synthetic_images():
    text = text_of(report(make_embedding(60, 30, 0)))
    assert "the real images all 60 30 0.7 0.65 to 0.75 0.25 the real images nv 40 20 0.8" in text
    assert "synthetic.zip all 60 30 0.5 0.45 to 0.55 0.25" in text
    assert "synthetic.zip df 2 1 - too few images 0.03" in text


def test_report_without_classes_has_no_section_about_them():
    embedding = make_embedding(60, 30, 0)
    mixtures = [replace(mixture, purity=()) for mixture in make_mixtures(embedding)]
    assert "of the same class?" not in text_of(report(embedding, mixtures, []))


def test_report_shows_the_regions_with_links_to_the_map_and_pictures_of_what_may_be_shown():
    embedding = make_embedding(60, 30, 0, hidden=())
    page = report(embedding)
    text = text_of(page)
    assert ("For 40 % of the real images (35 % to 45 %), no image of the set is as near as their 9 nearest real ones. "
            "Among a random half of the real images, and with 25 images of each, 30 % are without an image of the set, "
            "and 1 % without a real one of the other half." in text)
    assert "Region 1: 0 images of the set, 4.5 expected 10 real images: 7 nv, 3 without a class." in text
    assert "Region 2: 1 image of the set, 4.5 expected" in text
    assert [link["href"] for link in page.all("a")] == ["#pin=0", "#pin=10"]
    names = [image["alt"] for image in page.all("img")]
    assert len(names) == 2 * (8 + 1)
    assert names[0] == f"00000/img00000000.png ({embedding.points.classes[0]})"
    assert names[8] == f"00000/img00000000.png of synthetic.zip ({embedding.points.classes[60]})"


def test_captions_name_the_set_where_there_are_several_real_ones():
    embedding = make_embedding(60, 30, 0, hidden=())
    first, second = embedding.points.sets
    half = {field: getattr(first, field)[30:] for field in ("names", "classes", "groups")}
    sets = [replace(first, **{field: getattr(first, field)[:30] for field in half}),
            replace(first, name="site2.zip", **half), second]
    embedding = replace(embedding, points=replace(embedding.points, sets=sets))
    mixtures = [replace(mixture, set_number=2, regions=[replace(region, rows=[row + 25 for row in region.rows])
                                                        for region in mixture.regions])
                for mixture in make_mixtures(embedding) if mixture.set_number == 2]
    names = [image["alt"].split(" (")[0] for image in report(embedding, mixtures).all("img")]
    assert names[4:6] == ["00000/img00000029.png of real.zip", "00000/img00000030.png of site2.zip"]
    region = results_record(embedding, mixtures, [], [])["mixtures"][0]["regions"][0]
    assert region["images"][4:6] == [{"set": "real.zip", "name": "00000/img00000029.png"},
                                     {"set": "site2.zip", "name": "00000/img00000030.png"}]
    assert region["nearest"] == {"set": "synthetic.zip", "name": "00000/img00000000.png"}


def test_report_has_no_picture_of_hidden_sets():
    page = report(make_embedding(60, 30, 0, hidden=(REAL,)))
    assert len(page.all("img")) == 2
    page = report(make_embedding(60, 30, 0, hidden=(REAL, SYNTHETIC)))
    assert not page.all("img")
    assert "nearest of the set: 00000/img00000000.png of synthetic.zip (" in text_of(page)


def test_report_of_a_set_that_lacks_nothing_says_so():
    embedding = make_embedding(60, 30, 0)
    mixtures = [replace(mixture, regions=(), empty_share=None, control_share=None)
                for mixture in make_mixtures(embedding)]
    text = text_of(report(embedding, mixtures))
    assert "No region is empty: none has less than half of the images that are expected, beyond what chance" in text
    assert "There are too few images to tell how many real images have none of the set near them." in text


def test_report_without_other_sets_has_the_map_and_the_classes():
    text = text_of(report(make_embedding(60, 0, 0)))
    assert "How far the map can be trusted" in text
    assert "Are the neighbors of the same class?" in text
    assert "mix?" not in text


def test_report_with_hostile_names_has_the_same_tags():
    plain, hostile = make_embedding(hidden=()), make_embedding(hidden=(), nasty=NASTY)
    found = [report(plain, make_mixtures(plain), notes=[""]),
             report(hostile, make_mixtures(hostile, nasty=NASTY), notes=[NASTY])]
    assert [tag for tag, _ in found[0].tags] == [tag for tag, _ in found[1].tags]
    assert f"{NASTY}." in found[1].texts


def test_record_is_strict_json_with_all_numbers():
    embedding = make_embedding(60, 30, 20, nasty=NASTY)
    record = results_record(embedding, make_mixtures(embedding), make_purity(), ["a note"])
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert [one["kind"] for one in record["sets"]] == [REAL, SYNTHETIC, PROJECTED]
    assert record["maps"][0]["placed"] == {"trustworthiness": 0.95, "preservation": 0.4, "num_neighbors": 10,
                                           "num_points": 60}
    row, missing = record["mixtures"][0]["rows"]
    assert (row["class"], row["share"]["estimate"], row["ratio"]) == (None, 0.2, pytest.approx(0.6))
    assert (missing["class"], missing["share"], missing["ratio"], missing["reason"]) == (
        "df", None, None, "there are too few images")
    region = record["mixtures"][0]["regions"][1]
    assert region["images"][0] == {"set": f"real.zip{NASTY}", "name": f"00000/img00000010.png{NASTY}"}
    assert region["found"] == 1
    mixture = record["mixtures"][0]
    assert (mixture["empty_share"]["estimate"], mixture["matched_share"], mixture["control_share"],
            mixture["num_matched"]) == (0.4, 0.3, 0.01, 25)
    assert record["real_purity"][1]["share"]["estimate"] == pytest.approx(0.8)


def test_lines_for_the_terminal_have_the_main_numbers():
    embedding = make_embedding(60, 30, 0)
    lines = list(describe(embedding, make_mixtures(embedding), make_purity()))
    assert lines[:2] == ["real.zip: 60 images, real", "synthetic.zip: 30 images, synthetic"]
    assert "t-SNE  real              0.950         0.400         10" in lines
    assert ("share of synthetic.zip among the 10 nearest images of real ones: 0.2 (0.15 to 0.25), expected 0.333, "
            "ratio 0.6" in lines)
    assert "nearest real images of the same class, of the real images: 0.7 (0.65 to 0.75), by chance 0.25" in lines
    assert lines[-1] == MEANINGLESS


def test_table_has_facts_places_and_nearest_real_image_of_each_point(tmp_path):
    embedding = make_embedding(60, 30, 20)
    write_table(tmp_path / "map.csv", embedding)
    rows = read_table(tmp_path / "map.csv")
    assert list(rows[0]) == ["name", "set", "kind", "class", "group", "localization", "age", "tsne_x", "tsne_y",
                             "pca_x", "pca_y", "nearest_real", "nearest_real_set", "nearest_distance"]
    assert [row["set"] for row in rows] == ["real.zip"] * 60 + ["synthetic.zip"] * 30 + ["projected.zip"] * 20
    assert [float(row["pca_x"]) for row in rows] == pytest.approx(embedding.layouts[1].coordinates[:, 0], rel=1e-5)
    ages = [float(row["age"] or "nan") for row in rows]
    assert np.array_equal(ages, embedding.points.columns[4].values, equal_nan=True)
    found = int(embedding.nearest.rows[70, 0])
    assert (rows[70]["nearest_real"], rows[70]["nearest_real_set"]) == (f"00000/img{found:08d}.png", "real.zip")
    assert float(rows[70]["nearest_distance"]) == pytest.approx(embedding.nearest.distances[70, 0], rel=1e-5)


def test_table_has_groups_only_of_sets_with_pictures(tmp_path):
    write_table(tmp_path / "map.csv", make_embedding(60, 30, 20))
    groups = [row["group"] for row in read_table(tmp_path / "map.csv")]
    assert groups == [""] * 90 + [f"HAM_{index // 2:07d}" for index in range(20)]


def test_table_has_no_neighbor_where_there_is_none(tmp_path):
    embedding = make_embedding(60, 0, 0)
    embedding.nearest.rows[0] = -1
    embedding.nearest.distances[0] = np.nan
    write_table(tmp_path / "map.csv", embedding)
    row = read_table(tmp_path / "map.csv")[0]
    assert (row["nearest_real"], row["nearest_real_set"], row["nearest_distance"]) == ("", "", "")


def test_table_keeps_hostile_names_and_no_cell_is_a_formula(tmp_path):
    embedding = make_embedding(60, 0, 0, nasty=NASTY)
    values = ["=1+1", "@SUM(A1)", "+1", "-2.5", "-x", "\t=1", "plain"] + [""] * 53
    embedding = replace(embedding, points=Points(sets=embedding.points.sets,
                                                 columns=[Column(key="text", title="text", values=values)]))
    write_table(tmp_path / "map.csv", embedding)
    rows = read_table(tmp_path / "map.csv")
    assert [row["text"] for row in rows[:7]] == ["'=1+1", "'@SUM(A1)", "+1", "-2.5", "'-x", "'\t=1", "plain"]
    assert rows[1]["name"] == f"00000/img00000001.png{SHOWN}"


def test_table_is_not_written_by_half(tmp_path):
    path = tmp_path / "missing" / "map.csv"
    with pytest.raises(FileNotFoundError):
        write_table(path, make_embedding(60, 0, 0))
    assert re.findall("tmp", "".join(file.name for file in tmp_path.iterdir())) == []
