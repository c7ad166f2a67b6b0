"""Reach the map's page by keyboard, by addresses of others, on phones, in light and dark, and with hostile names."""

import csv
import io
import re

import numpy as np
import pytest

from analysis.embedding_page import NEIGHBORS_ONLY
from analysis.embedding_points import SYNTHETIC
from tests.helpers.browser import PHONE, WHY_NO_BROWSER, open_browser
from tests.helpers.made_embedding import NASTY, WHY_NOT, make_embedding
from tests.helpers.map_window import SHOWN, MapWindow, facts_of, rows_of, write_map

pytestmark = pytest.mark.skipif(WHY_NO_BROWSER != "", reason=WHY_NO_BROWSER)
LONG = "a_name_without_a_break_" * 8
ADDRESS_IS_WRITTEN = "() => location.hash.includes('at=') && new Promise(done => setTimeout(() => done(true), 300))"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def embedding():
    return make_embedding(60, 30, 20, side=64)


@pytest.fixture(scope="module")
def path(tmp_path_factory, embedding):
    return write_map(tmp_path_factory.mktemp("map"), embedding)


@pytest.fixture
def window(browser, path):
    """A window of the map, in which nothing may go wrong, whatever a test does."""
    with MapWindow(browser, path) as opened:
        yield opened
        assert opened.problems == []
        assert opened.requests == [opened.url]


# ------------------------------------------------------------------------------------------------------------- keyboard


def test_tab_reaches_all_controls_in_order_and_the_focus_is_seen(window):
    found, seen = [], []
    for _ in range(14):
        window.page.keyboard.press("Tab")
        name, style, width = window.run("""() => {
          const style = getComputedStyle(document.activeElement);
          return [document.activeElement.id || document.activeElement.className, style.outlineStyle,
            parseFloat(style.outlineWidth)];
        }""")
        found.append(name)
        seen.append(style != "none" and width >= 2)
    assert found[:12] == ["map-choice", "color-choice", "draw-choice", "search", "lasso", "select-view", "theme",
                          "help", "marks", "zoom-in", "zoom-out", "fit"]
    assert set(found[12:]) == {"entry", "only"}
    assert all(seen)


def test_keys_move_zoom_pin_and_walk(window, embedding):
    def press(*keys):
        for key in keys:
            window.page.keyboard.press(key)

    box = window.page.locator("#marks").bounding_box()
    middle = np.array([box["x"] + box["width"] / 2, box["y"] + box["height"] / 2])
    window.page.locator("#help").focus()
    press("Tab")  # the focus comes from the keyboard: the cross is shown
    first = window.places()
    press("+", "+")
    zoomed = window.places()
    assert np.ptp(zoomed[:, 0]) / np.ptp(first[:, 0]) == pytest.approx(2.25, rel=1e-3)
    press("ArrowRight", "ArrowDown")
    assert np.abs(window.places() - zoomed + [box["width"] / 10, box["height"] / 10]).max() < 1
    press("ArrowLeft", "ArrowUp", "-", "-")
    assert np.abs(window.places() - first).max() < 0.1
    press("+", "ArrowLeft", "0")
    assert np.abs(window.places() - first).max() < 0.1

    press("Enter")
    pinned = int(np.linalg.norm(first - middle, axis=1).argmin())
    assert window.state("pin") == pinned
    order = np.argsort(np.linalg.norm(first - first[pinned], axis=1))
    walk = []
    for key in ("n", "n", "n", "p", "p", "p", "p"):
        press(key)
        walk.append(window.state("pin"))
    assert walk == [*order[1:4], order[2], order[1], order[0], order[0]]
    press("Escape")
    assert window.state("pin") == -1
    press("v")
    assert window.text("#selection h2") == "Selection: 110 images"
    press("Escape")
    assert not window.is_shown("#selection")

    press("?")
    assert window.run("() => document.querySelector('#keys').open")
    press("Escape")
    assert not window.run("() => document.querySelector('#keys').open")
    assert window.run("() => document.activeElement.id") == "marks"
    press("/", "+", "n")  # are letters in the field
    assert window.run("() => [document.activeElement.id, document.activeElement.value]") == ["search", "+n"]
    press("Escape")
    assert window.run("() => document.activeElement.id") == "marks"
    assert np.abs(window.places() - first).max() < 0.1


