"""Plot what classifiers reach on a part: ROC, precision-recall and calibration curves, and confusion matrices, as PNGs.

One color for each condition: thin lines are the classifiers of single seeds, the thick one is the mean over them. With
more than two labels ROC and precision-recall curves have a panel for each label against the rest; of more than nine
labels, for those with the most images. Calibration is of the most probable label then.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.classification_scores import ECE_BINS, calibration_bins, calibration_sides, scored_labels
from torch_utils.plots import COLORS, draw_legend, make_figure, own_style, printable, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PANELS = 9  # of labels
_SIDES = {1: 460, 2: 330, 3: 250}  # of a panel in pixels, by number of columns
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 64, 52  # around the panels
_ACROSS, _DOWN = 60, 78  # between panels
_LEGEND, _ENTRY, _LINE = 330, 40, 20  # width, and heights of an entry of two lines and of a text
_DASHES = ("-", "--", ":", "-.")  # where there are more conditions than colors
_CELLS = {2: 72, 9: 52, 20: 40}  # of a confusion matrix, by the most labels
_TINY_CELL = 14  # of more labels, without numbers
_LABELS, _WIDEST = 116, 1300  # room for the names of labels; width of a figure of confusion matrices
_GRAY = "#606060"
_GRID = np.linspace(0, 1, 501)
_FEWEST_IN_BIN = 5  # images of each seed, for a point of a calibration curve: shares of fewer are mostly 0 or 1

Predictions = Mapping[str, np.ndarray]  # by condition, float64 [S, N, L]


def save_roc(path: str | os.PathLike, title: str, labels: np.ndarray, label_names: Sequence[str],
             predictions: Predictions, values: Mapping[str, str]) -> None:
    """Draw sensitivity over 1 - specificity; the thick line is the mean of the seeds' sensitivities.

    title:   with the numbers of images and groups
    labels:  int64 [N]; each label has images
    values:  by condition, a text for the legend, such as "AUC 0.832 [0.790, 0.871]"

    Raises OSError.
    """
    write_figure(path, curves_of_labels(title, labels, label_names, predictions, values, is_roc=True))


def save_precision_recall(path: str | os.PathLike, title: str, labels: np.ndarray, label_names: Sequence[str],
                          predictions: Predictions, values: Mapping[str, str]) -> None:
    """Draw precision over sensitivity, as `save_roc` does; dashed is the share of positive images."""
    write_figure(path, curves_of_labels(title, labels, label_names, predictions, values, is_roc=False))


def save_calibration(path: str | os.PathLike, title: str, labels: np.ndarray, label_names: Sequence[str],
                     predictions: Predictions, values: Mapping[str, str]) -> None:
    """Draw shares of positive images over probabilities in bins of equal width; the thick line is of all seeds' ones.

    The arguments are those of `save_roc`.
    """
    write_figure(path, calibration_figure(title, labels, label_names, predictions, values))


def save_confusion(path: str | os.PathLike, title: str, label_names: Sequence[str],
                   counts: Mapping[str, np.ndarray]) -> None:
    """Draw a confusion matrix for each condition: mean numbers of images over the seeds, and % of each row.

    counts:  by condition, float64 [S, L, L], labels in rows and predictions in columns

    Raises OSError.
    """
    write_figure(path, confusion_figure(title, label_names, counts))


@own_style()
def curves_of_labels(title: str, labels: np.ndarray, label_names: Sequence[str], predictions: Predictions,
                     values: Mapping[str, str], *, is_roc: bool) -> "Figure":
    """Return the figure of `save_roc` or `save_precision_recall`."""
    shown = list(scored_labels(len(label_names)))
    if len(shown) > _MOST_PANELS:
        counts = np.bincount(labels, minlength=len(label_names))
        shown = sorted(sorted(shown, key=lambda label: -counts[label])[:_MOST_PANELS])
        title = f"{title}; the {_MOST_PANELS} of {len(label_names)} labels with the most images"
    figure, panels = _panels(_with_seeds(title, predictions), len(shown), values)
    for axes, label in zip(panels, shown, strict=True):
        is_positive = labels == label
        if is_roc:
            axes.plot([0, 1], [0, 1], color=_GRAY, linewidth=1, linestyle=(0, (4, 4)))
        else:
            axes.axhline(is_positive.mean(), color=_GRAY, linewidth=1, linestyle=(0, (4, 4)))
        for (color, dash), by_seed in zip(_looks(), predictions.values()):
            curves = [(_roc if is_roc else _precision_recall)(is_positive, each[:, label]) for each in by_seed]
            _draw(axes, curves, _mean_curve(curves, is_roc), color, dash, "default" if is_roc else "steps-post")
        name = f"{label_names[label]}, {int(is_positive.sum())} of {len(labels)}"
        axes.set_title(printable(name, _side(len(shown))), loc="left", fontsize=9.5, pad=6)
        axes.set_xlabel("1 - specificity" if is_roc else "sensitivity", loc="right")
        axes.set_ylabel("sensitivity" if is_roc else "precision", loc="top")
    return figure


@own_style()
def calibration_figure(title: str, labels: np.ndarray, label_names: Sequence[str], predictions: Predictions,
                       values: Mapping[str, str]) -> "Figure":
    """Return the figure of `save_calibration`."""
    figure, (axes,) = _panels(_with_seeds(title, predictions), 1, values)
    axes.plot([0, 1], [0, 1], color=_GRAY, linewidth=1, linestyle=(0, (4, 4)))
    for (color, dash), by_seed in zip(_looks(), predictions.values()):
        sides = [calibration_sides(labels, each) for each in by_seed]
        whole = _calibration(*map(np.concatenate, zip(*sides)), len(sides) * _FEWEST_IN_BIN)
        _draw(axes, [_calibration(*side, _FEWEST_IN_BIN) for side in sides], whole, color, dash, "default", marker="o")
    name = label_names[1] if len(label_names) == 2 else "the most probable label"
    side = _side(1)
    bins = f"{ECE_BINS} bins of equal width, those with at least {_FEWEST_IN_BIN} images"
    axes.set_title(printable(bins, side), loc="left", fontsize=9.5, pad=6)
    axes.set_xlabel(printable(f"mean probability of {name}", side), loc="right")
    axes.set_ylabel("share of images" if len(label_names) == 2 else "share of images that are of it", loc="top")
    return figure


@own_style()
def confusion_figure(title: str, label_names: Sequence[str], counts: Mapping[str, np.ndarray]) -> "Figure":
    """Return the figure of `save_confusion`."""
    count = len(label_names)
    cell = next((size for most, size in _CELLS.items() if count <= most), _TINY_CELL)
    side, below = count * cell, _BOTTOM + (0 if count == 2 else _LABELS - 20)  # names of more labels are upright
    across, down = max(side, 230) + 28, side + below + 24
    columns = max(1, min(len(counts), (_WIDEST - _LABELS) // across))
    width, height = max(_LABELS + columns * across, 760), _TOP + math.ceil(len(counts) / columns) * down
    figure = make_figure(width, height)
    _write_title(figure, f"{title}; rows: label, columns: predicted; means over seeds of numbers of images, and % of "
                         "each row", width, height)
    names = [printable(name, _LABELS - 20) for name in label_names]
    for index, (name, by_seed) in enumerate(counts.items()):
        row, column = divmod(index, columns)
        bottom = height - _TOP - row * down - side
        axes = figure.add_axes(((_LABELS + column * across) / width, bottom / height, side / width, side / height))
        mean = np.mean(by_seed, axis=0)
        sums = mean.sum(axis=1, keepdims=True)
        shares = np.divide(100 * mean, sums, out=np.zeros_like(mean), where=sums > 0)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        if cell > _TINY_CELL:
            _write_cells(axes, mean, shares, size=cell / 7)
        axes.set_title(printable(name, across - 16), loc="left", fontsize=9.5, pad=6)
        axes.set_xticks(range(count), names, rotation=0 if count == 2 else 90)
        axes.set_yticks(range(count), names if column == 0 else [""] * count)
        axes.tick_params(length=0)
        axes.grid(visible=False)
    return figure


def _write_cells(axes: "Axes", mean: np.ndarray, shares: np.ndarray, *, size: float) -> None:
    for (row, column), number in np.ndenumerate(mean):
        share = shares[row, column]
        text = f"{number:.4g}" if number >= 1000 or number == round(number) else f"{number:.1f}"
        axes.text(column, row, f"{text}\n{share:.0f}%", ha="center", va="center", fontsize=min(size, 8.5),
                  color="white" if share > 60 else "#202020")


def _panels(title: str, count: int, values: Mapping[str, str]) -> tuple["Figure", list["Axes"]]:
    """Return a figure with square axes from 0 to 1, and a legend of conditions beside them."""
    from matplotlib.lines import Line2D  # here: a second to import

    columns = _columns(count)
    side, rows = _side(count), math.ceil(count / columns)
    right = _LEFT + columns * side + (columns - 1) * _ACROSS
    width = right + _RIGHT + _LEGEND
    height = _TOP + max(rows * side + (rows - 1) * _DOWN, _ENTRY * len(values) + _LINE) + _BOTTOM
    figure = make_figure(width, height)
    _write_title(figure, title, width, height)
    panels = []
    for index in range(count):
        row, column = divmod(index, columns)
        left, bottom = _LEFT + column * (side + _ACROSS), height - _TOP - row * (side + _DOWN) - side
        axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        panels.append(axes)
    entries = [(Line2D([], [], color=color, linestyle=dash, linewidth=2), f"{printable(name, _LEGEND - 50)}\n{value}")
               for (color, dash), (name, value) in zip(_looks(), values.items())]
    draw_legend(figure, entries, at=((right + _RIGHT) / width, 1 - _TOP / height))
    return figure, panels


def _write_title(figure: "Figure", title: str, width: int, height: int) -> None:
    figure.text(12 / width, 1 - 12 / height, printable(title, width - 24), va="top")


def _with_seeds(title: str, predictions: Predictions) -> str:
    return f"{title}; thin lines: single seeds" if max(map(len, predictions.values())) > 1 else title


def _columns(count: int) -> int:
    return {1: 1, 2: 2, 4: 2}.get(count, 3)


def _side(count: int) -> int:
    return _SIDES[_columns(count)]


def _looks() -> Iterator[tuple[str, str]]:
    """Yield colors and dashes, endlessly."""
    index = 0
    while True:
        yield COLORS[index % len(COLORS)], _DASHES[index // len(COLORS) % len(_DASHES)]
        index += 1


def _draw(axes: "Axes", curves: Sequence[tuple[np.ndarray, np.ndarray]], mean: tuple[np.ndarray, np.ndarray],
          color: str, dash: str, style: str, marker: str | None = None) -> None:
    if len(curves) > 1:
        for x, y in curves:
            axes.plot(x, y, color=color, linestyle=dash, linewidth=0.7, alpha=0.45, drawstyle=style)
    axes.plot(*mean, color=color, linestyle=dash, linewidth=1.8, drawstyle=style, marker=marker, markersize=4)


def _mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]], is_roc: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of curves at 501 places; of one curve, itself."""
    if len(curves) == 1:
        return curves[0]
    if is_roc:
        return _GRID, np.mean([np.interp(_GRID, x, y) for x, y in curves], axis=0)
    # The precision at the first step that reaches a sensitivity.
    return _GRID, np.mean([y[np.minimum(np.searchsorted(x, _GRID), len(x) - 1)] for x, y in curves], axis=0)


def _roc(is_positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.metrics import roc_curve  # here: importing it takes a second

    false, true, _ = roc_curve(is_positive, scores)
    return false, true


def _precision_recall(is_positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.metrics import precision_recall_curve  # here: importing it takes a second

    precision, recall, _ = precision_recall_curve(is_positive, scores, drop_intermediate=True)
    return recall[::-1], precision[::-1]


def _calibration(stated: np.ndarray, is_true: np.ndarray, fewest: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.calibration import calibration_curve  # here: importing it takes a second

    true, mean = calibration_curve(is_true, np.clip(stated, 0, 1), n_bins=ECE_BINS)
    counts = np.bincount(calibration_bins(stated))
    is_shown = counts[counts > 0] >= fewest  # the curve omits empty bins
    return mean[is_shown], true[is_shown]
