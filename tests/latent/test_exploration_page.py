"""Test the pages of explore.py: what they hold, that hostile texts stay texts, and that nothing else is loaded."""

import base64
import hashlib
import io
import re

import numpy as np
import PIL.Image
import pytest
import torch

from latent.exploration_page import (
    Cell,
    bullet_list,
    captioned,
    figure,
    heading,
    image_tag,
    paragraph,
    picture_table,
    sortable_table,
    write_page,
)
from tests.helpers.html_pages import HOSTILE, Tags, read


def picture_of(tag):
    (attributes,) = Tags(tag).all("img")
    data = attributes["src"].removeprefix("data:image/png;base64,")
    return attributes, np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))


def test_page_with_hostile_texts_everywhere_shows_them_and_adds_no_tag(tmp_path):
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)

    def page(text):
        cell = Cell(text, title=text, link=text)
        body = (heading(text) + paragraph(text) + figure(image_tag(pixels, text), text)
                + picture_table([text], [(text, [captioned(image_tag(pixels, text), text)])], text)
                + sortable_table([text, text], [[cell, text]], text))
        write_page(tmp_path / "page.html", text, body)
        return read(tmp_path / "page.html")

    plain, hostile = page("plain"), page(HOSTILE)

    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert [set(attributes) for _, attributes in hostile.tags] == [set(attributes) for _, attributes in plain.tags]
    assert hostile.texts.count(HOSTILE) == plain.texts.count("plain") == 15
    assert {attributes["alt"] for attributes in hostile.all("img")} == {HOSTILE}


def test_page_policy_admits_only_its_own_script_and_no_other_server(tmp_path):
    write_page(tmp_path / "page.html", "title", "")

    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (policy,) = [tag["content"] for tag in read(tmp_path / "page.html").all("meta")
                 if tag.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data: 'self' file:"
    assert "http:" not in text
    assert "https:" not in text


@pytest.mark.parametrize("channels", [1, 3])
def test_image_tag_holds_the_pixels_and_says_the_size_on_the_screen(channels):
    pixels = torch.randint(256, (channels, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    attributes, found = picture_of(image_tag(pixels, "an image", scale=3))

    expected = pixels[0] if channels == 1 else pixels.permute(1, 2, 0)
    np.testing.assert_array_equal(found, expected.numpy())
    assert (attributes["width"], attributes["height"], attributes["class"]) == ("21", "15", "enlarged")


def test_image_tag_with_a_limit_reduces_larger_images_only():
    image = PIL.Image.new("RGB", (40, 20), "red")

    large, small = picture_of(image_tag(image, "", most=10))[1], picture_of(image_tag(image, "", most=40))[1]

    assert large.shape == (5, 10, 3)
    assert small.shape == (20, 40, 3)
    assert image.size == (40, 20)


def test_image_tag_of_numbers_that_are_no_pixels_is_refused():
    with pytest.raises(ValueError, match=r"^an image is torch.float32 \[3, 2, 2\]; expected torch.uint8 "
                                         r"\[1 or 3, H, W\]$"):
        image_tag(torch.zeros(3, 2, 2), "")


def test_sortable_table_gives_the_numbers_that_cells_are_sorted_by():
    rows = [[Cell("0.10", 0.1), Cell("none", float("nan")), "b"], [Cell("2", 2), Cell("inf", float("inf")), "a"]]

    tags = Tags(sortable_table(["number", "missing", "text"], rows))

    assert [cell.get("data-number") for cell in tags.all("td")] == ["0.1", "NaN", None, "2.0", "Infinity", None]
    assert [cell.get("class") for cell in tags.all("th")] == ["number", "number", None]
    assert len(tags.all("button")) == 3


def test_sortable_table_shades_cells_blue_below_zero_and_orange_above():
    row = [Cell("", shade=shade) for shade in (-1, -5, -0.5, 0, None, float("nan"), 0.5, 1)]

    styles = [cell.get("style") for cell in Tags(sortable_table([""] * 8, [row])).all("td")]

    strongest = styles[0]
    assert styles[1] == strongest
    assert styles[3:6] == [None] * 3
    assert styles[2].split(" / ")[0] == strongest.split(" / ")[0] == "background: rgb(45 111 193"
    assert styles[6].split(" / ")[0] == styles[7].split(" / ")[0] == "background: rgb(224 130 20"
    assert [float(styles[index].split(" / ")[1].rstrip(")")) for index in (2, 0)] == [0.275, 0.55]


@pytest.mark.parametrize(("name", "address"), [
    ("direction 1.png", "./direction%201.png"), ("javascript:alert(1)", "./javascript%3Aalert%281%29"),
    ("//elsewhere.org/a.png", "./%2F%2Felsewhere.org%2Fa.png")])
def test_sortable_table_with_a_link_names_a_file_beside_the_page(name, address):
    tags = Tags(sortable_table(["", ""], [["text", Cell("picture", link=name)]]))

    assert [row.get("data-picture") for row in tags.all("tr")] == [None, address]
    assert [link["href"] for link in tags.all("a")] == [address]


def test_sortable_table_shows_the_first_picture_from_the_start():
    rows = [["none", ""], ["first", Cell("", link="a b.png")], [Cell("c", link="c"), ""]]

    tags = Tags(sortable_table(["", ""], rows))

    assert [row.get("class") for row in tags.all("tr")] == [None, None, "chosen", None]
    assert tags.all("img") == [{"src": "./a%20b.png", "alt": "first"}]
    assert "hidden" not in tags.all("figure")[0]
    assert tags.texts.count("first") == 2  # the cell and the caption
    assert not Tags(sortable_table([""], [["none"]])).all("figure")


def test_sortable_table_with_a_short_row_is_refused():
    with pytest.raises(ValueError, match=r"^a row of the table has another number of cells than its 2 columns$"):
        sortable_table(["a", "b"], [["1"]])


def test_bullet_list_escapes_its_texts_and_is_nothing_without_any():
    assert Tags(bullet_list(["one", HOSTILE])).all("li") == [{}, {}]
    assert "".join(Tags(bullet_list([HOSTILE])).texts).strip() == HOSTILE
    assert bullet_list([]) == ""


def test_page_with_bytes_of_file_names_that_are_not_text_shows_escapes(tmp_path):
    write_page(tmp_path / "page.html", "A page", paragraph("ISIC_\udcff.jpg"))
    assert "ISIC_\\udcff.jpg" in read(tmp_path / "page.html").texts


def test_table_marks_sentences_and_leaves_numbers_aligned():
    table = Tags(sortable_table(["text", "number"], [[Cell("A sentence.", is_long=True), Cell("1", sort=1.0)]]))
    assert [cell["class"] for cell in table.all("td")] == ["long", "number"]
