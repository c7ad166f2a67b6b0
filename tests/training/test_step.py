"""One training iteration: what changes when, and what must not."""

import copy
import dataclasses
import re

import pytest
import torch

from tests.helpers.small_networks import ada_config, random_labels, small_config, small_inputs, small_state
from training import loss as losses
from training.augment import AugmentPipe
from training.loss import path_lengths
from training.phases import PHASES, PhaseInputs, StepInputs, active_phases, draw_phases
from training.sampling import LabelDistribution
from training.step import GradientSum, train_step


def snapshot(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def moved(before, network):
    return {name for name, tensor in network.state_dict().items() if not torch.equal(before[name], tensor)}


def only(inputs, **changes):
    """Return inputs with the named fields of every phase replaced."""
    phases = {name: dataclasses.replace(phase, **changes) for name, phase in inputs.phases.items()}
    return dataclasses.replace(inputs, phases=phases)


def test_step_runs_phases_lazily_and_counts():
    config = small_config(g_reg_interval=2, d_reg_interval=3)
    state = small_state(config)
    ran = [list(train_step(state, small_inputs(state, config), config).stats) for _ in range(4)]
    assert ran == [["Gmain", "Greg", "Dmain", "Dreg"], ["Gmain", "Dmain"], ["Gmain", "Greg", "Dmain"],
                   ["Gmain", "Dmain", "Dreg"]]
    assert (state.iteration, state.nimg) == (4, 32)


@pytest.mark.parametrize(("changes", "missing"), [({"pl_weight": 0}, "Greg"), ({"gamma": 0}, "Dreg")])
def test_step_without_a_regularizer_leaves_its_phase_out(changes, missing):
    config = small_config(**changes)
    assert active_phases(0, config.loss) == [phase for phase in PHASES if phase != missing]


def test_step_reports_one_value_per_image_under_the_names_of_the_dashboards():
    config = small_config(micro_batch=4)
    state = small_state(config)
    stats = train_step(state, small_inputs(state, config), config).stats
    assert {phase: {name: len(values) for name, values in named.items()} for phase, named in stats.items()} == {
        "Gmain": {"Loss/scores/fake": 8, "Loss/signs/fake": 8, "Loss/G/loss": 8},
        "Greg": {"Loss/pl_penalty": 4, "Loss/G/reg": 4},
        "Dmain": {"Loss/scores/fake": 8, "Loss/signs/fake": 8, "Loss/scores/real": 8, "Loss/signs/real": 8,
                  "Loss/D/loss": 8},
        "Dreg": {"Loss/scores/real": 8, "Loss/signs/real": 8, "Loss/r1_penalty": 8, "Loss/D/reg": 8}}
    torch.testing.assert_close(stats["Greg"]["Loss/G/reg"], 2 * stats["Greg"]["Loss/pl_penalty"])
    torch.testing.assert_close(stats["Dreg"]["Loss/D/reg"], 0.25 * stats["Dreg"]["Loss/r1_penalty"])


def test_step_moves_every_parameter_and_leaves_no_gradient():
    config = small_config()
    state = small_state(config)
    before = {name: snapshot(getattr(state, name)) for name in ("G", "D", "G_ema")}
    train_step(state, small_inputs(state, config), config)
    for name in ("G", "D", "G_ema"):
        network = getattr(state, name)
        assert moved(before[name], network) >= {key for key, _ in network.named_parameters()}, name
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_step_accumulates_micro_batches_as_sums_of_their_gradients():
    # Without batch statistics and regularizers, two micro-batches make twice one batch's mean gradient.
    def run(micro_batch):
        config = small_config(micro_batch=micro_batch, pl_weight=0, gamma=0, style_mixing_prob=0)
        state = small_state(config, dtype=torch.float64)
        state.D.b4.mbstd.group_size = 1
        whole = dataclasses.replace(config, micro_batch=8)
        inputs = only(small_inputs(state, whole), mix_z=None, seeds=(), z=torch.randn(
            8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, noise_mode="const"))
        train_step(state, inputs, config)
        return {name: state.g_adam.state[p]["exp_avg_sq"] for name, p in state.G.named_parameters()}

    one, two = run(8), run(4)
    for name, square in one.items():
        assert square.abs().sum() > 0, name
        torch.testing.assert_close(two[name], 4 * square, rtol=1e-9, atol=0)


def test_step_style_mixing_takes_later_layers_from_the_second_latents():
    config = small_config(batch=4, micro_batch=4, noise_mode="const")
    state = small_state(config)
    captured = []
    state.G.synthesis.register_forward_pre_hook(lambda module, args: captured.append(args[0].detach().clone()))
    inputs = only(small_inputs(state, config), mix_cutoffs=[2])
    z, mix_z, c = (getattr(inputs.phases["Gmain"], name) for name in ("z", "mix_z", "c"))
    first, second = (state.G.mapping(value, c, skip_w_avg_update=True) for value in (z, mix_z))
    train_step(state, inputs, config)
    torch.testing.assert_close(captured[0], torch.cat([first[:, :2], second[:, 2:]], dim=1))


def test_step_w_avg_follows_first_latents_in_every_phase():
    config = small_config(batch=4, micro_batch=4, d_reg_interval=1)
    state = small_state(config)
    expected = state.G.mapping.w_avg.clone()
    calls = []
    state.G.mapping.register_forward_hook(lambda module, args, output: calls.append(output[:, 0].detach()))
    train_step(state, only(small_inputs(state, config), mix_cutoffs=[1]), config)
    assert [len(w) for w in calls] == [8, 4, 8]  # Gmain, Greg, Dmain: the first latents, then those of mixing
    for w in calls:
        expected = torch.lerp(w.chunk(2)[0].mean(0), expected, 0.995)
    torch.testing.assert_close(state.G.mapping.w_avg, expected)


def test_step_running_means_move_once_a_phase_by_all_micro_batches(monkeypatch):
    # P micro-batches do what P processes do that average their means.
    config = small_config(batch=8, micro_batch=4, noise_mode="const")
    state = small_state(config)
    state.pl_mean.fill_(0.3)
    w_avg, calls, lengths = state.G.mapping.w_avg.clone(), [], []
    state.G.mapping.register_forward_hook(lambda module, args, output: calls.append(output[:, 0].detach()))
    monkeypatch.setattr(losses, "path_lengths", lambda *args, **kwargs: lengths.append(
        path_lengths(*args, **kwargs)) or lengths[-1])
    result = train_step(state, only(small_inputs(state, config), mix_z=None, seeds=()), config)
    lengths[:] = [length.detach() for length in lengths]
    for first, second in zip(calls[::2], calls[1::2]):
        w_avg = torch.lerp(torch.cat([first, second]).mean(0), w_avg, 0.995)
    torch.testing.assert_close(state.G.mapping.w_avg, w_avg)
    whole = torch.lerp(torch.tensor(0.3), torch.stack(lengths).mean(), 0.01)
    torch.testing.assert_close(state.pl_mean, whole)
    expected = [(length - torch.lerp(torch.tensor(0.3), length.mean(), 0.01)).square() for length in lengths]
    torch.testing.assert_close(result.stats["Greg"]["Loss/pl_penalty"], torch.cat(expected))


def test_step_skipped_phase_leaves_w_avg_alone():
    config = small_config(pl_weight=0, gamma=0)
    state = small_state(config)
    inputs = small_inputs(state, config)
    inputs.phases["Gmain"].z[0] = float("nan")
    result = train_step(state, inputs, config)
    assert set(result.skipped) == {"Gmain"}
    assert torch.isfinite(state.G.mapping.w_avg).all()
    assert torch.isfinite(state.G_ema.mapping.w_avg).all()


def adam_of(values, device, dtype=torch.float32):
    """Return a fused Adam as TrainingState makes it, of one matrix and one vector."""
    parameters = [torch.nn.Parameter(value.to(device, dtype, copy=True)) for value in values]
    return torch.optim.Adam(parameters, lr=0.1, betas=(0.0, 0.9), eps=1e-8, fused=True), parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_pytorch_still_honors_the_undocumented_found_inf_of_a_fused_adam(device, dtype):
    """`train_step` skips steps with it. If this fails, a new PyTorch needs another way."""
    rng = torch.Generator().manual_seed(0)
    values, *gradients = ([torch.randn(5, 3, generator=rng), torch.randn(7, generator=rng)] for _ in range(4))
    adam, parameters = adam_of(values, device, dtype)

    def step(some, found_inf):
        for parameter, gradient in zip(parameters, some):
            parameter.grad = gradient.to(device, dtype)
        if found_inf is not None:
            adam.found_inf = torch.tensor(found_inf, device=device)
        adam.step()

    def everything():
        return [tensor.clone() for parameter in parameters
                for tensor in (parameter.detach(), *(adam.state[parameter][name]
                                                     for name in ("step", "exp_avg", "exp_avg_sq")))]

    step(gradients[0], 0.0)
    before = everything()
    assert not torch.equal(before[0], values[0].to(device, dtype)), "found_inf = 0 has to let Adam take its step"
    for odd in (gradients[1], [torch.full_like(value, torch.nan) for value in values],
                [torch.full_like(value, torch.inf) for value in values]):
        step(odd, 1.0)
        for now, then in zip(everything(), before):
            assert torch.equal(now, then), f"PyTorch {torch.__version__} takes a step although found_inf is 1"
    step(gradients[2], 0.0)
    after = everything()

    adam, parameters = adam_of(values, device, dtype)  # as if the skipped steps had never been, nor been counted
    step(gradients[0], None)
    step(gradients[2], None)
    for now, then in zip(after, everything()):
        assert torch.equal(now, then)


def test_pytorch_still_starts_a_fused_adam_with_a_step_that_found_inf_leaves_out():
    values = [torch.ones(4)]
    adam, (parameter,) = adam_of(values, "cpu")
    parameter.grad, adam.found_inf = torch.full((4,), torch.nan), torch.ones([])
    adam.step()
    assert torch.equal(parameter.detach(), values[0])
    assert [adam.state[parameter][name].abs().sum().item() for name in ("step", "exp_avg", "exp_avg_sq")] == [0, 0, 0]


def test_step_path_lengths_take_half_the_micro_batch_and_update_the_mean():
    config = small_config(batch=8, micro_batch=4)
    state = small_state(config)
    counts = []
    state.G.synthesis.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    train_step(state, small_inputs(state, config), config)
    assert counts == [4, 4, 2, 2, 4, 4]  # Gmain, Greg, Dmain
    assert state.pl_mean > 0


def test_step_with_one_image_regularizes_on_it():
    config = small_config(batch=1, micro_batch=1)
    state = small_state(config)
    result = train_step(state, small_inputs(state, config), config)
    assert len(result.stats["Greg"]["Loss/pl_penalty"]) == 1
    assert not result.skipped


def test_step_equal_inputs_give_bit_equal_states():
    config = small_config(ada=ada_config())
    states = []
    for _ in range(2):
        pipe = AugmentPipe(xflip=1, rotate=1, hue=1, noise=1)
        pipe.p.fill_(0.5)
        state = small_state(config, augment=pipe)
        for _ in range(3):
            torch.rand(5)  # the default generator must not matter
            train_step(state, small_inputs(state, config), config)
        states.append(state)
    for name, tensor in states[0].G_ema.state_dict().items():
        assert torch.equal(states[1].G_ema.state_dict()[name], tensor), name
    assert torch.equal(states[0].pl_mean, states[1].pl_mean)


def test_step_augments_reals_and_fakes_before_the_discriminator():
    class Blank(AugmentPipe):
        def forward(self, images, debug_percentile=None, **generators):
            return images * 0

    config = small_config()
    state = small_state(config, augment=Blank(xflip=1))
    seen = []
    state.D.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max().item()))
    train_step(state, small_inputs(state, config), config)
    assert seen == [0.0] * 4  # Gmain, Dmain twice, Dreg


