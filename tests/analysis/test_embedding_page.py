"""Test the page of an embedding: its data, its pictures, its scripts, and that no name harms it."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from analysis.embedding_page import FOLDER, NEIGHBORS_ONLY, SCRIPTS, page_script, write_embedding_page
from analysis.embedding_points import PROJECTED, REAL, SYNTHETIC, Column, Points
from analysis.embedding_report import report_html
from latent.exploration_page import SCRIPT
from tests.helpers.html_pages import CHROMIUM, open_in_chromium, read
from tests.helpers.made_embedding import CLASSES, NASTY, WHY_NOT, make_embedding, make_mixtures, make_purity

SHOWN = NASTY.replace("\udcff", "\\udcff")  # bytes that are not UTF-8 are written so
DECLARED = re.compile(r"^(?:export )?(?:async )?(?:function\*?|const|let|class) (\w+|[{\[][^=]*[}\]])", re.MULTILINE)


def write(folder, embedding, report="<p>numbers</p>", workers=1):
    """Write a page; return its tags, and its data."""
    write_embedding_page(folder / "map.html", embedding, report, workers)
    page = read(folder / "map.html")
    place = next(index for index, (tag, attributes) in enumerate(page.tags) if attributes.get("id") == "data")
    scripts = [tag for tag, _ in page.tags[:place]].count("script")
    text = (folder / "map.html").read_text(encoding="utf-8")
    data = re.findall(r'<script type="application/json" id="data">([^<]*)</script>', text)
    assert (scripts, len(data)) == (0, 1)
    return page, json.loads(data[0])


def numbers(text, kind):
    return np.frombuffer(base64.b64decode(text), dtype=kind)


def with_columns(embedding, *columns):
    return replace(embedding, points=Points(sets=embedding.points.sets, columns=columns))


def test_page_data_has_the_sets_in_order_with_the_reason_for_dots(tmp_path):
    _, data = write(tmp_path, make_embedding(60, 30, 20))
    assert data["sets"] == [
        {"name": "real.zip", "kind": REAL, "start": 0, "count": 60, "pictures": False, "why": WHY_NOT},
        {"name": "synthetic.zip", "kind": SYNTHETIC, "start": 60, "count": 30, "pictures": True, "why": ""},
        {"name": "projected.zip", "kind": PROJECTED, "start": 90, "count": 20, "pictures": True, "why": ""}]
    assert (data["count"], data["numReal"], data["space"]) == (110, 60, "efficientnet-lite0")
    assert (data["title"], data["names"][60]) == ("A map", "00000/img00000000.png")


def test_page_data_has_the_coordinates_of_each_map_up_to_one_scale(tmp_path):
    embedding = make_embedding()
    _, data = write(tmp_path, embedding)
    assert [(one["key"], one["title"], one["note"]) for one in data["maps"]] == [
        ("tsne", "t-SNE", f"made up {NEIGHBORS_ONLY}"), ("pca", "PCA", "made up")]
    for layout, one in zip(embedding.layouts, data["maps"], strict=True):
        shown = np.stack([numbers(one["x"], "<u2"), numbers(one["y"], "<u2")], axis=1).astype(float)
        scale = 65535 / np.ptp(layout.coordinates, axis=0).max()
        moved = shown - scale * layout.coordinates
        assert np.abs(moved - moved.mean(axis=0)).max() <= 1
        assert (shown.min(), shown.max()) == (0, 65535)


def test_page_data_has_columns_by_value_and_number(tmp_path):
    embedding = make_embedding()
    _, data = write(tmp_path, embedding)
    columns = {one["key"]: one for one in data["columns"]}
    assert list(columns) == ["class", "source", "set", "localization", "age"]
    codes = numbers(columns["localization"]["codes"], "u1")
    found = ["" if code == 255 else columns["localization"]["values"][code] for code in codes]
    assert found == embedding.points.columns[3].values
    counts = np.bincount(numbers(columns["class"]["codes"], "u1"))
    assert counts.tolist() == sorted(counts, reverse=True)
    assert set(columns["class"]["values"]) == set(CLASSES)
    assert np.array_equal(numbers(columns["age"]["data"], "<f4"), embedding.points.columns[4].values, equal_nan=True)


@pytest.mark.parametrize(("count", "kind"), [(255, "u1"), (256, "<u2")])
def test_page_data_has_wide_codes_for_more_values_than_bytes(tmp_path, count, kind):
    values = [f"value {index % (count + 1)}" if index % (count + 1) < count else "" for index in range(600)]
    _, data = write(tmp_path, with_columns(make_embedding(600, 0, 0), Column(key="id", title="id", values=values)))
    column, = data["columns"]
    codes = numbers(column["codes"], kind)
    assert column.get("wide", False) == (kind == "<u2")
    missing = 255 if kind == "u1" else 65535
    assert ["" if code == missing else column["values"][code] for code in codes] == values


def test_page_data_has_neighbors_of_which_some_are_missing(tmp_path):
    embedding = make_embedding()
    _, data = write(tmp_path, embedding)
    neighbors = data["neighbors"]
    assert neighbors["count"] == 5
    assert np.array_equal(numbers(neighbors["rows"], "<i4"), embedding.nearest.rows.ravel())
    assert np.array_equal(numbers(neighbors["distances"], "<f4"),
                          embedding.nearest.distances.ravel().astype(np.float32), equal_nan=True)


def test_page_data_has_groups_only_of_sets_with_pictures(tmp_path):
    _, data = write(tmp_path, make_embedding(60, 30, 20, hidden=(REAL,)))
    codes = numbers(data["groups"]["codes"], "<i4")
    assert (codes[:90] == -1).all()
    assert [data["groups"]["values"][code] for code in codes[90:93]] == ["HAM_0000000", "HAM_0000000", "HAM_0000001"]
    _, data = write(tmp_path, make_embedding(60, 30, 20, hidden=(REAL, SYNTHETIC, PROJECTED)))
    assert data["groups"] is None


def test_page_has_the_picture_of_each_point_on_its_tile(tmp_path):
    embedding = make_embedding(400, 200, 0, hidden=())
    page, data = write(tmp_path, embedding)
    pictures = data["pictures"]
    assert {name: pictures[name] for name in ("side", "perRow", "perSprite", "mime")} == {
        "side": 16, "perRow": 16, "perSprite": 256, "mime": "image/webp"}
    tiles = numbers(pictures["tiles"], "<i4")
    assert sorted(tiles) == list(range(600))
    sprites = [text for text in page.texts if text.startswith("UklGR")]  # "RIFF", as WebP files begin, in base64
    assert [script["type"] for script in page.all("script") if script.get("class") == "sprite"] == ["text/plain"] * 3
    sheets = [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in sprites]
    for point in (0, 123, 599):
        sprite, tile = divmod(int(tiles[point]), 256)
        y, x = 16 * (tile // 16), 16 * (tile % 16)
        errors = ((embedding.thumbnails - sheets[sprite][y:y + 16, x:x + 16].astype(float)) ** 2).mean(axis=(1, 2, 3))
        assert errors.argmin() == point


def test_page_has_pictures_near_each_other_on_the_first_map_in_one_sprite(tmp_path):
    embedding = make_embedding(1500, 0, 0, hidden=())
    _, data = write(tmp_path, embedding)
    sprites = numbers(data["pictures"]["tiles"], "<i4") // 256
    places = embedding.layouts[0].coordinates
    spread = [places[sprites == sprite].std(axis=0).mean() for sprite in range(5)]
    assert np.mean(spread) < 0.5 * places.std(axis=0).mean()


def test_page_without_pictures_has_no_sprite(tmp_path):
    page, data = write(tmp_path, make_embedding(60, 0, 0))
    assert (numbers(data["pictures"]["tiles"], "<i4") == -1).all()
    assert not [script for script in page.all("script") if script.get("class") == "sprite"]


def test_page_is_the_same_for_the_same_embedding_by_any_number_of_processes(tmp_path):
    contents = []
    for workers in (1, 2):
        write(tmp_path, make_embedding(400, 200, 0, hidden=()), workers=workers)
        contents.append((tmp_path / "map.html").read_bytes())
    assert contents[0] == contents[1]
    write(tmp_path, make_embedding(400, 200, 0, hidden=(), seed=1))
    assert (tmp_path / "map.html").read_bytes() != contents[0]


def test_page_with_hostile_names_has_no_other_tags_and_keeps_the_names(tmp_path):
    def tags(nasty):
        embedding = make_embedding(60, 30, 20, nasty=nasty)
        report = report_html(embedding, make_mixtures(embedding, nasty=nasty), make_purity(), [f"a note{nasty}"])
        page, data = write(tmp_path, embedding, report)
        return [tag for tag, _ in page.tags], page, data

    (plain, *_), (hostile, page, data) = tags(""), tags(NASTY)
    assert hostile == plain
    assert data["names"][0] == f"00000/img00000000.png{SHOWN}"
    assert data["title"] == f"A map{SHOWN}"
    assert f"A map{SHOWN}" in page.texts
    assert not any("onerror" in attributes for _, attributes in page.tags)


def test_page_admits_its_own_scripts_only_and_requests_nothing(tmp_path):
    page, _ = write(tmp_path, make_embedding(60, 30, 20))
    policy = page.all("meta")[1]["content"].split("; ")
    assert policy[0] == "default-src 'none'"
    assert "img-src data: blob:" in policy
    hashes = next(entry for entry in policy if entry.startswith("script-src ")).split()[1:]
    assert all(re.fullmatch(r"'sha256-[\w+/]{43}='", one) for one in hashes)
    assert len(hashes) == len([script for script in page.all("script") if "type" not in script]) == 2
    assert not re.search(r"https?:|url\(|@import", (tmp_path / "map.html").read_text(encoding="utf-8"))


def test_scripts_are_all_modules_in_an_order_in_which_they_can_be_joined():
    assert {path.stem for path in FOLDER.glob("*.mjs")} == set(SCRIPTS)
    known = set()
    for name in SCRIPTS:
        text = (FOLDER / f"{name}.mjs").read_text(encoding="utf-8")
        assert text.isascii()
        assert "</script" not in text
        assert "<!--" not in text
        assert set(re.findall(r'from "\./(\w+)\.mjs"', text)) <= known
        known.add(name)
    names = DECLARED.findall("".join((FOLDER / f"{name}.mjs").read_text(encoding="utf-8") for name in SCRIPTS))
    assert len(names) > 50
    assert sorted(names) == sorted(set(names))
    assert not re.search(r"^\s*(import|export)\b", page_script(), re.MULTILINE)
    assert "</script" not in SCRIPT


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed")
def test_page_with_hostile_names_in_a_browser_requests_nothing_and_logs_nothing(tmp_path):
    embedding = make_embedding(60, 30, 20, nasty=NASTY)
    report = report_html(embedding, make_mixtures(embedding, nasty=NASTY), make_purity(), [NASTY])
    write(tmp_path, embedding, report)
    assert open_in_chromium(tmp_path / "map.html", tmp_path) == ([], set())


def test_page_of_5000_pictures_is_small(tmp_path):  # one of 50,000: tests/end_to_end/test_embedding_speed.py
    embedding = make_embedding(2000, 2500, 500, side=64, hidden=())
    report = report_html(embedding, make_mixtures(embedding), make_purity(), [])
    write_embedding_page(tmp_path / "map.html", embedding, report)
    assert len(embedding.thumbnails) == 5000
    assert (tmp_path / "map.html").stat().st_size < 3e6
