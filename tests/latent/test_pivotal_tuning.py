"""latent.pivotal_tuning: the image at the pivot comes near, the others stay, and nothing else changes."""

import copy
import math

import pytest
import torch
from torch import nn

import generate
from dnnlib.cli import UserError, run
from generation.image_generator import latents_of
from generation.network import open_network
from latent.pivotal_tuning import TuningSettings, draw_locality, save_tuned, step_towards, tune
from tests.helpers.generator_files import is_alike, lively_generator, pixels_in, save_generator
from tests.helpers.small_networks import small_generator
from torch_utils.images import to_pixels
from training.snapshot import load_network

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = 1e-2  # a learning rate with which tiny networks learn in some steps


class TwoScales(nn.Module):
    """A similarity of pixels and their 2x2 means."""

    name, weights_sha256, preprocessing, least_size = "two-scales", "none", "images as they are", 8

    def embed(self, images):
        return [level / level[0].numel() ** 0.5 for level in (images, nn.functional.avg_pool2d(images, 2))]

    def compare(self, a, b):
        return sum((x - y).square().sum(dim=(1, 2, 3)) for x, y in zip(a, b))


def settings_with(**changes):
    return TuningSettings(**{"num_steps": 60, "seed": 1, "locality_distance": 2.0, "learning_rate": FAST, **changes})


@torch.no_grad()
def styles_of(G, count, seed=9):
    """Return styles [count, L, K], of each class in turn."""
    z = torch.randn(count, G.z_dim, generator=torch.Generator().manual_seed(seed))
    labels = torch.eye(G.c_dim)[torch.arange(count) % G.c_dim] if G.c_dim else torch.zeros(count, 0)
    return G.mapping(z, labels, skip_w_avg_update=True)


@torch.no_grad()
def images_of(G, ws, noise_mode="const"):
    return G.synthesis(ws, noise_mode=noise_mode, force_fp32=True)


def deviation_of(G):
    """Return how far styles are from their mean, as the root of the mean square."""
    w = styles_of(G, 1000)[:, 0]
    return (w - w.mean(dim=0)).square().sum(dim=1).mean().sqrt().item()


def foreign_image(make=small_generator, **network):
    """Return an image of a network of other weights: [1, C, R, R]."""
    other = make(seed=5, **network).eval()
    return images_of(other, styles_of(other, 1), noise_mode="none").clamp(-1, 1)


def lively_image(**network):
    return foreign_image(lively_generator, **network)


def mean_square(a, b):
    return (a - b).square().mean().item()


def moved_by(tuned, G, ws):
    return mean_square(images_of(tuned.G, ws), images_of(G, ws))


def state_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("network", [{}, {"c_dim": 0}, {"channels": 1}, {"architecture": "resnet"},
                                     {"num_fp16_res": 2, "conv_clamp": 256}],
                         ids=["classes", "no classes", "gray", "resnet", "half"])
def test_tune_brings_the_image_at_the_pivot_near_to_a_foreign_one(network):
    G = small_generator(**network).eval()
    w, target = styles_of(G, 1), foreign_image(**network)
    tuned = tune(G, w, target, TwoScales(), settings_with(num_steps=25))
    assert tuned.before.pixel == pytest.approx(mean_square(images_of(G, w), target), rel=1e-4)
    assert tuned.after.pixel == pytest.approx(mean_square(images_of(tuned.G, w), target), rel=1e-4)
    assert tuned.after.pixel < tuned.before.pixel / 15  # 34 to 73 times less, seen
    assert tuned.after.perceptual < tuned.before.perceptual / 15


@pytest.mark.parametrize("c_dim", [0, 2])
def test_tune_keeps_the_images_of_other_latents_by_its_locality_term(c_dim):
    G = lively_generator(c_dim=c_dim)
    w, others, target = styles_of(G, 1), styles_of(G, 65, seed=4)[1:], lively_image(c_dim=c_dim)
    distance = deviation_of(G)
    places = {"others": others, "around": step_towards(w, others, distance)}
    spread = {name: images_of(G, ws).var(dim=0, correction=0).mean().item() for name, ws in places.items()}
    moved, left = [], []
    for weight in (0, 0.1, 1):
        tuned = tune(G, w, target, TwoScales(), settings_with(learning_rate=3e-3, locality_distance=distance,
                                                              locality_weight=weight))
        moved.append({name: moved_by(tuned, G, ws) / spread[name] for name, ws in places.items()})
        left.append(tuned.after.pixel / tuned.before.pixel)
    free, held, tight = moved
    for name in places:
        assert held[name] < free[name]  # 0.4 to 0.92 of it, seen
        assert tight[name] < 0.5 * free[name]  # 0.12 to 0.43, seen
        assert tight[name] < 0.9  # of what tells one image of the network from another; 0.05 to 0.77, seen
    assert left[0] < left[1] < left[2] < 0.3  # what that costs at the pivot


