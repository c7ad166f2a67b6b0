"""FedAvg, FedAvgM and FedAdam on quadratics whose rounds are known in closed form, and exact continuation.

Site i has the loss h_i / 2 * (x - c_i)^2 and n_i images. Its gradient descent from x ends at c_i + a_i * (x - c_i),
with `shrink` a_i = (1 - eta * h_i)^steps.
"""

import math

import pytest
import torch

from federated.aggregate import Contribution, FedAdam, FedAvg, FedAvgM, average, make_server_optimizer
from torch_utils.checkpoint import read_checkpoint, write_checkpoint
from training.config import FederationConfig

X = "G.x"
CENTERS = torch.tensor([[3.0, -1.0], [0.5, 2.0], [-4.0, 8.0]], dtype=torch.float64)  # [sites, coordinates]
IMAGES = (1000, 500, 100)
OPTIMUM = (10 * CENTERS[0] + 5 * CENTERS[1] + CENTERS[2]) / 16  # of the sum of all images' losses, for equal h
START = torch.tensor([10.0, 20.0], dtype=torch.float64)


def rounds(optimizer, count, *, shrink=(0.5, 0.5, 0.5), start=START):
    """Run rounds of all sites and return the server's x after each, [count + 1, coordinates]."""
    state, path = {X: start}, [start]
    for _ in range(count):
        mean = average({str(site): Contribution(tensors={X: center + a * (state[X] - center)}, num_images=images)
                        for site, (center, a, images) in enumerate(zip(CENTERS, shrink, IMAGES))})
        state = optimizer.step(state, mean)
        path.append(state[X])
    return torch.stack(path)


def near(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def federation(**settings):
    return FederationConfig(sites=("a", "b"), rounds=2, round_kimg=1, **settings)


def test_fedavg_halves_the_distance_to_the_weighted_optimum_each_round():
    path = rounds(FedAvg(), 30)
    near(path - OPTIMUM, (START - OPTIMUM) * 0.5 ** torch.arange(31)[:, None])


def test_fedavg_of_unequal_curvatures_ends_at_its_known_fixed_point():
    # Sites that come near their own optimum in a round pull harder (client drift): weights are n_i * (1 - a_i).
    shrink = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    pull = torch.tensor(IMAGES, dtype=torch.float64) * (1 - shrink)
    near(rounds(FedAvg(), 200, shrink=shrink)[-1], (pull[:, None] * CENTERS).sum(dim=0) / pull.sum())


def test_fedavg_returns_the_mean_itself():
    current, mean = {X: torch.randn(50), "G_ema.x": torch.zeros(2)}, {X: torch.randn(50), "G_ema.x": torch.ones(2)}
    found = FedAvg().step(current, mean)
    assert all(found[name] is value for name, value in mean.items())


@pytest.mark.parametrize(("momentum", "lr"), [(0.9, 1), (0.5, 1), (0.9, 0.3)])
def test_fedavgm_oscillates_around_the_weighted_optimum_as_computed(momentum, lr):
    # The distance e obeys e[t+1] = (1 + momentum - lr / 2) e[t] - momentum e[t-1], whose roots are complex here:
    # e[t] = momentum^(t/2) (e[0] cos(angle t) + b sin(angle t)) with b from e[1] = (1 - lr / 2) e[0].
    cosine = (1 + momentum - lr / 2) / (2 * math.sqrt(momentum))
    angle, t = math.acos(cosine), torch.arange(41, dtype=torch.float64)[:, None]
    b = ((1 - lr / 2) / math.sqrt(momentum) - cosine) / math.sin(angle)
    distances = (START - OPTIMUM) * momentum ** (t / 2) * (torch.cos(angle * t) + b * torch.sin(angle * t))
    near(rounds(FedAvgM(lr=lr, momentum=momentum), 40) - OPTIMUM, distances)


def test_fedavgm_of_a_constant_update_reaches_its_effective_rate():
    optimizer, x, step = FedAvgM(lr=0.5, momentum=0.9), torch.zeros(1, dtype=torch.float64), 0.25
    for number in range(1, 301):
        new = optimizer.step({X: x}, {X: x + step})[X]
        assert (new - x).item() == pytest.approx(0.5 * step * (1 - 0.9**number) / (1 - 0.9), rel=1e-11)
        x = new
    assert optimizer.state_dict()["v"][X].item() == pytest.approx(step / (1 - 0.9), rel=1e-11)


def test_fedavgm_without_momentum_is_fedavg():
    current, mean = {X: torch.randn(5000)}, {X: torch.randn(5000)}
    assert torch.equal(FedAvgM(lr=1, momentum=0).step(current, mean)[X], mean[X])


def test_fedadam_first_step_in_closed_form():
    lr, beta1, beta2, tau = 0.1, 0.9, 0.99, 1e-3
    path = rounds(FedAdam(lr=lr, beta1=beta1, beta2=beta2, tau=tau), 1)
    delta = 0.5 * (OPTIMUM - START)
    expected = lr * (1 - beta1) * delta / ((beta2 * tau**2 + (1 - beta2) * delta**2).sqrt() + tau)
    near(path[1] - path[0], expected, 1e-13)


def test_fedadam_of_a_constant_update_in_closed_form():
    # m = (1 - beta1^t) d and v = beta2^t tau^2 + (1 - beta2^t) d^2: without correction for their start.
    lr, beta1, beta2, tau = 0.02, 0.8, 0.95, 0.01
    optimizer = FedAdam(lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    x, d = torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, -0.1, 1e-3, 0.0], dtype=torch.float64)
    for t in range(1, 120):
        new = optimizer.step({X: x}, {X: x + d})[X]
        expected = lr * (1 - beta1**t) * d / ((beta2**t * tau**2 + (1 - beta2**t) * d**2).sqrt() + tau)
        near(new - x, expected, 1e-11)
        x = new
    near((new - (x - expected))[:2], lr * torch.sign(d[:2]), 0.1)  # large updates move by lr, whatever their size


