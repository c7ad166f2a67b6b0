"""The weighted mean of the sites' tensors, class by class where labels are embedded; norms, cosines and refusals."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.aggregate import (
    Contribution,
    average,
    cosines,
    refuse_by_norm,
    round_beta,
    server_average,
    trained,
    update_norm,
)
from tests.helpers.small_networks import CLASSES, small_discriminator, small_generator
from training.config import EmaConfig
from training.state import ema_beta

EMBEDDINGS = ("G.mapping.embed.weight", "D.mapping.embed.weight", "G_ema.mapping.embed.weight")
SIZES = {"a": 1865, "b": 10016, "c": 18003}  # images of three hospitals


def drawn_tensors(seed, c_dim, dtype=torch.float32):
    """Return random tensors of every kind that travels: embeddings, other weights, a bias, running averages."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"G.synthesis.b4.conv1.weight": (3, 2, 3, 3), "G.synthesis.b4.conv1.bias": (3,), "G.mapping.w_avg": (4,),
              "G.scalar": (), "G_ema.synthesis.b4.conv1.bias": (3,), "D.b4.fc.weight": (2, 5)}
    if c_dim:
        shapes.update({name: (4, c_dim) for name in EMBEDDINGS})
    return {name: torch.randn(shape, generator=rng, dtype=dtype) for name, shape in shapes.items()}


def direct_mean(contributions, weights):
    """Compute the mean one number at a time."""
    sites = sorted(contributions)
    found = {}
    for name, first in contributions[sites[0]].tensors.items():
        result = np.empty(first.shape)
        for place in np.ndindex(*first.shape):
            counts = [contributions[site].num_images if weights == "images" else 1 for site in sites]
            if name in EMBEDDINGS and contributions[sites[0]].images_of_class:
                of_class = [contributions[site].images_of_class[place[-1]] for site in sites]
                counts = of_class if any(of_class) else counts
            numbers = [float(contributions[site].tensors[name][place]) for site in sites]
            result[place] = math.fsum(n * x for n, x in zip(counts, numbers)) / sum(counts)
        found[name] = result
    return found


@st.composite
def _contributions(draw):
    c_dim = draw(st.integers(0, 4))
    has_classes = c_dim > 0 and draw(st.booleans())
    found = {}
    for site in draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True)):
        by_class = draw(st.lists(st.integers(0, 5) | st.integers(0, 10**5), min_size=c_dim, max_size=c_dim))
        num_images = (sum(by_class) if has_classes else 0) or draw(st.integers(1, 10**6))
        tensors = drawn_tensors(draw(st.integers(0, 10**6)), c_dim)
        found[site] = Contribution(tensors=tensors, num_images=num_images,
                                   images_of_class=tuple(by_class) if has_classes else ())
    return found


