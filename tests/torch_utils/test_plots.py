"""torch_utils.plots: curves, histograms and intervals of given values, with any names, and without side effects."""

import logging
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import pytest
from matplotlib.colors import to_rgb

from torch_utils.plots import (
    Dot,
    curves_figure,
    draw_curves,
    histogram_figure,
    intervals_figure,
    save_curves,
    save_histogram,
    save_intervals,
)

BLUE, ORANGE = (31, 78, 160), (196, 78, 30)
AREA = slice(36, 352), slice(73, 700)  # rows and columns between the axes, below one line of a legend
LEGEND = {"value": "the value", "marked": "the worst", "interval": "95% interval", "floor": "the floor",
          "at_floor": "at the floor"}
NAMES = ["_private", "$x_1$", "a_b^c", "100%", "m\u00e9lanome", "\u75e3", "\ud800", "a\nb", "\u202eabc", "", "\\frac{"]


def places(picture, color):
    """Return rows and columns of a color between the axes."""
    return np.nonzero((np.asarray(picture)[AREA] == color).all(axis=2))


def texts(figure):
    """Return the texts of the legend."""
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def outlines(figure):
    """Return (heights, edges, baseline) of each histogram's outline."""
    return [patch.get_data() for patch in figure.axes[0].patches if not patch.get_fill()]


def test_draw_curves_falling_values_fall():
    rows, columns = places(draw_curves({"fid": [(0, 400.0), (100, 100.0), (200, 50.0)]}), BLUE)
    left, middle, right = (rows[abs(columns - column) < 3].mean() for column in (12, 314, 616))
    # Room of 6% on both sides of a range of 350.
    assert [left, middle, right] == pytest.approx([316 * part / 392 for part in (21, 321, 371)], abs=3)


def test_draw_curves_two_have_two_colors_and_titles():
    picture = draw_curves({"precision": [(0, 0.1), (10, 0.2)], "recall": [(0, 0.6), (10, 0.7)]})
    assert places(picture, BLUE)[0].min() > places(picture, ORANGE)[0].max()
    title = np.asarray(picture)[:30].astype(int)
    assert (abs(title - BLUE).max(axis=2) < 8).any()
    assert (abs(title - ORANGE).max(axis=2) < 8).any()


def test_curves_figure_has_the_finite_points_and_says_the_last_value():
    curve = [(0, 1.0), (5, math.nan), (10, 2.34567), (15, math.inf)]
    figure = curves_figure({"a": curve, "b": [], "c": [(4, math.nan)]})
    axes = figure.axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 1], [10, 2.34567]], [], []]
    assert texts(figure) == ["a 2.346", "b: no value", "c: no value"]
    assert axes.get_xlabel() == "kimg"
    assert axes.get_xlim() == pytest.approx((-0.2, 10.2))


def test_curves_figure_late_values_are_drawn_from_the_start_of_the_run():
    low, high = curves_figure({"a": [(900, 1.0), (1000, 2.0)]}).axes[0].get_xlim()
    assert low < 0 < 1000 < high


@pytest.mark.parametrize("values", [[], [math.nan], [3.0], [3.0, 3.0], [math.inf, 0.0], [1e30, 1e-30], [5e-324, 0.0],
                                    [1.7e308, -1.7e308], [1e18, 1e18 + 200]])
def test_draw_curves_odd_values_draw_what_is_finite(values):
    picture = draw_curves({"fid": list(enumerate(values))})
    assert picture.size == (720, 400)
    assert (len(places(picture, BLUE)[0]) > 0) == any(map(math.isfinite, values))


def test_draw_curves_many_make_room_for_their_titles():
    curves = {f"curve number {index}": [(0, index), (1, index)] for index in range(11)}
    figure = curves_figure(curves)
    figure.canvas.draw()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert legend.y0 > axes.y1
    assert legend.y1 <= figure.bbox.y1
    assert axes.height > 250


def test_save_curves_replaces_at_once_with_the_same_bytes(tmp_path):
    path = tmp_path / "metric-fid.png"
    path.write_bytes(b"old")
    curves = {"fid": [(0, 1.0), (4, 0.5)]}
    save_curves(path, curves)
    first = path.read_bytes()
    save_curves(path, curves)
    assert path.read_bytes() == first
    with PIL.Image.open(path) as picture:
        assert (picture.size, picture.mode, picture.info) == ((720, 400), "RGB", {})
    assert list(tmp_path.iterdir()) == [path]


def test_save_curves_missing_folder_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_curves(tmp_path / "none" / "a.png", {})


@pytest.mark.parametrize("count", [2, 5])
def test_histogram_figure_shares_fill_common_bins(count):
    rng = np.random.RandomState(0)
    values = {f"class {index}": rng.rand(100 * (index + 1)) + index for index in range(count)}
    figure = histogram_figure(values, quantity="distance")
    found = outlines(figure)
    assert len(found) == count
    scale = found[0].values.sum() - len(found[0].values) * (found[0].baseline or 0)  # of 100%
    for index, (heights, edges, baseline) in enumerate(found):
        assert (edges == found[0].edges).all()
        expected = np.histogram(values[f"class {index}"], edges)[0] / (100 * (index + 1))
        assert (heights - (baseline or 0)) / scale == pytest.approx(expected)
    everything = np.concatenate(list(values.values()))
    assert (found[0].edges[0], found[0].edges[-1]) == (everything.min(), everything.max())
    assert figure.axes[0].get_xlabel() == "distance"


