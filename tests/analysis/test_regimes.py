"""Which images a classifier is trained on: by group, nested, of the asked number; and what is refused."""

import re

import numpy as np
import pytest

from analysis.regimes import (
    BALANCE,
    BOTH,
    REAL,
    REAL_ON_SYNTHETIC,
    REGIMES,
    SYNTHETIC,
    Condition,
    choose_groups,
    choose_rows,
    parse_regimes,
    parse_shares,
    plan_conditions,
)
from dnnlib.cli import UserError

NAMES = ("rest", "mel")
RANDOM = np.random.RandomState(0)
GROUPS = np.repeat(np.arange(400), RANDOM.randint(1, 5, 400))  # one to four images of each patient
LABELS = np.repeat((RANDOM.rand(400) < 0.15).astype(np.int64), np.bincount(GROUPS))
OF_SET = np.repeat([0, 1], [900, 700])  # labels of the synthetic set


def rows(condition, seed=0, synthetic=OF_SET):
    return choose_rows(condition, LABELS, GROUPS, synthetic, NAMES, seed)


def test_conditions_of_all_regimes_with_their_baselines():
    found = plan_conditions(REGIMES, fractions=(0.1, 1.0), doses=(0.5, 1.0), fill=BALANCE)
    assert [(each.name, each.baseline) for each in found] == [
        ("real-0.1", None), ("real", None), ("synthetic", "real"),
        ("real-0.1+synthetic-0.5", "real-0.1"), ("real-0.1+synthetic-1", "real-0.1"),
        ("real-0.1+synthetic-balance", "real-0.1"), ("real+synthetic-0.5", "real"), ("real+synthetic-1", "real"),
        ("real+synthetic-balance", "real")]


@pytest.mark.parametrize(("regimes", "more", "names"), [
    ((SYNTHETIC,), {}, ["synthetic"]),
    ((REAL_ON_SYNTHETIC,), {}, ["real"]),
    ((BOTH,), {}, ["real+synthetic-1"]),
    ((BOTH,), {"fill": BALANCE}, ["real+synthetic-balance"]),
    ((SYNTHETIC,), {"fractions": (0.1, 0.5)}, ["synthetic"]),
])
def test_conditions_without_real_classifiers_have_no_baseline(regimes, more, names):
    found = plan_conditions(regimes, **more)
    assert [each.name for each in found] == names
    assert {each.baseline for each in found} == {None}


def test_fraction_keeps_groups_whole_and_shares_of_labels():
    chosen = choose_groups(LABELS, GROUPS, 0.3, NAMES, seed=5)
    assert not set(GROUPS[chosen]) & set(np.delete(GROUPS, chosen))
    for label in (0, 1):
        # Whole groups of at most four images: the nearest number is at most two off.
        assert abs((LABELS[chosen] == label).sum() - 0.3 * (label == LABELS).sum()) <= 2


def test_smaller_fraction_and_dose_are_parts_of_larger_ones_and_seeds_differ():
    for seed in range(3):
        parts = [rows(Condition(name="", regime=BOTH, fraction=fraction, dose=0.5), seed) for fraction in (0.1, 0.4)]
        assert set(parts[0].real) < set(parts[1].real)
        assert set(parts[0].synthetic) < set(parts[1].synthetic)
    first, second = (rows(Condition(name="", regime=BOTH, fraction=0.4, dose=0.5), seed) for seed in (0, 1))
    assert set(first.real) != set(second.real)
    assert set(first.synthetic) != set(second.synthetic)


def test_group_with_two_labels_counts_for_the_rarer_one():
    labels, groups = np.array([0, 0, 0, 0, 1, 0, 1, 0, 1]), np.array([0, 1, 2, 3, 4, 4, 5, 5, 6])
    chosen = choose_groups(labels, groups, 0.6, NAMES, seed=0)
    assert (np.bincount(groups[chosen], minlength=7)[4:] > 0).sum() == 2  # 3 of the 5 images of these patients


