"""latent.projection: schedules, noise maps, images that are found again, and what near means."""

import importlib.util
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dnnlib.cli import UserError
from latent.projection import (
    COLUMNS,
    PERCEPTUAL,
    Projection,
    ProjectionSettings,
    Projector,
    StyleStatistics,
    choose_pass,
    choose_similarity,
    finish,
    learning_rate,
    map_penalty,
    measure_pairs,
    measure_styles,
    style_noise,
    to_similarity_input,
)
from metrics.detectors import registry
from metrics.detectors.base import LPIPS_VGG16, VGG16
from metrics.detectors.registry import open_similarity
from tests.helpers.tiny_networks import generator
from torch_utils.distributed import Processes
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
    return G.mapping(z, label.expand(count, -1)), measure_styles(G, label)


def show(G, ws):
    return to_pixels(G.synthesis(ws, noise_mode="const"))


def project(G, similarity, targets, starts, **settings):
    projection = Projection(Projector(G, similarity, ProjectionSettings(**settings)), targets, starts)
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
    """Return the regularizer of one map, [r, r], from its definition."""
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
        start = measure_styles(G, label)
        assert torch.allclose(start.mean.double(), w.mean(dim=0), atol=1e-6)
        assert start.deviation == pytest.approx(math.sqrt(((w - w.mean(dim=0)) ** 2).sum().item() / 10_000), rel=1e-6)
    assert not torch.allclose(measure_styles(G, torch.tensor([1.0, 0.0])).mean, start.mean, atol=1e-2)


def test_start_leaves_the_moving_average_of_the_network_alone():
    G = network().train()
    before = G.mapping.w_avg.clone()
    measure_styles(G, torch.tensor([1.0, 0.0]))
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
    other = StyleStatistics(mean=start.mean + 0.1, deviation=0.5)
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


def test_noise_maps_stay_standardized_and_the_network_as_it_is(pixels):
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
    whole = Projection(projector, show(G, ws), [start] * 2, keep_path=True)
    first = Projection(projector, show(G, ws), [start] * 2, keep_path=True)
    for _ in range(20):
        whole.advance()
    for _ in range(7):
        first.advance()
    second = Projection(projector, show(G, ws), [start] * 2, keep_path=True)
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
        projection, steps = Projection(projector, show(G, ws), [start]), []
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
    projection = Projection(Projector(G, pixels, ProjectionSettings(num_steps=2)), show(G, ws), [start])
    finish(projection, tmp_path / "state.pt", "a")
    assert projection.is_done
    assert capsys.readouterr().err.endswith("; starting from scratch\n")


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
    assert str(caught.value) == ("the distance of the network's images to the targets is not finite, perhaps because "
                                 "its training diverged; expected a network that works: try an earlier snapshot")


@pytest.mark.parametrize(("settings", "message"), [
    ({"space": "z"}, "--space is z; expected w or w+"),
    ({"num_steps": 0}, "--num-steps is 0; expected at least 1"),
    ({"seed": -1}, "--seed is -1; expected at least 0")])
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


LARGE_ENOUGH = SimpleNamespace(least_size=8)