@pytest.mark.parametrize(("bias", "direction"), [(50.0, 1), (-50.0, -1)])
def test_step_moves_p_with_the_signs_of_main_and_regularization(bias, direction):
    config = small_config(batch=8, ada=ada_config(interval=2, kimg=0.16), d_reg_interval=2)
    pipe = AugmentPipe(brightness=1)
    pipe.p.fill_(0.5)
    state = small_state(config, augment=pipe, c_dim=0)
    with torch.no_grad():
        state.D.b4.out.bias.fill_(bias)
    train_step(state, small_inputs(state, config, c_dim=2), config)
    assert state.ada_signs.tolist() == [16.0 * direction, 16.0]  # Dmain and Dreg, 8 reals each
    assert pipe.p.item() == 0.5
    train_step(state, small_inputs(state, config, c_dim=2), config)
    assert pipe.p.item() == pytest.approx(0.5 + direction * 8 * 2 / 160)
    assert state.ada_signs.tolist() == [0.0, 0.0]


def test_step_with_fixed_p_leaves_it_alone():
    config = small_config(ada=None)
    pipe = AugmentPipe(brightness=1)
    pipe.p.fill_(0.3)
    state = small_state(config, augment=pipe)
    for _ in range(4):
        train_step(state, small_inputs(state, config), config)
    assert pipe.p.item() == pytest.approx(0.3)


