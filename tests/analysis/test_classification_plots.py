"""analysis.classification_plots: curves of given predictions, their legends, and room for any names and numbers."""

import numpy as np
import PIL.Image
import pytest
import sklearn.metrics

from analysis.classification_plots import (
    calibration_figure,
    confusion_figure,
    curves_of_labels,
    save_calibration,
    save_confusion,
    save_precision_recall,
    save_roc,
)

NAMES = ["_private", "$x_1$", "a|b", "<b>", "\u75e3", "\ud800", "a\nb", "", "\\frac{", "real+synthetic-0.5 " * 9]


def made(num_labels=2, conditions=("real", "synthetic"), seeds=3, count=200):
    random = np.random.RandomState(0)
    labels = random.randint(num_labels, size=count)
    found = {}
    for name in conditions:
        odds = np.exp(random.randn(seeds, count, num_labels) + np.eye(num_labels)[labels])
        found[name] = odds / odds.sum(axis=2, keepdims=True)
    return labels, [f"label {number}" for number in range(num_labels)], found, dict.fromkeys(conditions, "AUC 0.8")


def texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_roc_of_one_seed_is_that_of_scikit_learn():
    labels, names, predictions, values = made(conditions=["real"], seeds=1)
    figure = curves_of_labels("test: 200 images", labels, names, predictions, values, is_roc=True)
    (axes,) = figure.axes
    _, curve = axes.lines  # after the diagonal
    false, true, _ = sklearn.metrics.roc_curve(labels, predictions["real"][0, :, 1])
    assert (curve.get_xydata() == np.stack([false, true], axis=1)).all()
    assert texts(figure) == ["real\nAUC 0.8"]
    assert [text.get_text() for text in figure.texts] == ["test: 200 images"]
    assert axes.get_title(loc="left") == f"label 1, {labels.sum()} of 200"


@pytest.mark.parametrize("is_roc", [True, False])
def test_curves_have_a_thin_line_for_each_seed_and_their_mean(is_roc):
    labels, names, predictions, values = made()
    figure = curves_of_labels("test", labels, names, predictions, values, is_roc=is_roc)
    (axes,) = figure.axes
    assert [round(line.get_linewidth(), 1) for line in axes.lines] == [1, *[0.7, 0.7, 0.7, 1.8] * 2]
    for start in (1, 5):
        lines = axes.lines[start:start + 4]
        assert len({line.get_color() for line in lines}) == 1
        mean = np.array(lines[3].get_ydata())
        assert mean.max() <= 1
        # Between the smallest and the largest of the seeds, at places where these have no step.
        at = [np.interp([0.303, 0.707], *line.get_data()) for line in lines[:3]]
        found = np.interp([0.303, 0.707], *lines[3].get_data())
        assert (np.min(at, axis=0) - 0.02 <= found).all()
        assert (found <= np.max(at, axis=0) + 0.02).all()
    assert axes.lines[1].get_color() != axes.lines[5].get_color()
    assert figure.texts[0].get_text() == "test; thin lines: single seeds"


def test_precision_recall_shows_the_share_of_positives():
    labels, names, predictions, values = made()
    (axes,) = curves_of_labels("", labels, names, predictions, values, is_roc=False).axes
    assert axes.lines[0].get_ydata() == pytest.approx([labels.mean()] * 2)


@pytest.mark.parametrize(("num_labels", "panels"), [(2, 1), (3, 3), (7, 7), (9, 9), (12, 9)])
def test_several_labels_have_a_panel_each_up_to_nine(num_labels, panels):
    labels, names, predictions, values = made(num_labels, conditions=["real"], seeds=1)
    figure = curves_of_labels("test", labels, names, predictions, values, is_roc=True)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(titles) == panels
    if num_labels == 12:
        most = np.sort(np.bincount(labels))[::-1][:9]
        assert sorted((int(title.split(", ")[1].split()[0]) for title in titles), reverse=True) == most.tolist()
        assert figure.texts[0].get_text() == "test; the 9 of 12 labels with the most images"


