"""latent.projection: schedules, noise maps, and images that are found again."""

import math
import statistics

import numpy as np
import pytest
import torch

from dnnlib.cli import UserError
from latent.projection import (
    COLUMNS,
    ProjectionSettings,
    Projector,
    Start,
    choose_pass,
    find_start,
    finish,
    learning_rate,
    map_penalty,
    measure_pairs,
    style_noise,
)
from metrics.detectors.registry import open_similarity
from tests.helpers.tiny_networks import generator
from torch_utils.images import to_pixels

pytestmark = pytest.mark.usefixtures("one_thread")

# In the closest network that is quick: one that is not trained hides its styles behind noise of full strength.
NETWORK = dict(img_resolution=32, synthesis_kwargs={"channel_base": 512, "channel_max": 16})
NOISE_STRENGTH = 0.02


def network(**changes):
    G = generator(**{**NETWORK, **changes}).eval()
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, NOISE_STRENGTH)
    return G.requires_grad_(False)


@pytest.fixture(scope="module")
def G():
    return network()


@pytest.fixture(scope="module")
def pixels():
    return open_similarity("pixels", device="cpu")


def some_styles(G, count, seed=1):
    """Return styles [count, L, K] of class 0, and the start of that class."""
    label = torch.eye(G.c_dim)[0] if G.c_dim else torch.zeros(0)
    z = torch.randn(count, G.z_dim, generator=torch.Generator().manual_seed(seed))
    return G.mapping(z, label.expand(count, -1)), find_start(G, label)


def show(G, ws):
    return to_pixels(G.synthesis(ws, noise_mode="const"))


def project(G, similarity, targets, starts, **settings):
    projection = Projector(G, similarity, ProjectionSettings(**settings)).begin(targets, starts)
    while not projection.is_done:
        projection.advance()
    return projection


# Computed by hand from METHOD: t = step / 1000; at 999 the cosine is 0.5 - 0.5 cos(pi * 0.004).
@pytest.mark.parametrize(("step", "rate", "noise"), [
    (0, 0.0, 0.05),
    (50, 0.1, 0.05 * (1 - 0.05 / 0.75) ** 2),
    (750, 0.1, 0.0),
    (999, 3.947788e-6, 0.0)])
def test_schedule_has_the_values_of_the_method(step, rate, noise):
    assert learning_rate(step, 1000) == pytest.approx(rate, rel=1e-6, abs=1e-12)
    assert style_noise(step, 1000) == pytest.approx(noise, rel=1e-12, abs=1e-12)


def test_schedule_ramps_up_linearly_and_down_along_a_cosine():
    assert learning_rate(25, 1000) == pytest.approx(0.05)
    assert learning_rate(875, 1000) == pytest.approx(0.05)  # half of the cosine
    assert [learning_rate(step, 1000) for step in range(50, 751)] == [0.1] * 701
    assert learning_rate(30, 600) == pytest.approx(0.1)  # shares of the steps, not steps
    assert style_noise(375, 1000) == pytest.approx(0.05 / 4)


def penalty_by_loops(noise):
    """Return the regulariser of one map, [r, r], from its definition."""
    total = 0.0
    while True:
        side = len(noise)
        for dy, dx in ((0, 1), (1, 0)):
            products = [noise[y, x] * noise[(y - dy) % side, (x - dx) % side] for y in range(side) for x in range(side)]
            total += (sum(products) / side**2) ** 2
        if side <= 8:
            return total
        noise = noise.reshape(side // 2, 2, side // 2, 2).mean(axis=(1, 3))


def test_map_penalty_is_that_of_the_formula():
    random = np.random.RandomState(0)
    maps = [random.randn(3, 1, side, side) for side in (4, 8, 16, 32)]
    maps[2][1] += 2  # one that carries something
    expected = [sum(penalty_by_loops(level[image, 0]) for level in maps) for image in range(3)]
    found = map_penalty([torch.from_numpy(level) for level in maps])
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[1] > 10 * expected[0]


def test_start_is_mean_and_deviation_of_the_class():
    G = network()
    z = torch.from_numpy(np.random.RandomState(123).randn(10_000, G.z_dim))
    for label in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])):
        w = G.mapping(z, label.expand(10_000, -1))[:, 0].double()
        start = find_start(G, label)
        assert torch.allclose(start.mean.double(), w.mean(dim=0), atol=1e-6)
        assert start.deviation == pytest.approx(math.sqrt(((w - w.mean(dim=0)) ** 2).sum().item() / 10_000), rel=1e-6)
    assert not torch.allclose(find_start(G, torch.tensor([1.0, 0.0])).mean, start.mean, atol=1e-2)


def test_start_leaves_the_moving_average_of_the_network_alone():
    G = network().train()
    before = G.mapping.w_avg.clone()
    find_start(G, torch.tensor([1.0, 0.0]))
    assert torch.equal(G.mapping.w_avg, before)