def test_fedadam_ends_at_the_weighted_optimum():
    path = rounds(FedAdam(lr=0.05, beta1=0.9, beta2=0.99, tau=0.1), 3000)
    near(path[-1], OPTIMUM, 1e-9)


def test_fedadam_with_a_large_tau_is_damped_fedavg():
    # Far below tau, updates leave v = beta2^t tau^2, and a step is lr * delta / (tau * (1 + beta2^(t/2))).
    t = torch.arange(1, 21, dtype=torch.float64)
    factors = torch.cumprod(1 - 0.5 * 1.6 / (1 + 0.99 ** (t / 2)), dim=0)[:, None]
    path = rounds(FedAdam(lr=1.6e8, beta1=0, beta2=0.99, tau=1e8), 20)
    near(path[1:] - OPTIMUM, (START - OPTIMUM) * factors)


@pytest.mark.parametrize("optimizer", [FedAvg(), FedAvgM(lr=2, momentum=0.9),
                                       FedAdam(lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3)])
def test_running_averages_always_become_the_mean_and_networks_at_rest_stay(optimizer):
    averages = {"G.mapping.w_avg", "G_ema.mapping.w_avg", "G_ema.mapping.fc0.weight", "G_ema.x"}
    current = {name: torch.randn(20) for name in [*averages, X, "D.x"]}
    mean = {name: torch.randn(20) if name in averages else value.clone() for name, value in current.items()}
    before = {name: value.clone() for name, value in current.items()}
    for _ in range(3):
        found = optimizer.step(current, mean)
        assert all(torch.equal(found[name], mean[name]) for name in mean)
    assert all(torch.equal(current[name], value) for name, value in before.items())


def drawn_run(optimizer, count, *, seed, start):
    """Step through random means of float32 tensors, as the sites would send."""
    rng = torch.Generator().manual_seed(seed)
    state = start
    for _ in range(count):
        mean = {name: value + 0.01 * torch.randn(value.shape, generator=rng) for name, value in state.items()}
        state = optimizer.step(state, mean)
    return state


@pytest.mark.parametrize("kind", ["fedavg", "fedavgm", "fedadam"])
def test_state_through_a_file_continues_bit_for_bit(tmp_path, kind):
    settings = federation(server_optimizer=kind, server_lr=0.7)
    start = {"G.x": torch.randn(3, 4), "D.x": torch.randn(()), "G_ema.x": torch.randn(3, 4)}
    unbroken = make_server_optimizer(settings)
    middle = drawn_run(unbroken, 4, seed=0, start=start)
    write_checkpoint(tmp_path / "state.pt", {"optimizer": unbroken.state_dict(), "tensors": middle})
    expected = drawn_run(unbroken, 3, seed=1, start=middle)
    saved = read_checkpoint(tmp_path / "state.pt")
    continued = make_server_optimizer(settings)
    continued.load_state_dict(saved["optimizer"])
    found = drawn_run(continued, 3, seed=1, start=saved["tensors"])
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for moment, values in unbroken.state_dict().items():
        assert all(torch.equal(continued.state_dict()[moment][name], value) for name, value in values.items())


def test_state_that_was_returned_does_not_change_with_the_next_step():
    optimizer = FedAvgM(lr=1, momentum=0.5)
    optimizer.step({X: torch.zeros(2)}, {X: torch.ones(2)})
    saved = optimizer.state_dict()
    optimizer.step({X: torch.zeros(2)}, {X: torch.ones(2)})
    assert saved["v"][X].tolist() == [1, 1]
    assert optimizer.state_dict()["v"][X].tolist() == [1.5, 1.5]


@pytest.mark.parametrize(("optimizer", "saved", "message"), [
    (FedAvg(), {"v": {}}, "the state of the server optimizer has the moments v; expected none"),
    (FedAvgM(lr=1, momentum=0.9), {}, "the state of the server optimizer has the moments (none); expected v"),
    (FedAdam(lr=1, beta1=0, beta2=0, tau=1), {"v": {}},
     "the state of the server optimizer has the moments v; expected m, v"),
])
def test_state_of_another_optimizer_is_refused(optimizer, saved, message):
    with pytest.raises(ValueError) as refused:
        optimizer.load_state_dict(saved)
    assert str(refused.value) == message


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, FedAvg()),
    ({"server_optimizer": "fedavgm", "server_lr": 0.5, "server_momentum": 0.7}, FedAvgM(lr=0.5, momentum=0.7)),
    ({"server_optimizer": "fedadam", "server_lr": 0.5, "server_momentum": 0.7, "server_beta2": 0.8, "server_tau": 0.01},
     FedAdam(lr=0.5, beta1=0.7, beta2=0.8, tau=0.01)),
])
def test_optimizer_of_the_settings_steps_as_that_of_its_name(settings, expected):
    made = make_server_optimizer(federation(**settings))
    assert type(made) is type(expected)
    assert torch.equal(rounds(made, 5), rounds(expected, 5))