def test_calibration_of_a_calibrated_classifier_lies_on_the_diagonal():
    random = np.random.RandomState(1)
    scores = random.rand(40_000)
    labels = (random.rand(40_000) < scores).astype(int)
    predictions = {"real": np.stack([1 - scores, scores], axis=1)[None]}
    (axes,) = calibration_figure("", labels, ["rest", "mel"], predictions, {"real": "ECE 0.01"}).axes
    x, y = axes.lines[-1].get_data()
    assert len(x) == 15
    assert y == pytest.approx(x, abs=0.04)  # about four standard errors of 2,700 images
    assert axes.get_xlabel() == "mean probability of mel"


def test_calibration_leaves_out_bins_of_few_images():
    scores = np.repeat([0.1, 0.5, 0.9], [4, 5, 6])
    predictions = {"real": np.stack([1 - scores, scores], axis=1)[None]}
    labels = np.array([0, 0, 0, 1, *[1, 0, 0, 0, 0], *[1, 1, 1, 0, 0, 0]])
    (axes,) = calibration_figure("", labels, ["rest", "mel"], predictions, {"real": ""}).axes
    assert axes.lines[-1].get_xydata().tolist() == [[0.5, pytest.approx(0.2)], [pytest.approx(0.9), 0.5]]
    assert axes.get_title(loc="left") == "15 bins of equal width, those with at least 5 images"


def test_confusion_shows_means_over_seeds_and_shares_of_rows():
    counts = {"real": np.array([[[8, 2], [1, 3]], [[9, 1], [1, 3]]], dtype=float)}
    figure = confusion_figure("test", ["rest", "mel"], counts)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["8.5\n85%", "1.5\n15%", "1\n25%", "3\n75%"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["rest", "mel"]


def test_confusion_of_a_label_without_images_is_empty():
    figure = confusion_figure("", ["rest", "mel"], {"real": np.array([[[5.0, 0], [0, 0]]])})
    assert [text.get_text() for text in figure.axes[0].texts] == ["5\n100%", "0\n0%", "0\n0%", "0\n0%"]


@pytest.mark.parametrize("num_labels", [2, 7])
def test_twelve_conditions_are_inside_the_figure_and_apart(num_labels):
    conditions = [f"condition {number}" for number in range(12)]
    labels, names, predictions, values = made(num_labels, conditions, seeds=1)
    for figure in (curves_of_labels("test", labels, names, predictions, values, is_roc=True),
                   calibration_figure("test", labels, names, predictions, values)):
        figure.canvas.draw()
        legend = figure.legends[0].get_window_extent()
        assert legend.y0 >= 0
        assert legend.x1 <= figure.bbox.x1
        assert legend.x0 >= max(axes.get_window_extent().x1 for axes in figure.axes)
        curves = [line for line in figure.axes[0].lines if line.get_linewidth() == 1.8]
        assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 12
    figure = confusion_figure("test", names, {name: np.ones((1, num_labels, num_labels)) for name in conditions})
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert len(boxes) == 12
    assert not any(one.overlaps(two) for index, one in enumerate(boxes) for two in boxes[:index])
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_any_names_and_titles_are_drawn(tmp_path):
    labels, _, predictions, values = made(3, NAMES, seeds=1, count=60)
    names = ["\ud800", "$\\frac{", "a\nb" * 60]
    for save in (save_roc, save_precision_recall, save_calibration):
        save(tmp_path / "a.png", "\u75e3$_" * 100, labels, names, predictions, values)
        with PIL.Image.open(tmp_path / "a.png") as picture:
            assert picture.width < 1300
    save_confusion(tmp_path / "a.png", "\u75e3$_" * 100, names, {name: np.ones((1, 3, 3)) for name in NAMES})
    with PIL.Image.open(tmp_path / "a.png") as picture:
        assert picture.width <= 1300