def test_histogram_figure_says_numbers_and_medians():
    figure = histogram_figure({"train": [1, 2, 4, math.nan], "held out": [3.5, math.inf, -math.inf], "none": []},
                              quantity="distance")
    assert texts(figure) == ["train: n 3, median 2", "held out: n 1, median 3.5", "none: no value"]
    assert [text.get_text() for text in figure.texts] == ["4 values; 3 non-finite omitted"]
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [2, 3.5]


def test_histogram_figure_many_names_have_rows_that_do_not_overlap():
    names = [f"class {index}" for index in range(30)]
    figure = histogram_figure({name: [index, index + 1.0, index + 5.0] for index, name in enumerate(names)},
                              quantity="distance")
    figure.canvas.draw()
    labels = [label for label in figure.axes[0].get_yticklabels() if label.get_text()]
    assert [label.get_text() for label in labels] == [f"{name}\nn 3, median {index + 1}"
                                                      for index, name in enumerate(names)]
    extents = [label.get_window_extent() for label in labels]
    assert all(above.y0 > below.y1 for above, below in pairwise(extents))
    assert min(extent.x0 for extent in extents) > 0
    tops = [(heights.max(), baseline) for heights, _, baseline in outlines(figure)]
    assert all(lower < floor for (lower, _), (_, floor) in zip(tops[1:], tops))
    # Each median in its own row.
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [index + 1 for index in range(30)]
    assert [line.get_ydata()[0] for line in figure.axes[0].lines] == [floor for _, floor in tops]


@pytest.mark.parametrize(("values", "title", "legend"), [
    ({}, "0 values", []),
    ({"a": []}, "0 values", ["a: no value"]),
    ({"a": [math.nan, math.inf]}, "0 values; 2 non-finite omitted", ["a: no value"]),
])
def test_histogram_figure_of_nothing_says_so(values, title, legend):
    figure = histogram_figure(values, quantity="distance")
    assert [text.get_text() for text in figure.axes[0].texts] == ["no values"]
    assert ([text.get_text() for text in figure.texts], texts(figure)) == ([title], legend)


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [5e-324], [1e30, 1e-30], [1.7e308, -1.7e308]])
@pytest.mark.parametrize("count", [1, 5])
def test_save_histogram_odd_values_keep_all_of_them(tmp_path, values, count):
    names = [f"name {index}" for index in range(count)]
    figure = histogram_figure({name: values for name in names}, quantity="distance")
    first = outlines(figure)[0]
    assert (first.values > (first.baseline or 0)).sum() == len(set(values))
    save_histogram(tmp_path / "a.png", {name: values for name in names}, quantity="distance")
    with PIL.Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert len(picture.getcolors(1 << 20)) > 20


def test_save_histogram_same_values_give_the_same_bytes_without_notes(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        save_histogram(path, {"x": [1, 2, 3], "y": np.array([2.0, 5.0], dtype=np.float32)}, quantity="distance")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with PIL.Image.open(paths[0]) as picture:
        assert picture.info == {}
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [3, len(NAMES)])
def test_plots_any_names_appear_or_are_replaced(count, tmp_path):
    expected = ["_private", "$x_1$", "a_b^c", "100%", "m\u00e9lanome", "?", "?", "a?b", "?abc", "", "\\frac{"][:count]
    values = {name: [1.0, 2.0] for name in NAMES[:count]}
    save_histogram(tmp_path / "a.png", values, quantity="$\\frac{$ \u75e3")
    save_curves(tmp_path / "b.png", {name: [(0, 1.0)] for name in NAMES[:count]})
    assert texts(curves_figure({name: [(0, 1.0)] for name in values})) == [f"{name} 1" for name in expected]
    figure = histogram_figure(values, quantity="$\\frac{$ \u75e3")
    shown = texts(figure) or [label.get_text() for label in figure.axes[0].get_yticklabels()]
    separator = ": " if count == 3 else "\n"
    assert shown == [f"{name}{separator}n 2, median 1.5" for name in expected]
    assert figure.axes[0].get_xlabel() == "$\\frac{$ ?"


def test_plots_dollar_is_drawn_as_text_not_as_a_formula():
    def end_of_title(name):
        ink = np.asarray(draw_curves({name: [(0, 1.0)]}))[:30].max(axis=2) < 100
        return ink.any(axis=0).nonzero()[0].max()

    assert end_of_title("$\\alpha\\alpha$") > end_of_title("alphaalpha") + 20


def test_plots_long_names_are_shortened_to_their_room():
    (text,) = texts(curves_figure({"W" * 100: [(0, 1.0)]}))
    assert text == "W" * text.count("W") + ".. 1"
    assert 10 < text.count("W") < 30


