"""Use the map's page with a mouse: what it shows is compared with the embedding that it was made of."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from analysis.embedding_points import REAL, SYNTHETIC
from tests.helpers.browser import WHY_NO_BROWSER, open_browser
from tests.helpers.made_embedding import CLASSES, WHY_NOT, make_embedding
from tests.helpers.map_window import MapWindow, facts_of, rows_of, values_of, write_map

pytestmark = pytest.mark.skipif(WHY_NO_BROWSER != "", reason=WHY_NO_BROWSER)


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


def draw_lasso(window, corners):
    window.page.mouse.move(*corners[0])
    window.page.mouse.down()
    for corner in [*corners[1:], corners[0]]:
        window.page.mouse.move(*corner)
    window.page.mouse.up()


def lasso_around_many(window, radius=180):
    """Return the corners of a star within the map, and which points are inside: that around one of the points which
    has many others inside and between its arms."""
    places, box = window.places(), window.page.locator("#marks").bounding_box()
    angles = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, 0.45, 1) * radius
    star = reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found, most, least = None, None, 0
    for middle in places:
        corners = np.round(middle + star)
        outline = Outline(np.concatenate([corners, corners[:1]]), closed=True)
        inside = np.flatnonzero(outline.contains_points(places))
        is_within = ((corners > [box["x"], box["y"]]) & (corners < [box["x"] + box["width"], box["y"] + box["height"]]))
        # None may be so near the edge that rounding decides.
        is_clear = np.array_equal(*(outline.contains_points(places, radius=edge) for edge in (1e-3, -1e-3)))
        between = ((places >= corners.min(axis=0)) & (places <= corners.max(axis=0))).all(axis=1).sum() - len(inside)
        if min(len(inside), between) > least and is_within.all() and is_clear:
            found, most, least = corners, inside, min(len(inside), between)
    assert least > 4
    return found.tolist(), most


# -------------------------------------------------------------------------------------------------- points and pictures


def test_map_shows_the_coordinates_with_one_scale_and_y_upwards(window, embedding):
    places = window.places()
    coordinates = embedding.layouts[0].coordinates * [1, -1]
    scale = np.ptp(places[:, 1]) / np.ptp(coordinates[:, 1])
    moved = places - scale * coordinates
    assert np.abs(moved - moved.mean(axis=0)).max() < 0.1
    box = window.page.locator("#marks").bounding_box()
    assert (places >= [box["x"], box["y"]]).all()
    assert (places <= [box["x"] + box["width"], box["y"] + box["height"]]).all()


@pytest.mark.parametrize("kind", [SYNTHETIC, REAL])
def test_hover_shows_the_right_name_facts_and_picture_or_why_there_is_none(window, embedding, kind):
    row = window.isolated(rows_of(embedding, kind))
    assert not window.is_shown("#card")
    window.move_to(row)
    assert window.text("#card strong") == embedding.points.names[row]
    assert window.shown_facts("#card") == facts_of(embedding, row)
    if kind == REAL:
        assert window.texts("#card p") == [f"drawn as a dot: {WHY_NOT}"]
        assert window.page.locator("#card canvas").count() == 0
    else:
        # Of all thumbnails it is that of the point; the rest is the loss of WebP, and of being enlarged and reduced.
        picture = window.picture("#card canvas").reshape(64, 3, 64, 3, 3).mean(axis=(1, 3))
        errors = ((embedding.thumbnails - picture) ** 2).mean(axis=(1, 2, 3)) ** 0.5
        assert embedding.pictured[errors.argmin()] == row
        assert errors.min() < 8
        assert np.sort(errors)[1] > 2 * errors.min()
    window.page.mouse.move(5, 5)
    assert not window.is_shown("#card")


def test_click_pins_with_the_nearest_real_images_in_order_and_a_neighbor_takes_the_pin(window, embedding):
    row = window.isolated(rows_of(embedding, SYNTHETIC))
    window.click_on(row)
    for _ in range(3):  # the point, its nearest real image, and the nearest one of that
        nearest, distances = embedding.nearest.rows[row], embedding.nearest.distances[row]
        known = nearest >= 0
        assert window.state("pin") == row
        assert window.text("#pinned strong") == embedding.points.names[row]
        assert window.shown_facts("#pinned") == facts_of(embedding, row)
        buttons = "#pinned .images button"
        assert window.run("selector => [...document.querySelectorAll(selector)].map(each => Number(each.dataset.row))",
                          buttons) == nearest[known].tolist()
        assert window.texts(f"{buttons} small") == [
            f"distance {float(f'{distance:.3g}'):g} - {embedding.points.classes[other]}"
            for other, distance in zip(nearest[known], distances[known], strict=True)]
        assert window.text("#pinned h3") == f"Nearest real images: {known.sum()}"
        assert f"Pinned: {embedding.points.names[row]}" in window.text("#announcement")
        window.page.locator(buttons).first.click()
        row = nearest[0]
    window.page.keyboard.press("Escape")
    assert window.state("pin") == -1
    assert not window.is_shown("#pinned")


def test_click_beside_all_points_unpins(window, embedding):
    window.click_on(window.isolated(rows_of(embedding, REAL)))
    assert window.is_shown("#pinned")
    box = window.page.locator("#marks").bounding_box()
    window.page.mouse.click(box["x"] + 5, box["y"] + box["height"] - 5)
    assert window.state("pin") == -1


def test_drag_and_wheel_move_what_is_under_the_pointer_with_it(window, embedding):
    row = window.isolated(rows_of(embedding, REAL))
    window.page.keyboard.press("Tab")
    window.page.locator("#zoom-in").click()
    before = window.places()
    window.page.mouse.move(*before[row])
    window.page.mouse.down()
    window.page.mouse.move(*before[row] + [3, 40], steps=4)
    window.page.mouse.up()
    assert np.abs(window.places() - before - [3, 40]).max() < 0.1
    assert window.state("pin") == -1
    scale = np.ptp(before[:, 0])
    window.page.mouse.wheel(0, -120)
    window.wait("before => embeddingMap.state.view.zoom > before", 1.6)
    after = window.places()
    assert np.abs(after[row] - before[row] - [3, 40]).max() < 0.3  # a wheel's place is in whole pixels
    assert np.ptp(after[:, 0]) / scale == pytest.approx(np.exp(0.24), rel=1e-3)


def test_points_of_a_set_without_pictures_stay_dots_among_pictures(window, embedding):
    def middle(row):
        x, y = np.round(window.places()[row] - corner).astype(int)
        return window.pixels("#dots")[y, x]

    box = window.page.locator("#dots").bounding_box()
    corner = [box["x"], box["y"]]
    real = window.isolated(rows_of(embedding, REAL))
    other = window.isolated(rows_of(embedding, SYNTHETIC))
    window.page.locator("#draw-choice").select_option("dots")
    window.settle()
    dots = {row: middle(row) for row in (real, other)}
    window.page.locator("#draw-choice").select_option("pictures")
    window.wait("() => { embeddingMap.draw(); return document.querySelector('#dots').width; }")
    window.settle()
    thumbnail = embedding.thumbnails[embedding.pictured == other][0]
    wanted = thumbnail[28:36, 28:36].mean(axis=(0, 1))
    for _ in range(50):
        window.settle()
        if np.abs(middle(other) - wanted).max() < 40:
            break
    assert np.abs(middle(other) - wanted).max() < 40
    assert np.abs(dots[other] - wanted).max() > 40
    color = np.array(window.run("row => [0, 8, 16].map(bits => embeddingMap.state.colors.pixels[row] >>> bits & 255)",
                                real))
    assert np.abs(middle(real) - color).max() < 40
    assert np.abs(dots[real] - color).max() < 40


def test_page_without_any_picture_works_with_dots(browser, tmp_path, embedding):
    bare = replace(embedding, pictured=embedding.pictured[:0], thumbnails=embedding.thumbnails[:0], points=replace(
        embedding.points, sets=[replace(one, shows_pictures=False, why_not=WHY_NOT) for one in embedding.points.sets]))
    with MapWindow(browser, write_map(tmp_path, bare)) as window:
        row = window.isolated(rows_of(embedding, SYNTHETIC))
        window.page.locator("#draw-choice").select_option("pictures")
        window.click_on(row)
        assert window.text("#pinned p") == f"drawn as a dot: {WHY_NOT}"
        assert window.page.locator("canvas.picture").count() == 0
        assert len([text for text in window.texts("#sets p") if text.endswith(WHY_NOT)]) == 3
        assert window.problems == []


# ------------------------------------------------------------------------------------------------------------ selection


@pytest.mark.parametrize("way", ["button", "key", "shift"])
def test_lasso_lists_exactly_the_points_inside_with_counts_and_exports_them(window, embedding, way):
    corners, inside = lasso_around_many(window)
    if way == "button":
        window.page.locator("#lasso").click()
        assert window.is_shown("#hint")
    elif way == "key":
        window.page.locator("#marks").focus()
        window.page.keyboard.press("l")
    else:
        window.page.keyboard.down("Shift")
    draw_lasso(window, corners)
    window.page.keyboard.up("Shift")
    assert window.page.locator("#lasso").get_attribute("aria-pressed") == "false"
    assert window.state("selected") == inside.tolist()
    assert window.text("#selection h2") == f"Selection: {len(inside)} images"
    assert window.run("() => [...document.querySelectorAll('#selection .images button')].map(each => +each.dataset.row)"
                      ) == inside.tolist()

    classes = values_of(embedding, "class")
    table = [line.split("\t") for line in window.page.locator("#selection tbody").inner_text().splitlines()]
    assert [line[0] for line in table] == sorted(
        set(classes), key=lambda name: (-(classes[inside] == name).sum(), -(classes == name).sum(), name))
    for name, selected, *shares in table:
        is_one = classes == name
        assert int(selected) == is_one[inside].sum()
        share, of_all, ratio = (float(text.rstrip(" %")) for text in shares)
        assert share == pytest.approx(100 * is_one[inside].mean(), abs=0.51)
        assert of_all == pytest.approx(100 * is_one.mean(), abs=0.51)
        assert ratio == pytest.approx(is_one[inside].mean() / is_one.mean(), abs=0.0051)

    with window.page.expect_download() as downloading:
        window.page.locator("#download").click()
    assert downloading.value.suggested_filename == "A-map-selection.csv"
    lines = list(csv.DictReader(io.StringIO(downloading.value.path().read_text(encoding="utf-8"), newline="")))
    assert [(line["set"], line["name"]) for line in lines] == [
        (embedding.points.sets[embedding.points.set_numbers[row]].name, embedding.points.names[row]) for row in inside]
    assert [line["class"] for line in lines] == classes[inside].tolist()
    ages = [np.nan if line["age"] == "" else float(line["age"]) for line in lines]
    np.testing.assert_array_equal(ages, values_of(embedding, "age")[inside])
    distances = [float(line["distance to it"]) for line in lines]
    np.testing.assert_allclose(distances, embedding.nearest.distances[inside, 0], rtol=1e-6)

    window.page.locator("#marks").focus()
    window.page.keyboard.press("Escape")
    assert not window.is_shown("#selection")


def test_selection_of_the_view_follows_filters(window, embedding):
    window.page.locator("#select-view").click()
    assert window.text("#selection h2") == "Selection: 110 images"
    window.legend_entry("nv").click()
    rest = int((values_of(embedding, "class") != "nv").sum())
    assert window.text("#selection h2") == f"Selection: {rest} images"
    assert "nv" not in window.texts("#selection tbody th")


# -------------------------------------------------------------------------------------------------------------- filters


def test_legend_hides_shows_and_shows_only_one_value_with_right_counts(window, embedding):
    classes = values_of(embedding, "class")
    counts = {name: int((classes == name).sum()) for name in CLASSES}
    assert dict(zip(window.texts("#legend .entry .name"), window.texts("#legend .entry .count"), strict=True)) == {
        **{name: f"{count} of {count}" for name, count in counts.items()}, "missing": "0 of 0"}
    assert not window.is_shown("#legend .entry[data-code='-1']")
    window.legend_entry("mel").click()
    assert window.shown_rows().tolist() == np.flatnonzero(classes != "mel").tolist()
    assert window.shown_count() == f"{110 - counts['mel']} of 110 images shown"
    assert window.legend_entry("mel").get_attribute("aria-pressed") == "false"
    window.legend_entry("mel").click()
    assert window.shown_count() == "110 of 110 images shown"
    window.page.get_by_label("Only bkl", exact=True).click()
    assert window.shown_rows().tolist() == np.flatnonzero(classes == "bkl").tolist()
    window.page.get_by_label("Only bkl", exact=True).click()
    assert window.shown_count() == "110 of 110 images shown"
    window.legend_entry("df").dblclick()
    assert window.shown_rows().tolist() == np.flatnonzero(classes == "df").tolist()
    window.legend_entry("nv").click(modifiers=["Alt"])
    assert window.shown_rows().tolist() == np.flatnonzero(classes == "nv").tolist()


def test_filters_of_several_columns_join_and_their_chips_remove_them(window, embedding):
    classes, ages, places = (values_of(embedding, key) for key in ("class", "age", "localization"))
    window.legend_entry("nv").click()
    window.page.locator("#color-choice").select_option("localization")
    window.legend_entry("missing").click()
    window.page.locator("#color-choice").select_option("age")
    low, high = np.nanquantile(ages, (0.2, 0.8), method="nearest")  # of an image each: both ends belong to the range
    for label, value in (("Show from", low), ("to", high)):
        window.page.locator("#legend").get_by_label(label, exact=True).fill(f"{value:g}")
        window.page.keyboard.press("Enter")
    window.legend_entry("missing").click()
    window.legend_entry("projected.zip", "#sets").click()
    passing = {"class": classes != "nv", "localization": places != "", "age": (ages >= low) & (ages <= high),
               "set": np.arange(110) < 90}
    assert window.shown_rows().tolist() == np.flatnonzero(np.all(list(passing.values()), axis=0)).tolist()
    shown = [text.removeprefix("\xd7 ") for text in window.texts("#shown .chips button")]
    assert shown == ["all", "set: projected.zip hidden", "class: nv hidden", "localization: missing hidden",
                     f"age: {low:g} to {high:g}, missing hidden"]
    # What the legend counts of a value is what the filters of the other columns leave.
    left = [int(text.split()[0]) for text in window.texts("#sets .count")]
    others = np.all([passing[key] for key in ("class", "localization", "age")], axis=0)
    assert left == [int(others[part].sum()) for part in (slice(0, 60), slice(60, 90), slice(90, 110))]

    window.page.locator("#shown .chips button", has_text="class: nv hidden").click()
    del passing["class"]
    assert window.shown_rows().tolist() == np.flatnonzero(np.all(list(passing.values()), axis=0)).tolist()
    window.page.locator("#shown .chips button").first.click()
    assert window.shown_count() == "110 of 110 images shown"
    assert window.texts("#shown .chips button") == []
    assert window.page.locator("#legend").get_by_label("Show from", exact=True).input_value() == ""


def test_hidden_points_are_neither_hovered_nor_pinned(window, embedding):
    row = window.isolated(rows_of(embedding, SYNTHETIC))
    window.legend_entry("synthetic.zip", "#sets").click()
    window.move_to(row)
    assert not window.is_shown("#card")
    window.click_on(row)
    assert window.state("pin") != row


def test_search_finds_names_and_pins_the_chosen_one(window, embedding):
    window.page.locator("#search").fill("IMG0000001")
    found = [row for row, name in enumerate(embedding.points.names) if "img0000001" in name]
    assert len(found) == 30
    assert window.run("() => [...document.querySelectorAll('#search-results [role=option]')].map(e => +e.dataset.row)"
                      ) == found
    assert window.text("#search-results .note") == "30 found"
    assert window.state("found") == found
    for _ in range(3):
        window.page.keyboard.press("ArrowDown")
    window.page.keyboard.press("ArrowUp")
    window.page.keyboard.press("Enter")
    assert window.state("pin") == found[1]
    assert not window.is_shown("#search-results")
    assert window.run("() => document.activeElement.id") == "marks"
    window.page.locator("#search").click()
    window.page.locator("#search-results [role=option]").nth(4).click()
    assert window.state("pin") == found[4]
    window.page.locator("#search").fill("no such name")
    assert window.text("#search-results .note") == "0 found"
    window.page.keyboard.press("Escape")
    assert window.page.locator("#search").input_value() == ""
    assert window.state("found") == []
