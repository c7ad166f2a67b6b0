"""Plot curves over a run, histograms, and values with intervals, as PNGs."""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import PIL.Image

from dnnlib.files import atomic_write
from dnnlib.text import fitted

# matplotlib takes a second to import: functions import it, so that programs without a plot do not wait for it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Curve = Sequence[tuple[float, float]]  # (kimg, value)

_DPI = 100
_WIDTH, _HEIGHT = 720, 400  # pixels, like all lengths here
_TOP, _RIGHT, _BOTTOM = 36, 20, 48  # around the axes
_LEFT = 72
_LEFT_OF_ROWS = 232  # room for names
_LINE = 19  # height of a line of text
_COLUMN = 280  # width of a text in a legend
_NUMBER, _SUMMARY = 80, 200  # longest texts after a name
_ROW = 46  # height of a histogram that has its own row
_ROW_OF_DOTS = 40  # ... of a row of values
_PANEL, _GAP = 216, 24  # least width of a panel of values, and room between two
_MOST_PANELS = 4  # side by side
COLORS = ("#1f4ea0", "#c44e1e", "#288246", "#783c96", "#94741a", "#1a8a96", "#b03060", "#606060")
_STYLE = {
    "font.size": 9.5,
    "text.parse_math": False,  # a "$" in a name does not start a formula
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dedede",
    "legend.frameon": False,
}
_DOT, _MARKED, _FLOOR = COLORS[0], COLORS[1], "#303030"  # differ in lightness and shape too
_MOST_TOGETHER = 4  # histograms that can be told apart in one plot
_LEAST_BINS, _MOST_BINS = 12, 60
_MOST_MARKERS = 100  # points of a curve that are marked individually
_FARTHEST = 1e150  # larger values are clipped: differences between them would overflow


class Dot(NamedTuple):
    """A value in a row of a panel; NaN stands for what there is not."""

    value: float
    low: float = math.nan  # the ends of its interval, ...
    high: float = math.nan
    estimate: float = math.nan  # ... and what that is about, if it is not the value
    floor: float = math.nan  # a value to compare with, ...
    at_floor: float = math.nan  # ... and what the value is for as many images as that has
    is_marked: bool = False


@contextmanager
def own_style() -> Iterator[None]:
    """Ignore the user's matplotlibrc and suppress log messages about caches; restore both at the end."""
    log, deaf = logging.getLogger("matplotlib"), logging.NullHandler()
    log.addHandler(deaf)  # without any handler Python prints log messages
    try:
        import matplotlib

        plain = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
        with matplotlib.rc_context({**plain, **_STYLE}):
            yield
    finally:
        log.removeHandler(deaf)


def save_curves(path: str | os.PathLike, curves: dict[str, Curve]) -> None:
    """Draw named curves over kimg. Non-finite values are omitted; raises OSError."""
    _save(path, draw_curves(curves))


def draw_curves(curves: dict[str, Curve]) -> PIL.Image.Image:
    """Return the image that `save_curves` writes: RGB, with the last value of each curve in the legend.

    Up to four curves give 720 x 400 pixels, more a taller image.
    """
    return render_figure(curves_figure(curves))


def save_histogram(path: str | os.PathLike, values: dict[str, Sequence[float]], *, quantity: str) -> None:
    """Draw a histogram of the values of each name, with common bins, and their number and median.

    quantity: name of the quantity, written below the axis

    A few names share the axes; more have a row each. Non-finite values are omitted, and counted in the title.
    Raises OSError.
    """
    write_figure(path, histogram_figure(values, quantity=quantity))


def save_intervals(path: str | os.PathLike, rows: Sequence[tuple[str, str]],
                   panels: Mapping[str, Sequence[Dot | None]], legend: Mapping[str, str]) -> None:
    """Draw values with their intervals: one row per name, one panel per quantity.

    rows:    names with a second line each, such as the numbers of images
    panels:  by quantity, a value for each row; None = there is none
    legend:  texts for "value", "interval", "floor", "at_floor" and "marked"; what does not occur is omitted

    Raises OSError.
    """
    write_figure(path, intervals_figure(rows, panels, legend))