def test_image_of_the_network_is_found_again(G, pixels):
    ws, start = some_styles(G, 4)
    targets = show(G, ws)
    projection = project(G, pixels, targets, [start] * 4, num_steps=300)
    before = measure_pairs(targets, show(G, start.mean.expand(4, G.num_ws, -1)), pixels)[:, 0]
    after = measure_pairs(targets, show(G, projection.styles()), pixels)[:, 0]
    # Seen: 0.13, 0.02, 0.006, 0.02 of the distance and 0.49, 0.21, 0.06, 0.13 of the way in W; seven times as far
    # allowed for the best ones, little for the worst.
    assert (after < 0.2 * before).all()
    shares = (projection.w[:, 0] - ws[:, 0]).norm(dim=1) / (start.mean - ws[:, 0]).norm(dim=1)
    assert statistics.median(shares.tolist()) < 0.35
    assert shares.max() < 0.75


def test_w_plus_comes_at_least_as_near_as_w(G, pixels):
    targets = show(network(), some_styles(network(seed=5), 4)[0])  # outside of what the network makes
    targets = targets.flip(3)
    start = some_styles(G, 1)[1]
    distances = {space: measure_pairs(targets, show(G, project(G, pixels, targets, [start] * 4, num_steps=200,
                                                               space=space).styles()), pixels)[:, 0]
                 for space in ("w", "w+")}
    assert (distances["w+"] <= distances["w"]).all()
    assert distances["w+"].sum() < 0.8 * distances["w"].sum()


def test_w_has_one_style_for_all_layers_and_w_plus_one_each(G, pixels):
    ws, start = some_styles(G, 1)
    flat = project(G, pixels, show(G, ws), [start], num_steps=3)
    each = project(G, pixels, show(G, ws), [start], num_steps=3, space="w+")
    assert flat.w.shape == (1, 1, G.w_dim)
    assert each.w.shape == (1, G.num_ws, G.w_dim)
    assert torch.equal(flat.styles()[:, 0], flat.styles()[:, -1])
    assert not torch.equal(each.styles()[:, 0], each.styles()[:, -1])


@pytest.mark.parametrize("space", ["w", "w+"])
def test_result_of_an_image_does_not_depend_on_its_pass(G, pixels, space):
    ws, start = some_styles(G, 6)
    targets = show(G, ws)
    other = Start(mean=start.mean + 0.1, deviation=0.5)
    starts = [start, other, start, other, start, other]

    def found(places):
        return project(G, pixels, targets[places], [starts[place] for place in places], num_steps=40, space=space).w

    together, turned = found([0, 1, 2, 3]), found([3, 5, 4, 0])
    assert torch.equal(together[0], turned[3])
    assert torch.equal(together[3], turned[0])
    filled = found([0, 0, 0, 0])
    assert torch.equal(filled[0], together[0])
    assert torch.equal(filled[0], filled[3])
    # Passes of other sizes round in another order, and Adam moves a style by its learning rate of up to 0.1 a step even
    # where rounding decides about the sign of its gradient. A start that is one rounding off comes out up to 3e-3 off
    # after 40 steps, on one CPU or another; a pass of one image up to 9e-4. Another image is 0.1 and more away.
    assert torch.allclose(found([0])[0], together[0], atol=1e-2)
    assert not torch.allclose(found([2])[0], together[0], atol=0.1)