def test_tune_holds_what_lies_at_the_given_distance():
    G = lively_generator(c_dim=0)
    w, target = styles_of(G, 1), lively_image(c_dim=0)
    near, far = (tune(G, w, target, TwoScales(), settings_with(learning_rate=3e-3, locality_weight=1,
                                                               locality_distance=distance))
                 for distance in (0.3, 6.0))
    around = step_towards(w, styles_of(G, 32, seed=4), 6.0)
    assert moved_by(far, G, around) < 0.7 * moved_by(near, G, around)  # 0.28 to 0.39 of it, seen with three seeds


def test_tune_steps_are_those_of_the_formula():
    """Three steps against Adam and the loss written out, with images of an eval mode network."""
    settings = settings_with(num_steps=3, l2_weight=0.7, locality_weight=0.6, locality_l2_weight=1.9)
    G = small_generator().eval().requires_grad_(False)
    w, target, similarity = styles_of(G, 1), foreign_image(), TwoScales()

    def difference(a, b, l2_weight):
        distance = similarity.compare(similarity.embed(a), similarity.embed(b))[0]
        return distance, distance + l2_weight * (a - b).square().mean()

    theta = {name: value.detach().clone() for name, value in G.synthesis.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in theta.items()}
    second = copy.deepcopy(first)
    expected = []
    for step in range(3):
        z, c = draw_locality(G, settings.seed, step)
        direction = G.mapping(z, c) - w
        near = w + settings.locality_distance * direction / direction.square().sum(dim=2, keepdim=True).sqrt()
        leaves = {name: value.requires_grad_() for name, value in theta.items()}
        shown, there = (torch.func.functional_call(G.synthesis, leaves, (ws,), {"noise_mode": "const"})
                        for ws in (w, near))
        distance, loss = difference(shown, target, 0.7)
        loss = loss + 0.6 * difference(there, images_of(G, near), 1.9)[1]
        gradients = dict(zip(leaves, torch.autograd.grad(loss, leaves.values())))
        expected.append(distance.item())
        for name, gradient in gradients.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            theta[name] = (theta[name] - FAST * mean / (square.sqrt() + 1e-8)).detach()

    found = []
    tuned = tune(G, w, target, similarity, settings, on_step=lambda step, distance: found.append((step, distance)))
    assert [step for step, _ in found] == [0, 1, 2]
    assert [distance for _, distance in found] == pytest.approx(expected, rel=1e-4)
    for name, value in tuned.G.synthesis.named_parameters():
        # A weight whose gradient is rounding may go the other way; none passes 3 steps of the learning rate.
        assert ((value - theta[name]).abs() < 1e-4).float().mean() > 0.95, name


@pytest.mark.parametrize("c_dim", [0, 2])
def test_tune_repeats_bit_for_bit_and_follows_its_seed(c_dim):
    G = small_generator(c_dim=c_dim).eval()
    w, target = styles_of(G, 1), foreign_image(c_dim=c_dim)

    def tuned(seed):
        torch.randn(seed)  # whatever else was drawn must not matter
        return state_of(tune(G, w, target, TwoScales(), settings_with(num_steps=4, seed=seed)).G)

    assert same_states(tuned(1), tuned(1))
    assert not same_states(tuned(1), tuned(2))


def test_tune_leaves_the_global_random_state():
    G = lively_generator()
    before = torch.get_rng_state()
    tune(G, styles_of(G, 1), torch.zeros(1, 3, 8, 8), TwoScales(), settings_with(num_steps=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [False, True])
def test_tune_leaves_the_callers_generator_as_it_is(training):
    G = lively_generator().train(training)
    before, w = state_of(G), styles_of(G, 1)
    result = tune(G, w, torch.zeros(1, 3, 8, 8), TwoScales(), settings_with(num_steps=3))
    assert same_states(state_of(G), before)
    assert all(module.training == training for module in G.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in G.parameters())
    mine, theirs = ({tensor.data_ptr() for tensor in network.state_dict().values()} for network in (G, result.G))
    assert not mine & theirs


@pytest.mark.parametrize("training", [False, True])
def test_tune_changes_the_parameters_of_the_synthesis_alone(training):
    G = lively_generator().train(training)  # in train mode, calls of the mapping would move its mean style
    before = state_of(G)
    tuned = tune(G, styles_of(G, 1), torch.zeros(1, 3, 8, 8), TwoScales(), settings_with(num_steps=3)).G
    changed = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"synthesis.{name}" for name, _ in G.synthesis.named_parameters()}