def test_plots_leave_settings_and_log_as_they_were(monkeypatch, tmp_path):
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 40.0)  # as by a user's matplotlibrc
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    before, handlers = dict(matplotlib.rcParams), list(logging.getLogger("matplotlib").handlers)
    picture = draw_curves({"a": [(0, 1.0), (1, 2.0)]})
    save_histogram(tmp_path / "a.png", {"a": [1.0]}, quantity="b")
    assert dict(matplotlib.rcParams) == before
    assert logging.getLogger("matplotlib").handlers == handlers
    assert np.asarray(picture)[AREA].mean() > 240  # white, with a thin line


def test_plots_first_use_says_nothing_and_opens_no_pyplot(tmp_path):
    """A new user's font cache is created without messages, even if it cannot be saved."""
    home = tmp_path / "file"
    home.write_text("")  # where no folder can be made
    code = ("import sys; from torch_utils.plots import save_curves; assert 'matplotlib' not in sys.modules; "
            "save_curves(sys.argv[1], {'a': [(0, 1.0)]}); assert 'matplotlib.pyplot' not in sys.modules")
    done = subprocess.run([sys.executable, "-W", "always", "-c", code, str(tmp_path / "a.png")], capture_output=True,
                          text=True, check=False, cwd=Path(__file__).parent.parent.parent,
                          env={"HOME": str(home), "MPLCONFIGDIR": str(home / "none"), "PATH": "/usr/bin:/bin"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "a.png").exists()


def test_colors_of_the_first_two_are_those_that_tests_look_for():
    lines = curves_figure({"a": [], "b": []}).axes[0].lines
    assert [tuple(round(255 * part) for part in to_rgb(line.get_color())) for line in lines] == [BLUE, ORANGE]


def marks(axes):
    """Return (x, y) of each mark in an axes, by its marker and whether it is filled."""
    found = {}
    for line in axes.lines:
        kind = (line.get_marker(), "hollow" if line.get_markerfacecolor() == "white" else "full", len(line.get_xdata()))
        found.setdefault(kind, []).append((tuple(line.get_xdata()), tuple(line.get_ydata())))
    return found


def test_intervals_figure_has_each_number_in_its_row():
    figure = intervals_figure([("all", "n 9"), ("nevus", "n 4"), ("vasc", "n 1")], {
        "kid": [Dot(2.0, 1.0, 4.0, floor=0.5, at_floor=2.5), Dot(3.0, 2.5, 3.5, 2.75, is_marked=True), None],
        "fid": [Dot(7.0)] * 3}, LEGEND)
    kid, fid = figure.axes
    assert marks(kid) == {("|", "full", 1): [((0.5,), (0,))], ("|", "full", 2): [((1.0, 4.0), (0, 0))],
                          ("|", "full", 3): [((2.5, 2.75, 3.5), (-1, -1, -1))],
                          ("o", "hollow", 1): [((2.5,), (0,))], ("o", "full", 1): [((2.0,), (0,))],
                          ("D", "full", 1): [((3.0,), (-1,))]}
    assert [text.get_text() for text in kid.texts] == ["no value"]
    assert marks(fid) == {("o", "full", 1): [((7.0,), (0,)), ((7.0,), (-1,)), ((7.0,), (-2,))]}
    assert [label.get_text() for label in kid.get_yticklabels()] == ["all\nn 9", "nevus\nn 4", "vasc\nn 1"]
    assert [axes.get_title("left") for axes in figure.axes] == ["kid", "fid"]
    assert texts(figure) == list(LEGEND.values())


def test_intervals_figure_legend_tells_of_what_is_drawn_only():
    figure = intervals_figure([("all", "")], {"kid": [Dot(2.0, 1.0, 4.0)]}, LEGEND)
    assert texts(figure) == ["the value", "95% interval"]


@pytest.mark.parametrize(("rows", "panels"), [(2, 1), (8, 5), (30, 3), (1, 9)])
def test_intervals_figure_rows_and_panels_do_not_overlap(rows, panels):
    dots = [Dot(0.001 * row, 0.0005, 0.0301) for row in range(rows)]
    figure = intervals_figure([(f"class {row} " + "W" * row, "n 1000 real, 500 fake") for row in range(rows)],
                              {f"metric {index} " + "W" * 30: dots for index in range(panels)}, LEGEND)
    figure.canvas.draw()
    first = figure.axes[0]
    extents = [label.get_window_extent() for label in first.get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in pairwise(extents))
    assert min(extent.x0 for extent in extents) > 0
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1
                   for index, one in enumerate(boxes) for other in boxes[:index])
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 > max(box.y1 for box in boxes)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 5e-324, 1.7e308, -1.7e308])
def test_save_intervals_odd_values_and_names_are_drawn(tmp_path, value):
    rows = [(name, name) for name in NAMES]
    save_intervals(tmp_path / "a.png", rows, {name: [Dot(value, value, value)] * len(rows) for name in NAMES[:2]},
                   LEGEND)
    with PIL.Image.open(tmp_path / "a.png") as picture:
        assert (np.asarray(picture) == BLUE).all(axis=2).sum() > 50 * len(rows)