@own_style()
def curves_figure(curves: dict[str, Curve]) -> "Figure":
    """Return the figure of `draw_curves`."""
    lines = math.ceil(len(curves) / 2)  # lines of the legend, which has two columns
    axes = _axes(top=_TOP + _LINE * max(0, lines - 1), height=_HEIGHT + _LINE * max(0, lines - 2))
    entries, times = [], [0.0]  # a run starts at 0
    for index, (name, curve) in enumerate(curves.items()):
        finite = [(x, y) for x, y in curve if math.isfinite(x) and math.isfinite(y)]
        (line,) = axes.plot([x for x, _ in finite], [_clipped(y) for _, y in finite], linewidth=1.5, markersize=4,
                            color=COLORS[index % len(COLORS)], marker="o" if len(finite) <= _MOST_MARKERS else None)
        value = f" {finite[-1][1]:.4g}" if finite else ": no value"
        entries.append((line, f"{printable(name, _COLUMN - _NUMBER)}{value}"))
        times += [x for x, _ in finite]
    axes.margins(y=0.06)
    first, last = min(times), max(times) if any(times) else 1.0
    axes.set_xlim(first - 0.02 * (last - first), last + 0.02 * (last - first))
    _mark(axes.xaxis)
    _mark(axes.yaxis)
    axes.set_xlabel("kimg", loc="right")
    _legend(axes, entries, columns=2)
    return axes.figure


@own_style()
def histogram_figure(values: dict[str, Sequence[float]], *, quantity: str) -> "Figure":
    """Return the figure of `save_histogram`."""
    given = {name: np.asarray(numbers, dtype=np.float64).ravel() for name, numbers in values.items()}
    finite = {name: numbers[np.isfinite(numbers)] for name, numbers in given.items()}
    edges = _bin_edges([_clipped(numbers) for numbers in finite.values()])
    axes = _overlaid(finite, edges) if len(finite) <= _MOST_TOGETHER else _in_rows(finite, edges)
    axes.set_xlim(edges[0], edges[-1])
    _mark(axes.xaxis)
    axes.set_xlabel(printable(quantity, 2 * _COLUMN), loc="right")
    number = sum(map(len, finite.values()))
    missing = sum(map(len, given.values())) - number
    left_out = f"; {missing} non-finite omitted" if missing else ""
    title = f"{number} value{'' if number == 1 else 's'}{left_out}"
    axes.figure.text(_LEFT / _WIDTH, 1 - 8 / _height(axes), title, va="top")
    if not number:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center")
    return axes.figure


def _overlaid(finite: dict[str, np.ndarray], edges: np.ndarray) -> "Axes":
    """Draw overlapping histograms."""
    top = _TOP + _LINE * len(finite)
    axes = _axes(top=top, height=_HEIGHT + _LINE * max(0, len(finite) - 2))
    entries = []
    for index, (name, numbers) in enumerate(finite.items()):
        color = COLORS[index % len(COLORS)]
        outline = axes.stairs(_shares(numbers, edges), edges, color=color, linewidth=1.5)
        axes.stairs(_shares(numbers, edges), edges, color=color, alpha=0.2, fill=True)
        if len(numbers):
            axes.axvline(_clipped(np.median(numbers)), color=color, linestyle="--", linewidth=1.2)
        entries.append((outline, f"{printable(name, 2 * _COLUMN - _SUMMARY)}: {_summary(numbers)}"))
    axes.set_ylim(0, max(1.0, axes.dataLim.y1) * 1.05)
    _mark(axes.yaxis)
    axes.set_ylabel("% of values" if len(finite) < 2 else "% of the values of each name")
    _legend(axes, entries, columns=1, top=_TOP - 8)
    return axes