def test_tune_returns_a_generator_that_is_ready_for_use():
    G = lively_generator()
    tuned = tune(G, styles_of(G, 1), torch.zeros(1, 3, 8, 8), TwoScales(), settings_with(num_steps=2))
    assert not any(module.training for module in tuned.G.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in tuned.G.parameters())
    assert tuned.G.init_kwargs == G.init_kwargs
    assert (tuned.num_steps, tuned.similarity, tuned.similarity_sha256) == (2, "two-scales", "none")


def test_tune_works_while_gradients_are_off():
    G = lively_generator()
    arguments = (G, styles_of(G, 1), torch.zeros(1, 3, 8, 8), TwoScales(), settings_with(num_steps=2))
    expected = state_of(tune(*arguments).G)
    with torch.no_grad():
        assert same_states(state_of(tune(*arguments).G), expected)


def test_tune_takes_double_precision_networks():
    G = lively_generator().double()
    w = styles_of(G, 1).float()
    tuned = tune(G, w, torch.zeros(1, 3, 8, 8), TwoScales(), settings_with(num_steps=5))
    assert tuned.after.pixel < tuned.before.pixel


def test_tune_keeps_equal_images_equal_at_first():
    """Before the first step the locality term is nothing at all, so that it has no gradient."""
    G = small_generator().eval()
    w, target = styles_of(G, 1), foreign_image()
    weights = [state_of(tune(G, w, target, TwoScales(), settings_with(num_steps=1, locality_weight=weight)).G)
               for weight in (0, 100)]
    assert same_states(*weights)


def test_draws_depend_on_seed_and_step_alone():
    G = lively_generator()
    draws = {(seed, step): draw_locality(G, seed, step) for seed in (0, 1) for step in (0, 1)}
    assert len({z.sum().item() for z, _ in draws.values()}) == 4
    again = draw_locality(G, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(again, draws[1, 1]))


def test_draws_are_normal_latents_of_every_class():
    G = lively_generator(c_dim=3)
    z, c = (torch.cat(parts) for parts in zip(*(draw_locality(G, 0, step) for step in range(600))))
    assert (z.shape, c.shape) == ((600, 8), (600, 3))
    assert abs(z.mean().item()) < 0.05
    assert z.std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(c.sum(dim=1), torch.ones(600))
    assert (c.sum(dim=0) - 200).abs().max() < 50  # 4 deviations
    assert draw_locality(lively_generator(c_dim=0), 0, 0)[1].shape == (1, 0)


def test_locality_of_a_label_that_is_no_class_stays_with_it():
    G = lively_generator()
    z, c = draw_locality(G, 0, 3, label=(0.5, 0.25))
    assert torch.equal(c, torch.tensor([[0.5, 0.25]]))
    assert torch.equal(z, draw_locality(G, 0, 3)[0])


def test_step_towards_goes_the_distance_in_each_layer():
    pivot = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    w = torch.tensor([[[4.0, 5.0], [0.0, -7.0]]])
    found = step_towards(pivot, w, 2.0)
    assert torch.allclose(found, torch.tensor([[[2.2, 2.6], [0.0, -2.0]]]))
    assert torch.equal(step_towards(pivot, pivot, 2.0), pivot)  # no direction at all


class Blinding(TwoScales):
    """Its distance is no number from a step on."""

    def __init__(self, last_good):
        super().__init__()
        self.left = last_good

    def compare(self, a, b):
        self.left -= 1
        return super().compare(a, b) * (1 if self.left >= 0 else math.nan)


@pytest.mark.parametrize(("last_good", "text"), [
    (1, "--pti-steps: the loss is not finite before the first step, perhaps because the network's training diverged; "
        "expected a network that works: try an earlier snapshot"),
    (2, "--pti-steps is 5, but the loss is not finite after 1 of them; expected a finite one: leave --pti-steps out"),
    (5, "--pti-steps is 5, but the loss is not finite after 4 of them; expected a finite one: try --pti-steps=2"),
    (6, "--pti-steps is 5, but the loss is not finite after 5 of them; expected a finite one: try --pti-steps=2")])
def test_tune_loss_of_no_number_stops_with_advice(last_good, text):
    """The distance is asked for once before the steps, once a step, and once after them."""
    G = lively_generator()
    with pytest.raises(UserError) as error:
        tune(G, styles_of(G, 1), torch.zeros(1, 3, 8, 8), Blinding(last_good),
             settings_with(num_steps=5, locality_weight=0))
    assert str(error.value) == text


def test_tune_steps_too_wide_stop():
    G = lively_generator()
    with pytest.raises(UserError, match=r"^--pti-steps is 60, but the loss is not finite after "):
        tune(G, styles_of(G, 1), torch.zeros(1, 3, 8, 8), TwoScales(), settings_with(learning_rate=1e30))