def test_dose_counts_synthetic_images_by_the_real_ones_in_use():
    whole, part = (Condition(name="", regime=BOTH, fraction=fraction, dose=0.5) for fraction in (1, 0.2))
    assert len(rows(whole).real) == len(LABELS)
    assert len(rows(whole).synthetic) == round(0.5 * len(LABELS))
    assert len(rows(part).synthetic) == round(0.5 * len(rows(part).real))
    assert (np.diff(rows(part).synthetic) > 0).all()


def test_synthetic_regime_takes_the_whole_set_and_no_real_image():
    found = rows(Condition(name="", regime=SYNTHETIC))
    assert len(found.real) == 0
    assert found.synthetic.tolist() == list(range(len(OF_SET)))
    assert found.count_labels(LABELS, OF_SET, 2) == ([0, 0], [900, 700])


def test_real_regime_needs_no_synthetic_set():
    found = rows(Condition(name="", regime=REAL), synthetic=None)
    assert found.count_labels(LABELS, None, 2) == (np.bincount(LABELS).tolist(), [0, 0])


def test_balance_fills_up_the_rarer_label_alone():
    found = rows(Condition(name="", regime=BOTH, fill=BALANCE))
    real, synthetic = found.count_labels(LABELS, OF_SET, 2)
    assert synthetic[0] == 0
    assert real[0] == real[1] + synthetic[1]


@pytest.mark.parametrize(("condition", "message"), [
    (Condition(name="", regime=BOTH, dose=3),
     f"--dose=3 of {len(LABELS)} real images needs {3 * len(LABELS)} synthetic images; the set has 1600: make more "
     "with generate.py --count, or lower it"),
    (Condition(name="", regime=BOTH, dose=1e-5),
     f"--dose=1e-05 of {len(LABELS)} real images takes no synthetic image; expected a larger one"),
    (Condition(name="", regime=REAL, fraction=0.01),
     "--fraction=0.01 leaves 1 group (patients or lesions) of mel; expected at least 2: use a larger fraction"),
])
def test_too_few_images_are_refused(condition, message):
    with pytest.raises(UserError, match=re.escape(message)):
        rows(condition)


def test_balance_without_enough_images_of_the_rare_label_is_refused():
    few = np.repeat([0, 1], [900, 100])
    needed = (LABELS == 0).sum() - (LABELS == 1).sum()
    message = (f"--fill=balance needs {needed} synthetic images of mel; the set has 100: make more with generate.py "
               "--classes")
    with pytest.raises(UserError, match=re.escape(message)):
        rows(Condition(name="", regime=BOTH, fill=BALANCE), synthetic=few)


def test_lists_of_flags_are_parsed():
    assert parse_regimes("real+synthetic, real") == (REAL, BOTH)
    assert parse_shares("1,0.1,1", "--fraction", most=1) == (0.1, 1.0)
    # Conditions are named with six digits: these would be two of one name.
    assert parse_shares("0.5,0.5000001,0.9999999", "--fraction", most=1) == (0.5, 1.0)


@pytest.mark.parametrize(("parse", "message"), [
    (lambda: parse_regimes("real,sinthetic"),
     "--regimes has 'sinthetic' (did you mean synthetic?); expected some of real, synthetic, real+synthetic, "
     "real-on-synthetic, separated by commas"),
    (lambda: parse_shares("0.1,2", "--fraction", most=1),
     "--fraction has 2; expected numbers above 0 and at most 1, separated by commas, such as --fraction=0.1,1"),
    (lambda: parse_shares("0.5,", "--dose"),
     "--dose has an empty number; expected numbers above 0, separated by commas, such as --dose=0.5,1"),
    (lambda: parse_shares("nan", "--dose"),
     "--dose has nan; expected numbers above 0, separated by commas, such as --dose=0.5,1"),
])
def test_lists_with_a_mistake_are_refused(parse, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse()