def test_focus_is_kept_where_what_had_it_vanishes(window):
    def focused():
        return window.run("() => { const {id, textContent} = document.activeElement; return id || textContent; }")

    for name in ("nv", "mel"):
        window.legend_entry(name).click()
    window.legend_entry("real.zip", "#sets").click()
    for chip, next_one in (("set: real.zip hidden", "\xd7 class: mel, nv hidden"),
                           ("class: mel, nv hidden", "110 of 110 images shown")):
        window.page.locator("#shown .chips button", has_text=chip).focus()
        window.page.keyboard.press("Enter")
        assert focused() == next_one
    window.page.locator("#marks").focus()
    for key, button in (("Enter", "Unpin"), ("v", "Clear selection")):
        window.page.keyboard.press(key)
        window.page.get_by_role("button", name=button).focus()
        window.page.keyboard.press("Enter")
        assert focused() == "marks"


def test_cross_is_shown_while_the_map_is_used_by_keys(window):
    def cross():
        window.settle()
        return bool(window.run("""() => {
          const canvas = document.querySelector("#marks"), {width, height} = canvas;
          const copy = document.createElement("canvas").getContext("2d");
          copy.drawImage(canvas, width / 2 - 8, height / 2, 1, 1, 0, 0, 1, 1);
          return copy.getImageData(0, 0, 1, 1).data[3];
        }"""))

    box = window.page.locator("#marks").bounding_box()
    window.page.mouse.click(box["x"] + 5, box["y"] + box["height"] - 5)
    assert not cross()
    window.page.keyboard.press("0")
    assert cross()
    window.page.mouse.click(box["x"] + 5, box["y"] + box["height"] - 5)
    assert not cross()


def test_map_fits_a_window_of_another_size(window):
    for width, height in ((700, 500), (1900, 1000)):
        window.page.set_viewport_size({"width": width, "height": height})
        window.settle()
        box, places = window.page.locator("#marks").bounding_box(), window.places()
        ends = np.array([box["x"], box["y"]]), np.array([box["x"] + box["width"], box["y"] + box["height"]])
        margins = np.minimum(places - ends[0], ends[1] - places)
        assert margins.min() == pytest.approx(16, abs=1)
        assert window.pixels("#dots").shape[:2] == (round(box["height"]), round(box["width"]))
        assert window.run("() => document.documentElement.scrollWidth") <= width


# -------------------------------------------------------------------------------------------------------------- address


def described(window):
    """Return the view of a window, without what depends on its size."""
    return window.run("""() => {
      const {map, color, view, filters, pin} = embeddingMap.state;
      return {map: map.key, color: color.key, view, pin,
        filters: [...filters].map(([key, filter]) => [key, {...filter, hidden: [...filter.hidden ?? []].sort()}])
          .sort()};
    }""")


def test_address_opens_the_same_view_in_another_window(browser, window, path):
    window.page.locator("#map-choice").select_option("pca")
    window.page.locator("#color-choice").select_option("age")
    window.page.locator("#legend").get_by_label("Show from", exact=True).fill("21.5")
    window.page.keyboard.press("Enter")
    window.legend_entry("projected.zip", "#sets").click()
    window.page.locator("#color-choice").select_option("localization")
    window.legend_entry("missing").click()
    window.page.locator("#marks").focus()
    for key in ("+", "+", "ArrowLeft", "ArrowUp", "Enter"):
        window.page.keyboard.press(key)
    wanted = described(window)
    assert (wanted["map"], wanted["color"], len(wanted["filters"])) == ("pca", "localization", 3)
    assert wanted["pin"] >= 0
    window.wait(ADDRESS_IS_WRITTEN)
    address = window.run("() => location.hash")
    with MapWindow(browser, path, address) as other:
        assert described(other) == {**wanted, "view": pytest.approx(wanted["view"], abs=1e-4)}
        assert other.shown_rows().tolist() == window.shown_rows().tolist()
        assert other.text("#pinned strong") == window.text("#pinned strong")
        assert np.abs(other.places() - window.places()).max() < 0.5
        assert [other.run("() => document.querySelector('#map-choice').value"),
                other.run("() => document.querySelector('#color-choice').value")] == ["pca", "localization"]
        assert other.problems == []