@pytest.mark.parametrize(("w", "target"), [((1, 4, 8), (1, 3, 16, 16)), ((2, 4, 8), (1, 3, 8, 8)),
                                           ((1, 1, 8), (1, 3, 8, 8)), ((1, 4, 8), (3, 8, 8))])
def test_tune_other_shapes_raise(w, target):
    with pytest.raises(ValueError, match=r"; expected \[1, 4, 8\] and \[1, 3, 8, 8\]$"):
        tune(lively_generator(), torch.zeros(w), torch.zeros(target), TwoScales(), settings_with())


@pytest.mark.parametrize(("changes", "text"), [
    ({"num_steps": 0}, "--pti-steps is 0; expected at least 1, usually about 350"),
    ({"num_steps": -3}, "--pti-steps is -3; expected at least 1, usually about 350"),
    ({"locality_distance": 0.0}, "--pti-steps: the spread of the network's styles is 0; expected more than 0 and "
                                 "finite: try an earlier snapshot"),
    ({"locality_distance": math.nan}, "--pti-steps: the spread of the network's styles is nan; expected more than 0 "
                                      "and finite: try an earlier snapshot")])
def test_settings_of_a_user_that_do_not_work_say_so(changes, text):
    with pytest.raises(UserError) as error:
        settings_with(**changes)
    assert str(error.value) == text


@pytest.mark.parametrize(("name", "value", "text"), [
    ("learning_rate", 0.0, "learning_rate is 0; expected more than 0"),
    ("l2_weight", -1.0, "l2_weight is -1; expected at least 0"),
    ("locality_weight", math.inf, "locality_weight is inf; expected at least 0"),
    ("locality_l2_weight", math.nan, "locality_l2_weight is nan; expected at least 0")])
def test_settings_that_do_not_work_raise(name, value, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        settings_with(**{name: value})


def test_settings_left_alone_are_the_papers():
    settings = TuningSettings(num_steps=350, seed=0, locality_distance=1.0)
    assert (settings.learning_rate, settings.l2_weight, settings.locality_weight, settings.locality_l2_weight) == (
        3e-4, 1, 0.1, 1)


INFO = {"classes": ["nv", "mel"], "class_counts": [6, 4], "kimg": 12.5, "training_set": {"name": "ham"},
        "phantom": True}


def tuned_file(folder):
    """Tune the network of a file; return it as opened, the settings, the result and the new file."""
    network = open_network(save_generator(folder / "net.safetensors", INFO), "cpu")
    settings = settings_with(num_steps=2, seed=7)
    tuned = tune(network.G, styles_of(network.G, 1), torch.zeros(1, 3, 8, 8), TwoScales(), settings)
    save_tuned(folder / "tuned.safetensors", tuned, network, settings)
    return network, tuned, folder / "tuned.safetensors"


def test_save_keeps_the_weights_and_what_the_original_says(tmp_path):
    network, tuned, path = tuned_file(tmp_path)
    networks = load_network(path)
    assert networks.G is networks.D is None
    assert same_states(networks.G_ema.state_dict(), tuned.G.state_dict())
    info = dict(networks.config["info"])
    record = info.pop("pivotal_tuning")
    assert info == INFO
    assert record == {
        "network": "net.safetensors", "network_sha256": network.sha256, "num_steps": 2, "seed": 7,
        "learning_rate": FAST, "l2_weight": 1, "locality_distance": 2, "locality_weight": 0.1, "locality_l2_weight": 1,
        "similarity": "two-scales", "similarity_sha256": "none",
        "before": {"perceptual": tuned.before.perceptual, "pixel": tuned.before.pixel},
        "after": {"perceptual": tuned.after.perceptual, "pixel": tuned.after.pixel}}
    assert network.info == INFO  # the original's is not written into


def test_save_twice_gives_equal_bytes(tmp_path):
    network, tuned, path = tuned_file(tmp_path)
    first = path.read_bytes()
    save_tuned(path, tuned, network, settings_with(num_steps=2, seed=7))
    assert path.read_bytes() == first


def test_saved_network_makes_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    _, tuned, path = tuned_file(tmp_path)
    out = tmp_path / "out"
    assert run(generate.main, [f"--network={path}", "--seeds=3", "--class=mel", f"--outdir={out}"]) == 0
    assert capsys.readouterr().err == ""
    shown = tuned.G(latents_of([3], tuned.G.z_dim), torch.tensor([[0.0, 1.0]]), noise_mode="const")
    assert is_alike(pixels_in(out / "seed0003.png"), to_pixels(shown)[0].permute(1, 2, 0))