@settings(max_examples=60, deadline=None)
@given(_contributions(), st.sampled_from(["images", "equal"]))
def test_average_equals_the_direct_formula(contributions, weights):
    mean = average(contributions, weights)
    for name, expected in direct_mean(contributions, weights).items():
        assert mean[name].dtype == torch.float32
        # To the rounding to float32; near 0 to that of the terms.
        np.testing.assert_allclose(mean[name].numpy(), expected, rtol=6.1e-8, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("c_dim", [0, 3])
def test_average_of_sizes_10_5_1_weighs_by_images_or_equally(c_dim):
    parts = {site: Contribution(tensors=drawn_tensors(seed, c_dim, torch.float64), num_images=size)
             for seed, (site, size) in enumerate({"a": 1000, "b": 500, "c": 100}.items())}
    by_images, equally = average(parts), average(parts, "equal")
    for name in by_images:
        a, b, c = (parts[site].tensors[name] for site in "abc")
        torch.testing.assert_close(by_images[name], (10 * a + 5 * b + c) / 16, rtol=0, atol=1e-15)
        torch.testing.assert_close(equally[name], (a + b + c) / 3, rtol=0, atol=1e-15)


@pytest.mark.parametrize("weights", ["images", "equal"])
def test_average_class_columns_follow_the_sites_that_saw_the_class(weights):
    # Class 0 was seen by both, class 1 only at b, class 2 nowhere.
    seen = {"a": (30, 0, 0), "b": (10, 50, 0)}
    parts = {site: Contribution(tensors=drawn_tensors(seed, 3, torch.float64), num_images=sum(counts),
                                images_of_class=counts) for seed, (site, counts) in enumerate(seen.items())}
    mean = average(parts, weights)
    for name in EMBEDDINGS:
        a, b = (parts[site].tensors[name] for site in "ab")
        torch.testing.assert_close(mean[name][:, 0], 0.75 * a[:, 0] + 0.25 * b[:, 0], rtol=0, atol=1e-15)
        torch.testing.assert_close(mean[name][:, 1], b[:, 1], rtol=0, atol=1e-15)
        share = 30 / 90 if weights == "images" else 0.5
        torch.testing.assert_close(mean[name][:, 2], share * a[:, 2] + (1 - share) * b[:, 2], rtol=0, atol=1e-15)


def test_average_label_columns_are_those_of_the_networks():
    state = {f"{prefix}.{name}": value for prefix, network in (
        ("G", small_generator()), ("D", small_discriminator()), ("G_ema", small_generator()),
    ) for name, value in network.state_dict().items()}
    columns = [name for name, value in state.items() if value.ndim == 2 and value.shape[1] == CLASSES]
    assert set(EMBEDDINGS) <= set(columns)
    other = {name: value + 1 for name, value in state.items()}
    only_b = tuple([0] * CLASSES), tuple([7] * CLASSES)
    mean = average({"a": Contribution(tensors=state, num_images=7, images_of_class=only_b[0]),
                    "b": Contribution(tensors=other, num_images=7, images_of_class=only_b[1])})
    assert {name for name, value in mean.items() if torch.equal(value, other[name])} == set(EMBEDDINGS)


@pytest.mark.parametrize("weights", ["images", "equal"])
@pytest.mark.parametrize("sizes", [SIZES, {"a": 16, "b": 16, "c": 16}, {"a": 1, "b": 3, "c": 299_999_933},
                                   {f"s{i}": 7919 + i for i in range(9)}])
def test_average_of_equal_contributions_is_each_of_them_bit_for_bit(sizes, weights):
    rng = torch.Generator().manual_seed(3)
    # All magnitudes of float32, of both signs, and the numbers at its ends.
    bits = torch.randint(-2**31, 2**31, [20000], generator=rng).to(torch.int32).view(torch.float32)
    info = torch.finfo(torch.float32)
    ends = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, info.smallest_normal / 2**23])
    values = torch.cat([bits[bits.isfinite()], ends])
    for dtype, integer in ((torch.float32, torch.int32), (torch.float64, torch.int64)):  # exact also before rounding
        tensors = {"G.x": values.to(dtype), EMBEDDINGS[1]: values[:4000].reshape(1000, 4).to(dtype)}
        mean = average({site: Contribution(tensors=tensors, num_images=size, images_of_class=(size, 0, size // 3, 0))
                        for site, size in sizes.items()}, weights)
        assert all(torch.equal(mean[name].view(integer), value.view(integer)) for name, value in tensors.items())


def test_average_of_one_site_is_that_site_bit_for_bit():
    tensors = drawn_tensors(0, 2)
    mean = average({"a": Contribution(tensors=tensors, num_images=1865, images_of_class=(1865, 0))})
    assert all(torch.equal(mean[name], value) for name, value in tensors.items())


def test_average_depends_on_names_not_on_the_order_of_arrival():
    # In float64, since the order changes last bits, which vanish when the mean is rounded to float32.
    parts = {site: Contribution(tensors=drawn_tensors(seed, 2, torch.float64), num_images=size,
                                images_of_class=(size, 0))
             for seed, (site, size) in enumerate([*SIZES.items(), ("d", 77)])}
    expected = average(parts)
    for seed in range(6):
        shuffled = random.Random(seed).sample(list(parts.items()), len(parts))
        found = average(dict(shuffled))
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_average_leaves_contributions_as_they_were():
    parts = {site: Contribution(tensors=drawn_tensors(ord(site), 2, torch.float64), num_images=5) for site in "ab"}
    average(parts)
    for site, part in parts.items():
        assert all(torch.equal(part.tensors[name], value)
                   for name, value in drawn_tensors(ord(site), 2, torch.float64).items())


@pytest.mark.parametrize(("parts", "message"), [
    ({}, r"the sites \(none\) saw no images; expected at least one"),
    ({"a": Contribution(tensors={}, num_images=0)}, "the sites a saw no images; expected at least one"),
    ({"a": Contribution(tensors={"G.x": torch.zeros(1)}, num_images=1),
      "b": Contribution(tensors={"G.y": torch.zeros(1)}, num_images=1)},
     "site b sends other tensors or another number of classes than site a; expected the same"),
    ({"a": Contribution(tensors={}, num_images=1, images_of_class=(1, 0)), "b": Contribution(tensors={}, num_images=1)},
     "site b sends other tensors or another number of classes than site a; expected the same"),
    ({"a": Contribution(tensors={EMBEDDINGS[0]: torch.zeros(4, 3)}, num_images=1, images_of_class=(1,))},
     "a label embedding has 3 columns; expected 1, one per class"),
])
def test_average_of_what_does_not_fit_is_refused(parts, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        average(parts)


# Moving averages: each site's after each iteration, or the server's after each round.


def simulated_rounds(betas, iterations, sizes, rounds=3):
    """Train with random steps. Return the mean of the sites' moving averages and that of the mean networks, float64.

    betas, iterations, sizes:  of each site
    """
    rng = torch.Generator().manual_seed(1)
    by_class = [(size, size // 2 if site else 0) for site, size in enumerate(sizes)]
    state = {name: torch.randn(4, 2, generator=rng, dtype=torch.float64) for name in ("G.x", EMBEDDINGS[0])}
    state |= {name.replace("G.", "G_ema."): value for name, value in state.items()}
    direct = {name: value for name, value in state.items() if name.startswith("G_ema.")}
    for _ in range(rounds):
        at_sites = [dict(state) for _ in sizes]
        for step in range(max(iterations)):
            for site, tensors in enumerate(at_sites):
                for name in ("G.x", EMBEDDINGS[0]) if step < iterations[site] else ():
                    averaged = name.replace("G.", "G_ema.")
                    tensors[name] = tensors[name] + torch.randn(4, 2, generator=rng, dtype=torch.float64)
                    tensors[averaged] = torch.lerp(tensors[name], tensors[averaged], betas[site])
            parts = {str(site): Contribution(tensors=tensors, num_images=sizes[site], images_of_class=by_class[site])
                     for site, tensors in enumerate(at_sites)}
            state = average(parts)
            direct = {name: torch.lerp(state[name.replace("G_ema.", "G.")], value, betas[0])
                      for name, value in direct.items()}
    return {name: state[name] for name in direct}, direct


def farthest(found, expected):
    return max((found[name] - value).abs().max().item() for name, value in expected.items())


def test_mean_of_moving_averages_is_the_average_of_the_mean_network():
    assert farthest(*simulated_rounds([0.9] * 3, [7] * 3, [10, 5, 1])) < 1e-12


@pytest.mark.parametrize(("betas", "iterations"), [([0.9, 0.8, 0.9], [7, 7, 7]), ([0.9] * 3, [7, 4, 7])])
def test_mean_of_moving_averages_of_unequal_sites_is_another(betas, iterations):
    assert farthest(*simulated_rounds(betas, iterations, [10, 5, 1])) > 0.01


def test_round_beta_without_ramp_up_is_one_step_of_all_images():
    found = round_beta(EmaConfig(kimg=2, rampup=None), batch=16, start_nimg=336, end_nimg=672)
    assert found == pytest.approx(0.5 ** (336 / 2000), rel=1e-13)
    assert found == pytest.approx(ema_beta(336, 336, 2, None), rel=1e-13)


def test_round_beta_with_ramp_up_grows_within_the_round():
    # Half-lives are a quarter of the images seen, and at most 100: 20, 40, 60, 80, 100, 100, ... images.
    ema = EmaConfig(kimg=0.1, rampup=0.25)
    halvings = 80 / 20 + 80 / 40 + 80 / 60 + 80 / 80 + 80 / 100 + 80 / 100
    assert round_beta(ema, batch=80, start_nimg=80, end_nimg=560) == pytest.approx(0.5**halvings, rel=1e-13)
    assert round_beta(ema, batch=80, start_nimg=0, end_nimg=560) == 0  # G_ema is G after the first iteration
    assert ema_beta(480, 80, 0.1, 0.25) == pytest.approx(0.5 ** (480 / 20))  # a single step would forget far more


def test_server_average_of_a_network_at_rest_is_that_of_its_iterations():
    # Without motion within a round, one step with the round's beta equals a step per iteration.
    ema = EmaConfig(kimg=0.5, rampup=0.5)
    G, start = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([0.0, 3.0], dtype=torch.float64)
    direct = start
    for nimg in range(96, 192, 8):
        direct = torch.lerp(G, direct, ema_beta(8, nimg, 0.5, 0.5))
    found = server_average({"G_ema.x": start}, {"G.x": G, "D.x": start},
                           round_beta(ema, batch=8, start_nimg=96, end_nimg=192))
    assert found.keys() == {"G_ema.x"}
    torch.testing.assert_close(found["G_ema.x"], direct, rtol=1e-13, atol=0)


def test_server_average_copies_w_avg_and_stays_at_equal_networks_bit_for_bit():
    x, w_avg = torch.randn(1000), torch.randn(5)
    found = server_average({"G_ema.x": x, "G_ema.mapping.w_avg": torch.zeros(5)},
                           {"G.x": x, "G.mapping.w_avg": w_avg}, 0.37)
    assert found["G_ema.x"].dtype == torch.float32
    assert torch.equal(found["G_ema.x"], x)
    assert torch.equal(found["G_ema.mapping.w_avg"], w_avg)


# Norms


def test_trained_leaves_out_running_averages():
    names = ["G.mapping.fc0.weight", "G.mapping.w_avg", "D.b4.fc.bias", "G_ema.mapping.fc0.weight",
             "G_ema.mapping.w_avg"]
    assert trained(names) == ["G.mapping.fc0.weight", "D.b4.fc.bias"]


def test_update_norm_is_that_of_all_differences_together():
    base, tensors = drawn_tensors(0, 2), drawn_tensors(1, 2)
    names = trained(base)
    differences = np.concatenate([(tensors[name].double() - base[name].double()).numpy().ravel() for name in names])
    assert update_norm(tensors, base, names) == pytest.approx(np.linalg.norm(differences), rel=1e-14)
    assert update_norm(base, base, names) == 0
    assert update_norm({"G.x": torch.tensor([3.0]), "D.x": torch.tensor([[4.0]])},
                       {"G.x": torch.zeros(1), "D.x": torch.zeros(1, 1)}, ["G.x", "D.x"]) == 5


def test_update_norm_of_the_largest_numbers_is_finite():
    huge = torch.full([1000], torch.finfo(torch.float32).max)
    assert update_norm({"G.x": huge}, {"G.x": -huge}, ["G.x"]) == pytest.approx(2 * 3.4028235e38 * 1000**0.5)


def test_update_norm_sees_a_small_step_of_large_weights():
    base = torch.full([10], 1000.0)
    moved = base.clone()
    moved[0] = torch.nextafter(base[0], torch.tensor(math.inf))
    assert update_norm({"G.x": moved}, {"G.x": base}, ["G.x"]) == 2.0**-14  # the last bit of 1000


def test_cosines_of_every_pair_of_sites():
    base = {"G.x": torch.tensor([1.0, 1.0]), "D.x": torch.tensor([[5.0]])}

    def moved(*by):
        return {"G.x": base["G.x"] + torch.tensor(by[:2]), "D.x": base["D.x"] + by[2]}

    updates = {"c": moved(0, 4, 0), "a": moved(3, 0, 0), "b": moved(2, 0, 2), "d": moved(-1, 0, 0)}
    found = cosines(updates, base, ["G.x", "D.x"])
    assert list(found) == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")]
    half = pytest.approx(0.5**0.5, rel=1e-15)
    assert [*found.values()] == [half, 0, -1, 0, pytest.approx(-(0.5**0.5), rel=1e-15), 0]
    assert cosines({"a": updates["a"]}, base, ["G.x"]) == {}


def test_cosines_of_a_site_that_did_not_move_are_undefined():
    base = {"G.x": torch.ones(3)}
    found = cosines({"a": base, "b": {"G.x": torch.zeros(3)}, "c": {"G.x": torch.zeros(3)}}, base, ["G.x"])
    assert math.isnan(found["a", "b"])
    assert math.isnan(found["a", "c"])
    assert found["b", "c"] == pytest.approx(1, abs=1e-15)
    assert found["b", "c"] <= 1


# Refusals

_NORMS = st.floats(0, 1e6, allow_subnormal=False)


def test_refuse_by_norm_names_site_and_numbers():
    found = refuse_by_norm({"a": 0.12, "b": 12.34, "c": 0.1}, [[0.12, 0.13], *[[0.11, 0.12, 0.13]] * 5], 10)
    assert found == {"b": "its norm per local step is 12.3, more than 10 times the median 0.12 of this round's sites "
                          "and the last 5 rounds (--max-update-norm)"}


@pytest.mark.parametrize(("rounds", "words"), [
    (0, "of this round's sites (--max-update-norm)"),
    (1, "of this round's sites and the last round (--max-update-norm)"),
    (2, "of this round's sites and the last 2 rounds (--max-update-norm)"),
    (9, "of this round's sites and the last 5 rounds (--max-update-norm)"),
])
def test_refuse_by_norm_says_what_the_median_is_of(rounds, words):
    (reason,) = refuse_by_norm({"a": 1.0, "b": 11.0, "c": 1.0}, [[1.0, 1.0]] * rounds, 10).values()
    assert reason == f"its norm per local step is 11, more than 10 times the median 1 {words}"


def test_refuse_by_norm_of_two_sites_in_the_first_round_finds_the_hundredfold():
    assert [*refuse_by_norm({"a": 100.0, "b": 1.0}, [], 10)] == ["a"]
    assert refuse_by_norm({"a": 1.0, "b": 10.0}, [], 10) == {}  # the limit itself is accepted


def test_refuse_by_norm_of_one_site_compares_with_its_earlier_rounds():
    assert refuse_by_norm({"a": 100.0}, [], 10) == {}
    assert [*refuse_by_norm({"a": 100.0}, [[1.0], [1.1]], 10)] == ["a"]


def test_refuse_by_norm_forgets_rounds_before_the_last_five():
    old, new = [[0.01]] * 50, [[1.0]] * 5
    assert refuse_by_norm({"a": 2.0}, [*old, *new], 10) == {}
    assert [*refuse_by_norm({"a": 2.0}, [*old, *new[:2]], 10)] == ["a"]


def test_refuse_by_norm_most_sites_at_rest_are_no_measure():
    assert refuse_by_norm({"a": 0.0, "b": 0.0, "c": 1.0}, [[0.0, 0.0]] * 5, 10) == {}
    assert refuse_by_norm({"a": 0.0, "b": 0.0}, [], 10) == {}
    assert refuse_by_norm({}, [], 10) == {}
    assert [*refuse_by_norm({"a": 0.0, "b": 0.0, "c": 100.0}, [[0.0, 0.0, 1.0]], 10)] == ["c"]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("abcde"), _NORMS, max_size=5),
       st.lists(st.lists(_NORMS, max_size=4), max_size=7), st.floats(1.5, 100))
def test_refuse_by_norm_takes_the_largest_first_in_any_unit(norms, history, limit):
    found = refuse_by_norm(norms, history, limit)
    smallest = min(norms, key=norms.get, default=None)
    assert smallest not in found or history  # without earlier rounds the smallest update is accepted
    assert all(site in found for site in norms if any(norms[site] > norms[other] for other in found))
    in_other_unit = refuse_by_norm({site: 4 * norm for site, norm in norms.items()},
                                   [[4 * norm for norm in entry] for entry in history], limit)
    assert in_other_unit.keys() == found.keys()