def test_hostile_addresses_are_ignored(window):
    untouched = described(window)
    for address in ("map=__proto__&color=constructor", "color=*", "map=<script>alert(1)</script>",
                    "at=NaN_0_1", "at=0.5_0.5_1e999", "at=0.5_0.5", "at=Infinity_0_5", "at=0.5_0.5_-3", "pin=-5",
                    "pin=110", "pin=1.5", "pin=0x10", "pin=99999999999999999999", "hide.class=0_99", "hide.class=",
                    "hide.__proto__=0", "hide.age=0", "range.class=0_1", "range.age=a_b", "range.age=_",
                    "range.age=1_2_3_4",
                    "%", "%E0%A4%A", "=&&==", "pin=javascript:alert(1)", "hide.class=" + "0_" * 20000 + "x", "\u2028"):
        window.run("""address => new Promise(done => {
          addEventListener("hashchange", done, {once: true});
          location.hash = `${address}&nonce=${Math.random()}`;
        })""", address)
        assert described(window) == untouched, address


def test_pin_link_of_the_report_pins_the_point_and_scrolls_to_the_map(window, embedding):
    window.page.locator("#map-choice").select_option("pca")
    window.page.locator("#color-choice").select_option("age")
    links = window.page.locator(".report a[href^='#pin=']")
    row = int(links.last.get_attribute("href").removeprefix("#pin="))
    links.last.click()
    window.wait("row => embeddingMap.state.pin === row", row)
    window.settle()
    x, y = window.places()[row]
    assert 0 <= x <= 1280
    assert 0 <= y <= 800
    assert window.page.locator("#pinned strong").bounding_box()["y"] < 800
    assert window.text("#pinned strong") == embedding.points.names[row]
    assert [described(window)[name] for name in ("map", "color")] == ["pca", "age"]  # they stay as they were
    # The same link once more, after the reader has moved on.
    window.page.keyboard.press("Escape")
    window.wait("() => !location.hash.includes('pin')")
    links.last.click()
    window.wait("row => embeddingMap.state.pin === row", row)
    assert 0 <= window.places()[row][1] <= 800


# ------------------------------------------------------------------------------------------------- phones, light, dark

# Return [text, size in pixels, color, backgrounds from its own to an opaque one] of all texts that are shown.
TEXTS = """() => {
  const texts = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility({visibilityProperty: true}) || element.closest("script, noscript, .unseen")) {
      continue;
    }
    const style = getComputedStyle(element), backgrounds = [];
    for (let under = element; under; under = under.parentElement) {
      backgrounds.push(getComputedStyle(under).backgroundColor);
      if (backgrounds.at(-1).startsWith("rgb(")) break;
    }
    texts.push([text.slice(0, 40), parseFloat(style.fontSize), style.color, backgrounds]);
  }
  return texts;
}"""


def luminance(color):
    """Return the relative luminance of a color, [red, green, blue] from 0 to 255 (WCAG 2.2)."""
    shares = np.asarray(color, dtype=float) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def mixed(colors):
    """Return the color of computed ones that lie over each other, the lowest last."""
    found = np.zeros(3)
    for color in reversed(colors):
        *channels, alpha = [float(part) for part in re.findall(r"[\d.]+", color)] + [1.0] * color.startswith("rgb(")
        found = found * (1 - alpha) + alpha * np.array(channels)
    return found


