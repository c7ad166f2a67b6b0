"""imagesets.phantoms.scene: the looks of classes, and the distributions of attributes."""

from dataclasses import replace

import numpy as np
import pytest

from dnnlib.cli import UserError
from imagesets.phantoms.make import PhantomOptions, deal_lesions, render_phantom
from imagesets.phantoms.scene import (
    ARTIFACT_RATES,
    LOOKS,
    STRUCTURES,
    attributes,
    check_looks_differ,
    draw_scene,
    look_of,
)
from tests.helpers.phantom_helpers import auc

OF_CLASS = ["border_irregularity", "asymmetry", "num_colors", "colors", "structure"]
OF_VIEW = ["field_mm", "rotation_deg", "brightness", "num_hairs", *ARTIFACT_RATES]


def scene_table(class_name, count, rates=ARTIFACT_RATES, seed=0):
    return [attributes(draw_scene(seed=seed, lesion_number=i, index=i, look=look_of(class_name), rates=rates))
            for i in range(count)]


def test_attributes_but_those_of_the_look_are_the_same_in_every_class():
    tables = [scene_table(name, 40) for name in ("benign", "melanoma", "vasc", "something_else")]
    free = [name for name in tables[0][0] if name not in OF_CLASS]
    assert len(free) == 18
    for rows in zip(*tables):
        assert all([row[name] for name in free] == [rows[0][name] for name in free] for row in rows)


def test_attributes_are_independent_of_the_class_in_a_set():
    labels, lesions = deal_lesions([1000, 1000], 1)
    looks = [look_of("benign"), look_of("melanoma")]
    rows = [attributes(draw_scene(seed=1, lesion_number=lesion, index=index, look=looks[label], rates=ARTIFACT_RATES))
            for index, (label, lesion) in enumerate(zip(labels.tolist(), lesions.tolist()))]
    for name in rows[0]:
        if name not in OF_CLASS:
            # About 1400 lesions: the standard error of the area is sqrt(1400 / (12 * 700 * 700)) = 0.0154, or 1.2 times
            # that with lesions of up to three images; the bound is three of it, for 18 attributes.
            assert auc([row[name] for row in rows], labels) == pytest.approx(0.5, abs=0.056), name


def test_class_attributes_differ_and_overlap():
    benign, melanoma = scene_table("benign", 600), scene_table("melanoma", 600, seed=1)
    positive = np.arange(1200) >= 600
    columns = {name: np.array([row[name] for row in benign + melanoma], np.float64) for name in OF_CLASS[:3]}
    for values in columns.values():
        assert 0.7 < auc(values, positive) < 0.9
    together = sum((values - values.mean()) / values.std() for values in columns.values())
    assert 0.86 < auc(together, positive) < 0.96  # mostly distinguishable, but not always


def test_bias_sets_the_probability_and_changes_nothing_else():
    options = PhantomOptions(bias={"frame": (0.4, 0.02)})
    plain = scene_table("benign", 1000)
    for label, expected in ((0, 0.4), (1, 0.02)):
        biased = scene_table("benign", 1000, options.rates(label))
        share = np.mean([row["frame"] for row in biased])
        # Three standard errors of a share of 1000.
        assert share == pytest.approx(expected, abs=3 * (expected * (1 - expected) / 1000) ** 0.5)
        assert all({**row, "frame": 0} == {**other, "frame": 0} for row, other in zip(plain, biased))


def test_artifact_leaves_the_rest_of_the_view_alone():
    def view(hair):
        rates = {**ARTIFACT_RATES, "vignette": 1.0, "hair": hair}
        return draw_scene(seed=0, lesion_number=0, index=5, look=look_of("benign"), rates=rates).view
    assert replace(view(1.0), num_hairs=0, artifacts=frozenset()) == replace(view(0.0), artifacts=frozenset())
    assert view(1.0).artifacts == view(0.0).artifacts | {"hair"}


def test_artifacts_are_as_frequent_as_stated():
    rows = scene_table("benign", 1500)
    for name, rate in ARTIFACT_RATES.items():
        # Three standard errors of a share of 1500.
        assert np.mean([row[name] for row in rows]) == pytest.approx(rate, abs=3 * (rate * (1 - rate) / 1500) ** 0.5)
    assert all((row["num_hairs"] > 0) == bool(row["hair"]) for row in rows)


def test_images_of_one_lesion_share_its_attributes_and_not_the_view():
    _, first = render_phantom(0, 10, lesion_number=7, resolution=8)
    _, second = render_phantom(0, 11, lesion_number=7, resolution=8)
    shared = [name for name in first if name not in OF_VIEW]
    assert [first[name] for name in shared] == [second[name] for name in shared]
    assert first["rotation_deg"] != second["rotation_deg"]
    assert first["field_mm"] != second["field_mm"]


@pytest.mark.parametrize(("name", "look"), [
    ("benign", "nevus"), ("NV", "nevus"), ("Melanoma", "melanoma"), ("mel", "melanoma"), ("bkl", "keratosis"),
    ("Seborrheic Keratosis", "keratosis"), ("seborrheic-keratosis", "keratosis"), ("bcc", "basal_cell"),
    ("akiec", "actinic"), ("vasc", "vascular"), ("df", "dermatofibroma")])
def test_look_of_known_names(name, look):
    assert look_of(name) is LOOKS[look]


def test_look_of_unknown_name_is_its_own():
    first, again, other = look_of("lentigo"), look_of("lentigo"), look_of("wart")
    assert first == again
    assert first != other
    assert first.structure in STRUCTURES
    assert all(first != look for look in LOOKS.values())


def test_two_names_of_one_look_are_refused():
    with pytest.raises(UserError) as error:
        check_looks_differ(["nv", "mel", "benign"])
    assert str(error.value) == "--classes has nv and benign, which look the same; keep one of them"