def test_step_non_finite_gradients_skip_the_phase_and_are_named():
    config = small_config()
    state = small_state(config)
    inputs = small_inputs(state, config)
    inputs.reals[0] = float("nan")
    before = snapshot(state.D)
    result = train_step(state, inputs, config)
    assert set(result.skipped) == {"Dmain", "Dreg"}
    assert "b16.fromrgb.weight" in result.skipped["Dmain"]
    assert moved(before, state.D) == set()
    assert state.ada_signs.tolist() == [0.0, 0.0]
    assert all(torch.isfinite(tensor).all() for tensor in state.G.state_dict().values())
    assert not train_step(state, small_inputs(state, config), config).skipped


def test_step_non_finite_path_length_keeps_the_running_mean():
    config = small_config()
    state = small_state(config)
    state.pl_mean.fill_(0.25)
    inputs = small_inputs(state, config)
    inputs.phases["Greg"].pl_noise[0] = float("inf")
    result = train_step(state, inputs, config)
    assert set(result.skipped) == {"Greg"}
    assert state.pl_mean.item() == 0.25


def test_step_average_starts_as_a_copy_and_takes_buffers_along():
    config = small_config()
    state = small_state(config)
    train_step(state, small_inputs(state, config), config)
    assert moved(snapshot(state.G), state.G_ema) == set()  # nimg was 0: ramp-up forgets everything
    train_step(state, small_inputs(state, config), config)
    difference = moved(snapshot(state.G), state.G_ema)
    assert difference == {name for name, _ in state.G.named_parameters()}