def images_of(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


@pytest.mark.parametrize("side", [8, 64, 256])
def test_input_of_a_fitting_size_is_the_image_itself(side):
    images = images_of(2, 3, side, side)
    assert torch.equal(to_similarity_input(images, LARGE_ENOUGH), images)


def test_input_of_gray_has_three_equal_channels():
    images = images_of(2, 1, 8, 8)
    found = to_similarity_input(images, LARGE_ENOUGH)
    assert found.shape == (2, 3, 8, 8)
    assert all(torch.equal(found[:, channel], images[:, 0]) for channel in range(3))


@pytest.mark.parametrize(("side", "factor"), [(512, 2), (768, 3), (1024, 4)])
def test_input_of_a_large_image_is_the_mean_of_areas(side, factor):
    images = images_of(1, 1, side, side, dtype=torch.float64)
    expected = images.reshape(1, 1, 256, factor, 256, factor).mean(dim=(3, 5))
    found = to_similarity_input(images, LARGE_ENOUGH)
    assert torch.allclose(found, expected.expand(-1, 3, -1, -1), rtol=0, atol=1e-12)


def test_input_of_a_small_image_is_enlarged_in_straight_lines():
    images = torch.tensor([0.0, 1.0]).expand(1, 3, 2, 2)
    found = to_similarity_input(images, SimpleNamespace(least_size=4))
    # Centers of the 4 lie at -1/4, 1/4, 3/4 and 5/4 of the way between those of the 2; the outer ones stop at the edge.
    assert torch.equal(found, torch.tensor([0, 0.25, 0.75, 1]).expand(1, 3, 4, 4))


@pytest.mark.parametrize("side", [8, 32, 512])
@pytest.mark.parametrize("channels", [1, 3])
def test_input_of_an_image_depends_on_no_other_one(side, channels):
    images = images_of(3, channels, side, side)
    similarity = SimpleNamespace(least_size=32)
    alone = [to_similarity_input(image, similarity) for image in images.split(1)]
    assert torch.equal(to_similarity_input(images, similarity), torch.cat(alone))


@pytest.mark.parametrize(("side", "size"), [(8, 16), (16, 16), (512, 256)])
def test_input_passes_gradients_on(side, size):
    images = images_of(1, 1, side, side).requires_grad_()
    found = to_similarity_input(images, SimpleNamespace(least_size=16))
    assert found.shape == (1, 3, size, size)
    found.sum().backward()
    # Every pixel weighs the same in total; at the edges an enlargement repeats the outermost ones.
    assert images.grad.sum().item() == pytest.approx(3 * size * size, rel=1e-5)
    assert images.grad.min().item() > 0


@pytest.mark.parametrize(("images", "text"), [
    (torch.zeros(1, 2, 8, 8), r"images are torch.float32 \[1, 2, 8, 8\]; expected floating point \[N, 1 or 3, R, R\]"),
    (torch.zeros(1, 3, 8, 16), r"images are torch.float32 \[1, 3, 8, 16\]; expected"),
    (torch.zeros(3, 8, 8), r"images are torch.float32 \[3, 8, 8\]; expected"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"images are torch.uint8 \[1, 3, 8, 8\]; expected floating point"),
    (torch.zeros(1, 3, 300, 300), "images are 300x300; expected sides of at most 256, or of a multiple")])
def test_input_of_other_images_raises(images, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        to_similarity_input(images, LARGE_ENOUGH)


def images(count, seed, side=16, channels=3):
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def test_columns_are_those_of_the_table():
    assert (COLUMNS, PERCEPTUAL) == (("perceptual", "pixel_l2", "psnr", "feature_cosine"), 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_distances_are_those_of_their_definitions(channels):
    pixels = open_similarity("pixels", device="cpu")
    a, b = images(3, 1, channels=channels), images(3, 2, channels=channels)
    found = measure_pairs(a, b, pixels)
    assert (found.dtype, found.shape) == (torch.float32, (3, 4))
    for row, x, y in zip(found.tolist(), a.double(), b.double(), strict=True):
        halves = [nn.functional.avg_pool2d(image / 127.5, 2) for image in (x, y)]
        perceptual = ((x - y) / 127.5).square().mean() + (halves[0] - halves[1]).square().mean()
        l2 = (x - y).square().mean().sqrt()
        less_mean = [half - half.mean(dim=(1, 2), keepdim=True) for half in halves]
        cosine = (less_mean[0] * less_mean[1]).sum() / (less_mean[0].norm() * less_mean[1].norm())
        assert row == pytest.approx([float(perceptual), float(l2), 20 * math.log10(255 / l2), float(cosine)], abs=1e-4)


def test_equal_images_have_an_infinite_psnr():
    a = images(2, 1)
    found = measure_pairs(a, a, open_similarity("pixels", device="cpu"))
    assert found[:, 1:3].tolist() == [[0, math.inf]] * 2
    assert found[:, 0].tolist() == [0, 0]
    assert found[:, 3].tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_images_are_compared_where_the_weights_of_the_similarity_are(kind):
    class Elsewhere(nn.Module):
        least_size = 8

        def __init__(self):
            super().__init__()
            weight = torch.empty(1, device="meta")
            if kind == "parameter":
                self.weight = nn.Parameter(weight)
            else:
                self.register_buffer("weight", weight)

        def forward(self, a, b):
            raise LookupError(a.device.type, b.device.type)

    with pytest.raises(LookupError) as caught:
        measure_pairs(images(1, 1), images(1, 2), Elsewhere())
    assert caught.value.args == ("meta", "meta")


ADVICE = ("whose distances cannot be compared with those of lpips-vgg16; projector.py --detector=NAME chooses one of "
          "lpips-vgg16, efficientnet-lite0, random-conv, pixels")


@pytest.fixture
def downloads(downloads, monkeypatch):
    """The folder of downloads, empty, without a network; and an LPIPS that takes any files."""
    monkeypatch.setitem(registry._SIMILARITIES, "lpips-vgg16", registry._Kind(
        build=StandIn, files=(VGG16, LPIPS_VGG16)))
    monkeypatch.setattr(registry, "fetch", fetch_from(downloads, registry.fetch))
    return downloads


class StandIn(nn.Module):
    """What is opened in place of half a GiB."""

    name = "lpips-vgg16"

    def __init__(self, *paths):
        super().__init__()
        self.paths = [path.name for path in paths]
        self.folder = paths[0].parent


def fetch_from(folder, fetch):
    """Return a fetch that takes a file which is there without a look into it."""
    def look_first(url, *, name, sha256):
        return folder / name if (folder / name).exists() else fetch(url, name=name, sha256=sha256)

    return look_first


def without_packages(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(registry, "find_spec", lambda name: None if "efficientnet" in name else find(name))


def process(rank=0, count=1):
    return Processes(rank=rank, count=count, device=torch.device("cpu"))


def put(folder):
    for file in (VGG16, LPIPS_VGG16):
        (folder / file.name).touch()


def fetching(downloads):
    return f"downloading {VGG16.url} into {downloads}\n"


def missing_line(downloads):
    return (f"{VGG16.name} is not in the cache, and downloading {VGG16.url} failed (no network): download it on a "
            f"machine with network access, and copy it to {downloads / VGG16.name}; it is needed for the ppl "
            "metrics, and for projections that do not use efficientnet-lite0, random-conv or pixels")


@pytest.mark.parametrize("name", ["pixels", "random-conv", "efficientnet-lite0"])
def test_name_decides_even_where_lpips_is_at_hand(downloads, capsys, name):
    put(downloads)
    assert choose_similarity(name, None, process()).name == name
    assert capsys.readouterr().err == ""


def test_lpips_is_taken_where_its_weights_are_at_hand(downloads, capsys):
    put(downloads)
    found = choose_similarity(None, None, process())
    assert (type(found), found.folder) == (StandIn, downloads)
    assert capsys.readouterr().err == ""


def test_weights_alone_are_those_of_lpips(downloads, tmp_path, capsys):
    put(tmp_path)
    found = choose_similarity(None, str(tmp_path), process())
    assert (found.paths, found.folder) == ([VGG16.name, LPIPS_VGG16.name], tmp_path)
    assert capsys.readouterr().err == ""


def test_without_a_network_efficientnet_takes_its_place_and_that_is_said(downloads, capsys):
    assert choose_similarity(None, None, process()).name == "efficientnet-lite0"
    assert capsys.readouterr().err == (
        f"{fetching(downloads)}{missing_line(downloads)}. Using efficientnet-lite0 instead, {ADVICE}\n")


def test_without_network_and_packages_pixels_take_its_place(downloads, monkeypatch, capsys):
    without_packages(monkeypatch)
    assert choose_similarity(None, None, process()).name == "pixels"
    assert capsys.readouterr().err == (
        f"{fetching(downloads)}{missing_line(downloads)}. Using pixels instead, {ADVICE}\n")


def test_nothing_takes_the_place_of_what_was_named(downloads, capsys):
    with pytest.raises(UserError) as caught:
        choose_similarity("lpips-vgg16", None, process())
    assert str(caught.value) == missing_line(downloads)
    assert capsys.readouterr().err == fetching(downloads)


def test_nothing_takes_the_place_of_weights_that_are_missing(downloads, tmp_path):
    with pytest.raises(UserError) as caught:
        choose_similarity(None, str(tmp_path / "no"), process())
    assert str(caught.value) == (f"the folder of weights {tmp_path / 'no'} does not exist; expected a folder that "
                                 f"contains {VGG16.name} and {LPIPS_VGG16.name}")


def test_damaged_weights_are_an_error(downloads, monkeypatch):
    def refuse(*_):
        raise UserError("damaged")

    put(downloads)
    monkeypatch.setitem(registry._SIMILARITIES, "lpips-vgg16", registry._Kind(build=refuse, files=(VGG16, LPIPS_VGG16)))
    with pytest.raises(UserError, match=r"^damaged$"):
        choose_similarity(None, None, process())


def test_other_processes_open_what_the_first_one_chose(downloads, monkeypatch, capsys):
    told = []
    monkeypatch.setattr("latent.projection.broadcast_object", lambda value: told.append(value))
    choose_similarity(None, None, process(0, 2))
    assert told == ["efficientnet-lite0"]
    capsys.readouterr()
    monkeypatch.setattr("latent.projection.broadcast_object",
                        lambda value: "pixels" if value is None else pytest.fail("it chose itself"))
    assert choose_similarity(None, None, process(1, 2)).name == "pixels"
    assert capsys.readouterr().err == ""


def test_similarity_is_on_the_device_of_the_process(downloads):
    meta = Processes(rank=0, count=1, device=torch.device("meta"))
    found = choose_similarity("random-conv", None, meta)
    assert {tensor.device.type for tensor in found.parameters()} == {"meta"}
