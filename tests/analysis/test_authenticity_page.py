"""Test the page of the tests of authenticity: its order, its pictures, and that it loads nothing."""

import re

import numpy as np
import pytest
import torch

from analysis.authenticity_page import MOST_PAIRS, write_authenticity_page
from analysis.authenticity_report import LIMITS, conclusion
from analysis.authenticity_results import AuthenticityResults, GalleryPair, SecondaryNumber, adjust
from tests.helpers.html_pages import CHROMIUM, HOSTILE, open_in_chromium, read
from tests.helpers.made_authenticity import make_power, make_results, make_test

NASTY = f"{HOSTILE}\U0001f600\udcff"


def write(folder, results, real_images=True):
    write_authenticity_page(folder, results, real_images=real_images)
    return read(folder / "page.html")


def text_of(page):
    return " ".join(" ".join(page.texts).split())


def nasty_results():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    pair = GalleryPair(name=NASTY, training_name=NASTY, image=image, training_image=image, similarity=0.9, ratio=0.5,
                       alignment=NASTY)
    return make_results(
        {"nearest": 0.2, "membership": None}, {"membership": NASTY}, notes=[NASTY], equal_images=[(NASTY, NASTY)],
        protocol={NASTY: NASTY}, settings={NASTY: {NASTY: [NASTY]}}, counts={NASTY: {NASTY: 1}},
        power=[make_power(**{NASTY: (0, 0, 0, 20)})], distances={NASTY: {NASTY: np.arange(3.0)}},
        secondary=[SecondaryNumber(name=NASTY, value=1.0, meaning=NASTY, weakness=NASTY)],
        pairs={"synthetic": [pair], NASTY: [pair]})


def test_page_begins_with_the_conclusion_and_has_its_sections_in_order(tmp_path):
    results = make_results()
    page = write(tmp_path, results)
    text = text_of(page)
    marks = [*conclusion(results), "Held-out images are real images", "The most similar pairs", "What each test asked",
             results.tests[0].question, "What the tests would have found", "Distances and scores",
             "Other numbers, which decide nothing", "What these tests cannot see", *LIMITS, "How it was computed",
             "ab" * 32, "versions, torch"]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)


def test_page_has_number_control_and_power_of_each_test(tmp_path):
    text = text_of(write(tmp_path, make_results({"projection": None, "nearest": 0.0001}, {"projection": "no network"})))
    assert "Did not run: no network" in text
    assert "0.213 (0.163 to 0.263)" in text
    assert "Control: Two halves of the held-out images differ by 0.002." in text
    assert ("Power: It would have found copies from a share of 1 % on, in each transformation, in 90 % of 20 draws."
            in text)
    assert "n: 64 training images, 60 training groups, 64 held-out images." in text


def test_page_shows_pairs_side_by_side_with_what_was_measured(tmp_path):
    page = write(tmp_path, make_results(pairs=3))
    names = [image["alt"] for image in page.all("img")]
    assert names[:4] == ["synthetic/img00000.png", "training image train/ISIC_0000000.jpg", "control/img00000.png",
                         "training image train/ISIC_0000000.jpg"]
    assert len(names) == 1 + 3 * 2 * 2
    assert ("SSIM 0.920, ratio 0.43; mirrored, shifted by 3, 0 pixels; synthetic/img00001.png | train/ISIC_0000001.jpg"
            in page.texts)


def test_page_shows_only_the_most_similar_pairs(tmp_path):
    assert len(write(tmp_path, make_results(pairs=MOST_PAIRS + 5)).all("img")) == 1 + MOST_PAIRS * 2 * 2


def test_page_without_real_images_has_no_picture_of_a_pair_and_says_why(tmp_path):
    page = write(tmp_path, make_results(), real_images=False)
    assert [image["alt"] for image in page.all("img")] == [
        "Histograms of 1 - SSIM: synthetic, held-out, training, among other groups"]
    assert "No pictures are shown, because --no-real-images was given" in text_of(page)
    assert "ISIC_" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_page_has_distances_with_their_numbers(tmp_path):
    by_set = {"synthetic": np.arange(101.0), "held-out": np.arange(51.0), "empty": np.empty(0)}
    text = text_of(write(tmp_path, make_results(distances={"distance": by_set})))
    assert "distance; n: synthetic 101, held-out 51, empty 0" in text
    assert "synthetic 101 0 1 5 50 95 held-out 51 0 0.5 2.5 25 47.5 empty 0 - - - - -" in text


def test_page_colors_the_power_and_gives_the_smallest_shares(tmp_path):
    page = write(tmp_path, make_results(power=[make_power(plain=(0, 10, 20, 20), cropped=(0, 0, 0, 0))]))
    text = text_of(page)
    assert "The first table has the smallest share that each test would have found in 90 % of 20 draws." in text
    assert "2 Nearest training image: structural similarity 1 % none up to 5 %" in text
    assert "plain 0 of 20 10 of 20 20 of 20 20 of 20 cropped 0 of 20" in text
    shades = [cell["style"] for cell in page.all("td") if "style" in cell]
    assert len(shades) == 3
    assert shades[0] != shades[1] == shades[2]


def test_page_of_results_without_anything_says_what_is_missing(tmp_path):
    text = text_of(write(tmp_path, AuthenticityResults(
        protocol={}, settings={}, counts={}, tests=adjust([make_test("nearest", None, "no set")]))))
    for sentence in ("No test ran: it is not known whether there is a leak.", "No distances were measured.",
                     "No pairs were compared.", "No copies were planted", "None were computed."):
        assert sentence in text


def test_page_with_hostile_texts_shows_them_and_adds_no_tag(tmp_path):
    page = write(tmp_path, nasty_results())
    assert len(page.all("script")) == 1
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert page.texts.count(f"{HOSTILE}\U0001f600\\udcff") > 5


@pytest.mark.parametrize("real_images", [True, False])
def test_page_refers_to_nothing_outside(tmp_path, real_images):
    page = write(tmp_path, make_results(), real_images)
    assert {tag for tag, _ in page.tags}.isdisjoint({"a", "link", "iframe", "object", "embed", "base", "form", "svg"})
    for _, attributes in page.tags:
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        assert not {"href", "srcset", "data-picture", "action", "background", "poster"} & attributes.keys()
    assert not re.search(r"https?:|url\(|@import", (tmp_path / "page.html").read_text(encoding="utf-8"))


def test_page_does_not_depend_on_when_it_is_written(tmp_path):
    contents = []
    for _ in range(2):
        write(tmp_path, make_results())
        contents.append((tmp_path / "page.html").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed")
def test_page_in_a_browser_requests_nothing_and_logs_nothing(tmp_path):
    write(tmp_path, nasty_results())
    assert open_in_chromium(tmp_path / "page.html", tmp_path) == ([], set())


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed")
def test_other_page_in_the_browser_is_caught_when_it_requests_and_logs(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<img src="http://example.invalid/x.png"><script>console.log("here")</script>', encoding="utf-8")
    console, addresses = open_in_chromium(page, tmp_path)
    assert any('"here"' in line for line in console)
    assert addresses == {"http://example.invalid/x.png"}