def test_step_frozen_layers_stay():
    config = small_config()
    state = small_state(config)
    frozen = copy.deepcopy(state.D.b16.conv0)
    del state.D.b16.conv0.weight
    state.D.b16.conv0.register_buffer("weight", frozen.weight.detach().clone())
    train_step(state, small_inputs(state, config), config)
    assert torch.equal(state.D.b16.conv0.weight, frozen.weight)


@pytest.mark.parametrize(("change", "message"), [
    (lambda inputs: dataclasses.replace(inputs, phases={"Gmain": inputs.phases["Gmain"]}),
     "iteration 0 runs phase Greg; expected inputs for it"),
    (lambda inputs: dataclasses.replace(inputs, reals=inputs.reals[:6], labels=inputs.labels[:6]),
     "a step got 6 images; expected a multiple of micro_batch, 8"),
    (lambda inputs: only(inputs, z=torch.zeros(4, 8)), "Gmain: z has 4 rows; expected 8"),
    (lambda inputs: dataclasses.replace(inputs, phases={**inputs.phases, "Greg": dataclasses.replace(
        inputs.phases["Greg"], pl_noise=None)}), "Greg: pl_noise is missing; expected 4 rows"),
    (lambda inputs: dataclasses.replace(inputs, phases={**inputs.phases, "Greg": dataclasses.replace(
        inputs.phases["Greg"], pl_noise=torch.zeros(8, 3, 16, 16))}),
     "Greg: pl_noise has 8 rows; expected 4"),
    (lambda inputs: dataclasses.replace(inputs, labels=inputs.labels[:1]), "Gmain: labels has 1 rows; expected 8"),
    (lambda inputs: dataclasses.replace(inputs, reals=inputs.reals[:0]),
     "a step got 0 images; expected a multiple of micro_batch, 8"),
    (lambda inputs: only(inputs, mix_cutoffs=[0]), "Gmain: mix_cutoffs are [0]; expected 1 from 1 to 6"),
    (lambda inputs: only(inputs, mix_cutoffs=[]), "Gmain: mix_cutoffs are []; expected 1 from 1 to 6"),
    (lambda inputs: only(inputs, seeds=()),
     "Gmain: there are 0 seeds; expected 1, for layer noise and augmentation"),
])
def test_step_refuses_inputs_that_do_not_fit(change, message):
    config = small_config()
    state = small_state(config)
    before = {name: snapshot(getattr(state, name)) for name in ("G", "D", "G_ema")}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_step(state, change(small_inputs(state, config)), config)
    assert all(moved(before[name], getattr(state, name)) == set() for name in before)
    assert not any(p.requires_grad for network in (state.G, state.D) for p in network.parameters())


