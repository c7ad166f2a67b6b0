"""Walks along directions: slopes and intervals of known effects, and what is reported about them."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch

from generation.image_generator import SynthesisSettings
from latent.directions import Directions
from latent.exploration import ImageFunction
from latent.measurements import MEASUREMENTS, lesion_measurements
from latent.walks import (
    Effect,
    WalkReport,
    correct_for_number,
    describe_walk,
    fit_slopes,
    groups_of_styles,
    measure_effect,
    move,
    quantities_of,
    walk_directions,
    write_walks,
)
from tests.helpers.disc_generator import ATTRIBUTES, axis_of, disc_explorer
from tests.helpers.generator_files import pixels_in

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)
NAN = math.nan


def normal(*shape, seed=0):
    return np.random.RandomState(seed).randn(*shape)


def effect_of(slopes, *, noise=0.0, seed=0, groups=None):
    """Return the effect of images with given slopes over STEPS."""
    start = 3 + normal(len(slopes), seed=seed + 1)
    values = start[:, None] + np.outer(slopes, STEPS) + noise * normal(len(slopes), len(STEPS), seed=seed)
    return measure_effect("area", values, values[:, 2], STEPS, groups)


# Moving


def test_move_adds_the_shift_in_its_layers_only():
    ws, vector = torch.randn(3, 5, 4), torch.tensor([0.0, 0.6, 0.0, 0.8])
    moved = move(ws, vector, [-2.0, 0.0, 1.5], [1, 4])
    assert moved.shape == (3, 3, 5, 4)
    assert torch.equal(moved[:, 1], ws)
    assert torch.equal(moved[:, :, [0, 2, 3]], ws[:, None, [0, 2, 3]].expand(-1, 3, -1, -1))
    torch.testing.assert_close(moved[:, 2, [1, 4]] - ws[:, [1, 4]], (1.5 * vector).expand(3, 2, 4))


# Slopes


def test_slope_is_that_of_a_line_and_of_least_squares():
    values = np.array([[1, 3, 5, 7, 9.0], [4, 4, 4, 4, 4], [0, 1, 0, 1, 3]])
    assert fit_slopes(values, STEPS).tolist() == pytest.approx([2, 0, np.polyfit(STEPS, values[2], 1)[0]])


def test_slope_ignores_steps_without_a_value_and_needs_half_of_them():
    values = np.array([[NAN, 3, 5, 7, NAN], [NAN, NAN, 5, 7, NAN], [NAN] * 5])
    found = fit_slopes(values, STEPS)
    assert found[0] == pytest.approx(2)
    assert np.isnan(found[1:]).all()


def test_effect_has_the_mean_slope_and_the_interval_of_students_t():
    from scipy import stats

    slopes = 0.5 + 0.3 * normal(20)
    found = effect_of(slopes)
    expected = stats.ttest_1samp(slopes, 0)
    assert found.slope == pytest.approx(slopes.mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.num_units == 20
    assert found.num == 100


def test_spread_and_means_are_those_of_the_images():
    values = 3 + normal(30, 5)
    values[4, 1] = NAN
    found = measure_effect("area", values, values[:, 2], STEPS)
    assert found.spread == pytest.approx(values[:, 2].std(ddof=1))
    assert found.means == pytest.approx(np.nanmean(values, axis=0))
    assert found.num == 149
    assert found.relative == pytest.approx(found.slope / found.spread)


def test_images_of_a_group_count_once():
    slopes = (0.5 + 0.3 * normal(10)).repeat(4)
    alone, together = effect_of(slopes), effect_of(slopes, groups=np.arange(10).repeat(4))
    each = effect_of(slopes[::4])
    assert together.num_units == 10
    assert (together.low, together.high) == pytest.approx((each.low, each.high))
    assert alone.high - alone.low < 0.6 * (together.high - together.low)


@pytest.mark.parametrize(("values", "slope"), [
    (np.full((4, 5), NAN), None),
    (np.where(np.arange(4)[:, None] == 0, np.array(STEPS), NAN), 1.0),
], ids=["nowhere", "one image"])
def test_without_two_images_there_is_no_interval(values, slope):
    found = measure_effect("area", values, values[:, 2], STEPS)
    assert found.slope == slope
    assert (found.low, found.high, found.p_value, found.spread, found.num_units) == (None, None, None, None, 0)
    assert math.isnan(found.relative)
    assert not found.is_significant


def test_a_constant_quantity_has_no_effect():
    values = np.full((6, 5), 0.1)
    found = measure_effect("area", values, values[:, 2], STEPS)
    assert (found.slope, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_intervals_contain_the_true_slope_as_often_as_they_say():
    found = [effect_of(0.2 + 0.5 * normal(12, seed=seed), noise=0.4, seed=1000 + seed) for seed in range(400)]
    covered = np.mean([effect.low <= 0.2 <= effect.high for effect in found])
    assert 0.92 < covered < 0.98


def report_of(effects, name="0", detail=""):
    return WalkReport(name=name, detail=detail, steps=STEPS, effects=tuple(effects), sheet="a.png")


def test_without_effects_p_values_are_uniform_and_few_reports_find_one():
    found = [[effect_of(normal(10, seed=100 * trial + index), seed=7) for index in range(10)] for trial in range(120)]
    p_values = np.sort([effect.p_value for effects in found for effect in effects])
    uniform = (np.arange(len(p_values)) + 0.5) / len(p_values)
    assert np.abs(p_values - uniform).max() < 0.05
    reports = [correct_for_number([report_of(effects[:5]), report_of(effects[5:])]) for effects in found]
    wrong = np.mean([any(effect.is_significant for report in pair for effect in report.effects) for pair in reports])
    assert wrong < 0.1


def test_correction_counts_all_effects_of_a_report():
    effects = [effect_of(0.9 + normal(10, seed=seed)) for seed in range(3)]
    lost = measure_effect("area", np.full((2, 5), NAN), np.full(2, NAN), STEPS)
    first, second = correct_for_number([report_of([effects[0], lost]), report_of(effects[1:])])
    corrected = [first.effects[0].p_holm, *(effect.p_holm for effect in second.effects)]
    smallest = int(np.argmin([effect.p_value for effect in effects]))
    assert corrected[smallest] == pytest.approx(min(1, 3 * effects[smallest].p_value))
    assert all(p >= effect.p_value for p, effect in zip(corrected, effects))
    assert first.effects[1].p_holm is None


def test_names_that_occur_twice_are_told_apart():
    functions = [ImageFunction(names=names, compute=len) for names in (("area", "mel"), ("mel", "nv"))]
    assert quantities_of(functions) == ["area", "mel", "classifier:mel", "nv"]


# A generator whose image is known


def brightness():
    return ImageFunction(names=("brightness", "size", "nothing"), compute=lambda pixels: torch.stack(
        [pixels.float().mean(dim=(1, 2, 3)), (pixels[:, 0] < 180).float().mean(dim=(1, 2)),
         torch.ones(len(pixels))], dim=1).numpy())


def axes_of(explorer, attributes=ATTRIBUTES, deviation=1.0):
    return Directions(names=tuple(attributes), vectors=torch.stack([axis_of(explorer.G, name) for name in attributes]),
                      deviations=torch.full((len(attributes),), deviation), layers=tuple(range(explorer.G.num_ws)),
                      method="sefa", network_sha256=explorer.network.sha256)


def walk(explorer, seeds=range(4), *, directions=None, functions=None, **options):
    ws = explorer.styles(list(seeds))
    return walk_directions(explorer, directions or axes_of(explorer), ws, [f"seed {seed}" for seed in seeds],
                           steps=options.pop("steps", STEPS),
                           functions=[lesion_measurements()] if functions is None else functions, **options)


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    explorer = disc_explorer(tmp_path_factory.mktemp("lesions"), resolution=64)
    return explorer, walk(explorer, range(12))


def effect_on(report, quantity):
    return next(effect for effect in report.effects if effect.quantity == quantity)


def test_axes_of_a_disc_change_what_they_drive(lesions):
    radius, color, x, y = lesions[1]
    assert effect_on(radius, "area").is_significant
    assert effect_on(radius, "area").relative > 0.3
    # The radius is 0.21 + 0.11 tanh(w / 3).
    assert effect_on(radius, "diameter").slope == pytest.approx(2 * 0.11 / 3, rel=0.35)
    assert effect_on(color, "color_l").is_significant
    assert effect_on(color, "color_l").slope > 3
    for report in (x, y):
        assert abs(effect_on(report, "area").relative) < 0.05
        assert abs(effect_on(report, "color_l").relative) < 0.05
    assert [effect.quantity for effect in radius.effects] == list(MEASUREMENTS)
    assert radius.effects[0].unit == "image areas"


def test_steps_are_standard_deviations_of_the_direction(tmp_path):
    explorer = disc_explorer(tmp_path)
    slopes = [effect_on(walk(explorer, functions=[brightness()], directions=axes_of(explorer, ["color"], deviation))[0],
                        "brightness").slope for deviation in (0.1, 0.2)]
    assert slopes[1] == pytest.approx(2 * slopes[0], rel=0.05)


def test_unmoved_images_are_those_of_the_seeds_wherever_the_steps_are(tmp_path):
    explorer = disc_explorer(tmp_path)
    function = brightness()
    expected = explorer.evaluate(explorer.styles(list(range(4))), [function])[0]
    report = walk(explorer, functions=[function], steps=(1.0, 2.0), directions=axes_of(explorer, ["x"]))[0]
    assert effect_on(report, "size").spread == pytest.approx(expected[:, 1].std(ddof=1), rel=1e-5)
    moved = walk(explorer, functions=[function], steps=(0.0, 2.0), directions=axes_of(explorer, ["x"]))[0]
    assert effect_on(moved, "size").means[0] == pytest.approx(expected[:, 1].mean(), rel=1e-5)


def test_images_of_one_style_are_one_image(tmp_path):
    explorer = disc_explorer(tmp_path, settings=SynthesisSettings(truncation=0.0))
    report = walk(explorer, functions=[brightness()], directions=axes_of(explorer, ["radius"]))[0]
    effect = effect_on(report, "brightness")
    assert effect.slope < -1
    assert (effect.low, effect.p_value, effect.p_holm) == (None, None, None)
    ws = disc_explorer(tmp_path).styles([3, 4, 3])
    first, second, third = groups_of_styles(ws)
    assert first == third != second
    assert groups_of_styles(ws[:2]) is None


def test_sheet_has_a_row_for_each_image_and_a_column_for_each_step(tmp_path):
    explorer = disc_explorer(tmp_path, resolution=32)
    walk(explorer, functions=[], num_shown=3, directions=axes_of(explorer, ["radius"]))
    sheet = pixels_in(tmp_path / "direction-00-radius.png")
    rows, columns = 3, len(STEPS)
    corner = sheet[-rows * 32:, -columns * 32:].transpose(2, 0, 1)
    images = torch.cat(list(explorer.images(explorer.styles([0, 1, 2]))))
    for row in range(rows):
        cell = corner[:, row * 32:(row + 1) * 32, 2 * 32:3 * 32]  # the step 0
        assert np.array_equal(cell, images[row].numpy())


def test_page_tables_and_lines_tell_the_same(lesions, capsys):
    explorer, reports = lesions
    write_walks(explorer, reports, title="<b>Axes</b> & more", notes=["found <by> hand"], record={"seeds": [1, 2]})
    printed = capsys.readouterr().out
    record = json.loads((explorer.outdir / "effects.json").read_text())
    rows = list(csv.DictReader((explorer.outdir / "effects.csv").read_text().splitlines()))
    page = (explorer.outdir / "index.html").read_text()
    assert record["seeds"] == [1, 2]
    assert record["num_tests"] == 4 * len(MEASUREMENTS)
    assert record["directions"][0]["effects"][0]["slope"] == reports[0].effects[0].slope
    assert len(record["directions"][0]["effects"][0]["means"]) == len(STEPS)
    assert float(rows[0]["slope"]) == pytest.approx(reports[0].effects[0].slope, rel=1e-5)
    assert [row["direction"] for row in rows[::len(MEASUREMENTS)]] == list(ATTRIBUTES)
    assert "<b>" not in page
    assert "found &lt;by&gt; hand" in page
    assert f"{reports[0].effects[0].slope:+.3g}" in page
    assert not re.search(r"https?://", page)
    assert printed.startswith("direction radius: +1 sd of w: ")
    assert "a lesion was found in 240 of 240 images" in printed


def test_equal_walks_write_equal_files(tmp_path):
    for name in ("first", "second"):
        explorer = disc_explorer(tmp_path / name)
        write_walks(explorer, walk(explorer), title="Axes")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def shades_in(page):
    """Return the opacity of the color of each shaded cell."""
    return [float(opacity) for opacity in re.findall(r'style="background: rgb\([0-9 ]+ / ([0-9.]+)\)"', page)]


def test_color_is_the_strongest_from_half_a_standard_deviation_on(lesions):
    explorer, _ = lesions
    effects = [effect("area", slope) for slope in (0.05, 0.25, 0.5, 2.0)]
    write_walks(explorer, [report_of([*effects, effect("area", 2.0, p_holm=0.06)])], title="Axes")
    weak, middle, strong, stronger = shades_in((explorer.outdir / "index.html").read_text())
    assert strong == stronger
    assert (weak, middle) == pytest.approx((0.1 * strong, 0.5 * strong), abs=2e-3)


# Lines


def effect(quantity, slope, spread=1.0, p_holm=0.001):
    return Effect(quantity=quantity, unit="1", slope=slope, low=slope - 0.1, high=slope + 0.1, p_value=p_holm,
                  p_holm=p_holm, spread=spread, num=100, num_images=100, num_units=20, means=())


def test_line_names_the_strongest_significant_effects():
    report = report_of([effect("area", 0.5, spread=10), effect("color_l", -2.0), effect("diameter", 9.0, p_holm=0.2),
                        effect("color_a", 1.0), effect("color_b", 0.5)], detail="singular value 12.3")
    assert describe_walk(report) == ("direction 0 (singular value 12.3): +1 sd of w: color_l -2 [-2.1, -1.9], "
                                     "color_a +1 [0.9, 1.1], color_b +0.5 [0.4, 0.6]")


@pytest.mark.parametrize(("effects", "line"), [
    ([effect("area", 1.0, p_holm=0.06)], "direction 0: no effect that can be told from chance in 20 images"),
    ([], "direction 0: nothing measured"),
    ([measure_effect("area", np.full((2, 5), NAN), np.full(2, NAN), STEPS)],
     "direction 0: no effect can be told from chance, which needs two images or more with a lesion"),
], ids=["chance", "nothing", "untested"])
def test_line_says_when_nothing_was_found(effects, line):
    assert describe_walk(report_of(effects)) == line