def test_result_depends_on_the_seed_alone(G, pixels):
    ws, start = some_styles(G, 1)
    first, again, other = (project(G, pixels, show(G, ws), [start], num_steps=10, seed=seed).w for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noise_maps_stay_standardised_and_the_network_as_it_is(pixels):
    G = network()
    before = {name: value.clone() for name, value in G.state_dict().items()}
    ws, start = some_styles(G, 2)
    projection = project(G, pixels, show(G, ws), [start] * 2, num_steps=5)
    values = projection.state_dict()["values"]
    maps = {name: value for name, value in values.items() if name != "w"}
    assert len(maps) == 7  # one at 4x4, two each at 8, 16 and 32
    for noise in maps.values():
        assert torch.allclose(noise.mean(dim=(1, 2, 3)), torch.zeros(2), atol=1e-5)
        assert torch.allclose(noise.square().mean(dim=(1, 2, 3)), torch.ones(2), atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in G.state_dict().items())
    assert not G.training
    assert all(parameter.grad is None for parameter in G.parameters())


def test_projection_goes_on_from_a_state_bit_for_bit(G, pixels):
    ws, start = some_styles(G, 2)
    projector = Projector(G, pixels, ProjectionSettings(num_steps=20))
    whole = projector.begin(show(G, ws), [start] * 2, keep_path=True)
    first = projector.begin(show(G, ws), [start] * 2, keep_path=True)
    for _ in range(20):
        whole.advance()
    for _ in range(7):
        first.advance()
    second = projector.begin(show(G, ws), [start] * 2, keep_path=True)
    second.load_state_dict(first.state_dict())
    while not second.is_done:
        second.advance()
    assert torch.equal(second.w, whole.w)
    assert len(second.path) == 20
    assert all(torch.equal(a, b) for a, b in zip(second.path, whole.path, strict=True))


def test_finish_takes_states_of_the_same_identity_alone(G, pixels, tmp_path, monkeypatch):
    monkeypatch.setattr("latent.projection.STATE_SECONDS", 0.0)
    ws, start = some_styles(G, 1)
    projector = Projector(G, pixels, ProjectionSettings(num_steps=6))

    def run(identity):
        projection, steps = projector.begin(show(G, ws), [start]), []
        finish(projection, tmp_path / "state.pt", identity, steps.append)
        return projection.w, steps

    w, steps = run("a")
    assert steps == [1] * 6
    again, steps = run("a")
    assert steps == [6]  # the last state is that of the end
    assert torch.equal(w, again)
    assert run("b")[1] == [1] * 6


def test_finish_begins_anew_where_the_state_is_damaged(G, pixels, tmp_path, capsys):
    ws, start = some_styles(G, 1)
    (tmp_path / "state.pt").write_bytes(b"nothing")
    projection = Projector(G, pixels, ProjectionSettings(num_steps=2)).begin(show(G, ws), [start])
    finish(projection, tmp_path / "state.pt", "a")
    assert projection.is_done
    assert capsys.readouterr().err.endswith("; beginning anew\n")


@pytest.mark.parametrize("changes", [{"c_dim": 0}, {"img_channels": 1}, {"synthesis_kwargs": {
    "channel_base": 512, "channel_max": 16, "architecture": "resnet", "num_fp16_res": 2, "conv_clamp": 256}}])
def test_other_networks_are_projected_too(pixels, changes):
    G = network(**changes)
    ws, start = some_styles(G, 4)
    targets = show(G, ws)
    before = measure_pairs(targets, show(G, start.mean.expand(4, G.num_ws, -1)), pixels)[:, 0]
    after = measure_pairs(targets, show(G, project(G, pixels, targets, [start] * 4, num_steps=60).styles()), pixels)
    assert (after[:, 0] < 0.8 * before).all()  # seen: 0.63 at most
    assert (after[:, 0] / before).median() < 0.4  # seen: 0.17


def test_network_without_noise_has_no_maps(pixels):
    G = network(synthesis_kwargs={"channel_base": 512, "channel_max": 16, "use_noise": False})
    ws, start = some_styles(G, 1)
    projection = project(G, pixels, show(G, ws), [start], num_steps=2)
    assert set(projection.state_dict()["values"]) == {"w"}


def test_diverged_network_is_refused(pixels):
    G = network()
    ws, start = some_styles(G, 1)
    target = show(G, ws)
    G.synthesis.b8.conv1.weight.fill_(float("nan"))
    with pytest.raises(UserError) as caught:
        project(G, pixels, target, [start], num_steps=2)
    assert str(caught.value) == ("the distance of the network's images to the targets is no finite number, perhaps "
                                 "since its training diverged; expected a sound network: try an earlier snapshot")


@pytest.mark.parametrize(("settings", "message"), [
    ({"space": "z"}, "--space is z; expected w or w+"),
    ({"num_steps": 0}, "--num-steps is 0; expected at least 1"),
    ({"seed": -1}, "--seed is -1; expected a number from 0 on")])
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError) as caught:
        ProjectionSettings(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(("resolution", "device", "expected"), [
    (64, "cpu", 8), (256, "cpu", 8), (512, "cpu", 2), (1024, "cpu", 1), (64, "cuda", 32), (256, "cuda", 16),
    (1024, "cuda", 1)])
def test_passes_fit_resolution_and_device(resolution, device, expected):
    assert choose_pass(resolution, device) == expected


def test_distances_are_those_of_their_formulas(pixels):
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (2, 3, 16, 16), generator=random, dtype=torch.uint8) for _ in range(2))
    found = dict(zip(COLUMNS, measure_pairs(a, b, pixels).T.tolist(), strict=True))
    difference = a.numpy().astype(np.float64) - b.numpy()
    roots = np.sqrt((difference**2).mean(axis=(1, 2, 3)))
    assert found["pixel_l2"] == pytest.approx(roots, rel=1e-6)
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / roots**2), rel=1e-6)
    x, y = (values.float() / 127.5 - 1 for values in (a, b))
    assert found["perceptual"] == pytest.approx(pixels(x, y).tolist(), rel=1e-6)
    cosines = [np.dot(p, q) / np.linalg.norm(p) / np.linalg.norm(q)
               for p, q in zip(pixels.describe(x).numpy(), pixels.describe(y).numpy())]
    assert found["feature_cosine"] == pytest.approx(cosines, rel=1e-5)


def test_distances_of_equal_images_are_none(pixels):
    a = torch.randint(0, 256, (1, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert measure_pairs(a, a, pixels)[0].tolist() == [0, 0, math.inf, pytest.approx(1)]