def test_draw_phases_depends_on_micro_batch_not_on_process():
    config = small_config(batch=16, micro_batch=4)
    state = small_state(config)
    everything = small_inputs(state, config)
    parts = [small_inputs(state, config, microbatches=range(start, start + 2)) for start in (0, 2)]
    assert torch.equal(torch.cat([part.reals for part in parts]), everything.reals)
    for phase, whole in everything.phases.items():
        for name in ("z", "c", "mix_z", "pl_noise"):
            value = getattr(whole, name)
            if value is not None:
                joined = torch.cat([getattr(part.phases[phase], name) for part in parts])
                assert torch.equal(joined, value), (phase, name)
        assert [seed for part in parts for seed in part.phases[phase].seeds] == list(whole.seeds)


def test_draw_phases_phases_and_iterations_are_independent():
    config = small_config()
    state = small_state(config)
    inputs = small_inputs(state, config)
    assert not torch.equal(inputs.phases["Gmain"].z, inputs.phases["Dmain"].z)
    state.nimg += 8
    assert not torch.equal(inputs.phases["Gmain"].z, small_inputs(state, config).phases["Gmain"].z)


def test_draw_phases_mixes_as_often_as_asked_at_every_layer():
    config = small_config(batch=4000, micro_batch=2, style_mixing_prob=0.75, pl_weight=0, gamma=0)
    state = small_state(config)
    cutoffs = torch.tensor(small_inputs(state, config).phases["Gmain"].mix_cutoffs)
    num_ws = state.G.num_ws  # 6: crossovers at 1..5
    mixed = (cutoffs < num_ws).float().mean().item()
    assert abs(mixed - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5  # four standard errors
    shares = torch.bincount(cutoffs, minlength=num_ws + 1)[1:num_ws] / (cutoffs < num_ws).sum()
    assert (shares - 0.2).abs().max() < 4 * (0.2 * 0.8 / 1500) ** 0.5


def test_draw_phases_labels_follow_the_training_set():
    config = small_config(batch=4000, micro_batch=4000, pl_weight=0, gamma=0)
    table = random_labels(10)
    table[:] = torch.tensor([1.0, 0.0])
    table[0] = torch.tensor([0.0, 1.0])
    phases = draw_phases(config, seed=0, nimg=0, iteration=0, microbatches=range(1), z_dim=4, num_ws=6,
                         label_law=LabelDistribution(table), image_shape=(3, 8, 8))
    assert abs(phases["Gmain"].c[:, 1].mean().item() - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5


def test_phase_inputs_need_no_optional_parts():
    config = small_config(style_mixing_prob=0, noise_mode="none")
    state = small_state(config)
    inputs = small_inputs(state, config)
    bare = {name: PhaseInputs(z=phase.z, c=phase.c, pl_noise=phase.pl_noise) for name, phase in inputs.phases.items()}
    bare["Dreg"] = PhaseInputs()
    result = train_step(state, StepInputs(reals=inputs.reals, labels=inputs.labels, phases=bare), config)
    assert not result.skipped


def summed(losses, parameters):
    gradients = GradientSum(parameters)
    for loss in losses():
        gradients.add(loss)
    gradients.hand_over()
    return [parameter.grad for parameter in parameters]


def accumulated(losses, parameters):
    for parameter in parameters:
        parameter.grad = None
    for loss in losses():
        loss.backward()
    return [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sums_are_those_of_backward(count):
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    # One gradient for both, one without memory of its own, one in another layout, and none at all.
    first, second, spread, turned, unused = (torch.randn(size, requires_grad=True) for size in
                                             ((5, 6), (5, 6), (6,), (6, 5), (2,)))
    parameters = [weight, first, second, spread, turned, unused]
    x = torch.randn(2, 3, 5, 5)

    def losses():
        for i in range(count):
            total = (first + second + turned.T).exp().sum() * (i + 1)
            yield total + spread.sum() + torch.nn.functional.conv2d(x, weight).square().mean()

    expected = accumulated(losses, parameters)
    found = summed(losses, parameters)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert [a.stride() for a in found] == [parameter.stride() for parameter in parameters]
    assert len({gradient.data_ptr() for gradient in found}) == len(parameters)


def test_sum_leaves_other_leaves_without_gradient_and_lets_go_of_the_graph():
    weight, images = (torch.randn(3, requires_grad=True) for _ in range(2))
    loss = (weight * images).square().sum()
    gradients = GradientSum([weight])
    gradients.add(loss)
    assert (images.grad, weight.grad) == (None, None)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