def open_all_parts(window, row):
    """Pin a point, select all, hide a value, and search: every part of the page is shown."""
    window.page.locator("#select-view").click()
    window.run("row => { location.hash = `#pin=${row}&hide.class=1_2&hide.source=1`; }", row)
    window.wait("row => embeddingMap.state.pin === row", row)
    window.page.locator("#search").fill("img")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("chosen", [False, True])
def test_texts_and_dots_have_enough_contrast_in_both_themes(browser, path, embedding, theme, chosen):
    """chosen: by the page's button, against what the system says.

    The colors of dots are those of the legend. LIMIT: single dots on the map have less, as they are translucent.
    """
    system = {"light": "dark", "dark": "light"}[theme] if chosen else theme
    with MapWindow(browser, path, color_scheme=system) as window:
        clicks = {"light": 1, "dark": 2}[theme] if chosen else 0
        for _ in range(clicks):
            window.page.locator("#theme").click()
        assert window.text("#theme") == f"Theme: {theme if chosen else 'auto'}"
        open_all_parts(window, 70)
        texts = window.run(TEXTS)
        assert len(texts) > 300
        paper = mixed([window.run("() => getComputedStyle(document.body).backgroundColor")])
        assert (luminance(paper) > 0.5) == (theme == "light")
        assert {text: color for text, _, color, backgrounds in texts
                if contrast(mixed([color]), mixed(backgrounds)) < 4.5} == {}
        for color in ("class", "localization", "age"):
            window.page.locator("#color-choice").select_option(color)
            pixels = np.unique(window.run("() => Array.from(embeddingMap.state.colors.pixels)")).astype(np.int64)
            assert len(pixels) > 3
            for pixel in pixels:
                assert contrast([pixel >> bits & 255 for bits in (0, 8, 16)], paper) >= 3
        assert window.problems == []


def test_map_follows_the_theme_of_the_system_while_it_is_open(window):
    def corner():
        window.settle()
        return luminance(window.pixels("#dots")[0, 0])

    assert corner() > 0.9
    window.page.emulate_media(color_scheme="dark")
    assert corner() < 0.1
    window.page.emulate_media(color_scheme="light")
    assert corner() > 0.9


