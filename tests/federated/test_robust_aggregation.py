"""Medians and trimmed means of the sites' tensors: formulas, class columns, and what a hostile site can move."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean

from federated.aggregate import Contribution, aggregate, refuse_by_norm, trained, trimmed_mean, update_norm
from tests.helpers.make_sets import make_set
from tests.helpers.simulate_commands import isolate
from tests.helpers.simulations import newest, only_run, run_simulation, state_of
from training.config import FederationConfig

EMBEDDING = "G.mapping.embed.weight"


def contributions(values, counts=None, name="G.x"):
    """Return a contribution of each site, named by its place: values of the tensor, images of each class."""
    counts = [()] * len(values) if counts is None else counts
    return {f"s{index}": Contribution(tensors={name: torch.as_tensor(value, dtype=torch.float64)}, num_images=16,
                                      images_of_class=count)
            for index, (value, count) in enumerate(zip(values, counts, strict=True))}


def federation(**changes):
    return FederationConfig(**{"sites": ("a", "b", "c"), "rounds": 1, "round_kimg": 1.0, "weights": "equal", **changes})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), min_size=1, max_size=9),
       st.sampled_from([None, 0.05, 0.1, 0.2, 0.3, 0.49]))
def test_trimmed_mean_equals_numpy_and_scipy(values, trim):
    found = trimmed_mean(contributions(values), trim)["G.x"].numpy()
    if trim is None:
        expected = np.median(values, axis=0)
    else:
        cut = min(math.ceil(trim * len(values) - 1e-9), (len(values) - 1) // 2)
        expected = trim_mean(values, (cut + 1e-9) / len(values), axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(("count", "trim", "expected"), [
    (1, 0.2, 0), (2, 0.2, 0.5), (3, 0.2, 1), (3, 0.45, 1), (5, 0.2, 2), (10, 0.2, 4.5), (6, 0.2, 2.5), (30, 0.1, 14.5)])
def test_number_of_sites_left_out_is_rounded_up_and_leaves_one(count, trim, expected):
    # The largest of all is far away: it is left out wherever at least one is.
    values = [*range(count - 1), 10**9 if count > 2 else count - 1]
    random.Random(0).shuffle(values)
    assert trimmed_mean(contributions(values), trim)["G.x"] == expected


def test_share_that_is_whole_in_decimals_leaves_out_exactly_that_many():
    # 0.07 * 100 is 7.000000000000001 in binary, which would round up to 8.
    values = [0.0] * 92 + [1.0] * 8
    assert trimmed_mean(contributions(values), 0.07)["G.x"] == pytest.approx(1 / 86)


def test_aggregate_is_what_the_configuration_names():
    parts = contributions([0.0, 1.0, 2.0, 3.0, 94.0])
    found = {name: aggregate(parts, federation(aggregation=name, **more))["G.x"].item() for name, more in (
        ("mean", {}), ("median", {}), ("trimmed-mean", {"trim": 0.2}))}
    assert found == {"mean": 20, "median": 2, "trimmed-mean": 2}
    assert aggregate(parts, federation(aggregation="trimmed-mean", trim=0.01))["G.x"] == 2
    assert aggregate(contributions([0.0, 1.0, 2.0, 9.0, 94.0, 8.0]), federation(aggregation="median"))["G.x"] == 5


@pytest.mark.parametrize("trim", [None, 0.2])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_equal_sites_give_themselves_bit_for_bit(count, trim):
    rng = torch.Generator().manual_seed(3)
    bits = torch.randint(-2**31, 2**31, [20000], generator=rng).to(torch.int32).view(torch.float32)
    values = torch.cat([bits[bits.isfinite()], torch.tensor([0.0, -0.0, torch.finfo(torch.float32).max])])
    part = Contribution(tensors={"G.x": values, EMBEDDING: values[:4000].reshape(1000, 4)}, num_images=7,
                        images_of_class=(7, 0, 3, 0))
    found = trimmed_mean({str(site): part for site in range(count)}, trim)
    assert found.keys() == part.tensors.keys()
    assert all(torch.equal(found[name].view(torch.int32), value.view(torch.int32))
               for name, value in part.tensors.items())


@pytest.mark.parametrize("trim", [None, 0.2])
def test_order_of_arrival_does_not_matter(trim):
    rng = torch.Generator().manual_seed(0)
    parts = contributions(list(torch.randn(6, 50, generator=rng, dtype=torch.float64)))
    expected = trimmed_mean(parts, trim)["G.x"]
    for seed in range(4):
        shuffled = dict(random.Random(seed).sample(list(parts.items()), len(parts)))
        assert torch.equal(trimmed_mean(shuffled, trim)["G.x"], expected)


def test_class_columns_follow_the_sites_that_saw_the_class():
    # Class 0 was seen by all, class 1 by s2 alone, class 2 by two, class 3 nowhere.
    values = [[[0.0, 0.0, 0.0, 5.0]], [[1.0, 0.0, 2.0, 6.0]], [[9.0, 7.0, 4.0, 9.0]]]
    counts = [(9, 0, 0, 0), (8, 0, 3, 0), (1, 5, 2, 0)]
    parts = contributions(values, counts, EMBEDDING)
    assert trimmed_mean(parts, None)[EMBEDDING].tolist() == [[1.0, 7.0, 3.0, 6.0]]
    assert trimmed_mean(contributions(values, counts, "G.x"), None)["G.x"].tolist() == [[1.0, 0.0, 2.0, 6.0]]


@pytest.mark.parametrize(("parts", "message"), [
    ({}, "there are no sites; expected at least one"),
    ({"a": Contribution(tensors={"G.x": torch.zeros(1)}, num_images=1),
      "b": Contribution(tensors={}, num_images=1)},
     "site b sends other tensors or another number of classes than site a; expected the same"),
    ({"a": Contribution(tensors={EMBEDDING: torch.zeros(4, 3)}, num_images=1, images_of_class=(1,))},
     "a label embedding has 3 columns; expected 1, one per class"),
])
def test_what_does_not_fit_is_refused(parts, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        trimmed_mean(parts, None)


@pytest.mark.parametrize("direction", ["against", "random", "constant"])
def test_hostile_site_within_the_norm_limit_moves_the_mean_but_no_median(direction):
    """Four honest sites make nearly the same step; the fifth sends one of 9 times the norm, which is not refused."""
    rng = torch.Generator().manual_seed(1)
    base = {"G.x": torch.randn(2000, generator=rng), "G_ema.x": torch.randn(2000, generator=rng)}
    step = 0.1 * torch.randn(2000, generator=rng)
    honest = [{name: value + step + 0.02 * torch.randn(2000, generator=rng) for name, value in base.items()}
              for _ in range(4)]
    bad = {"against": -step, "random": torch.randn(2000, generator=rng), "constant": torch.ones(2000)}[direction]
    bad = 9 * step.norm() * bad / bad.norm()
    sites = {f"s{index}": tensors for index, tensors in enumerate(honest)} | {
        "s4": {name: value + bad for name, value in base.items()}}
    norms = {site: update_norm(tensors, base, trained(base)) for site, tensors in sites.items()}
    assert norms["s4"] > 8.5 * norms["s0"]
    assert refuse_by_norm(norms, [], limit=10) == {}
    parts = {site: Contribution(tensors=tensors, num_images=16) for site, tensors in sites.items()}
    wanted = {name: value + step for name, value in base.items()}
    moved = {name: aggregate(parts, federation(aggregation=name)) for name in ("mean", "median", "trimmed-mean")}
    for name in base:
        assert torch.dist(moved["mean"][name], wanted[name]) > 1.5 * step.norm()
        lowest, highest = torch.stack([each[name] for each in honest]).aminmax(dim=0)
        for how in ("median", "trimmed-mean"):
            assert torch.dist(moved[how][name], wanted[name]) < 0.25 * step.norm()
            assert (lowest <= moved[how][name]).all()
            assert (moved[how][name] <= highest).all()


# A simulation


def test_median_of_three_sites_is_what_the_server_continues_from(tmp_path, monkeypatch, capsys):
    isolate(tmp_path, monkeypatch)
    for index, name in enumerate("abc"):
        labels = [1, 0] * 6 if name == "b" else [0] * 12  # b alone has melanomas
        make_set(f"{name}.zip", images=range(100 * index, 100 * index + 12), size=16, classes=["nv", "mel"],
                 labels=labels)
    assert run_simulation("--data=a.zip,b.zip,c.zip", "--rounds=1", "--aggregation=median") == 0
    assert "rounds: 1; median, fedavg over G,D" in (only_run() / "server" / "log.txt").read_text()
    found, sites = newest(), [state_of(only_run() / f"site-{name}") for name in "abc"]
    for name in ("G.synthesis.b4.const", "D.b4.fc.weight", "G_ema.synthesis.b4.const"):
        values = torch.stack([site[f"training/{name.replace('.', '/', 1)}"] for site in sites])
        assert torch.equal(found[name], values.median(dim=0).values)
    columns = torch.stack([site["training/G/mapping.embed.weight"] for site in sites])
    assert torch.equal(found[EMBEDDING][:, 0], columns[:, :, 0].median(dim=0).values)
    assert torch.equal(found[EMBEDDING][:, 1], columns[1, :, 1])