def _in_rows(finite: dict[str, np.ndarray], edges: np.ndarray) -> "Axes":
    """Draw one histogram per row, all to the same scale, the first at the top."""
    axes = _axes(top=_TOP, left=_LEFT_OF_ROWS, height=_TOP + _BOTTOM + _ROW * len(finite))
    shares = {name: _shares(numbers, edges) for name, numbers in finite.items()}
    scale = 0.85 / max(1.0, *(share.max() for share in shares.values()))
    for index, (name, share) in enumerate(shares.items()):
        color, floor = COLORS[index % len(COLORS)], -float(index)
        axes.stairs(floor + scale * share, edges, baseline=floor, color=color, alpha=0.35, fill=True)
        axes.stairs(floor + scale * share, edges, baseline=floor, color=color, linewidth=1.2)
        if len(finite[name]):
            axes.plot([_clipped(np.median(finite[name]))] * 2, [floor, floor + 0.9], color=color, linestyle="--",
                      linewidth=1.2)
    axes.set_ylim(1 - len(finite), 1)
    titles = [f"{printable(name, _LEFT_OF_ROWS - 12)}\n{_summary(numbers)}" for name, numbers in finite.items()]
    axes.set_yticks([0.4 - index for index in range(len(finite))], titles)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return axes


@own_style()
def intervals_figure(rows: Sequence[tuple[str, str]], panels: Mapping[str, Sequence[Dot | None]],
                     legend: Mapping[str, str]) -> "Figure":
    """Return the figure of `save_intervals`, with up to four panels side by side."""
    columns = min(len(panels), _MOST_PANELS)
    lines = math.ceil(len(panels) / columns)
    panel = max(_PANEL, (_WIDTH - _LEFT_OF_ROWS - _RIGHT - (columns - 1) * _GAP) // columns)
    width = _LEFT_OF_ROWS + columns * panel + (columns - 1) * _GAP + _RIGHT
    kinds = {kind for dots in panels.values() for dot in dots if dot is not None for kind in _kinds(dot)}
    entries = [(_sample(kind), text) for kind, text in legend.items() if kind in kinds]
    above = 16 + _LINE * math.ceil(len(entries) / 2)
    body = _ROW_OF_DOTS * len(rows)
    height = above + lines * (_TOP + body + _BOTTOM)
    figure = make_figure(width, height)
    for index, (name, dots) in enumerate(panels.items()):
        line, column = divmod(index, columns)
        left, bottom = _LEFT_OF_ROWS + column * (panel + _GAP), height - above - line * (_TOP + body + _BOTTOM) - _TOP
        axes = figure.add_axes((left / width, (bottom - body) / height, panel / width, body / height))
        _draw_dots(axes, dots)
        axes.set_title(printable(name, panel), loc="left", fontsize=_STYLE["font.size"], pad=6)
        axes.set_ylim(0.5 - len(rows), 0.5)
        axes.set_yticks([-float(row) for row in range(len(rows))],
                        [f"{printable(first, _LEFT_OF_ROWS - 12)}\n{printable(second, _LEFT_OF_ROWS - 12)}"
                         for first, second in rows] if column == 0 else [""] * len(rows))
        axes.tick_params(axis="y", length=0)
        _mark(axes.xaxis, 4)
    if figure.axes:
        _legend(figure.axes[0], entries, columns=2, top=8)
    return figure


def _kinds(dot: Dot) -> Iterator[str]:
    """Yield what is drawn of a value, under the names of the legend's entries."""
    if math.isfinite(dot.value):
        yield "marked" if dot.is_marked else "value"
    for kind, number in (("interval", dot.low + dot.high), ("floor", dot.floor), ("at_floor", dot.at_floor)):
        if math.isfinite(number):
            yield kind


def _sample(kind: str, x: Sequence[float] = (), y: Sequence[float] = ()) -> "Line2D":
    """Return the mark of a kind at given points."""
    from matplotlib.lines import Line2D

    looks = {"value": {"marker": "o", "markersize": 6, "color": _DOT, "linestyle": "none"},
             "marked": {"marker": "D", "markersize": 7, "color": _MARKED, "linestyle": "none"},
             "interval": {"marker": "|", "markersize": 7, "color": "#606060", "linewidth": 1.6, "zorder": 1.5},
             "floor": {"marker": "|", "markersize": 17, "markeredgewidth": 2, "color": _FLOOR, "linestyle": "none"},
             "at_floor": {"marker": "o", "markersize": 6, "markerfacecolor": "white", "color": _DOT,
                          "linestyle": "none"}}
    return Line2D(x, y, **looks[kind])


def _draw_dots(axes: "Axes", dots: Sequence[Dot | None]) -> None:
    for row, dot in enumerate(dots):
        if dot is None:
            axes.text(0.5, -row, "no value", transform=axes.get_yaxis_transform(), ha="center", va="center",
                      color="#606060")
            continue
        places = {"value": [dot.value], "marked": [dot.value], "at_floor": [dot.at_floor], "floor": [dot.floor],
                  "interval": [place for place in (dot.low, dot.estimate, dot.high) if math.isfinite(place)]}
        # The value is drawn last, above the others.
        for kind in sorted(_kinds(dot), key=list(places).index, reverse=True):
            axes.add_line(_sample(kind, [_clipped(place) for place in places[kind]], [-row] * len(places[kind])))
    axes.margins(x=0.08)
    axes.autoscale_view(scaley=False)


def _bin_edges(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Return the edges of bins of equal width that cover all values."""
    values = np.concatenate([np.empty(0), *groups])
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    # Rice's rule for a group of median size; with many more bins, small groups would look like noise.
    size = np.median([len(group) for group in groups if len(group)] or [0])
    count = min(max(math.ceil(2 * size ** (1 / 3)), _LEAST_BINS), _MOST_BINS)
    room = 0.0 if high - low > 1e-9 * max(abs(low), abs(high)) else max(abs(high) * 0.1, 1e-9)
    return np.linspace(low - room, high + room, count + 1)


def _shares(numbers: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the percentage of the values in each bin."""
    return np.histogram(_clipped(numbers), edges)[0] * (100 / max(1, len(numbers)))


def _summary(numbers: np.ndarray) -> str:
    return f"n {len(numbers)}, median {np.median(numbers):.4g}" if len(numbers) else "no value"


def _clipped(values):
    return np.clip(values, -_FARTHEST, _FARTHEST)


def _axes(*, top: int, left: int = _LEFT, height: int = _HEIGHT) -> "Axes":
    """Return the axes of a new figure, with margins around them."""
    return make_figure(_WIDTH, height).add_axes((left / _WIDTH, _BOTTOM / height, (_WIDTH - left - _RIGHT) / _WIDTH,
                                             (height - top - _BOTTOM) / height))


def make_figure(width: int, height: int) -> "Figure":
    """Return an empty figure of a size in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def _height(axes: "Axes") -> float:
    return axes.figure.get_figheight() * _DPI


def _mark(axis, count: int = 6) -> None:
    """Use few, round tick labels in plain notation."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _legend(axes: "Axes", entries: Sequence[tuple], *, columns: int, top: int = 4) -> None:
    """Draw a legend above the axes."""
    draw_legend(axes.figure, entries, columns=columns, at=(_LEFT / _WIDTH, 1 - top / _height(axes)))


def draw_legend(figure: "Figure", entries: Sequence[tuple], *, columns: int = 1, at: tuple[float, float]) -> None:
    """Draw a legend of (line, text) pairs.

    at: upper left corner, as shares of the figure's width and height
    """
    if not entries:
        return
    legend = figure.legend([line for line, _ in entries], ["-"] * len(entries), ncols=columns, loc="upper left",
                           bbox_to_anchor=at, borderaxespad=0, borderpad=0)
    for place, (_, text) in zip(legend.get_texts(), entries):
        place.set_text(text)  # only now: legends omit texts that start with "_"


def printable(text: str, width: int) -> str:
    """Replace characters that are not in the font by "?", and shorten a text that is wider than `width` pixels."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    font.set_size(_STYLE["font.size"], _DPI)
    text = "".join(letter if letter.isprintable() and font.get_char_index(ord(letter)) else "?" for letter in text)

    def width_of(some: str) -> float:
        font.set_text(some)
        return font.get_width_height()[0] / 64

    return fitted(text, width, width_of)


@own_style()
def render_figure(figure: "Figure") -> PIL.Image.Image:
    """Return the image of a figure that was made in `own_style`: RGB."""
    figure.canvas.draw()
    return PIL.Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[:, :, :3].copy())


def write_figure(path: str | os.PathLike, figure: "Figure") -> None:
    """Write a figure that was made in `own_style` as a PNG. Raises OSError."""
    _save(path, render_figure(figure))


def _save(path: str | os.PathLike, picture: PIL.Image.Image) -> None:
    with atomic_write(path) as file:
        picture.save(file, "png")