@pytest.mark.parametrize("name", ["", LONG])
def test_phone_shows_all_within_its_width_and_legible(browser, tmp_path, name):
    embedding = make_embedding(60, 30, 20, nasty=name)
    with MapWindow(browser, write_map(tmp_path, embedding, name), **PHONE) as window:
        assert window.run("() => [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        open_all_parts(window, 70)
        assert window.run("() => [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        small = {text: size for text, size, _, _ in window.run(TEXTS) if size < 12}
        assert small == {}
        assert window.problems == []


def test_phone_taps_pin_and_two_fingers_zoom(browser, path, embedding):
    with MapWindow(browser, path, **PHONE) as window:
        row = window.isolated(rows_of(embedding, SYNTHETIC))
        window.page.touchscreen.tap(*window.places()[row])
        window.wait("row => embeddingMap.state.pin === row", row)
        window.page.locator("#to-details").tap()
        window.wait("() => { const {top} = pinned.getBoundingClientRect(); return top >= -1 && top < 400; }")
        window.run("() => scrollTo(0, 0)")
        assert window.text("#pinned strong") == embedding.points.names[row]

        before = window.places()
        box = window.page.locator("#marks").bounding_box()
        middle = np.array([box["x"] + box["width"] / 2, box["y"] + box["height"] / 2])
        session = window.context.new_cdp_session(window.page)
        for kind, reach in (("touchStart", 40), ("touchMove", 60), ("touchMove", 80), ("touchEnd", None)):
            touches = [] if reach is None else [
                {"x": middle[0] + side * reach, "y": middle[1], "id": number} for number, side in enumerate((-1, 1))]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
        window.wait("() => embeddingMap.state.view.zoom > 1.9")
        after = window.places()
        assert np.abs((after - middle) - 2 * (before - middle)).max() < 1
        assert window.state("pin") == row
        assert window.run("() => visualViewport.scale") == 1
        window.page.wait_for_timeout(500)  # a tap right after two fingers is taken for a part of their gesture
        window.page.locator("#fit").tap()
        window.wait("() => embeddingMap.state.view.zoom === 1")
        # One finger moves the map, not the page.
        window.page.locator("#zoom-in").tap()
        before = window.places()
        for kind, up in (("touchStart", 0), ("touchMove", 30), ("touchMove", 60), ("touchEnd", None)):
            touches = [] if up is None else [{"x": middle[0], "y": middle[1] - up, "id": 0}]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
        window.settle()
        assert np.abs(window.places() - before - [0, -60]).max() < 1
        assert window.run("() => scrollY") == 0
        assert window.problems == []


# -------------------------------------------------------------------------------------------------------- hostile names


def test_hostile_names_are_shown_as_they_are_and_run_nothing(browser, tmp_path):
    embedding = make_embedding(60, 30, 20, nasty=NASTY)
    with MapWindow(browser, write_map(tmp_path, embedding, NASTY)) as window:
        tags = ("() => [...document.querySelectorAll('script, style, title, img, iframe')]"
                ".map(each => each.tagName).sort()")
        before = window.run(tags)
        row = window.isolated(rows_of(embedding, SYNTHETIC))
        assert window.text("h1") == window.text("title") == f"A map{SHOWN}"
        assert window.texts("#map-choice option") == [f"t-SNE{SHOWN}", f"PCA{SHOWN}"]
        assert window.text("#map-note") == f"made up{SHOWN} {NEIGHBORS_ONLY}"
        window.move_to(row)
        assert window.text("#card strong") == embedding.points.names[row].replace(NASTY, SHOWN)
        wanted = {name.replace(NASTY, SHOWN): value.replace(NASTY, SHOWN) for name, value in
                  facts_of(embedding, row).items()}
        assert window.shown_facts("#card") == wanted
        window.click_on(row)
        assert window.shown_facts("#pinned") == wanted
        window.page.locator("#pinned .images button").first.click()
        assert window.text("#pinned p") == f"drawn as a dot: {WHY_NOT}{SHOWN}"
        assert f"real.zip{SHOWN} is drawn as dots: {WHY_NOT}{SHOWN}" in window.texts("#sets p")
        window.legend_entry(f"mel{SHOWN}").click()
        window.legend_entry(f"real.zip{SHOWN}", "#sets").click()
        window.page.locator("#color-choice").select_option("localization")
        assert f"lower leg{SHOWN}" in window.texts("#legend .name")
        assert f"\xd7 class: mel{SHOWN} hidden" in window.texts("#shown .chips button")
        window.page.locator("#search").fill("onerror")
        assert window.text("#search-results .note") == "110 found, the first 50 are listed"
        window.page.locator("#search-results [role=option]").nth(3).click()
        window.page.locator("#select-view").click()
        assert f"lower leg{SHOWN}" in window.texts("#selection th")
        with window.page.expect_download() as downloading:
            window.page.locator("#download").click()
        text = downloading.value.path().read_text(encoding="utf-8")
        selected = window.state("selected")
        assert [line[0] for line in csv.reader(io.StringIO(text, newline=""))][1:] == [
            embedding.points.names[one].replace(NASTY, SHOWN) for one in selected]
        assert re.fullmatch(r"[A-Za-z0-9-]+-selection\.csv", downloading.value.suggested_filename)
        window.page.locator("#theme").click()
        window.page.locator("#map-choice").select_option("pca")
        window.settle()
        assert window.run(tags) == before
        assert window.problems == []
        assert [request for request in window.requests if not request.startswith("blob:")] == [window.url]
